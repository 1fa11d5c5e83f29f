"""A stream as decoded slices, one at a time, in the caller's hands.

`receive.Receiver` pushes slices into sinks and gives whole items. Here the caller pulls: to look at, add up
or pass on what is never held whole, and to advance many streams in step with one another in the memory of one
slice.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec
from tensorwire.dtypes import DType
from tensorwire.errors import SchemaError, TensorwireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Scratch
from tensorwire.streams.receiver import check_codec, check_slice, extent_of, reject_files
from tensorwire.wire import (
    NEED_DATA,
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
from tensorwire.wire.drive import FromReader, as_source

# A raw payload comes in pieces of at most this: memory follows what arrives and not what a header claims.
_PIECE: Final = 4 << 20


class Piece(NamedTuple):
    """Elements of `item` from `start` on: `data` are their bytes, valid until a stream on the same scratch
    goes on.
    """

    item: TensorItem
    start: int
    data: np.ndarray

    @property
    def dtype(self) -> DType:
        """Of the elements."""
        return self.item.dtype


class Pieces(FromReader):
    """Iterate for every `Piece` of the tensors in a stream, in order.

    `source`: as in `decode`. `open_item` is called with each item as it is described, and raises for one that
    is not wanted. A slice is verified before it is given, but for a raw one of more than 4 MiB, which is once
    the next slice comes: trust the whole when the iterator has ended. `metadata` is there from the first item
    on, `digest` at the end. Raises a WireError for whatever is not a whole valid stream of tensors.
    """

    def __init__(
        self,
        source: Any,
        open_item: Callable[[Item], None],
        *,
        scratch: Scratch | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.metadata: dict[str, str] = {}
        self.digest = b""
        self._source = as_source(source)
        self._open_item = open_item
        self._scratch = scratch or Scratch()
        self._limits = limits
        self._reader = Reader(crc32c, limits)
        self._codecs: dict[int, Codec] = {}

    def steps(self) -> Generator[Any, None, None]:
        """The same for whoever fills the buffers (`wire.drive.Consumer`): yields NEED_DATA and pieces."""
        try:
            yield from self._steps()
        finally:
            # Not to leave it to the garbage collector: whoever opens items may know this object.
            self._reader.close()
            self._scratch = Scratch()

    def _steps(self) -> Generator[Any, None, None]:
        reader = self._reader
        while not reader.ended:
            event = reader.next_event()
            if event is NEED_DATA:
                yield event
            elif isinstance(event, SlicePart):
                yield self._raw_piece(event.number, event.item)
                self._direct_piece(event.done, event.left)
            elif isinstance(event, Slice):
                yield self._slice(event)
            elif isinstance(event, SliceStart):
                self._start_slice(event)
            elif isinstance(event, ItemStart):
                self._start_item(event)
            elif isinstance(event, StreamStart):
                event.info.check_base()
                self.metadata = dict(event.info.metadata)
            elif isinstance(event, StreamEnd):
                self.digest = event.summary.digest

    def _start_item(self, event: ItemStart) -> None:
        with self._located(event.item):
            reject_files(event.item)
            self._open_item(event.item)
            if isinstance(event.item, ValueItem):
                raise SchemaError("the stream carries values that are no tensors; receive it with decode")
            if isinstance(event.item, TensorItem):
                self._codecs[event.number] = check_codec(event.item)

    def _start_slice(self, event: SliceStart) -> None:
        codec = self._codecs[event.number]
        with self._located(event.item):
            check_slice(codec, event, event.item, self._limits)
        self._first = event.start * event.item.dtype.itemsize  # byte of the item that the slice begins at
        if codec.in_place:
            self._direct_piece(0, event.length)
        else:
            self._reader.direct(memoryview(self._scratch.payload(event.length)), anywhere=True)

    def _direct_piece(self, done: int, left: int) -> None:
        self._landed = done, self._scratch.values(min(left, _PIECE))
        self._reader.direct(memoryview(self._landed[1]))

    def _raw_piece(self, number: int, item: Item) -> Piece:
        done, data = self._landed
        with self._located(item):
            start = (self._first + done) // item.dtype.itemsize
            extent = extent_of(item, start, data.size // item.dtype.itemsize)
            self._codecs[number].decode(memoryview(data), extent, data)  # in place: only looks
        return Piece(item, start, data)

    def _slice(self, event: Slice) -> Piece:
        codec, item = self._codecs[event.number], event.item
        if codec.in_place:
            return self._raw_piece(event.number, item)
        data = self._scratch.values(event.count * item.dtype.itemsize)
        with self._located(item):
            codec.decode(event.payload, extent_of(item, event.start, event.count), data)
        return Piece(item, event.start, data)

    @contextmanager
    def _located(self, item: Item) -> Iterator[None]:
        """Errors inside name `item` and the frame being read now."""
        try:
            yield
        except TensorwireError as error:
            header, offset = self._reader.frame
            error.item = item.name
            error.frame, error.offset = header.sequence, offset
            raise
