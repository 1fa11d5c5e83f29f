"""Tensors that are kept encoded and decoded when they are needed: once, slice by slice, or never."""

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import prod
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec, add_weighted, from_stages
from tensorwire.dtypes import DType
from tensorwire.errors import ArgumentError, CorruptError
from tensorwire.limits import Limits
from tensorwire.memory import SPARE, Scratch
from tensorwire.streams.receiver import Completed, Event, ItemStart, Payload, Piece, Receiver, reject_files
from tensorwire.streams.schema import Schema
from tensorwire.streams.unflatten import Unflattener
from tensorwire.tensor import ByteArray, Extent, Front, TensorView, ViewFront
from tensorwire.wire import AliasItem, DataItem, TensorItem, ValueItem
from tensorwire.wire.items import CodecSpec


class Store(Protocol):
    """Where payloads are kept."""

    def put(self, data: memoryview) -> Any:
        """Keep these bytes; returns a key for `get`."""

    def get(self, kept: Any) -> memoryview:
        """The bytes again. Raises CorruptError if they have changed."""


class InMemory:
    """Keeps payloads in memory, without a copy if nobody can change them."""

    def put(self, data: memoryview) -> memoryview:
        """See `Store`."""
        return data if type(data.obj) is bytes else memoryview(bytes(data))

    def get(self, kept: memoryview) -> memoryview:
        """See `Store`."""
        return kept


class _Place(NamedTuple):
    offset: int
    length: int
    crc: int


