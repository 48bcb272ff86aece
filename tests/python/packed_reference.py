"""A second decoder of packed units, written from the description of the format alone.

Slow and plain: numbers are read with `struct`, weights are decoded one at a time.
"""

from __future__ import annotations

import functools
import struct

HEADER = struct.Struct("<QIIQQIIQQQ")
ENTRY = struct.Struct("<IIQQQII16sQ")
MAGIC = int.from_bytes(b"TOPACKED", "little")
RAW, E4P, E33 = range(3)


MASK = 2**64 - 1
MULTIPLIER = 0x9E3779B97F4A7C15
CHECKSUM_AT = 40


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _words(blob: bytes, begin: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}I", blob, begin)


def _e4p_exponents(blob: bytes, codes: int, count: int, palette: bytes) -> list[int]:
    nibbles = (blob[codes + index // 2] >> (4 * (index % 2)) & 15 for index in range(count))
    return [palette[nibble] for nibble in nibbles]


def _e33_code(words: tuple[int, ...], index: int) -> int:
    """The code of one weight of a group, whose 96 words are given."""
    quarter, lane, nibble = index // 256, index % 256 // 8, index % 8
    if quarter < 3:
        return words[32 * quarter + lane] >> (4 * nibble) & 7
    bits = [words[32 * j + lane] >> (4 * nibble + 3) & 1 for j in range(3)]
    return bits[0] + 2 * bits[1] + 4 * bits[2]


def _e33_group(
    blob: bytes, words_at: int, palette: bytes, escapes: int, first: int
) -> tuple[list[int], int]:
    """The exponents of 1024 weights, and how many of them were escapes."""
    words = _words(blob, words_at, 96)
    codes = [_e33_code(words, index) for index in range(1024)]
    exponents = [palette[code] for code in codes]
    number = first
    for lane in range(32):
        for quarter in range(4):
            for nibble in range(8):
                index = 256 * quarter + 8 * lane + nibble
                if codes[index] == 7:
                    stream = int.from_bytes(blob[escapes : escapes + 3 * number // 8 + 2], "little")
                    exponents[index] = palette[8 + (stream >> (3 * number) & 7)]
                    number += 1
    return exponents, number - first


def _tensor(blob: bytes, entry: tuple[int, ...], palette: bytes) -> bytes:
    codec, _, _, size, data, num_escapes, num_patches = entry
    if codec == RAW:
        return blob[data : data + size]
    count = size // 2
    groups, tiles = -(-count // 1024), -(-count // 4096)
    codes = data + 1024 * groups
    if codec == E4P:
        exponents = _e4p_exponents(blob, codes, count, palette)
        end = codes + 512 * groups
    else:
        offsets = codes + 384 * groups
        escapes = _up(offsets + 4 * (groups + 1), 16)
        firsts = _words(blob, offsets, groups + 1)
        exponents = []
        for group in range(groups):
            of_group, found = _e33_group(blob, codes + 384 * group, palette, escapes, firsts[group])
            assert firsts[group] + found == firsts[group + 1]
            exponents += of_group
        assert firsts[groups] == num_escapes
        end = _up(escapes + 4 * (-(-3 * num_escapes // 32) + 1), 16)
    weights = [
        (byte & 0x80) << 8 | exponent << 7 | byte & 0x7F
        for byte, exponent in zip(blob[data : data + count], exponents, strict=False)
    ]
    patches = _up(end + 4 * (tiles + 1), 16)
    firsts = _words(blob, end, tiles + 1)
    assert firsts[0] == 0
    assert firsts[tiles] == num_patches
    for tile in range(tiles):
        begin, length = patches + 4 * firsts[tile], firsts[tile + 1] - firsts[tile]
        for word in _words(blob, begin, length):
            weights[4096 * tile + (word & 0xFFFF)] = word >> 16
    return struct.pack(f"<{count}H", *weights)


def _mix(total: int, word: int) -> int:
    product = (total ^ word) * MULTIPLIER
    return product & MASK ^ product >> 64


def _block_sum(number: int, block: bytes) -> int:
    lanes = [(4 * number + lane + 1) * MULTIPLIER & MASK for lane in range(4)]
    for index, word in enumerate(struct.unpack("<32Q", block.ljust(256, b"\0"))):
        lanes[index % 4] = _mix(lanes[index % 4], word)
    return functools.reduce(_mix, lanes, number)


def checksum(data: bytes) -> int:
    """That of bytes, as Note [The checksum] defines it."""
    blocks = (data[begin : begin + 256] for begin in range(0, len(data), 256))
    return _mix(sum(_block_sum(*block) for block in enumerate(blocks)) & MASK, len(data))


def blob_checksum(blob: bytes) -> int:
    """That of a packed unit: with zeros where it stands."""
    return checksum(blob[:CHECKSUM_AT] + bytes(8) + blob[CHECKSUM_AT + 8 :])


def decode(blob: bytes, place_bytes: int, filler: int = 0) -> bytes:
    """Returns the place, with `filler` where no tensor lies."""
    magic, version, num_tensors, size, unpacked, num_tiles, zero, found, *_ = HEADER.unpack_from(
        blob
    )
    assert (magic, version, size, unpacked, zero) == (MAGIC, 3, len(blob), place_bytes, 0)
    assert found == blob_checksum(blob)
    place = bytearray([filler]) * place_bytes
    tiles = 0
    for index in range(num_tensors):
        *entry, palette, _ = ENTRY.unpack_from(blob, HEADER.size + ENTRY.size * index)
        tensor = _tensor(blob, tuple(entry), palette)
        _, first_tile, offset, length, data, _, _ = entry
        assert first_tile == tiles
        assert data % 256 == 0
        assert len(tensor) == length
        place[offset : offset + length] = tensor
        tiles += -(-length // 8192)
    assert num_tiles == tiles
    return bytes(place)
