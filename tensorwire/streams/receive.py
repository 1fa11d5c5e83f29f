"""The receiving loop: wire events to decoded slices, into sinks.

A sink is the place of one item: it lends the memory that a slice is decoded into and is told when a slice is
verified. Memory, files and `.safetensors` files differ in nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs import Codec, Raw, crc32c, from_stages
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, TensorwireError, WireError
from tensorwire.limits import Limits
from tensorwire.streams.pool import Pool
from tensorwire.streams.source import Source, finish
from tensorwire.streams.workers import Workers, thread_count
from tensorwire.wire import (
    NEED_DATA,
    Header,
    Item,
    ItemStart,
    Kind,
    Reader,
    Slice,
    SliceStart,
    StreamEnd,
    StreamStart,
)


# A raw payload up to this long is verified before it is committed anywhere; the frames of a stream are.
_PART: Final = 2 << 20


class Sink(ABC):
    """The place of one item. Offsets in bytes of the decoded item."""

    # Whether regions stay valid when the next one is asked for. Memory that still grows may move.
    stable = True
    # Whether raw bytes may be committed before they are verified, so that a frame of any length passes in parts.
    # For files that get their name only once all is verified.
    unverified = False

    @abstractmethod
    def region(self, start: int, stop: int) -> Any:
        """Memory for bytes [start, stop): a writable flat uint8 array, or a device tensor where the codec takes one."""

    def commit(self, start: int, region: Any) -> None:
        """The region now holds the bytes from `start` on. Called in order, maybe in another thread."""

    @abstractmethod
    def close(self) -> Any:
        """The item is complete and verified: give its value."""


class EncodedSink(ABC):
    """The place of an item that stays encoded: it gets verified payloads instead of decoded bytes."""

    @abstractmethod
    def accept(self, start: int, count: int, payload: memoryview) -> None:
        """Elements [start, start + count), encoded. The payload is valid during the call only."""

    @abstractmethod
    def close(self) -> Any:
        """The item is complete and verified: give its value."""


# Called with each item as it is described, before any memory is taken for it; None: it has no data of its own.
OpenItem = Callable[[int, Item], Sink | EncodedSink | None]


class Receiver:
    """One stream being received: iterate for (number, item, value) of each completed item.

    `start` holds the stream's info and `summary` what its end frame said, once they have passed.
    """

    def __init__(self, source: Source, open_item: OpenItem, limits: Limits, *, threads: int | None = None) -> None:
        self.start: StreamStart | None = None
        self.end: StreamEnd | None = None
        self._source = source
        self._reader = Reader(crc32c, limits)
        self._open_item = open_item
        self._limits = limits
        self._pool = Pool()
        self._workers = Workers(min(thread_count(threads), 1))
        self._codecs: dict[int, Codec] = {}
        self._sinks: dict[int, Any] = {}

    def __iter__(self) -> Iterator[tuple[int, Item, Any]]:
        try:
            yield from self._receive()
        except WireError:
            self._workers.drain()  # an earlier slice's error comes first, whatever the threads did
            raise
        finally:
            self._workers.close()

    def _receive(self) -> Iterator[tuple[int, Item, Any]]:
        reader = self._reader
        while not reader.ended:
            event = reader.next_event()
            if event is NEED_DATA:
                reader.buffer_updated(self._source.readinto(reader.get_buffer()) or 0)
            elif isinstance(event, Slice):
                self._finish_slice(event)
                if event.last:
                    self._workers.drain()
                    del self._codecs[event.number]
                    yield event.number, event.item, self._sinks.pop(event.number).close()
            elif isinstance(event, SliceStart):
                self._start_slice(event)
            elif isinstance(event, ItemStart):
                if self._start_item(event.number, event.item) and event.item.total == 0:
                    yield event.number, event.item, self._sinks.pop(event.number).close()
            elif isinstance(event, StreamStart):
                self.start = event
            elif isinstance(event, StreamEnd):
                self.end = event
        finish(self._source)

    def _start_item(self, number: int, item: Item) -> bool:
        try:
            codec = check_codec(item) if item.codec else Raw()
            sink = self._open_item(number, item)
        except TensorwireError as error:
            error.item = item.name if error.item is None else error.item
            raise
        if sink is None:
            return False
        self._sinks[number] = sink
        if item.total != 0:
            self._codecs[number] = codec
        return True

    def _start_slice(self, event: SliceStart) -> None:
        if event.count == 0:  # the close of an open-ended file
            return
        codec = self._codecs[event.number]
        try:
            check_slice(codec, event, event.item, self._limits)
            sink = self._sinks[event.number]
            if codec.in_place and isinstance(sink, Sink):
                if sink.unverified and event.length > _PART:
                    self._reader.divert(partial(self._part, event))
                    return
                destination = self._region(event)
            else:
                destination = self._pool.take(event.length)
        except TensorwireError as error:
            error.item = event.item.name
            raise
        self._reader.direct(memoryview(destination))

    def _finish_slice(self, event: Slice) -> None:
        if event.count == 0:
            return
        sink = self._sinks[event.number]
        if event.payload is None:  # it was diverted, and is committed
            return
        if isinstance(sink, EncodedSink):
            self._decode(event, None)
        elif self._codecs[event.number].in_place:
            self._decode(event, np.frombuffer(event.payload, np.uint8))
        else:
            if not sink.stable:
                self._workers.drain()
            region = self._region(event)
            self._workers.submit(partial(self._decode, event, region), event.count * _dtype(event.item).itemsize)
            if self._workers.full:
                self._workers.take()

    def _decode(self, event: Slice, region: np.ndarray | None) -> None:
        codec, dtype, sink = self._codecs[event.number], _dtype(event.item), self._sinks[event.number]
        try:
            if region is None:
                sink.accept(event.start, event.count, event.payload)
            else:
                codec.decode(event.payload, dtype, region)
                sink.commit(event.start * dtype.itemsize, region)
        except WireError as error:
            error.item = event.item.name
            raise

    def _part(self, event: SliceStart, offset: int, part: memoryview) -> None:
        """A part of a raw payload too long to be held."""
        data = np.frombuffer(part, np.uint8)
        try:
            self._codecs[event.number].decode(part, _dtype(event.item), data)
        except WireError as error:
            error.item = event.item.name
            raise
        self._sinks[event.number].commit(event.start * _dtype(event.item).itemsize + offset, data)

    def _region(self, event: SliceStart | Slice) -> np.ndarray:
        size = _dtype(event.item).itemsize
        return self._sinks[event.number].region(event.start * size, (event.start + event.count) * size)


def check_slice(codec: Codec, place: SliceStart | Header, item: Item, limits: Limits) -> None:
    """Raise unless a slice of `item` may stand at this place and have this length."""
    dtype = _dtype(item)
    codec.check_length(place.length, place.count, dtype)
    block, last = codec.block(dtype), item.total is not None and place.start + place.count == item.total
    if place.start % block or place.count % block and not last:
        raise FormatError(f"slice does not begin and end between blocks of {codec}")
    # Before zstd: a frame of a few bytes must not unpack to more than a writer may put into one.
    size = max(place.length, codec.sizes(place.count, dtype).total)
    if size > limits.frame and not codec.in_place:
        raise LimitError("frame", limits.frame, size)


def check_codec(item: Item) -> Codec:
    """The codec of a tensor or file. Raises where there is none or it cannot carry the dtype."""
    codec = from_stages(item.codec)
    if not codec.accepts(item.dtype):
        raise FormatError(f"codec {codec} cannot carry {item.dtype}", item=item.name)
    return codec


def _dtype(item: Item) -> DType:
    return item.dtype if item.dtype is not None else dtypes.UINT8


def reject_files(item: Item) -> None:
    """Raise for items that only the file functions take."""
    if item.kind == Kind.FILE:
        raise SchemaError("the stream carries a file; receive it with decode_file", item=item.name)
