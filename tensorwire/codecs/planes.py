"""planes: floats, losslessly, as planes of bytes.

Byte p of every element is plane p. The upper 16 bits of an element are rotated by one first, so that a plane holds
exponents alone, which take two to three bits; what mantissas hold hardly compresses, and travels as it is. Blocks that
are all zeros, of which updates have many, are left out. Each plane is raw, one byte that stands throughout, Huffman
codes where some bytes are more frequent than others, or a zstd frame where there are runs: among exponents, matches
cost more than they save. docs/format.md has the layout.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zstandard

from tensorwire import dtypes, kernels
from tensorwire.codecs.stage import Bytes, Encoded, Packer, Sizes, Take
from tensorwire.codecs.zstd import compress, decompress
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent

# Elements of a slice that cannot be divided, and those that are left out together where they are zeros.
_BLOCK: Final = 1024
_MARKED: Final = 64

# What stands of a slice: all blocks, those with marks, none.
_ALL, _MARKS, _NOTHING = range(3)
# How a plane stands there.
_RAW, _CONSTANT, _HUFFMAN, _ZSTD = range(4)
_LENGTH: Final = 4  # bytes that say how long a compressed plane is

# A plane is looked at through about this many of its bytes.
_SAMPLE: Final = 1 << 13
# In so many pairs of its bytes, two are the same at least once where it is worth coding: 256 if all are as frequent.
# From twice that on, codes save some 5 %.
_WORTH: Final = 128
# Bytes of a float of each dtype; complex elements have two.
_WIDTHS: Final = {
    dtype: dtype.part_size for dtype in dtypes.ALL if dtype.name.startswith(("float", "bfloat", "complex"))
}


@dataclass(frozen=True, repr=False)
class Planes(Packer):
    """Lossless, floats of any width. Weights in bfloat16 take two thirds of their bytes, in float32 four fifths."""

    id = 8
    name = "planes"
    lossless = True
    exact_length = False

    def accepts(self, dtype: DType) -> bool:
        """Floats of 8 to 64 bits, and complex numbers of them."""
        return dtype in _WIDTHS

    def block(self, dtype: DType) -> int:
        """1024 elements."""
        return _BLOCK

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """The bytes of the elements; and for what is said of the slice, its blocks and its planes."""
        size = count * dtype.itemsize
        return Sizes(size, planes_bound(size, _WIDTHS[dtype]) - size)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """What stands of the slice, then its planes."""
        payload = take(self.sizes(extent.count, extent.dtype).total)
        return Encoded(payload[: put_planes(np.frombuffer(data, np.uint8), _WIDTHS[extent.dtype], payload, take)])

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """The elements of the planes. Raises FormatError."""
        take_planes(np.frombuffer(payload, np.uint8), _WIDTHS[extent.dtype], out)


def planes_bound(size: int, width: int) -> int:
    """The most bytes that `size` bytes of elements of `width` bytes become."""
    return size + 1 + _mark_bytes(size, width) + width


def put_planes(values: Bytes, width: int, payload: Bytes, take: Take, *, worth: int = _WORTH) -> int:
    """Write elements of `width` bytes as planes, and what stands of them before; the bytes that they take.

    A plane is coded where two of its bytes are the same at least once in `worth` pairs.
    """
    at = 1 + _mark_bytes(values.size, width)
    marks = payload[1:at]
    blocks = kernels.nonzero_blocks(values, marks, blocksize=_MARKED * width)
    if blocks == 0:
        payload[0] = _NOTHING
        return 1
    everything = blocks == _blocks(values.size, width)
    payload[0] = _ALL if everything else _MARKS
    if everything:
        marks, at = marks.copy(), 1
    count = _marked_elements(marks, blocks, values.size // width)
    # Every plane where it will stand if it is raw and those before it are: most often it need not move.
    places = [at + 1 + p * (1 + count) for p in range(width)]
    planes = [payload[place : place + count] for place in places]
    kernels.split_planes(values, marks, planes)
    for plane, place in zip(planes, places, strict=True):
        at += _put_plane(plane, payload[at:], take, worth, in_place=at + 1 == place)
    return at


def take_planes(payload: Bytes, width: int, out: Bytes) -> None:
    """What `put_planes` was given, of the length of `out`. Raises FormatError."""
    given = _Reader(payload)
    form = given.byte("the form of a slice", _NOTHING)
    if form == _NOTHING:
        given.end()
        out[:] = 0
        return
    total = _blocks(out.size, width)
    marks = given.take(_mark_bytes(out.size, width)) if form == _MARKS else _full(total)
    blocks = int(np.unpackbits(marks).sum())
    if (form == _MARKS and not 0 < blocks < total) or marks[-1] & ~_full(total)[-1]:
        raise FormatError(f"{blocks} of {total} blocks of a slice are marked")
    count = _marked_elements(marks, blocks, out.size // width)
    planes = [_take_plane(given, count) for _ in range(width)]
    given.end()
    kernels.merge_planes(planes, marks, out)


class _Reader:
    """A payload from front to back. All methods raise FormatError where it ends too early."""

    __slots__ = ("_at", "_payload")

    def __init__(self, payload: Bytes) -> None:
        self._payload = payload
        self._at = 0

    def take(self, size: int) -> Bytes:
        """The next bytes."""
        part = self._payload[self._at : self._at + size]
        if part.size != size:
            raise FormatError(
                f"planes payload of {self._payload.size} bytes ends too early: {size} bytes were to come at {self._at}"
            )
        self._at += size
        return part

    def byte(self, what: str, most: int) -> int:
        """The next byte, which says one of a few things."""
        value = int(self.take(1)[0])
        if value > most:
            raise FormatError(f"{what} is {value}, which is more than {most}")
        return value

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != self._payload.size:
            raise FormatError(f"planes payload has {self._payload.size - self._at} bytes after its end")


def _blocks(size: int, width: int) -> int:
    return -(-size // (_MARKED * width))


def _mark_bytes(size: int, width: int) -> int:
    return -(-_blocks(size, width) // 8)


def _full(blocks: int) -> Bytes:
    """The marks of a slice of which all blocks stand."""
    marks = np.full(-(-blocks // 8), 255, np.uint8)
    marks[-1] >>= -blocks % 8
    return marks


def _marked_elements(marks: Bytes, blocks: int, elements: int) -> int:
    """How many elements there are in the marked blocks; the last block of a slice may be a shorter one."""
    last = -(-elements // _MARKED) - 1
    missing = -elements % _MARKED if marks[last // 8] >> last % 8 & 1 else 0
    return blocks * _MARKED - missing


def _put_plane(plane: Bytes, payload: Bytes, take: Take, worth: int, *, in_place: bool) -> int:
    """Write a plane, which may stand in the same memory further behind; the bytes that it takes."""
    counts = np.empty(256, np.uint32)
    kernels.byte_histogram(plane, counts, every=max(plane.size // _SAMPLE, 1))
    first = plane[0]
    if counts[first] == counts.sum() and plane.min() == plane.max():
        payload[:2] = _CONSTANT, first
        return 2
    mode, compressed = _compressed(plane, counts, take, worth)
    if mode != _RAW and _LENGTH + compressed.size < plane.size:
        size = 1 + _LENGTH + compressed.size
        payload[0] = mode
        payload[1 : 1 + _LENGTH] = np.frombuffer(compressed.size.to_bytes(_LENGTH, "little"), np.uint8)
        payload[1 + _LENGTH : size] = compressed
        return size
    payload[0] = _RAW
    if not in_place:
        payload[1 : 1 + plane.size] = plane
    return 1 + plane.size


def _compressed(plane: Bytes, counts: Any, take: Take, worth: int) -> tuple[int, Bytes]:
    """A plane of which these bytes are a sample, and how it is compressed; itself where it would hardly shrink.

    Told by how likely two bytes of it are the same, in whole numbers, so that every machine decides alike. Where
    neighbours are the same more often than others, or nearly all bytes are, there are runs, of which zstd may make
    less.
    """
    wide = counts.astype(np.int64)
    total = int(wide.sum())
    same = int(wide @ wide) - total
    pairs = total * (total - 1)
    if worth * same <= pairs:
        return _RAW, plane
    codes = take(plane.size)
    size = kernels.huffman_encode(plane, codes)
    best = (_HUFFMAN, codes[:size]) if size else (_RAW, plane)
    sample = plane[plane.size // 2 :][:_SAMPLE]
    neighbours = np.count_nonzero(sample[1:] == sample[:-1])
    if 4 * neighbours * pairs > 5 * same * sample.size or 10 * same > 9 * pairs:
        frame = np.frombuffer(compress(plane, zstandard.ZstdCompressor(level=1)), np.uint8)
        if frame.size < best[1].size:
            return _ZSTD, frame
    return best


def _take_plane(given: _Reader, count: int) -> Bytes:
    """A plane of `count` bytes, or the one byte that stands for all of them."""
    mode = given.byte("the mode of a plane", _ZSTD)
    if mode == _RAW:
        return given.take(count)
    if mode == _CONSTANT:
        return given.take(1)
    size = int(given.take(_LENGTH).view("<u4")[0])
    if size + _LENGTH >= count:
        raise FormatError(f"a plane of {count} bytes is compressed to {size}, which saves nothing")
    compressed = given.take(size)
    if mode == _ZSTD:
        return np.frombuffer(decompress(compressed.data, count, exact=True), np.uint8)
    plane = np.empty(count, np.uint8)
    if not kernels.huffman_decode(compressed, plane):
        raise FormatError(f"{size} bytes are not valid Huffman codes of {count} bytes")
    return plane
