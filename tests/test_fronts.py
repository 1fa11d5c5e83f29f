"""What the fronts make of tensors: memory of any layout and byte order, wrappers of every kind, torch's modes."""

import mmap
import os
import random
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorwire
import tensorwire.numpy as tn
from tensorwire import EncodeError, dtypes
from tensorwire.memory.strided import pieces, reader
from tensorwire.tensor import TensorView, ViewFront

torch = pytest.importorskip("torch")

import tensorwire.torch as tw

MIB = 1 << 20


# ------------------------------------------------------------------------------------------------------- Layouts


@st.composite
def layouts(draw: Any) -> np.ndarray:
    """Arrays of bits: permuted, strided, reversed and expanded."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    bits = draw(st.sampled_from(["u1", "u2", "u4", "u8", "c16"]))
    array = np.arange(int(np.prod(shape))).astype(bits).reshape(shape)
    array = array.transpose(draw(st.permutations(range(len(shape)))))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, -1, -2]), min_size=len(shape), max_size=len(shape)))
    array = array[tuple(slice(None, None, step) for step in steps)]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (3, *array.shape))
    if draw(st.booleans()):
        array = np.broadcast_to(array[..., None], (*array.shape, 2))
    return array


@given(layouts(), st.data())
def test_any_layout_reads_like_contiguous_memory(array: np.ndarray, data: Any) -> None:
    flat, read = np.ascontiguousarray(array).reshape(-1), reader(array)
    for _ in range(5):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, flat.size), st.integers(0, flat.size))))
        assert read(start, stop).tobytes() == flat[start:stop].tobytes()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.data())
def test_pieces_cover_the_range_once_and_in_order(shape: list[int], data: Any) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, array.size), st.integers(0, array.size))))
    covered = []
    for place, index, block in pieces(tuple(shape), start, stop):
        assert place == len(covered) and array[index].shape == block
        covered += array[index].reshape(-1).tolist()
    assert covered == list(range(start, stop))


@pytest.mark.parametrize("shape", [(2, 3 * MIB // 4), (3, 5, 7001), (4099, 1031), (64, 100_003)])
def test_short_slices_are_read_ahead_and_then_released(shape: tuple) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape[::-1]).transpose()
    expected, read, step = np.ascontiguousarray(array).reshape(-1), reader(array), 9_973
    for _ in range(2):  # a codec may look at a tensor more than once
        parts = [read(start, min(start + step, array.size)) for start in range(0, array.size, step)]
        assert np.array_equal(np.concatenate(parts).view(np.uint32), expected)
    del parts
    tracemalloc.start()
    for start in range(0, array.size, step):
        read(start, min(start + step, array.size))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < MIB and peak < 34 * MIB


def processor_seconds(job: Callable[[], object]) -> float:
    def once() -> float:
        began = time.process_time()
        job()
        return time.process_time() - began

    return min(once() for _ in range(3))


NONCONTIGUOUS = {
    "bf16 transposed": lambda: torch.randn(2048, 2048).bfloat16().t(),
    "f32 transposed": lambda: torch.randn(2048, 2048).t(),
    "f64 transposed": lambda: torch.randn(1024, 2048, dtype=torch.float64).t(),
    "f32 wide": lambda: torch.randn(1 << 16, 64).t(),
    "f32 channels_last": lambda: torch.randn(64, 256, 16, 16).to(memory_format=torch.channels_last),
    "f32 heads": lambda: torch.randn(512, 64, 128).permute(1, 2, 0),
    "u8 columns": lambda: torch.zeros(4096, 4096, dtype=torch.uint8)[:, :2048],
}


@pytest.mark.parametrize("codec", ["raw", "nf4"])
@pytest.mark.parametrize("kind", NONCONTIGUOUS)
def test_a_tensor_of_another_layout_costs_about_what_a_contiguous_copy_costs(kind: str, codec: str) -> None:
    tensor = NONCONTIGUOUS[kind]()

    def drain(value: Any) -> None:
        for _ in tw.encode({"w": value}, codec=codec):
            pass

    slow, fast = processor_seconds(lambda: drain(tensor)), processor_seconds(lambda: drain(tensor.contiguous()))
    assert slow < 1.5 * fast + 0.01


def peak_of_encoding(front: Any, tensor: Any) -> int:
    tracemalloc.start()
    for _ in front.encode({"w": tensor}):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_layout_and_byte_order_take_the_memory_of_frames() -> None:
    square = np.zeros((2048, 2048), np.float32)  # 16 MiB
    for array in (square.T, square.astype(">f4"), square.astype(">f4").T, square[::-1, ::-1], square.view(">c8")):
        assert peak_of_encoding(tn, array) < 6 * MIB


def test_conjugates_and_negatives_are_made_slice_by_slice() -> None:
    z = torch.randn(1 << 20, dtype=torch.complex64)
    for tensor in (z.conj(), z.conj().imag, torch._neg_view(z.conj()), z.reshape(1024, 1024).t().conj()):
        assert torch.equal(tw.loads(tw.dumps(tensor)), tensor)
    z.untyped_storage().resize_(0)  # so nothing holds a copy of it
    ints = torch._neg_view(torch.arange(5))
    assert torch.equal(tw.loads(tw.dumps(ints)), ints)


@pytest.mark.parametrize("dtype", [">i2", ">u8", ">f2", ">f4", ">f8", ">c8", ">c16"])
def test_big_endian_arrays_round_trip_bit_exact(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 16 * 60, np.uint8)
    for array in (bits.view(dtype), bits.view(dtype)[::-3], bits.view(dtype)[:60].reshape(10, 6).T):
        native = array.dtype.newbyteorder("=")
        expected = np.ascontiguousarray(array).view(f"V{array.itemsize}")
        got = tn.loads(tn.dumps(array))
        assert got.dtype == native
        assert got.astype(array.dtype).view(f"V{array.itemsize}").tobytes() == expected.tobytes()


def test_views_that_differ_in_byte_order_or_conjugation_are_not_tied() -> None:
    native = np.array([1.0, 2.0], "<f4")
    got = tn.loads(tn.dumps({"a": native, "b": native.view(">f4")}))
    assert got["a"].tolist() == [1, 2] and got["b"].tolist() == native.view(">f4").tolist()
    z = torch.tensor([1j])
    got = tw.loads(tw.dumps({"a": z, "b": z.conj(), "c": torch._neg_view(z)}))
    assert [got[name].item() for name in "abc"] == [1j, -1j, -1j]


# --------------------------------------------------------------------------------------------------------- Bools


def bools() -> "torch.Tensor":
    return torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_bools_of_any_byte_arrive_as_true_or_false(codec: str, tmp_path: Path) -> None:
    sources = {
        "torch": (tw, bools()),
        "expanded": (tw, bools()[:3].expand(2, 3)),
        "numpy": (tn, np.array([0, 1, 2, 255], np.uint8).view(bool)),
        "strided": (tn, np.array([0, 9, 2, 9], np.uint8).view(bool)[::2]),
    }
    for front, tensor in sources.values():
        wanted = np.asarray([bool(x) for x in np.asarray(tensor).view(np.uint8).reshape(-1)])
        data = front.dumps({"mask": tensor}, codec=codec)
        front.save_file({"mask": tensor}, tmp_path / "x.tw", codec=codec)
        with tn.open_file(tmp_path / "x.tw") as file:
            for got in (tn.loads(data)["mask"], tn.load_file(tmp_path / "x.tw")["mask"], file["mask"]):
                assert np.array_equal(got.reshape(-1), wanted)
    view = TensorView(dtypes.BOOL, (3,), lambda start, stop: bytes([0, 7, 1])[start:stop])
    data = b"".join(map(bytes, tensorwire.streams.encode({"m": view}, ViewFront(), codec=codec)))
    assert tn.loads(data)["m"].tolist() == [False, True, True]


# -------------------------------------------------------------------------------------------------------- Memory


def resized(tensor: "torch.Tensor", size: int, look: Callable[[Any], Any] = lambda tensor: tensor) -> Any:
    """A look at a tensor whose storage has `size` bytes afterwards."""
    seen = look(tensor)
    tensor.untyped_storage().resize_(size)
    return seen


SHORT = {
    "freed": lambda: resized(torch.ones(1000), 0),
    "short": lambda: resized(torch.ones(1000), 400),
    "a parameter": lambda: resized(torch.ones(1000), 0, torch.nn.Parameter),
    "a view": lambda: resized(torch.ones(1000), 2000, lambda tensor: tensor[400:600]),
    "expanded": lambda: resized(torch.ones(1), 0, lambda tensor: tensor.expand(5)),
    "transposed": lambda: resized(torch.ones(10, 10), 396, torch.t),
    "conjugate": lambda: resized(torch.ones(10, dtype=torch.complex64), 8, torch.conj),
}


@pytest.mark.parametrize("kind", SHORT)
def test_freed_or_truncated_storage_is_never_read(kind: str) -> None:
    for front in (tw, tn, tensorwire):
        with pytest.raises(EncodeError, match=r"storage holds \d+ of the \d+ bytes.*item 'w'"):
            front.dumps({"w": SHORT[kind]()})
    if kind in ("freed", "short"):
        with pytest.raises(EncodeError, match="storage"):
            tw.FRONT.target(SHORT[kind]())


def test_two_freed_tensors_are_not_tied_and_empty_ones_are_none() -> None:
    assert tw.FRONT.view(torch.empty(0)).identity is None
    empty = torch.ones(0)
    got = tw.loads(tw.dumps({"a": empty, "b": empty, "c": resized(torch.ones(4), 0)[:0]}))
    assert got["a"] is not got["b"] and got["c"].shape == (0,)


def test_storage_that_is_freed_while_it_is_sent_is_noticed() -> None:
    for codec in ("raw", "nf4"):
        tensor = torch.ones(4 * MIB)
        buffers = tw.encode({"w": tensor}, codec=codec)
        next(buffers)
        tensor.untyped_storage().resize_(0)
        with pytest.raises(EncodeError, match="freed or resized while it was being sent.*item 'w'"):
            list(buffers)


def test_sending_and_receiving_leave_storage_as_resizable_as_it_was() -> None:
    sent, room = torch.ones(10), torch.zeros(10)
    data = tw.dumps({"w": sent})
    tw.loads(data, into={"w": room})
    assert torch.equal(room, sent)
    for tensor in (sent, room):
        tensor.untyped_storage().resize_(0)


def test_a_swapped_parameter_does_not_change_what_is_sent() -> None:
    parameter = torch.nn.Parameter(torch.ones(2 * MIB))
    buffers = tw.encode({"w": parameter})
    parts = [bytes(next(buffers))]
    parameter.data = torch.empty(0)
    assert tw.loads([*parts, *map(bytes, buffers)])["w"].sum() == 2 * MIB


def test_arrays_that_reach_outside_their_memory_are_refused(tmp_path: Path) -> None:
    strided = np.lib.stride_tricks.as_strided
    path = tmp_path / "x.bin"
    np.arange(10_000).tofile(path)
    mapped = np.memmap(path, dtype="i8", mode="r")
    os.truncate(path, 4096)
    with path.open("rb") as file:
        shrunk = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    os.truncate(path, 100)
    for array in (strided(np.ones(3), (5,), (8,)), strided(np.ones(8), (4,), (-8,)), mapped, mapped[100:], shrunk):
        with pytest.raises(EncodeError, match="outside the memory.*'x'"):
            tn.dumps({"x": array})
    within = strided(np.arange(8.0)[4:], (4,), (-8,))
    assert tn.loads(tn.dumps(within)).tolist() == [4, 3, 2, 1]
    assert tn.loads(tn.dumps(np.memmap(path, dtype="u1", mode="r"))).size == 100


# ------------------------------------------------------------------------------------------------------ Wrappers


class Bare(torch.Tensor):
    pass


class Slotted(torch.Tensor):
    __slots__ = ("scale",)


class BareArray(np.ndarray):
    pass


def with_attribute(tensor: Any, name: str) -> Any:
    setattr(tensor, name, 1)
    return tensor


def two_tensors() -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(3), torch.ones(3))


def masked() -> Any:
    from torch.masked import masked_tensor

    return masked_tensor(torch.ones(3), torch.tensor([True, False, True]))


def params4bit() -> Any:
    modules = pytest.importorskip("bitsandbytes.nn")
    return modules.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu").weight


def int8_params() -> Any:
    modules = pytest.importorskip("bitsandbytes.nn")
    return modules.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).weight


def nested(layout: Any) -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


# What has another meaning than its memory alone, and what the error has to say.
WRAPPED = {
    "wrapper subclass": (two_tensors, "made of other tensors"),
    "MaskedTensor": (masked, "made of other tensors"),
    "Params4bit": (params4bit, "state_dict.*integrations.bitsandbytes"),
    "Int8Params": (int8_params, "state_dict"),
    "lazy parameter": (lambda: torch.nn.LazyLinear(3).weight, "run its module once"),
    "lazy buffer": (torch.nn.UninitializedBuffer, "run its module once"),
    "zero tensor": (lambda: torch._efficientzerotensor(4), "no memory.*its values"),
    "subclass with an attribute": (lambda: with_attribute(torch.ones(2).as_subclass(Bare), "scale"), "scale.*as_sub"),
    "subclass with a slot": (lambda: with_attribute(torch.ones(2).as_subclass(Slotted), "scale"), "scale.*as_sub"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "to_dense"),
    "sparse_csr": (lambda: torch.eye(2).to_sparse_csr(), "to_dense"),
    "sparse_bsr": (lambda: torch.eye(2).to_sparse_bsr((1, 1)), "to_dense"),
    "mkldnn": (lambda: torch.eye(2).to_mkldnn(), "to_dense"),
    "nested": (lambda: nested(torch.strided), "to_dense"),
    "jagged": (lambda: nested(torch.jagged), "made of other tensors"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dequantize"),
    "meta": (lambda: torch.ones(2, device="meta"), "no values"),
    "65 dimensions": (lambda: torch.zeros([1] * 65), "ndim is 65"),
    "67 dimensions transposed": (lambda: torch.zeros([2] + [1] * 65 + [2]).transpose(0, -1), "dimensions"),
    "uint4": (lambda: torch.empty(2, dtype=torch.uint4), "cannot be sent"),
    "MaskedArray": (lambda: np.ma.array([1, 2], mask=[0, 1]), r"carries more.*filled"),
    "array with a unit": (lambda: with_attribute(np.ones(2).view(BareArray), "unit"), "carries more.*unit"),
    "record array": (lambda: np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "dtype"),
    "chararray": (lambda: np.char.array(["a"]), "dtype"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPED)
def test_subclasses_with_extra_state_are_refused_with_a_remedy(kind: str) -> None:
    make, says = WRAPPED[kind]
    value = make()
    for front in (tw, tn, tensorwire):
        with pytest.raises(EncodeError, match=f"(?s){says}") as caught:
            front.dumps({"layers": [value]})
        assert caught.value.item == "/layers/0"


WHOLE = {
    "Parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "marked Parameter": lambda: with_attribute(torch.nn.Parameter(torch.arange(3.0)), "_is_hf_initialized"),
    "Buffer": lambda: torch.nn.Buffer(torch.arange(3.0)),
    "bare subclass": lambda: torch.arange(3.0).as_subclass(Bare),
    "leaf of a graph": lambda: torch.arange(3.0, requires_grad=True) * 1,
    "matrix": lambda: np.matrix([0, 1, 2], np.float32),
    "bare array subclass": lambda: np.arange(3.0, dtype=np.float32).view(BareArray),
    "recarray without fields": lambda: np.arange(3.0, dtype=np.float32).view(np.recarray),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_subclasses_without_extra_state_are_sent(kind: str) -> None:
    for front in (tw, tn):
        got = front.loads(front.dumps({"x": WHOLE[kind]()}))["x"]
        assert type(got) in (torch.Tensor, np.ndarray)
        assert got.reshape(-1).tolist() == [0, 1, 2]


def test_tensors_under_transforms_are_refused() -> None:
    refused = []

    def look(x: Any) -> Any:
        with pytest.raises(EncodeError, match=r"torch.func.*'x'"):
            tw.dumps({"x": x})
        refused.append(x)
        return x.sum()

    torch.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    torch.func.functionalize(look)(torch.ones(2))
    assert len(refused) == 4


# --------------------------------------------------------------------------------------------------------- Modes

SENT = {
    "full": torch.linspace(-1, 1, 5000),
    "tiny": torch.linspace(-1e-40, 1e-40, 300),
    "half": torch.linspace(-1, 1, 99).bfloat16(),
    "turned": torch.linspace(-1, 1, 600).reshape(20, 30).t(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
    "mask": torch.tensor([True, False]),
}
SENT["conj"] = torch.view_as_complex(torch.linspace(-1, 1, 40).reshape(20, 2)).conj()


class Modes:
    """torch's global states, each set for a block and put back."""

    @staticmethod
    def plain() -> Iterator[None]:
        yield

    @staticmethod
    def meta_device() -> Iterator[None]:
        with torch.device("meta"):
            yield

    @staticmethod
    def default_dtype() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)

    @staticmethod
    def inference() -> Iterator[None]:
        with torch.inference_mode():
            yield

    @staticmethod
    def no_grad() -> Iterator[None]:
        with torch.no_grad():
            yield

    @staticmethod
    def flush_denormal() -> Iterator[None]:
        torch.set_flush_denormal(True)
        yield
        torch.set_flush_denormal(False)

    @staticmethod
    def deterministic() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


