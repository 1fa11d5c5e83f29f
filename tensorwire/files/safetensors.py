"""`.safetensors` files to streams and back in O(frame) memory: the model is never loaded.

    transport.send(tensorwire.safetensors.encode("model.safetensors", codec="nf4"))
    tensorwire.safetensors.decode(transport.receive(), "received.safetensors")

A sharded checkpoint is one model: its index (`model.safetensors.index.json`) or folder is read as one file is, and
written where `max_shard_size` is given.

Needs neither torch nor the safetensors package. File format: https://huggingface.co/docs/safetensors, section Format.
Elements of less than a byte that no tensor library has (F6, and F4 whose rows end within a byte) travel as bytes; the
metadata of the stream says under `tensorwire.safetensors` what they are, and `decode` writes them as they were.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any, Final

from tensorwire import dtypes, streams
from tensorwire.dtypes import DType
from tensorwire.errors import (
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    TruncatedError,
    UnsupportedError,
    WireError,
    show,
)
from tensorwire.files.source import HEAD, File, Source, is_path, name_error, source
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Pool
from tensorwire.storage.atomic import new_folder, replacing, write_file
from tensorwire.storage.output import Output
from tensorwire.streams import Completed, Piece, Receiver, Schema
from tensorwire.streams.codec_choice import CodecChoice
from tensorwire.tensor import Buffer, ByteArray, TensorView, ViewFront
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
    dtypes.FLOAT4_E2M1FN_X2: "F4",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
# Of those that are no whole bytes; a shape counts elements.
_BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_PACKED: Final = "tensorwire.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def encode(
    file: File,
    *,
    codec: CodecChoice = "raw",
    frame_size: int = streams.FRAME_SIZE,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
) -> Iterator[Buffer]:
    """The buffers of a stream of all tensors in a `.safetensors` file, read piece by piece as they are sent.

    `file`: a path, a seekable file object, or a sharded checkpoint: its `.index.json`, or a folder of shards. `codec`
    as in `tensorwire.encode`; a function gets (name, TensorView). The file's metadata travels along. With `at_rest` the
    stream is laid out as `save_file` does, to become a `.tw` file that `open_file` can open. Raises, before the first
    buffer, FormatError or TruncatedError for a file that is not valid, EncodeError for what cannot be sent.

        transport.send(tensorwire.safetensors.encode("checkpoint/", codec="bf16|zstd"))
    """
    opened = open_checkpoint(file)
    try:
        buffers = streams.encode(
            dict(opened),
            ViewFront(),
            codec=codec,
            frame_size=frame_size,
            metadata=opened.metadata,
            at_rest=at_rest,
            limits=limits,
        )
    except BaseException:
        opened.close()
        raise
    stream = _closing(opened, buffers)
    next(stream)
    return stream


def decode(
    source: Any,
    path: str | os.PathLike[str],
    *,
    expect: Schema | None = None,
    max_shard_size: int | None = None,
    limits: Limits = DEFAULT,
) -> None:
    """Receive a stream of a flat dict of tensors into a `.safetensors` file, decoded, slice by slice.

    The file appears under its name only when the whole stream is verified. With `max_shard_size`, in bytes, `path` is a
    folder that is made, of files of at most that size (but for a tensor that is larger) and their index, named as
    Hugging Face names them; it may not exist yet, unless it is empty. The sender must describe all tensors before their
    data, as every sender does that knows its container. Tied tensors are written once each, since the file format has
    no ties. Raises SchemaError for streams that such a file cannot hold, StorageError where the system does not take
    the file.

        tensorwire.safetensors.decode(transport.receive(), "checkpoint", max_shard_size=5 * 10**9)
    """
    schema = None if expect is None else Schema.of(expect, ViewFront())
    with Receiver(limits) as receiver:
        if max_shard_size is None:
            with replacing(path) as fd:
                _receive(receiver, source, _Layout(lambda count: [Output(fd, path)], None, schema, limits))
        elif max_shard_size < 1:
            raise EncodeError(f"max_shard_size must be a number of bytes, not {max_shard_size}")
        else:
            _receive_shards(receiver, source, path, max_shard_size, schema, limits)


def _receive(receiver: Receiver, source: Any, layout: "_Layout") -> None:
    for event in receiver.events(source):
        if isinstance(event, Piece):
            layout.write(event)
        elif isinstance(event, ItemStart):
            layout.describe(event.number, event.item)
        elif isinstance(event, Completed):
            layout.copy(event)
        elif isinstance(event, StreamStart):
            layout.open(dict(event.info.metadata))
    layout.finish()


def _receive_shards(
    receiver: Receiver,
    source: Any,
    path: str | os.PathLike[str],
    max_shard_size: int,
    schema: Schema | None,
    limits: Limits,
) -> None:
    names: list[str] = []
    with new_folder(path) as folder:
        with ExitStack() as files:

            def outputs(count: int) -> list[Output]:
                names.extend(_shard_names(count))
                paths = [os.path.join(folder, name) for name in names]
                return [Output(files.enter_context(replacing(path)), path) for path in paths]

            layout = _Layout(outputs, max_shard_size, schema, limits)
            _receive(receiver, source, layout)
        if len(names) > 1:
            weight_map = {name: names[shard] for name, shard in sorted(layout.shards.items())}
            index = {"metadata": {"total_size": layout.size}, "weight_map": weight_map}
            write_file(os.path.join(folder, _INDEX), [json.dumps(index, indent=2).encode()])


def _shard_names(count: int) -> list[str]:
    """As `transformers` names the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


