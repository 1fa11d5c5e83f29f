"""What goes in comes out: any tensor of any dtype and layout, any container, through every codec, in frames of any size
and chunks of any cut, into memory, preallocated tensors and files; and what cannot come out is refused going in.
"""

import io
import mmap
import os
import threading
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frames import DATA, cut
from hypothesis import given
from hypothesis import strategies as st
from make import SPECIAL, bits
from vectors import plain, same

import tensorwire
import tensorwire.numpy as tw
from tensorwire import (
    EncodeError,
    FormatError,
    LimitError,
    NonFiniteError,
    SchemaError,
    TensorwireError,
    TruncatedError,
    decode_file,
    dtypes,
    encode_file,
)
from tensorwire.kernels import _numpy as twins
from tensorwire.limits import Limits
from tensorwire.streams.sender import FRAME_SIZE

NATIVE = [d.name for d in dtypes.ALL if d.name in np.sctypeDict and d.name != "complex32"]
OTHER = [d.name for d in dtypes.ALL if d.name not in NATIVE]
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
frame_sizes = st.integers(4096, 20_000)


def encoded(obj: Any, **options: Any) -> bytes:
    return b"".join(bytes(buffer) for buffer in tw.encode(obj, **options))


def little(array: np.ndarray) -> bytes:
    """The elements in C order and little-endian, as they stand on the wire."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def random_array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bit patterns of a dtype; one that NumPy does not have comes as labelled integers."""
    itemsize = dtypes.BY_NAME[dtype].itemsize
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * itemsize, np.uint8)
    if dtype == "bool":
        return (raw > 127).reshape(shape)
    if dtype in NATIVE:
        return raw.view(dtype).reshape(shape)
    return bits(raw.view(f"u{itemsize}"), dtype).reshape(shape)


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2] if a.ndim else a,
    "reversed": lambda a: a[::-1] if a.ndim else a,
    "reversed columns": lambda a: a[..., ::-1] if a.ndim else a,
    "fortran": np.asfortranarray,
    "expanded": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "inner": lambda a: np.pad(a.view(f"u{a.itemsize}") if a.itemsize <= 8 else a, 1)[(slice(1, -1),) * a.ndim],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


# ------------------------------------------------------------------------------------------------------ Tensors


@given(
    st.sampled_from(NATIVE),
    shapes,
    st.sampled_from([*LAYOUTS]),
    seeds,
    frame_sizes,
    st.sampled_from(["raw", "zstd"]),
)
def test_an_array_of_any_dtype_shape_and_layout_comes_back_bit_exact(dtype, shape, layout, seed, frame_size, codec):
    array = LAYOUTS[layout](random_array(dtype, shape, seed))
    before = array.tobytes()
    data = encoded(array, codec=codec, frame_size=frame_size)
    result = tw.loads(data)
    assert (result.dtype, result.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert little(result) == little(array)
    assert result.flags.writeable and result.flags.c_contiguous
    assert array.tobytes() == before
    # The layout of the source does not show.
    same_values = np.ascontiguousarray(array).reshape(array.shape)
    assert encoded(same_values, codec=codec, frame_size=frame_size) == data


@given(st.sampled_from(OTHER), shapes, seeds)
def test_dtypes_that_numpy_lacks_come_back_bit_exact_and_can_be_sent_on(dtype, shape, seed):
    array = random_array(dtype, shape, seed)
    data = tw.dumps({"x": array})
    result = tw.loads(data)["x"]
    assert tw.FRONT.view(result).dtype.name == dtype
    assert (result.shape, result.tobytes()) == (shape, array.tobytes())
    assert tw.dumps({"x": result}) == data


def test_ml_dtypes_arrays_come_back_as_ml_dtypes_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in OTHER:
        if hasattr(ml_dtypes, name):
            array = np.frombuffer(bytes(range(240)), getattr(ml_dtypes, name)).reshape(2, -1)[:, ::-1]
            result = tw.loads(tw.dumps(array))
            assert result.dtype == array.dtype
            assert result.tobytes() == array.tobytes()


@pytest.mark.parametrize("codec", ["raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true"])
def test_every_count_of_elements_from_0_to_200_keeps_its_shape(codec):
    values = [np.full((n,), 0.5, np.float32) for n in range(201)]
    for n, result in enumerate(tw.loads(tw.dumps(values, codec=codec))):
        assert result.shape == (n,)
        assert np.allclose(result, 0.5, rtol=0.01)
    for shape in [(), (1, 1), (3, 0, 2), (1,) * 32]:
        assert tw.loads(tw.dumps(np.zeros(shape, np.float32), codec=codec)).shape == shape


def torch_tensor(torch: Any, dtype: Any, shape: tuple[int, ...], seed: int) -> Any:
    if dtype == torch.bool:
        return torch.from_numpy(random_array("bool", shape, seed))
    raw = torch.from_numpy(random_array("uint8", (*shape, torch.empty((), dtype=dtype).element_size()), seed))
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


TORCH_LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.permute(tuple(reversed(range(t.ndim)))),
    "expanded": lambda t: t.expand(3, *t.shape),
    "strided": lambda t: t[::2] if t.ndim else t,
    "inner": lambda t: t[..., 1:] if t.ndim and t.shape[-1] else t,
    "parameter": lambda t: t.clone().requires_grad_() if t.is_floating_point() and t.element_size() > 1 else t,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.integers(0, 99), shapes, st.sampled_from([*TORCH_LAYOUTS]), seeds, st.sampled_from(["raw", "zstd"]))
