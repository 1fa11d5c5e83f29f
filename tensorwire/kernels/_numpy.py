"""The kernels in NumPy: the readable definition of their arithmetic, which ``_native`` equals bit for bit.

Every step is one IEEE float32 operation, rounded to nearest even, subnormals kept; a narrower output costs
one more rounding at the end. What a decoder gives beyond the largest finite value of its output is that value: the
scale of a block may have been rounded up, and finite values never become infinite. Work goes slice by slice, so that
temporaries stay at a few MiB. Block i of an array is its elements [i * blocksize, (i + 1) * blocksize); the last block
may be shorter. Shapes, dtypes and errors are the contract of `tensorwire.kernels`; `uncached` is ignored.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from tensorwire.kernels import _numpy_changes, tables
from tensorwire.kernels._numpy_checks import check_array as _check_array
from tensorwire.kernels._numpy_checks import check_overlap as _check_overlap
from tensorwire.kernels._numpy_checks import check_size as _check_size
from tensorwire.kernels._numpy_sparse import (
    add_selected,
    combine_selected,
    decode_positions,
    encode_positions,
    select_largest,
)
from tensorwire.kernels._numpy_values import pack_values, sum_magnitudes, unpack_values

__all__ = [
    "accumulate",
    "accumulate_4bit",
    "accumulate_int8",
    "accumulate_linear",
    "add_difference",
    "add_selected",
    "blockwise_absmax",
    "byte_histogram",
    "cast",
    "combine_selected",
    "crc32c",
    "decay_and_add",
    "decay_and_select",
    "decode_changes",
    "decode_positions",
    "default_environment",
    "dequantize_4bit",
    "dequantize_int8",
    "dequantize_linear",
    "difference",
    "divide_by_rms",
    "encode_changes",
    "encode_positions",
    "get_threads",
    "huffman_decode",
    "huffman_encode",
    "merge_planes",
    "nonzero_blocks",
    "pack_values",
    "quantize_4bit",
    "quantize_int8",
    "quantize_linear",
    "select_largest",
    "set_threads",
    "split_planes",
    "sum_magnitudes",
    "unpack_values",
]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

FLOAT_DTYPES: Final = (np.float32, np.float16, np.uint16)  # uint16: bfloat16 bit patterns
_LARGEST: Final = {
    np.dtype(np.float32): np.finfo(np.float32).max,
    np.dtype(np.float16): np.float32(65504),
    np.dtype(np.uint16): np.float32(float.fromhex("0x1.fep127")),
}
MAX_BLOCKSIZE_4BIT: Final = 4096  # as bitsandbytes; an even size keeps every block on whole bytes

_SLICE: Final = 1 << 18  # elements; even, so that a slice of 4-bit codes is whole bytes

# bitsandbytes' guard against dividing by an all-zero block's absmax: 1 / 1e-38 is still finite.
_SMALLEST_ABSMAX: Final = np.float32(1e-38)
_SMALLEST_NORMAL: Final = np.float32(2.0**-126)

P = ParamSpec("P")
R = TypeVar("R")


def _quiet(kernel: Callable[P, R]) -> Callable[P, R]:
    """Without floating-point warnings: over- and underflow are results here, not accidents."""

    @functools.wraps(kernel)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            return kernel(*args, **kwargs)

    return quiet


# ---- arguments ---------------------------------------------------------------------------------------------


def _checked_crc(crc: Words | None) -> dict[str, Array]:
    if crc is None:
        return {}
    _check_array("crc", crc, np.uint32, output=True)
    _check_size("crc", crc, 1)
    return {"crc": crc}


def _check_blocksize(blocksize: int) -> int:
    blocksize = operator.index(blocksize)
    if blocksize < 1:
        raise ValueError(f"blocksize: expected at least 1, got {blocksize}")
    return blocksize


def _check_4bit(blocksize: int, quant_type: str) -> int:
    blocksize = operator.index(blocksize)
    if not 2 <= blocksize <= MAX_BLOCKSIZE_4BIT or blocksize % 2:
        raise ValueError(f"blocksize: expected an even number, 2 to {MAX_BLOCKSIZE_4BIT}, got {blocksize}")
    if not isinstance(quant_type, str):
        raise TypeError(f"quant_type: expected a string, got {type(quant_type)}")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    return blocksize


def _blocks(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


# ---- slices and float types --------------------------------------------------------------------------------


def _slices(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _SLICE, n)) for start in range(0, n, _SLICE))


def _edges(start: int, stop: int, blocksize: int) -> tuple[int, int, npt.NDArray[np.int64]]:
    """The blocks [first, last) that elements [start, stop) touch, and the edges of their touched parts."""
    first, last = start // blocksize, _blocks(stop, blocksize)
    edges = np.arange(first, last + 1, dtype=np.int64) * blocksize
    edges[0], edges[-1] = start, stop
    return first, last, edges


def _times(x: Float32, factor: Float32, edges: npt.NDArray[np.int64]) -> Float32:
    """fl32(x * factor of its block)."""
    return x * np.repeat(factor, np.diff(edges))


def _widen(values: Array) -> Float32:
    """Any float array as float32, exactly; a signalling NaN of float16 comes out quiet, as of VCVTPH2PS."""
    if values.dtype == np.float32:
        return values
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    widened = values.astype(np.float32)
    nan = np.isnan(values)
    if nan.any():
        bits = values.view(np.uint16)[nan].astype(np.uint32)
        widened.view(np.uint32)[nan] = (bits & 0x8000) << 16 | 0x7FC00000 | (bits & 0x3FF) << 13
    return widened


def _narrow(values: Float32, out: Array) -> None:
    """Round float32 to the type of `out`, ties to even; a NaN keeps sign and top payload bits, made quiet."""
    if out.dtype == np.float32:
        out[:] = values
        return
    bits = values.view(np.uint32)
    if out.dtype == np.float16:
        out[:] = values
        quiet_nan = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF)
    else:
        out[:] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet_nan = bits >> 16 | 0x40
    nan = np.isnan(values)
    out.view(np.uint16)[nan] = quiet_nan[nan]


def _decode(values: Float32, scales: Float32, edges: npt.NDArray[np.int64], out: Array) -> None:
    """fl32(value * scale of its block), rounded to the type of `out`, which saturates at its largest finite value."""
    largest = _LARGEST[out.dtype]
    _narrow(np.clip(_times(values, scales, edges), -largest, largest), out)


@_quiet
def cast(
    values: Array,
    out: Array,
    crc: Words | None = None,
    *,
    saturate: bool = False,
    uncached: bool | None = None,
) -> int:
    """Convert float32 to float16 or bfloat16, or back; the number of finite values that overflowed.

    Narrowing rounds to nearest even; an overflow gives an infinity, with `saturate` the largest finite value
    of that sign. Widening is exact and returns 0.
    """
    _check_array("values", values, *FLOAT_DTYPES)
    _check_array("out", out, *FLOAT_DTYPES, output=True)
    if (values.dtype == np.float32) == (out.dtype == np.float32):
        raise TypeError(f"cast: no conversion from {values.dtype} to {out.dtype}")
    _check_size("out", out, values.size)
    _check_overlap({"out": out, **_checked_crc(crc)}, {"values": values})
    overflows = 0
    infinity, largest = (0x7C00, 0x7BFF) if out.dtype == np.float16 else (0x7F80, 0x7F7F)
    for start, stop in _slices(values.size):
        x, y = values[start:stop], out[start:stop]
        if out.dtype == np.float32:
            y[:] = _widen(x)
            continue
        _narrow(x, y)
        bits = y.view(np.uint16)
        overflowed = (bits & 0x7FFF == infinity) & np.isfinite(x)
        overflows += int(np.count_nonzero(overflowed))
        if saturate:
            bits[overflowed] = bits[overflowed] & 0x8000 | largest
    _sum(crc, out)
    return overflows


# ---- block statistics --------------------------------------------------------------------------------------


def _absmax(values: Array, absmax: Float32, blocksize: int) -> bool:
    absmax[:] = 0
    for start, stop in _slices(values.size):
        first, last, edges = _edges(start, stop, blocksize)
        # maximum propagates NaN; a block may reach over several slices.
        maxima = np.maximum.reduceat(np.abs(_widen(values[start:stop])), edges[:-1] - start)
        np.maximum(absmax[first:last], maxima, out=absmax[first:last])
    return bool(np.isfinite(absmax).all())


@_quiet
def blockwise_absmax(values: Array, absmax: Float32, *, blocksize: int) -> bool:
    """absmax[i] = the largest |x| of block i, exactly; whether all values are finite."""
    _check_array("values", values, *FLOAT_DTYPES)
    _check_array("absmax", absmax, np.float32, output=True)
    blocksize = _check_blocksize(blocksize)
    _check_size("absmax", absmax, _blocks(values.size, blocksize))
    _check_overlap({"absmax": absmax}, {"values": values})
    return _absmax(values, absmax, blocksize)


def _normalized(values: Array, absmax: Float32, start: int, stop: int, blocksize: int) -> Float32:
    """Y = fl32(x * fl32(1 / max(absmax, 1e-38))), in a partial block too; 0 in a zero block."""
    first, last, edges = _edges(start, stop, blocksize)
    inverse = np.divide(np.float32(1), np.maximum(absmax[first:last], _SMALLEST_ABSMAX), dtype=np.float32)
    return _times(_widen(values[start:stop]), inverse, edges)


# ---- 4 bits: NF4 and FP4 -----------------------------------------------------------------------------------


@_quiet
def quantize_4bit(
    values: Array,
    codes: npt.NDArray[np.uint8],
    absmax: Float32,
    crc: Words | None = None,
    *,
    blocksize: int,
    quant_type: str,
) -> bool:
    """Quantize to 16 levels with an absmax per block, two codes a byte; whether all values are finite.

    codes: (n + 1) // 2 bytes, even elements in the high nibbles; the last low nibble of an odd n is 0.
    nf4: the nearest of `NF4_CODE` by its midpoints, ties to the lower code: bitsandbytes' CPU encoder in full
    blocks that are not all zero. fp4: bitsandbytes' CUDA encoder: |y| strictly above a threshold is the next
    level up, and bit 3 is set where y < 0.
    """
    blocksize = _check_4bit(blocksize, quant_type)
    _check_array("values", values, *FLOAT_DTYPES)
    _check_array("codes", codes, np.uint8, output=True)
    _check_array("absmax", absmax, np.float32, output=True)
    _check_size("codes", codes, (values.size + 1) // 2)
    _check_size("absmax", absmax, _blocks(values.size, blocksize))
    _check_overlap({"codes": codes, "absmax": absmax, **_checked_crc(crc)}, {"values": values})
    if not _absmax(values, absmax, blocksize):
        return False
    for start, stop in _slices(values.size):
        y = _normalized(values, absmax, start, stop, blocksize)
        # searchsorted(side="left") is the number of thresholds strictly below y.
        if quant_type == "nf4":
            q = np.searchsorted(tables.NF4_THRESHOLDS, y).astype(np.uint8)
        else:
            level = np.searchsorted(tables.FP4_THRESHOLDS, np.abs(y))
            q = tables.FP4_CODE_OF_LEVEL[level] | (y < 0).astype(np.uint8) << np.uint8(3)
        packed = codes[start // 2 : (stop + 1) // 2]
        packed[:] = q[0::2] << 4
        packed[: q.size // 2] |= q[1::2]
    _sum(crc, absmax, codes)
    return True


@_quiet
def dequantize_4bit(
    codes: npt.NDArray[np.uint8],
    absmax: Float32,
    out: Array,
    *,
    blocksize: int,
    quant_type: str,
    uncached: bool | None = None,
) -> None:
    """Out = fl32(code value * absmax), then one rounding to the type of `out`, which saturates; n is out.size."""
    blocksize = _check_4bit(blocksize, quant_type)
    _check_array("codes", codes, np.uint8)
    _check_array("absmax", absmax, np.float32)
    _check_array("out", out, *FLOAT_DTYPES, output=True)
    _check_size("codes", codes, (out.size + 1) // 2)
    _check_size("absmax", absmax, _blocks(out.size, blocksize))
    _check_overlap({"out": out}, {"codes": codes, "absmax": absmax})
    code = tables.NF4_CODE if quant_type == "nf4" else tables.FP4_CODE
    for start, stop in _slices(out.size):
        packed = codes[start // 2 : (stop + 1) // 2]
        q = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: stop - start]
        first, last, edges = _edges(start, stop, blocksize)
        _decode(code[q], absmax[first:last], edges, out[start:stop])


# ---- 8 bits: the dynamic map -------------------------------------------------------------------------------


# The largest y of codes 0..254: a tie belongs to an even code, and an odd one ends just before it.
_INT8_LAST_OF_CODE: Final = np.where(
    np.arange(255) % 2 == 0, tables.INT8_THRESHOLDS, np.nextafter(tables.INT8_THRESHOLDS, np.float32(-1))
)


@_quiet
def quantize_int8(
    values: Array, codes: npt.NDArray[np.uint8], absmax: Float32, crc: Words | None = None, *, blocksize: int
) -> bool:
    """Quantize to the nearest of `INT8_CODE` with an absmax per block; whether all values are finite.

    With T[k] = fl32(c[k] + c[k+1]) / 2: y < T[k] goes to k, y > T[k] to k + 1, y == T[k] to the even one of
    the two, which is where the binary search of bitsandbytes' CUDA encoder ends. A zero block gets code 127,
    which is 0.
    """
    _check_array("values", values, *FLOAT_DTYPES)
    _check_array("codes", codes, np.uint8, output=True)
    _check_array("absmax", absmax, np.float32, output=True)
    blocksize = _check_blocksize(blocksize)
    _check_size("codes", codes, values.size)
    _check_size("absmax", absmax, _blocks(values.size, blocksize))
    _check_overlap({"codes": codes, "absmax": absmax, **_checked_crc(crc)}, {"values": values})
    if not _absmax(values, absmax, blocksize):
        return False
    for start, stop in _slices(values.size):
        y = _normalized(values, absmax, start, stop, blocksize)
        codes[start:stop] = np.searchsorted(_INT8_LAST_OF_CODE, y)
    _sum(crc, absmax, codes)
    return True


@_quiet
def dequantize_int8(
    codes: npt.NDArray[np.uint8], absmax: Float32, out: Array, *, blocksize: int, uncached: bool | None = None
) -> None:
    """Out = fl32(code value * absmax), then one rounding to the type of `out`, which saturates."""
    _check_array("codes", codes, np.uint8)
    _check_array("absmax", absmax, np.float32)
    _check_array("out", out, *FLOAT_DTYPES, output=True)
    blocksize = _check_blocksize(blocksize)
    _check_size("codes", codes, out.size)
    _check_size("absmax", absmax, _blocks(out.size, blocksize))
    _check_overlap({"out": out}, {"codes": codes, "absmax": absmax})
    for start, stop in _slices(out.size):
        first, last, edges = _edges(start, stop, blocksize)
        _decode(tables.INT8_CODE[codes[start:stop]], absmax[first:last], edges, out[start:stop])


# ---- 8 bits: linear ----------------------------------------------------------------------------------------


@_quiet
def quantize_linear(
    values: Array,
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.uint16],
    crc: Words | None = None,
    *,
    blocksize: int,
) -> bool:
    """Quantize to code * scale, |code| <= 127, a bfloat16 scale per block; whether all values are finite.

    scale = bfloat16(fl32(absmax / 127)), 0 when below 2**-126, and then the codes are 0. Otherwise code = the
    integer nearest to y = fl32(x * fl32(1 / scale)), ties to even. It needs the clamp only where another thread writes
    to `values` meanwhile: the scale is rounded down by at most 2**-8 of itself, and 127 * (1 + 2**-8) < 127.5.
    """
    _check_array("values", values, *FLOAT_DTYPES)
    _check_array("codes", codes, np.int8, output=True)
    _check_array("scales", scales, np.uint16, output=True)
    blocksize = _check_blocksize(blocksize)
    _check_size("codes", codes, values.size)
    _check_size("scales", scales, _blocks(values.size, blocksize))
    _check_overlap({"codes": codes, "scales": scales, **_checked_crc(crc)}, {"values": values})
    absmax = np.empty(scales.size, np.float32)
    if not _absmax(values, absmax, blocksize):
        return False
    _narrow(absmax / np.float32(127), scales)
    scales[_widen(scales) < _SMALLEST_NORMAL] = 0
    for start, stop in _slices(values.size):
        first, last, edges = _edges(start, stop, blocksize)
        scale = _widen(scales[first:last])
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        y = _times(_widen(values[start:stop]), inverse, edges)
        codes[start:stop] = np.clip(np.rint(y), -127, 127)
    _sum(crc, scales, codes)
    return True


@_quiet
def dequantize_linear(
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.uint16],
    out: Array,
    *,
    blocksize: int,
    uncached: bool | None = None,
) -> bool:
    """Out = fl32(code * scale), then one rounding to the type of `out`, which saturates; `scales`: bfloat16 bits.

    Returns whether no code is -128, which no quantizer makes; it decodes like any other.
    """
    _check_array("codes", codes, np.int8)
    _check_array("scales", scales, np.uint16)
    _check_array("out", out, *FLOAT_DTYPES, output=True)
    blocksize = _check_blocksize(blocksize)
    _check_size("codes", codes, out.size)
    _check_size("scales", scales, _blocks(out.size, blocksize))
    _check_overlap({"out": out}, {"codes": codes, "scales": scales})
    for start, stop in _slices(out.size):
        first, last, edges = _edges(start, stop, blocksize)
        _decode(codes[start:stop].astype(np.float32), _widen(scales[first:last]), edges, out[start:stop])
    return not (codes == -128).any()


# ---- weighted sums ------------------------------------------------------------------------------------------


@_quiet
def accumulate(values: Array, sums: Float64, *, weight: float) -> None:
    """Sums = fl64(sums + fl64(weight * values))."""
    _check_array("values", values, *FLOAT_DTYPES)
    _check_sums(sums, values.size, {"values": values})
    for start, stop in _slices(sums.size):
        sums[start:stop] += np.float64(weight) * _widen(values[start:stop]).astype(np.float64)


def decay_and_add(kept: Float32, values: Array, *, beta: float) -> float:
    """Kept = fl32(fl32(beta * kept) + values), of finite values; the largest magnitude of what is kept then."""
    _check_array("kept", kept, np.float32, output=True)
    _check_array("values", values, *FLOAT_DTYPES)
    _check_size("values", values, kept.size)
    _check_overlap({"kept": kept}, {"values": values})
    top = 0.0
    for start, stop in _slices(kept.size):
        part = kept[start:stop]
        part *= np.float32(beta)
        part += _widen(values[start:stop])
        top = max(top, float(np.abs(part).max()))
    return top


@_quiet
def divide_by_rms(values: Float32, roots: Float32, out: Float32, *, beta: float, scale: float, eps: float) -> None:
    """Roots = sqrt(beta * roots^2 + (1 - beta) * values^2); out = values / (roots * scale + eps).

    Calculated in float64, one rounding for each operation; both results are then rounded to float32.
    """
    _check_array("values", values, np.float32)
    _check_array("roots", roots, np.float32, output=True)
    _check_array("out", out, np.float32, output=True)
    _check_size("roots", roots, values.size)
    _check_size("out", out, values.size)
    _check_overlap({"roots": roots, "out": out}, {"values": values})
    for start, stop in _slices(values.size):
        new, before = values[start:stop].astype(np.float64), roots[start:stop].astype(np.float64)
        root = np.sqrt(beta * (before * before) + (1 - beta) * (new * new))
        roots[start:stop] = root
        out[start:stop] = new / (root * scale + eps)


def decay_and_select(
    kept: Float32,
    values: Array,
    positions: npt.NDArray[np.uint16],
    coefficients: Float32,
    *,
    beta: float,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: Float32 | None = None,
) -> float:
    """`decay_and_add`, and `select_largest` of what is kept then."""
    _check_array("kept", kept, np.float32, output=True)
    _check_overlap({"kept": kept, "positions": positions, "coefficients": coefficients}, {"values": values})
    made = kept.copy()
    decay_and_add(made, values, beta=beta)
    largest = select_largest(made, positions, coefficients, width=width, rows=rows, cols=cols, k=k, tables=tables)
    kept[:] = made
    return largest


def accumulate_4bit(
    codes: npt.NDArray[np.uint8],
    absmax: Float32,
    sums: Float64,
    *,
    weight: float,
    dtype: str,
    blocksize: int,
    quant_type: str,
) -> None:
    """Accumulate what `dequantize_4bit` gives."""
    values = _decoded(sums, dtype, {"codes": codes, "absmax": absmax})
    dequantize_4bit(codes, absmax, values, blocksize=blocksize, quant_type=quant_type)
    accumulate(values, sums, weight=weight)


def accumulate_int8(
    codes: npt.NDArray[np.uint8], absmax: Float32, sums: Float64, *, weight: float, dtype: str, blocksize: int
) -> None:
    """Accumulate what `dequantize_int8` gives."""
    values = _decoded(sums, dtype, {"codes": codes, "absmax": absmax})
    dequantize_int8(codes, absmax, values, blocksize=blocksize)
    accumulate(values, sums, weight=weight)


def accumulate_linear(
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.uint16],
    sums: Float64,
    *,
    weight: float,
    dtype: str,
    blocksize: int,
) -> bool:
    """Accumulate what `dequantize_linear` gives; its verdict."""
    values = _decoded(sums, dtype, {"codes": codes, "scales": scales})
    good = dequantize_linear(codes, scales, values, blocksize=blocksize)
    accumulate(values, sums, weight=weight)
    return good


def _decoded(sums: Float64, dtype: str, inputs: dict[str, Array]) -> Array:
    """An array of the dtype named, for what is to be added to `sums`."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected 'float32', 'float16' or 'bfloat16', got {dtype!r}")
    _check_sums(sums, getattr(sums, "size", 0), {name: a for name, a in inputs.items() if isinstance(a, np.ndarray)})
    return np.empty(sums.size, np.uint16 if dtype == "bfloat16" else dtype)


