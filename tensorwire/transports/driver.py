"""The common part of all transports, without I/O: conversations, gathering, minimum rates, deadlines, counters.

A transport is a `Driver` over a `Wire`, wrapped by a thin class with the public calls. The driver's methods are
coroutines. Over asyncio they wait. Over a blocking wire they never do, so `completed` can run them like functions.
"""

import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from tensorwire.errors import TransportError
from tensorwire.transfer import Conversation, Do, Fill, Send
from tensorwire.transports.pace import Pace

_GATHER_BYTES: Final = 1 << 20  # buffers are gathered up to this many bytes,
_GATHER_COUNT: Final = 64  # or this many buffers (IOV_MAX is at least 1024 where it matters)
_SMALL: Final = 16 << 10  # smaller buffers cost less to copy than a call or a TLS record of their own
_SHORTEST: Final = 0.001  # seconds; a patience of 0 would mean none
_PULSES: Final = 4  # signs of life that we send within the peer's timeout

T = TypeVar("T")
Buffer: TypeAlias = Any  # whatever memoryview() takes; Python has a name for it from 3.12 on
Pulse: TypeAlias = Callable[[], Awaitable[None]]


class Wire(Protocol):
    """A connection, or a replacement for one. Calls raise TransportError after `patience` seconds without progress."""

    @property
    def early(self) -> "Early":
        """What has arrived although nobody was reading."""

    @property
    def peer_name(self) -> str | None:
        """The common name in the peer's certificate, None without one."""

    @property
    def peer_names(self) -> frozenset[str] | None:
        """All names in the peer's certificate; None where none was asked for."""

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        """Receive at least one byte into `buffer`; returns how many, 0 once the peer has closed."""

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        """Send some bytes of `views`, none of which is empty, in order; returns how many."""

    async def flush(self, patience: float | None) -> None:
        """Wait until the system has all bytes that were written, and sends them without further calls."""

    async def heard(self) -> bool:
        """Whether the peer has sent something that was not read yet, or is gone."""

    async def work(self, work: Callable[[], Any], pause: float | None, pulse: Pulse) -> Any:
        """The result of `work`; until then, call `pulse` every `pause` seconds. On return, `work` has ended."""

    def close(self) -> None:
        """Close it; data that waits to be sent may still be sent."""

    async def wait_closed(self) -> None:
        """Wait until it is completely closed, after `close`."""


