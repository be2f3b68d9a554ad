"""Every published option of training does what it says.

Small runs of one or two epochs, looked at from inside.
"""

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler
from torch import nn

from fdsl_nb.data.augment import eval_transform
from fdsl_nb.models.checkpoints import load_weights, read_checkpoint
from fdsl_nb.data.loading import eval_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.training.evaluate import evaluate
from fdsl_nb.core.folder import RunFolder, read_summary
from fdsl_nb.training.learner import fdsl_learner, precision_on
from fdsl_nb.models.models import create_model
from fdsl_nb.training.optimise import make_schedule
from fdsl_nb.training.plan import Recipe, run_config
from fdsl_nb.training.training import make_model, open_splits, run_training, train
from training_helpers import (
    BASE,
    DRAWN,
    TINY,
    Watch,
    resolved,
    run_ranks,
    trained,
    values,
    watching,
)

pytestmark = pytest.mark.long

# 797 images, and splits to evaluate on
DIGITS = dict(dataset='digits', knobs={}, batch_size=160, epochs=1)


def weights(folder, name='last.pth.tar', entry='state_dict'):
    return read_checkpoint(Path(folder) / name)[entry]


def distance(one, other):
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


def first_weights(**given):
    return make_model(run_config(BASE | given), 4)[0].state_dict()


# The learning rate


def as_timm(steps, metrics=None, **flags):
    "The rate of every step in timm's own training script under these flags."
    optimizer = create_optimizer_v2(
        nn.Linear(1, 1), opt='sgd', lr=1e-3, weight_decay=0.05, momentum=0.9
    )
    schedule, epochs = create_scheduler(
        SimpleNamespace(seed=0, **flags), optimizer, updates_per_epoch=steps
    )
    rates, done = [], 0
    if flags.get('sched_on_updates'):
        schedule.step_update(0)
    elif metrics is None:
        schedule.step(0)
    for epoch in range(int(epochs)):
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]['lr'])
            done += 1
            schedule.step_update(done)
        schedule.step(epoch + 1, metrics and metrics[epoch])
    return rates


BY_STEP = dict(sched='cosine', epochs=6, sched_on_updates=True)
BY_EPOCH = dict(sched='cosine', epochs=6)
SCHEDULES = {  # timm's flags, our options
    'cosine': (BY_STEP, dict()),
    'tanh': (dict(sched='tanh', epochs=6), dict(sched='tanh', sched_on_updates=False)),
    'step': (
        dict(sched='step', epochs=6, decay_epochs=2, decay_rate=0.3),
        dict(sched='step', decay_epochs=2, decay_rate=0.3, sched_on_updates=False),
    ),
    'warm-up': (
        BY_EPOCH | dict(warmup_epochs=2, warmup_lr=1e-5),
        dict(warmup_epochs=2, warmup_lr=1e-5, sched_on_updates=False),
    ),
    'warm-up in steps': (
        BY_STEP | dict(warmup_epochs=1.5, warmup_lr=1e-5),
        dict(warmup_steps=3, warmup_lr=1e-5),
    ),
    'noise': (
        BY_STEP | dict(lr_noise=[0.3, 0.9], lr_noise_pct=0.4, lr_noise_std=0.5),
        dict(lr_noise=(0.3, 0.9), lr_noise_pct=0.4, lr_noise_std=0.5),
    ),
    'cycles': (
        BY_EPOCH | dict(epochs=3, lr_cycle_limit=2, lr_cycle_decay=0.5),
        dict(lr_cycle_limit=2, sched_on_updates=False),
    ),
    'longer cycles': (
        BY_STEP | dict(epochs=2, lr_cycle_limit=2, lr_cycle_mul=2.0, lr_cycle_decay=0.4),
        dict(lr_cycle_limit=2, lr_cycle_mul=2.0, lr_cycle_decay=0.4),
    ),
    'cooldown': (
        BY_EPOCH | dict(epochs=4, cooldown_epochs=2),
        dict(cooldown_epochs=2, sched_on_updates=False),
    ),
}


