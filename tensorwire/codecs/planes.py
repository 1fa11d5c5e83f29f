"""planes: floats, losslessly, as planes of bytes.

Plane p holds byte p of every element. The upper 16 bits of an element are rotated by one first, so that one plane holds
only exponents, which take two to three bits. Mantissas hardly compress, and are stored as they are. Blocks of zeros,
which updates have many of, are left out. A plane is stored raw, as one byte that all elements share, as Huffman codes
if some bytes are more frequent than others, or as a zstd frame if there are runs; for exponents, matches cost more than
they save. docs/format.md describes the layout.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zstandard

from tensorwire import dtypes, kernels
from tensorwire.codecs.stage import Bytes, Encoded, Packer, Sizes, Take
from tensorwire.codecs.zstd import compress, decompress
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, counted
from tensorwire.tensor import Extent

# Elements of an indivisible block of a slice, and of a block that is left out if it is all zeros.
_BLOCK: Final = 1024
_MARKED: Final = 64

# The blocks of a slice that are stored: all, marked ones, none.
_ALL, _MARKS, _NOTHING = range(3)
# How a plane is stored.
_RAW, _CONSTANT, _HUFFMAN, _ZSTD = range(4)
_LENGTH: Final = 4  # bytes of the length of a compressed plane

# Bytes of a plane, approximately, that are sampled.
_SAMPLE: Final = 1 << 13
# Equally frequent bytes have one equal pair in 256. At one in 128, codes save some 5 %.
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
        """The bytes of the elements; and metadata for the form of the slice, its marks and its planes."""
        size = count * dtype.itemsize
        return Sizes(size, planes_bound(size, _WIDTHS[dtype]) - size)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The form of the slice and its marks, then its planes."""
        payload = take(self.sizes(extent.count, extent.dtype).total)
        return Encoded(payload[: put_planes(np.frombuffer(data, np.uint8), _WIDTHS[extent.dtype], payload, take)])

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """The elements of the planes. Raises FormatError."""
        take_planes(np.frombuffer(payload, np.uint8), _WIDTHS[extent.dtype], out)


def planes_bound(size: int, width: int) -> int:
    """The most bytes that `size` bytes of elements of `width` bytes become."""
    return size + 1 + _mark_bytes(size, width) + width


def put_planes(values: Bytes, width: int, payload: Bytes, take: Take, *, worth: int = _WORTH) -> int:
    """Write elements of `width` bytes: the form and marks, then the planes. Returns the bytes that they take.

    A plane is coded if at least one in `worth` pairs of its bytes is equal.
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
    # Every plane goes where it belongs if it and all planes before it are raw, so it seldom needs to move.
    places = [at + 1 + p * (1 + count) for p in range(width)]
    planes = [payload[place : place + count] for place in places]
    kernels.split_planes(values, marks, planes)
    for plane, place in zip(planes, places, strict=True):
        at += _put_plane(plane, payload[at:], take, worth, in_place=at + 1 == place)
    return at


def take_planes(payload: Bytes, width: int, out: Bytes) -> None:
    """Fill `out` with the elements that `put_planes` was given. Raises FormatError."""
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
    """Reads a payload from front to back. All methods raise FormatError if it ends too early."""

    __slots__ = ("_at", "_payload")

    def __init__(self, payload: Bytes) -> None:
        self._payload = payload
        self._at = 0

    def take(self, size: int) -> Bytes:
        """The next bytes."""
        part = self._payload[self._at : self._at + size]
        if part.size != size:
            raise FormatError(
                f"planes payload of {counted(self._payload.size, 'byte')} ends too early: "
                f"{size} more expected at {self._at}"
            )
        self._at += size
        return part

    def byte(self, what: str, most: int) -> int:
        """The next byte, a number up to `most`. `what`: its name in errors."""
        value = int(self.take(1)[0])
        if value > most:
            raise FormatError(f"{what} is {value}, which is more than {most}")
        return value

    def end(self) -> None:
        """Raise FormatError if anything is left."""
        if self._at != self._payload.size:
            raise FormatError(f"planes payload has {counted(self._payload.size - self._at, 'byte')} after its end")


def _blocks(size: int, width: int) -> int:
    return -(-size // (_MARKED * width))


def _mark_bytes(size: int, width: int) -> int:
    return -(-_blocks(size, width) // 8)


def _full(blocks: int) -> Bytes:
    """The marks of a slice whose blocks are all stored."""
    marks = np.full(-(-blocks // 8), 255, np.uint8)
    marks[-1] >>= -blocks % 8
    return marks


def _marked_elements(marks: Bytes, blocks: int, elements: int) -> int:
    """How many elements the marked blocks have; the last block of a slice may be shorter."""
    last = -(-elements // _MARKED) - 1
    missing = -elements % _MARKED if marks[last // 8] >> last % 8 & 1 else 0
    return blocks * _MARKED - missing


def _put_plane(plane: Bytes, payload: Bytes, take: Take, worth: int, *, in_place: bool) -> int:
    """Write a plane, which may be in the same memory further back. Returns the bytes that it takes."""
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
    """A plane and how it is compressed, judged by a sample of it; the plane itself if it would hardly shrink.

    Decides by how often two bytes are equal, in integers, so that every machine decides alike. If neighbours are equal
    more often than other pairs, or nearly all bytes are equal, there are runs, which zstd may compress better.
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
    """A plane of `count` bytes, or a single byte if all are equal."""
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
