"""A stream at rest and its index: single items, without reading the rest (docs/format.md, section 8).

Opening an archive reads every description; data is read on request. All frames that are read go through the ledger, as
in the reader. Between two of them there may only be data of items, or skippable frames, which are read too. Opening an
archive and reading every item therefore checks everything that a reader from front to back checks, except the digest
in the END frame.
"""

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import compress
from operator import le, lt
from typing import Final, NamedTuple, Protocol, TypeVar

from tensorwire.checksum import Checksum
from tensorwire.errors import FormatError, LimitError, SchemaError, SequenceError, TruncatedError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.frames import (
    HEADER_SIZE,
    MOST_BUNDLED,
    PREAMBLE_SIZE,
    FrameType,
    Header,
    check_padding,
    check_payload,
    check_preamble,
    split_bundle,
    unpack_header,
)
from tensorwire.wire.items import ContainerItem, Described, Item, StreamInfo
from tensorwire.wire.ledger import END_SIZE, Ledger, Mark, Pending, State, Step, Summary

_MARK: Final = struct.Struct("<QII")
_MAX_UINT32: Final = (1 << 32) - 1

CheckedT = TypeVar("CheckedT")
# Called with the offset and size of a payload and with what `check` returned for its header. Returns those of its bytes
# that the caller wants, and the CRC-32C of all of them.
Fetch = Callable[[int, int, CheckedT], tuple[memoryview, int]]


class RandomAccess(Protocol):
    """Bytes at rest."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, size: int, /) -> memoryview:
        """Exactly `size` bytes from `offset` on, which are there."""


class StoredSlice(NamedTuple):
    """A verified slice: its header, its payload, and the offsets of payload and frame in the archive."""

    header: Header
    payload: memoryview
    offset: int
    frame_offset: int


class _Bundle(NamedTuple):
    """A verified BUNDLE frame. `first`: place of its first item in the index. `parts`: begin and end of payloads."""

    first: int
    header: Header
    offset: int
    payload: memoryview
    parts: list[tuple[int, int]]


class IndexPacker:
    """The index of a stream that is being written."""

    def __init__(self) -> None:
        self._frames = bytearray()
        self._data = bytearray()

    def add_items(self, mark: Mark, count: int) -> None:
        """Add an ITEM frame that describes `count` items."""
        self._frames += _MARK.pack(*mark)
        self._data += bytes(count * _MARK.size)

    def add_data(self, number: int, mark: Mark) -> None:
        """Add the first DATA frame of an item, or the BUNDLE frame that carries it."""
        _MARK.pack_into(self._data, number * _MARK.size, *mark)

    def pack(self) -> bytes:
        """The INDEX payload: the mark of each ITEM frame, and that of each item's data (zeros for none)."""
        return bytes(self._frames + self._data)


class _Index:
    """The marks of frames in an INDEX payload. Raises FormatError for a payload that no writer makes.

    As objects, the marks of data would take ten times the memory, so they are looked up in the bytes.
    """

    def __init__(self, payload: memoryview, items: int, end: int) -> None:
        data = len(payload) - items * _MARK.size
        self.frames: list[Mark] = [*_MARK.iter_unpack(payload[:data])]
        self._data = bytes(payload[data:])
        words = struct.unpack(f"<{2 * items}Q", self._data)
        offsets, others = words[::2], words[1::2]
        sequences = [word & _MAX_UINT32 for word in others]
        if not all(sequences):
            if any(offset or other for offset, other, has in zip(offsets, others, sequences, strict=True) if not has):
                raise FormatError("the index has an incomplete entry")
            offsets, others = tuple(compress(offsets, sequences)), tuple(compress(others, sequences))
        # The numbers of the items with data, in order.
        self.numbers = array("I", compress(range(items), sequences))
        self.sequences = array("I", filter(None, sequences))
        if offsets and max(offsets) >= end:
            raise FormatError("the index points past its own start")
        marks = dict.fromkeys(zip(offsets, others, strict=True))  # the items of a bundle share one mark
        begins, distinct = [offset for offset, _ in marks], [other & _MAX_UINT32 for _, other in marks]
        ordered = all(map(le, self.sequences, self.sequences[1:])) and all(map(lt, distinct, distinct[1:]))
        if not ordered or not all(map(le, [begin + HEADER_SIZE for begin in begins], begins[1:])):
            raise FormatError("the index is not in the order of frames")

    def data(self, place: int) -> Mark:
        """The mark of the first data frame of the item at this place in `numbers`."""
        mark: Mark = _MARK.unpack_from(self._data, self.numbers[place] * _MARK.size)
        return mark

    def beside(self, place: int) -> range:
        """The places of all items whose data begins with the same frame: one, or those of a bundle."""
        sequence = self.sequences[place]
        return range(bisect_left(self.sequences, sequence), bisect_right(self.sequences, sequence))

    def find(self, number: int) -> int | None:
        """The place of an item in `numbers`; None for an item without data."""
        place = bisect_left(self.numbers, number)
        return place if place < len(self.numbers) and self.numbers[place] == number else None


