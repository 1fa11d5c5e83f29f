"""What docs/codecs.md promises of each codec's error, for all finite values of all dtypes, the extreme ones above all.

A finite value never becomes infinite or NaN, and stays within the bound of its codec; or the encoder refuses, naming
the item and the element.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorwire as tw
from tensorwire import dtypes
from tensorwire.codecs import FP4, NF4, as_floats, parse
from tensorwire.dtypes import DType
from tensorwire.tensor import Extent, TensorView

PAGE = Path(__file__).parents[1] / "docs/codecs.md"
FLOATS = {dtype.name: dtype for dtype in (dtypes.FLOAT32, dtypes.FLOAT16, dtypes.BFLOAT16)}
BITS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
# The bits of the largest finite value, of 1, of the smallest normal one.
LARGEST = {"float32": 0x7F7FFFFF, "float16": 0x7BFF, "bfloat16": 0x7F7F}
ONE = {"float32": 0x3F800000, "float16": 0x3C00, "bfloat16": 0x3F80}
NORMAL = {"float32": 0x00800000, "float16": 0x0400, "bfloat16": 0x0080}
# Half a unit in the last place: relative, and of subnormal numbers.
ROUNDING = {"float32": (2.0**-24, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}

# As the page has them: the error of a code relative to the absmax of its block, and the absmax below which that is all
# that holds of it: the error is no more than it.
BOUND = {"int8": 0.00704, "int8-linear": 1 / 253, "nf4": 0.152, "fp4": 0.1667}
TINY = {"int8": 1e-38, "int8-linear": 1.5e-36, "nf4": 1e-38, "fp4": 1e-38}
SPECS = (
    "int8", "int8:blocksize=16", "int8-linear", "int8-linear:blocksize=16", "nf4", "nf4:blocksize=32", "fp4",
    "nf4|zstd", "nf4:double_quant=true", "nf4:blocksize=32,double_quant=true", "fp4:blocksize=32,double_quant=true",
)  # fmt: skip

Blocks = list[tuple[str, int, int]]
KINDS = ("largest", "largest of both signs", "near the largest", "any", "subnormal", "zeros", "one large", "ordinary")
blocks = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32), st.integers(1, 64)), min_size=1, max_size=6)


def pattern(kind: str, dtype: str, spread: np.random.Generator, count: int) -> np.ndarray:
    """Bits of finite values."""
    largest, sign = LARGEST[dtype], spread.integers(0, 2, count) << (8 * FLOATS[dtype].itemsize - 1)
    if kind == "largest":
        return np.full(count, largest)
    if kind == "largest of both signs":
        return largest | sign
    if kind == "near the largest":
        return largest - spread.integers(0, NORMAL[dtype] // 4, count) | sign
    if kind == "any":
        return spread.integers(0, largest + 1, count) | sign
    if kind == "subnormal":
        return spread.integers(0, NORMAL[dtype], count) | sign
    if kind == "one large":
        return np.where(np.arange(count) == spread.integers(0, count), largest, 1) | sign
    if kind == "ordinary":
        return ONE[dtype] - spread.integers(0, 4 * NORMAL[dtype], count) | sign
    return np.zeros(count, np.int64)


def made(recipe: Blocks, dtype: str, blocksize: int) -> np.ndarray:
    """The bytes of a tensor whose blocks are of these kinds, each shorter than a block where that is the last one."""
    parts = [
        pattern(kind, dtype, np.random.default_rng(seed), min(size, blocksize) if last else blocksize)
        for (kind, seed, size), last in zip(recipe, [False] * (len(recipe) - 1) + [True], strict=True)
    ]
    return np.concatenate(parts).astype(BITS[dtype]).view(np.uint8)


def there_and_back(spec: str, data: np.ndarray, dtype: DType) -> np.ndarray:
    """Decoded bytes."""
    codec, width = parse(spec), dtype.itemsize
    shape = (data.size // width,)
    view = TensorView(dtype, shape, lambda start, stop: data[start * width : stop * width])
    extent = Extent.whole(dtype, shape)
    encoded = codec.encode(data, extent, lambda size: np.empty(size, np.uint8), codec.prepare(view))
    out = np.empty_like(data)
    codec.decode(memoryview(encoded.payload), extent, out)
    return out


def absmax_of(values: np.ndarray, blocksize: int) -> np.ndarray:
    return np.maximum.reduceat(np.abs(values), np.arange(0, values.size, blocksize))


def code_error(name: str, absmax: np.ndarray) -> np.ndarray:
    return np.where(absmax < TINY[name], absmax, BOUND[name] * absmax)


def allowed(spec: str, values: np.ndarray, decoded: np.ndarray, dtype: str) -> np.ndarray:
    """The largest error that the page allows each element."""
    packer = parse(spec).packer
    absmax = absmax_of(values, packer.blocksize)
    error = code_error(packer.name, absmax)
    if isinstance(packer, (NF4, FP4)) and packer.double_quant:
        off = np.abs(absmax - np.float32(absmax.mean()))
        error += np.repeat(code_error("int8", absmax_of(off, 256)), 256)[: off.size] + 2.0**-22 * absmax.max()
    relative, subnormal = ROUNDING[dtype]
    exact = np.repeat(error, packer.blocksize)[: values.size] * (1 + 2.0**-20) + 2.0**-149
    return exact + relative * np.abs(decoded) + subnormal


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(recipe=blocks)
def test_finite_values_stay_finite_and_within_the_bound(spec, dtype, recipe):
    data = made(recipe, dtype, parse(spec).packer.blocksize)
    values, decoded = (
        as_floats(raw, FLOATS[dtype]).astype(np.float64) for raw in (data, there_and_back(spec, data, FLOATS[dtype]))
    )
    assert np.isfinite(decoded).all()
    worst = np.argmax(np.abs(decoded - values) - allowed(spec, values, decoded, dtype))
    assert abs(decoded[worst] - values[worst]) <= allowed(spec, values, decoded, dtype)[worst]


@pytest.mark.parametrize("spec", ["fp16", "bf16"])
@given(recipe=blocks)
def test_casts_stay_within_half_a_unit_saturate_or_name_the_element(spec, recipe):
    narrow = {"fp16": "float16", "bf16": "bfloat16"}[spec]
    data = made(recipe, "float32", 64)
    values = data.view(np.float32).astype(np.float64)
    largest = float(as_floats(np.array([LARGEST[narrow]], np.uint16).view(np.uint8), FLOATS[narrow])[0])
    saturated = there_and_back(f"{spec}:overflow=saturate", data, dtypes.FLOAT32).view(np.float32).astype(np.float64)
    relative, subnormal = ROUNDING[narrow]
    wanted = np.clip(values, -largest, largest)
    assert (np.abs(saturated - wanted) <= np.maximum(relative * np.abs(wanted), subnormal)).all()
    beyond = np.flatnonzero(np.abs(values) >= parse(spec).packer.limit)
    if not beyond.size:
        assert there_and_back(spec, data, dtypes.FLOAT32).tobytes() == saturated.astype(np.float32).tobytes()
        return
    with pytest.raises(tw.NonFiniteError) as raised:
        tw.dumps({"layer": {"w": data.view(np.float32)}}, codec=spec)
    assert (raised.value.item, raised.value.index) == ("/layer/w", beyond[0])
    raw = tw.loads(tw.dumps({"w": data.view(np.float32)}, codec=f"{spec}:overflow=raw"))["w"]
    assert raw.tobytes() == data.tobytes()


@pytest.mark.parametrize("spec", [*SPECS, "fp16", "bf16", "zstd"])
@pytest.mark.parametrize("dtype", [dtype.name for dtype in dtypes.ALL if dtype.name not in FLOATS])
def test_every_other_dtype_is_sent_exactly(spec, dtype):
    described = dtypes.BY_NAME[dtype]
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 64 * described.itemsize, np.uint8)
    codec = parse(spec)
    used = codec if codec.accepts(described) else codec.lossless_fallback()
    assert used.lossless
    assert there_and_back(repr(used), raw, described).tobytes() == raw.tobytes()


@pytest.mark.parametrize("spec", [*SPECS, "fp16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_refused_by_name_or_kept(spec, value):
    weights = np.linspace(-1, 1, 200, dtype=np.float32)
    weights[123] = value
    if spec in ("fp16", "bf16"):
        assert np.array_equal(tw.loads(tw.dumps({"w": weights}, codec=spec))["w"][123], value, equal_nan=True)
        return
    with pytest.raises(tw.NonFiniteError) as raised:
        tw.dumps({"a": [weights]}, codec=spec)
    assert (raised.value.item, raised.value.index) == ("/a/0", 123)


def test_the_page_states_these_bounds():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\S+) · absmax \| (\S+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: 1 / 253 if bound == "1/253" else float(bound) for name, bound, _ in rows} == BOUND
    assert {name: float(tiny) for name, _, tiny in rows} == TINY
