"""What is damaged is noticed and named: bits of checkpoints, pictures in folders, shards cut short.

And what cannot be is refused at the start: a fine-tuning without images to judge it by, a step of
an experiment that would fail hours later.
"""

import argparse
import io
import os
import random
import re
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdsl_nb.app.experiments import planned
from fdsl_nb.app.parameters import read_parameters
from fdsl_nb.app.runs import start_run
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.data.datasets import open_dataset, open_split
from fdsl_nb.formulas.layout import encode
from fdsl_nb.data.shards import ArchiveDataset, class_number, decode
from fdsl_nb.data.streams import StreamedShards, records
from fdsl_nb.models.checkpoints import (
    CheckpointError,
    export_model,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from fdsl_nb.models.models import create_model

SMALL = dict(patch_size=8, depth=1, embed_dim=24, num_heads=2)


def network(seed=0):
    return create_model('vit_tiny_patch16_224', 3, 32, seed=seed, **SMALL)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "What training leaves: weights, the optimizer's state, settings, the kit's own entries."
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return save_checkpoint(
        tmp_path_factory.mktemp('run') / 'last.pth.tar',
        model,
        arch='vit_tiny_patch16_224',
        epoch=3,
        optimizer=optimizer,
        metric=71.5,
        args=dict(lr=1e-3),
        extra=dict(fdsl=dict(steps_done=3, best=None, sums=[[1.0, 2]])),
    )


def same(a, b):
    "To the bit, with all types and in the same order."
    if torch.is_tensor(a):
        alike = torch.is_tensor(b) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, argparse.Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def flipped(whole, bit, path):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('where', ['anywhere', 'in headers'])
def test_a_flipped_bit_is_noticed_or_changes_nothing(where, checkpoint, tmp_path):
    whole, expected = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    rng = random.Random(0)
    first = range(8 * 3000)  # the pickle and its header
    last = range(8 * (len(whole) - 6000), 8 * len(whole))  # the list of members
    places = [range(8 * len(whole))] if where == 'anywhere' else [first, last]
    noticed = 0
    for n in range(400):
        bit = rng.choice(places[n % len(places)])
        path = flipped(whole, bit, tmp_path / 'last.pth.tar')
        try:
            found = read_checkpoint(path)
        except CheckpointError as e:
            noticed += 1
            assert "'last.pth.tar'" in str(e) and re.search('again|asks to run', str(e))
        else:
            assert same(expected, found), f'bit {bit}'
    assert noticed > (380 if where == 'anywhere' else 300)


def test_damage_is_named_with_member_and_remedy(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint) as archive:
        member = archive.getinfo('archive/data/7')
    whole = checkpoint.read_bytes()
    path = flipped(whole, 8 * (member.header_offset + 200), tmp_path / 'last.pth.tar')
    (tmp_path / 'model_best.pth.tar').hardlink_to(path)  # the same bytes are no remedy
    (tmp_path / 'checkpoint-2.pth.tar').write_bytes(whole)
    words = r"'last.pth.tar' is damaged at 'archive/data/7' .*or use another, .*'checkpoint-2.pth"
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)
    path = flipped(whole, 8 * (member.header_offset + 200), tmp_path / 'pytorch_model.bin')
    with pytest.raises(CheckpointError, match="'pytorch_model.bin' is damaged"):
        load_weights(network(), f'local-dir:{tmp_path}')


def pickled(path, instructions):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', instructions)
        archive.writestr('a/version', '3\n')
        archive.writestr('a/byteorder', 'little')
    return path


