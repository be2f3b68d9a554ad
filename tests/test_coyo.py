"""Images with many labels: what img2dataset writes is read.

Whatever is wrong with it is named, left out or refused.
"""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import PILToTensor

from fdsl_nb.data.coyo import (
    CoyoDataset,
    MultiHot,
    example_rows,
    list_shards,
    open_coyo,
    read_index,
    scan_shard,
    seal_shards,
    write_shards,
)
from fdsl_nb.data.loading import EpochBatchSampler, eval_loader, train_loader

TEN = dict(classes=10)

pytestmark = pytest.mark.usefixtures('own_data_root')


@pytest.fixture
def sheets(tmp_path):
    rows = list(example_rows(20, np.random.default_rng(3)))
    return rows, write_shards(tmp_path / 'sheets', rows, shard_images=8)


def pack(path, records):
    "A tar of records: name → bytes."
    with tarfile.open(path, 'w') as tar:
        for name, data in records.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def jpeg(value=90):
    buffer = io.BytesIO()
    Image.new('RGB', (16, 12), (value, 60, 30)).save(buffer, 'JPEG')
    return buffer.getvalue()


def meta(**values):
    return json.dumps(values).encode()


def test_photographs_written_by_webdataset_itself(tmp_path):
    china, flower = load_sample_images().images
    both = np.concatenate([china[:200, :200], flower[:200, :200]], 1)
    pictures = [
        (china, [7, 3], [0.9, 0.02]),
        (flower, [1], [0.4]),
        (both, [7, 1, 2], [0.6, 0.3, 0.1]),
    ]
    with webdataset.TarWriter(str(tmp_path / '00000.tar')) as writer:  # as img2dataset does it
        for n, (pixels, labels, probs) in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, 'JPEG', quality=95)
            writer.write(
                {
                    '__key__': f'{n:09d}',
                    'jpg': buffer.getvalue(),
                    'txt': 'a picture',
                    'json': json.dumps(dict(labels=labels, label_probs=probs), indent=4),
                }
            )
    images = open_coyo(shards=tmp_path, threshold=0.3, **TEN)
    assert [target.nonzero().flatten().tolist() for _, target in images] == [[7], [1], [1, 7]]
    for (image, _), (pixels, _, _) in zip(images, pictures):
        assert image.mode == 'RGB' and np.abs(np.asarray(image, float) - pixels).mean() < 4
    assert images.multilabel and images.classes == [str(c) for c in range(10)]
    assert len(open_coyo(shards=tmp_path).label(0)) == 21_841


def test_lists_as_text_read_the_same(tmp_path, sheets):
    rows, paths = sheets
    text = write_shards(tmp_path / 'text', rows, shard_images=8, as_text=True)
    with tarfile.open(text[0]) as tar:
        assert isinstance(json.load(tar.extractfile('000000000.json'))['labels'], str)
    for (a, ya), (b, yb) in zip(
        CoyoDataset(paths, MultiHot(10, 0.3)), CoyoDataset(text, MultiHot(10, 0.3)), strict=True
    ):
        assert a.tobytes() == b.tobytes() and torch.equal(ya, yb)


def test_threshold_keeps_labels_and_leaves_out_images(sheets):
    rows, paths = sheets
    for threshold in (None, 0.0, 0.05, 0.5, 0.7, 0.8):
        expected = [
            [
                c
                for c, p in zip(labels, probs.astype(np.float32))
                if threshold is None or p >= np.float32(threshold)
            ]
            for _, labels, probs in rows
        ]
        images = CoyoDataset(paths, MultiHot(10, threshold))
        assert [sorted(e) for e in expected if e] == [
            images.label(i).nonzero().flatten().tolist() for i in range(len(images))
        ]
        assert images.left_out['below the threshold'] == sum(not e for e in expected)
    assert images.left_out['below the threshold'] > 0
    with pytest.raises(
        ValueError, match='3 shards hold no record that can be used.*lower the threshold'
    ):
        CoyoDataset(paths, MultiHot(10, 1.0))


def test_normalized_targets_sum_to_one(sheets):
    images = CoyoDataset(sheets[1], MultiHot(10, 0.1, normalize_label=True))
    for i in range(len(images)):
        assert (
            images.label(i).sum().item() == pytest.approx(1) and len(images.label(i).unique()) == 2
        )


