"""What our learner costs compared with a bare loop of timm's own parts.

    python benchmarks/step.py [--seconds S] [--rounds N] [--threads N]

Both train the same model with the same optimizer, schedule, mixing and loss on the same batches,
held in memory. A round times both, in alternating order; what counts is the median of the rounds'
ratios, learner to loop (1 is no overhead). `deit_tiny` at 224 pixels is what a run trains; the tiny
network, a millisecond or two a step, is the worst case.
"""

import argparse, itertools, statistics, time
from functools import partial
from types import SimpleNamespace
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from fdsl_nb.training.learner import fdsl_learner
from fdsl_nb.models.models import create_model
from fdsl_nb.training.plan import Recipe

CASES = {
    'deit_tiny, 224 pixels': dict(img_size=224, batch_size=8),
    'demo model, 32 pixels': dict(
        img_size=32,
        batch_size=64,
        model_kwargs=dict(patch_size=8, embed_dim=128, depth=4, num_heads=4),
    ),
    'one layer, 32 pixels': dict(
        img_size=32,
        batch_size=2,
        model_kwargs=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
    ),
}


class InMemory:
    "Batches that are there, as the learner asks for them."

    def __init__(self, batches, steps):
        self.batches, self.batch_sampler = batches, SimpleNamespace(steps=steps, epoch=0, first=0)

    def __len__(self):
        return self.batch_sampler.steps

    def __iter__(self):
        for images, labels in itertools.islice(itertools.cycle(self.batches), len(self)):
            yield images.clone(), labels  # mixing is in place


def bare(model, r, batches, steps):
    "Steps/s of timm's parts in a plain loop."
    optimizer = create_optimizer_v2(model, opt=r.opt, lr=r.lr, weight_decay=r.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=1,
        warmup_epochs=0,
        min_lr=r.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    mix = Mixup(r.mixup, r.cutmix, label_smoothing=r.smoothing, num_classes=10)
    criterion = SoftTargetCrossEntropy()
    model.train()
    start = time.perf_counter()
    for step, (images, labels) in enumerate(InMemory(batches, steps)):
        images, labels = mix(images, labels)
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step + 1)
    return steps / (time.perf_counter() - start)


def ours(model, r, batches, steps):
    "Steps/s of the learner."
    learn = fdsl_learner(model, r, InMemory(batches, steps), classes=10)
    start = time.perf_counter()
    learn.fit(1)
    return steps / (time.perf_counter() - start)


def measure(r, seconds, rounds):
    "Steps/s of the bare loop and of the learner, a pair for each round."
    side = r.img_size
    batches = [
        (torch.randn(r.batch_size, 3, side, side), torch.randint(10, (r.batch_size,)))
        for _ in range(4)
    ]
    options = dict(seed=0, drop_path_rate=r.drop_path) | r.model_kwargs
    fresh = partial(create_model, r.model, 10, side, **options)
    for program in (ours, bare):
        program(fresh(), r, batches, 2)  # whatever is done once
    steps = max(4, int(seconds * bare(fresh(), r, batches, 4)))
    pairs = []
    for n in range(rounds):
        order = (ours, bare) if n % 2 else (bare, ours)
        rates = {program: program(fresh(), r, batches, steps) for program in order}
        pairs.append((rates[bare], rates[ours]))
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=4, help='of each measurement, about')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--case', choices=CASES, help='only this one')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'steps/s, medians of {args.rounds} rounds; ratios from … to')
    print(f'{"":24}{"bare loop":>12}{"learner":>12}{"ratio":>9}', flush=True)
    for name in [args.case] if args.case else CASES:
        r = Recipe(epochs=1, warmup_epochs=0, **CASES[name])
        pairs = measure(r, args.seconds, args.rounds)
        loop, learner = (statistics.median(rates) for rates in zip(*pairs))
        ratios = sorted(o / b for b, o in pairs)
        print(
            f'{name:24}{loop:12.2f}{learner:12.2f}{statistics.median(ratios):9.3f}'
            f'   {ratios[0]:.3f} … {ratios[-1]:.3f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
