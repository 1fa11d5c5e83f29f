"""Reads recorded updates in step, one slice of each at a time, never a whole update."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire.codecs import RAW, Codec, as_floats, from_stages
from tensorwire.errors import CorruptError, SchemaError
from tensorwire.limits import Limits
from tensorwire.memory import Scratch
from tensorwire.streams import ItemStart, Payload, Piece, Receiver
from tensorwire.tensor import Extent, TensorView
from tensorwire.updates.check import Update
from tensorwire.updates.difference import Bytes, key_of
from tensorwire.wire import StreamEnd, TensorItem, Unpack

_CHANGED: Final = "this is not the recording that was checked"

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Values:
    """A part of an update: the elements of one slice, encoded, and those of the model in the same place."""

    update: Update
    codec: Codec
    payload: memoryview
    extent: Extent
    base: Bytes

    def accumulate(self, sums: Float64, weight: float) -> None:
        """Add `weight` times each number that was sent to `sums`."""
        self.codec.accumulate(self.payload, self.extent, sums, weight)

    def numbers(self) -> Float64:
        """The model's numbers after this update."""
        dtype, scale = self.extent.dtype, self.update.scale
        sent = as_floats(self.decoded(), dtype).astype(np.float64)
        base = as_floats(self.base, dtype).astype(np.float64)
        if self.update.terms.kind == "difference":
            return base + scale * sent
        return sent if scale == 1.0 else base + scale * (sent - base)

    def decoded(self) -> Bytes:
        """The elements, decoded, in memory of their own."""
        out = np.empty(self.base.size, np.uint8)
        self.codec.decode(self.payload, self.extent, out)
        return out


class OpenFiles:
    """Files that are read in turn, at most `most` of them open at a time. A context manager."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[_File, BinaryIO] = OrderedDict()

    def source(self, recording: Any) -> Any:
        """The source of a recording for a Receiver: a file for a path, or the recording itself if it is a buffer."""
        return _File(os.fspath(recording), self) if isinstance(recording, (str, os.PathLike)) else recording

    def at(self, file: "_File") -> BinaryIO:
        """A file, open and where it was left."""
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= self._most:
                self._open.popitem(last=False)[1].close()
            self._open[file] = open(file.name, "rb", buffering=0)  # noqa: SIM115 - closed above, or at the end
            self._open[file].seek(file.offset)
        return self._open[file]

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


class _File:
    """One of them, as a source."""

    def __init__(self, name: str, files: OpenFiles) -> None:
        self.name = name
        self.offset = 0
        self._files = files

    def readinto(self, buffer: memoryview, /) -> int:
        size: int = self._files.at(self).readinto(buffer)  # type: ignore[attr-defined]  # of an unbuffered file
        self.offset += size
        return size


class _Slice(NamedTuple):
    """The part of a slice that the other updates have not reached yet."""

    codec: Codec
    payload: memoryview
    item: TensorItem
    start: int
    elements: int

    @property
    def extent(self) -> Extent:
        return Extent(self.item.dtype, self.item.shape, self.start, self.elements)

    def split(self, elements: int) -> "tuple[_Slice, _Slice]":
        """The first `elements` and the rest, decoded, in new memory."""
        size = self.item.dtype.itemsize
        data = np.empty(self.elements * size, np.uint8)
        self.codec.decode(self.payload, self.extent, data)
        return (
            self._replace(codec=RAW, payload=data[: elements * size].data, elements=elements),
            _Slice(RAW, data[elements * size :].data, self.item, self.start + elements, self.elements - elements),
        )


class Reader:
    """Reads a checked update again. `model`: the tensors that it must hold.

    All updates that are read in turn share `files`, `scratch` and `unpack`.
    """

    def __init__(
        self,
        update: Update,
        model: Mapping[str, TensorView],
        files: OpenFiles,
        *,
        scratch: Scratch,
        unpack: Unpack,
        limits: Limits,
    ) -> None:
        self._update = update
        self._model = model
        self._receiver = Receiver(limits, scratch=scratch, encoded=True, unpack=unpack)
        self._slices = self._read(files.source(update.recording))
        self._rest: _Slice | None = None

    def places(self) -> Iterator[tuple[TensorItem, int, int]]:
        """Item, first element and number of elements of each slice; take each before asking for the next."""
        while (mine := self._next()) is not None:
            self._rest = mine
            yield mine.item, mine.start, mine.elements

    def take(self, item: TensorItem, base: Bytes) -> Iterator[tuple[slice, Values]]:
        """The elements of an item that belong at `base`, in parts: their position in it, and their values."""
        size, each, done = item.dtype.itemsize, item.dtype.part_size, 0
        while done < base.size:
            mine = self._next()
            if mine is None or mine.item.name != item.name:
                raise SchemaError("the updates do not hold their items in the same order", item=item.name)
            wanted = (base.size - done) // size
            if mine.elements > wanted:
                mine, self._rest = mine.split(wanted)
            part = base[done : done + mine.elements * size]
            yield (
                slice(done // each, (done + part.size) // each),
                Values(self._update, mine.codec, mine.payload, mine.extent, part),
            )
            done += part.size

    def finish(self) -> None:
        """Read the end of the stream, which verifies all of it."""
        if self._next() is not None:
            raise SchemaError("an update is longer than the others")

    def _next(self) -> _Slice | None:
        rest, self._rest = self._rest, None
        return rest or next(self._slices, None)

    def _read(self, source: Any) -> Iterator[_Slice]:
        digest = b""
        with self._receiver as receiver:
            for event in receiver.events(source):
                if isinstance(event, ItemStart):
                    if isinstance(event.item, TensorItem):
                        self._check(event.item)
                elif isinstance(event, Payload) and isinstance(event.item, TensorItem):
                    yield _Slice(from_stages(event.item.codec), event.data, event.item, event.start, event.count)
                elif isinstance(event, Piece) and isinstance(event.item, TensorItem):  # of a raw item
                    count = event.data.size // event.dtype.itemsize
                    yield _Slice(RAW, event.data.data, event.item, event.start, count)
                elif isinstance(event, StreamEnd):
                    digest = event.summary.digest
        if digest != self._update.digest:
            raise CorruptError(_CHANGED)

    def _check(self, item: TensorItem) -> None:
        """Raise unless an item was in the update that was checked: its recording may have changed since."""
        view = self._model.get(key_of(item))
        if view is None or (view.dtype, view.shape) != (item.dtype, item.shape):
            raise CorruptError(_CHANGED)
