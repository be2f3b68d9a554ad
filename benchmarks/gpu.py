"""What a GPU has to prove: its pixels, its speed. One command, a line a stage.

    python benchmarks/gpu.py [stages] [--device cuda|cpu] [--json FILE]

Prints `PASS|FAIL|SKIP name: measured (limit)` for each stage, then a table; its status is 1 if a
stage failed. Every stage is a process with a time box, so one that hangs or dies costs no other.
`--device cpu` rehearses all that can be rehearsed without a GPU: compilation, the kernels run by
threads of the CPU, and the loops of the rates at a tiny size, which have no limit there.
"""

import argparse, contextlib, json, os, platform, subprocess, sys, time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from typing import NamedTuple
import numpy as np
import timm
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, interpolate
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.cuda_augment import SOURCE as AUGMENT_CU
from fdsl_nb.data.cuda_augment import Kernels, device_kernels, device_loader, pack_views
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import AugmentedDataset, EpochBatchSampler
from fdsl_nb.formulas import cuda
from fdsl_nb.formulas.formula import PUBLISHED, formula
from fdsl_nb.training.optimise import make_optimizer
from fdsl_nb.training.recipes import recipe

ARCHITECTURES = 'sm_80', 'sm_90', 'sm_100'


class Skipped(Exception):
    "A stage that this machine has no use for; its text says why."


@dataclass
class Result:
    "What a stage found."

    passed: bool
    measured: str
    limit: str = 'no limit'


class Stage(NamedTuple):
    "One thing to prove."

    run: Callable  # device → Result; raises `Skipped`
    seconds: int  # its time box
    only_cuda: bool = False


def spread(f, n, classes=12):
    "Addresses far apart in few classes, which may have to be searched."
    return [(i * 7919 % min(f.classes, classes), i * 104729 % f.instances) for i in range(n)]


# What is compiled


def compiled():
    try:
        files = cuda.SOURCES / 'draw.cu', AUGMENT_CU
        return {
            (file.name, arch): cuda.compile_cuda(file.read_text(), arch, name=file.name)
            for file in files
            for arch in ARCHITECTURES
        }
    except RuntimeError as e:
        if 'NVRTC is not here' in str(e):
            raise Skipped(str(e)) from None
        raise


def roundings(device):
    "`compile_cuda` refuses code that leaves a rounding out."
    fused = sum(made.ptx.count('fma') for made in compiled().values())
    return Result(fused == 0, f'{fused} fused in {", ".join(ARCHITECTURES)}', '0')


def registers(device):
    used = [r for made in compiled().values() for r in cuda.resources(made.log).values()]
    most = max(r.registers for r in used)
    spilled, shared = sum(r.spilled for r in used), max(r.shared for r in used)
    return Result(
        most <= 128 and not spilled and shared <= 49152,
        f'{most} registers, {spilled} bytes spilled, {shared} shared',
        '128, 0, 49152',
    )


def cached(device):
    start = time.perf_counter()
    first = cuda.cached_cubin('sm_90')
    once = time.perf_counter() - start
    start = time.perf_counter()
    same = cuda.cached_cubin('sm_90') == first
    again = time.perf_counter() - start
    return Result(same and again < 0.5, f'{once:.2f} s, then {again:.3f} s', 'then 0.5 s')


# What is drawn


def emulate(source):
    try:
        return cuda.EmulatedKernels(source)
    except FileNotFoundError as e:
        raise Skipped(str(e)) from None


def kernels(device, source=cuda.SOURCES / 'draw.cu'):
    "Draws a launch, to images as NumPy has them."
    if device == 'cuda':
        gpu = cuda.DeviceKernels(source=source)
        return lambda launch: gpu.draw(launch)[0].cpu().numpy()
    emulated = emulate(source)
    return lambda launch: emulated.draw(launch, threads=4)[0]


def pixels(device):
    draw, n = kernels(device), 24 if device == 'cuda' else 2
    equal = 0
    for name in PUBLISHED:
        f = formula(name)
        addresses = spread(f, n)
        images = draw(cuda.pack(f, addresses))
        equal += sum(np.array_equal(x, f.render(*a)) for x, a in zip(images, addresses))
    total = n * len(PUBLISHED)
    return Result(equal == total, f'{equal} of {total} images equal', 'all')


def augmented(device):
    "The published augmentation of full-size images, against the CPU's."
    draw, n = kernels(device, AUGMENT_CU), 512 if device == 'cuda' else 16
    transform, f = train_transform(recipe(dataset='visualatom')), formula('visualatom')
    images = np.stack([f.render(*a) for a in spread(f, 16)])
    images, seeds = images[np.arange(n) % 16], list(range(n))
    views = draw(pack_views(transform, images, seeds))
    expected = (transform.from_seed(x, seed).numpy() for x, seed in zip(images, seeds))
    equal = sum(map(np.array_equal, views, expected))
    return Result(equal == n, f'{equal} of {n} views equal', 'all')


