"""What has passed in a stream so far, and whether a frame may come next (docs/format.md, sections 3, 6 and 7).

Reader, writer and archive each keep a `Ledger` and ask it before every frame. The legal order is the table
`TRANSITIONS`; sequence numbers, links to the previous frame, slice positions and the tree of containers are checked
beside it.
"""

import hashlib
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import groupby
from typing import Any, Final

from tensorwire.errors import CorruptError, FormatError, LimitError, SequenceError, WireError, counted
from tensorwire.limits import Limits, check_limits
from tensorwire.wire.frames import (
    HEADER_SIZE,
    LEAST_BUNDLED,
    MOST_BUNDLED,
    PREAMBLE_SIZE,
    SKIPPABLE,
    FrameType,
    Header,
    split_bundle,
)
from tensorwire.wire.items import (
    AliasItem,
    ContainerItem,
    DataItem,
    Described,
    Item,
    Kind,
    StreamInfo,
    TensorItem,
    Unpack,
    unpack_items,
    unpack_stream,
)
from tensorwire.wire.names import Key, Path

_END: Final = struct.Struct("<QQQQ32s")
END_SIZE: Final = _END.size
_MAX_SEQUENCE: Final = (1 << 32) - 1


class State(IntEnum):
    """Where a stream is."""

    OPENING = auto()  # the preamble has passed
    READY = auto()  # between items
    PARTIAL = auto()  # an item has begun and is not complete
    ENDED = auto()


class Step(IntEnum):
    """What a frame does."""

    STREAM = auto()
    ITEM = auto()
    SLICE = auto()  # a data frame after which its item goes on
    LAST = auto()  # a data frame that completes its item
    BUNDLE = auto()  # the whole data of several items
    SKIP = auto()
    END = auto()


TRANSITIONS: Final[dict[State, dict[Step, State]]] = {
    State.OPENING: {Step.STREAM: State.READY},
    State.READY: {
        Step.ITEM: State.READY,
        Step.SLICE: State.PARTIAL,
        Step.LAST: State.READY,
        Step.BUNDLE: State.READY,
        Step.SKIP: State.READY,
        Step.END: State.ENDED,
    },
    State.PARTIAL: {
        Step.SLICE: State.PARTIAL,
        Step.LAST: State.READY,
        Step.SKIP: State.PARTIAL,
    },
    State.ENDED: {},
}

# Where a frame begins in the stream, and the sequence number and link that its header must have.
Mark = tuple[int, int, int]

_STEPS: Final[dict[int, Step]] = {
    FrameType.STREAM: Step.STREAM,
    FrameType.ITEM: Step.ITEM,
    FrameType.BUNDLE: Step.BUNDLE,
    FrameType.END: Step.END,
}


@dataclass(frozen=True, slots=True)
class Summary:
    """The content of the END frame: counts over everything before it, offset of the index (0: none), digest."""

    items: int
    frames: int
    size: int
    index_offset: int
    digest: bytes

    def pack(self) -> bytes:
        """The END payload."""
        return _END.pack(self.items, self.frames, self.size, self.index_offset, self.digest)

    @classmethod
    def unpack(cls, payload: bytes | memoryview) -> "Summary":
        """The summary in an END payload, which has the right length."""
        return cls(*_END.unpack(payload))


