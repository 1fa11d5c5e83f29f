"""The kernels of the sparse codec in NumPy: what they mean, which ``_native`` equals bit for bit.

The elements of a slice are the rows of a matrix of `width` columns. `rows` rows at a time are a band, the last of which
may have fewer; what stands behind the last whole row is a band of one short row. A band is divided into chunks of
`cols` columns from left to right, the last of which may be narrower. So chunks have an order, each has at most
`MOST_CHUNK` elements, and the position of an element in its chunk counts row by row. Of a chunk `k` elements are kept,
or all if it has no more, in the order of their positions. Where they are all 0, their positions are `NOTHING`.

With `tables` (tables.dct_tables), elements are coefficients of the chunk's DCT (_numpy_dct.py).
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from math import comb
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.kernels._numpy_checks import check_array, check_overlap, check_size
from tensorwire.kernels._numpy_dct import forward, inverse
from tensorwire.kernels.tables import DCT_MOST, dct_tables

Array = npt.NDArray[Any]

MOST_CHUNK: Final = 4096
# The largest magnitude that is taken: sums over a chunk, and what is made of them, stay finite.
LARGEST: Final = np.float32(2.0**100)
NOTHING: Final = 0xFFFF
# As many positions are numbered together, in a word of 64 bits; more have a code each.
ENUMERATED: Final = 6
MOST_RICE: Final = 12


def select_largest(
    values: Array,
    positions: Array,
    coefficients: Array,
    *,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: Array | None = None,
) -> float:
    """Positions and elements of the largest magnitudes of each chunk, of equal ones those that come first.

    Returns the largest magnitude; one that is not finite or beyond 2^100 if there is such, with anything in the
    outputs.
    """
    _check_grid(width, rows, cols, k, tables)
    check_array("values", values, np.float32)
    check_array("positions", positions, np.uint16, output=True)
    check_array("coefficients", coefficients, np.float32, output=True)
    for name, array in (("positions", positions), ("coefficients", coefficients)):
        check_size(name, array, _kept(values.size, width, rows, cols, k))
    check_overlap({"positions": positions, "coefficients": coefficients}, {"values": values})
    largest = float(np.abs(values).max(initial=0))
    if not largest <= LARGEST:
        return largest
    at = 0
    for start, bands, height, across in areas(values.size, width, rows):
        area = values[start : start + bands * height * across].reshape(bands, height, across)
        found = [_largest(_transformed(part, tables), k) for part in _columns(area, cols)]
        stop = at + sum(part.size for part, _ in found)
        positions[at:stop] = np.concatenate([part for part, _ in found], axis=1).reshape(-1)
        coefficients[at:stop] = np.concatenate([part for _, part in found], axis=1).reshape(-1)
        at = stop
    return largest


def add_selected(
    positions: Array,
    coefficients: Array,
    sums: Array,
    *,
    weight: float,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: Array | None = None,
) -> bool:
    """Sums += weight * the elements that were selected, 0 elsewhere, calculated as `sums` are (float32, float64).

    False, with nothing added: a position is not in its chunk.
    """
    _check_grid(width, rows, cols, k, tables)
    check_array("positions", positions, np.uint16)
    check_array("coefficients", coefficients, np.float32)
    check_array("sums", sums, np.float32, np.float64, output=True)
    for name, array in (("positions", positions), ("coefficients", coefficients)):
        check_size(name, array, _kept(sums.size, width, rows, cols, k))
    check_overlap({"sums": sums}, {"positions": positions, "coefficients": coefficients})
    places: list[tuple[Array, Array]] = []
    at = 0
    for start, bands, height, across in areas(sums.size, width, rows):
        area = sums[start : start + bands * height * across].reshape(bands, height, across)
        parts = list(_columns(area, cols))
        kept = [part.shape[1] * min(k, part.shape[2] * part.shape[3]) for part in parts]
        count = bands * sum(kept)
        split = np.cumsum(kept)[:-1]
        where = np.split(positions[at : at + count].reshape(bands, -1), split, axis=1)
        what = np.split(coefficients[at : at + count].reshape(bands, -1), split, axis=1)
        at += count
        for part, position, coefficient in zip(parts, where, what, strict=True):
            dense = np.zeros((*part.shape[:2], part.shape[2] * part.shape[3]), np.float32)
            position = position.reshape(*part.shape[:2], -1).astype(np.int64)
            if ((position >= dense.shape[2]) & (position != NOTHING)).any():
                return False
            nothing = position == NOTHING
            coefficient = np.where(nothing, 0, coefficient.reshape(position.shape))
            np.put_along_axis(dense, np.where(nothing, 0, position), coefficient, axis=2)
            elements = dense.reshape(part.shape)
            places.append((part, elements if tables is None else inverse(elements, tables)))
    factor = sums.dtype.type(weight)
    for part, elements in places:
        part += factor * elements.astype(sums.dtype)
    return True


def combine_selected(
    positions: Array,
    values: Array,
    weights: Array,
    out: Array,
    *,
    divisor: float,
    present: bool,
    signs: bool,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: Array | None = None,
) -> bool:
    """Of all positions that any message holds, sums in float64 in the order of messages, and what is made of them.

    False, with anything in `out`: a position is not in its chunk.
    """
    _check_grid(width, rows, cols, k, tables)
    check_array("positions", positions, np.uint16)
    check_array("values", values, np.float32)
    check_array("weights", weights, np.float64)
    check_array("out", out, np.float32, output=True)
    kept = _kept(out.size, width, rows, cols, k)
    for name, array in (("positions", positions), ("values", values)):
        check_size(name, array, weights.size * kept)
    check_overlap({"out": out}, {"positions": positions, "values": values, "weights": weights})
    sizes = chunk_sizes(out.size, width, rows, cols)
    starts, counts = np.cumsum(sizes) - sizes, np.minimum(sizes, k)
    sums, there, shape = np.zeros(out.size), np.zeros(out.size), (weights.size, kept)
    for place, value, weight in zip(positions.reshape(shape), values.reshape(shape), weights, strict=True):
        held = place != NOTHING
        if (place[held] >= np.repeat(sizes, counts)[held]).any():
            return False
        where = np.repeat(starts, counts)[held] + place[held]
        sums[where] += weight * (np.sign(value) if signs else value)[held].astype(np.float64)
        there[where] += weight
    if signs:
        sums = np.sign(sums)
    else:
        np.divide(sums, there if present else divisor, out=sums, where=there > 0)
    out[:] = 0
    every = (np.arange(out.size) - np.repeat(starts, sizes)).astype(np.uint16)
    whole = {"width": width, "rows": rows, "cols": cols, "k": MOST_CHUNK}
    return add_selected(every, sums.astype(np.float32), out, weight=1.0, tables=tables, **whole)


def _check_grid(width: int, rows: int, cols: int, k: int, tables: Array | None = None) -> None:
    for name, value in (("width", width), ("rows", rows), ("cols", cols), ("k", k)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if rows * cols > MOST_CHUNK:
        raise ValueError(f"rows, cols: expected a chunk of at most {MOST_CHUNK} elements")
    if tables is not None:
        if max(rows, cols) > DCT_MOST:
            raise ValueError(f"rows, cols: expected at most {DCT_MOST} to be transformed")
        check_array("tables", tables, np.float32)
        check_size("tables", tables, dct_tables().size)


def _kept(elements: int, width: int, rows: int, cols: int, k: int) -> int:
    if elements < 0:
        raise ValueError(f"elements: expected at least 0, got {elements}")
    return int(np.minimum(chunk_sizes(elements, width, rows, cols), k).sum())


def areas(count: int, width: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first element, number, height, width) of the bands of a slice: the whole ones, then each that is smaller."""
    whole, left = divmod(count // width, rows)
    start = 0
    for bands, height, across in ((whole, rows, width), (1, left, width), (1, 1, count % width)):
        if bands and height and across:
            yield start, bands, height, across
        start += bands * height * across


def _columns(area: Array, cols: int) -> Iterator[Array]:
    """Views of the chunks of some bands: (band, chunk, row, column)."""
    bands, height, across = area.shape
    whole = across // cols * cols
    if whole:
        yield area[:, :, :whole].reshape(bands, height, -1, cols).transpose(0, 2, 1, 3)
    if whole < across:
        yield area[:, None, :, whole:]


def _transformed(chunks: Array, tables: Array | None) -> Array:
    return chunks if tables is None else forward(chunks, tables)


def _largest(chunks: Array, k: int) -> tuple[Array, Array]:
    flat = chunks.reshape(*chunks.shape[:2], -1)
    order = np.argsort(-np.abs(flat), axis=2, kind="stable")[:, :, :k]
    positions = np.sort(order, axis=2)
    coefficients = np.take_along_axis(flat, positions, axis=2)
    something = (coefficients != 0).any(axis=2, keepdims=True)
    positions = np.where(something, positions, NOTHING).astype(np.uint16)
    coefficients = np.where(something, coefficients, np.float32(0))
    bands = chunks.shape[0]
    return positions.reshape(bands, -1), coefficients.reshape(bands, -1)


# ---- codes of positions ------------------------------------------------------------------------------------


def chunk_sizes(elements: int, width: int, rows: int, cols: int) -> Array:
    """How many elements each chunk has, in their order."""
    sizes = []
    for _, bands, height, across in areas(elements, width, rows):
        band = [height * min(cols, across - left) for left in range(0, across, cols)]
        sizes.append(np.tile(np.array(band, np.int64), bands))
    return np.concatenate(sizes) if sizes else np.empty(0, np.int64)


def encode_positions(positions: Array, codes: Array, *, elements: int, width: int, rows: int, cols: int, k: int) -> int:
    """Codes of the positions, and how many bytes they take; 0: there is no room for them.

    Of up to 6 to a chunk, the positions are numbered: the sum of comb(p, i + 1) over positions p, number i in their
    order, in as many bits as the largest such number takes. Nothing is one number more; where that takes another bit,
    it is the positions from 0 on. Of more, the numbers of elements that are left out before each of them have a code
    of Rice each: the number shifted right by the parameter, as so many bits 0 and a 1, and then as many of its lower
    bits. For nothing there is one code, of the number of all elements. The parameter is a byte before them, the one
    that takes the fewest bits, of equal ones the smallest. Bits stand from the lowest of the first byte on, and so do
    those of a number.
    """
    _check_grid(width, rows, cols, k)
    check_array("positions", positions, np.uint16)
    check_array("codes", codes, np.uint8, output=True)
    check_size("positions", positions, _kept(elements, width, rows, cols, k))
    check_overlap({"codes": codes}, {"positions": positions})
    chunks, at = [], 0
    for size in chunk_sizes(elements, width, rows, cols).tolist():
        kept = min(k, size)
        chunks.append((positions[at : at + kept].tolist(), size))
        at += kept
    if k <= ENUMERATED:
        bits = [_numbering(kept, size) for kept, size in chunks]
    else:
        gaps = np.array([gap for kept, size in chunks for gap in _gaps(kept, size)], np.int64)
        rice = min(range(MOST_RICE + 1), key=lambda r: int((gaps >> r).sum()) + gaps.size * (1 + r))
        bits = [_bits(rice, 8), *(_rice_code(gap, rice) for gap in gaps.tolist())]
    bits.append(np.empty(0, np.uint8))
    made = np.packbits(np.concatenate(bits), bitorder="little")
    if made.size > codes.size:
        return 0
    codes[: made.size] = made
    return int(made.size)


def decode_positions(
    codes: Array, positions: Array, *, elements: int, width: int, rows: int, cols: int, k: int
) -> bool:
    """What `encode_positions` was given; False: it never makes such codes."""
    _check_grid(width, rows, cols, k)
    check_array("codes", codes, np.uint8)
    check_array("positions", positions, np.uint16, output=True)
    check_size("positions", positions, _kept(elements, width, rows, cols, k))
    check_overlap({"positions": positions}, {"codes": codes})
    bits = np.unpackbits(codes, bitorder="little")
    ones = np.flatnonzero(bits)
    at = out = rice = 0
    if k > ENUMERATED:
        rice, at = int(codes[0]) if codes.size else MOST_RICE + 1, 8
        if rice > MOST_RICE:
            return False
    for size in chunk_sizes(elements, width, rows, cols).tolist():
        kept = min(k, size)
        if k <= ENUMERATED:
            length = (comb(size, kept) - 1).bit_length()
            number, at = _number(bits, at, length), at + length
            found = None if number is None else _numbered(number, size, kept)
        else:
            found, at = _from_rice(bits, ones, at, size, kept, rice)
        if found is None:
            return False
        positions[out : out + kept] = found
        out += kept
    return -(-at // 8) == codes.size and not bits[at:].any()


def _numbering(positions: list[int], size: int) -> Array:
    """The bits of the number of the positions in a chunk."""
    length = (comb(size, len(positions)) - 1).bit_length()
    number = comb(size, len(positions))
    if NOTHING not in positions:
        number = sum(comb(p, i + 1) for i, p in enumerate(positions))
    return _bits(number if number < 1 << length else 0, length)


def _gaps(positions: list[int], size: int) -> list[int]:
    """How many elements are left out before each position; for nothing, all."""
    return [size] if NOTHING in positions else [after - before - 1 for before, after in pairwise([-1, *positions])]


def _bits(number: int, length: int) -> Array:
    return np.array([number >> bit & 1 for bit in range(length)], np.uint8)


def _rice_code(gap: int, rice: int) -> Array:
    return np.concatenate([np.zeros(gap >> rice, np.uint8), _bits(1 | gap << 1, 1 + rice)])


def _number(bits: Array, at: int, length: int) -> int | None:
    """The number of the next bits; None where they end before."""
    if at + length > bits.size:
        return None
    return int.from_bytes(np.packbits(bits[at : at + length], bitorder="little").tobytes(), "little")


def _numbered(number: int, size: int, kept: int) -> list[int] | None:
    """The positions that have this number."""
    if number >= comb(size, kept):
        return [NOTHING] * kept if number == comb(size, kept) else None
    found: list[int] = []
    for i in range(kept, 0, -1):
        place = bisect_right([comb(p, i) for p in range(size)], number) - 1
        number -= comb(place, i)
        found.insert(0, place)
    return found


def _from_rice(bits: Array, ones: Array, at: int, size: int, kept: int, rice: int) -> tuple[list[int] | None, int]:
    """The positions whose codes stand from `at` on, and where they end."""
    found: list[int] = []
    for _ in range(kept):
        first = int(np.searchsorted(ones, at))
        high = int(ones[first]) - at if first < ones.size else 0
        low = _number(bits, at + high + 1, rice)
        if first == ones.size or low is None:
            return None, at
        at += high + 1 + rice
        found.append((found[-1] if found else -1) + 1 + (high << rice) + low)
        if found == [size]:
            return [NOTHING] * kept, at
        if found[-1] >= size:
            return None, at
    return found, at
