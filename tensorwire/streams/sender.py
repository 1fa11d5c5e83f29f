"""Containers to buffers.

Everything about the container is checked, and every descriptor made, before the first buffer leaves; then each
tensor is encoded frame by frame. Buffers are either small bytes, the caller's own memory (raw), or pooled memory
that is used again once the consumer lets go of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from tensorwire import dtypes
from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec, Encoded
from tensorwire.errors import EncodeError, NonFiniteError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Pool
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.flatten import Leaf, Walk
from tensorwire.streams.overlap import in_order
from tensorwire.tensor import Extent, Front, TensorView
from tensorwire.wire import FileItem, StreamInfo, TensorItem, ValueItem, Writer
from tensorwire.wire.frames import HEADER_SIZE

FRAME_SIZE: Final = 1 << 20
_MIN_FRAME_SIZE: Final = 1 << 12
# A codec that shrinks sevenfold would make a frame's slice seven times as much memory on either side.
_DECODED: Final = 4
_PIECE: Final = 1 << 20  # raw frames larger than this are read and checksummed piece by piece


def encode(
    value: Any,
    front: Front,
    *,
    codec: CodecChoice = "raw",
    frame_size: int = FRAME_SIZE,
    metadata: Mapping[str, str] | None = None,
    stream_id: bytes = b"",
    tie: bool = True,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
) -> Iterator[Any]:
    """The buffers of one stream.

    `frame_size`: bytes of a data frame with its header, at most. `at_rest`: lay the stream out as a file, with an
    index, aligned payloads and each raw item in one frame, so that it can be mapped. An iterator of (name, tensor)
    pairs is sent as a dict without being collected first.
    """
    if not _MIN_FRAME_SIZE <= frame_size <= limits.frame:
        raise EncodeError(f"frame_size must be from {_MIN_FRAME_SIZE} to {limits.frame} bytes, not {frame_size!r}")
    writer = Writer(crc32c, limits, index=at_rest)
    emit = _Emitter(writer, frame_size, whole=at_rest)
    try:
        head = writer.start(stream_info(metadata, stream_id, align=64 if at_rest else 1))
    except WireError as error:
        raise EncodeError(error.detail) from None
    if isinstance(value, Iterator):
        # Memory of tensors that are made one after the other is used again: equal addresses mean nothing.
        return emit.pairs(head, value, Walk(front, rule(codec), limits, tie=False))
    return emit.container(head, Walk(front, rule(codec), limits, tie=tie).leaves(value))


def encode_leaves(leaves: list[Leaf], *, frame_size: int, info: StreamInfo, limits: Limits) -> Iterator[Any]:
    """The buffers of a stream whose items were made elsewhere: files, tensors inside files."""
    writer = Writer(crc32c, limits)
    emit = _Emitter(writer, frame_size, whole=False)
    return emit.container(writer.start(info), leaves)


def stream_info(metadata: Mapping[str, str] | None, stream_id: bytes = b"", *, align: int = 1) -> StreamInfo:
    """StreamInfo in canonical form. Raises EncodeError for metadata that is not text."""
    pairs = tuple((metadata or {}).items())
    if not all(type(key) is str and type(text) is str for key, text in pairs):
        raise EncodeError("metadata must map text to text")
    return StreamInfo(align, stream_id, tuple(sorted(pairs)))


class _Frame(NamedTuple):
    """A data frame to be sent: what its header says, and the buffers of its payload."""

    start: int
    count: int
    length: int
    crc: int
    payload: Iterable[Any]


class _Emitter:
    """Writes leaves through one Writer."""

    def __init__(self, writer: Writer, frame_size: int, *, whole: bool) -> None:
        self._writer = writer
        self._frame_size = frame_size
        self._whole = whole
        self._pool = Pool()

    def describe(self, leaf: Leaf) -> bytes:
        """The leaf's ITEM frame. Raises EncodeError, also where its codec's blocks do not fit into a frame."""
        if leaf.codec is not None and leaf.item.total != 0:
            slice_size(leaf.codec, leaf.item, self._frame_size)
        try:
            return self._writer.item(leaf.item)
        except WireError as error:
            raise EncodeError(error.detail, item=leaf.item.name) from None

    def container(self, head: bytes, leaves: Iterable[Leaf]) -> Iterator[Any]:
        """All buffers. Every item is described, and refused if it must be, before this returns."""
        parts, described = [head], []
        for leaf in leaves:
            parts.append(self.describe(leaf))
            described.append(leaf)
        return self._container(b"".join(parts), described)

    def _container(self, head: bytes, leaves: list[Leaf]) -> Iterator[Any]:
        yield head
        yield from self._data(leaves)
        yield self._writer.end()

    def pairs(self, head: bytes, pairs: Iterator[tuple[str, Any]], walk: Walk) -> Iterator[Any]:
        """All buffers of a dict that is still being produced."""
        yield head + self._writer.item(next(walk.leaves({})).item)
        for name, value in pairs:
            for leaf in walk.leaves(value, (name,)):
                yield self.describe(leaf)
                yield from self._data([leaf])
        yield self._writer.end()

    def _data(self, leaves: Iterable[Leaf]) -> Iterator[Any]:
        for frames in in_order(self._jobs(leaves)):
            for frame in frames:
                yield self._writer.data(*frame[:4])
                yield from frame.payload

    def _jobs(self, leaves: Iterable[Leaf]) -> Iterator[tuple[Callable[[], Iterable[_Frame]], int]]:
        """(job, size) for every piece of work; a job gives the frames to be sent next."""
        for leaf in leaves:
            if leaf.item.total == 0:
                continue
            if isinstance(leaf.item, ValueItem):
                yield partial(self._bytes, leaf.value), 0
            elif leaf.item.total is None:
                yield partial(self._open_ended, leaf), 0
            elif self._whole and leaf.codec.in_place:
                yield partial(self._in_one_frame, leaf.view), 0
            else:
                yield from self._slices(leaf)

    def _slices(self, leaf: Leaf) -> Iterator[tuple[Callable[[], Iterable[_Frame]], int]]:
        step = slice_size(leaf.codec, leaf.item, self._frame_size)
        context = leaf.codec.prepare(leaf.view)
        for start in range(0, leaf.item.total, step):
            stop = min(start + step, leaf.item.total)
            yield partial(self._slice, leaf, start, stop, context), (stop - start) * leaf.view.dtype.itemsize

    def _slice(self, leaf: Leaf, start: int, stop: int, context: Any) -> list[_Frame]:
        on_device = leaf.codec.on_device and leaf.view.device_read is not None
        data = (leaf.view.device_read if on_device else leaf.view.read)(start, stop)
        try:
            extent = Extent(leaf.view.dtype, leaf.view.shape, start, stop - start)
            encoded = leaf.codec.encode(data, extent, self._pool.take, context)
        except NonFiniteError as error:
            error.index += start
            error.item = leaf.item.name
            raise
        return [_frame(start, stop - start, encoded)]

    def _open_ended(self, leaf: Leaf) -> Iterator[_Frame]:
        step = slice_size(leaf.codec, leaf.item, self._frame_size)
        start = 0
        while data := leaf.view.read(start, start + step):
            extent = Extent(dtypes.UINT8, leaf.view.shape, start, len(data))
            yield _frame(start, len(data), leaf.codec.encode(data, extent, self._pool.take))
            start += len(data)
        yield _Frame(start, 0, 0, 0, ())

    def _in_one_frame(self, view: TensorView) -> list[_Frame]:
        """A raw item in a single frame. Its checksum stands before it, so its bytes are read twice."""
        step = max(_PIECE // view.dtype.itemsize, 1)
        pieces = [(start, min(start + step, view.numel)) for start in range(0, view.numel, step)]
        crc = 0
        for start, stop in pieces:
            crc = crc32c(view.read(start, stop), crc)
        payload = (view.read(start, stop) for start, stop in pieces)
        return [_Frame(0, view.numel, view.numel * view.dtype.itemsize, crc, payload)]

    def _bytes(self, data: bytes) -> Iterator[_Frame]:
        step = self._frame_size - HEADER_SIZE
        for start in range(0, len(data), step):
            part = memoryview(data)[start : start + step]
            yield _frame(start, len(part), Encoded(part))


def slice_size(codec: Codec, item: TensorItem | FileItem, frame_size: int) -> int:
    """Elements of a full slice of `item`: as many whole blocks as fit into a frame, encoded, and into
    `_DECODED` frames, decoded; at least one block, or an item that is smaller than one.

    Raises EncodeError where a frame is too small for that.
    """
    budget, dtype = frame_size - HEADER_SIZE, item.dtype
    block = codec.block(dtype)
    count = min(codec.fit(budget, dtype), max(_DECODED * frame_size // dtype.itemsize // block, 1) * block)
    if count:
        return count
    if item.total is not None and codec.sizes(item.total, dtype).total <= budget:
        return item.total
    raise EncodeError(
        f"one block of {codec} ({block} elements) does not fit into a frame of {frame_size} bytes; raise frame_size",
        item=item.name,
    )


def _frame(start: int, count: int, encoded: Encoded) -> _Frame:
    payload = memoryview(encoded.payload)
    crc = crc32c(payload, 0) if encoded.crc is None else encoded.crc
    return _Frame(start, count, payload.nbytes, crc, (payload,))
