"""Augmentation of a batch of grey images as a CUDA kernel.

It gives the bits of fast_augment.py. What `GreyTransform.from_seed` draws for each image is drawn on
the CPU, by the same code, and packed into records; the kernel does the rest. Checked by compilation
and on a CPU: tests/test_cuda_augment.py.
"""

import inspect
import math
from pathlib import Path
import numpy as np
from fdsl_nb.data.fast_augment import ROTATE, GreyTransform, _rotation
from fdsl_nb.formulas.cuda import CannotPack, Launch

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


def _check(transform, views):
    if not transform.fast:
        raise CannotPack('the transform has a step that only timm knows; take timm, on the CPU')
    most = max((len(v.operations) for v in views), default=0)
    erased = max((len(v.erased) for v in views), default=0)
    if most > LAYERS or erased > RECTANGLES:
        raise CannotPack(
            f'{most} operations and {erased} rectangles of an image; a kernel takes {LAYERS} each'
        )


def _write(record, place, plan, size, filling, start):
    "Writes a plan; what fills its rectangles goes to a list, from number `start`; where it ends."
    top, left, height, width, bicubic = plan.crop.tolist()
    numbers = place, top, left, height, width, bicubic, *plan.flips
    for name, value in zip(_NUMBERS, (*numbers, len(plan.operations), len(plan.erased))):
        record[name] = value
    for n, (code, value, smooth) in enumerate(plan.operations.tolist()):
        matrix = _rotation(value, size, size) if code == ROTATE else (0.0,) * 6
        record['operation'][n] = code, value, smooth, matrix
    for n, (top, left, values, height, width) in enumerate(plan.erased):
        record['rectangle'][n] = top, left, height, width, start
        filling.append(values.numpy().ravel())
        start += values.numel()
    return start


def pack_views(
    transform: GreyTransform,  # of `train_transform`
    images,  # uint8 [n, h, w]: an array, or a tensor on the GPU
    seeds: list,  # of each image, 0 … 2**63 - 1
) -> Launch:
    "What the kernel makes `transform.from_seed(image, seed)` from; `CannotPack` if it cannot."
    n, height, width = images.shape
    if not transform.fast:
        _check(transform, [])
    plans = [transform.draw_from(seed, height, width) for seed in seeds]
    _check(transform, plans)
    s = transform._settings
    floats = len(s.values) > 0
    views, filling = np.zeros(n, _VIEW), [s.values.ravel()] if floats else []
    start = sum(map(len, filling))
    for i, plan in enumerate(plans):
        start = _write(views[i], i, plan, s.size, filling, start)
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
