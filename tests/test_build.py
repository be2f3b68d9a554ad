"""Data sets on disk: what is written and refused, what survives a kill, and reading it back."""

import contextlib, errno, hashlib, io, json, multiprocessing, os, pickle, random, shutil
import signal, subprocess, sys, tarfile, threading, time, zipfile
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import distributed
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import PILToTensor
import webdataset
from helpers import dask_cluster
from fdsl_nb.build import build as building
from fdsl_nb.build.build import build, local_executor, make_plan, open_executor, read_lines
from fdsl_nb.app.builds import run_build, start_build, verify_build
from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.formulas.contours import RCDB, VisualAtom
from fdsl_nb.data.loading import EpochBatchSampler, FormulaDataset, train_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.core.folder import RunFolder, locked
from fdsl_nb.formulas.ifs import FractalDB, OFDB2D, OnePFrac
from fdsl_nb.formulas.ifs3d import ExFractalDB, MVFractalDB, OFDB3D
from fdsl_nb.build.source import parameter_table
from fdsl_nb.build.parquet import export_parquet, features, part_file
from fdsl_nb.app.runs import configuration
from fdsl_nb.core.rng import Shuffle
from fdsl_nb.core.settings import Resolved
from fdsl_nb.formulas.layout import Plan, encode, metadata_folder
from fdsl_nb.data.shards import BuiltDataset, decode
from fdsl_nb.data.streams import ShardStream, share, spans, stream_loader
from fdsl_nb.training.training import run_training
from fdsl_nb.build.verify import repair, verify

SMALL = OnePFrac(classes=6, instances=20, size=48, points=3000)  # no two of its images are alike
LAYOUTS = [
    dict(layout='plain'),
    dict(layout='published'),
    dict(layout='shards', shard_images=32),
    dict(layout='shards', format='zstd', shard_images=50, seed=9),
    dict(layout='plain', format='zstd'),
]


def quiet(*_):
    pass


def make(out, **more):
    return build(SMALL, out, workers=0, progress=quiet, **more)


def rgb(image):
    return np.array(image.convert('RGB'))  # a data set may hand out grey images or RGB ones


ABOUT = 'about/'  # before the names of what lies beside the images


def contents(folder):
    "Checksum of every file of a build, images and metadata."
    folders = {'': Path(folder), ABOUT: metadata_folder(folder)}
    return {
        f'{where}{p.relative_to(root).as_posix()}': hashlib.sha256(p.read_bytes()).hexdigest()
        for where, root in folders.items()
        for p in sorted(root.rglob('*'))
        if p.is_file()
    }


def place(folder, name):
    "Where a file of `contents` is."
    if name.startswith(ABOUT):
        return metadata_folder(folder) / name.removeprefix(ABOUT)
    return Path(folder) / name


pytestmark = pytest.mark.usefixtures('own_data_root')


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp('built') / 'shards'
    make(out, layout='shards', shard_images=32)
    return out


# What is written


@pytest.mark.parametrize('arrangement', LAYOUTS, ids=lambda a: '-'.join(map(str, a.values())))
def test_every_image_reads_back(tmp_path, arrangement):
    make(tmp_path / 'out', **arrangement)
    back, online = open_dataset(str(tmp_path / 'out')), FormulaDataset(SMALL)
    assert len(back) == len(online) == 120 and back.classes == online.classes
    for i in range(120):
        np.testing.assert_array_equal(np.array(back[i][0]), np.array(online[i][0]))
        assert back[i][1] == back.label(i) == online.label(i)
    assert verify(tmp_path / 'out') == []


@pytest.mark.parametrize(
    'f',
    [
        RCDB(classes=2, instances=3, size=32),
        VisualAtom(classes=2, instances=3, size=32, start_class=7),
        OFDB2D(classes=2, size=32, points=500),
        FractalDB(classes=1, instances=1000, size=32, points=500, weight=0.1),
        OnePFrac(classes=2, size=32, points=2000),
        MVFractalDB(classes=1, size=32, points=300, instances=30),
        ExFractalDB(classes=1, size=32, points=300, instances=13),
        OFDB3D(classes=2, size=32, points=300, axes=2),
    ],
    ids=lambda f: f.name,
)
def test_published_names_are_the_reference_streams(f):
    ours = [f.published_file(c, k) for c in range(f.classes) for k in range(f.instances)]
    theirs = [s.file for s in f.reference()]
    if (
        f.name == 'visualatom'
    ):  # the class's number of corners is the stream's own; the rest of the name is not
        assert ours[0] == f'00007/vertex_{f.category(0).vertices:04d}_instance_0000.png'
        ours, theirs = ([n.split('_')[0] + n[-8:] for n in names] for names in (ours, theirs))
    assert len(set(ours)) == len(ours) and set(ours) == set(theirs)


def test_members_of_a_shard(shards):
    "A change here changes every shard's checksum."
    with tarfile.open(shards / 'SHARDS-000000.tar') as tar:
        members = list(tar)
    assert [m.name for m in members[:4]] == [
        '00004_0001.cls',
        '00004_0001.png',
        '00005_0005.cls',
        '00005_0005.png',
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, '', '', 0o644)
    }


def test_webdataset_reads_the_shards(shards):
    seen = list(
        webdataset.WebDataset(sorted(map(str, shards.glob('*.tar'))), shardshuffle=False)
        .decode('l')
        .to_tuple('__key__', 'png', 'cls')
    )
    assert sorted(key for key, *_ in seen) == [
        f'{c:05d}_{k:04d}' for c in range(6) for k in range(20)
    ]
    for key, image, c in seen:
        assert int(key[:5]) == c and (np.rint(image * 255) == SMALL.render(c, int(key[6:]))).all()


def test_torchvision_reads_the_folders(tmp_path):
    make(tmp_path / 'out', layout='plain')
    assert [(Path(p).name, c) for p, c in ImageFolder(tmp_path / 'out').samples] == [
        (f'{c:05d}_{k:04d}.png', c) for c in range(6) for k in range(20)
    ]


