"""Sweeps: a pre-training for each value; run here or beside each other; interrupted, continued."""

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import dask_cluster
from PIL import Image

from fdsl_nb.app.experiments import (
    copy_finished,
    data_fingerprint,
    experiment_cost,
    experiment_record,
    gains_table,
    half_width,
    plan_steps,
    planned,
    results,
    run_experiment,
    run_steps,
    settings_of,
    show_gains,
    show_steps,
    variants,
    with_ablation,
)
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.app.sweeps import show_sweep, sweep_table
from fdsl_nb.core.folder import RunFolder, write_config
from fdsl_nb.core.settings import Resolved
from fdsl_nb.training.ablations import ABLATIONS
from fdsl_nb.training.training import RUN

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


def test_a_pretraining_on_real_images_stands_beside_the_formulas(tmp_path):
    values = FORM | dict(real='digits', seeds=2, pretrain=dict(epochs=3))
    steps = {s.name: s for s in planned(values, RunFolder(tmp_path)).steps}
    assert steps['real/pretrain-0'].parameters['dataset'] == 'digits'
    assert settings_of(steps['real/pretrain-0'])['epochs'] == 3
    assert steps['real/finetune-1'].inputs == dict(weights='real/pretrain-0/last.pth.tar')
    alike = ('real/finetune-0', 'rcdb1k_deit_tiny/finetune-0')
    first, second = (steps[name].parameters for name in alike)
    assert first == second
    assert sum(name.startswith('scratch') for name in steps) == 4


def test_finished_steps_of_another_experiment_are_copied(tmp_path):
    one = planned(SWEEP, RunFolder(tmp_path / 'one'))
    run, _ = interrupted_after(4)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(one, run)
    longer = SWEEP | dict(finetune=dict(epochs=2), steps_from=str(tmp_path / 'one'))
    two = planned(longer, RunFolder(tmp_path / 'two'))
    run, done = interrupted_after(100)
    run_experiment(two, run)
    # the pre-training is the same step in both, the fine-tunings are not
    shared = 'rcdb1k_deit_tiny,vertices_max=50/pretrain-0'
    assert done == [s.name for s in two.steps if s.name != shared]
    with pytest.raises(FileNotFoundError, match='is no folder'):
        nowhere = SWEEP | dict(steps_from=str(tmp_path / 'nowhere'))
        run_experiment(planned(nowhere, RunFolder(tmp_path / 'three')), pretend)


def test_a_copy_replaces_nothing(tmp_path):
    one = planned(SWEEP, RunFolder(tmp_path / 'one'))
    run_experiment(one, pretend)
    two = planned(SWEEP | dict(steps_from=str(tmp_path / 'one')), RunFolder(tmp_path / 'two'))
    kept = two.place(two.steps[0]) / 'mine.txt'
    kept.parent.mkdir(parents=True)
    kept.write_text('mine')
    with pytest.raises(OSError):
        copy_finished(two)
    assert kept.read_text() == 'mine'


def test_half_width_is_students():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert math.isnan(half_width([1.0]))


def test_gains_are_paired_by_seed(tmp_path):
    e = planned(SWEEP, RunFolder(tmp_path))
    run_experiment(e, pretend)
    rng, rights = np.random.default_rng(0), {}
    for step in e.steps:
        if step.notebook == 'evaluate':
            right = rights[step.name] = rng.random(100) < 0.5
            best = np.where(right, 1, 0)[:, None]
            place = RunFolder(e.place(step))
            np.savez(place.file('answers.npz'), best=best, labels=np.ones(100, int), losses=best)
            result = dict(split='test', correct=int(right.sum()), images=100, loss=1.0)
            result['top1'] = float(right.mean() * 100)
            place.file('result.json').write_text(json.dumps(result))
    table = gains_table(e)
    first = 'rcdb1k_deit_tiny,vertices_max=50'
    by_seed = [
        100.0 * rights[f'{first}/evaluate-{s}'] - 100.0 * rights[f'scratch/evaluate-{s}']
        for s in (0, 1)
    ]
    row = table.loc[first]
    assert row.gain == pytest.approx(np.mean(by_seed), abs=0.01)
    assert row.ci95_seeds == pytest.approx(half_width(np.mean(by_seed, 1)), abs=0.01)
    assert row.ci95_images == pytest.approx(half_width(np.mean(by_seed, 0)), abs=0.01)
    assert show_gains(e) is not None and (tmp_path / 'gains.png').exists()
    assert (tmp_path / 'gains.csv').read_text().startswith('start,seeds,gain')


