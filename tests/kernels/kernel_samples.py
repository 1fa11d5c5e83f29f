"""Inputs that are hard for quantizers, and calls of the kernels that watch what they write."""

from types import ModuleType

import numpy as np
import numpy.typing as npt

from tensorwire.kernels import tables

Array = npt.NDArray

METHODS = ("nf4", "fp4", "int8", "linear")
FLOATS = ("float32", "float16", "bfloat16")
SAMPLES = (
    "normal",
    "weights",
    "magnitudes",
    "bits",
    "subnormal",
    "sparse",
    "zeros",
    "ties",
    "linear ties",
    "scale ties",
)

MARGIN = 64
FILLER = 0xA5

_EVERY_THRESHOLD = np.concatenate(
    [tables.NF4_THRESHOLDS, tables.FP4_THRESHOLDS, -tables.FP4_THRESHOLDS, tables.INT8_THRESHOLDS]
)


def sample(kind: str, n: int, seed: int) -> npt.NDArray[np.float32]:
    """n finite float32 values."""
    rng = np.random.default_rng([seed, n, SAMPLES.index(kind)])
    normal = rng.standard_normal(n).astype(np.float32)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    if kind == "normal":
        return normal
    if kind == "weights":
        return normal * np.float32(0.02) * np.where(rng.random(n) < 0.005, np.float32(20), np.float32(1))
    if kind == "magnitudes":
        return np.copysign(2.0 ** rng.uniform(-40, 0, n), normal).astype(np.float32)
    if kind == "bits":
        infinite = bits & 0x7F800000 == 0x7F800000
        return np.where(infinite, bits & 0x807FFFFF, bits).astype(np.uint32).view(np.float32)
    if kind == "subnormal":
        return (bits & np.uint32(0x80000000 | 0x7FFFFF >> rng.integers(0, 20))).view(np.float32)
    if kind == "sparse":
        return np.where(rng.random(n) < 0.95, np.copysign(np.float32(0), normal), normal)
    if kind == "zeros":
        return np.copysign(np.zeros(n, np.float32), normal)
    if kind == "ties":
        # Every 32nd value makes absmax a power of two; then y is a threshold or its neighbour exactly.
        at = rng.choice(_EVERY_THRESHOLD, n)
        towards = rng.choice(np.array([-2, 2], np.float32), n)
        y = np.where(rng.random(n) < 0.4, at, np.nextafter(at, towards))
        y[::32] = np.copysign(np.float32(1), y[::32])
        return y * np.float32(2.0 ** rng.integers(-60, 60))
    if kind == "linear ties":
        # Half-way between codes, where the scale is a power of two.
        y = rng.integers(-127, 127, n).astype(np.float32) + np.float32(0.5)
        y[::32] = np.copysign(np.float32(127), y[::32])
        return y * np.float32(2.0 ** rng.integers(-60, 60))
    assert kind == "scale ties"
    # absmax / 127 is half-way between two bfloat16, or next to that: with a value a block, in every block.
    midpoints = 1 + (2 * rng.integers(0, 128, n) + 1) / 256
    at = (127 * midpoints * 2.0 ** rng.integers(-130, 100, n)).astype(np.float32)
    return np.copysign((at.view(np.int32) + rng.integers(-2, 3, n, dtype=np.int32)).view(np.float32), normal)


