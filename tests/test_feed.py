"""Batches made ahead by threads and processes: those of a plain loop, to the bit, at any place."""

import gc
import pickle
import random
import threading
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.core.settings import machine_settings
from fdsl_nb.data import loading
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.loading import (
    AHEAD,
    RECENT,
    AugmentedDataset,
    EpochBatchSampler,
    FormulaDataset,
    ImageDataset,
    Part,
    choose_workers,
    free_cores,
    train_loader,
)
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training import training
from fdsl_nb.training.distributed import local_processes
from fdsl_nb.training.recipes import recipe
from PIL import Image
from torch.utils.data import default_collate

SMALL = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), img_size=32)
DRAWN = FormulaDataset(formula('visualatom', classes=3, instances=9, size=64))


def transform(fast=True):
    return train_transform(replace(recipe('rcdb1k_deit_tiny'), **SMALL, prefetcher=False), fast)


def batches(repeats=1, images=None, size=6, n=27, **more):
    return EpochBatchSampler(n, size, 5, repeats=repeats, images=images, **more)


def plain(sampler, images=DRAWN, change=None):
    "The batches of a loop, by timm and Pillow."
    data = AugmentedDataset(images, change or transform(False), sampler.seed, sampler.repeats)
    return [default_collate([data[s] for s in batch]) for batch in sampler]


@cache
def wanted(epochs, begin=0, first=0, **more):
    found, sampler = [], batches(**more)
    for sampler.epoch in range(begin, epochs):
        sampler.first = first if sampler.epoch == begin else 0
        found += plain(sampler)
    return found


def shown(loader, epochs, begin=0, first=0):
    "What a training sees that begins at a place."
    found = []
    for epoch in range(begin, epochs):
        loader.batch_sampler.epoch = epoch
        loader.batch_sampler.first = first if epoch == begin else 0
        found += list(loader)
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (x, y), (a, b) in zip(found, expected):
        assert torch.equal(x, a) and torch.equal(y, b)
        assert (x.dtype, y.dtype) == (a.dtype, b.dtype)


def helpers():
    return {t for t in threading.enumerate() if t.name.startswith('ThreadPoolExecutor')}


def ended(before, seconds=5):
    "Have all threads ended that were not there before?"
    until = time.time() + seconds
    while helpers() - before and time.time() < until:
        time.sleep(0.01)
    return not helpers() - before


@pytest.fixture
def threads():
    "Those that were there before the test."
    gc.collect()
    return helpers()


# an epoch of 2 batches is shorter than what is made ahead, one of 8 is longer
@pytest.mark.parametrize('images', (12, 48))
@pytest.mark.parametrize('repeats', (1, 3))
@pytest.mark.parametrize('workers', (0, 1, 2, 8))
def test_threads_give_the_batches_of_a_plain_loop(workers, repeats, images, threads):
    assert 12 // 6 < AHEAD < 48 // 6
    how = dict(repeats=repeats, images=images)
    loader = train_loader(DRAWN, transform(), batches(**how), workers)
    assert_same(shown(loader, 3), wanted(3, **how))
    for begin, first in ((1, 1), (0, 0)):  # again from the middle, with the same loader
        assert_same(shown(loader, 3, begin, first), wanted(3, begin, first, **how))
    assert bool(helpers() - threads) == bool(workers)
    loader.close()
    assert ended(threads)


def test_two_ranks_see_the_batches_of_one(threads):
    both = [
        shown(train_loader(DRAWN, transform(), batches(3, rank=r, world_size=2), 2), 2)
        for r in range(2)
    ]
    for (x, y), (a, _), (b, _) in zip(wanted(2, repeats=3), *both, strict=True):
        assert torch.equal(x[0::2], a) and torch.equal(x[1::2], b)


def test_whole_epochs_of_a_pass_each():
    loader = train_loader(DRAWN, transform(), batches(), 2)
    assert_same(shown(loader, 3), wanted(3))


