"""What the streaming layer promises beside the format: bounded memory, overlap that changes nothing, tied targets."""

import asyncio
import gc
import io
import threading
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorwire
from tensorwire import dtypes
from tensorwire.errors import EncodeError, NonFiniteError, SchemaError, WireError
from tensorwire.limits import DEFAULT
from tensorwire.memory import FixedMemory, Pool
from tensorwire.numpy import FRONT
from tensorwire.streams import (
    FRAME_SIZE,
    Completed,
    ItemStart,
    Payload,
    Piece,
    Pieces,
    Receiver,
    Sender,
    decode,
    flatten,
    rule,
)
from tensorwire.streams.overlap import Helper, in_order
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.wire import StreamEnd, StreamInfo, StreamStart

MIB = 1 << 20
BIG = (np.random.default_rng(2).standard_normal(6 * MIB) * 0.02).astype(np.float32)


def test_results_come_in_order_in_any_thread() -> None:
    def job(number: int) -> tuple[int, str]:
        time.sleep(0.001 * (number % 3))
        return number, threading.current_thread().name

    sizes = [1 << 20 if number % 4 else 10 for number in range(40)]
    results = list(in_order((lambda n=number: job(n), size) for number, size in enumerate(sizes)))
    assert [number for number, _ in results] == list(range(40))
    assert len({name for _, name in results}) == 2


def test_a_starved_helper_blocks_nobody() -> None:
    helper = Helper()
    gate = threading.Event()
    helper.submit(gate.wait, 1 << 20)  # the helper's thread is busy with this
    held = np.empty(1)
    helper.submit(lambda held=held: held.sum(), 1 << 20)
    helper._jobs.rotate(-1)
    assert helper.take() == held.sum()  # so the caller does it
    gate.set()
    helper.drain()
    helper.close()


def test_errors_of_jobs_are_raised_in_order() -> None:
    def fail() -> None:
        raise NonFiniteError("x", index=3)

    results = in_order([(lambda: 1, 1 << 20), (fail, 1 << 20), (lambda: 2, 1 << 20)])
    assert next(results) == 1
    with pytest.raises(NonFiniteError):
        next(results)


def test_no_thread_outlives_its_stream() -> None:
    before = threading.active_count()
    stream = tensorwire.encode({"w": BIG}, codec="nf4")
    next(stream), next(stream)
    stream.close()
    data = tensorwire.dumps({"w": BIG}, codec="nf4")
    decoder = tensorwire.decode(data)
    next(decoder)
    decoder.close()
    with pytest.raises(WireError):
        list(tensorwire.decode(data[:-200]))
    assert threading.active_count() == before


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "nf4", "nf4:double_quant=true", "nf4|zstd"])
def test_encoding_takes_the_memory_of_frames_not_of_tensors(codec: str) -> None:
    tracemalloc.start()
    for _ in tensorwire.encode({"w": BIG}, codec=codec):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB  # of 24


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "nf4", "nf4:double_quant=true", "nf4|zstd"])
def test_decoding_in_place_takes_the_memory_of_frames_not_of_tensors(codec: str) -> None:
    data = tensorwire.dumps({"w": BIG}, codec=codec)
    out = {"w": np.empty_like(BIG)}
    tracemalloc.start()
    for _ in tensorwire.decode(data, into=out):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_a_pooled_buffer_is_used_again_only_when_nobody_holds_it() -> None:
    pool = Pool()
    first = pool.take(1000)
    view = memoryview(first)
    second = pool.take(1000)
    assert first.ctypes.data != second.ctypes.data
    address = first.ctypes.data
    del first
    assert pool.take(1000).ctypes.data not in (address, second.ctypes.data)
    view.release()
    assert pool.take(900).ctypes.data == address


def test_buffers_that_a_consumer_keeps_keep_their_content() -> None:
    kept = list(tensorwire.encode({"w": BIG}, codec="nf4"))
    assert b"".join(kept) == tensorwire.dumps({"w": BIG}, codec="nf4")


