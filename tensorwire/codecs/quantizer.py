"""The common part of the quantizing packers: blocks of elements, each with its own scale.

Payload: the scales of all blocks, then the codes.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire.codecs.floats import KERNEL_DTYPES, largest, widen
from tensorwire.codecs.stage import Bytes, Choice, Packer, Part, Range, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, NonFiniteError
from tensorwire.tensor import TensorView


@dataclass(frozen=True, repr=False)
class Quantizer(Packer):
    """Blockwise quantization of float32, float16 and bfloat16.

    `nonfinite`: error, or raw to send a tensor with NaN or infinities losslessly, which costs one more pass over it.
    """

    blocksize: int = parameter(256, Range(16, 65536, power_of_two=True), wire=True)
    nonfinite: str = parameter("error", Choice(("error", "raw")))

    lossless = False
    exact_length = True
    on_device = True
    # Bytes of a scale.
    scale_size: ClassVar[int] = 4

    def accepts(self, dtype: DType) -> bool:
        """float32, float16, bfloat16."""
        return dtype in KERNEL_DTYPES

    def block(self, dtype: DType) -> int:
        """Elements that share a scale."""
        return self.blocksize

    def blocks(self, count: int) -> int:
        """The number of blocks in `count` elements; the last one may be partial."""
        return -(-count // self.blocksize)

    def parts(self, count: int, dtype: DType) -> tuple[Part, ...]:
        """The scales, then the codes."""
        sizes = self.sizes(count, dtype)
        return Part(sizes.metadata, self.scale_size), Part(sizes.data, 1)

    def fallback(self, view: TensorView) -> str:
        """A reason if nonfinite=raw and the tensor has a NaN or an infinity."""
        return "nonfinite" if self.nonfinite == "raw" and largest(view) == float("inf") else ""

    def refuse_nonfinite(self, values: Any) -> None:
        """Raise NonFiniteError naming the first NaN or infinity."""
        wide = widen(values)
        index = int(np.flatnonzero(~np.isfinite(wide))[0])
        raise NonFiniteError(
            f"{wide[index]}, which {self.name} cannot carry; use nonfinite=raw to send such items losslessly",
            index=index,
        )


class QuantizedState(NamedTuple):
    """A payload in the parts that bitsandbytes keeps: codes and absmax, which may be quantized themselves.

    `absmax`: float32, or with `nested_absmax` and `offset` the uint8 codes of double quantization.
    """

    codes: Bytes
    absmax: npt.NDArray[Any]
    nested_absmax: npt.NDArray[np.float32] | None = None
    offset: npt.NDArray[np.float32] | None = None

    @property
    def nested(self) -> bool:
        """Whether the absmax are quantized themselves."""
        return self.offset is not None

    def pack(self) -> Bytes:
        """The payload: offset and nested absmax if present, absmax, codes."""
        parts = (self.offset, self.nested_absmax, self.absmax, self.codes)
        return np.concatenate([part.view(np.uint8) for part in parts if part is not None])


class TableQuantizer(Quantizer):
    """bitsandbytes' types: a code's entry in a fixed table, times the block's float32 absmax."""

    # The float32 values of the codes.
    table: ClassVar[npt.NDArray[np.float32]]
    # bitsandbytes' name for it; its 8-bit type has none.
    quant_type: ClassVar[str | None]
    codes_per_byte: ClassVar[int]

    @property
    def tables(self) -> tuple[npt.NDArray[np.float32], ...]:
        """The table of the codes."""
        return (self.table,)

    @abstractmethod
    def state(self, payload: Any, count: int) -> QuantizedState:
        """The parts of a payload of `count` elements and the right length, without copies. Raises FormatError."""


def split(payload: Bytes, at: int) -> tuple[Bytes, Bytes]:
    """The two parts of a payload."""
    return payload[:at], payload[at:]


def checked_absmax(data: Bytes) -> npt.NDArray[np.float32]:
    """Received absmax bytes as float32. Raises FormatError for NaN, infinities and anything with its sign bit set."""
    bits = data.view(np.uint32)
    if bits.size and bits.max() >= 0x7F800000:
        raise FormatError("an absmax is negative, infinite or NaN")
    return data.view(np.float32)