class Items:
    """All items of an archive by number, made on request."""

    def __init__(self) -> None:
        self._frames: list[Described] = []
        self._firsts: list[int] = []
        self._count = 0

    def add(self, described: Described) -> None:
        """Add the items of the next ITEM frame."""
        self._firsts.append(self._count)
        self._frames.append(described)
        self._count += len(described)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> Item:
        number = range(self._count)[number]
        place = bisect_right(self._firsts, number) - 1
        return self._frames[place][number - self._firsts[place]]

    def pending(self, number: int) -> Pending:
        """The items with data from this one on: all that are left, or at least as many as a bundle can hold."""
        pending = Pending()
        place = bisect_right(self._firsts, number) - 1
        first, described = self._firsts[place], self._frames[place]
        pending.add(first, described)
        pending.drop(bisect_left(described.carriers, number - first))
        while len(pending.forms(MOST_BUNDLED)) < MOST_BUNDLED and place + 1 < len(self._frames):
            place += 1
            pending.add(self._firsts[place], self._frames[place])
        return pending

    def names(self) -> dict[str, int]:
        """The number of each item that is not a container, by its name."""
        names: dict[str, int] = {}
        for first, described in zip(self._firsts, self._frames, strict=True):
            bare = {number for number, form in enumerate(described.forms) if isinstance(form, ContainerItem)}
            numbered = zip(described.names(), range(first, first + len(described)), strict=True)
            if not bare:
                names.update(numbered)
                continue
            pairs = zip(numbered, described.numbers, strict=True)
            names.update(pair for pair, form in pairs if form not in bare)
        return names


