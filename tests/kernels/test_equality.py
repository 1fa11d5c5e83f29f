"""Every instruction set gives the bits of the NumPy twin, for all lengths, addresses, types and values."""

import functools
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import (
    FLOATS,
    METHODS,
    SAMPLES,
    Array,
    Output,
    accumulate,
    as_float,
    bits,
    bits_with_one_nan,
    blocks,
    code_count,
    decode,
    encode,
    float_dtype,
    misaligned,
    sample,
)

from tensorwire.kernels import _numpy

RNG = np.random.default_rng(7)
ANY_BYTES = RNG.integers(0, 256, 1 << 20, dtype=np.uint8)


def sizes_of_blocks(method: str) -> tuple[int, ...]:
    return (2, 6, 32, 64, 90, 128, 4096) if method in ("nf4", "fp4") else (1, 3, 16, 64, 100, 256, 4096, 1 << 40)


def check_encode(
    native: ModuleType, method: str, values: Array, blocksize: int, offset: int = 0, kind: str = ""
) -> None:
    expected = encode(_numpy, method, values, blocksize)
    found = encode(native, method, misaligned(values, offset) if offset else values, blocksize, offset)
    where = f"{method} {kind} {values.dtype} n={values.size} blocksize={blocksize} offset={offset}"
    assert found[0] is expected[0], where
    if expected[0]:
        assert (bits(found[1]) == bits(expected[1])).all(), f"codes: {where}"
        assert (bits(found[2]) == bits(expected[2])).all(), f"absmax or scales: {where}"


