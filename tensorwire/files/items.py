"""Reads an item of an archive, or a part of it, into memory."""

from array import array
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec
from tensorwire.errors import CorruptError, TensorwireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import GrowingMemory, Scratch
from tensorwire.streams.receiver import check_slice
from tensorwire.tensor import Extent
from tensorwire.wire import Archive, DataItem, Header, ValueItem

_STEP: Final = 1 << 20  # bytes that are read and checksummed before the next ones are, while they are in the caches
_SMALL: Final = 64 << 10

ReadInto = Callable[[int, memoryview], None]
# By where the payload of a raw frame begins: its checksum before the first step and behind each.
RunningSums = dict[int, "array[int]"]


def read_item(
    archive: Archive,
    number: int,
    item: DataItem,
    codec: Codec,
    limits: Limits = DEFAULT,
    *,
    read_into: ReadInto | None = None,
    part: tuple[int, int] | None = None,
    running: RunningSums | None = None,
) -> npt.NDArray[np.uint8]:
    """The decoded bytes of the item of this number: a tensor's elements, a value's encoding, a file's content.

    `part`: of elements [begin, end) only. `read_into` fills memory from an offset of the archive's source on.
    `running`: what was learned of raw frames when a part of them was read first, for which all of one is. Later parts
    read what they cover, in steps.
    """
    reading = _Reading(item, codec, limits, part, {} if running is None else running)
    # What is small comes with the headers around it.
    small = item.total is not None and item.total * reading.itemsize <= _SMALL
    fetch = None if read_into is None or small else partial(reading.fetch, read_into)
    for stored, extent in archive.slices(number, reading.check, fetch):
        try:
            reading.decode(stored.payload, extent)
            reading.learn()
        except TensorwireError as error:
            error.item, error.frame, error.offset = item.name, stored.header.sequence, stored.frame_offset
            raise
    return reading.memory.data[: reading.filled]


class _Reading:
    """An item, or elements [begin, end) of it, that is being read into memory."""

    def __init__(
        self, item: DataItem, codec: Codec, limits: Limits, part: tuple[int, int] | None, running: RunningSums
    ) -> None:
        self._item = item
        self._codec = codec
        self._limits = limits
        self.itemsize = 1 if isinstance(item, ValueItem) else item.dtype.itemsize
        self._begin, self._end = part or (0, item.total if item.total is not None else limits.stream)
        self._scratch = Scratch()
        self.memory = GrowingMemory((self._end - self._begin) * self.itemsize)
        self.filled = 0  # bytes
        self._running = running
        self._learned: RunningSums = {}  # of frames whose checksum is not known to match yet

    def check(self, header: Header) -> Extent | None:
        """The extent of a slice; None if no part of it is wanted."""
        extent = check_slice(self._codec, header, self._item, self._limits)
        begin, end = self._wanted(extent)
        return extent if begin < end else None

    def learn(self) -> None:
        """What was fetched has turned out to be what was written."""
        self._running |= self._learned

    def fetch(self, read_into: ReadInto, offset: int, size: int, extent: Extent) -> tuple[memoryview, int]:
        """The payload of a slice and its checksum: a raw one in its place, as far as it is wanted."""
        if not self._codec.in_place:
            payload = self._scratch.payload(size).data
            return payload, _read_summed(read_into, offset, payload, 0)
        begin, end = self._wanted(extent)
        place = self._region(begin, end).data
        if len(place) == size:
            return place, _read_summed(read_into, offset, place, 0)
        first = (begin - extent.start) * self.itemsize
        sums = self._running.get(offset)
        if sums is not None:
            self._read_steps(read_into, offset, size, place, first, sums)
            return place, sums[-1]
        sums = self._read_all(read_into, offset, size, place, first)
        if size > _STEP:
            self._learned[offset] = sums
        return place, sums[-1]

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

    def _read_all(self, read_into: ReadInto, offset: int, size: int, place: memoryview, first: int) -> "array[int]":
        """Read a whole payload, whose bytes from `first` on fill `place`; returns its running checksum."""
        sums = array("I", [0])
        for done in range(0, size, _STEP):
            sums.append(self._read_step(read_into, offset, done, size, place, first, sums[-1]))
        return sums

    def _read_steps(
        self, read_into: ReadInto, offset: int, size: int, place: memoryview, first: int, sums: "array[int]"
    ) -> None:
        """Fill `place` with the bytes of a payload from `first` on, of which the steps are read that hold them."""
        for number in range(first // _STEP, -(-(first + len(place)) // _STEP)):
            got = self._read_step(read_into, offset, number * _STEP, size, place, first, sums[number])
            if got != sums[number + 1]:
                raise CorruptError("it has changed since it was verified: open the file again")

    def _read_step(
        self, read_into: ReadInto, offset: int, done: int, size: int, place: memoryview, first: int, crc: int
    ) -> int:
        """Read one step of a payload and put what of it belongs there into `place`; returns the checksum behind it."""
        end = min(done + _STEP, size)
        low, high = max(done, first), min(end, first + len(place))
        if (low, high) == (done, end):
            step = place[low - first : high - first]
            read_into(offset + done, step)
            return crc32c(step, crc)
        step = self._scratch.payload(end - done).data
        read_into(offset + done, step)
        if low < high:
            place[low - first : high - first] = step[low - done : high - done]
        return crc32c(step, crc)


def _read_summed(read_into: ReadInto, offset: int, memory: memoryview, crc: int) -> int:
    """Fill `memory`, and continue the checksum over it while it is in the caches."""
    for done in range(0, len(memory), _STEP):
        step = memory[done : done + _STEP]
        read_into(offset + done, step)
        crc = crc32c(step, crc)
    return crc
