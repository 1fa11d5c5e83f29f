"""A stream frame by frame: each header with the event it led to, and the frame in which a broken stream breaks."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final

from tensorwire.checksum import crc32c
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire import NEED_DATA, Event, FrameType, Header, Reader, SlicePart, SliceStart
from tensorwire.wire.drive import Consumer, Source, pull
from tensorwire.wire.frames import HEADER_SIZE
from tensorwire.wire.reader import NeedData

_SCRATCH: Final = 5 << 20  # bytes of a payload held at a time; more than a block of a patch takes


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, the offset of its header, and the event that the reader made of it; None if the stream broke there."""

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
    """An iterable of the frames of a stream, each given once it is verified; payloads are not kept.

    If the stream is broken, the WireError is raised, and `broken` is the frame it broke in, if its header was valid.
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
        """The frame whose header has been read but which has not been returned."""
        return Frame(*self._reader.frame, None) if self._reader.frame and not self._reader.ended else None

    def steps(self) -> Generator[NeedData | Frame, None, None]:
        """The same for a caller that fills the buffers itself (`wire.drive.Consumer`): yields NEED_DATA and Frames."""
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
        """Note that `size` bytes were written there; 0: the input has ended."""
        self._reader.buffer_updated(size)

    def lend(self, data: memoryview) -> None:
        """`Reader.lend`."""
        self._reader.lend(data)
