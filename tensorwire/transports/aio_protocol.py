"""asyncio's callbacks as a `Wire`: at most one read and one drain are pending at a time."""

import asyncio
import math
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from tensorwire.errors import TensorwireError, TransportError
from tensorwire.transports.blocking import tune
from tensorwire.transports.driver import Early, Pulse, run_of
from tensorwire.transports.pace import AGREEING, HANDSHAKE, Stall, failed, unacknowledged
from tensorwire.transports.tls import common_name, peer_names

_SPARE: Final = 64 << 10
_TLS_HELD: Final = 1 << 20  # bytes; more than asyncio reads ahead on a TLS connection that nobody reads
_TLS_RECORDS: Final = 256 << 10  # bytes that asyncio reads of one at a time
_MOST_AT_ONCE: Final = 1 << 20  # bytes of one write
_POLL: Final = 0.001  # seconds
_LINGER: Final = 2.0  # seconds in which waiting data may be sent after a connection is closed

T = TypeVar("T")


class _Scratch:
    """Memory that all connections of an event loop share.

    What the loop delivers is moved out before another connection is served, so a connection that merely waits holds no
    memory.
    """

    def __init__(self) -> None:
        self.spare = memoryview(bytearray(_TLS_HELD))
        self.records = bytearray(_TLS_RECORDS)

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> "_Scratch":
        """The scratch memory of a loop."""
        if loop not in _SCRATCH:
            _SCRATCH[loop] = _Scratch()
        return _SCRATCH[loop]

    def lend_records(self, transport: Any) -> None:
        """Let a TLS connection of asyncio read from the socket through this memory instead of its own.

        From Python 3.11 on, asyncio allocates a quarter of a mebibyte per connection. If its attribute has another
        name, nothing changes.
        """
        protocol: Any = getattr(transport, "_ssl_protocol", None)
        if len(getattr(protocol, "_ssl_buffer", b"")) == _TLS_RECORDS and hasattr(protocol, "_ssl_buffer_view"):
            protocol._ssl_buffer, protocol._ssl_buffer_view = self.records, memoryview(self.records)


_SCRATCH: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Scratch]" = WeakKeyDictionary()