@pytest.mark.parametrize('flags, options', SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_timms(flags, options, tmp_path):
    flags = dict(warmup_epochs=0, min_lr=1e-5) | flags
    _, watch, _ = trained(tmp_path, epochs=6, min_lr=1e-5, **options)
    assert watch.rates == pytest.approx(as_timm(2, **flags), rel=1e-9)
    assert len(set(watch.rates)) >= 3, 'the rate hardly moves, and nothing was tested'
    noted = [row['lr'] for row in read_summary(RunFolder(tmp_path))]
    assert noted == pytest.approx(watch.rates[1::2], rel=1e-9)


PLATEAU = dict(sched='plateau', patience_epochs=1, decay_rate=0.5, min_lr=0.0, epochs=8)


def test_a_plateau_falls_when_the_loss_stays(tmp_path):
    _, watch, _ = trained(tmp_path, lr=1e-6, opt='sgd', eval_metric='loss', **PLATEAU)
    expected = [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert [r / 1e-6 for r in watch.rates[::2]] == pytest.approx(expected)


def test_a_plateau_goes_on_across_pauses(tmp_path):
    options = PLATEAU | dict(
        lr=3e-2,
        opt='sgd',
        eval_metric='loss',
        lr_noise=(0.5, 1.0),
        lr_noise_pct=0.3,
        warmup_epochs=2,
        decay_rate=0.3,
    )
    _, watch, _ = trained(tmp_path / 'whole', **options)
    rates = []
    for _ in range(8):
        _, session, result = trained(tmp_path / 'paused', pause=1, recovery_interval=1, **options)
        rates += session.rates
    assert not result['paused'] and rates == watch.rates
    assert distance(weights(tmp_path / 'paused'), weights(tmp_path / 'whole')) == 0


def test_a_plateau_is_timms_for_losses_and_for_accuracies():
    losses = [2.0, 1.5, 1.49999, 1.5, 1.6, 1.2, 1.3, 1.3, 1.3, 1.1]
    for metrics, kind, sign in ((losses, 'loss', -1), ([100 - 10 * v for v in losses], 'top1', 1)):
        expected = as_timm(
            1,
            metrics,
            sched='plateau',
            epochs=10,
            patience_epochs=1,
            decay_rate=0.3,
            eval_metric=kind,
            warmup_epochs=2,
            warmup_lr=1e-4,
            lr_noise=None,
        )
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
        r = Recipe(**PLATEAU | dict(epochs=10, warmup_epochs=2, decay_rate=0.3))
        schedule, rates = make_schedule(optimizer, r, 1, 0), []
        for epoch in range(10):
            schedule.step(epoch, sign * metrics[epoch - 1] if epoch else None)
            rates.append(optimizer.param_groups[0]['lr'])
        assert rates == pytest.approx(expected, rel=1e-12) and min(rates[2:]) < 1e-3


# The step


def moved(folder, **given):
    "What one step of plain SGD adds to each tensor at a rate of 1: the gradient as limited."
    options = dict(
        opt='momentum',
        momentum=0.0,
        weight_decay=0.0,
        lr=1.0,
        sched='constant',
        batch_size=32,
        epochs=1,
    )
    trained(folder, **options | given)
    before = first_weights(**given)
    return {k: v - before[k] for k, v in weights(folder).items()}


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors.values()]).norm().item()


def test_the_gradient_is_limited(tmp_path):
    free = moved(tmp_path / 'free')
    assert norm(free) > 0.1
    by_norm = moved(tmp_path / 'norm', clip_grad=0.05)
    assert norm(by_norm) == pytest.approx(0.05, rel=1e-3)
    by_value = moved(tmp_path / 'value', clip_grad=1e-3, clip_mode='value')
    assert max(t.abs().max().item() for t in by_value.values()) == pytest.approx(1e-3, rel=1e-2)
    adaptive, before = moved(tmp_path / 'agc', clip_grad=1e-3, clip_mode='agc'), first_weights()
    assert torch.allclose(adaptive['head.weight'], free['head.weight'], atol=1e-7)

    def rows(t):
        return t.flatten(1).norm(dim=1)

    name = 'blocks.0.mlp.fc1.weight'
    assert (rows(adaptive[name]) <= 1.01e-3 * rows(before[name]).clamp(min=1e-3)).all()
    assert rows(free[name]).max() > rows(adaptive[name]).max()