def test_other_data_sets_are_written_too(tmp_path):
    for split in ('val', 'test'):
        build(
            'digits',
            tmp_path / 'digits' / split,
            split,
            progress=quiet,
            workers=0,
            layout='shards' if split == 'val' else 'plain',
        )
    for split in ('val', 'test'):
        stored, digits = (
            open_dataset(str(tmp_path / 'digits'), split),
            open_dataset('digits', split),
        )
        assert stored.classes == digits.classes and len(stored) == len(digits)
        both = [
            Counter((np.array(x).tobytes(), y) for x, y in (d[i] for i in range(len(d))))
            for d in (stored, digits)
        ]
        assert both[0] == both[1]
    assert (
        open_dataset(str(tmp_path / 'digits'), 'train') is None
        if (tmp_path / 'digits' / 'train').exists()
        else True
    )


class Own:
    "A data set of somebody's own: nothing of this package, nothing of torch; classes in any order."

    classes = ['cat', 'dog']

    def __init__(self, kind=Image.fromarray):
        self.kind = kind

    def __len__(self):
        return 30

    def label(self, i):
        return i % 2

    def __getitem__(self, i):
        return self.kind(np.full((8, 9), 7 * i, np.uint8)), self.label(i)


def tensor(pixels):
    return torch.tensor(pixels) / 255


@pytest.mark.parametrize('arrangement', [LAYOUTS[0], LAYOUTS[2]], ids=['plain', 'shards'])
def test_a_data_set_object_is_written_and_mended_by_whoever_has_it(tmp_path, arrangement):
    build(Own(), tmp_path / 'out', workers=0, progress=quiet, **arrangement)
    before, back = contents(tmp_path / 'out'), open_dataset(str(tmp_path / 'out'))
    assert back.classes == Own.classes and sorted(
        (np.array(x)[0, 0], y) for x, y in (back[i] for i in range(30))
    ) == [(7 * i, i % 2) for i in range(30)]
    assert json.loads((metadata_folder(tmp_path / 'out') / 'manifest.json').read_text())[
        'source'
    ] == dict(object=f'{__name__}:Own', length=30)
    next(
        (tmp_path / 'out').rglob('*.tar' if arrangement['layout'] == 'shards' else '*_0003.png')
    ).unlink()
    with pytest.raises(
        ValueError,
        match='manifest.json: this was built from a data set object '
        '.*Own, 30 images.*give it yourself',
    ):
        repair(tmp_path / 'out')
    repair(tmp_path / 'out', source=Own())
    assert contents(tmp_path / 'out') == before and verify(tmp_path / 'out') == []
    with pytest.raises(ValueError, match='holds another build'):
        build('digits', tmp_path / 'out', 'val', workers=0, **arrangement)


@pytest.mark.process
def test_a_data_set_object_goes_to_other_processes_or_says_why_not(tmp_path):
    digits = open_dataset('digits', 'val')
    with local_executor(1) as pool:
        build(digits, tmp_path / 'object', executor=pool, progress=quiet, layout='shards')
        with pytest.raises(
            ValueError, match="Own cannot be sent to worker processes .*give workers=0"
        ):
            build(Own(lambda x: x), tmp_path / 'lambda', executor=pool, progress=quiet)
    build('digits', tmp_path / 'name', 'val', workers=0, progress=quiet, layout='shards')
    lines = [metadata_folder(tmp_path / n) / 'manifest.csv' for n in ('object', 'name')]
    assert lines[0].read_text() == lines[1].read_text()


@pytest.mark.parametrize(
    'source, says',
    [
        ([1, 2], 'has no classes; give a formula'),
        (7, 'has no __len__'),
        (Own(tensor), r'image 0 of Own is float32 \[8, 9\] and no picture'),
    ],
    ids=['list', 'number', 'tensors'],
)
def test_what_is_no_source_is_refused(tmp_path, source, says):
    with pytest.raises((TypeError, ValueError), match=says):
        build(source, tmp_path / 'out', workers=0, progress=quiet)


@pytest.mark.parametrize(
    'f',
    [RCDB(classes=3, size=32), OFDB2D(classes=2, size=32), OFDB3D(classes=2, size=32)],
    ids=lambda f: f.name,
)
def test_parameter_table_has_every_class(f):
    table = parameter_table(f)
    assert table['class'].unique().tolist() == list(range(f.classes))
    if f.name != 'rcdb':
        np.testing.assert_array_equal(
            table[table['class'] == 1].to_numpy()[:, 1:].astype(float), f.category(1)
        )


def test_shard_bytes_become_images(tmp_path):
    plan = make_plan(SMALL, 'shards', shard_bytes=60_000)
    make(tmp_path / 'out', layout='shards', shard_bytes=60_000)
    assert (
        all(40_000 < size < 80_000 for *_, size, _ in read_lines(tmp_path / 'out', plan)[:-1])
        and plan.parts > 2
    )


def test_a_plan_of_21_million_is_arithmetic():
    plan, started = Plan('shards', 'zstd', 21_000, 1000, shard_images=10_000), time.perf_counter()
    numbers = [17, 20_999_999, 10**7]
    assert [
        int(plan.images_at(plan.places(p))[place]) for p, place in map(plan.find, numbers)
    ] == numbers
    assert plan.parts == 2100 and time.perf_counter() - started < 5


@pytest.mark.parametrize('n', [1, 2, 5, 64, 65, 5000])
def test_shuffle_is_a_permutation(n):
    there = Shuffle(n, 5).image(range(n))
    assert (
        sorted(there.tolist()) == list(range(n))
        and (Shuffle(n, 5).place(there) == np.arange(n)).all()
    )
    if n > 60:
        assert (there != Shuffle(n, 6).image(range(n))).any() and abs(
            np.corrcoef(there, np.arange(n))[0, 1]
        ) < 0.35


# Workers, kills, faults


@pytest.mark.parametrize('arrangement', [LAYOUTS[1], LAYOUTS[3]], ids=['folders', 'shards'])
def test_bytes_do_not_depend_on_workers(tmp_path, arrangement):
    make(tmp_path / 'alone', **arrangement)
    with ThreadPoolExecutor(3) as pool:
        build(SMALL, tmp_path / 'threads', executor=pool, progress=quiet, **arrangement)
    assert contents(tmp_path / 'alone') == contents(tmp_path / 'threads')


