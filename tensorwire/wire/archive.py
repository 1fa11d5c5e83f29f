"""The INDEX payload: where each item of a stream at rest begins (docs/format.md, section 8)."""

import struct
from typing import Final, NamedTuple

from tensorwire.errors import FormatError

_ENTRY: Final = struct.Struct("<QIIQII")


class IndexEntry(NamedTuple):
    """Where one item stands: offset in the stream, sequence and link of its ITEM and first DATA frame.

    The data fields are zero for an item without data frames.
    """

    item_offset: int
    item_sequence: int
    item_link: int
    data_offset: int
    data_sequence: int
    data_link: int


def pack_index(entries: list[IndexEntry]) -> bytes:
    """One 32-byte entry an item, in item order."""
    return b"".join(_ENTRY.pack(*entry) for entry in entries)


class Index:
    """The entries of an INDEX payload by item number, unpacked one by one: as objects, they take ten times the memory."""

    def __init__(self, payload: bytes | memoryview) -> None:
        if len(payload) % _ENTRY.size:
            raise FormatError("index is not a whole number of entries")
        self._payload = payload

    def __len__(self) -> int:
        return len(self._payload) // _ENTRY.size

    def __getitem__(self, number: int) -> IndexEntry:
        return IndexEntry(*_ENTRY.unpack_from(self._payload, number * _ENTRY.size))
