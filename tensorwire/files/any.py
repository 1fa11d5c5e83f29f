"""Files of any kind, streamed in fixed-size chunks and received under a temporary name until verified."""

import os
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from typing import Any, BinaryIO

from tensorwire import dtypes
from tensorwire.codecs import Codec, parse
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.files.source import is_path, read_some
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Pool
from tensorwire.storage.atomic import replacing
from tensorwire.storage.output import Output, open_to_read, read_at
from tensorwire.streams import FRAME_SIZE, ItemStart, Piece, Receiver, Report, Sender, stream_info
from tensorwire.streams.flatten import BareLeaf, Leaf, TensorLeaf
from tensorwire.tensor import Buffer, ByteArray, TensorView
from tensorwire.wire import ContainerItem, FileItem, Item, Kind


def encode_file(
    file: str | os.PathLike[str] | BinaryIO,
    *,
    codec: str | Codec = "raw",
    name: str | None = None,
    frame_size: int = FRAME_SIZE,
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of a stream that carries one file, read as it is sent.

    `file`: a path, or an open binary file of unknown length, a pipe for example. `codec`: raw or zstd. `name` is
    what the receiver is told (the file's own name); it never decides where the receiver writes. `report`: as in
    `tensorwire.encode`.

        transport.send(tensorwire.encode_file("tokenizer.json", codec="zstd"))
    """
    chosen = parse(codec)
    if not chosen.accepts(dtypes.UINT8):
        raise EncodeError(f"{chosen} cannot carry a file; use raw or zstd")
    if is_path(file):
        # Opened now and not when it is read: by then the file may have another name, or the process another current
        # folder.
        opened, path = open_to_read(file), os.fsdecode(file)
        return _send_opened(opened, path, chosen, name, frame_size, limits, report)
    return _send(None, _piped(file), chosen, name or "-", frame_size, limits, report)


def _send_opened(
    opened: FileIO, path: str, codec: Codec, name: str | None, frame_size: int, limits: Limits, report: Report | None
) -> Iterator[Buffer]:
    with opened as file:
        status = os.fstat(file.fileno())
        name = name or os.path.basename(path)
        if stat.S_ISREG(status.st_mode):
            read = file_reader(file.fileno(), path, 0, 1, Pool())
            yield from _send(status.st_size, read, codec, name, frame_size, limits, report)
        else:  # a FIFO or device, whose reported size is meaningless
            yield from _send(None, _piped(file), codec, name, frame_size, limits, report)


def _send(
    size: int | None,
    read: Callable[[int, int], Buffer | ByteArray],
    codec: Codec,
    name: str,
    frame_size: int,
    limits: Limits,
    report: Report | None,
) -> Iterator[Buffer]:
    view = TensorView(dtypes.UINT8, (size or 0,), read)
    item = FileItem((name,), size, codec.stages())
    leaves: list[Leaf] = [BareLeaf(ContainerItem((), Kind.DICT)), TensorLeaf(item, view, codec)]
    return Sender(stream_info(None), frame_size, limits, report=report).container(leaves)


def file_reader(fd: int, path: str, offset: int, itemsize: int, pool: Pool) -> Callable[[int, int], ByteArray]:
    """`TensorView.read` over bytes of an open file from `offset` on, through pooled memory."""

    def read(start: int, stop: int) -> ByteArray:
        buffer = pool.take((stop - start) * itemsize)
        if read_at(fd, buffer.data, offset + start * itemsize) != buffer.size:
            raise EncodeError(f"{path!r} became shorter while it was read")
        return buffer

    return read


def _piped(file: Any) -> Callable[[int, int], bytes]:
    def read(start: int, stop: int) -> bytes:
        parts = []
        wanted = stop - start
        while wanted and (part := read_some(file, wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    return read


def decode_file(source: Any, path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> str:
    """Receive a stream that carries one file into `path`, which appears only when complete and verified.

    Returns the name that the sender gave, which is data and not a path. Raises SchemaError for other streams,
    StorageError if the file cannot be written.

        name = tensorwire.decode_file(transport.receive(), "received.bin")
    """
    names: list[str] = []
    with replacing(path) as fd, Receiver(limits) as receiver:
        output = Output(fd, path)
        for event in receiver.events(source):
            if isinstance(event, Piece):
                output.write_at(event.data.data, event.start)
            elif isinstance(event, ItemStart) and _is_file(event.item):
                names.append(str(event.item.path[-1]) if event.item.path else "")
                if len(names) > 1:
                    raise SchemaError("the stream carries more than one file")
        if not names:
            raise SchemaError("the stream carries no file")
    return names[0]


def _is_file(item: Item) -> bool:
    """Whether an item is the file, and not the dict around it. Raises SchemaError for any other item."""
    if not item.path and item.kind is Kind.DICT:
        return False
    if not isinstance(item, FileItem):
        raise SchemaError("the stream carries tensors, not a file; receive it with decode")
    return True
