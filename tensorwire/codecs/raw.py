"""raw: the elements' own little-endian bytes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs.base import Codec, Encoded, Sizes, Take
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent


@dataclass(frozen=True, repr=False)
class Raw(Codec):
    """Lossless, any dtype, no copy: the payload is the caller's memory."""

    id = 1
    name = "raw"
    in_place = True

    def stages(self) -> tuple[tuple[int, ...], ...]:
        return ((self.id,),)

    def accepts(self, dtype: DType) -> bool:
        return True

    def sizes(self, count: int, dtype: DType) -> Sizes:
        return Sizes(count * dtype.itemsize)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        return Encoded(data)

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        received = np.frombuffer(payload, np.uint8)
        if extent.dtype == dtypes.BOOL and received.size and received.max() > 1:
            raise FormatError("a bool is neither 0 nor 1")
        if received.ctypes.data != out.ctypes.data:
            out[:] = received
