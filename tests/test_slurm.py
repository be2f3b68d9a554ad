"""A real SLURM of two nodes on this machine: two network namespaces, each with its own host name.

Runs are submitted by the scripts of the documentation, cancelled, submitted again elsewhere, and
requeued. It needs SLURM, munge and root; its daemons work in a temporary folder and end with it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch

from fdsl_nb.build.verify import verify
from fdsl_nb.core.folder import RunFolder, read_summary
from fdsl_nb.models.checkpoints import read_checkpoint

CLUSTER = Path(__file__).parent.parent / 'docs' / 'cluster'
PROGRAMS = 'slurmctld', 'slurmd', 'munged', 'sbatch', 'ip', 'unshare', 'mount'
NODES = (1, 2)

pytestmark = [pytest.mark.process, pytest.mark.slow]

CONFIGURATION = """
ClusterName=fdsl
SlurmctldHost=node1(10.78.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
TmpFS={at}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmctldPort=16817
SlurmdPort=16818
NodeName=node[1-2] NodeAddr=10.78.0.[1-2] CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
HOSTS = '127.0.0.1 localhost\n10.78.0.1 node1\n10.78.0.2 node2\n'


class Slurm:
    "A cluster in a folder: its daemons, and what a user types on the first node."

    def __init__(self, at: Path, stack: ExitStack):
        self.at, self.stack = at, stack
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')} | {
            'SLURM_CONF': str(at / 'slurm.conf'),
            'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
            'OMP_NUM_THREADS': '1',
            'WANDB_MODE': 'disabled',
            'PYTHONPATH': os.pathsep.join([str(at), os.environ.get('PYTHONPATH', '')]),
        }

    def space(self, n):
        return f'fdsl-slurm-{os.getpid()}-{n}'

    def ip(self, line):
        done = subprocess.run(['ip', *line.split()], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'network namespaces cannot be made here: {done.stderr.strip()}')

    def make_nodes(self):
        for n in NODES:
            self.ip(f'netns add {self.space(n)}')
            self.stack.callback(subprocess.run, ['ip', 'netns', 'del', self.space(n)], check=False)
        ends = [f'fs{os.getpid() % 10**6}{n}' for n in NODES]
        (a, b), (here, there) = ends, map(self.space, NODES)
        self.ip(f'link add {a} netns {here} type veth peer name {b} netns {there}')
        for n, end in zip(NODES, ends):
            self.ip(f'-n {self.space(n)} link set {end} name net0')
            self.ip(f'-n {self.space(n)} addr add 10.78.0.{n}/24 dev net0')
            for device in ('lo', 'net0'):
                self.ip(f'-n {self.space(n)} link set {device} up')

    def on(self, n, *command):
        "The command, with what makes it run on node `n`."
        named = f'hostname node{n}; mount --bind {self.at}/hosts /etc/hosts; exec "$@"'
        space = ['ip', 'netns', 'exec', self.space(n), 'unshare', '--uts']
        return [*space, 'sh', '-c', named, 'sh', *map(str, command)]

    def start(self, name, command):
        with open(self.at / f'{name}.out', 'w') as out:
            daemon = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
        self.stack.callback(self.stop, daemon)

    def stop(self, daemon):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()

    def kill_what_is_left(self):
        "Processes in our own namespaces: steps of jobs that did not end."
        for n in NODES:
            words = ['ip', 'netns', 'pids', self.space(n)]
            found = subprocess.run(words, check=False, capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                os.kill(pid, signal.SIGKILL)

    def kill_kernels(self):
        "SIGKILL to the notebooks of all nodes at once, as where the power fails."
        found = []
        for n in NODES:
            words = ['ip', 'netns', 'pids', self.space(n)]
            said = subprocess.run(words, check=False, capture_output=True, text=True).stdout
            found += [psutil.Process(pid) for pid in map(int, said.split())]
        for p in [p for p in found if 'ipykernel_launcher' in p.cmdline()]:
            p.kill()

    def start_daemons(self):
        at = self.at
        for name in ('state', 'tmp-node1', 'tmp-node2'):
            (at / name).mkdir()
        (at / 'munge.key').write_bytes(os.urandom(64))
        (at / 'munge.key').chmod(0o600)
        (at / 'slurm.conf').write_text(CONFIGURATION.format(at=at))
        (at / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
        (at / 'hosts').write_text(HOSTS)
        names = ('socket', 'pid-file', 'log-file', 'seed-file', 'key-file')
        files = [f'--{name}={at}/munge.{name.removesuffix("-file")}' for name in names]
        self.start('munged', ['munged', '--force', '--foreground', *files])
        wait_for(lambda: (at / 'munge.socket').exists(), 20)
        self.start('slurmctld', self.on(1, 'slurmctld', '-D'))
        for n in NODES:
            self.start(f'slurmd-node{n}', self.on(n, 'slurmd', '-D'))
        self.stack.callback(self.kill_what_is_left)
        wait_for(lambda: 'idle node[1-2]' in self.say('sinfo --noheader --format=%T\\ %N'), 60)

    def run(self, *command, **more):
        return subprocess.run(
            self.on(1, *command),
            check=False,
            capture_output=True,
            text=True,
            env=self.environment | more,
            cwd=self.at,
        )

    def say(self, line):
        return self.run('sh', '-c', line).stdout

    def submit(self, options, script, *words, **more):
        "Gives a script of the documentation to sbatch; the number of the job."
        command = ['sbatch', '--parsable', *options.split(), CLUSTER / script, *words]
        done = self.run(*command, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number):
        "State and restarts of a job."
        said = self.say(f'scontrol show job {number}')
        return re.search(r'JobState=(\w+)', said)[1], int(re.search(r'Restarts=(\d+)', said)[1])

    def wait(self, number, seconds=600):
        ends = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
        wait_for(lambda: self.job(number)[0] in ends, seconds, lambda: self.log(number))
        return self.job(number)[0]

    def log(self, number):
        path = self.at / f'fdsl-{number}.log'
        return path.read_text() if path.exists() else 'no log'


def wait_for(condition, seconds, explain=lambda: ''):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, explain()
        time.sleep(0.2)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f'{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)')
    if os.geteuid():
        pytest.skip('nodes made of network namespaces take root')
    at = tmp_path_factory.mktemp('slurm')
    at.chmod(0o755)
    with ExitStack() as stack:
        cluster = Slurm(at, stack)
        cluster.make_nodes()
        cluster.start_daemons()
        yield cluster
        cluster.run('scancel', '--user', 'root')


TWO_NODES = '--nodes 2 --ntasks-per-node 1 --cpus-per-task 1'
SQUARES = '''
import os
from dataclasses import dataclass
import numpy as np
from fdsl_nb.formulas.formula import Formula
@dataclass(frozen=True)
class Squares(Formula):
    "Squares; process 1 cannot draw some of them where it is told so."
    def category(self, c): return c
    def draw(self, c, k):
        if k > 30 and os.environ.get('FAULTY') and os.environ.get('SLURM_PROCID') == '1':
            raise OSError('the disk of process 1 is gone')
        return np.full((self.size, self.size), 40 * c + k, np.uint8)
'''
SMALL = dict(
    dataset='our_squares:Squares',
    size=32,
    classes=4,
    instances=40,
    samples_per_epoch=160,
    batch_size=16,
    epochs=40,
    warmup_epochs=0,
    mixup=0.5,
    drop_path=0.1,
    save_every=1,
)


def words(folder, **given):
    return [w for k, v in dict(given, run=folder).items() for w in ('-p', k, str(v))]


def differing(one, other):
    "Names of the weights that differ between two run folders."
    one, other = (read_checkpoint(f / 'last.pth.tar')['state_dict'] for f in (one, other))
    return [k for k in one.keys() | other.keys() if not torch.equal(one[k], other[k])]


def assert_same_end(run, whole):
    assert RunFolder(run).state == 'done'
    assert differing(run, whole) == []
    assert (run / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    assert not list(run.glob('.*')), 'something was left'


def epochs(run):
    return len(read_summary(RunFolder(run))) if (run / 'summary.csv').exists() else 0


@pytest.fixture(scope='module')
def whole(slurm):
    "Trained on two nodes without a disturbance."
    (slurm.at / 'our_squares.py').write_text(SQUARES)
    run = slurm.at / 'whole'
    job = slurm.submit(TWO_NODES, 'slurm.sh', 'pretrain', *words(run, **SMALL))
    assert slurm.wait(job) == 'COMPLETED', slurm.log(job)
    return run


def test_two_nodes_train(slurm, whole):
    status = RunFolder(whole).status
    assert (status['state'], status['host'], status['scheduler']) == ('done', 'node1', 'SLURM')
    started = json.loads((whole / 'log.jsonl').read_text().splitlines()[0])
    assert started['processes'] == 2
    assert len(read_summary(RunFolder(whole))) == SMALL['epochs']
    named = slurm.say(f'srun {TWO_NODES} hostname').split()
    assert sorted(named) == ['node1', 'node2'] and os.uname().nodename not in named


def test_cancelled_and_continued_with_rank_0_on_the_other_node(slurm, whole):
    run = slurm.at / 'cancelled'
    given = 'pretrain', *words(run, **SMALL)
    job = slurm.submit(TWO_NODES, 'slurm.sh', *given)
    wait_for(lambda: epochs(run) > 2, 600, lambda: slurm.log(job))
    slurm.run('scancel', job)
    assert slurm.wait(job) == 'CANCELLED'
    status = RunFolder(run).status
    assert status['state'] == 'interrupted', status
    assert 'ended by SIGTERM' in status['reason'] and status['job'] == job
    assert 2 < epochs(run) < SMALL['epochs']
    (slurm.at / 'order').write_text('node2\nnode1\n')
    other = dict(
        SLURM_HOSTFILE=str(slurm.at / 'order'), SLURM_DISTRIBUTION='arbitrary', MASTER_ADDR='node2'
    )
    again = slurm.submit(TWO_NODES, 'slurm.sh', *given, **other)
    assert slurm.wait(again) == 'COMPLETED', slurm.log(again)
    status = RunFolder(run).status
    assert (status['host'], status['job']) == ('node2', again)
    assert_same_end(run, whole)


def test_a_requeued_job_goes_on(slurm, whole):
    run = slurm.at / 'requeued'
    job = slurm.submit(TWO_NODES, 'slurm.sh', 'pretrain', *words(run, **SMALL))
    wait_for(lambda: epochs(run) > 2, 600, lambda: slurm.log(job))
    slurm.run('scontrol', 'requeue', job)
    wait_for(lambda: slurm.job(job)[1] == 1, 60)
    assert slurm.wait(job, 600) == 'COMPLETED', slurm.log(job)
    assert RunFolder(run).status['restarts'] == 1
    assert_same_end(run, whole)


def test_a_job_that_was_killed_without_a_word_goes_on(slurm, whole):
    "The status still says running, from another machine; SLURM is asked about the job."
    run = slurm.at / 'killed'
    given = 'pretrain', *words(run, **SMALL)
    job = slurm.submit(TWO_NODES, 'slurm.sh', *given)
    wait_for(lambda: epochs(run) > 2, 600, lambda: slurm.log(job))
    slurm.kill_kernels()
    assert slurm.wait(job) == 'FAILED'
    assert RunFolder(run).status['state'] == 'running'
    again = slurm.submit('--nodes 1 --ntasks 2 --cpus-per-task 1 -w node2', 'slurm.sh', *given)
    assert slurm.wait(again) == 'COMPLETED', slurm.log(again)
    assert_same_end(run, whole)


def test_a_failing_rank_ends_the_job_and_says_why(slurm):
    (slurm.at / 'our_squares.py').write_text(SQUARES)
    run = slurm.at / 'failing'
    given = 'pretrain', *words(run, **SMALL)
    job = slurm.submit(TWO_NODES, 'slurm.sh', *given, FAULTY='yes')
    assert slurm.wait(job) == 'FAILED', slurm.log(job)
    status = RunFolder(run).status
    assert (status['state'], status['host']) == ('failed', 'node2')
    assert status['reason'] == 'process 1 of 2: OSError: the disk of process 1 is gone'


def test_a_build_over_srun(slurm):
    if 'works' not in slurm.say('srun --mpi=pmix --nodes 2 echo works'):
        pytest.skip('SLURM finds no PMIx (Debian: apt-get install libpmix-dev)')
    run = slurm.at / 'build'
    given = dict(dataset='visualatom', classes=6, instances=20, shard_images=30, layout='shards')
    job = slurm.submit('--nodes 2 --ntasks-per-node 2', 'slurm-build.sh', *words(run, **given))
    assert slurm.wait(job) == 'COMPLETED', slurm.log(job)
    assert RunFolder(run).state == 'done' and verify(run / 'data', 0) == []
    assert RunFolder(run).status['job'] == job
    alone = slurm.at / 'alone'
    command = ['fdsl', 'run', 'build', *words(alone, **given), '-p', 'workers', '0']
    subprocess.run(command, check=True, capture_output=True, env=slurm.environment, cwd=slurm.at)
    parts = sorted(p.name for p in (alone / 'data').iterdir())
    assert parts == sorted(p.name for p in (run / 'data').iterdir()) and len(parts) == 4
    for part in parts:
        assert (run / 'data' / part).read_bytes() == (alone / 'data' / part).read_bytes()


def test_a_task_has_the_cpus_that_were_asked_for(slurm):
    "srun of 22.05 and later forgets --cpus-per-task of the job."
    program = slurm.at / 'bin' / 'fdsl'
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho $SLURM_CPUS_PER_TASK cpus, $FDSL_WORKERS workers\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), slurm.environment['PATH']])
    job = slurm.submit('--nodes 2 --ntasks-per-node 1 --cpus-per-task 2', 'slurm.sh', PATH=path)
    assert slurm.wait(job) == 'COMPLETED', slurm.log(job)
    assert slurm.log(job).splitlines() == ['2 cpus, 1 workers'] * 2