class ProtocolWire(asyncio.BufferedProtocol):
    """A connection of asyncio.

    Without a read, nothing is taken from the socket, so the sender has to wait as well.

    `accepted`: called once it is connected. `known`: whether it has completed a conversation. `leaving`: whether it is
    being closed.
    """

    def __init__(self, accepted: Callable[["ProtocolWire"], None] = lambda wire: None) -> None:
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Future[int] = self._loop.create_future()
        self._draining: asyncio.Future[None] = self._loop.create_future()
        self._reading.cancel()  # neither is pending yet
        self._draining.cancel()
        self._wanted = memoryview(b"")  # the memory of the pending read
        self._scratch = _Scratch.of(self._loop)  # for bytes that the loop delivers without a pending read
        self.early = Early()
        self._direct = self._tls = False
        self._full = self._alert = self._agreeing = False
        self._peer_gone = self._ended = False  # whether the peer has ended, and whether all its data has been read
        self._broken: TensorwireError | None = None  # what reading meets,
        self._gone: TensorwireError | None = None  # and what writing does
        self.known = False
        self.leaving = False
        self.closed: asyncio.Future[None] = self._loop.create_future()

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        """`Wire.read`."""
        self._alert = False
        if self._broken is not None:
            raise self._broken
        if self._ended:
            return 0
        self._reading, self._wanted = self._loop.create_future(), buffer
        self._transport.resume_reading()
        return await _in_time(self._reading, patience, "receiving")

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        """`Wire.write`: ends when the system has everything, or the peer was `heard`.

        Not `writelines`, which copies everything before Python 3.12, and never reports a full buffer before 3.12.9
        (CVE-2024-12254).
        """
        if self._gone is not None:
            raise self._gone
        data = run_of(views)[:_MOST_AT_ONCE]  # asyncio copies what cannot be sent at once
        self._draining = self._loop.create_future()
        self._transport.write(data)
        if not self._full:  # TLS may have said so already
            _settle(self._draining, None)
        await self._moving(self._draining, patience)
        return len(data)

    async def flush(self, patience: float | None) -> None:
        """`Wire.flush`. Without TLS, `write` has done it; with TLS, nothing tells when the encrypted bytes are sent."""
        stall = Stall(math.inf if patience is None else patience, self._left)
        while self._plain.get_write_buffer_size() and self._gone is None and not (self._alert and self.early):
            if stall.is_over():
                raise TransportError("no progress while sending: timed out")
            await asyncio.sleep(_POLL)

    async def heard(self) -> bool:
        """`Wire.heard`. If it is False, the next `write` ends when that changes."""
        if self.early or self._peer_gone:
            return True
        self._alert = True
        self._transport.resume_reading()
        return False

    async def work(self, work: Callable[[], Any], pause: float | None, pulse: Pulse) -> Any:
        """`Wire.work`: in a thread."""
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while not (await asyncio.wait([working], timeout=pause))[0]:
                await pulse()
        finally:
            await asyncio.wait([working])  # even if we are cancelled, because a thread cannot be
        return working.result()

    def close(self) -> None:
        """Send waiting data for a limited time, then close."""
        if not self.leaving:
            self.leaving = True
            if (
                self._tls and not self._ended
            ):  # or it would wait for somebody to read the end that the peer has sent already
                self._transport.resume_reading()
            self._transport.close()
            timer = self._loop.call_later(_LINGER, self._transport.abort)
            self.closed.add_done_callback(lambda _: timer.cancel())

    def drop(self, reason: str) -> None:
        """Close at once."""
        self.leaving = True
        self._broken = self._gone = self._gone or TransportError(f"dropped: {reason}")
        self._transport.abort()

    async def wait_closed(self) -> None:
        """`Wire.wait_closed`."""
        await asyncio.wait([self.closed])

    async def start_tls(self, context: ssl.SSLContext, *, server_hostname: str | None = None) -> None:
        """Start TLS, as a client of `server_hostname` or as a server. Raises AuthError, TransportError."""
        self._agreeing = True
        try:
            transport = await self._loop.start_tls(
                self._transport,
                self,
                context,
                server_side=server_hostname is None,
                server_hostname=server_hostname,
                ssl_handshake_timeout=HANDSHAKE,
            )
        except BaseException as error:
            self._loop.call_soon(_settle, self.closed, None)  # nothing else will
            if isinstance(error, OSError):
                raise failed(AGREEING, error) from error
            raise
        if transport is None:
            raise TransportError("the peer has closed the connection")
        self._scratch.lend_records(transport)
        self._take(transport)

    def connection_made(self, transport: Any) -> None:
        """asyncio: the connection stands."""
        tune(transport.get_extra_info("socket"))
        self._plain = transport
        self._take(transport)
        self._accepted(self)

    @property
    def peer_name(self) -> str | None:
        """The common name in the peer's certificate, None without one."""
        return common_name(self._transport.get_extra_info("peercert"))

    @property
    def peer_names(self) -> frozenset[str] | None:
        """All names in the peer's certificate; None where none was asked for."""
        context = self._transport.get_extra_info("sslcontext")
        return None if context is None else peer_names(context, self._transport.get_extra_info("peercert"))

    def _take(self, transport: Any) -> None:
        self._transport, self._agreeing = transport, False
        self._tls = transport.get_extra_info("sslcontext") is not None
        transport.pause_reading()
        # Senders wait until the system has everything, because their memory is lent until then. (To TLS, 0 would mean
        # always full.)
        transport.set_write_buffer_limits(high=int(self._tls))

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio: where the next bytes go."""
        self._direct = not self._reading.done() and (not self._tls or len(self._wanted) >= _TLS_HELD)
        if self._direct:
            return self._wanted
        # At the end of a TLS connection, asyncio asks only once and drops what does not fit, so there must be room for
        # all that it holds.
        return self._scratch.spare[: _TLS_HELD if self._tls else _SPARE]

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: `size` bytes were written there."""
        if not self._agreeing:  # then TLS reads, and may give us the first bytes before its transport
            self._transport.pause_reading()
        if not self._direct:
            self.early += self._scratch.spare[:nbytes]
            self._wake()
        if not self._reading.done():
            self._reading.set_result(nbytes if self._direct else self.early.take(self._wanted))

    def pause_writing(self) -> None:
        """asyncio: written data waits to be sent."""
        self._full = True

    def resume_writing(self) -> None:
        """asyncio: the system has everything."""
        self._full = False
        _settle(self._draining, None)

    def eof_received(self) -> bool:
        """asyncio: the peer will send no more. Returns whether to keep the connection."""
        self._peer_gone = True
        self._wake()
        if self._tls:  # which knows no half: the connection is about to be lost, and only that says whether by an alert
            return False
        self._ended = True
        _settle(self._reading, 0)
        return True  # stay open for our answer

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection has ended."""
        self._ended = self._peer_gone = True
        if isinstance(exc, OSError):
            self._broken = self._gone = failed("talking to the peer", exc)
        self._gone = self._gone or TransportError("the peer has closed the connection")
        if self._broken is not None:
            _fail(self._reading, self._broken)
        _settle(self._reading, 0)
        _fail(self._draining, self._gone)
        _settle(self.closed, None)

    async def _moving(self, future: "asyncio.Future[None]", patience: float | None) -> None:
        """Wait for a future as long as written data is being sent."""
        if future.done() or patience is None:
            return await future
        stall = Stall(patience, self._left)

        def look() -> None:
            self._timer = self._loop.call_later(stall.pause, look)
            if stall.is_over():
                _fail(future, TransportError("no progress while sending: timed out"))

        timer = self._loop.call_later(stall.pause, look)

        try:
            return await future
        finally:
            timer.cancel()

    def _left(self) -> int:
        """Bytes that have not arrived: those that asyncio holds, TLS and what is below it, and those of the system."""
        held: int = self._transport.get_write_buffer_size() + self._plain.get_write_buffer_size()
        return held + unacknowledged(self._plain.get_extra_info("socket"))

    def _wake(self) -> None:
        if self._alert:
            _settle(self._draining, None)


async def _in_time(future: "asyncio.Future[T]", patience: float | None, doing: str) -> T:
    """The result of a future, or TransportError after `patience` seconds. Cheaper than a task around each read."""
    if future.done() or patience is None:
        return await future
    late = TransportError(f"no progress while {doing}: timed out")
    timer = future.get_loop().call_later(patience, _fail, future, late)
    try:
        return await future
    finally:
        timer.cancel()


def _settle(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
