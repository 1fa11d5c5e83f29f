"""Two ends of a bounded pipe within one process: for tests of whole protocols, and for threads that hand streams to one another."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from tensorwire.errors import TransportError
from tensorwire.transports.blocking import BlockingTransport, work_beside
from tensorwire.transports.driver import Early, Pulse
from tensorwire.transports.pace import MIN_RATE, TIMEOUT

_DEPTH: Final = 8  # buffers in the pipe, in each direction


class MemoryTransport(BlockingTransport):
    """One end of a pipe, for one thread at a time; `pair()` makes both. Buffers are handed over, not copied, so they must not be
    changed before the other end has read them. Otherwise as `TcpTransport`: `run`, time-outs and errors too.
    """

    @classmethod
    def pair(
        cls, *, timeout: float | None = TIMEOUT, min_rate: float = MIN_RATE
    ) -> "tuple[MemoryTransport, MemoryTransport]":
        """Two connected ends."""
        there, back = _Pipe(), _Pipe()
        ends = _MemoryWire(there, back), _MemoryWire(back, there)
        left, right = (cls(wire, timeout=timeout, min_rate=min_rate) for wire in ends)
        return left, right


class _Pipe:
    """One direction."""

    def __init__(self) -> None:
        self._buffers: deque[memoryview] = deque()
        self._ended = False  # nothing more is put in,
        self._gone = False  # or taken out
        self._changed = threading.Condition()

    def put(self, view: memoryview, patience: float | None) -> None:
        """Put a buffer in, once there is room."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._buffers) < _DEPTH or self._gone, patience):
                raise TransportError("no progress while sending: timed out")
            if self._gone or self._ended:
                raise TransportError("the peer has closed the connection" if self._gone else "the connection is closed")
            self._buffers.append(view)
            self._changed.notify_all()

    def take(self, buffer: memoryview, patience: float | None) -> int:
        """Fill `buffer` with at least one byte; 0 at the end."""
        with self._changed:
            if not self._changed.wait_for(self.holds_something, patience):
                raise TransportError("no progress while receiving: timed out")
            if not self._buffers:
                return 0
            first = self._buffers[0]
            size = min(len(buffer), len(first))
            buffer[:size] = first[:size]
            if size < len(first):
                self._buffers[0] = first[size:]
            else:
                self._buffers.popleft()
                self._changed.notify_all()
            return size

    def holds_something(self) -> bool:
        """Whether `take` would return at once."""
        return bool(self._buffers) or self._ended

    def end(self) -> None:
        """Nothing more is put in."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Nothing more is taken out."""
        with self._changed:
            self._gone = True
            self._changed.notify_all()


class _MemoryWire:
    """One end as a `Wire`."""

    peer_name = None

    def __init__(self, outgoing: _Pipe, incoming: _Pipe) -> None:
        self.early = Early()  # always empty: what arrives stays in the pipe
        self._outgoing = outgoing
        self._incoming = incoming

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        """`Wire.read`."""
        return self._incoming.take(buffer, patience)

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        """`Wire.write`."""
        self._outgoing.put(views[0], patience)
        return len(views[0])

    async def flush(self, patience: float | None) -> None:
        """`Wire.flush`: `write` has done it."""

    async def heard(self) -> bool:
        """`Wire.heard`."""
        return self._incoming.holds_something()

    async def work(self, work: Callable[[], Any], pause: float | None, pulse: Pulse) -> Any:
        """`Wire.work`."""
        return await work_beside(work, pause, pulse)

    def close(self) -> None:
        """`Wire.close`."""
        self._outgoing.end()
        self._incoming.leave()

    async def wait_closed(self) -> None:
        """`Wire.wait_closed`: `close` has done it."""
