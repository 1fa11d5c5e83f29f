"""`tensorwire receive`: wait for `tensorwire send` and write what it sends to a file."""

import argparse
import asyncio
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final

from tensorwire.cli import decode
from tensorwire.cli.common import PIPE, Progress, add_limits, binary_stdout, verb
from tensorwire.cli.network import PORT, SECURITY, add_security, address, listener_tls, report, where
from tensorwire.cli.outputs import add_force, check_output, exists
from tensorwire.cli.process import run_async
from tensorwire.errors import SchemaError, StorageError, TensorwireError, TransportError, show
from tensorwire.limits import Limits
from tensorwire.storage.parts import Part, has_note, scratch
from tensorwire.streams import size_text
from tensorwire.transfer import Offer, Outcome, Recording, RefusedError, greet, receive_stream
from tensorwire.transports import HANDSHAKE, TIMEOUT, AsyncListener, AsyncTransport
from tensorwire.wire import FileItem, Item, TensorItem

_TEXT: Final = f"""\
OUT is any kind of file that `tensorwire decode` writes, by its name; *.tw keeps the stream as it was sent. It appears
only when everything is verified. Until then, received data is kept beside it under a hidden name (*.part), and the
transfer resumes from there when the sender, or this command, is restarted.

{SECURITY}
examples:
  tensorwire receive received.safetensors --listen 0.0.0.0 \\
      --cert host.example.pem --key host.example.key
  tensorwire receive received.tw
"""
_CHUNK: Final = 1 << 20
_LOOK: Final = 0.2  # seconds between checks, while waiting, whether the command is to end


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "receive", _run, summary="receive a model or a file from `tensorwire send`", text=_TEXT)
    parser.add_argument("output", metavar="OUT", help="a file, or - for stdout")
    parser.add_argument("--to", choices=(*decode.KINDS, "tw"), help="the kind of OUT, whatever its name")
    listen = parser.add_argument("--listen", metavar="HOST:PORT", type=address, default=("127.0.0.1", PORT))
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
            result = run_async(_Reception(arguments, path, kind, out).result())
    report("received", arguments.output, result, as_json=arguments.json)
    return 0


def _check_output(arguments: argparse.Namespace) -> None:
    """Refuse an OUT that cannot be written, or exists and is not the result of a transfer that may lack its receipt."""
    output = arguments.output
    read = (arguments.cert, arguments.key, arguments.ca)
    check_output(output, inputs=read, force=arguments.force or (output != PIPE and has_note(output)))


class _Reception:
    """Serves connections until one transfer is complete. `out`: a stream that then gets the file at `path`."""

    def __init__(self, arguments: argparse.Namespace, path: str, kind: str, out: BinaryIO | None = None) -> None:
        self._arguments = arguments
        self._path = path
        self._kind = kind
        self._out = out
        self._arrival: _Arrival | None = None
        self._through: bytes | None = None  # the transfer that is complete
        self._broken: OSError | None = None  # why writing to `out` failed
        self._deciding = threading.Lock()  # guards who may send, and what is complete
        self._stopping = threading.Event()

    async def result(self) -> dict[str, Any]:
        """Listen until a transfer is complete, and return its report."""
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        host, port = self._arguments.listen
        options = {"tls": listener_tls(self._arguments, host), "plaintext": self._arguments.plaintext}
        async with AsyncListener(self._serve, host, port, on_error=_complain, **options) as listener:
            print(f"listening on {where(host, listener.port)}", file=sys.stderr, flush=True)
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
        """Whether no file exists, or only the one that this transfer has become."""
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
            print(f"{size} are kept for the next attempt: run the same command again", file=sys.stderr, flush=True)

    async def _serve(self, transport: AsyncTransport) -> None:
        await transport.run(greet(), within=HANDSHAKE)
        try:
            _, outcome, acknowledged = await transport.run(receive_stream(self._open))
        except TensorwireError:
            if self._broken is not None and not self._outcome.done():
                self._outcome.set_exception(self._broken)
            raise
        if not acknowledged:  # the sender may reconnect for its receipt
            await asyncio.sleep(TIMEOUT)
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def _open(self, offer: Offer) -> "_Arrival":
        # This runs in a thread per connection, and takes long if much has to be verified again.
        busy = RefusedError("another sender is already sending", kind="busy", retryable=True)
        if not self._deciding.acquire(blocking=False):
            raise busy
        try:
            if self._through not in (None, offer.transfer):
                raise RefusedError("another transfer is already complete", kind="done")
            if self._arrival is not None and self._arrival.open:
                raise busy
            if not (self._arguments.force or self._may_write(offer.transfer)):
                raise _exists()
            self._arrival = _Arrival(
                self._path, self._kind, offer, self._stopping, self._arguments.limits, self._finish
            )
            return self._arrival
        finally:
            self._deciding.release()

    def _finish(self, commit: Callable[[], Outcome], transfer: bytes) -> Outcome:
        """Commit a transfer and record it as the complete one, before its sender gets the receipt."""
        with self._deciding:
            if self._through is None and not (self._arguments.force or self._may_write(transfer)):
                raise _exists()  # since the last check
            outcome = commit()
            if self._through is None and self._out is not None:
                self._hand_on(self._out)
            self._through = transfer
            return outcome

    def _hand_on(self, out: BinaryIO) -> None:
        try:
            with open(self._path, "rb") as file:
                _write_on(out, iter(lambda: file.read(_CHUNK), b""), self._stopping)
        except OSError as error:
            if not isinstance(error, TensorwireError):
                self._broken = error
                raise RefusedError("the reader of this receiver's output is gone", kind="storage") from error
            raise


