"""TensorFlow's bundles: written by our own writer and by TensorFlow, complete and damaged."""

import random, shutil
from pathlib import Path
import pytest, torch
from tensorflow_bundles import message, table, write_bundle
from fdsl_nb.models.bundle import (
    DTYPES,
    SLOT,
    VALUE,
    bundle_tree,
    check_bundle,
    fields,
    open_bundle,
    read_index,
    slots,
    varint,
)
from fdsl_nb.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fdsl_nb.models.models import create_model

GOLDEN = Path(__file__).parent / 'golden'
DATA = 'coyo_ft.data-00000-of-00001'


def numbers(dtype, *shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) * 200).to(dtype)


TENSORS = {
    f'layer/{i}/{dtype}'.replace('torch.', ''): numbers(dtype, *shape)
    for dtype in DTYPES.values()
    for i, shape in enumerate([(), (3,), (2, 5), (2, 0, 3), (2, 3, 4, 5)])
}


@pytest.mark.parametrize('snappy', [False, True], ids=['plain', 'snappy'])
@pytest.mark.parametrize('shards, rows', [(1, 1000), (1, 3), (4, 7)])
def test_every_type_and_shape_comes_back(tmp_path, snappy, shards, rows):
    path = write_bundle(
        tmp_path / 'x.index',
        TENSORS | {'graph': [b'object', b'', b'graph' * 100]},
        shards,
        snappy,
        rows,
    )
    bundle = open_bundle(path)
    assert set(bundle) == {key + VALUE for key in TENSORS} and len(bundle.shards) == shards
    for key, value in TENSORS.items():
        found = bundle[key + VALUE]
        assert (found.dtype, found.shape) == (value.dtype, value.shape) and torch.equal(
            found, value
        )
    assert check_bundle(path) == sum(file.stat().st_size for file in bundle.shards)


def test_texts_are_no_tensors(tmp_path):
    bundle = open_bundle(
        write_bundle(tmp_path / 'x.index', dict(text=[b'abc'], weight=torch.ones(2)))
    )
    assert (
        list(bundle) == ['weight' + VALUE]
        and 'text' + VALUE not in bundle
        and 'text' + VALUE in bundle.entries
    )
    with pytest.raises(CheckpointError, match='is of type 7'):
        bundle['text' + VALUE]
    with pytest.raises(KeyError):
        bundle['absent']


def test_the_file_of_tensorflow():
    bundle = open_bundle(GOLDEN / 'coyo_ft.index')
    assert (len(bundle), slots(bundle), check_bundle(bundle.path)) == (
        84,
        {'momentum': 40},
        (GOLDEN / DATA).stat().st_size,
    )
    kernel = bundle['backbone/embedding/kernel' + VALUE]
    assert kernel.shape == (16, 16, 3, 64) and kernel.isfinite().all()
    assert bundle_tree(bundle, 1).splitlines()[0].split() == [
        'backbone',
        '76',
        'tensors',
        '939,520',
        'bytes',
    ]


def test_only_what_is_asked_for_is_read(tmp_path):
    path = write_bundle(tmp_path / 'x.index', dict(good=torch.ones(4), spoilt=torch.ones(4)))
    data = tmp_path / 'x.data-00000-of-00001'
    data.write_bytes(data.read_bytes()[:16] + b'\xff' + data.read_bytes()[17:])
    bundle = open_bundle(path)
    assert torch.equal(bundle['good' + VALUE], torch.ones(4))
    with pytest.raises(CheckpointError, match=f"{data.name}' is damaged at 'spoilt{VALUE}'"):
        bundle['spoilt' + VALUE]
    with pytest.raises(CheckpointError, match='spoilt'):
        check_bundle(path)


def test_tensors_are_our_own_to_change(tmp_path):
    path = write_bundle(tmp_path / 'x.index', dict(weight=torch.ones(4)))
    open_bundle(path)['weight' + VALUE].zero_()
    assert open_bundle(path)['weight' + VALUE].sum() == 4


# Damage


def same(a, b):
    return a.entries == b.entries and a.shards == b.shards


@pytest.fixture
def copy(tmp_path):
    for file in GOLDEN.glob('coyo_ft.*'):
        shutil.copy(file, tmp_path)
    return tmp_path


def spoil(file, at, bit):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_no_flipped_bit_of_the_index_goes_unnoticed(tmp_path):
    path = write_bundle(tmp_path / 'x.index', dict(a=torch.ones(4), b=torch.arange(3)), snappy=True)
    whole, content = open_bundle(path), path.read_bytes()
    refused = 0
    for at in range(len(content)):
        for bit in range(8):
            spoil(path, at, bit)
            try:
                assert same(
                    open_bundle(path), whole
                )  # the unused block of metadata, or the padding of the footer
            except CheckpointError as e:
                refused += 1
                assert 'x.index' in str(e) and 'download' in str(e)
            path.write_bytes(content)
    assert refused > 8 * (len(content) - 70)


def test_flipped_bits_of_the_published_layout(copy):
    rng, index, data = random.Random(0), copy / 'coyo_ft.index', copy / DATA
    for file, tries in ((index, 150), (data, 60)):
        content, whole = file.read_bytes(), open_bundle(index)
        for _ in range(tries):
            spoil(file, rng.randrange(len(content)), rng.randrange(8))
            try:
                check_bundle(index)
                assert file == index and same(open_bundle(index), whole)
            except CheckpointError as e:
                assert file.name in str(e)
            file.write_bytes(content)


