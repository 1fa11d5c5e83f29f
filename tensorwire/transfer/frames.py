"""A stream frame by frame: each header together with the event it led to, also where the stream breaks."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final

from tensorwire.checksum import crc32c
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire import NEED_DATA, Event, FrameType, Header, Reader, SlicePart, SliceStart
from tensorwire.wire.drive import Consumer, Source, pull
from tensorwire.wire.frames import HEADER_SIZE
from tensorwire.wire.reader import NeedData

_SCRATCH: Final = 5 << 20  # more than a block of a patch takes; bytes of a payload that are held at once


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, the byte its header begins at, and what the reader made of it: None where it broke."""

    header: Header
    offset: int
    event: Event | None

    @property
    def size(self) -> int:
        """Bytes of header, padding and payload."""
        return HEADER_SIZE + self.header.pad + self.header.length

    @property
    def type_name(self) -> str:
        """STREAM, ITEM, DATA, INDEX or END; the number of a type this version does not know."""
        return FrameType.label(self.header.type)


class Frames(Consumer[Frame]):
    """Iterate for the frames of a stream, each once it is verified; payloads are not kept.

    When the stream breaks, the WireError is raised, and `broken` is the frame it broke in, if its header was good.
    """

    def __init__(self, source: Source | None = None, limits: Limits = DEFAULT) -> None:
        self._source = source
        self._reader = Reader(crc32c, limits)
        self._scratch = memoryview(b"")

    def __iter__(self) -> Iterator[Frame]:
        assert self._source is not None
        return pull(self, self._source)

    @property
    def broken(self) -> Frame | None:
        """The frame whose header has been read but which has not been given."""
        return Frame(*self._reader.frame, None) if self._reader.frame and not self._reader.ended else None

    def steps(self) -> Generator[NeedData | Frame, None, None]:
        """The same for whoever fills the buffers (`wire.drive.Consumer`): yields NEED_DATA and Frames."""
        reader = self._reader
        self._scratch = memoryview(bytearray(_SCRATCH))
        while not reader.ended:
            event = reader.next_event()
            if event is NEED_DATA:
                yield event
            elif isinstance(event, SliceStart):
                reader.direct(self._scratch[: event.length])
            elif isinstance(event, SlicePart):
                reader.direct(self._scratch[: event.left])
            else:
                assert reader.frame is not None
                yield Frame(*reader.frame, event)

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        return self._reader.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes went there; 0: the input has ended."""
        self._reader.buffer_updated(size)

    def lend(self, data: memoryview) -> None:
        """`Reader.lend`."""
        self._reader.lend(data)