def repeated(device):
    "Many blocks at once, twice: the order of threads must not show."
    draw, n = kernels(device), 2048 if device == 'cuda' else 4
    differ = 0
    for name in ('visualatom', 'fractaldb', 'exfractaldb'):
        f = formula(name, size=128) if name != 'visualatom' else formula(name)
        launch = cuda.pack(f, spread(f, n))
        differ += int((draw(launch) != draw(launch)).any(axis=(1, 2)).sum())
    return Result(differ == 0, f'{differ} of {3 * n} images differ', '0')


def side_stream(device):
    "A launch follows torch's current stream, whichever that is."
    gpu, f = cuda.DeviceKernels(), formula('visualatom')
    addresses = spread(f, 64)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        images, _ = gpu.draw(cuda.pack(f, addresses))
        copied = images.clone()
    torch.cuda.current_stream().wait_stream(stream)
    expected = np.stack([f.render(*a) for a in addresses])
    equal = np.array_equal(copied.cpu().numpy(), expected)
    return Result(equal, 'equal' if equal else 'differs', 'equal')


def loader(device):
    "A run's batches made by kernels, threads ahead of it, against those of the CPU."
    if device == 'cuda':
        place = torch.device('cuda', torch.cuda.current_device())
        made, n = device_kernels(place), 128
    else:
        place, n = torch.device(device), 8
        made = Kernels(*map(emulate, (cuda.SOURCES / 'draw.cu', AUGMENT_CU)))
    images = open_dataset('visualatom', classes=4, instances=64, size=128)
    transform = train_transform(recipe(dataset='visualatom'))
    batches = EpochBatchSampler(len(images), n, repeats=2, epochs=1)
    dataset = AugmentedDataset(images, transform, repeats=2)
    equal = total = 0
    found = device_loader(images, transform, batches, made, place, workers=2)
    for (views, labels), samples in islice(zip(found, batches), 2):
        expected, classes = zip(*[dataset[sample] for sample in samples])
        same = [torch.equal(x.cpu(), y) for x, y in zip(views, expected)]
        equal += sum(same) if labels.tolist() == [*classes] else 0
        total += len(same)
    found.close()
    return Result(equal == total, f'{equal} of {total} views equal', 'all')