def check_decode(
    native: ModuleType, method: str, n: int, blocksize: int, dtype: str, seed: int, offset: int = 0
) -> None:
    """Of any bytes, over statistics of any bits: a peer sends what it likes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, code_count(method, n), dtype=np.uint8)
    stats = rng.integers(0, 256, blocks(n, blocksize) * 4, dtype=np.uint8).view(np.uint16)
    if method == "linear":
        codes, stats = codes.view(np.int8), stats[::2].copy()
    else:
        stats = stats.view(np.float32)
    expected = decode(_numpy, method, codes, stats, n, blocksize, dtype)
    if offset:
        codes, stats = misaligned(codes, offset), misaligned(stats, offset)
    found = decode(native, method, codes, stats, n, blocksize, dtype, offset)
    where = f"{method} {dtype} n={n} blocksize={blocksize} offset={offset}"
    assert (bits_with_one_nan(found) == bits_with_one_nan(expected)).all(), where
    sums = rng.standard_normal(n)
    expected_sums = accumulate(_numpy, method, codes, stats, sums, blocksize, dtype)
    found_sums = accumulate(native, method, codes, stats, sums, blocksize, dtype, offset)
    assert (bits_with_one_nan(found_sums) == bits_with_one_nan(expected_sums)).all(), where


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
class TestQuantizers:
    def test_every_small_length(self, native: ModuleType, method: str, dtype: str) -> None:
        for n in range(201):
            choices = sizes_of_blocks(method)
            for k in range(2):
                blocksize = choices[(n + k * 3) % len(choices)]
                values = as_float(sample(SAMPLES[(n + k) % len(SAMPLES)], n, k), dtype)
                check_encode(native, method, values, blocksize)
                check_decode(native, method, n, blocksize, dtype, seed=n)

    def test_values(self, native: ModuleType, method: str, dtype: str) -> None:
        for kind in SAMPLES:
            values = as_float(sample(kind, 30_011, 11), dtype)
            for blocksize in (64, 4096, 90 if method in ("nf4", "fp4") else 1):
                check_encode(native, method, values, blocksize, kind=kind)

    @pytest.mark.parametrize("n", [4097, 65_535, 300_007])
    def test_long_ones(self, native: ModuleType, method: str, dtype: str, n: int) -> None:
        values = as_float(sample("normal", n, 5), dtype)
        for blocksize in (32, 64, 2048):
            check_encode(native, method, values, blocksize)
            check_decode(native, method, n, blocksize, dtype, seed=n)

    def test_every_size_of_block(self, native: ModuleType, method: str, dtype: str) -> None:
        step = 2 if method in ("nf4", "fp4") else 1
        values = as_float(sample("weights", 701, 3), dtype)
        for blocksize in range(step, 140, step):
            check_encode(native, method, values, blocksize)
            check_decode(native, method, 701, blocksize, dtype, seed=blocksize)

    def test_every_address(self, native: ModuleType, method: str, dtype: str) -> None:
        for n in (1, 64, 333, 5000):
            values = as_float(sample("normal", n, 4), dtype)
            for offset in (1, 2, 3, 4, 20, 63):
                check_encode(native, method, values, 64, offset)
                check_decode(native, method, n, 64, dtype, seed=n, offset=offset)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_bits(self, native: ModuleType, method: str, dtype: str, data: st.DataObject) -> None:
        width = np.dtype(float_dtype(dtype)).itemsize
        octets = data.draw(st.binary(max_size=600))
        values = np.frombuffer(octets[: len(octets) // width * width], float_dtype(dtype))
        check_encode(native, method, values, data.draw(st.sampled_from(sizes_of_blocks(method))))


class TestAbsmax:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("kind", SAMPLES)
    def test_absmax(self, native: ModuleType, dtype: str, kind: str) -> None:
        for n in (*range(70), 4097, 100_003):
            values = as_float(sample(kind, n, 6), dtype)
            for blocksize in (1, 7, 64, 4096, 1 << 40):
                expected = np.empty(blocks(n, blocksize), np.float32)
                found = Output(expected.size, np.float32)
                assert _numpy.blockwise_absmax(values, expected, blocksize=blocksize) is True
                assert native.blockwise_absmax(values, found.array, blocksize=blocksize) is True
                assert (bits(found.checked()) == bits(expected)).all(), (n, blocksize)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weighted_sums_of_plain_values(native: ModuleType, dtype: str) -> None:
    for n in (*range(70), 4097, 100_003):
        values = ANY_BYTES.view(float_dtype(dtype))[n : 2 * n]
        expected, found = Output(n, np.float64), Output(n, np.float64, offset=n % 8)
        expected.array[:] = found.array[:] = np.arange(n) / 3
        with np.errstate(invalid="ignore"):
            _numpy.accumulate(values, expected.array, weight=0.7)
        native.accumulate(misaligned(values, n % 5), found.array, weight=0.7)
        assert (bits_with_one_nan(found.checked()) == bits_with_one_nan(expected.checked())).all(), n


PAIRS = [("float32", "float16"), ("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
class TestCast:
    def check(self, native: ModuleType, values: Array, target: str, *, offset: int = 0) -> None:
        for saturate in (False, True):
            expected, found = (
                Output(values.size, float_dtype(target)),
                Output(values.size, float_dtype(target), offset),
            )
            count = _numpy.cast(values, expected.array, saturate=saturate)
            crc = np.zeros(1, np.uint32)
            assert native.cast(misaligned(values, offset), found.array, crc, saturate=saturate) == count
            assert (bits(found.checked()) == bits(expected.checked())).all()
            assert crc[0] == native.crc32c(found.array)
            uncached = (None, True, False)[(values.size + offset) % 3]
            assert native.cast(values, found.array, saturate=saturate, uncached=uncached) == count
            assert (bits(found.checked()) == bits(expected.checked())).all()

    def test_any_bits(self, native: ModuleType, source: str, target: str) -> None:
        self.check(native, ANY_BYTES.view(float_dtype(source)), target)

    @pytest.mark.parametrize("kind", SAMPLES)
    def test_values(self, native: ModuleType, source: str, target: str, kind: str) -> None:
        self.check(native, as_float(sample(kind, 20_011, 8), source), target)

    def test_every_length_and_address(self, native: ModuleType, source: str, target: str) -> None:
        values = ANY_BYTES.view(float_dtype(source))
        for n in range(201):
            self.check(native, values[n : 2 * n], target, offset=n % 7)


PERIOD, REST = 1 << 20, 1237


def repeated(array: Array, period: int, times: int) -> Array:
    return np.concatenate([np.tile(array[:period], times), array[period:]])


@functools.cache
def one_period(method: str, dtype: str) -> tuple[Array, Array, Array, Array]:
    """Values, their codes and statistics, and these decoded, by the twin."""
    values = as_float(sample("weights", PERIOD + REST, 12), dtype)
    _, codes, stats = encode(_numpy, method, values, 64)
    return values, codes, stats, decode(_numpy, method, codes, stats, values.size, 64, dtype)


@pytest.mark.parametrize("offset", [0, 2, 20])
class TestHugeOutputs:
    """Of more than 16 MiB, which may be written past the caches. They repeat: the twin does one period."""

    @pytest.mark.parametrize("method", METHODS)
    def test_encode(self, native: ModuleType, method: str, offset: int) -> None:
        values, codes, stats, _ = one_period(method, "float16")
        times = 17 * 2 // code_count(method, 2)
        long_values = misaligned(repeated(values, PERIOD, times), offset)
        finite, found_codes, found_stats = encode(native, method, long_values, 64, offset)
        assert finite is True
        assert (found_codes == repeated(codes, code_count(method, PERIOD), times)).all()
        assert (bits(found_stats) == bits(repeated(stats, PERIOD // 64, times))).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("method", METHODS)
    def test_decode(self, native: ModuleType, method: str, dtype: str, offset: int) -> None:
        _, codes, stats, expected = one_period(method, dtype)
        times = 17 // expected.itemsize + 1
        codes = misaligned(repeated(codes, code_count(method, PERIOD), times), offset)
        stats = repeated(stats, PERIOD // 64, times)
        found = decode(native, method, codes, stats, times * PERIOD + REST, 64, dtype, offset)
        assert (bits(found) == bits(repeated(expected, PERIOD, times))).all()

    @pytest.mark.parametrize(("source", "target"), PAIRS)
    def test_cast(self, native: ModuleType, source: str, target: str, offset: int) -> None:
        values = as_float(sample("bits", PERIOD + REST, 14), source)
        expected = np.empty(values.size, float_dtype(target))
        overflows = [_numpy.cast(values[start:], expected[start:]) for start in (PERIOD, 0)]
        times = 17 // expected.itemsize + 1
        found = Output(times * PERIOD + REST, float_dtype(target), offset)
        crc = np.zeros(1, np.uint32) if offset else None
        count = native.cast(misaligned(repeated(values, PERIOD, times), offset), found.array, crc)
        assert crc is None or crc[0] == native.crc32c(found.array)
        assert count == (overflows[1] - overflows[0]) * times + overflows[0]
        assert (bits(found.checked()) == bits(repeated(expected, PERIOD, times))).all()
