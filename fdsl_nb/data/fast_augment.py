"""timm's training transform for grey images, compiled, to the bit.

timm, Pillow and torch are the specification. What is not covered here goes to them: colour, other
policies than RandAugment, other filters than bilinear and bicubic. So does everything where a
comparison at first use finds another bit, for example with a Pillow that rounds differently.
"""

import math
import random
import sys
import threading
from copy import copy
from functools import lru_cache
from types import FunctionType
from typing import NamedTuple
import numpy as np
import PIL
import timm
import torch
from numba import njit, uint32, uint64
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomVerticalFlip
from fdsl_nb.core.rng import mt_randbelow, mt_random, mt_words, philox
from fdsl_nb.data.loading import seeded

# What is done to an image, and how a magnitude becomes its argument.
OPERATIONS = ('none', 'contrast', 'brightness', 'color', 'sharpness', 'autocontrast', 'equalize')
OPERATIONS += ('invert', 'posterize', 'solarize', 'solarize_add', 'rotate', 'shear_x', 'shear_y')
OPERATIONS += ('translate_x', 'translate_y')
(
    NONE,
    CONTRAST,
    BRIGHTNESS,
    COLOR,
    SHARPNESS,
    AUTOCONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,
    SOLARIZE,
    SOLARIZE_ADD,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
) = range(len(OPERATIONS))
UNUSED, SIGNED, FACTOR, SIGNED_FACTOR, BITS, FEWER_BITS, MORE_BITS, BELOW, ABOVE, ADDED = range(10)

# timm's name → operation, rule of its argument, span of a signed argument at magnitude 10
_OPS = {
    'AutoContrast': (AUTOCONTRAST, UNUSED, 0.0),
    'Equalize': (EQUALIZE, UNUSED, 0.0),
    'Invert': (INVERT, UNUSED, 0.0),
    'Rotate': (ROTATE, SIGNED, 30.0),
    'Posterize': (POSTERIZE, BITS, 0.0),
    'PosterizeIncreasing': (POSTERIZE, FEWER_BITS, 0.0),
    'PosterizeOriginal': (POSTERIZE, MORE_BITS, 0.0),
    'Solarize': (SOLARIZE, BELOW, 0.0),
    'SolarizeIncreasing': (SOLARIZE, ABOVE, 0.0),
    'SolarizeAdd': (SOLARIZE_ADD, ADDED, 0.0),
    'Color': (COLOR, FACTOR, 0.0),
    'ColorIncreasing': (COLOR, SIGNED_FACTOR, 0.0),
    'Contrast': (CONTRAST, FACTOR, 0.0),
    'ContrastIncreasing': (CONTRAST, SIGNED_FACTOR, 0.0),
    'Brightness': (BRIGHTNESS, FACTOR, 0.0),
    'BrightnessIncreasing': (BRIGHTNESS, SIGNED_FACTOR, 0.0),
    'Sharpness': (SHARPNESS, FACTOR, 0.0),
    'SharpnessIncreasing': (SHARPNESS, SIGNED_FACTOR, 0.0),
    'ShearX': (SHEAR_X, SIGNED, 0.3),
    'ShearY': (SHEAR_Y, SIGNED, 0.3),
    'TranslateXRel': (TRANSLATE_X, SIGNED, 0.45),
    'TranslateYRel': (TRANSLATE_Y, SIGNED, 0.45),
}

# ---- random numbers: as Python's `random`, in timm's order


@njit(cache=True, nogil=True)
def _seeded_state(key):
    "The state, uint32 [625], of a Mersenne Twister seeded with words, uint32 [n]."
    state = np.empty(625, np.uint32)
    state[0] = uint32(19650218)
    for i in range(1, 624):
        before = state[i - 1]
        state[i] = uint32(uint32(1812433253) * (before ^ (before >> uint32(30)))) + uint32(i)
    i = 1
    for k in range(624):
        before = state[i - 1]
        mixed = uint32((before ^ (before >> uint32(30))) * uint32(1664525))
        state[i] = uint32(state[i] ^ mixed) + key[k % key.size] + uint32(k % key.size)
        i += 1
        if i == 624:
            state[0] = state[623]
            i = 1
    for _ in range(623):
        before = state[i - 1]
        mixed = uint32((before ^ (before >> uint32(30))) * uint32(1566083941))
        state[i] = uint32(state[i] ^ mixed) - uint32(i)
        i += 1
        if i == 624:
            state[0] = state[623]
            i = 1
    state[0] = uint32(0x80000000)
    state[624] = uint32(624)
    return state


@njit(cache=True, nogil=True)
def _chosen(state, n, out):
    "As `numpy.random.randint(0, n, out.size)`: masked bits, drawn again until below n."
    mask, word = 1, np.empty(1, np.uint32)
    while mask < n:
        mask *= 2
    for i in range(out.size):
        out[i] = 0
        while n > 1:
            mt_words(state, word)
            out[i] = int(word[0]) & (mask - 1)
            if out[i] < n:
                break


@njit(cache=True, nogil=True)
def _random(state):
    out = np.empty(1)
    mt_random(state, out)
    return out[0]


@njit(cache=True, nogil=True)
def _uniform(state, a, b):
    return a + (b - a) * _random(state)


