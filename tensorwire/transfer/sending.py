"""The sending side of a resumable transfer: the rest of a stream from the receiver's position on.

The same input gives the same bytes, so a sender needs no state: it makes the stream again and leaves out what the
receiver has. The receiver's position carries the CRC of its last header, which identifies every byte before it. If the
next frame has this CRC as its link, it is still the same stream. The last bytes are sent only after a check that the
source has not changed since the start; without them the receiver gets nothing.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from typing import Any, Final, Protocol

from tensorwire.checksum import crc32c
from tensorwire.errors import EncodeError, SequenceError, StorageError, WireError
from tensorwire.transfer.position import Position
from tensorwire.wire.frames import HEADER_SIZE, unpack_header

_DIGEST_SIZE: Final = 32  # the last bytes of a stream are the SHA-256 in its END frame
_CHUNK: Final = 128 << 10  # held for each receiver of a recorded stream; there may be many


class Outgoing(Protocol):
    """A stream to be sent, in as many attempts as it takes."""

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on.

        Raises SequenceError if the receiver has the beginning of another stream.
        """

    @property
    def digest(self) -> str:
        """The digest in the END frame, once `after` is exhausted."""


def version_of(*paths: str | os.PathLike[str]) -> object:
    """A value that differs between two states of some files: their identity, sizes and times of the last change.

    It differs even if somebody has set the modification times back. A pipe or device has only one state. Raises
    OSError.
    """
    return [_version(os.stat(path)) for path in paths]


def _version(status: os.stat_result) -> tuple[int, ...]:
    which = status.st_dev, status.st_ino
    if not stat.S_ISREG(status.st_mode):
        return which
    return (*which, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Regenerated:
    """A stream that `make` produces again for each attempt: `lambda: tensorwire.encode(state_dict, codec="nf4")`.

    `version`: returns a value that differs between two states of the source: `lambda: version_of("model.safetensors")`.
    It is called now, at the beginning of each attempt, and before the last bytes. If its value has changed, `after`
    raises EncodeError, and the receiver gets nothing.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], *, version: Callable[[], object] = lambda: None) -> None:
        self._make = make
        self._version = version
        self._first = version()
        self._tail = b""

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on."""
        offset, head, held = 0, b"", memoryview(b"")
        self._check_version()
        for buffer in self._make():
            view = _bytes_of(buffer)
            if not view:  # the transport should send what it has, so this must not hold anything back either
                self._check_version()
                yield from (held, view) if held else (view,)
                held = view
                continue
            self._tail = (self._tail + bytes(view[-_DIGEST_SIZE:]))[-_DIGEST_SIZE:]
            view, offset = view[max(position.offset - offset, 0) :], offset + len(view)
            if position.offset and len(head) < HEADER_SIZE:
                head += view[: HEADER_SIZE - len(head)]
                if len(head) == HEADER_SIZE:
                    _check(head, position)
            if view:
                if held:
                    yield held
                held = view
        self._check_version()
        if offset < position.offset or 0 < len(head) < HEADER_SIZE:
            raise _another_stream(position)
        if held:
            yield held

    @property
    def digest(self) -> str:
        """The digest in the END frame, once `after` is exhausted."""
        return self._tail.hex()

    def _check_version(self) -> None:
        if self._version() != self._first:
            raise EncodeError(
                "the data changed while it was being sent, so none of it arrives; send it again once it is written"
            )


class Recorded:
    """A stream in a file, which is encoded once and sent to many.

    The file may be removed or replaced while it is sent. If it is written to, `after` raises StorageError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._digest: str | None = None

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on, read as they are sent."""
        with open(self._path, "rb", buffering=0) as file:
            began = os.fstat(file.fileno())
            size = began.st_size
            if position.offset > size:
                raise _another_stream(position)
            self._digest = _last_bytes(file)
            if 0 < position.offset < size:
                file.seek(position.offset)
                _check(file.read(HEADER_SIZE), position)
            file.seek(position.offset)
            left = size - position.offset
            while left:
                chunk = bytearray(min(left, _CHUNK))
                got = file.readinto(chunk)
                if not got:
                    raise StorageError(f"{self._path} became shorter while it was sent")
                left -= got
                if not left and _changed(began, os.fstat(file.fileno())):
                    raise StorageError(f"{self._path} was written to while it was sent")
                yield memoryview(chunk)[:got]

    @property
    def digest(self) -> str:
        """The digest in the END frame."""
        if self._digest is None:
            with open(self._path, "rb", buffering=0) as file:
                self._digest = _last_bytes(file)
        return self._digest


def _last_bytes(file: FileIO) -> str:
    file.seek(-min(_DIGEST_SIZE, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().hex()


def _changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def _bytes_of(buffer: Any) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # a shape with a 0 in it cannot be cast


def _check(head: bytes, position: Position) -> None:
    if len(head) < HEADER_SIZE:
        raise _another_stream(position)
    try:
        header = unpack_header(head, crc32c, frame=position.frames, offset=position.offset)
    except WireError:  # no frame of ours begins there
        raise _another_stream(position) from None
    if (header.sequence, header.link) != (position.frames, position.link):
        raise _another_stream(position)


def _another_stream(position: Position) -> SequenceError:
    return SequenceError(
        "the receiver has the beginning of another stream: the source has changed; send it as a new transfer",
        frame=position.frames,
        offset=position.offset,
    )