class Ledger:
    """The state of one stream."""

    __slots__ = (
        "_digest",
        "_index_offset",
        "_is_tensor",
        "_tree",
        "_unpack",
        "align",
        "items",
        "limits",
        "link",
        "offset",
        "pending",
        "position",
        "sequence",
        "state",
    )

    def __init__(self, limits: Limits, preamble: bytes | None, link: int, unpack: Unpack = unpack_items) -> None:
        check_limits(limits)
        self.limits = limits
        self._unpack = unpack
        self.state = State.OPENING
        self.sequence = 0  # of the next frame
        self.link = link  # CRC of the last header, which the next frame must repeat
        self.offset = PREAMBLE_SIZE  # of the next frame, in the stream
        self.align = 1
        self.items = 0
        self.position = 0  # elements of the current item so far
        self.pending = Pending()
        self._index_offset = 0
        # None: not every frame will be seen.
        self._digest = None if preamble is None else hashlib.sha256(preamble)
        self._tree = _Tree()
        self._is_tensor = bytearray()  # by item number

    @classmethod
    def within(cls, limits: Limits, mark: Mark, align: int, pending: "Pending") -> "Ledger":
        """A ledger that starts at `mark`, the first data frame of the first item of `pending`."""
        ledger = cls(limits, None, 0)
        ledger.state, ledger.align = State.READY, align
        ledger.offset, ledger.sequence, ledger.link = mark
        ledger.pending = pending
        return ledger

    @property
    def mark(self) -> Mark:
        """Of the next frame."""
        return self.offset, self.sequence, self.link

    def padding(self) -> int:
        """Zero bytes between the next data frame's header and its payload."""
        return -(self.offset + HEADER_SIZE) % self.align

    def admit(self, header: Header) -> Step:
        """The step that a frame with this header takes. Raises unless it may come next. Changes nothing."""
        if header.sequence != self.sequence:
            raise SequenceError(f"expected frame {self.sequence}, got {header.sequence}", **self._where())
        if header.link != self.link:
            detail = "frame does not follow the one before it: spliced from another stream"
            raise SequenceError(detail, **self._where())
        step = self._step(header)
        if step not in TRANSITIONS[self.state]:
            name = FrameType.label(header.type)
            raise SequenceError(f"a {name} frame cannot come here ({self.state.name.lower()})", **self._where())
        if header.type == FrameType.DATA:
            self._admit_slice(header)
        elif header.type == FrameType.BUNDLE:
            self._admit_bundle(header)
        elif header.type == FrameType.ITEM:
            if header.item != self.items:
                raise SequenceError(f"expected item {self.items}, got {header.item}", **self._where())
        elif header.type == FrameType.END:
            self._admit_end(header)
        self._admit_size(header)
        return step

    def _admit_slice(self, header: Header) -> None:
        number, item = self.pending.head
        total = item.total
        if header.item != number:
            raise SequenceError(f"expected data of item {number}, got item {header.item}", **self._where())
        if header.start != self.position:
            detail = f"expected element {self.position}, got {header.start}"
            raise SequenceError(detail, item=item.name, **self._where())
        if total is None:
            if (header.count == 0) != (header.length == 0):
                raise FormatError("only the empty closing frame has no bytes", item=item.name, **self._where())
        elif header.count == 0 or header.length == 0:
            raise FormatError("empty data frame", item=item.name, **self._where())
        elif header.start + header.count > total:
            raise FormatError("data beyond the end of the item", item=item.name, **self._where())
        if header.pad != self.padding():
            detail = f"padding is {header.pad}, must be {self.padding()}"
            raise FormatError(detail, item=item.name, **self._where())

    def _admit_bundle(self, header: Header) -> None:
        if not self.pending:
            raise SequenceError("data without an item", **self._where())
        if header.item != self.pending.number:
            detail = f"expected data of item {self.pending.number}, got a bundle from item {header.item} on"
            raise SequenceError(detail, **self._where())
        if not LEAST_BUNDLED <= header.count <= MOST_BUNDLED:
            raise FormatError(f"a bundle of {counted(header.count, 'item')}", **self._where())
        forms = self.pending.forms(header.count)
        if len(forms) < header.count:
            raise SequenceError(f"a bundle of {header.count} items, {len(forms)} are still to come", **self._where())
        if any(form.total is None for form in forms):
            raise FormatError("a file of unknown size in a bundle", **self._where())
        if header.length <= 4 * header.count:
            raise FormatError("empty bundle", **self._where())

    def _admit_end(self, header: Header) -> None:
        if self.pending:
            detail = "end frame before the data of all items"
            raise SequenceError(detail, item=self.pending.head[1].name, **self._where())
        if not self.items:
            raise SequenceError("end frame before the root item", **self._where())
        if header.length != END_SIZE:
            raise FormatError(f"end frame of {header.length} bytes, must be {END_SIZE}", **self._where())

    def _admit_size(self, header: Header) -> None:
        """Check the header against the limits. Sizes are exact: Python's integers do not wrap."""
        limits, size = self.limits, self.offset + HEADER_SIZE + header.pad + header.length
        if self.sequence == _MAX_SEQUENCE:
            raise LimitError("frames", _MAX_SEQUENCE, self.sequence + 1, field=None, **self._where())
        if size > limits.stream:
            raise LimitError("stream", limits.stream, size, field="stream", **self._where())
        if header.type == FrameType.DATA:
            name, limit = "item", limits.item
            if header.start + header.count > limits.stream and self.pending.head[1].total is None:
                got = header.start + header.count
                raise LimitError("file", limits.stream, got, field="stream", **self._where())
        elif header.type == FrameType.ITEM:
            name, limit = "descriptor", limits.descriptor
        elif header.type == FrameType.BUNDLE:
            name, limit = "frame", limits.frame
        elif header.type == FrameType.STREAM:
            name, limit = "metadata", limits.metadata
        elif header.type >= SKIPPABLE:
            name, limit = "skippable", limits.skippable
        else:
            return
        if header.length > limit:
            what = f"length of a {FrameType.label(header.type)} frame ({name})"
            raise LimitError(what, limit, header.length, field=name, **self._where())

    def _step(self, header: Header) -> Step:
        if header.type != FrameType.DATA:
            return Step.SKIP if header.type >= SKIPPABLE else _STEPS[header.type]
        if not self.pending:
            raise SequenceError("data without an item", **self._where())
        total = self.pending.head[1].total
        last = header.count == 0 if total is None else header.start + header.count == total
        return Step.LAST if last else Step.SLICE

    def read_stream(self, payload: bytes | memoryview) -> StreamInfo:
        """Unpack the verified payload of an admitted STREAM frame, and record it."""
        try:
            info = unpack_stream(bytes(payload), self.limits)
        except WireError as error:
            error.frame, error.offset = self.sequence, self.offset
            raise
        self.align = info.align
        return info

    def read_items(self, payload: bytes | memoryview) -> Described:
        """Unpack the verified payload of an admitted ITEM frame, and record its items."""
        try:
            described = self._unpack(payload, self.limits)
            self.add_items(described)
        except WireError as error:
            error.frame, error.offset = self.sequence, self.offset
            raise
        return described

    def read_bundle(self, header: Header, payload: memoryview) -> list[tuple[int, DataItem, memoryview]]:
        """The number, item and verified payload of each item that an admitted BUNDLE frame carries."""
        try:
            places = split_bundle(payload, header.count)
        except WireError as error:
            error.frame, error.offset = self.sequence, self.offset
            raise
        items = self.pending.first(header.count)
        return [(*item, payload[start:stop]) for item, (start, stop) in zip(items, places, strict=True)]

    def read_end(self, payload: bytes | memoryview) -> Summary:
        """Unpack the verified payload of an admitted END frame. Raises unless it matches the stream so far."""
        summary = Summary.unpack(payload)
        self._check_summary(summary)
        return summary

    def add_items(self, described: Described) -> None:
        """Record the items that the current ITEM frame describes. Raises if an item is not allowed here."""
        first = self.items
        if first + len(described) > self.limits.items:
            raise LimitError("items", self.limits.items, first + len(described), field="items", **self._where())
        self._tree.add(described)
        self.pending.add(first, described)
        tensors = [isinstance(form, TensorItem) and form.total != 0 for form in described.forms]
        self._is_tensor += bytes([tensors[number] for number in described.numbers])
        self.items += len(described)
        if any(isinstance(form, AliasItem) for form in described.forms):
            self._check_aliases(first, described)

    def _check_aliases(self, first: int, described: Described) -> None:
        """Raise for an alias whose target is not an earlier tensor with its data still to come.

        A receiver therefore knows all names of a tensor when it arrives, and need not keep it for later aliases.
        """
        waiting = self.pending.number if self.pending else self.items
        for at, number in enumerate(described.numbers):
            form = described.forms[number]
            if isinstance(form, AliasItem) and not (waiting <= form.of < first + at and self._is_tensor[form.of]):
                detail = f"alias of item {form.of}, not an earlier tensor still to come"
                raise FormatError(detail, item=described[at].name)

    def pass_frame(self, header: Header, packed: bytes | bytearray | memoryview, step: Step) -> None:
        """Record an admitted and verified frame. `step` is what `admit` returned."""
        self.state = TRANSITIONS[self.state][step]
        if step is Step.SLICE:
            self.position += header.count
        elif step is Step.LAST:
            self.pending.drop(1)
            self.position = 0
        elif step is Step.BUNDLE:
            self.pending.drop(header.count)
        elif step is Step.SKIP and header.type == FrameType.INDEX:
            self._index_offset = self.offset
        if self._digest is not None:
            self._digest.update(packed)
        self.link = header.crc
        self.sequence += 1
        self.offset += HEADER_SIZE + header.pad + header.length

    def pass_data(self, mark: Mark) -> None:
        """Continue at `mark`, a later frame, past data that is not read, of items that are no longer pending."""
        self.offset, self.sequence, self.link = mark

    def summary(self) -> Summary:
        """The summary that an END frame must have at this point."""
        digest = b"" if self._digest is None else self._digest.digest()
        return Summary(self.items, self.sequence, self.offset, self._index_offset, digest)

    def _check_summary(self, got: Summary) -> None:
        """Compare an END frame with the stream so far; the digest only if every frame was seen."""
        expected = self.summary()
        for field in ("items", "frames", "size", "index_offset"):
            if getattr(got, field) != getattr(expected, field):
                detail = f"end frame says {field}={getattr(got, field)}, the stream has {getattr(expected, field)}"
                raise FormatError(detail, **self._where())
        if self._digest is not None and got.digest != expected.digest:
            raise CorruptError("stream digest mismatch", **self._where())

    def _where(self) -> dict[str, int]:
        return {"frame": self.sequence, "offset": self.offset}


