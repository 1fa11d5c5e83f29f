"""Frame buffers that are reused, and memory that grows with what has arrived."""

import sys
import threading
from typing import Any, Final, Protocol

import numpy as np

from tensorwire.memory.spare import SPARE, SPARE_FROM
from tensorwire.tensor import ByteArray

_KEPT: Final = 8
# Allocated for an item when its first bytes arrive. Beyond that, memory grows by this factor: memory that is not yet
# written to costs only addresses, and few growths mean little copying.
_FIRST_TAKE: Final = 4 << 20
_GROWTH: Final = 16
# Tensors of more bytes would leave the caches before they are complete: half of a common L3.
_UNCACHED_FROM: Final = 16 << 20
_NOTHING: Final = np.empty(0, np.uint8)


def _count(arrays: list[ByteArray], index: int) -> int:
    return sys.getrefcount(arrays[index])


_FREE: Final = _count([np.empty(0, np.uint8)], 0)


def _for_frames(size: int) -> ByteArray:
    """At least `size` bytes.

    Compressed slices all differ by a few bytes, so large sizes are rounded up. Otherwise spare memory would keep one
    buffer of each size.
    """
    return SPARE.empty(-(-size // SPARE_FROM) * SPARE_FROM if size >= SPARE_FROM else size)


class Pool:
    """A few warm buffers, shared by the threads of one stream.

    Touching fresh memory costs ten times more than writing to warm memory, so frames share a few buffers. A buffer is
    free when nobody else refers to it, as its reference count shows: a consumer may simply keep what it was given.
    """

    def __init__(self) -> None:
        self._arrays: list[ByteArray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> ByteArray:
        """A uint8 array of `size` bytes with arbitrary content."""
        with self._lock:
            free = [i for i in range(len(self._arrays)) if _count(self._arrays, i) == _FREE]
            for index in free:
                if self._arrays[index].size >= size:
                    return self._arrays[index][:size]
            if free:
                del self._arrays[free[0]]
            array = _for_frames(size)
            if len(self._arrays) < _KEPT:
                self._arrays.append(array)
            return array[:size]


class Memory(Protocol):
    """The memory of one decoded item, addressed by its bytes."""

    @property
    def stable(self) -> bool:
        """Whether regions keep their addresses when the next one is requested."""

    @property
    def uncached(self) -> bool | None:
        """How kernels should write to it: bypassing the caches (True), or as they choose (None)."""

    def region(self, start: int, stop: int) -> Any:
        """Bytes [start, stop): a writable flat uint8 array, or a device tensor for codecs that decode there."""


class FixedMemory:
    """Memory that exists already: `data`, a flat array or device tensor of elements of `itemsize` bytes."""

    __slots__ = ("_data", "_itemsize", "uncached")

    stable: Final = True

    def __init__(self, data: Any, itemsize: int = 1) -> None:
        self._data = data
        self._itemsize = itemsize
        self.uncached = data.nbytes >= _UNCACHED_FROM or None

    def region(self, start: int, stop: int) -> Any:
        """Bytes [start, stop)."""
        return self._data[start // self._itemsize : stop // self._itemsize]


class GrowingMemory:
    """`size` bytes for an item that a peer declared. Unless trusted, it allocates only in step with what arrives.

    Nothing is allocated before the first region is requested, because a stream may describe a quarter of a million
    items in a few megabytes without sending any of them. `data` is what is allocated so far, and complete once the last
    region was requested.
    """

    __slots__ = ("_reused", "_size", "data", "stable")

    def __init__(self, size: int, *, trusted: bool = False) -> None:
        self.stable = trusted
        self.data = _NOTHING
        self._size = size
        self._reused = False  # whether the memory was used before, rather than fresh from the system

    @property
    def uncached(self) -> bool | None:
        """True for large memory that was used before; kernels decide about the rest."""
        return (self._reused and self.data.size >= _UNCACHED_FROM) or None

    def region(self, start: int, stop: int) -> ByteArray:
        """Bytes [start, stop). Regions given before must no longer be in use, unless it is stable."""
        if self.data is _NOTHING:
            self.data = self._first(stop)
        elif stop > self.data.size:
            # Not ndarray.resize, which fills the added part with zeros, in small pages.
            grown = self._taken(max(stop, _GROWTH * self.data.size))
            grown[: self.data.size] = self.data
            self.data = grown
        return self.data[start:stop]

    def _first(self, stop: int) -> ByteArray:
        if self._size < SPARE_FROM:  # less than the first allocation in any case, and never kept as spare memory
            return np.empty(self._size, np.uint8)
        spare = SPARE.take(self._size)
        self._reused = spare is not None
        return self._taken(self._size if self.stable else max(stop, _FIRST_TAKE)) if spare is None else spare

    def _taken(self, size: int) -> ByteArray:
        return SPARE.empty(self._size) if size >= self._size else np.empty(size, np.uint8)


class Scratch:
    """The memory of one slice, encoded and decoded. Streams that are read in turns can share one."""

    def __init__(self) -> None:
        self._payload = self._values = _NOTHING

    def payload(self, size: int) -> ByteArray:
        """`size` bytes for an encoded slice."""
        if self._payload.size < size:
            self._payload = _for_frames(size)
        return self._payload[:size]

    def values(self, size: int) -> ByteArray:
        """`size` bytes for a decoded slice."""
        if self._values.size < size:
            self._values = _for_frames(size)
        return self._values[:size]
