"""Every number has a range, every word its choices.

The values here are tried on all parameters of all run notebooks, and on all settings that go into
their dictionaries. Each is accepted and inside what is declared, or refused by name and value.
"""

import math
import re
from dataclasses import fields
from functools import lru_cache

import pytest

from fdsl_nb.app import parameters
from fdsl_nb.app.cli import described
from fdsl_nb.app.parameters import (
    check_parameters,
    check_values,
    find_notebook,
    from_text,
    parameter_limits,
    read_parameters,
    run_notebooks,
)
from fdsl_nb.core.settings import Limits, check_settings, limits_of
from fdsl_nb.data.augmentation import PREPARED, Augmentation, check_aa
from fdsl_nb.training.plan import OTHER_NAMES, Evaluation, Recipe, Run, checked, in_epochs
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN, resolve

NAN, INF = math.nan, math.inf
NUMBERS = [0, 1, -1, 3, 100, 2**32, 2**63, 10**30, 0.0, 0.1, 0.5, 1.0, 1.5, -0.5]
NUMBERS += [1e-300, 1e300, NAN, INF, -INF]
WORDS = ['', 'xx', 'nan', '1', 'true', '-', 'é', 'cosine', 'rand-m9']
LISTS = [[], [1], [0.1, 0.5], [0.5, 0.1], [0.5] * 3, [-1] * 3, [NAN, 1.0], [0, INF], ['lr'], [None]]
OTHERS = [True, False, {}, {'a': 1}, {3: 4}, {'lr': NAN}]
VALUES = [*NUMBERS, *WORDS, *LISTS, *OTHERS]

OF_RECIPES = ('name', 'paper', 'record', 'cost', 'reported', 'source', 'knobs')
OPTIONS = [f.name for f in fields(Recipe) if f.name not in OF_RECIPES]


@pytest.fixture(scope='module', autouse=True)
def notebooks_read_once():
    "Reading a notebook takes longer than checking a value, and does not depend on it."
    with pytest.MonkeyPatch.context() as patch:
        for name in ('_read', 'read_parameters', 'edited_parameters', 'default_parameters'):
            patch.setattr(parameters, name, lru_cache(None)(getattr(parameters, name)))
        patch.setattr(parameters, '_names_read', lru_cache(None)(parameters._names_read))
        yield


def is_number(value):
    return type(value) in (int, float)


def is_inside(number, limits):
    "By the letter of the declaration, and not by the code that checks it."
    if not is_number(number) or not math.isfinite(number):
        return False
    ends = (
        limits.low is None or number >= limits.low,
        limits.high is None or number <= limits.high,
        limits.above is None or number > limits.above,
        limits.below is None or number < limits.below,
    )
    return all(ends)


def is_valid(value, expected, limits):
    "Is an accepted value one that its declaration allows?"
    if limits.choices and expected is not tuple:
        return value in limits.choices
    if expected in (int, float):
        return is_inside(value, limits) and (expected is float or type(value) is int)
    if expected is tuple:
        if limits.entries is str:
            return all(isinstance(v, str) for v in value)
        right = not limits.lengths or len(value) in limits.lengths
        falls = limits.rising and list(value) != sorted(value)
        return right and not falls and all(is_inside(v, limits) for v in value)
    return isinstance(value, {list: list, dict: dict}.get(expected, expected))


def refusal(notebook, given):
    try:
        check_values(find_notebook(notebook), given)
    except (TypeError, ValueError) as e:
        return str(e)


def tried(notebook, name, value, expected, limits, given):
    "'' if the value was treated as it should be, else what went wrong."
    said = refusal(notebook, given)
    here = f'{notebook}: {name}={value!r}'
    if said is None:
        good = is_valid(value, expected, limits)
        return '' if good else f'{here} was accepted'
    if f'{name}={value!r}' in said or f'{name}={value!r}'.replace("'", '"') in said:
        return ''
    # what is wrong inside a dictionary is named there
    if isinstance(value, dict) and value and any(f'{k}={v!r}' in said for k, v in value.items()):
        return ''
    return f'{here} was refused without its name and value: {said}'


def cases_of_parameters():
    for notebook in run_notebooks():
        limits = parameter_limits(notebook)
        for p in read_parameters(notebook).values():
            for value in VALUES:
                yield notebook, p.name, from_text(p, value), p.type, limits.get(p.name, Limits())


def test_every_parameter_of_every_notebook_is_checked():
    count, wrong = 0, []
    for notebook, name, value, expected, limits in cases_of_parameters():
        count += 1
        wrong.append(tried(notebook, name, value, expected, limits, {name: value}))
    wrong = list(filter(None, wrong))
    assert not wrong, f'{len(wrong)} of {count}:\n' + '\n'.join(wrong[:20])
    assert count > 5000