BAD = {
    'has no picture': {'json': meta(labels=[1], label_probs=[0.5])},
    'has no .json': {'jpg': jpeg()},
    'cannot be read': {'jpg': jpeg(), 'json': b'{"labels": [1'},
    'that cannot be read': {'jpg': jpeg(), 'json': b'\xff\xfe\x00'},
    'json that cannot be read': {'jpg': jpeg(), 'json': b'[1, 2]'},
    'has no labels': {'jpg': jpeg(), 'json': meta(label_probs=[])},
    'no labels': {'jpg': jpeg(), 'json': meta(labels='[]', label_probs='[]')},
    'has labels that are not whole numbers': {
        'jpg': jpeg(),
        'json': meta(labels=[1.5], label_probs=[0.5]),
    },
    'labels that are not whole numbers': {
        'jpg': jpeg(),
        'json': meta(labels=['dog'], label_probs=[0.5]),
    },
    'not whole numbers': {'jpg': jpeg(), 'json': meta(labels=[[1], [2, 3]], label_probs=[0.5])},
    'has not as many numbers in label_probs': {
        'jpg': jpeg(),
        'json': meta(labels=[1, 2], label_probs=[0.5]),
    },
    'as many numbers in label_probs': {
        'jpg': jpeg(),
        'json': meta(labels=[1], label_probs='nonsense'),
    },
    'has labels outside 0 … 9': {
        'jpg': jpeg(),
        'json': meta(labels=[1, 10], label_probs=[0.5, 0.1]),
    },
    'labels outside 0 … 9': {'jpg': jpeg(), 'json': meta(labels=[-1], label_probs=[0.5])},
    'has no label_probs for the threshold': {'jpg': jpeg(), 'json': meta(labels=[1])},
}


@pytest.mark.parametrize('fault', BAD)
def test_a_bad_record_is_named_or_left_out_and_counted(tmp_path, fault):
    good = {'000000000.jpg': jpeg(), '000000000.json': meta(labels=[4], label_probs=[0.5])}
    bad = {f'000000001.{suffix}': data for suffix, data in BAD[fault].items()}
    path = pack(tmp_path / '00000.tar', good | bad)
    with pytest.raises(ValueError, match=f'00000.tar: record 000000001 .*{fault}.*on_error="skip"'):
        open_coyo(shards=path, threshold=0.1, **TEN)
    images = open_coyo(shards=path, threshold=0.1, on_error='skip', **TEN)
    assert len(images) == 1 and images.label(0).argmax() == 4
    ((reason, count),) = images.left_out.items()
    assert fault in reason and count == 1


@pytest.mark.process
def test_a_picture_that_will_not_decode(tmp_path):
    records = {
        f'00000000{n}.{suffix}': data
        for n in range(4)
        for suffix, data in (
            ('jpg', jpeg(50 * n) if n != 2 else b'not a picture'),
            ('json', meta(labels=[n])),
        )
    }
    path = pack(tmp_path / '00000.tar', records)
    images = open_coyo(shards=path, **TEN)
    with pytest.raises(ValueError, match='00000.tar, picture at byte .* is damaged'):
        images[2]
    lenient = open_coyo(shards=path, on_error='skip', **TEN)
    seen = [
        y.argmax().item()
        for _, y in DataLoader(
            lenient, batch_size=None, collate_fn=lambda pair: pair, num_workers=2
        )
    ]
    assert seen == [0, 1, 3, 3] and lenient.skipped.item() == 1


@pytest.mark.parametrize('sealed', [False, True], ids=['not sealed', 'sealed'])
def test_a_shard_cut_anywhere_is_refused(tmp_path, sealed):
    (path,) = write_shards(tmp_path / 'cut', list(example_rows(2, np.random.default_rng(0))))
    whole = path.read_bytes()
    if sealed:
        seal_shards(tmp_path / 'cut')
    end = read_index(path)[-1]
    for size in [
        *range(0, int(end['json'] + end['json_size']), 300),
        *range(0, int(end['json'] + end['json_size']), 512),
    ]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='00000.tar'):
            CoyoDataset([path], MultiHot(10))


def test_no_flipped_bit_of_a_sealed_shard_passes_for_data(tmp_path):
    (path,) = write_shards(tmp_path / 'flip', list(example_rows(2, np.random.default_rng(0))))
    seal_shards(tmp_path / 'flip')
    clean, good = (
        path.read_bytes(),
        [(x.tobytes(), y) for x, y in CoyoDataset([path], MultiHot(10))],
    )
    refused = 0
    for bit in np.random.default_rng(1).integers(0, 8 * len(clean), 250):
        data = bytearray(clean)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            for (x, y), (a, b) in zip(CoyoDataset([path], MultiHot(10)), good, strict=True):
                assert x.tobytes() == a and torch.equal(y, b), f'bit {bit}'
        except ValueError as e:
            assert '00000.tar' in str(e)
            refused += 1
    assert refused > 80


