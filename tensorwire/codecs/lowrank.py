"""lowrank: a tensor as the product of two thin matrices, in numbers of a few bits.

A slice is rows of a matrix of `width` columns, the last of which may be shorter. Payload: `rank` float32 steps for the
right factor and as many for the left one, then the codes of the right factor (`width` rows of `rank`) and those of the
left one (a row of `rank` for each row of the slice). Every slice carries the whole right factor, so that it decodes
alone; slices are large, and it is small.

The factors are those of a power iteration (PowerSGD: Vogels, Karimireddy, Jaggi, arXiv:1905.13727). It multiplies
matrices as the machine does it best, so that other machines may write other bytes of the same tensor; what a payload
decodes to is the same everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels
from tensorwire.codecs.floats import KERNEL_DTYPES, widen
from tensorwire.codecs.signed import Float32, checked_steps, pack, packed_size, step_of, unpack
from tensorwire.codecs.stage import Bytes, Encoded, Packer, Range, Sizes, Take, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, NonFiniteError
from tensorwire.tensor import Extent

LARGEST: Final = 2.0**40  # of a magnitude that is encoded: sums of squares stay finite
_LARGEST_FACTOR: Final = 2.0**56  # of one that is decoded: so do products, and sums of 64 of them
_STEP: Final = 4
_BLOCK: Final = 1 << 15  # elements that are made at a time: they stay in the second-level cache


class Factors(NamedTuple):
    """The matrix of a slice is `left` times the transposed `right`."""

    left: Float32
    right: Float32


@dataclass(frozen=True, repr=False)
class LowRank(Packer):
    """float32, float16 or bfloat16 as two factors of `rank` columns. `width`: columns of the matrix."""

    rank: int = parameter(4, Range(1, 64), wire=True)
    bits: int = parameter(2, Range(1, 16, power_of_two=True), wire=True)
    width: int = parameter(1024, Range(1, 1 << 17), wire=True)

    id = 11
    name = "lowrank"
    lossless = False
    exact_length = True
    expands = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.width:
            raise EncodeError(f"rank {self.rank} of {self.name} is more than the {self.width} columns of the matrix")

    def accepts(self, dtype: DType) -> bool:
        """float32, float16, bfloat16."""
        return dtype in KERNEL_DTYPES

    def block(self, dtype: DType) -> int:
        """A row."""
        return self.width

    def ceiling(self, dtype: DType) -> float:
        """2^40."""
        return LARGEST

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """The codes of both factors; the steps of their columns."""
        rows = -(-count // self.width)
        return Sizes(packed_size((self.width + rows) * self.rank, self.bits), 2 * _STEP * self.rank)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The factors, from a start of no meaning on. Raises NonFiniteError, also for magnitudes beyond 2^40."""
        values = widen(np.frombuffer(data, KERNEL_DTYPES[extent.dtype]))
        bad = np.flatnonzero(~(np.abs(values) <= np.float32(LARGEST)))
        if bad.size:
            raise NonFiniteError(f"{values[bad[0]]}, which {self.name} cannot carry", index=int(bad[0]))
        return Encoded(self.factorize(values))

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """The product of the factors. Raises FormatError."""
        wide = extent.dtype == dtypes.FLOAT32
        elements = out.view(np.float32) if wide else np.empty(extent.count, np.float32)
        with kernels.default_environment():
            for start, part in self._product(self.factors(payload, extent), extent.count):
                elements[start : start + part.size] = part
        if not wide:
            kernels.cast(elements, out.view(KERNEL_DTYPES[extent.dtype]), saturate=True)

    def accumulate(self, payload: memoryview, extent: Extent, sums: npt.NDArray[np.float64], weight: float) -> bool:
        """A few rows at a time."""
        if extent.dtype != dtypes.FLOAT32:
            return False
        self.add(self.factors(payload, extent), sums, weight)
        return True

    def add(self, factors: Factors, sums: npt.NDArray[np.floating[Any]], weight: float) -> None:
        """Add `weight` times each element to float32 or float64 `sums`, one rounding of theirs for product and sum."""
        with kernels.default_environment():
            for start, part in self._product(factors, sums.size):
                sums[start : start + part.size] += sums.dtype.type(weight) * part.astype(sums.dtype)

    def factors(self, payload: memoryview, extent: Extent) -> Factors:
        """The factors of a payload of the right length. Raises FormatError."""
        data, rows = np.frombuffer(payload, np.uint8), -(-extent.count // self.width)
        head = self.sizes(extent.count, extent.dtype).metadata
        steps = checked_steps(data[:head], self.bits, _LARGEST_FACTOR).reshape(2, self.rank)
        each = np.concatenate([np.tile(steps[0], self.width), np.tile(steps[1], rows)])
        with kernels.default_environment():
            values = unpack(data[head:], each, each.size, self.bits).reshape(-1, self.rank)
        return Factors(left=values[self.width :], right=values[: self.width])

    def factorize(self, values: Float32, right: Float32 | None = None) -> Bytes:
        """The payload of finite values. `right`: a factor to begin with, that of the step before."""
        rows = -(-values.size // self.width)
        matrix = np.zeros((rows, self.width), np.float32)
        matrix.reshape(-1)[: values.size] = values
        with kernels.default_environment(), np.errstate(all="ignore"):
            if right is None:
                right = np.random.default_rng(0).standard_normal((self.width, self.rank), np.float32)
                right = matrix.T @ _orthonormal(matrix @ right)
            found = _orthonormal(matrix @ _orthonormal(right))
            left_steps, left_codes = self._packed(found)
            left = unpack(left_codes, np.tile(left_steps, rows), rows * self.rank, self.bits).reshape(found.shape)
            # What fits best to the left factor as it will be decoded.
            wanted = np.linalg.lstsq(left.T @ left, left.T @ matrix, rcond=1e-6)[0].T.astype(np.float32)
            right_steps = self._steps(wanted)
            steps = np.concatenate([np.tile(right_steps, self.width), np.tile(left_steps, rows)])
            codes = pack(np.concatenate([wanted, left]).reshape(-1), steps, self.bits)
        return np.concatenate([np.concatenate([right_steps, left_steps]).astype("<f4").view(np.uint8), codes])

    def _steps(self, factor: Float32) -> Float32:
        """Of the columns."""
        columns = np.ascontiguousarray(factor.T)
        return np.array([step_of(column, self.bits) for column in columns], np.float32)

    def _packed(self, factor: Float32) -> tuple[Float32, Bytes]:
        """Steps and codes of the columns."""
        steps = self._steps(factor)
        return steps, pack(factor.reshape(-1), np.tile(steps, len(factor)), self.bits)

    def _product(self, factors: Factors, count: int) -> Iterator[tuple[int, Float32]]:
        """(first element, elements) of a few rows at a time, sums over ascending columns of the factors."""
        step = max(_BLOCK // self.width, 1)
        right = np.ascontiguousarray(factors.right.T)
        for row in range(0, len(factors.left), step):
            left = factors.left[row : row + step]
            part = np.zeros((len(left), self.width), np.float32)
            for r in range(self.rank):
                part += left[:, r, None] * right[r]
            start = row * self.width
            yield start, part.reshape(-1)[: count - start]


def _orthonormal(matrix: Float32) -> Float32:
    """An orthonormal basis of the columns, zeros behind where they have fewer dimensions."""
    basis = np.linalg.qr(matrix)[0].astype(np.float32)
    padded = np.zeros(matrix.shape, np.float32)
    padded[:, : basis.shape[1]] = basis
    return padded