def test_without_random_weights_there_are_no_gains(tmp_path):
    e = planned(SWEEP | dict(scratch=False), RunFolder(tmp_path))
    run_experiment(e, pretend)
    assert gains_table(e) is None and show_gains(e) is None


# the smallest sweep that trains: two pre-trainings, two fine-tunings, two evaluations
TINY = FORM | dict(
    sweep=dict(vertices_max=[50, 500]),
    scratch=False,
    notebooks=False,
    workers=0,
    pretrain=dict(
        epochs=1,
        samples_per_epoch=128,
        classes=4,
        instances=4,
        size=32,
        wandb_mode='disabled',
    ),
    finetune=dict(epochs=1, samples_per_epoch=128, wandb_mode='disabled'),
)
NUMBERS = ['start', 'seed', 'correct', 'loss']


def trained(values, folder, executor=None):
    "Start, seed, correct answers and loss of every evaluation of the sweep in a folder."
    run_experiment(planned(values | dict(scheduler=executor), RunFolder(folder)))
    return results(planned(values, RunFolder(folder)))[NUMBERS].sort_values(NUMBERS[:2])


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    return trained(TINY, tmp_path_factory.mktemp('alone'))


def begun(folder):
    said = [json.loads(p.read_text()) for p in folder.glob('*/*/step.json')]
    return sum(1 for s in said if s['state'] == 'done'), len(said)


@pytest.mark.slow
def test_killed_twice_and_continued(tmp_path, alone):
    words = (
        'import sys, json; from fdsl_nb.core.folder import RunFolder; '
        'from fdsl_nb.app.experiments import planned, run_experiment; '
        'run_experiment(planned(json.loads(sys.argv[1]), RunFolder(sys.argv[2])))'
    )
    folder = tmp_path / 'killed'
    for steps in (2, 5):  # killed while this step runs
        command = [sys.executable, '-c', words, json.dumps(TINY), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while begun(folder)[1] < steps and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert begun(folder)[0] == steps - 1
    assert trained(TINY, folder).equals(alone)


@pytest.mark.slow
def test_two_dask_workers_over_tcp_come_to_the_same_numbers(tmp_path, alone, monkeypatch):
    "The workers are in a folder of their own."
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    with dask_cluster(tmp_path / 'elsewhere') as client, contextlib.chdir(tmp_path):
        found = trained(TINY, 'below', client.scheduler.address)
    assert found.equals(alone)
    assert not list((tmp_path / 'elsewhere').rglob('result.json'))


def test_a_fingerprint_is_of_pixels_and_classes(tmp_path):
    def digits_folder(name, value):
        for split, n in (('train', 3), ('val', 1)):
            for c in '01':
                for k in range(n):
                    place = tmp_path / name / split / c
                    place.mkdir(parents=True, exist_ok=True)
                    Image.new('L', (4, 4), value + k).save(place / f'{k}.png')
        return data_fingerprint(str(tmp_path / name))

    first, same = digits_folder('a', 7), digits_folder('b', 7)
    assert first == same and first['train'].startswith('6 images, ')
    assert first != digits_folder('c', 8)


@pytest.mark.process
def test_the_record_says_machine_versions_and_cost(tmp_path):
    e = planned(FORM | dict(scratch=False), RunFolder(tmp_path))
    run_experiment(e, pretend)
    for step in e.steps[:2]:
        config = {k: Resolved(v, 'test') for k, v in (RUN | settings_of(step)).items()}
        write_config(RunFolder(e.place(step)), config)
    said, cost = experiment_record(e), experiment_cost(e)
    assert {'machine', 'commit', 'torch', 'digits, test'} <= set(said.index)
    # the demo: ten epochs of 100 batches of 64; twelve of the 24 whole batches of 797 digits
    assert cost.loc['pretrain', ['images', 'steps']].tolist() == [64000, 1000]
    assert cost.loc['finetune', ['images', 'steps']].tolist() == [12 * 24 * 32, 12 * 24]
    assert cost.loc['evaluate', 'images'] == 100
    assert json.loads((tmp_path / 'record.json').read_text())['cost'][0]['stage'] == 'pretrain'
