"""How fast training is fed on one core: drawn while training, from a build, as published.

    python benchmarks/loading.py [name …] [--images N] [--size N] [--rounds N] [--builds]

Prints images per second of processor time with the augmentation of the family's recipe, and how
many times that of the published program: a folder of RGB PNG as Pillow saves it, timm's transform.

    published     that folder, one image after the other
    online        drawn by the formula, the transform in kernels, through the loader
    three repeats the same with repeated augmentation: an image is drawn once for three
    kept          the same when all images are in memory (data sets of 1,000 images)
    timm          the transform alone: timm's on an RGB image
    kernels       the transform alone: ours on the drawn image

With --builds also our own folders and shards. Everything runs in one thread, in turn, --rounds
times, and the best round counts. Processor time instead of the clock, because a machine that others
use as well stretches the clock; even so, trust the ratios, not the rates. Files come from the page
cache: a disk can only be slower. The last line is by the clock, and needs two idle cores: how many
times as fast two threads draw and augment as one.
"""

import argparse, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from fdsl_nb.data.augment import train_transform
from fdsl_nb.build.build import build
from fdsl_nb.data.loading import EpochBatchSampler, FormulaDataset, train_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training.recipes import recipe
from fdsl_nb.data.streams import ShardStream, stream_loader

BATCH = 64
FAMILIES = 'rcdb visualatom fractaldb mvfractaldb exfractaldb onepfrac ofdb2d ofdb3d'.split()
SMALL = ('onepfrac', 'ofdb2d', 'ofdb3d')
BUILT = {
    'folder': {'layout': 'plain'},
    'shards, PNG': {'layout': 'shards', 'shard_images': 200},
    'shards, zstd': {'layout': 'shards', 'shard_images': 200, 'format': 'zstd'},
}


def quiet(*_):
    pass


def drawn(f, i):
    "Image i, as training would draw it."
    return np.asarray(FormulaDataset(f)[i][0])


def save_as_published(f, root, images):
    "The images as the published scripts leave them: three channels, Pillow's own settings."
    for i in range(images):
        folder = Path(root) / 'published' / 'train' / f'{i % f.classes:05d}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn(f, i)).convert('RGB').save(folder / f'{i:05d}.png')


def rate(loader):
    "Images per second of processor time in one pass."
    start, seen = time.process_time(), 0
    for images, _ in loader:
        seen += len(images)
    return seen / (time.process_time() - start)


def each(images, work):
    "A loader of one: what `work` makes of number 0 … images - 1."
    return (([work(i)], None) for i in range(images))


def sources(f, r, root, images):
    "Name → function of an epoch that gives a loader."
    ours, timms = train_transform(r), train_transform(r, fast=False)
    own = FormulaDataset(f)
    few = [drawn(f, i % len(own)) for i in range(min(images, 64))]
    rgb = [Image.fromarray(image).convert('RGB') for image in few]
    ours.from_seed(few[0], 0)  # compiled, and compared with timm's

    def loader(dataset, transform, epoch, repeats=1, workers=0):
        batches = EpochBatchSampler(len(dataset), BATCH, images=images, repeats=repeats)
        batches.epoch, batches.epochs = epoch, epoch + 1
        return train_loader(dataset, transform, batches, workers)

    recent, kept = FormulaDataset(f), FormulaDataset(f)
    recent.cache(0)
    kept.cache(1 << 30)
    for c, k in np.ndindex(f.classes, f.instances if len(own) <= images else 0):
        kept.render(c, k)
    published = open_dataset(f'{root}/published')
    return {
        'published': lambda e: loader(published, timms, e),
        'online': lambda e: loader(own, ours, e),
        'three repeats': lambda e: loader(recent, ours, e, 3),
        **({'kept': lambda e: loader(kept, ours, e)} if f.name in SMALL else {}),
        'timm': lambda e: each(images, lambda i: timms(rgb[i % len(rgb)])),
        'kernels': lambda e: each(images, lambda i: ours.from_seed(few[i % len(few)], i)),
    }


def built_sources(f, r, root):
    "The same for folders and shards that this package writes."
    transform, found = train_transform(r), {}
    for name, arrangement in BUILT.items():
        build(f, Path(root) / name, workers=0, progress=quiet, **arrangement)
        dataset = open_dataset(f'{root}/{name}')
        batches = EpochBatchSampler(len(dataset), BATCH)
        found[name] = lambda e, d=dataset, b=batches: train_loader(d, transform, b)
    stream = ShardStream(f'{root}/shards, zstd', transform, BATCH)
    return found | {'stream, zstd': lambda e: stream_loader(stream)}


def best_rates(made, rounds):
    "Source → images per second in its best round; all sources in turn."
    best = dict.fromkeys(made, 0.0)
    for epoch in range(rounds):
        for name, loader in made.items():
            best[name] = max(best[name], rate(loader(epoch)))
    return best


def two_threads(f, r, rounds, seconds=1.5):
    "How many times the images a second of one thread two threads make, by the clock."
    own, ours = FormulaDataset(f), train_transform(r)
    out = ours.from_seed(own.array(0)[0], 0).repeat(2, 1, 1, 1)

    def work(thread):
        "Images made until the time is up: a short run would time the start of a thread."
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            ours.from_seed(own.array(images % len(own))[0], images, out[thread])
            images += 1
        return images

    best = {}
    for threads in (1, 2) * rounds:
        with ThreadPoolExecutor(threads) as pool:
            made = sum(pool.map(work, range(threads)))
        best[threads] = max(best.get(threads, 0), made / seconds)
    return best[2] / best[1]


def measure(name, args):
    f = formula(name, classes=10, size=args.size)
    if not f.by_chance and f.instances > args.images // 10:
        f = formula(name, classes=10, instances=args.images // 10, size=args.size)
    r = recipe(dataset=name)
    with tempfile.TemporaryDirectory() as root:
        save_as_published(f, root, min(args.images, len(FormulaDataset(f))))
        made = sources(f, r, root, args.images)
        if args.builds:
            made |= built_sources(f, r, root)
        best = best_rates(made, args.rounds)
    print(f'\n{f.name}, {args.size}², {r.train_interpolation} filter, mean {r.mean[0]}')
    for source, value in best.items():
        print(f'{source:14}{value:8.0f} images/s{value / best["published"]:8.2f}×')
    if not f.by_chance:
        ratio = two_threads(f, r, args.rounds)
        print(f'two threads are {ratio:.2f} times one')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', default=FAMILIES, help='formulas; all if none')
    parser.add_argument('--images', type=int, default=320)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--builds', action='store_true', help='our folders and shards as well')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        measure(name, args)


if __name__ == '__main__':
    main()
