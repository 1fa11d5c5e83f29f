"""The proxy that the tests of transports rely on does to the bytes what it says, and leaves nothing behind."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from leaks import left_open, open_files
from network import PATIENCE
from proxy import (
    Cut,
    Delay,
    Drop,
    Duplicate,
    Fault,
    Flip,
    HalfClose,
    Proxy,
    Reorder,
    Reset,
    Stall,
    Throttle,
    Trickle,
)

DATA = bytes(range(256)) * 40
PLACES = [0, 1, 100, len(DATA) - 1, len(DATA)]
RANGES = [(0, 1), (0, 300), (5, 1000), (len(DATA) - 7, 7), (100, 0)]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    threads, files = {*threading.enumerate()}, open_files()
    yield
    assert {*threading.enumerate()} <= threads
    assert not left_open(files)


@contextmanager
def connected(
    up: Fault | None = None, down: Fault | None = None
) -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A proxy, and the client's and the server's end of a connection through it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy(listener.getsockname()[1], up=up, down=down) as proxy,
    ):
        client = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
        listener.settimeout(PATIENCE)
        server, _ = listener.accept()
        server.settimeout(PATIENCE)
        with client, server:
            yield proxy, client, server


def read(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def pushed(peer: socket.socket, data: bytes = DATA) -> None:
    peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)


def came_through(fault: Fault) -> bytes:
    with connected(up=fault) as (_, client, server):
        pushed(client)
        return read(server)


def test_an_honest_way_both_ways() -> None:
    with connected() as (proxy, client, server):
        pushed(client)
        assert read(server) == DATA
        pushed(server, DATA[:99])  # after the other way was closed
        assert read(client) == DATA[:99]
    assert proxy.connections == 1
    assert proxy.received == proxy.sent == {"up": len(DATA), "down": 99}


@pytest.mark.parametrize("at", PLACES[:-1])
def test_flip(at: int) -> None:
    got = came_through(Flip(at, 0x81))
    assert [(n, a ^ b) for n, (a, b) in enumerate(zip(DATA, got, strict=False)) if a != b] == [(at, 0x81)]
    assert len(got) == len(DATA)


@pytest.mark.parametrize(("at", "length"), RANGES)
def test_drop_duplicate_reorder(at: int, length: int) -> None:
    before, inside, after = DATA[:at], DATA[at : at + length], DATA[at + length :]
    assert came_through(Drop(at, length)) == before + after
    assert came_through(Duplicate(at, length)) == before + inside + inside + after
    # What is still held back at the end comes then.
    assert came_through(Reorder(at, length, 50)) == before + after[:50] + inside + after[50:]


def test_faults_on_the_way_back() -> None:
    with connected(down=Drop(0, 10)) as (proxy, client, server):
        pushed(client)
        pushed(server)
        assert (read(server), read(client)) == (DATA, DATA[10:])
    assert proxy.received["down"] == len(DATA) == proxy.sent["down"] + 10


@pytest.mark.parametrize("at", PLACES)
def test_cut_ends_both_ways_in_order(at: int) -> None:
    with connected(up=Cut(at)) as (proxy, client, server):
        client.sendall(DATA)
        assert read(server) == DATA[:at]
        assert read(client) == b""
    assert proxy.sent["up"] == at


@pytest.mark.parametrize("at", PLACES)
def test_half_close_leaves_the_way_back_open(at: int) -> None:
    with connected(up=HalfClose(at)) as (_, client, server):
        client.sendall(DATA)
        assert read(server) == DATA[:at]
        server.sendall(b"still here")
        assert client.recv(100) == b"still here"


@pytest.mark.parametrize("at", PLACES[1:])
def test_reset(at: int) -> None:
    with connected(up=Reset(at)) as (proxy, client, server):
        client.sendall(DATA)
        for peer in (client, server):
            with pytest.raises(ConnectionResetError):
                read(peer)
    assert proxy.sent["up"] == at


def test_a_reset_by_a_peer_is_passed_on() -> None:
    with connected() as (_, client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(ConnectionResetError):
            read(server)


@pytest.mark.parametrize("at", PLACES)
def test_stall_stops_one_way_and_fills_the_window(at: int) -> None:
    with connected(up=Stall(at)) as (proxy, client, server):
        client.sendall(DATA)
        got = b""
        while len(got) < at:
            got += server.recv(1 << 16)
        assert got == DATA[:at]
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.sendall(b"the way back works")
        assert client.recv(100) == b"the way back works"
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
    assert proxy.sent["up"] == at


def test_a_receiver_that_does_not_read_holds_the_sender_up() -> None:
    with connected() as (_, client, _server):
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))


def seconds(fault: Fault, size: int) -> float:
    with connected(up=fault) as (_, client, server):
        start = time.perf_counter()
        pushed(client, bytes(size))
        assert read(server) == bytes(size)
        return time.perf_counter() - start


def test_paces() -> None:
    """A pace holds up by what it says, and by no more: that is told by ratios, which a busy machine leaves alone."""
    one, many = seconds(Delay(0.2), 1 << 10), seconds(Delay(0.2), 2 << 20)
    assert one >= 0.2 and 0.2 <= many < 16 * one  # later, not slower: in turns, 64 chunks would take 64 times as long
    fast, slow = seconds(Throttle(1 << 20), 256 << 10), seconds(Throttle(1 << 18), 256 << 10)
    assert 0.2 <= fast < slow and slow >= 0.8
    few, more = seconds(Trickle(0.01, at=50_000), 50_020), seconds(Trickle(0.01, at=50_000), 50_100)
    assert 0.2 <= few < more and more >= 0.8


def test_only_the_first_connections_are_faulty() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Proxy(listener.getsockname()[1], up=Cut(3), faulty=1) as proxy:
            for expected in (DATA[:3], DATA, DATA):
                with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as client:
                    server, _ = listener.accept()
                    with server:
                        pushed(client)
                        assert read(server) == expected
        assert proxy.connections == 3


def test_a_reset_at_once_and_a_server_that_is_not_there_look_the_same() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Proxy(port, up=Reset(0)) as proxy, pytest.raises(ConnectionResetError):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as client:
                client.recv(1)
        listener.accept()[0].close()
    with Proxy(port) as proxy, pytest.raises(ConnectionResetError):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as client:
            client.recv(1)


def test_a_proxy_before_a_proxy_has_both_faults() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1], up=Flip(0)) as inner:
        with Proxy(inner.port, up=Drop(0, 2)) as outer, socket.create_connection(("127.0.0.1", outer.port)) as client:
            server, _ = listener.accept()
            with server:
                pushed(client)
                assert read(server) == bytes([DATA[2] ^ 1]) + DATA[3:]


def test_a_hundred_connections_that_nobody_closes_end_with_the_proxy() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        with Proxy(listener.getsockname()[1], up=Stall(0), down=Trickle(60)) as proxy:
            clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(100)]
            servers = [listener.accept()[0] for _ in clients]
        [peer.close() for peer in clients + servers]
    assert proxy.connections == 100