def _check_sums(sums: Float64, expected: int, inputs: dict[str, Array]) -> None:
    _check_array("sums", sums, np.float64, output=True)
    _check_size("sums", sums, expected)
    _check_overlap({"sums": sums}, inputs)


def default_environment() -> AbstractContextManager[None]:
    """Nothing: NumPy cannot say how the processor rounds."""
    return nullcontext()


# ---- checksum ----------------------------------------------------------------------------------------------

_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli's, bit-reversed: bit 31 is x**0, and the register shifts right
_FOLD_BYTES: Final = 1 << 20  # the most that is folded at once: bounds temporaries and the number of tables
_FOLD_MIN_BYTES: Final = 512  # below, Python's byte loop is faster


def _bit_table() -> list[int]:
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ (_POLYNOMIAL if register & 1 else 0)
        table.append(register)
    return table


_BYTE_TABLE: Final = _bit_table()  # register byte -> the register after eight zero bits


def _lookup(byte_tables: Words, registers: Words) -> Words:
    """A linear map of registers, given as what each value of each of its four bytes contributes: (4, 256)."""
    octets = registers.view(np.uint8).reshape(-1, 4)
    result: Words = byte_tables[0][octets[:, 0]]
    for k in range(1, 4):
        result ^= byte_tables[k][octets[:, k]]
    return result