def scaled(device):
    "A float16 step with infinite gradients is left out, and nothing waits for the device."
    model = torch.nn.Linear(8, 8).to(device)
    optimizer = make_optimizer(model, recipe(dataset='visualatom'))
    scaler, norms = torch.amp.GradScaler(device), []
    x = torch.ones(4, 8, device=device)
    for n in range(3):
        with torch.autocast(device, torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        if n == 1:
            model.weight.grad.fill_(float('inf'))
        if device == 'cuda' and n:  # the first step makes the state
            torch.cuda.set_sync_debug_mode('error')
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        norms.append(model.weight.detach().norm())
        if device == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
    fused = bool(optimizer.param_groups[0].get('fused'))
    moved = [bool(a != b) for a, b in pairwise(norms)]
    passed = moved == [False, True] and scaler.get_scale() == 2**15 and fused == (device == 'cuda')
    return Result(passed, f'moved {moved}, scale {scaler.get_scale():g}, fused {fused}', 'left out')


# How fast


def synchronize(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def rate(step, images, seconds, device):
    "Images a second of `step()`, which handles `images` of them; two steps before are not counted."
    step(), step()
    synchronize(device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            step()
        done += 4 * images
        synchronize(device)
    return done / (time.perf_counter() - start)


def drawer(name, batch, device, **knobs):
    "Batches of a formula, uint8 [batch, size, size] on the device, drawn where it can."
    f = formula(name, **knobs)
    gpu = cuda.DeviceKernels() if device == 'cuda' else None
    for start in count(0, batch):
        numbers = range(start, start + batch)
        addresses = [(i * 7919 % f.classes, i * 104729 % f.instances) for i in numbers]
        labels = torch.tensor([c for c, _ in addresses], device=device)
        if gpu:
            yield gpu.draw(cuda.pack(f, addresses))[0], labels
        else:
            yield cuda.draw_images(f, addresses, 'cpu'), labels


def draw_rate(device):
    batch, seconds = (1024, 20) if device == 'cuda' else (16, 3)
    batches = drawer('visualatom', batch, device)
    if device == 'cuda':  # tables of all classes are made once
        list(islice(batches, 8))
    found = rate(lambda: next(batches), batch, seconds, device)
    enough = found >= 50_000 if device == 'cuda' else found > 0
    limit = '50,000' if device == 'cuda' else 'no limit on a CPU'
    return Result(enough, f'{found:,.0f} VisualAtom images/s', limit)


def ahead(batches, device):
    "Batches made on a side stream, one ahead of the one that is used."
    if device != 'cuda':
        yield from batches
        return
    stream = torch.cuda.Stream()

    def made():
        with torch.cuda.stream(stream):
            return next(batches)

    waiting = made()
    while True:
        torch.cuda.current_stream().wait_stream(stream)
        batch = waiting
        for tensor in batch:
            tensor.record_stream(torch.cuda.current_stream())
        waiting = made()
        yield batch


def training(model, batches, side, device):
    "One step of training on the next batch, drawn larger than it is shown."
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=device == 'cuda')
    low = torch.autocast('cuda', torch.bfloat16) if device == 'cuda' else contextlib.nullcontext()

    def step():
        images, labels = next(batches)
        images = images.unsqueeze(1).float().div(255)
        images = interpolate(images, (side, side), mode='bilinear', antialias=True)
        with low:
            loss = cross_entropy(model(images.expand(-1, 3, -1, -1)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_rate(name, least):
    "The stage of a network: fed by a formula, and by one batch again and again."

    def stage(device):
        if device == 'cuda':
            model, side, batch, knobs, seconds = timm.create_model(name), 224, 512, {}, 25
        else:
            tiny = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
            model = timm.create_model(name, **tiny)
            side, batch, knobs, seconds = 32, 8, dict(size=64), 2
        model.to(device)
        same = next(drawer('visualatom', batch, device, **knobs))
        synthetic = rate(
            training(model, iter(lambda: same, None), side, device), batch, seconds, device
        )
        batches = ahead(drawer('visualatom', batch, device, **knobs), device)
        fed = rate(training(model, batches, side, device), batch, seconds, device)
        said = f'{fed:,.0f} images/s, {fed / synthetic:.2f} of one batch repeated'
        if device != 'cuda':
            return Result(fed > 0, said, 'no limit on a CPU')
        return Result(fed >= least and fed >= 0.85 * synthetic, said, f'{least:,}, 0.85')

    return stage


def group(device):
    "Gradients of one process summed by NCCL, or by Gloo on a CPU."
    backend = 'nccl' if device == 'cuda' else 'gloo'
    store = dist.TCPStore('127.0.0.1', 0, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(8, 1).to(device), gradient_as_bucket_view=True, static_graph=True
    )
    model(torch.ones(2, 8, device=device)).sum().backward()
    found = float(model.module.weight.grad.sum())
    dist.destroy_process_group()
    return Result(found == 16, f'sum {found:g} by {backend}', '16')


STAGES = {
    'roundings': Stage(roundings, 60),
    'registers': Stage(registers, 60),
    'cache': Stage(cached, 60),
    'pixels': Stage(pixels, 120),
    'augmented': Stage(augmented, 240),
    'repeated': Stage(repeated, 90),
    'stream': Stage(side_stream, 60, only_cuda=True),
    'loader': Stage(loader, 240),
    'scaler': Stage(scaled, 60),
    'group': Stage(group, 60),
    'draw rate': Stage(draw_rate, 90),
    'ViT-Ti': Stage(step_rate('vit_tiny_patch16_224', 20_000), 120),
    'ViT-S': Stage(step_rate('vit_small_patch16_224', 8_000), 120),
    'ViT-B': Stage(step_rate('vit_base_patch16_224', 2_500), 120),
}


# Each in a process


def in_this_process(name, device):
    "Runs a stage and prints its result as a line of JSON, the last on stdout."
    stage = STAGES[name]
    try:
        if stage.only_cuda and device != 'cuda':
            raise Skipped('needs a GPU')
        found = asdict(stage.run(device))
    except Skipped as e:
        found = dict(passed=None, measured=str(e), limit='')
    except Exception as e:
        found = dict(passed=False, measured=f'{type(e).__name__}: {e}'[:500], limit='no error')
    print(json.dumps(found))


def in_a_process(name, device):
    "A row of the table."
    words = [sys.executable, __file__, name, '--device', device, '--here']
    start = time.perf_counter()
    try:
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=STAGES[name].seconds
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as e:
        found = dict(passed=False, measured='not done', limit=f'{e.timeout:.0f} s')
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()[-1:] or ['nothing']
        found = dict(passed=False, measured=f'died, status {done.returncode}: {said[0]}', limit='')
    state = {True: 'PASS', False: 'FAIL', None: 'SKIP'}[found.pop('passed')]
    return dict(name=name, state=state, seconds=round(time.perf_counter() - start, 1), **found)


def about(device):
    "The machine, in a line."
    card = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {os.cpu_count()} cores'
    return f'{card}; torch {torch.__version__}, Python {platform.python_version()}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('stages', nargs='*', help=f'of {", ".join(STAGES)}; all when none is given')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--json', help='a file for the results')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.stages:
        if name not in STAGES:
            parser.error(f'{name!r} is no stage; known: {", ".join(STAGES)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch finds no GPU; look at nvidia-smi, or rehearse with --device cpu')
    if args.here:
        in_this_process(args.stages[0], args.device)
        return
    print(about(args.device), flush=True)
    rows = []
    for name in args.stages or STAGES:
        row = in_a_process(name, args.device)
        rows.append(row)
        limit = f' ({row["limit"]})' if row['limit'] else ''
        print(f'{row["state"]} {name}: {row["measured"]}{limit}', flush=True)
    print(f'\n{"stage":12}{"state":>8}{"seconds":>9}')
    for row in rows:
        print(f'{row["name"]:12}{row["state"]:>8}{row["seconds"]:9.1f}')
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with open(args.json, 'w') as f:
            json.dump(dict(machine=about(args.device), stages=rows), f, indent=1)
    sys.exit(any(row['state'] == 'FAIL' for row in rows))


if __name__ == '__main__':
    main()
