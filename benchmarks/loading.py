"""How fast training is fed: from a folder as published (RGB PNG as Pillow saves it), from a build, or drawn online, measured in turn in the same run, on one core.

    python benchmarks/loading.py [name] [--images N] [--size N] [--rounds N]

Prints images/s and batches/s (64 images) with the published augmentation, and without any, each source once a round; the best of the rounds counts, and the ratio to the first.
Files come from the page cache, where they are after the first round: a disk can only be slower.
"""

import argparse, itertools, tempfile, time
from pathlib import Path
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor
from fdsl_nb.data.augment import train_transform
from fdsl_nb.build.build import build
from fdsl_nb.data.loading import EpochBatches, FormulaDataset, train_loader
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training.recipes import recipe
from fdsl_nb.data.streams import ShardStream, stream_loader

BATCH = 64


def quiet(*_):
    pass


def save_as_published(f, root):
    "The images as the published scripts leave them: three channels, Pillow's own settings."
    for c, k in itertools.product(range(f.classes), range(f.instances)):
        (root / 'train' / f'{c:05d}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(f.render(c, k)).convert('RGB').save(
            root / 'train' / f'{c:05d}' / f'{c:05d}_{k:04d}.png'
        )


def rate(loader):
    "Images/s of one pass."
    start, seen = time.perf_counter(), 0
    for images, _ in loader:
        seen += len(images)
    return seen / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('name', nargs='?', default='visualatom', help='the formula')
    parser.add_argument('--images', type=int, default=640)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    f = formula(args.name, classes=10, instances=args.images // 10, size=args.size)
    with tempfile.TemporaryDirectory() as root:
        built = {
            'folder': {'layout': 'plain'},
            'shards, PNG': {'layout': 'shards', 'shard_images': 200},
            'shards, zstd': {'layout': 'shards', 'shard_images': 200, 'format': 'zstd'},
        }
        for name, arrangement in built.items():
            build(f, Path(root) / name, workers=0, progress=quiet, **arrangement)
        save_as_published(f, Path(root) / 'published')
        sets = {name: open_dataset(f'{root}/{name}') for name in ('published', *built)} | {
            'online': FormulaDataset(f)
        }
        transforms = {
            'published augmentation': train_transform(recipe(dataset=args.name)),
            'a crop': Compose([CenterCrop(224), PILToTensor()]),
        }
        for what, transform in transforms.items():
            best = dict.fromkeys((*sets, 'stream, zstd'), 0.0)
            for epoch in range(args.rounds):
                for name, dataset in sets.items():
                    batches = EpochBatches(len(f), BATCH)
                    batches.epoch = epoch
                    best[name] = max(best[name], rate(train_loader(dataset, transform, batches)))
                best['stream, zstd'] = max(
                    best['stream, zstd'],
                    rate(stream_loader(ShardStream(f'{root}/shards, zstd', transform, BATCH))),
                )
            print(
                f'{f.name}, {args.size}², {what}\n{"":14}{"images/s":>12}{"batches/s":>12}{"ratio":>12}'
            )
            for name, value in best.items():
                print(
                    f'{name:14}{value:12.0f}{value / BATCH:12.2f}{value / best["published"]:11.2f}×'
                )


if __name__ == '__main__':
    main()
