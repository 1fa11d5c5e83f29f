"""`tensorwire receive`: wait for a `tensorwire send` and put what comes into a file."""

import argparse
import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from tensorwire.cli import decode
from tensorwire.cli.common import PIPE, Progress, add_limits, binary_stdout, verb
from tensorwire.cli.network import PORT, SECURITY, add_security, address, listener_tls, report
from tensorwire.cli.outputs import add_force, check_output, exists
from tensorwire.cli.process import run_async
from tensorwire.errors import SchemaError, TensorwireError, TransportError, show
from tensorwire.limits import Limits
from tensorwire.storage.parts import Part, has_note, scratch
from tensorwire.streams import size_text
from tensorwire.transfer import Offer, Outcome, Recording, RefusedError, greet, receive_stream
from tensorwire.transports import HANDSHAKE, TIMEOUT, AsyncListener, AsyncTransport
from tensorwire.wire import FileItem, Item, TensorItem

_TEXT: Final = f"""\
OUT becomes what `tensorwire decode` makes of a stream, by its name; *.tw keeps the stream as it was sent. It appears
only when all is verified. What has arrived waits beside it under a hidden name (*.part), and the transfer goes on
there when the sender, or this command, is started again.

{SECURITY}
examples:
  tensorwire receive received.safetensors --listen 0.0.0.0 \\
      --cert host.example.pem --key host.example.key
  tensorwire receive received.tw
"""
_CHUNK: Final = 1 << 20


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "receive", _run, summary="receive a model or a file from a `tensorwire send`", text=_TEXT)
    parser.add_argument("output", metavar="OUT", help="a file, or - for stdout")
    parser.add_argument("--to", choices=(*decode.KINDS, "tw"), help="what OUT becomes, whatever its name")
    where = ("127.0.0.1", PORT)
    listen = parser.add_argument("--listen", metavar="HOST:PORT", type=address, default=where)
    listen.help = f"where to listen (127.0.0.1:{PORT}; port 0 picks one)"
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    add_force(parser)
    add_limits(parser)
    add_security(parser, listens=True)


def _run(arguments: argparse.Namespace) -> int:
    _check_output(arguments)
    kind = arguments.to or ("tw" if arguments.output.endswith(".tw") else decode.kind_of(arguments.output))
    if arguments.output != PIPE:
        result = run_async(_Reception(arguments, arguments.output, kind).result())
    else:
        out = binary_stdout()
        with scratch() as path:
            result = run_async(_Reception(arguments, path, kind).result())
            with open(path, "rb") as file:
                shutil.copyfileobj(file, out, _CHUNK)
    report("received", arguments.output, result, as_json=arguments.json)
    return 0


def _check_output(arguments: argparse.Namespace) -> None:
    """Refuse an OUT that could not be written, or is there, unless a transfer to it may only lack its receipt."""
    output = arguments.output
    read = (arguments.cert, arguments.key, arguments.ca)
    check_output(output, inputs=read, force=arguments.force or (output != PIPE and has_note(output)))


class _Reception:
    """Serves whoever connects until one transfer is through."""

    def __init__(self, arguments: argparse.Namespace, path: str, kind: str) -> None:
        self._arguments = arguments
        self._path = path
        self._kind = kind
        self._arrival: _Arrival | None = None
        self._through: bytes | None = None  # the transfer that is
        self._opening = threading.Lock()
        self._stopping = threading.Event()

    async def result(self) -> dict[str, Any]:
        """Listen until a transfer is through, and give its report."""
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        host, port = self._arguments.listen
        options = {"tls": listener_tls(self._arguments, host), "plaintext": self._arguments.plaintext}
        async with AsyncListener(self._serve, host, port, on_error=_complain, **options) as listener:
            shown = f"[{host}]" if ":" in host else host
            print(f"listening on {shown}:{listener.port}", file=sys.stderr, flush=True)
            try:
                outcome = await self._outcome
            finally:
                self._stopping.set()
                if self._outcome.cancelled():
                    self._say_what_is_left()
        assert self._arrival is not None
        result = {"bytes": outcome.end.offset, "moved": self._arrival.moved, "seconds": self._arrival.seconds}
        return {**result, "stream_digest": outcome.digest}

    def _may_write(self, transfer: bytes) -> bool:
        """Whether no file is there, or the one that this transfer has become."""
        if not exists(self._path):
            return True
        part = Part(self._path, transfer)
        try:
            return part.note() is not None
        finally:
            part.close()

    def _say_what_is_left(self) -> None:
        arrival = self._arrival
        if arrival is not None and arrival.open and self._arguments.output != PIPE:
            size = size_text(arrival.position.offset)
            print(f"{size} are kept for the next attempt: start the same command again", file=sys.stderr, flush=True)

    async def _serve(self, transport: AsyncTransport) -> None:
        await transport.run(greet(), within=HANDSHAKE)
        offer, outcome, acknowledged = await transport.run(receive_stream(self._open))
        self._through = offer.transfer
        if not acknowledged:  # it may come again for its receipt
            await asyncio.sleep(TIMEOUT)
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def _open(self, offer: Offer) -> "_Arrival":
        # This runs in a thread per connection, and takes long where much is to be verified again.
        busy = RefusedError("another sender is at it", kind="busy", retryable=True)
        if not self._opening.acquire(blocking=False):
            raise busy
        try:
            if self._through not in (None, offer.transfer):
                raise RefusedError("another transfer is through", kind="done")
            if self._arrival is not None and self._arrival.open:
                raise busy
            if not (self._arguments.force or self._may_write(offer.transfer)):
                raise RefusedError("what this receiver is to write exists already", kind="exists")
            self._arrival = _Arrival(self._path, self._kind, offer, self._stopping, self._arguments.limits)
            return self._arrival
        finally:
            self._opening.release()


class _Arrival(Recording):
    """A recording with progress that becomes a file of the kind asked for."""

    def __init__(self, path: str, kind: str, offer: Offer, stopping: threading.Event, limits: Limits) -> None:
        self.open = True
        self._stopping = stopping
        self._accepts = limits
        self.moved = 0
        self._kind = kind
        self._began = time.monotonic()
        finish = None if kind == "tw" else self._decode
        super().__init__(path, offer.transfer, check=lambda: self._check_item, finish=finish, limits=limits)
        print(f"receiving {show(offer.name)}", file=sys.stderr)
        self._start = self.position.offset
        self._progress = Progress(offer.size, self._start)

    def buffer_updated(self, size: int) -> None:
        super().buffer_updated(size)
        self.moved += size
        self._progress.reach(self._start + self.moved)

    def commit(self) -> Outcome:
        self.seconds = time.monotonic() - self._began
        return super().commit()

    def close(self) -> None:
        super().close()
        self.open = False

    def _check_item(self, item: Item) -> None:
        self._check_time()
        unwanted = TensorItem if self._kind == "file" else FileItem
        if self._kind != "tw" and isinstance(item, unwanted):
            wanted = "a file" if self._kind == "file" else "tensors"
            raise SchemaError(f"{wanted} is to be received; this is not", item=item.name)

    def _decode(self, part: str) -> None:
        with open(part, "rb", buffering=0) as file:
            decode.write(self._chunks(file), self.path, self._kind, self._accepts)

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(_CHUNK):
            self._check_time()
            yield chunk

    def _check_time(self) -> None:
        """Raise in a thread, which no signal ends, once the command is to end."""
        if self._stopping.is_set():
            raise TransportError("this receiver is being stopped")


def _complain(error: TensorwireError) -> None:
    print(f"tensorwire: {error}", file=sys.stderr)
