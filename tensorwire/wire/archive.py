"""A stream at rest and its index: single items, without reading the rest (docs/format.md, section 8).

Every descriptor is read when an archive is opened, data when it is asked for. All frames that are read go through the
ledger, as they do in the reader. What stands between two of them is either the data of an item, or has to be
skippable and is read too, so that whoever opens an archive and reads every item has checked all that a reader from
front to back checks, but for the digest in the END frame.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from tensorwire.checksum import Checksum
from tensorwire.errors import FormatError, LimitError, SchemaError, TruncatedError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.frames import (
    HEADER_SIZE,
    PREAMBLE_SIZE,
    SKIPPABLE,
    FrameType,
    Header,
    check_padding,
    check_payload,
    check_preamble,
    unpack_header,
)
from tensorwire.wire.items import AliasItem, ContainerItem, Item, StreamInfo
from tensorwire.wire.ledger import END_SIZE, Ledger, Mark, State, Summary

_ENTRY: Final = struct.Struct("<QIIQII")
NO_DATA: Final = Mark(0, 0, 0)


class RandomAccess(Protocol):
    """Bytes at rest."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, size: int, /) -> memoryview:
        """Exactly `size` bytes from `offset` on, which are there."""


class StoredSlice(NamedTuple):
    """A verified slice: its header, its payload, and the offsets of its frame and of its payload."""

    header: Header
    payload: memoryview
    frame_offset: int
    offset: int


def pack_index(entries: list[tuple[Mark, Mark]]) -> bytes:
    """One 32-byte entry an item, in item order: its ITEM frame and its first DATA frame (`NO_DATA` without any)."""
    return b"".join(_ENTRY.pack(*item, *data) for item, data in entries)


