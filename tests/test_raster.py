"""The fast kernels against plain Python, where they are most likely to differ."""

import math
import numpy as np
import pytest
from fdsl_nb.core.raster import draw_line, draw_polygon

SIZE = 64


def line_pixels(x, y, xe, ye):
    "Bresenham's pixels from (x, y) to (xe, ye), the last one left out, as Pillow chooses them."
    dx, dy = abs(xe - x), abs(ye - y)
    step_x, step_y = (1 if xe >= x else -1), (1 if ye >= y else -1)
    error = 2 * min(dx, dy) - max(dx, dy)
    for _ in range(max(dx, dy)):
        yield x, y
        turn = error >= 0
        if dy >= dx or turn:
            y += step_y
        if dy < dx or turn:
            x += step_x
        error += 2 * min(dx, dy) - turn * 2 * max(dx, dy)


def plain_polygon(shape, xs, ys):
    "What `draw_polygon` must draw: each side, pixel after pixel, checked one by one."
    image = np.zeros(shape, np.uint8)
    corners = [(int(x), int(y)) for x, y in zip(xs, ys)]
    for here, there in zip(corners, corners[1:] + corners[:1]):
        for x, y in [*line_pixels(*here, *there), there]:
            if 0 <= x < shape[1] and 0 <= y < shape[0]:
                image[y, x] = 200
    return image


def compare(xs, ys, shape=(SIZE, SIZE)):
    "The kernel's image, after it was compared with the plain one."
    image = np.zeros(shape, np.uint8)
    draw_polygon(image, np.array(xs, float), np.array(ys, float), 200)
    np.testing.assert_array_equal(image, plain_polygon(shape, xs, ys))
    return image


def test_all_short_sides_in_all_directions():
    for dx in range(-9, 10):
        for dy in range(-9, 10):
            compare([30, 30 + dx], [31, 31 + dy])


@pytest.mark.parametrize('seed', range(3))
def test_random_polygons_that_leave_the_image(seed):
    rng = np.random.default_rng(seed)
    for spread in (2, 10, 100, 1000):
        for _ in range(40):
            xs, ys = rng.uniform(-spread, SIZE + spread, (2, rng.integers(1, 40)))
            compare(xs, ys, shape=(SIZE, SIZE - 7))


def test_sides_of_no_length():
    assert compare([5.2, 5.9, 5.0], [7.1, 7.8, 7.3]).sum() == 200
    assert compare([-3.0] * 4, [7.0] * 4).sum() == 0
    compare([0, 0, 3, 3, 3], [0, 0, 0, 0, 4])


def test_coordinates_are_cut_toward_zero():
    image = compare([-0.9, 4.9], [-0.9, -0.2])
    assert np.flatnonzero(image).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('corner', [(0, 0), (SIZE - 1, 0), (0, SIZE - 1), (SIZE - 1, SIZE - 1)])
def test_sides_that_end_in_a_corner_of_the_image(corner):
    for x in range(-2, SIZE + 2, 5):
        for y in (-2, -1, 0, 3, SIZE - 1, SIZE):
            compare([corner[0], x], [corner[1], y])


def test_a_huge_radius():
    angles = np.arange(20) * 2 * math.pi / 20
    for radius in (1e3, 1e5):
        compare(radius * np.cos(angles), radius * np.sin(angles) + radius)


def test_long_sides_inside_a_long_image():
    # from 32,768 pixels on, the slope has too few digits and the plain walk takes over
    for length in (30_011, 32_766, 32_767, 32_768, 39_999):
        for minor in (1, 2, 3, 29):
            compare([0, length, 3], [0, minor, 29], shape=(30, 40_000))


def test_the_rounded_slope_never_moves_a_pixel():
    # the rule of `draw_polygon`, in whole numbers: the slope is cut to 32 binary digits, plus one
    rng = np.random.default_rng(0)
    lengths = [*range(1, 300), *rng.integers(300, 32_768, 60).tolist(), 32_766, 32_767]
    for major in lengths:
        minors = range(major + 1) if major < 300 else rng.integers(0, major + 1, 10).tolist()
        i = np.arange(major, dtype=np.int64)
        for minor in minors:
            slope = int(minor * 2.0**32 / major) + 1
            across = (i * slope + 2**31) >> 32
            assert np.array_equal(across, (2 * minor * i + major) // (2 * major)), (minor, major)


def test_polygon_and_lines_light_the_same_pixels():
    rng = np.random.default_rng(4)
    xs, ys = rng.uniform(-20, SIZE + 20, (2, 30))
    image = np.zeros((SIZE, SIZE), np.uint8)
    for v in range(30):
        draw_line(image, xs[v - 1], ys[v - 1], xs[v], ys[v], 200)
    np.testing.assert_array_equal(image, compare(xs, ys))
