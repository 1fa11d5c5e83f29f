"""Blocking TCP, plain on this machine and TLS beyond it: writes are gathered, reads go straight to the destination."""

import selectors
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeVar

from tensorwire.errors import TransportError
from tensorwire.transfer import Conversation
from tensorwire.transports.addresses import check_address, connected, listening
from tensorwire.transports.driver import Buffer, Early, Pulse, Transport, completed, run_of
from tensorwire.transports.pace import (
    AGREEING,
    HANDSHAKE,
    LOOKS,
    MIN_RATE,
    TIMEOUT,
    Stall,
    failed,
    is_plain,
    said,
    unacknowledged,
)
from tensorwire.transports.tls import common_name, peer_names, require_protection

# What is on its way when a peer dies is sent again: what has not left yet, and what has arrived but was not read.
_UNSENT: Final = 1 << 20
_UNREAD: Final = 2 << 20
_EARLY: Final = 64 << 10
_LAST_WORDS: Final = 2.0  # seconds to be heard once a handshake has failed
_GATHERS: Final = hasattr(socket.socket, "sendmsg")  # not on Windows

T = TypeVar("T")
Skin = TypeVar("Skin", bound="BlockingTransport")


class BlockingTransport(Transport):
    """The calls of a transport, each of which returns when it is done; a context manager.

    Streams follow one another in either direction.
    """

    def run(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Hold a conversation (see `tensorwire.transfer`) and return its result.

        `within`: seconds that it may take in all.

        Raises what the conversation raises, and TransportError.
        """
        return completed(self.driver.converse(conversation, within=within))

    def send(self, buffers: Iterable[Buffer]) -> int:
        """Send every buffer in order; returns the bytes sent. Raises TransportError.

        Buffers are gathered: up to a mebibyte waits for the next one. An empty buffer says that the next may be long in
        coming, and what is gathered leaves; `tensorwire.encode` gives one behind each layer of a generator.
        """
        return completed(self.driver.send(buffers))

    def receive(self: Skin) -> Skin:
        """What `decode` reads from: exactly one stream is taken, the next one stays."""
        return self

    def readinto(self, buffer: memoryview, /) -> int:
        """Receive straight into `buffer`: at least one byte, 0 once the peer has closed. Raises TransportError."""
        return completed(self.driver.read(buffer))

    def __enter__(self: Skin) -> Skin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TcpTransport(BlockingTransport):
    """One connection over TCP. Made by `connect` and by `TcpListener.accept`.

    `timeout`: seconds without any progress after which a call fails with TransportError, however long it takes in all.
    A peer that trickles a stream below `min_rate` bytes a second is given up as well.
    """

    def __init__(
        self, connection: socket.socket, *, timeout: float | None = TIMEOUT, min_rate: float = MIN_RATE
    ) -> None:
        connection.settimeout(timeout)
        tune(connection)
        super().__init__(SocketWire(connection), timeout=timeout, min_rate=min_rate)

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
        min_rate: float = MIN_RATE,
    ) -> "TcpTransport":
        """Connect to a listener, at the first of its addresses that answers, all within `timeout`.

        `tls`: see `client_tls`; without it only this machine is spoken to, unless `plaintext` says that the network is
        trusted. Raises TransportError, AuthError where the other end is not who it should be.
        """
        check_address(host, port)
        require_protection(host, tls, plaintext)
        try:
            connection = connected(host, port, timeout)
        except OSError as error:
            raise TransportError(f"cannot connect to {host}:{port}: {said(error)}") from error
        if tls is not None:
            connection = _handshake(tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False))
        return cls(connection, timeout=timeout, min_rate=min_rate)


class BlockingWire:
    """What the wires of blocking transports have in common: nothing stays behind when a call returns."""

    peer_name: str | None = None
    peer_names: frozenset[str] | None = None

    def __init__(self) -> None:
        self.early = Early()

    async def flush(self, patience: float | None) -> None:
        """`Wire.flush`: `write` has done it."""

    async def work(self, work: Callable[[], Any], pause: float | None, pulse: Pulse) -> Any:
        """`Wire.work`: in a thread of its own where the peer has to be told meanwhile that we are alive."""
        if pause is None:
            return work()
        with ThreadPoolExecutor(1) as executor:  # which ends when the work does, whatever is raised here
            working = executor.submit(work)
            while not wait([working], pause).done:
                await pulse()
            return working.result()

    async def wait_closed(self) -> None:
        """`Wire.wait_closed`: `close` has done it."""


class SocketWire(BlockingWire):
    """A blocking socket as a `Wire`."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._socket = connection
        self._seconds = connection.gettimeout()
        if isinstance(connection, ssl.SSLSocket):
            certificate = connection.getpeercert()
            self.peer_name = common_name(certificate)
            self.peer_names = peer_names(connection.context, certificate)

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        """`Wire.read`."""
        try:
            self._wait_at_most(patience)
            return self._socket.recv_into(buffer)
        except OSError as error:
            raise failed("receiving", error) from error

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        """`Wire.write`."""
        gathers = _GATHERS and not isinstance(self._socket, ssl.SSLSocket)
        data: Any = views if gathers else run_of(views)
        stall: Stall | None = None
        while True:
            try:
                self._wait_at_most(None if patience is None else patience / LOOKS)
                return self._socket.sendmsg(data) if gathers else self._socket.send(data)
            except TimeoutError as error:
                assert patience is not None
                stall = stall or Stall(patience, lambda: unacknowledged(self._socket))
                if stall.is_over():
                    raise failed("sending", error) from error
            except OSError as error:
                raise failed("sending", self._alert(error)) from error

    async def heard(self) -> bool:
        """`Wire.heard`."""
        try:
            self._wait_at_most(0)
            self.early += self._socket.recv(_EARLY)
        except (BlockingIOError, ssl.SSLWantReadError):
            return bool(self.early)
        except OSError:  # the next call says which
            pass
        return True

    def close(self) -> None:
        """`Wire.close`."""
        self._socket.close()

    def _wait_at_most(self, seconds: float | None) -> None:
        if seconds != self._seconds:
            self._socket.settimeout(seconds)
            self._seconds = seconds

    def _alert(self, error: OSError) -> OSError:
        """Why TLS has ended, where the peer has said so before it closed; else `error`."""
        if isinstance(self._socket, ssl.SSLSocket) and not isinstance(error, TimeoutError):
            with suppress(ssl.SSLWantReadError):
                try:
                    self._wait_at_most(0)
                    self._socket.recv(1)
                except ssl.SSLError as said:
                    return said if said.reason else error
                except OSError:
                    pass
        return error


class TcpListener:
    """Accepts connections one at a time, each when `accept` is called; a context manager.

    `host`: "" is every address of this machine, "0.0.0.0" every one of IPv4, "::" of IPv6; a name is all addresses that
    it has. `port` 0 picks one that is free at all of them, which `port` then tells.

    `tls`: see `server_tls`; without it only this machine is listened to, unless `plaintext` says that the network is
    trusted. `timeout` and `min_rate` are those of the transports, and `accept` waits for `timeout` at most. It has no
    `connections` and no `on_error`, as `AsyncListener` has: how many are served, and what comes of an error, is up to
    whoever calls `accept`.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        timeout: float | None = TIMEOUT,
        min_rate: float = MIN_RATE,
    ) -> None:
        check_address(host, port)
        require_protection(host, tls, plaintext)
        try:
            self._sockets = listening(host, port)
        except OSError as error:
            raise TransportError(f"cannot listen on {host}:{port}: {said(error)}") from error
        self._selector = selectors.DefaultSelector()
        for each in self._sockets:
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ)
        self._tls = tls
        self._timeout = timeout
        self._min_rate = min_rate
        self.host = host
        self.port: int = self._sockets[0].getsockname()[1]

    def accept(self) -> TcpTransport:
        """Wait for a peer.

        Raises TransportError after the timeout, AuthError where its certificate is not what it must be; the next call
        waits for another peer.
        """
        try:
            connection = self._next_peer()
        except OSError as error:
            raise failed("waiting for a peer", error) from error
        if self._tls is not None:
            connection = _handshake(self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False))
        return TcpTransport(connection, timeout=self._timeout, min_rate=self._min_rate)

    def close(self) -> None:
        """Stop listening; accepted connections live on."""
        self._selector.close()
        for each in self._sockets:
            each.close()

    def __enter__(self) -> "TcpListener":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _next_peer(self) -> socket.socket:
        until = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            left = None if until is None else max(until - time.monotonic(), 0)
            ready = self._selector.select(left)
            if not ready:
                raise TimeoutError
            listener = ready[0][0].fileobj
            assert isinstance(listener, socket.socket)
            with suppress(BlockingIOError):  # it has gone again
                return listener.accept()[0]


def tune(connection: socket.socket) -> None:
    """Send small messages at once, and keep little in the system's buffers."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    if _may_fix_window():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNREAD)


@cache
def _may_fix_window() -> bool:
    """Whether the system gives the receive buffer we ask for.

    Where it would give less, and keep it at that, its own choice is better: 6 MiB at most by Linux's defaults, the same
    that cap what may be asked for.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNREAD)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= _UNREAD


def _handshake(connection: ssl.SSLSocket) -> ssl.SSLSocket:
    connection.settimeout(HANDSHAKE)
    try:
        connection.do_handshake()
        return connection
    except OSError as error:
        if isinstance(error, ssl.SSLError) and not is_plain(error):  # who speaks without TLS would not hear it
            _be_heard(connection)
        connection.close()
        raise failed(AGREEING, error) from error


def _be_heard(connection: ssl.SSLSocket) -> None:
    """Let the alert reach the peer: closing with something unread would reset the connection, and lose it."""
    plain = socket.socket(fileno=connection.detach())
    with plain, suppress(OSError):
        plain.shutdown(socket.SHUT_WR)
        plain.settimeout(_LAST_WORDS)
        until = time.monotonic() + _LAST_WORDS
        while time.monotonic() < until and plain.recv(_EARLY):
            pass