@pytest.mark.parametrize(
    'notebook, parameter, part, names',
    (
        ('pretrain', 'options', Recipe, OPTIONS),
        ('evaluate', 'transform', Augmentation, PREPARED),
    ),
)
def test_every_setting_in_a_dictionary_is_checked(notebook, parameter, part, names):
    limits, types = limits_of(part), {f.name: f.type for f in fields(part)}
    wrong = []
    for name in names:
        for value in VALUES:
            given = {parameter: {name: value}}
            wrong.append(tried(notebook, name, value, types[name], limits[name], given))
    wrong = list(filter(None, wrong))
    assert not wrong, f'{len(wrong)} of {len(names) * len(VALUES)}:\n' + '\n'.join(wrong[:20])


def test_every_number_has_a_range_and_some_words_choices():
    for part in (Recipe, Run, Evaluation, Augmentation):
        limits = limits_of(part)
        for f in fields(part):
            if f.type in (int, float) and not limits[f.name].choices:
                assert limits[f.name].has_range, f'{part.__name__}.{f.name} has no range'
    for notebook in run_notebooks():
        limits = parameter_limits(notebook)
        for p in read_parameters(notebook).values():
            if p.type in (int, float):
                assert str(limits[p.name]), f'{notebook}: {p.name} has no range'


def test_every_default_and_every_recipe_is_inside():
    for part in (Recipe, Run, Evaluation):
        check_settings(part, vars(part()))
    for stage, some in dict(pretrain=PRETRAIN, finetune=FINETUNE).items():
        for r in some:
            checked(r)
            for budget in ('demo', 'paper'):
                resolve(stage, {}, r.name, budget)
    for notebook in run_notebooks():
        defaults = {p.name: p.default for p in read_parameters(notebook).values()}
        check_parameters(notebook, defaults)


RAN_OR_DIED = (  # what `options` or a parameter was given, and a word of the answer
    (dict(smoothing=-1), 'is outside 0 … 1 (without 1)'),
    (dict(drop_path=NAN), 'is not finite; choose 0 … 1'),
    (dict(reprob=2.0), 'is outside 0 … 1'),
    (dict(model_ema_decay=2.0), 'is outside 0 … 1 (without 1)'),
    (dict(mixup_prob=9), 'is outside 0 … 1'),
    (dict(scale=[0.5, 0.1]), 'falls: the smaller number comes first'),
    (dict(ratio=[2.0]), 'is of length 1, not 2'),
    (dict(crop_pct=-1), 'is outside 0.1 … 1'),
    (dict(mean=[0.5, 0.5]), 'is of length 2, not 1 or 3'),
    (dict(std=[-1, -1, -1]), 'is outside 0 … ∞ (without 0)'),
    (dict(opt_betas=[0.9, 1.0]), 'is outside 0 … 1 (without 1)'),
    (dict(head='xx'), 'is not known; known: auto, keep, new, zero'),
    (dict(resize='bicubik'), "did you mean 'bicubic'"),
    (dict(epochs=0), 'is outside 1 … ∞'),
    (dict(batch_size=0), 'is outside 1 … ∞'),
    (dict(mixup=-1), 'is outside 0 … 100'),
    (dict(interpolation='xx'), 'known: bicubic, bilinear, lanczos, nearest'),
    (dict(aa='xyz'), 'known: 3a, augmix, original, originalr, rand, v0, v0r'),
    (dict(aa='rand-q9'), "has a section 'q9'; rand knows m, n, p, mstd, mmax, inc"),
    (dict(aa='rand-m9-fast'), "has a section 'fast'"),
    (dict(sched='cosin'), "did you mean 'cosine'"),
    (dict(sched='none'), 'is not known'),
    (dict(opt='admw'), "did you mean 'adamw'"),
    (dict(loss='xx'), 'known: bce, cross_entropy, jsd'),
    (dict(lr=INF), 'is not finite'),
    (dict(aug_splits=1), 'is not known'),
    (dict(valid_pct=1.0), 'is outside 0 … 1 (without 1)'),
    (dict(recount=0), 'is outside 1 … 100'),
    (dict(lr_noise_pct=0), 'is outside 0.01 … 1'),
    (dict(freeze=[3]), 'holds 3, which is not of type str'),
    (dict(samples_per_epoch=-1), 'is outside 0 … ∞'),
    (dict(model=''), 'names nothing'),
    (dict(cooldown_epochs=99), 'leaves none for the schedule'),
    (dict(eval_every=10), 'without max_steps'),
    (dict(sched='plateau', decay_rate=1.0), 'the rate would not fall'),
    (dict(train_crop_mode='random', resize_size=8), 'is smaller than the crop'),
)


