"""`.tw` files: the same stream at rest, with an index for access to single tensors."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.errors import (
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    TensorwireError,
    TruncatedError,
)
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import GrowingMemory
from tensorwire.storage.atomic import write_file
from tensorwire.streams.receiver import check_codec, check_slice
from tensorwire.streams.sender import encode
from tensorwire.streams.sinks import collect, decode
from tensorwire.tensor import Front
from tensorwire.wire import AliasItem, Header, Index, Item, StreamInfo, Summary, TensorItem
from tensorwire.wire.frames import HEADER_SIZE, PREAMBLE_SIZE, FrameType, check_preamble, unpack_header
from tensorwire.wire.items import unpack_item, unpack_stream
from tensorwire.wire.ledger import END_SIZE


def save_file(value: Any, path: str | os.PathLike, front: Front, **options: Any) -> int:
    """Write `value` to `path`, which appears only when complete. Returns the bytes written.

    Raises StorageError where the system does not take the file; one that was at `path` is untouched then.
    """
    buffers = encode(value, front, at_rest=True, **options)
    return write_file(path, buffers)


def load_file(path: str | os.PathLike, front: Front, **options: Any) -> Any:
    """The whole container in a `.tw` file, every byte verified."""
    with open(path, "rb", buffering=0) as file:
        value = collect(file, front, **options)
        if file.read(1):
            raise FormatError("bytes after the end frame", offset=file.tell() - 1)
    return value


def iterate_file(path: str | os.PathLike, front: Front, **options: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each item in a `.tw` file, one at a time."""
    with open(path, "rb", buffering=0) as file:
        yield from decode(file, front, **options)


