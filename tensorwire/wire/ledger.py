"""What has passed in a stream so far, and whether a frame may come next (docs/format.md, sections 3, 6 and 7).

Reader and writer each keep one `Ledger` and ask it before every frame. The legal order is the table `TRANSITIONS`;
sequence numbers, links to the previous frame, slice positions and the tree of containers are checked beside it.
"""

import hashlib
import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from tensorwire.errors import CorruptError, FormatError, LimitError, SequenceError
from tensorwire.limits import Limits
from tensorwire.wire.frames import HEADER_SIZE, PREAMBLE_SIZE, SKIPPABLE, FrameType, Header
from tensorwire.wire.items import AliasItem, ContainerItem, DataItem, Item, Kind, Path, TensorItem

_END: Final = struct.Struct("<QQQQ32s")
END_SIZE: Final = _END.size
_MAX_SEQUENCE: Final = (1 << 32) - 1


class State(Enum):
    """Where a stream is."""

    OPENING = auto()  # the preamble has passed
    READY = auto()  # between items
    PARTIAL = auto()  # an item has begun and is not complete
    ENDED = auto()


class Step(Enum):
    """What a frame does."""

    STREAM = auto()
    ITEM = auto()
    SLICE = auto()  # a data frame after which its item goes on
    LAST = auto()  # a data frame that completes its item
    SKIP = auto()
    END = auto()