@pytest.mark.process
@pytest.mark.parametrize(
    'instructions, words',
    [
        (b'\x80\x02}' + b')' + b'\x85' * 300_000 + b'K\x01s.', 'nests tuples'),
        (b'\x80\x02}' + b'N' + b'N\x86' * 300_000 + b'K\x01s.', 'nests tuples'),
        (b'\x80\x02}(' + b'(' * 300_000 + b't' * 300_000 + b'K\x01u.', 'nests tuples'),
        (b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + bytes([0, 0, 0, 0, 32]) + b'\x85R.', 'asks'),
    ],
    ids=['tuples', 'pairs', 'marks', 'bytearray'],
)
def test_a_pickle_takes_no_memory_and_no_stack(instructions, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(pickled(tmp_path / 'a.pth', instructions))


def test_a_tensor_is_not_larger_than_its_file(tmp_path):
    torch.save(dict(a=torch.zeros(1).expand(10**6, 10**6)), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r"'a.pth' says that a tensor has shape \(1000000, 1"):
        read_checkpoint(tmp_path / 'a.pth')
    torch.save(dict(a=torch.zeros(9, device='meta')), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="'a.pth' .*meta"):
        read_checkpoint(tmp_path / 'a.pth')


def test_a_compressed_checkpoint_is_no_bomb(checkpoint, tmp_path):
    with (
        zipfile.ZipFile(checkpoint) as old,
        zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match='compressed|more is in it than the file holds'):
        read_checkpoint(tmp_path / 'a.pth')


def test_an_export_in_another_memory_order_is_read(tmp_path):
    model = create_model('resnet18', 3, channels=(8, 16, 16, 32), seed=0)
    export_model(tmp_path, model.to(memory_format=torch.channels_last))
    again = create_model('resnet18', 3, channels=(8, 16, 16, 32), seed=1)
    assert load_weights(again, f'local-dir:{tmp_path}').missing == ()


# Pictures


def folder_of_pictures(root, splits=('train',)):
    for split in splits:
        for c in 'ab':
            (root / split / c).mkdir(parents=True)
            for n in range(3):
                Image.new('L', (8, 8), 50 * n).save(root / split / c / f'{n}.png')
    return root


def test_a_damaged_picture_in_a_folder_is_named_and_can_be_skipped(tmp_path):
    root = folder_of_pictures(tmp_path, ('train', 'val'))
    for split in ('train', 'val'):
        picture = root / split / 'a' / '1.png'
        picture.write_bytes(picture.read_bytes()[:45])
        with pytest.raises(ValueError, match=f'{split}/a/1.png is damaged .*on_error="skip"'):
            open_split(str(root), split)[1]
        images = open_split(str(root), split, on_error='skip')
        with pytest.warns(UserWarning, match='skipped: .*1.png'):
            assert images[1][0].getpixel((0, 0)) == 100
        assert int(images.skipped) == 1
    named = open_split('digits', 'val', val_dir=str(root), on_error='skip')
    with pytest.warns(UserWarning, match='skipped'):
        named[1]
    with pytest.raises(ValueError, match="on_error='leave' is not known"):
        open_dataset(str(root), on_error='leave')


def test_what_a_picture_claims_is_limited(tmp_path, monkeypatch):
    from fdsl_nb.data.loading import pixel_limit

    root = folder_of_pictures(tmp_path)
    monkeypatch.setenv('FDSL_MAX_IMAGE_PIXELS', '63')
    pixel_limit.cache_clear()
    try:
        with pytest.raises(ValueError, match='0.png .*max_image_pixels'):
            open_dataset(str(root))[0]
        for form, name in (('png', 'a.png'), ('zstd', 'a.npy.zst')):
            with pytest.raises(ValueError, match=f'{name} is damaged .*max_image_pixels'):
                decode(encode(np.zeros((40, 40), np.uint8), form), name)
        with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('a/1.png', bytes(10**6))
        with pytest.raises(ValueError, match='a.zip: .* unpacks to more than'):
            ArchiveDataset(tmp_path / 'a.zip')[0]
    finally:
        monkeypatch.undo()
        pixel_limit.cache_clear()
        pixel_limit()


def test_a_picture_is_of_a_format_that_runs_nothing(tmp_path):
    root = folder_of_pictures(tmp_path)
    (root / 'train' / 'a' / '0.png').write_bytes(
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'
    )
    with pytest.raises(ValueError, match='0.png is damaged .UnidentifiedImageError'):
        open_dataset(str(root))[0]


# Shards


def shard(path, records=4):
    picture = encode(np.zeros((8, 8), np.uint8))
    with tarfile.open(path, 'w') as tar:
        for n in range(records):
            for suffix, data in (('cls', b'%d' % (n % 2)), ('png', picture)):
                info = tarfile.TarInfo(f'{n:04d}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.process
@pytest.mark.parametrize('cut', [512, 1024, 1536, 2000])
def test_a_cut_shard_is_noticed_by_a_stream_and_not_remembered(cut, tmp_path, monkeypatch):
    monkeypatch.setenv('FDSL_DATA_ROOT', str(tmp_path / 'data'))
    path = shard(tmp_path / 'a.tar')
    whole = path.read_bytes()
    path.write_bytes(whole[: 2048 + cut])
    with pytest.raises(ValueError, match='a.tar cannot be read'):
        StreamedShards([f'pipe:cat {path}'])
    path.write_bytes(whole)
    images = StreamedShards([f'pipe:cat {path}'])
    assert [images.label(i) for i in range(len(images))] == [0, 1, 0, 1]


@pytest.mark.process
def test_a_shard_that_a_server_changed_is_read_again(tmp_path, own_data_root):
    "And one that it did not change is not."
    asked = []

    class Answers(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.command)

    shard(tmp_path / 'a.tar', 4)
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Answers, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/a.tar'
        assert len(StreamedShards([url])) == len(StreamedShards([url])) == 4
        assert asked == ['HEAD', 'GET', 'HEAD']
        shard(tmp_path / 'a.tar', 6)
        os.utime(tmp_path / 'a.tar', (0, 0))  # the server tells whole seconds
        images = StreamedShards([url])
        assert [images.label(i) for i in range(len(images))] == [0, 1, 0, 1, 0, 1]
        server.shutdown()


def test_a_damaged_header_is_not_the_end_of_a_stream(tmp_path):
    path = shard(tmp_path / 'a.tar')
    damaged = bytearray(path.read_bytes())
    damaged[2048 + 100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises((ValueError, tarfile.TarError), match='nothing readable'):
        list(records(str(path)))


@pytest.mark.parametrize(
    'text', [b'-1', b'1000000', b'9' * 5000, b'one', b'', b'1.0', '²'.encode()]
)
def test_a_class_is_a_number(text):
    with pytest.raises(ValueError, match='a.tar: .cls holds'):
        class_number(text, 'a.tar')


# At the start


def test_a_fine_tuning_without_images_to_judge_it_by_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of_pictures(Path('only'))
    given = dict(dataset='only', scratch=True, run='x')
    with pytest.raises(ValueError, match="dataset='only' has neither a val nor a test split"):
        start_run('finetune', given)
    assert (
        start_run('finetune', given | dict(options=dict(valid_pct=0.3)))['valid_pct'].value == 0.3
    )


@pytest.mark.parametrize(
    'mistake, words',
    [
        (dict(finetune_data='only'), 'finetune-0: .*neither a val nor a test'),
        (dict(finetune=dict(model='resnet5x')), 'finetune-0: .*did you mean'),
        (
            dict(finetune=dict(batch_size=7), processes=2),
            'finetune-0: batch_size=7 does not divide',
        ),
        (dict(finetune=dict(val_dir='missing')), "finetune-0: .*'missing'"),
        (dict(finetune=dict(img_size=33)), 'finetune-0: img_size=33'),
        (
            dict(pretrain=dict(options=dict(model_kwargs=dict(patchsize=3)))),
            'pretrain-0: .*patchsi',
        ),
        (dict(pretrain=dict(knobs=dict(sise=3))), 'pretrain-0: .*sise=3'),
    ],
    ids=str,
)
def test_an_experiment_tries_every_step_before_the_first_runs(
    mistake, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder_of_pictures(Path('only'))
    values = {p.name: p.default for p in read_parameters('reproduce').values()}
    with pytest.raises((ValueError, OSError), match=words):
        planned(values | mistake, RunFolder('x'))
    assert not Path('x').exists()


# Sizes are compared before memory is taken: each of these was a hang, a crash or gigabytes


@pytest.mark.parametrize('text', [b'[' * 100_000, b'9' * 5000, b'[]', b'\xff', b'{"state": 5}'])
def test_a_damaged_status_is_named(text, tmp_path):
    (tmp_path / 'status.json').write_bytes(text)
    with pytest.raises(ValueError, match='status.json is damaged'):
        _ = RunFolder(tmp_path).state


def test_a_table_of_categories_is_as_wide_as_its_header(tmp_path):
    from fdsl_nb.formulas.categories import load_categories

    (tmp_path / 'c.csv').write_bytes(b'class,a,b\n' + b'1,' * 100_000)
    with pytest.raises(ValueError):
        load_categories(tmp_path / 'c.csv', ('a', 'b'))