def test_a_torch_tensor_of_any_dtype_and_layout_comes_back_bit_exact(number, shape, layout, seed, codec):
    torch = pytest.importorskip("torch")
    from tensorwire import torch as front

    known = [getattr(torch, d.name) for d in dtypes.ALL if isinstance(getattr(torch, d.name, None), torch.dtype)]
    tensor = TORCH_LAYOUTS[layout](torch_tensor(torch, known[number % len(known)], shape, seed))
    result = front.loads(front.dumps({"x": tensor}, codec=codec))["x"]
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert not result.requires_grad
    assert result.is_contiguous()

    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

    def as_bytes(t: Any) -> bytes:
        return t.detach().view(same_size[t.element_size()]).numpy().tobytes()

    assert as_bytes(result) == as_bytes(tensor)
    # The top level takes either library and gives NumPy; both fronts write the same bytes.
    assert tensorwire.dumps({"x": tensor}, codec=codec) == front.dumps({"x": tensor}, codec=codec)
    assert tensorwire.loads(front.dumps(tensor)).shape == tuple(tensor.shape)


def test_torch_views_are_resolved_and_tied_tensors_tied_again():
    torch = pytest.importorskip("torch")
    from tensorwire import torch as front

    z = torch.randn(4, dtype=torch.complex64)
    got = front.loads(front.dumps([z.conj(), z.conj().imag]))
    assert torch.equal(got[0], z.conj().resolve_conj())
    assert torch.equal(got[1], -z.imag)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    state = OrderedDict(embed=weight, head=weight, part=weight[1:], turned=weight.t())
    data = front.dumps(state)
    got = front.loads(data)
    assert got["embed"] is got["head"]
    assert all(torch.equal(got[name], state[name]) for name in state)
    assert got["part"].data_ptr() != got["embed"].data_ptr()
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(front.loads(front.dumps(image)), image)


def test_an_optimizer_state_dict_round_trips():
    torch = pytest.importorskip("torch")
    from tensorwire import torch as front

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    restored = torch.optim.AdamW(model.parameters())
    restored.load_state_dict(front.loads(front.dumps(optimizer.state_dict())))
    assert repr(restored.state_dict()) == repr(optimizer.state_dict())
    model.load_state_dict(front.loads(front.dumps(model.state_dict(), codec="int8")))


# --------------------------------------------------------------------------------------------------- Containers

keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), max_size=8)
keys = keys | st.integers(-(2**53), 2**53)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40)
    | st.text(st.characters(codec="utf-8"), max_size=40)
)  # fmt: skip
arrays = st.builds(random_array, st.sampled_from(NATIVE), shapes, seeds)


