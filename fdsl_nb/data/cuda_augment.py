"""Grey images augmented, and batches made, by CUDA kernels.

It gives the bits of fast_augment.py. What `GreyTransform.from_seed` draws for each image is drawn on
the CPU, by the same code, and packed into records; the kernel does the rest. Checked by compilation
and on a CPU: tests/test_cuda_augment.py.
"""

import inspect
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
from numba import njit, uint32
from fdsl_nb.core.rng import mt_words
from fdsl_nb.data.fast_augment import ROTATE, GreyTransform, _drawn_from, _own_generator, _rotation
from fdsl_nb.data.loading import (
    AHEAD,
    AugmentedDataset,
    EpochBatchSampler,
    EpochLoader,
    FormulaDataset,
    ImageDataset,
    Part,
)
from fdsl_nb.formulas.cuda import CannotPack, DeviceKernels, Launch, pack, why_not_cuda

SOURCE = Path(inspect.getfile(GreyTransform)).parent / 'cuda_src' / 'augment.cu'
LAYERS = RECTANGLES = 8  # most operations and erased rectangles of an image

_OPERATION = np.dtype([('code', 'f8'), ('value', 'f8'), ('bicubic', 'f8'), ('matrix', 'f8', 6)])
_RECTANGLE = np.dtype([(n, 'i8') for n in ('top', 'left', 'height', 'width', 'filling')])
_NUMBERS = 'image top left height width bicubic flip_across flip_down operations erased'.split()
_VIEW = np.dtype(
    [
        *[(n, 'i8') for n in _NUMBERS],
        ('operation', _OPERATION, LAYERS),
        ('rectangle', _RECTANGLE, RECTANGLES),
    ]
)
_SETTINGS = np.dtype(
    [(n, 'i8') for n in 'height width size floats noise taps fill_red fill_green fill_blue'.split()]
)


def _check(transform):
    if not transform.fast:
        raise CannotPack('the transform has a step that only timm knows; take timm, on the CPU')
    s = transform._settings
    layers, rectangles = s.layers, int(s.numbers[-1][-1])
    if layers > LAYERS or rectangles > RECTANGLES:
        raise CannotPack(
            f'{layers} operations and up to {rectangles} rectangles an image; '
            f'a kernel takes {LAYERS} each'
        )


class _Plans(NamedTuple):
    "The random numbers of many images, each array with a row an image."

    crop: np.ndarray  # int64 [n, 5], as in `Plan`
    flips: np.ndarray  # bool [n, 2]
    operations: np.ndarray  # float64 [n, layers, 3], as in `Plan`
    matrices: np.ndarray  # float64 [n, layers, 6], of rotations
    rectangles: np.ndarray  # int64 [n, most, 4]: top, left, height, width
    erased: np.ndarray  # int64 [n], how many of them


@njit(cache=True, nogil=True)
def _torch_state(seed):
    "The state, uint32 [625], of a torch generator on the CPU seeded with a number."
    state = np.empty(625, np.uint32)
    state[0] = uint32(seed & np.uint64(0xFFFFFFFF))
    for i in range(1, 624):
        before = state[i - 1]
        state[i] = uint32(uint32(1812433253) * (before ^ (before >> uint32(30)))) + uint32(i)
    state[624] = uint32(624)
    return state


@njit(cache=True, nogil=True)
def _flips_from(seed, chances, out):
    "As `torch.rand(1) < chance` for each chance above 0, float32 [2]."
    if not chances.any():
        out[:] = False
        return
    state, word = _torch_state(seed), np.empty(1, np.uint32)
    for i in range(len(chances)):
        out[i] = False
        if chances[i] > 0:
            mt_words(state, word)
            out[i] = np.float32(word[0] & uint32(0xFFFFFF)) * np.float32(2**-24) < chances[i]


@njit(cache=True, nogil=True)
def _fill_plans(seeds, chances, layers, numbers, plans):
    "Draws for each seed, as `GreyTransform.draw_from` does."
    crop, flips, operations, matrices, rectangles, erased = plans
    height, width, size, scale, ratio, filters, ops, erasing = numbers
    for i in range(len(seeds)):
        drawn = _drawn_from(
            seeds[i], layers, height, width, size, scale, ratio, filters, ops, erasing
        )
        _flips_from(seeds[i], chances, flips[i])
        crop[i], operations[i], erased[i] = drawn[0], drawn[1], len(drawn[2])
        rectangles[i, : erased[i]] = drawn[2]
        for k in range(layers):
            if operations[i, k, 0] == ROTATE:
                matrix = _rotation(operations[i, k, 1], size, size)
                for m in range(6):
                    matrices[i, k, m] = matrix[m]


