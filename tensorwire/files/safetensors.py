"""`.safetensors` files to streams and back in O(frame) memory: the model is never loaded.

    transport.send(tensorwire.safetensors.encode("model.safetensors", codec="nf4"))
    tensorwire.safetensors.decode(transport.receive(), "received.safetensors")

Needs neither torch nor the safetensors package. File format: https://huggingface.co/docs/safetensors, section Format.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any, Final

from tensorwire import dtypes, streams
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, TruncatedError, UnsupportedError, show
from tensorwire.files.any import file_reader
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Pool
from tensorwire.storage.atomic import replacing
from tensorwire.storage.output import Output, read_at
from tensorwire.streams import Completed, Piece, Receiver, Report, Schema
from tensorwire.streams.codec_choice import CodecChoice
from tensorwire.tensor import Buffer, TensorView, ViewFront
from tensorwire.wire import AliasItem, Item, ItemStart, Kind, StreamStart, TensorItem
from tensorwire.wire.items import Path

# The safetensors library's own ceiling.
_MAX_HEADER: Final = 100_000_000
_COPY: Final = 1 << 20
_METADATA: Final = "__metadata__"
_NAMES: Final = {
    dtypes.BOOL: "BOOL",
    dtypes.UINT8: "U8",
    dtypes.INT8: "I8",
    dtypes.UINT16: "U16",
    dtypes.INT16: "I16",
    dtypes.UINT32: "U32",
    dtypes.INT32: "I32",
    dtypes.UINT64: "U64",
    dtypes.INT64: "I64",
    dtypes.FLOAT16: "F16",
    dtypes.BFLOAT16: "BF16",
    dtypes.FLOAT32: "F32",
    dtypes.FLOAT64: "F64",
    dtypes.COMPLEX64: "C64",
    dtypes.FLOAT8_E4M3FN: "F8_E4M3",
    dtypes.FLOAT8_E5M2: "F8_E5M2",
    dtypes.FLOAT8_E4M3FNUZ: "F8_E4M3FNUZ",
    dtypes.FLOAT8_E5M2FNUZ: "F8_E5M2FNUZ",
    dtypes.FLOAT8_E8M0FNU: "F8_E8M0",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}


def encode(
    path: str | os.PathLike[str],
    *,
    codec: CodecChoice = "raw",
    frame_size: int = streams.FRAME_SIZE,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of a stream of all tensors in a `.safetensors` file, read piece by piece as they are sent.

    `codec` and `report` as in `tensorwire.encode`; a function gets (name, TensorView). The file's metadata travels
    along. With `at_rest` the stream is laid out as `save_file` does, to become a `.tw` file that `open_file` can open.
    Raises, before the first buffer, FormatError or TruncatedError for a file that is not valid, EncodeError for
    what cannot be sent.
    """
    file = SafetensorsFile(path)
    try:
        buffers = streams.encode(
            dict(file),
            ViewFront(),
            codec=codec,
            frame_size=frame_size,
            metadata=file.metadata,
            at_rest=at_rest,
            limits=limits,
            report=report,
        )
    except BaseException:
        file.close()
        raise
    stream = _closing(file, buffers)
    next(stream)
    return stream


def decode(
    source: Any, path: str | os.PathLike[str], *, expect: Schema | None = None, limits: Limits = DEFAULT
) -> None:
    """Receive a stream of a flat dict of tensors into a `.safetensors` file, decoded, slice by slice.

    The file appears under its name only when the whole stream is verified. The sender must describe all tensors
    before their data, as every sender does that knows its container. Tied tensors are written once each, since
    the file format has no ties. Raises SchemaError for streams that such a file cannot hold, StorageError where the
    system does not take the file.
    """
    with replacing(path) as fd, Receiver(limits) as receiver:
        layout = _Layout(Output(fd, path), None if expect is None else Schema.of(expect, ViewFront()), limits)
        for event in receiver.events(source):
            if isinstance(event, Piece):
                layout.write(event)
            elif isinstance(event, ItemStart):
                layout.describe(event.number, event.item)
            elif isinstance(event, Completed):
                layout.copy(event)
            elif isinstance(event, StreamStart):
                layout.metadata = dict(event.info.metadata)
        layout.finish()


