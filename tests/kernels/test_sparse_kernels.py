"""The kernels of sparse slices: what they do, every instruction set like the twin, and what they refuse."""

import functools
from decimal import Decimal, getcontext
from math import comb, pi
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kernel_samples import Array, Output, misaligned

from tensorwire.kernels import _numpy, _numpy_sparse
from tensorwire.kernels.tables import DCT_MOST, dct_tables

NOTHING = 0xFFFF
WHOLE = {"width": 64, "rows": 64, "cols": 64}
FLAT = {"width": 4096, "rows": 1, "cols": 4096}
GRIDS = [
    FLAT,
    WHOLE,
    {"width": 130, "rows": 44, "cols": 43},
    {"width": 7, "rows": 3, "cols": 2},
    {"width": 65, "rows": 64, "cols": 64},
    {"width": 1, "rows": 5, "cols": 1},
    {"width": 33, "rows": 1, "cols": 33},
]
COUNTS = [1, 5, 64, 100, 4096, 5003]
CASES = [
    (grid, transformed) for grid in GRIDS for transformed in (False, True) if grid["cols"] <= 64 or not transformed
]
RNG = np.random.default_rng(40)
NORMAL = RNG.standard_normal(20_000).astype(np.float32)
VALUES = {
    "normal": NORMAL,
    "steps": np.round(NORMAL),
    "zeros": NORMAL * (np.arange(20_000) // 1500 % 2).astype(np.float32),
}


def kept(count: int, k: int, **grid: int) -> int:
    return int(np.minimum(_numpy_sparse.chunk_sizes(count, grid["width"], grid["rows"], grid["cols"]), k).sum())


def select(kernels: ModuleType, values: Array, offset: int = 0, **options: Any) -> tuple[Array, Array]:
    count = kept(values.size, options["k"], **{name: options[name] for name in WHOLE})
    positions, coefficients = Output(count, np.uint16, offset), Output(count, np.float32, offset)
    given = misaligned(values, offset)
    top = kernels.select_largest(given, positions.array, coefficients.array, **options)
    assert top == np.abs(values).max(initial=0)
    return positions.checked(), coefficients.checked()


class TestDefinition:
    def test_the_first_of_equal_magnitudes_is_kept(self, kernels: ModuleType) -> None:
        values = np.array([1, -2, 2, 0, -2, 3], np.float32)
        positions, coefficients = select(kernels, values, k=3, **FLAT)
        assert positions.tolist() == [1, 2, 5] and coefficients.tolist() == [-2, 2, 3]

    def test_nothing_is_kept_of_zeros(self, kernels: ModuleType) -> None:
        values = np.zeros(2 * 64, np.float32)
        values[70], values[3] = 1, -0.0
        positions, coefficients = select(kernels, values, k=2, width=64, rows=1, cols=64)
        assert positions.tolist() == [NOTHING, NOTHING, 0, 6] and coefficients.tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 16, 17, 20, 24, 44, 60, 64])
    def test_the_transform_is_the_dct(self, kernels: ModuleType, n: int) -> None:
        values = NORMAL[: n * n]
        grid = {"k": 4096, "width": n, "rows": n, "cols": n, "tables": dct_tables()}
        positions, coefficients = select(kernels, values, **grid)
        u, x = np.arange(n)[:, None], np.arange(n)
        matrix = np.sqrt((2 - (u == 0)) / n) * np.cos(pi * (2 * x + 1) * u / (2 * n))
        expected = matrix @ values.reshape(n, n).astype(np.float64) @ matrix.T
        assert np.allclose(coefficients.reshape(n, n), expected, atol=1e-5)
        back = np.zeros(n * n, np.float32)
        assert kernels.add_selected(positions, coefficients, back, weight=1.0, **grid)
        assert np.allclose(back, values, atol=1e-5)

    def test_the_largest_values_stay_finite(self, kernels: ModuleType) -> None:
        """Whatever their signs: those that add up in each intermediate result of a column."""
        for n in (63, 64):
            u, x = np.arange(n)[:, None], np.arange(n)
            signs = np.sign(np.cos(pi * (2 * x + 1) * u / (2 * n))).astype(np.float32)
            grid = {"k": 4096, "width": n, "rows": n, "cols": n, "tables": dct_tables()}
            for row in signs[:: n // 8]:
                values = np.outer(row, row).astype(np.float32).reshape(-1)
                positions, coefficients = select(kernels, values * np.float32(2.0**100), **grid)
                assert np.isfinite(coefficients).all()
                sums = np.zeros(n * n, np.float32)
                assert kernels.add_selected(positions, values * np.float32(2.0**110), sums, weight=1.0, **grid)
                assert np.isfinite(sums).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**101])
    def test_unacceptable_values_are_reported(self, kernels: ModuleType, bad: float) -> None:
        for at in (0, 4095, 4999):
            values = NORMAL[:5000].copy()
            values[at] = bad
            out = np.empty(8, np.uint16), np.empty(8, np.float32)
            assert not kernels.select_largest(values, *out, k=4, **FLAT) <= 2.0**100
            kept = np.zeros(5000, np.float32)
            assert not kernels.decay_and_select(kept, values, *out, beta=1.0, k=4, **FLAT) <= 2.0**100

    def test_numbers_of_positions(self, kernels: ModuleType) -> None:
        for positions in ([0, 1], [0, 2], [1, 2], [62, 63], [NOTHING] * 2):
            codes = np.zeros(2, np.uint8)
            assert kernels.encode_positions(np.array(positions, np.uint16), codes, elements=64, k=2, **WHOLE) == 2
            number = sum(comb(p, i + 1) for i, p in enumerate(positions)) if NOTHING not in positions else comb(64, 2)
            assert int.from_bytes(codes.tobytes(), "little") == number

    def test_rice_codes(self, kernels: ModuleType) -> None:
        codes = np.zeros(8, np.uint8)
        positions = np.arange(7, dtype=np.uint16) * 2 + 1  # one is left out before each: 1 bit 0, a bit 1
        assert kernels.encode_positions(positions, codes, elements=16, k=7, width=16, rows=1, cols=16) == 3
        assert codes[:3].tolist() == [0, 0b10101010, 0b00101010]

    def test_no_room(self, kernels: ModuleType) -> None:
        positions, _ = select(kernels, NORMAL, k=7, **FLAT)
        codes = np.zeros(4 * positions.size, np.uint8)
        size = kernels.encode_positions(positions, codes, elements=NORMAL.size, k=7, **FLAT)
        assert size > 1
        assert kernels.encode_positions(positions, codes[: size - 1].copy(), elements=NORMAL.size, k=7, **FLAT) == 0

    def test_a_position_outside_its_chunk(self, kernels: ModuleType) -> None:
        for tables in (None, dct_tables()):
            given = np.array([16], np.uint16), np.ones(1, np.float32)
            sums, grid = np.zeros(16), {"k": 1, "width": 4, "rows": 4, "cols": 4, "tables": tables}
            assert not kernels.add_selected(*given, sums, weight=1.0, **grid)
            out, how = np.zeros(16, np.float32), {"divisor": 1.0, "present": True, "signs": False}
            assert not kernels.combine_selected(*given, np.ones(1), out, **how, **grid)

    def test_messages_are_combined(self, kernels: ModuleType) -> None:
        positions = np.array([0, 2, 0, 3, NOTHING, NOTHING], np.uint16)
        values = np.array([1, 2, -4, 3, 7, 7], np.float32)
        for how, wanted in (((2.0, False, False), [-3.5, 0, 1, 3]), ((1.0, True, False), [-7 / 3, 0, 2, 3])):
            out = np.full(4, np.nan, np.float32)
            options = dict(zip(("divisor", "present", "signs"), how, strict=True))
            weights = np.array([1.0, 2, 5])
            assert kernels.combine_selected(positions, values, weights, out, **options, k=2, width=4, rows=1, cols=4)
            assert out.tolist() == np.array(wanted, np.float32).tolist()
        assert kernels.combine_selected(
            positions, values, weights, out, divisor=1.0, present=False, signs=True, k=2, width=4, rows=1, cols=4
        )
        assert out.tolist() == [-1, 0, 1, 1]


