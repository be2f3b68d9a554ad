"""Draws the pictures of the README: python docs/pictures.py"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fdsl_nb.formulas.formula import formula, formulas

OUT = Path(__file__).parent / 'images'
SIDE = 120


def tile(name, c, k, **knobs):
    image = (
        Image.fromarray(formula(name, classes=100, **knobs).render(c, k))
        .convert('L')
        .resize((SIDE, SIDE), Image.LANCZOS)
    )
    return np.array(image)


def sheet(rows, titles, path):
    "Tiles in rows with a title over each row."
    height = SIDE + 18
    page = Image.new('L', (len(rows[0]) * (SIDE + 4), len(rows) * height), 255)
    for y, (row, title) in enumerate(zip(rows, titles)):
        ImageDraw.Draw(page).text((2, y * height + 4), title, fill=0)
        for x, image in enumerate(row):
            page.paste(Image.fromarray(image), (x * (SIDE + 4), y * height + 18))
    page.quantize(16).save(path, optimize=True)


def families():
    "Every family: four classes each, two families a row."
    known = formulas()
    centred = dict(
        rcdb=dict(start_range=0, lines_min=150),
        visualatom=dict(start_range=0, lines_min=100, radius_min=40),
    )
    rows = [
        [tile(name, c, 0, **centred.get(name, {})) for name in pair for c in (1, 2, 5, 11)]
        for pair in zip(known[::2], known[1::2])
    ]
    sheet(
        rows,
        [
            f'{left} (four classes), {right} (four classes)'
            for left, right in zip(known[::2], known[1::2])
        ],
        OUT / 'families.png',
    )


def knob():
    "One knob turned: the periods of VisualAtom's two waves, everything else as in class 1."
    still = dict(
        vertices_min=500, vertices_max=500, start_range=0, radius_min=30, lines_min=50, lines_max=50
    )
    rows = [
        [
            tile(
                'visualatom', 1, 0, wave_1_min=n, wave_1_max=n, wave_2_min=m, wave_2_max=m, **still
            )
            for n in (0, 1, 3, 6, 9, 14, 19)
        ]
        for m in (2, 11)
    ]
    sheet(
        rows,
        [f'first wave 0, 1, 3, 6, 9, 14, 19 periods; second wave {m}' for m in (2, 11)],
        OUT / 'knob.png',
    )


if __name__ == '__main__':
    OUT.mkdir(exist_ok=True)
    families()
    knob()