@pytest.mark.process
def test_local_processes_write_the_same_bytes_and_may_be_killed(tmp_path):
    "One pool for both, since starting it takes seconds."
    make(tmp_path / 'alone', **LAYOUTS[3])

    def progress(done, total, drawn, *_):
        if drawn:
            os.kill(next(iter(pool._processes)), signal.SIGKILL)

    with local_executor(2) as pool:
        build(SMALL, tmp_path / 'processes', executor=pool, progress=quiet, **LAYOUTS[3])
        with pytest.raises(RuntimeError, match='a worker process was killed.*of 40 parts are kept'):
            build(
                MANY,
                tmp_path / 'killed',
                executor=pool,
                progress=progress,
                layout='shards',
                shard_images=50,
            )
    assert contents(tmp_path / 'alone') == contents(tmp_path / 'processes')


def stopped(out, after, **arrangement):
    def progress(done, *_):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(SMALL, out, workers=0, progress=progress, **arrangement)


@pytest.mark.parametrize('arrangement', LAYOUTS[:4], ids=lambda a: '-'.join(map(str, a.values())))
def test_a_stopped_build_continues(tmp_path, arrangement, monkeypatch):
    monkeypatch.setattr(building, 'chunks', lambda plan, missing: ([p] for p in missing))
    make(tmp_path / 'whole', **arrangement)
    stopped(tmp_path / 'out', 40, **arrangement)
    with pytest.raises(ValueError, match='not finished'):
        open_dataset(str(tmp_path / 'out'))
    # what a kill leaves: a line cut short, a part nobody vouches for, drafts
    with open(metadata_folder(tmp_path / 'out') / '.done.jsonl', 'a') as f:
        f.write('[3, "SHA')
    (
        tmp_path / 'out' / f'.{Path(make_plan(SMALL, **arrangement).part(1)).name}.x1x1x1x1'
    ).write_bytes(b'half')
    last = tmp_path / 'out' / building.Plan.part(make_plan(SMALL, **arrangement), 2)
    if arrangement['layout'] != 'shards':
        last.mkdir(parents=True, exist_ok=True)
        last /= Path(make_plan(SMALL, **arrangement).file(2 * SMALL.instances)).name
    last.write_bytes(b'cut short')
    drawn = []
    build(
        SMALL,
        tmp_path / 'out',
        workers=0,
        progress=lambda done, total, now, *_: drawn.append(now),
        **arrangement,
    )
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole') and 0 < drawn[-1] < 120


def test_a_finished_build_is_not_begun_again(tmp_path):
    make(tmp_path / 'out', layout='plain')
    before = contents(tmp_path / 'out')
    build(
        SMALL,
        tmp_path / 'out',
        workers=0,
        progress=lambda *_: pytest.fail('drawn again'),
        layout='plain',
    )
    assert contents(tmp_path / 'out') == before


@pytest.mark.parametrize(
    'fault, says',
    [
        (errno.ENOSPC, 'the disk is full: make room'),
        (errno.EROFS, 'can only be read'),
        (errno.EACCES, 'may not be written'),
    ],
)
def test_disk_faults_say_what_was_kept(tmp_path, monkeypatch, fault, says):
    write, calls = building.write_shard, []

    def failing(job, p):
        calls.append(p)
        if len(calls) == 3:
            raise OSError(fault, os.strerror(fault))
        return write(job, p)

    monkeypatch.setattr(building, 'write_shard', failing)
    monkeypatch.setattr(building, 'chunks', lambda plan, missing: ([p] for p in missing))
    with pytest.raises(OSError, match=f'{says}.*2 of 4 parts are kept'):
        make(tmp_path / 'out', layout='shards', shard_images=32)
    monkeypatch.undo()
    make(tmp_path / 'out', layout='shards', shard_images=32)
    assert verify(tmp_path / 'out') == []


@pytest.mark.process
@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='needs to mount a small disk'
)
def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / 'disk').mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', tmp_path / 'disk'],
        check=False,
        capture_output=True,
    ).returncode:
        pytest.skip('cannot mount')
    try:
        with pytest.raises(OSError, match='the disk is full.*parts are kept'):
            build(
                SMALL,
                tmp_path / 'disk' / 'out',
                workers=0,
                progress=quiet,
                layout='shards',
                shard_images=20,
            )
        assert not list((tmp_path / 'disk' / 'out').glob('.SHARDS*'))
    finally:
        subprocess.run(['umount', tmp_path / 'disk'], check=True)


