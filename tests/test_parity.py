"""Our learner beside a plain loop of timm's own parts.

From the same weights and batches: the same losses, weights and learning rates.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.loading import EpochBatchSampler, train_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.training.learner import fdsl_learner
from fdsl_nb.models.models import create_model
from fdsl_nb.training.optimise import make_optimizer
from fdsl_nb.training.recipes import recipe
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
        # the plain loop mixes floats, and gives timm the model itself
        prefetcher=False,
        no_weight_decay=True,
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


# Momentum


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
