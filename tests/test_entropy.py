"""The stage `entropy`: what it makes of payloads, that nothing is lost behind it, and that nothing grows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorwire
from tensorwire import dtypes
from tensorwire.codecs import BUILT_IN, Packer, parse
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent, TensorView

RNG = np.random.default_rng(48)
WEIGHTS = (RNG.standard_normal(1 << 18) * 0.02).astype(np.float32)
# As updates are: rows that nothing happened to beside others, whose sizes differ.
UPDATE = (WEIGHTS.reshape(-1, 256) * np.exp(RNG.standard_normal((1024, 1)))).astype(np.float32)
UPDATE[RNG.random(1024) < 0.5] = 0
PACKERS = ["raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "nf4:double_quant=true", "fp4", "planes"]


def encoded(spec: str, values: np.ndarray) -> bytes:
    codec, shape, data = parse(spec), (values.size,), values.reshape(-1).view(np.uint8)
    view = TensorView(dtypes.FLOAT32, shape, lambda start, stop: data[4 * start : 4 * stop])
    context = codec.prepare(view)
    extent = Extent.whole(dtypes.FLOAT32, shape)
    payload = bytes(codec.encode(data, extent, lambda size: np.full(size, 0xA5, np.uint8), context).payload)
    codec.check_length(len(payload), extent)
    return payload


def unpacked(spec: str, payload: bytes, count: int) -> bytes:
    return bytes(parse(spec).unpack(memoryview(payload), Extent.whole(dtypes.FLOAT32, (count,))))


def bits(spec: str, values: np.ndarray) -> float:
    return 8 * len(encoded(spec, values)) / values.size


@pytest.mark.parametrize("spec", PACKERS)
def test_the_payload_round_trips(spec: str) -> None:
    for values in (UPDATE, WEIGHTS[:5001], WEIGHTS[:1], np.zeros(3000, np.float32), np.ones(777, np.float32)):
        before = encoded(spec, values)
        assert unpacked(f"{spec}|entropy", encoded(f"{spec}|entropy", values), values.size) == before


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(PACKERS),
    count=st.integers(1, 3000),
    zeros=st.integers(0, 3000),
    scale=st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 60000.0]),
    behind=st.sampled_from(["entropy", "zstd|entropy", "entropy|zstd"]),
)
def test_values_are_the_same_as_without_entropy(spec: str, count: int, zeros: int, scale: float, behind: str) -> None:
    values = (WEIGHTS[:count] * np.float32(scale)).clip(-60000, 60000)
    values[:zeros] = 0
    plain, packed = (tensorwire.loads(tensorwire.dumps(values, codec=each)) for each in (spec, f"{spec}|{behind}"))
    assert plain.tobytes() == packed.tobytes()


@pytest.mark.parametrize(
    ("spec", "update", "weights"),
    [("nf4", 2.3, 4.35), ("fp4", 2.2, 4.2), ("int8", 4.2, 7.5), ("int8-linear", 4.0, 7.55), ("bf16", 5.75, 10.7)],
)
def test_updates_and_weights_shrink(spec: str, update: float, weights: float) -> None:
    """Of made-up ones; `tensorwire bench lossless` measures real ones."""
    assert bits(f"{spec}|entropy", UPDATE) < update
    assert bits(f"{spec}|entropy", WEIGHTS) < weights


def test_numbers_of_several_bytes_compress_well() -> None:
    integers = np.arange(100_000) // 7
    assert len(tensorwire.dumps(integers, codec="entropy")) < 0.16 * integers.nbytes
    assert len(tensorwire.dumps(WEIGHTS, codec="entropy")) < 0.84 * WEIGHTS.nbytes


@pytest.mark.parametrize("packer", [stage for stage in BUILT_IN if issubclass(stage, Packer)], ids=lambda one: one.name)
def test_parts_add_up(packer: type[Packer]) -> None:
    stages = [packer()] if packer.name not in ("nf4", "fp4") else [packer(), packer(double_quant=True)]
    for stage in stages:
        for dtype in filter(stage.accepts, dtypes.ALL):
            for count in (1, 63, 1000, 70_001):
                parts = stage.parts(count, dtype)
                assert not parts or sum(part.size for part in parts) == stage.sizes(count, dtype).total
                assert all(part.width in (1, 2, 4, 8) and part.size % part.width == 0 for part in parts)


def test_incompressible_payloads_grow_by_one_byte() -> None:
    noise = RNG.integers(0, 256, 40_000, dtype=np.uint8).view(np.float32)
    for values in (noise, WEIGHTS[:3], np.zeros(63, np.float32)):
        before = encoded("raw", values)
        assert encoded("raw|entropy", values) == b"\0" + before


def test_blocks_of_the_most_frequent_byte_are_left_out() -> None:
    values = np.zeros(1 << 16, np.float32)
    values[:128] = WEIGHTS[:128]
    codes = len(values) // 2
    assert len(encoded("nf4|entropy", values)) < 64 + codes / 64 / 8 + 2 * 150


def test_slices_decode_independently_into_place() -> None:
    weights = {"a": UPDATE, "b": WEIGHTS[:1000].astype(np.float16), "n": np.arange(10), "zero": np.zeros(3000)}
    stream = b"".join(tensorwire.encode(weights, codec="int8|entropy", frame_size=8192))
    plain = tensorwire.loads(tensorwire.dumps(weights, codec="int8"))
    into = {name: np.full_like(array, 1) for name, array in weights.items()}
    received = tensorwire.loads(stream, into=into)
    assert all(received[name] is into[name] and np.array_equal(into[name], plain[name]) for name in weights)


def test_tensors_that_a_quantizer_does_not_carry_go_through_it() -> None:
    report = tensorwire.Report()
    weights = {"ids": np.arange(50_000) // 9, "double": WEIGHTS.astype(np.float64), "w": WEIGHTS}
    data = tensorwire.dumps(weights, codec="nf4|entropy", report=report)
    assert report.codecs["raw|entropy"].bytes_out < 0.46 * report.codecs["raw|entropy"].bytes_in
    assert np.array_equal(tensorwire.loads(data)["double"], weights["double"])


@pytest.mark.parametrize("spec", ["nf4|entropy", "raw|entropy", "planes|entropy"])
def test_a_damaged_payload_is_refused_or_gives_bytes_but_never_more(spec: str) -> None:
    codec, count = parse(spec), 3000
    extent = Extent.whole(dtypes.FLOAT32, (count,))
    payload, refused = encoded(spec, UPDATE.reshape(-1)[:count]), 0
    for _ in range(500):
        damaged = bytearray(payload)
        damaged[int(RNG.integers(0, min(len(damaged), 200)))] ^= 1 << int(RNG.integers(0, 8))
        if RNG.random() < 0.2:
            damaged = damaged[: int(RNG.integers(0, len(damaged)))]
        out = np.full(4 * count + 64, 0xA5, np.uint8)
        try:
            codec.decode(memoryview(damaged), extent, out[32:-32])
        except FormatError:
            refused += 1
        assert (out[:32] == 0xA5).all() and (out[-32:] == 0xA5).all()
    assert refused > 100


def test_encoding_is_pure_and_deterministic() -> None:
    locked = UPDATE.copy()
    locked.setflags(write=False)
    for spec in PACKERS:
        assert encoded(f"{spec}|entropy", locked) == encoded(f"{spec}|entropy", UPDATE.copy())
    assert np.array_equal(locked, UPDATE)
