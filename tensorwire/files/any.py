"""Files of any kind, streamed in fixed-size chunks and received under a temporary name until verified."""

import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs import Codec, parse
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Pool
from tensorwire.storage.atomic import replacing
from tensorwire.storage.output import Output, read_at
from tensorwire.streams.flatten import Leaf
from tensorwire.streams.receiver import Receiver, Sink
from tensorwire.streams.sender import FRAME_SIZE, encode_leaves, stream_info
from tensorwire.tensor import TensorView
from tensorwire.wire import ContainerItem, FileItem, Item, Kind
from tensorwire.wire.drive import as_source


def encode_file(
    file: str | os.PathLike | BinaryIO,
    *,
    codec: str | Codec = "raw",
    name: str | None = None,
    frame_size: int = FRAME_SIZE,
    limits: Limits = DEFAULT,
) -> Iterator[Any]:
    """The buffers of a stream that carries one file, read as it is sent.

    `file`: a path, or an open binary file of unknown length, a pipe for example. `codec`: raw or zstd. `name` is
    what the receiver is told (the file's own name); it never decides where the receiver writes.
    """
    chosen = parse(codec)
    if not chosen.accepts(dtypes.UINT8):
        raise EncodeError(f"{chosen} cannot carry a file; use raw or zstd")
    if hasattr(file, "read"):
        return _send(None, _piped(file), chosen, name or "-", frame_size, limits)
    return _open_and_send(file, chosen, name, frame_size, limits)


def _open_and_send(
    path: str | os.PathLike, codec: Codec, name: str | None, frame_size: int, limits: Limits
) -> Iterator[Any]:
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            size, read = status.st_size, file_reader(file.fileno(), 0, 1, Pool())
        else:  # a FIFO or device, whose size says nothing
            size, read = None, _piped(file)
        yield from _send(size, read, codec, name or os.path.basename(os.fspath(path)), frame_size, limits)


def _send(size: int | None, read: Any, codec: Codec, name: str, frame_size: int, limits: Limits) -> Iterator[Any]:
    view = TensorView(dtypes.UINT8, (size or 0,), read)
    item = FileItem((name,), size, codec.stages())
    leaves = [Leaf(ContainerItem((), Kind.DICT)), Leaf(item, view, codec)]
    return encode_leaves(leaves, frame_size=frame_size, info=stream_info(None), limits=limits)


def file_reader(fd: int, offset: int, itemsize: int, pool: Pool) -> Any:
    """`TensorView.read` over bytes of an open file from `offset` on, through pooled memory."""

    def read(start: int, stop: int) -> np.ndarray:
        buffer = pool.take((stop - start) * itemsize)
        if read_at(fd, memoryview(buffer), offset + start * itemsize) != buffer.size:
            raise EncodeError("the file became shorter while it was sent")
        return buffer

    return read


def _piped(file: BinaryIO) -> Any:
    def read(start: int, stop: int) -> bytes:
        parts = []
        wanted = stop - start
        while wanted and (part := file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    return read


def decode_file(source: Any, path: str | os.PathLike, *, limits: Limits = DEFAULT) -> str:
    """Receive a stream that carries one file into `path`, which appears only when complete and verified.

    Returns the name that the sender gave, which is data and not a path. Raises SchemaError for other streams,
    StorageError where the system does not take the file.
    """
    with replacing(path) as fd:
        receiver = Receiver(as_source(source), _OneFile(Output(fd, path)), limits)
        names = [item.name for _, item, _ in receiver]
        if not names:
            raise SchemaError("the stream carries no file")
    return names[0]


class _OneFile:
    """Accepts a dict with one file in it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._taken = False

    def __call__(self, number: int, item: Item) -> Sink | None:
        if not item.path and item.kind is Kind.DICT:
            return None
        if not isinstance(item, FileItem):
            raise SchemaError("the stream carries tensors, not a file; receive it with decode")
        if self._taken:
            raise SchemaError("the stream carries more than one file")
        self._taken = True
        return FileSink(self._output, 0, Pool())


class FileSink(Sink):
    """An item whose decoded bytes stand in an open file from `offset` on."""

    def __init__(self, output: Output, offset: int, pool: Pool) -> None:
        self._output = output
        self._offset = offset
        self._pool = pool

    def region(self, start: int, stop: int) -> np.ndarray:
        return self._pool.take(stop - start)

    def commit(self, start: int, region: np.ndarray) -> None:
        self._output.write_at(memoryview(region), self._offset + start)

    def close(self) -> None:
        return None
