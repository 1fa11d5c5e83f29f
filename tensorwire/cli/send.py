"""`tensorwire send`: a model or any file to another machine."""

import argparse
import json
import os
import ssl
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Final

import tensorwire
from tensorwire.cli import inputs
from tensorwire.cli.common import PIPE, CodecArgument, Progress, UsageError, codec_choice, verb
from tensorwire.cli.network import SECURITY, add_security, address, connection_tls, report
from tensorwire.errors import UnsupportedError, show
from tensorwire.transfer import Offer, Peer, Position, Regenerated
from tensorwire.transports import PATIENCE, TcpTransport, send_resuming

_TEXT: Final = f"""\
{inputs.HELP}
When the connection breaks, or either side is killed and started again with the
same arguments, the transfer goes on from the last frame that the receiver has verified.

{SECURITY}
examples:
  tensorwire send model.safetensors host.example:7453 --codec nf4 --ca authority.pem
  tensorwire send checkpoint.bin 127.0.0.1
"""


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "send", _run, summary="send a model or a file to a `tensorwire receive`", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a file, or - for stdin (which cannot be resumed)")
    parser.add_argument("address", metavar="HOST:PORT", type=address, help="where the receiver listens")
    parser.add_argument("--codec", type=codec_choice, default="raw", metavar="SPEC", help="how to encode (raw)")
    inputs.add_kind(parser)
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
        raise UsageError("send to which host? HOST:PORT")
    tls = connection_tls(arguments, host)
    with inputs.opened(arguments.input, arguments.kind, arguments.codec) as source:
        result = _send(source, arguments, tls)
    report("sent", arguments.input, result, as_json=arguments.json)
    return 0


def _send(source: inputs.Input, arguments: argparse.Namespace, tls: ssl.SSLContext | None) -> dict[str, Any]:
    host, port = arguments.address
    began = time.monotonic()
    outgoing = _Outgoing(source)
    receipt = send_resuming(
        lambda: TcpTransport.connect(host, port, tls=tls, plaintext=arguments.plaintext),
        Offer(_transfer(arguments.input, source), os.path.basename(arguments.input), outgoing.size),
        outgoing,
        patience=arguments.patience,
        check_peer=lambda peer: _check_codecs(peer, source.codec),
    )
    seconds = time.monotonic() - began
    return {"bytes": receipt.size, "moved": receipt.sent, "seconds": seconds, "stream_digest": receipt.digest}


def _transfer(path: str, source: inputs.Input) -> bytes:
    """The same for the same file and codec, whoever asks and whenever."""
    if path == PIPE:
        return os.urandom(32)
    status = os.stat(path)
    about = [os.path.basename(path), status.st_size, status.st_mtime_ns, source.codec, source.kind]
    return sha256(json.dumps(about).encode()).digest()


def _check_codecs(peer: Peer, codec: CodecArgument) -> None:
    for spec in [codec] if isinstance(codec, str) else codec.values():
        missing = {stage[0] for stage in tensorwire.codec(spec).stages()} - set(peer.codecs)
        if missing:
            raise UnsupportedError(
                f"the receiver ({show(peer.software)}) does not know codec {spec}: ids {sorted(missing)}"
            )


class _Outgoing:
    """The stream of what is sent, with progress."""

    def __init__(self, source: inputs.Input) -> None:
        self.size = source.size()
        self._pipe = source.path == PIPE
        self._began = False
        self._stream = Regenerated(source.stream)

    def after(self, position: Position) -> Iterator[Any]:
        if self._pipe and self._began:
            raise UsageError("the connection broke, and what came from stdin cannot be read again")
        self._began = True
        with Progress(self.size, position.offset) as progress:
            for buffer in self._stream.after(position):
                yield buffer
                progress.update(len(buffer))

    @property
    def digest(self) -> str:
        return self._stream.digest
