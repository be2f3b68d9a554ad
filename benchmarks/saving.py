"""What a checkpoint costs the training: python benchmarks/saving.py

The time for which a step waits while a checkpoint with AdamW's state is written in its way, and
while a thread writes a copy, for a ViT-Ti and a ViT-B; the best of three.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import timm
import torch

from fdsl_nb.models.serialization import save_checkpoint
from fdsl_nb.training.saving import CheckpointWriter


def stepped(name):
    model = timm.create_model(name, num_classes=1000)
    opt = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    return model, opt


def seconds(model, path, **given):
    begun = time.perf_counter()
    save_checkpoint(path, model, **given)
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--folder', help='on the disk that is meant; a temporary one')
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    for name in ('vit_tiny_patch16_224', 'vit_base_patch16_224'):
        model, opt = stepped(name)
        given, writer = dict(arch=name, epoch=0, optimizer=opt), CheckpointWriter()
        with tempfile.TemporaryDirectory(dir=folder) as root:
            path, times = Path(root) / 'last.pth.tar', []
            for _ in range(3):
                in_the_way = seconds(model, path, **given)
                beside = seconds(model, path, **given, write=writer.write)
                writer.wait()
                times.append((in_the_way, beside, writer.seconds))
            size = os.path.getsize(path)
        before, now, thread = (1e3 * min(column) for column in zip(*times))
        print(
            f'{name:22} {size / 1e6:6.0f} MB   in the way {before:6.0f} ms   '
            f'now {now:6.0f} ms, and {thread:6.0f} ms in a thread   {before / now:4.1f}×'
        )


if __name__ == '__main__':
    main()
