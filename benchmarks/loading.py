"""How fast training is fed: from a folder as published, from a build, or drawn online, on one core.

    python benchmarks/loading.py [name] [--images N] [--size N] [--rounds N]

Prints images/s and batches/s (64 images) with the published augmentation, and without any. The
published folder holds RGB PNG as Pillow saves it. Each source is read once a round, in turn; the
best of the rounds counts, and its ratio to the published folder. Files come from the page cache,
where they are after the first round: a disk can only be slower.
"""

import argparse, itertools, tempfile, time
from pathlib import Path
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor
from fdsl_nb.data.augment import train_transform
from fdsl_nb.build.build import build
from fdsl_nb.data.loading import EpochBatchSampler, FormulaDataset, train_loader
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
        folder = root / 'train' / f'{c:05d}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(f.render(c, k)).convert('RGB').save(folder / f'{c:05d}_{k:04d}.png')


def rate(loader):
    "Images/s of one pass."
    start, seen = time.perf_counter(), 0
    for images, _ in loader:
        seen += len(images)
    return seen / (time.perf_counter() - start)


BUILT = {
    'folder': {'layout': 'plain'},
    'shards, PNG': {'layout': 'shards', 'shard_images': 200},
    'shards, zstd': {'layout': 'shards', 'shard_images': 200, 'format': 'zstd'},
}


def write_all(f, root):
    for name, arrangement in BUILT.items():
        build(f, Path(root) / name, workers=0, progress=quiet, **arrangement)
    save_as_published(f, Path(root) / 'published')


def best_rates(f, root, transform, rounds):
    "Source → images/s in its best round."
    sets = {name: open_dataset(f'{root}/{name}') for name in ('published', *BUILT)}
    sets['online'] = FormulaDataset(f)
    best = dict.fromkeys((*sets, 'stream, zstd'), 0.0)
    for epoch in range(rounds):
        for name, dataset in sets.items():
            batches = EpochBatchSampler(len(f), BATCH)
            batches.epoch = epoch
            best[name] = max(best[name], rate(train_loader(dataset, transform, batches)))
        stream = ShardStream(f'{root}/shards, zstd', transform, BATCH)
        best['stream, zstd'] = max(best['stream, zstd'], rate(stream_loader(stream)))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('name', nargs='?', default='visualatom', help='the formula')
    parser.add_argument('--images', type=int, default=640)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    f = formula(args.name, classes=10, instances=args.images // 10, size=args.size)
    transforms = {
        'published augmentation': train_transform(recipe(dataset=args.name)),
        'a crop': Compose([CenterCrop(224), PILToTensor()]),
    }
    with tempfile.TemporaryDirectory() as root:
        write_all(f, root)
        for what, transform in transforms.items():
            best = best_rates(f, root, transform, args.rounds)
            print(f'{f.name}, {args.size}², {what}')
            print(f'{"":14}{"images/s":>12}{"batches/s":>12}{"ratio":>12}')
            for name, value in best.items():
                ratio = value / best['published']
                print(f'{name:14}{value:12.0f}{value / BATCH:12.2f}{ratio:11.2f}×')


if __name__ == '__main__':
    main()