MODES = [name for name in vars(Modes) if not name.startswith("_")]


def bits_of(value: "torch.Tensor") -> bytes:
    return b"" if not value.numel() else bytes(tw.FRONT.view(value).read(0, value.numel()))


@pytest.mark.parametrize("codec", ["raw", "zstd", "bf16", "int8", "int8-linear", "nf4", "nf4:double_quant=true"])
@pytest.mark.parametrize("mode", MODES)
def test_no_global_mode_of_torch_changes_what_is_sent_or_received(mode: str, codec: str, tmp_path: Path) -> None:
    # The scales of double quantization are calculated by NumPy, which follows the mode where they are subnormal.
    sent = {name: tensor for name, tensor in SENT.items() if name != "tiny" or "double" not in codec}
    expected = tw.dumps(sent, codec=codec)
    wanted = tw.loads(expected)
    rooms = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    block = getattr(Modes, mode)()
    next(block)
    try:
        assert tw.dumps(sent, codec=codec) == expected
        tw.save_file(sent, tmp_path / "x.tw", codec=codec)
        tw.loads(expected, into=rooms, expect=sent)
        with tw.open_file(tmp_path / "x.tw") as file:
            ways = [tw.loads(expected), tw.load_file(tmp_path / "x.tw"), {name: file[name] for name in sent}]
    finally:
        next(block, None)
    for got in (*ways, rooms):
        for name, tensor in got.items():
            assert (tensor.device.type, tensor.dtype) == ("cpu", wanted[name].dtype)
            assert not tensor.is_inference() and not tensor.requires_grad
            assert bits_of(tensor) == bits_of(wanted[name])


