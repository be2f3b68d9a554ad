"""From a moved slider to the new bytes in the image widget, compared with drawing by matplotlib.

    python benchmarks/explore.py [names] [--size N] [--moves N]

For each family it prints milliseconds, the median and the slowest of the moves, of: a knob of the
family; the instance; a class seen before; a new class, which the fractals search for; the same knob
with the contact sheet below updated too; and the same picture drawn by matplotlib instead. All is
measured in the same run.
"""

import argparse, io, statistics, time
from matplotlib.figure import Figure
from fdsl_nb.app.explore import Explorer
from fdsl_nb.formulas.formula import formula, formulas

LIMIT = 60  # ms, what a hand takes for "at once"
KNOBS = dict(
    rcdb='drift',
    visualatom='drift',
    fractaldb='weight',
    ofdb2d='points',
    onepfrac='delta',
    exfractaldb='far',
    mvfractaldb='far',
    ofdb3d='far',
)


def moved(control, values, picture, whole=False):
    "Milliseconds of each move until the widget holds new bytes, or (`whole`) all is updated."
    arrived, took = [], []

    def arrive(change):
        arrived.append(time.perf_counter())

    picture.observe(arrive, 'value')
    for value in values:
        arrived.clear()
        start = time.perf_counter()
        control.value = value
        end = time.perf_counter()
        # a move that leaves the very same picture sends no bytes; then its whole time counts
        if arrived and not whole:
            end = arrived[0]
        took.append(1000 * (end - start))
    picture.unobserve_all('value')
    return took


def spread(slider, moves):
    "As many values between a slider's ends, none of them where it stands."
    values = [slider.min + (slider.max - slider.min) * (i + 0.5) / moves for i in range(moves)]
    return [round(v) for v in values] if isinstance(slider.value, int) else values


def with_matplotlib(f, places):
    "Milliseconds a picture by matplotlib's `imshow` and `savefig`."
    took = []
    for c, k in places:
        start = time.perf_counter()
        figure = Figure(figsize=(f.size / 100, f.size / 100))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(f.render(c, k), cmap='gray')
        axes.axis('off')
        figure.savefig(io.BytesIO(), format='png', dpi=100)
        took.append(1000 * (time.perf_counter() - start))
    return took


def measure(name, size, moves):
    "A row: the columns' milliseconds."
    explorer = Explorer(name, pages=False, size=size)
    slider = explorer.controls[KNOBS[name]]
    values = spread(slider, moves)
    moved(slider, values[:1], explorer.picture)  # compiles
    knob = moved(slider, values, explorer.picture)
    explorer.take(name, size=size)
    instances = range(1, 1 + min(moves, explorer.instance.max))
    instance = moved(explorer.instance, instances, explorer.picture)
    # classes of its own: families share searches, and what one has found the next does not search
    first = 100 * (1 + list(KNOBS).index(name))
    fresh = moved(explorer.cls, range(first, first + moves), explorer.picture)
    known = moved(explorer.cls, range(first + moves - 2, first - 1, -1), explorer.picture)
    paged = Explorer(name, size=size)
    sheet = moved(paged.controls[KNOBS[name]], values, paged.picture, whole=True)
    slow = with_matplotlib(formula(name, size=size), [(200 + i, 0) for i in range(moves)])
    return knob, instance, known, fresh, sheet, slow


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', help='families; all when none is given')
    parser.add_argument('--size', type=int, default=512, help='side of the image, pixels')
    parser.add_argument('--moves', type=int, default=40, help='of each slider, at most 100')
    args = parser.parse_args()
    if not 2 <= args.moves <= 100:
        parser.error(f'--moves {args.moves} is not in 2 … 100')
    for name in args.names:
        if name not in KNOBS:
            parser.error(f'{name!r} is not known; known: {", ".join(formulas())}')
    heads = 'knob', 'instance', 'class, seen', 'class, new', 'knob + sheet', 'matplotlib'
    print(f'{"ms, median / slowest":22}' + ''.join(f'{head:>16}' for head in heads))
    for name in args.names or KNOBS:
        row = measure(name, args.size, args.moves)
        cells = ''.join(f'{summary(took):>16}' for took in row)
        moves = [t for took in row[:4] for t in took]
        slow = sum(t > LIMIT for t in moves)
        print(f'{name:22}{cells}   {slow} of {len(moves)} above {LIMIT} ms', flush=True)


def summary(took):
    return f'{statistics.median(took):.1f} / {max(took):.1f}' if took else '–'


if __name__ == '__main__':
    main()
