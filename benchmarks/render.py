"""How fast each formula draws, compared with its specification in plain Python.

    python benchmarks/render.py [names] [--seconds N] [--threads N]

Prints milliseconds an image on one thread, averaged over the same images for every column: drawn
alone, with 8-bit PNG (Pillow, level 1), with raw zstd where `zstandard` is installed, the naive
version; then the ratio naive / drawn alone, and how many times faster several threads are than one.
All is measured in the same run.
"""

import argparse, io, time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from PIL import Image
from fdsl_nb.formulas.formula import formula
import naive

try:
    import zstandard
except ImportError:
    zstandard = None


class Family(NamedTuple):
    "One row of the table."

    name: str  # as `formula(name)` knows it, drawn at published settings
    naive: Callable  # (formula, c, k) → image: the specification
    images: int = 24  # how many images every column draws; the slower the naive version, the fewer
    knobs: dict = {}  # where the published settings would take too long


FAMILIES = (
    Family('rcdb', naive.contours, 192),
    Family('visualatom', naive.contours, 96),
    Family('fractaldb', naive.plane, 6),
    Family('ofdb2d', naive.plane, 6),
    Family('onepfrac', naive.plane, 12),
    Family('exfractaldb', naive.space, 48),  # places far apart: each image pays for its whole cloud
    Family('mvfractaldb', naive.space, 48),
    Family('ofdb3d', naive.space, 48),
)


def png(image):
    "8-bit PNG, level 1, in memory."
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG', compress_level=1)
    return buffer.getbuffer().nbytes


def raw_zstd(image):
    "The pixels by zstd, level 1."
    return len(zstandard.ZstdCompressor(level=1).compress(image.tobytes()))


def best(run, seconds):
    "The fastest of the runs that fit in `seconds`, in seconds; a run before them compiles."
    run()
    fastest, end = float('inf'), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() >= end:
            return fastest


def measure(family, seconds, threads):
    "A row: the name and its numbers, None where something is not installed."
    f = formula(family.name, **family.knobs)
    # classes and instances spread over the whole data set, the same for every column
    places = [(i * 7919 % f.classes, i * 104729 % f.instances) for i in range(family.images)]

    def each(after):
        return lambda: [after(f.render(c, k)) for c, k in places]

    def per_image(run, seconds):
        return best(run, seconds) / len(places) * 1000

    alone = per_image(each(len), seconds)
    encoded = per_image(each(png), seconds)
    packed = per_image(each(raw_zstd), seconds) if zstandard else None
    start = time.perf_counter()
    for c, k in places:
        family.naive(f, c, k)
    slow = (time.perf_counter() - start) / len(places) * 1000
    with ThreadPoolExecutor(threads) as pool:
        # a share each, not an image each: the pool's own bookkeeping is not what is measured
        shares = [places[i::threads] for i in range(threads)] * 2

        def share(part):
            return [f.render(c, k).size for c, k in part]

        # every image twice, so that a thread that gets the cheap share takes work from the other
        together = per_image(lambda: list(pool.map(share, shares)), seconds) / 2
    return family.name, alone, encoded, packed, slow, slow / alone, alone / together


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', help='families; all when none is given')
    parser.add_argument('--seconds', type=float, default=5.0, help='for each measured column')
    parser.add_argument('--threads', type=int, default=2, help='for the last column')
    args = parser.parse_args()
    known = {family.name: family for family in FAMILIES}
    for name in args.names:
        if name not in known:
            parser.error(f'{name!r} has no row; known: {", ".join(known)}')
    heads = 'ms an image', '+ PNG', '+ zstd', 'naive', 'ratio', f'{args.threads} threads'
    print(f'{"":14}' + ''.join(f'{head:>13}' for head in heads))
    for name in args.names or known:
        row = measure(known[name], args.seconds, args.threads)
        shown = ['–' if value is None else f'{value:.2f}' for value in row[1:5]]
        shown += [f'{value:.1f}×' for value in row[5:]]
        print(f'{name:14}' + ''.join(f'{value:>13}' for value in shown), flush=True)


if __name__ == '__main__':
    main()