class Pending:
    """Items whose data is still to come, in order. Objects are made one at a time: an archive needs only a few."""

    __slots__ = ("_at", "_head", "_runs")

    def __init__(self) -> None:
        # One run per ITEM frame: the number of its first item, the frame, and the indexes of its items with data.
        self._runs: deque[tuple[int, Described, Sequence[int]]] = deque()
        self._at = 0  # how many of the first run are done
        self._head: tuple[int, DataItem] | None = None

    def __bool__(self) -> bool:
        return bool(self._runs)

    @property
    def number(self) -> int:
        """The number of the first pending item."""
        first, _, indexes = self._runs[0]
        return first + indexes[self._at]

    @property
    def head(self) -> tuple[int, DataItem]:
        """The number of the first pending item, and the item itself."""
        if self._head is None:
            first, described, indexes = self._runs[0]
            index = indexes[self._at]
            self._head = first + index, described[index]  # type: ignore[assignment]  # it has data
        return self._head  # type: ignore[return-value]  # which has just been made

    def add(self, first: int, described: Described) -> None:
        """Add the items with data of an ITEM frame whose first item has number `first`."""
        indexes = described.carriers
        if indexes:
            self._runs.append((first, described, indexes))

    def first(self, count: int) -> list[tuple[int, DataItem]]:
        """The first `count` pending items, or all if there are fewer, with their numbers."""
        return [(number, described[index]) for number, described, index in self._first(count)]  # type: ignore[misc]

    def forms(self, count: int) -> list[Item]:
        """The forms of the first `count` pending items, or of all if there are fewer."""
        return [described.forms[described.numbers[index]] for _, described, index in self._first(count)]

    def _first(self, count: int) -> Iterator[tuple[int, Described, int]]:
        at = self._at
        for first, described, indexes in self._runs:
            part = indexes[at : at + count]
            for index in part:
                yield first + index, described, index
            count, at = count - len(part), 0
            if not count:
                return

    def drop(self, count: int) -> None:
        """Remove the first `count` pending items."""
        self._head = None
        while count:
            step = min(count, len(self._runs[0][2]) - self._at)
            self._at += step
            count -= step
            if self._at == len(self._runs[0][2]):
                self._runs.popleft()
                self._at = 0

    def drop_numbers(self, numbers: Sequence[int]) -> bool:
        """Remove the first pending items if they have these numbers; returns whether they have."""
        done = 0
        while self._runs and done < len(numbers):
            first, _, indexes = self._runs[0]
            here = [first + index for index in indexes[self._at : self._at + len(numbers) - done]]
            if here != [*numbers[done : done + len(here)]]:
                return False
            self.drop(len(here))
            done += len(here)
        return done == len(numbers)


