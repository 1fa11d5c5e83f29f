"""The kernels of numbers of a few bits in NumPy, which is their definition: a sign and a magnitude (m + 1/2) * step."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.kernels._numpy_checks import check_array, check_overlap, check_size

Array = npt.NDArray[Any]

_WHOLE: Final = 2.0**32
_BYTE: Final = 8
_BLOCK: Final = 1 << 14  # numbers that are worked on at a time, which make whole bytes: they stay in the caches


def sum_magnitudes(values: Array) -> tuple[float, int, int]:
    """The largest magnitude; all in units of 2^-32 of it, each rounded to a whole number, together; how many are not 0.

    Such a sum is the same in whatever order a machine adds.
    """
    check_array("values", values, np.float32)
    if values.size >> 31:
        raise ValueError("values: expected fewer than 2^31")
    magnitudes = [np.abs(values[start:stop]) for start, stop in _blocks(values.size)]
    top = max((float(part.max()) for part in magnitudes), default=0.0)
    if top == 0:
        return 0.0, 0, 0
    sums = [int(np.rint(part.astype(np.float64) / top * _WHOLE).astype(np.int64).sum()) for part in magnitudes]
    return top, sum(sums), sum(int(np.count_nonzero(part)) for part in magnitudes)


def pack_values(values: Array, steps: Array, codes: Array, *, bits: int) -> None:
    """Codes of `bits` bits, one behind the other, from the lowest bit of the first byte on; the highest is the sign.

    The others are the magnitude divided by the step, at most as many as there are. `steps`: one, or one each.
    """
    check_array("values", values, np.float32)
    check_array("codes", codes, np.uint8, output=True)
    _check(steps, codes, values.size, bits)
    check_overlap({"codes": codes}, {"values": values, "steps": steps})
    size = bits * _BLOCK // _BYTE
    for number, (start, stop) in enumerate(_blocks(values.size)):
        step = steps if steps.size == 1 else steps[start:stop]
        codes[number * size : (number + 1) * size] = _packed(_codes_of(values[start:stop], step, bits), bits)


def unpack_values(codes: Array, steps: Array, values: Array, *, bits: int) -> bool:
    """The numbers that codes stand for; False: bits behind the last one are not 0."""
    check_array("codes", codes, np.uint8)
    check_array("values", values, np.float32, output=True)
    _check(steps, codes, values.size, bits)
    check_overlap({"values": values}, {"codes": codes, "steps": steps})
    size = bits * _BLOCK // _BYTE
    for number, (start, stop) in enumerate(_blocks(values.size)):
        step = steps if steps.size == 1 else steps[start:stop]
        unpacked = _unpacked(codes[number * size : (number + 1) * size], bits)
        values[start:stop] = _numbers(unpacked[: stop - start], step, bits)
    used = values.size * bits % _BYTE
    return not used or not codes[-1] >> used


def _check(steps: Array, codes: Array, count: int, bits: int) -> None:
    if bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"bits: expected 1, 2, 4, 8 or 16, got {bits}")
    check_array("steps", steps, np.float32)
    if steps.size != 1:
        check_size("steps", steps, count)
    check_size("codes", codes, -(-count * bits // _BYTE))


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _codes_of(values: Array, step: Array, bits: int) -> Array:
    codes: Array = (values < 0).astype(np.uint16) << np.uint16(bits - 1)
    if bits > 1:
        with np.errstate(over="ignore"):
            scaled = np.divide(np.abs(values), step, out=np.zeros_like(values), where=step > 0)
        codes |= np.minimum(scaled, np.float32((1 << (bits - 1)) - 1)).astype(np.uint16)
    return codes


def _packed(codes: Array, bits: int) -> Array:
    if bits >= _BYTE:
        return codes.astype(f"<u{bits // _BYTE}").view(np.uint8)
    if bits == 1:
        return np.packbits(codes.astype(np.uint8), bitorder="little")
    each = _BYTE // bits
    padded = np.zeros(-(-codes.size // each) * each, np.uint8)
    padded[: codes.size] = codes
    parts = padded.reshape(-1, each) << (np.arange(each, dtype=np.uint8) * np.uint8(bits))
    joined: Array = np.bitwise_or.reduce(parts, axis=1)
    return joined


def _unpacked(data: Array, bits: int) -> Array:
    if bits >= _BYTE:
        return data.view(f"<u{bits // _BYTE}").astype(np.uint16)
    if bits == 1:
        return np.unpackbits(data, bitorder="little").astype(np.uint16)
    shifts = np.arange(_BYTE // bits, dtype=np.uint8) * np.uint8(bits)
    codes: Array = ((data[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).astype(np.uint16)
    return codes


def _numbers(codes: Array, step: Array, bits: int) -> Array:
    values: Array = (codes & np.uint16((1 << (bits - 1)) - 1)).astype(np.float32)
    values += np.float32(0.5)
    values *= step
    values[codes >> np.uint16(bits - 1) != 0] *= np.float32(-1)
    return values
