"""Memory of dropped tensors, kept for later ones (docs/decisions/0011-spare-memory.md)."""

import mmap
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.tensor import ByteArray

# The C library already keeps smaller memory.
SPARE_FROM: Final = 256 << 10


# The system must be able to take spare memory back while we have it.
_CAN_SPARE: Final = hasattr(mmap, "MADV_FREE")


def _initial_limit(asked: str) -> int:
    if not _CAN_SPARE:  # pragma: no cover - Windows
        return 0
    if not asked:
        return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16, 1 << 30)
    if not asked.isdecimal():
        raise ImportError(f"TENSORWIRE_SPARE_MEMORY: expected a number of bytes, got {asked!r}")
    return int(asked)


class SpareMemory:
    """Keeps the memory of dropped large arrays for new ones of the same size, at most `limit` bytes.

    Filling memory for the first time costs three to ten times as much as filling it again, because the system clears
    each page first. A training loop that decodes the same model every round pays this only in the first round. Kept
    memory is marked as free (madvise, MADV_FREE): the system takes it when it runs short, which costs nothing but the
    saving for the next array.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._free: dict[int, list[_Mapping]] = {}  # by size; the last one given back is at the end
        # Never waited for: finalizers run in any thread at any time, even in the one that holds the lock, and after a
        # fork the child may find it held for ever. A caller that does not get the lock does without spare memory.
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """Bytes that may be kept."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._shrink(limit)

    def empty(self, size: int) -> ByteArray:
        """A uint8 array of `size` bytes with arbitrary content. Raises MemoryError."""
        array = self.take(size)
        if array is not None:
            return array
        try:
            return self._new(size)
        except MemoryError:  # spare memory counts towards a limit on the address space
            self._shrink(0)
            return self._new(size)

    def _new(self, size: int) -> ByteArray:
        if size < SPARE_FROM or size > self._limit:
            return np.empty(size, np.uint8)
        return _Loan(_Mapping(size), self).array()

    def take(self, size: int) -> ByteArray | None:
        """As `empty`, but only from spare memory of that size; None if there is none."""
        mapping = None
        if self._lock.acquire(blocking=False):
            try:
                mapping = self._pop(size, -1) if size in self._free else None
            finally:
                self._lock.release()
        return None if mapping is None else _Loan(mapping, self).array()

    def give_back(self, mapping: "_Mapping") -> None:
        """Keep a mapping that is no longer used, or release it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if mapping.size <= self._limit:
                mapping.mark_free()
                self._free[mapping.size] = [*self._free.pop(mapping.size, ()), mapping]
                self._size += mapping.size
        finally:
            self._lock.release()
        self._shrink(self._limit)

    def _pop(self, size: int, index: int) -> "_Mapping":
        mapping = self._free[size].pop(index)
        self._size -= size
        if not self._free[size]:
            del self._free[size]
        return mapping

    def _shrink(self, size: int) -> None:
        """Release kept memory beyond `size` bytes, the least recently used first."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._size > size:
                self._pop(next(iter(self._free)), 0)
        finally:
            self._lock.release()


class _Mapping:
    """A private anonymous mapping, in huge pages if the system grants them."""

    __slots__ = ("_memory", "address", "size")

    def __init__(self, size: int) -> None:
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size} bytes: {error.strerror}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # pragma: no branch - another platform
            with suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data

    def mark_free(self) -> None:
        with suppress(OSError):  # locked in memory by the program, for instance
            self._memory.madvise(mmap.MADV_FREE)


class _Loan:
    """A mapping in use: NumPy keeps this object for as long as any view of the array lives."""

    def __init__(self, mapping: _Mapping, owner: SpareMemory) -> None:
        self._mapping = mapping
        self._owner = owner

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self._mapping.size,), "data": (self._mapping.address, False)}

    def array(self) -> ByteArray:
        return np.asarray(self)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing():  # pragma: no branch - the interpreter ends: what this needs is being taken down
            self._owner.give_back(self._mapping)


SPARE: Final = SpareMemory(_initial_limit(os.environ.get("TENSORWIRE_SPARE_MEMORY", "")))


def float32_arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
    """Arrays of these shapes with arbitrary content, in spare memory where there is some. Raises MemoryError.

    Small arrays share one allocation: the C library returns small ones to the system as soon as they are free.
    """
    sizes = {name: 4 * prod(shape) for name, shape in shapes.items()}
    small, at = SPARE.empty(sum(size for size in sizes.values() if size < SPARE_FROM)), 0
    arrays = {}
    for name, size in sizes.items():
        if size < SPARE_FROM:
            memory, at = small[at : at + size], at + size
        else:
            memory = SPARE.empty(size)
        arrays[name] = memory.view(np.float32).reshape(shapes[name])
    return arrays


def set_spare_memory(size: int) -> None:
    """Keep at most `size` bytes of memory of dropped tensors for the next ones; 0: none. What is kept beyond is let go.

    The default is a sixteenth of the machine's memory, 1 GiB at most, or TENSORWIRE_SPARE_MEMORY. The system takes it
    back whenever it needs memory; until then it counts as this process's.

        tensorwire.set_spare_memory(0)
    """
    if type(size) is not int or size < 0:
        raise ValueError(f"spare memory: expected a number of bytes, not {size!r}")
    SPARE.limit = size if _CAN_SPARE else 0


def get_spare_memory() -> int:
    """The bytes that may be kept.

    To do without for a while:

        before = tensorwire.get_spare_memory()
        tensorwire.set_spare_memory(0)
        ...
        tensorwire.set_spare_memory(before)
    """
    return SPARE.limit
