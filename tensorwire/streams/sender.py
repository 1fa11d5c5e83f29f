"""Containers to buffers.

The whole container is checked, and every descriptor made, before the first buffer is yielded; then each tensor is
encoded frame by frame. Buffers are either small bytes, the caller's own memory (raw), or pooled memory that is reused
once the consumer releases it. An empty buffer means: send what you have gathered, because the next buffer still has to
be made.

The caller's own memory is checksummed when its header is made. If it changes before it is sent, the receiver refuses
the stream. Where that must not happen (files, messages), `private` streams carry copies.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any, Final, NamedTuple

import numpy as np

from tensorwire import dtypes
from tensorwire.checksum import crc32c
from tensorwire.codecs import RAW, Codec, Encoded
from tensorwire.errors import ArgumentError, EncodeError, LimitError, NonFiniteError, WireError
from tensorwire.limits import DEFAULT, Limits, check_limits
from tensorwire.memory import Pool
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.flatten import BareLeaf, Leaf, Rule, TensorLeaf, ValueLeaf, as_pair, flatten
from tensorwire.streams.overlap import in_order
from tensorwire.streams.receiver import EXPANDED
from tensorwire.streams.report import Report, check_report
from tensorwire.tensor import Buffer, ByteArray, Extent, Front, as_buffer
from tensorwire.wire import ContainerItem, FileItem, Kind, StreamInfo, TensorItem, Writer
from tensorwire.wire.frames import HEADER_SIZE, MOST_BUNDLED, bundle_table

FRAME_SIZE: Final = 1 << 20
ALIGNMENT: Final = 64  # of payloads in a file
_MIN_FRAME_SIZE: Final = 1 << 12
# Without this limit, a codec that shrinks sevenfold would need seven times the memory of a frame on either side.
_DECODED: Final = EXPANDED
_PART: Final = 1 << 20  # raw frames larger than this are read and checksummed part by part
# Small items are sent together: with frames of their own, each would cost ten times as much as its bytes. With only a
# few of them, that does not matter.
_SMALL: Final = 4 << 10  # bytes of a payload
_SMALL_OF_LARGE: Final = 64 << 10  # the same, if that is at most a hundredth of the decoded tensor
_BUNDLE: Final = 128 << 10  # bytes of a frame; reading any of its items reads all of it
_MANY: Final = 16  # items
FLUSH: Final = b""
# Receives (offset, bytes) that must overwrite earlier output.
Late = list[tuple[int, bytes]]


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
    private: bool = False,
    late: Late | None = None,
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of one stream.

    Options: as for `tensorwire.encode`. `at_rest`: lay the stream out as a file, with an index, aligned payloads
    and each raw item in one frame, so that it can be mapped. `private`: yield copies instead of the caller's memory;
    `at_rest` does so, too. `late`: called with headers that are made after their payload, for output that can be
    overwritten; without it, a large raw item that changes meanwhile is an EncodeError.
    """
    info = stream_info(metadata, stream_id, at_rest=at_rest)
    sender = Sender(info, frame_size, limits, at_rest=at_rest, private=private, late=late, report=report)
    choose = rule(codec, report)
    if isinstance(value, Iterator):
        return sender.pairs(value, front, choose)
    return sender.container(flatten(value, front, choose, limits, tie=tie))


def gather(buffers: Iterable[Any], size: int) -> Iterator[bytes]:
    """The bytes of a stream in portions of at most `size` bytes, for transports with a limited message size.

    `buffers`: of `encode`, for instance. Only a buffer larger than `size` is cut, so that a payload, one per frame,
    arrives in one portion if it fits. A decoder need not know where the cuts are.

        for message in tensorwire.gather(tensorwire.encode(weights), 4 << 20):
            queue.put(message)
    """
    if size < 1:
        raise ArgumentError(f"a portion must have at least one byte, not {size!r}")
    portion = BytesIO()
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        if portion.tell() and portion.tell() + len(rest) > size:
            yield portion.getvalue()
            portion = BytesIO()
        while len(rest) > size:
            yield bytes(rest[:size])
            rest = rest[size:]
        portion.write(rest)
    if portion.tell():
        yield portion.getvalue()


