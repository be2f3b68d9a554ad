"""Keras's SGD and AdamW, against five updates that the published program computed."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdsl_nb.training.optimise import (
    KerasAdamW,
    KerasSGD,
    clip_gradients,
    make_ema,
    make_optimizer,
)
from fdsl_nb.training.plan import Recipe

STEPS = json.loads((Path(__file__).parent / 'golden' / 'coyo_steps.json').read_text())
COYO = replace(Recipe(), clip_grad=1.0, filter_bias_and_bn=False, opt_eps=1e-7)
SGD = replace(COYO, opt='keras_sgd', weight_decay=0.0)
ADAMW = replace(COYO, opt='keras_adamw', weight_decay=0.1)
PUBLISHED = dict(
    sgd=SGD,
    adamw=ADAMW,
    adamw_base=replace(ADAMW, weight_decay=0.3),
    adamw_small_gradients=ADAMW,
)
# half a unit in the last place of the largest weight, twice: once for each of two roundings
ROUNDING = 2.4e-7


class Two(torch.nn.Module):
    "The two tensors of the trace."

    def __init__(self):
        super().__init__()
        bias, kernel = map(torch.tensor, STEPS['start'])
        self.bias, self.kernel = torch.nn.Parameter(bias), torch.nn.Parameter(kernel)


def walk(r, gradients, optimizer_of=make_optimizer):
    "The parameters after each of the five updates."
    model = Two()
    optimizer, seen = optimizer_of(model, r), []
    for lr, some in zip(STEPS['lrs'], gradients):
        optimizer.param_groups[0]['lr'] = lr
        for p, g in zip(model.parameters(), some):
            p.grad = torch.tensor(g)
        clip_gradients(model, r)
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    return seen


def gradients_of(name):
    return STEPS['small_gradients' if name.endswith('small_gradients') else 'gradients']


def apart(ours, theirs):
    "The largest difference of any number after any update."
    pairs = [(a, torch.tensor(b)) for one, other in zip(ours, theirs) for a, b in zip(one, other)]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize('name', PUBLISHED)
def test_five_updates_are_the_published_programs(name):
    ours = walk(PUBLISHED[name], gradients_of(name))
    assert apart(ours, STEPS['parameters'][name]) <= ROUNDING


def torchs(kind, **settings):
    return lambda model, r: kind(model.parameters(), **settings)


@pytest.mark.parametrize(
    'name, optimizer_of, difference',
    (
        ('sgd', torchs(torch.optim.SGD, lr=1.0, momentum=0.9), 0.0197),
        (
            'adamw_small_gradients',
            torchs(torch.optim.AdamW, eps=1e-7, weight_decay=0.1),
            0.0167,
        ),
    ),
)
def test_torchs_updates_are_others(name, optimizer_of, difference):
    ours = walk(PUBLISHED[name], gradients_of(name), optimizer_of)
    assert apart(ours, STEPS['parameters'][name]) == pytest.approx(difference, abs=1e-4)


def test_the_averages_are_the_published_programs():
    r = replace(SGD, model_ema_decay=0.9999, model_ema_warmup=True)
    model = Two()
    average, seen = make_ema(model, r), []
    for t, some in enumerate(walk(r, STEPS['gradients']), 1):
        with torch.no_grad():
            for p, value in zip(model.parameters(), some):
                p.copy_(value)
        average.update(model, t)
        seen.append([p.clone() for p in average.module.parameters()])
    assert apart(seen, STEPS['averages']) <= ROUNDING


def test_a_limit_divides_by_the_norm_alone():
    limited = {}
    for opt in ('keras_sgd', 'sgd'):
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3e-3, 4e-3]])
        clip_gradients(model, replace(SGD, opt=opt, clip_grad=1e-3))
        limited[opt] = model.weight.grad.norm().item()
    assert limited['keras_sgd'] == pytest.approx(1e-3, rel=1e-7)
    assert limited['sgd'] == pytest.approx(1e-3 * 5e-3 / 5.001e-3, rel=1e-6)


def one_step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.param_groups[0]['lr'] = 0.01 * (seed + 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize('r', (SGD, ADAMW), ids=lambda r: r.opt)
def test_a_saved_state_goes_on_to_the_last_bit(r):
    whole, broken = Two(), Two()
    one, other = make_optimizer(whole, r), make_optimizer(broken, r)
    for seed in range(3):
        one_step(whole, one, seed)
        one_step(broken, other, seed)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    other = make_optimizer(broken, r)
    other.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        one_step(whole, one, seed)
        one_step(broken, other, seed)
    for a, b in zip(whole.parameters(), broken.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('r', (SGD, ADAMW), ids=lambda r: r.opt)
def test_a_scaler_of_gradients_changes_nothing_and_skips_what_overflows(r):
    plain, scaled = Two(), Two()
    one, other = make_optimizer(plain, r), make_optimizer(scaled, r)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)

    def step(factor):
        for model in (plain, scaled):
            model.zero_grad()
        sum((p * p).sum() for p in plain.parameters()).backward()
        loss = sum((p * p).sum() for p in scaled.parameters()) * factor
        scaler.scale(loss).backward()

    for _ in range(2):
        step(1)
        one.step()
        scaler.step(other)
        scaler.update()
    step(float('inf'))
    scaler.step(other)
    scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters()):
        assert torch.equal(a, b)
    assert scaler.get_scale() == 512


def test_each_group_has_its_weight_decay_and_rate():
    made = [
        (KerasSGD, dict(momentum=0.0), 1 - 0.5 * (1 + 0.1)),
        (KerasAdamW, dict(eps=0.0), (1 - 0.5 * 0.1) - 0.5),
    ]
    for kind, more, expected in made:
        decays, stays = (torch.ones(1, requires_grad=True) for _ in range(2))
        groups = [dict(params=[decays], weight_decay=0.1, lr=0.5), dict(params=[stays], lr=0.0)]
        optimizer = kind(groups, **more)
        for p in (decays, stays):
            p.grad = torch.ones(1)
        optimizer.step()
        assert decays.item() == pytest.approx(expected, abs=1e-6)
        assert stays.item() == 1


def test_parameters_without_a_gradient_stay():
    for kind in (KerasSGD, KerasAdamW):
        moved, left = (torch.ones(1, requires_grad=True) for _ in range(2))
        optimizer = kind([moved, left], lr=0.1)
        moved.grad = torch.ones(1)
        assert optimizer.step(lambda: 3.0) == 3
        assert left.item() == 1 != moved.item()


@pytest.mark.parametrize(
    'wrong, near',
    (('keras_sdg', 'keras_sgd'), ('keras_adam', 'keras_adamw'), ('my_sgd', 'keras_adamw')),
)
def test_unknown_names(wrong, near):
    with pytest.raises(ValueError, match=f'opt={wrong!r}.*{near}'):
        make_optimizer(Two(), replace(Recipe(), opt=wrong))
