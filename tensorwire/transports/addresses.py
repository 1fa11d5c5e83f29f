"""Chooses among the addresses of a host: connects to the first that answers, and listens at all of them."""

import errno
import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Final

from tensorwire.errors import ArgumentError, show

AHEAD: Final = 0.25  # seconds that an address has before the next is tried beside it (RFC 8305, section 5)
_TRIES: Final = 16  # ports that one family has free and the other may not
_LAST_PORT: Final = (1 << 16) - 1
_BACKLOG: Final = 1024
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR)

_Info = tuple[Any, ...]  # of `getaddrinfo`: family, type, protocol, name, address


def check_address(host: object, port: object) -> None:
    """Raise ArgumentError for what is no host and port: of a port beyond 65535 the system takes what is left over."""
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= _LAST_PORT:
        raise ArgumentError(f"a port is a number from 0 to {_LAST_PORT}, not {port!r:.40}")
    if not isinstance(host, str):
        raise ArgumentError(f"a host is text, not {type(host).__name__}")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ArgumentError(f"{show(host)} is no name of a host: between dots stand 1 to 63 characters") from None


def connected(host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to the first of the host's addresses that answers, all within `timeout` seconds.

    Each address is tried a quarter of a second after the previous one, or once that has failed, and the attempts run in
    parallel, so an address that never answers does not use up the time of the others. Raises OSError.
    """
    race = _Race(_interleaved(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while (winner := race.step(deadline)) is None:
            pass
        return winner
    finally:
        race.close()


class _Race:
    """Parallel attempts to connect."""

    def __init__(self, infos: Iterator[_Info]) -> None:
        self._infos = infos
        self._info = next(infos, None)
        self._begin_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._error: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    def step(self, deadline: float | None) -> socket.socket | None:
        """Start the attempts that are due, and wait for running ones. Returns a connection, if there is one."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
        if self._info is not None and (now >= self._begin_at or not self._selector.get_map()):
            return self._begin(now)
        if not self._selector.get_map():
            raise self._error
        ends = [end for end in (deadline, self._begin_at if self._info is not None else None) if end is not None]
        for key, _ in self._selector.select(min(ends) - now if ends else None):
            if (winner := self._ended(key.fileobj)) is not None:
                return winner
        return None

    def close(self) -> None:
        """Abandon the running attempts."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # a socket of ours
        self._selector.close()

    def _begin(self, now: float) -> socket.socket | None:
        assert self._info is not None
        family, kind, protocol, _, address = self._info
        self._info, self._begin_at = next(self._infos, None), now + AHEAD
        try:
            attempt = socket.socket(family, kind, protocol)
        except OSError as error:  # a family that this machine does not support
            self._error = error
            return None
        attempt.setblocking(False)
        try:
            number = attempt.connect_ex(address)
        except OSError as error:
            self._failed(attempt, error)
            return None
        if number == 0:
            return attempt
        if number in _UNDER_WAY:
            self._selector.register(attempt, selectors.EVENT_WRITE)
        else:
            self._failed(attempt, OSError(number, os.strerror(number)))
        return None

    def _ended(self, attempt: Any) -> socket.socket | None:
        self._selector.unregister(attempt)
        number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number == 0:
            return attempt  # type: ignore[no-any-return]  # a socket of ours
        self._failed(attempt, OSError(number, os.strerror(number)))
        return None

    def _failed(self, attempt: socket.socket, error: OSError) -> None:
        attempt.close()
        self._error = error
        self._begin_at = time.monotonic()


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a host, all at one port; port 0 picks one. Raises OSError.

    "" stands for every address, of both families where the machine has them. "::" is every address of IPv6 alone, and
    "0.0.0.0" of IPv4.
    """
    infos = list(dict.fromkeys(_interleaved(_local(host, port))))
    for left in reversed(range(_TRIES)):
        try:
            return _listening(infos, port)
        except OSError as error:
            if port or not left or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError  # the last one was raised


def _local(host: str, port: int) -> list[_Info]:
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _listening(infos: list[_Info], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in infos:
            try:
                made = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                if len(infos) == 1:
                    raise
                continue  # a family that this machine does not support
            sockets.append(made)
            if os.name == "posix":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                made.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or len(infos) == 1:
                    raise
                sockets.pop().close()  # IPv6 that is switched off
                continue
            port = made.getsockname()[1]
            made.listen(_BACKLOG)
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return sockets
    except BaseException:
        for made in sockets:
            with suppress(OSError):
                made.close()
        raise


def _interleaved(infos: list[_Info]) -> Iterator[_Info]:
    """The families in turn, each in the order in which the system prefers its addresses (RFC 8305, section 4)."""
    families: dict[Any, list[_Info]] = {}
    for info in infos:
        families.setdefault(info[0], []).append(info)
    return (info for row in zip_longest(*families.values()) for info in row if info is not None)