@pytest.mark.parametrize('length', [0, 1, 47, 48, 3000, 6443, 6491])
def test_index_cut_short(copy, length):
    index = copy / 'coyo_ft.index'
    index.write_bytes(index.read_bytes()[:length])
    with pytest.raises(
        CheckpointError, match="'coyo_ft.index' is damaged or no index.*download it again"
    ):
        open_bundle(index)


@pytest.mark.parametrize('length', [0, 100, 500_000, 961_145])
def test_data_cut_short_are_noticed_at_once(copy, length):
    data = copy / DATA
    data.write_bytes(data.read_bytes()[:length])
    message = (
        rf"{DATA}' is cut short: it ends at byte {length}, '[\w/.-]+' at \d+; "
        'copy or download it again'
    )
    with pytest.raises(CheckpointError, match=message):
        open_bundle(copy / 'coyo_ft.index')


def test_data_that_shrink_after_opening(copy):
    bundle, data = open_bundle(copy / 'coyo_ft.index'), copy / DATA
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{DATA}' ends within 'backbone/embedding/kernel"):
        bundle['backbone/embedding/kernel' + VALUE]


def test_missing_data_file(tmp_path):
    path = write_bundle(tmp_path / 'x.index', dict(a=torch.ones(1), b=torch.ones(1)), shards=2)
    (tmp_path / 'x.data-00001-of-00002').unlink()
    with pytest.raises(
        CheckpointError,
        match="'x.data-00001-of-00002' is not beside 'x.index', which needs 2 data files",
    ):
        open_bundle(path)


SPOILT = [
    (dict(n=1, value=23), 'is of type 23'),
    (dict(n=2, value=message((2, message((1, 5))))), r'16 bytes for shape \(5,\)'),
    (dict(n=3, value=9), 'in data file 9 of 1'),
    (dict(n=4, value=10**15), 'is cut short'),
    (dict(n=7, value=b'slice'), 'stored in slices'),
    (dict(n=1, value=b'no'), 'field 1 is no number'),
]


@pytest.mark.parametrize('change, answer', SPOILT, ids=[answer for _, answer in SPOILT])
def test_entries_that_cannot_be(tmp_path, change, answer):
    "Wrong, though every checksum is right."

    def edit(key, fields):
        return [f for f in fields if f[0] != change['n']] + [(change['n'], change['value'])]

    path = write_bundle(tmp_path / 'x.index', dict(a=torch.ones(4)), edit=edit)
    with pytest.raises(CheckpointError, match=answer):
        open_bundle(path)['a' + VALUE]


def test_tables_that_are_no_checkpoints(tmp_path):
    for name, rows, answer in [
        ('other', [(b'key', b'value')], 'it has no header'),
        ('big', [(b'', message((1, 1), (2, 1)))], 'big-endian'),
    ]:
        (tmp_path / f'{name}.index').write_bytes(table(rows))
        with pytest.raises(CheckpointError, match=answer):
            read_index(tmp_path / f'{name}.index')


BLOCKS = {
    'kind 2, neither plain': lambda b: b[:-1] + b'\2',
    'a row runs over': lambda b: b'\5' + b[1:],
    'more than 64 bits': lambda b: b'\xff' * 12 + b[-9:],
    'shorter than its own ending': lambda b: b'\0',
    'snappy': lambda b: b'\xff' * 9 + b'\1',
    'snappy: ': lambda b: b'\xff\xff\xff\xff\x0f' + b[1:-1] + b'\1',
}


@pytest.mark.parametrize('answer', BLOCKS)
def test_blocks_that_cannot_be(tmp_path, answer):
    "Wrong, though every checksum is right."
    (tmp_path / 'x.index').write_bytes(
        table([(b'', message((1, 1))), (b'key', message((1, 1)))], spoil=BLOCKS[answer])
    )
    with pytest.raises(CheckpointError, match=f"'x.index' is damaged or no index.*{answer}"):
        open_bundle(tmp_path / 'x.index')


@pytest.mark.parametrize('broken', [b'\x80', b'\x0a\x05ab', b'\x0d\x01', b'\x0b', b'\xff' * 12])
def test_broken_messages(broken):
    with pytest.raises(ValueError):
        fields(broken)


def test_numbers_end_within_64_bits():
    assert varint(b'\xff' * 9 + b'\x01', 0) == (2**64 - 1, 10)
    with pytest.raises(ValueError, match='more than 64 bits'):
        varint(b'\xff' * 10 + b'\x01', 0)


# Through the one door


def test_the_door_answers_by_name(copy):
    model = create_model('vit_tiny_patch16_224', 10, 64)
    with pytest.raises(
        CheckpointError, match="is the data of a TensorFlow checkpoint; give 'coyo_ft.index'"
    ):
        load_weights(model, copy / DATA)
    spoil(copy / 'coyo_ft.index', 100, 0)
    with pytest.raises(CheckpointError, match="'coyo_ft.index' is damaged"):
        load_weights(model, copy / 'coyo_ft.index')


def test_bundles_of_other_programs(tmp_path):
    path = write_bundle(
        tmp_path / 'x.index',
        {'dense/kernel': torch.ones(2, 2), f'dense/kernel{SLOT}optimizer/m': torch.ones(2, 2)},
    )
    assert len(read_checkpoint(path)) == 2
    with pytest.raises(CheckpointError, match="'x.index' holds 'dense/kernel.*none of the layouts"):
        load_weights(create_model('vit_tiny_patch16_224', 10, 64), path)
