"""The kernels' signatures, which every implementation has: the extension, its twin in NumPy, and the one for CUDA.

The type checker holds each of the three modules against `Kernels`; tests hold their results against one another.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]
# Weighted sums.
Float64: TypeAlias = npt.NDArray[np.float64]
# One element, which receives a checksum.
Crc: TypeAlias = npt.NDArray[np.uint32]
# float32, float16, or uint16 holding bfloat16 bit patterns; for CUDA a 1-D torch tensor on the device.
Floats: TypeAlias = Any


class Kernels(Protocol):
    """What works on floats. See `tensorwire.kernels` for what all of them have in common."""

    def cast(
        self,
        values: Floats,
        out: Floats,
        crc: Crc | None = None,
        *,
        saturate: bool = False,
        uncached: bool | None = None,
    ) -> int:
        """Convert float32 to float16 or bfloat16, or back; the number of finite values that overflowed."""

    def blockwise_absmax(self, values: Floats, absmax: Float32, *, blocksize: int) -> bool:
        """absmax[i] = the largest |x| of block i."""

    def quantize_4bit(
        self,
        values: Floats,
        codes: Bytes,
        absmax: Float32,
        crc: Crc | None = None,
        *,
        blocksize: int,
        quant_type: str,
    ) -> bool:
        """Quantize to nf4 or fp4 codes, two a byte, and absmax."""

    def dequantize_4bit(
        self,
        codes: Bytes,
        absmax: Float32,
        out: Floats,
        *,
        blocksize: int,
        quant_type: str,
        uncached: bool | None = None,
    ) -> None:
        """table[code] * absmax of its block, saturated at the largest finite value of `out`."""

    def quantize_int8(
        self, values: Floats, codes: Bytes, absmax: Float32, crc: Crc | None = None, *, blocksize: int
    ) -> bool:
        """Quantize to codes of the dynamic 8-bit type and absmax."""

    def dequantize_int8(
        self, codes: Bytes, absmax: Float32, out: Floats, *, blocksize: int, uncached: bool | None = None
    ) -> None:
        """table[code] * absmax of its block, saturated at the largest finite value of `out`."""

    def quantize_linear(
        self,
        values: Floats,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.uint16],
        crc: Crc | None = None,
        *,
        blocksize: int,
    ) -> bool:
        """Quantize to codes of -127 to 127 and bfloat16 scales."""

    def dequantize_linear(
        self,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.uint16],
        out: Floats,
        *,
        blocksize: int,
        uncached: bool | None = None,
    ) -> bool:
        """Code * scale of its block, saturated likewise; False: there was a -128, which no quantizer makes."""


class HostKernels(Kernels, Protocol):
    """What the host has beside them.

    `accumulate` and its kin add `weight` times each value to float64 sums, for the values that a decoder would have
    given as `dtype` ("float32", "float16" or "bfloat16"): one rounding for the product, one for the sum.
    """

    def accumulate(self, values: Floats, sums: Float64, *, weight: float) -> None:
        """Sums += weight * values."""

    def accumulate_4bit(
        self,
        codes: Bytes,
        absmax: Float32,
        sums: Float64,
        *,
        weight: float,
        dtype: str,
        blocksize: int,
        quant_type: str,
    ) -> None:
        """Sums += weight * what `dequantize_4bit` gives."""

    def accumulate_int8(
        self, codes: Bytes, absmax: Float32, sums: Float64, *, weight: float, dtype: str, blocksize: int
    ) -> None:
        """Sums += weight * what `dequantize_int8` gives."""

    def accumulate_linear(
        self,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.uint16],
        sums: Float64,
        *,
        weight: float,
        dtype: str,
        blocksize: int,
    ) -> bool:
        """Sums += weight * what `dequantize_linear` gives, and its verdict."""

    def nonzero_blocks(self, values: Bytes, marks: Bytes, *, blocksize: int) -> int:
        """Set bit i of `marks`, lowest first, where block i has a byte that is not 0, no other; how many are set."""

    def byte_histogram(self, values: Bytes, counts: npt.NDArray[np.uint32], *, every: int = 1) -> None:
        """counts[b] = how often byte b stands in blocks 0, every, 2 * every, ... of 64 bytes."""

    def huffman_encode(self, values: Bytes, codes: Bytes) -> int:
        """Write `values` in Huffman codes; the bytes that they take.

        0: there is no room for them and 8 bytes behind. `codes` holds anything beyond.
        """

    def huffman_decode(self, codes: Bytes, out: Bytes) -> bool:
        """What `huffman_encode` was given, of the length of `out`; False: codes that it never makes."""

    def split_planes(self, values: Bytes, marks: Bytes, planes: Sequence[Bytes]) -> None:
        """The bytes of elements, one array for each, lowest first, of the blocks of 64 elements that are marked.

        The width of an element, 1, 2, 4 or 8 bytes, is the number of planes. The upper 16 bits of an element are
        rotated left by one first: a sign stands below its exponent then.
        """

    def merge_planes(self, planes: Sequence[Bytes], marks: Bytes, out: Bytes) -> None:
        """What `split_planes` was given, with zeros in blocks that are not marked.

        A plane of one byte stands for that byte throughout.
        """

    def select_largest(
        self,
        values: Float32,
        positions: npt.NDArray[np.uint16],
        coefficients: Float32,
        *,
        width: int,
        rows: int,
        cols: int,
        k: int,
        tables: Float32 | None = None,
    ) -> float:
        """Positions and elements of the k largest magnitudes of each chunk of `rows` by `cols`, or of its DCT.

        Returns the largest magnitude; one that is not finite or beyond 2^100 if there is such, with anything in the
        outputs.
        """

    def decay_and_select(
        self,
        kept: Float32,
        values: Floats,
        positions: npt.NDArray[np.uint16],
        coefficients: Float32,
        *,
        beta: float,
        width: int,
        rows: int,
        cols: int,
        k: int,
        tables: Float32 | None = None,
    ) -> float:
        """`decay_and_add`, and `select_largest` of the result."""

    def add_selected(
        self,
        positions: npt.NDArray[np.uint16],
        coefficients: Float32,
        sums: npt.NDArray[np.floating[Any]],
        *,
        weight: float,
        width: int,
        rows: int,
        cols: int,
        k: int,
        tables: Float32 | None = None,
    ) -> bool:
        """Sums, float32 or float64, += weight * what was selected; False: a position outside its chunk."""

    def combine_selected(
        self,
        positions: npt.NDArray[np.uint16],
        values: Float32,
        weights: npt.NDArray[np.float64],
        out: Float32,
        *,
        divisor: float,
        present: bool,
        signs: bool,
        width: int,
        rows: int,
        cols: int,
        k: int,
        tables: Float32 | None = None,
    ) -> bool:
        """What messages hold together, which stand one behind the other and have a weight each.

        Sums are in float64, in the order of messages; with `signs`, the signs of those of signs; with `present`,
        divided by the weights of those that hold the position, else by `divisor`. Then float32, transformed back.
        False: a position outside its chunk, with anything in `out`.
        """

    def encode_positions(
        self,
        positions: npt.NDArray[np.uint16],
        codes: Bytes,
        *,
        elements: int,
        width: int,
        rows: int,
        cols: int,
        k: int,
    ) -> int:
        """Write the positions of a slice of `elements` in codes; the bytes that they take, 0: there is no room."""

    def decode_positions(
        self,
        codes: Bytes,
        positions: npt.NDArray[np.uint16],
        *,
        elements: int,
        width: int,
        rows: int,
        cols: int,
        k: int,
    ) -> bool:
        """What `encode_positions` was given; False: codes that it never makes."""

    def sum_magnitudes(self, values: Float32) -> tuple[float, int, int]:
        """The largest magnitude; all in units of 2^-32 of it, each rounded, together; how many are not 0."""

    def pack_values(self, values: Float32, steps: Float32, codes: Bytes, *, bits: int) -> None:
        """Write numbers as a sign and a magnitude in steps, of `bits` (1, 2, 4, 8, 16). `steps`: one, or one each."""

    def unpack_values(self, codes: Bytes, steps: Float32, values: Float32, *, bits: int) -> bool:
        """The numbers that codes stand for; False: bits behind the last one are not 0."""

    def decay_and_add(self, kept: Float32, values: Floats, *, beta: float) -> float:
        """Make of what is kept beta times that, plus finite values; the largest magnitude then."""

    def divide_by_rms(
        self, values: Float32, roots: Float32, out: Float32, *, beta: float, scale: float, eps: float
    ) -> None:
        """Update root mean squares that decay by `beta`, and divide each value by `scale` times its own, plus eps."""

    def difference(self, base: Bytes, values: Bytes, out: Bytes, *, width: int) -> None:
        """The differences of unsigned numbers of `width` bytes to those of a base, as zig-zag.

        0, -1, 1, -2, ... are 0, 1, 2, 3, ...; the upper 16 bits are rotated right by one, which `split_planes` undoes.
        """

    def add_difference(self, differences: Bytes, values: Bytes, *, width: int) -> None:
        """Make of a base, in its place, the values that `difference` was taken to."""

    def encode_changes(
        self, base: Floats, values: Floats, codes: Bytes, work: npt.NDArray[np.uint32]
    ) -> tuple[int, int]:
        """Write which of the values, float16 or bfloat16, differ from those of a base, and how.

        The bytes that it takes, and how many differ. 0 bytes: there is no room for them, or nothing differs, or more
        than half of them. `work` has two elements for each value; it and the rest of `codes` then hold anything.
        """

    def decode_changes(self, codes: Bytes, values: Floats, work: npt.NDArray[np.uint32]) -> int:
        """Make of a base, in its place, the values that `encode_changes` was given; how many of them changed.

        0: codes that it never makes of this base; `values` then hold anything. `work`: as there.
        """

    def default_environment(self) -> AbstractContextManager[Any]:
        """In it this thread rounds to nearest even and keeps subnormals, whatever the host has set."""

    def crc32c(self, data: Any, seed: int = 0) -> int:
        """CRC-32C (Castagnoli) of a contiguous buffer, chained through `seed`."""

    def set_threads(self, count: int) -> None:
        """Threads that one call may use, its own included."""

    def get_threads(self) -> int:
        """The number that `set_threads`, or TENSORWIRE_THREADS at import, has set; else 1."""
