"""A transfer through a network that does its worst: it ends, well or with a typed error, and leaves nothing behind.

CI tries a spread of positions; TENSORWIRE_FAULTS=200 tries so many for each fault and direction, and, on a machine that
has nothing else to do, judges how long each call takes.
"""

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_loop import MIB, MOST_AGAIN, run
from network import Server, nothing_left
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

import tensorwire
from tensorwire.errors import StorageError, TensorwireError
from tensorwire.transfer import Offer, Receipt, Recording, RefusedError, Regenerated, greet, receive_stream
from tensorwire.transports import AsyncTransport, TcpTransport, send_resuming
from tensorwire.transports.aio_protocol import ProtocolWire
from tensorwire.transports.blocking import SocketWire

POSITIONS = int(os.environ.get("TENSORWIRE_FAULTS", "6"))
JUDGES_TIME = "TENSORWIRE_FAULTS" in os.environ
IDLE = 0.3
SLACK = 5.0  # seconds beyond the idle time-out within which every call ends
AT_ONCE = 8

MODEL = {"a": np.random.default_rng(7).standard_normal(20_000, np.float32), "b": np.ones(100, np.float32)}
STREAM = b"".join(tensorwire.encode(MODEL, frame_size=4096))
# Greeting, offer and goodbye up; greeting, position and receipt down.
LENGTHS = {"up": len(STREAM) + 250, "down": 280}

FAULTS: dict[str, Callable[[int], Fault]] = {
    "delay": lambda at: Delay(0.001 * (at % 40)),
    "throttle": lambda at: Throttle(200_000 + at * 10),
    "cut": Cut,
    "reset": Reset,
    "half-close": HalfClose,
    "flip": lambda at: Flip(at, 1 << at % 8),
    "duplicate": lambda at: Duplicate(at, 1 + at % 100),
    "reorder": lambda at: Reorder(at, 1 + at % 50, 1 + at % 70),
    "drop": lambda at: Drop(at, 1 + at % 100),
    "stall": Stall,
    "trickle": lambda at: Trickle(0.05, at),
}


def transfer(folder: Path, server: Server, name: str, **faults: Any) -> Receipt | TensorwireError:
    """One stream through a proxy whose first connection is faulty. What came of it."""
    outgoing = Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096))
    with Proxy(server.port, faulty=1, **faults) as proxy:
        began = time.monotonic()
        try:
            return send_resuming(
                lambda: TcpTransport.connect("127.0.0.1", proxy.port, timeout=IDLE),
                Offer(name.encode(), name),
                outgoing,
                patience=2.0,
            )
        except TensorwireError as error:
            return error
        finally:
            took = time.monotonic() - began
            # One faulty attempt and one good one; a slow fault takes as long as it does, with progress.
            assert not JUDGES_TIME or took < 2 * (IDLE + SLACK), f"took {took:.1f} s"


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_at_every_place(fault: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorwire.transports.pace._WINDOW", IDLE)
    outcomes: Counter[str] = Counter()

    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet(), within=2)
        await transport.run(receive_stream(lambda offer: Recording(tmp_path / offer.name, offer.transfer)))

    length = LENGTHS[way]
    places = sorted({length * number // POSITIONS for number in range(POSITIONS)})
    with nothing_left(), Server(serve, timeout=IDLE) as server:

        def attempt(at: int) -> None:
            name = f"{at}"
            result = transfer(tmp_path, server, name, **{way: FAULTS[fault](at)})
            path = tmp_path / name
            if isinstance(result, Receipt):
                assert path.read_bytes() == STREAM and result.digest == STREAM[-32:].hex()
                outcomes["arrived"] += 1
            else:
                assert not path.exists() or path.read_bytes() == STREAM
                outcomes[type(result).__name__] += 1
            # Nobody holds the place: a last attempt, without faults, always comes through.
            if not isinstance(result, Receipt):
                receipt = send_resuming(
                    lambda: TcpTransport.connect("127.0.0.1", server.port),
                    Offer(name.encode(), name),
                    Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096)),
                )
                assert receipt.digest == STREAM[-32:].hex() and path.read_bytes() == STREAM

        with ThreadPoolExecutor(AT_ONCE) as executor:
            list(executor.map(attempt, places))
        assert all(isinstance(error, TensorwireError) for error in server.errors)
    print(f"\n{fault} {way}: {dict(outcomes)}")
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("side", ["send", "receive"])
def test_kill_9_on_either_side(side: str, tmp_path: Path) -> None:
    """The loop of tests/kill_loop.py, small."""
    result = run(side, 5, 24 * MIB, tmp_path, rate=30 * MIB)
    assert result.kills == 5
    assert max(result.again) <= MOST_AGAIN