@pytest.mark.parametrize(("grid", "transformed"), CASES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 6, 7, 32, 4096])
def test_every_instruction_set_equals_the_twin(
    kernels: ModuleType, grid: dict[str, int], k: int, transformed: bool
) -> None:
    options = tuple(sorted({**grid, "k": k}.items()))
    for number, count in enumerate(COUNTS):
        twin = of_the_twin(options, transformed, number)
        other = results(kernels, options, transformed, number, number) if kernels is not _numpy else twin
        for wanted, got in zip(twin, other, strict=True):
            assert wanted.tobytes() == got.tobytes(), count
        positions, back = twin[0], twin[-1]
        fits = positions != NOTHING  # else what says so may have needed one bit more
        assert np.array_equal(back[fits], positions[fits])


@functools.cache
def of_the_twin(options: Any, transformed: bool, number: int) -> list[Array]:
    return results(_numpy, options, transformed, number, 0)


def results(module: ModuleType, options: Any, transformed: bool, number: int, offset: int) -> list[Array]:
    """All that the six kernels make of some values."""
    grid, count, tables = dict(options), COUNTS[number], dct_tables() if transformed else None
    values = [*VALUES.values()][number % 3][:count]
    positions, coefficients = select(module, values, offset, tables=tables, **grid)
    outputs = [positions, coefficients]
    for new in (values, values.astype(np.float16), (values.view(np.uint32) >> 16).astype(np.uint16)):
        kept, chosen = Output(count, np.float32, offset), (np.empty_like(positions), np.empty_like(coefficients))
        kept.array[:] = NORMAL[::-1][:count]
        top = module.decay_and_select(kept.array, misaligned(new, offset), *chosen, beta=0.9, tables=tables, **grid)
        outputs += [kept.checked(), *chosen, np.array(top)]
    for dtype in (np.float32, np.float64):
        sums = NORMAL[:count].astype(dtype)
        assert module.add_selected(positions, coefficients, sums, weight=-0.3, tables=tables, **grid)
        outputs.append(sums)
    two = np.tile(positions, 2), np.concatenate([coefficients, -coefficients[::-1]]), np.array([0.7, 3])
    for divisor, present, signs in ((3.7, False, False), (1.0, True, False), (1.0, False, True)):
        out = Output(count, np.float32, offset)
        how = {"divisor": divisor, "present": present, "signs": signs}
        assert module.combine_selected(*two, out.array, **how, tables=tables, **grid)
        outputs.append(out.checked())
    codes = np.zeros(4 * positions.size + 4096, np.uint8)
    codes = codes[: module.encode_positions(positions, codes, elements=count, **grid)]
    back = Output(positions.size, np.uint16)
    assert module.decode_positions(codes, back.array, elements=count, **grid)
    return [*outputs, codes, back.checked()]


