"""A stream at rest and its index: single items, without reading the rest (docs/format.md, section 8).

Every descriptor is read when an archive is opened, data when it is asked for. All frames that are read go through the
ledger, as they do in the reader. What stands between two of them is either the data of an item, or has to be
skippable and is read too, so that whoever opens an archive and reads every item has checked all that a reader from
front to back checks, but for the digest in the END frame.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol, TypeVar

from tensorwire.checksum import Checksum
from tensorwire.errors import FormatError, LimitError, SchemaError, SequenceError, TruncatedError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.frames import (
    HEADER_SIZE,
    PREAMBLE_SIZE,
    FrameType,
    Header,
    check_padding,
    check_payload,
    check_preamble,
    unpack_header,
)
from tensorwire.wire.items import AliasItem, ContainerItem, Item, StreamInfo
from tensorwire.wire.ledger import END_SIZE, Ledger, Mark, State, Step, Summary

_ENTRY: Final = struct.Struct("<QIIQII")
NO_DATA: Final[Mark] = 0, 0, 0

CheckedT = TypeVar("CheckedT")
# Reads the payload that stands at an offset and has a size, for what `check` said to its header: its bytes, as far as
# the caller wants them, and the CRC-32C of all of them.
Fetch = Callable[[int, int, CheckedT], tuple[memoryview, int]]


class RandomAccess(Protocol):
    """Bytes at rest."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, size: int, /) -> memoryview:
        """Exactly `size` bytes from `offset` on, which are there."""


