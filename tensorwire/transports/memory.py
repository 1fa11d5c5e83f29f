"""Two ends of a bounded pipe within one process: for tests of protocols, and for threads that exchange streams."""

import threading
from collections import deque
from typing import Final

from tensorwire.errors import TransportError
from tensorwire.transports.blocking import BlockingTransport, BlockingWire
from tensorwire.transports.pace import MIN_RATE, TIMEOUT

_DEPTH: Final = 8  # buffers in transit in each direction


class MemoryTransport(BlockingTransport):
    """One end of a pipe, for one thread at a time; `pair()` makes both.

    Buffers are handed over, not copied, so they must not be changed before the other end has read them. Otherwise as
    `TcpTransport`, with its time-outs and errors.
    """

    @classmethod
    def pair(
        cls, *, timeout: float | None = TIMEOUT, min_rate: float = MIN_RATE
    ) -> "tuple[MemoryTransport, MemoryTransport]":
        """Two connected ends."""
        changed = threading.Condition()
        here = _MemoryWire(changed)
        there = here.peer = _MemoryWire(changed, here)
        return cls(here, timeout=timeout, min_rate=min_rate), cls(there, timeout=timeout, min_rate=min_rate)


class _MemoryWire(BlockingWire):
    """One end as a `Wire`; `changed` guards both. Nothing is early: what arrives stays in the inbox."""

    def __init__(self, changed: threading.Condition, peer: "_MemoryWire | None" = None) -> None:
        super().__init__()
        self.peer = peer or self
        self._changed = changed
        self._inbox: deque[memoryview] = deque()
        self._closed = False

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        """`Wire.read`."""
        with self._changed:
            if not self._changed.wait_for(self._has_news, patience):
                raise TransportError("no progress while receiving: timed out")
            if not self._inbox:
                return 0
            first = self._inbox.popleft()
            size = min(len(buffer), len(first))
            buffer[:size] = first[:size]
            if size < len(first):
                self._inbox.appendleft(first[size:])
            self._changed.notify_all()
            return size

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        """`Wire.write`."""
        peer = self.peer
        with self._changed:
            if not self._changed.wait_for(lambda: len(peer._inbox) < _DEPTH or peer._closed, patience):
                raise TransportError("no progress while sending: timed out")
            if peer._closed or self._closed:
                raise TransportError(
                    "the connection is closed" if self._closed else "the peer has closed the connection"
                )
            peer._inbox.append(views[0])
            self._changed.notify_all()
        return len(views[0])

    async def heard(self) -> bool:
        """`Wire.heard`."""
        return self._has_news()

    def close(self) -> None:
        """`Wire.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_news(self) -> bool:
        return bool(self._inbox) or self.peer._closed