def test_a_full_disk_in_mid_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as "storage", which the sender takes for a reason to come again, and gone on with once there is room."""
    from tensorwire.storage import output

    room = [40_000]

    class FullOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            if offset + len(data) > room[0]:
                if offset < room[0]:
                    return os.pwrite(fd, data[: room[0] - offset], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.pwrite(fd, data, offset)

    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet(), within=2)
        await transport.run(receive_stream(lambda offer: Recording(tmp_path / "m", offer.transfer)))

    def send(patience: float) -> Receipt:
        return send_resuming(
            lambda: TcpTransport.connect("127.0.0.1", server.port),
            Offer(b"t"),
            Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096)),
            patience=patience,
        )

    with nothing_left(), Server(serve) as server:
        with monkeypatch.context() as patch:
            patch.setattr(output, "os", FullOs())
            with pytest.raises(RefusedError, match="(?i)no space") as caught:
                send(0.3)
            assert (caught.value.kind, caught.value.retryable) == ("storage", True)
            assert all(isinstance(error, StorageError) and error.errno == errno.ENOSPC for error in server.errors)
            assert not (tmp_path / "m").exists()
            threading.Timer(0.5, lambda: room.__setitem__(0, 1 << 30)).start()
            receipt = send(10)
        assert 0 < receipt.sent < len(STREAM) - 30_000
        assert (tmp_path / "m").read_bytes() == STREAM


@pytest.mark.parametrize("number", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("call", ["recv_into", "sendmsg"])
def test_the_nth_call_of_the_sender_s_socket_fails(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [number]

    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet(), within=2)
        await transport.run(receive_stream(lambda offer: Recording(tmp_path / "m", offer.transfer)))

    name = {"recv_into": "read", "sendmsg": "write"}[call]
    real = getattr(SocketWire, name)

    async def failing(self: SocketWire, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            self._socket.close()  # what follows is EBADF from the system itself
        return await real(self, *arguments)

    with nothing_left(), Server(serve) as server:
        monkeypatch.setattr(SocketWire, name, failing)
        receipt = send_resuming(
            lambda: TcpTransport.connect("127.0.0.1", server.port),
            Offer(b"t"),
            Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096)),
        )
        assert receipt.digest == STREAM[-32:].hex() and (tmp_path / "m").read_bytes() == STREAM


@pytest.mark.parametrize("number", [1, 2, 3, 4, 10, 30])
def test_the_receiver_s_nth_receive_fails(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [number]
    real = ProtocolWire.buffer_updated

    def failing(self: Any, size: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            self._transport._fatal_error(OSError(errno.ECONNRESET, "reset"))
        real(self, size)

    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet(), within=2)
        await transport.run(receive_stream(lambda offer: Recording(tmp_path / "m", offer.transfer)))

    with nothing_left(), Server(serve) as server:
        monkeypatch.setattr(ProtocolWire, "buffer_updated", failing)
        receipt = send_resuming(
            lambda: TcpTransport.connect("127.0.0.1", server.port),
            Offer(b"t"),
            Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096)),
        )
        assert receipt.digest == STREAM[-32:].hex() and (tmp_path / "m").read_bytes() == STREAM
        assert isinstance(server.error(), TensorwireError)