@pytest.mark.parametrize('batch, parts', ((16, 4), (12, 8), (10, 4)))
def test_a_batch_in_parts_is_the_same_step(batch, parts):
    images, labels = torch.randn(2 * batch, 3, 32, 32), torch.arange(2 * batch) % 4
    batches = list(zip(images.split(batch), labels.split(batch)))
    base = {k: v for k, v in BASE.items() if k in Recipe.__dataclass_fields__}
    got = []
    for accumulate in (1, parts):
        how = dict(opt='sgd', epochs=1, batch_size=batch, grad_accum_steps=accumulate)
        r = Recipe(**base | how)
        model = create_model(r.model, 4, 32, seed=0, **TINY)
        learn = fdsl_learner(model, r, InMemory(batches), classes=4)
        learn.fit(1)
        got.append((learn.train_loss, learn.model.state_dict()))
    assert got[0][0] == pytest.approx(got[1][0], abs=1e-6) and distance(got[0][1], got[1][1]) < 1e-7


class InMemory(list):
    "Batches, with what the learner asks of a loader."

    @property
    def batch_sampler(self):
        return SimpleNamespace(steps=len(self), first=0, epoch=0)


@pytest.mark.parametrize('dynamic', (False, True))
def test_averaged_weights_are_measured_and_saved(dynamic, tmp_path):
    class Trail(Watch):
        order, trail = 45, []

        def after_batch(self):
            named = self.learn.model.named_parameters()
            self.trail.append({k: p.detach().clone() for k, p in named})

    config, trail = (
        values(tmp_path, **DIGITS | dict(model_ema_decay=0.7, model_ema_warmup=dynamic)),
        Trail(),
    )
    with watching(trail):
        train(config)
    start = make_model(run_config(config), 10)[0].state_dict()
    by_hand = {k: torch.zeros_like(v) if dynamic else start[k] for k, v in trail.trail[0].items()}
    for t, now in enumerate(trail.trail, 1):
        d = 0.7 if t > 1 else 0.0  # timm: the first update copies
        if dynamic:
            d = min(0.7, (1 + t) / (10 + t))
        by_hand = {k: d * by_hand[k] + (1 - d) * now[k] for k in now}
    saved = weights(tmp_path, entry='state_dict_ema')
    assert distance(by_hand, saved) < 1e-6 and distance(by_hand, weights(tmp_path)) > 1e-5
    model = create_model(BASE['model'], 10, 32, **TINY)
    loaded = load_weights(model, tmp_path / 'last.pth.tar', use_ema=True)
    assert loaded.head == 'kept, 10 classes' and distance(model.state_dict(), saved) == 0
    transform = eval_transform(run_config(config))
    found = evaluate(model, eval_loader(open_dataset('digits', 'val'), transform, 256), 10)
    assert read_summary(RunFolder(tmp_path))[0]['eval_loss'] == pytest.approx(found.loss, rel=1e-6)


def test_every_loss_trains(tmp_path):
    first = {}
    views = dict(aug_splits=3, aa='augmix-m3-w3', smoothing=0.1)
    for loss, more in dict(cross_entropy={}, bce={}, keras_bce={}, jsd=views).items():
        given = dict(knobs=DRAWN | dict(instances=4), epochs=40, loss=loss, lr=3e-3)
        _, watch, _ = trained(tmp_path / loss, **given | more)
        first[loss] = watch.losses[0]
        assert np.mean(watch.losses[-8:]) < np.mean(watch.losses[:8]) - 0.01, loss
    assert first['cross_entropy'] == pytest.approx(math.log(4), abs=0.1)
    assert first['bce'] == pytest.approx(math.log(2), abs=0.1)
    assert first['keras_bce'] == pytest.approx(4 * math.log(2), abs=0.4)


