"""What happens before the first batch: python benchmarks/startup.py --baseline FOLDER

21 million images in 2,100 shards, four ranks started at once as processes: seconds until each has
its first batch of 64, and the memory that this takes on top of what the imported package takes.
FOLDER is a checkout of another version, measured in the same run (`git worktree add FOLDER …`).

Before that: a worker of a build, from the import to its first shard (`--worker`: nothing else).

What stands in for what: the indexes are whole, 21 million records; the shards are sparse files of
the size of their ten thousand records with one picture in each, to which all places of its index
point. No shard can be scanned here, so each rank finds the scans of all shards done, and what is
left is opening them; what scanning costs is measured on one whole shard. Pages of files that are
mapped are shared by all ranks; they are counted for each of them here all the same.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

RANK = """
import sys, time
begun = time.time()
kind, place, rank = sys.argv[1:]
import json
import torch
from torchvision.transforms import PILToTensor
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import EpochBatchSampler, train_loader

def memory(name):
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) / 1e3

before, imported = memory('VmRSS'), time.time()
images = open_dataset(place)
opened = time.time()
loader = train_loader(images, PILToTensor(), EpochBatchSampler(len(images), 256, 0, int(rank), 4))
x, labels = next(iter(loader))
said = dict(
    images=len(images), imports=imported - begun, opened=opened - imported,
    batch=time.time() - opened, seconds=time.time() - begun,
    peak=memory('VmHWM') - before, kept=memory('VmRSS') - before,
)
print(json.dumps(said))
"""

ORDER = """
import sys, time
from fdsl_nb.data.loading import permutation

def memory(name):
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) / 1e3

permutation(2_000_000, 0, 0)[0]  # compiled
permutation.cache_clear()
before, begun = memory('VmRSS'), time.perf_counter()
order = permutation(int(sys.argv[1]), 0, 1)
first = [int(order[place]) for place in range(1024)]
print(memory('VmHWM') - before, time.perf_counter() - begun)
"""

SCAN = """
import sys, time
from fdsl_nb.data import shards
begun = time.perf_counter()
rows = shards._scan_records(sys.argv[1])
print(time.perf_counter() - begun, len(rows))
"""


WORKER = """
import pickle, sys, time
begun = time.time()
function, arguments = pickle.load(open(sys.argv[1], 'rb'))
read = time.time()
function(*arguments)
with open('/proc/self/status') as f:
    memory = {line.split(':')[0]: int(line.split()[1]) / 1e3 for line in f if line.startswith('Vm')}
print(read - begun, time.time() - begun, memory['VmRSS'], memory['VmHWM'])
"""

TASK = """
import pickle, sys
from fdsl_nb.build.build import build, write_parts_of
from fdsl_nb.build.source import as_source
from fdsl_nb.formulas.formula import formula
source = as_source(formula('rcdb', classes=2, instances=4, size=64))
build(source, sys.argv[1], layout='shards', shard_images=4, workers=0)
with open(sys.argv[2], 'wb') as f:
    pickle.dump((write_parts_of, (source, sys.argv[1], [0])), f)
