"""The fixed structures: preamble and frame header (docs/format.md, sections 2 and 3).

Both are plain little-endian structs under a CRC-32C of their own, which is checked before any field is used.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from tensorwire.checksum import Checksum
from tensorwire.errors import CorruptError, FormatError, UnsupportedError

MAGIC: Final = b"\x93TWIR\r\n\x1a"
MAJOR: Final = 1
MINOR: Final = 0
_TLS: Final = b"\x16\x03"  # how a handshake begins, in place of a stream

_PREAMBLE: Final = struct.Struct("<8sBBHI")
PREAMBLE_SIZE: Final = _PREAMBLE.size
# Low byte: features a reader must know. High byte: features it may ignore.
_CRITICAL_FLAGS: Final = 0x00FF

_HEADER: Final = struct.Struct("<BBBBIQIIQQII")
HEADER_SIZE: Final = _HEADER.size
_CRC_OFFSET: Final = HEADER_SIZE - 4
_CRC: Final = struct.Struct("<I")

# A frame of this type or above may be skipped by a reader that does not know it.
SKIPPABLE: Final = 0x80


class FrameType(IntEnum):
    """Frame types of version 1."""

    STREAM = 1
    ITEM = 2
    DATA = 3
    END = 4
    BUNDLE = 5
    INDEX = 0x81
    TARGET = 0x82

    @classmethod
    def label(cls, number: int) -> str:
        """The name of a type, or its number if this version has no name for it."""
        return cls(number).name if number in _KNOWN else f"type {number:#04x}"


_KNOWN: Final = frozenset(FrameType)
_ABOUT_ITEMS: Final = frozenset({FrameType.ITEM, FrameType.DATA, FrameType.BUNDLE})

# Items of a BUNDLE frame: enough to be worth one, and few enough that reading one of them costs little.
LEAST_BUNDLED: Final = 2
MOST_BUNDLED: Final = 64


class Header(NamedTuple):
    """A frame header. Sizes in bytes; `start` and `count` in elements of the item; in a BUNDLE `count` is of items."""

    type: int
    pad: int
    sequence: int
    length: int
    item: int
    link: int
    start: int
    count: int  # type: ignore[assignment]  # a field of the format, which hides tuple.count
    payload_crc: int
    crc: int

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return HEADER_SIZE + self.pad + self.length


def pack_preamble(checksum: Checksum) -> bytes:
    """The first 16 bytes of every stream."""
    body = _PREAMBLE.pack(MAGIC, MAJOR, MINOR, 0, 0)[:-4]
    return body + _CRC.pack(checksum(body, 0))


def check_preamble(data: bytes | memoryview, checksum: Checksum) -> int:
    """Return the preamble's CRC, the link of the first frame.

    Raises FormatError (not a stream), UnsupportedError (another version, byte order or critical feature),
    CorruptError.
    """
    magic: bytes
    crc: int
    magic, major, minor, flags, crc = _PREAMBLE.unpack(data)
    if magic == MAGIC[::-1]:
        raise UnsupportedError("the magic is byte-swapped: written big-endian; streams are little-endian", offset=0)
    if magic != MAGIC:
        detail = "these bytes are TLS: one end uses it and the other not" if magic.startswith(_TLS) else "wrong magic"
        raise FormatError(f"not a tensorwire stream: {detail}", offset=0)
    if checksum(data[:-4], 0) != crc:
        raise CorruptError("preamble checksum mismatch", offset=0)
    if major != MAJOR:
        raise UnsupportedError(f"format version {major}.{minor}; this build reads {MAJOR}.x", offset=8)
    if flags & _CRITICAL_FLAGS:
        raise UnsupportedError(f"unknown critical features {flags & _CRITICAL_FLAGS:#04x}", offset=10)
    return crc


def pack_header(
    checksum: Checksum,
    *,
    type: int,
    sequence: int,
    length: int,
    link: int,
    payload_crc: int,
    item: int = 0,
    start: int = 0,
    count: int = 0,
    pad: int = 0,
) -> tuple[bytes, Header]:
    """The 48 bytes of a frame header, and the header they say."""
    body = _HEADER.pack(type, 0, pad, 0, sequence, length, item, link, start, count, payload_crc, 0)[:_CRC_OFFSET]
    crc = checksum(body, 0)
    header = Header(type, pad, sequence, length, item, link, start, count, payload_crc, crc)
    return body + _CRC.pack(crc), header


def unpack_header(
    data: bytes | bytearray | memoryview, checksum: Checksum, *, frame: int | None, offset: int
) -> Header:
    """Check a header's CRC and reserved bits, then return it. `frame` and `offset` name it in errors."""
    (kind, flags, pad, reserved, sequence, length, item, link, start, count, payload_crc, crc) = _HEADER.unpack(data)
    if checksum(data[:_CRC_OFFSET], 0) != crc:
        raise CorruptError("frame header checksum mismatch", frame=frame, offset=offset)
    if flags or reserved:
        raise FormatError("reserved bits of the frame header are not zero", frame=frame, offset=offset)
    if kind < SKIPPABLE and kind not in _KNOWN:
        raise UnsupportedError(f"unknown critical frame type {kind}", frame=frame, offset=offset)
    if kind != FrameType.DATA and (
        pad or start or (count and kind != FrameType.BUNDLE) or (item and kind not in _ABOUT_ITEMS)
    ):
        raise FormatError(f"frame type {kind} must leave pad, item, start and count zero", frame=frame, offset=offset)
    return Header(kind, pad, sequence, length, item, link, start, count, payload_crc, crc)


def check_payload(crc: int, header: Header, *, offset: int, item: str | None = None) -> None:
    """Raise CorruptError unless `crc` is the payload checksum in the header of the frame at `offset`."""
    if crc != header.payload_crc:
        place = offset + HEADER_SIZE
        raise CorruptError("payload checksum mismatch", frame=header.sequence, item=item, offset=place)


def bundle_table(lengths: Sequence[int]) -> bytes:
    """The table at the start of a BUNDLE payload: the lengths of its items' payloads."""
    return struct.pack(f"<{len(lengths)}I", *lengths)


def split_bundle(payload: memoryview, count: int) -> list[tuple[int, int]]:
    """The begin and end of the payload of each of the `count` items in a BUNDLE payload. Raises FormatError."""
    lengths = struct.unpack_from(f"<{count}I", payload)
    stops = [*accumulate(lengths, initial=4 * count)]
    if not all(lengths) or stops[-1] != len(payload):
        raise FormatError("the payloads of a bundle do not match its table")
    return [*pairwise(stops)]


def check_padding(padding: bytes | bytearray | memoryview, header: Header, *, offset: int) -> None:
    """Raise FormatError unless the bytes before the payload of the frame at `offset` are zero."""
    if any(padding):
        raise FormatError("padding is not zero", frame=header.sequence, offset=offset)