@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 20])
def test_damaged_codes_get_the_same_verdict(kernels: ModuleType, k: int) -> None:
    grid = {"width": 25, "rows": 5, "cols": 9}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, 200))
        positions, _ = select(_numpy, NORMAL[:count] * (rng.random(count) < 0.1).astype(np.float32), k=k, **grid)
        codes = np.zeros(4 * positions.size + 600, np.uint8)
        codes = codes[: _numpy.encode_positions(positions, codes, elements=count, k=k, **grid)]
        codes = np.append(codes, np.zeros(int(seed % 3 == 0), np.uint8))[: codes.size + 1 - seed % 5 // 4]
        for at in rng.integers(0, max(codes.size, 1), seed % 4):
            codes[at:][:1] ^= np.uint8(1 << rng.integers(8))
        verdicts = []
        for module in (_numpy, kernels):
            back = Output(positions.size, np.uint16)
            verdicts.append(
                (bool(module.decode_positions(codes.copy(), back.array, elements=count, k=k, **grid)), back)
            )
        assert verdicts[0][0] == verdicts[1][0], seed
        if verdicts[0][0]:
            assert np.array_equal(verdicts[0][1].checked(), verdicts[1][1].checked())


def correct(name: str) -> dict[str, Any]:
    arrays = {
        "values": np.ones(16, np.float32),
        "kept": np.ones(16, np.float32),
        "codes": np.zeros(8, np.uint8),
        "positions": np.zeros(2, np.uint16),
        "coefficients": np.zeros(2, np.float32),
        "sums": np.zeros(16),
        "weights": np.ones(1),
        "out": np.zeros(16, np.float32),
    }
    if name == "combine_selected":  # of one message
        arrays["values"] = arrays["coefficients"]
    taken = {
        "select_largest": ["values", "positions", "coefficients"],
        "decay_and_select": ["kept", "values", "positions", "coefficients"],
        "add_selected": ["positions", "coefficients", "sums"],
        "combine_selected": ["positions", "values", "weights", "out"],
        "encode_positions": ["positions", "codes"],
        "decode_positions": ["codes", "positions"],
    }[name]
    options: dict[str, Any] = {"width": 4, "rows": 4, "cols": 4, "k": 2}
    if name == "add_selected":
        options["weight"] = 1.0
    if name == "decay_and_select":
        options["beta"] = 1.0
    if name == "combine_selected":
        options |= {"divisor": 1.0, "present": False, "signs": False}
    if name.endswith("positions"):
        options["elements"] = 16
    return {key: arrays[key] for key in taken} | options


def call(kernels: ModuleType, name: str, **changes: Any) -> Any:
    arguments = correct(name) | changes
    positional = [arguments.pop(key) for key in [*arguments] if key in {*correct(name)} - {*OPTIONS}]
    return getattr(kernels, name)(*positional, **arguments)


OPTIONS = ["width", "rows", "cols", "k", "weight", "beta", "elements", "divisor", "present", "signs"]
NAMES = [
    "select_largest",
    "decay_and_select",
    "add_selected",
    "combine_selected",
    "encode_positions",
    "decode_positions",
]


OF_ANY_SIZE = [("values", "select_largest"), ("kept", "decay_and_select"), ("values", "decay_and_select")]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_is_an_error(kernels: ModuleType, name: str) -> None:
    call(kernels, name)
    for key, value in correct(name).items():
        if isinstance(value, np.ndarray):
            with pytest.raises(TypeError, match=key):
                call(kernels, name, **{key: value.astype(np.int64)})
            with pytest.raises(TypeError, match=key):
                call(kernels, name, **{key: value.reshape(1, -1)})
            if key not in ("codes", "sums", "weights", "out") and (key, name) not in OF_ANY_SIZE:
                with pytest.raises(ValueError, match=f"{key}: expected 2"):
                    call(kernels, name, **{key: np.append(value, value[:1])})
    for key in ("width", "rows", "cols", "k"):
        with pytest.raises(ValueError, match=f"{key}: expected at least 1, got 0"):
            call(kernels, name, **{key: 0})
    with pytest.raises(ValueError, match="at most 4096"):
        call(kernels, name, rows=64, cols=65)
    if "elements" in correct(name):
        with pytest.raises(ValueError, match="elements: expected at least 0"):
            call(kernels, name, elements=-1)
    else:
        with pytest.raises(ValueError, match="at most 64"):
            call(kernels, name, cols=65, tables=dct_tables())
        with pytest.raises(ValueError, match="tables"):
            call(kernels, name, tables=dct_tables()[1:])
    output = {"add_selected": "sums", "combine_selected": "out", "encode_positions": "codes"}.get(name, "positions")
    frozen = correct(name)[output]
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        call(kernels, name, **{output: frozen})


def test_outputs_must_not_overlap_inputs(kernels: ModuleType) -> None:
    memory = np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "decode_positions", codes=memory[:8], positions=memory[4:8].view(np.uint16))
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "encode_positions", codes=memory[:8], positions=memory[4:8].view(np.uint16))
    with pytest.raises(ValueError, match="overlaps"):
        values = np.zeros(16, np.float32)
        call(kernels, "select_largest", values=values, coefficients=values[:2])
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "decay_and_select", values=values, kept=values)
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "decay_and_select", kept=values, coefficients=values[:2])
    with pytest.raises(ValueError, match="at least 1"):
        values = np.ones(16, np.float32)
        try:
            call(kernels, "decay_and_select", kept=values, k=0)
        finally:
            assert (values == 1).all()
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "add_selected", sums=values, coefficients=values[:2])
    with pytest.raises(ValueError, match="overlaps"):
        call(kernels, "combine_selected", out=values, values=values[:2])


