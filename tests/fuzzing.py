"""A campaign of hostile files and values: what is read is right, or refused by a named error.

`python tests/fuzzing.py CASES SEED` prints a table: for each format how many cases were accepted
and refused, the slowest, and the most memory that one of them took. Each fault is printed with the
seed that makes it again. A case is a small good file with bits turned, pieces cut, moved or
repeated, numbers replaced by extreme ones, or one of a list of files that are well formed and lie.
"""

import argparse
import faulthandler
import io
import json
import logging
import os
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zstandard
from PIL import Image

from fdsl_nb.app.compare import read_run, run_row
from fdsl_nb.app import parameters
from fdsl_nb.app.browser import report_links, run_line
from fdsl_nb.app.parameters import check_values, find_notebook, read_parameters, run_notebooks
from fdsl_nb.build.build import build
from fdsl_nb.build.verify import verify
from fdsl_nb.core.settings import machine_settings
from fdsl_nb.data.coyo import open_coyo
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.formulas.layout import encode, metadata_folder
from fdsl_nb.data.shards import BuiltDataset, decode
from fdsl_nb.data.streams import records
from fdsl_nb.formulas.categories import load_categories
from fdsl_nb.formulas.formula import formula
from fdsl_nb.models.checkpoints import load_weights, read_checkpoint, read_weights
from fdsl_nb.models.google import google_shapes
from fdsl_nb.models.models import create_model
from fdsl_nb.training.training import architecture_of
from tensorflow_bundles import write_bundle

SECONDS, BYTES = 20, 1_500_000_000  # of processor time, of memory, that a case may take
NAMED = (ValueError, OSError)
EXTREME = [0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b'-1', b'1e999', b'nan', b'null', b'{}', b'[]', b'"\\u0000"', b'9' * 30, b'9' * 5000]
WORDS += [b'[' * 20_000, b'{"a":' * 20_000, b'true', b'0.5', b'"../../x"', b'1' + b'0' * 12]


class HangError(BaseException):
    "A case took longer than it may."


def interrupted(*_):
    raise HangError


# How a good file is spoilt


def turned(data, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def moved(data, rng):
    "A piece is repeated at another place, removed, or filled with noise."
    first, size = rng.randrange(len(data)), rng.choice((1, 4, 16, 64, 512))
    piece, place = data[first : first + size], rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[place : place + size] = piece
    elif kind == 1:
        data[place:place] = piece
    elif kind == 2:
        del data[first : first + size]
    else:
        data[first : first + size] = rng.randbytes(len(piece))


def enlarged(data, rng):
    "A number of 2, 4 or 8 bytes becomes an extreme one."
    size, order = rng.choice((2, 4, 8)), rng.choice(('little', 'big'))
    place = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 128))))
    data[place : place + size] = (rng.choice(EXTREME) % 256**size).to_bytes(size, order)


def reworded(data, rng):
    "A number or a text becomes another."
    found = list(re.finditer(rb'-?\d[\d.e+-]*|"[^"]*"|true|false|null', bytes(data)))
    if found:
        first, last = rng.choice(found).span()
        data[first:last] = rng.choice(WORDS)


def spoilt(data, rng, is_text):
    data = bytearray(data)
    ways = (reworded, reworded, turned, cut, moved) if is_text else (turned, cut, moved, enlarged)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(ways)(data, rng)
    return bytes(data)


# What is read, and how


