"""The kill matrix: whatever a run does, killed at any moment and started again it ends the same.

Training from images drawn online, in a folder, in shards and streamed, on one process and two;
builds by this process, by local workers and by Dask. SIGKILL comes at random moments of a seed, and
counts only where it met a process at work: 200 at least, 15 or 16 in each test. Every weight and
byte is compared, and nothing is left.
"""

import random
import shutil
import signal
import time
from contextlib import contextmanager
from hashlib import sha256

import distributed
import psutil
import pytest
import torch
from training_helpers import (
    CONTEXT,
    TINY,
    Lightning,
    printed,
    run_ranks,
    start_ranks,
    start_server,
    values,
    wait_ranks,
)

from fdsl_nb.build.build import build, open_executor
from fdsl_nb.build.verify import verify
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.models.checkpoints import read_checkpoint

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures('own_data_root')]

IMAGES = VisualAtom(classes=4, instances=16, size=96, start_range=10, lines_max=20)
SHARDS = dict(layout='shards', shard_images=16)
TRAINED = 15  # kills of each way to train
BUILT = 16  # of each way to build


def quiet(*_, **__):
    pass


def leftovers(folder):
    "Drafts and locks; `.out.fdsl_nb` lies beside a build."
    return [p for p in folder.rglob('.*') if not p.name.endswith('.fdsl_nb')]


# Training

# 64 images, 8 a step: 16 steps in two epochs
GIVEN = dict(
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.5,
    scale=(0.3, 1.0),
    mixup=0.8,
    cutmix=1.0,
    drop_path=0.1,
    model_ema_decay=0.9,
    workers=1,
    epochs=2,
    recovery_interval=1,
    save_every=1,
    model_kwargs=TINY,
)
STEPS = 16


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The same images in four ways: data set and knobs of each."
    root = tmp_path_factory.mktemp('sources')
    build(IMAGES, root / 'folder', workers=0, progress=quiet, layout='plain')
    build(IMAGES, root / 'shards', workers=0, progress=quiet, **SHARDS)
    names = 'classes', 'instances', 'size', 'start_range', 'lines_max'
    return dict(
        online=dict(dataset='visualatom', knobs={k: getattr(IMAGES, k) for k in names}),
        folder=dict(dataset=str(root / 'folder'), knobs={}),
        shards=dict(dataset=str(root / 'shards'), knobs={}),
        stream=dict(dataset=f'pipe:cat {root}/shards/SHARDS-{{000000..000003}}.tar', knobs={}),
    )


def assert_same_weights(killed, whole):
    one, other = (read_checkpoint(f / 'last.pth.tar') for f in (killed, whole))
    for entry in ('state_dict', 'state_dict_ema'):
        assert [k for k in other[entry] if not torch.equal(one[entry][k], other[entry][k])] == []
    assert (killed / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    names = [sorted(p.name for p in f.iterdir()) for f in (killed, whole)]
    assert names[0] == names[1] and RunFolder(killed).state == 'done'
    assert leftovers(killed) == []


def struck(folder, given, processes, chance):
    "Starts a run that lightning strikes, for as long as it is not done; yields after each kill."
    for step in sorted(chance.sample(range(STEPS), 8)):
        strike = Lightning, (step, chance.uniform(0, 0.2))
        codes = wait_ranks(start_ranks(values(folder, **given), processes, strike))
        if codes == [0] * processes:
            return
        assert codes == [-signal.SIGKILL] * processes, printed(folder)
        assert RunFolder(folder).state == 'interrupted'
        yield


@pytest.mark.parametrize('processes', (1, 2))
@pytest.mark.parametrize('source', ('online', 'folder', 'shards', 'stream'))
def test_kills_of_training(source, processes, sources, tmp_path):
    given, hits, runs = GIVEN | sources[source] | dict(batch_size=8 // processes), 0, 0
    run_ranks(values(tmp_path / 'whole', **given), processes)
    chance = random.Random(f'{source} {processes}')
    while hits < TRAINED:
        runs += 1
        killed = tmp_path / str(runs)
        hits += sum(1 for _ in struck(killed, given, processes, chance))
        run_ranks(values(killed, **given), processes)
        assert_same_weights(killed, tmp_path / 'whole')
    print(f'training, {source}, processes={processes}: {hits} kills in {runs} runs')


# Builds

MANY = VisualAtom(classes=12, instances=32, size=128)
LAYOUTS = dict(shards=SHARDS, plain=dict(layout='plain'))


def build_here(out, layout, workers, scheduler, began):
    "What a killed process does."

    def progress(*_, **__):
        began.set()

    with open_executor(scheduler, workers) as executor:
        build(MANY, out, workers=0, executor=executor, progress=progress, **LAYOUTS[layout])


@contextmanager
def building(*given):
    "A process that builds, from the moment on when images are drawn."
    start_server()
    began = CONTEXT.Event()
    process = CONTEXT.Process(target=build_here, args=(*given, began))
    process.start()
    while not began.wait(0.01) and process.is_alive():
        pass
    try:
        yield process
    finally:
        process.join(120)


def kill_all(process):
    for p in psutil.Process(process.pid).children(recursive=True):
        p.kill()
    process.kill()


def kill_one_worker(process):
    "A worker process; the other child is Python's own tracker of resources."
    for p in psutil.Process(process.pid).children():
        if 'spawn_main' in ' '.join(p.cmdline()):
            p.kill()
            return


def contents(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def kill_builds(at, chance, seconds, kills, *given):
    "Builds and kills until so many were hit; the numbers of hits and of builds."
    build(MANY, at / 'whole' / 'out', workers=0, progress=quiet, **LAYOUTS[given[0]])
    hits = builds = 0
    while hits < BUILT:
        builds += 1
        now = at / str(builds)
        now.mkdir()
        for n in range(BUILT // 2):
            with building(now / 'out', *given) as process:
                time.sleep(chance.uniform(0, seconds))
                if not process.is_alive():
                    break
                kills[n % len(kills)](process)
                hits += 1
        with building(now / 'out', *given) as process:
            pass
        assert process.exitcode == 0
        assert contents(now) == contents(at / 'whole') and leftovers(now) == []
        assert verify(now / 'out', workers=0) == []
        shutil.rmtree(now)
    return hits, builds


@pytest.mark.parametrize('workers', (0, 2))
@pytest.mark.parametrize('layout', LAYOUTS)
def test_kills_of_local_builds(layout, workers, tmp_path):
    kills = [kill_all, lambda process: process.kill(), kill_one_worker][: 3 if workers else 1]
    chance = random.Random(f'{layout} {workers}')
    hits, builds = kill_builds(tmp_path, chance, 0.4, kills, layout, workers, '')
    print(f'build, {layout}, workers={workers}: {hits} kills in {builds} builds')


def test_kills_of_dask(tmp_path):
    "Of the build, whose tasks may still be at work when the next one comes, and of workers."
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:

        def kill_worker(process):
            running = [w.process.process.pid for w in cluster.workers.values() if w.process]
            psutil.Process(chance.choice(running)).kill()

        chance = random.Random('dask')
        kills = [lambda process: process.kill()] * 3 + [kill_worker]
        given = 'shards', 0, cluster.scheduler_address
        hits, builds = kill_builds(tmp_path, chance, 0.4, kills, *given)
    print(f'build, Dask: {hits} kills in {builds} builds')
