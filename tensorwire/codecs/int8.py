"""int8, int8-linear: eight bits an element and one scale a block.

int8 is bitsandbytes' blockwise dynamic 8-bit type (Dettmers et al., arXiv:2110.02861): the nearest of 256 fixed
values, times the block's absmax. int8-linear is plain symmetric rounding with a bfloat16 scale.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels
from tensorwire.codecs.floats import kernel_target, kernel_view, kernels_for
from tensorwire.codecs.quantizer import QuantizedState, Quantizer, TableQuantizer, checked_absmax, split
from tensorwire.codecs.stage import Encoded, Range, Sizes, Sums, Take, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.kernels import tables
from tensorwire.tensor import Extent

_UNUSED: Final = "code -128 is not used"


@dataclass(frozen=True, repr=False)
class Int8(TableQuantizer):
    """bitsandbytes' dynamic 8-bit type, float32 absmax per block."""

    blocksize: int = parameter(4096, Range(16, 65536, power_of_two=True), wire=True)

    id = 4
    name = "int8"
    table = tables.INT8_CODE
    quant_type = None
    codes_per_byte = 1

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """A byte an element, four a block."""
        return Sizes(count, 4 * self.blocks(count))

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The absmax, then the codes. Raises NonFiniteError."""
        values = kernel_view(data, extent.dtype)
        payload = take(self.sizes(len(values), extent.dtype).total)
        absmax, codes = split(payload, 4 * self.blocks(len(values)))
        crc = np.empty(1, np.uint32)
        if not kernels_for(values).quantize_int8(values, codes, absmax.view(np.float32), crc, blocksize=self.blocksize):
            self.refuse_nonfinite(values)
        return Encoded(payload, int(crc[0]))

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Table entries times absmax. Raises FormatError for an invalid absmax."""
        values = kernel_target(out, extent.dtype)
        state = self.state(payload, len(values))
        kernels_for(values).dequantize_int8(
            state.codes, state.absmax, values, blocksize=self.blocksize, uncached=uncached
        )

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Straight from the codes."""
        state = self.state(payload, extent.count)
        kernels.accumulate_int8(
            state.codes, state.absmax, sums, weight=weight, dtype=extent.dtype.name, blocksize=self.blocksize
        )
        return True

    def state(self, payload: Any, count: int) -> QuantizedState:
        """Codes and absmax. Raises FormatError for an invalid absmax."""
        absmax, codes = split(np.frombuffer(payload, np.uint8), 4 * self.blocks(count))
        return QuantizedState(codes, checked_absmax(absmax))


class Int8Linear(Quantizer):
    """Symmetric rounding to -127..127, bfloat16 scale per block. See docs/decisions/0003."""

    id = 5
    name = "int8-linear"
    scale_size = dtypes.BFLOAT16.itemsize

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """A byte an element, two a block."""
        return Sizes(count, self.scale_size * self.blocks(count))

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The scales, then the codes. Raises NonFiniteError."""
        values = kernel_view(data, extent.dtype)
        payload = take(self.sizes(len(values), extent.dtype).total)
        scales, codes = split(payload, 2 * self.blocks(len(values)))
        crc = np.empty(1, np.uint32)
        if not kernels_for(values).quantize_linear(
            values, codes.view(np.int8), scales.view(np.uint16), crc, blocksize=self.blocksize
        ):
            self.refuse_nonfinite(values)
        return Encoded(payload, int(crc[0]))

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Codes times scales. Raises FormatError for an invalid scale, and for code -128."""
        values = kernel_target(out, extent.dtype)
        codes, scales = self._parts(payload, len(values))
        if not kernels_for(values).dequantize_linear(
            codes, scales, values, blocksize=self.blocksize, uncached=uncached
        ):
            raise FormatError(_UNUSED)

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Straight from the codes."""
        codes, scales = self._parts(payload, extent.count)
        if not kernels.accumulate_linear(
            codes, scales, sums, weight=weight, dtype=extent.dtype.name, blocksize=self.blocksize
        ):
            raise FormatError(_UNUSED)
        return True

    def _parts(self, payload: Any, count: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]:
        """Codes and scales. Raises FormatError for an invalid scale."""
        scale_bytes, codes = split(np.frombuffer(payload, np.uint8), 2 * self.blocks(count))
        scales = scale_bytes.view(np.uint16)
        if scales.size and scales.max() >= 0x7F80:
            raise FormatError("a scale is negative, infinite or NaN")
        return codes.view(np.int8), scales
