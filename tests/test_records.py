"""Every recipe against its record: what the published program does, measured by running it."""

import hashlib
import json
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from records import (
    HERE,
    MODELS,
    RECORDS,
    described,
    described_train,
    deviations,
    on_purpose,
    rates,
)

from fdsl_nb.data.augment import train_transform
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN

pytestmark = pytest.mark.long

RECIPES = [*PRETRAIN, *FINETUNE]
FOLLOWING = [r for r in RECIPES if r.record]
PURPOSE = deviations()


def equal(ours, theirs):
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return ours == pytest.approx(theirs, rel=1e-9)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, dict):
        return ours is not None and all(equal(ours.get(k), v) for k, v in theirs.items())
    return ours == theirs


def differences(r):
    "Field → (ours, published) of what differs without a reason, and the number compared."
    record = RECORDS[r.record]
    published = record['values'] | dict(
        model=MODELS.get(record['values']['model'], record['values']['model'])
    )
    ours, unknown = described(r, record), ('eval', 'groups', 'parameters')
    found, compared = {}, 0
    for name, theirs in published.items():
        if theirs is None and name in unknown:
            continue
        compared += 1
        if not equal(ours[name], theirs) and not on_purpose(r.record, name, PURPOSE):
            found[name] = (ours[name], theirs)
    return found, compared


@pytest.mark.parametrize('r', FOLLOWING, ids=lambda r: r.name)
def test_a_recipe_does_what_its_record_says(r):
    found, compared = differences(r)
    assert not found
    assert compared >= 20


@pytest.mark.parametrize('r', FOLLOWING, ids=lambda r: r.name)
def test_the_learning_rates_are_the_records(r):
    record = RECORDS[r.record]
    if on_purpose(r.record, 'epochs', PURPOSE):
        r = replace(r, epochs=record['values']['epochs'])
    published = [rate for _, rate in record['lr']['points']]
    # TensorFlow computes its rates in float32
    exact = 0.0 if record['file'] != 'trainer.py' else 1.2e-7 * max(published)
    assert rates(r, record) == pytest.approx(published, rel=1e-9, abs=exact)


def test_every_record_has_its_recipe_and_every_recipe_its_record():
    names = [r.record for r in FOLLOWING]
    assert sorted(names) == sorted(RECORDS)
    without = {r.name for r in RECIPES} - {r.name for r in FOLLOWING}
    assert without == {'mvfractaldb1k_deit_tiny', 'mvfractaldb1k_deit_base', 'onepfrac21k_vit_tiny'}


def test_every_deviation_is_one():
    "A row of the table that excuses nothing is out of date."
    settings = {name for record in RECORDS.values() for name in record['values']}
    for pattern, field, reason in PURPOSE:
        assert field in settings and len(reason) > 20, (pattern, field)


def test_reported_numbers_name_their_source():
    assert {f.name for f in fields(RECIPES[0])} >= {'record', 'reported', 'source'}
    assert not [r.name for r in RECIPES if r.reported and not r.source]


BATCHES = json.loads((HERE / 'golden' / 'transforms_timm_0.4.12.json').read_text())


def pictures():
    "Eight images, colour, 300 × 260 pixels: those that timm 0.4.12 was given."
    chance = np.random.default_rng(5)
    ys, xs = np.mgrid[0:300, 0:260]
    for i in range(8):
        grain = chance.integers(-30, 30, (300, 260))
        wave = 127 + 90 * np.sin(xs / (5 + i)) * np.cos(ys / (9 + i)) + grain
        shades = np.stack([np.clip(wave + 20 * c, 0, 255) for c in range(3)], 2)
        yield Image.fromarray(shades.astype(np.uint8))


def hashed(transform, image, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return hashlib.sha256(transform(image).contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize('batch', BATCHES, ids=lambda b: b['records'][0])
def test_transforms_give_the_tensors_of_timm_0_4_12(batch):
    following = [r for r in FOLLOWING if r.record in batch['records']]
    assert following
    for transform in {str(described_train(r)): train_transform(r) for r in following}.values():
        found = [hashed(transform, x, 100 + i) for i, x in enumerate(pictures())]
        assert found == batch['sha256']
