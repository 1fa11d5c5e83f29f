"""Shows what a stream holds and whether it is valid: `inspect` reads frames, `verify` decodes all and keeps nothing.

Both take a path, or a source as `tensorwire.decode` does, and read it from its first byte to its last in
O(frame) memory.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tensorwire.codecs import binding_of, from_stages
from tensorwire.errors import WireError
from tensorwire.files.source import opened
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams import ItemStart, Payload, Receiver
from tensorwire.streams.patches import CODEC
from tensorwire.tensor import Extent
from tensorwire.transfer.frames import Frame, Frames
from tensorwire.wire import (
    AliasItem,
    Bundle,
    FileItem,
    Item,
    ItemsStart,
    Slice,
    StreamEnd,
    StreamInfo,
    StreamStart,
    TensorItem,
)
from tensorwire.wire.drive import as_source
from tensorwire.wire.frames import HEADER_SIZE, PREAMBLE_SIZE
from tensorwire.wire.items import CodecSpec
from tensorwire.wire.ledger import END_SIZE

_CHUNK: Final = 1 << 20
PATCH: Final[CodecSpec] = CODEC.stages()


@dataclass(frozen=True, slots=True)
class Verified:
    """A valid stream: its numbers of items, frames and bytes, and the SHA-256 in its END frame."""

    items: int
    frames: int
    size: int
    digest: str


@dataclass(slots=True)
class ItemReport:
    """One item: its description, and its bytes decoded (`size`) and on the wire (`wire_size`, without headers).

    `dtype` and `shape` are None except for tensors, `codec` for items without one, `alias_of` except for aliases.
    `complete`: whether all of its data has arrived. For a tensor in a patch, `changed` counts the numbers that differ
    from the base, and `ways` the slices by how they are coded (`tensorwire.codecs.WAYS`).
    """

    item: Item
    codec: str | None
    size: int = 0
    wire_size: int = 0
    complete: bool = False
    changed: int = 0
    ways: Counter[str] = field(default_factory=Counter)

    @property
    def dtype(self) -> str | None:
        """The name of the element type."""
        return self.item.dtype.name if isinstance(self.item, TensorItem) else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Outermost dimension first."""
        return self.item.shape if isinstance(self.item, TensorItem) else None

    @property
    def alias_of(self) -> int | None:
        """The number of the item that this is another name for."""
        return self.item.of if isinstance(self.item, AliasItem) else None

    @property
    def ratio(self) -> float | None:
        """Decoded bytes over bytes on the wire."""
        return self.size / self.wire_size if self.wire_size else None


@dataclass(slots=True)
class Inspection:
    """What a stream holds: all of it, or up to where it breaks (`error`, and `broken`, the frame that it breaks in).

    `digest`: the SHA-256 in the END frame, None if the stream is broken.
    """

    info: StreamInfo = field(default_factory=StreamInfo)
    items: list[ItemReport] = field(default_factory=list)
    frames: int = 0
    wire_size: int = PREAMBLE_SIZE
    digest: str | None = None
    error: WireError | None = None
    broken: Frame | None = None

    @property
    def size(self) -> int:
        """Bytes of all items, decoded."""
        return sum(item.size for item in self.items)

    @property
    def changed(self) -> int:
        """Numbers that a patch changes."""
        return sum(item.changed for item in self.items)

    @property
    def ways(self) -> "Counter[str]":
        """The number of slices of a patch by how they are coded."""
        return sum((item.ways for item in self.items), Counter())

    @property
    def framing(self) -> int:
        """Bytes on the wire that are not payload of an item."""
        return self.wire_size - sum(item.wire_size for item in self.items)


def inspect(
    source: Any, *, on_frame: Callable[[Frame], None] = lambda frame: None, limits: Limits = DEFAULT
) -> Inspection:
    """Describe a stream without decoding payloads; checksums and the order of frames are checked.

    `source`: a path, or what `decode` takes. `on_frame`: called with each frame as it is verified. A broken stream is
    described up to where it breaks: see `Inspection.error`. Raises OSError if a file cannot be read.

        report = tensorwire.inspect("model.tw")
        print(report.digest, [(item.item.name, item.codec) for item in report.items])
    """
    report = Inspection()
    try:
        with _opened(source) as chunks:
            _look_at(report, Frames(as_source(chunks), limits), on_frame)
    except WireError as error:
        report.error = error
    return report


def _look_at(report: Inspection, frames: Frames, on_frame: Callable[[Frame], None]) -> None:
    try:
        for frame in frames:
            _enter(report, frame)
            on_frame(frame)
    except WireError:
        report.broken = frames.broken
        raise


def verify(source: Any, *, limits: Limits = DEFAULT) -> Verified:
    """Check a stream as a receiver would, and drop what it decodes. Raises a WireError that says where it breaks.

    `source`: a path, or what `decode` takes. The payloads of a patch need its base, so for a patch only checksums, and
    what each slice is bound to, are checked.

        tensorwire.verify("model.tw").digest
    """
    summary = None
    with _opened(source) as chunks:
        receiver, against = Receiver(limits, any_base=True), b""
        for event in receiver.events(chunks):
            if isinstance(event, StreamStart):
                against = event.info.base
            elif isinstance(event, ItemStart) and against and _is_patched(event.item):
                receiver.keep_encoded(event.number)
            elif isinstance(event, Payload):
                binding_of(event.data, Extent(event.item.dtype, (), event.start, event.count))
            elif isinstance(event, StreamEnd):
                summary = event.summary
    assert summary is not None  # a stream without an END frame is a TruncatedError
    # The END frame counts what came before it.
    return Verified(summary.items, summary.frames + 1, summary.size + HEADER_SIZE + END_SIZE, summary.digest.hex())


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    """A path as an iterable of chunks, so that bytes after the end of the stream are an error; else `source` itself."""
    if not isinstance(source, (str, os.PathLike)):
        yield source
        return
    with opened(source) as file:
        yield iter(lambda: file.read(_CHUNK), b"")


def _is_patched(item: Item) -> bool:
    return isinstance(item, TensorItem) and item.codec == PATCH


def _enter(report: Inspection, frame: Frame) -> None:
    report.frames += 1
    report.wire_size += frame.size
    event = frame.event
    if isinstance(event, StreamStart):
        report.info = event.info
    elif isinstance(event, ItemsStart):
        report.items += map(_item_report, event.items)
    elif isinstance(event, StreamEnd):
        report.digest = event.summary.digest.hex()
    elif isinstance(event, Slice):
        _enter_slice(report, event, frame.header.length)
    elif isinstance(event, Bundle):
        for part in event.slices:
            _enter_slice(report, part, len(part.payload))


def _enter_slice(report: Inspection, part: Slice, length: int) -> None:
    item = report.items[part.number]
    item.size += part.count * (part.item.dtype.itemsize if isinstance(part.item, TensorItem) else 1)
    item.wire_size += length
    item.complete = part.last
    if isinstance(part.item, TensorItem) and _is_patched(part.item) and length == len(part.payload):
        binding = binding_of(part.payload, Extent(part.item.dtype, part.item.shape, part.start, part.count))
        item.changed += binding.changed or 0
        item.ways[binding.way] += 1


def _item_report(item: Item) -> ItemReport:
    codec = describe_codec(item.codec) if isinstance(item, (TensorItem, FileItem)) else None
    return ItemReport(item, codec, complete=item.total == 0)


def describe_codec(stages: CodecSpec) -> str:
    """The spec of a codec in a descriptor, even if the codec is not known here."""
    try:
        return repr(from_stages(stages))
    except WireError:
        return f"unknown {[list(stage) for stage in stages]}"
