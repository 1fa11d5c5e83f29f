"""Blocking TCP, plain on this machine and TLS beyond it: gathered writes of the caller's memory, reads straight into the
destination.
"""

import socket
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeVar

from tensorwire.errors import TransportError
from tensorwire.transfer.session import Conversation, Do, Fill
from tensorwire.transports.pace import HANDSHAKE, MIN_RATE, TIMEOUT, Pace, failed
from tensorwire.transports.tls import require_protection

_GATHER_BYTES: Final = 1 << 20  # buffers are gathered up to this many bytes,
_GATHER_COUNT: Final = 64  # or this many buffers (IOV_MAX is at least 1024 where it matters)
# What is on its way when a peer dies is sent again: what has not left yet, and what has arrived but was not read.
_UNSENT: Final = 1 << 20
_UNREAD: Final = 2 << 20
_EARLY: Final = 64 << 10

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
        tune(connection)
        self._socket = connection
        self._timeout = timeout
        self._deadline: float | None = None
        self._pace = Pace(min_rate)
        self._early = b""  # what was heard while sending

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
        return cls(connection, timeout=timeout, min_rate=min_rate)

    def run(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Hold a conversation (see `session`) and return its result. `within`: seconds that it may take in all.

        Raises what the conversation raises, and TransportError.
        """
        self._deadline = None if within is None else time.monotonic() + within
        try:
            step = next(conversation)
            while True:
                try:
                    answer = self._step(step)
                except BaseException as error:
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as stop:
            return stop.value
        finally:
            self._deadline = None
            conversation.close()

    def send(self, buffers: Iterable[Any]) -> int:
        """Send every buffer in order; returns the bytes sent. Raises TransportError."""
        return self._send(buffers, alert=False)

    def _send(self, buffers: Iterable[Any], *, alert: bool) -> int:
        batch: list[memoryview] = []
        size = total = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            batch.append(view)
            size += len(view)
            if size >= _GATHER_BYTES or len(batch) == _GATHER_COUNT:
                if alert and self._heard():
                    return total
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
        return self._read(buffer, steady=True)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "TcpTransport":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _step(self, step: Any) -> Any:
        if isinstance(step, Fill):
            return self._read(step.buffer, steady=step.steady, within=step.within)
        if isinstance(step, Do):
            return self._do(step)
        return self._send(step.buffers, alert=step.alert)

    def _do(self, step: Do) -> Any:
        if not step.meanwhile or self._timeout is None:
            return step.work()
        with ThreadPoolExecutor(1) as executor:  # which ends when the work does, whatever is raised here
            work = executor.submit(step.work)
            while not wait([work], self._timeout / 4).done:
                with suppress(TransportError):  # whether the peer is still there shows when the work is done
                    self.send([step.meanwhile])
            return work.result()

    def _read(self, buffer: memoryview, *, steady: bool, within: float | None = None) -> int:
        if self._early:
            size = min(len(buffer), len(self._early))
            buffer[:size], self._early = self._early[:size], self._early[size:]
            return size
        began = time.monotonic()
        try:
            self._set_patience(within)
            got = self._socket.recv_into(buffer)
        except OSError as error:
            raise failed("receiving", error) from error
        if steady:
            self._pace.moved(got, time.monotonic() - began)
        return got

    def _send_all(self, batch: list[memoryview]) -> None:
        while batch:
            began = time.monotonic()
            try:
                self._set_patience()
                sent = self._send_some(batch)
            except OSError as error:
                raise failed("sending", self._alert(error)) from error
            self._pace.moved(sent, time.monotonic() - began)
            while batch and sent >= len(batch[0]):
                sent -= len(batch.pop(0))
            if sent:
                batch[0] = batch[0][sent:]

    def _send_some(self, batch: list[memoryview]) -> int:
        if isinstance(self._socket, ssl.SSLSocket):  # which gathers nothing
            return self._socket.send(batch[0]) if batch[0] else 0
        return self._socket.sendmsg(batch)

    def _alert(self, error: OSError) -> OSError:
        """Why TLS has ended, where the peer has said so before it closed; else `error`."""
        if isinstance(self._socket, ssl.SSLSocket) and not isinstance(error, TimeoutError):
            with suppress(ssl.SSLWantReadError):
                try:
                    self._socket.settimeout(0)
                    self._socket.recv(1)
                except ssl.SSLError as said:
                    return said if said.reason else error
                except OSError:
                    pass
        return error

    def _heard(self) -> bool:
        """Whether the peer has said something since we began to send, or is gone."""
        try:
            self._socket.settimeout(0)
            self._early += self._socket.recv(_EARLY)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:  # the next call says which
            pass
        return True

    def _set_patience(self, within: float | None = None) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TransportError("the peer takes longer than it may")
        times = [seconds for seconds in (self._timeout, within, left) if seconds is not None]
        patience = max(min(times), 0.001) if times else None
        if patience != self._socket.gettimeout():
            self._socket.settimeout(patience)


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
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
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


def tune(connection: Any) -> None:
    """Send small messages at once, and keep little in the system's buffers."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    if _may_fix_window():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNREAD)


@cache
def _may_fix_window() -> bool:
    """Whether the system gives the receive buffer we ask for. Where it would give less, and keep it at that, its own choice is
    better: 6 MiB at most by Linux's defaults, the same that cap what may be asked for.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNREAD)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= _UNREAD


def _handshake(connection: socket.socket, tls: ssl.SSLContext, **side: Any) -> ssl.SSLSocket:
    connection.settimeout(HANDSHAKE)
    try:
        return tls.wrap_socket(connection, **side)
    except OSError as error:
        connection.close()
        raise failed("agreeing on TLS", error) from error