@functools.cache
def _advance(words: int) -> Words:
    """Four byte tables of the map "append `words` zero words"; a power of two, by squaring the half."""
    if words > 1:
        half = _advance(words // 2)
        return _lookup(half, half.reshape(-1)).reshape(4, 256)
    registers = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    byte_table = np.array(_BYTE_TABLE, np.uint32)
    for _ in range(4):
        registers = registers >> 8 ^ byte_table[registers & 0xFF]
    return registers


def _fold(register: int, words: Words) -> int:
    """The register after a power of two of message words.

    The register is linear in the message: the first half, advanced over the length of the second, can be
    added to the second half, and log2 such folds leave one word. As fast as a table for each byte, and all
    lanes at once.
    """
    words = words.copy()
    words[0] ^= register
    while words.size > 1:
        half = words.size // 2
        words = _lookup(_advance(half), words[:half]) ^ words[half:]
    return int(_lookup(_advance(1), words)[0])


def crc32c(data: bytes | bytearray | memoryview | Array, seed: int = 0) -> int:
    """The CRC-32C of a contiguous buffer (RFC 3720, appendix B.4).

    It chains through `seed`: the checksum of a, given as seed for b, leads to that of both.
    """
    octets = np.frombuffer(data, np.uint8)
    register = operator.index(seed) ^ 0xFFFFFFFF
    if not 0 <= register <= 0xFFFFFFFF:
        raise ValueError(f"seed: expected 32 bits, got {seed}")
    while octets.size >= _FOLD_MIN_BYTES:
        length = min(1 << octets.size.bit_length() - 1, _FOLD_BYTES)
        register = _fold(register, octets[:length].view("<u4"))
        octets = octets[length:]
    for octet in octets.tolist():
        register = register >> 8 ^ _BYTE_TABLE[(register ^ octet) & 0xFF]
    return register ^ 0xFFFFFFFF


def _sum(crc: Words | None, *outputs: Array) -> None:
    """Store the checksum of the outputs of an encoder, one after the other, where it is asked for."""
    if crc is not None:
        crc[0] = functools.reduce(lambda seed, output: crc32c(output, seed), outputs, 0)


# ---- byte planes -------------------------------------------------------------------------------------------

_PLANE_BLOCK: Final = 64  # elements that share a mark, and bytes that are counted together


def nonzero_blocks(values: Array, marks: Array, *, blocksize: int) -> int:
    """Mark the blocks that have a byte other than 0, lowest bit first; their number."""
    blocksize = _check_blocksize(blocksize)
    _check_array("values", values, np.uint8)
    _check_array("marks", marks, np.uint8, output=True)
    blocks = _blocks(values.size, blocksize)
    _check_size("marks", marks, _blocks(blocks, 8))
    _check_overlap({"marks": marks}, {"values": values})
    nonzero = np.unique(np.flatnonzero(values) // blocksize)
    bits = np.zeros(8 * marks.size, np.bool_)
    bits[nonzero] = True
    marks[:] = np.packbits(bits, bitorder="little")
    return nonzero.size


def byte_histogram(values: Array, counts: Words, *, every: int = 1) -> None:
    """How often each byte stands in every so many blocks of 64."""
    if operator.index(every) < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    _check_array("values", values, np.uint8)
    _check_array("counts", counts, np.uint32, output=True)
    _check_size("counts", counts, 256)
    _check_overlap({"counts": counts}, {"values": values})
    counted = np.arange(values.size) // _PLANE_BLOCK % every == 0
    counts[:] = np.bincount(values[counted], minlength=256)


def split_planes(values: Array, marks: Array, planes: Sequence[Array]) -> None:
    """Byte p of each element, its upper 16 bits rotated left by one, to plane p; of the marked blocks."""
    width = _check_planes(planes, output=True)
    _check_array("values", values, np.uint8)
    marked = _marked(marks, values.size, width)
    for plane in planes:
        _check_size("planes", plane, int(marked.sum()))
    outputs = {f"planes {p}": plane for p, plane in enumerate(planes)}
    _check_overlap(outputs, {"values": values, "marks": marks})
    elements = values.reshape(-1, width)[marked]
    _rotate(elements, 1)
    for plane, column in zip(planes, elements.T, strict=True):
        plane[:] = column


def merge_planes(planes: Sequence[Array], marks: Array, out: Array) -> None:
    """The elements whose bytes the planes are; a plane of one byte stands for that byte throughout."""
    width = _check_planes(planes)
    _check_array("out", out, np.uint8, output=True)
    marked = _marked(marks, out.size, width)
    for plane in planes:
        if plane.size != 1:
            _check_size("planes", plane, int(marked.sum()))
    _check_overlap({"out": out}, {"marks": marks} | {f"planes {p}": plane for p, plane in enumerate(planes)})
    elements = np.empty((int(marked.sum()), width), np.uint8)
    for p, plane in enumerate(planes):
        elements[:, p] = plane
    _rotate(elements, 15)
    whole = out.reshape(-1, width)
    whole[~marked] = 0
    whole[marked] = elements


def _check_planes(planes: Sequence[Array], *, output: bool = False) -> int:
    """The width of an element."""
    if len(planes) not in (1, 2, 4, 8):
        raise ValueError(f"planes: expected 1, 2, 4 or 8, got {len(planes)}")
    for plane in planes:
        _check_array("planes", plane, np.uint8, output=output)
    return len(planes)


def _marked(marks: Array, size: int, width: int) -> npt.NDArray[np.bool_]:
    """Whether the block of each element is marked."""
    if size % width:
        raise ValueError(f"elements: expected a multiple of {width} bytes, got {size}")
    blocks = _blocks(size // width, _PLANE_BLOCK)
    _check_array("marks", marks, np.uint8)
    _check_size("marks", marks, _blocks(blocks, 8))
    bits = np.unpackbits(marks, bitorder="little").astype(np.bool_)
    if bits[blocks:].any():
        raise ValueError("marks: more than there are blocks")
    return np.repeat(bits[:blocks], _PLANE_BLOCK)[: size // width]


def _rotate(elements: Array, bits: int) -> None:
    """Rotate the upper 16 bits of each element, a row of bytes, to the left."""
    if elements.shape[1] > 1:
        upper = np.ascontiguousarray(elements[:, -2:]).view("<u2")
        elements[:, -2:] = (upper << bits | upper >> (16 - bits)).astype("<u2").view(np.uint8)


# ---- Huffman codes -----------------------------------------------------------------------------------------

# Bits of the longest code, bytes that share codes, and streams that their codes stand in (docs/format.md, section 6).
_CODE_BITS: Final = 11
_SEGMENT: Final = 1 << 17
_STREAMS: Final = 4
_BEHIND: Final = 8  # bytes that may be written behind them


def huffman_encode(values: Array, codes: Array) -> int:
    """Segment after segment; the bytes they take, or 0 where there is no room for them."""
    _check_array("values", values, np.uint8)
    _check_array("codes", codes, np.uint8, output=True)
    _check_overlap({"codes": codes}, {"values": values})
    at = 0
    for start in range(0, values.size, _SEGMENT):
        segment = values[start : start + _SEGMENT]
        counts = np.bincount(segment, minlength=256)
        lengths = _code_lengths(counts.tolist())
        first, last = (int(found) for found in np.flatnonzero(lengths)[[0, -1]])
        halves = np.append(lengths[first : last + 1], np.zeros((last - first + 1) % 2, np.int64)).reshape(-1, 2)
        streams = [_code_stream(part, lengths) for part in _quarters(segment)]
        sizes = np.array([stream.size for stream in streams], "<u2").view(np.uint8)
        made = np.concatenate([[first, last], halves[:, 0] | halves[:, 1] << 4, sizes, *streams]).astype(np.uint8)
        if made.size + _BEHIND > codes.size - at:
            return 0
        codes[at : at + made.size] = made
        at += made.size
    return at


def huffman_decode(codes: Array, out: Array) -> bool:
    """Segment after segment; whether an encoder writes such ones."""
    _check_array("codes", codes, np.uint8)
    _check_array("out", out, np.uint8, output=True)
    _check_overlap({"out": out}, {"codes": codes})
    at = 0
    for start in range(0, out.size, _SEGMENT):
        taken = _decode_segment(codes[at:], out[start : start + _SEGMENT])
        if not taken:
            return False
        at += taken
    return at == codes.size


def _quarters(segment: Array) -> list[Array]:
    size = _blocks(segment.size, _STREAMS)
    return [segment[s * size : (s + 1) * size] for s in range(_STREAMS)]


def _code_lengths(counts: list[int]) -> Array:
    """Lengths of the codes of bytes that occur so often, 0 for those that do not."""
    order = sorted((byte for byte in range(256) if counts[byte]), key=lambda byte: (counts[byte], byte))
    weights = [counts[byte] for byte in order]
    if len(order) == 1:  # there is no code without a bit: another byte gets one, too
        order.append(0 if order[0] else 1)
        weights *= 2
    depths = [min(depth, _CODE_BITS) for depth in _depths(weights)]
    whole, used = 1 << _CODE_BITS, sum(1 << _CODE_BITS - depth for depth in depths)
    at = 0
    while used > whole:  # the rarest get longer codes until all fit
        if depths[at] < _CODE_BITS:
            depths[at] += 1
            used -= whole >> depths[at]
        at = (at + 1) % len(depths)
    while used < whole:  # then the most frequent shorter ones
        for at in reversed(range(len(depths))):
            if used + (whole >> depths[at]) <= whole:
                used += whole >> depths[at]
                depths[at] -= 1
    lengths = np.zeros(256, np.int64)
    lengths[order] = depths
    return lengths


def _depths(weights: list[int]) -> list[int]:
    """Of the leaves of a Huffman tree, whose weights ascend. Of equal weights a leaf is taken first."""
    leaves, weights = len(weights), [*weights]
    parents = [0] * (2 * leaves - 1)
    leaf, inner = 0, leaves
    for node in range(leaves, 2 * leaves - 1):
        weights.append(0)
        for _ in range(2):
            if leaf < leaves and (inner == node or weights[leaf] <= weights[inner]):
                taken, leaf = leaf, leaf + 1
            else:
                taken, inner = inner, inner + 1
            parents[taken] = node
            weights[node] += weights[taken]
    depths = [0] * (2 * leaves - 1)
    for node in reversed(range(2 * leaves - 2)):
        depths[node] = depths[parents[node]] + 1
    return depths[:leaves]


def _canonical_codes(lengths: Array) -> Array:
    """Codes by length and then by byte, their first bit the lowest."""
    codes, following = np.zeros(256, np.int64), 0
    for length in range(1, _CODE_BITS + 1):
        for byte in np.flatnonzero(lengths == length):
            codes[byte] = int(f"{following:0{length}b}"[::-1], 2)
            following += 1
        following *= 2
    return codes


def _code_stream(values: Array, lengths: Array) -> Array:
    """The codes of some bytes, one behind the other from the lowest bit on."""
    codes, sizes = _canonical_codes(lengths)[values], lengths[values]
    ends = np.cumsum(sizes)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for bit in range(_CODE_BITS):
        longer = sizes > bit
        bits[(ends - sizes + bit)[longer]] = (codes >> bit & 1)[longer]
    return np.packbits(bits, bitorder="little")


def _decode_segment(data: Array, out: Array) -> int:
    """The bytes that the segment takes, 0 where no encoder writes such ones."""
    if data.size < 3 or data[0] >= data[1]:
        return 0
    first, last = int(data[0]), int(data[1])
    at = 2 + (last - first) // 2 + 1
    halves = np.stack([data[2:at] & 15, data[2:at] >> 4], axis=1).reshape(-1)
    if data.size < at + 2 * _STREAMS or halves[last - first + 1 :].any() or halves.max() > _CODE_BITS:
        return 0
    lengths = np.zeros(256, np.int64)
    lengths[first : last + 1] = halves[: last - first + 1]
    used = int((1 << _CODE_BITS >> lengths[lengths > 0]).sum())
    if used != 1 << _CODE_BITS or not lengths[first] or not lengths[last]:
        return 0
    sizes = data[at : at + 2 * _STREAMS].view("<u2").tolist()
    at += 2 * _STREAMS
    if at + sum(sizes) > data.size:
        return 0
    good = True
    for size, part in zip(sizes, _quarters(out), strict=True):
        good &= _decode_stream(data[at : at + size], lengths, part)
        at += size
    return at if good else 0


def _decode_stream(data: Array, lengths: Array, out: Array) -> bool:
    """Whether the codes of so many bytes stand there, and zeros behind them."""
    window = np.arange(1 << _CODE_BITS)
    bytes_of, bits_of = np.zeros((2, window.size), np.int64)
    codes = _canonical_codes(lengths)
    for byte in np.flatnonzero(lengths):
        mine = window & ((1 << lengths[byte]) - 1) == codes[byte]
        bytes_of[mine], bits_of[mine] = byte, lengths[byte]
    bits = np.append(np.unpackbits(data, bitorder="little"), np.zeros(_CODE_BITS, np.uint8)).astype(np.int64)
    windows = np.zeros(bits.size - _CODE_BITS, np.int64)
    for bit in range(_CODE_BITS):
        windows |= bits[bit : bit + windows.size] << bit
    steps, end, at = bits_of[windows].tolist(), 8 * data.size, 0
    places = []
    for _ in range(out.size):
        if at >= end:
            return False
        places.append(at)
        at += steps[at]
    out[:] = bytes_of[windows[places]]
    return _blocks(at, 8) == data.size and not bits[at:].any()


def difference(base: Array, values: Array, out: Array, *, width: int) -> None:
    """Differences as zig-zag, turned."""
    _check_array("base", base, np.uint8)
    _check_array("values", values, np.uint8)
    _check_array("out", out, np.uint8, output=True)
    _check_width(width, values)
    _check_size("base", base, values.size)
    _check_size("out", out, values.size)
    _check_overlap({"out": out}, {"base": base, "values": values})
    _numpy_changes.difference(base, values, out, width=width)


def add_difference(differences: Array, values: Array, *, width: int) -> None:
    """Differences added, in place."""
    _check_array("differences", differences, np.uint8)
    _check_array("values", values, np.uint8, output=True)
    _check_width(width, values)
    _check_size("differences", differences, values.size)
    _check_overlap({"values": values}, {"differences": differences})
    _numpy_changes.add_difference(differences, values, width=width)


def _check_width(width: int, values: Array) -> None:
    if width not in (1, 2, 4, 8):
        raise ValueError(f"width: expected 1, 2, 4 or 8, got {width}")
    if values.size % width:
        raise ValueError(f"elements: expected a multiple of {width} bytes, got {values.size}")


def encode_changes(base: Array, values: Array, codes: Array, work: Words) -> tuple[int, int]:
    """Group after group; `work` is not used."""
    _check_array("base", base, np.float16, np.uint16)
    _check_array("values", values, np.float16, np.uint16)
    _check_array("codes", codes, np.uint8, output=True)
    if base.dtype != values.dtype:
        raise TypeError("values: not of the type of base")
    _check_size("values", values, base.size)
    _check_work(work, values.size)
    _check_overlap({"codes": codes, "work": work}, {"base": base, "values": values})
    return _numpy_changes.encode_changes(base, values, codes)


def decode_changes(codes: Array, values: Array, work: Words) -> int:
    """Group after group, in place; `work` is not used."""
    _check_array("codes", codes, np.uint8)
    _check_array("values", values, np.float16, np.uint16, output=True)
    _check_work(work, values.size)
    _check_overlap({"values": values, "work": work}, {"codes": codes})
    return _numpy_changes.decode_changes(codes, values)


def _check_work(work: Words, count: int) -> None:
    _check_array("work", work, np.uint32, output=True)
    _check_size("work", work, 2 * count)
    if not work.flags.aligned:
        raise ValueError("work: not aligned")


def set_threads(count: int) -> None:
    """Accepted for the sake of the contract: this implementation uses one thread."""
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {count}")


def get_threads() -> int:
    """Threads a call uses."""
    return 1
