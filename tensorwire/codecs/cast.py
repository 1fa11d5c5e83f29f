"""fp16, bf16: float32 rounded to half the bytes, to nearest even (IEEE 754), subnormals and NaN kept."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs.floats import (
    KERNEL_DTYPES,
    add_weighted,
    kernel_target,
    kernel_view,
    kernels_for,
    largest,
    widen,
)
from tensorwire.codecs.stage import Choice, Encoded, Packer, Part, Sizes, Sums, Take, parameter
from tensorwire.dtypes import DType
from tensorwire.errors import NonFiniteError
from tensorwire.tensor import Extent, TensorView


@dataclass(frozen=True, repr=False)
class Cast(Packer):
    """What both casts share.

    `overflow`: what becomes of finite values beyond the narrow type: error, saturate (to its largest finite value) or
    raw (the whole tensor is sent losslessly). Infinities and NaN are values like any other.
    """

    overflow: str = parameter("error", Choice(("error", "saturate", "raw")))

    lossless = False
    exact_length = True
    on_device = True
    narrow: ClassVar[DType]
    # The smallest magnitude that rounds to infinity.
    limit: ClassVar[float]

    def accepts(self, dtype: DType) -> bool:
        """float32."""
        return dtype == dtypes.FLOAT32

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """Two bytes an element."""
        return Sizes(count * self.narrow.itemsize)

    def parts(self, count: int, dtype: DType) -> tuple[Part, ...]:
        """The narrow elements."""
        return (Part(count * self.narrow.itemsize, self.narrow.itemsize),)

    def fallback(self, view: TensorView) -> str:
        """With overflow=raw, where a value is too large."""
        return f"beyond {self.narrow}" if self.overflow == "raw" and largest(view) >= self.limit else ""

    def ceiling(self, dtype: DType) -> float:
        """Below what rounds to infinity, where that is an error."""
        return float(np.nextafter(np.float32(self.limit), np.float32(0))) if self.overflow == "error" else float("inf")

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """Each element rounded. Raises NonFiniteError for one that overflows, unless it is to saturate."""
        values = kernel_view(data, extent.dtype)
        payload = take(self.sizes(len(values), extent.dtype).total)
        narrow = payload.view(KERNEL_DTYPES[self.narrow])
        crc = np.empty(1, np.uint32)
        overflowed = kernels_for(values).cast(values, narrow, crc, saturate=self.overflow == "saturate")
        if overflowed and self.overflow == "error":
            values = widen(values)
            index = int(np.flatnonzero(np.isfinite(values) & (np.abs(values) >= np.float32(self.limit)))[0])
            raise NonFiniteError(
                f"{values[index]}, beyond {self.narrow}; "
                "use overflow=saturate, or overflow=raw to send such items losslessly",
                index=index,
            )
        return Encoded(payload, int(crc[0]))

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Each element widened, which is exact."""
        values = kernel_target(out, extent.dtype)
        kernels_for(values).cast(np.frombuffer(payload, KERNEL_DTYPES[self.narrow]), values, uncached=uncached)

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Straight from the narrow elements."""
        add_weighted(payload, self.narrow, sums, weight)
        return True


class Float16(Cast):
    """IEEE binary16."""

    id = 2
    name = "fp16"
    narrow = dtypes.FLOAT16
    limit = 65520.0


class BFloat16(Cast):
    """The upper half of a float32."""

    id = 3
    name = "bf16"
    narrow = dtypes.BFLOAT16
    limit = float(np.array(0x7F7F8000, np.uint32).view(np.float32))