class Checkpoint(Mapping[str, TensorView]):
    """Tensors at rest as a mapping of names to views that read from them; a context manager. See `open_checkpoint`."""

    metadata: dict[str, str]
    _views: dict[str, TensorView]

    def __getitem__(self, name: str) -> TensorView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; views can no longer be read."""
        raise NotImplementedError


def open_checkpoint(file: File) -> Checkpoint:
    """Names to views of a `.safetensors` file, or of a sharded checkpoint, by its `.index.json` or its folder.

    with tensorwire.safetensors.open_checkpoint("checkpoint/") as tensors:
        print(len(tensors), tensors["lm_head.weight"].shape)
    """
    if is_path(file):
        path = os.fsdecode(file)
        if os.path.isdir(path):
            index = os.path.join(path, _INDEX)
            return SafetensorsShards(index if os.path.exists(index) else path)
        if path.endswith(".json"):
            return SafetensorsShards(path)
    return SafetensorsFile(file)


class SafetensorsShards(Checkpoint):
    """A sharded checkpoint: the files that an index lists, or all `.safetensors` files of a folder.

    Raises FormatError where the index and the files disagree, or two files have a tensor of one name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.metadata = {}
        self._views = {}
        self._files: list[SafetensorsFile] = []
        self._path = os.fsdecode(path)
        wanted = None if os.path.isdir(self._path) else self._read_index()
        folder = self._path if wanted is None else os.path.dirname(self._path)
        names = set(wanted.values()) if wanted is not None else _shards_in(folder)
        packed: dict[str, Any] = {}
        try:
            for name in sorted(names):
                file = SafetensorsFile(os.path.join(folder, name))
                self._files.append(file)
                packed |= file.packed
                self._add(file)
            self._check(wanted)
        except BaseException:
            self.close()
            raise
        self.metadata |= _packed_metadata(packed)

    def close(self) -> None:
        """Close all files; views can no longer be read."""
        for file in self._files:
            file.close()

    def _read_index(self) -> dict[str, str]:
        """File names by tensor. Raises FormatError, also for a name that leads out of the folder."""
        if os.path.getsize(self._path) > _MAX_HEADER:
            raise LimitError("safetensors index", _MAX_HEADER, os.path.getsize(self._path))
        with open(self._path, "rb") as file:
            text = file.read()
        try:
            index = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"the index is not JSON: {error}") from None
        names = index.get("weight_map") if type(index) is dict else None
        if not names or not _is_text_map(names):
            raise self._wrong("the index has no weight_map of tensors to files")
        for name in names.values():
            if os.path.basename(name) != name or name in ("", os.curdir, os.pardir) or "\\" in name or "\0" in name:
                raise self._wrong(f"the index names {show(name)}, which is no file beside it")
        return names  # type: ignore[no-any-return]  # which has just been checked

    def _add(self, file: "SafetensorsFile") -> None:
        for name in file.keys() & self._views.keys():
            raise self._wrong("two files have a tensor of this name", item=name)
        self._views |= file
        for key, text in file.own_metadata.items():
            if self.metadata.setdefault(key, text) != text:
                raise self._wrong(f"the files differ in their metadata {show(key)}: make it equal, or remove it")

    def _check(self, wanted: Mapping[str, str] | None) -> None:
        if wanted is None:
            return
        for file in self._files:
            for name in file:
                if wanted.get(name) != os.path.basename(file.name):
                    raise self._wrong("the index does not list this tensor in the file that has it", item=name)
        for name in wanted.keys() - self._views.keys():
            raise self._wrong(f"the index has this tensor in {show(wanted[name])}, which has not", item=name)

    def _wrong(self, detail: str, item: str | None = None) -> FormatError:
        error = FormatError(detail, item=item)
        error.file = self._path
        return error


