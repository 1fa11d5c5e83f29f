"""Blocking TCP, plain on this machine and TLS beyond it: gathered writes of the caller's memory, reads straight into the
destination.
"""

import socket
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, Final, TypeVar

from tensorwire.errors import AuthError, TransportError
from tensorwire.transports.pace import HANDSHAKE, MIN_RATE, TIMEOUT, Pace, failed
from tensorwire.transports.session import Conversation, Do, Fill
from tensorwire.transports.tls import require_protection

_GATHER_BYTES: Final = 1 << 20  # buffers are gathered up to this many bytes,
_GATHER_COUNT: Final = 64  # or this many buffers (IOV_MAX is at least 1024 where it matters)
# What is on its way when a peer dies is sent again, so that this much, twice, is what a death costs.
_SOCKET_BUFFER: Final = 2 << 20

T = TypeVar("T")


class TcpTransport:
    """One connection. Streams follow one another in either direction; a context manager.

    `timeout`: seconds without any progress after which a call fails with TransportError, however long it takes in all. A peer
    that trickles a stream below `min_rate` bytes a second is given up as well.
    """

    def __init__(
        self, connection: socket.socket, *, timeout: float | None = TIMEOUT, min_rate: float = MIN_RATE
    ) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._socket = connection
        self._timeout = timeout
        self._pace = Pace(min_rate)

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
    ) -> "TcpTransport":
        """Connect to a listener. `tls`: see `client_tls`; without it only this machine is spoken to, unless `plaintext` says that
        the network is trusted. Raises TransportError, AuthError where the other end is not who it should be.
        """
        require_protection(host, tls, plaintext)
        try:
            connection = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise TransportError(f"cannot connect to {host}:{port}: {error}") from error
        if tls is not None:
            connection = _handshake(connection, tls, server_hostname=host)
        return cls(connection, timeout=timeout)

    def run(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Hold a conversation (see `session`) and return its result. `within`: seconds that it may take in all.

        Raises what the conversation raises, and TransportError.
        """
        deadline = None if within is None else time.monotonic() + within
        try:
            step = next(conversation)
            while True:
                try:
                    answer = self._step(step, deadline)
                except BaseException as error:
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as stop:
            return stop.value
        finally:
            conversation.close()
            if within is not None:
                self._socket.settimeout(self._timeout)

    def send(self, buffers: Iterable[Any]) -> int:
        """Send every buffer in order; returns the bytes sent. Raises TransportError."""
        batch: list[memoryview] = []
        size = total = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            batch.append(view)
            size += len(view)
            if size >= _GATHER_BYTES or len(batch) == _GATHER_COUNT:
                self._send_all(batch)
                total += size
                size = 0
                batch = []
        self._send_all(batch)
        return total + size

    def receive(self) -> "TcpTransport":
        """What `decode` reads from: exactly one stream is taken, the next one stays."""
        return self

    def readinto(self, buffer: memoryview, /) -> int:
        """Receive straight into `buffer`: at least one byte, 0 once the peer has closed. Raises TransportError."""
        began = time.monotonic()
        got = self._read(buffer)
        self._pace.moved(got, time.monotonic() - began)
        return got

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "TcpTransport":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _step(self, step: Any, deadline: float | None) -> Any:
        if deadline is not None:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        if isinstance(step, Fill):
            return self.readinto(step.buffer) if step.steady else self._read(step.buffer)
        if isinstance(step, Do):
            return self._do(step)
        return self.send(step.buffers)

    def _do(self, step: Do) -> Any:
        if not step.meanwhile or self._timeout is None:
            return step.work()
        with ThreadPoolExecutor(1) as executor:
            work = executor.submit(step.work)
            while True:
                try:
                    return work.result(self._timeout / 4)
                except NotYet:
                    if work.done():  # what the work raised
                        raise
                    self.send([step.meanwhile])

    def _read(self, buffer: memoryview) -> int:
        try:
            return self._socket.recv_into(buffer)
        except OSError as error:
            raise failed("receiving", error) from error

    def _send_all(self, batch: list[memoryview]) -> None:
        try:
            while batch:
                began = time.monotonic()
                sent = self._send_some(batch)
                self._pace.moved(sent, time.monotonic() - began)
                while batch and sent >= len(batch[0]):
                    sent -= len(batch.pop(0))
                if sent:
                    batch[0] = batch[0][sent:]
        except OSError as error:
            if isinstance(error, TransportError):
                raise
            raise failed("sending", error) from error

    def _send_some(self, batch: list[memoryview]) -> int:
        if isinstance(self._socket, ssl.SSLSocket):  # which gathers nothing
            return self._socket.send(batch[0]) if batch[0] else 0
        return self._socket.sendmsg(batch)


class TcpListener:
    """Accepts connections, one at a time; for many, and for those who mean ill, see `AsyncListener`. `port` 0 picks a free one,
    which `port` then tells; a context manager.

    `tls`: see `server_tls`; without it only this machine is listened to, unless `plaintext` says that the network is trusted.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
    ) -> None:
        require_protection(host, tls, plaintext)
        try:
            self._socket = socket.create_server((host, port))
        except OSError as error:
            raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
        self._tls = tls
        self._timeout = timeout
        self._socket.settimeout(timeout)
        self.port: int = self._socket.getsockname()[1]

    def accept(self) -> TcpTransport:
        """Wait for a peer. Raises TransportError after the timeout, AuthError where its certificate is not what it must be."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            raise failed("waiting for a peer", error) from error
        if self._tls is not None:
            connection = _handshake(connection, self._tls, server_side=True)
        return TcpTransport(connection, timeout=self._timeout)

    def close(self) -> None:
        """Stop listening; accepted connections live on."""
        self._socket.close()

    def __enter__(self) -> "TcpListener":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _handshake(connection: socket.socket, tls: ssl.SSLContext, **side: Any) -> ssl.SSLSocket:
    connection.settimeout(HANDSHAKE)
    try:
        return tls.wrap_socket(connection, **side)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise AuthError(f"the other end's certificate is refused: {error.verify_message}") from error
    except OSError as error:
        connection.close()
        raise failed("agreeing on TLS", error) from error
