"""What `status.json` says about a run of another machine, and what follows from it."""

import json
import os
import socket
import time
from pathlib import Path

import filelock
import pytest

from fdsl_nb.core import folder as records
from fdsl_nb.core.folder import (
    LOST,
    RunFolder,
    locked,
    refuse_running,
    renew_heartbeat,
    scheduler_job,
    set_aside,
    set_status,
)

JOB = {'SLURM_JOB_ID': '4711'}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ('SLURM_JOB_ID', 'SLURM_RESTART_COUNT', 'PBS_JOBID', 'LSB_JOBID', 'JOB_ID'):
        monkeypatch.delenv(name, raising=False)


def utc(seconds):
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + seconds))


def elsewhere(path, ago=0.0, **more):
    "The folder of a run that says it is running on another machine, last heard so long ago."
    run = RunFolder(path)
    set_status(run, 'running')
    said = run.status | dict(host='node17', pid=77, heartbeat=utc(-ago)) | more
    run.file('status.json').write_text(json.dumps(said, indent=1))
    return run


@pytest.mark.parametrize(
    ('environment', 'found'),
    [
        ({'SLURM_JOB_ID': '4711'}, ('SLURM', '4711', 0)),
        ({'SLURM_JOB_ID': '4711', 'SLURM_RESTART_COUNT': '2'}, ('SLURM', '4711', 2)),
        ({'PBS_JOBID': '12.server'}, ('PBS', '12.server', 0)),
        ({'LSB_JOBID': '5'}, ('LSF', '5', 0)),
        ({'JOB_ID': '6', 'RESTARTED': '1'}, ('Grid Engine', '6', 1)),
    ],
)
def test_the_status_names_the_job(tmp_path, monkeypatch, environment, found):
    assert scheduler_job(environment) == dict(zip(('scheduler', 'job', 'restarts'), found))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_status(RunFolder(tmp_path), 'running')
    status = RunFolder(tmp_path).status
    assert (status['scheduler'], status['job'], status['restarts']) == found
    assert (status['pid'], status['host']) == (os.getpid(), socket.gethostname())


def test_a_heartbeat_changes_nothing_but_the_time(tmp_path):
    run = RunFolder(tmp_path)
    set_status(run, 'running')
    before = run.status
    text = (
        run.file('status.json')
        .read_text()
        .replace(f'"heartbeat": "{before["heartbeat"]}"', f'"heartbeat": "{utc(-60)}"')
    )
    run.file('status.json').write_text(text)
    old, inode = run.status['heartbeat'], run.file('status.json').stat().st_ino
    renew_heartbeat(run)
    assert run.status['heartbeat'] > old and run.status | dict(heartbeat='') == before | dict(
        heartbeat=''
    )
    assert run.file('status.json').stat().st_ino == inode
    assert len(run.file('status.json').read_text()) == len(text)


@pytest.mark.parametrize('state', ('done', 'failed', 'interrupted', 'paused'))
def test_no_heartbeat_touches_a_status_that_is_not_running(tmp_path, state):
    "Another process may have written how it ended, a moment ago."
    run = RunFolder(tmp_path)
    set_status(run, state)
    run.file('status.json').write_text(json.dumps(run.status | dict(heartbeat=utc(-60))))
    before = run.file('status.json').read_bytes()
    renew_heartbeat(run)
    assert run.file('status.json').read_bytes() == before


def test_no_heartbeat_for_the_run_of_another_process(tmp_path):
    run = elsewhere(tmp_path, 60)
    before = run.file('status.json').read_bytes()
    renew_heartbeat(run)
    assert run.file('status.json').read_bytes() == before


@pytest.mark.process
def test_a_fresh_heartbeat_elsewhere_is_refused_until_it_is_old(tmp_path):
    run = elsewhere(tmp_path, 30, scheduler='SLURM', job='4711')
    assert run.state == 'running'
    with pytest.raises(ValueError, match='process 77 on host node17, SLURM job 4711') as refused:
        refuse_running(run)
    said = str(refused.value)
    free = utc(LOST - 30)[11:19], utc(LOST - 29)[11:19], utc(LOST - 31)[11:19]
    assert any(f'continues it from {at} UTC on' in said for at in free), said
    assert 'remove' not in said and 'delete' not in said
    run = elsewhere(tmp_path, LOST + 5)
    assert run.state == 'interrupted'
    refuse_running(run)


def test_a_run_that_is_under_way_is_not_set_aside(tmp_path, monkeypatch):
    run = elsewhere(tmp_path, 30)

    def moved(*_):
        raise AssertionError('a file was moved')

    for name in ('rename', 'replace', 'unlink', 'remove'):
        monkeypatch.setattr(records.os, name, moved)
    monkeypatch.setattr(records.shutil, 'rmtree', moved)
    with pytest.raises(ValueError, match='is under way'):
        set_aside(run)


def test_a_job_that_was_started_again_goes_on_at_once(tmp_path, monkeypatch):
    run = elsewhere(tmp_path, 1, scheduler='SLURM', job='4711', restarts=0)
    monkeypatch.setenv('SLURM_JOB_ID', '4711')
    assert run.state == 'running', 'the same job, not started again: another step of it'
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    assert run.state == 'interrupted'
    refuse_running(run)
    monkeypatch.setenv('SLURM_JOB_ID', '4712')
    assert run.state == 'running'


SQUEUE = '''#!/bin/sh
case "$*" in
*" 1") exit 0;;
*" 2") echo RUNNING;;
*" 3") echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
*" 4") echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1;;
*" 5") echo COMPLETING;;
*" 6") echo CANCELLED;;
esac
'''


@pytest.mark.process
@pytest.mark.parametrize('job', '123456')
def test_slurm_is_asked_whether_the_job_has_ended(tmp_path, monkeypatch, job):
    (tmp_path / 'squeue').write_text(SQUEUE)
    (tmp_path / 'squeue').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    run = elsewhere(tmp_path / 'run', 1, scheduler='SLURM', job=job)
    if job in '136':
        refuse_running(run)
    else:
        with pytest.raises(ValueError, match='is under way'):
            refuse_running(run)


def soft_locks(monkeypatch):
    monkeypatch.setattr(records, '_lock_class', lambda folder: filelock.SoftFileLock)


def lock_of(host, pid):
    return f'{pid}\n{host}\n12345\n'


@pytest.mark.parametrize('ago', (30, LOST + 5))
def test_a_lock_file_of_a_lost_machine_is_taken_over(tmp_path, monkeypatch, ago):
    "On file systems without flock, where a kill leaves the lock behind."
    soft_locks(monkeypatch)
    elsewhere(tmp_path, ago)
    (tmp_path / '.lock').write_text(lock_of('node17', 77))
    if ago > LOST:
        with locked(tmp_path):
            pass
        assert not (tmp_path / '.lock').exists()
    else:
        with pytest.raises(ValueError, match='process 77 on host node17'):
            locked(tmp_path).__enter__()


@pytest.mark.parametrize(('host', 'pid'), [('node18', 77), ('node17', 78)])
def test_a_lock_file_of_somebody_else_stays(tmp_path, monkeypatch, host, pid):
    soft_locks(monkeypatch)
    elsewhere(tmp_path, LOST + 5)
    (tmp_path / '.lock').write_text(lock_of(host, pid))
    with pytest.raises(ValueError, match=f'process {pid} on host {host}'):
        locked(tmp_path).__enter__()
    assert (tmp_path / '.lock').read_text() == lock_of(host, pid)
    assert not Path(f'{tmp_path}/.lock.free').exists()