def test_the_cosines_are_the_same_on_every_machine() -> None:
    """Rounded right, and so far from the middle of two float32 that an error of float64 would not matter."""
    getcontext().prec = 40
    half_turn = Decimal("3.141592653589793238462643383279502884197")

    def cosine(x: Decimal) -> Decimal:
        term = total = Decimal(1)
        for n in range(1, 40):
            term *= -x * x / ((2 * n - 1) * (2 * n))
            total += term
        return total

    def check(stored: Any, wanted: Decimal, *where: int) -> None:
        got = float(stored)
        margin = Decimal(float(np.spacing(np.float32(abs(got))))) / 2 - abs(wanted - Decimal(got))
        assert margin > abs(wanted) * Decimal(2) ** -49, where

    at = 0
    for n in range(1, DCT_MOST + 1):
        exact = [cosine(half_turn * j / (2 * n)) for j in range(n)] + [Decimal(0)]
        stored = dct_tables()[at : at + n * n].reshape(n, n)
        for u in range(n):
            for x in range(n):
                angle = (2 * x + 1) * u % (4 * n)
                angle = min(angle, 4 * n - angle)
                check(stored[u, x], exact[angle] if angle <= n else -exact[2 * n - angle], n, u, x)
        at += n * n
    for n in range(2, DCT_MOST + 1, 2):
        for x in range(n // 2):
            check(dct_tables()[at + x], 1 / (2 * cosine(half_turn * (2 * x + 1) / (2 * n))), n, x)
        at += n // 2
    assert at == dct_tables().size
    for area in {height * width for height in range(1, DCT_MOST + 1) for width in range(1, DCT_MOST + 1)}:
        for factor in (1, 2, 4):
            check(np.sqrt(factor / area).astype(np.float32), (Decimal(factor) / area).sqrt(), area, factor)