def test_tied_tensors_fill_both_of_their_targets() -> None:
    value = {"embed": BIG[:1000], "other": np.arange(3), "head": BIG[:1000]}
    into = {name: np.zeros_like(tensor) for name, tensor in value.items()}
    for name, tensor in tensorwire.decode(tensorwire.dumps(value), into=into):
        assert tensor is into[name] and np.array_equal(tensor, value[name])


def test_a_target_that_the_stream_does_not_carry_is_an_error() -> None:
    with pytest.raises(SchemaError, match="not written.*item 'missing'"):
        tensorwire.loads(tensorwire.dumps({"a": np.ones(2)}), into={"missing": np.zeros(2)})


def test_errors_in_payloads_name_item_frame_and_offset() -> None:
    data = bytearray(tensorwire.dumps({"x": np.ones(3)}))
    with pytest.raises(WireError) as caught:
        tensorwire.loads(data, expect={"x": np.ones(4)})
    assert (caught.value.item, caught.value.frame) == ("x", 1) and caught.value.offset


def test_a_tensor_smaller_than_a_block_needs_no_frame_for_a_block() -> None:
    small = {"bias": BIG[:100]}
    data = b"".join(tensorwire.encode(small, codec="int8:blocksize=65536", frame_size=4096))
    assert np.abs(tensorwire.loads(data)["bias"] - small["bias"]).max() < 1e-3


def test_works_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected = tensorwire.dumps({"w": BIG}, codec="nf4")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert tensorwire.dumps({"w": BIG}, codec="nf4") == expected
    assert tensorwire.loads(expected)["w"].shape == BIG.shape


# The receiver, pulled


def kept(event: Any) -> Any:
    """An event whose data outlives the next one."""
    return event._replace(data=event.data.copy()) if isinstance(event, Piece) else event