def as_float(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Finite float32 as finite values of another type; out of range, zero."""
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.abs(values) < 65504, values, np.float32(0)).astype(np.float16)


def float_dtype(dtype: str) -> type[np.generic]:
    return {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]


def misaligned(array: Array, offset: int) -> Array:
    """A copy that starts `offset` bytes after an aligned address."""
    copy = np.empty(array.nbytes + offset, np.uint8)[offset:].view(array.dtype)
    copy[:] = array
    return copy


class Output:
    """An array for a kernel to fill, with a margin of known bytes at both sides."""

    def __init__(self, n: int, dtype: npt.DTypeLike, offset: int = 0) -> None:
        size = n * np.dtype(dtype).itemsize
        self._whole = np.full(MARGIN + offset + size + MARGIN, FILLER, np.uint8)
        self._inside = slice(MARGIN + offset, MARGIN + offset + size)
        self.array = self._whole[self._inside].view(dtype)

    def checked(self) -> Array:
        """The array, after a look at the margins."""
        assert (self._whole[: self._inside.start] == FILLER).all(), "written before the output"
        assert (self._whole[self._inside.stop :] == FILLER).all(), "written after the output"
        return self.array


def blocks(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def code_count(method: str, n: int) -> int:
    return (n + 1) // 2 if method in ("nf4", "fp4") else n


def encode(
    kernels: ModuleType, method: str, values: Array, blocksize: int, offset: int = 0
) -> tuple[bool, Array, Array]:
    """Whether all is finite, codes, and absmax or scales. For every other size also looks at the checksum."""
    codes = Output(code_count(method, values.size), np.int8 if method == "linear" else np.uint8, offset)
    stats = Output(blocks(values.size, blocksize), np.uint16 if method == "linear" else np.float32, offset)
    crc = np.zeros(1, np.uint32) if (values.size // 2 + offset // 2) % 2 == 0 else None
    outputs = codes.array, stats.array, crc
    if method in ("nf4", "fp4"):
        finite = kernels.quantize_4bit(values, *outputs, blocksize=blocksize, quant_type=method)
    elif method == "int8":
        finite = kernels.quantize_int8(values, *outputs, blocksize=blocksize)
    else:
        finite = kernels.quantize_linear(values, *outputs, blocksize=blocksize)
    if finite and crc is not None:
        assert crc[0] == kernels.crc32c(codes.array, kernels.crc32c(stats.array))
    return finite, codes.checked(), stats.checked()


def decode(
    kernels: ModuleType,
    method: str,
    codes: Array,
    stats: Array,
    n: int,
    blocksize: int,
    dtype: str,
    offset: int = 0,
) -> Array:
    """The decoded values; written past the caches, before them, or as the kernel sees fit, depending on the size."""
    out = Output(n, float_dtype(dtype), offset)
    options = {"blocksize": blocksize, "uncached": (None, True, False)[(n + offset) % 3]}
    if method in ("nf4", "fp4"):
        kernels.dequantize_4bit(codes, stats, out.array, quant_type=method, **options)
    elif method == "int8":
        kernels.dequantize_int8(codes, stats, out.array, **options)
    else:
        kernels.dequantize_linear(codes, stats, out.array, **options)
    return out.checked()


def accumulate(
    kernels: ModuleType,
    method: str,
    codes: Array,
    stats: Array,
    sums: Array,
    blocksize: int,
    dtype: str,
    offset: int = 0,
) -> Array:
    """`sums`, and 0.3 times what the codes stand for."""
    out = Output(sums.size, np.float64, offset)
    out.array[:] = sums
    options = {"weight": 0.3, "dtype": dtype, "blocksize": blocksize}
    if method in ("nf4", "fp4"):
        kernels.accumulate_4bit(codes, stats, out.array, quant_type=method, **options)
    elif method == "int8":
        kernels.accumulate_int8(codes, stats, out.array, **options)
    else:
        kernels.accumulate_linear(codes, stats, out.array, **options)
    return out.checked()


def bits(array: Array) -> Array:
    """Bit patterns, so that 0.0 is not -0.0 and a NaN is equal to itself."""
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def bits_with_one_nan(array: Array) -> Array:
    """As `bits`, with all NaNs alike: which NaN a product gives is not part of the contract."""
    quiet, sign = {2: (0x7E00, 0x7FFF), 4: (0x7FC00000, 0x7FFFFFFF), 8: (0x7FF8 << 48, (1 << 63) - 1)}[array.itemsize]
    infinities = {np.float16: 0x7C00, np.uint16: 0x7F80, np.float32: 0x7F800000, np.float64: 0x7FF0 << 48}
    plain = bits(array)
    return np.where(plain & plain.dtype.type(sign) > infinities[array.dtype.type], plain.dtype.type(quiet), plain)
