"""asyncio: many connections in one thread, for servers above all. Reads land straight in the destination, here too."""

import asyncio
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from typing import TypeVar

from tensorwire.errors import TensorwireError, TransportError
from tensorwire.transfer import Conversation
from tensorwire.transports.addresses import AHEAD, check_address, listening
from tensorwire.transports.aio_protocol import ProtocolWire
from tensorwire.transports.driver import Buffer, Transport
from tensorwire.transports.pace import MIN_RATE, TIMEOUT, failed, said
from tensorwire.transports.tls import require_protection

if sys.platform != "win32":
    import resource

T = TypeVar("T")


class AsyncTransport(Transport):
    """One connection, as `TcpTransport`, for coroutines; an async context manager.

    Made by `connect` and by `AsyncListener`.
    """

    def __init__(self, wire: ProtocolWire, *, timeout: float | None, min_rate: float) -> None:
        super().__init__(wire, timeout=timeout, min_rate=min_rate)
        self._wire = wire

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
        check_address(host, port)
        require_protection(host, tls, plaintext)
        loop = asyncio.get_running_loop()
        try:
            attempts = loop.create_connection(ProtocolWire, host, port, happy_eyeballs_delay=AHEAD)
            _, wire = await asyncio.wait_for(attempts, timeout)
        except asyncio.TimeoutError:
            raise TransportError(f"no progress while connecting to {host}:{port}: timed out") from None
        except OSError as error:
            raise failed(f"connecting to {host}:{port}", error) from error
        if tls is not None:
            await wire.start_tls(tls, server_hostname=host)
        return cls(wire, timeout=timeout, min_rate=min_rate)

    async def run(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Hold a conversation (see `tensorwire.transfer`) and return its result.

        `within`: seconds that it may take in all.

        Raises what the conversation raises, and TransportError.
        """
        result = await self.driver.converse(conversation, within=within)
        self._wire.known = True
        return result

    async def send(self, buffers: Iterable[Buffer] | AsyncIterable[Buffer]) -> int:
        """Send every buffer in order; returns the bytes sent. Raises TransportError.

        Buffers are gathered as by `TcpTransport.send`, and an empty one has what is gathered leave. Of an async
        iterable it leaves whenever the next buffer is not there at once.
        """
        if not isinstance(buffers, AsyncIterable):
            return await self.driver.send(buffers)
        async with aclosing(_flushing(buffers)) as flushing:
            return await self.driver.send(flushing)

    def receive(self) -> "AsyncTransport":
        """What `decode_async` reads from: exactly one stream is taken, the next one stays."""
        return self

    async def readinto(self, buffer: memoryview, /) -> int:
        """Receive straight into `buffer`: at least one byte, 0 once the peer has closed. Raises TransportError."""
        return await self.driver.read(buffer)

    async def __aenter__(self) -> "AsyncTransport":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.driver.hang_up()


async def _flushing(buffers: AsyncIterable[Buffer]) -> AsyncGenerator[Buffer, None]:
    """`buffers`, with an empty one wherever the next is not there at once."""
    iterator = aiter(buffers)
    while True:
        upcoming = asyncio.ensure_future(anext(iterator))
        try:
            await asyncio.sleep(0)  # the turn in which it comes if nothing has to be waited for
            if not upcoming.done():
                yield b""
            buffer = await upcoming
        except StopAsyncIteration:
            return
        finally:
            if upcoming.cancel():
                await asyncio.wait([upcoming])
        yield buffer


class AsyncListener:
    """Accepts connections and calls `serve(transport)` for each.

    At most `connections` are served at a time, or a third of the descriptors that this process may have. A new
    connection displaces the oldest over which no conversation (the greeting, to begin with) has been held yet, and is
    closed where there is none.

        async with AsyncListener(serve, host, port, tls=server_tls(...)) as listener:
            await listener.serve_forever()

    An error that `serve` raises ends its connection and is given to `on_error`. `host`, `port`, `tls`, `plaintext`,
    `timeout` and `min_rate` are as for `TcpListener`.
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
        check_address(host, port)
        require_protection(host, tls, plaintext)
        self._serve = serve
        self._tls = tls
        self._timeout = timeout
        self._min_rate = min_rate
        self._connections = min(connections, _affordable())
        self._on_error = on_error
        self._servers: list[asyncio.Server] = []
        self._tasks: dict[ProtocolWire, asyncio.Task[None]] = {}
        self.host = host
        self.port = port

    async def __aenter__(self) -> "AsyncListener":
        loop = asyncio.get_running_loop()
        try:
            sockets = listening(self.host, self.port)
        except OSError as error:
            raise TransportError(f"cannot listen on {self.host}:{self.port}: {said(error)}") from error
        self.port = sockets[0].getsockname()[1]
        for each in sockets:
            server = await loop.create_server(lambda: ProtocolWire(self._accepted), sock=each, backlog=1024)
            self._servers.append(server)
        return self

    async def __aexit__(self, *exc: object) -> None:
        # A server that is closed loses what it has just accepted: first it accepts no more.
        loop = asyncio.get_running_loop()
        for listening_socket in [each for server in self._servers for each in server.sockets]:
            with suppress(NotImplementedError):  # a loop that waits for no readers
                loop.remove_reader(listening_socket.fileno())
        for _ in range(3):  # turns of the loop in which a connection that was just accepted gets here
            await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        wires = dict(self._tasks)
        for task in wires.values():
            task.cancel()
        await asyncio.gather(*wires.values(), return_exceptions=True)
        if wires:
            await asyncio.wait([wire.closed for wire in wires])

    async def serve_forever(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(server.serve_forever() for server in self._servers))

    def _accepted(self, wire: ProtocolWire) -> None:
        staying = [other for other in self._tasks if not other.leaving]
        if len(staying) >= self._connections:
            out = next((other for other in staying if not other.known), wire)
            out.drop("too many connections")
            if out is wire:
                return
        task = asyncio.get_running_loop().create_task(self._serve_one(wire))
        self._tasks[wire] = task
        task.add_done_callback(lambda _: self._served(wire))

    def _served(self, wire: ProtocolWire) -> None:
        """Also of a task that was cancelled before it began."""
        del self._tasks[wire]
        wire.drop("served")

    async def _serve_one(self, wire: ProtocolWire) -> None:
        try:
            if self._tls is not None:
                await wire.start_tls(self._tls)
            async with AsyncTransport(wire, timeout=self._timeout, min_rate=self._min_rate) as transport:
                await self._serve(transport)
        except TensorwireError as error:
            self._on_error(error)


def _affordable() -> int:
    """Connections that leave descriptors for a file each, and as many for everything else."""
    if sys.platform == "win32":
        return sys.maxsize
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else max(allowed // 3, 1)
