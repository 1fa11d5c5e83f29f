"""The kernels of patches: what they do, every instruction set like the twin, and what they refuse."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kernel_samples import Array, Output, misaligned

from tensorwire.kernels import _numpy

LENGTHS = (2, 3, 63, 64, 65, 200, 4095, 4096, 4097, 20_000)
RATES = (0.0, 0.005, 0.05, 0.3, 0.49)
TYPES = (np.uint16, np.float16)


def pair(n: int, rate: float, dtype: Any, seed: int = 0) -> tuple[Array, Array]:
    """Floats of many exponents, of which the small ones change more often, and by more than one now and then."""
    rng = np.random.default_rng([n, int(1000 * rate), seed])
    floats = (rng.normal(0, 0.05, n) * 2.0 ** rng.integers(-6, 3, n)).astype(np.float32)
    base = (floats.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else floats.astype(np.float16)
    likely = 2 * rate * (abs(floats) < np.median(abs(floats)))
    change = np.where(rng.random(n) < likely, rng.choice([1, -1, 1, -1, 2, -3, 100, -(1 << 15)], n), 0)
    changed = (base.view(np.uint16) + change.astype(np.uint16)).astype(np.uint16)
    return base, changed.view(dtype)


def encode(kernels: ModuleType, base: Array, values: Array, room: int, offset: int = 0) -> Array:
    codes = Output(room, np.uint8, offset)
    work = np.empty(2 * base.size, np.uint32)
    size, changed = kernels.encode_changes(misaligned(base, offset), misaligned(values, offset), codes.array, work)
    assert changed == np.count_nonzero(base.view(np.uint16) != values.view(np.uint16))
    return codes.checked()[:size].copy()


def decode(kernels: ModuleType, codes: Array, base: Array, offset: int = 0) -> Array | None:
    out = Output(base.size, base.dtype, offset)
    out.array[:] = base
    changed = kernels.decode_changes(misaligned(codes, offset), out.array, np.empty(2 * base.size, np.uint32))
    made = out.checked()
    assert changed in (0, np.count_nonzero(made.view(np.uint16) != base.view(np.uint16)))
    return made if changed else None


class TestDefinition:
    def test_one_change_of_one_float(self, kernels: ModuleType) -> None:
        base = np.full(100, 0x3C00, np.uint16)
        values = base.copy()
        values[40] -= 1
        codes = encode(kernels, base, values, 100)
        assert np.array_equal(decode(kernels, codes, base), values) and codes.size < 12

    def test_no_change_and_too_many_changes_are_not_coded(self, kernels: ModuleType) -> None:
        base = np.arange(100, dtype=np.uint16)
        assert encode(kernels, base, base, 1000).size == 0
        assert encode(kernels, base, np.where(np.arange(100) < 51, base + 1, base).astype(np.uint16), 1000).size == 0
        assert encode(kernels, base, np.where(np.arange(100) < 50, base + 1, base).astype(np.uint16), 1000).size > 0

    def test_differences(self, kernels: ModuleType) -> None:
        base = np.array([5, 5, 5, 0], np.uint32)
        values = np.array([5, 4, 6, 0xFFFFFFFF], np.uint32)
        out = np.empty(16, np.uint8)
        kernels.difference(base.view(np.uint8), values.view(np.uint8), out, width=4)
        assert [*out.view(np.uint32)] == [0, 1, 2, 1]
        kernels.add_difference(out, base.view(np.uint8), width=4)
        assert np.array_equal(base, values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rate", RATES)
def test_sparse_changes_equal_the_twins_and_round_trip(native: ModuleType, dtype: Any, rate: float) -> None:
    for n in LENGTHS:
        base, values = pair(n, rate, dtype)
        wanted = encode(_numpy, base, values, 4 * n + 100)
        found = encode(native, base, values, 4 * n + 100, n % 4 * base.itemsize)
        assert np.array_equal(found, wanted), n
        if found.size:
            for kernels in (native, _numpy):
                assert np.array_equal(decode(kernels, found, base, n % 4).view(np.uint16), values.view(np.uint16)), n
            assert encode(native, base, values, found.size).size == found.size
            assert encode(native, base, values, found.size - 1).size == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_damaged_codes_get_the_same_verdict(native: ModuleType, dtype: Any) -> None:
    accepted = 0
    for seed in range(40):
        base, values = pair(300, 0.1, dtype, seed)
        codes = encode(_numpy, base, values, 2000)
        for at in range(0, codes.size, 3):
            mutant = codes.copy()
            mutant[at] ^= 1 << (at + seed) % 8
            mutant = mutant[: codes.size - (seed % 3 == 2)]
            found, wanted = decode(native, mutant, base), decode(_numpy, mutant, base)
            assert (found is None) == (wanted is None), (seed, at)
            if found is not None:
                accepted += 1
                assert np.array_equal(found.view(np.uint16), wanted.view(np.uint16)), (seed, at)
    assert accepted  # a sign, for example: checksums see to that


@pytest.mark.parametrize("dtype", TYPES)
def test_random_codes_are_refused_or_decoded_alike(native: ModuleType, dtype: Any) -> None:
    rng = np.random.default_rng(9)
    base, _ = pair(500, 0.1, dtype)
    for size in range(60):
        codes = rng.integers(0, 256, size, np.uint8)
        codes[:1] |= 1
        found, wanted = decode(native, codes, base), decode(_numpy, codes, base)
        assert (found is None) == (wanted is None)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_differences_are_equal_and_add_up(native: ModuleType, width: int) -> None:
    rng = np.random.default_rng(width)
    for n in (0, 1, 3, 64, 1000):
        base, values = rng.integers(0, 256, (2, n * width), np.uint8)
        found, wanted = Output(n * width, np.uint8, n % 3), np.empty(n * width, np.uint8)
        native.difference(misaligned(base, 1), misaligned(values, 3), found.array, width=width)
        _numpy.difference(base, values, wanted, width=width)
        assert np.array_equal(found.checked(), wanted)
        for kernels in (native, _numpy):
            made = misaligned(base, 1).copy()
            kernels.add_difference(wanted, made, width=width)
            assert np.array_equal(made, values)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"base": np.zeros(4, np.float32)}, TypeError, "base"),
        ({"values": np.zeros(4, np.float16)}, TypeError, "type of base"),
        ({"values": np.zeros(5, np.uint16)}, ValueError, "values"),
        ({"work": np.zeros(7, np.uint32)}, ValueError, "work"),
        ({"work": misaligned(np.zeros(8, np.uint32), 1)}, ValueError, "aligned"),
        ({"codes": np.zeros(4, np.int8)}, TypeError, "codes"),
    ],
)
def test_wrong_arguments_are_refused(
    kernels: ModuleType, change: dict[str, Array], error: type[Exception], says: str
) -> None:
    base = np.zeros(4, np.uint16)
    given = {"base": base, "values": base.copy(), "codes": np.zeros(9, np.uint8), "work": np.zeros(8, np.uint32)}
    with pytest.raises(error, match=says):
        kernels.encode_changes(*(given | change).values())


def test_other_wrong_arguments_are_refused(kernels: ModuleType) -> None:
    bytes_ = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="width"):
        kernels.difference(bytes_, bytes_.copy(), bytes_.copy(), width=3)
    with pytest.raises(ValueError, match="multiple"):
        kernels.add_difference(bytes_[:7], bytes_[:7].copy(), width=2)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.add_difference(bytes_, bytes_, width=2)
    floats, work = np.zeros(4, np.uint16), np.zeros(8, np.uint32)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.decode_changes(floats.view(np.uint8), floats, work)
    with pytest.raises(ValueError, match="work"):
        kernels.decode_changes(bytes_, floats, work[:5])