class Archive:
    """A stream at rest that has an index. `info`: the content of its STREAM frame. `items`: all items by number.

    `accept` is called with the info and then, in the order of the stream, with one item of each form (dtype, shape and
    codec of a tensor) in an ITEM frame; it raises for what the caller does not accept. Raises what a reader from front
    to back would raise for the same bytes; FormatError if only the index is wrong; SchemaError for a stream without an
    index.
    """

    def __init__(
        self,
        source: RandomAccess,
        checksum: Checksum,
        limits: Limits = DEFAULT,
        *,
        accept: Callable[[StreamInfo | Item], object],
    ) -> None:
        self.info = StreamInfo()
        self.items = Items()
        self._read, self._size = source.read, source.size
        self._checksum = checksum
        self._accept = accept
        self._limits = limits
        self._index: _Index
        self._index_mark: Mark = 0, 0, 0
        self._bundle: _Bundle | None = None
        self._passed = 0  # items with data that the ledger has passed
        try:
            self._open()
        except WireError as error:
            raise self._explained(error) from None

    def slices(
        self, number: int, check: Callable[[Header], CheckedT | None], fetch: "Fetch[CheckedT] | None" = None
    ) -> Iterator[tuple[StoredSlice, CheckedT]]:
        """The data frames of an item, each with what `check` returns for its header.

        `check` is called before the payload is read, and may raise; a payload for which it returns None is skipped.
        `fetch` reads payloads into memory of the caller. The frame that only closes a file is left out. An item in a
        bundle, which is always read as a whole, gives one slice, with the header that a frame of its own would have.
        """
        place = self._index.find(number)
        if place is None:
            return
        beside = self._index.beside(place)
        if len(beside) > 1:
            yield from self._bundled(number, place, beside, check)
            return
        ledger = Ledger.within(self._limits, self._index.data(place), self.info.align, self.items.pending(number))
        name = self.items[number].name
        try:
            while ledger.pending and ledger.pending.number == number:
                header, packed, step = self._header(ledger)
                if step is Step.SKIP:
                    self._payload(ledger, header)
                elif step is Step.BUNDLE:
                    raise FormatError("the index lists only some of the items in a bundle", offset=ledger.offset)
                elif header.count:
                    checked = check(header)
                    if checked is not None:
                        payload = self._fetched(ledger, header, name, checked, fetch)
                        begin = ledger.offset + HEADER_SIZE + header.pad
                        yield StoredSlice(header, payload, begin, ledger.offset), checked
                ledger.pass_frame(header, packed, step)
            self._skip_to(ledger, self._after(place))
        except WireError as error:
            raise self._located(error, name, ledger.sequence, ledger.offset) from None

    def _located(self, error: WireError, name: str, frame: int, offset: int) -> WireError:
        """The error with this item and frame; raises any error that comes before it in the stream."""
        error.item, error.frame, error.offset = name, frame, error.offset or offset
        return self._explained(error, until=offset)

    def is_bundled(self, number: int) -> bool:
        """Whether an item shares a frame with others."""
        place = self._index.find(number)
        return place is not None and len(self._index.beside(place)) > 1

    def _bundled(
        self, number: int, place: int, beside: range, check: Callable[[Header], CheckedT | None]
    ) -> Iterator[tuple[StoredSlice, CheckedT]]:
        """The slice of an item in a bundle. The last bundle is kept: its items are often read one after the other."""
        item, bundle = self.items[number], self._bundle
        if bundle is None or bundle.first != beside.start:
            bundle = self._bundle = self._read_bundle(item.name, beside)
        start, stop = bundle.parts[place - beside.start]
        own = bundle.header._replace(item=number, count=item.total or 0, length=stop - start)
        try:
            checked = check(own)
        except WireError as error:
            raise self._located(error, item.name, own.sequence, bundle.offset) from None
        if checked is not None:
            begin = bundle.offset + HEADER_SIZE + start
            yield StoredSlice(own, bundle.payload[start:stop], begin, bundle.offset), checked

    def _read_bundle(self, name: str, beside: range) -> "_Bundle":
        """The verified bundle that holds the items at these places in the index. `name`: the item to name in errors."""
        pending = self.items.pending(self._index.numbers[beside.start])
        ledger = Ledger.within(self._limits, self._index.data(beside.start), self.info.align, pending)
        try:
            header, packed, step = self._header(ledger)
            if step is not Step.BUNDLE or header.count != len(beside):
                raise FormatError("the index and the stream disagree about the items in a bundle", offset=ledger.offset)
            payload = self._payload(ledger, header)
            bundle = _Bundle(beside.start, header, ledger.offset, payload, split_bundle(payload, header.count))
            ledger.pass_frame(header, packed, step)
            self._skip_to(ledger, self._after(beside.start))
        except WireError as error:
            raise self._located(error, name, ledger.sequence, ledger.offset) from None
        return bundle

    def _after(self, place: int) -> Mark:
        """The mark of the first frame after this item's data that is in the index, or of the index itself."""
        index = self._index
        place = index.beside(place)[-1]
        frame = bisect_right(index.frames, index.sequences[place], key=_sequence)
        marks = [*index.frames[frame : frame + 1], self._index_mark]
        if place + 1 < len(index.numbers):
            marks.append(index.data(place + 1))
        return min(marks, key=_sequence)

    def _open(self) -> None:
        end = self._find_index()
        ledger = self._begin(digest=False)  # the digest would need every header
        for mark in self._index.frames:
            self._reach(ledger, mark)
            header, packed, step = self._header(ledger)
            if step is not Step.ITEM:
                raise FormatError("the index points at another frame", offset=ledger.offset)
            self.items.add(self._read_items(ledger, header))
            ledger.pass_frame(header, packed, step)
        self._reach(ledger, self._index_mark)
        self._skip_to(ledger, end)
        header, _, _ = self._header(ledger)
        ledger.read_end(self._payload(ledger, header))

    def _find_index(self) -> Mark:
        """Read the index. Returns the mark of the END frame. Both are unverified until the ledger reaches them."""
        offset = max(self._size - HEADER_SIZE - END_SIZE, 0)
        end = self._header_at(offset)
        if end.type != FrameType.END or end.length != END_SIZE:
            raise FormatError("the last frame is not an end frame", offset=offset)
        summary = Summary.unpack(self._bytes(offset + HEADER_SIZE, END_SIZE))
        where = summary.index_offset
        if not where:
            raise SchemaError("the file has no index: it is a recorded stream; read it with load_file")
        index = self._header_at(where)
        length, data = index.length, summary.items * _MARK.size
        if index.type != FrameType.INDEX or length < data or length % _MARK.size:
            raise FormatError("there is no index of all items where the end frame says", offset=where)
        if length > self._limits.skippable:
            raise LimitError("index", self._limits.skippable, length, field="skippable", offset=where)
        self._index_mark = where, index.sequence, index.link
        self._index = _Index(self._bytes(where + HEADER_SIZE, length), summary.items, where)
        return offset, end.sequence, end.link

    def _explained(self, error: WireError, until: int | None = None) -> WireError:
        """The error, if none comes before it in the stream; raises the earlier one otherwise."""
        self._walk(until)
        if isinstance(error, SequenceError):  # the frames of the stream are in order, so the index is wrong
            return FormatError(f"the index points elsewhere: {error.detail}", item=error.item, offset=error.offset)
        return error

    def _walk(self, until: int | None = None) -> None:
        """Read the stream from front to back, except the payloads of data, and raise for the first fault.

        `until`: the offset of the last frame of interest.
        """
        ledger = self._begin(digest=True)
        while ledger.state is not State.ENDED and (until is None or ledger.offset <= until):
            header, packed, step = self._header(ledger)
            if header.type == FrameType.DATA:
                if ledger.offset == until:
                    return
                self._bytes(ledger.offset, header.size, ledger.sequence)
            elif step is Step.ITEM:
                self._read_items(ledger, header)
            elif step is Step.END:
                ledger.read_end(self._payload(ledger, header))
            else:
                self._payload(ledger, header)
            ledger.pass_frame(header, packed, step)
        if ledger.state is State.ENDED and ledger.offset != self._size:
            raise FormatError("bytes after the end frame", offset=ledger.offset)

    def _begin(self, *, digest: bool) -> Ledger:
        """The ledger after the preamble and the STREAM frame."""
        preamble = bytes(self._bytes(0, PREAMBLE_SIZE))
        link = check_preamble(preamble, self._checksum)
        ledger = Ledger(self._limits, preamble if digest else None, link)
        header, packed, step = self._header(ledger)
        self.info = ledger.read_stream(self._payload(ledger, header))
        self._accept(self.info)
        ledger.pass_frame(header, packed, step)
        return ledger

    def _read_items(self, ledger: Ledger, header: Header) -> Described:
        described = ledger.read_items(self._payload(ledger, header))
        for number in range(len(described.forms)):
            item = described[described.numbers.index(number)]
            try:
                self._accept(item)
            except WireError as error:
                error.item, error.frame, error.offset = item.name, ledger.sequence, ledger.offset
                raise
        return described

    def _reach(self, ledger: Ledger, mark: Mark) -> None:
        """Continue at the frame at `mark`, past the data of items before it."""
        index, first = self._index, self._passed
        if first < len(index.numbers) and index.sequences[first] < mark[1]:
            self._passed = bisect_left(index.sequences, mark[1], lo=first)
            self._skip_to(ledger, index.data(first))
            if not ledger.pending.drop_numbers(index.numbers[first : self._passed]):
                raise FormatError("the index and the stream disagree about which items have data", offset=ledger.offset)
            if index.data(self._passed - 1)[0] + HEADER_SIZE > mark[0]:
                raise FormatError("the index is not in the order of frames", offset=ledger.offset)
            ledger.pass_data(mark)
        self._skip_to(ledger, mark)

    def _skip_to(self, ledger: Ledger, mark: Mark) -> None:
        """Continue at the frame at `mark`, past skippable frames, which are verified."""
        while ledger.offset < mark[0]:
            header, packed, step = self._header(ledger)
            if step is not Step.SKIP:
                raise FormatError("the index leaves out a frame", offset=ledger.offset)
            self._payload(ledger, header)
            ledger.pass_frame(header, packed, step)
        if ledger.mark != mark:
            raise FormatError("the index points elsewhere", offset=ledger.offset)

    def _header(self, ledger: Ledger) -> tuple[Header, memoryview, Step]:
        """The next header, admitted: its fields, its bytes and what it does."""
        packed = self._bytes(ledger.offset, HEADER_SIZE, ledger.sequence)
        header = unpack_header(packed, self._checksum, frame=ledger.sequence, offset=ledger.offset)
        return header, packed, ledger.admit(header)

    def _header_at(self, offset: int) -> Header:
        return unpack_header(self._bytes(offset, HEADER_SIZE), self._checksum, frame=None, offset=offset)

    def _payload(self, ledger: Ledger, header: Header, item: str | None = None) -> memoryview:
        """The payload of the next frame, verified."""
        pad = header.pad
        payload = self._bytes(ledger.offset + HEADER_SIZE, pad + header.length, ledger.sequence)
        if pad:
            check_padding(payload[:pad], header, offset=ledger.offset)
            payload = payload[pad:]
        check_payload(self._checksum(payload, 0), header, offset=ledger.offset, item=item)
        return payload

    def _fetched(
        self, ledger: Ledger, header: Header, item: str, checked: CheckedT, fetch: "Fetch[CheckedT] | None"
    ) -> memoryview:
        """The payload of the next frame, verified, as `fetch` reads it."""
        if fetch is None:
            return self._payload(ledger, header, item)
        begin = ledger.offset + HEADER_SIZE
        self._check_end(begin + header.pad + header.length, ledger.sequence)
        if header.pad:
            check_padding(self._read(begin, header.pad), header, offset=ledger.offset)
        payload, crc = fetch(begin + header.pad, header.length, checked)
        check_payload(crc, header, offset=ledger.offset, item=item)
        return payload

    def _bytes(self, offset: int, size: int, frame: int | None = None) -> memoryview:
        self._check_end(offset + size, frame)
        return self._read(offset, size)

    def _check_end(self, end: int, frame: int | None) -> None:
        if end > self._size:
            raise TruncatedError("the file ends before the end frame", frame=frame, offset=self._size)


def _sequence(mark: Mark) -> int:
    return mark[1]
