"""Recorded updates read in step with one another, a slice of each at a time, and never whole."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tensorwire.codecs import RAW, Codec, as_floats, from_stages
from tensorwire.errors import CorruptError, SchemaError
from tensorwire.limits import Limits
from tensorwire.memory import Scratch
from tensorwire.streams import Payload, Piece, Receiver
from tensorwire.tensor import Extent, TensorView
from tensorwire.updates.check import Update
from tensorwire.updates.difference import Bytes, number_size
from tensorwire.wire import Item, ItemStart, StreamEnd, TensorItem

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
        """What the update makes of the model's numbers."""
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
    """Files that are read in turns, of which at most `most` are open at a time. A context manager."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[_File, BinaryIO] = OrderedDict()

    def source(self, recording: Any) -> Any:
        """Where a recording is read from: its path, as a source for a Receiver, or the buffer that it is."""
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


class Reader:
    """One update that was checked, read once more. `model`: the tensors that it must hold, in their order."""

    def __init__(
        self,
        update: Update,
        model: Mapping[str, TensorView],
        files: OpenFiles,
        scratch: Scratch,
        limits: Limits,
    ) -> None:
        self._update = update
        self._model = model
        self._receiver = Receiver(limits, scratch=scratch)
        self._slices = self._read(files.source(update.recording))
        # The slice that is next: lent by the receiver, or what the others had no more of, decoded.
        self._next: tuple[TensorItem, Codec, int, memoryview] | None = None
        self._length = 0

    def places(self) -> Iterator[tuple[TensorItem, int, int]]:
        """Item, first element and elements of each slice. Take it before going on."""
        while self._peek():
            assert self._next is not None
            item, _, start, _ = self._next
            yield item, start, self._length

    def take(self, item: TensorItem, base: Bytes) -> Iterator[tuple[slice, Values]]:
        """The numbers that belong at `base`, in parts: where in it, and what they are."""
        size, done = item.dtype.itemsize, 0
        while done < base.size:
            if not self._peek() or self._next is None or self._next[0].name != item.name:
                raise SchemaError("the updates do not hold their items in the same order", item=item.name)
            mine, codec, start, payload = self._next
            length = min(self._length, (base.size - done) // size)
            if length < self._length:  # the others have no more
                place = Extent(mine.dtype, mine.shape, start, self._length)
                rest = np.empty(self._length * size, np.uint8)
                codec.decode(payload, place, rest)
                codec, payload = RAW, rest.data[: length * size]
                self._next, self._length = (
                    (mine, RAW, start + length, rest.data[length * size :]),
                    self._length - length,
                )
            else:
                self._next = None
            part = base[done : done + length * size]
            extent = Extent(mine.dtype, mine.shape, start, length)
            scale = number_size(mine.dtype)
            yield slice(done // scale, (done + part.size) // scale), Values(self._update, codec, payload, extent, part)
            done += part.size

    def finish(self) -> None:
        """Read the end of the stream, which vouches for all of it."""
        if self._peek():
            raise SchemaError("an update is longer than the others")

    def _peek(self) -> bool:
        """Whether there is a next slice."""
        if self._next is None:
            event = next(self._slices, None)
            if event is None:
                return False
            item = event.item
            assert isinstance(item, TensorItem)
            if isinstance(event, Piece):
                self._next = item, RAW, event.start, event.data.data
                self._length = event.data.size // item.dtype.itemsize
            else:
                self._next = item, from_stages(item.codec), event.start, event.data
                self._length = event.count
        return True

    def _read(self, source: Any) -> Iterator[Piece | Payload]:
        digest = b""
        with self._receiver as receiver:
            for event in receiver.events(source):
                if isinstance(event, (Piece, Payload)):
                    yield event
                elif isinstance(event, ItemStart):
                    self._check(event.item)
                    if isinstance(event.item, TensorItem):
                        receiver.keep_encoded(event.number)
                elif isinstance(event, StreamEnd):
                    digest = event.summary.digest
        if digest != self._update.digest:
            raise CorruptError("this is not the recording that was checked")

    def _check(self, item: Item) -> None:
        """Raise unless an item was in the update that was checked: what is kept of it since may have changed."""
        if isinstance(item, TensorItem):
            view = self._model.get(item.name)
            if view is None or (view.dtype, view.shape) != (item.dtype, item.shape):
                raise CorruptError("this is not the recording that was checked")