class SafetensorsFile(Mapping[str, TensorView]):
    """A `.safetensors` file as a mapping of names to views that read from it; a context manager.

    Offsets, sizes and dtypes are checked against the file before anything is read through them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            header, begin, size = self._read_header()
            metadata = header.pop(_METADATA, {})
            if not _is_text_map(metadata):
                raise FormatError("safetensors metadata must map text to text")
            self.metadata: dict[str, str] = metadata
            self._views = self._make_views(header, begin, size)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> TensorView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; views can no longer be read."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        size = os.fstat(self._fd).st_size
        prefix = bytearray(8)
        if read_at(self._fd, memoryview(prefix), 0) != 8:
            raise TruncatedError("too short for a safetensors file", offset=size)
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER:
            raise LimitError("safetensors header", _MAX_HEADER, length)
        if 8 + length > size:
            raise TruncatedError("the safetensors header reaches beyond the end of the file", offset=size)
        text = bytearray(length)
        read_at(self._fd, memoryview(text), 8)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the safetensors header is not JSON: {error}") from None
        if type(header) is not dict:
            raise FormatError("the safetensors header is not a JSON object")
        return header, 8 + length, size - 8 - length

    def _make_views(self, header: dict[str, Any], begin: int, size: int) -> dict[str, TensorView]:
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[3:])
        views = {}
        pool = Pool()  # one for all tensors: they are read one after the other
        end = 0
        for name, dtype, shape, start, stop in entries:
            if start != end:
                raise FormatError("tensors overlap or leave holes", item=name)
            end = stop
            views[name] = TensorView(dtype, shape, file_reader(self._fd, begin + start, dtype.itemsize, pool))
        if end != size:
            raise FormatError(f"tensors take {end} bytes, the file has {size}")
        return views


def _entry(name: str, entry: Any) -> tuple[str, DType, tuple[int, ...], int, int]:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a safetensors entry must have dtype, shape and data_offsets", item=name)
    if type(entry["dtype"]) is not str:
        raise FormatError("dtype must be text", item=name)
    if entry["dtype"] not in _DTYPES:
        raise UnsupportedError(f"unknown safetensors dtype {show(entry['dtype'])}", item=name)
    dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise FormatError("shape and data_offsets must be lists of non-negative integers", item=name)
    if len(shape) > DEFAULT.ndim:
        raise LimitError("ndim", DEFAULT.ndim, len(shape), item=name)
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise FormatError("data_offsets do not match dtype and shape", item=name)
    return name, dtype, tuple(shape), *offsets


def _is_text_map(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for text in value.values())


def _closing(file: SafetensorsFile, buffers: Iterator[Buffer]) -> Iterator[Buffer]:
    with file:
        yield b""  # begun, so that the file is closed even if the stream never is
        yield from buffers


class _Layout:
    """The file being written: where each tensor goes is known once the stream has described all of them."""

    def __init__(self, output: Output, schema: Schema | None, limits: Limits) -> None:
        self.metadata: dict[str, str] = {}
        self._output = output
        self._schema = schema
        self._limits = limits
        self._items: dict[int, TensorItem] = {}
        self._offsets: dict[Path, int] = {}  # empty until the first data comes

    def describe(self, number: int, item: Item) -> None:
        """Make room for an item. Raises for what the file cannot hold."""
        if self._schema is not None:
            self._schema.check(item)
        if not item.path and item.kind is Kind.DICT:
            return
        if not isinstance(item, (TensorItem, AliasItem)) or len(item.path) != 1 or type(item.path[0]) is not str:
            raise SchemaError("a .safetensors file holds a flat dict of tensors only; receive this with decode")
        if item.path[0] == _METADATA:
            raise SchemaError(f"a .safetensors file cannot hold a tensor called {_METADATA}")
        if self._offsets:
            raise SchemaError("tensors described after data has begun; receive this stream with decode")
        tensor = replace(self._items[item.of], path=item.path) if isinstance(item, AliasItem) else item
        if tensor.dtype not in _NAMES:
            raise UnsupportedError(f"safetensors has no {tensor.dtype}")
        self._items[number] = tensor

    def write(self, piece: Piece) -> None:
        """Write a piece of a tensor; the first one settles the layout and writes the header."""
        if not self._offsets:
            self._settle()
        start = self._offsets[piece.item.path] + piece.start * piece.dtype.itemsize
        self._output.write_at(piece.data.data, start)

    def copy(self, event: Completed) -> None:
        """Write a completed tensor once more under each of its other names."""
        for alias in event.aliases:
            size = _bytes(self._items[event.number])
            buffer = memoryview(bytearray(min(size, _COPY)))
            for done in range(0, size, _COPY):
                part = buffer[: min(_COPY, size - done)]
                self._output.read_at(part, self._offsets[event.item.path] + done)
                self._output.write_at(part, self._offsets[alias.path] + done)

    def finish(self) -> None:
        """All data has come."""
        if not self._offsets:
            self._settle()
        if self._schema is not None:
            self._schema.check_complete()

    def _settle(self) -> None:
        # Widest dtypes first, as the safetensors library orders them, so that every tensor is aligned.
        order = sorted(self._items.values(), key=lambda item: (-item.dtype.itemsize, item.name))
        header: dict[str, Any] = {_METADATA: self.metadata} if self.metadata else {}
        begins, end = {}, 0
        for item in order:
            begins[item.path] = end
            end += _bytes(item)
            if end > self._limits.stream:  # every other name of a tensor is another copy of it here
                raise LimitError("safetensors file", self._limits.stream, end)
            header[item.name] = {
                "dtype": _NAMES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": [begins[item.path], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _MAX_HEADER:
            raise LimitError("safetensors header", _MAX_HEADER, len(text))
        self._output.write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)
        self._offsets = {path: 8 + len(text) + begin for path, begin in begins.items()}


def _bytes(item: TensorItem) -> int:
    return prod(item.shape) * item.dtype.itemsize
