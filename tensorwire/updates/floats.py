"""The bytes of float tensors as arrays to calculate with, and back.

A floating-point dtype here is one that this room calculates with: 16, 32 and 64 bits and bfloat16.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels
from tensorwire.dtypes import DType

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

# The type that a dtype is calculated in. NumPy has no bfloat16.
ARITHMETIC: Final[dict[DType, type[np.floating[Any]]]] = {
    dtypes.FLOAT16: np.float16,
    dtypes.BFLOAT16: np.float32,
    dtypes.FLOAT32: np.float32,
    dtypes.FLOAT64: np.float64,
}
# The largest finite value of each.
LARGEST: Final = {
    dtypes.FLOAT16: 65504.0,
    dtypes.BFLOAT16: float.fromhex("0x1.fep127"),
    dtypes.FLOAT32: float(np.finfo(np.float32).max),
    dtypes.FLOAT64: float(np.finfo(np.float64).max),
}


def as_floats(data: Any, dtype: DType) -> Floats:
    """The elements in a buffer of little-endian bytes, without a copy; of bfloat16 a copy as float32."""
    if dtype != dtypes.BFLOAT16:
        return np.frombuffer(data, ARITHMETIC[dtype])
    bits = np.frombuffer(data, np.uint16)
    out = np.empty(bits.size, np.float32)
    kernels.cast(bits, out)
    return out


def as_bytes(values: Floats, dtype: DType) -> Bytes:
    """Elements of the type that `as_floats` gives as bytes, without a copy; bfloat16 rounds to nearest even."""
    if dtype != dtypes.BFLOAT16:
        return values.view(np.uint8)
    out = np.empty(values.size, np.uint16)
    kernels.cast(values, out)
    return out.view(np.uint8)


def round_into(values: npt.NDArray[np.float64], dtype: DType, out: Bytes) -> None:
    """Write float64 values to `out` as `dtype`, rounded to nearest even; to bfloat16 by way of float32."""
    if dtype == dtypes.BFLOAT16:
        kernels.cast(values.astype(np.float32), out.view(np.uint16))
    else:
        out.view(ARITHMETIC[dtype])[:] = values
