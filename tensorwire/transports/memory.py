"""Two ends of a bounded pipe within one process, for tests and for threads that hand streams to one another."""

import queue
from collections.abc import Iterable
from typing import Any, Final

_DEPTH: Final = 8


class MemoryTransport:
    """One end of a pipe; `pair()` makes both. Buffers are handed over, not copied."""

    def __init__(self, outgoing: "queue.Queue[Any]", incoming: "queue.Queue[Any]") -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._rest: memoryview | None = memoryview(b"")

    @classmethod
    def pair(cls) -> "tuple[MemoryTransport, MemoryTransport]":
        """Two connected ends."""
        there: queue.Queue[Any] = queue.Queue(_DEPTH)
        back: queue.Queue[Any] = queue.Queue(_DEPTH)
        return cls(there, back), cls(back, there)

    def send(self, buffers: Iterable[Any]) -> int:
        """Hand over every buffer; blocks while the other end is behind. Returns the bytes sent."""
        total = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            total += len(view)
            self._outgoing.put(view)
        return total

    def receive(self) -> "MemoryTransport":
        """What `decode` reads from."""
        return self

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` with at least one byte; 0 once the other end is closed."""
        while self._rest is not None and not self._rest:
            self._rest = self._incoming.get()
        if self._rest is None:
            return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        """Tell the other end that nothing more comes."""
        self._outgoing.put(None)
