"""Inception's transforms against plain NumPy on awkward sizes; reversed mixing by hand.

Random numbers depend on the address alone.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fdsl_nb.data.loading import AugmentedDataset, SampleIndex
from fdsl_nb.data.inception import (
    CentreView,
    InceptionView,
    SquashView,
    area_resize,
    beta,
    bilinear,
    crop_box,
    cutmix_masks,
    cutmix_reversed,
    mix_reversed,
    mixup_reversed,
    pixels_of,
    reversed_mixer,
)

FLOWER = Image.fromarray(load_sample_images().images[1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    'height, width', [(375, 500), (640, 427), (20, 500), (500, 20), (7, 5), (1, 1)]
)
def test_crops_keep_to_their_limits(height, width):
    boxes = np.array([crop_box(height, width, generator=seeded(s)) for s in range(300)])
    assert (
        (boxes[:, :2] >= 0).all()
        and (boxes[:, 2:] >= 1).all()
        and (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    )
    cut = boxes[(boxes[:, 2:] != (height, width)).any(1)]
    areas = cut[:, 2] * cut[:, 3] / (height * width)
    assert (areas >= 0.05).all() and (areas <= 1).all()
    assert (cut[:, 3] >= 0.75 * cut[:, 2] - 0.5).all() and (
        cut[:, 3] <= 1.33 * cut[:, 2] + 0.5
    ).all()
    if min(height, width) > 100:
        # heights are drawn evenly: with one shape, all that are possible come about equally often,
        # and no crop ends at the far edge
        heights = np.array(
            [crop_box(height, width, ratio=(1.0, 1.0), generator=seeded(s))[2] for s in range(1500)]
        )
        low, high = round((0.05 * height * width) ** 0.5), min(height, width)
        assert (
            heights.min() >= low
            and heights.max() == high
            and abs(heights.mean() - (low + high) / 2) < 0.05 * (high - low)
        )
        free = boxes[:, 2] < height
        assert (boxes[free, 0] + boxes[free, 2] < height).all() and (
            boxes[free, 0] == 0
        ).mean() < 0.1


def by_area(values, new):
    "Rows of weights by hand, in float64."
    old = len(values)
    out = np.zeros((new, *values.shape[1:]))
    for i in range(new):
        first, last = i * old / new, (i + 1) * old / new
        for j in range(int(first), min(old, int(np.ceil(last)))):
            out[i] += values[j] * (min(last, j + 1) - max(first, j)) * new / old
    return out


@pytest.mark.parametrize('size', [(50, 75), (256, 383), (500, 90), (1, 1)])
def test_resizing_by_area(size):
    small = FLOWER.resize((101, 67))
    expected = by_area(by_area(np.array(small, float), size[0]).swapaxes(0, 1), size[1]).swapaxes(
        0, 1
    )
    np.testing.assert_allclose(
        area_resize(pixels_of(small), *size).permute(1, 2, 0), expected, atol=2e-3
    )


def test_the_centre_of_published_size():
    for width, height in ((500, 375), (375, 500), (333, 1000), (256, 256), (64, 48)):
        image = FLOWER.resize((width, height))
        ratio = 256 / min(width, height)
        tall, wide = round(height * ratio), round(width * ratio)
        top, left = (tall - 224) // 2, (wide - 224) // 2
        expected = area_resize(pixels_of(image), tall, wide)[:, top : top + 224, left : left + 224]
        assert torch.equal(CentreView()(image), (expected - 127.5) / 127.5)


def test_no_averaging_when_shrinking():
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (60, 30)))
    assert bilinear(pixels_of(stripes), 60, 30).unique().tolist() == [
        127.5
    ]  # both neighbours of a place between
    assert bilinear(pixels_of(stripes), 60, 20).unique().tolist() == [
        0.0,
        255.0,
    ]  # every third pixel, and no other
    torch.testing.assert_close(
        area_resize(pixels_of(stripes), 3, 10), torch.full((3, 3, 10), 127.5)
    )


@pytest.mark.parametrize('view', [InceptionView(32), CentreView(32, 40), SquashView(32)])
def test_any_mode_of_picture(view):
    for mode in ('RGB', 'L', 'RGBA', 'P', 'CMYK'):
        with torch.random.fork_rng():
            x = view(FLOWER.convert(mode))
        assert (
            x.shape == (3, 32, 32) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1
        )


def test_chance_of_a_view_is_its_address():
    images = AugmentedDataset([(FLOWER, 0)] * 4, InceptionView(16), seed=2)
    a, b = images[SampleIndex(1, 3)][0], images[SampleIndex(1, 2)][0]
    torch.rand(5)
    assert torch.equal(images[SampleIndex(1, 3)][0], a) and not torch.equal(a, b)
    flips = [
        torch.equal(
            InceptionView(16, area=(1.0, 1.0), ratio=(1.5, 1.5), hflip=h, generator=seeded())(
                FLOWER
            ),
            SquashView(16)(FLOWER).flip(2),
        )
        for h in (0.0, 1.0)
    ]
    assert flips == [False, True]


def hand_mixed(images, targets, weights):
    back = slice(None, None, -1)
    w = weights.reshape(-1, 1)
    return images * w[..., None, None] + images[back] * (
        1 - w[..., None, None]
    ), targets * w + targets[back] * (1 - w)


def a_batch(n, classes=5):
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, 3, 6, 8)).astype(np.float32), (
        rng.random((n, classes)) < 0.4
    ).astype(np.float32)


@pytest.mark.parametrize('n', [1, 2, 7, 8])
def test_mixup_cutmix_and_both_by_hand(n):
    images, targets = a_batch(n)
    tensors = torch.from_numpy(images), torch.from_numpy(targets)

    weights = beta(0.8, n, seeded()).numpy()
    weights = np.maximum(weights, 1 - weights)
    found = mix_reversed(*tensors, mixup=0.8, generator=seeded())
    for a, b in zip(found, hand_mixed(images, targets, weights)):
        np.testing.assert_allclose(a, b, atol=1e-6)

    masks = cutmix_masks(n, 6, 8, 1.0, seeded()).numpy()
    for batch_area in (False, True):
        share = masks.mean((1, 2), keepdims=False)[:, None] if not batch_area else masks.mean()
        found = mix_reversed(*tensors, cutmix=1.0, generator=seeded(), batch_area=batch_area)
        np.testing.assert_array_equal(found[0], np.where(masks[:, None], images[::-1], images))
        np.testing.assert_allclose(
            found[1], targets * (1 - share) + targets[::-1] * share, atol=1e-6
        )

    half, g = n // 2, seeded()
    both = mix_reversed(*tensors, mixup=0.8, cutmix=1.0, generator=g)
    g = seeded()
    w = beta(0.8, half, g)
    first = mixup_reversed(tensors[0][:half], tensors[1][:half], torch.maximum(w, 1 - w))
    second = cutmix_reversed(
        tensors[0][half:], tensors[1][half:], cutmix_masks(n - half, 6, 8, 1.0, g)
    )
    for a, b, c in zip(both, first, second):
        assert torch.equal(a, torch.cat([b, c])) and len(a) == n


def test_an_image_stays_mainly_itself():
    weights = beta(0.2, 4000, seeded())
    assert (
        0 <= weights.min()
        and weights.max() <= 1
        and weights.mean().item() == pytest.approx(0.5, abs=0.02)
    )
    assert weights.var().item() == pytest.approx(1 / (4 * 1.4), rel=0.05)  # of Beta(0.2, 0.2)
    marked = torch.eye(6)
    _, soft = mix_reversed(torch.zeros(6, 3, 2, 2), marked, mixup=0.2, generator=seeded())
    assert (soft.diagonal() >= 0.5).all() and torch.allclose(soft.sum(1), torch.ones(6))


def test_the_chance_of_a_batch_is_its_step():
    images, targets = map(torch.from_numpy, a_batch(8))
    mix = reversed_mixer(0.5, 0.5, 5, seed=3)
    first = mix(images, targets, 10, 1)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(mix(images, targets, 10, 1), first))
    assert not torch.equal(mix(images, targets, 11, 1)[0], first[0]) and not torch.equal(
        mix(images, targets, 10, 0)[0], first[0]
    )
    numbers = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    assert torch.equal(mix(images, numbers, 10)[1], mix(images, torch.eye(5)[numbers], 10)[1])
    assert reversed_mixer(0.0, 0.0, 5) is None and torch.equal(
        mix_reversed(images, targets)[0], images
    )
