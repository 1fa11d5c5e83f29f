"""Streams that are handed over as they come, tensors that stay encoded, and the mean of tensors."""

import gc
import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tensorwire
from tensorwire import streams
from tensorwire.errors import (
    ArgumentError,
    ClosedError,
    CorruptError,
    EncodeError,
    FormatError,
    SchemaError,
    TruncatedError,
    WireError,
)
from tensorwire.tensor import ViewFront
from tensorwire.updates import is_finite, mean_of

MIB = 1 << 20
RNG = np.random.default_rng(5)
BIG = (RNG.standard_normal(3 * MIB) * 0.02).astype(np.float32)
STATE = {
    "big": BIG.reshape(3, -1),
    "small": np.arange(5, dtype=np.float16),
    "count": np.array(7),
    "none": np.empty((3, 0), np.float32),
    "flags": np.array([True, False]),
}
STATE["tied"] = STATE["big"]
CODECS = ["raw", "bf16", "nf4", "int8", "nf4:double_quant=true", "bf16|zstd", "planes"]


def portions(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def fed(decoder: tensorwire.Decoder, data: bytes, size: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for portion in portions(data, size):
        given |= dict(decoder.feed(portion))
    decoder.finish()
    return given


def same(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


@pytest.mark.parametrize("size", [4099, MIB, 1 << 30])
@pytest.mark.parametrize("codec", CODECS)
def test_feeding_in_portions_gives_the_same_values(codec: str, size: int) -> None:
    data = tensorwire.dumps(STATE, codec=codec, metadata={"step": "7"})
    whole = tensorwire.loads(data)
    decoder = tensorwire.decoder(expect=STATE)
    got = fed(decoder, data, size)
    assert got.keys() == whole.keys() and all(same(got[name], whole[name]) for name in whole)
    assert got["tied"] is got["big"]
    assert decoder.ended and decoder.metadata == {"step": "7"}


def test_feeding_byte_by_byte_gives_the_same_values() -> None:
    small = {"a": np.arange(100, dtype=np.float32), "step": 3, "words": ["x", None]}
    got = fed(tensorwire.decoder(), tensorwire.dumps(small, codec="int8"), 1)
    assert got["step"] == 3 and got["words"] == ["x", None] and got["a"].size == 100


def test_fed_memory_may_change_and_into_is_filled() -> None:
    target = {"a": np.zeros(1000, np.float32)}
    decoder, buffer = tensorwire.decoder(into=target), bytearray(1000)
    for portion in portions(tensorwire.dumps({"a": BIG[:1000]}), 1000):
        buffer[: len(portion)] = portion
        decoder.feed(memoryview(buffer)[: len(portion)])
        buffer[:] = bytes(1000)
    assert np.array_equal(target["a"], BIG[:1000])


def test_truncated_input_and_trailing_bytes_raise() -> None:
    data = tensorwire.dumps({"a": BIG[:1000]})
    decoder = tensorwire.decoder()
    decoder.feed(data[:-1])
    assert not decoder.ended
    with pytest.raises(TruncatedError):
        decoder.finish()
    with pytest.raises(ClosedError):
        decoder.feed(data[-1:])
    decoder = tensorwire.decoder()
    decoder.feed(data)
    decoder.finish()
    decoder.feed(b"")
    with pytest.raises(FormatError, match="after the end"):
        decoder.feed(b"x")


def test_a_broken_byte_raises_and_ends_the_decoder() -> None:
    data = bytearray(tensorwire.dumps({"a": BIG[:1000], "b": BIG[1000:2000]}))
    data[-200] ^= 1
    decoder = tensorwire.decoder()
    with pytest.raises(WireError) as caught:
        decoder.feed(bytes(data))
    assert caught.value.item == "b"
    with pytest.raises(ClosedError, match="new decoder"):
        decoder.feed(b"")


def test_unexpected_items_are_refused_once_described() -> None:
    data = tensorwire.dumps({"a": BIG})
    with pytest.raises(SchemaError):
        tensorwire.decoder(expect={"a": BIG[:1]}).feed(data[:1000])
    with pytest.raises(SchemaError):
        tensorwire.decoder(expect={"a": BIG, "b": BIG}).feed(data)
    with pytest.raises(SchemaError):
        tensorwire.decoder(expect={"a": BIG, "b": BIG}, keep_encoded=tensorwire.InMemory()).feed(data)
    with pytest.raises(ArgumentError, match="keep_encoded"):
        tensorwire.decoder(into={"a": BIG}, keep_encoded=tensorwire.InMemory())
    with pytest.raises(ArgumentError):
        tensorwire.decoder().feed("text")


@pytest.mark.parametrize("size", [1, 100, 5 * MIB])
def test_gathered_portions_are_the_stream_in_messages_of_at_most_that_size(size: int) -> None:
    value = {"a": BIG if size > 100 else BIG[:500], "b": BIG[:70]}
    buffers = [bytes(buffer) for buffer in tensorwire.encode(value, codec="nf4")]
    messages = list(tensorwire.gather(buffers, size))
    assert b"".join(messages) == b"".join(buffers)
    assert all(type(message) is bytes and 0 < len(message) <= size for message in messages)


def test_gathering_cuts_no_buffer_that_fits() -> None:
    assert list(tensorwire.gather([b"head", b"", b"payload", b"x" * 20, b"end"], 8)) == [
        b"head",
        b"payload",
        b"xxxxxxxx",
        b"xxxxxxxx",
        b"xxxxend",
    ]
    assert list(tensorwire.gather([b"", b""], 8)) == []
    with pytest.raises(ArgumentError):
        next(tensorwire.gather([b"a"], 0))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("store", [tensorwire.InMemory, tensorwire.OnDisk])
def test_kept_encoded_tensors_decode_to_the_same_values(codec: str, store: Any) -> None:
    data = tensorwire.dumps(STATE, codec=codec)
    whole = tensorwire.loads(data)
    kept = fed(tensorwire.decoder(keep_encoded=store()), data, 100_000)
    assert kept.keys() == whole.keys() and kept["tied"] is kept["big"]
    for name, tensor in kept.items():
        assert same(tensor.decode(), whole[name])
        assert tensor.shape == whole[name].shape and tensor.decode() is not tensor.decode()
    big, numbers = kept["big"], whole["big"].ravel()
    for start, stop in [(0, 10), (MIB - 3, MIB + 5), (big.spans()[0][1] - 1, 2 * MIB), (3 * MIB - 1, 3 * MIB)]:
        assert big.read(start, stop).tobytes() == numbers[start:stop].tobytes()
        assert bytes(big.view().read(start, stop)) == numbers[start:stop].tobytes()
        sums = np.ones(stop - start)
        big.accumulate(sums, 0.3, start)
        assert np.array_equal(sums, 1 + 0.3 * numbers[start:stop].astype(np.float64))
    assert sum(count for _, count in big.spans()) == big.decode().size
    with pytest.raises(EncodeError):
        kept["count"].accumulate(np.zeros(1), 1.0)


def test_kept_encoded_takes_the_memory_of_the_wire() -> None:
    messages = list(tensorwire.gather(tensorwire.encode({"a": BIG}, codec="nf4"), MIB))
    gc.collect()
    tracemalloc.start()
    decoder = tensorwire.decoder(keep_encoded=tensorwire.InMemory())
    for index, message in enumerate(messages):
        given = decoder.feed(message)
        messages[index] = b""
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    ((_, tensor),) = given
    assert tensor.nbytes <= 0.15 * BIG.nbytes and "nf4" in repr(tensor)
    assert held < 6 * MIB  # of scratch memory, and next to nothing that is not the messages' own


def test_payloads_lost_on_disk_are_detected() -> None:
    store = tensorwire.OnDisk()
    ((_, tensor),) = tensorwire.decoder(keep_encoded=store).feed(tensorwire.dumps({"a": BIG}, codec="nf4"))
    os.pwrite(store._file.fileno(), b"\xff\xff", 1000)
    with pytest.raises(CorruptError, match="kept on disk"):
        tensor.decode()
    os.ftruncate(store._file.fileno(), 500)
    with pytest.raises(CorruptError, match="kept on disk"):
        tensor.decode()


def test_a_folder_on_disk_is_left_as_it_was(tmp_path: Any) -> None:
    store = tensorwire.OnDisk(str(tmp_path))
    tensorwire.decoder(keep_encoded=store).feed(tensorwire.dumps({"a": BIG}, codec="nf4"))
    assert list(tmp_path.iterdir()) == []


def test_the_mean_of_tensors_is_calculated_in_float64_and_rounded_once() -> None:
    inputs = [(RNG.standard_normal((700, 300)) * 3).astype(np.float32) for _ in range(3)]
    weights = [1.0, 10.0, 0.1]
    sums = np.zeros((700, 300))
    for each, weight in zip(inputs, weights, strict=True):
        sums += weight * each.astype(np.float64)
    assert same(mean_of(inputs, weights), (sums / 11.1).astype(np.float32))


def test_encoded_tensors_of_different_codecs_and_slices_are_added_up() -> None:
    datas = [
        b"".join(tensorwire.encode({"a": BIG}, codec=codec, frame_size=size))
        for codec, size in [("nf4", MIB), ("bf16", 1 << 16), ("raw", 300_000), ("planes", MIB)]
    ]
    decoded = [tensorwire.loads(data)["a"] for data in datas]
    stores = [tensorwire.InMemory(), tensorwire.OnDisk(), tensorwire.InMemory(), tensorwire.InMemory()]
    encoded = [
        fed(tensorwire.decoder(keep_encoded=store), data, MIB)["a"] for store, data in zip(stores, datas, strict=True)
    ]
    weights = [3, 1, 2, 5]
    expected = mean_of(decoded, weights)
    assert same(mean_of(encoded, weights), expected)
    assert same(mean_of([encoded[0], *decoded[1:]], weights), expected)
    assert same(mean_of([*decoded[:3], encoded[3]], weights), expected)


def test_the_mean_of_integers_bools_and_complex_numbers() -> None:
    most = np.iinfo(np.int64).max
    mean = mean_of([np.array([3, most, most, -5]), np.array([4, most, most - 1, -5])], [1, 2])
    assert mean.tolist()[:2] == [4, most] and mean[2] in (most - 1, most) and mean[3] == -5 and mean.dtype == np.int64
    unsigned = mean_of([np.array([0, 255], np.uint8), np.array([255, 0], np.uint8)], [1, 3])
    assert unsigned.tolist() == [191, 64] and unsigned.dtype == np.uint8
    assert mean_of([np.array([True, True, False]), np.array([False, True, True])], [2, 1]).tolist() == [
        True,
        True,
        False,
    ]
    assert mean_of([np.array(1 + 2j), np.array(3 - 2j)], [1, 1]) == 2
    assert mean_of([np.empty((0, 3), np.float16)] * 2, [1, 1]).shape == (0, 3)


def test_tensors_without_a_mean_are_refused() -> None:
    with pytest.raises(SchemaError, match="cannot be averaged"):
        mean_of([np.zeros(2), np.zeros(3)], [1, 1])
    with pytest.raises(SchemaError, match="cannot be averaged"):
        mean_of([np.zeros(2, np.float32), np.zeros(2)], [1, 1])
    with pytest.raises(ValueError, match="weight"):
        mean_of([np.zeros(2)], [0])
    with pytest.raises(ValueError, match="weight"):
        mean_of([np.zeros(2)], [float("nan")])
    with pytest.raises(ValueError, match="as many"):
        mean_of([np.zeros(2)], [1, 2])
    with pytest.raises(ValueError, match="as many"):
        mean_of([], [])


def test_the_mean_of_torch_tensors_is_one() -> None:
    torch = pytest.importorskip("torch")
    one, two = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([2.0, 5.0], dtype=torch.bfloat16)
    mean = mean_of([one, two], [1, 1])
    assert mean.dtype == torch.bfloat16 and mean.tolist() == [1.5, 4.0] and one.tolist() == [1.0, 3.0]
    scale = torch.tensor([127, 128], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert mean_of([scale, scale], [1, 2]).view(torch.uint8).tolist() == [127, 128]
    with pytest.raises(SchemaError, match="no mean"):
        mean_of([scale, scale.view(torch.uint8).flip(0).view(torch.float8_e8m0fnu)], [1, 2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_single_nan_is_found(bad: float) -> None:
    for dtype in (np.float16, np.float32, np.float64, np.complex64):
        values = np.full(300_000, np.finfo(dtype).max, dtype)  # whose sum is beyond its dtype, and finite all the same
        assert is_finite(values)
        values[270_000] = bad
        assert not is_finite(values)
    assert is_finite(np.array([1, 2])) and is_finite(np.empty(0))
    broken = BIG.copy()
    broken[-1] = bad
    ((_, tensor),) = tensorwire.decoder(keep_encoded=tensorwire.InMemory()).feed(
        tensorwire.dumps({"a": broken}, codec="bf16")
    )
    assert not is_finite(tensor)


def test_payloads_on_disk_are_read_by_several_threads_at_once() -> None:
    """As an encoder does, which reads the next slice while the last one is sent."""
    values = np.arange(4 << 20, dtype=np.float32)
    decoder = tensorwire.decoder(keep_encoded=tensorwire.OnDisk())
    ((_, tensor),) = decoder.feed(tensorwire.dumps({"w": values}, codec="planes"))

    def read(start: int) -> bool:
        parts = range(start, values.size - 100_000, 300_007)
        return all(
            np.array_equal(tensor.read(at, at + 100_000).view(np.float32), values[at : at + 100_000]) for at in parts
        )

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(read, range(0, 80_000, 10_000)))
    again = tensorwire.numpy.loads(b"".join(streams.encode({"w": tensor.view()}, ViewFront(), codec="planes")))
    assert np.array_equal(again["w"], values)
