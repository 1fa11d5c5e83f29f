"""The kernels of byte planes: what they do, every instruction set like the twin, and what they refuse."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kernel_samples import Array, Output, blocks, misaligned

from tensorwire.kernels import _numpy

WIDTHS = (1, 2, 4, 8)
LENGTHS = (*range(1, 140), 511, 512, 513, 1000, 4096, 5003)
RNG = np.random.default_rng(35)
ANY_BYTES = RNG.integers(0, 256, 1 << 17, dtype=np.uint8)


def marks_of(elements: int, seed: int) -> Array:
    """Some of the blocks; all for seed 0, none for seed 1."""
    bits = np.random.default_rng(seed).random(blocks(elements, 64)) < (1, 0, 0.5, 0.1, 0.9)[seed % 5]
    return np.packbits(bits, bitorder="little")


def standing(marks: Array, elements: int) -> int:
    return int(np.repeat(np.unpackbits(marks, bitorder="little"), 64)[:elements].sum())


def split(kernels: ModuleType, values: Array, marks: Array, width: int, offset: int = 0) -> list[Array]:
    outputs = [Output(standing(marks, values.size // width), np.uint8, offset + p) for p in range(width)]
    kernels.split_planes(misaligned(values, offset), marks, [output.array for output in outputs])
    return [output.checked() for output in outputs]


class TestDefinition:
    def test_the_sign_goes_below_the_exponent(self, kernels: ModuleType) -> None:
        values = np.array([-1.5, 2.0], np.float32)
        low, second, third, high = split(kernels, values.view(np.uint8), np.array([1], np.uint8), 4)
        assert [*high] == [127, 128] and [*third] == [0x81, 0x00] and not low.any() and not second.any()

    def test_single_byte_elements_are_unchanged(self, kernels: ModuleType) -> None:
        assert np.array_equal(split(kernels, ANY_BYTES[:100], np.array([3], np.uint8), 1)[0], ANY_BYTES[:100])

    def test_blocks_without_a_mark_are_zeros(self, kernels: ModuleType) -> None:
        out = np.full(2 * 200, 7, np.uint8)
        kernels.merge_planes([np.full(72, 3, np.uint8)] * 2, np.array([0b1010], np.uint8), out)
        assert not out[:128].any() and not out[256:384].any()
        assert (out[128:256].view(np.uint16) == 0x8181).all() and (out[384:].view(np.uint16) == 0x8181).all()

    def test_a_plane_of_one_byte_is_constant(self, kernels: ModuleType) -> None:
        for count in (1, 64, 100):
            marks, one = marks_of(count, 0), np.array([130], np.uint8)
            whole, short = np.empty((2, 2 * count), np.uint8)
            kernels.merge_planes([ANY_BYTES[:count].copy(), np.full(count, 130, np.uint8)], marks, whole)
            kernels.merge_planes([ANY_BYTES[:count].copy(), one], marks, short)
            assert np.array_equal(whole, short)

    def test_marks_of_nonzero_blocks(self, kernels: ModuleType) -> None:
        values = np.zeros(10 * 16 + 3, np.uint8)
        marks = np.full(2, 0xFF, np.uint8)
        assert kernels.nonzero_blocks(values, marks, blocksize=16) == 0 and not marks.any()
        values[[0, 47, 162]] = 1, 0x80, 1
        assert kernels.nonzero_blocks(values, marks, blocksize=16) == 3 and [*marks] == [0b101, 0b100]

    def test_counts(self, kernels: ModuleType) -> None:
        counts = np.full(256, 9, np.uint32)
        kernels.byte_histogram(ANY_BYTES[:1000], counts)
        assert np.array_equal(counts, np.bincount(ANY_BYTES[:1000], minlength=256))
        kernels.byte_histogram(ANY_BYTES[:1000], counts, every=5)
        some = np.concatenate([ANY_BYTES[at : min(at + 64, 1000)] for at in range(0, 1000, 320)])
        assert np.array_equal(counts, np.bincount(some, minlength=256))


@pytest.mark.parametrize("width", WIDTHS)
class TestEquality:
    def test_split_and_merge(self, native: ModuleType, width: int) -> None:
        for n in LENGTHS:
            values, marks, offset = ANY_BYTES[n : n + n * width], marks_of(n, n % 5), n % 7
            planes = split(native, values, marks, width, offset)
            expected = split(_numpy, values, marks, width)
            assert all(map(np.array_equal, planes, expected)), n
            found, merged = Output(n * width, np.uint8, offset), np.empty(n * width, np.uint8)
            native.merge_planes([misaligned(plane, offset) for plane in planes], marks, found.array)
            _numpy.merge_planes(expected, marks, merged)
            assert np.array_equal(found.checked(), merged), n
            kept = np.repeat(np.unpackbits(marks, bitorder="little"), 64)[:n].repeat(width)
            assert np.array_equal(merged, values * kept), n

    def test_constant_planes(self, native: ModuleType, width: int) -> None:
        for n in (1, 63, 64, 65, 1000):
            marks, constant = marks_of(n, 2 + n % 3), np.array([n % 256], np.uint8)
            planes = [constant if (n + p) % 3 else ANY_BYTES[p : p + standing(marks, n)] for p in range(width)]
            found, expected = Output(n * width, np.uint8), np.empty(n * width, np.uint8)
            native.merge_planes(planes, marks, found.array)
            _numpy.merge_planes(planes, marks, expected)
            assert np.array_equal(found.checked(), expected), n


def test_marks_and_counts_are_equal(native: ModuleType) -> None:
    sparse = np.where(RNG.random(30_000) < 0.005, ANY_BYTES[:30_000], 0).astype(np.uint8)
    for n in (0, *LENGTHS, 30_000):
        for blocksize in (1, 7, 64, 128, 512, 1 << 40):
            size = blocks(blocks(n, blocksize), 8)
            found, expected = Output(size, np.uint8), np.full(size, 3, np.uint8)
            count = native.nonzero_blocks(sparse[:n], found.array, blocksize=blocksize)
            assert count == _numpy.nonzero_blocks(sparse[:n], expected, blocksize=blocksize)
            assert np.array_equal(found.checked(), expected)
        for every in (1, 3, 1 << 60):
            counts, twins = Output(256, np.uint32, n % 3), np.empty(256, np.uint32)
            native.byte_histogram(misaligned(ANY_BYTES[:n], n % 5), counts.array, every=every)
            _numpy.byte_histogram(ANY_BYTES[:n], twins, every=every)
            assert np.array_equal(counts.checked(), twins)


def samples(n: int) -> list[Array]:
    """Bytes of many kinds: even, few, skewed beyond codes of 11 bits, one, two far apart, long runs."""
    rng = np.random.default_rng(n)
    kinds = [rng.integers(0, 256, n), rng.normal(120, 3, n), rng.geometric(0.5, n), np.full(n, 7), np.zeros(n)]
    kinds += [rng.integers(0, 2, n) * 255, np.minimum(rng.zipf(1.3, n), 255), np.sort(rng.geometric(0.1, n))]
    fibonacci = np.repeat(np.arange(24), np.minimum(1.618 ** np.arange(24), 1 << 20).astype(int))
    return [np.clip(kind, 0, 255).astype(np.uint8) for kind in [*kinds, fibonacci[:n]]]


class TestHuffman:
    @pytest.mark.parametrize("n", [*range(1, 20), 200, 1000, 5000, 131_072, 131_073, 300_001])
    def test_codes_equal_the_twins_and_round_trip(self, native: ModuleType, n: int) -> None:
        for number, values in enumerate(samples(n)):
            size = values.size + 1000
            found, expected = Output(size, np.uint8, n % 7), np.empty(size, np.uint8)
            made = native.huffman_encode(misaligned(values, n % 5), found.array)
            assert made == _numpy.huffman_encode(values, expected), number
            codes = found.checked()[:made]
            assert np.array_equal(codes, expected[:made]), number
            for kernels in (native, _numpy):
                out = Output(values.size, np.uint8, n % 3)
                assert kernels.huffman_decode(codes, out.array) is True
                assert np.array_equal(out.checked(), values), number

    def test_without_room_nothing_is_written_past_the_end(self, kernels: ModuleType) -> None:
        values = samples(3000)[1]
        whole = np.empty(4000, np.uint8)
        size = kernels.huffman_encode(values, whole)
        for room in range(size + 20):
            out = Output(room, np.uint8)
            assert kernels.huffman_encode(values, out.array) == (size if room >= size + 8 else 0)
            out.checked()

    def test_codes_of_an_empty_plane(self, kernels: ModuleType) -> None:
        nothing = np.empty(0, np.uint8)
        assert kernels.huffman_encode(nothing, np.empty(9, np.uint8)) == 0
        assert kernels.huffman_decode(nothing, nothing) is True
        assert kernels.huffman_decode(np.zeros(1, np.uint8), nothing) is False

    def test_damaged_codes_get_the_same_verdict_within_bounds(self, native: ModuleType) -> None:
        rng, good = np.random.default_rng(5), 0
        for round_ in range(600):
            values = samples(int(rng.integers(1, 700)))[round_ % 9]
            codes = np.empty(values.size + 200, np.uint8)
            codes = codes[: _numpy.huffman_encode(values, codes)]
            codes[rng.integers(0, min(codes.size, 30 if round_ % 2 else 10_000), 2)] ^= 1 << int(rng.integers(0, 8))
            codes = codes[: codes.size - int(rng.integers(0, 2))].copy()
            found, expected = Output(values.size, np.uint8), np.empty(values.size, np.uint8)
            verdict = native.huffman_decode(codes, found.array)
            assert verdict is _numpy.huffman_decode(codes, expected)
            if verdict:
                good += 1
                assert np.array_equal(found.checked(), expected)
            found.checked()
        assert 20 < good < 580

    def test_arguments(self, kernels: ModuleType) -> None:
        values, codes = np.zeros(100, np.uint8), np.zeros(300, np.uint8)
        for kernel, out in ((kernels.huffman_encode, "codes"), (kernels.huffman_decode, "out")):
            refused(TypeError, out, kernel, values, codes.view(np.int8))
            refused(ValueError, "overlaps", kernel, codes[:100], codes[99:])
            locked = codes.copy()
            locked.setflags(write=False)
            refused(ValueError, out, kernel, values, locked)


def refused(error: type[Exception], says: str, kernel: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=says):
        kernel(*arguments, **options)


class TestArguments:
    """130 elements of 2 bytes: 3 blocks."""

    def test_sizes(self, kernels: ModuleType) -> None:
        values, marks, planes = np.zeros(260, np.uint8), np.array([5], np.uint8), [np.zeros(66, np.uint8)] * 2
        apart = [plane.copy() for plane in planes]
        kernels.split_planes(values, marks, apart)
        kernels.merge_planes(planes, marks, values)
        refused(ValueError, "marks", kernels.split_planes, values, np.zeros(2, np.uint8), apart)
        refused(ValueError, "marks", kernels.merge_planes, planes, np.array([8], np.uint8), values)
        refused(ValueError, "planes", kernels.split_planes, values, np.array([3], np.uint8), apart)
        refused(ValueError, "planes", kernels.merge_planes, [planes[0], planes[0][:-1]], marks, values)
        refused(ValueError, "elements", kernels.split_planes, values[:-1], marks, apart)
        for count in (0, 3, 5, 9):
            refused(ValueError, "planes", kernels.split_planes, values, marks, [planes[0]] * count)
            refused(ValueError, "planes", kernels.merge_planes, [planes[0]] * count, marks, values)
        refused(ValueError, "marks", kernels.nonzero_blocks, values, np.zeros(2, np.uint8), blocksize=64)
        refused(ValueError, "blocksize", kernels.nonzero_blocks, values, marks, blocksize=0)
        refused(ValueError, "counts", kernels.byte_histogram, values, np.zeros(255, np.uint32))
        refused(ValueError, "every", kernels.byte_histogram, values, np.zeros(256, np.uint32), every=0)

    def test_types(self, kernels: ModuleType) -> None:
        values, marks, planes = np.zeros(260, np.uint8), np.array([5], np.uint8), [np.zeros(66, np.uint8)] * 2
        refused(TypeError, "values", kernels.split_planes, values.view(np.uint16), marks, planes)
        refused(TypeError, "marks", kernels.split_planes, values, marks.view(np.int8), planes)
        refused(TypeError, "planes", kernels.merge_planes, [planes[0], None], marks, values)
        refused(TypeError, "out", kernels.merge_planes, planes, marks, bytes(260))
        refused(TypeError, "counts", kernels.byte_histogram, values, np.zeros(256, np.int32))

    def test_outputs_must_be_writable_and_not_overlap(self, kernels: ModuleType) -> None:
        values, marks, memory = np.zeros(260, np.uint8), np.array([5], np.uint8), np.zeros(400, np.uint8)
        locked = np.zeros(66, np.uint8)
        locked.setflags(write=False)
        refused(ValueError, "planes", kernels.split_planes, values, marks, [memory[:66], locked])
        refused(ValueError, "overlaps", kernels.split_planes, values, marks, [memory[:66], memory[65:131]])
        refused(ValueError, "overlaps", kernels.split_planes, values, marks, [memory[:66], values[:66]])
        refused(ValueError, "overlaps", kernels.merge_planes, [memory[:66], memory[:66]], marks, memory[65:325])
        refused(ValueError, "overlaps", kernels.nonzero_blocks, values, values[:1], blocksize=64)
        kernels.split_planes(values, marks, [memory[:66], memory[66:132]])
