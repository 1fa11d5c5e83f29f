"""Reads arrays of any memory layout in element order, slice by slice, in the memory of a slice."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire.tensor import ByteArray

Array = npt.NDArray[Any]

# Bytes that are transposed at a time; they stay in the first-level cache.
_STRIP: Final = 32 << 10
# Bytes of a cache line. A slice that uses less of each line would make the same lines be fetched many times.
_LINE: Final = 64
# The most bytes that are read ahead to avoid that.
_AHEAD: Final = 16 << 20


def reader(array: Array, fix: Callable[[Array], None] | None = None) -> Callable[[int, int], ByteArray]:
    """`TensorView.read` over an array of any layout, of unsigned ints or complex128 that hold the tensor's bits.

    Contiguous memory is returned without a copy. Other slices are copied, in about the time of a contiguous copy.
    `fix`: changes the copy of a slice in place to the tensor's values, for another byte order or conjugates.
    """
    if not array.flags.c_contiguous:
        return _Strided(array, fix).read
    if fix is None:
        return _Contiguous(array)
    flat = array.reshape(-1)

    def read(start: int, stop: int) -> ByteArray:
        part: ByteArray = flat[start:stop].copy().view(np.uint8)
        fix(part)
        return part

    return read


class _Contiguous:
    """Memory that is in order, as bytes from when it is first read: until then many of them wait."""

    __slots__ = ("_array", "_memory")

    def __init__(self, array: Array) -> None:
        self._array = array
        self._memory: ByteArray | None = None

    def __call__(self, start: int, stop: int) -> ByteArray:
        """Elements [start, stop)."""
        memory, itemsize = self._memory, self._array.itemsize
        if memory is None:
            memory = self._memory = self._array.reshape(-1).view(np.uint8)
        return memory[start * itemsize : stop * itemsize]


class Piece(NamedTuple):
    """A block of a tensor. `place`: its offset among the requested elements. `at`: its index in the tensor."""

    place: int
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]


class _Strided:
    """An array that is not contiguous.

    If the axis that is contiguous in memory is an outer one, and slices are short along it, several slices are read at
    once and kept until the end of the tensor.
    """

    __slots__ = ("_ahead", "_array", "_fix", "_kept")

    def __init__(self, array: Array, fix: Callable[[Array], None] | None) -> None:
        self._array = _coalesced(array)
        self._fix = fix
        fastest = _by_stride(self._array)[-1]
        inner = prod(self._array.shape[fastest + 1 :])
        self._ahead = min(_LINE // array.itemsize * inner, _AHEAD // array.itemsize)
        self._kept: tuple[int, Array] = (0, np.empty(0, array.dtype))

    def read(self, start: int, stop: int) -> ByteArray:
        """Elements [start, stop) in C order."""
        if stop - start >= self._ahead:
            return self._gathered(start, stop).view(np.uint8)
        first, kept = self._kept
        if not first <= start <= stop <= first + kept.size:
            first, kept = start, self._gathered(start, min(start + self._ahead, self._array.size))
        self._kept = (first, kept) if stop < self._array.size else (0, np.empty(0, kept.dtype))
        return kept[start - first : stop - first].view(np.uint8)

    def _gathered(self, start: int, stop: int) -> Array:
        out = np.empty(stop - start, self._array.dtype)
        for place, index, shape in pieces(self._array.shape, start, stop):
            _copy(out[place : place + prod(shape)].reshape(shape), self._array[index])
        if self._fix is not None:
            self._fix(out)
        return out


def _coalesced(array: Array) -> Array:
    """The same elements with as few axes as possible, at least one."""
    shape: list[int] = []
    strides: list[int] = []
    for size, stride in zip(array.shape, array.strides, strict=True):
        if size == 1:
            continue
        if shape and strides[-1] == stride * size:
            shape[-1] *= size
            strides[-1] = stride
        else:
            shape.append(size)
            strides.append(stride)
    return np.lib.stride_tricks.as_strided(array, shape or [1], strides or [array.itemsize], writeable=False)


def _by_stride(array: Array) -> list[int]:
    """The axes by decreasing stride. Axes without a stride come first."""
    steps = [abs(stride) if size > 1 else 0 for size, stride in zip(array.shape, array.strides, strict=True)]
    return sorted(range(array.ndim), key=lambda axis: -(steps[axis] or 1 << 62))


def pieces(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Piece]:
    """Elements [start, stop) of a tensor of this shape, in C order, as blocks that can be indexed."""
    row = prod(shape[1:])
    place = 0
    while start < stop:
        first, begin = divmod(start, row)
        whole = (stop - start) // row
        if begin or not whole:  # a part of a row
            end = min(row, begin + stop - start)
            for piece in pieces(shape[1:], begin, end):
                yield Piece(place + piece.place, (first, *piece.at), piece.shape)
            count = end - begin
        else:
            yield Piece(place, (slice(first, first + whole),), (whole, *shape[1:]))
            count = whole * row
        start, place = start + count, place + count


def _copy(out: Array, block: Array) -> None:
    """`out[...] = block`, reading `block` in the order of its memory."""
    order = _by_stride(block)
    if order[-1] == block.ndim - 1:
        out[...] = block
    else:
        _turn(out.transpose(order), block.transpose(order))


def _turn(out: Array, block: Array) -> None:
    """`out[...] = block`, with the axes of `block` in the order of its memory, and those of `out` not."""
    row = block.nbytes // len(block)
    if row > _STRIP and block.ndim > 2:
        for target, part in zip(out, block, strict=True):
            _turn(target, part)
        return
    step = max(_STRIP // row, 1)
    for begin in range(0, len(block), step):
        # Compact first: elements at large strides, powers of two at worst, compete for few places in a cache.
        out[begin : begin + step] = np.ascontiguousarray(block[begin : begin + step])
