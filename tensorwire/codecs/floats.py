"""Float tensors as arrays: as kernels take them, and as NumPy can calculate with.

NumPy has no bfloat16. Kernels take it as uint16 bit patterns (`kernel_view`); arithmetic gets it, and floats of eight
bits, widened to float32, which is exact (`as_floats`), and rounds back to them (`from_floats`).
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

# The NumPy dtype in which kernels take each float type.
KERNEL_DTYPES: Final[Mapping[DType, type[np.generic]]] = MappingProxyType(
    {dtypes.FLOAT32: np.float32, dtypes.FLOAT16: np.float16, dtypes.BFLOAT16: np.uint16}
)
_EIGHT_BITS: Final = (dtypes.FLOAT8_E4M3FN, dtypes.FLOAT8_E5M2, dtypes.FLOAT8_E4M3FNUZ, dtypes.FLOAT8_E5M2FNUZ)
# The types that support arithmetic, and the NumPy dtype for it; for complex ones, that of their two parts.
CALCULATED: Final[Mapping[DType, type[np.floating[Any]]]] = MappingProxyType(
    {
        dtypes.FLOAT16: np.float16,
        dtypes.BFLOAT16: np.float32,
        dtypes.FLOAT32: np.float32,
        dtypes.FLOAT64: np.float64,
        dtypes.COMPLEX32: np.float16,
        dtypes.COMPLEX64: np.float32,
        dtypes.COMPLEX128: np.float64,
        **dict.fromkeys(_EIGHT_BITS, np.float32),
    }
)
_SCAN: Final = 1 << 20  # elements per step when a whole tensor must be scanned before its first slice
_SCAN_BLOCK: Final = 4096


def is_float(dtype: DType) -> bool:
    """Whether it is a real float that is at least two bytes wide: float16, bfloat16, float32, float64."""
    return dtype in (dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.FLOAT64)


def is_calculated(dtype: DType) -> bool:
    """Whether `as_floats` and `from_floats` take this dtype: all but integers, bools and float8_e8m0fnu, float4."""
    return dtype in CALCULATED


def as_floats(data: Any, dtype: DType) -> npt.NDArray[Any]:
    """The little-endian bytes of float elements as an array for arithmetic.

    float16, float32 and float64 are viewed without a copy; bfloat16 and floats of eight bits are widened exactly to a
    new float32 array. A complex element gives two floats, the real part first. `data`: a C-contiguous buffer. Raises
    EncodeError for a dtype for which `is_calculated` is False.
    """
    _check_calculated(dtype)
    if dtype == dtypes.BFLOAT16:
        return widen(np.frombuffer(data, np.uint16))
    if dtype in _EIGHT_BITS:
        wide: npt.NDArray[np.float32] = np.frombuffer(data, _foreign(dtype)).astype(np.float32)
        return wide
    return np.frombuffer(data, CALCULATED[dtype])


def from_floats(values: npt.NDArray[Any], dtype: DType, out: npt.NDArray[np.uint8] | None = None) -> Any:
    """1-D floats rounded to nearest even to the elements of `dtype`: their bytes, a flat uint8 array.

    They are written to `out` if given; without it, nothing is copied if `values` have the dtype already. float64
    becomes bfloat16 by way of float32. For complex elements, `values` has both parts, as from `as_floats`. Raises
    EncodeError for a dtype that `as_floats` does not take.
    """
    _check_calculated(dtype)
    if dtype == dtypes.BFLOAT16:
        out = np.empty(2 * values.size, np.uint8) if out is None else out
        kernels.cast(np.ascontiguousarray(values, np.float32), out.view(np.uint16))
        return out
    target = _foreign(dtype) if dtype in _EIGHT_BITS else CALCULATED[dtype]
    if out is None:
        return np.ascontiguousarray(values, target).view(np.uint8)
    out.view(target)[:] = values
    return out


def add_weighted(data: Any, dtype: DType, sums: npt.NDArray[np.float64], weight: float) -> None:
    """Add `weight` times each float, as `as_floats` gives them, to `sums`: one rounding each for product and sum."""
    if dtype in KERNEL_DTYPES:
        kernels.accumulate(np.frombuffer(data, KERNEL_DTYPES[dtype]), sums, weight=weight)
    else:
        with kernels.default_environment():
            sums += weight * as_floats(data, dtype).astype(np.float64)


def _check_calculated(dtype: DType) -> None:
    if dtype not in CALCULATED:
        raise EncodeError(f"{dtype} is none of {', '.join(map(str, CALCULATED))}")


def _foreign(dtype: DType) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, dtype.name)


def on_device(data: Any) -> bool:
    """Whether a slice is a torch tensor on a device rather than host memory."""
    return hasattr(data, "is_cuda")


def kernel_view(data: Any, dtype: DType) -> Any:
    """A slice as the float array that kernels take: a view of its bytes, or the device tensor itself."""
    return data if on_device(data) else np.frombuffer(data, KERNEL_DTYPES[dtype])


def kernel_target(out: Any, dtype: DType) -> Any:
    """The memory of a decoded slice as the float array that kernels fill."""
    return out if on_device(out) else out.view(KERNEL_DTYPES[dtype])


def kernels_for(values: Any) -> Kernels:
    """The kernels for a float array on the host, or on its device."""
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
    """max|x| over a whole float tensor; infinity if it has a NaN or an infinity."""
    top = 0.0
    for start in range(0, view.numel, _SCAN):
        values = kernel_view((view.device_read or view.read)(start, min(start + _SCAN, view.numel)), view.dtype)
        top = max(top, largest_of(values))
        if top == np.inf:
            break
    return top


def largest_of(values: Any) -> float:
    """max|x| over a float array as kernels take it; infinity if it has a NaN or an infinity."""
    absmax = np.empty(-(-len(values) // _SCAN_BLOCK), np.float32)
    finite = kernels_for(values).blockwise_absmax(values, absmax, blocksize=_SCAN_BLOCK)
    return float(absmax.max(initial=0)) if finite else float("inf")
