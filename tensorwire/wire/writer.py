"""Events in, bytes out. A payload never passes through here: only its length and checksum do."""

from collections.abc import Iterable, Iterator

from tensorwire.checksum import Checksum
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.archive import IndexPacker
from tensorwire.wire.frames import HEADER_SIZE, FrameType, pack_header, pack_preamble
from tensorwire.wire.items import Described, Item, ItemPacker, StreamInfo, pack_stream
from tensorwire.wire.ledger import Ledger


class Writer:
    """One stream being written. Every method returns the bytes to send next.

    With `index=True` the stream ends with an index of its items, for random access at rest.
    """

    def __init__(self, checksum: Checksum, limits: Limits = DEFAULT, *, index: bool = False) -> None:
        self._checksum = checksum
        self._limits = limits
        preamble = pack_preamble(checksum)
        self._preamble = preamble
        self._ledger = Ledger(limits, preamble, int.from_bytes(preamble[-4:], "little"))
        self._index = IndexPacker() if index else None

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._ledger.offset

    def start(self, info: StreamInfo) -> bytes:
        """Preamble and STREAM frame."""
        frame = self._message(FrameType.STREAM, pack_stream(info, self._limits))
        self._ledger.align = info.align
        return self._preamble + frame

    def items(self, items: Iterable[Item]) -> Iterator[bytes]:
        """ITEM frames for one or more items; the items' data must follow in the order in which they were described.

        Raises a WireError that names the item if a reader would refuse it.
        """
        packer = ItemPacker(self._limits)
        for item in items:
            if not packer.add(item):
                yield self._described(*packer.take())
                packer.add(item)
        yield self._described(*packer.take())

    def _described(self, payload: bytes, described: Described) -> bytes:
        mark = self._ledger.mark
        frame = self._message(FrameType.ITEM, payload, described)
        if self._index is not None:
            self._index.add_items(mark, len(described))
        return frame

    def data(self, start: int, count: int, length: int, crc: int) -> bytes:
        """Header and padding of a DATA frame of the current item: `count` elements from `start`.

        The caller sends the payload after it: `length` bytes whose CRC-32C is `crc`.
        """
        ledger = self._ledger
        pad = ledger.padding()
        number = ledger.pending.number if ledger.pending else 0
        packed, header = pack_header(
            self._checksum,
            type=FrameType.DATA,
            sequence=ledger.sequence,
            length=length,
            link=ledger.link,
            payload_crc=crc,
            item=number,
            start=start,
            count=count,
            pad=pad,
        )
        step = ledger.admit(header)
        if self._index is not None and start == 0:
            self._index.add_data(number, ledger.mark)
        ledger.pass_frame(header, packed, step)
        return packed + bytes(pad)

    def bundle(self, count: int, length: int, crc: int) -> bytes:
        """Header of a BUNDLE frame of the next `count` items, whose payload has `length` bytes and this CRC-32C."""
        ledger = self._ledger
        numbers = [number for number, _ in ledger.pending.first(count)]
        packed, header = pack_header(
            self._checksum,
            type=FrameType.BUNDLE,
            sequence=ledger.sequence,
            length=length,
            link=ledger.link,
            payload_crc=crc,
            item=numbers[0] if numbers else 0,
            count=count,
        )
        step = ledger.admit(header)
        if self._index is not None:
            for number in numbers:
                self._index.add_data(number, ledger.mark)
        ledger.pass_frame(header, packed, step)
        return packed

    def data_header_size(self) -> int:
        """Bytes that `data` will return for the next frame."""
        return HEADER_SIZE + self._ledger.padding()

    def end(self) -> bytes:
        """The INDEX frame, if requested, and the END frame."""
        index = b""
        if self._index is not None:
            index = self._message(FrameType.INDEX, self._index.pack())
        return index + self._message(FrameType.END, self._ledger.summary().pack())

    def _message(self, kind: FrameType, payload: bytes, described: Described | None = None) -> bytes:
        ledger = self._ledger
        packed, header = pack_header(
            self._checksum,
            type=kind,
            sequence=ledger.sequence,
            length=len(payload),
            link=ledger.link,
            payload_crc=self._checksum(payload, 0),
            item=ledger.items if described is not None else 0,
        )
        step = ledger.admit(header)
        if described is not None:
            ledger.add_items(described)
        ledger.pass_frame(header, packed, step)
        return packed + payload
