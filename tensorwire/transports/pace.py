"""When to drop a peer: decided by its progress on the monotonic clock, never by the total time of a transfer."""

import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tensorwire.errors import AuthError, TransportError

TIMEOUT: Final = 60.0  # seconds without a byte
HANDSHAKE: Final = 10.0  # seconds for TLS and for the greeting
MIN_RATE: Final = 1024.0  # bytes a second, over
LOOKS: Final = 4  # checks of what has been sent, within the time after which a peer is dropped
_WINDOW: Final = 30.0  # seconds of waiting
AGREEING: Final = "agreeing on TLS"
_ALERTS: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")  # OpenSSL's names of alerts about our certificate
_PLAIN: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


class Pace:
    """Watches the bytes of a stream, so that a peer cannot hold a connection by trickling."""

    def __init__(self, min_rate: float = MIN_RATE) -> None:
        self._min_rate = min_rate
        self._waited = 0.0
        self._moved = 0

    def moved(self, size: int, seconds: float) -> None:
        """Note that `size` bytes moved after `seconds` of waiting. Raises TransportError if the peer is too slow."""
        self._waited += seconds
        self._moved += size
        if self._waited < _WINDOW:
            return
        if self._moved < self._min_rate * self._waited:
            rate = self._moved / self._waited
            raise TransportError(
                f"the peer is too slow: {rate:.0f} bytes a second, at least {self._min_rate:.0f} are required"
            )
        self._waited, self._moved = 0.0, 0


def said(error: OSError) -> str:
    """The system's text for an error about an address, without the number and address that Python adds."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


class Stall:
    """Distinguishes a peer that takes nothing from a slow one, while bytes wait in the system to be sent.

    The system reports room only when a large part of its buffer has been sent, which takes minutes on a slow link.
    `left`: returns how many bytes wait; fewer than ever before means progress.
    """

    def __init__(self, patience: float, left: Callable[[], int]) -> None:
        self.pause: Final = patience / LOOKS
        self._patience = patience
        self._left = left
        self._least = left()
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Whether the patience is used up. Call it after every `pause`."""
        left, now = self._left(), time.monotonic()
        if left < self._least:
            self._least, self._since = left, now
        return now - self._since >= self._patience


def unacknowledged(connection: socket.socket) -> int:
    """Bytes that the peer's system has not acknowledged yet; 0 if our system does not tell."""
    with suppress(OSError, ValueError):
        if sys.platform == "linux":
            import fcntl
            import termios

            return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def failed(doing: str, error: OSError) -> TransportError | AuthError:
    """The error of this library for an error of a socket."""
    if isinstance(error, TransportError):
        return error
    if isinstance(error, TimeoutError):
        return TransportError(f"no progress while {doing}: timed out")
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthError(f"the other end's certificate is refused: {error.verify_message}")
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLError) and any(word in reason for word in _ALERTS):
        return AuthError(f"the other end refuses our certificate, or one of us has none: {reason}")
    if is_plain(error):
        return TransportError("the other end does not use TLS: one of the two commands runs without it (--plaintext)")
    if doing == AGREEING and isinstance(error, (ConnectionError, ssl.SSLEOFError)):
        return TransportError(f"the peer has closed the connection while {doing}: does it use TLS?")
    return TransportError(f"connection failed while {doing}: {error}")


def is_plain(error: OSError) -> bool:
    """Whether a TLS error means that the peer does not use TLS."""
    return isinstance(error, ssl.SSLError) and any(word in (error.reason or "") for word in _PLAIN)