def test_under_a_fake_mode_real_tensors_are_sent_and_none_are_made() -> None:
    from torch._subclasses import FakeTensorMode

    data = tw.dumps({"w": SENT["turned"]})
    with FakeTensorMode():
        assert tw.dumps({"w": SENT["turned"]}) == data
        schema = tw.schema({"w": torch.empty(30, 20)})
        with pytest.raises(tensorwire.UnsupportedError, match="leave its fake"):
            tw.loads(data)
    assert tw.loads(data, expect=schema)["w"].shape == (30, 20)


# ---------------------------------------------------------------------------------------------- The other library


def test_each_front_sends_both_libraries_and_returns_its_own() -> None:
    array, tensor = np.arange(6, dtype=np.int16).reshape(2, 3).T, torch.arange(3).bfloat16()
    value = {"array": array, "tensor": tensor, "scalar": np.float64(0.5), "state": [np.int64(3), (np.bool_(True),)]}
    assert tw.dumps(value) == tn.dumps(value) == tensorwire.dumps(value)
    got = tw.loads(tw.dumps(value))
    assert got["array"].tolist() == array.tolist() and got["array"].dtype == torch.int16
    assert got["scalar"].dtype == torch.float64 and got["scalar"] == 0.5 and got["state"][1][0]
    got = tn.loads(tn.dumps(value))
    assert got["tensor"].dtype.name == "bfloat16" and (got["tensor"] + 1).tolist() == [1, 2, 3]
    room = {"array": np.zeros((3, 2), np.int16)}
    assert tw.loads(tw.dumps({"array": array}), into=room)["array"] is room["array"]
    assert np.array_equal(room["array"], array)


