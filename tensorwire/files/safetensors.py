"""`.safetensors` files to streams and back in O(frame) memory: the model is never loaded.

    transport.send(tensorwire.safetensors.encode("model.safetensors", codec="nf4"))
    tensorwire.safetensors.decode(transport.receive(), "received.safetensors")

A sharded checkpoint is one model: give its index (`model.safetensors.index.json`) or folder instead of a file. With
`max_shard_size`, `decode` writes one.

Needs neither torch nor the safetensors package. File format: https://huggingface.co/docs/safetensors, section Format.
Elements of less than a byte that no tensor library has (F6, and F4 whose rows end within a byte) are sent as bytes. The
metadata of the stream records their types under `tensorwire.safetensors`, and `decode` writes them as they were.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any, Final

from tensorwire import dtypes, streams
from tensorwire.errors import (
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    UnsupportedError,
)
from tensorwire.files.checkpoint import (
    BITS,
    INDEX,
    MAX_HEADER,
    METADATA,
    NAMES,
    PACKED,
    Checkpoint,
    SafetensorsFile,
    SafetensorsShards,
    open_checkpoint,
    unpacked,
)
from tensorwire.files.source import File
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage.atomic import new_folder, replacing, write_file
from tensorwire.storage.output import Output
from tensorwire.streams import Completed, ItemStart, Piece, Receiver, Report, Schema
from tensorwire.streams.codec_choice import CodecChoice
from tensorwire.tensor import Buffer, ViewFront
from tensorwire.wire import AliasItem, Item, Kind, StreamStart, TensorItem
from tensorwire.wire.names import Path

__all__ = ["Checkpoint", "SafetensorsFile", "SafetensorsShards", "decode", "encode", "open_checkpoint"]

_COPY: Final = 1 << 20


def encode(
    file: File,
    *,
    codec: CodecChoice = "raw",
    frame_size: int = streams.FRAME_SIZE,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of a stream of all tensors in a `.safetensors` file, read piece by piece as they are sent.

    `file`: a path, a seekable file object, or a sharded checkpoint: its `.index.json`, or a folder of shards. `codec`
    and `report` as in `tensorwire.encode`; a function gets (name, TensorView). The file's metadata is sent along. With
    `at_rest` the stream is laid out as `save_file` does, to become a `.tw` file that `open_file` can open. Raises,
    before the first buffer, FormatError or TruncatedError for a file that is not valid, EncodeError for tensors that
    cannot be sent.

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
            report=report,
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

    The file appears under its name only when the whole stream is verified. With `max_shard_size`, in bytes, `path`
    becomes a folder of files of at most that size (except for a tensor that is larger) and their index, with the names
    that Hugging Face uses; the folder must not exist yet, or be empty. The sender must describe all tensors before
    their data, as it does unless it encodes an iterator. Tied tensors are written once for each name, because the file
    format has no ties. Raises SchemaError for streams that such a file cannot hold, StorageError if it cannot be
    written.

        tensorwire.safetensors.decode(transport.receive(), "checkpoint", max_shard_size=5 * 10**9)
    """
    schema = None if expect is None else Schema.of(expect, ViewFront(), limits=limits)
    with Receiver(limits) as receiver:
        if max_shard_size is None:
            with replacing(path) as fd:
                _receive(receiver, source, _Layout(lambda count: [Output(fd, path)], None, schema, limits))
        elif type(max_shard_size) is not int or max_shard_size < 1:
            raise EncodeError(f"max_shard_size must be a number of bytes, as 5 * 10**9, not {max_shard_size!r}")
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
            write_file(os.path.join(folder, INDEX), [json.dumps(index, indent=2).encode()])


def _shard_names(count: int) -> list[str]:
    """The names that `transformers` gives to the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _closing(file: Checkpoint, buffers: Iterator[Buffer]) -> Iterator[Buffer]:
    with file:
        yield b""  # started here, so that the file is closed even if the stream is never read
        yield from buffers


class _Layout:
    """The files being written. The place of each tensor is known once the stream has described all of them.

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
        """Take the metadata of the stream. Raises FormatError if the entry that `encode` makes is malformed."""
        self._packed = unpacked(metadata.pop(PACKED)) if PACKED in metadata else {}
        self._metadata = metadata

    def describe(self, number: int, item: Item) -> None:
        """Make room for an item. Raises if the file cannot hold it."""
        if self._schema is not None:
            self._schema.check(item)
        if not item.path and item.kind is Kind.DICT:
            return
        if not isinstance(item, (TensorItem, AliasItem)) or len(item.path) != 1 or type(item.path[0]) is not str:
            raise SchemaError(
                "a .safetensors file holds a flat dict of tensors only; decode this to another kind of file"
            )
        if item.path[0] == METADATA:
            raise SchemaError(f"a .safetensors file cannot hold a tensor called {METADATA}")
        if self._places:
            raise SchemaError("tensors described after data has begun; receive this stream with decode")
        tensor = replace(self._items[item.of], path=item.path) if isinstance(item, AliasItem) else item
        if tensor.dtype not in NAMES:
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
        """Finish the files, after all data has arrived."""
        if not self._places:
            self._settle()
        if self._schema is not None:
            self._schema.check_complete()

    def _settle(self) -> None:
        self.size = sum(map(_bytes, self._items.values()))
        if self.size > self._limits.stream:  # every other name of a tensor is another copy of it here
            raise LimitError("safetensors file", self._limits.stream, self.size, field="stream")
        shards = self._divided()
        for number, (output, items) in enumerate(zip(self._outputs(len(shards)), shards, strict=True)):
            self.shards |= {_key(item): number for item in items}
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
        order = sorted(items, key=lambda item: (-item.dtype.itemsize, _key(item)))
        header: dict[str, Any] = {METADATA: self._metadata} if self._metadata else {}
        begins, end = {}, 0
        for item in order:
            begins[item.path] = end
            end += _bytes(item)
            dtype, shape = self._as_stored(item)
            header[_key(item)] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[item.path], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise LimitError("safetensors header", MAX_HEADER, len(text), field=None)
        output.write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)
        self._places |= {path: (output, 8 + len(text) + begin) for path, begin in begins.items()}

    def _as_stored(self, item: TensorItem) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape that a tensor has in a file. Raises FormatError if the metadata contradicts them."""
        if _key(item) in self._packed:
            dtype, shape = self._packed[_key(item)]
            if item.dtype != dtypes.UINT8 or prod(shape) * BITS[dtype] != _bytes(item) * 8:
                raise FormatError(
                    f"the metadata {PACKED} says {dtype} {list(shape)}, but the size differs", item=item.name
                )
            return dtype, shape
        if item.dtype == dtypes.FLOAT4_E2M1FN_X2:
            return NAMES[item.dtype], (*item.shape[:-1], item.shape[-1] * 2) if item.shape else (2,)
        return NAMES[item.dtype], item.shape


def _key(item: TensorItem) -> str:
    """The name of a tensor in a file, and in the file that it came from: its key, which is text."""
    return str(item.path[0])


def _bytes(item: TensorItem) -> int:
    return prod(item.shape) * item.dtype.itemsize
