"""Bytes <-> events, without I/O: the format of docs/format.md and nothing else.

`Reader` is fed bytes and gives events; `Writer` is given events and gives buffers. Both walk the one table of legal
steps in `ledger.py`, so that the writer refuses whatever the reader would refuse. Knows no codec, socket or thread;
the checksum is handed in.
"""

from tensorwire.wire.archive import Index, IndexEntry, pack_index
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
    ValueItem,
)
from tensorwire.wire.ledger import Summary
from tensorwire.wire.reader import (
    NEED_DATA,
    Event,
    ItemStart,
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
    "ContainerItem",
    "DataItem",
    "Event",
    "FileItem",
    "FrameType",
    "Header",
    "Index",
    "IndexEntry",
    "Item",
    "ItemStart",
    "Kind",
    "Reader",
    "Skipped",
    "Slice",
    "SlicePart",
    "SliceStart",
    "StreamEnd",
    "StreamInfo",
    "StreamStart",
    "Summary",
    "TensorItem",
    "ValueItem",
    "Writer",
    "pack_index",
]