def test_a_receiver_yields_pieces_in_order_and_completions() -> None:
    data = tensorwire.dumps({"a": BIG, "b": 7, "c": BIG, "e": np.ones((0, 3))}, codec="nf4", metadata={"k": "v"})
    events = [kept(event) for event in Receiver(DEFAULT).events(iter([data]))]
    assert isinstance(events[0], StreamStart) and dict(events[0].info.metadata) == {"k": "v"}
    assert isinstance(events[-1], StreamEnd)
    completed = [event for event in events if isinstance(event, Completed)]
    assert [(event.item.name, [alias.name for alias in event.aliases]) for event in completed] == [
        ("e", []),
        ("a", ["c"]),
        ("b", []),
    ]
    assert completed[-1].value == 7
    pieces = [event for event in events if isinstance(event, Piece)]
    joined = np.concatenate([piece.data for piece in pieces]).view(np.float32)
    assert np.array_equal(joined, tensorwire.loads(data)["a"])
    assert [piece.start for piece in pieces] == list(np.cumsum([0, *(piece.data.size // 4 for piece in pieces)])[:-1])


@pytest.mark.parametrize("codec", ["raw", "bf16"])
def test_an_item_is_received_into_the_given_memory(codec: str) -> None:
    data = tensorwire.dumps({"a": BIG}, codec=codec)
    memory = np.zeros(BIG.nbytes, np.uint8)
    with Receiver(DEFAULT) as receiver:
        for event in receiver.events(iter([data])):
            if isinstance(event, ItemStart) and event.item.path:
                receiver.land(event.number, FixedMemory(memory))
            elif isinstance(event, Piece):
                assert np.shares_memory(event.data, memory)
    assert np.array_equal(memory.view(np.float32), tensorwire.loads(data)["a"])


def test_payloads_can_stay_encoded() -> None:
    data = tensorwire.dumps({"a": BIG, "b": BIG + 1}, codec="int8")
    payloads: dict[str, bytes] = {"a": b"", "b": b""}
    with Receiver(DEFAULT) as receiver:
        for event in receiver.events(data):
            if isinstance(event, ItemStart) and event.item.path:
                receiver.keep_encoded(event.number)
            elif isinstance(event, Payload):
                assert event.data.nbytes == tensorwire.codec("int8").sizes(event.count, dtypes.FLOAT32).total
                payloads[event.item.name] += event.data
            assert not isinstance(event, Piece)
    assert all(payload in data or len(payload) > MIB for payload in payloads.values())
    assert sum(map(len, payloads.values())) > BIG.size * 2


def test_errors_of_a_consumer_are_located() -> None:
    data = tensorwire.dumps({"first": np.ones(3), "second": np.ones(3)})

    def consume(refused: str) -> None:
        with Receiver(DEFAULT) as receiver:
            for event in receiver.events(data):
                if isinstance(event, Completed) and event.item.name == refused:
                    raise SchemaError("not this one")
            raise SchemaError("of the whole")

    with pytest.raises(SchemaError) as caught:
        consume("second")
    assert (caught.value.item, caught.value.frame) == ("second", 3) and caught.value.offset
    with pytest.raises(SchemaError) as caught:
        consume("none")
    assert (caught.value.item, caught.value.frame) == (None, None)


def test_errors_in_a_part_of_a_large_slice_are_located(tmp_path: Path) -> None:
    tensorwire.save_file({"a": BIG}, tmp_path / "x.tw")  # in one frame

    def consume() -> None:
        with open(tmp_path / "x.tw", "rb") as file, Receiver(DEFAULT) as receiver:
            for event in receiver.events(file):
                if isinstance(event, Piece):
                    raise SchemaError("not this one")

    with pytest.raises(SchemaError, match="item 'a', frame 2"):
        consume()


@pytest.mark.parametrize("end", ["whole", "broken", "left"])
def test_a_consumer_and_its_receiver_are_gone_when_the_stream_ends(end: str) -> None:
    """Nothing refers back: no cycle keeps what was received for the garbage collector."""
    data = tensorwire.dumps({"a": BIG, "b": BIG + 1}, codec="bf16")
    gc.collect()
    gc.disable()
    try:
        receiver = Receiver(DEFAULT)
        gone = weakref.ref(receiver)
        with pytest.raises(WireError) if end == "broken" else receiver:
            for event in receiver.events(iter([data[:-200] if end == "broken" else data])):
                if end == "left" and isinstance(event, Piece):
                    break
        del receiver, event
        assert gone() is None
    finally:
        gc.enable()


# A producer that takes its time


def layers(asked: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(5):
        asked.append(number)
        yield f"layer{number}", BIG[: MIB + number]


async def layers_async(asked: list[int]) -> AsyncIterator[tuple[str, np.ndarray]]:
    for name, layer in layers(asked):
        yield name, layer


@pytest.mark.parametrize("codec", ["raw", "bf16", "nf4", "nf4|zstd"])
def test_a_layer_is_delivered_before_the_next_one_is_made(codec: str) -> None:
    asked: list[int] = []
    received = 0
    for name, _ in tensorwire.decode(tensorwire.encode(layers(asked), codec=codec)):
        assert (name, asked[-1]) == (f"layer{received}", received)
        received += 1
    assert received == 5


def test_an_empty_buffer_precedes_every_wait() -> None:
    asked: list[int] = []
    flushed = [asked[-1] if asked else None for buffer in tensorwire.encode(layers(asked)) if len(buffer) == 0]
    assert flushed == [None, 0, 1, 2, 3, 4]
    assert all(len(buffer) for buffer in tensorwire.encode({"a": BIG, "b": np.ones(0), "c": {}}))


@pytest.mark.parametrize("codec", ["raw", "nf4"])
def test_asynchronous_layers_are_delivered_one_by_one(codec: str) -> None:
    async def main() -> int:
        asked: list[int] = []
        received = 0
        async for name, _ in tensorwire.decode_async(tensorwire.encode_async(layers_async(asked), codec=codec)):
            assert (name, asked[-1]) == (f"layer{received}", received)
            received += 1
        return received

    assert asyncio.run(main()) == 5


async def joined(buffers: AsyncIterator[Any]) -> bytes:
    return b"".join([bytes(buffer) async for buffer in buffers])


def test_encoding_under_asyncio_gives_the_same_bytes() -> None:
    value = {"a": BIG, "b": [1, {"c": BIG[:7]}], "small": [np.ones(3) for _ in range(300)]}
    for codec in ("raw", "nf4|zstd"):
        expected = tensorwire.dumps(value, codec=codec, metadata={"k": "v"})
        assert asyncio.run(joined(tensorwire.encode_async(value, codec=codec, metadata={"k": "v"}))) == expected
    pairs = b"".join(tensorwire.encode(iter([("a", BIG), ("b", {"c": 3})])))
    assert asyncio.run(joined(tensorwire.encode_async(iter([("a", BIG), ("b", {"c": 3})])))) == pairs


def test_encoding_under_asyncio_works_in_other_threads_and_leaves_none() -> None:
    before = threading.active_count()
    threads: set[str] = set()

    def codec(name: str, value: Any) -> str:
        threads.add(threading.current_thread().name)
        return "nf4"

    async def main(value: Any, count: int) -> None:
        buffers = tensorwire.encode_async(value, codec=codec)
        for _ in range(count):
            await anext(buffers)
        await buffers.aclose()  # type: ignore[attr-defined]

    for value in ({"a": BIG}, iter([("a", BIG)])):
        asyncio.run(main(value, 4))
    assert threads and threading.main_thread().name not in threads
    assert threading.active_count() == before


def test_encoding_under_asyncio_raises_what_encoding_raises() -> None:
    for value, error in (({"a": object()}, EncodeError), ({"a": np.full(9, np.nan, np.float32)}, NonFiniteError)):
        with pytest.raises(error, match="item 'a'"):
            asyncio.run(joined(tensorwire.encode_async(value, codec="nf4")))


def test_decode_async_takes_any_source() -> None:
    data = tensorwire.dumps({"a": BIG, "b": [1, np.ones(3)]}, codec="nf4")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    async def received(source: Any) -> dict[str, Any]:
        return {name: value async for name, value in tensorwire.decode_async(source)}

    expected = dict(tensorwire.decode(data))
    for source in (data, bytearray(data), [data[:99], b"", data[99:]], io.BytesIO(data), chunks()):
        got = asyncio.run(received(source))
        assert list(got) == list(expected)
        assert all(np.array_equal(got[name], expected[name]) for name in got)


# How large a stream is

TREE = {
    "w": BIG[: 2 * MIB + 3],
    "tied": BIG[: 2 * MIB + 3],
    "strided": BIG[:70_000].reshape(-1, 7)[:, 2],
    "half": BIG[:1000].astype(np.float16),
    "ints": np.arange(300_000),
    "empty": np.ones((0, 5), np.float32),
    "scalar": np.float32(3),
    "nested": [1, ("text", {"x": BIG[:5], 7: None}), {}],
    "long": "a" * (3 * MIB),
}
FIXED = ["raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "int8:blocksize=64"]


@pytest.mark.parametrize("codec", [*FIXED, "raw|zstd", "nf4|zstd"])
@pytest.mark.parametrize(
    "value", [TREE, BIG[:9], 3, [], {"n": {"a": BIG, "b": BIG}}], ids=["tree", "tensor", "value", "list", "nested"]
)
def test_the_size_of_a_stream_is_known_without_encoding_it(codec: str, value: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"codec": codec, "metadata": {"key": "text"}}
    for extra in ({}, {"frame_size": 20_000, "stream_id": b"round 7"}, {"tie": False}):
        size = tensorwire.encoded_size(value, **options, **extra)
        real = sum(map(len, map(bytes, tensorwire.encode(value, **options, **extra))))
        assert real <= size if "zstd" in codec else real == size
    size, real = tensorwire.encoded_size(value, at_rest=True, **options), 0
    real = tensorwire.save_file(value, tmp_path / "x.tw", **options)
    assert real <= size if "zstd" in codec else real == size


def test_the_size_of_an_iterator_is_unknown() -> None:
    with pytest.raises(EncodeError, match="iterator"):
        tensorwire.encoded_size(layers([]))


def test_views_are_sent_and_never_received() -> None:
    front = ViewFront()
    view = TensorView(dtypes.FLOAT32, (3,), lambda start, stop: np.ones(stop - start, np.float32).tobytes())
    assert front.view(view) is view and front.view(3) is None and front.device_target(view) is None
    for receive in (lambda: front.wrap(np.zeros(4, np.uint8), dtypes.FLOAT32, (1,)), lambda: front.target(view)):
        with pytest.raises(EncodeError, match="sent only"):
            receive()


# Against a version


def test_a_stream_against_a_version_is_refused_unless_that_version_is_named(tmp_path: Path) -> None:
    base, other = b"b" * 32, b"o" * 32
    leaves = list(flatten({"a": BIG[:9]}, FRONT, rule("raw"), DEFAULT))
    data = b"".join(Sender(StreamInfo(base=base), FRAME_SIZE, DEFAULT).container(leaves))
    assert np.array_equal(tensorwire.loads(data, base=base)["a"], BIG[:9])
    assert [name for name, _ in tensorwire.decode(data, base=base)] == ["a"]
    assert len(list(Pieces(data, lambda item: None, base=base))) == 1
    path = tmp_path / "x.tw"
    path.write_bytes(data)
    assert np.array_equal(tensorwire.load_file(path, base=base)["a"], BIG[:9])

    async def received(**options: Any) -> list[str]:
        return [name async for name, _ in tensorwire.decode_async(data, **options)]

    assert asyncio.run(received(base=base)) == ["a"]
    for options in ({}, {"base": other}):
        for read in (
            lambda options: tensorwire.loads(data, **options),
            lambda options: list(tensorwire.decode(data, **options)),
            lambda options: list(Pieces(data, lambda item: None, **options)),
            lambda options: tensorwire.load_file(path, **options),
            lambda options: asyncio.run(received(**options)),
        ):
            with pytest.raises(SchemaError, match=f"against version {base.hex()}"):
                read(options)
    assert tensorwire.loads(tensorwire.dumps({"a": 1}), base=base) == {"a": 1}


@pytest.mark.parametrize("codec", ["raw", "raw|zstd"])
def test_pieces_are_copied_to_devices_without_a_decoder(codec: str) -> None:
    """With tensors on the CPU in the place of a device."""
    torch = pytest.importorskip("torch")

    class Front(tensorwire.torch.TorchFront):
        def device_target(self, value: object) -> Any:
            assert isinstance(value, torch.Tensor)
            return value.reshape(-1)

        def target(self, value: object) -> memoryview:
            raise AssertionError("it is on a device")

    value = {"a": BIG.reshape(4, -1), "tied": BIG.reshape(4, -1)}
    into = {name: torch.zeros(tensor.shape) for name, tensor in value.items()}
    for name, tensor in decode(tensorwire.dumps(value, codec=codec), Front(), into=into):
        assert tensor is into[name] and np.array_equal(tensor.numpy(), value[name])


def test_fixed_memory_is_addressed_by_bytes_whatever_its_elements() -> None:
    memory = FixedMemory(BIG[:100], 4)
    assert memory.stable and memory.uncached is None
    assert np.array_equal(memory.region(40, 80), BIG[10:20])
    assert FixedMemory(BIG.view(np.uint8)).uncached