def test_a_damaged_seal_is_refused(tmp_path):
    (path,) = write_shards(tmp_path / 'seal', list(example_rows(1, np.random.default_rng(0))))
    seal_shards(tmp_path / 'seal')
    index = path.with_suffix('.index')
    clean = index.read_bytes()
    for bit in range(0, 8 * len(clean), 5):
        data = bytearray(clean)
        data[bit // 8] ^= 1 << bit % 8
        index.write_bytes(data)
        with pytest.raises(ValueError, match='00000.(index is damaged|tar has .* bytes)'):
            read_index(path)
    for size in (0, 7, 19, len(clean) - 1):
        index.write_bytes(clean[:size])
        with pytest.raises(ValueError, match='00000.index is damaged'):
            read_index(path)


def test_a_damaged_header_is_not_the_end(tmp_path, sheets):
    path = sheets[1][0]
    data = bytearray(path.read_bytes())
    data[int(scan_shard(path)[3]['picture']) - 512 + 20] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 6  # what Python's reader makes of it, without a word
    with pytest.raises(ValueError, match='00000.tar is cut off, damaged'):
        scan_shard(path)


@pytest.mark.process
def test_processes_seal_as_one_does(sheets):
    paths = sheets[1]
    seal_shards(paths[0].parent)
    alone = [p.with_suffix('.index').read_bytes() for p in paths]
    for p in paths:
        p.with_suffix('.index').unlink()
    assert seal_shards(str(paths[0].parent / '*.tar'), workers=2) == 3
    assert [p.with_suffix('.index').read_bytes() for p in paths] == alone


def test_a_second_opening_reads_no_shard(sheets, monkeypatch):
    CoyoDataset(sheets[1], MultiHot(10))
    monkeypatch.setattr(
        'fdsl_nb.data.coyo.scan_shard', lambda path: pytest.fail(f'{path} was read again')
    )
    assert len(CoyoDataset(sheets[1], MultiHot(10, 0.5))) == 20


def test_shards_by_every_kind_of_name(tmp_path, sheets):
    rows, paths = sheets
    folder, names = paths[0].parent, [str(p) for p in paths]
    for text in (folder, f'{folder}/{{00000..00002}}.tar', f'{folder}/*.tar', '::'.join(names)):
        assert list_shards(text) == names and list_shards(text, 'val') is None
    write_shards(tmp_path / 'split/train', rows[:12])
    write_shards(tmp_path / 'split/val', rows[12:])
    assert [len(open_coyo(s, shards=tmp_path / 'split', **TEN)) for s in ('train', 'val')] == [
        12,
        8,
    ]
    assert open_coyo('test', shards=tmp_path / 'split', **TEN) is None
    assert len(open_coyo('val', shards=dict(train=names[0], val=names[1]), **TEN)) == 8
    with pytest.raises(ValueError, match='can only be read in order'):
        list_shards('pipe:cat a.tar')
    with pytest.raises(FileNotFoundError, match='names no .tar'):
        list_shards(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match="on_error='skp' is not known; did you mean 'skip'"):
        open_coyo(shards=folder, on_error='skp', **TEN)


@pytest.mark.process
def test_epochs_do_not_depend_on_processes_workers_or_stops(sheets):
    images = CoyoDataset(sheets[1], MultiHot(10, 0.2))

    def epoch(rank=0, world_size=1, workers=0, first=0):
        batches = EpochBatchSampler(len(images), 4, 5, rank, world_size)
        batches.epoch, batches.first = 2, first
        return list(train_loader(images, PILToTensor(), batches, workers))

    alone, two = epoch(), [epoch(rank, 2, workers=rank) for rank in range(2)]
    assert len(alone) == 5 and alone[0][1].shape == (4, 10) and alone[0][1].dtype == torch.float32
    for batch, first, second in zip(alone, *two, strict=True):
        for n in range(2):
            assert torch.equal(batch[n][0::2], first[n]) and torch.equal(batch[n][1::2], second[n])
    for later, before in zip(epoch(workers=2, first=3), alone[3:], strict=True):
        assert torch.equal(later[0], before[0]) and torch.equal(later[1], before[1])
    assert sum(
        len(y) for r in range(3) for _, y in eval_loader(images, PILToTensor(), 4, r, 3)
    ) == len(images)