# Mixing


def shares(watch):
    return torch.stack(watch.labels)


@pytest.mark.parametrize('mode', ('batch', 'pair', 'elem', 'reversed'))
def test_the_mode_of_mixing(mode, tmp_path):
    _, watch, _ = trained(tmp_path, mixup=1.0, mixup_mode=mode, epochs=3)
    for labels in watch.labels:
        assert labels.shape == (16, 4) and torch.allclose(labels.sum(1), torch.ones(16))
        mixed = labels[(labels > 0).sum(1) == 2]
        ratios = {round(float(row.max()), 4) for row in mixed}
        assert len(ratios) == 1 if mode == 'batch' else len(ratios) > 1
        if mode == 'pair':
            assert torch.allclose(labels.max(1).values, labels.flip(0).max(1).values)


def test_mixing_ends_where_it_should(tmp_path):
    _, watch, _ = trained(
        tmp_path, mixup=1.0, cutmix=1.0, smoothing=0.1, mixup_off_epoch=2, epochs=3
    )
    most = [labels.max(1).values.min().item() for labels in watch.labels]
    assert max(most[:4]) < 0.92 and most[4:] == pytest.approx([0.925] * 2)


# What is trained, and how it is computed


def test_frozen_weights_stay(tmp_path):
    trained(tmp_path, freeze=('patch_embed.*', 'pos_embed'), weight_decay=0.5)
    before, after = first_weights(), weights(tmp_path)
    frozen = {k for k in before if k.startswith('patch_embed.') or k == 'pos_embed'}
    assert all(torch.equal(before[k], after[k]) == (k in frozen) for k in before)


@pytest.mark.parametrize(
    'options',
    (dict(channels_last=True), dict(torchcompile='aot_eager')),
    ids=lambda o: next(iter(o)),
)
def test_the_same_numbers_computed_otherwise(options, tmp_path):
    trained(tmp_path / 'plain', opt='sgd', **DIGITS)
    learn, _, result = trained(tmp_path / 'other', opt='sgd', **DIGITS, **options)
    assert weights(tmp_path / 'plain').keys() == weights(tmp_path / 'other').keys()
    assert distance(weights(tmp_path / 'plain'), weights(tmp_path / 'other')) < 1e-6
    assert result['images'] == 800 and hasattr(learn.model, '_orig_mod') == (
        'torchcompile' in options
    )


def test_lower_precision(tmp_path):
    _, watch, _ = trained(tmp_path / 'low', precision='bfloat16', epochs=10, lr=3e-3)
    _, exact, _ = trained(tmp_path / 'exact', epochs=10, lr=3e-3)
    gap = np.abs(np.subtract(watch.losses, exact.losses)).max()
    assert 0 < gap < 0.1
    assert {t.dtype for t in weights(tmp_path / 'low').values()} == {torch.float32}


class Infinite(Callback):
    "Gives the second step an infinite gradient; keeps scale and first weight of every step."

    def __init__(self):
        self.kept = []

    def after_backward(self):
        if self.learn.steps_done == 1:
            next(self.learn.model.parameters()).grad[:] = float('inf')

    def after_batch(self):
        if self.training:
            weight = next(self.learn.model.parameters()).detach().clone()
            self.kept.append((self.learn.scaler.get_scale(), weight))


def test_float16_leaves_out_a_step_with_infinite_gradients(tmp_path, capsys):
    with watching(Infinite()) as left:
        (tmp_path / 'run').mkdir()
        train(values(tmp_path / 'run', precision='float16', clip_grad=1.0))
    scales, weights = zip(*left['learn'].infinite.kept)
    assert scales == (65536.0, 32768.0, 32768.0, 32768.0)
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [True, False, False]
    assert 'float16' in (tmp_path / 'run' / 'log.jsonl').read_text()
    assert "precision='float16' is slow on a CPU" in capsys.readouterr().out