class TensorFile:
    """Random access to the tensors of a `.tw` file: only what is asked for is read and verified.

    A context manager and a read-only mapping of names to tensors. `map(name)` gives a raw item as a view of
    the file itself. The file must have an index, as `save_file` writes; a recorded stream has none.
    """

    def __init__(self, path: str | os.PathLike, front: Front, *, limits: Limits = DEFAULT) -> None:
        self._front = front
        self._limits = limits
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PREAMBLE_SIZE + 2 * HEADER_SIZE + END_SIZE:
                raise TruncatedError("too short for a stream", offset=size)
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            # torch has no read-only tensors: what `map` gives may be written to, privately, never to the file.
            self._private = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            self.info, self._entries = self._read_index()
            self._items = [self._read_item(number) for number in range(len(self._entries))]
            if any(
                isinstance(item, AliasItem) and not isinstance(self._items[item.of], TensorItem) for item in self._items
            ):
                raise FormatError("alias of what is no tensor")
        except BaseException:
            self.close()
            raise
        self._numbers = {
            item.name: n for n, item in enumerate(self._items) if isinstance(item, (TensorItem, AliasItem))
        }

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Views that `map` gave stay valid: the memory goes when the last of them does."""
        self._data = self._private = memoryview(b"")

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata of the file."""
        return dict(self.info.metadata)

    def item(self, name: str) -> Item:
        """The descriptor of a tensor: dtype, shape, codec. Raises KeyError."""
        return self._items[self._resolve(name)]

    def __getitem__(self, name: str) -> Any:
        """The tensor, decoded and verified. Raises KeyError."""
        item = self.item(name)
        codec = check_codec(item)
        size = item.dtype.itemsize
        memory = GrowingMemory(item.total * size)
        for header, payload, _ in self._frames(name):
            try:
                extent = check_slice(codec, header, item, self._limits)
                region = memory.region(header.start * size, (header.start + header.count) * size)
                codec.decode(payload, extent, region)
            except TensorwireError as error:
                error.item = name
                raise
        return self._front.wrap(memory.data, item.dtype, item.shape)

    def map(self, name: str) -> Any:
        """A raw tensor as a view of the file, verified once here, without a copy.

        NumPy arrays are read-only; writing to a torch tensor changes a private copy of its pages, not the file.
        Raises EncodeError for a tensor that is not stored raw in one frame.
        """
        item = self.item(name)
        codec = check_codec(item)
        frames = list(self._frames(name)) if codec.in_place else []
        if item.total and len(frames) != 1:
            raise EncodeError("only a raw tensor in one frame can be mapped; read it with file[name]", item=name)
        begin, length = (frames[0][2], frames[0][0].length) if frames else (0, 0)
        data = np.frombuffer(self._private, np.uint8)[begin : begin + length]
        for header, payload, _ in frames:
            extent = check_slice(codec, header, item, self._limits)
            codec.decode(payload, extent, np.frombuffer(payload, np.uint8))  # in place: only looks
        tensor = self._front.wrap(data, item.dtype, item.shape)
        if isinstance(tensor, np.ndarray):
            tensor.flags.writeable = False
        return tensor

    def _resolve(self, name: str) -> int:
        number = self._numbers[name]
        item = self._items[number]
        return item.of if isinstance(item, AliasItem) else number

    def _read_index(self) -> tuple[StreamInfo, Index]:
        link = check_preamble(bytes(self._data[:PREAMBLE_SIZE]), crc32c)
        end_offset = len(self._data) - HEADER_SIZE - END_SIZE
        end, payload = self._frame(end_offset, FrameType.END)
        summary = Summary.unpack(payload)
        if summary.size != end_offset:
            raise FormatError("the end frame does not stand where it says", offset=end_offset)
        if not summary.index_offset:
            raise SchemaError("the file has no index: it is a recorded stream; read it with load_file")
        start, payload = self._frame(PREAMBLE_SIZE, FrameType.STREAM)
        if start.link != link:
            raise FormatError("the first frame does not follow the preamble", offset=PREAMBLE_SIZE)
        info = unpack_stream(bytes(payload), self._limits)
        index, payload = self._frame(summary.index_offset, FrameType.INDEX)
        if index.crc != end.link or index.sequence + 1 != end.sequence:
            raise FormatError("the index does not stand before the end frame", offset=summary.index_offset)
        entries = Index(payload)
        if len(entries) != summary.items:
            raise FormatError(f"the index has {len(entries)} entries for {summary.items} items")
        if len(entries) > self._limits.items:
            raise LimitError("items", self._limits.items, len(entries))
        return info, entries

    def _read_item(self, number: int) -> Item:
        entry = self._entries[number]
        header, payload = self._frame(entry.item_offset, FrameType.ITEM)
        if (header.item, header.sequence, header.link) != (number, entry.item_sequence, entry.item_link):
            raise FormatError("the index points at another item", offset=entry.item_offset)
        item = unpack_item(bytes(payload), self._limits)
        if isinstance(item, AliasItem) and not (item.of < number and self._entries[item.of].data_offset):
            raise FormatError("alias of a later item", item=item.name)
        return item

    def _frames(self, name: str) -> Iterator[tuple[Header, memoryview, int]]:
        """Header, payload and the payload's offset of each data frame."""
        number = self._resolve(name)
        item, entry = self._items[number], self._entries[number]
        offset, position = entry.data_offset, 0
        sequence, link = entry.data_sequence, entry.data_link
        while position < item.total:
            header, payload = self._frame(offset, FrameType.DATA)
            expected = (number, position, sequence, link)
            if (header.item, header.start, header.sequence, header.link) != expected or not header.count:
                raise FormatError("data frame out of place", item=name, offset=offset)
            position += header.count
            if position > item.total:
                raise FormatError("data beyond the end of the item", item=name, offset=offset)
            begin = offset + HEADER_SIZE + header.pad
            yield header, payload, begin
            offset = begin + header.length
            sequence, link = sequence + 1, header.crc

    def _frame(self, offset: int, kind: FrameType) -> tuple[Header, memoryview]:
        if not PREAMBLE_SIZE <= offset <= len(self._data) - HEADER_SIZE:
            raise TruncatedError("a frame begins beyond the end of the file", offset=offset)
        header = unpack_header(self._data[offset : offset + HEADER_SIZE], crc32c, frame=None, offset=offset)
        if header.type != kind:
            raise FormatError(f"expected a {kind.name} frame", offset=offset)
        begin = offset + HEADER_SIZE + header.pad
        if begin + header.length > len(self._data):
            raise TruncatedError("a frame reaches beyond the end of the file", offset=offset)
        payload = self._data[begin : begin + header.length]
        if crc32c(payload, 0) != header.payload_crc or any(self._data[offset + HEADER_SIZE : begin]):
            raise CorruptError("payload checksum mismatch", frame=header.sequence, offset=begin)
        return header, payload