@dataclass
class Format:
    "A kind of file: good ones, ones that lie, and what reads them."

    name: str
    file: str  # its name in a folder of the case's own
    read: object  # function of the file's path, which returns what it found
    seeds: list  # good contents
    lies: list = field(default_factory=list)  # well formed, and hostile
    words: str = ''  # what the message of a refusal names, the file if empty
    is_text: bool = False
    beside: object = None  # function of the folder: makes what else the reader needs
    exact: bool = False  # are all bytes that matter under a checksum?


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(contents, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(contents, change=lambda info: info):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name, data in contents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(change(info), io.BytesIO(data))
    return out.getvalue()


def saved(content, **options):
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def small_network():
    options = dict(patch_size=8, depth=1, embed_dim=24, num_heads=2)
    return create_model('vit_tiny_patch16_224', 3, 32, seed=0, **options)


def torch_formats():
    weights = {k: v.clone() for k, v in small_network().state_dict().items()}
    settings = argparse.Namespace(model='vit_tiny_patch16_224', lr=0.1)
    content = dict(state_dict=weights, epoch=3, arch='vit_tiny_patch16_224', args=settings)
    new = saved(content)
    huge = torch.zeros(1).expand(10**6, 10**6)
    parts = members(new)
    name = next(k for k in parts if k.endswith('data.pkl'))
    pickles = [
        b'\x80\x02}' + b')' + b'\x85' * 200_000 + b'K\x01s.',
        b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + bytes([0, 0, 0, 0, 32]) + b'\x85R.',
        b'\x80\x02' + b']q\x00' + b'h\x00a' * 100_000 + b'.',
        b'\x80\x02X\xff\xff\xff\xff.',
        b'\x80\x02' + b'(' * 500_000 + b'.',
        b'\x80\x02ctorch\nTensor\n(M\xff\xffM\xff\xffM\xff\xfftR.',
        b'\x80\x02ctorch\nFloatTensor\n\x8a\x06' + bytes([0, 0, 0, 0, 0, 32]) + b'\x85R.',
    ]
    lies = [zipped(parts | {name: p}) for p in pickles]
    lies += [saved(dict(state_dict=dict(a=huge))), zipped(parts, zipfile.ZIP_DEFLATED)]
    lies += [saved(dict(state_dict=weights | dict(head=v))) for v in (huge, {}, [weights] * 3)]
    lies += [zipped({name: parts[name]}), zipped({name: bytes(50_000_000)}, zipfile.ZIP_DEFLATED)]
    with_all = ['last.pth.tar', read_and_load]
    return [
        Format('torch zip', *with_all, [new], lies, exact=True),
        Format(
            'torch old',
            *with_all,
            [saved(content, _use_new_zipfile_serialization=False)],
            [saved(dict(state_dict=dict(a=huge)), _use_new_zipfile_serialization=False), *pickles],
        ),
        Format(
            'safetensors',
            'model.safetensors',
            read_and_load,
            [safetensors.torch.save(weights)],
            [struct.pack('<Q', len(h)) + h for h in safetensor_headers()],
        ),
        npz_format(),
    ]


def safetensor_headers():
    for shape, ends in (
        ([2**40], [0, 2**42]),
        ([2**63, 2**63], [0, 4]),
        ([0], [4, 0]),
        ([-1], [0, 4]),
    ):
        yield json.dumps(dict(a=dict(dtype='F32', shape=shape, data_offsets=ends))).encode()
    yield b'{"a":' * 50_000
    yield b'[' * 90_000
    yield json.dumps(
        {str(n): dict(dtype='F32', shape=[0], data_offsets=[0, 0]) for n in range(9999)}
    ).encode()


def read_and_load(path):
    content = read_checkpoint(path)
    _, found = read_weights(path)
    try:
        load_weights(small_network_once(), path)
    except ValueError:
        pass
    return {k: v.float().clone() for k, v in found.items()} | {'number': torch.tensor(len(content))}


@cache
def small_network_once():
    return small_network()


def npy(array, shape=None):
    out = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(out, header | dict(shape=shape or array.shape))
    return out.getvalue() + array.tobytes()


def npz_format():
    shapes = google_shapes(1, 24, 2, 48, 8, 5, 3)
    arrays = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    one = next(iter(arrays))
    parts = {f'{k}.npy': npy(v) for k, v in arrays.items()}
    wrong = [npy(arrays[one], s) for s in ((2**40,), (2**63, 2**63), (0,), (10**9, 10**9))]
    wrong += [b'\x93NUMPY\x01\x00\xff\xff' + b'(' * 65535, b'\x93NUMPY\x07\x00v\x00{}']
    lies = [zipped(parts | {f'{one}.npy': w}) for w in wrong]
    lies += [zipped(parts | {f'{one}.npy': npy(np.zeros(10**8, np.uint8))}, zipfile.ZIP_DEFLATED)]
    read = lambda path: {k: v.clone() for k, v in read_checkpoint(path).items()}
    return Format('npz', 'ViT.npz', read, [zipped(parts)], lies)


def bundle_formats():
    tensors = {f'net/w{n}/.ATTRIBUTES/VARIABLE_VALUE': torch.ones(3, n + 1) for n in range(6)}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for n, snappy in enumerate((False, True)):
            write_bundle(Path(folder) / f'{n}.index', tensors, snappy=snappy)
            found.append((Path(folder) / f'{n}.index').read_bytes())
        data = (Path(folder) / '0.data-00000-of-00001').read_bytes()

    def read(path):
        return {
            k: v.clone() for k, v in dict(read_checkpoint(path.with_name('ckpt.index'))).items()
        }

    names = 'ckpt.index', 'ckpt.data-00000-of-00001'
    give = lambda name, content: lambda folder: (folder / name).write_bytes(content)
    return [
        Format('bundle index', names[0], read, found, words='ckpt', beside=give(names[1], data)),
        Format(
            'bundle data', names[1], read, [data], words='ckpt', beside=give(names[0], found[0])
        ),
    ]


# Pictures

GREY = formula('rcdb', classes=1, instances=1, size=32, start_range=4).render(0, 0)


def picture(kind):
    out = io.BytesIO()
    Image.fromarray(GREY).convert('RGB').save(out, kind)
    return out.getvalue()


def png_of(width, height, data=b''):
    def chunk(kind, body):
        return (
            struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        )

    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    body = chunk(b'IDAT', zlib.compress(data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + body + chunk(b'IEND', b'')


def picture_formats():
    read = lambda path: decode(path.read_bytes(), path.name)
    huge = [png_of(2**31 - 1, 2**31 - 1), png_of(60_000, 60_000), png_of(9_000, 9_000)]
    huge += [png_of(32, 32, bytes(50_000_000)), png_of(0, 0)]
    suffixes = dict(jpg='JPEG', webp='WEBP', bmp='BMP', ppm='PPM', tif='TIFF', gif='GIF')
    found = [Format('png', 'a.png', read, [encode(GREY)], huge, exact=True)]
    for suffix, kind in suffixes.items():
        found.append(Format(suffix, f'a.{suffix}', read, [picture(kind)], huge[:2]))
    lie = zstandard.ZstdCompressor(level=19).compress
    arrays = [npy(GREY, s) for s in ((2**40, 1), (2**63, 2**63), (32, 32, 3), (-1, -1024), (0, 0))]
    frames = [lie(a) for a in arrays] + [
        lie(bytes(2_000_000_000 // 4)),
        lie(b''),
        lie(b'(' * 10**6),
    ]
    frames += [lie(npy(GREY.astype(t))) for t in (np.float64, np.int8)]
    packed = Format('zstd', 'a.npy.zst', read, [encode(GREY, 'zstd')], frames, exact=True)
    return [*found, packed, npy_format(lie)]


def npy_format(compress):
    read = lambda path: decode(compress(path.read_bytes()), 'a.npy.zst')
    return Format('npy', 'a.npy.zst', read, [npy(GREY), npy(np.stack([GREY] * 3, -1))])


# Archives and shards


def everything(images):
    return [
        (np.asarray(images[i][0]).tobytes(), images.label(i)) for i in range(min(len(images), 50))
    ]


def archive_formats():
    png = encode(GREY)
    files = [(f'{c}/{n}.png', png) for c in 'ab' for n in range(3)]
    deep = [(f'a/{n}.png', png) for n in range(3)]
    tars = [tarred(files)]
    sparse = dict(realsize=str(2**50), name='a/x.png', major='1', minor='0')
    headers = [dict(size=size) for size in ('-1', '9' * 30, str(2**40))]
    headers.append({f'GNU.sparse.{k}': v for k, v in sparse.items()})
    lies = [tarred(deep, extended(h)) for h in headers]
    lies += [
        pax_of(2**40),
        pax_of(10**11),
        negative_tar(),
        b''.join(pax_of(0)[:1024] for _ in range(3000)),
    ]
    zips = [zipped(dict(files)), zipped(dict(files), zipfile.ZIP_DEFLATED)]
    bombs = [
        zipped({'a/1.png': bytes(500_000_000)}, zipfile.ZIP_DEFLATED),
        zipped({f'a/{n}.png': b'' for n in range(9999)}),
    ]
    read = lambda path: everything(open_dataset(str(path)))
    rows = [
        (f'{n:04d}.{s}', d) for n in range(4) for s, d in (('cls', b'%d' % (n % 2)), ('png', png))
    ]
    labels = [b'-1', b'9' * 30, b'9' * 5000, b'1000000000', b'', b'x', b'0x1']
    shards = [tarred(rows)]
    wrong = [tarred([('0.cls', x), ('0.png', png)]) for x in labels] + lies

    def read_shard(path):
        return everything(open_dataset(str(path.with_name('a-{0..0}.tar'))))

    def read_stream(path):
        return list(records(str(path)))

    coyo = [
        tarred(
            [
                ('0.jpg', picture('JPEG')),
                ('0.json', b'{"labels": [1, 2], "label_probs": [0.5, 0.9]}'),
            ]
        )
    ]
    more = [
        b'[' * 90_000,
        b'{"labels": [1000000000000], "label_probs": [1]}',
        b'{"labels": 1}',
        b'9' * 5000,
    ]
    no_labels = [tarred([('0.jpg', picture('JPEG')), ('0.json', m)]) for m in more]
    return [
        Format('tar', 'a.tar', read, tars, lies),
        Format('zip', 'a.zip', read, zips, bombs),
        Format('shard', 'a-0.tar', read_shard, shards, wrong),
        Format('stream', 'a.tar', read_stream, shards, wrong),
        Format(
            'coyo',
            'a.tar',
            lambda path: everything(open_coyo(shards=str(path.parent), classes=10)),
            coyo,
            no_labels,
        ),
    ]


def extended(headers):
    "A function that gives a member these extended headers."

    def change(info):
        info.pax_headers = headers
        return info

    return change


def pax_of(size):
    "A tar of one header that announces so many bytes of further headers."
    info = tarfile.TarInfo('././@PaxHeader')
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def negative_tar():
    info = tarfile.TarInfo('a/1.png')
    good = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    good[124:136] = b'\xff' * 12  # -1, in base 256
    good[148:156] = b'        '
    good[148:156] = b'%06o\0 ' % sum(good)
    return bytes(good) + bytes(2048)


def build_formats():
    "A build beside which one of its files is spoilt."
    kept = tempfile.mkdtemp()
    found = []
    for layout in ('plain', 'shards'):
        root = Path(kept) / layout / 'out'
        tiny = formula('rcdb', classes=3, instances=2, size=16, start_range=4)
        build(tiny, root, workers=0, progress=lambda *_: None, layout=layout)
        meta = metadata_folder(root)
        names = ['manifest.json', 'manifest.csv']
        if layout == 'shards':
            names.append('index/SHARDS-000000.idx')
        for name in names:
            good = (meta / name).read_bytes()

            def read(path, root=root, place=meta / name, good=good):
                place.write_bytes(path.read_bytes())
                try:
                    everything(BuiltDataset(root))
                    return verify(root)
                finally:
                    place.write_bytes(good)

            lies = []
            if name == 'manifest.json':
                for change in (
                    dict(classes=10**9),
                    dict(instances=10**15),
                    dict(classes=10**30),
                    dict(instances=[10**12] * 3),
                    dict(names=['a'] * 3),
                    dict(shard_images=1),
                    dict(spec='[' * 90_000),
                ):
                    said = json.loads(good)
                    said['plan'] |= change
                    lies.append(json.dumps(said).encode())
            text = not name.endswith('.idx')
            found.append(
                Format(
                    f'{layout} {Path(name).name}',
                    Path(name).name,
                    read,
                    [good],
                    lies,
                    words='manifest|out|SHARDS|index|\\.png',
                    is_text=text,
                )
            )
    return found


# Runs, tables, settings


def shown(path):
    "A run as the browser of runs shows it."
    run = read_run(path.parent)
    return run_line(run_row(run), run.reason) + report_links(run)


def run_formats():
    files = {
        'status.json': json.dumps(
            dict(
                state='running',
                pid=1,
                process_started=1.5,
                host='h',
                time='2026-01-01T00:00:00Z',
                heartbeat='2026-01-01T00:00:00Z',
                reason='',
            )
        ),
        'config.json': json.dumps(
            dict(lr=dict(value=0.1, source='recipe'), folder=dict(value='runs/x', source='output'))
        ),
        'result.json': json.dumps(dict(top1=91.5, correct=90, images=100, split='test')),
        'summary.csv': 'epoch,train_loss,eval_top1,lr\n0,2.5,10.0,0.1\n1,2.25,20.0,0.05\n',
        'log.jsonl': '{"time": 1.5, "event": "start"}\n{"time": 2.5, "event": "epoch"}\n',
    }

    def give(name):
        return lambda folder: [(folder / n).write_text(t) for n, t in files.items() if n != name]

    deep = [
        b'[' * 200_000,
        b'{"a":' * 200_000,
        b'',
        b'null',
        b'"x"',
        b'{"state": "running"}',
        b'9' * 10_000,
    ]
    tables = [
        b'epoch\n' + b'9' * 5000 + b'\n',
        b'a,b\n1,2\n',
        b'epoch,a\n1,2,3,4\n',
        b'\0\n\n',
        b'epoch,x\n1,"' + b'y' * 200_000,
    ]
    return [
        Format(
            n,
            n,
            shown,
            [t.encode()],
            tables if n == 'summary.csv' else deep,
            words=f'{n}|case is damaged',
            is_text=True,
            beside=give(n),
        )
        for n, t in files.items()
    ]


def other_formats():
    table = b"class,a,b\n0,0.5,0.25\n0,0.1,0.75\n1,2.0,1.0\n"
    settings = b'[paths]\ndata_root = data\n[run]\nworkers = 2\nprecision = recipe\n'
    export = json.dumps(
        dict(architecture='vit_tiny_patch16_224', num_classes=3, model_args=dict(patch_size=8))
    ).encode()
    bad = [
        b'class,a,b\n1e300,1,1\n',
        b'class,a,b\n-1,1,1\n',
        b'class,a,b\n' + b'1,' * 100_000,
        b'class,a,b\nnan,1,1\n',
        b'class,a,b\n1000000000,1,2\n',
    ]
    return [
        Format(
            'categories.csv',
            'c.csv',
            lambda path: load_categories(path, ('a', 'b')),
            [table],
            bad,
            is_text=True,
        ),
        Format(
            'settings.ini',
            'settings.ini',
            lambda path: machine_settings(path, {}),
            [settings],
            [b'[run]\nworkers = ' + b'9' * 5000],
            is_text=True,
        ),
        Format(
            'export config.json',
            'config.json',
            lambda path: architecture_of(f'local-dir:{path.parent}'),
            [export],
            [b'[' * 200_000],
            is_text=True,
        ),
    ]


def all_formats():
    groups = (
        torch_formats,
        bundle_formats,
        picture_formats,
        archive_formats,
        build_formats,
        run_formats,
        other_formats,
    )
    return [f for group in groups for f in group()]


# A case


@dataclass
class Row:
    "What became of a format's cases."

    name: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak: int = 0


def peak_memory(reset=False):
    "The most bytes that this process held since the last reset."
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status)[1])


def contents_alike(a, b):
    if torch.is_tensor(a):
        return (
            torch.is_tensor(b) and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(contents_alike(a[k], b[k]) for k in a)
        )
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def outcome(format, content, folder, good=None):
    "(accepted, what is wrong with it or '') of one file."
    path = folder / format.file
    for old in folder.iterdir():
        old.unlink()
    if format.beside:
        format.beside(folder)
    path.write_bytes(content)
    try:
        found = format.read(path)
    except NAMED as e:
        said = f'{type(e).__name__}: {e}'
        if 'MemoryError' in said:
            return False, said
        named = re.search(format.words or re.escape(format.file.partition('.')[0]), str(e))
        return False, '' if named else f'no file is named: {said}'
    except HangError:
        return False, f'longer than {SECONDS} seconds'
    except BaseException as e:
        return False, f'{type(e).__name__}: {e}'
    if good is not None and not contents_alike(good, found):
        return True, 'another content was accepted'
    return True, ''


def run_files(formats, cases, seed, faults):
    "Runs so many cases, the same share of each format; yields a row a format."
    signal.signal(signal.SIGPROF, interrupted)
    with tempfile.TemporaryDirectory() as place:
        os.environ['FDSL_DATA_ROOT'] = str(Path(place) / 'data')
        folder = Path(place) / 'case'
        folder.mkdir()
        for format in formats:
            good = {}
            for n, content in enumerate(format.seeds):
                accepted, wrong = outcome(format, content, folder)
                if not accepted or wrong:
                    faults.append(f'{format.name}: the good file is refused: {wrong}')
                if format.exact:
                    good[n] = format.read(folder / format.file)
            row = Row(format.name)
            for case in range(-len(format.lies), cases // len(formats)):
                rng = random.Random(f'{seed} {format.name} {case}')
                n = rng.randrange(len(format.seeds))
                lie = case < 0
                content = format.lies[case] if lie else spoilt(format.seeds[n], rng, format.is_text)
                before, started = peak_memory(reset=True), time.process_time()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                accepted, wrong = outcome(format, content, folder, None if lie else good.get(n))
                signal.setitimer(signal.ITIMER_PROF, 0)
                row.slowest = max(row.slowest, time.process_time() - started)
                taken = peak_memory() - before
                row.peak = max(row.peak, taken)
                row.cases += 1
                row.accepted += accepted
                row.refused += not accepted
                if taken > BYTES:
                    wrong = f'{taken} bytes'
                if wrong:
                    faults.append(f'{format.name}, case {case}: {wrong[:300]}')
            yield row


# Values of parameters

VALUES = [
    0,
    1,
    -1,
    2,
    3,
    100,
    2**31,
    2**32,
    2**63,
    10**30,
    0.0,
    0.1,
    0.5,
    1.0,
    1.5,
    -0.5,
    1e-300,
    1e300,
]
VALUES += [
    float('nan'),
    float('inf'),
    -float('inf'),
    '',
    'xx',
    '1',
    'nan',
    'true',
    'é',
    '{0..3}',
    '../x',
    'a\0b',
]
VALUES += [
    True,
    False,
    [],
    [1],
    [0.5, 0.1],
    [None],
    [[[]]],
    ['lr'],
    {},
    {'a': 1},
    {3: 4},
    {'lr': float('nan')},
    {'': {}},
]
VALUES += ['x' * 10_000, '<img src=x onerror=alert(1)>', 'pipe:touch exploded']


def run_values(cases, seed, faults):
    "So many values of parameters over all run notebooks, one, two or three at a time."
    rng, row = random.Random(f'{seed} values'), Row('parameters')
    declared = {name: list(read_parameters(name).values()) for name in run_notebooks()}
    paths = {name: find_notebook(name) for name in declared}
    while row.cases < cases:
        notebook = rng.choice(list(declared))
        chosen = rng.sample(declared[notebook], rng.choice((1, 1, 2, 3)))
        given = {p.name: rng.choice(VALUES) for p in chosen}
        started = time.process_time()
        try:
            check_values(paths[notebook], dict(given))
            row.accepted += len(given)
        except (TypeError, *NAMED) as e:
            row.refused += len(given)
            if not any(name in str(e) for name in given):
                faults.append(f'{notebook} {str(given)[:200]}: no parameter is named: {e}')
        except BaseException as e:
            faults.append(f'{notebook} {str(given)[:200]}: {type(e).__name__}: {e}')
        row.slowest = max(row.slowest, time.process_time() - started)
        row.cases += len(given)
    return row


def notebooks_read_once():
    "Reading a notebook takes longer than checking a value, and does not depend on it."
    for name in (
        '_read',
        'read_parameters',
        'edited_parameters',
        'default_parameters',
        '_names_read',
    ):
        setattr(parameters, name, lru_cache(None)(getattr(parameters, name)))


def table(rows):
    lines = [
        f'{"format":<24} {"cases":>6} {"accepted":>8} {"refused":>8} {"slowest":>8} {"peak":>8}'
    ]
    for r in rows:
        counts = f'{r.cases:>6} {r.accepted:>8} {r.refused:>8}'
        lines.append(f'{r.name:<24} {counts} {r.slowest:>6.2f} s {r.peak / 1e6:>5.0f} MB')
    return '\n'.join(lines)


def campaign(cases, values, seed, only=''):
    "Prints the table and the faults; returns how many faults there were."
    warnings.simplefilter('ignore')
    logging.disable()
    faulthandler.enable()
    torch.set_num_threads(1)
    faults, rows = [], []
    held = resource.getrlimit(resource.RLIMIT_AS)
    now = int(re.search(r'VmSize:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
    formats = [f for f in all_formats() if re.search(only, f.name)]
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * BYTES, held[1]))
    rows.extend(run_files(formats, cases, seed, faults))
    if values:
        notebooks_read_once()
        rows.append(run_values(values, seed, faults))
    total = Row(
        'together', *(sum(getattr(r, k) for r in rows) for k in ('cases', 'accepted', 'refused'))
    )
    total.slowest, total.peak = max(r.slowest for r in rows), max(r.peak for r in rows)
    print(table([*rows, total]))
    kinds = Counter(re.sub(r'\d+', 'N', f)[:120] for f in faults)
    print(f'{len(faults)} faults')
    for fault in faults[:40]:
        print(' ', fault)
    if len(faults) > 40:
        for kind, n in kinds.most_common(30):
            print(f'  {n} × {kind}')
    return len(faults)


if __name__ == '__main__':
    sys.exit(bool(campaign(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])))
