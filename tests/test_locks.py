"""One writer in a folder: two at once, kills, file systems without locks, and whole runs."""

import json
import os
import socket
import subprocess
import sys
import time

import filelock
import pytest
from training_helpers import Slow, printed, start_ranks, values, wait_ranks

from fdsl_nb.app.experiments import planned, run_experiment
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.build.build import build
from fdsl_nb.build.verify import verify
from fdsl_nb.core import folder as folders
from fdsl_nb.core.folder import RunFolder, locked, read_summary, refuse_other_run, set_status
from fdsl_nb.formulas.contours import VisualAtom

pytestmark = [pytest.mark.process]

SOFT = '''
import filelock
def no_flock(*_, **__):
    raise OSError(37, 'No locks available')
filelock.lock_descriptor = no_flock
'''
HOLD = '''
import sys, time
from fdsl_nb.core.folder import locked
with locked(sys.argv[1]):
    print('in', flush=True)
    time.sleep(600)
'''
ADD = '''
import pathlib, sys
from fdsl_nb.core.folder import locked
number = pathlib.Path(sys.argv[1]) / 'number'
for _ in range(40):
    with locked(sys.argv[1], wait=True):
        number.write_text(str(int(number.read_text()) + 1))
'''


@pytest.fixture
def start():
    "Starts Python code with arguments; what still runs when the test ends is killed."
    started = []

    def begin(code, *arguments):
        words = [sys.executable, '-c', code, *map(str, arguments)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for child in started:
        child.kill()
        child.wait()


def held_by(child):
    return f'is being written by process {child.pid} on host {socket.gethostname()}; wait for it'


def without_flock(monkeypatch):
    def no_flock(*_, **__):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(filelock, 'lock_descriptor', no_flock)


# The lock


@pytest.mark.parametrize('before', ('', SOFT), ids=('flock', 'soft'))
def test_the_second_is_refused_and_a_kill_does_not_block(before, start, tmp_path, monkeypatch):
    if before:
        without_flock(monkeypatch)
    child = start(before + HOLD, tmp_path)
    assert child.stdout.readline() == 'in\n'
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(ValueError, match=held_by(child)):
            with locked(tmp_path):
                pass
    assert time.monotonic() - began < 1
    child.kill()
    child.wait()
    assert (tmp_path / '.lock').exists()
    with locked(tmp_path):
        assert (tmp_path / '.lock').read_text().startswith(f'{os.getpid()}\n')
    assert not list(tmp_path.iterdir())


def test_without_flock_another_host_is_believed(tmp_path, monkeypatch):
    "Nobody here can know whether a process of another machine is gone."
    without_flock(monkeypatch)
    (tmp_path / '.lock').write_text('12\nnode17\n')
    with pytest.raises(ValueError, match='by process 12 on host node17; wait'):
        with locked(tmp_path):
            pass
    assert (tmp_path / '.lock').read_text() == '12\nnode17\n'


@pytest.mark.parametrize('before', ('', SOFT), ids=('flock', 'soft'))
def test_waiting_in_turn(before, start, tmp_path):
    "Each turn removes the file of the lock, and still nobody is inside beside another."
    (tmp_path / 'number').write_text('0')
    children = [start(before + ADD, tmp_path) for _ in range(4)]
    assert [child.wait(120) for child in children] == [0] * 4
    assert (tmp_path / 'number').read_text() == '160'
    assert [p.name for p in tmp_path.iterdir()] == ['number']


def test_an_error_inside_frees_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            with locked(tmp_path / 'new'):
                raise ZeroDivisionError
    assert not list((tmp_path / 'new').iterdir())


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.lock').symlink_to(tmp_path / 'thesis.txt')
    with pytest.raises(ValueError, match='is a link'):
        with locked(tmp_path / 'run'):
            pass
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_a_run_of_another_host_names_it_and_the_remedy(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(folders.socket, 'gethostname', lambda: 'node17')
        set_status(run, 'running')
    text = (tmp_path / 'status.json').read_text().replace(f'"pid": {os.getpid()}', '"pid": 12')
    (tmp_path / 'status.json').write_text(text)
    with pytest.raises(ValueError, match=r'process 12 on host node17\).*continues it from'):
        refuse_other_run(run, {})
    monkeypatch.setattr(folders.time, 'time', lambda now=time.time: now() + folders.LOST + 1)
    refuse_other_run(run, {})


# Whole runs


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_trainings_at_once(tmp_path):
    "The second is refused and writes nothing; the first ends; killed, it leaves the folder free."
    config = values(tmp_path / 'run', epochs=3)
    steps = tmp_path / 'steps'
    [first] = start_ranks(config, 1, (Slow, (steps,)))
    wait_for(steps.exists)
    before = RunFolder(tmp_path / 'run').status | dict(heartbeat='')
    for _ in range(2):
        [second] = start_ranks(config | dict(overwrite=True), 1)
        assert wait_ranks([second]) == [1]
    said = printed(tmp_path / 'run')
    assert said.count(f'run is being written by process {first.pid} on host') == 2
    assert RunFolder(tmp_path / 'run').status | dict(heartbeat='') == before
    assert not list((tmp_path / 'run').glob('replaced-*'))
    first.kill()
    first.join()
    assert RunFolder(tmp_path / 'run').state == 'interrupted'
    [third] = start_ranks(config, 1)
    assert wait_ranks([third]) == [0], printed(tmp_path / 'run')
    assert RunFolder(tmp_path / 'run').state == 'done'
    assert [row['epoch'] for row in read_summary(RunFolder(tmp_path / 'run'))] == [0, 1, 2]
    assert not (tmp_path / 'run' / '.lock').exists()


SMALL = dict(classes=4, instances=8, size=96, start_range=10, lines_max=20)
BUILD = '''
import json, sys, time
from fdsl_nb.build.build import build
from fdsl_nb.formulas.contours import VisualAtom
def wait(*_):
    print('in', flush=True)
    time.sleep(600)
more = json.loads(sys.argv[2])
build(VisualAtom(**more.pop('knobs')), sys.argv[1], workers=0, progress=wait, **more)
'''


def test_two_builds_at_once(start, tmp_path):
    for layout in ('plain', 'shards'):
        arrangement = dict(layout=layout, shard_images=8)
        out = tmp_path / layout
        first = start(BUILD, out, json.dumps(arrangement | dict(knobs=SMALL)))
        assert first.stdout.readline() == 'in\n'
        began = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
        with pytest.raises(ValueError, match=held_by(first)):
            build(VisualAtom(**SMALL), out, workers=0, **arrangement)
        assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == began
        first.kill()
        first.wait()
        build(VisualAtom(**SMALL), out, workers=0, **arrangement)
        assert verify(out, 0) == [] and not list(out.rglob('.*'))


EXPERIMENT = '''
import sys, time
from fdsl_nb.app.experiments import planned, run_experiment
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.core.folder import RunFolder
form = {p.name: p.default for p in read_parameters('reproduce').values()}
def run(experiment, step):
    print(step.name, flush=True)
    time.sleep(600)
run_experiment(planned(form, RunFolder(sys.argv[1])), run)
'''


@pytest.mark.slow
def test_two_experiments_at_once(start, tmp_path):
    first = start(EXPERIMENT, tmp_path)
    wait_for(lambda: RunFolder(tmp_path).state == 'running')
    form = {p.name: p.default for p in read_parameters('reproduce').values()}
    began = []
    with pytest.raises(ValueError, match=r'is under way \(process'):
        planned(form, RunFolder(tmp_path))
    status = tmp_path / 'status.json'
    status.rename(tmp_path / 'kept')
    e = planned(form, RunFolder(tmp_path))
    with pytest.raises(ValueError, match=held_by(first)):
        run_experiment(e, lambda e, step: began.append(step))
    assert not began and not status.exists()
    (tmp_path / 'kept').rename(status)
    first.kill()
    first.wait()

    def stop(e, step):
        began.append(step.name)
        raise RuntimeError('enough seen')

    with pytest.raises(RuntimeError, match='enough seen'):
        run_experiment(planned(form, RunFolder(tmp_path)), stop)
    assert began == [e.steps[0].name]
