"""Blocking TCP: gathered writes of the caller's memory, reads straight into the destination."""

import socket
from collections.abc import Iterable
from typing import Any, Final

from tensorwire.errors import TransportError

_GATHER_BYTES: Final = 1 << 20  # buffers are gathered up to this many bytes,
_GATHER_COUNT: Final = 64  # or this many buffers (IOV_MAX is at least 1024 where it matters)
_SOCKET_BUFFER: Final = 4 << 20
_TIMEOUT: Final = 60.0


class TcpTransport:
    """One connection. Streams follow one another in either direction; a context manager.

    `timeout`: seconds without any progress after which a call fails with TransportError.
    """

    def __init__(self, connection: socket.socket, *, timeout: float | None = _TIMEOUT) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._socket = connection

    @classmethod
    def connect(cls, host: str, port: int, *, timeout: float | None = _TIMEOUT) -> "TcpTransport":
        """Connect to a listener. Raises TransportError."""
        try:
            return cls(socket.create_connection((host, port), timeout), timeout=timeout)
        except OSError as error:
            raise TransportError(f"cannot connect to {host}:{port}: {error}") from error

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
        try:
            return self._socket.recv_into(buffer)
        except OSError as error:
            raise _failed("receiving", error) from error

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "TcpTransport":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send_all(self, batch: list[memoryview]) -> None:
        try:
            while batch:
                sent = self._socket.sendmsg(batch)
                while batch and sent >= len(batch[0]):
                    sent -= len(batch.pop(0))
                if sent:
                    batch[0] = batch[0][sent:]
        except OSError as error:
            raise _failed("sending", error) from error


class TcpListener:
    """Accepts connections. `port` 0 picks a free one, which `port` then tells; a context manager."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, timeout: float | None = _TIMEOUT) -> None:
        try:
            self._socket = socket.create_server((host, port))
        except OSError as error:
            raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
        self._timeout = timeout
        self._socket.settimeout(timeout)
        self.port: int = self._socket.getsockname()[1]

    def accept(self) -> TcpTransport:
        """Wait for a peer. Raises TransportError after the timeout."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            raise _failed("waiting for a peer", error) from error
        return TcpTransport(connection, timeout=self._timeout)

    def close(self) -> None:
        """Stop listening; accepted connections live on."""
        self._socket.close()

    def __enter__(self) -> "TcpListener":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _failed(doing: str, error: OSError) -> TransportError:
    if isinstance(error, TimeoutError):
        return TransportError(f"no progress while {doing}: timed out")
    return TransportError(f"connection failed while {doing}: {error}")