class _Open:
    """A container whose children may follow. `count`: children so far. `keys`: their keys, for a dict."""

    __slots__ = ("count", "keys", "kind", "path")

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path = path
        self.kind = kind
        self.count = 0
        self.keys: set[Key] = set()


class _Tree:
    """The containers that are open: items come depth-first, parents before children, siblings in order."""

    __slots__ = ("_open", "_started")

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._started = False

    def add(self, described: Described) -> None:
        """Add the items of a frame, adjacent children of one container at a time."""
        at = 0
        for parent, rows in groupby(described.rows, _parent):
            siblings = [*rows]
            if parent is not None:
                self._add_children(parent, [row[-1] for row in siblings], described, at)
            elif self._started or len(siblings) > 1:
                raise FormatError("a second root item")
            self._started = True
            at += len(siblings)
            form = described.forms[siblings[-1][0]]  # containers before it are closed already
            if isinstance(form, ContainerItem):
                self._open.append(_Open(siblings[-1][1:], form.kind))

    def _add_children(self, parent: Path, keys: list[Key], described: Described, at: int) -> None:
        while self._open and self._open[-1].path != parent:
            self._open.pop()
        if not self._open:
            raise FormatError("an item outside any open container", item=described[at].name)
        container = self._open[-1]
        if container.kind != Kind.DICT:
            kind = container.kind.name.lower()
            for place, key in enumerate(keys, container.count):
                if type(key) is not int or key != place:
                    name = described[at + place - container.count].name
                    raise FormatError(f"expected element {place} of a {kind}", item=name)
        elif len({*keys}) == len(keys) and container.keys.isdisjoint(keys):
            container.keys.update(keys)
        else:
            twice = next(place for place, key in enumerate(keys) if key in container.keys or key in keys[:place])
            raise FormatError("a key of a container appears twice", item=described[at + twice].name)
        container.count += len(keys)


def _parent(row: tuple[Any, ...]) -> Path | None:
    """The path of the container that an item is in; None for the root."""
    return row[1:-1] if len(row) > 1 else None
