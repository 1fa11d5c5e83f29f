"""Numbers as a sign and a magnitude of a few bits: (m + 1/2) * step, with m from 0 on.

What sparse and lowrank keep of a tensor is written this way, with one bit as signs alone. No code means 0: a number
that is kept is worth it.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.codecs.stage import Bytes
from tensorwire.errors import FormatError

# From where on magnitudes are all the same, in multiples of their mean, by their bits; with 16, from the largest on.
_CLIP: Final = {1: 2.0, 2: 2.0, 4: 4.0, 8: 32.0}
_WHOLE: Final = 2.0**32
_BYTE: Final = 8

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
    magnitudes = np.abs(values).astype(np.float64)
    top = float(magnitudes.max(initial=0))
    if top == 0:
        return 0.0
    mean = int(np.rint(magnitudes / top * _WHOLE).astype(np.int64).sum()) / np.count_nonzero(magnitudes) / _WHOLE * top
    most = top if bits > 1 else 2 * top
    return float(np.float32(min(_CLIP.get(bits, np.inf) * mean, most) / (1 << (bits - 1))))


def codes_of(values: Float32, step: Any, bits: int) -> Codes:
    """The code of each number: its sign as the highest bit, below it the magnitude. `step`: float32, one or as many."""
    codes: Codes = (values < 0).astype(np.uint16) << np.uint16(bits - 1)
    if bits > 1:
        steps = np.float32(step) + np.zeros_like(values)
        scaled = np.divide(np.abs(values), steps, out=np.zeros_like(values), where=steps > 0)
        codes |= np.minimum(scaled, np.float32((1 << (bits - 1)) - 1)).astype(np.uint16)
    return codes


def packed(codes: Codes, bits: int) -> Bytes:
    """Codes one behind the other, from the lowest bit of the first byte on."""
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


def unpacked(data: Bytes, count: int, bits: int) -> Codes:
    """The codes that `packed` was given. `data`: as many bytes as that gives. Raises FormatError."""
    if bits >= _BYTE:
        return data.view(f"<u{bits // _BYTE}").astype(np.uint16)
    if bits == 1:
        codes = np.unpackbits(data, bitorder="little")
    else:
        shifts = np.arange(_BYTE // bits, dtype=np.uint8) * np.uint8(bits)
        codes = ((data[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)
    if codes[count:].any():
        raise FormatError("bits behind the last value are not 0")
    return codes[:count].astype(np.uint16)


def numbers(codes: Codes, step: Any, bits: int) -> Float32:
    """The numbers that codes stand for. `step`: float32, one or as many."""
    made: Float32 = (codes & np.uint16((1 << (bits - 1)) - 1)).astype(np.float32)
    made += np.float32(0.5)
    made *= step
    made[codes >> np.uint16(bits - 1) != 0] *= np.float32(-1)
    return made


def checked_steps(data: Bytes, bits: int, largest: float) -> Float32:
    """Received steps as float32. Raises FormatError for one that is negative, NaN or makes numbers beyond `largest`."""
    steps: Float32 = data.view("<f4").astype(np.float32)
    if bool(np.signbit(steps).any()) or not (steps <= np.float32(largest / (1 << (bits - 1)))).all():
        raise FormatError(f"a step of values is negative, NaN or beyond {largest:g}")
    return steps