@pytest.mark.parametrize('given, answer', RAN_OR_DIED, ids=[str(g) for g, _ in RAN_OR_DIED])
def test_what_ran_or_died_is_one_sentence(given, answer):
    for stage in ('pretrain', 'finetune'):
        said = refusal(stage, dict(options=given))
        assert answer in said
        assert '\n' not in said
        name, value = list(given.items())[-1]
        assert f'{name}={value!r}' in said
    declared = read_parameters('pretrain')
    if set(given) <= set(declared):
        assert answer in refusal('pretrain', given)


@pytest.mark.parametrize(
    'notebook, given, answer',
    (
        ('pretrain', dict(seed=2**32), 'seed=4294967296 is outside 0 … 4294967295'),
        ('pretrain', dict(seed=-1), 'seed=-1 is outside'),
        ('pretrain', dict(checkpoint_hist=-1), 'checkpoint_hist=-1 is outside 0 … ∞'),
        ('pretrain', dict(processes=0), 'processes=0 is outside 1 … 1024'),
        ('pretrain', dict(workers=-1), 'workers=-1 is outside 0 … 1024'),
        ('pretrain', dict(wandb_mode='on'), "did you mean 'online'?"),
        ('pretrain', dict(classes=0), 'classes=0 is outside 1 … 4294967295'),
        ('pretrain', dict(size=4), 'size=4 is outside 8 … 8192'),
        ('finetune', dict(seeds=0), 'seeds=0 is outside 1 … 1000'),
        ('evaluate', dict(split='tst'), "did you mean 'test'?"),
        ('evaluate', dict(transform=dict(crop_pct=9)), 'transform: crop_pct=9 is outside 0.1 … 1'),
        ('evaluate', dict(transform=dict(reprob=0)), 'reprob=0 is no setting'),
        ('build', dict(layout='shard'), "did you mean 'shards'?"),
        ('build', dict(shard_images=0), 'shard_images=0 is outside 1 … ∞'),
        ('build', dict(seed=2**64), 'seed=18446744073709551616 is outside 0 …'),
        ('reproduce', dict(finetune=dict(lr=-1)), 'finetune: lr=-1 is outside 0 … ∞'),
        ('reproduce', dict(pretrain=dict(options=dict(drop=9))), 'options: drop=9 is outside'),
        ('browse', dict(published=dict(a='x')), "holds 'x', which is not of type float"),
    ),
)
def test_parameters_that_are_no_setting_of_a_recipe(notebook, given, answer):
    assert answer in refusal(notebook, given)


def test_a_build_takes_all_64_bits_of_a_seed():
    assert refusal('build', dict(seed=2**40)) is None


def test_the_generator_of_initial_weights_wraps():
    "Why a run's seed ends at 2³² - 1."
    import torch

    def first(seed):
        return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()

    assert first(2**32) == first(0)
    assert first(2**32 - 1) != first(0)


# Names of other programs


@pytest.mark.parametrize('name, ours', OTHER_NAMES.items())
def test_a_name_of_another_program_leads_to_ours(name, ours):
    known = {f.name for f in (*fields(Recipe), *fields(Run))}
    assert ours in known | {p for n in run_notebooks() for p in read_parameters(n)}
    assert name not in known
    for notebook in ('pretrain', 'finetune'):
        declared = read_parameters(notebook)
        said = refusal(notebook, {name: 3})
        if ours in declared:
            assert said.endswith(f'did you mean {ours!r}?')
        elif ours in OPTIONS:
            assert said.endswith(f"did you mean -y 'options: {{{ours}: 3}}'?")
    if ours in OPTIONS:
        assert f'did you mean {ours!r}?' in refusal('pretrain', dict(options={name: 3}))


def test_a_setting_that_is_no_parameter_is_sent_to_the_options():
    said = refusal('pretrain', dict(drop=0.1))
    assert said.endswith("did you mean -y 'options: {drop: 0.1}'?")


# Lists that stand here because importing the originals takes seconds


def test_optimizers_are_timms():
    from timm.optim import list_optimizers

    from fdsl_nb.training import plan

    assert set(plan._OPTIMIZERS) <= set(list_optimizers())
    for name in ('lookahead_adamw', 'AdamW', 'bnbadam8bit', 'fusedsgd', *plan._OPTIMIZERS):
        plan.check_opt(name)


