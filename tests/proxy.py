"""A TCP proxy on loopback that breaks connections on purpose, at bytes and paces that a test chooses.

    with Proxy(port, up=Reset(at=1000)) as proxy:
        client.connect(("127.0.0.1", proxy.port))     # reset once 1000 bytes have gone to the server

`up` is a fault on the way from client to server, `down` on the way back, `None` an honest way. A fault has its state
per connection; `faulty=1` lets it befall the first connection only, so that a second attempt comes through. Several
faults one after the other: a proxy in front of a proxy. Knows bytes, not frames: a test that wants to lose a frame
passes the frame's place in the stream. An honest direction holds at most 64 KiB, so that back-pressure passes through.
"""

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final

UP: Final = "up"
DOWN: Final = "down"
_CHUNK: Final = 64 << 10
_FOREVER: Final = 1 << 62


class _EndedError(Exception):
    """A fault has ended this direction: what else comes is thrown away."""


class _BrokenError(Exception):
    """The connection ends with a reset on both sides."""


class Fault:
    """Base of all faults: an honest way.

    Subclasses name the bytes at which they want a piece to begin or end, and act.
    """

    def cuts(self) -> tuple[int, ...]:
        """Places in the stream that no piece spans."""
        return ()

    async def reach(self, way: "Way") -> None:
        """`way.position` has moved; called once at 0."""

    async def piece(self, way: "Way", data: bytes) -> None:
        """`data` has come from `way.position` on."""
        await way.send(data)


@dataclass(frozen=True)
class Delay(Fault):
    """All arrives `seconds` later, at the full rate; up to 64 chunks are on their way."""

    seconds: float


@dataclass(frozen=True)
class Throttle(Fault):
    """At most `rate` bytes a second."""

    rate: float

    async def piece(self, way: "Way", data: bytes) -> None:
        step = max(1, int(self.rate / 50))
        for begin in range(0, len(data), step):
            await way.send(data[begin : begin + step])
            await asyncio.sleep(len(data[begin : begin + step]) / self.rate)


@dataclass(frozen=True)
class Trickle(Fault):
    """From byte `at` on, one byte every `interval` seconds."""

    interval: float
    at: int = 0

    def cuts(self) -> tuple[int, ...]:
        return (self.at,)

    async def piece(self, way: "Way", data: bytes) -> None:
        if way.position < self.at:
            await way.send(data)
            return
        for byte in data:
            await way.send(bytes([byte]))
            await asyncio.sleep(self.interval)


@dataclass(frozen=True)
class _At(Fault):
    """Something happens as soon as `at` bytes have passed, the end of the stream included."""

    at: int

    def cuts(self) -> tuple[int, ...]:
        return (self.at,)

    async def reach(self, way: "Way") -> None:
        if way.position == self.at:
            await self.happen(way)

    async def happen(self, way: "Way") -> None:
        raise NotImplementedError


class Cut(_At):
    """Both peers see the end of the stream (FIN), both ways; what they still send is thrown away."""

    async def happen(self, way: "Way") -> None:
        way.finish()
        way.back.finish()
        raise _EndedError


class Reset(_At):
    """Both peers are reset (RST). Bytes that the system had not yet delivered may be lost, as in life."""

    async def happen(self, way: "Way") -> None:
        raise _BrokenError


class HalfClose(_At):
    """The receiver sees the end of the stream (FIN) this way only; the way back goes on."""

    async def happen(self, way: "Way") -> None:
        way.finish()
        raise _EndedError


class Stall(_At):
    """Nothing passes any more, this way only, and nothing is read: the sender's window fills up and stays full."""

    async def happen(self, way: "Way") -> None:
        await asyncio.Event().wait()


@dataclass(frozen=True)
class Flip(Fault):
    """The bits of `mask` are flipped in the byte at `at`."""

    at: int
    mask: int = 1

    def cuts(self) -> tuple[int, ...]:
        return self.at, self.at + 1

    async def piece(self, way: "Way", data: bytes) -> None:
        await way.send(bytes([data[0] ^ self.mask]) if way.position == self.at else data)


@dataclass(frozen=True)
class _Range(Fault):
    """Something happens to bytes [at, at + length)."""

    at: int
    length: int

    def cuts(self) -> tuple[int, ...]:
        return self.at, self.at + self.length

    def inside(self, way: "Way") -> bool:
        return self.at <= way.position < self.at + self.length


class Drop(_Range):
    """The bytes are lost; what follows closes the gap."""

    async def piece(self, way: "Way", data: bytes) -> None:
        if not self.inside(way):
            await way.send(data)


class Duplicate(_Range):
    """The bytes come twice, one after the other."""

    async def piece(self, way: "Way", data: bytes) -> None:
        await way.send(data)
        if self.inside(way):
            way.held += data
            if way.position + len(data) == self.at + self.length:
                await way.release()


