"""asyncio: many connections in one thread, for servers above all. Reads land straight in the destination, here too."""

import asyncio
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Final, TypeVar

from tensorwire.errors import TensorwireError, TransportError
from tensorwire.transfer.session import Conversation, Do, Fill
from tensorwire.transports.blocking import tune
from tensorwire.transports.pace import HANDSHAKE, MIN_RATE, TIMEOUT, Pace, failed
from tensorwire.transports.tls import require_protection

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SPARE: Final = 64 << 10
_TLS_HELD: Final = 1 << 20  # bytes, more than asyncio reads ahead of a TLS connection that nobody reads from
_LINGER: Final = 2.0  # seconds that last words have to leave after a connection is closed

T = TypeVar("T")


class AsyncTransport:
    """One connection, as `TcpTransport`, for coroutines; an async context manager. Made by `connect` and by `AsyncListener`.

    `sent`, `received`: bytes so far, without those of TLS. `peer_name`: the common name in the peer's certificate, None without.
    """

    def __init__(self, wire: "_Wire", *, timeout: float | None, min_rate: float) -> None:
        self._wire = wire
        self._timeout = timeout
        self._deadline: float | None = None
        self._pace = Pace(min_rate)
        self.sent = self.received = 0
        self.peer_name = wire.peer_name

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
        min_rate: float = MIN_RATE,
    ) -> "AsyncTransport":
        """Connect to a listener; as `TcpTransport.connect`."""
        require_protection(host, tls, plaintext)
        loop = asyncio.get_running_loop()
        name, handshake = (host, HANDSHAKE) if tls is not None else (None, None)
        try:
            connecting = loop.create_connection(
                _Wire, host, port, ssl=tls, server_hostname=name, ssl_handshake_timeout=handshake
            )
            _, wire = await asyncio.wait_for(connecting, timeout)
        except asyncio.TimeoutError:
            raise TransportError(f"no progress while connecting to {host}:{port}: timed out") from None
        except OSError as error:
            raise failed(f"connecting to {host}:{port}", error) from error
        return cls(wire, timeout=timeout, min_rate=min_rate)

    async def run(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Hold a conversation (see `session`) and return its result. `within`: seconds that it may take in all.

        Raises what the conversation raises, and TransportError.
        """
        # Not `wait_for`: before Python 3.12 it may lose a cancellation that comes as the conversation ends.
        self._deadline = None if within is None else time.monotonic() + within
        try:
            result = await self._run(conversation)
        finally:
            self._deadline = None
        self._wire.known = True
        return result

    async def send(self, buffers: Iterable[Any]) -> int:
        """Send every buffer in order; returns the bytes sent. The next one is asked for when the last is on its way."""
        return await self._send(buffers, alert=False)

    async def _send(self, buffers: Iterable[Any], *, alert: bool) -> int:
        total = 0
        for buffer in buffers:
            if alert and self._wire.heard():
                break
            view = memoryview(buffer).cast("B")
            began = time.monotonic()
            await self._in_time(self._wire.write(view), "sending")
            self._pace.moved(len(view), time.monotonic() - began)
            total += len(view)
            self.sent += len(view)
        return total

    def receive(self) -> "AsyncTransport":
        """What `decode_async` reads from: exactly one stream is taken, the next one stays."""
        return self

    async def readinto(self, buffer: memoryview, /) -> int:
        """Receive straight into `buffer`: at least one byte, 0 once the peer has closed. Raises TransportError."""
        return await self._read(buffer, steady=True)

    def close(self) -> None:
        """Close the connection. What waits to be sent has two seconds to leave."""
        self._wire.close()

    async def __aenter__(self) -> "AsyncTransport":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await asyncio.wait([self._wire.closed])

    async def _run(self, conversation: Conversation[T]) -> T:
        try:
            step = next(conversation)
            while True:
                try:
                    answer = await self._step(step)
                except BaseException as error:
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as stop:
            return stop.value
        finally:
            conversation.close()

    async def _step(self, step: Any) -> Any:
        if isinstance(step, Fill):
            return await self._read(step.buffer, steady=step.steady, within=step.within)
        if isinstance(step, Do):
            return await self._do(step)
        return await self._send(step.buffers, alert=step.alert)

    async def _do(self, step: Do) -> Any:
        work = asyncio.ensure_future(asyncio.to_thread(step.work))
        pause = self._timeout / 4 if step.meanwhile and self._timeout else None
        try:
            while not (await asyncio.wait([work], timeout=pause))[0]:
                with suppress(TransportError):  # whether the peer is still there shows when the work is done
                    await self.send([step.meanwhile])
        finally:
            await asyncio.wait([work])  # also when we are cancelled: a thread cannot be
        return work.result()

    async def _read(self, buffer: memoryview, *, steady: bool, within: float | None = None) -> int:
        began = time.monotonic()
        got = await self._in_time(self._wire.read(buffer), "receiving", within)
        if steady:
            self._pace.moved(got, time.monotonic() - began)
        self.received += got
        return got

    async def _in_time(self, waiter: "asyncio.Future[T]", doing: str, within: float | None = None) -> T:
        """The result of a future, or TransportError after `timeout` or `within`. Cheaper than a task around each read."""
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            waiter.cancel()
            raise TransportError("the peer takes longer than it may")
        if waiter.done():
            return waiter.result()
        timer = None
        times = [seconds for seconds in (self._timeout, within, left) if seconds is not None]
        if times:
            late = TransportError(f"no progress while {doing}: timed out")
            timer = waiter.get_loop().call_later(min(times), _fail, waiter, late)
        try:
            return await waiter
        finally:
            if timer is not None:
                timer.cancel()


class AsyncListener:
    """Accepts connections and calls `serve(transport)` for each, at most `connections` at a time, or a third of the descriptors
    that this process may have. When there are more, a new one takes the place of the one that has for longest not held a
    conversation (the greeting, to begin with), and is closed where all have.

        async with AsyncListener(serve, host, port, tls=server_tls(...)) as listener:
            await listener.serve_forever()

    An error that `serve` raises ends its connection and is given to `on_error`. Other parameters as for `TcpListener`.
    """

    def __init__(
        self,
        serve: Callable[[AsyncTransport], Awaitable[None]],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
        min_rate: float = MIN_RATE,
        connections: int = 1024,
        on_error: Callable[[TensorwireError], None] = lambda error: None,
    ) -> None:
        require_protection(host, tls, plaintext)
        self._serve = serve
        self._address = host, port
        self._tls = tls
        self._timeout = timeout
        self._min_rate = min_rate
        self._connections = min(connections, _affordable())
        self._on_error = on_error
        self._tasks: dict[_Wire, asyncio.Task] = {}
        self.port = port

    async def __aenter__(self) -> "AsyncListener":
        loop = asyncio.get_running_loop()
        host, port = self._address
        try:
            self._server = await loop.create_server(lambda: _Wire(self._accepted), host, port, backlog=1024)
        except OSError as error:
            raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for _ in range(3):  # turns of the loop in which a connection that was just accepted gets here
            await asyncio.sleep(0)
        wires = dict(self._tasks)
        for task in wires.values():
            task.cancel()
        await asyncio.gather(*wires.values(), return_exceptions=True)
        if wires:
            await asyncio.wait([wire.closed for wire in wires])

    async def serve_forever(self) -> None:
        """Until cancelled."""
        await self._server.serve_forever()

    def _accepted(self, wire: "_Wire") -> None:
        staying = [other for other in self._tasks if not other.leaving]
        if len(staying) >= self._connections:
            out = next((other for other in staying if not other.known), wire)
            out.drop("too many connections")
            if out is wire:
                return
        task = asyncio.get_running_loop().create_task(self._serve_one(wire))
        self._tasks[wire] = task
        task.add_done_callback(lambda _: self._served(wire))

    def _served(self, wire: "_Wire") -> None:
        """Also of a task that was cancelled before it began."""
        del self._tasks[wire]
        wire.drop("served")

    async def _serve_one(self, wire: "_Wire") -> None:
        try:
            if self._tls is not None:
                await wire.start_tls(self._tls)
            async with AsyncTransport(wire, timeout=self._timeout, min_rate=self._min_rate) as transport:
                await self._serve(transport)
        except TensorwireError as error:
            self._on_error(error)


def _affordable() -> int:
    """Connections that leave descriptors for a file each, and as many for everything else."""
    if resource is None:
        return sys.maxsize
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else max(allowed // 3, 1)


class _Wire(asyncio.BufferedProtocol):
    """Between the event loop and a transport: one read and one drain are waited for at most. Without a read nothing is taken from
    the socket, so that whoever sends has to wait as well.
    """

    def __init__(self, accepted: Callable[["_Wire"], None] = lambda wire: None) -> None:
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Future[int] | None = None
        self._draining: asyncio.Future[None] | None = None
        self._wanted = memoryview(b"")  # where the read that is waited for wants its bytes,
        self._spare = memoryview(b"")  # and where those go that the loop delivers although nobody reads
        self._early = bytearray()
        self._direct = self._tls = False
        self._full = self._ended = self._alert = self._agreeing = False
        self._broken: TensorwireError | None = None  # what reading meets,
        self._gone: TensorwireError | None = None  # and what writing does
        self.known = False  # whether a conversation has been held
        self.leaving = False
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def read(self, buffer: memoryview) -> "asyncio.Future[int]":
        """Will be the number of bytes that were read into `buffer`, 0 at the end."""
        self._reading, self._alert = self._loop.create_future(), False
        if self._early:
            self._reading.set_result(self._early_into(buffer))
        elif self._broken is not None:
            self._reading.set_exception(self._broken)
        elif self._ended:
            self._reading.set_result(0)
        else:
            self._wanted = buffer
            self._transport.resume_reading()
        return self._reading

    def write(self, data: memoryview) -> "asyncio.Future[None]":
        """Takes `data` to be sent; done when there is room for more."""
        self._draining = self._loop.create_future()
        if self._gone is not None:
            self._draining.set_exception(self._gone)
            return self._draining
        self._transport.write(data)
        if not self._full:
            _settle(self._draining, None)  # TLS may have said so already
        return self._draining

    def heard(self) -> bool:
        """Whether the peer has said something that was not read yet, or is gone. If not, the next drain ends when it does."""
        if self._early or self._ended:
            return True
        self._alert = True
        self._transport.resume_reading()
        return False

    def close(self) -> None:
        """Send what waits to be sent, for a while, and close."""
        if not self.leaving:
            self.leaving = True
            self._transport.close()
            timer = self._loop.call_later(_LINGER, self._transport.abort)
            self.closed.add_done_callback(lambda _: timer.cancel())

    def drop(self, reason: str) -> None:
        """Close at once."""
        self.leaving = True
        self._broken = self._gone = self._gone or TransportError(f"dropped: {reason}")
        self._transport.abort()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Agree on TLS with whoever has connected. Raises AuthError, TransportError."""
        self._agreeing = True
        try:
            transport = await self._loop.start_tls(
                self._transport, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE
            )
        except BaseException as error:
            self._loop.call_soon(_settle, self.closed, None)  # nobody else will
            if isinstance(error, OSError):
                raise failed("agreeing on TLS", error) from error
            raise
        if transport is None:
            raise TransportError("the peer has closed the connection")
        self._take(transport)

    def connection_made(self, transport: Any) -> None:
        tune(transport.get_extra_info("socket"))
        self._take(transport)
        self._accepted(self)

    @property
    def peer_name(self) -> str | None:
        """The common name in the peer's certificate."""
        subject = (self._transport.get_extra_info("peercert") or {}).get("subject", ())
        return next((value for part in subject for key, value in part if key == "commonName"), None)

    def _take(self, transport: Any) -> None:
        self._transport, self._agreeing = transport, False
        self._tls = transport.get_extra_info("sslcontext") is not None
        transport.pause_reading()
        # Whoever sends waits until all is with the system: memory is lent until then. (TLS takes 0 for always full.)
        transport.set_write_buffer_limits(high=int(self._tls))

    def get_buffer(self, sizehint: int) -> memoryview:
        self._direct = self._awaited() and (not self._tls or len(self._wanted) >= _TLS_HELD)
        if self._direct:
            return self._wanted
        # At the end of a TLS connection asyncio asks once and drops what it holds beyond: there must be room for all of that.
        self._spare = memoryview(bytearray(_TLS_HELD if self._tls else _SPARE))
        return self._spare

    def buffer_updated(self, nbytes: int) -> None:
        if not self._agreeing:  # then TLS reads, and may give us the first bytes before its transport
            self._transport.pause_reading()
        if not self._direct:
            self._early += self._spare[:nbytes]
            self._spare = memoryview(b"")
            self._wake()
        if self._awaited():
            self._reading.set_result(nbytes if self._direct else self._early_into(self._wanted))

    def _awaited(self) -> bool:
        return self._reading is not None and not self._reading.done()

    def _early_into(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._early))
        buffer[:size] = self._early[:size]
        del self._early[:size]
        return size

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        _settle(self._draining, None)

    def eof_received(self) -> bool:
        self._ended = True
        _settle(self._reading, 0)
        self._wake()
        return not self._tls  # stay open for our answer; TLS knows no half

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        if isinstance(exc, OSError):
            self._broken = self._gone = failed("talking to the peer", exc)
        self._gone = self._gone or TransportError("the peer has closed the connection")
        if self._broken is not None:
            _fail(self._reading, self._broken)
        _settle(self._reading, 0)
        _fail(self._draining, self._gone)
        _settle(self.closed, None)

    def _wake(self) -> None:
        if self._alert:
            _settle(self._draining, None)


def _settle(future: "asyncio.Future[Any] | None", result: Any) -> None:
    if future is not None and not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any] | None", error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