def test_float16_goes_on_with_its_scale(tmp_path):
    given = dict(precision='float16', model_ema_decay=0.9, drop_path=0.1, mixup=0.8, epochs=3)
    with watching(Infinite()) as left:
        train(values(tmp_path, **given, pause=1))
    assert left['learn'].paused
    _, _, _ = trained(tmp_path, **given)
    with watching(Infinite()):
        (tmp_path / 'whole').mkdir()
        train(values(tmp_path / 'whole', **given))
    one, other = (read_checkpoint(f / 'last.pth.tar') for f in (tmp_path, tmp_path / 'whole'))
    assert one['amp_scaler'] == other['amp_scaler'] and one['amp_scaler']['scale'] == 32768.0
    for entry in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(one[entry][k], other[entry][k]) for k in other[entry])


def test_float16_takes_the_place_of_a_bfloat16_that_a_gpu_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla V100')
    found, said = precision_on(torch.device('cuda', 0), 'bfloat16')
    assert found == 'float16' and 'Tesla V100: float16 with a gradient scaler' in said
    assert precision_on(torch.device('cuda', 0), 'float32') == ('float32', '')


SMALL = dict(
    resnet18=dict(channels=(8, 16, 16, 32)),
    swin_tiny_patch4_window7_224=dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    mixer_s16_224=dict(mlp_ratio=(0.5, 0.1)),
    pvt_v2_b0=dict(depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1)),
)


