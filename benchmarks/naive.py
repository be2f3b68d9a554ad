"""The specifications of the formula notebooks as a plain module, to compare the kernels with.

Plain Python and Pillow in the manner of the published programs. Noise is looked up by NumPy for a
whole line at once, which costs about what the programs' C package costs; random numbers are
Python's own, as there.
"""

import math, random
import numpy as np
from PIL import Image, ImageDraw
from fdsl_nb.formulas import ifs
from fdsl_nb.formulas.ifs3d import FOCAL, weight_table, weighted
from fdsl_nb.core.raster import PERMUTATION


# Contours: RCDB and VisualAtom (fdsl_nb.formulas.contours)


def noise(x):
    "`noise.pnoise1` of an array, in 32-bit floats."
    f = np.float32
    x = np.asarray(x, f)
    whole = np.floor(x)
    i, t = whole.astype(int) % 1024, x - whole

    def slope(h, d):
        return np.where(h & 8, -d, d * ((h & 7) + 1).astype(f))

    left, right = slope(PERMUTATION[i & 255], t), slope(PERMUTATION[(i + 1) & 255], t - f(1))
    return (left + t * t * t * (t * (t * f(6) - f(15)) + f(10)) * (right - left)) * f(0.4)


def ring(card):
    "Corners of the first polygon as two lists."
    angles = [math.pi * 2 / card.vertices * v for v in range(card.vertices)]
    return (
        [math.cos(a) * card.radius * card.oval_x for a in angles],
        [math.sin(a) * card.radius * card.oval_y for a in angles],
    )


def bend(xs, ys, card, gain, values):
    "The corners moved, in place, by `values`: those across, then those down."
    n, angle = card.vertices, math.pi * 2 / card.vertices

    def wave(v, count):
        return 0.5 * math.sin(angle * v * count)

    def bent(value, v):
        noise = float(value) * card.noise * gain - card.noise
        return noise - wave(v, card.wave_1) - wave(v, card.wave_2)

    for v in range(n):
        across, down = bent(values[v], v), bent(values[n + v], v)
        xs[v] -= math.cos(angle * v) * (across - card.drift)
        ys[v] -= math.sin(angle * v) * (down - card.drift)


def outline(pen, xs, ys, grey):
    "Each side drawn from corner to corner, and back to the first."
    xs, ys = [*xs, xs[0]], [*ys, ys[0]]
    for i in range(len(xs) - 1):
        pen.line((xs[i], ys[i], xs[i + 1], ys[i + 1]), fill=min(grey, 255), width=1)


def contour_image(family, card, rng):
    "One picture of `card`; `rng` has the methods of `random.Random`."
    canvas = Image.new('L', (family.size, family.size), family.background)
    pen, (xs, ys) = ImageDraw.Draw(canvas), ring(card)
    inside, outside = family.split_start(card)
    xs, ys = [x + inside[0] for x in xs], [y + inside[1] for y in ys]
    for _ in range(card.lines):
        grey = rng.randint(0, family.greys - 1)
        places = [rng.uniform(0, 10_000) for _ in range(2 * card.vertices)]
        bend(xs, ys, card, family.gain, noise(places))
        outline(pen, [x + outside[0] for x in xs], [y + outside[1] for y in ys], grey)
    return np.array(canvas)


def contours(family, c, k):
    "Image (c, k) of RCDB or VisualAtom: its canonical category, greys and noise from Python."
    category = family.category(c)
    if k:
        category = family.new_instance(category, family.instance_stream(c, k))
    return contour_image(family, category, random.Random(f'{c} {k}'))


# Fractals in space: MVFractalDB, ExFractalDB, 3D-OFDB (fdsl_nb.formulas.ifs3d)