class StoredSlice(NamedTuple):
    """A verified slice: its header, its payload, and the byte of the archive that the payload begins at."""

    header: Header
    payload: memoryview
    offset: int

    @property
    def frame_offset(self) -> int:
        """The byte of the archive that the frame begins at."""
        return self.offset - self.header.pad - HEADER_SIZE


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
        self._read, self._size = source.read, source.size
        self._checksum = checksum
        self._accept = accept
        self._limits = limits
        self._entries = memoryview(b"")  # of the index: as objects, they would take ten times the memory
        self._after: dict[int, Mark] = {}  # by item number: the first frame after its data that the index knows
        try:
            self._open()
        except WireError as error:
            raise self._explained(error) from None

    def slices(
        self, number: int, check: Callable[[Header], CheckedT | None], fetch: "Fetch[CheckedT] | None" = None
    ) -> Iterator[tuple[StoredSlice, CheckedT]]:
        """The data frames of an item, each with what `check` says to its header.

        `check` is called before the payload is read, and may raise; a payload for which it gives None is passed over.
        `fetch` reads payloads into memory of the caller. Without the frame that only closes a file.
        """
        item = self.items[number]
        if isinstance(item, (AliasItem, ContainerItem)) or number not in self._after:
            return
        begin = _ENTRY.unpack_from(self._entries, number * _ENTRY.size)[3:]
        ledger = Ledger.within(self._limits, begin, self.info.align, number, item)
        try:
            while ledger.pending:
                header, packed, step = self._header(ledger)
                if step is Step.SKIP:
                    self._payload(ledger, header)
                elif header.count:
                    checked = check(header)
                    if checked is not None:
                        payload = self._fetched(ledger, header, item.name, checked, fetch)
                        yield StoredSlice(header, payload, ledger.offset + HEADER_SIZE + header.pad), checked
                ledger.pass_frame(header, packed, step)
            self._skip_to(ledger, self._after[number])
        except WireError as error:
            error.item, error.frame, error.offset = item.name, ledger.sequence, error.offset or ledger.offset
            raise self._explained(error, until=ledger.offset) from None

    def close(self) -> None:
        """Let go of the source: no data can be read any more, and to ask for it is a ValueError."""
        self._entries.release()

    def _open(self) -> None:
        index, end = self._find_index()
        ledger = self._begin(digest=False)  # which takes every header
        for entry in _ENTRY.iter_unpack(self._entries):
            if entry[:3] != ledger.mark:
                self._reach(ledger, entry[:3])
            header, packed, step = self._header(ledger)
            if step is not Step.ITEM:
                raise FormatError("the index points at another frame", offset=ledger.offset)
            item = self._read_item(ledger, header)
            if item.total == 0 and entry[3:] != NO_DATA:
                raise FormatError("the index has data for an item without any", item=item.name, offset=ledger.offset)
            ledger.pass_frame(header, packed, step)
            self.items.append(item)
        self._reach(ledger, index)
        self._skip_to(ledger, end)
        header, _, _ = self._header(ledger)
        ledger.read_end(self._payload(ledger, header))

    def _find_index(self) -> tuple[Mark, Mark]:
        """Find the entries, and where INDEX and END stand. None of it is verified before the account reaches it."""
        offset = max(self._size - HEADER_SIZE - END_SIZE, 0)
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
            raise LimitError("index", self._limits.skippable, index.length, field="skippable", offset=where)
        self._entries = self._bytes(where + HEADER_SIZE, index.length)
        return (where, index.sequence, index.link), (offset, end.sequence, end.link)

    def _explained(self, error: WireError, until: int | None = None) -> WireError:
        """The same error, for there is none before it in the stream; raises that otherwise."""
        self._walk(until)
        if isinstance(error, SequenceError):  # of frames where the index has them, which the stream has in order
            return FormatError(f"the index points elsewhere: {error.detail}", item=error.item, offset=error.offset)
        return error

    def _walk(self, until: int | None = None) -> None:
        """Read the stream from front to back, all but the payloads of data, and raise for the first fault.

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
                self._read_item(ledger, header)
            elif step is Step.END:
                ledger.read_end(self._payload(ledger, header))
            else:
                self._payload(ledger, header)
            ledger.pass_frame(header, packed, step)
        if ledger.state is State.ENDED and ledger.offset != self._size:
            raise FormatError("bytes after the end frame", offset=ledger.offset)

    def _begin(self, *, digest: bool) -> Ledger:
        """The account after the preamble and the STREAM frame."""
        preamble = bytes(self._bytes(0, PREAMBLE_SIZE))
        link = check_preamble(preamble, self._checksum)
        ledger = Ledger(self._limits, preamble if digest else None, link)
        header, packed, step = self._header(ledger)
        self.info = ledger.read_stream(self._payload(ledger, header))
        self._accept(self.info)
        ledger.pass_frame(header, packed, step)
        return ledger

    def _read_item(self, ledger: Ledger, header: Header) -> Item:
        item = ledger.read_item(self._payload(ledger, header))
        try:
            self._accept(item)
        except WireError as error:
            error.item, error.frame, error.offset = item.name, ledger.sequence, ledger.offset
            raise
        return item

    def _reach(self, ledger: Ledger, mark: Mark) -> None:
        """Go on at the frame at `mark`, beyond the data of items that stands before it."""
        begin = self._next_data(ledger, mark)
        while begin is not None:
            self._skip_to(ledger, begin)
            number, _ = ledger.pending.popleft()
            following = self._next_data(ledger, mark)
            self._after[number] = following or mark
            ledger.pass_data(following or mark)
            begin = following
        self._skip_to(ledger, mark)

    def _next_data(self, ledger: Ledger, mark: Mark) -> Mark | None:
        """Where the data of the first pending item begins, if that is before `mark`."""
        if not ledger.pending:
            return None
        entry = _ENTRY.unpack_from(self._entries, ledger.pending[0][0] * _ENTRY.size)
        return entry[3:] if 0 < entry[4] < mark[1] else None

    def _skip_to(self, ledger: Ledger, mark: Mark) -> None:
        """Go on at the frame at `mark`, over skippable ones, which are verified."""
        while ledger.offset < mark[0]:
            header, packed, step = self._header(ledger)
            if step is not Step.SKIP:
                raise FormatError("a frame that the index leaves out", offset=ledger.offset)
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
