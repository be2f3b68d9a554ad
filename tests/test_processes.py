"""One, two and four processes train alike, and end together.

The same losses, every image once and with the same augmentation, exact counts.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter

import psutil
import pytest
from training_helpers import (
    BASE,
    Lost,
    Seen,
    Slow,
    Watch,
    command,
    printed,
    run_ranks,
    start_ranks,
    values,
    wait_ranks,
)

from fdsl_nb.core.folder import RunFolder

pytestmark = pytest.mark.process

ON = dict(
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.5,
    hflip=0.5,
    scale=(0.3, 1.0),
    ratio=(3 / 4, 4 / 3),
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    drop_path=0.1,
    model_ema_decay=0.9,
    aug_repeats=3,
    recovery_interval=2,
)


def losses(folder):
    return [json.loads(line)['loss'] for line in (folder / 'losses.jsonl').read_text().splitlines()]


def test_the_same_losses_on_any_number_of_processes(tmp_path):
    found = {}
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        given = dict(
            opt='sgd',
            lr=0.05,
            epochs=10,
            aa='rand-m9-mstd0.5-inc1',
            reprob=0.5,
            scale=(0.3, 1.0),
            warmup_epochs=2,
            clip_grad=1.0,
            grad_accum_steps=2,
        )
        run_ranks(values(folder, **given), processes, (Watch, (folder / 'losses.jsonl',)))
        found[processes] = losses(folder)
    assert len(found[1]) == 20 and max(found[1]) - min(found[1]) > 1e-2, 'nothing was trained'
    for processes in (2, 4):
        assert max(abs(a - b) for a, b in zip(found[1], found[processes], strict=True)) < 1e-5


def test_every_image_once_and_augmented_alike(tmp_path):
    found = {}
    for processes, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
        folder = tmp_path / f'{processes}-{workers}'
        # a class an image, so that its label is its number
        knobs = BASE['knobs'] | dict(classes=32, instances=1)
        given = ON | dict(knobs=knobs, workers=workers, aug_repeats=1)
        run_ranks(values(folder, **given), processes, (Seen, (folder,)))
        lines = [
            line for file in folder.glob('seen-*.jsonl') for line in file.read_text().splitlines()
        ]
        rows = [tuple(json.loads(line)) for line in lines]
        once = {(epoch, image): 1 for epoch in range(2) for image in range(32)}
        assert Counter((epoch, image) for epoch, image, _ in rows) == once
        found[processes, workers] = set(rows)
    different = {seen for _, _, seen in found[1, 0]}
    assert len(different) > 50, 'epochs and images look alike'  # a few crops are empty
    assert all(rows == found[1, 0] for rows in found.values())


def test_counts_are_exact_where_images_do_not_divide(tmp_path):
    "797 images train, 200 choose, 800 measure; on three processes none of these divides."
    results = {}
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        config = values(
            folder,
            dataset='digits',
            knobs={},
            batch_size=60,
            epochs=2,
            opt='sgd',
            lr=0.05,
            eval_metric='top1',
            clip_grad=1.0,
        )
        run_ranks(config, processes)
        results[processes] = json.loads((folder / 'result.json').read_text())
    one, three = results[1], results[3]
    assert three['images'] == one['images'] == 800 == sum(map(sum, three['confusion']))
    assert [sum(row) for row in three['confusion']] == [sum(row) for row in one['confusion']]
    assert three['confusion'] == one['confusion']
    assert three['loss'] == pytest.approx(one['loss'], abs=1e-5)


def after_some_steps(file, steps=3, seconds=90):
    "Waits until the run has made some steps."
    until = time.time() + seconds
    while time.time() < until:
        if file.exists() and len(file.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    pytest.fail(f'no {steps} steps in {seconds} s')


def reason(folder):
    assert RunFolder(folder).state == 'failed'
    return RunFolder(folder).status['reason']


def alive(processes, seconds):
    "Those that still run after some seconds; what only waits to be collected has ended."
    until, left = time.time() + seconds, processes
    while left and time.time() < until:
        left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return left


LONG = dict(epochs=200, workers=1, train_crop_mode='inception')  # which needs a process


def test_a_rank_that_fails_ends_all_and_says_why(tmp_path):
    ranks = start_ranks(values(tmp_path, dataset='training_helpers:Stumbling'), 2)
    codes, now = wait_ranks(ranks), time.time()
    stumbled = [x for x in printed(tmp_path).splitlines() if x.startswith('stumbled')]
    assert all(codes) and now - float(stumbled[0].split()[-1]) < 10
    assert 'ArithmeticError: no picture of class 1, instance 1' in reason(tmp_path)


@pytest.mark.parametrize('which', (0, 1))
def test_a_rank_that_is_killed_ends_all(which, tmp_path):
    "As under a cluster's launcher; what is left of the run says that a partner was lost."
    ranks = start_ranks(values(tmp_path, **LONG), 2, (Slow, (tmp_path / 'steps',)))
    after_some_steps(tmp_path / 'steps')
    family = [c for p in ranks for c in psutil.Process(p.pid).children(recursive=True)]
    os.kill(ranks[which].pid, signal.SIGKILL)
    killed = time.time()
    codes = wait_ranks(ranks, 20)
    assert time.time() - killed < 10
    assert codes[which] == -signal.SIGKILL and codes[1 - which] not in (0, None)
    assert alive(family, 15) == [], 'a worker process was left behind'
    assert f'process {1 - which} of 2: ' in reason(tmp_path) and 'onnection' in reason(tmp_path)


def two_processes(tmp_path):
    "A program whose training has two ranks, some steps done; and all that it has started."
    words, environment = command(
        values(tmp_path, processes=2, **LONG), ('Slow', [str(tmp_path / 'steps')])
    )
    with open(tmp_path / 'printed', 'w') as out:
        child = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
    after_some_steps(tmp_path / 'steps')
    family = psutil.Process(child.pid).children(recursive=True)
    return child, family


@pytest.mark.slow
@pytest.mark.parametrize('victim', ('rank', 'worker'))
def test_a_killed_process_of_our_own_launching_ends_the_run(victim, tmp_path):
    "The notebook's process starts the ranks and says how they ended; also for a loading worker."
    child, family = two_processes(tmp_path)
    workers = [p for p in family if 'fdsl_nb.training.worker' in p.cmdline()]
    ranks = [p for p in workers if p.ppid() != child.pid and p.children()]
    loads = [p for r in ranks for p in r.children()]
    os.kill((ranks if victim == 'rank' else loads)[-1].pid, signal.SIGKILL)
    killed = time.time()
    while RunFolder(tmp_path).status['state'] == 'running' and time.time() < killed + 30:
        time.sleep(0.05)
    assert alive(family, 1) == [] and time.time() - killed < 10
    said = 'died without saying why (killed' if victim == 'rank' else 'DataLoader worker'
    assert said in reason(tmp_path)
    assert child.wait(30) == 1


PHASES = 'start', 'first batch', 'training', 'evaluation', 'saving'


def slowly(phase, number):
    quick = (phase, number) in (('evaluation', signal.SIGSTOP), ('start', signal.SIGKILL))
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ('phase', 'number'),
    [
        pytest.param(p, n, marks=slowly(p, n), id=f'{n.name} in {p}')
        for p in PHASES
        for n in (signal.SIGKILL, signal.SIGSTOP)
    ],
)
def test_nobody_waits_for_a_partner_that_is_lost(phase, number, tmp_path):
    "In no phase longer than is stated: here 15 s at the start and 10 s later, some for noticing."
    victim = 0 if phase == 'saving' else 1
    given = dict(valid_pct=0.25, eval_metric='top1', workers=1, recovery_interval=0)
    ranks = start_ranks(
        values(tmp_path, **given), 2, (Lost, (victim, phase, number, tmp_path / 'lost'))
    )
    try:
        ranks[1 - victim].join(90)
        ended = time.time()
        assert ranks[1 - victim].exitcode not in (0, None), printed(tmp_path)
        assert ended - float((tmp_path / 'lost').read_text()) < 30
    finally:
        for p in ranks:
            p.kill()
        wait_ranks(ranks)
    if number == signal.SIGSTOP or phase in ('start', 'evaluation'):
        said = 'have not all come' if phase == 'start' else 'no sign of life'
        assert said in reason(tmp_path) and f'process {1 - victim} of 2: ' in reason(tmp_path)


@pytest.mark.parametrize('processes', (1, pytest.param(2, marks=pytest.mark.slow)))
def test_sigterm_is_recorded_whoever_gets_it(processes, tmp_path):
    "A scheduler sends it to every process of the job, a user to one."
    ranks = start_ranks(values(tmp_path, **LONG), processes, (Slow, (tmp_path / 'steps',)))
    after_some_steps(tmp_path / 'steps')
    os.kill(ranks[-1].pid, signal.SIGTERM)
    codes = wait_ranks(ranks, 20)
    assert 0 not in codes and -signal.SIGKILL not in codes
    status = RunFolder(tmp_path).status
    assert status['state'] == 'interrupted' and 'ended by SIGTERM' in status['reason']
    assert status['pid'] == ranks[-1].pid


@pytest.mark.slow
@pytest.mark.parametrize('victim', ('program', 'rank'))
def test_sigterm_to_a_program_with_its_own_processes(victim, tmp_path):
    child, family = two_processes(tmp_path)
    rank = next(p for p in family if p.ppid() != child.pid and p.children())
    os.kill(child.pid if victim == 'program' else rank.pid, signal.SIGTERM)
    child.wait(30)
    assert alive(family, 15) == []
    status = RunFolder(tmp_path).status
    assert status['state'] == 'interrupted' and 'ended by SIGTERM' in status['reason']
