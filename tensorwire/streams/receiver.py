"""The receiving loop: a stream in, verified pieces of its items out, pulled by the consumer.

    with Receiver(limits) as receiver:
        for event in receiver.events(source):
            if isinstance(event, ItemStart): receiver.land(event.number, memory)    # or `keep_encoded`, or neither
            elif isinstance(event, Piece): ...        # elements in that memory, or in some that is lent
            elif isinstance(event, Completed): ...    # the item is complete and verified

A consumer owns its receiver, and the receiver knows nothing of the consumer, which may write pieces to memory or to
files, or add them up.
"""

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from itertools import cycle
from typing import Any, Final, NamedTuple

from tensorwire import dtypes
from tensorwire.checksum import crc32c
from tensorwire.codecs import RAW, Codec, from_stages
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, TensorwireError, WireError
from tensorwire.limits import Limits
from tensorwire.memory import Memory, Scratch
from tensorwire.streams.overlap import Helper
from tensorwire.tensor import ByteArray, Extent
from tensorwire.wire import NEED_DATA, Bundle, ItemsStart, Slice, SlicePart, SliceStart, StreamEnd, StreamStart
from tensorwire.wire.drive import as_async_source, as_source, may_wait, pull, pull_async
from tensorwire.wire.frames import Header
from tensorwire.wire.items import (
    AliasItem,
    CodecSpec,
    ContainerItem,
    DataItem,
    FileItem,
    Item,
    TensorItem,
    Unpack,
    ValueItem,
    unpack_items,
)
from tensorwire.wire.reader import NeedData, Reader
from tensorwire.wire.values import unpack_value

# For a codec that expands, a decoded slice may be this many times as large as a frame.
EXPANDED: Final = 4
# A raw payload is received in parts of at most this, so that memory grows with what arrives, not with what is claimed.
_PART: Final = 4 << 20
_CHECKED: Final = 1024  # results of `_whole` that are kept, because many small items are alike


class ItemStart(NamedTuple):
    """An item was described; its data follows later unless `item.total` is 0."""

    number: int
    item: Item


# Returns memory for an item by its number; None if its data need not be kept.
Take = Callable[[int, DataItem], Memory | None]


class Piece(NamedTuple):
    """Elements of `item` from `start` on: `data` are their bytes, decoded.

    They are in the memory given to `land`, or else in memory that is lent until the next event. They are verified,
    except in a raw slice of more than 4 MiB, which comes in several pieces and is verified with the last one.
    """

    number: int
    item: TensorItem | FileItem
    start: int
    data: ByteArray

    @property
    def dtype(self) -> DType:
        """Of the elements."""
        return self.item.dtype


class Payload(NamedTuple):
    """A verified slice of an item that is kept encoded: elements [start, start + count).

    `data` is lent until the next event.
    """

    number: int
    item: TensorItem | FileItem
    start: int
    count: int  # type: ignore[assignment]  # of elements, which hides tuple.count
    data: memoryview


class Completed(NamedTuple):
    """An item is complete and verified. `aliases`: its other names. `value`: of a ValueItem."""

    number: int
    item: DataItem
    aliases: tuple[AliasItem, ...]
    value: Any = None


Event = StreamStart | ItemStart | Piece | Payload | Completed | StreamEnd


class _Position(NamedTuple):
    """Where in a stream something is: what an error about it says."""

    item: Item
    frame: int
    offset: int

    def locate(self, error: TensorwireError) -> None:
        """Add the item, frame and offset to an error that lacks them."""
        error.item = self.item.name if error.item is None else error.item
        if error.frame is None:
            error.frame, error.offset = self.frame, self.offset


class _Incoming:
    """The item whose data is coming."""

    __slots__ = ("codec", "encoded", "item", "itemsize", "memory", "number", "value")

    def __init__(self, number: int, item: DataItem, codec: Codec, memory: Memory | None, encoded: bool) -> None:
        self.number = number
        self.item = item
        self.codec = codec
        self.itemsize = _dtype(item).itemsize
        self.memory = memory
        self.encoded = encoded
        self.value = bytearray()  # of a ValueItem


