"""Numbers as a sign and a magnitude of a few bits: (m + 1/2) * step, with m from 0 on.

What sparse and lowrank keep of a tensor is written this way, with one bit as signs alone. No code means 0: a number
that is kept is worth it.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorwire.codecs.stage import Bytes
from tensorwire.errors import FormatError

# From where on magnitudes are all the same, in multiples of their mean, by their bits; with 16, from the largest on.
_CLIP: Final = {1: 2.0, 2: 2.0, 4: 4.0, 8: 32.0}
_WHOLE: Final = 2.0**32
_BYTE: Final = 8
_WORTH_A_TABLE: Final = 1 << 11  # numbers, from where on what each byte means is worked out first
_BLOCK: Final = 1 << 14  # numbers that are worked on at a time, which make whole bytes: they stay in the caches

Codes = npt.NDArray[np.uint16]
Float32 = npt.NDArray[np.float32]


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-count * bits // _BYTE)


def step_of(values: Float32, bits: int) -> float:
    """The difference between neighbouring magnitudes, a float32 that suits these numbers; 0 where all are 0.

    Follows from the mean magnitude of those that are not 0, which is taken in whole numbers, so that it is the same
    in whatever order a machine adds.
    """
    top = max((float(np.abs(part).max()) for part in _blocks(values)), default=0.0)
    if top == 0:
        return 0.0
    total = count = 0
    for part in _blocks(values):
        total += int(np.rint(np.abs(part).astype(np.float64) / top * _WHOLE).astype(np.int64).sum())
        count += int(np.count_nonzero(part))
    most = top if bits > 1 else 2 * top
    return float(np.float32(min(_CLIP.get(bits, np.inf) * (total / count / _WHOLE * top), most) / (1 << (bits - 1))))


def pack(values: Float32, steps: Float32, bits: int) -> Bytes:
    """The codes of numbers, one behind the other, from the lowest bit of the first byte on. `steps`: one or as many.

    The highest bit of a code is the sign, the others are the magnitude.
    """
    parts = [np.empty(0, np.uint8)]
    parts += [
        _packed(_codes_of(part, step, bits), bits) for part, step in zip(_blocks(values), _steps(steps), strict=False)
    ]
    return np.concatenate(parts)


def unpack(data: Bytes, steps: Float32, count: int, bits: int) -> Float32:
    """The numbers that `data`, of the right length, stands for. `steps`: one or `count`. Raises FormatError."""
    values = np.empty(count, np.float32)
    if steps.size == 1 and bits < _BYTE and count >= _WORTH_A_TABLE:
        _check_end(data, count, bits)
        # What each byte stands for.
        table = _numbers(_unpacked(np.arange(256, dtype=np.uint8), bits), steps, bits).reshape(256, -1)
        for part, packed in zip(_blocks(values), _packed_blocks(data, bits), strict=True):
            part[:] = table[packed].reshape(-1)[: part.size]
        return values
    for part, codes, step in zip(_blocks(values), code_blocks(data, count, bits), _steps(steps), strict=False):
        part[:] = _numbers(codes, step, bits)
    return values


def _numbers(codes: Codes, step: Float32, bits: int) -> Float32:
    values: Float32 = (codes & np.uint16((1 << (bits - 1)) - 1)).astype(np.float32)
    values += np.float32(0.5)
    values *= step
    values[codes >> np.uint16(bits - 1) != 0] *= np.float32(-1)
    return values


def code_blocks(data: Bytes, count: int, bits: int) -> Iterator[Codes]:
    """The codes in `data`, some at a time. Raises FormatError."""
    _check_end(data, count, bits)
    for number, packed in enumerate(_packed_blocks(data, bits)):
        yield _unpacked(packed, bits)[: count - number * _BLOCK]


def _packed_blocks(data: Bytes, bits: int) -> Iterator[Bytes]:
    """What `_blocks` are packed in."""
    size = packed_size(_BLOCK, bits)
    return (data[start : start + size] for start in range(0, data.size, size))


def _check_end(data: Bytes, count: int, bits: int) -> None:
    used = count * bits % _BYTE
    if used and data[-1] >> used:
        raise FormatError("bits behind the last value are not 0")


def _blocks(values: Float32) -> Iterator[Float32]:
    return (values[start : start + _BLOCK] for start in range(0, values.size, _BLOCK))


def _steps(steps: Float32) -> Iterator[Float32]:
    return repeat(steps) if steps.size == 1 else _blocks(steps)


def _codes_of(values: Float32, step: Float32, bits: int) -> Codes:
    codes: Codes = (values < 0).astype(np.uint16) << np.uint16(bits - 1)
    if bits > 1:
        scaled = np.divide(np.abs(values), step, out=np.zeros_like(values), where=step > 0)
        codes |= np.minimum(scaled, np.float32((1 << (bits - 1)) - 1)).astype(np.uint16)
    return codes


def _packed(codes: Codes, bits: int) -> Bytes:
    if bits >= _BYTE:
        return codes.astype(f"<u{bits // _BYTE}").view(np.uint8)
    if bits == 1:
        return np.packbits(codes.astype(np.uint8), bitorder="little")
    each = _BYTE // bits
    padded = np.zeros(packed_size(codes.size, bits) * each, np.uint8)
    padded[: codes.size] = codes
    parts: Bytes = padded.reshape(-1, each) << (np.arange(each, dtype=np.uint8) * np.uint8(bits))
    joined: Bytes = np.bitwise_or.reduce(parts, axis=1)
    return joined


def _unpacked(data: Bytes, bits: int) -> Codes:
    if bits >= _BYTE:
        return data.view(f"<u{bits // _BYTE}").astype(np.uint16)
    if bits == 1:
        return np.unpackbits(data, bitorder="little").astype(np.uint16)
    shifts = np.arange(_BYTE // bits, dtype=np.uint8) * np.uint8(bits)
    codes: Codes = ((data[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).astype(np.uint16)
    return codes


def checked_steps(data: Bytes, bits: int, largest: float) -> Float32:
    """Received steps as float32. Raises FormatError for one that is negative, NaN or makes numbers beyond `largest`."""
    steps: Float32 = data.view("<f4").astype(np.float32)
    if bool(np.signbit(steps).any()) or not (steps <= np.float32(largest / (1 << (bits - 1)))).all():
        raise FormatError(f"a step of values is negative, NaN or beyond {largest:g}")
    return steps