def _shards_in(folder: str) -> list[str]:
    names = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    if not names:
        error = FormatError("a folder without .safetensors files is no checkpoint")
        error.file = folder
        raise error
    return names


class SafetensorsFile(Checkpoint):
    """A `.safetensors` file, by its path or as a seekable file object.

    Offsets, sizes and dtypes are checked against the file before anything is read through them. `own_metadata`: as it
    stands in the file; `metadata`: with what `packed` says of tensors that travel as bytes, by name: dtype and shape.
    """

    def __init__(self, file: File) -> None:
        self._source = source(file)
        self.name = self._source.name
        self.packed: dict[str, Any] = {}
        try:
            header, begin, size = self._read_header()
            metadata = header.pop(_METADATA, {})
            if not _is_text_map(metadata):
                raise FormatError("safetensors metadata must map text to text")
            self.own_metadata: dict[str, str] = metadata
            self._views = self._make_views(header, begin, size)
            self.metadata = metadata | _packed_metadata(self.packed)
        except WireError as error:
            head = bytes(self._source.read(0, min(HEAD, self._source.size)))
            self.close()
            name_error(error, self.name, head, b"")
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; views can no longer be read."""
        self._source.close()

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        size = self._source.size
        if size < 8:
            raise TruncatedError("too short for a safetensors file", offset=size)
        length = int.from_bytes(self._source.read(0, 8), "little")
        if length > _MAX_HEADER:
            raise LimitError("safetensors header", _MAX_HEADER, length)
        if 8 + length > size:
            raise TruncatedError("the safetensors header reaches beyond the end of the file", offset=size)
        try:
            header = json.loads(bytes(self._source.read(8, length)))
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
        for name, stored, shape, start, stop in entries:
            if start != end:
                raise FormatError("tensors overlap or leave holes", item=name)
            end = stop
            dtype, unpacked = _as_sent(stored, shape, stop - start)
            if dtype == dtypes.UINT8 and stored != "U8":
                self.packed[name] = [stored, list(shape)]
            views[name] = TensorView(dtype, unpacked, _reader(self._source, begin + start, dtype.itemsize, pool))
        if end != size:
            hint = ": it was cut short" if end > size else ""
            raise FormatError(f"tensors take {end} bytes, the file has {size}{hint}")
        return views


def _reader(source: Source, offset: int, itemsize: int, pool: Pool) -> Callable[[int, int], ByteArray]:
    """`TensorView.read` over bytes of a file from `offset` on, through pooled memory."""

    def read(start: int, stop: int) -> ByteArray:
        buffer = pool.take((stop - start) * itemsize)
        source.read_into(offset + start * itemsize, buffer.data)
        return buffer

    return read


def _as_sent(stored: str, shape: tuple[int, ...], size: int) -> tuple[DType, tuple[int, ...]]:
    """The dtype and shape that a tensor of the file travels with."""
    if stored not in _BITS:
        return _DTYPES[stored], shape
    if stored in _DTYPES and shape and shape[-1] % 2 == 0:
        return _DTYPES[stored], (*shape[:-1], shape[-1] // 2)
    return dtypes.UINT8, (size,)


def _packed_metadata(packed: Mapping[str, Any]) -> dict[str, str]:
    return {_PACKED: json.dumps(packed, separators=(",", ":"), sort_keys=True)} if packed else {}


def _unpacked(text: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape, in a file, of tensors that travel as bytes. Raises FormatError."""
    try:
        packed = json.loads(text)
        found = {name: (dtype, tuple(shape)) for name, (dtype, shape) in packed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"the metadata {_PACKED} does not say what tensors are") from None
    for name, (dtype, shape) in found.items():
        if dtype not in _BITS or any(type(n) is not int or n < 0 for n in shape):
            raise FormatError(f"the metadata {_PACKED} does not say what it is", item=name)
    return found


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a safetensors entry must have dtype, shape and data_offsets", item=name)
    if type(entry["dtype"]) is not str:
        raise FormatError("dtype must be text", item=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES and dtype not in _BITS:
        raise UnsupportedError(f"unknown safetensors dtype {show(dtype)}", item=name)
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise FormatError("shape and data_offsets must be lists of non-negative integers", item=name)
    if len(shape) > DEFAULT.ndim:
        raise LimitError("ndim", DEFAULT.ndim, len(shape), item=name)
    bits = _BITS[dtype] if dtype in _BITS else _DTYPES[dtype].itemsize * 8
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != prod(shape) * bits:
        raise FormatError("data_offsets do not match dtype and shape", item=name)
    return name, dtype, tuple(shape), *offsets


def _is_text_map(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for text in value.values())


def _closing(file: Checkpoint, buffers: Iterator[Buffer]) -> Iterator[Buffer]:
    with file:
        yield b""  # begun, so that the file is closed even if the stream never is
        yield from buffers


class _Layout:
    """The files being written: where each tensor goes is known once the stream has described all of them.

    `outputs` opens as many files as there are shards. `shards`: the number of the shard of each tensor; `size`: bytes
    of all tensors.
    """

    def __init__(
        self,
        outputs: Callable[[int], list[Output]],
        max_shard_size: int | None,
        schema: Schema | None,
        limits: Limits,
    ) -> None:
        self.shards: dict[str, int] = {}
        self.size = 0
        self._outputs = outputs
        self._max_shard_size = max_shard_size
        self._schema = schema
        self._limits = limits
        self._metadata: dict[str, str] = {}
        self._packed: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._items: dict[int, TensorItem] = {}
        self._places: dict[Path, tuple[Output, int]] = {}  # empty until the first data comes

    def open(self, metadata: dict[str, str]) -> None:
        """Take the metadata of the stream. Raises FormatError for what `encode` says in it."""
        self._packed = _unpacked(metadata.pop(_PACKED)) if _PACKED in metadata else {}
        self._metadata = metadata

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
        if self._places:
            raise SchemaError("tensors described after data has begun; receive this stream with decode")
        tensor = replace(self._items[item.of], path=item.path) if isinstance(item, AliasItem) else item
        if tensor.dtype not in _NAMES:
            raise UnsupportedError(f"safetensors has no {tensor.dtype}")
        self._items[number] = tensor

    def write(self, piece: Piece) -> None:
        """Write a piece of a tensor; the first one settles the layout and writes the headers."""
        if not self._places:
            self._settle()
        output, begin = self._places[piece.item.path]
        output.write_at(piece.data.data, begin + piece.start * piece.dtype.itemsize)

    def copy(self, event: Completed) -> None:
        """Write a completed tensor once more under each of its other names."""
        for alias in event.aliases:
            size = _bytes(self._items[event.number])
            buffer = memoryview(bytearray(min(size, _COPY)))
            (source, begin), (target, place) = self._places[event.item.path], self._places[alias.path]
            for done in range(0, size, _COPY):
                part = buffer[: min(_COPY, size - done)]
                source.read_at(part, begin + done)
                target.write_at(part, place + done)

    def finish(self) -> None:
        """All data has come."""
        if not self._places:
            self._settle()
        if self._schema is not None:
            self._schema.check_complete()

    def _settle(self) -> None:
        self.size = sum(map(_bytes, self._items.values()))
        if self.size > self._limits.stream:  # every other name of a tensor is another copy of it here
            raise LimitError("safetensors file", self._limits.stream, self.size)
        shards = self._divided()
        for number, (output, items) in enumerate(zip(self._outputs(len(shards)), shards, strict=True)):
            self.shards |= {item.name: number for item in items}
            self._write_header(output, items)

    def _divided(self) -> list[list[TensorItem]]:
        """The tensors of each file, in the order of the stream."""
        shards: list[list[TensorItem]] = [[]]
        size = 0
        for item in self._items.values():
            size += _bytes(item)
            if self._max_shard_size is not None and size > self._max_shard_size and shards[-1]:
                shards.append([])
                size = _bytes(item)
            shards[-1].append(item)
        return shards

    def _write_header(self, output: Output, items: list[TensorItem]) -> None:
        # Widest dtypes first, as the safetensors library orders them, so that every tensor is aligned.
        order = sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))
        header: dict[str, Any] = {_METADATA: self._metadata} if self._metadata else {}
        begins, end = {}, 0
        for item in order:
            begins[item.path] = end
            end += _bytes(item)
            dtype, shape = self._as_stored(item)
            header[item.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[item.path], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _MAX_HEADER:
            raise LimitError("safetensors header", _MAX_HEADER, len(text))
        output.write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)
        self._places |= {path: (output, 8 + len(text) + begin) for path, begin in begins.items()}

    def _as_stored(self, item: TensorItem) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape that a tensor has in a file. Raises FormatError where the metadata says another."""
        if item.name in self._packed:
            dtype, shape = self._packed[item.name]
            if item.dtype != dtypes.UINT8 or prod(shape) * _BITS[dtype] != _bytes(item) * 8:
                raise FormatError(f"the metadata {_PACKED} says {dtype} {list(shape)}, which it is not", item=item.name)
            return dtype, shape
        if item.dtype == dtypes.FLOAT4_E2M1FN_X2:
            return _NAMES[item.dtype], (*item.shape[:-1], item.shape[-1] * 2) if item.shape else (2,)
        return _NAMES[item.dtype], item.shape


def _bytes(item: TensorItem) -> int:
    return prod(item.shape) * item.dtype.itemsize