def test_choices_are_those_that_the_code_knows():
    from fdsl_nb.build.build import MODES
    from fdsl_nb.formulas.layout import FORMATS, LAYOUTS
    from fdsl_nb.formulas.formula import Formula
    from fdsl_nb.models.models import RESIZE_MODES
    from fdsl_nb.training import plan
    from fdsl_nb.training.optimise import CLOSED_FORMS

    assert set(plan.PROGRAM_SCHEDULES) == set(CLOSED_FORMS)
    assert set(plan.RESIZE_MODES) == set(RESIZE_MODES)
    build = parameter_limits('build')
    assert build['layout'].choices == tuple(LAYOUTS)
    assert build['format'].choices == tuple(FORMATS)
    assert build['mode'].choices == tuple(MODES)
    knobs = {f.name: f.metadata for f in fields(Formula)}
    for name in ('classes', 'instances', 'size', 'seed'):
        ends = knobs[name]['low'], knobs[name]['high']
        assert (build[name].low, build[name].high) == ends


def test_every_schedule_makes_one():
    import torch

    from fdsl_nb.training.optimise import make_schedule
    from fdsl_nb.training.plan import SCHEDULES

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    for sched in SCHEDULES:
        r = checked(Recipe(sched=sched, epochs=20, warmup_epochs=2, decay_epochs=5))
        make_schedule(optimizer, r, 10).step(0)


AA = ('rand-m9-mstd0.5-inc1', 'rand', 'rand-m9-n3-p0.7-mmax10', 'rand-mstd101-tweights', 'rand-t3a')
AA += (
    'augmix',
    'augmix-m3-w3-d2-a0.5-b1-mstd0',
    'original',
    'originalr-mstd0.5',
    'v0',
    'v0r',
    '3a',
)


@pytest.mark.parametrize('name', AA)
def test_timm_builds_an_accepted_policy(name):
    from timm.data import create_transform

    check_aa(name)
    create_transform(32, is_training=True, auto_augment=name)


@pytest.mark.parametrize(
    'name', ('random', 'rand-', 'rand-m', 'rand-m9.5', 'rand-tx', 'rand-p2', 'v1', 'augmix-q3', '-')
)
def test_other_policies_are_refused(name):
    with pytest.raises(ValueError, match='is no policy|has a section'):
        check_aa(name)


# Nothing given is ignored


def lengths(config):
    names = 'epochs', 'max_steps', 'eval_every', 'samples_per_epoch'
    return {k: (config[k].value, config[k].source) for k in names}


STEPS = 'vitpytorch_cifar10_b16'  # 10,000 steps of 512, evaluated every 100


def test_the_configuration_shows_the_epochs_that_a_recipe_in_steps_has():
    found = lengths(resolve('finetune', {}, STEPS, 'paper'))
    source = f'recipe {STEPS}'
    assert found['epochs'] == (100, source)
    assert found['max_steps'] == (10_000, source)
    assert found['samples_per_epoch'] == (51_200, source)


def test_epochs_replace_steps():
    found = lengths(resolve('finetune', dict(epochs=7), STEPS, 'paper'))
    assert found['epochs'] == (7, 'parameter')
    assert found['max_steps'] == found['eval_every'] == (0, 'parameter epochs')


def test_steps_replace_epochs():
    found = lengths(resolve('pretrain', dict(max_steps=50, batch_size=64), 'rcdb1k_deit_tiny'))
    assert found['max_steps'] == (50, 'parameter')
    assert found['epochs'] == (1, 'parameter max_steps')
    assert found['samples_per_epoch'] == (3200, 'parameter max_steps')


def warmups(stage, given, name, budget='paper'):
    config = resolve(stage, given, name, budget)
    return [(config[k].value, config[k].source) for k in ('warmup_epochs', 'warmup_steps')]


def test_one_warmup_replaces_the_other():
    name = 'visualatom1k_vit_tiny'  # 5000 steps
    recipe = f'recipe {name}'
    assert warmups('pretrain', {}, name) == [(0, recipe), (5000, recipe)]
    found = warmups('pretrain', dict(warmup_epochs=2), name)
    assert found == [(2, 'parameter'), (0, 'parameter warmup_epochs')]
    found = warmups('pretrain', dict(warmup_epochs=0), name)
    assert found == [(0, 'parameter'), (0, 'parameter warmup_epochs')]
    found = warmups('pretrain', dict(warmup_steps=9), 'rcdb1k_deit_tiny')
    assert found == [(0, 'parameter warmup_steps'), (9, 'parameter')]
    found = warmups('pretrain', dict(sched='vitpytorch_cosine'), 'rcdb1k_deit_tiny')
    assert found[0] == (0, 'parameter sched')


