"""Events in, bytes out. A payload never passes through here: only its length and checksum do."""

from tensorwire.checksum import Checksum
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire.archive import NO_DATA, pack_index
from tensorwire.wire.frames import HEADER_SIZE, FrameType, pack_header, pack_preamble
from tensorwire.wire.items import Item, StreamInfo, pack_item, pack_stream
from tensorwire.wire.ledger import Ledger, Mark


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
        self._entries: list[tuple[Mark, Mark]] | None = [] if index else None  # as `pack_index` takes them

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._ledger.offset

    def start(self, info: StreamInfo) -> bytes:
        """Preamble and STREAM frame."""
        frame = self._message(FrameType.STREAM, pack_stream(info, self._limits))
        self._ledger.align = info.align
        return self._preamble + frame

    def item(self, item: Item) -> bytes:
        """An ITEM frame; the item's data follows in the order in which items were described."""
        payload = pack_item(item, self._limits)
        ledger = self._ledger
        if self._entries is not None:
            self._entries.append((ledger.mark, NO_DATA))
        return self._message(FrameType.ITEM, payload, item=item)

    def data(self, start: int, count: int, length: int, crc: int) -> bytes:
        """Header and padding of a DATA frame of the current item: `count` elements from `start`.

        The caller sends the payload after it: `length` bytes whose CRC-32C is `crc`.
        """
        ledger = self._ledger
        pad = ledger.padding()
        number = ledger.pending[0][0] if ledger.pending else 0
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
        if self._entries is not None and start == 0:
            self._entries[number] = self._entries[number][0], ledger.mark
        ledger.pass_frame(header, packed, step)
        return packed + bytes(pad)

    def data_header_size(self) -> int:
        """Bytes that `data` will give for the next frame."""
        return HEADER_SIZE + self._ledger.padding()

    def end(self) -> bytes:
        """The INDEX frame where asked for, and the END frame."""
        index = b""
        if self._entries is not None:
            index = self._message(FrameType.INDEX, pack_index(self._entries))
        return index + self._message(FrameType.END, self._ledger.summary().pack())

    def _message(self, kind: FrameType, payload: bytes, item: Item | None = None) -> bytes:
        ledger = self._ledger
        packed, header = pack_header(
            self._checksum,
            type=kind,
            sequence=ledger.sequence,
            length=len(payload),
            link=ledger.link,
            payload_crc=self._checksum(payload, 0),
            item=ledger.items if item is not None else 0,
        )
        step = ledger.admit(header)
        if item is not None:
            ledger.add_item(item)
        ledger.pass_frame(header, packed, step)
        return packed + payload
