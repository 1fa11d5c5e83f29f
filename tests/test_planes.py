"""The lossless codec `planes`: nothing is lost, nothing grows, and each plane goes the way it should."""

import numpy as np
import pytest

import tensorwire
from tensorwire import dtypes
from tensorwire.codecs import Planes, parse
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent

CODEC = parse("planes")
CARRIED = [dtype for dtype in dtypes.ALL if CODEC.accepts(dtype)]
RNG = np.random.default_rng(35)
WEIGHTS = (RNG.standard_normal(1 << 18) * 0.02).astype(np.float32)
NOISE = RNG.integers(0, 256, 1 << 20, dtype=np.uint8)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def encoded(data: np.ndarray, dtype: DType) -> bytes:
    data = data.view(np.uint8)
    count = data.size // dtype.itemsize
    extent = Extent.whole(dtype, (count,))
    payload = bytes(CODEC.encode(data, extent, lambda size: np.full(size, 0xA5, np.uint8)).payload)
    CODEC.check_length(len(payload), extent)
    return payload


def decoded(payload: bytes, dtype: DType, count: int) -> np.ndarray:
    out = np.full(count * dtype.itemsize, 0xA5, np.uint8)
    CODEC.decode(memoryview(payload), Extent.whole(dtype, (count,)), out)
    return out


def ratio(data: np.ndarray, dtype: DType) -> float:
    payload = encoded(data, dtype)
    assert np.array_equal(decoded(payload, dtype, data.nbytes // dtype.itemsize), data.view(np.uint8))
    return len(payload) / data.nbytes


@pytest.mark.parametrize("dtype", CARRIED, ids=str)
def test_any_bits_of_any_length_round_trip(dtype: DType) -> None:
    few = NOISE & 0x83
    holes = np.where((np.arange(NOISE.size) // 700) % 3 == 0, NOISE, 0).astype(np.uint8)
    for count in (1, 2, 63, 64, 65, 500, 1024, 1025, 7000):
        for values in (NOISE, few, holes, np.zeros_like(NOISE), np.full_like(NOISE, 7)):
            ratio(values[: count * dtype.itemsize].copy(), dtype)


def test_every_float_is_carried_and_nothing_else() -> None:
    floats = {dtype for dtype in dtypes.ALL if "float" in dtype.name or "complex" in dtype.name}
    assert {*CARRIED} == floats and CODEC.lossless and not CODEC.exact_length


def test_weights_shrink() -> None:
    """Of a normal distribution; real weights are measured by `tensorwire bench lossless`."""
    brain = bfloat16(WEIGHTS)
    update = WEIGHTS.copy().reshape(-1, 512)
    update[::2] = 0
    assert ratio(brain, dtypes.BFLOAT16) < 0.67
    assert ratio(WEIGHTS, dtypes.FLOAT32) < 0.835
    assert ratio(brain.astype(np.uint32) << 16, dtypes.FLOAT32) < 0.335
    assert ratio(update.reshape(-1), dtypes.FLOAT32) < 0.42
    assert ratio(np.zeros(1 << 18, np.float32), dtypes.FLOAT32) < 1e-5
    assert ratio(WEIGHTS.astype(np.float16), dtypes.FLOAT16) < 0.9
    assert ratio(WEIGHTS.astype(np.float64), dtypes.FLOAT64) < 0.48


def test_noise_hardly_grows() -> None:
    for dtype in CARRIED:
        for count in (1024, 1 << 16):
            bound = CODEC.bound(count, dtype)
            assert len(encoded(NOISE[: count * dtype.itemsize], dtype)) <= bound
            assert bound <= count * dtype.itemsize * 1.004 + 8


@pytest.mark.parametrize(
    ("plane", "mode"),
    [
        (NOISE[:50_000], 0),
        (np.full(50_000, 9, np.uint8), 1),
        (NOISE[:50_000] & 7 | 8, 2),
        (np.where(NOISE[:50_000] < 5, NOISE[:50_000] + 1, 200).astype(np.uint8), 3),
        (np.append(np.full(49_999, 9, np.uint8), 8).astype(np.uint8), 3),
        (np.repeat(NOISE[:500] | 1, 100), 3),
    ],
    ids=["noise", "one byte", "few", "skewed", "one byte but one, which no sample shows", "runs"],
)
def test_each_plane_gets_the_mode_that_suits_its_bytes(plane: np.ndarray, mode: int) -> None:
    payload = encoded(plane, dtypes.FLOAT8_E5M2)
    assert payload[0] == 0 and payload[1] == mode


def test_planes_follow_one_that_was_compressed() -> None:
    values = np.stack([NOISE[:30_000] & 3, NOISE[30_000:60_000], NOISE[:30_000], NOISE[:30_000]], axis=1)
    payload = encoded(values.reshape(-1), dtypes.FLOAT32)
    assert payload[:2] == b"\0\2" and len(payload) < 30_000 * 3.4
    assert np.array_equal(decoded(payload, dtypes.FLOAT32, 30_000), values.reshape(-1))


def test_zero_blocks_are_left_out_but_not_minus_zeros() -> None:
    values = np.zeros(640, np.float32)
    assert encoded(values, dtypes.FLOAT32) == b"\2"
    values[130] = -0.0
    payload = encoded(values, dtypes.FLOAT32)
    assert payload[:3] == b"\1\4\0"
    assert np.signbit(decoded(payload, dtypes.FLOAT32, 640).view(np.float32)).sum() == 1


def test_encoding_is_pure_and_deterministic() -> None:
    values = WEIGHTS[:5000].copy()
    values.setflags(write=False)
    assert encoded(values, dtypes.FLOAT32) == encoded(values.copy(), dtypes.FLOAT32)


def test_slices_decode_independently_into_place() -> None:
    weights = {"a": WEIGHTS, "b": WEIGHTS[:1000].astype(np.float16), "n": np.arange(10), "zero": np.zeros(3000)}
    stream = b"".join(tensorwire.encode(weights, codec="planes", frame_size=16384))
    into = {name: np.full_like(array, 1) for name, array in weights.items()}
    received = tensorwire.loads(stream, into=into)
    assert all(received[name] is into[name] and np.array_equal(into[name], weights[name]) for name in weights)
    assert len(stream) < 0.86 * sum(array.nbytes for array in weights.values())


@pytest.mark.parametrize("spec", ["planes|zstd", "planes"])
def test_a_damaged_payload_is_refused_or_gives_bytes_but_never_more(spec: str) -> None:
    codec, count = parse(spec), 3000
    extent = Extent.whole(dtypes.FLOAT32, (count,))
    payload = bytes(codec.encode(WEIGHTS[:count], extent, lambda size: np.empty(size, np.uint8)).payload)
    rng, refused = np.random.default_rng(1), 0
    for _ in range(1000):
        damaged = bytearray(payload)
        damaged[int(rng.integers(0, len(damaged)))] ^= 1 << int(rng.integers(0, 8))
        if rng.random() < 0.2:
            damaged = damaged[: int(rng.integers(1, len(damaged)))]
        out = np.full(4 * count + 64, 0xA5, np.uint8)
        try:
            codec.decode(memoryview(damaged), extent, out[32:-32])
        except FormatError:
            refused += 1
        assert (out[:32] == 0xA5).all() and (out[-32:] == 0xA5).all()
    assert refused > 150


def test_a_stage_without_parameters_reads_as_its_name() -> None:
    assert repr(Planes()) == "planes" and CODEC.stages() == ((8,),)
