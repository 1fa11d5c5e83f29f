"""The sending side of a transfer that may be taken up again: the rest of a stream from where its receiver is.

The same input gives the same bytes, so a sender needs no state: it makes the stream again and leaves out what the
receiver has. The receiver's position carries the CRC of its last header, which stands for every byte before it; that
the next frame repeats it as its link shows that it is still the same stream.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

from tensorwire.checksum import crc32c
from tensorwire.errors import SequenceError, StorageError, WireError
from tensorwire.transfer.position import Position
from tensorwire.wire.frames import HEADER_SIZE, unpack_header

_DIGEST_SIZE: Final = 32  # the last bytes of a stream are the SHA-256 in its END frame
_CHUNK: Final = 128 << 10  # held for each receiver of a recording, of which there may be many


class Outgoing(Protocol):
    """A stream to be sent, as often as it takes."""

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on.

        Raises SequenceError where the receiver has the beginning of another stream.
        """

    @property
    def digest(self) -> str:
        """What the END frame said, once `after` is exhausted."""


class Regenerated:
    """A stream that `make` gives anew each time, as `lambda: tensorwire.encode(state_dict, codec="nf4")` does."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make
        self._tail = b""

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on."""
        offset, head = 0, b""
        for buffer in self._make():
            view = _bytes_of(buffer)
            if not view:  # the transport should not hold back what it has
                yield view
                continue
            self._tail = (self._tail + bytes(view[-_DIGEST_SIZE:]))[-_DIGEST_SIZE:]
            view, offset = view[max(position.offset - offset, 0) :], offset + len(view)
            if position.offset and len(head) < HEADER_SIZE:
                head += view[: HEADER_SIZE - len(head)]
                if len(head) == HEADER_SIZE:
                    _check(head, position)
            if view:
                yield view
        if offset < position.offset or 0 < len(head) < HEADER_SIZE:
            raise _another_stream(position)

    @property
    def digest(self) -> str:
        """What the END frame said, once `after` is exhausted."""
        return self._tail.hex()


class Recorded:
    """A stream that stands in a file: encoded once, sent to many."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on, read as they are sent."""
        with open(self._path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if position.offset > size:
                raise _another_stream(position)
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
                yield memoryview(chunk)[:got]
                left -= got

    @property
    def digest(self) -> str:
        """What the END frame says."""
        with open(self._path, "rb") as file:
            file.seek(-_DIGEST_SIZE, os.SEEK_END)
            return file.read().hex()


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
