"""What the streaming layer promises beside the format: bounded memory, overlap that changes nothing, tied targets."""

import threading
import time
import tracemalloc

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import NonFiniteError, SchemaError, WireError
from tensorwire.memory.buffers import Pool
from tensorwire.streams.overlap import Helper, in_order

MIB = 1 << 20
BIG = (np.random.default_rng(2).standard_normal(6 * MIB) * 0.02).astype(np.float32)


def test_results_come_in_order_whoever_does_the_work() -> None:
    def job(number: int) -> tuple[int, str]:
        time.sleep(0.001 * (number % 3))
        return number, threading.current_thread().name

    sizes = [1 << 20 if number % 4 else 10 for number in range(40)]
    results = list(in_order((lambda n=number: job(n), size) for number, size in enumerate(sizes)))
    assert [number for number, _ in results] == list(range(40))
    assert len({name for _, name in results}) == 2


def test_a_helper_that_never_gets_the_core_holds_nobody_up() -> None:
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


def test_errors_of_jobs_reach_the_caller_in_their_turn() -> None:
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
    assert (caught.value.item, caught.value.frame) == ("x", 2) and caught.value.offset


def test_a_tensor_smaller_than_a_block_needs_no_frame_for_a_block() -> None:
    small = {"bias": BIG[:100]}
    data = b"".join(tensorwire.encode(small, codec="int8:blocksize=65536", frame_size=4096))
    assert np.abs(tensorwire.loads(data)["bias"] - small["bias"]).max() < 1e-3


def test_no_thread_to_be_had_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected = tensorwire.dumps({"w": BIG}, codec="nf4")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert tensorwire.dumps({"w": BIG}, codec="nf4") == expected
    assert tensorwire.loads(expected)["w"].shape == BIG.shape