def containers(leaves: Any) -> Any:
    lists = st.lists(leaves, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(keys, leaves, max_size=4)


trees = st.recursive(scalars | arrays, containers, max_leaves=12)


@given(trees, frame_sizes)
def test_any_container_comes_back_with_exact_types_and_order(tree, frame_size):
    data = encoded(tree, frame_size=frame_size)
    assert same(plain(tw.loads(data)), plain(tree))
    assert encoded(tree, frame_size=frame_size) == data


@given(trees, st.data())
def test_a_stream_may_arrive_in_any_portions(tree, data):
    stream = encoded(tree)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert same(plain(tw.loads(chunks)), plain(tree))
    assert same(plain(tw.loads(io.BytesIO(stream))), plain(tree))


def test_ties_are_kept_unless_switched_off_and_views_of_other_shape_are_not_ties():
    base = np.arange(6.0)
    tree = {"a": base, "b": [base, base.reshape(2, 3), base[1:]], "c": base.copy()}
    result = tw.loads(tw.dumps(tree))
    assert result["b"][0] is result["a"]
    assert len({id(x) for x in (result["a"], result["b"][1], result["b"][2], result["c"])}) == 4
    assert same(plain(result), plain(tree))
    untied = encoded(tree, tie=False)
    assert len(untied) > len(encoded(tree))
    assert tw.loads(untied)["b"][0] is not tw.loads(untied)["a"]
    assert dict(tw.decode(tw.dumps({"a": base, "b": base})))["b"].tobytes() == base.tobytes()


def test_names_that_look_like_paths_or_attributes_are_plain_data():
    names = [
        "__proto__",
        "__class__",
        "__metadata__",
        "..",
        "/etc/passwd",
        "C:\\x",
        "CON",
        "a/../../b",
        "",
        "x" * 1024,
    ]
    names += ["e\u0301", "\u00e9"]
    tree = {name: np.uint8(number) for number, name in enumerate(names)}
    assert same(plain(tw.loads(tw.dumps(tree))), plain(tree))


def test_large_values_are_sent_item_by_item():
    tree = {"long": ["x" * 1000] * 300, "text": "y" * 300_000, "bytes": bytes(3 << 20)}
    assert tw.loads(tw.dumps(tree)) == tree


def test_an_iterator_of_pairs_is_sent_as_a_dict_without_being_collected():
    made = []

    def pairs():
        for number in range(5):
            made.append(number)
            yield f"layer.{number}", np.full(3, number, np.int16)

    stream = tw.encode(pairs())
    assert made == []
    next(stream)
    assert len(made) <= 1
    rest = b"".join(bytes(buffer) for buffer in stream)
    assert made == [*range(5)]
    assert rest
    result = tw.loads(encoded(pairs()))
    assert [*result] == [f"layer.{number}" for number in range(5)]
    assert all((value == number).all() for number, value in enumerate(result.values()))


# ------------------------------------------------------------------------------------------------------- Codecs

# Each spec with the kernel and options that say what it does, and the least frame that holds one block.
SPECS = {
    "fp16": ("fp16", {}, 4096),
    "bf16": ("bf16", {}, 4096),
    "int8:blocksize=256": ("int8", {"blocksize": 256}, 4096),
    "int8": ("int8", {"blocksize": 4096}, 4200),
    "int8-linear": ("linear", {"blocksize": 256}, 4096),
    "int8-linear:blocksize=16": ("linear", {"blocksize": 16}, 4096),
    "nf4": ("4bit", {"blocksize": 64, "quant_type": "nf4"}, 4096),
    "nf4:blocksize=4096": ("4bit", {"blocksize": 4096, "quant_type": "nf4"}, 4096),
    "fp4": ("4bit", {"blocksize": 64, "quant_type": "fp4"}, 4096),
    "fp4:blocksize=32": ("4bit", {"blocksize": 32, "quant_type": "fp4"}, 4096),
    "nf4:blocksize=32,double_quant=true": ("double", {"blocksize": 32, "quant_type": "nf4"}, 4500),
    "fp4:double_quant=true": ("double", {"blocksize": 64, "quant_type": "fp4"}, 8600),
}


def twice_quantized(absmax: np.ndarray) -> np.ndarray:
    offset = np.float32(np.cumsum(absmax.astype(np.float64))[-1] / absmax.size)
    codes, nested = np.empty(absmax.size, np.uint8), np.empty(-(-absmax.size // 256), np.float32)
    twins.quantize_int8(absmax - offset, codes, nested, blocksize=256)
    result = np.empty(absmax.size, np.float32)
    twins.dequantize_int8(codes, nested, result, blocksize=256)
    return result + offset


def restored(values: np.ndarray, method: str, options: dict) -> np.ndarray:
    """What decoding what was encoded gives, done on the whole flat array by the readable kernels."""
    out = np.empty_like(values)
    n, blocks = values.size, -(-values.size // options.get("blocksize", 1))
    if method in ("fp16", "bf16"):
        narrow = np.empty(n, np.float16 if method == "fp16" else np.uint16)
        twins.cast(values, narrow)
        twins.cast(narrow, out)
    elif method == "int8":
        codes, absmax = np.empty(n, np.uint8), np.empty(blocks, np.float32)
        twins.quantize_int8(values, codes, absmax, **options)
        twins.dequantize_int8(codes, absmax, out, **options)
    elif method == "linear":
        codes, scales = np.empty(n, np.int8), np.empty(blocks, np.uint16)
        twins.quantize_linear(values, codes, scales, **options)
        twins.dequantize_linear(codes, scales, out, **options)
    elif n:
        codes, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(blocks, np.float32)
        twins.quantize_4bit(values, codes, absmax, **options)
        absmax = twice_quantized(absmax) if method == "double" else absmax
        twins.dequantize_4bit(codes, absmax, out, **options)
    return out


def hard_values(n: int, seed: int) -> np.ndarray:
    """Finite float32 values of all magnitudes, with zeros of both signs and whole blocks of them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n) * 10.0 ** rng.integers(-42, 4)
    values[rng.random(n) < 0.1] = -0.0
    start = rng.integers(0, n + 1)
    values[start : start + 300] = 0
    return values.astype(np.float32)


@given(
    st.sampled_from([*SPECS]),
    st.integers(0, 20_000),
    seeds,
    st.integers(0, 30_000),
    st.sampled_from(["", "|zstd"]),
)
def test_a_codec_equals_its_kernel_for_any_frame_size(spec, n, seed, more, behind):
    method, options, least = SPECS[spec]
    values = hard_values(n, seed)
    sent = {"float32": values}
    if method not in ("fp16", "bf16"):
        sent["float16"] = values.clip(-60000, 60000).astype(np.float16)
        sent["bfloat16"] = bits((values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
    data = encoded(sent, codec=spec + behind, frame_size=least + 128 + more)
    for name, result in tw.loads(data).items():
        kernel_values = sent[name].view(np.uint16) if name == "bfloat16" else sent[name]
        assert tw.FRONT.view(result).dtype.name == name
        assert result.tobytes() == restored(kernel_values, method, options).tobytes()
    # The values do not depend on the frames, nor the bytes on the layout or on the run.
    whole = tw.loads(encoded(sent, codec=spec + behind))
    assert all(whole[name].tobytes() == result.tobytes() for name, result in tw.loads(data).items())
    strided = {name: np.zeros(2 * n, array.dtype)[::2] for name, array in sent.items()}
    for name, array in sent.items():
        strided[name][:] = array
    assert encoded(strided, codec=spec + behind, frame_size=least + 128 + more) == data


def test_a_codec_can_be_chosen_by_pattern_and_by_function():
    embed, w, b = (hard_values(70, seed) for seed in range(3))
    tree = {"embed": embed, "layers": [{"w": w, "b": b}], "steps": np.int64(7)}
    by_pattern = tw.dumps(tree, codec={"*/w": "nf4", "embed": "bf16"})
    by_function = tw.dumps(tree, codec=lambda name, value: {"embed": "bf16", "/layers/0/w": "nf4"}.get(name, "raw"))
    assert by_pattern == by_function
    result = tw.loads(by_pattern)
    assert same(plain(result["layers"][0]["b"]), plain(b))
    assert result["steps"] == 7
    assert result["embed"].tobytes() == restored(embed, "bf16", {}).tobytes()
    assert result["layers"][0]["w"].tobytes() == restored(w, *SPECS["nf4"][:2]).tobytes()


QUANTIZING = ["int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "int8|zstd"]


@pytest.mark.parametrize("spec", QUANTIZING)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_unsupported_values_raise_with_item_and_index_or_are_sent_raw(spec, poison, dtype):
    values = np.linspace(-1, 1, 40_000).astype(dtype)
    values[33_333] = poison
    values[39_999] = np.nan
    tree = {"good": values[:1000], "layer": {"w": values}}
    with pytest.raises(NonFiniteError, match=r"element 33333 is .*/layer/w") as caught:
        encoded(tree, codec=spec, frame_size=20_000)
    assert (caught.value.index, caught.value.item) == (33_333, "/layer/w")
    name, *behind = spec.split("|")
    spec = "|".join([name + (",nonfinite=raw" if ":" in name else ":nonfinite=raw"), *behind])
    result = tw.loads(encoded(tree, codec=spec, frame_size=20_000))
    assert result["layer"]["w"].tobytes() == values.tobytes()
    assert result["good"].tobytes() != values[:1000].tobytes()


@pytest.mark.parametrize(("spec", "beyond", "largest"), [("fp16", 65520, 65504), ("bf16", 3.4e38, 3.3895314e38)])
def test_cast_overflow_raises_saturates_or_is_sent_raw(spec, beyond, largest):
    values = np.ones(9000, np.float32)
    values[8000] = -beyond
    values[[7000, 7001]] = np.inf, np.nan  # values like any other
    with pytest.raises(NonFiniteError, match="element 8000 is .*'w'") as caught:
        encoded({"w": values}, codec=spec, frame_size=4096)
    assert (caught.value.index, caught.value.item) == (8000, "w")
    saturated = tw.loads(tw.dumps({"w": values}, codec=f"{spec}:overflow=saturate"))["w"]
    assert saturated[8000] == np.float32(-largest)
    assert np.isinf(saturated[7000])
    assert np.isnan(saturated[7001])
    raw = tw.loads(tw.dumps({"w": values}, codec=f"{spec}:overflow=raw"))["w"]
    assert raw.tobytes() == values.tobytes()


def test_casts_keep_subnormals_signed_zeros_infinities_and_nan():
    for spec in ("fp16", "bf16"):
        result = tw.loads(tw.dumps(SPECIAL, codec=spec))
        assert result.tobytes() == restored(SPECIAL, spec, {}).tobytes()
        assert np.array_equal(np.isnan(result), np.isnan(SPECIAL))
        assert np.array_equal(np.signbit(result), np.signbit(SPECIAL))
        assert (result[np.isinf(SPECIAL)] == SPECIAL[np.isinf(SPECIAL)]).all()


# --------------------------------------------------------------------------------------------- into= and expect=


@given(st.sampled_from(["raw", "zstd", "nf4", "bf16"]), st.integers(0, 3000), seeds, frame_sizes)
def test_into_fills_and_returns_the_given_tensors(codec, n, seed, frame_size):
    sent = {"a": hard_values(n, seed), "b": {"c": np.arange(5)}}
    data = encoded(sent, codec=codec, frame_size=frame_size)
    room = {"a": np.full(n, 7, np.float32), "/b/c": np.full(5, 7)}
    result = tw.loads(data, into=room)
    assert result["a"] is room["a"]
    assert result["b"]["c"] is room["/b/c"]
    assert same(plain(result), plain(tw.loads(data)))


@pytest.mark.parametrize(
    "room", [np.zeros(4), np.zeros((1, 3)), np.zeros(3, np.float32), [0.0, 0.0, 0.0], np.zeros(())]
)
def test_into_refuses_another_shape_or_dtype_before_it_writes(room):
    data = tw.dumps({"x": np.ones(3)})
    before = bytes(np.asarray(room).tobytes())
    with pytest.raises(SchemaError, match="'x'"):
        tw.loads(data, into={"x": room})
    assert np.asarray(room).tobytes() == before


def test_into_refuses_memory_it_cannot_write_in_place():
    data = tw.dumps({"x": np.ones((2, 2))})
    locked = np.zeros((2, 2))
    locked.flags.writeable = False
    for room in (locked, np.zeros((2, 4))[:, ::2], np.zeros((2, 2), order="F")):
        with pytest.raises(EncodeError, match="'x'"):
            tw.loads(data, into={"x": room})


def test_into_torch_tensors():
    torch = pytest.importorskip("torch")
    from tensorwire import torch as front

    values = torch.randn(300)
    for codec in ("raw", "bf16", "nf4"):
        for sent in (values, values[:1], values[0], values[:0]):
            data = front.dumps({"x": sent}, codec=codec)
            room = torch.zeros(300)[:: 300 // max(sent.numel(), 1)][: sent.numel()].reshape(sent.shape)
            assert front.loads(data, into={"x": room})["x"] is room
            assert torch.equal(room, front.loads(data)["x"])
    for room in (torch.zeros(3, dtype=torch.complex64).conj(), torch.zeros(3, 2)[:, 0]):
        with pytest.raises(EncodeError, match="into="):
            front.loads(front.dumps({"x": room + 1}), into={"x": room})


EXPECTED = {"w": np.zeros((2, 3), np.float32), "n": {"v": 1, "t": (np.int8(0),)}}
DIFFERENT = {
    "shape": {"w": np.zeros((3, 2), np.float32), "n": {"v": 1, "t": (np.int8(0),)}},
    "broadcast": {"w": np.zeros((1, 2, 3), np.float32), "n": {"v": 1, "t": (np.int8(0),)}},
    "dtype": {"w": np.zeros((2, 3), np.float64), "n": {"v": 1, "t": (np.int8(0),)}},
    "name": {"x": np.zeros((2, 3), np.float32), "n": {"v": 1, "t": (np.int8(0),)}},
    "extra": {"w": np.zeros((2, 3), np.float32), "n": {"v": 1, "t": (np.int8(0),), "u": 2}},
    "container": {"w": np.zeros((2, 3), np.float32), "n": {"v": 1, "t": [np.int8(0)]}},
    "kind": {"w": 1.0, "n": {"v": 1, "t": (np.int8(0),)}},
    "root": [np.zeros((2, 3), np.float32)],
}


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_expect_accepts_the_same_schema_whatever_the_values(codec):
    sent = {"w": np.ones((2, 3), np.float32), "n": {"v": 12345, "t": (np.int8(5),)}}
    data = tw.dumps(sent, codec=codec)
    for expect in (EXPECTED, tw.schema(EXPECTED), tw.schema(EXPECTED, codec=codec)):
        for _ in range(2):  # a schema may be used again
            assert same(plain(tw.loads(data, expect=expect)), plain(tw.loads(data)))


@pytest.mark.parametrize("kind", [*DIFFERENT])
def test_expect_refuses_a_difference_before_any_data(kind):
    data = tw.dumps(DIFFERENT[kind])
    with pytest.raises(SchemaError):
        tw.loads(data, expect=EXPECTED)

    def until_data():
        for piece in cut(data):
            assert piece[0] != DATA, "data was asked for"
            yield piece

    with pytest.raises(SchemaError):
        tw.loads(until_data(), expect=EXPECTED)


def test_expect_refuses_what_is_missing_another_codec_and_another_tie():
    with pytest.raises(SchemaError, match="missing"):
        tw.loads(tw.dumps({"w": EXPECTED["w"]}), expect={"w": EXPECTED["w"], "v": EXPECTED["w"].copy()})
    with pytest.raises(SchemaError, match="codec"):
        tw.loads(tw.dumps(EXPECTED, codec="nf4"), expect=tw.schema(EXPECTED, codec="int8"))
    with pytest.raises(SchemaError):
        tied = np.zeros(2)
        tw.loads(tw.dumps({"a": tied, "b": tied}), expect={"a": np.zeros(2), "b": np.zeros(2)})


# --------------------------------------------------------------------------------- What is refused on the way in

Point = namedtuple("Point", "x y")
DEEP: Any = 0
for _ in range(40):
    DEEP = [DEEP]
LOOP: list = []
LOOP.append(LOOP)


class Text(str):
    pass


REFUSED = {
    "structured": (np.zeros(2, [("a", "i4")]), "dtype"),
    "object": (np.array([1, None], object), "dtype"),
    "unicode": (np.array(["a"]), "dtype"),
    "bytes array": (np.array([b"a"]), "dtype"),
    "datetime": (np.array(["2026-01-01"], "M8[D]"), "dtype"),
    "timedelta": (np.array([1], "m8[s]"), "dtype"),
    "void": (np.zeros(2, "V3"), "dtype"),
    "long double": (np.zeros(2, np.longdouble), "dtype"),
    "int of 65 bits": (2**64, "64 bits"),
    "negative int of 65 bits": (-(2**63) - 1, "64 bits"),
    "million digits": (10**1_000_000, "64 bits"),
    "set": ({1}, "set cannot be sent"),
    "complex": (1j, "complex cannot be sent"),
    "object()": (object(), "object cannot be sent"),
    "function": (len, "cannot be sent"),
    "namedtuple": (Point(1, 2), "Point cannot be sent"),
    "str subclass": (Text("x"), "Text cannot be sent"),
    "bytearray": (bytearray(b"x"), "bytearray cannot be sent"),
    "path": (Path("x"), "cannot be sent"),
    "lone surrogate": ("\ud800", "surrogates"),
    "too deep": (DEEP, "deep"),
    "too deep with tensors": ([DEEP, np.zeros(1)], "deep"),
    "loop": (LOOP, "deep"),
    "large text": ("x" * (16 << 20), "value"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*REFUSED])
def test_unsendable_items_are_refused_by_name_before_any_byte(kind):
    value, says = REFUSED[kind]
    with pytest.raises(EncodeError, match=says) as caught:
        tw.encode({"fine": np.zeros(3), "model": [{"bad": value}]}, limits=Limits(value=16 << 20))
    assert caught.value.item.startswith("/model/0/bad")
    assert "/model/0/bad" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["a\n", "\x1b[2J", "\x00", "\x7f", "\u202e", "\u2066", "\ud800", "x" * 1025, "ä" * 513,
            True, None, 1.5, float("nan"), (1,), b"x", 2**53 + 1, -(2**53) - 1],
    ids=ascii,
)  # fmt: skip
def test_names_that_a_reader_would_refuse_are_refused(key):
    with pytest.raises(EncodeError, match=r"/model/0"):
        tw.encode({"model": [{key: np.zeros(3)}]})
    with pytest.raises(EncodeError):
        encoded(iter([(key, np.zeros(3))]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_without_dense_values_are_refused_with_the_remedy():
    torch = pytest.importorskip("torch")
    from tensorwire import torch as front

    dense = torch.ones(2, 2)
    cases = {
        "dequantize": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        r"to_dense": dense.to_sparse(),
        r"to_dense.*": dense.to_sparse_csr(),
        "meta": torch.empty(2, device="meta"),
        "layout|nested": torch.nested.nested_tensor([dense, dense[0:1]]),
    }
    for says, tensor in cases.items():
        with pytest.raises(EncodeError, match=says) as caught:
            front.encode({"layers": [tensor]})
        assert caught.value.item == "/layers/0"
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), pytest.raises(EncodeError, match=r"fake.*/layers/0"):
        front.encode({"layers": [torch.empty(2)]})


@pytest.mark.parametrize(
    "options",
    [{"codec": "zip"}, {"codec": "nf4:blocksize=63"}, {"codec": "nf4|int8"}, {"codec": 4}, {"codec": {"*": "nf5"}},
     {"codec": lambda name, value: "nf5"}, {"frame_size": 4095}, {"frame_size": 1 << 27}, {"metadata": {"a": 1}},
     {"metadata": {1: "a"}}, {"metadata": {"a": "x" * 100}, "limits": Limits(metadata=100)},
     {"stream_id": bytes(65)}, {"stream_id": "text"},
     {"codec": "int8", "frame_size": 4100}],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_refused_before_any_byte(options):
    with pytest.raises(EncodeError):
        tw.encode({"x": np.zeros(9000, np.float32)}, **options)


def test_errors_survive_pickling_and_show_hostile_names_escaped_and_cut():
    import pickle

    errors = [
        LimitError("items", 3, 4, frame=2, item="a", offset=9),
        NonFiniteError("nan", index=4),
        TruncatedError("cut", frame=1, offset=2),
        tensorwire.TransportError("gone", retryable=False),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
    shown = str(FormatError("x", item="\x1b[2J\u202e" + "y" * 5000))
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) < 160


# -------------------------------------------------------------------------------------------------- Files at rest


@given(trees, st.sampled_from(["raw", "zstd", "int8", "nf4"]))
def test_a_saved_file_equals_a_message(tree, codec):
    import tempfile

    tree = {"tree": tree, "w": hard_values(500, 1)}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.tw")
        try:
            assert tw.save_file(tree, path, codec=codec, metadata={"k": "v"}) == os.path.getsize(path)
        except NonFiniteError:
            assert codec in ("int8", "nf4")
            assert os.listdir(folder) == []
            return
        loaded = tw.load_file(path)
        assert same(plain(loaded), plain(tw.loads(tw.dumps(tree, codec=codec))))
        with tw.open_file(path) as file:
            assert file.metadata == {"k": "v"}
            pairs = [(name, value) for name, value in tw.decode(Path(path).read_bytes()) if name in file]
            assert len(file) == len({name for name, _ in pairs}) == len([*file])
            for name, value in pairs if len(pairs) == len(file) else ():
                assert same(plain(file[name]), plain(value))


def memory_of(array):
    """What an array is a view of, in the end."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj


def test_mapped_tensors_are_views_of_the_file_read_only_and_aligned(tmp_path):
    big = np.arange(3_000_000, dtype=np.float32).reshape(1000, -1)
    tree = {"a": np.arange(3), "big": big, "none": np.zeros((0, 2)), "flag": np.bool_(True), "q": big[0]}
    tw.save_file(tree, tmp_path / "x.tw", codec={"q": "nf4"})
    assert same(plain(tw.load_file(tmp_path / "x.tw")["big"]), plain(big))
    file = tw.open_file(tmp_path / "x.tw")
    for name in ("a", "big", "none", "flag"):
        mapped = file.map(name)
        assert same(plain(mapped), plain(tree[name]))
        assert not mapped.flags.writeable
        assert not mapped.flags.owndata
        assert mapped.size == 0 or mapped.ctypes.data % 64 == 0
        assert mapped.size == 0 or isinstance(memory_of(mapped), mmap.mmap)
    with pytest.raises(EncodeError, match="q"):
        file.map("q")
    with pytest.raises(KeyError):
        file["absent"]
    mapped = file.map("big")
    file.close()
    assert mapped[-1, -1] == big[-1, -1]  # the memory stays while somebody looks


def test_a_recorded_stream_has_no_index_but_loads(tmp_path):
    path = tmp_path / "x.tw"
    path.write_bytes(tw.dumps({"a": np.arange(3)}))
    assert (tw.load_file(path)["a"] == [0, 1, 2]).all()
    with pytest.raises(SchemaError, match="index"):
        tw.open_file(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError, match="after the end"):
        tw.load_file(path)


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "x.tw"
    tw.save_file({"a": np.arange(3)}, path)
    before = path.read_bytes()
    with pytest.raises(NonFiniteError):
        tw.save_file({"a": np.full(3, np.nan, np.float32)}, path, codec="nf4")
    with pytest.raises(EncodeError):
        tw.save_file({"a": object()}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.tw"]


# --------------------------------------------------------------------------------------------------- Any other file


@given(st.integers(0, 30_000), seeds, frame_sizes, st.sampled_from(["raw", "zstd"]), st.booleans())
def test_a_file_of_any_size_arrives_whole_under_the_name_the_receiver_chose(size, seed, frame_size, codec, piped):
    import tempfile

    content = np.random.default_rng(seed).integers(0, 4, size, np.uint8).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.bin"), Path(folder, "target")
        source.write_bytes(content)
        file = io.BytesIO(content) if piped else source
        name = decode_file(encode_file(file, codec=codec, frame_size=frame_size), target)
        assert name == ("-" if piped else "source.bin")
        assert target.read_bytes() == content
        assert sorted(os.listdir(folder)) == ["source.bin", "target"]


def test_a_pipe_is_sent_as_it_is_read(tmp_path):
    reading, writing = os.pipe()
    content = bytes(range(256)) * 2000

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe:
            for at in range(0, len(content), 7001):
                pipe.write(content[at : at + 7001])

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        decode_file(encode_file(pipe, name="../../etc/passwd"), tmp_path / "here")
    writer.join()
    assert (tmp_path / "here").read_bytes() == content
    assert os.listdir(tmp_path) == ["here"]


def test_a_failed_transfer_leaves_no_temporary_file_and_keeps_the_target(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    stream = b"".join(bytes(b) for b in encode_file(io.BytesIO(bytes(9000)), frame_size=4096))
    damaged = bytearray(stream)
    damaged[-200] ^= 1
    broken = [
        stream[:-1],
        stream[:5000],
        bytes(damaged),
        stream + b"\0",
        b"",
        tw.dumps({}),
        tw.dumps({"a": np.zeros(2)}),
    ]
    for data in broken:
        with pytest.raises(TensorwireError):
            decode_file(data, target)
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["target"]

    def dying():
        yield stream[:5000]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_file(dying(), target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(SchemaError, match="decode_file"):
        tw.loads(stream)


def test_files_take_only_byte_codecs_and_valid_names(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(EncodeError, match="cannot carry a file"):
        encode_file(tmp_path / "f", codec="nf4")
    with pytest.raises(EncodeError):
        b"".join(encode_file(tmp_path / "f", name="a\nb"))
    with pytest.raises(FileNotFoundError):
        b"".join(encode_file(tmp_path / "absent"))


def test_frames_are_no_longer_than_asked_for_and_1_mib_by_default():
    tensors = {"a": np.zeros(400_000, np.float32), "b": np.zeros(999_999, np.uint8)}
    for codec in ("raw", "int8", "nf4", "zstd"):
        for frame_size in (FRAME_SIZE, 5000):
            longest = max(memoryview(b).nbytes for b in tw.encode(tensors, codec=codec, frame_size=frame_size))
            assert longest <= frame_size - 48
    assert FRAME_SIZE == 1 << 20