def test_what_is_refused(tmp_path, monkeypatch):
    make(tmp_path / 'out', layout='shards', shard_images=32)
    for other, says in [
        (dict(layout='plain'), "plan layout='shards' there, 'plain' here"),
        (dict(layout='shards', shard_images=33), 'shard_images=32 there, 33 here'),
    ]:
        with pytest.raises(ValueError, match=says):
            make(tmp_path / 'out', **other)
    with pytest.raises(ValueError, match='source seed=0 there, 4 here'):
        build(
            OnePFrac(classes=6, instances=20, size=48, points=3000, seed=4),
            tmp_path / 'out',
            layout='shards',
            shard_images=32,
        )
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').touch()
    with pytest.raises(ValueError, match='is not empty and holds no build .*thesis.txt'):
        make(tmp_path / 'mine')
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['thesis.txt']
    for wrong, says in [
        (dict(layout='shard'), "did you mean 'shards'"),
        (dict(format='pngs'), "did you mean 'png'"),
        (dict(layout='published', format='zstd'), 'choose format'),
        (dict(layout='shards', shard_images=0), 'give 1 or more'),
    ]:
        with pytest.raises(ValueError, match=says):
            make(tmp_path / 'new', **wrong)
    with pytest.raises(ValueError, match="'photos' is not known"):
        build('photos', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_other_versions_do_not_continue_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(building, 'chunks', lambda plan, missing: ([p] for p in missing))
    stopped(tmp_path / 'out', 40)
    monkeypatch.setattr(building.importlib.metadata, 'version', lambda name: '0.0')
    with pytest.raises(ValueError, match='versions fdsl_nb='):
        make(tmp_path / 'out')


def test_two_builds_at_once_are_refused(tmp_path):
    def progress(*_):
        with pytest.raises(ValueError, match=f'being written by process {os.getpid()} on host'):
            make(tmp_path / 'out')

    build(SMALL, tmp_path / 'out', workers=0, progress=progress)


def test_nothing_grows_with_the_data_set(tmp_path):
    "Ten thousand shards are planned, and only so many tasks are under way at a time."
    waiting, most = [0], [0]

    class Counting(ThreadPoolExecutor):
        def submit(self, *a):
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
            future = super().submit(*a)
            future.add_done_callback(lambda _: waiting.__setitem__(0, waiting[0] - 1))
            return future

    with Counting(1) as pool:
        assert sum(building.finished(((abs, (n,)) for n in range(2000)), pool, 8)) == sum(
            range(2000)
        )
    assert most[0] <= 8


SCRIPT = '''
import sys
from fdsl_nb.build.build import build, open_executor
from fdsl_nb.formulas.contours import VisualAtom
if __name__ == '__main__':
    out, layout, workers, classes = sys.argv[1:]
    atoms = VisualAtom(classes=int(classes), instances=40, size=96)
    arrangement = dict(layout=layout)
    if layout == 'shards':
        arrangement['shard_images'] = 50
    with open_executor(workers=int(workers)) as executor:
        build(atoms, out, workers=0, executor=executor, **arrangement)
'''
MANY = VisualAtom(classes=50, instances=40, size=96)


def kill_and_continue(tmp_path, layout, kills, workers=2, classes=50, longest=4):
    "Kills a build `kills` times, then lets it end; its contents, how many kills met it unfinished."
    (tmp_path / 'script.py').write_text(SCRIPT)
    command = [
        sys.executable,
        str(tmp_path / 'script.py'),
        str(tmp_path / 'out'),
        layout,
        str(workers),
        str(classes),
    ]
    chance, hits = random.Random(layout), 0
    for n in range(kills):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        process.stdout.readline()  # the first line of progress: drawing begins
        time.sleep(chance.uniform(0, longest if n else longest / 4))
        hits += process.poll() is None
        process.kill() if n % 2 else os.killpg(
            process.pid, signal.SIGKILL
        )  # the parent alone, or all of it
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    return contents(tmp_path / 'out'), hits


@pytest.mark.process
def test_a_killed_build_ends_like_an_undisturbed_one(tmp_path):
    found, _ = kill_and_continue(tmp_path, 'shards', 1, workers=0, classes=10, longest=0.8)
    build(
        VisualAtom(classes=10, instances=40, size=96),
        tmp_path / 'whole',
        workers=0,
        progress=quiet,
        layout='shards',
        shard_images=50,
    )
    assert found == contents(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['published', 'shards'])
def test_ten_kills(tmp_path, layout):
    found, hits = kill_and_continue(tmp_path, layout, 10)
    build(
        MANY,
        tmp_path / 'whole',
        workers=0,
        progress=quiet,
        layout=layout,
        **(dict(shard_images=50) if layout == 'shards' else {}),
    )
    assert found == contents(tmp_path / 'whole') and hits >= 2


@pytest.mark.process
def test_dask_writes_the_same_bytes(tmp_path):
    "A cluster that runs already, by its address; and one made for the build."

    def built(name, scheduler):
        with open_executor(scheduler, workers=1) as executor:
            make(tmp_path / name, executor=executor, layout='shards', shard_images=20)
        return contents(tmp_path / name)

    make(tmp_path / 'alone', layout='shards', shard_images=20)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        assert built('address', cluster.scheduler_address) == contents(tmp_path / 'alone')
    assert built('local', 'dask') == contents(tmp_path / 'alone')


# Slices, for job arrays


@pytest.mark.parametrize('arrangement', [LAYOUTS[1], LAYOUTS[3]], ids=['folders', 'shards'])
def test_slices_make_the_same_build_in_any_order(tmp_path, arrangement, monkeypatch):
    monkeypatch.setattr(building, 'chunks', partial(building.chunks, images=20))
    make(tmp_path / 'whole', **arrangement)
    about = tmp_path / '.out.fdsl_nb'
    for k in (3, 1, 2):
        assert not (about / 'manifest.csv').exists()
        found = make(tmp_path / 'out', slice=f'{k}/3', **arrangement)
    assert found['images'] == 120 and contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert not list(about.glob('.*'))
    assert make(tmp_path / 'out', slice='2/3', **arrangement) == found


def test_a_build_without_a_slice_completes_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(building, 'chunks', partial(building.chunks, images=20))
    make(tmp_path / 'whole')
    make(tmp_path / 'out', slice='2/3')
    drawn, real = [], building.write_class
    monkeypatch.setattr(building, 'write_class', lambda job, p, *a: drawn.append(p) or real(job, p))
    make(tmp_path / 'out')
    assert drawn == [0, 2, 3, 5] and contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def slice_at_once(out, k, barrier):
    building.chunks = partial(building.chunks, images=20)
    barrier.wait()
    make(out, slice=f'{k}/3', layout='shards', shard_images=20)


@pytest.mark.process
def test_slices_at_the_same_time(tmp_path):
    fork = multiprocessing.get_context('fork')
    barrier = fork.Barrier(3)
    jobs = [
        fork.Process(target=slice_at_once, args=(tmp_path / 'out', k, barrier)) for k in (1, 2, 3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    make(tmp_path / 'whole', layout='shards', shard_images=20)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_a_build_waits_for_no_slice_that_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(building, 'chunks', partial(building.chunks, images=20))
    make(tmp_path / 'out', slice='1/2')
    with locked(tmp_path / '.out.fdsl_nb', '.slice-2-2.lock'):
        with pytest.raises(ValueError, match='is being written by process'):
            make(tmp_path / 'out')
    for wrong in ('3/2', '0/2', '1', '1/0', 'a/b', '-1/2'):
        with pytest.raises(ValueError, match='for example 3/16'):
            make(tmp_path / 'other', slice=wrong)
    assert not (tmp_path / 'other').exists()


def test_jobs_of_an_array_build_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(building, 'chunks', partial(building.chunks, images=20))
    form = dict(dataset='visualatom', budget='demo', classes=4, instances=20, seed=0, workers=0)
    form |= dict(scheduler=None, layout='plain', format='png', out=str(tmp_path / 'out'))
    said = []
    for k in (2, 1):
        request = start_build(form | dict(slice=f'{k}/2', run=str(tmp_path / f'run{k}')))
        run_build(request)
        said.append(verify_build(request))
    assert said[0].startswith('slice 2/2 is written') and said[1].startswith('80 images')
    for wrong, match in (
        (dict(slice='3/2'), 'for example 3/16'),
        (dict(slice='1/2', out=None), 'needs out'),
        (dict(slice='1/2', scheduler='mpi'), 'leave one out'),
    ):
        with pytest.raises(ValueError, match=match):
            start_build(form | wrong | dict(run=str(tmp_path / 'wrong')))


def test_an_executor_of_200_threads_has_200_tasks_under_way():
    met = threading.Barrier(200)
    with ThreadPoolExecutor(200) as pool:
        found = list(building.finished(((met.wait, (60,)) for _ in range(200)), pool))
    assert sorted(found) == list(range(200))


class Sent(Executor):
    "Keeps how long each task is as it would be sent, and does it in another folder."

    def __init__(self, elsewhere):
        self.elsewhere, self.sizes = elsewhere, []

    def submit(self, function, *arguments):
        packed, future = pickle.dumps((function, arguments)), Future()
        self.sizes.append(len(packed))
        function, arguments = pickle.loads(packed)
        with contextlib.chdir(self.elsewhere):
            future.set_result(function(*arguments))
        return future


def test_tasks_are_small_and_know_where_they_are(tmp_path, monkeypatch):
    names = [f'a class with rather a long name, number {c:05d}' for c in range(200)]
    for name in names:
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        Image.new('L', (8, 8)).save(tmp_path / 'pictures' / name / 'a.png')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    sent = Sent(tmp_path / 'elsewhere')
    build('pictures', 'out', executor=sent, progress=quiet)
    assert verify('out', workers=0) == [] and not list((tmp_path / 'elsewhere').iterdir())
    assert max(sent.sizes) < 2000
    told = json.loads((tmp_path / '.out.fdsl_nb/manifest.json').read_text())
    assert told['source']['dataset'] == 'pictures'


@pytest.mark.slow
def test_dask_started_elsewhere_completes_a_build(tmp_path):
    "The workers are in a folder of their own."
    with dask_cluster(tmp_path / 'elsewhere') as client, contextlib.chdir(tmp_path):
        build(MANY, 'out', executor=client.get_executor(), progress=quiet, layout='shards')
        assert verify('out', workers=0) == []
    assert not list((tmp_path / 'elsewhere').rglob('*.tar'))


@pytest.mark.slow
def test_dask_survives_the_loss_of_a_worker(tmp_path):
    build(MANY, tmp_path / 'whole', workers=0, progress=quiet, layout='shards', shard_images=50)
    for n in range(10):
        after, killed = random.Random(n).uniform(1, 1500), []
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            victim = next(iter(client.run(os.getpid).values()))

            def progress(done, *_, after=after, killed=killed, victim=victim):
                if done >= after and not killed:
                    os.kill(victim, signal.SIGKILL)
                    killed.append(done)

            build(
                MANY,
                tmp_path / f'out{n}',
                executor=client.get_executor(),
                progress=progress,
                layout='shards',
                shard_images=50,
            )
        assert killed and contents(tmp_path / f'out{n}') == contents(tmp_path / 'whole')


def test_executors_by_name():
    with open_executor() as executor:
        assert executor is None
    with pytest.raises(ValueError, match='give dask, mpi'):
        with open_executor('slurm'):
            pass


# Verify and repair


@pytest.mark.parametrize('arrangement', LAYOUTS[:4], ids=lambda a: '-'.join(map(str, a.values())))
def test_any_flipped_byte_is_found_and_mended(tmp_path, arrangement):
    make(tmp_path / 'out', **arrangement)
    before, chance = contents(tmp_path / 'out'), random.Random(1)
    files = [
        name
        for name in before
        if name.endswith(('.png', '.zst', '.tar', '.idx')) and name != f'{ABOUT}contact_sheet.png'
    ]
    for name in chance.sample(files, min(len(files), 4)):
        path = place(tmp_path / 'out', name)
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        found = verify(tmp_path / 'out')
        assert (
            len(found) == 1 and found[0].kind == 'damaged' and found[0].name.split('/')[0] in name
        )
        assert repair(tmp_path / 'out') == found and contents(tmp_path / 'out') == before


@pytest.mark.parametrize(
    'spoil',
    (
        lambda data, header: data[:header] + bytes([data[header] ^ 1]) + data[header + 1 :],
        lambda data, header: data[:header],
    ),
    ids=('a damaged header', 'an end between two files'),
)
def test_a_tar_is_read_to_its_end_mark_or_refused(tmp_path, spoil):
    make(tmp_path / 'out', layout='plain')
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(tmp_path / 'out', 'train')
    assert len(open_dataset(str(tmp_path / 'all.tar'))) > 20
    with tarfile.open(tmp_path / 'all.tar') as tar:
        header = [m.offset for m in tar if m.name.endswith('.png')][10]
    (tmp_path / 'all.tar').write_bytes(spoil((tmp_path / 'all.tar').read_bytes(), header))
    with pytest.raises(ValueError, match=f'all.tar is cut off, damaged .*{header}'):
        open_dataset(str(tmp_path / 'all.tar'))


@pytest.mark.parametrize('arrangement', LAYOUTS[:4], ids=lambda a: '-'.join(map(str, a.values())))
def test_missing_and_stray_files(tmp_path, arrangement):
    make(tmp_path / 'out', **arrangement)
    before = contents(tmp_path / 'out')
    files = [
        name
        for name in before
        if name.endswith(('.png', '.zst', '.tar', '.idx')) and name != f'{ABOUT}contact_sheet.png'
    ][:2]
    files += [name for name in before if name.endswith('.idx')][-1:]  # of a shard that is there
    for name in (*files, f'{ABOUT}README.md'):
        place(tmp_path / 'out', name).unlink()
    strays = (
        ['cat.jpg']
        if arrangement['layout'] == 'shards'
        else ['cat.jpg', f'{Path(files[0]).parent}/dog.png']
    )
    for name in strays:
        (tmp_path / 'out' / name).touch()
    assert Counter(f.kind for f in verify(tmp_path / 'out', workers=0)) == {
        'missing': len(files) + 1,
        'stray': len(strays),
    }
    repair(tmp_path / 'out')
    assert sorted(f.name for f in verify(tmp_path / 'out') if f.kind == 'stray') == sorted(
        strays
    ) and len(verify(tmp_path / 'out')) == len(strays)
    for name in strays:
        (tmp_path / 'out' / name).unlink()
    assert contents(tmp_path / 'out') == before


def test_repair_with_other_programs_says_so(tmp_path, monkeypatch):
    make(tmp_path / 'out', layout='shards', shard_images=32)
    (tmp_path / 'out' / 'SHARDS-000001.tar').unlink()
    monkeypatch.setattr(building, 'encode', lambda image, format: encode(255 - image, format))
    with pytest.raises(ValueError, match='is not what the manifest promises'):
        repair(tmp_path / 'out')


# Reading


def test_zip_and_tar_are_the_folder(tmp_path):
    make(tmp_path / 'plain')
    folder = ImageFolder(tmp_path / 'plain')
    with (
        zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as z,
        tarfile.open(tmp_path / 'a.tar', 'w') as tar,
    ):
        for p in sorted((tmp_path / 'plain').rglob('*.png'), reverse=True):
            z.write(p, f'data/train/{p.relative_to(tmp_path / "plain")}')
            tar.add(p, f'data/train/{p.relative_to(tmp_path / "plain")}')
    for name in ('a.zip', 'a.tar'):
        packed = open_dataset(str(tmp_path / name))
        assert (
            packed.classes == [f'{c:05d}' for c in range(6)]
            and len(packed) == 120
            and open_dataset(str(tmp_path / name), 'val') is None
        )
        for i in range(0, 120, 11):
            assert packed[i][1] == folder[i][1] and (rgb(packed[i][0]) == rgb(folder[i][0])).all()
    with pytest.raises(IndexError):
        packed[120]


def test_a_compressed_tar_says_what_to_do(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w:gz') as tar:
        tar.add(__file__, 'x/y.png')
    with pytest.raises(ValueError, match='pack it anew without compression'):
        open_dataset(str(tmp_path / 'a.tar'))


@pytest.mark.process
@pytest.mark.parametrize('workers', [0, 2])
def test_first_epoch_is_that_of_the_online_data_set(shards, workers):
    "Same seed, same tensors: training cannot tell a build from its formula."
    sets = open_dataset(str(shards)), FormulaDataset(SMALL)
    a, b = (
        torch.cat(
            [
                x
                for x, _ in train_loader(
                    d,
                    PILToTensor(),
                    EpochBatchSampler(120, 8, seed=5),
                    workers if d is sets[0] else 0,
                )
            ]
        )
        for d in sets
    )
    assert torch.equal(a, b)


def test_the_checksum_over_the_pixels_is_checked():
    "Pillow reads on where it does not fit."
    data = encode(SMALL.render(0, 0))
    for place in range(len(data) - 20, len(data)):
        with pytest.raises(ValueError, match='a.png is damaged'):
            decode(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], 'a.png')


def test_a_lost_index_is_no_loss(shards, tmp_path):
    one = BuiltDataset(shards)
    expected = [one.read(i) for i in range(0, 120, 7)]
    index = metadata_folder(shards) / 'index'
    index.rename(tmp_path / 'index')
    try:
        assert [one.read(i) for i in range(0, 120, 7)] == expected
    finally:
        (tmp_path / 'index').rename(index)


@pytest.mark.process
def test_others_shards_by_pattern(shards, tmp_path):
    for n in range(4):
        (tmp_path / f'x-{n}.tar').write_bytes((shards / f'SHARDS-00000{n}.tar').read_bytes())
    for name in (f'{tmp_path}/x-{{0..3}}.tar', f'{tmp_path}/x-*.tar', str(tmp_path)):
        found = open_dataset(name)
        assert len(found) == 120 and Counter(found.label(i) for i in range(120)) == {
            c: 20 for c in range(6)
        }
    image, c = found[5]
    assert any((np.array(image) == SMALL.render(c, k)).all() for k in range(20))
    with pytest.raises(ValueError, match='pipe:cat x.tar cannot be read'):
        open_dataset('pipe:cat x.tar')


@pytest.mark.process
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize(
    'world_size, workers, batch, buffer',
    [(1, 0, 7, 0), (2, 2, 8, 10), (3, 2, 12, 200), (4, 3, 4, 3)],
)
def test_streams_lose_and_double_nothing(shards, world_size, workers, batch, buffer):
    numbers = {SMALL.render(*divmod(i, 20)).tobytes(): i for i in range(120)}
    for epoch in (0, 1):
        seen, lengths = [], []
        for rank in range(world_size):
            stream = ShardStream(
                shards,
                PILToTensor(),
                batch,
                seed=2,
                rank=rank,
                world_size=world_size,
                buffer=buffer,
            )
            stream.epoch = epoch
            own = [
                numbers[x[0].numpy().tobytes()]
                for xs, _ in stream_loader(stream, workers)
                for x in xs
            ]
            assert len(own) == len(stream)
            lengths.append(len(own))
            seen += own
        assert len(set(lengths)) == 1 and len(seen) == len(set(seen)) == 120 // batch * batch


@pytest.mark.process
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers, first', [(0, 3), (2, 3), (3, 4)])
def test_streams_resume_in_an_epoch(shards, workers, first):
    def batches(first):
        stream = ShardStream(shards, PILToTensor(), 8, seed=2, buffer=20)
        stream.first = first
        return [x for x, _ in stream_loader(stream, workers)]

    for a, b in zip(batches(0)[first:], batches(first), strict=True):
        assert torch.equal(a, b)


def test_shares_cover_an_epoch_for_any_numbers():
    chance = random.Random(0)
    for _ in range(200):
        world_size, workers, own = chance.randint(1, 5), chance.randint(1, 5), chance.randint(1, 6)
        records = chance.randint(world_size * own, 300)
        parts = [
            share(records, world_size * own, r, world_size, w, workers)
            for r in range(world_size)
            for w in range(workers)
        ]
        taken = [i for first, many in parts for i in range(first, first + many)]
        assert sorted(taken) == list(range(records // (world_size * own) * world_size * own))
        counts = [9] * (records // 9) + [records % 9]
        for part in parts:
            assert sum(stop - start for _, start, stop in spans(counts, *part)) == part[1]


@pytest.mark.process
@pytest.mark.filterwarnings('ignore:skipped')
@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_records_are_named_or_counted(shards, tmp_path, workers):
    copy = tmp_path / 'copy'
    shutil.copytree(shards, copy)
    shutil.copytree(metadata_folder(shards), metadata_folder(copy))
    data = bytearray((copy / 'SHARDS-000002.tar').read_bytes())
    data[1700] ^= 1
    (copy / 'SHARDS-000002.tar').write_bytes(data)
    broken = int(BuiltDataset(copy).plan.images_at([64])[0])
    with pytest.raises(ValueError, match='SHARDS-000002.tar/.*is damaged'):
        BuiltDataset(copy)[broken]
    lenient = BuiltDataset(copy, on_error='skip')
    assert (
        sum(
            len(x)
            for x, _ in train_loader(
                lenient, PILToTensor(), EpochBatchSampler(120, 8, epochs=1), workers
            )
        )
        == 120
        and lenient.skipped.item() == 1
    )
    stream = ShardStream(copy, PILToTensor(), 8, on_error='skip', epochs=1)
    assert (
        sum(len(x) for x, _ in stream_loader(stream, workers)) == 120 and stream.skipped.item() == 1
    )
    with pytest.raises(ValueError, match='is damaged'):
        list(stream_loader(ShardStream(copy, PILToTensor(), 8), workers))
    with pytest.raises(ValueError, match="on_error='warn' is not known"):
        BuiltDataset(copy, on_error='warn')


@pytest.mark.process
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize(
    'world_size, workers, repeats, images',
    [(1, 0, 3, None), (2, 2, 3, None), (1, 0, 1, 64), (1, 0, 2, 400), (2, 0, 3, 104)],
)
def test_streams_repeat_and_cut_as_numbered_sets_do(shards, world_size, workers, repeats, images):
    "Epochs are pieces of one sequence: an image comes again only when all images have come."
    numbers = {SMALL.render(*divmod(i, 20)).tobytes(): i for i in range(120)}
    shown, epochs = Counter(), 3 if workers else 5
    for epoch in range(epochs):
        streams = [
            ShardStream(
                shards,
                PILToTensor(),
                8,
                seed=2,
                rank=r,
                world_size=world_size,
                buffer=7,
                repeats=repeats,
                images=images,
            )
            for r in range(world_size)
        ]
        for stream in streams:
            stream.epoch = epoch
            own = [
                numbers[x[0].numpy().tobytes()]
                for xs, _ in stream_loader(stream, workers)
                for x in xs
            ]
            assert len(own) == len(stream) == (images or 120) // 8 * 8 // world_size
            shown.update(own)
        if not images:
            assert sum(shown.values()) == 120 * (epoch + 1) and all(
                n % 3 == 0 for n in shown.values()
            )
    if images:
        assert (
            sum(shown.values()) == images * epochs
            and max(shown.values()) - min(shown.values()) <= repeats
        )


def test_a_stream_augments_as_a_numbered_set_does(shards):
    "The same image, pass_index and repeat: the same view, wherever it was read from."

    def noise(image):
        return torch.rand(4)

    stream, whole = ShardStream(shards, noise, 8, seed=2, repeats=3), FormulaDataset(SMALL)
    views = {tuple(x.tolist()) for xs, _ in stream_loader(stream) for x in xs}
    batches = EpochBatchSampler(120, 8, seed=2, repeats=3, images=360)
    assert (
        views < {tuple(x.tolist()) for xs, _ in train_loader(whole, noise, batches) for x in xs}
        and len(views) == 120
    )


# Training on what was built

TINY = Resolved(dict(patch_size=8, embed_dim=32, depth=1, num_heads=2), 'test')


def trained(folder, **given):
    "The weights after one epoch of the demo, and the result."
    asked = (
        dict(
            budget='demo',
            epochs=1,
            batch_size=16,
            warmup_epochs=0,
            wandb_mode='disabled',
            mixup=0.5,
            repeats=2,
            samples_per_epoch=160,
        )
        | given
    )
    result = run_training(
        configuration('pretrain', asked, RunFolder(folder)) | dict(model_kwargs=TINY)
    )
    return read_checkpoint(folder / 'last.pth.tar')['state_dict'], result


@pytest.mark.parametrize(
    'layout, format', [('shards', 'zstd'), pytest.param('plain', 'png', marks=pytest.mark.slow)]
)
def test_pretraining_cannot_tell_a_build_from_its_formula(tmp_path, layout, format, monkeypatch):
    "build, verify, pretrain: bit for bit the weights of training online with the same seed."
    monkeypatch.setenv('FDSL_WORKERS', '0')
    form = dict(
        dataset='visualatom',
        split='train',
        out=None,
        budget='demo',
        classes=4,
        instances=20,
        size=None,
        seed=5,
        knobs=None,
        layout=layout,
        format=format,
        shard_images=30,
        shard_bytes=None,
        workers=0,
        scheduler=None,
        run=str(tmp_path / 'build'),
    )
    asked = start_build(form)
    run_build(asked)
    assert verify_build(asked).startswith('80 images')
    weights, _ = trained(tmp_path / 'stored', dataset=asked.job.out, seed=5)
    online, _ = trained(tmp_path / 'online', dataset='visualatom', classes=4, instances=20, seed=5)
    assert [k for k in online if not torch.equal(online[k], weights[k])] == []


@pytest.mark.process
@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pretraining_from_a_pipe(shards, tmp_path, processes):
    "As from any data set: counted once, then streamed; and again to the same bit."
    name = f'pipe:cat {shards}/SHARDS-{{000000..000003}}.tar'
    runs = [trained(tmp_path / str(n), dataset=name, processes=processes) for n in range(2)]
    assert runs[0][1]['train_loss'] > 0 and runs[0][0]['head.weight'].shape[0] == 6
    assert all(
        torch.equal(a, b) for a, b in zip(runs[0][0].values(), runs[1][0].values(), strict=True)
    )
    assert len(list((tmp_path / 'data' / 'streams').iterdir())) == 4


@pytest.mark.process
def test_shards_over_http(shards, tmp_path):
    if shutil.which('curl') is None:
        pytest.skip('webdataset opens URLs by curl, which is not installed')
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = open_dataset(f'http://127.0.0.1:{server.server_port}/SHARDS-{{000000..000003}}.tar')
        local = open_dataset(f'{shards}/SHARDS-{{000000..000003}}.tar')
        assert [one.label(i) for i in range(120)] == [local.label(i) for i in range(120)] and rgb(
            one[77][0]
        ).tobytes() == rgb(local[77][0]).tobytes()
        assert (
            sum(len(x) for x, _ in one.train_loader(PILToTensor(), EpochBatchSampler(120, 8)))
            == 120
        )
        server.shutdown()


# Parquet


def export(out, source=SMALL, **more):
    return export_parquet(source, out, file_images=50, workers=0, progress=quiet, **more)


def test_parquet_of_a_formula_a_build_and_a_folder(shards, tmp_path):
    "Pictures as bytes, labels as numbers, in shuffled order; PNG and JPEG files stay as they are."
    parquet = pytest.importorskip('pyarrow.parquet', reason='the extra parquet is not installed')
    (tmp_path / 'photos' / 'train' / 'cat').mkdir(parents=True)
    photo = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    photo.save(tmp_path / 'photos' / 'train' / 'cat' / 'a.jpg')
    with zipfile.ZipFile(tmp_path / 'photos.zip', 'w') as z:
        z.write(tmp_path / 'photos' / 'train' / 'cat' / 'a.jpg', 'cat/a.jpg')
    for name, source in [
        ('formula', SMALL),
        ('build', str(shards)),
        ('photos', str(tmp_path / 'photos.zip')),
    ]:
        export(tmp_path / f'hub-{name}', source)
    assert contents(tmp_path / 'hub-formula').keys() == contents(tmp_path / 'hub-build').keys()
    rows = [
        [
            row
            for p in range(3)
            for row in parquet.read_table(
                tmp_path / f'hub-{name}' / part_file(make_plan(SMALL, 'shards', shard_images=50), p)
            ).to_pylist()
        ]
        for name in ('formula', 'build')
    ]
    assert rows[0] == rows[1] and [r['label'] for r in rows[0]] == [
        i // 20 for i in make_plan(SMALL, 'shards').images_at(range(120)).tolist()
    ]
    assert (
        decode(rows[0][7]['image']['bytes'], 'x.png').tobytes()
        == SMALL.render(*divmod(int(Shuffle(120, 0).image([7])[0]), 20)).tobytes()
    )
    file = next((tmp_path / 'hub-photos' / 'data').iterdir())
    assert parquet.read_table(file).to_pylist() == [
        dict(
            image=dict(
                bytes=(tmp_path / 'photos' / 'train' / 'cat' / 'a.jpg').read_bytes(),
                path='00000_0000.jpg',
            ),
            label=0,
        )
    ]
    assert json.loads(parquet.read_schema(file).metadata[b'huggingface']) == {
        'info': {
            'features': {
                'image': {'_type': 'Image'},
                'label': {'names': ['cat'], '_type': 'ClassLabel'},
            }
        }
    }


def test_the_datasets_library_reads_the_parquet(tmp_path, monkeypatch):
    import datasets

    export(tmp_path / 'hub')
    for one in (
        datasets.load_dataset(
            str(tmp_path / 'hub'), split='train', cache_dir=str(tmp_path / 'cache')
        ),
        datasets.load_dataset(str(tmp_path / 'hub'), split='train', streaming=True),
    ):
        assert (
            isinstance(one.features['image'], datasets.Image)
            and one.features['label'].names == features(make_plan(SMALL))['label']['names']
        )
        assert sum(row['label'] for row in one) == 20 * sum(range(6)) and next(iter(one))[
            'image'
        ].size == (48, 48)


@pytest.mark.process
def test_a_stopped_export_continues(tmp_path):
    pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    export(tmp_path / 'whole')

    def stop(done, *_):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parquet(SMALL, tmp_path / 'out', file_images=50, workers=0, progress=stop)
    (tmp_path / 'out' / 'data' / '.train-00001-of-00003.parquet.x1x1x1x1').write_bytes(b'half')
    drawn = []
    export_parquet(
        SMALL,
        tmp_path / 'out',
        file_images=50,
        workers=0,
        progress=lambda done, total, now, *_: drawn.append(now),
    )
    assert drawn[-1] == 70 and contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    with pytest.raises(ValueError, match='holds images of another export'):
        export(tmp_path / 'out', seed=1)
    (tmp_path / 'out' / 'cat.jpg').touch()
    with pytest.raises(ValueError, match='holds cat.jpg, which this export would not write'):
        export(tmp_path / 'out')


def test_a_data_set_object_becomes_parquet(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet', reason='the extra parquet is not installed')
    export_parquet(Own(), tmp_path / 'out', workers=0, progress=quiet)
    rows = parquet.read_table(
        tmp_path / 'out' / part_file(make_plan(Own(), 'shards'), 0)
    ).to_pylist()
    assert sorted(
        (np.array(Image.open(io.BytesIO(row['image']['bytes'])))[0, 0], row['label'])
        for row in rows
    ) == [(7 * i, i % 2) for i in range(30)]


def test_a_damaged_parquet_file_is_named(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet', reason='the extra parquet is not installed')
    export(tmp_path / 'out')
    file = tmp_path / 'out' / part_file(make_plan(SMALL, 'shards', shard_images=50), 1)
    whole, chance = file.read_bytes(), random.Random(0)
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f'{file.name} is no whole Parquet file'):
            export(tmp_path / 'out')
    footer = int.from_bytes(whole[-8:-4], 'little')
    for _ in range(40):  # a turned bit in the footer: noticed, or without meaning
        data, place = bytearray(whole), chance.randrange(len(whole) - footer - 8, len(whole))
        data[place] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            export(tmp_path / 'out')
        except ValueError as e:
            assert file.name in str(e)
    data = bytearray(whole)
    data[len(whole) // 3] ^= 1  # among the pictures: the page's checksum tells the reader
    file.write_bytes(data)
    with pytest.raises(OSError, match='CRC'):
        parquet.read_table(file, page_checksum_verification=True)