@njit(cache=True, nogil=True)
def _gauss(state, held, mean, std):
    "As `random.gauss`; `held` float64 [2]: is there a second number of a pair, and which."
    if held[0]:
        held[0] = 0.0
        return mean + held[1] * std
    angle = _random(state) * (2.0 * math.pi)
    radius = math.sqrt(-2.0 * math.log(1.0 - _random(state)))
    held[0] = 1.0
    held[1] = math.sin(angle) * radius
    return mean + math.cos(angle) * radius * std


@njit(cache=True, nogil=True)
def _crop(state, height, width, scale, ratio):
    "Top, left, height, width, as `RandomResizedCrop.get_params`."
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = _uniform(state, scale[0], scale[1]) * (height * width)
        aspect = math.exp(_uniform(state, low, high))
        w, h = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            top = mt_randbelow(state, height - h + 1)
            return top, mt_randbelow(state, width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = int(np.rint(w / ratio[0]))
    elif width / height > ratio[1]:
        w = int(np.rint(h * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, nogil=True)
def _argument(state, rule, level, span):
    "An operation's argument at a magnitude 0 … 1."
    if rule == SIGNED:
        value = level * span
        return -value if _random(state) > 0.5 else value
    if rule == FACTOR:
        return level * 1.8 + 0.1
    if rule == SIGNED_FACTOR:
        value = level * 0.9
        return max(0.1, 1.0 + (-value if _random(state) > 0.5 else value))
    if rule == BITS:
        return float(int(level * 4))
    if rule == FEWER_BITS:
        return float(4 - int(level * 4))
    if rule == MORE_BITS:
        return float(int(level * 4) + 4)
    if rule == BELOW:
        return float(min(256, int(level * 256)))
    if rule == ABOVE:
        return float(256 - min(256, int(level * 256)))
    if rule == ADDED:
        return float(min(128, int(level * 110)))
    return 0.0


@njit(cache=True, nogil=True)
def _operation(state, held, op, bicubic, found):
    "One operation drawn into `found`: code, argument, is its filter bicubic."
    code, rule, span = op[0], op[1], op[2]
    prob, magnitude, std = op[3], op[4], op[5]
    found[:] = 0.0
    if prob < 1.0 and _random(state) > prob:
        return
    if std == np.inf:
        magnitude = _uniform(state, 0.0, magnitude)
    elif std > 0:
        magnitude = _gauss(state, held, magnitude, std)
    level = max(0.0, min(magnitude, 10.0)) / 10.0
    found[0], found[1], found[2] = code, _argument(state, int(rule), level, span), bicubic
    if code >= ROTATE and bicubic < 0:
        found[2] = mt_randbelow(state, 2)


@njit(cache=True, nogil=True)
def _erased(state, erasing, size, out):
    "Rectangles (top, left, height, width) drawn into `out`, int64 [n, 4], as `RandomErasing`."
    prob, low, high, log_low, log_high, most = erasing
    if most < 1 or _random(state) > prob:
        return 0
    count = 1 if most == 1 else 1 + mt_randbelow(state, int(most))
    found = 0
    for _ in range(count):
        for _ in range(10):
            area = _uniform(state, low, high) * (size * size) / count
            aspect = math.exp(_uniform(state, log_low, log_high))
            h, w = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
            if w < size and h < size:
                out[found, 0] = mt_randbelow(state, size - h + 1)
                out[found, 1] = mt_randbelow(state, size - w + 1)
                out[found, 2], out[found, 3] = h, w
                found += 1
                break
    return found


@njit(cache=True, nogil=True)
def _drawn(state, held, chosen, height, width, size, scale, ratio, filters, ops, erasing):
    "(crop with its filter int64 [5], operations float64 [n, 3], rectangles int64 [m, 4])."
    crop, found = np.empty(5, np.int64), np.empty((chosen.size, 3))
    crop[0], crop[1], crop[2], crop[3] = _crop(state, height, width, scale, ratio)
    crop[4] = filters[0] if filters[0] >= 0 else mt_randbelow(state, 2)
    for i in range(chosen.size):
        _operation(state, held, ops[chosen[i]], filters[1], found[i])
    rectangles = np.empty((max(1, int(erasing[5])), 4), np.int64)
    return crop, found, rectangles[: _erased(state, erasing, size, rectangles)]


@njit(cache=True)  # shorter than taking the interpreter's lock again would be
def _drawn_from(seed, layers, height, width, size, scale, ratio, filters, ops, erasing):
    "The same from generators seeded as `seeded` does, without touching the global ones."
    words = np.array([seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)]).astype(np.uint32)
    chosen = np.zeros(layers, np.int64)
    if layers:
        _chosen(_seeded_state(words), len(ops), chosen)
    state = _seeded_state(words if words[1] else words[:1])
    return _drawn(
        state, np.zeros(2), chosen, height, width, size, scale, ratio, filters, ops, erasing
    )


# ---- resizing: Pillow's fixed point, 22 bits of fraction, across and then down

_BITS = 22


@njit(cache=True, nogil=True)
def _weight(x, bicubic):
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


@njit(cache=True, nogil=True)
def _coefficients(length, size, bicubic):
    "For each pixel of `size` that `length` become: first one it is made of, how many, weights."
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    inverse = 1.0 / stretch
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, math.ceil(support) * 2 + 1), np.int32)
    row = np.empty(weights.shape[1])
    for i in range(size):
        centre = (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        n = min(int(centre + support + 0.5), length) - low
        total = 0.0
        for x in range(n):
            row[x] = _weight((x + low - centre + 0.5) * inverse, bicubic)
            total += row[x]
        for x in range(n):
            w = row[x] / total if total != 0.0 else row[x]
            weights[i, x] = int((-0.5 if w < 0 else 0.5) + w * (1 << _BITS))
        while n > 1 and weights[i, n - 1] == 0:  # adds nothing
            n -= 1
        first[i], count[i] = low, n
    return first, count, weights


@njit(cache=True, nogil=True)
def _transposed(image):
    "Rows for columns, uint8 [h, w] → [w, h rounded up to eights], eight rows packed at a time."
    height, width = image.shape
    last, packed = height - 1, np.empty((width, (height + 7) // 8), np.uint64)
    for group in range(packed.shape[1]):
        y = 8 * group
        a, b = image[y], image[min(y + 1, last)]
        c, d = image[min(y + 2, last)], image[min(y + 3, last)]
        e, f = image[min(y + 4, last)], image[min(y + 5, last)]
        g, h = image[min(y + 6, last)], image[min(y + 7, last)]
        for x in range(width):
            low = uint32(a[x] | b[x] << 8 | c[x] << 16 | d[x] << 24)
            high = uint32(e[x] | f[x] << 8 | g[x] << 16 | h[x] << 24)
            packed[x, group] = uint64(low) | uint64(high) << uint64(32)
    return packed.view(np.uint8)


@njit(cache=True, nogil=True)
def _down(image, size, bicubic, reverse):
    "Columns resized, uint8 [size, width], perhaps bottom first."
    width = image.shape[1]
    first, count, weights = _coefficients(image.shape[0], size, bicubic)
    total, out = np.empty(width, np.int32), np.empty((size, width), np.uint8)
    for i in range(size):
        total[:] = 1 << (_BITS - 1)
        for y in range(count[i]):
            w, line = weights[i, y], image[first[i] + y]
            for x in range(width):
                total[x] += line[x] * w
        line = out[size - 1 - i if reverse else i]
        for x in range(width):
            line[x] = min(max(total[x] >> _BITS, 0), 255)
    return out


@njit(cache=True, nogil=True)
def _resized(image, crop, flips, out):
    "A crop of an image, resized and flipped into `out`, uint8 [size, size]."
    size, height, bicubic = out.shape[0], crop[2], crop[4] > 0
    columns = _transposed(image[crop[0] : crop[0] + height, crop[1] : crop[1] + crop[3]])
    half = _transposed(_down(columns, size, bicubic, flips[0]))[:height]
    out[:] = _down(half, size, bicubic, flips[1])[:, :size]


# ---- operations on colours: a table of 256 values for each channel


@njit(cache=True, nogil=True)
def _histogram(plane):
    counts = np.zeros((4, 256), np.int64)
    flat = plane.ravel()
    n = flat.size // 4 * 4
    for i in range(0, n, 4):
        counts[0, flat[i]] += 1
        counts[1, flat[i + 1]] += 1
        counts[2, flat[i + 2]] += 1
        counts[3, flat[i + 3]] += 1
    for i in range(n, flat.size):
        counts[0, flat[i]] += 1
    return counts[0] + counts[1] + counts[2] + counts[3]


@njit(cache=True, nogil=True)
def _blended(a, b, factor):
    "As `Image.blend` of two values, in float32."
    value = np.float32(a) + np.float32(factor * np.float32(b - a))
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@njit(cache=True, nogil=True)
def _autocontrast(counts, table):
    low, high = 0, 255
    while low < 255 and not counts[low]:
        low += 1
    while high > 0 and not counts[high]:
        high -= 1
    if high <= low:
        return
    scale = 255.0 / (high - low)
    offset = -low * scale
    for i in range(256):
        table[i] = min(max(int(i * scale + offset), 0), 255)


@njit(cache=True, nogil=True)
def _equalize(counts, table):
    last = 255
    while last > 0 and not counts[last]:
        last -= 1
    step = (counts.sum() - counts[last]) // 255
    if not step:
        return
    n = step // 2
    for i in range(256):
        table[i] = min(n // step, 255)
        n += counts[i]


@njit(cache=True, nogil=True)
def _luma(planes, y, x):
    "The grey value of a pixel, as Pillow converts RGB to L."
    r, g, b = int(planes[0, y, x]), int(planes[1, y, x]), int(planes[2, y, x])
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@njit(cache=True, nogil=True)
def _mean(planes, channels):
    "The mean grey value, rounded."
    _, height, width = planes.shape
    total = 0
    for y in range(height):
        for x in range(width):
            total += int(planes[0, y, x]) if channels == 1 else _luma(planes, y, x)
    return int(total / (height * width) + 0.5)


@njit(cache=True, nogil=True)
def _table(planes, channels, c, code, value, table):
    "Fills `table`, uint8 [256], with what an operation makes of the values of channel `c`."
    for i in range(256):
        table[i] = i
    if code == AUTOCONTRAST:
        _autocontrast(_histogram(planes[c]), table)
    elif code == EQUALIZE:
        _equalize(_histogram(planes[c]), table)
    elif code == CONTRAST or code == BRIGHTNESS:
        ground = _mean(planes, channels) if code == CONTRAST else 0
        for i in range(256):
            table[i] = _blended(ground, i, np.float32(value))
    elif code == POSTERIZE and value < 8:
        for i in range(256):
            table[i] = i & ~((1 << (8 - int(value))) - 1)
    else:
        for i in range(256):
            if code == INVERT or (code == SOLARIZE and i >= value):
                table[i] = 255 - i
            elif code == SOLARIZE_ADD and i < 128:
                table[i] = min(255, i + int(value))


@njit(cache=True, nogil=True)
def _looked_up(planes, channels, code, value):
    tables = np.empty((channels, 256), np.uint8)
    for c in range(channels):
        _table(planes, channels, c, code, value, tables[c])
    for c in range(channels):
        flat, table = planes[c].ravel(), tables[c]
        for i in range(flat.size):
            flat[i] = table[flat[i]]


@njit(cache=True, nogil=True)
def _saturated(planes, value):
    "As `ImageEnhance.Color`, for channels that differ."
    factor = np.float32(value)
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            grey = _luma(planes, y, x)
            for c in range(3):
                planes[c, y, x] = _blended(grey, int(planes[c, y, x]), factor)


@njit(cache=True, nogil=True)
def _sharpened(plane, value, out):
    "As `ImageEnhance.Sharpness`; the outermost pixels stay."
    height, width = plane.shape
    factor = np.float32(value)
    out[:] = plane
    for y in range(1, height - 1):
        above, line, below, to = plane[y - 1], plane[y], plane[y + 1], out[y, 1:]
        for x in range(width - 2):
            ring = above[x] + above[x + 1] + above[x + 2] + line[x] + line[x + 2]
            ring += below[x] + below[x + 1] + below[x + 2]
            # a 13th, rounded: never halfway, so Pillow's float32 gives the same
            smooth = np.int32(2 * (ring + 5 * line[x + 1]) + 13) // np.int32(26)
            to[x] = _blended(smooth, np.int32(line[x + 1]), factor)


# ---- operations on positions: Pillow's affine transform in float64


@njit(cache=True, nogil=True)
def _cubic(a, b, c, d, t):
    p2 = -a + c
    p3 = 2 * (a - b) + c - d
    p4 = -a + b - c + d
    return b + t * (p2 + t * (p3 + t * p4))


@njit(cache=True, nogil=True)
def _slid_row(line, shift, offset, bicubic, low, high, out):
    "Pixels low … high of a row whose pixel x comes from (x + 0.5 + shift) + offset."
    n = line.size
    for x in range(low, high):
        at = ((x + 0.5) + shift) + offset - 0.5
        i = math.floor(at)
        t = at - i
        if bicubic:
            a, b = float(line[min(max(i - 1, 0), n - 1)]), float(line[min(max(i, 0), n - 1)])
            c, d = float(line[min(i + 1, n - 1)]), float(line[min(i + 2, n - 1)])
            out[x] = np.uint8(min(max(_cubic(a, b, c, d, t), 0.0), 255.0))
        else:
            a, b = float(line[min(max(i, 0), n - 1)]), float(line[min(i + 1, n - 1)])
            out[x] = np.uint8(a + (b - a) * t)


@njit(cache=True, nogil=True)
def _slid_inside(line, first, start, stop, shift, offset, bicubic, out):
    "The same where x lies between pixels x + first and x + first + 1; False if one does not."
    fits, to = True, out[start:stop]
    b, c = line[start + first : stop + first], line[start + first + 1 : stop + first + 1]
    if not bicubic:
        for x in range(to.size):
            t = (((x + start) + 0.5) + shift) + offset - 0.5 - (x + start + first)
            fits &= (t >= 0.0) & (t < 1.0)
            to[x] = np.uint8(float(b[x]) + (float(c[x]) - float(b[x])) * t)
        return fits
    a, d = line[start + first - 1 : stop + first - 1], line[start + first + 2 : stop + first + 2]
    for x in range(to.size):
        t = (((x + start) + 0.5) + shift) + offset - 0.5 - (x + start + first)
        fits &= (t >= 0.0) & (t < 1.0)
        value = _cubic(float(a[x]), float(b[x]), float(c[x]), float(d[x]), t)
        to[x] = np.uint8(min(max(value, 0.0), 255.0))
    return fits


@njit(cache=True, nogil=True)
def _slid(plane, slope, offset, bicubic, out, inside):
    "Row y moved by slope · y + offset; `inside` [rows, 2] becomes the columns that have a value."
    height, width = plane.shape
    for y in range(height):
        shift = slope * (y + 0.5)
        low, high = 0, width
        while low < width and ((low + 0.5) + shift) + offset < 0.0:
            low += 1
        while high > low and ((high - 1 + 0.5) + shift) + offset >= width:
            high -= 1
        inside[y, 0], inside[y, 1] = low, high
        middle = (low + high) // 2
        first = math.floor(((middle + 0.5) + shift) + offset - 0.5) - middle
        start, stop = max(low, 1 - first), min(high, width - 2 - first)
        if start < stop and _slid_inside(
            plane[y], first, start, stop, shift, offset, bicubic, out[y]
        ):
            _slid_row(plane[y], shift, offset, bicubic, low, start, out[y])
            _slid_row(plane[y], shift, offset, bicubic, stop, high, out[y])
        else:
            _slid_row(plane[y], shift, offset, bicubic, low, high, out[y])


@njit(cache=True, nogil=True)
def _rounded(x):
    "As `round(x, 15)` for |x| ≤ 1: the error of the product decides between neighbours."
    product = x * 1e15
    c = 134217729.0 * x
    x_high = c - (c - x)
    x_low = x - x_high
    c = 134217729.0 * 1e15
    high = c - (c - 1e15)
    low = 1e15 - high
    error = ((x_high * high - product) + x_high * low + x_low * high) + x_low * low
    n = np.rint(product)
    gap = product - n
    if gap == 0.5 and error > 0.0:
        n += 1.0
    elif gap == -0.5 and error < 0.0:
        n -= 1.0
    return n / 1e15


@njit(cache=True, nogil=True)
def _rotation(degrees, width, height):
    "The matrix of `Image.rotate`: six numbers, from a pixel to where it comes from."
    if degrees < 0.0:
        degrees += 360.0
    angle = -(degrees * (math.pi / 180.0))
    a, b = _rounded(math.cos(angle)), _rounded(math.sin(angle))
    d, e = _rounded(-math.sin(angle)), a
    x, y = -width / 2, -height / 2
    return a, b, (a * x + b * y + 0.0) + width / 2, d, e, (d * x + e * y + 0.0) + height / 2


@njit(cache=True, nogil=True)
def _padded(plane):
    "The plane, two pixels wider on each side: its outermost ones repeated."
    size = plane.shape[0]
    out = np.empty((size + 4, size + 4), np.uint8)
    for y in range(size + 4):
        line, source = out[y], plane[min(max(y - 2, 0), size - 1)]
        line[2 : size + 2] = source
        line[:2], line[size + 2 :] = source[0], source[size - 1]
    return out


@njit(cache=True, nogil=True)
def _places(matrix, y, low, high, stride, at, across, down):
    "Where the pixels of a row come from in a padded plane: the first of 16, and how far beyond."
    a, b, c, d, e, f = matrix
    for k in range(high - low):
        u = a * (low + k + 0.5) + b * (y + 0.5) + c - 0.5
        v = d * (low + k + 0.5) + e * (y + 0.5) + f - 0.5
        i, j = math.floor(u), math.floor(v)
        across[k], down[k] = u - i, v - j
        at[k] = (j + 1) * stride + i + 1


@njit(cache=True, nogil=True)
def _gathered(flat, at, offset, n, out):
    for k in range(n):
        out[k] = float(flat[at[k] + offset])


@njit(cache=True, nogil=True)
def _cubics(a, b, c, d, t, n, out):
    for k in range(n):
        out[k] = _cubic(a[k], b[k], c[k], d[k], t[k])


@njit(cache=True, nogil=True)
def _turned_row(flat, at, stride, bicubic, across, down, four, rows, out):
    "Pixels between those of a padded plane; `four`, `rows` float64 [4, n] are room to work."
    n, taps = out.size, 4 if bicubic else 2
    skip = 0 if bicubic else stride + 1
    for r in range(taps):
        for k in range(taps):
            _gathered(flat, at, uint64(skip + r * stride + k), n, four[k])
        if bicubic:
            _cubics(four[0], four[1], four[2], four[3], across, n, rows[r])
        else:
            for k in range(n):
                rows[r, k] = four[0, k] + (four[1, k] - four[0, k]) * across[k]
    if bicubic:
        _cubics(rows[0], rows[1], rows[2], rows[3], down, n, four[0])
    else:
        for k in range(n):
            four[0, k] = rows[0, k] + (rows[1, k] - rows[0, k]) * down[k]
    for k in range(n):
        out[k] = np.uint8(min(max(four[0, k], 0.0), 255.0))


@njit(cache=True, nogil=True)
def _within(matrix, y, width, height):
    "The first column of a row that comes from inside, and the one after the last."
    a, b, c, d, e, f = matrix
    low, high = width, 0
    for x in range(width):
        u, v = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
        if not (u < 0.0 or u >= width or v < 0.0 or v >= height):
            low, high = min(low, x), x + 1
    return min(low, high), high


@njit(cache=True, nogil=True)
def _rotated(plane, degrees, bicubic, out, inside):
    "A plane turned about its middle; `inside` [rows, 2] becomes the columns that have a value."
    height, width = plane.shape
    flat, stride = _padded(plane).ravel(), width + 4
    at, across, down = np.empty(width, np.uint64), np.empty(width), np.empty(width)
    four, rows = np.empty((4, width)), np.empty((4, width))
    matrix = _rotation(degrees, width, height)
    for y in range(height):
        low, high = _within(matrix, y, width, height)
        inside[y, 0], inside[y, 1] = low, high
        _places(matrix, y, low, high, stride, at, across, down)
        _turned_row(flat, at, stride, bicubic, across, down, four, rows, out[y, low:high])


@njit(cache=True, nogil=True)
def _moved_plane(plane, code, value, bicubic, out, inside):
    "One plane sheared, shifted or turned; where it has no value, `out` is left as it is."
    size = plane.shape[0]
    if code == ROTATE and value == 0.0:
        out[:] = plane
        inside[:, 0], inside[:, 1] = 0, size
    elif code == ROTATE:
        _rotated(plane, value, bicubic, out, inside)
    elif code == SHEAR_X or code == SHEAR_Y:
        _slid(plane, value, 0.0, bicubic, out, inside)
    else:
        _slid(plane, 0.0, value * size, bicubic, out, inside)


@njit(cache=True, nogil=True)
def _filled(plane, inside, value):
    for y in range(plane.shape[0]):
        plane[y, : inside[y, 0]] = value
        plane[y, inside[y, 1] :] = value


@njit(cache=True, nogil=True)
def _moved(planes, channels, code, value, bicubic, fill):
    "Planes sheared, shifted or turned, over the fill colour; how many channels differ now."
    upright = code != SHEAR_Y and code != TRANSLATE_Y
    size = planes.shape[1]
    out = np.empty((3, size, size), np.uint8)
    inside = np.empty((size, 2), np.int64)
    for c in range(channels):
        if upright:
            _moved_plane(planes[c], code, value, bicubic, out[c], inside)
        else:
            columns = _transposed(planes[c, :size, :size])[:, :size].copy()
            _moved_plane(columns, code, value, bicubic, out[c], inside)
    if channels == 1 and (fill[0] != fill[1] or fill[0] != fill[2]):
        out[1], out[2] = out[0], out[0]
        channels = 3
    for c in range(channels):
        _filled(out[c], inside, fill[c])
        if upright:
            planes[c] = out[c]
        else:
            planes[c] = _transposed(out[c, :size, :size])[:, :size]
    return channels


# ---- the whole


@njit(cache=True, nogil=True)
def _changed(planes, channels, code, value, bicubic, fill):
    "One operation on planes, uint8 [3, size, size], of which the first, or all three, count."
    if code >= ROTATE:
        return _moved(planes, channels, code, value, bicubic, fill)
    if code == SHARPNESS:
        out = np.empty(planes.shape[1:], np.uint8)
        for c in range(channels):
            _sharpened(planes[c], value, out)
            planes[c] = out
    elif code == COLOR:  # nothing is more or less colourful than grey
        if channels == 3:
            _saturated(planes, value)
    elif code != NONE:
        _looked_up(planes, channels, code, value)
    return channels


@njit(cache=True, nogil=True)
def _augmented(image, crop, flips, operations, fill, planes):
    "Crop, flips and operations of an image, uint8 [h, w]; how many channels differ."
    _resized(image, crop, flips, planes[0])
    channels = np.int64(1)  # no constant, for which numba would compile all anew
    for i in range(len(operations)):
        code, value, bicubic = int(operations[i, 0]), operations[i, 1], operations[i, 2] > 0
        channels = _changed(planes, channels, code, value, bicubic, fill)
    return channels


@njit(cache=True, nogil=True)
def _augmented_bytes(image, crop, flips, operations, fill, out):
    "The image as bytes in `out`, uint8 [3, size, size]."
    if _augmented(image, crop, flips, operations, fill, out) == 1:
        out[1], out[2] = out[0], out[0]


@njit(cache=True, nogil=True)
def _augmented_floats(image, crop, flips, operations, fill, values, out):
    "The image in `out`, float32 [3, size, size], by the value of each byte, float32 [3, 256]."
    planes = np.empty(out.shape, np.uint8)
    channels = _augmented(image, crop, flips, operations, fill, planes)
    for c in range(3):
        plane, table = planes[c if channels == 3 else 0].ravel(), values[c]
        flat = out[c].ravel()
        for i in range(flat.size):
            flat[i] = table[plane[i]]


class Plan(NamedTuple):
    "The random numbers of one image."

    crop: np.ndarray  # int64 [5]: top, left, height, width, is the filter bicubic
    flips: tuple  # two bools: left to right, upside down
    operations: np.ndarray  # float64 [layers, 3]: code, argument, is the filter bicubic
    erased: list  # (top, left, what comes there, float32 [3, h, w] or [3, 1, 1]) each


_local = threading.local()
_global_generators = threading.RLock()  # held by whoever seeds them


def _own_generator(seed):
    "A torch generator of this thread, seeded."
    if not hasattr(_local, 'generator'):
        _local.generator = torch.Generator()
    return _local.generator.manual_seed(seed)


def _grey(image):
    "A grey image as bytes [h, w] that kernels take; None for any other."
    if isinstance(image, Image.Image):
        return np.array(image) if image.mode == 'L' else None
    if image.ndim != 2 or image.dtype != np.uint8:
        return None
    return np.require(image, requirements='CW')


def _filter(interpolation):
    "0 bilinear, 1 bicubic, -1 drawn from the two; None for any other."
    if isinstance(interpolation, (list, tuple)):
        return -1 if [_filter(x) for x in interpolation] == [0, 1] else None
    name = getattr(interpolation, 'name', '').lower()
    return dict(bilinear=0, bicubic=1).get(name)


def _row(op):
    "An operation of timm as numbers; None if it is unknown here."
    if op.name not in _OPS or op.magnitude_max or op.hparams.get('translate_pct', 0.45) != 0.45:
        return None
    return (*_OPS[op.name], float(op.prob), float(op.magnitude), float(op.magnitude_std))


def _rand_augment(step):
    "Of timm's `RandAugment`: rows of operations, layers, filter, fill; None if one is unknown."
    rows, one = [_row(op) for op in step.ops], step.ops[0].kwargs
    fill, filter = one['fillcolor'], _filter(one['resample'])
    if None in rows or step.choice_weights is not None or len(fill) != 3 or filter is None:
        return None
    return np.array(rows), step.num_layers, filter, np.array(fill, np.uint8)


def _values(steps):
    "What each byte becomes by the last steps: float32 [3, 256], or nothing for bytes."
    if isinstance(steps[0], MaybePILToTensor):
        return np.empty((0, 0), np.float32)
    greys = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
    return np.ascontiguousarray(Compose(steps)(Image.fromarray(greys))[:, 0].numpy())


_KINDS = [
    (RandomResizedCropAndInterpolation,),
    (FunctionType,),
    (RandomHorizontalFlip, None),
    (RandomVerticalFlip, None),
    (RandAugment, None),
    (MaybeToTensor, MaybePILToTensor),
    (Normalize, None),
    (RandomErasing, None),
]


def _sorted(transforms):
    "The steps by kind, None for one that is not there; nothing if there are others."
    left, found = [*transforms], []
    for kinds in _KINDS:
        if left and type(left[0]) in kinds:
            found.append(left.pop(0))
        elif None in kinds:
            found.append(None)
    return found if len(found) == len(_KINDS) and not left else ()


class _Settings:
    "timm's settings as numbers; `ValueError` for one that the kernels do not know."

    def __init__(self, transforms):
        steps = _sorted(transforms)
        if not steps:
            raise ValueError('a step is unknown')
        crop, _, *flips, policy, to_tensor, normalize, erase = steps
        self.size, filter = crop.size[0], _filter(crop.interpolation)
        self.flips = [step and step.p for step in flips]
        self.values = _values([step for step in (to_tensor, normalize) if step])
        self.remode = erase and erase.mode
        none = np.zeros((1, 6)), 0, 0, np.zeros(3, np.uint8)
        read = _rand_augment(policy) if policy else none
        if read is None or filter is None or crop.size[0] != crop.size[1]:
            raise ValueError('an operation, filter or size is unknown')
        self.rows, self.layers, policy_filter, self.fill = read
        if erase and (erase.min_count != 1 or erase.num_splits > 1):
            raise ValueError('several rectangles at least, or splits')
        # what the drawing kernels take
        self.numbers = (
            self.size,
            tuple(map(float, crop.scale)),
            tuple(map(float, crop.ratio)),
            (filter, policy_filter),
            self.rows,
            _erasing(erase),
        )


def _erasing(step):
    if not step:
        return (0.0,) * 6
    chance = (step.probability, step.min_area, step.max_area)
    return tuple(map(float, (*chance, *step.log_aspect_ratio, step.max_count)))


class GreyTransform(Compose):
    "timm's transform for training, with grey images in kernels; others go through timm's steps."

    def __init__(
        self,
        transforms: list,  # timm's steps; the second makes an image RGB
    ):
        super().__init__(transforms)
        try:
            self._settings = _Settings(transforms)
        except ValueError:
            self._settings = None
        self._agrees = None  # unknown yet

    def __getstate__(self):
        return self.__dict__ | dict(_agrees=None)  # another machine may have another Pillow

    @property
    def fast(self) -> bool:
        "Are grey images done in kernels? Compares both ways when it is first asked."
        if self._agrees is None:
            with _global_generators:
                self._compare()
        return self._agrees

    def _compare(self):
        if self._agrees is not None:  # another thread has done it meanwhile
            return
        fault = self._difference() if self._settings else ''
        if fault:
            print(fault, file=sys.stderr)
        self._agrees = bool(self._settings) and not fault

    def __call__(
        self,
        image,  # Pillow image, or uint8 [h, w] or [h, w, 3]
    ) -> torch.Tensor:  # float32 or uint8 [3, size, size]
        "The image, changed by draws from the global generators, as timm draws them."
        grey = _grey(image) if self.fast else None
        if grey is not None:
            return self.apply(grey, self.draw(*grey.shape))
        return super().__call__(Image.fromarray(image) if isinstance(image, np.ndarray) else image)

    def from_seed(
        self,
        image,  # Pillow image, or uint8 [h, w] or [h, w, 3]
        seed: int,  # 0 … 2**63 - 1
        out: torch.Tensor = None,  # where to write, [3, size, size]
    ) -> torch.Tensor:  # float32 or uint8 [3, size, size]
        "As `with seeded(seed): transform(image)`; grey images use no global generator."
        grey = _grey(image) if self.fast else None
        if grey is not None:
            return self.apply(grey, self.draw_from(seed, *grey.shape), out)
        with _global_generators, seeded(seed):
            result = self(image)
        return result if out is None else out.copy_(result)

    def draw(self, height: int, width: int) -> Plan:
        "The random numbers for a grey image, from the global generators."
        s = self._settings
        flips = self._flips(None)
        chosen = np.random.randint(0, len(s.rows), s.layers)
        version, words, second = random.getstate()
        state = np.array(words, np.uint32)
        held = np.array([second is not None, second or 0.0], np.float64)
        drawn = _drawn(state, held, chosen, height, width, *s.numbers)
        random.setstate((version, tuple(state.tolist()), held[1].item() if held[0] else None))
        return self._plan(flips, drawn, None)

    def draw_from(self, seed: int, height: int, width: int) -> Plan:
        "The random numbers for a grey image, by a seed alone."
        s = self._settings
        drawn = _drawn_from(np.uint64(seed), s.layers, height, width, *s.numbers)
        generator = _own_generator(seed) if any(s.flips) or len(drawn[2]) else None
        return self._plan(self._flips(generator), drawn, generator)

    def _flips(self, generator):
        chances = self._settings.flips
        return tuple(bool(p and torch.rand(1, generator=generator) < p) for p in chances)

    def _plan(self, flips, drawn, generator):
        crop, operations, rectangles = drawn
        erased = [
            (top, left, self._filling(height, width, generator), height, width)
            for top, left, height, width in rectangles.tolist()
        ]
        return Plan(crop, flips, operations, erased)

    def _filling(self, height, width, generator):
        "What comes where a rectangle was erased, as timm's `RandomErasing` draws it."
        if self._settings.remode == 'pixel':
            return torch.empty(3, height, width).normal_(generator=generator)
        if self._settings.remode == 'rand':
            return torch.empty(3, 1, 1).normal_(generator=generator)
        return torch.zeros(3, 1, 1)

    def apply(
        self,
        image: np.ndarray,  # uint8 [h, w], contiguous
        plan: Plan,  # of `draw` or `draw_from`, for an image of this size
        out: torch.Tensor = None,  # where to write, [3, size, size]
    ) -> torch.Tensor:  # float32 or uint8 [3, size, size]
        "The image, changed as planned; threads run this side by side."
        s = self._settings
        floats = len(s.values)
        if out is None:
            out = torch.empty((3, s.size, s.size), dtype=torch.float32 if floats else torch.uint8)
        what = image, plan.crop, plan.flips, plan.operations, s.fill
        pixels = out.numpy()  # torch would have a team of threads for each thread that writes
        if floats:
            _augmented_floats(*what, s.values, pixels)
        else:
            _augmented_bytes(*what, pixels)
        for top, left, values, height, width in plan.erased:
            pixels[:, top : top + height, left : left + width] = values.numpy()
        return out

    def _difference(self, seeds=12):
        "One line if the two ways differ on some images, else ''."
        picture = _test_picture()
        for seed in range(seeds):
            with seeded(seed):
                wanted = super().__call__(Image.fromarray(picture))
            with seeded(seed):
                found = self.apply(picture, self.draw(*picture.shape))
            again = self.apply(picture, self.draw_from(seed, *picture.shape))
            if not (torch.equal(wanted, found) and torch.equal(wanted, again)):
                return _FAULT.format('crop, resizing or draws')
        policies = [step for step in self.transforms if isinstance(step, RandAugment)]
        for op in (op for step in policies for op in step.ops):
            if not _same_operation(op, picture[:64, :64], self._settings.fill):
                return _FAULT.format(op.name)
        return ''


_FAULT = (
    f'Pillow {PIL.__version__} and timm {timm.__version__} differ from the compiled transform '
    f'({{}}); images go through timm, more slowly'
)


@lru_cache
def _test_picture():
    "Waves, flat parts and noise, uint8 [88, 120]."
    y, x = np.mgrid[:88, :120]
    waves = 128 + 120 * np.sin(x * y / 150) * np.cos(x / 9)
    noise = philox(0, (0, 0, 0), waves.size).reshape(waves.shape) % 41
    return (waves * ((x // 20 + y // 20) % 3 > 0)).clip(0, 215).astype(np.uint8) + noise.astype(
        np.uint8
    )


def _same_operation(op, picture, fill):
    "Does an operation of timm give the same, at several magnitudes, signs and filters?"
    op = copy(op)
    op.prob = 1.0
    row = np.array(_row(op))
    filter = _filter(op.kwargs['resample'])
    for seed in range(6):
        with seeded(seed):
            wanted = np.asarray(op(Image.fromarray(picture).convert('RGB')))
        state = _seeded_state(np.array([seed], np.uint32))
        found, planes = np.empty(3), np.empty((3, *picture.shape), np.uint8)
        planes[0] = picture
        _operation(state, np.zeros(2), row, filter, found)
        channels = _changed(planes, 1, int(found[0]), found[1], found[2] > 0, fill)
        got = planes if channels == 3 else planes[:1].repeat(3, 0)
        if not np.array_equal(got.transpose(1, 2, 0), wanted):
            return False
    return True
