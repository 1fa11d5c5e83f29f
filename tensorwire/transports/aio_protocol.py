"""asyncio's callbacks as a `Wire`: at most one read and one drain are waited for at a time."""

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
_TLS_HELD: Final = 1 << 20  # bytes, more than asyncio reads ahead of a TLS connection that nobody reads from
_TLS_RECORDS: Final = 256 << 10  # bytes that asyncio reads of one at a time
_MOST_AT_ONCE: Final = 1 << 20  # bytes of one write
_POLL: Final = 0.001  # seconds
_LINGER: Final = 2.0  # seconds that last words have to leave after a connection is closed

T = TypeVar("T")


class _Scratch:
    """Memory that all connections of an event loop share.

    What the loop delivers is taken out of it again before it serves another connection, so that one that merely waits
    holds none.
    """

    def __init__(self) -> None:
        self.spare = memoryview(bytearray(_TLS_HELD))
        self.records = bytearray(_TLS_RECORDS)

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> "_Scratch":
        """That of a loop."""
        if loop not in _SCRATCH:
            _SCRATCH[loop] = _Scratch()
        return _SCRATCH[loop]

    def lend_records(self, transport: Any) -> None:
        """Let a TLS connection of asyncio read from the socket through our memory, not through some of its own.

        It allocates a quarter of a mebibyte for each, from Python 3.11 on. Where it is called otherwise, it keeps that.
        """
        protocol: Any = getattr(transport, "_ssl_protocol", None)
        if len(getattr(protocol, "_ssl_buffer", b"")) == _TLS_RECORDS and hasattr(protocol, "_ssl_buffer_view"):
            protocol._ssl_buffer, protocol._ssl_buffer_view = self.records, memoryview(self.records)


_SCRATCH: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Scratch]" = WeakKeyDictionary()


class ProtocolWire(asyncio.BufferedProtocol):
    """A connection of asyncio.

    Without a read nothing is taken from the socket, so that whoever sends has to wait as well.

    `accepted` is told once it is made. `known`: whether a conversation has been held over it. `leaving`: whether it is
    being closed.
    """

    def __init__(self, accepted: Callable[["ProtocolWire"], None] = lambda wire: None) -> None:
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Future[int] = self._loop.create_future()
        self._draining: asyncio.Future[None] = self._loop.create_future()
        self._reading.cancel()  # nobody waits for either yet
        self._draining.cancel()
        self._wanted = memoryview(b"")  # where the read that is waited for wants its bytes
        self._scratch = _Scratch.of(self._loop)  # where those go that the loop delivers although nobody reads
        self.early = Early()
        self._direct = self._tls = False
        self._full = self._alert = self._agreeing = False
        self._peer_gone = self._ended = False  # whether the peer has ended, and whether all that it said has been read
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
        """`Wire.write`: done when all is with the system, or the peer has been `heard`.

        Not `writelines`, which before Python 3.12 copies all, and before 3.12.9 never says that it is full
        (CVE-2024-12254).
        """
        if self._gone is not None:
            raise self._gone
        data = run_of(views)[:_MOST_AT_ONCE]  # asyncio copies what does not leave at once
        self._draining = self._loop.create_future()
        self._transport.write(data)
        if not self._full:  # TLS may have said so already
            _settle(self._draining, None)
        await self._moving(self._draining, patience)
        return len(data)

    async def flush(self, patience: float | None) -> None:
        """`Wire.flush`. Without TLS `write` has done it; with it, nobody says when the encrypted bytes have left."""
        stall = Stall(math.inf if patience is None else patience, self._left)
        while self._plain.get_write_buffer_size() and self._gone is None and not (self._alert and self.early):
            if stall.is_over():
                raise TransportError("no progress while sending: timed out")
            await asyncio.sleep(_POLL)

    async def heard(self) -> bool:
        """`Wire.heard`. If not, the next `write` ends when it is."""
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
            await asyncio.wait([working])  # also when we are cancelled: a thread cannot be
        return working.result()

    def close(self) -> None:
        """Send what waits to be sent, for a while, and close."""
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
        """Agree on TLS, as the one who connects to `server_hostname` or listens. Raises AuthError, TransportError."""
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
            self._loop.call_soon(_settle, self.closed, None)  # nobody else will
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
        # Whoever sends waits until all is with the system: memory is lent until then. (TLS takes 0 for always full.)
        transport.set_write_buffer_limits(high=int(self._tls))

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio: where the next bytes go."""
        self._direct = not self._reading.done() and (not self._tls or len(self._wanted) >= _TLS_HELD)
        if self._direct:
            return self._wanted
        # At the end of a TLS connection asyncio asks once and drops what it holds beyond: there must be room for all of
        # that.
        return self._scratch.spare[: _TLS_HELD if self._tls else _SPARE]

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: so many bytes went there."""
        if not self._agreeing:  # then TLS reads, and may give us the first bytes before its transport
            self._transport.pause_reading()
        if not self._direct:
            self.early += self._scratch.spare[:nbytes]
            self._wake()
        if not self._reading.done():
            self._reading.set_result(nbytes if self._direct else self.early.take(self._wanted))

    def pause_writing(self) -> None:
        """asyncio: what is written waits to be sent."""
        self._full = True

    def resume_writing(self) -> None:
        """asyncio: all is with the system."""
        self._full = False
        _settle(self._draining, None)

    def eof_received(self) -> bool:
        """asyncio: the peer says no more. Returns whether to keep the connection."""
        self._peer_gone = True
        self._wake()
        if self._tls:  # which knows no half: the connection is about to be lost, and only that says whether by an alert
            return False
        self._ended = True
        _settle(self._reading, 0)
        return True  # stay open for our answer

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: there is no connection any more."""
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
        """Wait for it as long as what was written leaves."""
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
