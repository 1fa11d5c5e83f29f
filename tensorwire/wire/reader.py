"""Bytes in, events out. Three outcomes: an event, `NEED_DATA`, or a WireError (in the manner of h11).

    reader = Reader(crc32c)
    while not reader.ended:
        event = reader.next_event()
        if event is NEED_DATA:
            n = source.readinto(reader.get_buffer())     # straight to where the bytes belong
            reader.buffer_updated(n)                     # n == 0: end of input
        elif isinstance(event, SliceStart):
            reader.direct(view)                          # optional: memory for the payload or its first bytes
        elif isinstance(event, SlicePart):               # those bytes have arrived:
            reader.direct(view)                          # memory for the next ones

Bytes that are in memory already are passed with `reader.lend(data)`, which replaces the two lines that fill the buffer.

Decode order, never reordered: header CRC, then every field and limit, then the payload's bytes as they arrive,
then the payload CRC, then the event. The reader never asks for a byte beyond the end frame.
"""

from collections.abc import Generator
from copy import copy
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from tensorwire.checksum import Checksum
from tensorwire.errors import FormatError, TruncatedError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.frames import (
    HEADER_SIZE,
    PREAMBLE_SIZE,
    SKIPPABLE,
    FrameType,
    Header,
    check_padding,
    check_payload,
    check_preamble,
    unpack_header,
)
from tensorwire.wire.items import DataItem, Item, StreamInfo, Unpack, unpack_items
from tensorwire.wire.ledger import Ledger, Step, Summary

_SKIP_BUFFER: Final = 64 << 10
_UNDIRECTED: Final = None, False
_STEP: Final = 4 << 20  # bytes by which the buffer of a payload grows if the caller gave no memory for it


class NeedData(Enum):
    """The type of `NEED_DATA`: an enumeration with one member, so that type checkers can narrow unions with it."""

    NEED_DATA = auto()

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA: Final = NeedData.NEED_DATA


class StreamStart(NamedTuple):
    """The stream has begun."""

    info: StreamInfo


class ItemsStart(NamedTuple):
    """Items were described; `number` is that of the first. Data follows later for each whose `total` is not 0."""

    number: int
    items: list[Item]


class SliceStart(NamedTuple):
    """The header of a data frame is verified; its `length` payload bytes follow."""

    number: int
    item: DataItem
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, as in Header
    length: int


class SlicePart(NamedTuple):
    """The directed memory is full, but not verified yet; the caller must `direct` the `left` bytes that follow."""

    number: int
    item: DataItem
    done: int
    left: int


class Slice(NamedTuple):
    """A verified slice: elements [start, start + count) of an item. Valid until the next `next_event`.

    `payload` is the directed memory (for several parts, the last), or otherwise a buffer of the reader's.
    """

    number: int
    item: DataItem
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, as in Header
    payload: memoryview
    last: bool


class Bundle(NamedTuple):
    """A verified frame with the whole data of several items: a slice of each, valid until the next `next_event`."""

    slices: list[Slice]


class Skipped(NamedTuple):
    """A skippable frame, the index or one of a type that this version does not know, was verified and dropped."""

    type: int
    length: int


class StreamEnd(NamedTuple):
    """The whole stream is verified."""

    summary: Summary


Event = StreamStart | ItemsStart | SliceStart | SlicePart | Slice | Bundle | Skipped | StreamEnd