"""


def run(code, checkout, root, *arguments):
    "Starts a process of that version of the package."
    environment = dict(
        os.environ, PYTHONPATH=str(checkout), FDSL_DATA_ROOT=str(root / 'data'), OMP_NUM_THREADS='1'
    )
    words = [sys.executable, '-c', code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)


def member(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def stub():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new('L', (32, 32)).save(buffer, 'PNG')
    return buffer.getvalue()


def sparse_shard(path, records, picture):
    "As large as that many records; the first one is there."
    with open(path, 'wb') as f:
        f.write(member('00000_0000.cls', b'0') + member('00000_0000.png', picture))
        f.truncate(records * 2048 + 1024)
    return 1536, len(picture)


def make_build(folder, shards, records):
    "A finished build of shards of stub pictures, with its manifest and all of its index."
    from fdsl_nb.formulas.layout import metadata_folder
    from fdsl_nb.build.build import Job, _write_lines, describe, make_plan
    from fdsl_nb.build.source import as_source
    from fdsl_nb.formulas.formula import formula

    source = as_source(formula('rcdb', classes=records, instances=shards))
    job = Job(source, make_plan(source, layout='shards', shard_images=records), str(folder))
    about = metadata_folder(folder)
    folder.mkdir(parents=True)
    (about / 'index').mkdir(parents=True)
    (about / 'manifest.json').write_text(json.dumps(describe(job)))
    for p in range(shards):
        name = job.plan.part(p)
        where = sparse_shard(folder / name, records, stub())
        np.tile(np.array(where, '<i8'), (records, 1)).tofile(about / 'index' / f'{name[:-4]}.idx')
    size = (folder / job.plan.part(0)).stat().st_size
    _write_lines(job, [(job.plan.part(p), records, size, 64 * '0') for p in range(shards)])


def make_others(folder, root, shards, records):
    "Shards of another program, and the scan of each under the data root, as both versions keep it."
    import hashlib

    folder.mkdir(parents=True)
    (root / 'data/indexes').mkdir(parents=True)
    for s in range(shards):
        path = folder / f'{s:06d}.tar'
        where = sparse_shard(path, records, stub())
        stat = path.stat()
        key = f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}'
        word = hashlib.sha256(key.encode()).hexdigest()[:24]
        rows = np.column_stack([np.tile(where, (records, 1)), np.arange(records) % 1000])
        np.save(root / 'data/indexes' / f'{word}.npy', rows)


def whole_shard(path, records):
    picture = stub()
    with open(path, 'wb') as f:
        for i in range(records):
            record = member(f'{i:08d}.cls', b'7') + member(f'{i:08d}.png', picture)
            f.write(record)
        f.write(bytes(1024))


def start(checkout, root, kind, place):
    "Four ranks at once; the slowest and the largest."
    ranks = [run(RANK, checkout, root, kind, place, rank) for rank in range(4)]
    said = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    return {name: max(s[name] for s in said) for name in said[0]}


def show_worker(version, checkout, root):
    "What a worker of a build costs until it has written its first shard; the best of five."
    task = root / f'{version}.task'
    run(TASK, checkout, root, root / f'drawn-{version}', task).communicate()
    tries = [run(WORKER, checkout, root, task).communicate()[0].split() for _ in range(5)]
    imports, seconds, kept, peak = (min(map(float, column)) for column in zip(*tries))
    print(
        f'{version:>8}  a worker of a build: first shard after {seconds:.2f} s '
        f'(imports {imports:.2f}), {kept:.0f} MB kept, {peak:.0f} MB at most',
        flush=True,
    )


def show(version, case, said):
    print(
        f'{version:>8}  {case:<34} {said["images"]:>11,} images  {said["seconds"]:6.1f} s '
        f'(imports {said["imports"]:.1f}, opening {said["opened"]:.2f}, '
        f'first batch {said["batch"]:.2f}), {said["peak"]:5.0f} MB at most',
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--baseline', help='another checkout of the package')
    parser.add_argument('--shards', type=int, default=2100)
    parser.add_argument('--records', type=int, default=10_000, help='of a shard')
    parser.add_argument('--worker', action='store_true', help='only a worker of a build')
    parser.add_argument('--folder', help='for 1.5 GB of indexes; a temporary one')
    given = parser.parse_args()
    versions = {'now': Path(__file__).resolve().parents[1]}
    if given.baseline:
        versions['before'] = Path(given.baseline).resolve()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for version, checkout in versions.items():
            show_worker(version, checkout, Path(folder))
        if not given.worker:
            measure(versions, Path(folder), given.shards, given.records)


def measure(versions, root, shards, records):
    make_build(root / 'built', shards, records)
    make_others(root / 'others', root, shards, records)
    whole_shard(root / 'whole.tar', records)
    last = shards - 1
    pattern = f'{root}/built/SHARDS-{{000000..{last:06d}}}.tar'
    others = f'{root}/others/{{000000..{last:06d}}}.tar'
    for version, checkout in versions.items():
        run(RANK, checkout, root, 'warm', root / 'built', 0).communicate()  # kernels compiled
        show(version, 'folder of a build', start(checkout, root, 'folder', root / 'built'))
        if version == 'now':  # before, it would scan every shard
            show(version, 'pattern of a build', start(checkout, root, 'pattern', pattern))
        show(version, 'shards of others, first time', start(checkout, root, 'others', others))
        show(version, 'shards of others, again', start(checkout, root, 'others', others))
        seconds, found = run(SCAN, checkout, root, root / 'whole.tar').communicate()[0].split()
        print(
            f'{version:>8}  scanning a shard of {int(found):,} records: {float(seconds):.2f} s, '
            f'{float(seconds) * shards / 60:.0f} minutes for {shards:,}, in one process',
            flush=True,
        )
        for n in (300_000_000,) if version == 'now' else (30_000_000,):
            peak, seconds = map(float, run(ORDER, checkout, root, n).communicate()[0].split())
            print(
                f'{version:>8}  order of a pass of {n:,}: {peak:,.0f} MB, {seconds:.2f} s',
                flush=True,
            )


if __name__ == '__main__':
    main()