@pytest.mark.parametrize('name', SMALL)
def test_every_published_architecture_trains_and_goes_on(name, tmp_path):
    given = dict(
        model=name,
        model_kwargs=SMALL[name],
        drop_path=0.1,
        clip_grad=1.0,
        clip_mode='agc',
        export=True,
    )
    learn, watch, _ = trained(tmp_path / 'whole', **given)
    assert all(map(math.isfinite, watch.losses))
    trained(tmp_path / 'paused', pause=1, **given)
    trained(tmp_path / 'paused', pause=1, **given)
    assert distance(weights(tmp_path / 'paused'), weights(tmp_path / 'whole')) == 0
    address = f'local-dir:{tmp_path / "whole" / "model"}'
    exported = timm.create_model(address, pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(exported(x), learn.model.eval()(x))


# What is kept


def test_the_best_of_the_history_stays(tmp_path):
    trained(
        tmp_path,
        epochs=7,
        checkpoint_hist=2,
        interval_saved_epochs=3,
        eval_metric='loss',
        lr=3e-2,
        opt='sgd',
    )
    losses = [row['train_loss'] for row in read_summary(RunFolder(tmp_path))]
    best = sorted(range(7), key=losses.__getitem__)[:2]
    held = {f'held-checkpoint-{n}.pth.tar' for n in (0, 3, 6)}  # as the published programs
    kept = held | {f'checkpoint-{e}.pth.tar' for e in best}
    assert {p.name for p in tmp_path.glob('*checkpoint-*')} == kept

    def epoch_of(name):
        return read_checkpoint(tmp_path / f'{name}.pth.tar')['epoch']

    assert epoch_of('model_best') == epoch_of(f'checkpoint-{best[0]}') == best[0]
    assert epoch_of('held-checkpoint-3') == 3


def test_a_pause_changes_nothing(tmp_path):
    given = dict(
        epochs=3,
        model_ema_decay=0.9,
        mixup=0.5,
        drop_path=0.1,
        model_kwargs=TINY | dict(depth=2),
        save_images=True,
        export=True,
        recovery_interval=1,
    )
    run_training(resolved(values(tmp_path / 'whole', **given)))
    for state in ('paused', 'paused', 'done'):
        run_training(resolved(values(tmp_path / 'paused', pause=1, **given)))
        assert RunFolder(tmp_path / 'paused').state == state
    paused, whole = tmp_path / 'paused', tmp_path / 'whole'
    for entry in ('state_dict', 'state_dict_ema'):
        assert distance(weights(paused, entry=entry), weights(whole, entry=entry)) == 0
    assert (paused / 'summary.csv').read_text() == (whole / 'summary.csv').read_text()
    assert not list(tmp_path.glob('*/recovery-*'))
    assert (paused / 'inputs.png').stat().st_size > 1000


def test_the_best_or_the_last_is_exported(tmp_path):
    given = DIGITS | dict(epochs=3, lr=1e-2, export=True)
    transform = eval_transform(Recipe(**{k: BASE[k] for k in ('img_size', 'scale', 'ratio')}))
    for eval_metric in ('top1', 'top1_test', 'last'):
        _, _, result = trained(tmp_path / eval_metric, eval_metric=eval_metric, **given)
        rows = read_summary(RunFolder(tmp_path / eval_metric))
        exported = timm.create_model(
            f'local-dir:{tmp_path / eval_metric / "model"}', pretrained=True
        )
        test = eval_loader(open_dataset('digits', 'test'), transform, 256)
        assert evaluate(exported, test, 10).correct == result['correct']
        if eval_metric == 'top1_test':
            assert result['top1'] == pytest.approx(max(row['eval_top1'] for row in rows))
        if eval_metric == 'last':
            assert (tmp_path / eval_metric / 'model_best.pth.tar').exists()
    val, test = (
        read_summary(RunFolder(tmp_path / b))[0]['eval_top1'] for b in ('top1', 'top1_test')
    )
    # of 200 and of 800 images
    assert val * 2 == round(val * 2) and test * 8 == pytest.approx(round(test * 8))
    assert val != test


def test_images_held_out_choose(tmp_path):
    config = dict(BASE, valid_pct=0.25)
    splits = open_splits(run_config(config))
    assert (len(splits['train']), len(splits['val'])) == (24, 8)
    _, _, result = trained(tmp_path, valid_pct=0.25, batch_size=8, eval_metric='top1')
    assert (result['split'], result['images']) == ('val', 8)
    assert 'eval_top1' in read_summary(RunFolder(tmp_path))[0]


def test_a_zero_head(tmp_path):
    trained(tmp_path / 'first', knobs=BASE['knobs'] | dict(classes=3), batch_size=8)
    given = dict(weights=str(tmp_path / 'first' / 'last.pth.tar'), head='zero')
    _, watch, _ = trained(tmp_path / 'second', **given)
    assert watch.losses[0] == pytest.approx(math.log(4), abs=1e-6)
    model, loaded = make_model(run_config(BASE | given), 4)
    assert 'zeroed' in loaded.head and not model.head.weight.any()
    assert torch.equal(model.pos_embed, weights(tmp_path / 'first')['pos_embed'])


# Over processes


@pytest.mark.process
def test_batch_norm_is_the_same_in_every_process(tmp_path):
    given = dict(
        model='resnet18',
        model_kwargs=SMALL['resnet18'],
        model_ema_decay=0.9,
        recovery_interval=1,
        epochs=3,
    )
    run_ranks(values(tmp_path, **given), 2, (Statistics, (tmp_path,)))
    files = (tmp_path / f'statistics-{rank}.pt' for rank in range(2))
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert len(one) == 6 and one[0].keys() == other[0].keys()
    assert any('running_var' in k for k in one[0])
    for here, there in zip(one, other):
        assert distance(here, there) == 0


class Statistics(Watch):
    "Keeps what each process has after an epoch: the network's tensors and their average's."

    order = 45

    def __init__(self, folder):
        self.folder, self.kept = folder, []

    def before_batch(self):
        pass

    def after_batch(self):
        pass

    def after_epoch(self):
        model, average = self.learn.model.module, self.learn.average.module
        self.kept += [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, average)]
        torch.save(self.kept, self.folder / f'statistics-{os.environ["RANK"]}.pt')


def test_a_card_says_what_was_trained_and_in_which_budget(tmp_path):
    for budget in ('demo', 'paper'):
        trained(tmp_path / budget, export=True, budget=budget, **DIGITS)
        card = (tmp_path / budget / 'model' / 'README.md').read_text()
        assert 'Trained on digits' in card and '1 epochs, ' in card
        assert ('shrunk to minutes' in card) == (budget == 'demo')
