"""nf4, fp4: bitsandbytes' 4-bit types (Dettmers et al., arXiv:2305.14314), two elements a byte.

Payload: float32 absmax of all blocks, then the packed codes. With `double_quant` (bitsandbytes'
compress_statistics) the absmax are themselves stored in 8 bits: a float32 offset, which is the mean absmax of the
whole tensor, float32 absmax per 256 differences from it, the differences as dynamic int8 codes, then the elements.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from tensorwire import kernels
from tensorwire.codecs.floats import kernel_target, kernel_view, kernels_for
from tensorwire.codecs.quantizer import QuantizedState, TableQuantizer, checked_absmax, split
from tensorwire.codecs.stage import Bytes, Choice, Encoded, Part, Range, Sizes, Sums, Take, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.kernels import tables
from tensorwire.tensor import Extent, TensorView

NESTED_BLOCKSIZE: Final = 256
_NEST_BLOCKS: Final = 8192  # blocks quantized per step if their absmax are quantized too
_LARGEST: Final = np.finfo(np.float32).max
_SCAN_BLOCKS: Final = 4096  # blocks per step when computing the mean absmax


@dataclass(frozen=True, repr=False)
class FourBit(TableQuantizer):
    """The common part of both 4-bit types."""

    blocksize: int = parameter(64, Range(32, 4096, power_of_two=True), wire=True)
    double_quant: bool = parameter(False, Choice((False, True)), wire=True)

    quant_type: ClassVar[str]
    codes_per_byte = 2

    @property
    def tables(self) -> tuple[npt.NDArray[np.float32], ...]:
        """The table of the codes, and with double_quant the one of the absmax."""
        return (self.table, tables.INT8_CODE) if self.double_quant else (self.table,)

    def block(self, dtype: DType) -> int:
        """Elements that share a scale, or with double_quant a nested one."""
        return self.blocksize * NESTED_BLOCKSIZE if self.double_quant else self.blocksize

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """Half a byte an element, four bytes a block; with double_quant one a block, and a little."""
        return Sizes((count + 1) // 2, self._metadata(self.blocks(count)))

    def _metadata(self, blocks: int) -> int:
        return _nested_head(blocks) + blocks if self.double_quant else 4 * blocks

    def parts(self, count: int, dtype: DType) -> tuple[Part, ...]:
        """The absmax, or with double_quant what is needed for their codes, and these; then the codes."""
        if not self.double_quant:
            return super().parts(count, dtype)
        blocks = self.blocks(count)
        return Part(_nested_head(blocks), 4), Part(blocks, 1), Part((count + 1) // 2, 1)

    def prepare(self, view: TensorView) -> float | None:
        """With double_quant the offset: the mean absmax of the tensor."""
        return mean_absmax(view, self.blocksize) if self.double_quant and view.numel else None

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The absmax, then the codes. Raises NonFiniteError."""
        values = kernel_view(data, extent.dtype)
        sizes = self.sizes(len(values), extent.dtype)
        payload = take(sizes.total)
        metadata, codes = split(payload, sizes.metadata)
        crc = None if self.double_quant else np.empty(1, np.uint32)
        if self.double_quant:
            with kernels.default_environment():
                finite = self._encode_nested(values, codes, metadata, context)
        else:
            finite = self._quantize(values, codes, metadata.view(np.float32), crc)
        if not finite:
            self.refuse_nonfinite(values)
        return Encoded(payload, None if crc is None else int(crc[0]))

    def _quantize(
        self,
        values: Any,
        codes: Bytes,
        absmax: npt.NDArray[np.float32],
        crc: npt.NDArray[np.uint32] | None = None,
    ) -> bool:
        return kernels_for(values).quantize_4bit(
            values, codes, absmax, crc, blocksize=self.blocksize, quant_type=self.quant_type
        )

    def _encode_nested(self, values: Any, codes: Bytes, metadata: Bytes, offset: float) -> bool:
        """In steps, so that apart from the payload only the absmax of one step need memory."""
        head_bytes, nested_codes = split(metadata, _nested_head(self.blocks(len(values))))
        head = head_bytes.view(np.float32)
        head[0] = offset
        buffer = np.empty(_NEST_BLOCKS, np.float32)
        for block in range(0, nested_codes.size, _NEST_BLOCKS):
            start, stop = block * self.blocksize, (block + _NEST_BLOCKS) * self.blocksize
            absmax = buffer[: nested_codes.size - block]
            if not self._quantize(values[start:stop], codes[start // 2 : stop // 2], absmax):
                return False
            absmax -= offset
            kernels.quantize_int8(
                absmax,
                nested_codes[block : block + _NEST_BLOCKS],
                head[1 + block // NESTED_BLOCKSIZE :][: -(-absmax.size // NESTED_BLOCKSIZE)],
                blocksize=NESTED_BLOCKSIZE,
            )
        return True

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Table entries times absmax. Raises FormatError for an invalid absmax or a nonzero unused half byte."""
        values = kernel_target(out, extent.dtype)
        state = self.state(payload, len(values))
        absmax = unnest(state) if self.double_quant else state.absmax
        kernels_for(values).dequantize_4bit(
            state.codes, absmax, values, blocksize=self.blocksize, quant_type=self.quant_type, uncached=uncached
        )

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Straight from the codes."""
        state = self.state(payload, extent.count)
        kernels.accumulate_4bit(
            state.codes,
            unnest(state) if self.double_quant else state.absmax,
            sums,
            weight=weight,
            dtype=extent.dtype.name,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
        )
        return True

    def state(self, payload: Any, count: int) -> QuantizedState:
        """Codes and absmax. Raises FormatError for an invalid absmax, or an unused half byte that is not 0."""
        blocks = self.blocks(count)
        metadata, codes = split(np.frombuffer(payload, np.uint8), self._metadata(blocks))
        if count % 2 and codes[-1] & 0x0F:
            raise FormatError("the unused half of the last byte is not zero")
        if not self.double_quant:
            return QuantizedState(codes, checked_absmax(metadata))
        head, absmax_codes = split(metadata, _nested_head(blocks))
        floats = checked_absmax(head)
        return QuantizedState(codes, absmax_codes, floats[1:], floats[:1])


class NF4(FourBit):
    """4-bit NormalFloat: 16 levels at the quantiles of a normal distribution."""

    id = 6
    name = quant_type = "nf4"
    table = tables.NF4_CODE


class FP4(FourBit):
    """4-bit float, as bitsandbytes' CUDA code rounds it."""

    id = 7
    name = quant_type = "fp4"
    table = tables.FP4_CODE


def mean_absmax(view: TensorView, blocksize: int) -> float:
    """The mean of all blocks' absmax: summed in order in float64, divided, rounded once to float32."""
    total = 0.0
    step = _SCAN_BLOCKS * blocksize
    for start in range(0, view.numel, step):
        values = kernel_view((view.device_read or view.read)(start, min(start + step, view.numel)), view.dtype)
        absmax = np.empty(-(-len(values) // blocksize), np.float32)
        if not kernels_for(values).blockwise_absmax(values, absmax, blocksize=blocksize):
            return 0.0  # the quantizer will name the element
        with kernels.default_environment():
            total = float(np.cumsum(np.concatenate(([total], absmax.astype(np.float64))))[-1])
    with kernels.default_environment():
        return float(np.float32(total / -(-view.numel // blocksize)))


def unnest(state: QuantizedState) -> npt.NDArray[np.float32]:
    """The float32 absmax of a nested state, saturated, because near the largest float32 they may exceed it."""
    assert state.nested_absmax is not None
    assert state.offset is not None
    absmax = np.empty(state.absmax.size, np.float32)
    kernels.dequantize_int8(state.absmax, state.nested_absmax, absmax, blocksize=NESTED_BLOCKSIZE)
    with np.errstate(over="ignore"), kernels.default_environment():
        absmax += state.offset
        np.minimum(absmax, _LARGEST, out=absmax)
    return absmax


def _nested_head(blocks: int) -> int:
    """Bytes of the offset and the nested absmax."""
    return 4 + 4 * -(-blocks // NESTED_BLOCKSIZE)
