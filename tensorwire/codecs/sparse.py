"""sparse: of each chunk of a tensor the few largest elements, or the few largest coefficients of its DCT.

A tensor is seen as the rows of a matrix, cut into chunks of `rows` by `cols` elements. What is kept of a chunk is `k`
positions and values of `bits` bits; the rest decodes to zeros. Payload: a float32 step, the parameter of Rice's codes
where there are any, the codes of the positions of all chunks, with `scaled` the scales of all chunks, the values.
docs/codecs.md has the arithmetic.

DeMo (Peng, Quesnelle, Kingma, arXiv:2411.19870) sends momentum this way, SparseLoCo (arXiv:2508.15706) what a worker
changed in several steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import comb
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels
from tensorwire.codecs.floats import KERNEL_DTYPES, widen
from tensorwire.codecs.signed import Float32, checked_steps, pack, packed_size, step_of, unpack
from tensorwire.codecs.stage import Bytes, Choice, Encoded, Packer, Range, Sizes, Take, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError, NonFiniteError
from tensorwire.kernels.tables import DCT_MOST, dct_tables
from tensorwire.tensor import Extent

MOST_CHUNK: Final = 4096
NOTHING: Final = 0xFFFF
LARGEST: Final = 2.0**100  # of a magnitude that is encoded: sums over a chunk stay finite
_LARGEST_VALUE: Final = 2.0**110  # of one that is decoded
_ENUMERATED: Final = 6  # positions that have one number together
_DENSE: Final = 1 << 18  # elements of a dense tensor that are made at a time
_STEP: Final = 4
_SCALE_BITS: Final = 4
_LOWEST_SCALE: Final = (1 << _SCALE_BITS) - 1
# A step that tells codes from one another, also where theirs is 0, and what code 0 stands for then.
_CODES: Final = np.array([2], np.float32)
_CODE_0: Final = 1


class Selected(NamedTuple):
    """What is kept of a slice: of each chunk the positions, ascending, and their elements or coefficients.

    Of a chunk of zeros all positions are `NOTHING`, and the values 0.
    """

    positions: npt.NDArray[np.uint16]
    values: Float32


@dataclass(frozen=True, repr=False)
class Sparse(Packer):
    """The k largest of each chunk of float32, float16 or bfloat16, as signs and magnitudes of `bits` bits together.

    `width`: columns of the matrix; a chunk is `rows` by `cols` of them, at most 4096 elements. `dct`: of the chunk's
    two-dimensional DCT-II, which has at most 64 rows and columns. `scaled`: each chunk has a power of two of its own
    that its values are multiplied by, 2^-15 to 1; without, all values of a slice are of about one size.
    """

    k: int = parameter(64, Range(1, MOST_CHUNK), wire=True)
    bits: int = parameter(1, Range(1, 16, power_of_two=True), wire=True)
    dct: bool = parameter(False, Choice((False, True)), wire=True)
    rows: int = parameter(1, Range(1, DCT_MOST), wire=True)
    cols: int = parameter(MOST_CHUNK, Range(1, MOST_CHUNK), wire=True)
    width: int = parameter(MOST_CHUNK, Range(1, 1 << 32), wire=True)
    scaled: bool = parameter(False, Choice((False, True)), wire=True)

    id = 10
    name = "sparse"
    lossless = False
    exact_length = False
    expands = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows * self.cols > MOST_CHUNK or self.cols > self.width or (self.dct and self.cols > DCT_MOST):
            raise EncodeError(
                f"chunks of {self.rows} by {self.cols} of {self.width} columns: at most {MOST_CHUNK} elements, "
                f"with dct at most {DCT_MOST} rows and columns, and are no wider than the matrix"
            )

    def accepts(self, dtype: DType) -> bool:
        """float32, float16, bfloat16."""
        return dtype in KERNEL_DTYPES

    def block(self, dtype: DType) -> int:
        """A band of chunks."""
        return self.rows * self.width

    def ceiling(self, dtype: DType) -> float:
        """2^100."""
        return LARGEST

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """At most: the codes, with the parameter of Rice's that is the best for positions that are as far apart."""
        return _layout(self, count).sizes

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """What is selected, coded. Raises NonFiniteError for NaN, infinities and magnitudes beyond 2^100."""
        values = widen(np.frombuffer(data, KERNEL_DTYPES[extent.dtype]))
        chosen = self._unfilled(values.size)
        top = kernels.select_largest(values, chosen.positions, chosen.values, **self._grid, tables=self._tables)
        if not top <= LARGEST:
            index = int(np.flatnonzero(~(np.abs(values) <= np.float32(LARGEST)))[0])
            raise NonFiniteError(f"{values[index]}, which {self.name} cannot carry", index=index)
        return Encoded(self._pack(chosen, extent, take))

    def take_in(self, kept: Float32, new: Any, extent: Extent, *, beta: float) -> tuple[Bytes, float]:
        """Replace what a compressor keeps of a slice by beta * kept + new; return its payload and largest magnitude.

        `new`: float32, float16 or bfloat16 (as uint16). The result must be finite and at most 2^100.
        """
        chosen = self._unfilled(kept.size)
        top = kernels.decay_and_select(
            kept, new, chosen.positions, chosen.values, beta=beta, **self._grid, tables=self._tables
        )
        return self._pack(chosen, extent, lambda size: np.empty(size, np.uint8)), top

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Zeros, but for what was selected. Raises FormatError."""
        wide = extent.dtype == dtypes.FLOAT32
        elements = out.view(np.float32) if wide else np.empty(extent.count, np.float32)
        elements[:] = 0
        self.add(self.selected(payload, extent), elements, 1.0)
        if not wide:
            kernels.cast(elements, out.view(KERNEL_DTYPES[extent.dtype]), saturate=True)

    def accumulate(self, payload: memoryview, extent: Extent, sums: npt.NDArray[np.float64], weight: float) -> bool:
        """Where something was selected; of elements that are rounded again, only once they are decoded."""
        if extent.dtype != dtypes.FLOAT32:
            return False
        self.add(self.selected(payload, extent), sums, weight)
        return True

    def selected(self, payload: memoryview, extent: Extent) -> Selected:
        """What a payload of the right length holds. Raises FormatError."""
        data, (kept, chunks, sizes) = np.frombuffer(payload, np.uint8), _layout(self, extent.count)
        behind = data.size - packed_size(kept, self.bits)
        scales = behind - self.scales_size(chunks)
        if scales < sizes.metadata:
            raise FormatError(f"a payload of {data.size} bytes ends before {kept} values of {self.bits} bits")
        positions = np.empty(kept, np.uint16)
        codes = data[_STEP:scales]
        if not kernels.decode_positions(codes, positions, elements=extent.count, **self._grid):
            raise FormatError(f"{codes.size} bytes are no codes of {kept} positions")
        step = checked_steps(data[:_STEP], self.bits, _LARGEST_VALUE)
        values = unpack(data[behind:], step, kept, self.bits)
        each = None
        if self.scaled:
            each = np.repeat(_unpacked_scales(data[scales:behind], chunks), self._kept_of_chunks(extent.count))
            with kernels.default_environment():
                values *= _powers(each, -1)
        if positions.max(initial=0) == NOTHING:
            nothing = positions == NOTHING
            if each is not None and each[nothing].any():
                raise FormatError("a scale that is not 1 of a chunk of which nothing is kept")
            if (unpack(data[behind:], _CODES, kept, self.bits)[nothing] != _CODE_0).any():
                raise FormatError("a value that is not 0 of a chunk of which nothing is kept")
            values[nothing] = 0
        return Selected(positions, values)

    def add(self, chosen: Selected, sums: npt.NDArray[np.floating[Any]], weight: float) -> None:
        """Add `weight` times each element to float32 or float64 `sums`, one rounding of theirs for product and sum."""
        kernels.add_selected(chosen.positions, chosen.values, sums, weight=weight, **self._grid, tables=self._tables)

    def combine(
        self, chosen: Sequence[Selected], weights: Sequence[float], out: Float32, *, how: str, divisor: float
    ) -> None:
        """Fill `out` with what many have selected of it: the sums of weight times value, and what `how` makes of them.

        `present`: divided by the weights of those that hold the position; `vote`: the signs of the sums of signs; else
        divided by `divisor`. Sums are in float64, in this order.
        """
        kernels.combine_selected(
            np.concatenate([each.positions for each in chosen]),
            np.concatenate([each.values for each in chosen]),
            np.array(weights, np.float64),
            out,
            divisor=divisor,
            present=how == "present",
            signs=how == "vote",
            **self._grid,
            tables=self._tables,
        )

    def places(self, positions: npt.NDArray[np.uint16], count: int) -> npt.NDArray[np.int64]:
        """Where what is selected of a slice of `count` elements stands, if its chunks stood one behind the other."""
        sizes = self._chunk_sizes(count)
        return np.repeat(np.cumsum(sizes) - sizes, self._kept_of_chunks(count)) + positions.astype(np.int64)

    def dense(self, chunks: Float32) -> Float32:
        """The elements of a tensor, of which everything is given: chunk behind chunk, elements or coefficients."""
        elements = np.zeros(chunks.size, np.float32)
        whole, block = replace(self, k=MOST_CHUNK), self.rows * self.width
        step = max(_DENSE // block, 1) * block
        positions = whole._all_positions(min(step, chunks.size))
        for start in range(0, chunks.size, step):
            part = chunks[start : start + step]
            if part.size < positions.size:
                positions = whole._all_positions(part.size)
            whole.add(Selected(positions, part), elements[start : start + step], 1.0)
        return elements

    def _all_positions(self, count: int) -> npt.NDArray[np.uint16]:
        """The positions of all elements of a slice, chunk after chunk."""
        sizes = self._chunk_sizes(count)
        return (np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.uint16)

    @cached_property
    def _grid(self) -> dict[str, int]:
        return {"width": self.width, "rows": self.rows, "cols": self.cols, "k": self.k}

    @property
    def _tables(self) -> Float32 | None:
        return dct_tables() if self.dct else None

    def _areas(self, count: int) -> list[tuple[int, int, int]]:
        """(number, height, width) of the bands of a slice: whole ones, one of the rows left, one of a row that ends."""
        whole, left = divmod(count // self.width, self.rows)
        areas = [(whole, self.rows, self.width), (1, left, self.width), (1, 1, count % self.width)]
        return [area for area in areas if all(area)]

    def kinds(self, count: int) -> list[tuple[int, int]]:
        """How many chunks of how many elements there are in a slice."""
        kinds = []
        for bands, height, across in self._areas(count):
            chunks, rest = divmod(across, self.cols)
            kinds += [(bands * chunks, height * self.cols), (bands, height * rest)]
        return [kind for kind in kinds if all(kind)]

    def _chunk_sizes(self, count: int) -> npt.NDArray[np.int64]:
        """How many elements each chunk of a slice has."""
        sizes: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        for bands, height, across in self._areas(count):
            chunks, rest = divmod(across, self.cols)
            band = np.array([height * self.cols] * chunks + [height * rest] * (rest > 0), np.int64)
            sizes.append(np.tile(band, bands))
        return np.concatenate(sizes)

    def _kept_of_chunks(self, count: int) -> npt.NDArray[np.int64]:
        """How many elements are kept of each chunk of a slice."""
        return np.minimum(self._chunk_sizes(count), self.k)

    def _unfilled(self, count: int) -> Selected:
        """For what is selected of a slice."""
        kept = _layout(self, count).kept
        return Selected(np.empty(kept, np.uint16), np.empty(kept, np.float32))

    def index_bits(self, size: int) -> int:
        """Bits of the codes of a chunk of so many elements, as `sizes` expects them."""
        kept = min(self.k, size)
        if self.k <= _ENUMERATED:
            return (comb(size, kept) - 1).bit_length()
        return kept * (1 + self._likely_rice) + ((size - kept) >> self._likely_rice) + 1

    @property
    def _likely_rice(self) -> int:
        """Of a whole chunk: how many bits the mean distance of positions has."""
        return max((self.rows * self.cols // self.k).bit_length() - 1, 0)

    def scales_size(self, chunks: int) -> int:
        """Bytes of the scales of so many chunks."""
        return packed_size(chunks, _SCALE_BITS) if self.scaled else 0

    def _pack(self, chosen: Selected, extent: Extent, take: Take) -> Bytes:
        payload = take(self.sizes(extent.count, extent.dtype).total)
        values, last = chosen.values, [np.empty(0, np.uint8)]
        if self.scaled and values.size:
            counts = self._kept_of_chunks(extent.count)
            scales = _scales(values, counts)
            with kernels.default_environment():
                values = values * _powers(np.repeat(scales, counts), 1)
            last.append(_packed_scales(scales))
        step = np.array([step_of(values, self.bits)], np.float32)
        last.append(pack(values, step, self.bits))
        payload[:_STEP] = step.astype("<f4").view(np.uint8)
        coded = np.concatenate(last)
        room, behind = payload[_STEP : payload.size - coded.size], _STEP
        if room.size:
            behind += kernels.encode_positions(chosen.positions, room, elements=extent.count, **self._grid)
        payload[behind : behind + coded.size] = coded
        return payload[: behind + coded.size]


def _scales(values: Float32, counts: npt.NDArray[np.int64]) -> Bytes:
    """How many times each chunk's values may be doubled to be about as large as the largest; of zeros, 0."""
    tops = np.maximum.reduceat(np.abs(values), np.cumsum(counts) - counts)
    exponents = np.frexp(tops)[1]
    below = np.where(tops > 0, np.frexp(tops.max())[1] - exponents, 0)
    return np.minimum(below, _LOWEST_SCALE).astype(np.uint8)


