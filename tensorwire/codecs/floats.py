"""Float tensors as arrays: as kernels take them, and as NumPy can calculate with.

NumPy has no bfloat16. Kernels take it as uint16 bit patterns (`kernel_view`); arithmetic gets it widened to float32,
which is exact (`as_floats`), and rounds back to it (`from_floats`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError
from tensorwire.kernels.contract import Kernels
from tensorwire.tensor import TensorView

# How kernels see each float type that they take.
KERNEL_DTYPES: Final[Mapping[DType, type[np.generic]]] = MappingProxyType(
    {dtypes.FLOAT32: np.float32, dtypes.FLOAT16: np.float16, dtypes.BFLOAT16: np.uint16}
)
# The float types that can be calculated with, and the NumPy type of the arrays.
CALCULATED: Final[Mapping[DType, type[np.floating[Any]]]] = MappingProxyType(
    {
        dtypes.FLOAT16: np.float16,
        dtypes.BFLOAT16: np.float32,
        dtypes.FLOAT32: np.float32,
        dtypes.FLOAT64: np.float64,
    }
)
_SCAN: Final = 1 << 20  # elements looked at in one go when a whole tensor has to be seen before its first slice
_SCAN_BLOCK: Final = 4096


def is_float(dtype: DType) -> bool:
    """Whether `as_floats` and `from_floats` take this dtype: float16, bfloat16, float32, float64."""
    return dtype in CALCULATED


def as_floats(data: Any, dtype: DType) -> npt.NDArray[Any]:
    """The little-endian bytes of float elements as an array to calculate with.

    float16, float32 and float64 are seen as they stand, without a copy; bfloat16 is widened, exactly, to a new float32
    array. `data`: a C-contiguous buffer. Raises EncodeError for a dtype that is none of these.
    """
    _check_float(dtype)
    if dtype != dtypes.BFLOAT16:
        return np.frombuffer(data, CALCULATED[dtype])
    return widen(np.frombuffer(data, np.uint16))


def from_floats(values: npt.NDArray[Any], dtype: DType, out: npt.NDArray[np.uint8] | None = None) -> Any:
    """1-D floats rounded to nearest even to the elements of `dtype`: their bytes, a flat uint8 array.

    They are written to `out` if that is given, and come without a copy where `values` have the dtype already.
    float64 becomes bfloat16 by way of float32. Raises EncodeError for a dtype that `as_floats` does not take.
    """
    _check_float(dtype)
    if out is None:
        if dtype != dtypes.BFLOAT16:
            return np.ascontiguousarray(values, CALCULATED[dtype]).view(np.uint8)
        out = np.empty(values.size * dtype.itemsize, np.uint8)
    if dtype == dtypes.BFLOAT16:
        kernels.cast(np.ascontiguousarray(values, np.float32), out.view(np.uint16))
    else:
        out.view(CALCULATED[dtype])[:] = values
    return out


def _check_float(dtype: DType) -> None:
    if dtype not in CALCULATED:
        raise EncodeError(f"{dtype} is none of {', '.join(map(str, CALCULATED))}")


def on_device(data: Any) -> bool:
    """Whether a slice is a torch tensor on a device rather than host memory."""
    return hasattr(data, "is_cuda")


def kernel_view(data: Any, dtype: DType) -> Any:
    """A slice as the float array that kernels take: its bytes seen as one, or the device tensor that it is."""
    return data if on_device(data) else np.frombuffer(data, KERNEL_DTYPES[dtype])


def kernel_target(out: Any, dtype: DType) -> Any:
    """The memory of a decoded slice as the float array that kernels fill."""
    return out if on_device(out) else out.view(KERNEL_DTYPES[dtype])


def kernels_for(values: Any) -> Kernels:
    """The kernels for where a float array lives."""
    if on_device(values):  # pragma: no cover - tests/test_cuda.py, where there is a CUDA device
        from tensorwire.kernels import cuda

        return cuda
    return kernels


def widen(values: Any) -> npt.NDArray[np.float32]:
    """A float array as kernels take it, as float32 on the host, exactly."""
    if on_device(values):  # pragma: no cover - tests/test_cuda.py, where there is a CUDA device
        wide: npt.NDArray[np.float32] = values.float().cpu().numpy()
        return wide
    if values.dtype == np.float32:
        return np.asarray(values, np.float32)
    out = np.empty(values.size, np.float32)
    kernels.cast(np.ascontiguousarray(values), out)
    return out


def largest(view: TensorView) -> float:
    """max|x| over a whole float tensor, infinity where a NaN or an infinity is in it."""
    top = 0.0
    for start in range(0, view.numel, _SCAN):
        values = kernel_view((view.device_read or view.read)(start, min(start + _SCAN, view.numel)), view.dtype)
        absmax = np.empty(-(-len(values) // _SCAN_BLOCK), np.float32)
        if not kernels_for(values).blockwise_absmax(values, absmax, blocksize=_SCAN_BLOCK):
            return float("inf")
        top = max(top, float(absmax.max()))
    return top
