"""What `send` and `receive` share: addresses, TLS options, the report."""

import argparse
import ssl
import sys
import time
from typing import Any, Final

from tensorwire.cli.common import UsageError, print_json
from tensorwire.errors import TensorwireError, TransportError, counted
from tensorwire.transports import client_tls, is_loopback, server_tls

PORT: Final = 7453
_LAST_PORT: Final = 65535
_REMINDER: Final = 30.0  # seconds
SECURITY: Final = """\
Connections beyond this machine use TLS 1.3: the receiver needs --cert and --key, and the sender checks its certificate
against the system's authorities or --ca. --plaintext disables TLS, for a trusted network. `tensorwire certificate`
makes certificates to start with.
"""


def address(text: str) -> tuple[str, int]:
    """An argument HOST:PORT, HOST, :PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = text, str(PORT)
    if not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    if int(port) > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"there is no port {port}: the last is {_LAST_PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def add_security(parser: argparse.ArgumentParser, *, listens: bool) -> None:
    """The options for TLS."""
    whose = "require client certificates of" if listens else "trust only"
    parser.add_argument("--cert", metavar="PEM", help="own certificate")
    parser.add_argument("--key", metavar="PEM", help="its private key")
    parser.add_argument("--ca", metavar="PEM", help=f"{whose} this authority")
    parser.add_argument("--plaintext", action="store_true", help="no TLS: the network is trusted")


def listener_tls(arguments: argparse.Namespace, host: str) -> ssl.SSLContext | None:
    """For `receive`. Raises UsageError, AuthError, TransportError."""
    _check_plaintext(arguments)
    if not (arguments.cert or arguments.key or arguments.ca):
        if not (arguments.plaintext or is_loopback(host)):
            raise TransportError(
                f"listening on {host or 'every address'} needs --cert and --key (`tensorwire certificate` makes a "
                "pair), or --plaintext if the network is trusted"
            )
        return None
    if not (arguments.cert and arguments.key):
        raise UsageError("listening with TLS needs --cert and --key; `tensorwire certificate` makes a pair")
    return server_tls(arguments.cert, arguments.key, ca=arguments.ca)


def connection_tls(arguments: argparse.Namespace, host: str) -> ssl.SSLContext | None:
    """For `send`. Raises UsageError, AuthError."""
    _check_plaintext(arguments)
    if bool(arguments.cert) != bool(arguments.key):
        raise UsageError("--cert and --key must be given together")
    if arguments.plaintext or (is_loopback(host) and not (arguments.ca or arguments.cert)):
        return None
    return client_tls(ca=arguments.ca, certificate=arguments.cert, key=arguments.key)


def _check_plaintext(arguments: argparse.Namespace) -> None:
    if arguments.plaintext and (arguments.cert or arguments.key or arguments.ca):
        raise UsageError("--plaintext cannot be combined with --cert, --key or --ca")


def where(host: str, port: int) -> str:
    """An address as text."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def named(error: TensorwireError, peer: str) -> str:
    """The detail of an error, with the peer that it is about."""
    return error.detail if peer in error.detail else f"{peer}: {error.detail}"


class Retries:
    """Reports that a transfer is retried, and why: each new reason at once, the same reason every half a minute."""

    def __init__(self, host: str, port: int, patience: float) -> None:
        self._where = where(host, port)
        self._patience = patience
        self._said = ""
        self._at = 0.0

    def __call__(self, error: TensorwireError, seconds: float) -> None:
        """Report it, unless it was just reported."""
        now = time.monotonic()
        if error.detail == self._said and now - self._at < _REMINDER:
            return
        self._said, self._at = error.detail, now
        left = f"trying again until {self._patience:g} s have passed without progress"
        print(f"{named(error, self._where)}; {left}", file=sys.stderr, flush=True)


def report(verb: str, name: str, result: dict[str, Any], *, as_json: bool) -> None:
    """Report how a transfer ended: one line for people, or JSON."""
    if as_json:
        print_json(result)
        return
    rate = result["moved"] / max(result["seconds"], 1e-9) / 1e6
    resumed = f", {result['moved']:,} of them now" if result["moved"] < result["bytes"] else ""
    line = f"{verb} {name}: {counted(result['bytes'], 'byte')}{resumed} in {result['seconds']:.1f} s ({rate:.0f} MB/s)"
    print(f"{line}, stream digest {result['stream_digest']}", file=sys.stderr)