def test_an_epoch_left_in_the_middle_begins_again():
    loader = train_loader(DRAWN, transform(), batches(), 2)
    for _ in range(2):
        assert_same([next(iter(loader))], wanted(1)[:1])
    assert_same(list(loader), wanted(1))
    assert_same([next(iter(loader))], wanted(2)[4:5])  # that epoch was read to its end
    loader.set_epoch(0)
    one, other = iter(loader), iter(loader)
    assert_same([next(one), next(other), next(one)], [wanted(1)[n] for n in (0, 0, 1)])


def test_batches_that_are_kept_stay_as_they_are():
    "Memory is used again only when no tensor over it is left."
    loader = train_loader(DRAWN, transform(), batches(), 2)
    kept, rows = [], []
    for epoch in range(12):
        loader.batch_sampler.epoch = epoch
        for n, (x, y) in enumerate(loader):
            rows.append(x[1:3])
            if n % 2:
                kept.append((epoch, n, x))
    expected = wanted(12)
    for epoch, n, x in kept:
        assert torch.equal(x, expected[epoch * 4 + n][0])
    for row, (x, _) in zip(rows, expected, strict=True):
        assert torch.equal(row, x[1:3])


class Counted(ImageDataset):
    "Grey images of one value each, and how often each was drawn; some are faulty, or in colour."

    classes, fixed = ['all'], True

    def __init__(self, n=40, faulty=(), coloured=(), seconds=0.0):
        self.n, self.faulty, self.coloured, self.seconds = n, faulty, coloured, seconds
        self.drawn, self.error = [], LookupError

    def __len__(self):
        return self.n

    def label(self, i):
        return 0

    def array(self, i):
        self.drawn.append(i)
        time.sleep(self.seconds)
        if i in self.faulty:
            raise self.error(f'no image {i}')
        image = np.full((40, 40), i, np.uint8)
        return np.stack([image, image + 20, 255 - image], 2) if i in self.coloured else image, 0

    def __getitem__(self, i):
        image, label = self.array(i)
        return Image.fromarray(image), label


def test_an_image_in_colour_does_not_touch_the_generators_of_the_training():
    "Threads leave it to the training's own thread, which restores them."
    images = Counted(coloured=range(3, 40, 5))
    loader = train_loader(images, transform(), batches(n=40), 2)
    expected = plain(batches(n=40), images)
    torch.manual_seed(0)
    numbers = []
    for (x, y), (a, b) in zip(loader, expected, strict=True):
        assert torch.equal(x, a)
        numbers.append(torch.rand(1).item())
    torch.manual_seed(0)
    assert numbers == [torch.rand(1).item() for _ in numbers]


@pytest.mark.parametrize('error', (LookupError, IndexError, ZeroDivisionError, KeyboardInterrupt))
@pytest.mark.parametrize('workers', (0, 2))
def test_an_error_arrives_as_it_is_and_ends_the_threads(workers, error, threads):
    images = Counted(faulty=[int(batches(n=40).batch(1, 2)[3].index)])
    images.error = error
    loader = train_loader(images, transform(), batches(n=40), workers)
    with pytest.raises(error, match=f'no image {images.faulty[0]}') as found:
        shown(loader, 3)
    assert found.type is error
    del found
    assert ended(threads)