def stream_info(metadata: Mapping[str, str] | None, stream_id: bytes = b"", *, at_rest: bool = False) -> StreamInfo:
    """StreamInfo in canonical form. Raises EncodeError for metadata that is not text."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise EncodeError(f"metadata must map text to text; it is of type {type(metadata).__name__}")
    pairs = tuple((metadata or {}).items())
    if not all(type(key) is str and type(text) is str for key, text in pairs):
        raise EncodeError("metadata must map text to text")
    if not all(_travels(key) and _travels(text) for key, text in pairs):
        raise EncodeError("metadata with lone surrogates cannot be sent: it is not valid UTF-8")
    return StreamInfo(align=ALIGNMENT if at_rest else 1, id=stream_id, metadata=tuple(sorted(pairs)))


def _travels(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _EncodedSlice(NamedTuple):
    """A data frame to be sent: the fields of its header, its payload, and its item.

    `crc`: None if it is to be computed when the payload is sent.
    """

    start: int
    elements: int
    length: int
    crc: int | None
    payload: Iterable[Buffer]
    leaf: TensorLeaf | ValueLeaf


class _EncodedBundle(NamedTuple):
    """A bundle to be sent: its slices, each a whole item, and their joined payloads."""

    slices: list[_EncodedSlice]
    payloads: bytearray


_Job = Callable[[], Iterable[_EncodedSlice | _EncodedBundle]]


class Sender:
    """Writes leaves through one Writer, and counts them in a report."""

    def __init__(
        self,
        info: StreamInfo,
        frame_size: int,
        limits: Limits,
        *,
        at_rest: bool = False,
        private: bool = False,
        late: Late | None = None,
        report: Report | None = None,
    ) -> None:
        check_limits(limits)
        check_report(report)
        if type(frame_size) is not int or not _MIN_FRAME_SIZE <= frame_size <= limits.frame:
            raise EncodeError(f"frame_size must be from {_MIN_FRAME_SIZE} to {limits.frame} bytes, not {frame_size!r}")
        self._writer = Writer(crc32c, limits, index=at_rest)
        self._frame_size = frame_size
        self._limits = limits
        self._at_rest = at_rest
        self._private = private or at_rest
        self._late = late
        self._pool = Pool()
        self._report = report
        with _writing():
            self._start = self._framed(self._writer.start(info))

    def container(self, leaves: Iterable[Leaf]) -> Iterator[Buffer]:
        """All buffers. Before this returns, every item has been described, or refused."""
        described: list[Leaf] = []
        head = b"".join([self._start, *self._describe(leaves, described)])
        self._check_size(described)
        return self._container(head, described)

    def _check_size(self, leaves: Iterable[Leaf]) -> None:
        """Raise EncodeError if even the smallest encoding of these leaves exceeds the limit for a stream."""
        data = [leaf for leaf in leaves if not isinstance(leaf, BareLeaf)]
        begins, most = self._writer.offset, self._limits.stream
        if begins + 2 * sum((leaf.item.total or 0) * _width(leaf) + HEADER_SIZE for leaf in data) <= most:
            return  # the usual case, at a lower cost
        size = begins
        for group in gathered(data, self._frame_size):
            if len(group) > 1:
                size += HEADER_SIZE + sum(map(_least_payload, group))
            else:
                size += _least(group[0], self._frame_size, at_rest=self._at_rest)
        if size > most:
            raise EncodeError(LimitError("stream", self._limits.stream, size).detail)

    def _container(self, head: bytes, leaves: list[Leaf]) -> Iterator[Buffer]:
        yield head
        yield from self._data(leaves)
        yield self.end()

    def pairs(self, pairs: Iterator[tuple[str, Any]], front: Front, rule: Rule) -> Iterator[Buffer]:
        """All buffers of a dict that is still being produced."""
        yield self.head()
        yield FLUSH
        for pair in pairs:
            name, value = as_pair(pair)
            yield from self.pair(name, value, front, rule)
            yield FLUSH
        rule.finish()
        yield self.end()

    def head(self) -> bytes:
        """What comes before the first pair."""
        return self._start + b"".join(self._describe([BareLeaf(ContainerItem((), Kind.DICT))], []))

    def pair(self, name: str, value: Any, front: Front, rule: Rule) -> Iterator[Buffer]:
        """The buffers of one pair."""
        # Equal addresses mean nothing here: tensors that are made one after the other may reuse memory.
        leaves: list[Leaf] = []
        described = self._describe(flatten(value, front, rule, self._limits, path=(name,), tie=False), leaves)
        yield b"".join(described)
        yield from self._data(leaves)

    def end(self) -> bytes:
        """What comes last."""
        with _writing():
            return self._framed(self._writer.end())

    def _framed(self, data: bytes) -> bytes:
        """The writer's output, after counting its bytes."""
        if self._report is not None:
            self._report.framing += len(data)
        return data

    def _describe(self, leaves: Iterable[Leaf], described: list[Leaf]) -> Iterator[bytes]:
        """The ITEM frames of leaves; the leaves are appended to `described`.

        Raises EncodeError, naming the item; among others, if a block of its codec does not fit into a frame.
        """
        try:
            for frame in self._writer.items(self._noted(leaf, described).item for leaf in leaves):
                yield self._framed(frame)
        except WireError as error:
            raise EncodeError(error.detail, item=error.item or described[-1].item.name) from None

    def _noted(self, leaf: Leaf, described: list[Leaf]) -> Leaf:
        if isinstance(leaf, TensorLeaf) and leaf.item.total != 0:
            slice_size(leaf.codec, leaf.item, self._frame_size)
        if self._report is not None and not isinstance(leaf, BareLeaf):
            self._report.add_item(_spec(leaf))
        described.append(leaf)
        return leaf

    def _data(self, leaves: Iterable[Leaf]) -> Iterator[Buffer]:
        for slices in in_order(self._jobs(leaves)):
            for encoded in slices:
                if self._report is not None:
                    for part in encoded.slices if isinstance(encoded, _EncodedBundle) else (encoded,):
                        self._report.add_frame(_spec(part.leaf), part.elements * _width(part.leaf), part.length)
                if isinstance(encoded, _EncodedBundle):
                    table, payloads = bundle_table([part.length for part in encoded.slices]), encoded.payloads
                    size, crc = len(table) + len(payloads), crc32c(payloads, crc32c(table, 0))
                    yield self._framed(self._writer.bundle(len(encoded.slices), size, crc) + table)
                    yield payloads
                elif encoded.crc is None:
                    yield from self._header_late(encoded)
                else:
                    yield self._framed(self._header(encoded, encoded.crc))
                    yield from encoded.payload

    def _header_late(self, encoded: _EncodedSlice) -> Iterator[Buffer]:
        """A frame whose payload is read only once: zeros take the place of its header, which is made last."""
        assert self._late is not None
        offset = self._writer.offset
        yield self._framed(bytes(self._writer.data_header_size()))
        crc = 0
        for part in encoded.payload:
            crc = crc32c(part, crc)
            yield part
        self._late.append((offset, self._header(encoded, crc)))

    def _header(self, encoded: _EncodedSlice, crc: int) -> bytes:
        try:
            return self._writer.data(encoded.start, encoded.elements, encoded.length, crc)
        except WireError as error:
            raise EncodeError(error.detail, item=encoded.leaf.item.name) from None

    def _jobs(self, leaves: Iterable[Leaf]) -> Iterator[tuple[_Job, int]]:
        """(job, size in bytes) for every piece of work; a job returns the frames to be sent next."""
        for group in gathered(leaves, self._frame_size):
            leaf = group[0]
            if len(group) > 1:
                yield partial(self._bundle, group), 0
            elif isinstance(leaf, ValueLeaf):
                yield partial(self._value, leaf), 0
            elif leaf.item.total is None:
                yield partial(self._open_ended, leaf), 0
            elif self._at_rest and leaf.codec.in_place:
                yield partial(self._in_one_frame, leaf), 0
            else:
                yield from self._slices(leaf)

    def _slices(self, leaf: TensorLeaf) -> Iterator[tuple[_Job, int]]:
        context = leaf.codec.prepare(leaf.view)
        for start, stop in cuts(leaf, self._frame_size, at_rest=self._at_rest):
            yield partial(self._slice, leaf, start, stop, context), (stop - start) * leaf.view.dtype.itemsize

    def _slice(self, leaf: TensorLeaf, start: int, stop: int, context: Any) -> list[_EncodedSlice]:
        encoded = self._encode(leaf, start, stop, context)
        if self._private and leaf.codec.in_place:
            encoded = Encoded(self._copied(encoded.payload))
        return [_encoded(leaf, start, stop - start, encoded)]

    def _encode(self, leaf: TensorLeaf, start: int, stop: int, context: Any) -> Encoded:
        read = leaf.view.device_read if leaf.codec.on_device and leaf.view.device_read else leaf.view.read
        try:
            extent = Extent(leaf.view.dtype, leaf.view.shape, start, stop - start)
            return leaf.codec.encode(read(start, stop), extent, self._pool.take, context)
        except EncodeError as error:
            if isinstance(error, NonFiniteError):
                error.index += start
            error.item = leaf.item.name
            raise

    def _open_ended(self, leaf: TensorLeaf) -> Iterator[_EncodedSlice]:
        step = slice_size(leaf.codec, leaf.item, self._frame_size)
        start = 0
        while data := leaf.view.read(start, start + step):
            extent = Extent(dtypes.UINT8, leaf.view.shape, start, len(data))
            yield _encoded(leaf, start, len(data), leaf.codec.encode(data, extent, self._pool.take))
            start += len(data)
        yield _EncodedSlice(start, 0, 0, 0, (), leaf)

    def _in_one_frame(self, leaf: TensorLeaf) -> list[_EncodedSlice]:
        """A raw item in a single frame."""
        view = leaf.view
        step = max(_PART // view.dtype.itemsize, 1)
        if view.numel <= step:
            return [_encoded(leaf, 0, view.numel, Encoded(self._copied(_read(leaf, 0, view.numel))))]
        parts = [(start, min(start + step, view.numel)) for start in range(0, view.numel, step)]
        if self._late is None:
            crc = 0
            for start, stop in parts:
                crc = crc32c(_read(leaf, start, stop), crc)
            return [
                _EncodedSlice(0, view.numel, view.numel * view.dtype.itemsize, crc, self._again(leaf, parts, crc), leaf)
            ]
        payload = (self._copied(_read(leaf, start, stop)).data for start, stop in parts)
        return [_EncodedSlice(0, view.numel, view.numel * view.dtype.itemsize, None, payload, leaf)]

    def _again(self, leaf: TensorLeaf, parts: list[tuple[int, int]], expected: int) -> Iterator[Buffer]:
        """The parts, read again. Raises EncodeError after the last one if they differ from what was checksummed."""
        crc = 0
        for start, stop in parts:
            part = self._copied(_read(leaf, start, stop))
            crc = crc32c(part, crc)
            yield part.data
        if crc != expected:
            raise EncodeError("it was changed while it was written: copy it before, or wait", item=leaf.item.name)

    def _copied(self, data: Buffer | ByteArray) -> ByteArray:
        """The same bytes, in memory that nothing else writes to."""
        given = np.frombuffer(as_buffer(data), np.uint8)
        copy = self._pool.take(given.size)
        copy[:] = given
        return copy

    def _bundle(self, leaves: list[TensorLeaf | ValueLeaf]) -> list[_EncodedBundle]:
        """Small items, whole, copied into one payload."""
        slices, payloads = [], bytearray()
        for leaf in leaves:
            if isinstance(leaf, ValueLeaf):
                part, count = memoryview(leaf.data), len(leaf.data)
            else:
                count = leaf.view.numel
                part = memoryview(self._encode(leaf, 0, count, leaf.codec.prepare(leaf.view)).payload)
            payloads += part
            slices.append(_EncodedSlice(0, count, part.nbytes, 0, (), leaf))
        return [_EncodedBundle(slices, payloads)]

    def _value(self, leaf: ValueLeaf) -> Iterator[_EncodedSlice]:
        for start, stop in cuts(leaf, self._frame_size, at_rest=self._at_rest):
            yield _encoded(leaf, start, stop - start, Encoded(memoryview(leaf.data)[start:stop]))


@contextmanager
def _writing(leaf: Leaf | None = None) -> Iterator[None]:
    """Turn a WireError of the writer into an EncodeError: the caller's input is wrong, not received bytes."""
    try:
        yield
    except WireError as error:
        raise EncodeError(error.detail, item=None if leaf is None else leaf.item.name) from None


def _least(leaf: TensorLeaf | ValueLeaf, frame_size: int, *, at_rest: bool) -> int:
    """The fewest bytes that the frames of an item can take: for codecs that compress, only the headers."""
    total = leaf.item.total or 0
    if isinstance(leaf, ValueLeaf):
        return total + HEADER_SIZE
    if at_rest and leaf.codec.in_place:
        return total * leaf.item.dtype.itemsize + HEADER_SIZE
    frames = -(-total // slice_size(leaf.codec, leaf.item, frame_size)) if total else 0
    return _least_payload(leaf) + frames * HEADER_SIZE


def _least_payload(leaf: TensorLeaf | ValueLeaf) -> int:
    total = leaf.item.total or 0
    if isinstance(leaf, ValueLeaf):
        return total
    return leaf.codec.sizes(total, leaf.item.dtype).total if leaf.codec.exact_length else 0


def gathered(leaves: Iterable[Leaf], frame_size: int) -> Iterator[list[TensorLeaf | ValueLeaf]]:
    """The leaves with data, grouped: those that are sent in one bundle are together."""
    group: list[TensorLeaf | ValueLeaf] = []
    used = HEADER_SIZE
    for leaf in leaves:
        if isinstance(leaf, BareLeaf) or leaf.item.total == 0:
            continue
        size = _small(leaf, frame_size)
        most = frame_size if _expands(leaf) else min(_BUNDLE, frame_size)
        if not size or used + size > most or len(group) == MOST_BUNDLED:
            yield from _bundled(group)
            group, used = [], HEADER_SIZE
        if size:
            group.append(leaf)
            used += size
        else:
            yield [leaf]
    yield from _bundled(group)


def _bundled(group: list[TensorLeaf | ValueLeaf]) -> Iterable[list[TensorLeaf | ValueLeaf]]:
    return [group] if len(group) >= _MANY else [[leaf] for leaf in group]


def _expands(leaf: TensorLeaf | ValueLeaf) -> bool:
    return isinstance(leaf, TensorLeaf) and leaf.codec.packer.expands


def _small(leaf: TensorLeaf | ValueLeaf, frame_size: int) -> int:
    """The most bytes that an item takes in a bundle; 0 if it has frames of its own."""
    total, most = leaf.item.total, _SMALL
    if total is None:
        return 0
    if isinstance(leaf, TensorLeaf) and leaf.codec.packer.expands:  # never received in place, and never mapped
        most = _SMALL_OF_LARGE if total * leaf.item.dtype.itemsize <= _DECODED * frame_size else 0
    elif total > _SMALL:  # in elements: no other codec makes them smaller than half a byte
        return 0
    size = total if isinstance(leaf, ValueLeaf) else leaf.codec.bound(total, leaf.item.dtype)
    return size + 4 if size <= most else 0


def cuts(leaf: TensorLeaf | ValueLeaf, frame_size: int, *, at_rest: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of each slice of an item whose size is known."""
    total = leaf.item.total or 0
    if isinstance(leaf, ValueLeaf):
        step = frame_size - HEADER_SIZE
    elif at_rest and leaf.codec.in_place:
        step = total
    else:
        step = slice_size(leaf.codec, leaf.item, frame_size)
    for start in range(0, total, step or 1):
        yield start, min(start + step, total)


def slice_size(codec: Codec, item: TensorItem | FileItem, frame_size: int) -> int:
    """Elements of a full slice of `item`.

    As many whole blocks as fit into one frame when encoded, and into `_DECODED` frames when decoded; at least one
    block, or an item that is smaller than a block. For a codec that expands, not even one block may be larger when
    decoded. Raises EncodeError if a frame is too small.
    """
    budget, dtype = frame_size - HEADER_SIZE, item.dtype
    block = codec.block(dtype)
    most = _DECODED * frame_size // dtype.itemsize
    if not codec.packer.expands:
        most = max(most, block)
    count = min(codec.fit(budget, dtype), most // block * block)
    if count:
        return count
    if item.total is not None and item.total <= most and codec.sizes(item.total, dtype).total <= budget:
        return item.total
    raise EncodeError(
        f"one block of {codec} ({block} elements) does not fit into a frame of {frame_size} bytes; raise frame_size",
        item=item.name,
    )


def _read(leaf: TensorLeaf, start: int, stop: int) -> Buffer:
    try:
        return as_buffer(leaf.view.read(start, stop))
    except EncodeError as error:
        error.item = leaf.item.name
        raise


def _encoded(leaf: TensorLeaf | ValueLeaf, start: int, count: int, encoded: Encoded) -> _EncodedSlice:
    payload = memoryview(encoded.payload)
    crc = crc32c(payload, 0) if encoded.crc is None else encoded.crc
    return _EncodedSlice(start, count, payload.nbytes, crc, (payload,), leaf)


def _spec(leaf: TensorLeaf | ValueLeaf) -> str:
    return repr(RAW if isinstance(leaf, ValueLeaf) else leaf.codec)


def _width(leaf: TensorLeaf | ValueLeaf) -> int:
    return 1 if isinstance(leaf, ValueLeaf) else leaf.item.dtype.itemsize


class StreamSize(NamedTuple):
    """Bytes of a stream: payloads (`metadata` of them for absmax, scales and the like) and framing."""

    payloads: int
    metadata: int
    framing: int

    @property
    def total(self) -> int:
        """All bytes of the stream."""
        return self.payloads + self.framing


def stream_size(
    leaves: Iterable[Leaf],
    *,
    info: StreamInfo | None = None,
    frame_size: int = FRAME_SIZE,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
) -> StreamSize:
    """The size of a stream of these leaves, without the data of files whose size is not known in advance."""
    with _writing():
        return _stream_size(
            list(leaves), info or stream_info(None, at_rest=at_rest), frame_size, limits, at_rest=at_rest
        )


def _stream_size(leaves: list[Leaf], info: StreamInfo, frame_size: int, limits: Limits, *, at_rest: bool) -> StreamSize:
    # Lengths do not depend on checksums, so nothing is checksummed.
    writer = Writer(lambda data, crc: 0, limits, index=at_rest)
    framing = len(writer.start(info))
    framing += sum(map(len, writer.items(leaf.item for leaf in leaves)))
    payloads = metadata = 0
    for group in gathered(leaves, frame_size):
        carried = [_lengths(leaf, leaf.item.total or 0) for leaf in group]
        if len(group) > 1:
            length = sum(length for length, _ in carried)
            framing += len(writer.bundle(len(group), length + 4 * len(group), 0)) + 4 * len(group)
        else:
            pieces = [(start, stop - start) for start, stop in cuts(group[0], frame_size, at_rest=at_rest)]
            carried = [_lengths(group[0], count) for _, count in pieces]
            for (start, count), (length, _) in zip(pieces, carried, strict=True):
                framing += len(writer.data(start, count, length, 0))
        payloads += sum(length for length, _ in carried)
        metadata += sum(extra for _, extra in carried)
    return StreamSize(payloads, metadata, framing + len(writer.end()))


def _lengths(leaf: TensorLeaf | ValueLeaf, count: int) -> tuple[int, int]:
    """The most bytes that the payload of a slice can take, and how many of them are metadata."""
    if isinstance(leaf, ValueLeaf):
        return count, 0
    dtype = leaf.item.dtype
    return leaf.codec.bound(count, dtype), leaf.codec.sizes(count, dtype).metadata
