"""Loss and figures for many labels.

Vectors worked out by hand, scikit-learn as a second opinion, many processes against one.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from fdsl_nb.training.distributed import join, launch, get_rank, get_world_size
from fdsl_nb.training.learner import Loss
from fdsl_nb.training.multilabel import (
    KERAS_EPSILON,
    MultiLabelCounter,
    MultiLabelLoss,
    drawer,
    bucket_auc,
    label_ranks,
    ranked,
)
from fdsl_nb.training.plan import Recipe

COUNTS = (
    'ranks',
    'true_positives',
    'false_positives',
    'false_negatives',
    'areas',
    'precisions',
    'exact_areas',
)


def some_answers(images=41, classes=300):
    "Logits with ties, targets with classes that never and always occur, images without labels."
    g = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(images, classes, generator=g)).round() / 2 - 1
    targets = (torch.rand(images, classes, generator=g) < 0.1).float()
    targets[:, 7], targets[:, 8] = 0.0, 1.0
    targets[3:4] = 0.0
    return logits, targets


def counted(logits, targets, batch=8, classes=None):
    counter = MultiLabelCounter(classes or logits.shape[1], average_precision=True)
    for x, y in zip(logits.split(batch), targets.split(batch)):
        counter.add(x, y)
    return counter.result()


def test_loss_of_a_hand_made_batch():
    logits = torch.tensor([[0.0, math.log(3)], [-math.log(3), 0.0]])
    targets = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    first = math.log(2) - math.log(0.75)  # chances 1/2 and 3/4
    second = -math.log(0.25) + math.log(2)  # chances 1/4 and 1/2
    assert MultiLabelLoss()(logits, targets).item() == pytest.approx((first + second) / 2, rel=1e-6)
    half = torch.full((2, 2), 0.5)
    assert MultiLabelLoss()(torch.zeros(2, 2), half).item() == pytest.approx(
        2 * math.log(2), rel=1e-6
    )


@pytest.mark.parametrize('clip', [0.0, 1e-7])
def test_smoothing_is_for_training_only(clip):
    logits, targets = some_answers()
    y = targets.double() * 0.8 + 0.1
    p = logits.double().sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum(1).mean().item()
    assert MultiLabelLoss(0.2, clip)(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        measured = MultiLabelLoss(0.2, clip)(logits, targets).item()
        assert measured == MultiLabelLoss(0.0, clip)(logits, targets).item()
        assert measured != pytest.approx(expected, rel=1e-3)


def test_the_published_clip_caps_a_class_and_kills_its_gradient():
    for x, y in ((-40.0, 1.0), (40.0, 0.0)):
        for loss, value, slope in (
            (MultiLabelLoss(clip=1e-7), -math.log(1e-7), 0.0),
            (MultiLabelLoss(), 40.0, 1.0),
        ):
            logits = torch.tensor([[x]], requires_grad=True)
            found = loss(logits, torch.tensor([[y]]))
            found.backward()
            assert found.item() == pytest.approx(value, rel=1e-6)
            assert abs(logits.grad.item()) == pytest.approx(slope, abs=1e-6)
    assert -math.log(1e-7) == pytest.approx(16.1, abs=0.05)


COYO = json.loads((Path(__file__).parent / 'golden' / 'coyo_bce.json').read_text())


@pytest.mark.parametrize('published', COYO['found'], ids=lambda p: str(p['smoothing']))
def test_loss_and_gradient_are_the_published_programs(published):
    logits = torch.tensor(COYO['logits'], requires_grad=True)
    loss = MultiLabelLoss(published['smoothing'], KERAS_EPSILON)(
        logits, torch.tensor(COYO['targets'])
    )
    loss.backward()
    assert loss.item() == pytest.approx(published['loss'], rel=2e-7)
    difference = logits.grad - torch.tensor(published['gradient'])
    assert difference.abs().max() <= 1e-7
    exact = MultiLabelLoss()(logits, torch.tensor(COYO['targets']))
    assert exact > loss + 1


def test_one_label_an_image_has_the_published_loss_too():
    "The recipe of COYO-ViT's B/16 on ImageNet: one label an image, a sum over classes, smoothed."
    logits, labels = torch.tensor(COYO['logits']).requires_grad_(), torch.tensor([0, 3, 1])
    one_hot = F.one_hot(labels, 4).float()
    r = Recipe(loss='keras_bce', smoothing=1e-4)
    expected = MultiLabelLoss(1e-4, KERAS_EPSILON)(logits, one_hot)
    assert torch.equal(Loss(r)(logits, labels), expected)
    mixed = Loss(r)(logits, one_hot)  # smoothed already, by what mixed it
    assert torch.equal(mixed, MultiLabelLoss(0.0, KERAS_EPSILON)(logits, one_hot))
    with torch.no_grad():
        assert torch.equal(Loss(r)(logits, labels), F.cross_entropy(logits, labels))


def test_low_precision_logits_do_not_spoil_the_loss():
    logits, targets = some_answers()
    assert MultiLabelLoss()(logits.bfloat16(), targets).dtype == torch.float32
    low = logits.bfloat16()
    assert counted(low, targets).loss == counted(low.float(), targets).loss


def test_ranks_by_hand():
    logits = torch.tensor(
        [[5.0, 4.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 2.0], [0.0, 0.0, 1.0], [1.0, 2.0, 3.0]]
    )
    labels = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    assert label_ranks(logits, labels).tolist() == [2, 1, 1, 3, 0]


def test_figures_by_hand():
    logits = torch.tensor(
        [
            [2.0, -1.0, 1.0, -3.0],
            [-1.0, 1.0, 3.0, -3.0],
            [-2.0, -1.0, -1.0, -3.0],
            [1.0, -2.0, -1.0, -3.0],
        ]
    )
    targets = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    e = counted(logits, targets)
    assert (e.images, e.correct, e.correct_top5) == (4, 2, 3)  # ranks 0, 1, 0 and no label at all
    assert (e.hit(1), e.hit(2), e.top5) == (50.0, 75.0, 75.0)
    assert [v.tolist() for v in (e.true_positives, e.false_positives, e.false_negatives)] == [
        [1, 1, 0, 0],
        [1, 0, 2, 0],
        [1, 1, 0, 0],
    ]
    assert e.micro_f1 == 2 * 2 / (2 * 2 + 3 + 2)
    assert e.macro_f1 == pytest.approx((1 / 2 + 2 / 3 + 0 + 0) / 4)
    # class 0, from the top: yes, no, no, yes
    # class 1: yes, then one yes and one no together, then no
    assert e.precisions[:2] == pytest.approx([(1 + 2 / 4) / 2, (1 + 2 / 3) / 2])
    assert np.isnan(e.precisions[2:]).all() and e.mean_ap == pytest.approx((0.75 + 5 / 6) / 2)
    assert e.exact_areas[:2] == pytest.approx([0.5, 3.5 / 4])
    assert e.published_auc == pytest.approx((0.5 + 0.875) / 4)


def test_drawers_are_those_of_two_hundred_thresholds():
    thresholds = np.array([-1e-7, *(i / 199 for i in range(1, 199)), 1 + 1e-7])
    g = np.random.default_rng(0)
    logits = torch.from_numpy(np.concatenate([g.normal(0, 3, 500), [-200.0, 200.0, 0.0]])).float()
    y = g.random(503) < 0.3
    p = logits.sigmoid().numpy()
    assert drawer(logits).tolist() == [int((x > thresholds[1:-1]).sum()) for x in p.astype(float)]
    true, false = (
        np.array([(p[y == kind] > t).sum() for t in thresholds]) for kind in (True, False)
    )
    rates = true / y.sum(), false / (~y).sum()
    expected = sum(
        (rates[1][i] - rates[1][i + 1]) * (rates[0][i] + rates[0][i + 1]) / 2 for i in range(199)
    )
    counts = np.stack(
        [
            np.bincount(drawer(logits[torch.from_numpy(y == kind)]).numpy(), minlength=199)[None]
            for kind in (False, True)
        ]
    )
    assert bucket_auc(counts)[0] == pytest.approx(expected, abs=1e-12)


def test_figures_equal_scikit_learns():
    logits, targets = some_answers()
    e, kept = counted(logits, targets), [c for c in range(300) if 0 < targets[:, c].sum() < 41]
    assert len(kept) < 298
    has = [c for c in range(300) if targets[:, c].sum()]
    assert e.mean_ap == pytest.approx(
        np.mean([average_precision_score(targets[:, c], logits[:, c]) for c in has]), abs=1e-12
    )
    assert e.exact_auc == pytest.approx(
        np.mean([roc_auc_score(targets[:, c], logits[:, c]) for c in kept]), abs=1e-12
    )
    assert e.micro_f1 == pytest.approx(f1_score(targets, logits > 0, average='micro'), abs=1e-12)
    assert e.macro_f1 == pytest.approx(
        f1_score(targets, logits > 0, average='macro', zero_division=0), abs=1e-12
    )
    for k in (1, 5, 50):
        order = np.argsort(-logits.numpy(), axis=1, kind='stable')[:, :k]
        assert e.hits(k) == int(np.take_along_axis(targets.numpy(), order, 1).max(1).sum())


def test_order_of_images_changes_nothing():
    logits, targets = some_answers()
    shuffled = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    a, b = counted(logits, targets), counted(logits[shuffled], targets[shuffled], batch=5)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert ranked(np.zeros(4), np.array([True, False, False, True])) == (0.5, 0.5)


def test_soft_targets_count_as_labels():
    logits, targets = some_answers()
    shares = targets / targets.sum(1, keepdim=True).clamp(min=1)
    a, b = counted(logits, targets), counted(logits, shares)
    np.testing.assert_array_equal(a.ranks, b.ranks)
    np.testing.assert_array_equal(a.precisions, b.precisions)
    assert a.loss != b.loss


def test_what_is_no_number_is_not_measured():
    logits, targets = some_answers()
    logits[4, 2], logits[9, 1] = float('nan'), float('inf')
    with pytest.raises(FloatingPointError, match='answers 2 of 41 images'):
        counted(logits, targets)


def share(config):
    "This process's part of the answers, counted; every third process gets none of the last images."
    with join():
        logits, targets = some_answers(config['images'])
        own = slice(get_rank(), None, get_world_size())
        e = counted(logits[own], targets[own], config['batch'], classes=300)
        found = {name: getattr(e, name).tolist() for name in COUNTS}
        return json.loads(json.dumps(found | {'figures': e.figures()}))


@pytest.mark.process
@pytest.mark.parametrize(
    'images',
    [41, pytest.param(1, marks=pytest.mark.slow)],
    ids=['41 images', 'one image'],
)
def test_two_processes_count_as_one_does(images, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent))
    alone = share({'images': images, 'batch': 8})
    two = launch('test_multilabel:share', {'images': images, 'batch': 5}, 2)
    assert alone['figures'].pop('loss') == pytest.approx(two['figures'].pop('loss'), rel=1e-12)
    assert str(alone) == str(two)  # as text, because nan is not equal to itself
