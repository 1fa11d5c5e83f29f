"""`tensorwire send`: send a model or any file to another machine."""

import argparse
import json
import os
import ssl
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Final

import tensorwire
from tensorwire import Report
from tensorwire.cli import inputs
from tensorwire.cli.common import PIPE, CodecArgument, UsageError, add_limits, codec_choice, tracked, verb
from tensorwire.cli.network import SECURITY, Retries, add_security, address, connection_tls, named, report, where
from tensorwire.errors import AuthError, TransportError, UnsupportedError, show
from tensorwire.transfer import Offer, Peer, Position, Regenerated, version_of
from tensorwire.transports import PATIENCE, TcpTransport, send_resuming

_TEXT: Final = f"""\
{inputs.HELP}
If the connection breaks, or either side is killed and restarted with the same arguments, the transfer resumes after
the last frame that the receiver has verified.

{SECURITY}
examples:
  tensorwire send model.safetensors host.example --codec nf4 --ca authority.pem
  tensorwire send checkpoint.bin 127.0.0.1
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "send", _run, summary="send a model or a file to `tensorwire receive`", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a file, or - for stdin (which cannot be resumed)")
    parser.add_argument("address", metavar="HOST:PORT", type=address, help="where the receiver listens")
    parser.add_argument(
        "--codec", type=codec_choice, default="raw", metavar="SPEC", help="codec, or rules by name (raw)"
    )
    inputs.add_kind(parser)
    add_limits(parser)
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="S",
        help=f"give up after S s without progress ({PATIENCE:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    add_security(parser, listens=False)


def _run(arguments: argparse.Namespace) -> int:
    host, _ = arguments.address
    if not host:
        raise UsageError("give the host to send to: HOST:PORT")
    tls = connection_tls(arguments, host)
    if arguments.input != PIPE:
        os.stat(arguments.input)  # now, rather than after waiting for the receiver
    with inputs.opened(arguments) as source:
        try:
            result = _send(source, arguments, tls)
        except (TransportError, AuthError) as error:
            error.detail = named(error, where(*arguments.address))
            raise
    report("sent", arguments.input, result, as_json=arguments.json)
    return 0


def _send(source: inputs.Input, arguments: argparse.Namespace, tls: ssl.SSLContext | None) -> dict[str, Any]:
    host, port = arguments.address
    began = time.monotonic()
    outgoing = _Outgoing(source)
    receipt = send_resuming(
        lambda: TcpTransport.connect(host, port, tls=tls, plaintext=arguments.plaintext),
        Offer(_transfer(arguments.input, source), source.name, source.stream_size()),
        outgoing,
        patience=arguments.patience,
        check_peer=lambda peer: _check_codecs(peer, source.codec),
        on_retry=Retries(host, port, arguments.patience),
    )
    seconds = time.monotonic() - began
    print(outgoing.report, file=sys.stderr)
    return {"bytes": receipt.size, "moved": receipt.sent, "seconds": seconds, "stream_digest": receipt.digest}


def _transfer(path: str, source: inputs.Input) -> bytes:
    """An identifier that is always the same for the same files and codec."""
    if path == PIPE:
        return os.urandom(32)
    states = ((each, os.stat(each)) for each in inputs.files(path))
    about = [[os.path.basename(each), status.st_size, status.st_mtime_ns] for each, status in states]
    return sha256(json.dumps([about, source.codec, source.kind]).encode()).digest()


def _check_codecs(peer: Peer, codec: CodecArgument) -> None:
    for spec in [codec] if isinstance(codec, str) else codec.values():
        missing = {stage[0] for stage in tensorwire.codec(spec).stages()} - set(peer.codecs)
        if missing:
            raise UnsupportedError(
                f"the receiver ({show(peer.software)}) does not know codec {spec}: ids {sorted(missing)}"
            )


class _Outgoing:
    """The outgoing stream, with progress and a report."""

    def __init__(self, source: inputs.Input) -> None:
        self.report = Report()
        self._source = source
        self._began = False
        self._stream = Regenerated(self._encoded, version=self._version)

    def after(self, position: Position) -> Iterator[Any]:
        if self._source.path == PIPE and self._began:
            raise UsageError("the connection broke, and stdin cannot be read again")
        self._began = True
        return tracked(self._stream.after(position), self._source.size(), lambda: self.report.bytes_in)

    @property
    def digest(self) -> str:
        return self._stream.digest

    def _version(self) -> object:
        return None if self._source.path == PIPE else version_of(*inputs.files(self._source.path))

    def _encoded(self) -> Iterator[Any]:
        self.report = Report()  # of this attempt, which encodes the whole stream again
        return self._source.stream(report=self.report)
