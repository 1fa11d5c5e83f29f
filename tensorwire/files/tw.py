"""`.tw` files: the same stream at rest, with an index for access to single items."""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorwire.checksum import crc32c
from tensorwire.codecs import RAW, Codec
from tensorwire.errors import EncodeError, FormatError, TensorwireError, TruncatedError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import GrowingMemory
from tensorwire.storage.atomic import write_file
from tensorwire.streams.receiver import check_codec, check_slice, reject_files
from tensorwire.streams.sender import encode
from tensorwire.streams.sinks import collect, decode
from tensorwire.tensor import Front
from tensorwire.wire import (
    AliasItem,
    Archive,
    ContainerItem,
    DataItem,
    Item,
    StreamInfo,
    TensorItem,
    ValueItem,
)
from tensorwire.wire.items import CodecSpec
from tensorwire.wire.values import unpack_value


def save_file(value: Any, path: str | os.PathLike[str], front: Front, **options: Any) -> int:
    """Write `value` to `path`, which appears only when complete. Returns the bytes written.

    Raises StorageError where the system does not take the file; one that was at `path` is untouched then.
    """
    buffers = encode(value, front, at_rest=True, **options)
    return write_file(path, buffers)


def load_file(path: str | os.PathLike[str], front: Front, **options: Any) -> Any:
    """The whole container in a `.tw` file, every byte verified."""
    with open(path, "rb", buffering=0) as file:
        value = collect(file, front, **options)
        if file.read(1):
            raise FormatError("bytes after the end frame", offset=file.tell() - 1)
    return value


def iterate_file(path: str | os.PathLike[str], front: Front, **options: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each item in a `.tw` file, one at a time."""
    with open(path, "rb", buffering=0) as file:
        yield from decode(file, front, **options)


class TensorFile:
    """Random access to the tensors and plain values of a `.tw` file: only what is asked for is read and verified.

    A context manager and a read-only mapping of names to tensors and values. `map(name)` gives a raw tensor as a view
    of the file itself. The file must have an index, as `save_file` writes; a recorded stream has none. Reading every
    name checks all that `load_file` checks, but for the digest at the end. `base`: the content digest of the version
    that the file may be against.
    """

    def __init__(
        self, path: str | os.PathLike[str], front: Front, *, base: bytes | None = None, limits: Limits = DEFAULT
    ) -> None:
        self._front = front
        self._limits = limits
        self._file = _Mapped(path)
        self._codecs: dict[tuple[CodecSpec, int], Codec] = {}  # by what they carry: a few for many items

        def accept(what: StreamInfo | Item) -> None:
            if isinstance(what, TensorItem):
                if (what.codec, what.dtype.number) not in self._codecs:
                    self._codecs[what.codec, what.dtype.number] = check_codec(what)
            elif isinstance(what, StreamInfo):
                what.check_base(base)
            else:
                reject_files(what)

        try:
            self._archive = Archive(self._file, crc32c, limits, accept=accept)
        except BaseException:
            self._file.close()
            raise
        self.info = self._archive.info
        named = enumerate(self._archive.items)
        self._numbers = {item.name: number for number, item in named if not isinstance(item, ContainerItem)}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Views that `map` gave stay valid: the memory goes when the last of them does.

        To read afterwards is a ValueError.
        """
        self._archive.close()
        self._file.close()

    def keys(self) -> list[str]:
        """Names of all tensors and values."""
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
        """The descriptor of a tensor (dtype, shape, codec) or of a value. Raises KeyError."""
        return self._archive.items[self._resolve(name)]

    def __getitem__(self, name: str) -> Any:
        """The tensor or value, decoded and verified. Raises KeyError."""
        number = self._resolve(name)
        item = self._archive.items[number]
        if isinstance(item, TensorItem):
            codec = self._codecs[item.codec, item.dtype.number]
            data = read_item(self._archive, number, item, codec, self._limits)
            return self._front.wrap(data, item.dtype, item.shape)
        assert isinstance(item, ValueItem), "a name is a tensor's, an alias's or a value's, and an alias is resolved"
        data = read_item(self._archive, number, item, RAW, self._limits)
        try:
            return unpack_value(data.tobytes(), self._limits)
        except TensorwireError as error:
            error.item = name
            raise

    def map(self, name: str) -> Any:
        """A raw tensor as a view of the file, verified once here, without a copy.

        NumPy arrays are read-only; writing to a torch tensor changes a private copy of its pages, not the file.
        Raises EncodeError for a tensor that is not stored raw in one frame.
        """
        number = self._resolve(name)
        item = self._archive.items[number]
        refusal = EncodeError("only a raw tensor in one frame can be mapped; read it with file[name]", item=name)
        codec = self._codecs.get((item.codec, item.dtype.number)) if isinstance(item, TensorItem) else None
        if not isinstance(item, TensorItem) or codec is None or not codec.in_place:
            raise refusal
        slices = list(self._archive.slices(number, lambda header: check_slice(codec, header, item, self._limits)))
        if len(slices) > 1:
            raise refusal
        data = self._file.view[:0]
        for stored, extent in slices:
            data = self._file.view[stored.offset : stored.offset + len(stored.payload)]
            codec.decode(stored.payload, extent, data)  # in place: only looks
        tensor = self._front.wrap(data, item.dtype, item.shape)
        if isinstance(tensor, np.ndarray):
            tensor.flags.writeable = False
        return tensor

    def _resolve(self, name: str) -> int:
        number = self._numbers[name]
        item = self._archive.items[number]
        return item.of if isinstance(item, AliasItem) else number


def read_item(
    archive: Archive, number: int, item: DataItem, codec: Codec, limits: Limits = DEFAULT
) -> npt.NDArray[np.uint8]:
    """The decoded bytes of the item of this number: a tensor's elements, a value's encoding, a file's content."""
    itemsize = 1 if isinstance(item, ValueItem) else item.dtype.itemsize
    memory = GrowingMemory((item.total if item.total is not None else limits.stream) * itemsize)
    stop = 0
    for stored, extent in archive.slices(number, lambda header: check_slice(codec, header, item, limits)):
        start, stop = extent.start * itemsize, (extent.start + extent.count) * itemsize
        try:
            codec.decode(stored.payload, extent, memory.region(start, stop))
        except TensorwireError as error:
            error.item, error.frame, error.offset = item.name, stored.header.sequence, stored.frame_offset
            raise
    return memory.data[:stop]


class _Mapped:
    """A file mapped into memory, as an archive takes it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                raise TruncatedError("the file is empty", offset=0)
            shared = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # torch has no read-only tensors: what `map` gives may be written to, privately, never to the file.
            private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps = [shared, private]
        self._data = memoryview(shared)
        self.view = np.frombuffer(private, np.uint8)

    def read(self, offset: int, size: int, /) -> memoryview:
        """`RandomAccess.read`."""
        return self._data[offset : offset + size]

    def close(self) -> None:
        """Let go of the file: at once, but for maps that somebody looks at, which go with the last view of them."""
        self._data, self.view = memoryview(b""), np.empty(0, np.uint8)
        while self._maps:
            with suppress(BufferError):
                self._maps.pop().close()
