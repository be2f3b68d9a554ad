"What happens before the first batch, and what it costs in large data sets."

import io
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import PILToTensor
from training_helpers import trained

from fdsl_nb.build.build import Job, build, describe, make_plan, tasks_of
from fdsl_nb.build.source import as_source
from fdsl_nb.core.folder import RunFolder, locked
from fdsl_nb.core.rng import NumpyRandom, Shuffle
from fdsl_nb.data import coyo, shards, streams
from fdsl_nb.data.coyo import CoyoDataset, MultiHot, example_rows, seal_shards, write_shards
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import LISTED, EpochBatchSampler, FormulaDataset, permutation
from fdsl_nb.formulas import categories, ifs3d, ifs_search
from fdsl_nb.formulas.formula import formula
from fdsl_nb.formulas.layout import encode, metadata_folder
from fdsl_nb.models.checkpoints import CheckpointError
from fdsl_nb.training.saving import resume
from fdsl_nb.training.training import continue_run


def test_the_order_of_300_million_images_needs_no_memory():
    assert Shuffle(10)[3] < 10  # compiled before memory is counted
    tracemalloc.start()
    batches = iter(EpochBatchSampler(300_000_000, 4096, seed=3, rank=1, world_size=4))
    first = [draw.index for draw in next(batches)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 and len(set(first)) == 1024
    assert (Shuffle(300_000_000, 3, 0).place(first) == np.arange(1, 4096, 4)).all()


def test_passes_of_long_data_sets_have_different_orders_and_short_ones_the_old():
    n = LISTED + 1
    orders = [permutation(n, seed, p).image(range(1000)) for seed, p in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert permutation(8, 0, 0).tolist() == [5, 6, 7, 2, 4, 3, 0, 1]
    assert len(permutation(LISTED, 0, 0)) == len(set(permutation(LISTED, 0, 0).tolist()))


# Where records are, found once


def pack(path, labels):
    "A shard of eight-pixel PNGs as another program writes it."
    with tarfile.open(path, 'w') as tar:
        for i, label in enumerate(labels):
            pixels = np.full((8, 8), label, np.uint8)
            for suffix, data in (('png', encode(pixels)), ('cls', b'%d' % label)):
                info = tarfile.TarInfo(f'{i:03d}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def others(tmp_path, own_data_root):
    "The pattern of three shards of four records."
    for s in range(3):
        pack(tmp_path / f'others-{s}.tar', range(s, s + 4))
    return str(tmp_path / 'others-{0..2}.tar')


def refuse(*_):
    pytest.fail('a shard was read again')


def test_shards_are_scanned_once_and_mapped(others, monkeypatch):
    first = open_dataset(others)
    monkeypatch.setattr(shards, 'tar_index', refuse)
    monkeypatch.setattr(shards, '_scan_shard', refuse)
    again = open_dataset(others)
    assert isinstance(again.index.rows, np.memmap) and len(again.classes) == 6
    assert [again.label(i) for i in range(12)] == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
    assert [again[i][0].getpixel((0, 0)) for i in range(12)] == [again.label(i) for i in range(12)]
    assert len(pickle.dumps(first.index)) < 400  # a worker process maps the file itself


def test_a_shard_that_changed_is_scanned_again(others, tmp_path):
    open_dataset(others)
    pack(tmp_path / 'others-1.tar', [7, 7, 7, 7, 7])
    again = open_dataset(others)
    assert len(again) == 13 and again.label(8) == 7 and again[8][0].getpixel((0, 0)) == 7


def count_scans(pattern, barrier, scans):
    scan = shards._scan_records
    shards._scan_records = lambda path: scans.put(path) or scan(path)
    barrier.wait()
    assert len(open_dataset(pattern)) == 12


def run_at_once(function, processes, *arguments):
    "Calls it with a barrier and a queue in forked processes; what they put there, in order."
    fork = multiprocessing.get_context('fork')
    barrier, seen = fork.Barrier(processes), fork.Queue()
    ranks = [
        fork.Process(target=function, args=(*arguments, barrier, seen)) for _ in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * processes
    seen.put(None)
    return sorted(iter(seen.get, None))


@pytest.mark.process
def test_four_processes_scan_each_shard_once(others):
    scanned = run_at_once(count_scans, 4, others)
    assert [path[-5:] for path in scanned] == ['0.tar', '1.tar', '2.tar']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A build of 60 images in four shards."
    out = tmp_path_factory.mktemp('built') / 'out'
    source = formula('rcdb', classes=6, instances=10, size=32)
    build(source, out, workers=0, progress=lambda *_: None, layout='shards', shard_images=16)
    return out


def test_a_pattern_of_a_build_uses_its_manifest(built, own_data_root, monkeypatch):
    monkeypatch.setattr(shards, 'tar_index', refuse)
    whole, pattern = open_dataset(built), open_dataset(f'{built}/SHARDS-{{000000..000003}}.tar')
    assert len(pattern) == 60 and pattern.classes == whole.classes
    order = whole.plan.images_at(range(60)).tolist()
    assert [pattern.name(i) for i in range(60)] == [whole.name(i) for i in order]
    for i in range(0, 60, 7):
        assert pattern[i][0].tobytes() == whole[order[i]][0].tobytes()
        assert pattern.label(i) == whole.label(order[i])
    some = open_dataset(f'{built}/SHARDS-{{000002..000003}}.tar')
    assert [some.name(i) for i in range(28)] == [pattern.name(i) for i in range(32, 60)]
    assert not own_data_root.exists()


def test_shards_beside_a_build_are_others(built, own_data_root, tmp_path):
    copied = shutil.copytree(built, tmp_path / 'out')
    shutil.copytree(metadata_folder(built), metadata_folder(copied))
    pack(copied / 'SHARDS-000004.tar', [1, 2])
    mixed = open_dataset(f'{copied}/SHARDS-{{000003..000004}}.tar')
    assert type(mixed) is shards.ShardFiles and len(mixed) == 14


def count_indexes(folder, barrier, scans):
    scan = shards.tar_index
    shards.tar_index = lambda path: scans.put(path.name) or scan(path)
    barrier.wait()
    images = open_dataset(folder)
    assert all(images[i][0].size == (32, 32) for i in range(60))


@pytest.mark.process
def test_a_build_without_index_is_scanned_once(built, own_data_root, tmp_path):
    copied = shutil.copytree(built, tmp_path / 'out')
    shutil.copytree(metadata_folder(built), metadata_folder(copied))
    (metadata_folder(copied) / 'index/SHARDS-000001.idx').unlink()
    (metadata_folder(copied) / 'index/SHARDS-000002.idx').unlink()
    assert run_at_once(count_indexes, 2, copied) == ['SHARDS-000001.tar', 'SHARDS-000002.tar']


@pytest.mark.process
def test_streams_of_known_counts_are_not_read_first(others, tmp_path, monkeypatch):
    pipes = f'pipe:cat {tmp_path}/others-{{0..2}}.tar'
    read = open_dataset(pipes)
    monkeypatch.setattr(streams, 'records', refuse)
    assert isinstance(open_dataset(pipes).index.rows, np.memmap)
    known = open_dataset(f'pipe:cat  {tmp_path}/others-{{0..2}}.tar', counts=4, classes=6)
    assert (len(known), known.classes) == (len(read), read.classes)
    monkeypatch.undo()
    assert [known.label(i) for i in range(12)] == [read.label(i) for i in range(12)]
    loader = known.train_loader(PILToTensor(), EpochBatchSampler(12, 4))
    assert sorted(c for _, labels in loader for c in labels.tolist()) == sorted(read.index.rows)
    with pytest.raises(ValueError, match='give both'):
        open_dataset(pipes, counts=4)


def test_the_index_of_many_labels_is_mapped(tmp_path, own_data_root, monkeypatch):
    write_shards(tmp_path / 'sheets', list(example_rows(20, np.random.default_rng(3))))
    paths = sorted((tmp_path / 'sheets').glob('*.tar'))
    first = CoyoDataset(paths, MultiHot(10, 0.2))
    monkeypatch.setattr(coyo, 'read_index', refuse)
    again = CoyoDataset(paths, MultiHot(10, 0.2))
    assert isinstance(again.index.rows, np.memmap) and again.left_out == first.left_out
    assert [again.labels(i)[0].tolist() for i in range(len(again))] == [
        first.labels(i)[0].tolist() for i in range(len(first))
    ]
    seal_shards(tmp_path / 'sheets')  # sealed since: the seals are read
    with pytest.raises(pytest.fail.Exception, match='read again'):
        CoyoDataset(paths, MultiHot(10, 0.2))


def test_a_checkpoint_is_read_once_and_mapped(tmp_path, monkeypatch):
    learn, _, _ = trained(tmp_path)
    read, load = [], torch.load

    def counted(path, *arguments, mmap=False, **more):
        read.append((Path(path).name, mmap))
        return load(path, *arguments, mmap=mmap, **more)

    monkeypatch.setattr(torch, 'load', counted)
    continue_run(learn, RunFolder(tmp_path))
    with pytest.raises(CheckpointError, match='give more'):
        resume(learn, tmp_path / 'last.pth.tar')
    assert read == [('last.pth.tar', True)] * 2


# Categories, searched once


def search_like_a_rank(source, note, barrier, scans):
    "Prepares and reads every class in two worker processes; each search leaves a line in `note`."
    real = ifs_search.first_filling

    def counted(*arguments):
        with open(note, 'a') as f:
            f.write('searched\n')
        return real(*arguments)

    ifs_search.first_filling = counted
    images = FormulaDataset(source)
    barrier.wait()
    images.prepare(workers=2)
    loader = DataLoader(images, 20, num_workers=2, collate_fn=len)
    scans.put(sum(loader))


@pytest.mark.process
@pytest.mark.parametrize('kind', ['canonical', 'published'])
def test_two_ranks_with_two_workers_search_each_class_once(tmp_path, own_data_root, kind):
    knobs = dict(rate=0.02, search_points=6000, points=200, size=16, categories=kind)
    source = formula('fractaldb', classes=200, instances=1, **knobs)
    note = tmp_path / 'searches'
    ifs_search.published_categories.cache_clear()
    assert run_at_once(search_like_a_rank, 2, source, note) == [200, 200]
    assert len(note.read_text().splitlines()) == 200
    alone = [source.category(c) for c in (0, 99, 199)]
    ifs_search.published_categories.cache_clear()
    ifs_search._found.clear()
    for c, maps in zip((0, 99, 199), alone, strict=True):
        np.testing.assert_array_equal(source.category(c), maps)


def test_systems_in_space_are_read_from_disk(own_data_root, monkeypatch):
    source = formula('exfractaldb', classes=60, variance=0.04)
    source.prepare(workers=2)
    found = [source.category(c) for c in (0, 59)]
    ifs3d.canonical_system.cache_clear()
    monkeypatch.setattr(ifs3d, '_search_system', refuse)
    for c, maps in zip((0, 59), found, strict=True):
        np.testing.assert_array_equal(source.category(c), maps)


def test_a_block_that_another_process_is_at_is_left_to_it(own_data_root):
    "The rest is searched meanwhile; then the claimed block is waited for, and read."
    cache = categories.category_cache('waiting', block_of='one')
    order = []

    def search(c):
        order.append(c)
        return np.array([[float(c)]])

    with ThreadPoolExecutor(1) as pool:
        with locked(cache.folder, '.00001.lock'):
            waiting = pool.submit(categories.search_parallel, search, 150, cache)
            while len(order) < 100:
                time.sleep(0.01)
            assert not waiting.done()
        assert [maps.item() for maps in waiting.result(60)] == list(range(150))
    assert order == [*range(50), *range(100, 150), *range(50, 100)]


def test_a_published_search_goes_on_within_a_block(own_data_root):
    cache = categories.category_cache('stream', seed=1)

    def search(rng):
        return np.array([[rng.random_sample()]])

    whole = categories.CategoryStream(search, NumpyRandom(1), cache)
    expected = NumpyRandom(1).random_sample(130).tolist()
    for n in (3, 49, 50, 51, 130):
        found = categories.CategoryStream(search, NumpyRandom(1), cache).upto(n)
        assert [maps.item() for maps in found] == expected[:n]
    assert [maps.item() for maps in whole.upto(130)] == expected


def test_training_searches_before_it_draws(tmp_path, own_data_root):
    knobs = dict(classes=4, instances=4, rate=0.02, search_points=6000, points=200, size=32)
    trained(tmp_path / 'run', dataset='fractaldb', knobs=knobs, epochs=1)
    assert len(list(own_data_root.rglob('categories/fractaldb-*/00000.json'))) == 1


# A worker of a build

DRAWING = """
import pickle, sys
for function, arguments in pickle.load(sys.stdin.buffer):
    function(*arguments)
print([name for name in ('torch', 'torchvision', 'timm', 'pandas') if name in sys.modules])
"""


def planned(source, out, **settings):
    "The tasks of a build that has begun in a folder."
    job = Job(as_source(source), make_plan(source, **settings), str(out))
    (metadata_folder(out) / 'index').mkdir(parents=True)
    out.mkdir()
    (metadata_folder(out) / 'manifest.json').write_text(json.dumps(describe(job)))
    return list(tasks_of(job, range(job.plan.parts)))


@pytest.mark.process
def test_a_worker_that_draws_imports_no_torch(tmp_path):
    fractals = formula('fractaldb', classes=1, instances=2, size=32, points=500, rate=0.01)
    pngs = planned(fractals, tmp_path / 'pngs')
    tars = planned(
        formula('rcdb', classes=2, instances=2, size=32), tmp_path / 'tars', layout='shards'
    )
    drawing = subprocess.run(
        [sys.executable, '-c', DRAWING], input=pickle.dumps(pngs + tars), check=True, stdout=-1
    )
    assert drawing.stdout.decode().strip() == '[]'
    assert len([*(tmp_path / 'pngs').rglob('*.png')]) == 2
    assert len([*(tmp_path / 'tars').glob('*.tar')]) == 1
