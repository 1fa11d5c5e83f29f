"""nf4, fp4: bitsandbytes' 4-bit types (Dettmers et al., arXiv:2305.14314), two elements a byte.

Payload: float32 absmax of all blocks, then the packed codes. With `double_quant` (bitsandbytes'
compress_statistics) the absmax are themselves stored in 8 bits: a float32 offset, which is the mean absmax of the
whole tensor, float32 absmax per 256 differences from it, the differences as dynamic int8 codes, then the elements.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from tensorwire import kernels
from tensorwire.codecs.base import Encoded, Sizes, Take, check_choice, refuse_nonfinite
from tensorwire.codecs.floats import kernel_target, kernel_view, kernels_for
from tensorwire.codecs.int8 import Quantizer, checked_absmax, split
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.kernels import tables
from tensorwire.tensor import Extent, TensorView

NESTED_BLOCKSIZE: Final = 256
_NEST_BLOCKS: Final = 8192  # blocks quantized in one go where their absmax are quantized in turn
_SCAN_BLOCKS: Final = 4096  # blocks looked at in one go for their mean absmax


@dataclass(frozen=True, repr=False)
class FourBit(Quantizer):
    """The part that both 4-bit types share."""

    blocksize: int = 64
    double_quant: bool = False

    smallest = 32
    biggest = 4096
    quant_type: ClassVar[str]
    # The 16 float32 values of the codes.
    table: ClassVar[np.ndarray]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("double_quant", self.double_quant, (False, True))

    def stages(self) -> tuple[tuple[int, ...], ...]:
        return ((self.id, self.blocksize, int(self.double_quant)),)

    def block(self, dtype: DType) -> int:
        return self.blocksize * NESTED_BLOCKSIZE if self.double_quant else self.blocksize

    def sizes(self, count: int, dtype: DType) -> Sizes:
        blocks = self.blocks(count)
        metadata = 4 + 4 * -(-blocks // NESTED_BLOCKSIZE) + blocks if self.double_quant else 4 * blocks
        return Sizes((count + 1) // 2, metadata)

    def prepare(self, view: TensorView) -> np.float32 | None:
        return mean_absmax(view, self.blocksize) if self.double_quant and view.numel else None

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        values = kernel_view(data, extent.dtype)
        sizes = self.sizes(len(values), extent.dtype)
        payload = take(sizes.total)
        metadata, codes = split(payload, sizes.metadata)
        crc = None if self.double_quant else np.empty(1, np.uint32)
        if self.double_quant:
            finite = self._encode_nested(values, codes, metadata, context)
        else:
            finite = self._quantize(values, codes, metadata.view(np.float32), crc)
        if not finite:
            refuse_nonfinite(values, self)
        return Encoded(payload, None if crc is None else int(crc[0]))

    def _quantize(self, values: Any, codes: np.ndarray, absmax: np.ndarray, crc: np.ndarray | None = None) -> bool:
        return kernels_for(values).quantize_4bit(
            values, codes, absmax, crc, blocksize=self.blocksize, quant_type=self.quant_type
        )

    def _encode_nested(self, values: Any, codes: np.ndarray, metadata: np.ndarray, offset: np.float32) -> bool:
        """In pieces: no memory is needed beside the payload but for the absmax of one of them."""
        head, nested_codes = split(metadata, 4 + 4 * -(-self.blocks(len(values)) // NESTED_BLOCKSIZE))
        head = head.view(np.float32)
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

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        values = kernel_target(out, extent.dtype)
        metadata, codes = self.parts(payload, len(values), extent.dtype)
        absmax = unnest(metadata, self.blocks(len(values))) if self.double_quant else checked_absmax(metadata)
        kernels_for(values).dequantize_4bit(
            codes, absmax, values, blocksize=self.blocksize, quant_type=self.quant_type, uncached=uncached
        )

    def parts(self, payload: memoryview, count: int, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
        """Metadata and codes of a received payload of the right length. Raises FormatError."""
        metadata, codes = split(np.frombuffer(payload, np.uint8), self.sizes(count, dtype).metadata)
        if count % 2 and codes[-1] & 0x0F:
            raise FormatError("the unused half of the last byte is not zero")
        return metadata, codes


@dataclass(frozen=True, repr=False)
class NF4(FourBit):
    """4-bit NormalFloat: 16 levels at the quantiles of a normal distribution."""

    id = 6
    name = quant_type = "nf4"
    table = tables.NF4_CODE


@dataclass(frozen=True, repr=False)
class FP4(FourBit):
    """4-bit float, as bitsandbytes' CUDA code rounds it."""

    id = 7
    name = quant_type = "fp4"
    table = tables.FP4_CODE


def mean_absmax(view: TensorView, blocksize: int) -> np.float32:
    """The mean of all blocks' absmax: summed in order in float64, divided, rounded once to float32."""
    total = np.float64(0)
    step = _SCAN_BLOCKS * blocksize
    for start in range(0, view.numel, step):
        values = kernel_view((view.device_read or view.read)(start, min(start + step, view.numel)), view.dtype)
        absmax = np.empty(-(-len(values) // blocksize), np.float32)
        if not kernels_for(values).blockwise_absmax(values, absmax, blocksize=blocksize):
            return np.float32(0)  # the quantizer will name the element
        total = np.cumsum(np.concatenate(([total], absmax.astype(np.float64))))[-1]
    return np.float32(total / -(-view.numel // blocksize))


def unnest(metadata: np.ndarray, blocks: int) -> np.ndarray:
    """The float32 absmax of `blocks` blocks that double quantization stands for. Raises FormatError."""
    head, codes = split(metadata, 4 + 4 * -(-blocks // NESTED_BLOCKSIZE))
    nested = checked_absmax(head)
    absmax = np.empty(blocks, np.float32)
    kernels.dequantize_int8(codes, nested[1:], absmax, blocksize=NESTED_BLOCKSIZE)
    with np.errstate(over="ignore"):
        absmax += nested[0]
    if not np.isfinite(absmax).all():
        raise FormatError("a double-quantized absmax is infinite")
    return absmax
