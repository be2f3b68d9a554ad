"""What the ends of epochs cost a loader, with stand-ins that only sleep.

    python benchmarks/feed.py [--image MS] [--step MS] [--steps N] [--epochs N] [--workers N]

Prints seconds, and how many times those of the steps alone. An image takes 2 ms, a step 20 ms, an
epoch has three steps of 64 images, and eight workers help. The baseline is torch's loader with a
new iterator for every epoch, its processes kept; then come our loader by threads, as for formulas
in kernels, and by processes, as for everything else. Each is timed once more over one long epoch of
as many steps, which is what epochs should cost. Sleeping takes no core, so that a small or busy
machine gives the same. The first steps, during which workers start, are not counted.
"""

import argparse
import time
import warnings
import numpy as np
import torch
from torch.utils.data import DataLoader
from fdsl_nb.data.loading import AugmentedDataset, EpochBatchSampler, ImageDataset, train_loader

BATCH, STARTING = 64, 12


class Sleeping(ImageDataset):
    "Images that take their time."

    classes, fixed = ['all'], True

    def __init__(self, seconds):
        self.seconds, self.image = seconds, np.zeros((8, 8), np.uint8)

    def __len__(self):
        return 1 << 20

    def label(self, i):
        return 0

    def array(self, i):
        time.sleep(self.seconds)
        return self.image, 0


class Plain:
    "A transform that does nothing; `fast` says that threads may do it."

    def __init__(self, fast):
        self.fast = fast

    def from_seed(self, image, seed, out=None):
        made = torch.from_numpy(image)
        return made if out is None else out.copy_(made)


class NewIterators:
    "torch's loader as it is used mostly: one iterator an epoch, with processes that stay."

    def __init__(self, dataset, batches, workers):
        self.batch_sampler = batches
        self.loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=workers, persistent_workers=True
        )

    def __iter__(self):
        return iter(self.loader)


def seconds(loader, epochs, step):
    "What the steps of some epochs take after the first `STARTING`."
    done, started = 0, 0.0
    for epoch in range(epochs):
        loader.batch_sampler.epoch = epoch
        for _ in loader:
            time.sleep(step)
            done += 1
            if done == STARTING:
                started = time.perf_counter()
    return time.perf_counter() - started


def loaders(args):
    "Name → function of the images of an epoch."
    images = Sleeping(args.image / 1000)

    def batches(n):
        return EpochBatchSampler(len(images), BATCH, images=n)

    def ours(fast):
        return lambda n: train_loader(images, Plain(fast), batches(n), args.workers)

    def baseline(n):
        return NewIterators(AugmentedDataset(images, Plain(False)), batches(n), args.workers)

    return {'an iterator an epoch': baseline, 'threads': ours(True), 'processes': ours(False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--image', type=float, default=2, help='milliseconds an image')
    parser.add_argument('--step', type=float, default=20, help='milliseconds a step')
    parser.add_argument('--steps', type=int, default=3, help='steps an epoch')
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--workers', type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # they only sleep
    steps, step = args.steps * args.epochs, args.step / 1000
    print(f'{args.epochs} epochs of {args.steps} steps: {(steps - STARTING) * step:.2f} s of steps')
    for name, loader in loaders(args).items():
        short = seconds(loader(args.steps * BATCH), args.epochs, step)
        long = seconds(loader(steps * BATCH), 1, step)
        ratio = short / long
        print(f'{name:22}{short:6.2f} s, as one long epoch {long:6.2f} s: {ratio:5.2f}×')


if __name__ == '__main__':
    main()