def test_random_states_round_trip() -> None:
    states = {"numpy": np.random.get_state(), "torch": torch.get_rng_state(), "python": random.getstate()}  # noqa: NPY002
    got = tw.loads(tw.dumps(states))
    np.random.set_state((*got["numpy"][:1], got["numpy"][1].numpy(), *(x for x in got["numpy"][2:])))  # noqa: NPY002
    torch.set_rng_state(got["torch"])
    random.setstate(got["python"])


def test_dtypes_without_numpy_arithmetic_come_as_raw_bits() -> None:
    pairs = torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    got = tn.loads(tn.dumps({"x": pairs}))["x"]
    with pytest.raises(TypeError):
        got + 1
    assert got.view(np.uint8).tolist() == [0, 1, 2, 3]
    assert tn.dumps({"x": got}) == tw.dumps({"x": pairs})
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex32):
        tensor = torch.ones(3, dtype=torch.float32).to(dtype)
        assert tn.loads(tn.dumps(tensor)).astype(np.complex64).tolist() == [1, 1, 1]


def test_no_warning_comes_from_looking_at_a_tensor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in SENT.values():
            tw.dumps(value)


@pytest.mark.parametrize("look", ["contiguous", "transposed", "conjugate"])
def test_slices_on_a_device_are_made_there_one_by_one(look: str) -> None:
    """Run on the CPU, where the same calls work."""
    tensor = torch.randn(60, 50, dtype=torch.complex64)
    tensor = {"contiguous": tensor, "transposed": tensor.t(), "conjugate": tensor.t().conj()}[look]
    checks: list[int] = []
    read, device_read = tw._device_readers(tensor.requires_grad_(), lambda: checks.append(1))
    expected = tensor.detach().contiguous().reshape(-1).resolve_conj()
    for start, stop in ((0, 3000), (7, 8), (13, 1777), (3000, 3000)):
        assert torch.equal(device_read(start, stop), expected[start:stop])
        assert not device_read(start, stop).requires_grad
        assert read(start, stop).tobytes() == expected[start:stop].numpy().tobytes()
    assert len(checks) == 12
