"""raw: the elements' own little-endian bytes."""

from typing import Any

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs.floats import add_weighted
from tensorwire.codecs.stage import Encoded, Packer, Part, Sizes, Sums, Take
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent


class Raw(Packer):
    """Lossless, any dtype, no copy: the payload is the caller's memory."""

    id = 1
    name = "raw"
    lossless = True
    exact_length = True
    in_place = True

    def accepts(self, dtype: DType) -> bool:
        """Every dtype."""
        return True

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """The bytes of the elements."""
        return Sizes(count * dtype.itemsize)

    def parts(self, count: int, dtype: DType) -> tuple[Part, ...]:
        """The elements, complex ones as two numbers."""
        return (Part(count * dtype.itemsize, dtype.part_size),)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The given memory itself."""
        return Encoded(data)

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Copy the bytes, unless they are in place already. Raises FormatError for a bool that is neither 0 nor 1."""
        received = np.frombuffer(payload, np.uint8)
        if extent.dtype == dtypes.BOOL and received.size and received.max() > 1:
            raise FormatError("a bool is neither 0 nor 1")
        if _address(received) != _address(out):
            out[:] = received

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Straight from the elements."""
        add_weighted(payload, extent.dtype, sums, weight)
        return True


def _address(array: Any) -> int:
    """The address of an array; `.ctypes` would make three objects for it."""
    address: int = array.__array_interface__["data"][0]
    return address
