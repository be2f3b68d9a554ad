"""Writes TensorFlow's bundles for tests: plain or Snappy, with any number of blocks and files."""

import struct
from pathlib import Path
import cramjam, torch
from fdsl_nb.models.bundle import DTYPES, MAGIC, TEXT, VALUE, masked_crc

NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def message(*fields):
    "A Protocol Buffers message of (field, value): an int, bytes, or a checksum as ('crc', int)."
    out = b''
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, tuple):
            out += varint(number << 3 | 5) + struct.pack('<I', value[1])
        elif value:
            out += varint(number << 3) + varint(value)
    return out


def block(rows, restart=16):
    body, restarts, before = b'', [], b''
    for i, (key, value) in enumerate(rows):
        shared = 0
        if i % restart == 0:
            restarts.append(len(body))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        body += (
            varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        )
        before = key
    restarts = restarts or [0]
    return body + struct.pack(f'<{len(restarts)}I', *restarts) + struct.pack('<I', len(restarts))


def table(rows, snappy=False, rows_in_block=50, spoil=lambda stored: stored):
    "An index file: blocks of rows, metadata, list of blocks, footer; `spoil` may change a block."
    out, places = b'', []

    def store(content):
        nonlocal out
        stored = bytes(cramjam.snappy.compress_raw(content)) + b'\1' if snappy else content + b'\0'
        stored = spoil(stored)
        place = varint(len(out)) + varint(len(stored) - 1)
        out += stored + struct.pack('<I', masked_crc(stored))
        return place

    for first in range(0, len(rows), rows_in_block):
        part = rows[first : first + rows_in_block]
        places.append((part[-1][0], store(block(part))))
    footer = store(block([])) + store(block(places, restart=1))
    return out + footer.ljust(40, b'\0') + struct.pack('<Q', MAGIC)


def raw_of(value):
    "Bytes to store, bytes that the checksum covers, TensorFlow's type, shape."
    if not torch.is_tensor(value):  # a list of texts
        sums = b''.join(struct.pack('<I', len(text)) for text in value)
        rest = struct.pack('<I', masked_crc(sums)) + b''.join(value)
        lengths = b''.join(varint(len(text)) for text in value)
        return lengths + rest, sums + rest, TEXT, (len(value),)
    raw = b''
    if value.numel():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw, raw, NUMBERS[value.dtype], tuple(value.shape)


def write_bundle(
    path,
    tensors,
    shards=1,
    snappy=False,
    rows_in_block=50,
    names=lambda key: key + VALUE,
    edit=lambda key, fields: fields,
):
    "Write a bundle; tensors go to the data files in turn, `edit` may spoil the fields of an entry."
    path, data = Path(path), [b''] * shards
    rows = [(b'', message((1, shards), (3, message((1, 1)))))]
    for i, (key, value) in enumerate(sorted(tensors.items())):
        raw, summed, dtype, shape = raw_of(value)
        shape = b''.join(message((2, message((1, n)))) for n in shape)
        fields = [
            (1, dtype),
            (2, shape),
            (3, i % shards),
            (4, len(data[i % shards])),
            (5, len(raw)),
            (6, ('crc', masked_crc(summed))),
        ]
        data[i % shards] += raw
        rows.append((names(key).encode(), message(*edit(key, fields))))
    path.write_bytes(table(sorted(rows), snappy, rows_in_block))
    for i, content in enumerate(data):
        path.with_name(f'{path.stem}.data-{i:05}-of-{shards:05}').write_bytes(content)
    return path
