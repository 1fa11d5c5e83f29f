"""A stream frame by frame: each header together with the event it led to, also where the stream breaks."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from tensorwire.codecs import crc32c
from tensorwire.errors import WireError
from tensorwire.streams.pool import Pool
from tensorwire.streams.source import Source, finish
from tensorwire.wire import (
    NEED_DATA,
    FrameType,
    Header,
    ItemStart,
    Reader,
    Slice,
    SliceStart,
    StreamEnd,
    StreamStart,
)
from tensorwire.wire.frames import HEADER_SIZE, PREAMBLE_SIZE, unpack_header

_REUSED: Final = 64 << 20  # payloads up to this size are read into the same memory again and again


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, the byte its header begins at, and what the reader made of it: None for a skippable one."""

    header: Header
    offset: int
    event: StreamStart | ItemStart | Slice | StreamEnd | None

    @property
    def size(self) -> int:
        """Bytes of header, padding and payload."""
        return HEADER_SIZE + self.header.pad + self.header.length

    @property
    def type_name(self) -> str:
        """STREAM, ITEM, DATA, INDEX or END; the number of a type this version does not know."""
        known = self.header.type in FrameType._value2member_map_
        return FrameType(self.header.type).name if known else f"type {self.header.type:#04x}"


class Frames:
    """Iterate for the frames of a stream, each once it is verified.

    When the stream breaks, the WireError is raised, and `broken` is the frame it broke in, if its header was
    good.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._headers = _Headers()
        self._pool = Pool()

    @property
    def broken(self) -> Frame | None:
        """The frame whose header has been read but which has not been given."""
        waiting = self._headers.waiting
        return Frame(*waiting[-1], None) if waiting else None

    def __iter__(self) -> Iterator[Frame]:
        reader = Reader(crc32c)
        while not reader.ended:
            event = reader.next_event()
            if event is NEED_DATA:
                buffer = reader.get_buffer()
                size = self._source.readinto(buffer)
                self._headers.see(buffer[:size])
                reader.buffer_updated(size)
            elif isinstance(event, SliceStart):
                if event.length <= _REUSED:
                    reader.direct(memoryview(self._pool.take(event.length)))
            else:
                yield from self._frames(event)
        finish(self._source)

    def _frames(self, event: Any) -> Iterator[Frame]:
        """The frame of `event`, and before it those that the reader skipped without an event."""
        while True:
            header, offset = self._headers.waiting.popleft()
            skipped = header.type == FrameType.INDEX or header.type not in FrameType._value2member_map_
            yield Frame(header, offset, None if skipped else event)
            if not skipped:
                return


class _Headers:
    """Sees all bytes of a stream pass and picks out the frame headers."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Header, int]] = deque()
        self._offset = 0
        self._skip = PREAMBLE_SIZE
        self._partial = bytearray()

    def see(self, data: memoryview) -> None:
        while len(data):
            if self._skip:
                size = min(self._skip, len(data))
                self._skip -= size
            else:
                size = min(HEADER_SIZE - len(self._partial), len(data))
                self._partial += data[:size]
            data = data[size:]
            self._offset += size
            if len(self._partial) == HEADER_SIZE:
                self._take_header()

    def _take_header(self) -> None:
        offset = self._offset - HEADER_SIZE
        try:
            header = unpack_header(bytes(self._partial), crc32c, frame=0, offset=offset)
        except WireError:
            return  # the reader, which sees the same bytes next, says so and stops
        self.waiting.append((header, offset))
        self._skip = header.pad + header.length
        self._partial.clear()
