"""The kernels of numbers of a few bits, and of what compressors take in: every instruction set like the twin."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kernel_samples import Array, Output, misaligned

from tensorwire.kernels import _numpy

BITS = [1, 2, 4, 8, 16]
COUNTS = [0, 1, 2, 7, 8, 9, 100, 5003, 40_000]
RNG = np.random.default_rng(41)
NORMAL = RNG.standard_normal(40_000).astype(np.float32)
EXTREME = np.array([0, -0.0, 1e-45, -1e-40, 2.0**110, -(2.0**-126), 1, -1, 0.5, 1.5, 2.5], np.float32)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "values", [NORMAL, np.round(NORMAL), np.resize(EXTREME, 40_000)], ids=["normal", "whole", "extreme"]
)
def test_sums_of_magnitudes_equal_the_twins(kernels: ModuleType, values: Array, count: int) -> None:
    largest, total, there = kernels.sum_magnitudes(misaligned(values[:count], 4))
    assert (largest, total, there) == _numpy.sum_magnitudes(values[:count])
    assert largest == np.abs(values[:count]).max(initial=0) and there == np.count_nonzero(values[:count])
    exact = np.abs(values[:count].astype(np.float64)).sum()
    assert abs(total * 2.0**-32 * largest - exact) <= 2.0**-32 * largest * max(count, 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_codes_equal_the_twins(kernels: ModuleType, bits: int, count: int) -> None:
    sets = [NORMAL[:count], np.resize(EXTREME, count)]
    for values in sets:
        for steps in (
            np.array([0.3], np.float32),
            np.zeros(1, np.float32),
            np.abs(NORMAL[:count]) // 0.5 * np.float32(0.1),
        ):
            made = []
            for module, offset in ((_numpy, 0), (kernels, 1)):
                codes = Output(-(-count * bits // 8), np.uint8, offset)
                module.pack_values(misaligned(values, 4 * offset), steps, codes.array, bits=bits)
                back = Output(count, np.float32, 4 * offset)
                assert module.unpack_values(codes.checked(), steps, back.array, bits=bits)
                made.append((codes.checked().tobytes(), back.checked().tobytes()))
            assert made[0] == made[1]


def test_codes_by_hand(kernels: ModuleType) -> None:
    values, codes = np.array([0.9, -1.1, 5, -0.0, 1e30], np.float32), np.empty(2, np.uint8)
    kernels.pack_values(values, np.ones(1, np.float32), codes, bits=2)
    assert codes.tolist() == [0 | (2 | 1) << 2 | 1 << 4 | 0 << 6, 1]
    back = np.empty(5, np.float32)
    assert kernels.unpack_values(codes, np.array([1, 2, 1, 1, 4], np.float32), back, bits=2)
    assert back.tolist() == [0.5, -3, 1.5, 0.5, 6]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unused_bits_after_the_last_code_are_checked(kernels: ModuleType, bits: int) -> None:
    for count in range(1, 20):
        size, used = -(-count * bits // 8), count * bits % 8
        for bit in range(used or 8, 8):
            codes = np.zeros(size, np.uint8)
            codes[-1] = 1 << bit
            assert not kernels.unpack_values(codes, np.ones(1, np.float32), np.empty(count, np.float32), bits=bits)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", COUNTS)
def test_decay_and_add_equals_numpy(kernels: ModuleType, dtype: str, count: int) -> None:
    new = NORMAL[:count][::-1].copy()
    new = new.astype(np.float16) if dtype == "float16" else new
    new = (new.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else new
    wide = (new.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else new.astype(np.float32)
    for beta in (1.0, 0.999, 0.0):
        kept = Output(count, np.float32, 4)
        kept.array[:] = NORMAL[:count]
        top = kernels.decay_and_add(kept.array, misaligned(new, 2), beta=beta)
        expected = np.float32(beta) * NORMAL[:count] + wide
        assert kept.checked().tobytes() == expected.tobytes()
        assert top == np.abs(expected).max(initial=0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_values_are_divided_by_their_root_mean_square(kernels: ModuleType, count: int, scale: float) -> None:
    for values in (NORMAL[:count], np.resize(EXTREME, count)):
        made = []
        for module, offset in ((_numpy, 0), (kernels, 4)):
            roots, out = Output(count, np.float32, offset), Output(count, np.float32, offset)
            roots.array[:] = np.abs(values[::-1])
            given = misaligned(values, offset)
            module.divide_by_rms(given, roots.array, out.array, beta=0.9, scale=scale, eps=1e-8)
            made.append((roots.checked(), out.checked()))
        assert made[0][0].tobytes() == made[1][0].tobytes() and made[0][1].tobytes() == made[1][1].tobytes()
        exact = np.sqrt(0.9 * values[::-1].astype(np.float64) ** 2 + 0.1 * values.astype(np.float64) ** 2)
        assert np.allclose(made[1][0], exact, rtol=1e-6, atol=1e-45)
        assert np.allclose(made[1][1], values / (exact * scale + 1e-8), rtol=1e-5, atol=1e-30)


CORRECT: dict[str, dict[str, Any]] = {
    "sum_magnitudes": {"values": np.ones(4, np.float32)},
    "pack_values": {"values": np.ones(4, np.float32), "steps": np.ones(4, np.float32), "codes": np.zeros(1, np.uint8)},
    "unpack_values": {
        "codes": np.zeros(1, np.uint8),
        "steps": np.ones(4, np.float32),
        "values": np.ones(4, np.float32),
    },
    "decay_and_add": {"kept": np.ones(4, np.float32), "values": np.ones(4, np.float32)},
    "divide_by_rms": {name: np.ones(4, np.float32) for name in ("values", "roots", "out")},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "pack_values": {"bits": 2},
    "unpack_values": {"bits": 2},
    "decay_and_add": {"beta": 1.0},
    "divide_by_rms": {"beta": 0.9, "scale": 1.0, "eps": 1e-8},
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_wrong_argument_is_an_error(kernels: ModuleType, name: str) -> None:
    def call(**changes: Any) -> Any:
        given = CORRECT[name] | {key: value for key, value in changes.items() if key in CORRECT[name]}
        options = OPTIONS.get(name, {}) | {key: value for key, value in changes.items() if key not in CORRECT[name]}
        return getattr(kernels, name)(*(value.copy() for value in given.values()), **options)

    call()
    for key, value in CORRECT[name].items():
        for wrong in (value.astype(np.int64), value.reshape(1, -1)):
            with pytest.raises(TypeError, match=key):
                call(**{key: wrong})
        if name != "sum_magnitudes":
            with pytest.raises(ValueError, match="expected"):
                call(**{key: np.append(value, [value[:1]] * 4)})
    if "bits" in OPTIONS.get(name, {}):
        for bits in (0, 3, 32, -1):
            with pytest.raises(ValueError, match="bits: expected 1, 2, 4, 8 or 16"):
                call(bits=bits)


def test_outputs_must_be_writable_and_not_overlap(kernels: ModuleType) -> None:
    memory, one = np.zeros(64, np.uint8), np.ones(1, np.float32)
    floats = memory.view(np.float32)[:4]
    with pytest.raises(ValueError, match="overlaps"):
        kernels.pack_values(floats, one, memory[:1], bits=2)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.unpack_values(memory[:1], one, floats, bits=2)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.decay_and_add(floats, memory.view(np.float32)[2:6], beta=1.0)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.divide_by_rms(np.ones(4, np.float32), floats, memory.view(np.float32)[2:6], **OPTIONS["divide_by_rms"])
    memory.setflags(write=False)
    frozen = memory.view(np.float32)[:4]
    for call in (
        lambda: kernels.pack_values(np.ones(4, np.float32), one, memory[:1], bits=2),
        lambda: kernels.unpack_values(np.zeros(1, np.uint8), one, frozen, bits=2),
        lambda: kernels.decay_and_add(frozen, np.ones(4, np.float32), beta=1.0),
        lambda: kernels.divide_by_rms(floats, frozen, np.ones(4, np.float32), **OPTIONS["divide_by_rms"]),
    ):
        with pytest.raises(ValueError, match="read-only"):
            call()