def test_threads_end_with_the_loader_and_with_an_error_in_the_step(threads):
    loader = train_loader(Counted(seconds=0.001), transform(), batches(n=40), 3)
    next(iter(loader))
    assert helpers() - threads
    del loader
    gc.collect()
    assert ended(threads)

    def step():
        for _ in train_loader(Counted(seconds=0.001), transform(), batches(n=40), 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()
    gc.collect()
    assert ended(threads)


def test_what_is_ahead_is_bounded_and_ends_with_the_last_epoch():
    images = Counted()
    loader = train_loader(images, transform(), batches(n=40, epochs=2), 2)
    first = next(iter(loader))
    time.sleep(0.2)
    assert len(images.drawn) <= 2 + 6 * AHEAD  # two to know size and kind
    assert len(first[0]) == 6
    images.drawn.clear()
    shown(loader, 2)
    time.sleep(0.1)
    assert len(images.drawn) == 2 + 2 * 36


@pytest.mark.process
@pytest.mark.parametrize('workers', (1, 2))
def test_processes_go_on_from_epoch_to_epoch(workers):
    "For what needs Python's generators; they are started once."
    timms = transform(False)
    loader = train_loader(DRAWN, timms, batches(3, 12), workers)
    assert_same(shown(loader, 4), wanted(4, repeats=3, images=12))
    running = loader.running
    assert_same(shown(loader, 6, 4), wanted(6, 4, repeats=3, images=12))
    assert loader.running is running
    assert_same(shown(loader, 2, 0, 1), wanted(2, 0, 1, repeats=3, images=12))
    assert loader.running is not running
    loader.close()


# Images that are kept


class Tallied(VisualAtom):
    "Counts what it draws."

    name, tally = 'tallied', []

    def render(self, c, k):
        self.tally.append((c, k))
        return super().render(c, k)


@pytest.fixture
def tallied():
    Tallied.tally.clear()
    return FormulaDataset(Tallied(classes=3, instances=9, size=32))


BYTES = 27 * 32 * 32


@pytest.mark.parametrize('workers', (0, 2))
def test_a_small_data_set_is_drawn_once(workers, tallied):
    tallied.cache(BYTES)
    loader = train_loader(
        Part(tallied, range(26)), transform(), batches(3, n=26, epochs=4), workers
    )
    Tallied.tally.clear()
    found = shown(loader, 4)
    sampler = batches(3, n=26, epochs=4)
    images = {sample.index for batch in sampler.onward() for sample in batch}
    first = {(0, 0)}  # looked at for its size
    assert {*Tallied.tally} | first == {divmod(i, 9) for i in images} | first and len(images) > 15
    assert len(Tallied.tally) <= len(images) + 2  # two threads may draw one at the same time
    plainly = []
    for sampler.epoch in range(4):
        plainly += plain(sampler, FormulaDataset(VisualAtom(classes=3, instances=9, size=32)))
    assert_same(found, plainly)


@pytest.mark.parametrize('limit, kept', ((BYTES, 27), (BYTES - 1, RECENT), (0, RECENT)))
def test_nothing_above_the_limit_is_kept(limit, kept, tallied):
    large = FormulaDataset(replace(tallied.formula, classes=9))
    tallied.cache(limit)
    large.cache(limit)
    for i in range(81):
        large.array(i)
    assert large.render.cache_info().currsize == RECENT
    assert tallied.render.cache_info().maxsize == (None if kept == 27 else RECENT)
    again = pickle.loads(pickle.dumps(tallied))
    assert not hasattr(again.render, 'cache_info')
    assert np.array_equal(again.array(5)[0], tallied.array(5)[0])


def test_an_image_is_drawn_once_for_its_repeats(tallied):
    "Also where they are in two batches, and for each process alone."
    for rank in range(2):
        tallied.cache(0)
        sampler = batches(4, size=10, rank=rank, world_size=2)
        own = [s.index for batch in sampler for s in batch]
        Tallied.tally.clear()
        for workers in (0, 2):
            tallied.cache(0)
            Tallied.tally.clear()
            list(
                train_loader(tallied, transform(), batches(4, size=10, **vars_of(sampler)), workers)
            )
            assert len(set(own)) <= len(Tallied.tally) <= len(set(own)) + 2 + 2 * bool(workers)


def vars_of(sampler):
    return dict(rank=sampler.rank, world_size=sampler.world_size, epochs=1)


def test_views_by_chance_are_kept_and_chosen_as_without():
    "3D-OFDB shows one of a few views of a class."
    f = formula('ofdb3d', classes=2, size=32)
    plain_set, kept = FormulaDataset(f), FormulaDataset(f)
    kept.cache(1 << 30)
    for seed in range(30):
        random.seed(seed)
        image, _ = kept.array(seed % 2)
        random.seed(seed)
        assert np.array_equal(image, plain_set.array(seed % 2)[0])
        random.seed(seed)
        assert np.array_equal(image, f.random_view(seed % 2, random))
    assert kept.render.cache_info().currsize <= 2 * f.instances


# As many as the machine has room for


@pytest.mark.parametrize(
    'cores, gpu, threads, wanted',
    ((1, False, 0, 0), (2, False, 0, 0), (8, False, 0, 2), (8, False, 8, 0), (8, False, 7, 1))
    + ((1, True, 0, 1), (2, True, 0, 1), (8, True, 4, 7), (64, True, 0, 16)),
)
def test_loading_and_torch_have_a_core_each(cores, gpu, threads, wanted):
    assert choose_workers(cores, gpu, threads) == wanted
    if not gpu:
        assert wanted + max(threads, cores - wanted) <= cores


@pytest.mark.parametrize('busy, wanted', ((0, 8), (50, 4), (70, 2), (100, 1)))
def test_what_others_keep_busy_is_not_free(busy, wanted, monkeypatch):
    monkeypatch.setattr(loading, 'cpu_count', lambda: 8)
    monkeypatch.setattr(loading.psutil, 'cpu_count', lambda: 8)
    monkeypatch.setattr(loading.psutil, 'cpu_percent', lambda seconds: busy)
    assert free_cores() == wanted
    assert free_cores(processes=3) == 2
    monkeypatch.setattr(loading, 'cpu_count', lambda: 2)  # of a large machine, where others work
    monkeypatch.setattr(loading.psutil, 'cpu_count', lambda: 64)
    assert free_cores() == (1 if busy == 100 else 2)


def test_processes_on_this_machine_share_it():
    slurm = dict(SLURM_PROCID='5', SLURM_NTASKS='16', SLURM_NNODES='4')
    assert [local_processes(slurm, own) for own in (True, False)] == [1, 4]
    mpi = dict(OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_SIZE='6', OMPI_COMM_WORLD_LOCAL_SIZE='3')
    assert local_processes(mpi, False) == 3
    assert local_processes({}) == 1


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torchs_threads_fit_and_stay_over_a_restart(monkeypatch, tmp_path, torch_threads):
    monkeypatch.setattr(training, 'cpu_count', lambda: 8)
    monkeypatch.setattr(training, 'free_cores', lambda processes, look: 4)
    monkeypatch.setattr(training.psutil, 'cpu_count', lambda logical: 8)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    torch.set_num_threads(2)
    cpu, folder = torch.device('cpu'), RunFolder(tmp_path)
    assert training.use_cores('auto', cpu)[0] == 1
    assert torch.get_num_threads() == 2  # as given
    monkeypatch.delenv('OMP_NUM_THREADS')
    number, said = training.use_cores('auto', cpu, training._threads_before(folder))
    assert (number, torch.get_num_threads()) == (1, 3)
    assert said == (
        'workers=auto: 1 load images, torch has 3 threads (8 cores, 4 of them free, no GPU)'
    )
    folder.file('log.jsonl').write_text('{"event": "start", "threads": 6}\n{"event": "st')
    assert training.use_cores(3, cpu, training._threads_before(folder))[0] == 3
    assert torch.get_num_threads() == 6
    training.use_cores(3, cpu)
    assert torch.get_num_threads() == 1


def test_workers_are_a_number_or_auto(monkeypatch, tmp_path):
    monkeypatch.setenv('FDSL_SETTINGS', str(tmp_path / 'settings.ini'))
    (tmp_path / 'settings.ini').write_text('[run]\nworkers = auto\n')
    assert machine_settings()['workers'].value == 'auto'
    monkeypatch.setenv('FDSL_WORKERS', '3')
    assert machine_settings()['workers'].value == 3
    monkeypatch.setenv('FDSL_WORKERS', 'many')
    with pytest.raises(ValueError, match="workers='many' in FDSL_WORKERS is not a whole number"):
        machine_settings()
