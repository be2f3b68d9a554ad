"""Grey images in kernels: the tensors of timm, Pillow and torch, to the bit."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data.auto_augment import AugmentOp
from torchvision.transforms import Compose

from fdsl_nb.data import fast_augment
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.augmentation import Augmentation
from fdsl_nb.data.fast_augment import GreyTransform
from fdsl_nb.data.loading import seeded
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training.recipes import recipe

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FILLS = ((124, 116, 104), (128, 128, 128))
FAMILIES = ('rcdb', 'visualatom', 'fractaldb', 'ofdb2d', 'onepfrac', 'mvfractaldb', 'exfractaldb')
FAMILIES += ('ofdb3d',)


def drawn(name, size=64, count=4):
    f = formula(name, classes=2, size=size)
    if f.by_chance:
        chance = random.Random(0)
        return [f.random_view(k % 2, chance) for k in range(count)]
    return [f.render(k % 2, k % f.instances) for k in range(count)]


def awkward(size=56):
    "Images that no formula draws: noise, one colour, two colours, few values."
    chance = np.random.default_rng(0)
    noise = chance.integers(0, 256, (size, size), dtype=np.uint8)
    return [noise, noise * 0, noise * 0 + 77, (noise > 9) * np.uint8(255), noise // 30 + 100]


def pictures(size=224):
    return [*awkward(size), *drawn('rcdb', size), *drawn('visualatom', size)]


def coloured(image):
    return np.stack([image, np.roll(image, 3, 1), 255 - image], 2)


def kernel(op, image, seed):
    "What the kernel of a timm operation makes of an image [h, w, 3], and the next random number."
    fill = np.array(op.kwargs['fillcolor'], np.uint8)
    row = np.array(fast_augment._row(op))
    filter = fast_augment._filter(op.kwargs['resample'])
    state, found = fast_augment._seeded_state(np.array([seed], np.uint32)), np.empty(3)
    fast_augment._operation(state, np.zeros(2), row, filter, found)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    channels = 1 if (planes == planes[0]).all() else 3
    planes[channels:] = 0  # not looked at
    code, value, bicubic = int(found[0]), found[1], found[2] > 0
    channels = fast_augment._changed(planes, channels, code, value, bicubic, fill)
    after = fast_augment._random(state)
    planes = planes if channels == 3 else planes[:1].repeat(3, 0)
    return planes.transpose(1, 2, 0), after


@pytest.mark.parametrize('name', fast_augment._OPS)
def test_every_operation_gives_64_images_of_pillow(name):
    chance = np.random.default_rng(len(name))
    images = [*pictures(48), *awkward(33), *awkward(24)]
    changed = 0
    for seed in range(64):
        grey = images[seed % len(images)]
        image = coloured(grey) if seed % 3 == 2 else np.stack([grey] * 3, 2)
        level = dict(magnitude=int(chance.integers(11)))
        std = dict(magnitude_std=(0, 0.5, 3.0, float('inf'))[seed % 4])
        op = AugmentOp(name, 1.0, **level, hparams=dict(img_mean=FILLS[seed % 2], **std))
        random.seed(seed)
        wanted, after = np.asarray(op(Image.fromarray(image))), random.random()
        found, next_number = kernel(op, image, seed)
        assert np.array_equal(found, wanted), (seed, level, std)
        assert next_number == after
        changed += not np.array_equal(wanted, image)
    assert changed > 8 or 'Color' in name


@pytest.mark.parametrize('name', ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'))
@pytest.mark.parametrize('filter', (2, 3))
def test_positions_at_the_size_of_training(name, filter):
    hparams = dict(img_mean=FILLS[0], magnitude_std=3.0, interpolation=Image.Resampling(filter))
    op = AugmentOp(name, 1.0, 5, hparams=hparams)
    for seed, grey in enumerate(pictures(224)):
        image = np.stack([grey] * 3, 2)
        random.seed(seed)
        wanted = np.asarray(op(Image.fromarray(image)))
        assert np.array_equal(kernel(op, image, seed)[0], wanted), seed


SETTINGS = dict(
    published=Augmentation(img_size=64, prefetcher=True, **IMAGENET),
    normalised=Augmentation(img_size=64, **IMAGENET),
    plain=Augmentation(img_size=64, reprob=0.9, recount=3),
    ofdb=Augmentation(img_size=64, train_interpolation='bicubic', hflip=0.5, reprob=0.5),
    black=Augmentation(img_size=57, train_interpolation='bilinear', remode='const', reprob=0.9),
    colour=Augmentation(img_size=64, remode='rand', reprob=0.9, hflip=0.5, vflip=0.5, **IMAGENET),
    crops=Augmentation(img_size=96, aa='', color_jitter=0.0, reprob=0.0, scale=(0.8, 1.0)),
    strips=Augmentation(img_size=32, ratio=(3.0, 4.0), scale=(0.9, 1.0)),
    strong=Augmentation(img_size=64, aa='rand-m10-n4-p0.8-mstd101', **IMAGENET),
    decreasing=Augmentation(img_size=64, aa='rand-m7-n3-mstd1', prefetcher=True),
    large=Augmentation(img_size=224, hflip=0.5, **IMAGENET),
)


def generators():
    return random.random(), random.gauss(0, 1), np.random.random(), torch.rand(1).item()


@pytest.mark.parametrize('name', SETTINGS)
def test_whole_transforms_give_timms_tensors(name):
    ours, timms = train_transform(SETTINGS[name]), train_transform(SETTINGS[name], fast=False)
    assert ours.fast and type(timms) is Compose
    shapes = ((90, 130), (130, 90), (64, 64), (40, 300), (20, 17))
    chance = np.random.default_rng(1)
    images = [chance.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    images += [x for f in ('rcdb', 'visualatom') for x in drawn(f, 160, 2)]
    for seed in range(200):
        image = images[seed % len(images)]
        with seeded(seed):
            wanted, then = timms(Image.fromarray(image)), generators()
        with seeded(seed):
            found, and_then = ours(Image.fromarray(image)), generators()
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), seed
        assert and_then == then, 'the generators were left elsewhere'
        assert torch.equal(ours.from_seed(image, seed), wanted), seed


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_in_its_recipe(name):
    r = replace(recipe(dataset=name), img_size=64)
    ours, timms = train_transform(r), train_transform(r, fast=False)
    assert ours.fast
    images = drawn(name, 128)
    for seed in range(64):
        with seeded(seed):
            wanted = timms(Image.fromarray(images[seed % len(images)]))
        assert torch.equal(ours.from_seed(images[seed % len(images)], seed), wanted), seed


def test_seeds_of_every_length():
    ours = train_transform(SETTINGS['ofdb'])
    image = pictures(64)[5]
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1):
        with seeded(seed):
            wanted = ours(image)
        assert torch.equal(ours.from_seed(image, seed), wanted), seed


def test_threads_change_nothing():
    ours = train_transform(SETTINGS['colour'])
    images = pictures(64)
    alone = [ours.from_seed(images[i % len(images)], i) for i in range(96)]
    state = random.getstate()
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda i: ours.from_seed(images[i % len(images)], i), range(96)))
    assert all(map(torch.equal, alone, shared))
    assert random.getstate() == state, 'a global generator was used'


def test_threads_may_share_a_transform_that_was_not_compared_yet():
    images = [pictures(64)[0], coloured(pictures(64)[1])]  # the second one goes through timm
    known, fresh = train_transform(SETTINGS['colour']), train_transform(SETTINGS['colour'])
    alone = [known.from_seed(images[i % 2], i) for i in range(48)]
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda i: fresh.from_seed(images[i % 2], i), range(48)))
    assert fresh.fast and all(map(torch.equal, alone, shared))


def test_images_go_where_they_are_wanted():
    ours = train_transform(SETTINGS['published'])
    batch = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image = pictures(64)[5]
    assert ours.from_seed(image, 3, out=batch[1]).data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], ours.from_seed(image, 3)) and not batch[0].any()


@pytest.mark.parametrize('name', ('published', 'colour'))
def test_colour_and_other_modes_go_through_timm(name):
    ours, timms = train_transform(SETTINGS[name]), train_transform(SETTINGS[name], fast=False)
    grey = Image.fromarray(pictures(96)[0])
    for image in (Image.fromarray(coloured(pictures(96)[0])), grey.convert('P'), grey.convert('1')):
        with seeded(5):
            wanted = timms(image)
        with seeded(5):
            assert torch.equal(ours(image), wanted)
        assert torch.equal(ours.from_seed(image, 5), wanted)
    with seeded(5):
        wanted = timms(Image.fromarray(coloured(pictures(96)[0])))
    assert torch.equal(ours.from_seed(coloured(pictures(96)[0]), 5), wanted)


@pytest.mark.parametrize(
    'change',
    (
        dict(aa='3a'),
        dict(aa='original'),
        dict(aa='rand-m9-tweights'),
        dict(aa='rand-m9-mmax20'),
        dict(aa='', color_jitter=0.4),
        dict(train_crop_mode='random'),
        dict(train_interpolation='lanczos', aa=''),
        dict(train_interpolation='nearest'),
        dict(mean=(0.5,), std=(0.5,), aa=''),
    ),
    ids=str,
)
def test_what_is_unknown_goes_through_timm(change, capsys):
    a = Augmentation(img_size=48, **change)
    ours, timms = train_transform(a), train_transform(a, fast=False)
    image = Image.fromarray(pictures(64)[5])
    for seed in range(8):
        with seeded(seed):
            wanted = timms(image)
        with seeded(seed):
            assert torch.equal(ours(np.asarray(image)), wanted)
    assert not ours.fast or change.get('mean')
    assert not capsys.readouterr().err


def test_another_pillow_is_noticed(monkeypatch, capsys):
    "A Pillow that blends with another rounding: one line, and timm's tensors."
    enhance = ImageEnhance.Sharpness.enhance
    monkeypatch.setattr(ImageEnhance.Sharpness, 'enhance', lambda x, f: enhance(x, f + 0.05))
    ours = train_transform(SETTINGS['published'])
    image = Image.fromarray(pictures(64)[5])
    for seed in range(40):
        with seeded(seed):
            wanted = train_transform(SETTINGS['published'], fast=False)(image)
        with seeded(seed):
            assert torch.equal(ours(image), wanted)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'images go through timm' in said
    assert 'Sharpness' in said or 'draws' in said


@pytest.mark.parametrize('name', ('_weight', '_cubic'))
def test_another_rounding_of_positions_is_noticed(name, monkeypatch, capsys):
    resize, transform = Image.Image.resize, Image.Image.transform
    if name == '_weight':
        monkeypatch.setattr(
            Image.Image, 'resize', lambda x, *a, **k: resize(x, *a, **k).point(lambda v: v ^ 1)
        )
    else:
        monkeypatch.setattr(
            Image.Image,
            'transform',
            lambda x, *a, **k: transform(x, *a, **k).point(lambda v: v ^ 1),
        )
    assert not train_transform(SETTINGS['published']).fast
    assert capsys.readouterr().err.count('\n') == 1


def test_it_travels_to_a_worker_and_is_compared_there():
    ours = train_transform(SETTINGS['published'])
    assert ours.fast
    arrived = pickle.loads(pickle.dumps(ours))
    assert isinstance(arrived, GreyTransform) and arrived._agrees is None
    image = pictures(64)[5]
    assert torch.equal(arrived.from_seed(image, 9), ours.from_seed(image, 9))


def test_angles_are_rounded_as_python_does():
    chance = np.random.default_rng(4)
    values = np.concatenate([chance.uniform(-1, 1, 20000), chance.uniform(-1, 1, 2000) ** 9])
    for x in values.tolist():  # NumPy rounds its own numbers in another way
        assert fast_augment._rounded(x) == round(x, 15), x
    assert fast_augment._rounded(1.0) == 1.0 and fast_augment._rounded(0.0) == 0.0


def test_the_comparison_restores_the_generators():
    ours = copy(train_transform(SETTINGS['colour']))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = generators()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert ours.fast
    assert generators() == wanted