class Driver:
    """The calls of a transport as coroutines. `sent`, `received`: bytes so far, without those of TLS."""

    def __init__(self, wire: Wire, *, timeout: float | None, min_rate: float) -> None:
        self.wire: Final = wire
        self.sent = self.received = 0
        self._timeout = timeout
        self._deadline: float | None = None
        self._pace = Pace(min_rate)

    async def converse(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Run a conversation and return its result. Errors of a step are raised inside it, and it may continue."""
        # Not `wait_for`, which before Python 3.12 may lose a cancellation that comes as the conversation ends.
        self._deadline = None if within is None else time.monotonic() + within
        try:
            step = next(conversation)
            while True:
                try:
                    answer = await self._step(step)
                except BaseException as error:  # each step has errors of its own
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            self._deadline = None
            conversation.close()

    async def send(self, buffers: Iterable[Buffer] | AsyncIterable[Buffer], *, alert: bool = False) -> int:
        """Send every buffer in order; returns the bytes sent.

        Buffers are gathered up to a mebibyte; an empty one means that the next may take time, so everything gathered is
        sent. `alert`: stop once the peer has sent anything.
        """
        before = self.sent
        batch = _Batch()
        if isinstance(buffers, AsyncIterable):
            async for buffer in buffers:
                if batch.add(buffer) and not await self._leave(batch, alert):
                    return self.sent - before
        else:
            for buffer in buffers:
                if batch.add(buffer) and not await self._leave(batch, alert):
                    return self.sent - before
        batch.pauses = True
        await self._leave(batch, False)
        return self.sent - before

    async def read(self, buffer: memoryview, *, steady: bool = True, within: float | None = None) -> int:
        """Receive at least one byte into `buffer`; returns how many, 0 once the peer has closed.

        `steady`, `within`: see `Fill`.
        """
        patience = self._patience(within)
        began = time.monotonic()
        early = self.wire.early
        got = early.take(buffer) if early else await self.wire.read(buffer, patience)
        if steady:
            self._pace.moved(got, time.monotonic() - began)
        self.received += got
        return got

    async def hang_up(self) -> None:
        """Close the connection and wait until it is completely closed."""
        self.wire.close()
        await self.wire.wait_closed()

    async def _step(self, step: Fill | Send | Do) -> Any:
        if isinstance(step, Fill):
            return await self.read(step.buffer, steady=step.steady, within=step.within)
        if isinstance(step, Send):
            return await self.send(step.buffers, alert=step.alert)
        return await self._do(step)

    async def _do(self, step: Do) -> Any:
        async def pulse() -> None:
            with suppress(TransportError):  # the end of the work will show whether the peer is still there
                await self.send([step.meanwhile])

        pause = self._timeout / _PULSES if step.meanwhile and self._timeout else None
        return await self.wire.work(step.work, pause, pulse)

    async def _leave(self, batch: "_Batch", alert: bool) -> bool:
        """Send what is gathered. Returns whether to continue: with `alert`, not after the peer has sent anything."""
        if alert and await self.wire.heard():
            return False
        while batch.views:
            patience = self._patience()
            began = time.monotonic()
            sent = await self.wire.write(batch.views, patience)
            self._pace.moved(sent, time.monotonic() - began)
            self.sent += sent
            batch.drop(sent)
        if batch.pauses:
            await self.wire.flush(self._patience())
            batch.pauses = False
        return True

    def _patience(self, within: float | None = None) -> float | None:
        """Seconds that the next call may wait. Raises TransportError if the conversation's time is over."""
        if self._deadline is None and within is None:
            return self._timeout
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TransportError("the peer takes longer than it is allowed to")
        return max(_SHORTEST, min(seconds for seconds in (self._timeout, within, left) if seconds is not None))


class Transport:
    """The properties that every transport has.

    `driver`: its calls as coroutines, for code that serves all kinds. `peer_name`: the common name in the peer's
    certificate, None without one; for display. `peer_names`: all its names, None if no certificate was requested;
    `speaks_for` tells which names the peer may use.
    """

    def __init__(self, wire: Wire, *, timeout: float | None, min_rate: float) -> None:
        self.driver: Final = Driver(wire, timeout=timeout, min_rate=min_rate)
        self.peer_name: Final = wire.peer_name
        self.peer_names: Final = wire.peer_names

    @property
    def sent(self) -> int:
        """Bytes sent so far, without those of TLS."""
        return self.driver.sent

    @property
    def received(self) -> int:
        """Bytes received so far, without those of TLS."""
        return self.driver.received

    def close(self) -> None:
        """Close the connection. Data that waits to be sent is still sent, under asyncio within two seconds."""
        self.driver.wire.close()


class Early(bytearray):
    """Bytes that have arrived while nobody was reading, kept for the next read."""

    def take(self, buffer: memoryview) -> int:
        """Move as many of them as fit into `buffer`; returns how many."""
        size = min(len(buffer), len(self))
        buffer[:size] = self[:size]
        del self[:size]
        return size


class _Batch:
    """Buffers that are sent together. `pauses`: whether the next buffer may take time."""

    __slots__ = ("_size", "pauses", "views")

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self.pauses = False
        self._size = 0

    def add(self, buffer: Buffer) -> bool:
        """Add a buffer. Returns whether the batch must be sent, because it is full or the buffer was empty."""
        view = memoryview(buffer)
        if view.nbytes == 0:
            self.pauses = True
            return True
        view = view.cast("B")
        self.views.append(view)
        self._size += len(view)
        return self._size >= _GATHER_BYTES or len(self.views) == _GATHER_COUNT

    def drop(self, size: int) -> None:
        """Remove the first `size` bytes, which were sent."""
        views = self.views
        self._size -= size
        while views and size >= len(views[0]):
            size -= len(views.pop(0))
        if size:
            views[0] = views[0][size:]


def run_of(views: list[memoryview]) -> bytes | memoryview:
    """The next data for a call that takes one buffer: a large buffer, or all small ones before it, joined."""
    small = 0
    while small < len(views) and len(views[small]) < _SMALL:
        small += 1
    return b"".join(views[:small]) if small > 1 else views[0]


def completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, because everything that it awaits on a blocking wire has blocked."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a blocking transport was given something that waits: use the asyncio one")