TRANSITIONS: Final[dict[State, dict[Step, State]]] = {
    State.OPENING: {Step.STREAM: State.READY},
    State.READY: {
        Step.ITEM: State.READY,
        Step.SLICE: State.PARTIAL,
        Step.LAST: State.READY,
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


@dataclass(frozen=True, slots=True)
class Summary:
    """What the END frame says: counts over everything before it, offset of the index (0: none), digest."""

    items: int
    frames: int
    size: int
    index_offset: int
    digest: bytes

    def pack(self) -> bytes:
        return _END.pack(self.items, self.frames, self.size, self.index_offset, self.digest)

    @classmethod
    def unpack(cls, payload: bytes | memoryview) -> "Summary":
        return cls(*_END.unpack(payload))


class Ledger:
    """The account of one stream, kept by its reader and by its writer alike."""

    def __init__(self, limits: Limits, preamble: bytes, link: int) -> None:
        self.limits = limits
        self.state = State.OPENING
        self.sequence = 0  # of the next frame
        self.link = link  # CRC of the last header, which the next frame must repeat
        self.offset = PREAMBLE_SIZE  # of the next frame, in the stream
        self.align = 1
        self.items = 0
        self.position = 0  # elements of the current item that have passed
        self.pending: deque[tuple[int, DataItem]] = deque()  # items whose data is still to come, in order
        self._index_offset = 0
        self._digest = hashlib.sha256(preamble)
        self._tree = _Tree()
        self._is_tensor = bytearray()  # by item number

    def padding(self) -> int:
        """Zero bytes between the next data frame's header and its payload."""
        return -(self.offset + HEADER_SIZE) % self.align

    def admit(self, header: Header) -> None:
        """Raise unless a frame with this header may come next. Changes nothing."""
        where = {"frame": self.sequence, "offset": self.offset}
        if header.sequence != self.sequence:
            raise SequenceError(f"expected frame {self.sequence}, got {header.sequence}", **where)
        if header.link != self.link:
            raise SequenceError("frame does not follow the one before it: spliced from another stream", **where)
        if self.sequence == _MAX_SEQUENCE:
            raise LimitError("frames", _MAX_SEQUENCE, self.sequence + 1, **where)
        size = self.offset + HEADER_SIZE + header.pad + header.length
        if size > self.limits.stream:
            raise LimitError("stream", self.limits.stream, size, **where)
        if self._step(header) not in TRANSITIONS[self.state]:
            raise SequenceError(f"a {_name(header.type)} frame cannot come here ({self.state.name.lower()})", **where)
        if header.type == FrameType.ITEM:
            if header.item != self.items:
                raise SequenceError(f"expected item {self.items}, got {header.item}", **where)
            if self.items == self.limits.items:
                raise LimitError("items", self.limits.items, self.items + 1, **where)
        elif header.type == FrameType.DATA:
            self._admit_slice(header, where)
        elif header.type == FrameType.END:
            if self.pending:
                raise FormatError("end frame before the data of all items", item=self.pending[0][1].name, **where)
            if not self.items:
                raise FormatError("a stream holds at least its root item", **where)
        _check_length(header, self.limits, where)

    def _admit_slice(self, header: Header, where: dict[str, int]) -> None:
        number, item = self.pending[0]
        if header.item != number:
            raise SequenceError(f"expected data of item {number}, got item {header.item}", **where)
        if header.start != self.position:
            raise SequenceError(f"expected element {self.position}, got {header.start}", item=item.name, **where)
        if item.total is None:
            if (header.count == 0) != (header.length == 0):
                raise FormatError("only the empty closing frame has no bytes", item=item.name, **where)
            if header.start + header.count > self.limits.stream:
                raise LimitError("file", self.limits.stream, header.start + header.count, **where)
        elif header.count == 0 or header.length == 0:
            raise FormatError("empty data frame", item=item.name, **where)
        elif header.start + header.count > item.total:
            raise FormatError("data beyond the end of the item", item=item.name, **where)
        if header.pad != self.padding():
            raise FormatError(f"padding is {header.pad}, must be {self.padding()}", item=item.name, **where)

    def _step(self, header: Header) -> Step:
        if header.type >= SKIPPABLE:
            return Step.SKIP
        if header.type != FrameType.DATA:
            return Step[FrameType(header.type).name]
        if not self.pending:
            raise SequenceError("data without an item", frame=self.sequence, offset=self.offset)
        total = self.pending[0][1].total
        last = header.count == 0 if total is None else header.start + header.count == total
        return Step.LAST if last else Step.SLICE

    def add_item(self, item: Item) -> None:
        """Take note of the item that the current ITEM frame describes. Raises where it cannot stand here."""
        self._tree.add(item)
        if isinstance(item, AliasItem):
            # So that a receiver knows all names of a tensor when it arrives, and need not keep it for later ones.
            waiting = self.pending and self.pending[0][0] <= item.of < self.items and self._is_tensor[item.of]
            if not waiting:
                raise FormatError(f"alias of item {item.of}, not an earlier tensor still to come", item=item.name)
        self._is_tensor.append(isinstance(item, TensorItem) and item.total != 0)
        if not isinstance(item, (AliasItem, ContainerItem)) and item.total != 0:
            self.pending.append((self.items, item))
        self.items += 1

    def pass_frame(self, header: Header, packed: bytes) -> None:
        """Enter an admitted and verified frame into the account."""
        step = self._step(header)
        self.state = TRANSITIONS[self.state][step]
        if step is Step.SLICE:
            self.position += header.count
        elif step is Step.LAST:
            self.pending.popleft()
            self.position = 0
        if header.type == FrameType.INDEX:
            self._index_offset = self.offset
        self._digest.update(packed)
        self.link = header.crc
        self.sequence += 1
        self.offset += HEADER_SIZE + header.pad + header.length

    def summary(self) -> Summary:
        """What the END frame has to say at this point."""
        return Summary(self.items, self.sequence, self.offset, self._index_offset, self._digest.digest())

    def check_summary(self, got: Summary) -> None:
        """Compare an END frame with the account."""
        expected = self.summary()
        where = {"frame": self.sequence, "offset": self.offset}
        for field in ("items", "frames", "size", "index_offset"):
            if getattr(got, field) != getattr(expected, field):
                raise FormatError(
                    f"end frame says {field}={getattr(got, field)}, the stream has {getattr(expected, field)}",
                    **where,
                )
        if got.digest != expected.digest:
            raise CorruptError("stream digest mismatch", **where)


class _Tree:
    """The containers that are open: items come depth-first, parents before children, siblings in order."""

    def __init__(self) -> None:
        self._open: list[tuple[Path, Kind, set]] = []
        self._started = False

    def add(self, item: Item) -> None:
        if not item.path:
            if self._started:
                raise SequenceError("a second root item")
        else:
            self._add_child(item)
        self._started = True
        if isinstance(item, ContainerItem):
            self._open.append((item.path, item.kind, set()))

    def _add_child(self, item: Item) -> None:
        parent, key = item.path[:-1], item.path[-1]
        while self._open and self._open[-1][0] != parent:
            self._open.pop()
        if not self._open:
            raise FormatError("an item outside any open container", item=item.name)
        _, kind, keys = self._open[-1]
        if kind == Kind.DICT:
            if key in keys:
                raise SequenceError("duplicate key", item=item.name)
        elif type(key) is not int or key != len(keys):
            raise FormatError(f"expected element {len(keys)} of a {kind.name.lower()}", item=item.name)
        keys.add(key)


def _check_length(header: Header, limits: Limits, where: dict[str, int]) -> None:
    name, limit = {
        FrameType.STREAM: ("metadata", limits.metadata),
        FrameType.ITEM: ("descriptor", limits.descriptor),
        FrameType.DATA: ("item", limits.item),
        FrameType.END: ("end frame", END_SIZE),
    }.get(header.type, ("skippable", limits.skippable))  # type: ignore[call-overload]
    if header.length > limit:
        raise LimitError(f"length of a {_name(header.type)} frame ({name})", limit, header.length, **where)
    if header.type == FrameType.END and header.length != END_SIZE:
        raise FormatError(f"end frame of {header.length} bytes, must be {END_SIZE}", **where)


def _name(number: int) -> str:
    return FrameType(number).name if number in FrameType._value2member_map_ else f"type {number}"