class OnDisk:
    """Keeps payloads in an unnamed file in `folder`, or with other temporary files. Removed when it is dropped.

    decoder = tensorwire.torch.decoder(keep_encoded=tensorwire.OnDisk("/fast/disk"))
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise ArgumentError(f"a folder is a path, not {type(folder).__name__}")
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed when it is dropped
        self._seeking = Lock()
        self._end = 0

    def put(self, data: memoryview) -> _Place:
        """See `Store`. Raises OSError where the disk is full."""
        rest = data.cast("B")
        place = _Place(self._end, len(rest), crc32c(rest, 0))
        with self._seeking:
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._end += place.length
        return place

    def get(self, kept: _Place) -> memoryview:
        """See `Store`. Threads may ask at once."""
        data = bytearray(kept.length)
        rest = memoryview(data)
        with self._seeking:
            self._file.seek(kept.offset)
            while rest and (size := self._file.readinto(rest)):
                rest = rest[size:]
        if rest or crc32c(data, 0) != kept.crc:
            raise CorruptError("a payload that was kept on disk has changed")
        return memoryview(data)


class _Slice(NamedTuple):
    """Elements [start, start + count), as their payload was kept."""

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs of it
    kept: Any


_start = attrgetter("start")


class _Last:
    """The last slice that was decoded in part, shared by all tensors of a stream: the next part is often in it."""

    __slots__ = ("decoded",)

    def __init__(self) -> None:
        self.decoded: tuple[_Slice | None, ByteArray] = None, np.empty(0, np.uint8)


class EncodedTensor:
    """A whole, verified, encoded tensor, from `tensorwire.decoder(keep_encoded=...)`.

    `dtype`, `shape`: of the decoded tensor. `codec`: as it was sent. `nbytes`: bytes of the kept payloads.
    """

    __slots__ = ("_front", "_last", "_slices", "_store", "codec", "dtype", "nbytes", "shape")

    def __init__(
        self,
        front: Front,
        store: Store,
        item: TensorItem,
        codec: Codec,
        slices: Sequence[_Slice],
        nbytes: int,
        last: _Last,
    ) -> None:
        self.dtype: DType = item.dtype
        self.shape = item.shape
        self.codec = codec
        self.nbytes = nbytes
        self._slices = slices
        self._front = front
        self._store = store
        self._last = last

    def __repr__(self) -> str:
        return f"EncodedTensor({self.dtype}, {list(self.shape)}, {self.codec})"

    def spans(self) -> list[tuple[int, int]]:
        """First element and number of elements of each slice, in order."""
        return [(each.start, each.count) for each in self._slices]

    def decode(self) -> Any:
        """The tensor, in memory of its own."""
        out, tensor = self.empty()
        size = self.dtype.itemsize
        for each in self._slices:
            self._decode(each, out[each.start * size : (each.start + each.count) * size])
        return tensor

    def empty(self) -> tuple[ByteArray, Any]:
        """Uninitialized bytes, and a tensor over them like that of `decode`."""
        out = SPARE.empty(prod(self.shape) * self.dtype.itemsize)
        return out, self._front.wrap(out, self.dtype, self.shape)

    def read(self, start: int, stop: int) -> ByteArray:
        """The bytes of elements [start, stop) of the flattened tensor, decoded, in memory of their own."""
        size = self.dtype.itemsize
        out = np.empty((stop - start) * size, np.uint8)
        for each, first, last in self._within(start, stop):
            place = out[(first - start) * size : (last - start) * size]
            if last - first == each.count:
                self._decode(each, place)
            else:
                place[:] = self._part(each, first, last)
        return out

    def view(self) -> TensorView:
        """A view that can be encoded or subtracted, decoded slice by slice as it is read."""
        return TensorView(self.dtype, self.shape, self.read)

    def accumulate(self, sums: npt.NDArray[np.float64], weight: float, start: int = 0) -> None:
        """Add `weight` times each element from `start` on to float64 `sums`, as many as it has room for.

        Each product and each sum is rounded once. For complex elements, `sums` has both parts, the real one first.
        Raises EncodeError for elements that are not floats.
        """
        each_size = self.dtype.itemsize // self.dtype.part_size
        for each, first, last in self._within(start, start + sums.size // each_size):
            place = sums[(first - start) * each_size : (last - start) * each_size]
            if last - first == each.count:
                self.codec.accumulate(self._store.get(each.kept), self._extent(each), place, weight)
            else:
                add_weighted(self._part(each, first, last), self.dtype, place, weight)

    def _within(self, start: int, stop: int) -> Iterator[tuple[_Slice, int, int]]:
        """The slices that overlap [start, stop), and the overlapping elements of each."""
        for number in range(max(bisect_right(self._slices, start, key=_start) - 1, 0), len(self._slices)):
            each = self._slices[number]
            first, last = max(start, each.start), min(stop, each.start + each.count)
            if first >= last:
                return
            yield each, first, last

    def _part(self, each: _Slice, first: int, last: int) -> ByteArray:
        size = self.dtype.itemsize
        decoded, whole = self._last.decoded  # read once: an encoder reads slices in two threads
        if decoded is not each:
            whole = np.empty(each.count * size, np.uint8)
            self._decode(each, whole)
            self._last.decoded = each, whole
        return whole[(first - each.start) * size : (last - each.start) * size]

    def _decode(self, each: _Slice, out: ByteArray) -> None:
        self.codec.decode(self._store.get(each.kept), self._extent(each), out)

    def _extent(self, each: _Slice) -> Extent:
        return Extent(self.dtype, self.shape, each.start, each.count)


def collect_encoded(source: Any, store: Store, *, limits: Limits) -> Any:
    """The whole container, once the whole stream is verified; its tensors are views, decoded as they are read."""
    items, containers = EncodedItems(ViewFront(), None, limits, None, store), Unflattener()
    with items.receiver as receiver:
        for event in receiver.events(source):
            if isinstance(event, ItemStart):
                containers.declare(event.item)
            for item, value in items.completed(event):
                containers.fill(item.path, value.view() if isinstance(value, EncodedTensor) else value)
    return containers.result()


class EncodedItems:
    """Receives a stream of tensors and keeps it encoded; decodes only to check that it is valid."""

    def __init__(self, front: Front, expect: Any, limits: Limits, base: bytes | None, store: Store) -> None:
        self._front = front
        self._schema = None if expect is None else Schema.of(expect, front, limits=limits)
        self._store = store
        self._slices: list[_Slice] = []  # of the current item
        self._nbytes = 0
        self._codecs: dict[CodecSpec, Codec] = {}  # a few for many items
        self._trial = Scratch()
        self._last = _Last()
        self.receiver = Receiver(limits, base=base, scratch=Scratch())

    def completed(self, event: Event) -> Sequence[tuple[DataItem | AliasItem, Any]]:
        """The items that this event completes, under all of their names."""
        if isinstance(event, Completed):
            value = event.value if isinstance(event.item, ValueItem) else self._tensor(event.item)
            return [(item, value) for item in (event.item, *event.aliases)]
        if isinstance(event, ItemStart):
            reject_files(event.item)
            if self._schema is not None:
                self._schema.check(event.item)
            if isinstance(event.item, TensorItem):
                self.receiver.keep_encoded(event.number)
        elif isinstance(event, Payload):
            self._try(event)
            self._keep(event.start, event.count, event.data)
        elif isinstance(event, Piece):  # of a raw item
            self._keep(event.start, event.data.size // event.dtype.itemsize, event.data.data)
        return ()

    def check_complete(self) -> None:
        """Raise SchemaError if an expected item has not arrived."""
        if self._schema is not None:
            self._schema.check_complete()

    def _try(self, event: Payload) -> None:
        """Decode a payload to find errors now, and not when it is needed."""
        assert isinstance(event.item, TensorItem)  # files are refused
        extent = Extent(event.item.dtype, event.item.shape, event.start, event.count)
        out = self._trial.values(event.count * event.item.dtype.itemsize)
        self._codec(event.item).decode(event.data, extent, out)

    def _keep(self, start: int, count: int, data: memoryview) -> None:
        self._slices.append(_Slice(start, count, self._store.put(data)))
        self._nbytes += data.nbytes

    def _tensor(self, item: DataItem) -> EncodedTensor:
        assert isinstance(item, TensorItem)
        slices, self._slices = tuple(self._slices), []
        nbytes, self._nbytes = self._nbytes, 0
        return EncodedTensor(self._front, self._store, item, self._codec(item), slices, nbytes, self._last)

    def _codec(self, item: TensorItem) -> Codec:
        codec = self._codecs.get(item.codec)
        if codec is None:
            codec = self._codecs[item.codec] = from_stages(item.codec)
        return codec
