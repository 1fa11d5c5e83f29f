"""What every implementation computes, against hand-worked values and a second definition in float64.

float64 holds the product of two float32 exactly, and a quotient of two of them closely enough to round like
the exact one: each step of the definition is then one float64 operation and one explicit rounding.
"""

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import (
    FLOATS,
    METHODS,
    SAMPLES,
    Array,
    Output,
    as_float,
    bits,
    bits_with_one_nan,
    blocks,
    code_count,
    decode,
    encode,
    float_dtype,
    sample,
)

from tensorwire.kernels import tables

Float64 = npt.NDArray[np.float64]

TINY = np.float64(np.float32(1e-38))

# Mantissa bits, smallest normal exponent, largest finite value.
FORMATS = {
    "float32": (23, -126, float.fromhex("0x1.fffffep127")),
    "float16": (10, -14, 65504.0),
    "bfloat16": (7, -126, float.fromhex("0x1.fep127")),
}


def rounded(x: Float64, dtype: str) -> Float64:
    """The nearest value of a type, ties to even, infinite beyond the range."""
    mantissa, smallest, largest = FORMATS[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        exponent = np.frexp(x)[1] - 1
        ulp = np.ldexp(1.0, np.maximum(exponent, smallest) - mantissa)
        nearest = np.rint(x / ulp) * ulp
    finite = np.where(np.abs(nearest) > largest, np.copysign(np.inf, x), nearest)
    return np.where(np.isfinite(x), finite, x)


def f32(x: Float64) -> Float64:
    return rounded(x, "float32")


def exactly(values: Array) -> Float64:
    """A float array as float64."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(np.float64)


def stored(x: Float64, dtype: str) -> Array:
    """Values of a type as an array of it."""
    with np.errstate(over="ignore"):
        if dtype == "float16":
            return x.astype(np.float16)
        single = x.astype(np.float32)
    return (single.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else single


def expected_absmax(x: Float64, blocksize: int) -> Float64:
    return np.array([np.abs(x[i : i + blocksize]).max() for i in range(0, x.size, blocksize)], np.float64)


def expected_codes(method: str, values: Array, blocksize: int) -> tuple[Array, Array]:
    """Codes, unpacked, and stored absmax or scales."""
    x = exactly(values)
    block = np.arange(x.size) // blocksize
    absmax = expected_absmax(x, blocksize)
    if method == "linear":
        scale = rounded(f32(absmax / 127), "bfloat16")
        scale[scale < 2.0**-126] = 0
        inverse = np.array([f32(1 / s) if s else 0.0 for s in scale])
        codes = np.clip(np.rint(f32(x * inverse[block])), -127, 127).astype(np.int8)
        return codes, stored(scale, "bfloat16")
    y = f32(x * f32(1 / np.maximum(absmax, TINY))[block])
    if method == "fp4":
        level = (np.abs(y)[:, None] > tables.FP4_THRESHOLDS).sum(axis=1)
        return tables.FP4_CODE_OF_LEVEL[level] + np.where(y < 0, 8, 0).astype(np.uint8), stored(absmax, "float32")
    thresholds = {"nf4": tables.NF4_THRESHOLDS, "int8": tables.INT8_THRESHOLDS}[method]
    codes = (y[:, None] > thresholds).sum(axis=1)
    if method == "int8":
        tie = (y[:, None] == thresholds).any(axis=1)
        codes += tie & (codes % 2 == 1)
    return codes.astype(np.uint8), stored(absmax, "float32")


def unpacked(method: str, codes: Array, n: int) -> Array:
    """A code an element; high nibbles first."""
    if method not in ("nf4", "fp4"):
        return codes
    q = np.array([nibble for octet in codes.tolist() for nibble in divmod(octet, 16)], np.uint8)
    assert n % 2 == 0 or q[n] == 0, "the low nibble after the last element"
    return q[:n]


def expected_values(method: str, codes: Array, stats: Array, n: int, blocksize: int, dtype: str) -> Array:
    q = unpacked(method, codes, n + n % 2)[:n]
    code = {"nf4": tables.NF4_CODE, "fp4": tables.FP4_CODE, "int8": tables.INT8_CODE}
    value = q.astype(np.float64) if method == "linear" else exactly(code[method])[q]
    with np.errstate(invalid="ignore", over="ignore"):
        product = value * exactly(stats)[np.arange(n) // blocksize]
    largest = FORMATS[dtype][2]
    return stored(np.clip(rounded(f32(product), dtype), -largest, largest), dtype)


def blocksizes(method: str) -> st.SearchStrategy[int]:
    if method in ("nf4", "fp4"):
        return st.sampled_from([2, 4, 6, 32, 34, 64, 100, 128, 256, 4096])
    return st.sampled_from([1, 2, 3, 7, 16, 31, 64, 100, 256, 4096, 2**40, 2**63 - 1])


FLOAT_LISTS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=70)
SAMPLED = st.builds(sample, st.sampled_from(SAMPLES), st.integers(0, 400), st.integers(0, 2**32 - 1))
VALUES = st.one_of(FLOAT_LISTS.map(lambda x: np.array(x, np.float32)), SAMPLED)


@pytest.mark.parametrize("method", METHODS)
class TestQuantizers:
    @settings(max_examples=100, deadline=None)
    @given(values=VALUES, dtype=st.sampled_from(FLOATS), data=st.data())
    def test_encode(self, kernels: ModuleType, method: str, values: Array, dtype: str, data: st.DataObject) -> None:
        values = as_float(values, dtype)
        before = values.copy()
        blocksize = data.draw(blocksizes(method))
        finite, codes, stats = encode(kernels, method, values, blocksize)
        assert finite is True
        expected, expected_stats = expected_codes(method, values, blocksize)
        assert unpacked(method, codes, values.size).tolist() == expected.tolist()
        assert bits(stats).tolist() == bits(expected_stats).tolist()
        assert (bits(values) == bits(before)).all()

    @settings(max_examples=100, deadline=None)
    @given(octets=st.binary(max_size=90), dtype=st.sampled_from(FLOATS), data=st.data())
    def test_decode_any_bytes(
        self, kernels: ModuleType, method: str, octets: bytes, dtype: str, data: st.DataObject
    ) -> None:
        codes = np.frombuffer(octets, np.int8 if method == "linear" else np.uint8)
        n = codes.size
        if code_count(method, 2) == 1:
            n = 2 * n - data.draw(st.integers(0, 1)) if n else 0
        blocksize = data.draw(blocksizes(method))
        size = blocks(n, blocksize) * (2 if method == "linear" else 4)
        stats = np.frombuffer(
            data.draw(st.binary(min_size=size, max_size=size)),
            np.uint16 if method == "linear" else np.float32,
        )
        values = decode(kernels, method, codes, stats, n, blocksize, dtype)
        expected = expected_values(method, codes, stats, n, blocksize, dtype)
        assert bits_with_one_nan(values).tolist() == bits_with_one_nan(expected).tolist()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_empty_input(self, kernels: ModuleType, method: str, dtype: str) -> None:
        finite, codes, stats = encode(kernels, method, np.empty(0, float_dtype(dtype)), 64)
        assert finite is True and codes.size == stats.size == 0
        assert decode(kernels, method, codes, stats, 0, 64, dtype).size == 0

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_nonfinite_values_are_found_at_any_position(self, kernels: ModuleType, method: str, dtype: str) -> None:
        n, blocksize = 2 * 64 + 37, 64
        for kind in ("normal", "zeros"):
            good = as_float(sample(kind, n, 1), dtype)
            assert encode(kernels, method, good, blocksize)[0] is True
            for bad in (np.nan, -np.nan, np.inf, -np.inf):
                for position in range(n):
                    values = good.copy()
                    values[position] = stored(np.array([bad]), dtype)[0]
                    assert encode(kernels, method, values, blocksize)[0] is False, (kind, bad, position)

    @pytest.mark.parametrize("pattern", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFC00000])
    def test_any_nan_is_found(self, kernels: ModuleType, method: str, pattern: int) -> None:
        values = np.zeros(5000, np.float32)
        values.view(np.uint32)[4321] = pattern
        assert encode(kernels, method, values, 4096)[0] is False

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_largest_values_are_finite(self, kernels: ModuleType, method: str, dtype: str) -> None:
        largest = stored(np.array([FORMATS[dtype][2]] * 130), dtype)
        finite, codes, stats = encode(kernels, method, largest, 64)
        assert finite is True
        decoded = decode(kernels, method, codes, stats, 130, 64, dtype)
        assert np.isfinite(exactly(decoded)).all()
        if method != "linear":
            assert bits(decoded).tolist() == bits(largest).tolist()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_a_scale_that_is_too_large_saturates_its_own_block(
        self, kernels: ModuleType, method: str, dtype: str
    ) -> None:
        values = sample("weights", 3 * 64, 3)
        _, codes, stats = encode(kernels, method, values, 64)
        huge = stats.copy()
        huge[1] = 0x7F7F if method == "linear" else np.finfo(np.float32).max
        found = exactly(decode(kernels, method, codes, huge, values.size, 64, dtype))
        plain = exactly(decode(kernels, method, codes, stats, values.size, 64, dtype))
        assert (found[:64] == plain[:64]).all() and (found[128:] == plain[128:]).all()
        assert 0.99 * FORMATS[dtype][2] < np.abs(found).max() <= FORMATS[dtype][2]
        assert (np.sign(found) == np.sign(plain)).all()


@pytest.mark.parametrize("method", METHODS)
class TestLongArrays:
    """Whatever an implementation cuts its work into, only the blocks are to be seen."""

    @pytest.mark.parametrize("blocksize", [64, 90, 4096])
    def test_blocks_are_independent(self, kernels: ModuleType, method: str, blocksize: int) -> None:
        values = sample("weights", 600_001, 9)
        _, codes, stats = encode(kernels, method, values, blocksize)
        out = decode(kernels, method, codes, stats, values.size, blocksize, "float32")
        step = 150_000 // blocksize * blocksize
        for start in range(0, values.size, step):
            part = values[start : start + step]
            _, part_codes, part_stats = encode(kernels, method, part, blocksize)
            at, first = code_count(method, start), start // blocksize
            assert (codes[at : at + part_codes.size] == part_codes).all()
            assert (stats[first : first + part_stats.size] == part_stats).all()
            part_out = decode(kernels, method, part_codes, part_stats, part.size, blocksize, "float32")
            assert (out[start : start + step] == part_out).all()

    @pytest.mark.parametrize("largest_at", [0, 300_000, 599_999])
    def test_one_block(self, kernels: ModuleType, method: str, largest_at: int) -> None:
        if method in ("nf4", "fp4"):
            pytest.skip("blocks of 4-bit codes are short")
        values = sample("normal", 600_000, 10)
        values[largest_at] = 6
        _, codes, stats = encode(kernels, method, values, values.size)
        for start in range(0, values.size, 100_000):
            part = values[start : start + 100_000].copy()
            part[0] = 6
            _, part_codes, part_stats = encode(kernels, method, part, part.size)
            assert (codes[start + 1 : start + part.size] == part_codes[1:]).all()
            assert stats.tolist() == part_stats.tolist()


class TestExamples:
    """Worked by hand from the tables."""

    def encode(self, kernels: ModuleType, method: str, *values: float) -> tuple[list[int], list[float]]:
        finite, codes, stats = encode(kernels, method, np.array(values, np.float32), 4)
        assert finite is True
        return codes.tolist(), stats.tolist()

    def test_nf4(self, kernels: ModuleType) -> None:
        assert self.encode(kernels, "nf4", 2, -2, 0, 1) == ([0xF0, 0x7C], [2.0])
        assert self.encode(kernels, "nf4", 0, -0.0, 0, 0, 3) == ([0x77, 0x77, 0xF0], [0.0, 3.0])

    def test_fp4(self, kernels: ModuleType) -> None:
        assert self.encode(kernels, "fp4", 2, -2, 0, 1) == ([0x3B, 0x05], [2.0])
        assert self.encode(kernels, "fp4", 1, -0.001, 0.001, -0.0) == ([0x38, 0x00], [1.0])

    def test_fp4_sign_is_the_sign_of_the_scaled_value(self, kernels: ModuleType) -> None:
        # The smallest value times 1 / 2**20 is -0.0, which is not below 0.
        assert self.encode(kernels, "fp4", 2.0**20, -(2.0**-149)) == ([0x30], [2.0**20])

    def test_int8(self, kernels: ModuleType) -> None:
        assert self.encode(kernels, "int8", 2, -2, 0, -0.0, 0) == ([255, 0, 127, 127, 127], [2.0, 0.0])

    def test_linear(self, kernels: ModuleType) -> None:
        one = 0x3F80
        assert self.encode(kernels, "linear", 127, -126.5, 0.5, -1.5) == ([127, -126, 0, -2], [one])
        # absmax / 127 is rounded down to the scale 1, by as much as that goes.
        assert self.encode(kernels, "linear", 127.496, -127.496) == ([127, -127], [one])

    def test_linear_scale_is_zero_or_normal(self, kernels: ModuleType) -> None:
        assert self.encode(kernels, "linear", 127 * 2.0**-126, 2.0**-126) == ([127, 1], [0x0080])
        assert self.encode(kernels, "linear", 126 * 2.0**-126, 2.0**-126) == ([0, 0], [0])
        # Rounded to bfloat16 first.
        assert self.encode(kernels, "linear", 126.9999 * 2.0**-126) == ([127], [0x0080])

    def test_linear_scales_half_way_between_two(self, kernels: ModuleType) -> None:
        midpoints = 1 + (2 * np.arange(128) + 1) / 256
        at = (127 * midpoints * np.array([[1], [2.0**-133], [2.0**-40], [2.0**119]])).astype(np.float32).reshape(-1)
        for ulps in (-2, -1, 0, 1, 2):
            values = (at.view(np.int32) + np.int32(ulps)).view(np.float32)
            _, codes, scales = encode(kernels, "linear", values, 1)
            expected, expected_scales = expected_codes("linear", values, 1)
            assert codes.tolist() == expected.tolist()
            assert scales.tolist() == expected_scales.tolist()

    @pytest.mark.parametrize(("method", "db"), [("nf4", 20.7), ("fp4", 18.3), ("int8", 40.4), ("linear", 44.5)])
    def test_noise_on_normal_data(self, kernels: ModuleType, method: str, db: float) -> None:
        x = sample("normal", 1 << 16, 2)
        _, codes, stats = encode(kernels, method, x, 64)
        noise = x - decode(kernels, method, codes, stats, x.size, 64, "float32")
        assert 20 * np.log10(np.linalg.norm(x) / np.linalg.norm(noise)) == pytest.approx(db, abs=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_code_of_minus_128_is_reported_and_decoded(kernels: ModuleType, dtype: str) -> None:
    scales, out = np.array([0x3F80, 0x4000, 0x4080], np.uint16), Output(165, float_dtype(dtype))  # 1, 2, 4
    codes = np.resize(np.arange(-127, 128, dtype=np.int8), 165)
    assert kernels.dequantize_linear(codes, scales, out.array, blocksize=64) is True
    for position in range(165):
        bad = codes.copy()
        bad[position] = -128
        assert kernels.dequantize_linear(bad, scales, out.array, blocksize=64) is False, position
        assert exactly(out.checked())[position] == -128 * 2.0 ** (position // 64)


class TestAbsmax:
    @settings(max_examples=100, deadline=None)
    @given(values=VALUES, dtype=st.sampled_from(FLOATS), blocksize=blocksizes("int8"))
    def test_absmax(self, kernels: ModuleType, values: Array, dtype: str, blocksize: int) -> None:
        values = as_float(values, dtype)
        absmax = Output(blocks(values.size, blocksize), np.float32)
        assert kernels.blockwise_absmax(values, absmax.array, blocksize=blocksize) is True
        assert absmax.checked().tolist() == expected_absmax(exactly(values), blocksize).tolist()

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_nonfinite_values_are_found(self, kernels: ModuleType, dtype: str, bad: float) -> None:
        absmax = np.empty(3, np.float32)
        for position in range(165):
            values = as_float(sample("normal", 165, 1), dtype)
            values[position] = stored(np.array([bad]), dtype)[0]
            assert kernels.blockwise_absmax(values, absmax, blocksize=64) is False, position


def cast(kernels: ModuleType, values: Array, dtype: str, *, saturate: bool = False) -> tuple[Array, int]:
    out = Output(values.size, float_dtype(dtype))
    overflows = kernels.cast(values, out.array, saturate=saturate)
    assert type(overflows) is int
    return out.checked(), overflows


class TestCast:
    EVERY_16_BITS = np.arange(65536, dtype=np.uint16)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_widening_every_value(self, kernels: ModuleType, dtype: str) -> None:
        values = self.EVERY_16_BITS.view(float_dtype(dtype))
        wide, overflows = cast(kernels, values, "float32")
        assert overflows == 0
        number = ~np.isnan(wide)
        assert (wide[number] == exactly(values)[number]).all()
        assert (np.signbit(wide) == (self.EVERY_16_BITS >= 0x8000)).all()
        # NaN: the payload at the top of the wider one; of float16 it is made quiet, as in hardware.
        payload = self.EVERY_16_BITS[~number].astype(np.uint32)
        if dtype == "bfloat16":
            expected = payload << 16
        else:
            expected = (payload & 0x8000) << 16 | 0x7FC00000 | (payload & 0x3FF) << 13
        assert (bits(wide)[~number] == expected).all()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_narrowing_around_every_value_and_midpoint(self, kernels: ModuleType, dtype: str) -> None:
        ascending = exactly(self.EVERY_16_BITS.view(float_dtype(dtype)))[: 0x7F81 if dtype == "bfloat16" else 0x7C01]
        ascending[-1] = 2 * ascending[-2] - ascending[-3]  # where infinity begins, one step after the largest
        middle = (ascending[1:] + ascending[:-1]) / 2
        with np.errstate(over="ignore"):  # 2**128
            at = np.concatenate([ascending, middle]).astype(np.float32)
        x = np.concatenate([at, np.nextafter(at, np.float32(-np.inf)), np.nextafter(at, np.float32(np.inf))])
        x = np.concatenate([x, -x])
        expected = stored(rounded(exactly(x), dtype), dtype)
        narrow, overflows = cast(kernels, x, dtype)
        assert (bits(narrow) == bits(expected)).all()
        overflowed = np.isinf(exactly(expected)) & np.isfinite(x)
        assert overflows == overflowed.sum() > 0

        narrow, overflows = cast(kernels, x, dtype, saturate=True)
        largest = np.copysign(FORMATS[dtype][2], x)
        saturated = stored(np.where(overflowed, largest, exactly(expected)), dtype)
        assert (bits(narrow) == bits(saturated)).all()
        assert overflows == overflowed.sum()

    @pytest.mark.parametrize(
        ("dtype", "wide", "narrow"),
        [
            ("float16", 0x7F800001, 0x7E00),
            ("float16", 0xFFFFFFFF, 0xFFFF),
            ("float16", 0xFF802000, 0xFE01),
            ("float16", 0x7F800000, 0x7C00),
            ("bfloat16", 0x7F800001, 0x7FC0),
            ("bfloat16", 0xFFFFFFFF, 0xFFFF),
            ("bfloat16", 0xFF810000, 0xFFC1),
            ("bfloat16", 0xFF800000, 0xFF80),
        ],
    )
    @pytest.mark.parametrize("saturate", [False, True])
    def test_nan_and_infinity_stay(
        self, kernels: ModuleType, dtype: str, wide: int, narrow: int, saturate: bool
    ) -> None:
        values = np.full(67, wide, np.uint32).view(np.float32)
        out, overflows = cast(kernels, values, dtype, saturate=saturate)
        assert set(bits(out).tolist()) == {narrow}
        assert overflows == 0
