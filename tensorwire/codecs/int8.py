"""int8, int8-linear: eight bits an element and one scale a block.

int8 is bitsandbytes' blockwise dynamic 8-bit type (Dettmers et al., arXiv:2110.02861): the nearest of 256 fixed
values, times the block's absmax. int8-linear is plain symmetric rounding with a bfloat16 scale.
Payload: the scales of all blocks, then one byte an element.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs.base import Codec, Encoded, Sizes, Take, check_choice, check_power_of_two, refuse_nonfinite
from tensorwire.codecs.floats import KERNEL_DTYPES, kernel_target, kernel_view, kernels_for, largest
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.kernels import tables
from tensorwire.tensor import Extent, TensorView


@dataclass(frozen=True, repr=False)
class Quantizer(Codec):
    """What every quantizing codec shares. `nonfinite`: error, or raw to send a tensor with NaN or infinities
    losslessly (which costs one more pass over it).
    """

    blocksize: int = 0
    nonfinite: str = "error"

    on_device = True
    smallest: ClassVar[int] = 16
    biggest: ClassVar[int] = 65536

    def __post_init__(self) -> None:
        check_power_of_two("blocksize", self.blocksize, self.smallest, self.biggest)
        check_choice("nonfinite", self.nonfinite, ("error", "raw"))

    def stages(self) -> tuple[tuple[int, ...], ...]:
        return ((self.id, self.blocksize),)

    def accepts(self, dtype: DType) -> bool:
        return dtype in KERNEL_DTYPES

    def block(self, dtype: DType) -> int:
        return self.blocksize

    def blocks(self, count: int) -> int:
        """Blocks in `count` elements, the last one maybe partial."""
        return -(-count // self.blocksize)

    def fallback(self, view: TensorView) -> bool:
        return self.nonfinite == "raw" and largest(view) == float("inf")


@dataclass(frozen=True, repr=False)
class Int8(Quantizer):
    """bitsandbytes' dynamic 8-bit type, float32 absmax per block."""

    id = 4
    name = "int8"
    # The 256 float32 values of the codes.
    table: ClassVar[np.ndarray] = tables.INT8_CODE
    blocksize: int = 4096

    def sizes(self, count: int, dtype: DType) -> Sizes:
        return Sizes(count, 4 * self.blocks(count))

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        values = kernel_view(data, extent.dtype)
        payload = take(self.sizes(len(values), extent.dtype).total)
        absmax, codes = split(payload, 4 * self.blocks(len(values)))
        crc = np.empty(1, np.uint32)
        if not kernels_for(values).quantize_int8(values, codes, absmax.view(np.float32), crc, blocksize=self.blocksize):
            refuse_nonfinite(values, self)
        return Encoded(payload, int(crc[0]))

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        values = kernel_target(out, extent.dtype)
        absmax, codes = split(np.frombuffer(payload, np.uint8), 4 * self.blocks(len(values)))
        kernels_for(values).dequantize_int8(
            codes, checked_absmax(absmax), values, blocksize=self.blocksize, uncached=uncached
        )


@dataclass(frozen=True, repr=False)
class Int8Linear(Quantizer):
    """Symmetric rounding to -127..127, bfloat16 scale per block. See docs/decisions/0003."""

    id = 5
    name = "int8-linear"
    blocksize: int = 256

    def sizes(self, count: int, dtype: DType) -> Sizes:
        return Sizes(count, dtypes.BFLOAT16.itemsize * self.blocks(count))

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        values = kernel_view(data, extent.dtype)
        payload = take(self.sizes(len(values), extent.dtype).total)
        scales, codes = split(payload, 2 * self.blocks(len(values)))
        crc = np.empty(1, np.uint32)
        if not kernels_for(values).quantize_linear(
            values, codes.view(np.int8), scales.view(np.uint16), crc, blocksize=self.blocksize
        ):
            refuse_nonfinite(values, self)
        return Encoded(payload, int(crc[0]))

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        values = kernel_target(out, extent.dtype)
        scale_bytes, codes = split(np.frombuffer(payload, np.uint8), 2 * self.blocks(len(values)))
        scales = scale_bytes.view(np.uint16)
        if scales.size and scales.max() >= 0x7F80:
            raise FormatError("a scale is negative, infinite or NaN")
        if not kernels_for(values).dequantize_linear(
            codes.view(np.int8), scales, values, blocksize=self.blocksize, uncached=uncached
        ):
            raise FormatError("code -128 is not used")


def split(payload: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of a payload."""
    return payload[:at], payload[at:]


def checked_absmax(data: np.ndarray) -> np.ndarray:
    """Received absmax bytes as float32. Raises FormatError for NaN, infinities and negative values, -0 included."""
    bits = data.view(np.uint32)
    if bits.size and bits.max() >= 0x7F800000:
        raise FormatError("an absmax is negative, infinite or NaN")
    return data.view(np.float32)
