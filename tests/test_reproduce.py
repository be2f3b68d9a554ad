"""Whole experiments: real notebooks by papermill, killed on the way; and what must be refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fdsl_nb.app import experiments
from fdsl_nb.app.compare import table_text
from fdsl_nb.app.experiments import (
    run_step,
    experiment_table,
    identity,
    planned,
    results,
    run_experiment,
    run_notebook,
    start_experiment,
    state_of,
)
from fdsl_nb.core.folder import RunFolder, read_config, set_status
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.training.training import read_result

NBS = Path(__file__).parent.parent / 'nbs'
FORM = {p.name: p.default for p in read_parameters('reproduce').values()}
TWO = FORM | dict(
    recipe=['rcdb1k_deit_tiny', 'visualatom1k_vit_tiny'], finetune_recipe='finetune_cvpr2022'
)
TINY = dict(
    recipe=TWO['recipe'],
    finetune_recipe='finetune_cvpr2022',
    published_for='cifar10',
    scratch=True,
    pretrain=dict(epochs=3, samples_per_epoch=256, classes=4, batch_size=32),
    finetune=dict(epochs=1, options=dict(eval_metric='top1')),
)


@pytest.fixture
def start():
    "Starts an experiment; what still runs when the test ends is ended with it."
    started = []

    def begin(folder, **given):
        folder.mkdir(exist_ok=True)
        words = [
            '-m',
            'papermill',
            str(NBS / 'reproduce.ipynb'),
            str(folder / 'reproduce.ipynb'),
            '--log-output',
            '--no-progress-bar',
            '-y',
            json.dumps(given),
        ]
        started.append(
            subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, 'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1'},
            )
        )
        return started[-1]

    yield begin
    for child in started:
        if child.poll() is None:
            kill_family(child, signal.SIGKILL)


def wait_for(holds, seconds=900):
    end = time.time() + seconds
    while not holds():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


def kill_family(child, sent):
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(sent)
    child.communicate(timeout=30)
    return family, psutil.wait_procs(family, timeout=20)[1]


def pretend(e, step):
    "An invented result in a notebook's place."
    result = dict(split='test', correct=50, images=100, top1=50.0, loss=1.0, seconds=6.0)
    RunFolder(e.place(step)).file('result.json').write_text(json.dumps(result))


@pytest.mark.slow
@pytest.mark.process
def test_an_experiment_killed_on_the_way_is_continued_to_the_whole_table(start, tmp_path):
    # epochs enough that one is cut: the kernel ends some seconds after papermill is killed
    place, given = (
        tmp_path / 'whole',
        TINY | dict(pretrain=TINY['pretrain'] | dict(epochs=16, samples_per_epoch=128)),
    )
    child = start(place, **given)
    first, broken = place / 'rcdb1k_deit_tiny', place / 'visualatom1k_vit_tiny' / 'pretrain-0'
    wait_for(lambda: (broken / 'summary.csv').exists() or child.poll() is not None)
    assert child.poll() is None, (
        f'ended by itself with {child.returncode}: {child.communicate()[0]}'
    )
    family, alive = kill_family(child, signal.SIGKILL)
    assert len(family) >= 3, 'a kernel, papermill and its kernel were expected'
    assert alive == [], 'processes were left behind'
    assert (
        RunFolder(place).state == 'interrupted'
        and json.loads((broken / 'step.json').read_text())['state'] == 'begun'
    )
    done = {p: p.stat().st_mtime_ns for p in first.rglob('*') if p.is_file()}

    printed = (child := start(place, **given)).communicate(timeout=900)[0]
    assert child.returncode == 0, printed
    assert {p: p.stat().st_mtime_ns for p in first.rglob('*') if p.is_file()} == done, (
        'a finished step was touched'
    )
    assert printed.count('done before') == 3 and '4/8 visualatom1k_vit_tiny/pretrain-0\n' in printed
    assert 'continuing after epoch' in (broken / 'pretrain.ipynb').read_text()

    rows = [line.split(' | ') for line in (place / 'table.md').read_text().split('\n')[2:-1]]
    assert [row[0].lstrip('| ') for row in rows] == [
        'rcdb1k_deit_tiny',
        'visualatom1k_vit_tiny',
        'scratch',
    ]
    assert [row[-1].rstrip(' |') for row in rows] == ['97.0', '97.6', '']
    for row, name in zip(rows, ('rcdb1k_deit_tiny', 'visualatom1k_vit_tiny', 'scratch')):
        tuned, examined = (
            read_result(RunFolder(place / name / f'{step}-0')) for step in ('finetune', 'evaluate')
        )
        assert (
            (tuned['correct'], tuned['images'], tuned['split'])
            == (examined['correct'], examined['images'], examined['split'])
            == (tuned['correct'], 800, 'test')
        )
        assert row[-2] == f"{examined['correct']}/800"
    scratch, other = (
        read_config(RunFolder(place / name / 'finetune-0'))
        for name in ('scratch', 'rcdb1k_deit_tiny')
    )
    differ = {k for k in scratch if scratch[k] != other[k]}
    assert differ == {'folder', 'weights'}, 'only the start may differ'
    assert (place / 'report.png').stat().st_size > 5000 and RunFolder(place).state == 'done'


@pytest.mark.process
def test_a_failing_step_ends_it_with_the_cause_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    given = FORM | dict(
        scratch=False,
        pretrain=dict(epochs=1, samples_per_epoch=128, batch_size=32, lr=1e30, warmup_epochs=0),
        finetune=dict(epochs=1),
        run=str(tmp_path),
    )
    e = start_experiment(given)
    with pytest.raises(
        RuntimeError,
        match=r'rcdb1k_deit_tiny/pretrain-0: FloatingPointError: (.*\n)?.*loss=nan.* lower lr',
    ):
        run_experiment(e)
    assert [state_of(e, s) for s in e.steps] == ['begun', 'new', 'new']
    assert e.folder.state == 'failed' and 'lower lr' in e.folder.status['reason']
    ran = []
    run_experiment(start_experiment(given), lambda e, s: (ran.append(s.name), pretend(e, s)))
    assert ran == [s.name for s in e.steps]


@pytest.mark.process
def test_a_notebook_that_cannot_start_says_so(tmp_path, monkeypatch):
    (tmp_path / 'broken.ipynb').write_text('{')
    monkeypatch.setattr(experiments, 'find_notebook', lambda name: tmp_path / 'broken.ipynb')
    e = planned(TWO, RunFolder(tmp_path / 'run'))
    with pytest.raises(
        RuntimeError,
        match=r'pretrain-0: \S*(Error|NotJSON).*; the rest of the story is in .*papermill.log',
    ):
        run_step(e, e.steps[0], run_notebook)


def test_what_was_done_stays_done_when_recipes_and_seeds_are_added(tmp_path):
    ran = []

    def run(e, s):
        ran.append(s.name)
        pretend(e, s)

    run_experiment(
        planned(FORM | dict(finetune_recipe='finetune_cvpr2022'), RunFolder(tmp_path)), run
    )
    assert len(ran) == 5
    more = planned(TWO | dict(seeds=3), RunFolder(tmp_path))
    run_experiment(more, run)
    assert len(ran) == len(set(ran)) == len(more.steps) == 20
    assert len(results(more)) == 9 and experiment_table(more).seeds.tolist() == [3, 3, 3]


def test_only_what_follows_from_a_change_is_done_again(tmp_path):
    ran = []

    def run(e, s):
        ran.append(s.name)
        pretend(e, s)

    run_experiment(planned(TWO, RunFolder(tmp_path)), run)
    changed = TWO | dict(pretrain=dict(lr=0.002))
    with pytest.raises(
        ValueError,
        match='pretrain-0 holds another pretrain step: lr=None there, lr=0.002 here; '
        '.* overwrite=True',
    ):
        planned(changed, RunFolder(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'scratch').rglob('*')}
    ran.clear()
    run_experiment(planned(changed | dict(overwrite=True), RunFolder(tmp_path)), run)
    assert (
        sorted({name.split('/')[0] for name in ran})
        == ['rcdb1k_deit_tiny', 'visualatom1k_vit_tiny']
        and len(ran) == 6
    )
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'scratch').rglob('*')} == before
    ran.clear()
    run_experiment(planned(changed | dict(overwrite=True), RunFolder(tmp_path)), run)
    assert ran == []


@pytest.mark.process
@pytest.mark.parametrize('overwrite', (False, True))
def test_a_step_begun_goes_on_unless_it_is_to_be_replaced(overwrite, tmp_path):
    e = planned(FORM, RunFolder(tmp_path))

    def breaks(e, s):
        begun = RunFolder(e.place(s))
        set_status(begun, 'running')
        begun.output('last.pth.tar').touch()
        raise RuntimeError('no disk')

    with pytest.raises(RuntimeError, match='no disk'):
        run_experiment(e, breaks)
    found = []

    def run(e, s):
        found.append((e.place(s) / 'last.pth.tar').exists())
        pretend(e, s)

    run_experiment(planned(FORM | dict(overwrite=overwrite), RunFolder(tmp_path)), run)
    assert found[0] != overwrite


def test_processes_and_workers_do_not_make_another_experiment(tmp_path):
    run_experiment(planned(TWO, RunFolder(tmp_path)), pretend)
    more = planned(
        TWO | dict(processes=2, workers=3, finetune=dict(wandb_group='all')), RunFolder(tmp_path)
    )
    assert {state_of(more, s) for s in more.steps} == {'done'}


# A network of published size takes seconds to make
@pytest.mark.parametrize('budget', ('demo', pytest.param('paper', marks=pytest.mark.slow)))
@pytest.mark.parametrize('name', [r.name for r in PRETRAIN])
def test_every_recipe_has_a_plan(name, budget, tmp_path):
    for more in (
        dict(),
        dict(online=False),
        dict(every_seed=True, seeds=2),
        dict(finetune_recipe=FINETUNE[-1].name),
    ):
        if name.startswith('coyo') and 'online' in more:
            continue  # photographs
        e = planned(FORM | dict(recipe=[name], budget=budget) | more, RunFolder(tmp_path))
        assert (
            len({s.name for s in e.steps})
            == len(e.steps)
            == len({identity(s, e.steps) for s in e.steps})
        )
        for n, step in enumerate(e.steps):
            assert all(other in e.steps[:n] for other in e.steps if step.follows(other))
            assert bool(step.inputs) == any(step.follows(other) for other in e.steps)


def test_recipes_that_differ_in_network_or_fine_tuning_have_scratch_rows_of_their_own(tmp_path):
    def scratch(**given):
        return {
            s.start: s.parameters['recipe']
            for s in planned(TWO | given, RunFolder(tmp_path)).steps
            if s.notebook == 'finetune' and not s.inputs
        }

    assert scratch() == {'scratch': 'finetune_cvpr2022'}
    assert scratch(finetune_recipe=None) == {
        'scratch': 'finetune_cvpr2022',
        'scratch-2': 'finetune_cvpr2023',
    }
    assert list(scratch(recipe=['rcdb1k_deit_tiny', 'rcdb1k_deit_small'], budget='paper')) == [
        'scratch',
        'scratch-2',
    ]
    assert scratch(scratch=False) == {}


def test_every_seed_has_a_pretraining_of_its_own(tmp_path):
    names = [
        s.inputs['weights'].split('/')[1]
        for s in planned(FORM | dict(seeds=2, every_seed=True), RunFolder(tmp_path)).steps
        if s.notebook == 'finetune' and s.inputs
    ]
    assert names == ['pretrain-0', 'pretrain-1']


@pytest.mark.parametrize(
    'slip, words',
    (
        (
            dict(recipe='rcdb1k_deit_tiny,visualatom'),
            "recipe='visualatom' is not a pretrain recipe",
        ),
        (dict(finetune_recipe='finetune_cvpr'), "did you mean 'finetune_cvpr20"),
        (dict(finetune_data='nowhere'), "dataset='nowhere' is not known"),
        (dict(published_for='cifar'), "did you mean 'cifar10"),
        (dict(pretrain=dict(epoch=3)), "did you mean 'epochs'"),
        (dict(finetune=dict(options=dict(mixupp=0.5))), "did you mean 'mixup'"),
        (dict(finetune=dict(weights='x')), 'the experiment decides this'),
        (dict(budget='large'), "budget='large' is not known"),
        (dict(recipe=3), "recipe=3 should be of type list"),
        (dict(recipe='coyo300m_vit_large', online=False), 'which no formula draws'),
        (dict(seeds=0), 'seeds=0 is outside 1'),
    ),
)
def test_slips_stop_it_before_anything_runs(slip, words, tmp_path):
    with pytest.raises((ValueError, TypeError), match=words.replace('(', r'\(')):
        start_experiment(TWO | slip | dict(run=str(tmp_path / 'slip')))
    assert (
        sorted(p.name for p in (tmp_path / 'slip').iterdir()) == ['files.txt', 'status.json']
        and RunFolder(tmp_path / 'slip').state == 'failed'
    )


def test_it_is_started_once_not_once_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match='start reproduce.ipynb once, with processes=4'):
        planned(TWO, RunFolder(tmp_path))


@pytest.mark.parametrize(
    'spoil',
    (
        lambda text: text[:-5],
        lambda text: text.replace('identity', 'idemtity'),
        lambda text: '[]',
        lambda text: '',
    ),
)
def test_a_damaged_record_is_named(spoil, tmp_path):
    e = planned(TWO, RunFolder(tmp_path))
    run_experiment(e, pretend)
    path = e.place(e.steps[2]) / 'step.json'
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match='evaluate-0.step.json is damaged'):
        planned(TWO, RunFolder(tmp_path))


def test_a_table_without_a_published_number_has_no_such_column(tmp_path):
    e = planned(TWO, RunFolder(tmp_path))
    run_experiment(e, pretend)
    table = experiment_table(e)
    assert 'published' not in table and table_text(table, 'markdown').count('\n') == 5


@pytest.mark.slow
def test_built_first_or_drawn_online_trains_to_the_same_accuracy(start, tmp_path):
    given = dict(
        scratch=False,
        pretrain=dict(
            epochs=2, samples_per_epoch=512, classes=4, instances=16, knobs=dict(drift=0.2)
        ),
        finetune=dict(epochs=2),
    )
    for name, online in (('online', True), ('built', False)):
        printed = (child := start(tmp_path / name, online=online, **given)).communicate(
            timeout=900
        )[0]
        assert child.returncode == 0, printed
    online, built = (
        read_result(RunFolder(tmp_path / name / 'rcdb1k_deit_tiny' / 'evaluate-0'))
        for name in ('online', 'built')
    )
    assert online['correct'] == built['correct'] and online['loss'] == built['loss']
