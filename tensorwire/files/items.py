"""Reads an item of an archive, or a part of it, into memory."""

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec
from tensorwire.errors import TensorwireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import GrowingMemory, Scratch
from tensorwire.streams.receiver import check_slice
from tensorwire.tensor import Extent
from tensorwire.wire import Archive, DataItem, Header, ValueItem

_STEP: Final = 1 << 20  # bytes that are read and checksummed before the next ones are, while they are in the caches
_SMALL: Final = 64 << 10


def read_item(
    archive: Archive,
    number: int,
    item: DataItem,
    codec: Codec,
    limits: Limits = DEFAULT,
    *,
    read_into: Callable[[int, memoryview], None] | None = None,
    part: tuple[int, int] | None = None,
) -> npt.NDArray[np.uint8]:
    """The decoded bytes of the item of this number: a tensor's elements, a value's encoding, a file's content.

    `part`: of elements [begin, end) only. `read_into` fills memory from an offset of the archive's source on.
    """
    reading = _Reading(item, codec, limits, part)
    # Small items are read together with the headers around them.
    small = item.total is not None and item.total * reading.itemsize <= _SMALL
    fetch = None if read_into is None or small else partial(reading.fetch, read_into)
    for stored, extent in archive.slices(number, reading.check, fetch):
        try:
            reading.decode(stored.payload, extent)
        except TensorwireError as error:
            error.item, error.frame, error.offset = item.name, stored.header.sequence, stored.frame_offset
            raise
    return reading.memory.data[: reading.filled]


class _Reading:
    """An item, or elements [begin, end) of it, that is being read into memory."""

    def __init__(self, item: DataItem, codec: Codec, limits: Limits, part: tuple[int, int] | None) -> None:
        self._item = item
        self._codec = codec
        self._limits = limits
        self.itemsize = 1 if isinstance(item, ValueItem) else item.dtype.itemsize
        self._begin, self._end = part or (0, item.total if item.total is not None else limits.stream)
        self._scratch = Scratch()
        self.memory = GrowingMemory((self._end - self._begin) * self.itemsize)
        self.filled = 0  # bytes

    def check(self, header: Header) -> Extent | None:
        """The extent of a slice; None if no part of it is wanted."""
        extent = check_slice(self._codec, header, self._item, self._limits)
        begin, end = self._wanted(extent)
        return extent if begin < end else None

    def fetch(
        self, read_into: Callable[[int, memoryview], None], offset: int, size: int, extent: Extent
    ) -> tuple[memoryview, int]:
        """The payload of a slice and its checksum. A raw payload is read into place, as far as it is wanted."""
        if not self._codec.in_place:
            payload = self._scratch.payload(size).data
            return payload, _read_summed(read_into, offset, payload, 0)
        begin, end = self._wanted(extent)
        place = self._region(begin, end).data
        before, behind = (begin - extent.start) * self.itemsize, (extent.start + extent.count - end) * self.itemsize
        crc = self._pass_over(read_into, offset, before, 0)
        crc = _read_summed(read_into, offset + before, place, crc)
        return place, self._pass_over(read_into, offset + before + len(place), behind, crc)

    def decode(self, payload: memoryview, extent: Extent) -> None:
        """Decode the wanted part of a slice into the memory."""
        begin, end = self._wanted(extent)
        region = self._region(begin, end)
        if end - begin == extent.count:
            self._codec.decode(payload, extent, region)
            return
        if self._codec.in_place and len(payload) == region.size:  # `fetch` has put it there
            self._codec.decode(payload, extent._replace(start=begin, count=end - begin), region)
            return
        values = self._scratch.values(extent.count * self.itemsize)
        self._codec.decode(payload, extent, values)
        at = (begin - extent.start) * self.itemsize
        region[:] = values[at : at + region.size]

    def _wanted(self, extent: Extent) -> tuple[int, int]:
        return max(extent.start, self._begin), min(extent.start + extent.count, self._end)

    def _region(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        start, stop = (begin - self._begin) * self.itemsize, (end - self._begin) * self.itemsize
        self.filled = max(self.filled, stop)
        return self.memory.region(start, stop)

    def _pass_over(self, read_into: Callable[[int, memoryview], None], offset: int, size: int, crc: int) -> int:
        """The checksum, continued over bytes that are not kept."""
        for done in range(0, size, _STEP):
            step = self._scratch.payload(min(_STEP, size - done)).data
            crc = _read_summed(read_into, offset + done, step, crc)
        return crc


def _read_summed(read_into: Callable[[int, memoryview], None], offset: int, memory: memoryview, crc: int) -> int:
    """Fill `memory`, and continue the checksum over it while it is in the caches."""
    for done in range(0, len(memory), _STEP):
        step = memory[done : done + _STEP]
        read_into(offset + done, step)
        crc = crc32c(step, crc)
    return crc
