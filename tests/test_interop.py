"""Data sets and samplers in loops of others: torch's loader, Lightning, Hugging Face's Trainer.

The slow ones need `pip install lightning transformers accelerate`.
"""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms.functional import pil_to_tensor

from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.augmentation import Augmentation
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import AugmentedDataset, EpochBatchSampler, hold_out, train_loader

KNOBS = dict(classes=3, instances=4, size=256, start_range=20)
IMAGES = open_dataset('rcdb', **KNOBS)
AUGMENT = train_transform(Augmentation(img_size=32, scale=(0.5, 1.0), prefetcher=False))


@pytest.fixture(params=['formula', 'digits', 'folder', 'part'])
def images(request, tmp_path):
    if request.param == 'folder':
        for i in range(6):
            path = tmp_path / 'train' / 'ab'[i // 3] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            IMAGES[i][0].save(path)
        return open_dataset(str(tmp_path), transform=pil_to_tensor)
    if request.param == 'part':
        return hold_out(open_dataset('rcdb', transform=pil_to_tensor, **KNOBS), 0.5)[0]
    knobs = KNOBS if request.param == 'formula' else {}
    return open_dataset('rcdb' if knobs else 'digits', transform=pil_to_tensor, **knobs)


def test_what_torchvision_users_expect(images):
    n = len(images)
    assert images.targets == [images.label(i) for i in range(n)]
    assert sorted(images.class_to_idx.values()) == list(range(len(images.classes)))
    last, label = images[-1]
    assert torch.equal(last, images[n - 1][0]) and label == images.targets[-1]
    assert isinstance(images[np.int64(0)][0], torch.Tensor)
    with pytest.raises(IndexError, match=f'image {n} is not in 0 … {n - 1}'):
        images[n]
    with pytest.raises(TypeError, match=r'slice\(0, 2, None\).*Subset'):
        images[0:2]
    x, _ = next(iter(DataLoader(images, 2)))
    assert x.shape[0] == 2
    assert sum(1 for _ in images) == n  # Python's loop ends


def loader(workers=0):
    batches = EpochBatchSampler(len(IMAGES), 4, seed=1)
    return DataLoader(
        AugmentedDataset(IMAGES, AUGMENT, 1), batch_sampler=batches, num_workers=workers
    )


def test_epochs_are_counted_or_set():
    counted, asked = loader(), loader()
    assert isinstance(counted.batch_sampler, BatchSampler)
    epochs = [list(counted) for _ in range(2)]
    own = train_loader(IMAGES, AUGMENT, EpochBatchSampler(len(IMAGES), 4, seed=1))
    for epoch in range(2):
        asked.batch_sampler.sampler.set_epoch(epoch)  # where Lightning looks
        for (x, y), (x1, y1), (x2, y2) in zip(epochs[epoch], asked, own, strict=True):
            assert torch.equal(x, x1) and torch.equal(x, x2)
            assert torch.equal(y, y1) and torch.equal(y, y2)
    own.set_epoch(0)
    assert torch.equal(next(iter(own))[0], epochs[0][0][0])


def order_and_pictures(epochs):
    "(labels of each epoch, is every picture of the second new?)"
    sums = [{round(float(x.double().sum()), 6) for b, _ in epoch for x in b} for epoch in epochs]
    return [torch.cat([y for _, y in epoch]).tolist() for epoch in epochs], not sums[0] & sums[1]


def check_two_epochs(seen):
    labels, new = order_and_pictures(seen)
    assert sorted(labels[0]) == sorted(labels[1]) and labels[0] != labels[1] and new
    for epoch, batches in enumerate(seen):
        again = loader()
        again.batch_sampler.set_epoch(epoch)
        for (x, _), (x1, _) in zip(batches, again, strict=True):
            assert torch.equal(x, x1)


def test_two_epochs_differ_in_order_and_augmentation():
    one = loader()
    check_two_epochs([list(one) for _ in range(2)])


@pytest.mark.slow
def test_lightning(tmp_path):
    lightning = pytest.importorskip('lightning')

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(3 * 32 * 32, 3), [[], []]

        def training_step(self, batch, _):
            x, y = batch
            self.seen[self.current_epoch].append((x.clone(), y.clone()))
            return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = dict(
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer = lightning.Trainer(max_epochs=2, accelerator='cpu', default_root_dir=tmp_path, **quiet)
    trainer.fit(model, loader())
    check_two_epochs(model.seen)


@pytest.mark.slow
def test_lightning_does_not_replace_the_order_silently():
    "Among several processes it puts a sampler of its own in; here it has to say that it cannot."
    pytest.importorskip('lightning')
    from lightning.fabric.utilities.data import _update_dataloader
    from torch.utils.data import SequentialSampler

    with pytest.raises(TypeError, match='orders images itself; in Lightning set use_distributed'):
        _update_dataloader(loader(), SequentialSampler(range(12)))


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    seen = [[], []]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 32 * 32, 3)

        def forward(self, pixel_values, labels):
            step = sum(map(len, seen))
            seen[step // 3].append((pixel_values.clone(), labels.clone()))
            logits = self.layer(pixel_values.flatten(1))
            return dict(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)

    def collate(rows):
        images, labels = zip(*rows)
        return dict(pixel_values=torch.stack(images), labels=torch.tensor(labels))

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            mine = loader()
            made = DataLoader(mine.dataset, batch_sampler=mine.batch_sampler, collate_fn=collate)
            return self.accelerator.prepare(made)

    settings = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        use_cpu=True,
        report_to=[],
        save_strategy='no',
        disable_tqdm=True,
        logging_strategy='no',
    )
    Trainer(Model(), settings, train_dataset=IMAGES).train()
    check_two_epochs(seen)
