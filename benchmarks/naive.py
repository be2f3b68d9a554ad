"""The specifications of the library notebooks as a plain module: what the kernels are measured against.

Plain Python and Pillow in the manner of the published programs. Noise is looked up by NumPy for a whole line at once, which costs about what the
programs' C package costs; chance is Python's own generator, as there.
"""

import math, random
import numpy as np
from PIL import Image, ImageDraw
from fdsl_nb.raster import PERMUTATION


# Contours: RCDB and VisualAtom (11_contours)

def noise(x):
    "`noise.pnoise1` of an array, in 32-bit floats."
    f = np.float32
    x = np.asarray(x, f)
    whole = np.floor(x)
    i, t = whole.astype(int) % 1024, x - whole
    slope = lambda h, d: np.where(h & 8, -d, d * ((h & 7) + 1).astype(f))
    left, right = slope(PERMUTATION[i & 255], t), slope(PERMUTATION[(i + 1) & 255], t - f(1))
    return (left + t * t * t * (t * (t * f(6) - f(15)) + f(10)) * (right - left)) * f(0.4)

def ring(card):
    "Corners of the first polygon as two lists."
    angles = [math.pi * 2 / card.vertices * v for v in range(card.vertices)]
    return ([math.cos(a) * card.radius * card.oval_x for a in angles], [math.sin(a) * card.radius * card.oval_y for a in angles])

def bend(xs, ys, card, gain, values):
    "The corners moved, in place, by `values`: those across, then those down."
    n, angle = card.vertices, math.pi * 2 / card.vertices
    wave = lambda v, count: 0.5 * math.sin(angle * v * count)
    for v in range(n):
        across = float(values[v]) * card.noise * gain - card.noise - wave(v, card.wave_1) - wave(v, card.wave_2)
        down = float(values[n + v]) * card.noise * gain - card.noise - wave(v, card.wave_1) - wave(v, card.wave_2)
        xs[v] -= math.cos(angle * v) * (across - card.drift)
        ys[v] -= math.sin(angle * v) * (down - card.drift)

def outline(pen, xs, ys, grey):
    "Each side drawn from corner to corner, and back to the first."
    xs, ys = [*xs, xs[0]], [*ys, ys[0]]
    for i in range(len(xs) - 1): pen.line((xs[i], ys[i], xs[i+1], ys[i+1]), fill=min(grey, 255), width=1)

def contour_image(family, card, rng):
    "One picture of `card`; `rng` has the methods of `random.Random`."
    canvas = Image.new('L', (family.size, family.size), family.background)
    pen, (xs, ys) = ImageDraw.Draw(canvas), ring(card)
    inside, outside = family.split_start(card)
    xs, ys = [x + inside[0] for x in xs], [y + inside[1] for y in ys]
    for _ in range(card.lines):
        grey = rng.randint(0, family.greys - 1)
        bend(xs, ys, card, family.gain, noise([rng.uniform(0, 10_000) for _ in range(2 * card.vertices)]))
        outline(pen, [x + outside[0] for x in xs], [y + outside[1] for y in ys], grey)
    return np.array(canvas)

def contours(family, c, k):
    "Image (c, k) of RCDB or VisualAtom: its canonical category, with Python's generator for greys and noise."
    category = family.category(c)
    if k: category = family.new_instance(category, family.instance_stream(c, k))
    return contour_image(family, category, random.Random(f'{c} {k}'))
