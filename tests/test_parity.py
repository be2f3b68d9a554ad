"""Our learner beside a plain loop of timm's own parts.

From the same weights and batches: the same losses, weights and learning rates.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.loading import EpochBatchSampler, FormulaDataset, train_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training.learner import LRScheduler, fdsl_learner
from fdsl_nb.models.models import create_model
from fdsl_nb.training.optimise import CLOSED_FORMS, make_optimizer
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN, recipe
from fdsl_nb.core.rng import MIX, STEP, seed_for
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from training_helpers import TINY, Watch

pytestmark = pytest.mark.long

# What the published programs were given, read from them and their papers and written down here
# again, not taken from the recipes.
AS_PUBLISHED = dict(
    rcdb1k_deit_tiny=dict(
        opt='adamw',
        lr=1e-3,
        weight_decay=0.05,
        sched='cosine',
        warmup_epochs=5,
        warmup_lr=1e-4,
        min_lr=1e-5,
        sched_on_updates=True,
    ),
    visualatom1k_vit_tiny=dict(
        opt='adamw',
        lr=1e-3,
        weight_decay=0.05,
        sched='cosine',
        warmup_steps=5000,
        warmup_lr=1e-6,
        min_lr=1e-5,
        sched_on_updates=True,
    ),
    ofdb2d1k_vit_tiny=dict(
        opt='adamw',
        lr=1e-3 * 256 / 512,
        weight_decay=0.05,
        sched='cosine',
        warmup_epochs=5,
        warmup_lr=1e-6 * 256 / 512,
        min_lr=1e-5 * 256 / 512,
        sched_on_updates=False,
    ),
    finetune_cvpr2023=dict(
        opt='sgd',
        lr=0.01 * 768 / 512,
        weight_decay=1e-4,
        sched='cosine',
        warmup_epochs=10,
        warmup_lr=1e-6 * 768 / 512,
        min_lr=1e-5 * 768 / 512,
        sched_on_updates=False,
    ),
)
MIXED = dict(
    mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode='batch', label_smoothing=0.1
)


def shortened(p):
    "Published settings with warm-up and epochs so short that 30 steps see all of the schedule."
    warmup = dict(warmup_steps=6) if 'warmup_steps' in p else dict(warmup_epochs=2)
    return p | dict(epochs=10) | warmup


def timm_schedule(optimizer, p, epochs, steps):
    if 'warmup_steps' in p:
        return CosineLRScheduler(
            optimizer,
            t_initial=epochs * steps,
            lr_min=p['min_lr'],
            warmup_t=p['warmup_steps'],
            warmup_lr_init=p['warmup_lr'],
            t_in_epochs=False,
        )
    return create_scheduler_v2(
        optimizer,
        sched=p['sched'],
        num_epochs=epochs,
        warmup_epochs=p['warmup_epochs'],
        warmup_lr=p['warmup_lr'],
        min_lr=p['min_lr'],
        step_on_epochs=not p['sched_on_updates'],
        updates_per_epoch=steps,
    )[0]


def plain_loop(model, epochs, p, classes, ema):
    "timm's training script without its extras, on the batches of `epochs`; only seeds are ours."
    optimizer = create_optimizer_v2(
        model, opt=p['opt'], lr=p['lr'], weight_decay=p['weight_decay'], momentum=0.9
    )
    schedule = timm_schedule(optimizer, p, len(epochs), len(epochs[0]))
    mix, criterion = Mixup(**MIXED, num_classes=classes), SoftTargetCrossEntropy()
    average = ModelEmaV3(model, decay=ema)
    losses, rates, done = [], [], 0
    model.train()
    if p['sched_on_updates']:
        schedule.step_update(0)
    else:
        schedule.step(0)
    for epoch, batches in enumerate(epochs):
        for images, labels in batches:
            seed = seed_for(0, MIX, done, 0)
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
            images, labels = mix(images.clone(), labels)
            torch.manual_seed(seed_for(0, STEP, done, 0))
            rates.append(optimizer.param_groups[0]['lr'])
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            average.update(model, step=done)
            schedule.step_update(num_updates=done)
            losses.append(loss.item())
        schedule.step(epoch + 1)
    return losses, rates, average.module


@pytest.mark.parametrize('name', AS_PUBLISHED)
def test_thirty_steps_are_timms(name):
    p = shortened(AS_PUBLISHED[name])
    r = replace(
        recipe(name, 'finetune' if name.startswith('finetune') else 'pretrain'),
        img_size=32,
        batch_size=16,
        epochs=10,
        model_kwargs=TINY | dict(depth=2),
        precision='float32',
        model_ema_decay=0.9,
        **{k: v for k, v in p.items() if k in ('warmup_steps', 'warmup_epochs')},
    )
    data = open_dataset('visualatom', classes=4, instances=12, size=96, lines_max=20)

    def loader():
        return train_loader(
            data,
            train_transform(r),
            EpochBatchSampler(len(data), r.batch_size, repeats=r.aug_repeats),
        )

    def fresh():
        return create_model(r.model, 4, 32, seed=0, drop_path_rate=r.drop_path, **r.model_kwargs)

    ours, watch = fresh(), Watch()
    learn = fdsl_learner(ours, r, loader(), classes=4, cbs=[watch])
    learn.fit(r.epochs)
    batches, epochs = loader(), []
    for epoch in range(r.epochs):
        batches.batch_sampler.epoch = epoch
        epochs.append(list(batches))
    theirs = fresh()
    losses, rates, average = plain_loop(theirs, epochs, p, 4, 0.9)
    assert len(losses) == len(watch.losses) == 30 and len(set(rates)) > 8
    assert watch.rates == pytest.approx(rates, rel=1e-9)
    assert np.abs(np.subtract(watch.losses, losses)).max() < 1e-6
    for mine, other in ((ours, theirs), (learn.average.module, average)):
        others = other.state_dict()
        gaps = {k: (v - others[k]).abs().max().item() for k, v in mine.state_dict().items()}
        assert max(gaps.values()) < 1e-6, max(gaps, key=gaps.get)
    assert (ours.head.weight - fresh().head.weight).abs().max() > 1e-3, 'nothing was trained'


# Every recipe's learning rate, every step

IMAGES = dict(cifar10=45_000, cifar100=45_000, imagenet=1_281_167, coyo=300_000_000)


def images_of(r):
    if r.dataset in IMAGES:
        return IMAGES[r.dataset]
    return len(FormulaDataset(formula(r.dataset, **r.knobs))) if r.dataset != 'digits' else 50_000


def flags_of(r):
    "A published schedule; the closed forms are in fdsl_nb.training.optimise."
    for names, p in FLAGS:
        if any(r.name.startswith(n) for n in names):
            return p
    raise KeyError(f'{r.name} has no published flags here')


_CVPR2022 = AS_PUBLISHED['rcdb1k_deit_tiny']
_OFDB21K = AS_PUBLISHED['ofdb2d1k_vit_tiny'] | dict(
    lr=5e-4, warmup_lr=1e-6 * 1024 / 512, min_lr=1e-5 * 1024 / 512
)
FLAGS = (
    (('visualatom',), AS_PUBLISHED['visualatom1k_vit_tiny']),
    (('ofdb2d21k', 'ofdb3d21k'), _OFDB21K),
    (('ofdb', 'onepfrac'), AS_PUBLISHED['ofdb2d1k_vit_tiny']),
    (
        ('fractaldb1k',),
        _CVPR2022
        | dict(lr=3e-4 * 64 / 512, warmup_epochs=10, warmup_lr=1e-6, sched_on_updates=False),
    ),
    (('finetune_cvpr2022',), _CVPR2022),
    (('finetune_cvpr2023',), AS_PUBLISHED['finetune_cvpr2023']),
    (
        ('finetune_aaai2022',),
        AS_PUBLISHED['finetune_cvpr2023']
        | dict(opt='momentum', lr=0.01 * 96 / 512, warmup_lr=1e-6, min_lr=1e-5),
    ),
    (('rcdb', 'exfractaldb', 'mvfractaldb'), _CVPR2022),
)
OF_THE_RATE = (
    'lr',
    'warmup_lr',
    'min_lr',
    'warmup_epochs',
    'warmup_steps',
    'sched_on_updates',
    'epochs',
)


def what_decides_the_rate(r):
    own = [getattr(r, name) for name in OF_THE_RATE]
    return (*own, images_of(r) // r.batch_size, str(flags_of(r)))


BY_TIMM = {}  # recipes that differ in nothing that concerns the rate are tested once
for _r in [*PRETRAIN, *FINETUNE]:
    if _r.sched not in CLOSED_FORMS:
        BY_TIMM.setdefault(what_decides_the_rate(_r), _r)


def some_of(epochs, steps, every):
    """Steps of the whole schedule.

    Every `every`th, the first and last 500, and both sides of each epoch's beginning."""
    whole = epochs * steps
    chosen = {*range(0, whole, every), *range(min(500, whole)), *range(max(0, whole - 500), whole)}
    for epoch in range(0, epochs, max(1, epochs // 300)):
        chosen |= {max(0, epoch * steps - 1), epoch * steps}
    return sorted(chosen)


def compare_rates(r, every):
    epochs, steps = r.epochs, images_of(r) // r.batch_size
    sampler = SimpleNamespace(steps=steps)
    learn = SimpleNamespace(
        training=True,
        steps_done=0,
        epoch=0,
        first_epoch=0,
        first_batch=0,
        metric=None,
        xb=(torch.zeros(1),),
        dls=SimpleNamespace(train=SimpleNamespace(batch_sampler=sampler)),
    )
    layer = nn.Linear(2, 2)
    learn.opt = SimpleNamespace(opt=make_optimizer(layer, r))
    before = LRScheduler(r, 0)
    before.learn = learn
    before.before_fit()
    p = flags_of(r)
    theirs = create_optimizer_v2(
        nn.Linear(2, 2), opt=p['opt'], lr=p['lr'], weight_decay=p['weight_decay']
    )
    schedule, worst = timm_schedule(theirs, p, epochs, steps), 0.0
    for step in some_of(epochs, steps, every):
        if step // steps != learn.epoch or step == 0:
            learn.epoch = step // steps
            before.before_epoch()
            schedule.step(learn.epoch)
        learn.steps_done = step
        before.before_batch()
        schedule.step_update(step)
        for mine, other in zip(learn.opt.opt.param_groups, theirs.param_groups):
            worst = max(worst, abs(mine['lr'] / other['lr'] - 1))
    assert worst < 1e-9


@pytest.mark.parametrize('r', BY_TIMM.values(), ids=lambda r: r.name)
def test_the_rate_of_a_recipe_is_timms(r):
    compare_rates(r, 997)


@pytest.mark.slow
@pytest.mark.parametrize('r', BY_TIMM.values(), ids=lambda r: r.name)
def test_the_rate_of_a_recipe_is_timms_at_every_step(r):
    compare_rates(r, 1)


@pytest.mark.parametrize(
    'name, nesterov',
    (
        ('finetune_cvpr2023', True),
        ('finetune_aaai2022', False),
        ('vitpytorch_cifar10_b16', False),
        ('coyo_imagenet_vit_large_384', False),
    ),
)
def test_momentum_is_the_published_one(name, nesterov):
    "timm's `sgd` is Nesterov's, which the programs made with timm had; torch's and Keras's is not."
    r, layers = recipe(name, 'finetune'), [nn.Linear(3, 2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = (
        make_optimizer(layers[0], r),
        torch.optim.SGD(layers[1].parameters(), r.lr, 0.9, nesterov=nesterov),
    )
    for group in (g for o in optimizers for g in o.param_groups):
        group['weight_decay'] = 0.0
    for _ in range(3):
        for layer, optimizer in zip(layers, optimizers):
            optimizer.zero_grad()
            layer(torch.ones(3)).square().sum().backward()
            optimizer.step()
    assert torch.allclose(layers[0].weight, layers[1].weight, rtol=0, atol=1e-7)
