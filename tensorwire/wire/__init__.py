"""Bytes <-> events, without I/O: the format of docs/format.md and nothing else.

`Reader` turns bytes into events; `Writer` turns events into buffers; `Archive` gives single items of a stream at rest.
All three follow the one table of legal steps in `ledger.py`, so whatever one of them refuses, the others refuse too.
Nothing here knows codecs, sockets or threads; the checksum function is passed in.
"""

from tensorwire.wire.archive import Archive, RandomAccess, StoredSlice
from tensorwire.wire.frames import FrameType, Header
from tensorwire.wire.items import (
    AliasItem,
    ContainerItem,
    DataItem,
    FileItem,
    Item,
    Kind,
    StreamInfo,
    TensorItem,
    Unpack,
    ValueItem,
    sharing,
)
from tensorwire.wire.ledger import Summary
from tensorwire.wire.names import name_of, path_of
from tensorwire.wire.reader import (
    NEED_DATA,
    Bundle,
    Event,
    ItemsStart,
    Reader,
    Skipped,
    Slice,
    SlicePart,
    SliceStart,
    StreamEnd,
    StreamStart,
)
from tensorwire.wire.writer import Writer

__all__ = [
    "NEED_DATA",
    "AliasItem",
    "Archive",
    "Bundle",
    "ContainerItem",
    "DataItem",
    "Event",
    "FileItem",
    "FrameType",
    "Header",
    "Item",
    "ItemsStart",
    "Kind",
    "RandomAccess",
    "Reader",
    "Skipped",
    "Slice",
    "SlicePart",
    "SliceStart",
    "StoredSlice",
    "StreamEnd",
    "StreamInfo",
    "StreamStart",
    "Summary",
    "TensorItem",
    "Unpack",
    "ValueItem",
    "Writer",
    "name_of",
    "path_of",
    "sharing",
]
