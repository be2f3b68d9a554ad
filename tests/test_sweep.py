"""Sweeps: a pre-training for each value; run here or beside each other; interrupted, continued."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fdsl_nb.app.experiments import (
    plan_steps,
    planned,
    results,
    run_experiment,
    run_steps,
    settings_of,
    show_steps,
    variants,
    with_ablation,
)
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.app.sweeps import show_sweep, sweep_table
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.training.ablations import ABLATIONS

FORM = {p.name: p.default for p in read_parameters('reproduce').values()}
SWEEP = FORM | dict(sweep=dict(vertices_max=[50, 500]), seeds=2)


def pretend(e, step):
    "Leaves a result that depends on the step alone."
    result = dict(seconds=1)
    if step.notebook == 'evaluate':
        correct = sum(step.name.encode()) % 100
        result = dict(split='test', correct=correct, images=100, top1=correct, loss=1.0)
    RunFolder(e.place(step)).file('result.json').write_text(json.dumps(result))


def test_every_value_reaches_its_place():
    sweep = {'vertices_max': [50], 'lr': [0.003], 'drop': [0.2], 'finetune.lr': [0.01]}
    (v,) = variants(FORM | dict(sweep=sweep, pretrain=dict(epochs=3, knobs=dict(classes=7))))
    assert v.name == 'rcdb1k_deit_tiny,vertices_max=50,lr=0.003,drop=0.2,finetune.lr=0.01'
    pretrain, finetune, _ = plan_steps(v.values | dict(sweep=None, scratch=False))
    config = settings_of(pretrain)
    assert (config['lr'], config['drop'], config['epochs']) == (0.003, 0.2, 3)
    assert config['knobs']['vertices_max'] == 50 and config['knobs']['classes'] == 7
    assert settings_of(finetune)['lr'] == 0.01


def test_scratch_is_shared_by_the_values_of_a_knob():
    names = [s.name for s in plan_steps(SWEEP)]
    assert len(names) == 2 * (1 + 2 * 2) + 2 * 2
    assert sum(name.startswith('scratch/') for name in names) == 4
    assert 'rcdb1k_deit_tiny,vertices_max=50/pretrain-0' in names


@pytest.mark.parametrize(
    'sweep, words',
    [
        (dict(vertices_max=50), 'should be a list of values'),
        (dict(vertices_max=[]), 'should be a list of values'),
        (dict(vertices_max=[50, 50]), 'a value twice'),
        (dict(vertices_max=[[1], [2]]), 'numbers or words'),
        (dict(vertices_mx=[50]), "did you mean 'vertices_max'"),
        ({'evaluate.lr': [1.0]}, 'names no stage'),
        (dict(smoothing=[-1.0]), 'smoothing=-1.0 is outside'),
        (dict(vertices_max=[2]), 'vertices_max=2'),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_runs(sweep, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        planned(FORM | dict(sweep=sweep), RunFolder(tmp_path))
    assert not list(tmp_path.glob('rcdb*'))


def test_every_ablation_can_be_planned():
    for a in ABLATIONS:
        steps = plan_steps(with_ablation(FORM | dict(ablation=a.name)))
        points = max(1, len(variants(with_ablation(FORM | dict(ablation=a.name)))))
        assert len(steps) >= 3 * points


def test_an_ablation_has_its_own_recipes():
    with pytest.raises(ValueError, match='leave one of them out'):
        with_ablation(FORM | dict(ablation='onepfrac_delta'), ('recipe',))
    with pytest.raises(ValueError, match="did you mean 'onepfrac_delta'"):
        with_ablation(FORM | dict(ablation='onepfrac_dleta'))


def interrupted_after(n):
    "`pretend`, and a KeyboardInterrupt instead of step n."
    done = []

    def run(e, step):
        if len(done) == n:
            raise KeyboardInterrupt
        done.append(step.name)
        pretend(e, step)

    return run, done


def test_interrupted_twice_and_continued(tmp_path):
    e = planned(SWEEP, RunFolder(tmp_path))
    ran = []
    for n in (3, 4):
        run, done = interrupted_after(n)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(e, run)
        ran += done
        e = planned(SWEEP, RunFolder(tmp_path))
    run, done = interrupted_after(100)
    found = run_experiment(e, run)
    assert ran + done == [s.name for s in e.steps]  # each once, in order
    assert len(found) == 6 and set(show_steps(e).state) == {'done'}


def test_beside_each_other_the_same_results(tmp_path):
    alone = planned(SWEEP, RunFolder(tmp_path / 'alone'))
    run_experiment(alone, pretend)
    beside = planned(SWEEP, RunFolder(tmp_path / 'beside'))
    at_once, most, lock = [], [], threading.Lock()

    def run(e, step):
        for other in e.steps:
            if step.follows(other):
                assert RunFolder(e.place(other)).file('result.json').exists()
        with lock:
            at_once.append(step)
            most.append(len(at_once))
        time.sleep(0.02)
        pretend(e, step)
        with lock:
            at_once.remove(step)

    with ThreadPoolExecutor(4) as executor:
        run_steps(beside, run, executor)
    assert max(most) >= 3
    assert results(beside).equals(results(alone))


def test_after_a_failure_nothing_starts_and_what_runs_ends(tmp_path):
    e = planned(SWEEP, RunFolder(tmp_path))
    broken = 'rcdb1k_deit_tiny,vertices_max=50/pretrain-0'

    def run(e, step):
        if step.name == broken:
            raise RuntimeError('the disk is full')
        time.sleep(0.1)
        pretend(e, step)

    with ThreadPoolExecutor(2) as executor, pytest.raises(RuntimeError, match='the disk is full'):
        run_steps(e, run, executor)
    states = show_steps(e).state
    assert states[broken] == 'begun'
    assert states.eq('done').sum() <= 2 and states.eq('begun').sum() == 1


def test_table_and_figures(tmp_path):
    e = planned(SWEEP, RunFolder(tmp_path))
    run_experiment(e, pretend)
    table = sweep_table(e)
    runs = results(e).set_index(['start', 'seed']).top1
    first = 'rcdb1k_deit_tiny,vertices_max=50'
    row = table.set_index('start').loc[first]
    assert row.top1 == runs[first].mean()
    assert row.gain == pytest.approx((runs[first] - runs['scratch']).mean())
    assert show_sweep(e) is not None and (tmp_path / 'sweep.png').stat().st_size > 10_000


def test_two_names_make_a_grid(tmp_path):
    values = FORM | dict(sweep=dict(vertices_max=[50, 500], lines_min=[1, 100]), scratch=False)
    e = planned(values, RunFolder(tmp_path))
    run_experiment(e, pretend)
    (axes, *_) = show_sweep(e).axes
    assert axes.get_xlabel() == 'lines_min' and len(axes.texts) == 4


def test_without_a_sweep_there_is_no_figure(tmp_path):
    e = planned(FORM | dict(scratch=False), RunFolder(tmp_path))
    run_experiment(e, pretend)
    assert show_sweep(e) is None
