"""How fast a data set is written, compared with drawing it alone; whether memory grows with it.

    python benchmarks/build.py [name] [--images N] [--size N] [--workers N]

Prints images/s for drawing alone and for each layout on one core, the ratio of the two, and bytes
an image; then the build by several workers against one (their start not counted), and the largest
memory of a process that builds 1,000 images and of one that builds twenty times as many. All is
measured in the same run.
"""

import argparse, itertools, subprocess, sys, tempfile, time
from pathlib import Path
from fdsl_nb.build.build import build, local_executor
from fdsl_nb.formulas.formula import formula

LAYOUTS = {
    'folder, PNG': {'layout': 'plain'},
    'shards, PNG': {'layout': 'shards', 'shard_images': 250},
    'shards, zstd': {'layout': 'shards', 'format': 'zstd', 'shard_images': 250},
}

PEAK = """
import resource, sys
from fdsl_nb.build.build import build
from fdsl_nb.formulas.formula import formula
f = formula('visualatom', classes=int(sys.argv[1]), instances=100, size=64)
build(f, sys.argv[2], workers=0, progress=lambda *_: None, layout=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def drawing(f):
    "Images/s of drawing every image of a formula once, nothing kept."
    start = time.perf_counter()
    for c, k in itertools.product(range(f.classes), range(f.instances)):
        f.render(c, k)
    return len(f) / (time.perf_counter() - start)


def writing(f, executor=None, **arrangement):
    "Images/s of a build between its first and last report of progress, and bytes an image."
    times = []

    def progress(done, total, drawn, seconds, *_):
        times.append(seconds)

    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / 'out'
        built = build(f, out, workers=0, executor=executor, progress=progress, **arrangement)
    return len(f) / times[-1], built['bytes'] / len(f)


def peak(classes, layout):
    "MiB of a process that builds `classes` × 100 images."
    with tempfile.TemporaryDirectory() as root:
        words = [sys.executable, '-c', PEAK, str(classes), f'{root}/out', layout]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('name', nargs='?', default='visualatom', help='the formula')
    parser.add_argument('--images', type=int, default=2000)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    f = formula(args.name, classes=10, instances=args.images // 10, size=args.size)
    for c in range(f.classes):
        f.render(c, 0)  # compiles the kernels and finds the categories
    on_one_core(f)
    with_workers(f, args.workers)
    for layout in ('plain', 'shards'):
        small, large = peak(10, layout), peak(200, layout)
        print(f'{layout}: {small:.0f} MiB for 1,000 images, {large:.0f} MiB for 20,000')


def on_one_core(f):
    "Prints a row for drawing alone and one for each layout."
    print(f'{f.name}, {f.size}², {len(f)} images')
    print(f'{"":14}{"images/s":>12}{"to drawing":>14}{"kB an image":>14}')
    # drawn before and after, so that a machine that slows down in between is seen
    first = drawing(f)
    rows = {name: writing(f, **arrangement) for name, arrangement in LAYOUTS.items()}
    alone = (first + drawing(f)) / 2
    print(f'{"drawing alone":14}{alone:12.0f}')
    for name, (rate, size) in rows.items():
        print(f'{name:14}{rate:12.0f}{alone / rate:13.2f}×{size / 1000:14.1f}')


def with_workers(f, workers):
    "Prints a line for each layout: several workers against one."
    with local_executor(workers) as pool, local_executor(1) as single:
        for executor, count in ((pool, workers), (single, 1)):
            # every worker starts and compiles
            places = [i % f.classes for i in range(count * 4)]
            list(executor.map(f.render, places, [0] * len(places)))
        for name, arrangement in LAYOUTS.items():
            one, _ = writing(f, single, **arrangement)
            several, _ = writing(f, pool, **arrangement)
            ratio = several / one
            print(f'{name}: {workers} workers {several:.0f} images/s, one {one:.0f}, {ratio:.2f}×')


if __name__ == '__main__':
    main()
