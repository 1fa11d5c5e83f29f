"""`.tw` files: the same stream at rest, with an index for access to single items."""

import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorwire.checksum import crc32c
from tensorwire.codecs import RAW, Codec
from tensorwire.errors import (
    EncodeError,
    FormatError,
    TensorwireError,
    TruncatedError,
    WireError,
    check_function,
    counted,
    show,
)
from tensorwire.files.items import RunningSums, read_item
from tensorwire.files.source import (
    HEAD,
    File,
    Memory,
    Source,
    bytes_left,
    check_writable,
    closed,
    is_path,
    name_error,
    opened,
    source,
)
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage.atomic import write_file
from tensorwire.storage.output import file_name, name_of, write_object
from tensorwire.streams.receiver import check_codec, check_slice, reject_files
from tensorwire.streams.sender import Late, encode
from tensorwire.streams.sinks import collect, decode
from tensorwire.streams.unflatten import Unflattener
from tensorwire.tensor import Buffer, ByteArray, Extent, Front, TensorView
from tensorwire.wire import (
    AliasItem,
    Archive,
    DataItem,
    Header,
    Item,
    StreamInfo,
    TensorItem,
    ValueItem,
)
from tensorwire.wire.frames import MAGIC
from tensorwire.wire.items import CodecSpec
from tensorwire.wire.values import unpack_value

_STEP = 1 << 20  # bytes that are verified before the next ones are read
# Bytes done, and bytes in all or None if that is not known.
Progress = Callable[[int, int | None], object]


def save_file(
    value: Any,
    file: File,
    front: Front,
    *,
    progress: Progress | None = None,
    total: int | None = None,
    **options: Any,
) -> int:
    """Write `value` to a path, which appears only when complete, or into a file object. Returns the bytes written.

    `progress`: called as bytes are written, with `total`. Raises StorageError if the file cannot be written; an
    existing file at the path is then unchanged.
    """
    check_function(progress, "progress", "done", "total")
    late: Late | None = [] if is_path(file) else None
    if late is None:
        check_writable(file)
    buffers = encode(value, front, at_rest=True, late=late, **options)
    if progress is not None:
        buffers = _counted(buffers, progress, total)
    size = write_object(file, buffers) if late is None else write_file(file, buffers, late)  # type: ignore[arg-type]
    _log("saved %d bytes to %s", size, file)
    return size


def load_file(file: File, front: Front, *, progress: Progress | None = None, **options: Any) -> Any:
    """The whole container in a `.tw` file, every byte verified: by its path, or as a file object, from where it is."""
    check_function(progress, "progress", "done", "total")
    with opened(file) as raw:
        value = collect(raw if progress is None else _Counting(raw, progress), front, **options)
        if raw.read(1):
            raise FormatError("bytes after the end frame", offset=raw.tell() - 1)
    _log("loaded %s", file)
    return value


