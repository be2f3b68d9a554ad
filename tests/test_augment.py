"""What is done to a batch after its images were cut: by timm's order, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup
from timm.data.loader import PrefetchLoader

from fdsl_nb.core.rng import ERASE, MIX, seed_for
from fdsl_nb.data.augment import BatchFinisher, mixer, train_transform
from fdsl_nb.data.augmentation import Augmentation, Mixing
from fdsl_nb.data.loading import seeded


@pytest.mark.parametrize('mode', ('batch', 'pair', 'elem'))
@pytest.mark.parametrize('alphas', ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)))
def test_batches_of_bytes_are_finished_as_timms_prefetching_loader_does(mode, alphas):
    mixup, cutmix = alphas
    a = Augmentation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), prefetcher=True)
    chance = np.random.default_rng(3)
    images = chance.integers(0, 256, (8, 3, 40, 40), dtype=np.uint8)
    labels = chance.integers(0, 5, 8)
    collate = FastCollateMixup(mixup, cutmix, mode=mode, label_smoothing=0.1, num_classes=5)
    mix = mixer(Mixing(mixup, cutmix, mixup_mode=mode, smoothing=0.1), classes=5, seed=7)
    with seeded(seed_for(7, MIX, 11, 0)):
        batch = collate([*zip(images.copy(), labels)])
    device = torch.device('cpu')
    prefetched = PrefetchLoader([batch], a.mean, a.std, device=device, re_prob=1.0, re_mode='pixel')
    with seeded(seed_for(7, ERASE, 11, 0)):
        ((theirs, their_labels),) = prefetched
    finish = BatchFinisher(replace(a, reprob=1.0), mix, seed=7)
    ours, our_labels = finish(torch.from_numpy(images), torch.from_numpy(labels), step=11)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_labels, their_labels)


def test_transforms_for_the_prefetcher_end_in_bytes():
    a = Augmentation(img_size=32, aa='', color_jitter=0.0, reprob=0.0)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    )
    with seeded(1):
        floats = train_transform(a)(picture)
    with seeded(1):
        pixels = train_transform(replace(a, prefetcher=True))(picture)
    assert pixels.dtype == torch.uint8
    finished, _ = BatchFinisher(a, None)(pixels[None], torch.tensor([0]), step=0)
    torch.testing.assert_close(finished[0], floats, rtol=0, atol=1e-6)