def _packed_scales(scales: Bytes) -> Bytes:
    """Two in a byte, the first in its low half."""
    halves = np.append(scales, np.zeros(scales.size % 2, np.uint8))
    packed: Bytes = halves[::2] | halves[1::2] << np.uint8(_SCALE_BITS)
    return packed


def _unpacked_scales(data: Bytes, count: int) -> Bytes:
    """So many of them. Raises FormatError."""
    halves = np.stack([data & np.uint8(_LOWEST_SCALE), data >> np.uint8(_SCALE_BITS)], axis=1).reshape(-1)
    if halves[count:].any():
        raise FormatError("bits behind the last scale are not 0")
    return halves[:count]


def _powers(exponents: Bytes, sign: int) -> Float32:
    """Two to the power of them, or of their negatives."""
    powers: Float32 = np.ldexp(np.float32(1), sign * exponents.astype(np.int32))
    return powers


class _Layout(NamedTuple):
    """What is kept of a slice, and how large it is at most."""

    kept: int
    chunks: int
    sizes: Sizes


@lru_cache(maxsize=4096)
def _layout(codec: Sparse, count: int) -> _Layout:
    """Asked for several times a slice, and the same in every step."""
    kinds = codec.kinds(count)
    index = sum(number * codec.index_bits(size) for number, size in kinds)
    kept = sum(number * min(codec.k, size) for number, size in kinds)
    head = _STEP if codec.k <= _ENUMERATED else _STEP + 1
    chunks = sum(number for number, _ in kinds)
    data = packed_size(index, 1) + codec.scales_size(chunks) + packed_size(kept, codec.bits)
    return _Layout(kept, chunks, Sizes(data, head))