class Reader:
    """One stream being read. See the module's docstring.

    `frame` is the header of the current frame and its offset in the stream, from the moment that the header is verified
    until the next one is. It tells which frame an event belongs to, and where a stream breaks.
    """

    def __init__(self, checksum: Checksum, limits: Limits = DEFAULT, *, unpack: Unpack = unpack_items) -> None:
        self.ended = False
        self.frame: tuple[Header, int] | None = None
        self._checksum = checksum
        self._limits = limits
        self._unpack = unpack
        self._ledger: Ledger | None = None
        self._wanted = memoryview(b"")  # the part of the current buffer that is still to be filled
        self._received = 0
        self._destination: tuple[memoryview | None, bool] = _UNDIRECTED
        self._anywhere = False  # whether the payload may be used in other memory than was directed
        self._lent: memoryview | None = None  # that other memory, if it is used
        self._error: WireError | None = None
        self._steps = self._run()

    def next_event(self) -> Event | NeedData:
        """The next event, or NEED_DATA. After an error every further call raises it again."""
        if self._error is not None:
            raise copy(self._error)
        if self._wanted:
            return NEED_DATA
        try:
            return next(self._steps)
        except WireError as error:
            self._error = copy(error)  # without the traceback, which keeps the receiver's memory alive
            raise
        except StopIteration:
            raise FormatError("the stream has ended", offset=self._received) from None

    def get_buffer(self) -> memoryview:
        """Memory for the next bytes: exactly as many as the current structure lacks. Empty unless NEED_DATA."""
        return self._wanted

    def buffer_updated(self, size: int) -> None:
        """Note that `size` bytes were written to `get_buffer()`; 0 means that the input has ended."""
        if size == 0 and self._error is None:
            frame = self._ledger.sequence if self._ledger else None
            self._error = TruncatedError("the input ended before the end frame", frame=frame, offset=self._received)
        self._received += size
        self._wanted = self._wanted[size:]
        self._anywhere = False

    def lend(self, data: memoryview) -> None:
        """Take `data` as the next bytes, at most as many as `get_buffer()` has room for; none: the input has ended.

        They are copied, except for a payload that may stay in any memory (`direct`). Such a payload is used in place,
        so it must not change until the next `next_event`.
        """
        size = len(data)
        if self._anywhere and size == len(self._wanted):
            self._lent = data
        else:
            self._wanted[:size] = data
        self.buffer_updated(size)

    def feed(self, data: Any) -> Generator[Event, None, int]:
        """Copy `data` in and yield the events that it completes; returns how many bytes were taken.

        Fewer bytes than given are taken only when the stream ended within `data`.
        """
        view = memoryview(data).cast("B")
        taken = 0
        while not self.ended:
            event = self.next_event()
            if event is not NEED_DATA:
                yield event
            elif taken == len(view):
                break
            else:
                size = min(len(self._wanted), len(view) - taken)
                self._wanted[:size] = view[taken : taken + size]
                self.buffer_updated(size)
                taken += size
        return taken

    def direct(self, destination: memoryview, *, anywhere: bool = False) -> None:
        """Receive the payload of the slice just started, or its next bytes, into `destination`.

        `anywhere`: a payload that is completely in other memory already may stay there; `Slice.payload` says where.
        """
        self._destination = destination, anywhere

    def close(self) -> None:
        """Release the memory that payloads were directed to, at any point of the stream."""
        self._steps.close()
        self._wanted, self._destination, self._lent = memoryview(b""), _UNDIRECTED, None

    def _directed(self, left: int) -> tuple[memoryview | None, bool]:
        (destination, anywhere), self._destination = self._destination, _UNDIRECTED
        if destination is not None and not min(left, 1) <= destination.nbytes <= left:
            raise ValueError(f"destination of {destination.nbytes} bytes for {left} bytes of payload")
        return destination, anywhere

    def _run(self) -> Generator[Event | NeedData, None, None]:
        preamble = bytearray(PREAMBLE_SIZE)
        yield from self._fill(memoryview(preamble))
        link = check_preamble(bytes(preamble), self._checksum)
        ledger = self._ledger = Ledger(self._limits, bytes(preamble), link, self._unpack)
        packed = bytearray(HEADER_SIZE)
        while not self.ended:
            yield from self._fill(memoryview(packed))
            self.frame = None
            header = unpack_header(packed, self._checksum, frame=ledger.sequence, offset=ledger.offset)
            self.frame = header, ledger.offset
            step = ledger.admit(header)
            if header.type == FrameType.DATA:
                event = yield from self._read_slice(ledger, header, last=step is Step.LAST)
            else:
                event = yield from self._read_message(ledger, header)
            ledger.pass_frame(header, packed, step)
            yield event

    def _read_slice(self, ledger: Ledger, header: Header, *, last: bool) -> Generator[Event | NeedData, None, Event]:
        number, item = ledger.pending.head
        self._destination = _UNDIRECTED
        yield SliceStart(number, item, header.start, header.count, header.length)
        destination, anywhere = self._directed(header.length)
        pad = bytearray(header.pad)
        yield from self._fill(memoryview(pad))
        check_padding(pad, header, offset=ledger.offset)
        if destination is None:
            destination = yield from self._buffer(header.length)
            crc = self._checksum(destination, 0)
        else:
            destination, crc = yield from self._fill_checked(destination, 0, anywhere)
            left = header.length - destination.nbytes
            while left:
                yield SlicePart(number, item, header.length - left, left)
                destination, anywhere = self._directed(left)
                if destination is None:
                    raise ValueError(f"{left} bytes of payload that were not directed")
                destination, crc = yield from self._fill_checked(destination, crc, anywhere)
                left -= destination.nbytes
        check_payload(crc, header, offset=ledger.offset, item=item.name)
        return Slice(number, item, header.start, header.count, destination, last)

    def _read_message(self, ledger: Ledger, header: Header) -> Generator[NeedData, None, Event]:
        if header.type >= SKIPPABLE:
            yield from self._skip(ledger, header)
            return Skipped(header.type, header.length)
        buffer = yield from self._buffer(header.length)
        check_payload(self._checksum(buffer, 0), header, offset=ledger.offset)
        if header.type == FrameType.BUNDLE:
            parts = ledger.read_bundle(header, buffer)
            return Bundle([Slice(number, item, 0, item.total or 0, part, True) for number, item, part in parts])
        payload = bytes(buffer)
        if header.type == FrameType.STREAM:
            return StreamStart(ledger.read_stream(payload))
        if header.type == FrameType.ITEM:
            return ItemsStart(header.item, ledger.read_items(payload).items())
        summary = ledger.read_end(payload)
        self.ended = True
        return StreamEnd(summary)

    def _skip(self, ledger: Ledger, header: Header) -> Generator[NeedData, None, None]:
        scratch = memoryview(bytearray(min(header.length, _SKIP_BUFFER)))
        crc, left = 0, header.length
        while left:
            part = scratch[: min(left, _SKIP_BUFFER)]
            yield from self._fill(part)
            crc = self._checksum(part, crc)
            left -= len(part)
        check_payload(crc, header, offset=ledger.offset)

    def _fill(self, buffer: memoryview) -> Generator[NeedData, None, None]:
        self._wanted = buffer
        if buffer:  # `next_event` resumes this once all of it is filled
            yield NEED_DATA

    def _fill_checked(
        self, buffer: memoryview, crc: int, anywhere: bool
    ) -> Generator[NeedData, None, tuple[memoryview, int]]:
        """The bytes, in `buffer` or where they were lent, and their checksum."""
        self._anywhere = anywhere
        yield from self._fill(buffer)
        lent, self._lent = self._lent, None
        filled = buffer if lent is None else lent
        return filled, self._checksum(filled, crc)

    def _buffer(self, length: int) -> Generator[NeedData, None, memoryview]:
        parts = []
        for done in range(0, length, _STEP):
            parts.append(bytearray(min(_STEP, length - done)))
            yield from self._fill(memoryview(parts[-1]))
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
