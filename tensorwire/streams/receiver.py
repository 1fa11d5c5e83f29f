"""The receiving loop: wire events to decoded slices, into sinks.

A sink is the place of one item: it lends the memory that a slice is decoded into and is told when a slice is
verified. Memory, files and `.safetensors` files differ in nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import numpy as np

from tensorwire import dtypes
from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec, Raw, from_stages
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, TensorwireError, WireError
from tensorwire.limits import Limits
from tensorwire.memory.buffers import Pool
from tensorwire.streams.overlap import Helper
from tensorwire.tensor import Extent
from tensorwire.wire import (
    NEED_DATA,
    DataItem,
    FileItem,
    Header,
    Item,
    ItemStart,
    Reader,
    Slice,
    SlicePart,
    SliceStart,
    StreamEnd,
    StreamStart,
    TensorItem,
    ValueItem,
)
from tensorwire.wire.drive import FromReader, Source

# A raw payload lands in pieces of at most this, so that memory follows what arrives and not what a header claims.
_PIECE: Final = 4 << 20


class Sink(ABC):
    """The place of one item. Offsets in bytes of the decoded item."""

    # Whether regions stay valid when the next one is asked for. Memory that still grows may move.
    stable = True
    # How decoders write to regions, as kernels take it.
    uncached: bool | None = None

    @abstractmethod
    def region(self, start: int, stop: int) -> Any:
        """Memory for bytes [start, stop): a writable flat uint8 array, or a device tensor where the codec takes one."""

    def commit(self, start: int, region: Any) -> None:
        """The region now holds the bytes from `start` on. Called in order, maybe in another thread.

        A raw slice longer than 4 MiB is committed in pieces before it is verified; all is when `close` is called.
        """

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


class Receiver(FromReader):
    """One stream being received: iterate for (number, item, value) of each completed item.

    `start` holds the stream's info and `end` what its end frame said, once they have passed. Without a source,
    drive `steps`. `overlap`: decode slices in another thread while the next ones are received, which costs more than it
    gains where nothing is waited for. `base`: the content digest of the version that the stream may be against.
    """

    def __init__(
        self,
        source: Source | None,
        open_item: OpenItem,
        limits: Limits,
        *,
        overlap: bool = True,
        base: bytes | None = None,
    ) -> None:
        self.start: StreamStart | None = None
        self.end: StreamEnd | None = None
        self._source = source
        self._reader = Reader(crc32c, limits)
        self._open_item = open_item
        self._limits = limits
        self._overlap = overlap
        self._base = base
        self._pool = Pool()
        self._codecs: dict[int, Codec] = {}
        self._sinks: dict[int, Any] = {}
        self._helper = Helper()
        self._raw: SliceStart | None = None  # the raw slice that is landing,
        self._landing: tuple[int, np.ndarray] = 0, np.empty(0, np.uint8)  # its current piece,
        self._unfit: WireError | None = None  # and what was wrong with one, to be raised once the slice is verified

    def steps(self) -> Generator[Any, None, None]:
        """The same for whoever fills the buffers (`wire.drive.Consumer`): yields NEED_DATA and completed items."""
        try:
            yield from self._receive()
        except WireError:
            self._helper.drain()  # an earlier slice's error comes first, whatever the threads did
            raise
        finally:
            self._helper.close()
            # Not to leave what was received to the garbage collector: whoever opens items knows this object.
            self._reader.close()
            del self._open_item

    def _receive(self) -> Iterator[Any]:
        reader = self._reader
        while not reader.ended:
            event = reader.next_event()
            if event is NEED_DATA:
                yield event
            elif isinstance(event, Slice):
                self._finish_slice(event)
                if event.last:
                    self._helper.drain()
                    del self._codecs[event.number]
                    yield event.number, event.item, self._close(event.number, event.item)
            elif isinstance(event, SliceStart):
                self._start_slice(event)
            elif isinstance(event, SlicePart):
                self._land()
                self._direct_piece(event.done, event.left)
            elif isinstance(event, ItemStart):
                if self._start_item(event.number, event.item) and event.item.total == 0:
                    yield event.number, event.item, self._close(event.number, event.item)
            elif isinstance(event, StreamStart):
                event.info.check_base(self._base)
                self.start = event
            elif isinstance(event, StreamEnd):
                self.end = event

    def _close(self, number: int, item: Item) -> Any:
        with self._located(item):
            return self._sinks.pop(number).close()

    def _start_item(self, number: int, item: Item) -> bool:
        with self._located(item):
            codec = check_codec(item) if isinstance(item, (TensorItem, FileItem)) else Raw()
            sink = self._open_item(number, item)
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
        with self._located(event.item):
            check_slice(codec, event, event.item, self._limits)
        if codec.in_place and isinstance(self._sinks[event.number], Sink):
            self._raw = event
            self._direct_piece(0, event.length)
        else:
            self._reader.direct(memoryview(self._pool.take(event.length)), anywhere=True)

    def _direct_piece(self, done: int, left: int) -> None:
        begin = self._raw.start * _dtype(self._raw.item).itemsize + done
        region = self._sinks[self._raw.number].region(begin, begin + min(left, _PIECE))
        self._landing = begin, region
        self._reader.direct(memoryview(region))

    def _land(self) -> None:
        begin, region = self._landing
        try:
            itemsize = _dtype(self._raw.item).itemsize
            extent = extent_of(self._raw.item, begin // itemsize, region.size // itemsize)
            self._codecs[self._raw.number].decode(memoryview(region), extent, region)
        except WireError as error:
            self._unfit = self._unfit or error
        self._sinks[self._raw.number].commit(begin, region)

    def _finish_slice(self, event: Slice) -> None:
        if event.count == 0:
            return
        codec, sink = self._codecs[event.number], self._sinks[event.number]
        if isinstance(sink, Sink) and not codec.in_place:
            self._decode(event, codec, sink)
            return
        with self._located(event.item):
            if isinstance(sink, EncodedSink):
                sink.accept(event.start, event.count, event.payload)
            else:
                self._land()
                if self._unfit is not None:
                    raise self._unfit

    def _decode(self, event: Slice, codec: Codec, sink: Sink) -> None:
        """Decode a slice, or let the helper do it while the next one is received."""
        if not sink.stable:
            self._helper.drain()
        dtype, located = _dtype(event.item), self._located(event.item)
        begin, size = event.start * dtype.itemsize, event.count * dtype.itemsize
        region = sink.region(begin, begin + size)

        def work() -> None:
            with located:
                codec.decode(event.payload, extent_of(event.item, event.start, event.count), region, sink.uncached)
                sink.commit(begin, region)

        if not self._overlap:
            work()
            return
        self._helper.submit(work, size)
        if self._helper.full:
            self._helper.take()

    def _located(self, item: Item) -> AbstractContextManager[None]:
        """Errors inside name `item` and the frame being read now."""
        assert self._reader.frame is not None
        header, offset = self._reader.frame
        return _located(item.name, header.sequence, offset)


@contextmanager
def _located(item: str, frame: int, offset: int) -> Iterator[None]:
    try:
        yield
    except TensorwireError as error:
        if error.item is None:
            error.item = item
        error.frame, error.offset = frame, offset
        raise


def check_slice(codec: Codec, place: SliceStart | Header, item: DataItem, limits: Limits) -> Extent:
    """The extent of a slice of `item`. Raises unless it may stand at this place and have this length."""
    extent = extent_of(item, place.start, place.count)
    dtype = extent.dtype
    codec.check_length(place.length, extent)
    block, last = codec.block(dtype), item.total is not None and place.start + place.count == item.total
    if place.start % block or (place.count % block and not last):
        raise FormatError(f"slice does not begin and end between blocks of {codec}")
    # Before zstd: a frame of a few bytes must not unpack to more than a writer may put into one.
    size = max(place.length, codec.sizes(place.count, dtype).total)
    if size > limits.frame and not codec.in_place:
        raise LimitError("frame", limits.frame, size)
    return extent


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


def _dtype(item: DataItem) -> DType:
    return dtypes.UINT8 if isinstance(item, ValueItem) else item.dtype


def reject_files(item: Item) -> None:
    """Raise for items that only the file functions take."""
    if isinstance(item, FileItem):
        raise SchemaError("the stream carries a file; receive it with decode_file", item=item.name)
