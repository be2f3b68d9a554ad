"""Ranks that somebody else made, and what becomes of processes whose parent dies."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers import free_port

from fdsl_nb.training.distributed import LAUNCHERS, found_ranks, launch

HELLO = '''
import json
from fdsl_nb.training.distributed import launch
print(json.dumps(launch('fdsl_nb.training.distributed:say_hello', {})))
'''


@pytest.mark.process
@pytest.mark.parametrize(
    'name, rank, world_size, local', LAUNCHERS, ids=[row[0] for row in LAUNCHERS]
)
def test_ranks_of_every_launcher_join(name, rank, world_size, local):
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', HELLO],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **meeting, rank: str(r), world_size: '2', local: str(r)},
        )
        for r in range(2)
    ]
    said = [json.loads(p.communicate(timeout=120)[0].strip().split('\n')[-1]) for p in ranks]
    assert said == [dict(processes=2, ranks=1)] * 2


def test_a_launcher_of_one_process_does_not_count():
    assert found_ranks({'SLURM_PROCID': '0', 'SLURM_NTASKS': '1'}) is None
    assert found_ranks({'RANK': '1', 'WORLD_SIZE': '4'})['launcher'] == 'torchrun'


def test_too_few_processes_are_refused():
    with pytest.raises(ValueError, match='processes=0: at least one'):
        launch('fdsl_nb.training.distributed:say_hello', {}, 0)


@pytest.mark.process
def test_processes_end_with_a_killed_parent():
    wait = "from fdsl_nb.training.distributed import launch; launch('time:sleep', 60, 2)"
    parent = subprocess.Popen(
        [sys.executable, '-c', wait], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.time() + 60
    while len(psutil.Process(parent.pid).children(recursive=True)) < 3 and time.time() < until:
        time.sleep(0.2)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3, 'a launcher and two ranks were expected'
    time.sleep(4)  # until the ranks sleep
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