def _drawn_plans(transform, seeds, height, width):
    s, n = transform._settings, len(seeds)
    most = max(1, int(s.numbers[-1][-1]))
    plans = _Plans(
        np.empty((n, 5), np.int64),
        np.empty((n, 2), np.bool_),
        np.empty((n, s.layers, 3)),
        np.zeros((n, s.layers, 6)),
        np.zeros((n, most, 4), np.int64),
        np.empty(n, np.int64),
    )
    chances = np.array([p or 0.0 for p in s.flips], np.float32)
    numbers = (height, width, *s.numbers)
    _fill_plans(np.array(seeds, np.uint64), chances, s.layers, numbers, tuple(plans))
    return plans


def _write(views, plans, places):
    "Plans as records; what fills the rectangles is written by `_write_filling`."
    views['image'] = places
    for name, column in zip(_NUMBERS[1:6], plans.crop.T, strict=True):
        views[name] = column
    views['flip_across'], views['flip_down'] = plans.flips.T
    layers, most = plans.operations.shape[1], plans.rectangles.shape[1]
    views['operations'], views['erased'] = layers, plans.erased
    operations, rectangles = views['operation'][:, :layers], views['rectangle'][:, :most]
    for n, name in enumerate(('code', 'value', 'bicubic')):
        operations[name] = plans.operations[..., n]
    operations['matrix'] = plans.matrices
    for n, name in enumerate(('top', 'left', 'height', 'width')):
        rectangles[name] = plans.rectangles[..., n]


def _write_filling(views, transform, seeds, filling):
    "What fills the rectangles goes to the list; each record says from which number on."
    start = sum(map(len, filling))
    for i in np.flatnonzero(views['erased']):
        generator = _own_generator(int(seeds[i]))
        transform._flips(generator)
        for row in views['rectangle'][i, : views['erased'][i]]:
            values = transform._filling(int(row['height']), int(row['width']), generator)
            filling.append(values.numpy().ravel())
            row['filling'] = start
            start += values.numel()