@pytest.mark.parametrize(
    'given, name, answer',
    (
        (dict(epochs=7, max_steps=100), None, 'epochs=7 and max_steps=100 exclude each other'),
        (dict(warmup_epochs=1, warmup_steps=9), None, 'warmup_epochs=1 and warmup_steps=9 exclude'),
        (dict(samples_per_epoch=64), STEPS, 'samples_per_epoch=64 with max_steps=10000'),
        (dict(samples_per_epoch=64, max_steps=9), None, 'samples_per_epoch=64 with max_steps=9'),
        (dict(max_steps=0), STEPS, f'max_steps=0, but {STEPS} counts in steps'),
        (dict(warmup_epochs=2), STEPS, "warmup_epochs=2 is nothing that sched='vitpytorch_cosine'"),
        (dict(warmup_steps=2, sched='plateau'), None, 'give warmup_epochs'),
        (dict(epochs=7, eval_every=10), STEPS, 'eval_every=10 without max_steps'),
    ),
)
def test_a_value_that_would_be_ignored_is_refused(given, name, answer):
    with pytest.raises(ValueError, match=re.escape(answer)):
        resolve('finetune', given, name, 'paper')


@pytest.mark.parametrize('r', [*PRETRAIN, *FINETUNE], ids=lambda r: r.name)
def test_the_configuration_is_the_recipe_that_is_trained(r):
    "What `config.json` says of lengths is what `in_epochs` makes of it, and not changed again."
    stage = 'pretrain' if r in PRETRAIN else 'finetune'
    config = {k: v.value for k, v in resolve(stage, {}, r.name, 'paper').items()}
    trained = in_epochs(Recipe(**{f.name: config[f.name] for f in fields(Recipe)}))
    assert (trained.epochs, trained.samples_per_epoch) == (
        config['epochs'],
        config['samples_per_epoch'],
    )
    assert not (config['warmup_epochs'] and config['warmup_steps'])


# Help


def test_help_shows_ranges_and_choices():
    text = ' '.join(described('pretrain', 200).split())
    for shown in (
        'passes through the data [1 … ∞]',
        'stochastic depth [0 … 1 (without 1)]',
        '[offline, online, disabled]',
        '[float32, bfloat16, float16]',
    ):
        assert shown in text


# Real trainings at the edges


TOO_LONG = ('epochs', 'max_steps', 'samples_per_epoch', 'img_size', 'eval_every', 'resize_size')


def edges(limits, expected):
    "Values at the ends of a range, and far inside where it is open."
    small, large = (1, 2**40) if expected is int else (1e-6, 1e6)
    low = limits.low if limits.low is not None else limits.above + small
    high = limits.high
    if high is None:
        high = large if limits.below is None else limits.below - 1e-6
    return list(dict.fromkeys(expected(v) for v in (low, low + small, high)))


def edge_cases():
    for f in fields(Recipe):
        limits = f.metadata.get('limits', Limits())
        if f.type in (int, float) and limits.has_range:
            for value in edges(limits, f.type):
                if f.name not in TOO_LONG or value <= 1:
                    yield f.name, value


BESIDE = dict(  # what makes a setting count
    lr_noise_pct=dict(lr_noise=(0.0, 1.0)),
    lr_noise_std=dict(lr_noise=(0.0, 1.0)),
    lr_cycle_mul=dict(lr_cycle_limit=3),
    lr_cycle_decay=dict(lr_cycle_limit=3),
    decay_rate=dict(sched='poly'),
    decay_epochs=dict(sched='step'),
    patience_epochs=dict(sched='plateau'),
    mixup_prob=dict(mixup=0.8),
    mixup_switch_prob=dict(mixup=0.8, cutmix=1.0),
    mixup_off_epoch=dict(mixup=0.8),
    recount=dict(reprob=1.0),
    valid_pct=dict(dataset='digits', knobs={}),
    opt_eps=dict(opt='adamw'),
    momentum=dict(opt='momentum'),
)


@pytest.mark.slow
@pytest.mark.parametrize('name, value', list(edge_cases()))
def test_an_accepted_edge_trains_or_is_refused(name, value, tmp_path):
    from training_helpers import trained

    given = dict(img_size=32, epochs=1) | BESIDE.get(name, {}) | {name: value}
    try:
        _, watch, _ = trained(tmp_path, **given)
        assert watch.losses
    except (ValueError, FloatingPointError) as e:
        assert '; ' in str(e), f'{name}={value} died with {e!r}'