class _Arrival(Recording):
    """A recording with progress that becomes a file of the requested kind."""

    def __init__(
        self,
        path: str,
        kind: str,
        offer: Offer,
        stopping: threading.Event,
        limits: Limits,
        finish: Callable[[Callable[[], Outcome], bytes], Outcome],
    ) -> None:
        self.open = True
        self.moved = 0
        self.seconds = 0.0
        self._offer = offer
        self._stopping = stopping
        self._accepts = limits
        self._kind = kind
        self._let_finish = finish
        self._began = time.monotonic()
        convert = None if kind == "tw" else self._decode
        super().__init__(path, offer.transfer, check=lambda: self._check_item, convert=convert, limits=limits)
        print(f"receiving {show(offer.name)}", file=sys.stderr)
        self._start = self.position.offset
        self._progress = Progress(offer.size, self._start)

    def buffer_updated(self, size: int) -> None:
        super().buffer_updated(size)
        self.moved += size
        self._progress.reach(self._start + self.moved)

    def commit(self) -> Outcome:
        self.seconds = time.monotonic() - self._began
        return self._let_finish(super().commit, self._offer.transfer)

    def close(self) -> None:
        super().close()
        self.open = False

    def _check_item(self, item: Item) -> None:
        _check_time(self._stopping)
        unwanted = TensorItem if self._kind == "file" else FileItem
        if self._kind != "tw" and isinstance(item, unwanted):
            wanted = "a file" if self._kind == "file" else "tensors"
            raise SchemaError(f"the receiver expects {wanted}; this is something else", item=item.name)

    def _decode(self, part: str, made: str) -> None:
        try:
            with open(part, "rb", buffering=0) as file:
                decode.write(self._chunks(file), made, self._kind, self._accepts)
        except StorageError as error:  # its text names the hidden file
            error.detail = error.detail.replace(made, self.path)
            raise

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(_CHUNK):
            _check_time(self._stopping)
            yield chunk


def _write_on(out: BinaryIO, chunks: Iterable[bytes], stopping: threading.Event) -> None:
    """Write to a stream that may be slow, from a thread, which signals do not interrupt. Raises OSError."""
    waits = hasattr(select, "PIPE_BUF") and stat.S_ISFIFO(os.fstat(out.fileno()).st_mode)  # not on Windows
    most = select.PIPE_BUF if waits else _CHUNK  # a pipe that is ready takes this many bytes at once
    for chunk in chunks:
        view = memoryview(chunk)
        for begin in range(0, len(view), most):
            while waits and not select.select([], [out], [], _LOOK)[1]:
                _check_time(stopping)
            _check_time(stopping)
            out.write(view[begin : begin + most])
            out.flush()


def _exists() -> RefusedError:
    return RefusedError("the file that this receiver would write already exists", kind="exists")


def _check_time(stopping: threading.Event) -> None:
    """Raise TransportError once the command is to end. For threads, which signals do not interrupt."""
    if stopping.is_set():
        raise TransportError("this receiver is being stopped")


def _complain(error: TensorwireError) -> None:
    print(f"tensorwire: {error}", file=sys.stderr)
