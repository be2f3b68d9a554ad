"""What an epoch costs besides its steps: python benchmarks/epochs.py

Epochs of three steps, as a data set with one image a class has them, at row 100 and at row 80,000
of a run, with 1,000 and with 21,000 classes. The baseline, in the same run, keeps books as before:
`summary.csv` written anew and a checkpoint after every epoch. CPU time of one core, per epoch, less
that of three steps alone.
"""

import argparse
import contextlib
import io
import resource
import tempfile
import time
from types import SimpleNamespace

import torch
from torch import nn

from fdsl_nb.core.folder import RunFolder
from fdsl_nb.training import saving
from fdsl_nb.training.learner import fdsl_learner
from fdsl_nb.training.plan import Recipe
from fdsl_nb.training.saving import SaveCheckpoints

SETTINGS = dict(
    mixup=0.0, cutmix=0.0, warmup_epochs=0, img_size=8, batch_size=4, eval_metric='last'
)


class Batches:
    "Three batches, made before anything is timed."

    def __init__(self, classes):
        self.batches = [(torch.randn(4, 192), torch.randint(classes, (4,))) for _ in range(3)]
        self.batch_sampler = SimpleNamespace(steps=3, epoch=0, first=0)

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(self.batches)


def network(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 32), nn.GELU(), nn.Linear(32, classes))


def plain_steps(classes, epochs):
    "CPU seconds an epoch of the three steps alone."
    model, batches = network(classes), Batches(classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    begun = time.process_time()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return (time.process_time() - begun) / epochs


def rewrite_summary(folder, row):
    "The baseline: all rows are read and written again."
    rows = saving.read_summary(folder)
    folder.file('summary.csv').unlink(missing_ok=True)
    text = io.StringIO()
    text.write(','.join(row) + '\n')
    text.writelines(','.join(map(str, r.values())) + '\n' for r in [*rows, row])
    folder.output('summary.csv').write_text(text.getvalue())


@contextlib.contextmanager
def books(as_before):
    "With the baseline's way to add a row, if asked for."
    now = saving.add_epoch
    saving.add_epoch = rewrite_summary if as_before else now
    try:
        yield
    finally:
        saving.add_epoch = now


def whole_epochs(classes, row, epochs, as_before):
    "CPU seconds an epoch of the learner, from a given row on."
    with tempfile.TemporaryDirectory() as root, books(as_before):
        folder = RunFolder(root)
        folder.output('summary.csv').write_text('epoch,train_loss,lr\n')
        with open(folder.file('summary.csv'), 'a') as f:
            f.writelines(f'{n},6.9,0.001\n' for n in range(row))
        keep = SaveCheckpoints(folder, {}, save_every=1 if as_before else 0)
        r = Recipe(**SETTINGS, epochs=row + epochs + 1)
        learn = fdsl_learner(network(classes), r, Batches(classes), classes=classes, cbs=[keep])
        learn.first_epoch = row
        begun = []
        learn.add_cb(Clock(begun))
        with contextlib.redirect_stdout(io.StringIO()):
            learn.fit(row + epochs + 1)
    return (begun[-1] - begun[0]) / epochs


class Clock(saving.Callback):
    "The CPU time at the end of each epoch."

    order = 90

    def __init__(self, times):
        self.times = times

    def after_epoch(self):
        self.times.append(time.process_time())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=100, help='timed, of each kind')
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    print('classes    row   before, ms   now, ms   ratio   memory, MB')
    for classes in (1000, 21_000):
        alone = plain_steps(classes, epochs)
        for row in (100, 80_000):
            before = whole_epochs(classes, row, max(3, epochs // 10), True) - alone
            now = max(whole_epochs(classes, row, epochs, False) - alone, 1e-4)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f'{classes:7} {row:6} {1e3 * before:12.1f} {1e3 * now:9.1f} '
                f'{before / now:7.0f} {memory:12.0f}'
            )


if __name__ == '__main__':
    main()