def space_game(maps, picks):
    "The points of a 3-D system, [3, picks - 1], stretched to [-1, 1] and moved to their mean."
    point, points, thresholds = (0.0, 0.0, 0.0), [], np.cumsum(maps[:, 12]).tolist()
    maps = maps.tolist()
    for r in picks[:-1].tolist():
        a, b, c, d, e, f, g, h, i, j, k, l, _ = next(m for m, t in zip(maps, thresholds) if r <= t)
        x, y, z = point
        point = (x * a + y * b + z * c + j, x * d + y * e + z * f + k, x * g + y * h + z * i + l)
        points.append(point)
    points = np.array(points).T
    points = (points - points.min()) / (points.max() - points.min()) * 2 - 1
    return points - np.array([[sum(axis) / len(picks)] for axis in points])


def space_view(cloud, camera, size):
    "One view of a cloud by a camera: rows right, up, forward."
    x, y, depth = camera @ cloud.astype(np.float32)
    scale = FOCAL / (depth + np.float32(4))

    def pixel(v):
        place = (scale * v * np.float32(0.5) + np.float32(0.5)) * np.float32(size)
        return np.floor(np.rint(place * 256) / 256).astype(int)

    column, row = pixel(x), pixel(y)
    inside = (depth + 4 >= 1) & (depth + 4 <= 100)
    for v in (column, row):
        inside &= (0 <= v) & (v < size)
    image = np.zeros((size, size), np.uint8)
    image[row[inside], column[inside]] = 255
    return image


def space(family, c, k):
    "Image (c, k) of a 3-D family: its system, picks from NumPy's generator, the canonical camera."
    row, view = divmod(k, family.views_per_cloud)
    maps = weighted(family.category(c), weight_table(family.rows)[row])
    cloud = space_game(maps, np.random.RandomState(row).random_sample(family.points))
    return space_view(cloud, family.camera(view, family.instance_stream(c, k)), family.size)


# Fractals in the plane: FractalDB, 2D-OFDB, 1p-frac (fdsl_nb.formulas.chaos, fdsl_nb.formulas.ifs)


def plane_game(maps, picks):
    "The points of a 2-D system, the origin first, as two arrays."
    x = y = 0.0
    xs, ys, limits = [x], [y], np.cumsum(maps[:, 6]).tolist()
    maps = maps.tolist()
    for pick in picks[:-1].tolist():
        for (a, b, c, d, e, f, _), limit in zip(maps, limits):
            if pick <= limit:
                x, y = x * a + y * b + e, x * c + y * d + f
                break
        xs.append(x)
        ys.append(y)
    return np.array(xs), np.array(ys)


def plane_pixels(v, size, padding):
    "One coordinate stretched to the picture."
    if v.min() < 0:
        v = v - v.min()
    return np.uint16(v / (v.max() - v.min()) * float(size - 2 * padding) + float(padding)).tolist()


def plane_image(maps, size, points, padding, full, rng):
    "A grey picture of three channels, a random patch pasted for each point."
    xs, ys = plane_game(maps, np.random.RandomState(100).random_sample(points))
    page = Image.new('RGB', (size, size))
    for x, y in zip(plane_pixels(xs, size, padding), plane_pixels(ys, size, padding)):
        mask = f'{511 if full else rng.randrange(1, 512):09b}'
        patch = np.zeros((3, 3, 3), np.uint8)
        for row in range(3):
            for column in range(3):
                patch[row, column] = 127 * int(mask[3 * row + column])
        page.paste(Image.fromarray(patch), (x + 1, y + 1))
    return np.array(page.transpose(Image.FLIP_TOP_BOTTOM))


def plane(family, c, k):
    "Image (c, k) of FractalDB, 2D-OFDB or 1p-frac before its flip, from its canonical maps."
    maps = family.category(c)
    if isinstance(family, ifs.FractalDB):
        maps = maps * [*ifs.weight_table(family.weight)[family.variant(k).weight_row], 1]
    full = getattr(family, 'mask_mode', '') == 'fill'
    rng = random.Random(f'{c} {k}')
    return plane_image(maps, family.size, family.points, family.padding, full, rng)