def iterate_file(file: File, front: Front, **options: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each item in a `.tw` file, one at a time."""
    with opened(file) as raw:
        yield from decode(raw, front, **options)


def _counted(buffers: Iterator[Buffer], progress: Progress, total: int | None) -> Iterator[Buffer]:
    done = 0
    for buffer in buffers:
        yield buffer
        done += memoryview(buffer).nbytes
        progress(done, total)


class _Counting:
    """A file that reports how much of it was read."""

    def __init__(self, file: Any, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._done = 0
        self._total = bytes_left(file)

    def readinto(self, buffer: memoryview, /) -> int | None:
        got: int | None = self._file.readinto(buffer)
        self._done += got or 0
        self._progress(self._done, self._total)
        return got


def _log(message: str, *arguments: object) -> None:
    import logging  # importing it takes a tenth of the time of importing the whole library

    logging.getLogger("tensorwire").debug(message, *arguments)


class TensorFile(Mapping[str, Any]):
    """Random access to the tensors and plain values of a `.tw` file: only what is requested is read and verified.

        with tensorwire.torch.open_file("model.tw") as file:
            weight = file["layer.0.weight"]
            rows = file.get_slice("layer.0.weight")[0:64]
            view = file.map("layer.0.weight")

    A context manager and a read-only mapping of names to tensors and values. `file`: a path; a seekable binary file
    object, such as fsspec gives for HTTP and S3, which the caller must close; or a buffer with the content of a file.
    Only `map` and `view` map memory. The file must have an index, as `save_file` writes; a recorded stream has none.
    Reading every name checks everything that `load_file` checks, except the digest at the end. `base`: the content
    digest of the version that the file may be against.

    Threads may share it. It can be pickled, by its path and these arguments (or as its file object can), and is opened
    again on first use. Raises a WireError that names the file; ClosedError once it is closed.
    """

    def __init__(
        self, file: File | Memory, front: Front, *, base: bytes | None = None, limits: Limits = DEFAULT
    ) -> None:
        self._file: File | Memory = file
        if not isinstance(file, Memory) and is_path(file):
            self._file = os.path.abspath(file_name(file))
        self._front = front
        self._base = base
        self._limits = limits
        self._name = name_of(self._file)
        self._is_closed = False
        self._opened: _Opened | None = None
        self._content()

    def __getstate__(self) -> dict[str, Any]:
        if self._is_closed:
            raise closed(self._name)
        return {**self.__dict__, "_opened": None}

    __eq__ = object.__eq__  # a mapping would read both
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        if self._is_closed:
            return f"TensorFile({self._name!r}, closed)"
        return f"TensorFile({self._name!r}{'' if self._opened is None else ', ' + counted(len(self), 'item')})"

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Tensors from `map` stay valid, because each has a mapping of its own."""
        self._is_closed = True
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._content().numbers)

    def __len__(self) -> int:
        return len(self._content().numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._content().numbers

    @property
    def info(self) -> StreamInfo:
        """The content of the STREAM frame."""
        return self._content().archive.info

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata of the file."""
        return dict(self.info.metadata)

    def item(self, name: str) -> Item:
        """The descriptor of a tensor (dtype, shape, codec) or of a value. Raises KeyError."""
        return self._content().find(name)[1]

    def __getitem__(self, name: str) -> Any:
        """The tensor or value, decoded and verified. Raises KeyError."""
        content = self._content()
        number, item = content.find(name)
        with content.errors():
            if isinstance(item, TensorItem):
                data = content.read(number, item, content.codec(item))
                return self._front.wrap(data, item.dtype, item.shape)
            assert isinstance(item, ValueItem), (
                "a name is a tensor's, an alias's or a value's, and an alias is resolved"
            )
            try:
                return unpack_value(content.read(number, item, RAW).tobytes(), self._limits)
            except TensorwireError as error:
                error.item = name
                raise

    def get_slice(self, name: str) -> "TensorSlice":
        """A tensor to be read in parts: `file.get_slice("w")[0:64]`. Raises KeyError; EncodeError for a value."""
        item = self._content().find(name)[1]
        if not isinstance(item, TensorItem):
            raise EncodeError("only tensors have slices; read a value with file[name]", item=name)
        return TensorSlice(self, name, item)

    def map(self, name: str) -> Any:
        """A raw tensor as a view of the file, verified once here, without a copy.

        Each call maps only the tensor's own pages; a small tensor in a bundle is read instead. NumPy arrays are
        read-only; writing to a torch tensor changes only that tensor. If the file is truncated while it is mapped,
        reading the tensor ends the process (SIGBUS). Raises EncodeError for a tensor that is not stored raw in one
        frame, and for a file object.
        """
        content = self._content()
        item = content.find(name)[1]
        data = self._mapped(name, content, read_only=self._front.read_only)
        assert isinstance(item, TensorItem), "`_mapped` has seen to it"
        with content.errors():
            tensor = self._front.wrap(data, item.dtype, item.shape)
        if isinstance(tensor, np.ndarray):
            tensor.flags.writeable = False
        return tensor

    def view(self, name: str) -> TensorView:
        """A view of a tensor, which is read part by part as it is sent or used: see `tensorwire.updates.Views`.

        Nothing is read until then. A raw tensor is mapped if `map` can do so, and verified once; for other tensors, the
        frames that hold a part are read and verified each time. Views of one tensor under several names count as tied.
        Raises KeyError; EncodeError for a plain value.
        """
        content = self._content()
        number, item = content.find(name)
        if not isinstance(item, TensorItem):
            raise EncodeError("only tensors can be viewed; read a value with file[name]", item=name)
        read = _ItemReader(self, name, item.dtype.itemsize, raw=content.codec(item).in_place)
        return TensorView(item.dtype, item.shape, read, identity=(id(self), number))

    def read_bytes(self, name: str, begin: int, end: int) -> ByteArray:
        """The bytes of elements [begin, end) of a tensor. Raises KeyError."""
        content = self._content()
        number, item = content.find(name)
        assert isinstance(item, TensorItem), "`get_slice` and `view` have seen to it"
        with content.errors():
            return content.read(number, item, content.codec(item), part=(begin, end))

    def map_bytes(self, name: str) -> ByteArray | None:
        """The bytes of a tensor as a read-only mapping; None if `map` cannot map it."""
        content = self._content()
        try:
            return self._mapped(name, content, read_only=True)
        except EncodeError:
            return None

    def _mapped(self, name: str, content: "_Opened", *, read_only: bool) -> ByteArray:
        number, item = content.find(name)
        refusal = EncodeError("only a raw tensor in one frame can be mapped; read it with file[name]", item=name)
        if not isinstance(item, TensorItem) or not content.codec(item).in_place:
            raise refusal
        codec, total = content.codec(item), item.total

        def check(header: Header) -> Extent:
            if header.count != total:
                raise refusal
            return check_slice(codec, header, item, self._limits)

        def fetch(offset: int, size: int, extent: Extent) -> tuple[memoryview, int]:
            data = content.source.map(offset, size, read_only=read_only)
            return data, crc32c(data, 0)

        data = np.empty(0, np.uint8)
        with content.errors():
            if content.archive.is_bundled(number):
                data = content.read(number, item, codec)
            else:
                for stored, extent in content.archive.slices(number, check, fetch):
                    data = np.frombuffer(stored.payload, np.uint8)
                    codec.decode(stored.payload, extent, data)  # in place: only checks the values
        return data

    def views(self) -> Any:
        """The container in the file, nested as it was, whose tensors are views that read from it.

        Valid until the file is closed. A raw tensor in one frame is verified as a whole when it is first read, others
        slice by slice.

            for buffer in streams.encode(file.views(), ViewFront()): ...
        """
        content = self._content()
        return content.views(self.__getitem__)

    def read_part(self, name: str, begin: int, end: int) -> Any:
        """Elements [begin, end) of a tensor, flat. Raises KeyError."""
        data = self.read_bytes(name, begin, end)
        content = self._content()
        item = content.find(name)[1]
        assert isinstance(item, TensorItem), "`read_bytes` has seen to it"
        with content.errors():
            return self._front.wrap(data, item.dtype, (end - begin,))

    def _content(self) -> "_Opened":
        if self._is_closed:
            raise closed(self._name)
        if self._opened is None:
            self._opened = _Opened(source(self._file), self._base, self._limits)
        return self._opened


class _ItemReader:
    """`TensorView.read` of a tensor in a file."""

    __slots__ = ("_file", "_itemsize", "_mapped", "_name", "_raw")

    def __init__(self, file: TensorFile, name: str, itemsize: int, *, raw: bool) -> None:
        self._file = file
        self._name = name
        self._itemsize = itemsize
        self._raw = raw
        self._mapped: ByteArray | None = None

    def __call__(self, start: int, stop: int) -> ByteArray:
        if self._raw and self._mapped is None:
            self._mapped = self._file.map_bytes(self._name)
            self._raw = self._mapped is not None
        if self._mapped is None:
            return self._file.read_bytes(self._name, start, stop)
        return self._mapped[start * self._itemsize : stop * self._itemsize]


class TensorSlice:
    """A tensor in a file, to be read in parts: index it like an array of its shape.

    Integers and a slice at the front decide what is read: the frames that hold it, no others. (A raw tensor that
    `save_file` wrote is one frame with one checksum: for its first part all of it is read, in little memory. Later
    parts, as long as the file is open, read the mebibytes that hold them.) What follows, up to a whole index of the
    tensor library, picks from that in memory.
    """

    __slots__ = ("_file", "_item", "_name")

    def __init__(self, file: TensorFile, name: str, item: TensorItem) -> None:
        self._file = file
        self._name = name
        self._item = item

    def get_shape(self) -> list[int]:
        """Outermost dimension first."""
        return list(self._item.shape)

    def get_dtype(self) -> str:
        """The name of the element type, as torch spells it."""
        return self._item.dtype.name

    def __getitem__(self, index: Any) -> Any:
        """The part. Raises IndexError, as arrays do; EncodeError for a step that is not positive."""
        index = index if isinstance(index, tuple) else (index,)
        begin, end, shape, rest = _front_of(index, self._item)
        part = self._file.read_part(self._name, begin, end).reshape(shape)
        return part[rest] if rest else part


def _front_of(index: tuple[Any, ...], item: TensorItem) -> tuple[int, int, tuple[int, ...], tuple[Any, ...]]:
    """What the front of an index selects: elements [begin, end), their shape, and the rest of the index."""
    begin, shape = 0, item.shape
    for place, part in enumerate(index):
        if isinstance(part, slice) and shape:
            chosen = range(shape[0])[part]
            if chosen.step < 1:
                raise EncodeError("slices of a file go forward: take a step of 1 or more", item=item.name)
            row = prod(shape[1:])
            stop = chosen[-1] + 1 if chosen else chosen.start
            rest = (slice(None, None, chosen.step), *index[place + 1 :])
            shape = (stop - chosen.start, *shape[1:])
            return (
                begin + chosen.start * row,
                begin + stop * row,
                shape,
                rest if rest != (slice(None, None, 1),) else (),
            )
        at = _place(part) if shape else None
        if at is None:
            return begin, begin + prod(shape), shape, index[place:]
        if not -shape[0] <= at < shape[0]:
            raise IndexError(f"index {at} is out of range for a dimension of {shape[0]} of {show(item.name)}")
        shape, begin = shape[1:], begin + at % shape[0] * prod(shape[1:])
    return begin, begin + prod(shape), shape, ()


def _place(part: Any) -> int | None:
    """An index that is an integer; None for any other, such as an array of several or a mask."""
    if isinstance(part, bool) or getattr(part, "shape", ()) != ():
        return None
    try:
        return operator.index(part)
    except TypeError:
        return None


class _Opened:
    """An open file: its archive, its items by name, and their codecs."""

    def __init__(self, source: Source, base: bytes | None, limits: Limits) -> None:
        self.source = source
        self._limits = limits
        self._codecs: dict[tuple[CodecSpec, int], Codec] = {}  # by what they carry: a few for many items
        self._running: RunningSums = {}

        def accept(what: StreamInfo | Item) -> None:
            if isinstance(what, TensorItem):
                if (what.codec, what.dtype.number) not in self._codecs:
                    self._codecs[what.codec, what.dtype.number] = check_codec(what)
            elif isinstance(what, StreamInfo):
                what.check_base(base)
            else:
                reject_files(what)

        try:
            with self.errors():
                if not source.size:
                    raise TruncatedError("the file is empty", offset=0)
                self.archive = Archive(source, crc32c, limits, accept=accept)
        except BaseException:
            source.close()
            raise
        self.numbers = self.archive.items.names()

    def close(self) -> None:
        self.source.close()

    def find(self, name: str) -> tuple[int, Item]:
        """The number of the item with this name, and the item. Raises KeyError."""
        number = self.numbers[name]
        item = self.archive.items[number]
        if isinstance(item, AliasItem):
            return item.of, self.archive.items[item.of]
        return number, item

    def codec(self, item: TensorItem) -> Codec:
        return self._codecs[item.codec, item.dtype.number]

    def read(
        self, number: int, item: DataItem, codec: Codec, part: tuple[int, int] | None = None
    ) -> npt.NDArray[np.uint8]:
        return read_item(
            self.archive,
            number,
            item,
            codec,
            self._limits,
            read_into=self.source.read_into,
            part=part,
            running=self._running,
        )

    def views(self, value_of: Callable[[str], Any]) -> Any:
        """The container, with its tensors as views; `value_of` returns the values."""
        containers = Unflattener()
        items = [self.archive.items[number] for number in range(len(self.archive.items))]
        made: dict[int, TensorView] = {}
        for number, item in enumerate(items):
            containers.declare(item)
            if isinstance(item, TensorItem):
                made[number] = TensorView(item.dtype, item.shape, _StoredReader(self, number, item).read)
                containers.fill(item.path, made[number])
            elif isinstance(item, AliasItem):
                containers.fill(item.path, made[item.of])
            elif isinstance(item, ValueItem):
                containers.fill(item.path, value_of(item.name))
        return containers.result()

    def whole(self, number: int, item: TensorItem) -> int | None:
        """The offset of the payload of a raw tensor in one frame, after verifying it; None for any other tensor."""
        codec, total, places = self.codec(item), item.total, []
        if not codec.in_place or self.archive.is_bundled(number):
            return None

        def check(header: Header) -> Extent | None:
            return check_slice(codec, header, item, self._limits) if header.count == total else None

        def fetch(offset: int, size: int, extent: Extent) -> tuple[memoryview, int]:
            places.append(offset)
            memory, crc = memoryview(bytearray(min(size, _STEP))), 0
            for done in range(0, size, _STEP):
                part = memory[: min(_STEP, size - done)]
                self.source.read_into(offset + done, part)
                codec.decode(part, extent, np.frombuffer(part, np.uint8))  # in place: only looks
                crc = crc32c(part, crc)
            return memory[:0], crc

        for _ in self.archive.slices(number, check, fetch):
            pass
        return places[0] if places else None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Add the name of the file to WireErrors inside and, if it is not a stream, what it is."""
        try:
            yield
        except WireError as error:
            head = b""
            with suppress(TensorwireError):
                head = bytes(self.source.read(0, min(HEAD, self.source.size)))
            name_error(error, self.source.name, head, MAGIC)
            raise


class _StoredReader:
    """`TensorView.read` of a tensor in a file."""

    __slots__ = ("_item", "_number", "_opened", "_place")

    def __init__(self, opened: _Opened, number: int, item: TensorItem) -> None:
        self._opened = opened
        self._number = number
        self._item = item
        self._place: int | None = -1  # not looked for yet

    def read(self, start: int, stop: int) -> ByteArray:
        """Elements [start, stop)."""
        opened, item, number = self._opened, self._item, self._number
        with opened.errors():
            if self._place == -1:
                self._place = opened.whole(number, item)
            if self._place is None:
                return opened.read(number, item, opened.codec(item), part=(start, stop))
            data = np.empty((stop - start) * item.dtype.itemsize, np.uint8)
            opened.source.read_into(self._place + start * item.dtype.itemsize, data.data)
            return data
