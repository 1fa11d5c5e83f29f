"""Buffers that are used again as soon as nobody else holds them.

First touch of fresh memory costs ten times more than writing warm memory, so frames share a few buffers. Whether
one is free is read off its reference count: a consumer that keeps what it was given simply keeps it.
"""

import sys
from typing import Final

import numpy as np

_KEPT: Final = 4


def _count(arrays: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(arrays[index])


_FREE: Final = _count([np.empty(0, np.uint8)], 0)


class Pool:
    """Up to four warm buffers of one owner; not for use by several threads."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """A uint8 array of `size` bytes with arbitrary content, 64-byte aligned as far as NumPy aligns."""
        for index in range(len(self._arrays)):
            if _count(self._arrays, index) == _FREE:
                if self._arrays[index].size >= size:
                    return self._arrays[index][:size]
                del self._arrays[index]
                break
        array = np.empty(size, np.uint8)
        if len(self._arrays) < _KEPT:
            self._arrays.append(array)
        return array[:size]