@dataclass(frozen=True)
class Reorder(_Range):
    """The bytes come only after the `beyond` bytes that follow them."""

    beyond: int

    def cuts(self) -> tuple[int, ...]:
        return *super().cuts(), self.at + self.length + self.beyond

    async def piece(self, way: "Way", data: bytes) -> None:
        if self.inside(way):
            way.held += data
            return
        await way.send(data)
        if way.position + len(data) == self.at + self.length + self.beyond:
            await way.release()


class Way:
    """One direction of one connection."""

    back: "Way"  # the other direction

    def __init__(self, proxy: "Proxy", name: str, source: socket.socket, target: socket.socket, fault: Fault) -> None:
        self.position = 0  # bytes that have come, of those that the fault has seen
        self.held = b""
        self._proxy, self._name, self._source, self._target, self._fault = proxy, name, source, target, fault
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Pass bytes on until the source ends. Raises _BrokenError, OSError."""
        try:
            await self._fault.reach(self)
            if isinstance(self._fault, Delay):
                await self._run_delayed(self._fault.seconds)
            else:
                while data := await self._receive():
                    for piece in self._pieces(data):
                        await self._fault.piece(self, piece)
                        self.position += len(piece)
                        await self._fault.reach(self)
            await self.release()
            self.finish()
        except _EndedError:
            while await self._receive():
                pass

    async def send(self, data: bytes) -> None:
        """Pass `data` on."""
        await self._loop.sock_sendall(self._target, data)
        self._proxy.sent[self._name] += len(data)

    async def release(self) -> None:
        """Pass on what was held back."""
        held, self.held = self.held, b""
        if held:
            await self.send(held)

    def finish(self) -> None:
        """Tell the target that no more will come."""
        with suppress(OSError):
            self._target.shutdown(socket.SHUT_WR)

    async def _receive(self) -> bytes:
        data = await self._loop.sock_recv(self._source, _CHUNK)
        self._proxy.received[self._name] += len(data)
        return data

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        begin = self.position
        places = sorted({cut - begin for cut in self._fault.cuts() if 0 < cut - begin < len(data)})
        for start, stop in zip([0, *places], [*places, len(data)], strict=True):
            yield data[start:stop]

    async def _run_delayed(self, seconds: float) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def receive() -> None:
            while data := await self._receive():
                await under_way.put((self._loop.time() + seconds, data))
            await under_way.put((self._loop.time() + seconds, b""))

        async def deliver() -> None:
            data = b"some"
            while data:
                due, data = await under_way.get()
                await asyncio.sleep(due - self._loop.time())
                await self.send(data)

        await _all_or_none(receive(), deliver())


class Proxy:
    """Listens on loopback and connects whoever comes to a server there; a context manager.

    `port`: where to connect to. `connections` accepted so far; `received` and `sent`: bytes by direction, "up" and
    "down".
    """

    def __init__(
        self, server: int, *, up: Fault | None = None, down: Fault | None = None, faulty: int = _FOREVER
    ) -> None:
        self.connections = 0
        self.received = {UP: 0, DOWN: 0}
        self.sent = {UP: 0, DOWN: 0}
        self._server, self._up, self._down, self._faulty = server, up or Fault(), down or Fault(), faulty
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task | None = None
        self._begun = threading.Event()
        self._errors: deque[BaseException] = deque()
        self._thread = threading.Thread(target=self._run, name="proxy")

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._main is not None
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()
        if self._errors and error is None:
            raise self._errors[0]

    def _run(self) -> None:
        self._main = self._loop.create_task(self._serve())
        self._loop.call_soon(self._begun.set)
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.close()

    async def _serve(self) -> None:
        tasks: set[asyncio.Task] = set()
        try:
            while True:
                client, _ = await self._loop.sock_accept(self._listener)
                self.connections += 1
                task = self._loop.create_task(self._connect(client, honest=self.connections > self._faulty))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            self._listener.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect(self, client: socket.socket, *, honest: bool) -> None:
        server = socket.socket()
        try:
            for peer in (client, server):
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.sock_connect(server, ("127.0.0.1", self._server))
            up = Way(self, UP, client, server, Fault() if honest else self._up)
            down = Way(self, DOWN, server, client, Fault() if honest else self._down)
            up.back, down.back = down, up
            await _all_or_none(up.run(), down.run())
        except (_BrokenError, OSError):  # a fault's reset, or a peer's, which is passed on
            for peer in (client, server):
                with suppress(OSError):
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except Exception as error:  # a mistake in here: the test must hear of it
            self._errors.append(error)
        finally:
            client.close()
            server.close()


async def _all_or_none(*coroutines: object) -> None:
    """Run all; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