def pack_views(
    transform: GreyTransform,  # of `train_transform`
    images,  # uint8 [n, h, w]: an array, or a tensor on the GPU
    seeds: list,  # of each view, 0 … 2**63 - 1
    places: list = None,  # of each view: which image; one view of each if None
) -> Launch:
    "What the kernel makes `transform.from_seed(image, seed)` from; `CannotPack` if it cannot."
    _check(transform)
    _, height, width = images.shape
    s, n = transform._settings, len(seeds)
    floats = len(s.values) > 0
    views, filling = np.zeros(n, _VIEW), [s.values.ravel()] if floats else []
    plans = _drawn_plans(transform, seeds, height, width)
    _write(views, plans, range(n) if places is None else places)
    _write_filling(views, transform, seeds, filling)
    taps = 2 * math.ceil(2 * max(1.0, max(height, width) / s.size)) + 1
    settings = (height, width, s.size, floats, s.remode == 'pixel', taps, *s.fill.tolist())
    share = 4 * taps * s.size + height * s.size + 6 * s.size**2
    return Launch(
        'augment',
        views,
        images,
        np.concatenate(filling) if filling else np.zeros(1, np.float32),
        np.array([settings], _SETTINGS),
        (n, 3, s.size, s.size),
        -(-share // 16) * 16,
        'float32' if floats else 'uint8',
    )


# ---- batches of a formula, drawn and augmented by kernels


class Kernels(NamedTuple):
    "What draws and what augments: `DeviceKernels`, or `EmulatedKernels` in tests."

    draw: object
    augment: object


@lru_cache
def device_kernels(
    device: torch.device,  # a GPU
) -> Kernels:
    "The kernels of a GPU, loaded once."
    return Kernels(DeviceKernels(device), DeviceKernels(device, SOURCE))


def _formula_of(images):
    "The formula's data set that this one is, or is a part of."
    return _formula_of(images.images) if isinstance(images, Part) else images


def _address(images, i):
    "Class and instance of image `i`."
    while isinstance(images, Part):
        images, i = images.images, int(images.numbers[i])
    return divmod(i, images.listed)


def why_not_in_kernels(
    images: ImageDataset,
    transform,  # of `train_transform`
) -> str:
    "Why kernels cannot draw and augment these images on a GPU here; '' if they can."
    drawn = _formula_of(images)
    if not isinstance(drawn, FormulaDataset):
        return 'the images are read, not drawn; only those of a formula can be'
    if not drawn.fixed:
        return 'instances are chosen by chance when they are asked for (by_chance)'
    if not hasattr(transform, 'from_seed'):
        return 'the transform is not the one that kernels know'
    first = [_address(images, 0)]
    fault = why_not_cuda(drawn.formula, first)
    if fault:
        return fault
    if len(pack(drawn.formula, first).shape) == 4:
        return 'the images are in colour, and kernels augment grey ones'
    try:
        _check(transform)
    except CannotPack as e:
        return str(e)
    return ''


def choose_feed(
    draw_on: str,  # auto, cpu or cuda
    device: torch.device,  # where the network is
    images: ImageDataset,
    transform,  # of `train_transform`
) -> tuple:  # (cpu or cuda, a line about it or '')
    "Where images are drawn; `ValueError` for what cannot be."
    if draw_on == 'cpu' or (draw_on == 'auto' and device.type == 'cpu'):
        return 'cpu', ''
    if draw_on == 'auto' and not isinstance(_formula_of(images), FormulaDataset):
        return 'cpu', ''
    reason = why_not_in_kernels(images, transform)
    if not reason:
        return 'cuda', 'images are drawn and augmented on the GPU'
    if draw_on == 'cuda':
        raise ValueError(f"draw_on='cuda': {reason}; or give draw_on='auto'")
    return 'cpu', f'images are drawn on the CPU and copied: {reason}'


class _Made(NamedTuple):
    "A batch whose kernels have been started."

    images: torch.Tensor  # [n, 3, size, size]
    labels: torch.Tensor  # int64 [n]
    drawn: torch.Tensor  # bool [views], on the CPU: was the image of this view drawn?
    samples: list
    done: object  # event on the stream; None without a GPU


class _Feed:
    "Makes the batches of one process, on a stream of its own where there is a GPU."

    def __init__(self, dataset: AugmentedDataset, kernels: Kernels, device: torch.device):
        self.dataset, self.kernels, self.device = dataset, kernels, device
        self.formula = _formula_of(dataset.images).formula
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def make(self, samples) -> _Made:
        "Starts the kernels of a batch; threads do this for several batches."
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            addresses = {s.index: _address(self.dataset.images, s.index) for s in samples}
            order = {index: place for place, index in enumerate(addresses)}
            places = [order[s.index] for s in samples]
            launch = pack(self.formula, [*addresses.values()])
            images, drawn = self.kernels.draw.draw(launch)
            seeds = [self.dataset.seed_of(s) for s in samples]
            launch = pack_views(self.dataset.transform, images, seeds, places)
            views, _ = self.kernels.augment.draw(launch)
            labels = torch.tensor([addresses[s.index][0] for s in samples])
            drawn = torch.as_tensor(drawn)[self._there(torch.tensor(places))]
            return self._made(torch.as_tensor(views), labels, drawn, samples)

    def _there(self, tensor):
        if self.device.type != 'cuda':
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _made(self, views, labels, drawn, samples):
        labels, flags, done = self._there(labels), drawn, None
        if self.stream:
            flags = torch.empty(drawn.shape, dtype=torch.bool, pin_memory=True)
            flags.copy_(drawn, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return _Made(views, labels, flags, samples, done)

    def hand_over(self, made: _Made) -> tuple:  # images and labels, for the current stream
        "The batch, for the stream that trains; memory comes back when that has used it."
        if made.done:
            made.done.synchronize()  # begun batches ago
            using = torch.cuda.current_stream(self.device)
            using.wait_event(made.done)
            for tensor in (made.images, made.labels):
                tensor.record_stream(using)
        for row in torch.nonzero(~made.drawn).flatten().tolist():
            # the CPU draws it, or says what is wrong with it
            image, _ = self.dataset.images.array(made.samples[row].index)
            seed = self.dataset.seed_of(made.samples[row])
            made.images[row] = self.dataset.transform.from_seed(image, seed).to(self.device)
        return made.images, made.labels


def _ahead(feed, batches, workers):
    "Yields the batches of all epochs; some are under way while one is used."
    waiting, lists = deque(), batches.onward()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        while True:
            for samples in islice(lists, AHEAD - len(waiting)):
                waiting.append(pool.submit(feed.make, samples))
            if not waiting:
                return
            yield feed.hand_over(waiting.popleft().result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def device_loader(
    images: ImageDataset,  # of a formula, or a part of them
    transform: GreyTransform,  # of `train_transform`
    batches: EpochBatchSampler,  # says which images, in which order
    kernels: Kernels,
    device: torch.device,  # where the kernels draw
    workers: int = 0,  # threads that pack what kernels are started with
) -> EpochLoader:
    "The batches of `train_loader`, drawn and augmented on the device."
    dataset = AugmentedDataset(images, transform, batches.seed, batches.repeats)
    feed = _Feed(dataset, kernels, device)
    return EpochLoader(batches, lambda: _ahead(feed, batches, workers))