class Receiver:
    """Receives one stream: a `wire.drive.Consumer` and a context manager.

    As a context manager, it adds item, frame, offset and file to errors that the consumer raises about an event.
    `overlap`: decode slices in another thread while the next ones are received; a loss for sources that never wait.
    `scratch`: memory for slices without memory of their own, shared with other streams that are read in turn with this
    one; nothing is then decoded ahead. `take`: gives memory for an item when its data begins, if `land` gave none, so
    that none is allocated for items that may never arrive. `base`: the content digest of the stream's base; a stream
    against any other is refused with a SchemaError. `any_base`: accept any, because the consumer checks it. `encoded`:
    `keep_encoded` for all items. `unpack`: `wire.sharing()`, for streams that are read in turn with this one.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        base: bytes | None = None,
        any_base: bool = False,
        overlap: bool = True,
        scratch: Scratch | None = None,
        take: Take | None = None,
        encoded: bool = False,
        unpack: Unpack = unpack_items,
    ) -> None:
        reader = self._reader = Reader(crc32c, limits, unpack=unpack)
        self.get_buffer, self.buffer_updated, self.lend = reader.get_buffer, reader.buffer_updated, reader.lend
        self._limits = limits
        self._base = base
        self._any_base = any_base
        self._take = take
        self._overlap = overlap and scratch is None
        # Slices use them in turns: one is decoded, or used by the consumer, while the next one is received.
        self._scratches = cycle([Scratch(), Scratch()] if scratch is None else [scratch])
        self._scratch = next(self._scratches)
        # What the consumer chose for items to come, by number. There may be many, so nothing else is kept about them.
        self._memory: dict[int, Memory] = {}
        self._all_encoded = encoded
        self._encoded: set[int] = set()
        self._incoming: _Incoming | None = None
        self._codecs: dict[tuple[CodecSpec, int], Codec] = {}  # by what they carry: a few for many items
        # Of whole items, by what they are; with a length that a payload may have.
        self._checked: dict[tuple[CodecSpec, int, tuple[int, ...]], tuple[Codec, Extent, int]] = {}
        self._aliases: dict[int, list[AliasItem]] = {}
        self._file: object = None  # the name of the source
        self._helper: Helper[tuple[_Position, Piece]] = Helper()
        self._at: _Position | None = None  # the origin of the event that is being handled
        # The part of a raw slice that is being filled: its first byte and its memory. `_unfit`: what is wrong with an
        # earlier part; it becomes an error once the slice is verified.
        self._landing: tuple[int, Any] = 0, None
        self._unfit = ""

    def events(self, source: Any) -> Iterator[Event]:
        """The events of a stream from a blocking source: a buffer, an iterable of buffers, or what has `readinto`."""
        source = as_source(source)
        self._file = getattr(source, "name", None)
        self._overlap = self._overlap and may_wait(source)
        return pull(self, source)

    def events_async(self, source: Any) -> AsyncIterator[Event]:
        """As `events`; also from an asynchronous iterable, or where `readinto` is a coroutine function."""
        self._file = getattr(source, "name", None)
        source = as_async_source(source)
        self._overlap = self._overlap and may_wait(source)
        return pull_async(self, source)

    def land(self, number: int, memory: Memory) -> None:
        """Decode an item that was just described into `memory`."""
        self._memory[number] = memory

    def keep_encoded(self, number: int) -> None:
        """Yield the payloads of an item that was just described in place of pieces; for a raw item, the same bytes."""
        self._encoded.add(number)

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._locate(error)

    def steps(self) -> Generator[Event | NeedData, None, None]:
        """Events, and NEED_DATA."""
        try:
            yield from self._receive()
        except WireError as error:
            self._locate(error)
            self._helper.drain()  # an error in an earlier slice comes first, whatever the timing of the threads
            raise
        finally:
            self._helper.close()
            self._reader.close()

    def _locate(self, error: BaseException | None) -> None:
        if not isinstance(error, TensorwireError):
            return
        if self._at is not None:
            self._at.locate(error)
        if error.file is None and isinstance(self._file, str):
            error.file = self._file

    def _receive(self) -> Iterator[Event | NeedData]:
        reader = self._reader
        while not reader.ended:
            self._at = None
            event = reader.next_event()
            if event is NEED_DATA:
                yield event
            elif isinstance(event, Slice):
                self._at = self._position(event.item)
                yield from self._finish_slice(event)
            elif isinstance(event, Bundle):
                yield from self._finish_items(event)
            elif isinstance(event, SliceStart):
                self._at = self._position(event.item)
                self._start_slice(event)
            elif isinstance(event, ItemsStart):
                yield from self._start_items(event)
            elif isinstance(event, SlicePart):
                self._at = self._position(event.item)
                incoming = self._arriving(event.number, event.item)
                yield from self._landed(incoming)
                self._direct(incoming, self._landing[0] + self._landing[1].size, event.left)
            elif isinstance(event, StreamStart):
                if not self._any_base:
                    event.info.check_base(self._base)
                yield event
            elif isinstance(event, StreamEnd):
                yield event

    def _start_items(self, event: ItemsStart) -> Iterator[Event]:
        position = self._position(event.items[0])
        for number, item in enumerate(event.items, event.number):
            self._at = _Position(item, position.frame, position.offset)
            if isinstance(item, AliasItem):
                self._aliases.setdefault(item.of, []).append(item)
            elif not isinstance(item, ContainerItem):
                self._codec(item)
            yield ItemStart(number, item)
            if item.total == 0 and not isinstance(item, (AliasItem, ContainerItem)):
                yield self._complete(self._arriving(number, item))

    def _codec(self, item: DataItem) -> Codec:
        """The codec of an item. Raises if it is unknown or cannot carry the dtype."""
        if isinstance(item, ValueItem):
            return RAW
        key = item.codec, item.dtype.number
        codec = self._codecs.get(key)
        if codec is None:
            codec = self._codecs[key] = check_codec(item)
        return codec

    def _arriving(self, number: int, item: DataItem) -> _Incoming:
        """The item that this data belongs to."""
        if self._incoming is None:
            self._incoming = _Incoming(number, item, self._codec(item), *self._place(number, item))
        return self._incoming

    def _place(self, number: int, item: DataItem) -> tuple[Memory | None, bool]:
        """The memory for an item whose data begins to arrive, and whether the item is kept encoded."""
        if self._all_encoded or number in self._encoded:
            self._encoded.discard(number)
            return None, True
        memory = self._memory.pop(number, None)
        return self._take(number, item) if memory is None and self._take else memory, False

    def _complete(self, incoming: _Incoming) -> Completed:
        self._incoming = None
        number, item = incoming.number, incoming.item
        aliases = tuple(self._aliases.pop(number, ()))
        value = unpack_value(bytes(incoming.value), self._limits) if isinstance(item, ValueItem) else None
        return Completed(number, item, aliases, value)

    def _start_slice(self, event: SliceStart) -> None:
        if event.count == 0:  # the close of an open-ended file
            return
        self._scratch = next(self._scratches)
        incoming = self._arriving(event.number, event.item)
        check_slice(incoming.codec, event, event.item, self._limits)
        if incoming.codec.in_place:
            self._direct(incoming, event.start * incoming.itemsize, event.length)
        else:
            self._reader.direct(self._scratch.payload(event.length).data, anywhere=True)

    def _direct(self, incoming: _Incoming, begin: int, left: int) -> None:
        """Direct the next part of a raw slice into its place."""
        region = self._region(incoming, begin, min(left, _PART))
        self._landing = begin, region
        self._reader.direct(memoryview(region))

    def _region(self, incoming: _Incoming, begin: int, size: int) -> Any:
        if incoming.memory is None:
            return self._scratch.values(size)
        return incoming.memory.region(begin, begin + size)

    def _landed(self, incoming: _Incoming) -> Iterator[Piece]:
        """Handle a part of a raw slice that has arrived."""
        begin, region = self._landing
        extent = extent_of(incoming.item, begin // incoming.itemsize, region.size // incoming.itemsize)
        try:
            incoming.codec.decode(memoryview(region), extent, region)  # in place: only checks the values
        except FormatError as error:
            self._unfit = self._unfit or error.detail
        if isinstance(incoming.item, ValueItem):
            incoming.value += memoryview(region)
        elif not self._unfit:
            yield Piece(incoming.number, incoming.item, extent.start, region)

    def _finish_slice(self, event: Slice) -> Iterator[Event]:
        incoming = self._arriving(event.number, event.item)
        item = incoming.item
        if event.count == 0:
            pass
        elif incoming.codec.in_place or isinstance(item, ValueItem):
            yield from self._landed(incoming)
            if self._unfit:
                raise FormatError(self._unfit)
        elif incoming.encoded:
            yield Payload(event.number, item, event.start, event.count, event.payload)
        else:
            yield from self._decode(event, incoming, item)
        if event.last:
            while self._helper:
                yield self._taken()
            yield self._complete(incoming)

    def _finish_items(self, event: Bundle) -> Iterator[Event]:
        """The items of a bundle are there, all of each."""
        position = self._position(event.slices[0].item)
        for number, item, _, count, payload, _ in event.slices:
            self._at = _Position(item, position.frame, position.offset)
            codec, extent = self._whole(item, count, len(payload))
            if isinstance(item, ValueItem):
                yield Completed(number, item, (), unpack_value(bytes(payload), self._limits))
                continue
            memory, encoded = self._place(number, item)
            if encoded:
                yield Payload(number, item, 0, count, payload)
            else:
                size = count * item.dtype.itemsize
                region = self._scratch.values(size) if memory is None else memory.region(0, size)
                codec.decode(payload, extent, region)
                yield Piece(number, item, 0, region)
            yield Completed(number, item, tuple(self._aliases.pop(number, ())))

    def _whole(self, item: DataItem, count: int, length: int) -> tuple[Codec, Extent]:
        """The codec and extent of an item that is one payload of `length` bytes. Raises if that is not valid."""
        if not isinstance(item, TensorItem):
            codec = self._codec(item)
            return codec, check_slice(codec, SliceStart(0, item, 0, count, length), item, self._limits)
        key = item.codec, item.dtype.number, item.shape
        checked = self._checked.get(key)
        if checked is not None and checked[2] == length:
            return checked[:2]
        if checked is None:
            codec = self._codec(item)
            extent = check_slice(codec, SliceStart(0, item, 0, count, length), item, self._limits)
        else:
            codec, extent, _ = checked
            _check_length(codec, length, extent, self._limits)
        if len(self._checked) < _CHECKED:
            self._checked[key] = codec, extent, length
        return codec, extent

    def _decode(self, event: Slice, incoming: _Incoming, item: TensorItem | FileItem) -> Iterator[Piece]:
        """Decode a slice, or let the helper do it while the next one is received."""
        position = self._position(item)
        if incoming.memory is not None and not incoming.memory.stable:
            while self._helper:
                yield self._taken()
        extent = extent_of(item, event.start, event.count)
        size = event.count * incoming.itemsize
        region = self._region(incoming, event.start * incoming.itemsize, size)
        uncached = incoming.memory.uncached if incoming.memory is not None else None
        piece = Piece(event.number, item, event.start, region)
        decode = partial(incoming.codec.decode, event.payload, extent, region, uncached)
        if not self._overlap:
            decode()
            yield piece
            return
        self._helper.submit(partial(_decoded, decode, piece, position), size)
        if self._helper.full:
            yield self._taken()

    def _taken(self) -> Piece:
        """The next piece that the helper has decoded."""
        self._at, piece = self._helper.take()
        return piece

    def _position(self, item: Item) -> _Position:
        """The position of the current frame, which is about `item`."""
        assert self._reader.frame is not None
        header, offset = self._reader.frame
        return _Position(item, header.sequence, offset)


def _decoded(decode: Callable[[], None], piece: Piece, position: _Position) -> tuple[_Position, Piece]:
    try:
        decode()
    except TensorwireError as error:
        position.locate(error)
        raise
    return position, piece


def check_slice(codec: Codec, place: SliceStart | Header, item: DataItem, limits: Limits) -> Extent:
    """The extent of a slice of `item`. Raises if its place or length is not valid."""
    extent = extent_of(item, place.start, place.count)
    _check_length(codec, place.length, extent, limits)
    block, last = codec.block(extent.dtype), item.total is not None and place.start + place.count == item.total
    if place.start % block or (place.count % block and not last):
        raise FormatError(f"slice does not begin and end between blocks of {codec}")
    return extent


def _check_length(codec: Codec, length: int, extent: Extent, limits: Limits) -> None:
    """Raise unless the payload of a slice may have this length."""
    codec.check_length(length, extent)
    # Before zstd: a frame of a few bytes must not unpack to more than a writer may put into one.
    size = max(length, codec.sizes(extent.count, extent.dtype).total)
    if codec.packer.expands:
        size = max(size, extent.count * extent.dtype.itemsize // EXPANDED)
    if size > limits.frame and not codec.in_place:
        raise LimitError("frame", limits.frame, size)


def extent_of(item: DataItem, start: int, count: int) -> Extent:
    """Elements [start, start + count) of an item."""
    shape = item.shape if isinstance(item, TensorItem) else (item.total or 0,)
    return Extent(_dtype(item), shape, start, count)


def check_codec(item: TensorItem | FileItem) -> Codec:
    """The codec of a tensor or file. Raises where there is none or it cannot carry the dtype."""
    codec = from_stages(item.codec)
    if not codec.accepts(item.dtype):
        raise FormatError(f"codec {codec} cannot carry {item.dtype}", item=item.name)
    return codec


def reject_files(item: Item) -> None:
    """Raise for items that only the file functions take."""
    if isinstance(item, FileItem):
        raise SchemaError("the stream carries a file; receive it with decode_file", item=item.name)


def _dtype(item: DataItem) -> DType:
    return dtypes.UINT8 if isinstance(item, ValueItem) else item.dtype