class Archive:
    """A stream at rest that has an index. `info` is its STREAM frame's, `items` are all items by number.

    `accept` is called with the info and then with each item, in the order of the stream, and raises for what the caller
    does not take. Raises what a reader from front to back would raise of the same bytes; FormatError for an index that
    is wrong where the stream is not; SchemaError for a stream without an index.
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
        self.items: list[Item] = []
        self._source = source
        self._checksum = checksum
        self._accept = accept
        self._limits = limits
        self._data: dict[int, tuple[Mark, Mark]] = {}  # by item number: its first data frame, and what comes after all
        try:
            self._open()
        except WireError:
            self._walk()  # another fault may come before this one, and explain it
            raise

    def slices(self, number: int, check: Callable[[Header], object]) -> Iterator[StoredSlice]:
        """The data frames of an item. `check` is called with each header before its payload is read, and may raise."""
        item = self.items[number]
        if isinstance(item, (AliasItem, ContainerItem)) or number not in self._data:
            return
        begin, end = self._data[number]
        ledger = Ledger.within(self._limits, begin, self.info.align, number, item)
        try:
            while ledger.pending:
                header, packed = self._header(ledger)
                if header.type != FrameType.DATA:
                    self._skip(ledger, header, packed)
                    continue
                check(header)
                payload = self._payload(ledger, header, item.name)
                begin = ledger.offset
                ledger.pass_frame(header, packed)
                yield StoredSlice(header, payload, begin, begin + HEADER_SIZE + header.pad)
            self._skip_to(ledger, end)
        except WireError as error:
            self._walk(until=ledger.offset)
            error.item, error.frame, error.offset = item.name, ledger.sequence, error.offset or ledger.offset
            raise

    def _open(self) -> None:
        index, end, entries = self._find_index()
        ledger = self._begin()
        for entry in _ENTRY.iter_unpack(entries):
            self._reach(ledger, Mark(*entry[:3]), entries)
            header, packed = self._header(ledger)
            if header.type != FrameType.ITEM:
                raise FormatError("the index points at another frame", offset=ledger.offset)
            item = self._read_item(ledger, header)
            if item.total == 0 and entry[3:] != NO_DATA:
                raise FormatError("the index has data for an item without any", item=item.name, offset=ledger.offset)
            ledger.pass_frame(header, packed)
            self.items.append(item)
        self._reach(ledger, index, entries)
        self._skip_to(ledger, end)
        header, packed = self._header(ledger)
        ledger.read_end(self._payload(ledger, header))

    def _find_index(self) -> tuple[Mark, Mark, memoryview]:
        """Where INDEX and END stand, and the entries, none of which is verified before the account reaches it."""
        offset = self._source.size - HEADER_SIZE - END_SIZE
        end = self._header_at(offset)
        if end.type != FrameType.END or end.length != END_SIZE:
            raise FormatError("the last frame is no end frame", offset=offset)
        summary = Summary.unpack(self._bytes(offset + HEADER_SIZE, END_SIZE))
        where = summary.index_offset
        if not where:
            raise SchemaError("the file has no index: it is a recorded stream; read it with load_file")
        index = self._header_at(where)
        if index.type != FrameType.INDEX or index.length != summary.items * _ENTRY.size:
            raise FormatError("no index of all items stands where the end frame says", offset=where)
        if index.length > self._limits.skippable:
            raise LimitError("index (skippable)", self._limits.skippable, index.length, offset=where)
        entries = self._bytes(where + HEADER_SIZE, index.length)
        return Mark(where, index.sequence, index.link), Mark(offset, end.sequence, end.link), entries

    def _walk(self, until: int | None = None) -> None:
        """Read the stream from front to back, all but the payloads of data, and raise for the first fault."""
        ledger = self._begin()
        while ledger.state is not State.ENDED and (until is None or ledger.offset <= until):
            header, packed = self._header(ledger)
            if header.type == FrameType.DATA:
                self._bytes(ledger.offset, header.size, ledger.sequence)
            elif header.type == FrameType.ITEM:
                self._read_item(ledger, header)
            elif header.type == FrameType.END:
                ledger.read_end(self._payload(ledger, header))
            else:
                self._payload(ledger, header)
            ledger.pass_frame(header, packed)
        if ledger.state is State.ENDED and ledger.offset != self._source.size:
            raise FormatError("bytes after the end frame", offset=ledger.offset)

    def _begin(self) -> Ledger:
        """The account after the preamble and the STREAM frame."""
        preamble = bytes(self._bytes(0, PREAMBLE_SIZE))
        ledger = Ledger(self._limits, preamble, check_preamble(preamble, self._checksum))
        header, packed = self._header(ledger)
        self.info = ledger.read_stream(self._payload(ledger, header))
        self._accept(self.info)
        ledger.pass_frame(header, packed)
        return ledger

    def _read_item(self, ledger: Ledger, header: Header) -> Item:
        item = ledger.read_item(self._payload(ledger, header))
        try:
            self._accept(item)
        except WireError as error:
            error.item, error.frame, error.offset = item.name, ledger.sequence, ledger.offset
            raise
        return item

    def _reach(self, ledger: Ledger, mark: Mark, entries: memoryview) -> None:
        """Go on at the frame at `mark`, beyond the data of items that stands before it."""
        while ledger.pending:
            number = ledger.pending[0][0]
            begin = _data_mark(entries, number)
            if not 0 < begin.sequence < mark.sequence:
                break
            self._skip_to(ledger, begin)
            end = _data_mark(entries, ledger.pending[1][0]) if len(ledger.pending) > 1 else mark
            if not 0 < end.sequence < mark.sequence:
                end = mark
            ledger.pass_data(end)
            self._data[number] = begin, end
        self._skip_to(ledger, mark)

    def _skip_to(self, ledger: Ledger, mark: Mark) -> None:
        """Go on at the frame at `mark`, over skippable ones, which are verified."""
        while ledger.offset < mark.offset:
            self._skip(ledger, *self._header(ledger))
        if ledger.mark != mark:
            raise FormatError("the index points elsewhere", offset=mark.offset)

    def _skip(self, ledger: Ledger, header: Header, packed: memoryview) -> None:
        if header.type < SKIPPABLE:
            raise FormatError("the index leaves out a frame", offset=ledger.offset)
        self._payload(ledger, header)
        ledger.pass_frame(header, packed)

    def _header(self, ledger: Ledger) -> tuple[Header, memoryview]:
        """The next header, admitted, and its bytes."""
        packed = self._bytes(ledger.offset, HEADER_SIZE, ledger.sequence)
        header = unpack_header(packed, self._checksum, frame=ledger.sequence, offset=ledger.offset)
        ledger.admit(header)
        return header, packed

    def _header_at(self, offset: int) -> Header:
        return unpack_header(self._bytes(offset, HEADER_SIZE), self._checksum, frame=None, offset=offset)

    def _payload(self, ledger: Ledger, header: Header, item: str | None = None) -> memoryview:
        """The payload of the next frame, verified."""
        begin = ledger.offset + HEADER_SIZE
        if header.pad:
            check_padding(self._bytes(begin, header.pad, ledger.sequence), header, offset=ledger.offset)
        payload = self._bytes(begin + header.pad, header.length, ledger.sequence)
        check_payload(self._checksum(payload, 0), header, offset=ledger.offset, item=item)
        return payload

    def _bytes(self, offset: int, size: int, frame: int | None = None) -> memoryview:
        if offset < 0 or offset + size > self._source.size:
            raise TruncatedError("the file ends before the end frame", frame=frame, offset=self._source.size)
        return self._source.read(offset, size)


def _data_mark(entries: memoryview, number: int) -> Mark:
    return Mark(*_ENTRY.unpack_from(entries, number * _ENTRY.size)[3:])
