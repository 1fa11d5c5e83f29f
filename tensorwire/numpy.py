"""NumPy arrays to and from streams and `.tw` files.

Native dtypes come back as they were (big-endian ones in native order). bfloat16, float8 and float4 travel as
ml_dtypes arrays; where ml_dtypes is not installed they are received as their bits: an unsigned integer array whose
`dtype.metadata["tensorwire"]` names the type, which can be sent on.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes
from tensorwire.api import Api
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, UnsupportedError
from tensorwire.tensor import ByteArray, Front, TensorView, reader

_NATIVE: Final = {
    np.dtype(dtype.name): dtype for dtype in dtypes.ALL if dtype.name in np.sctypeDict and dtype.name != "complex32"
}
_BITS: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_METADATA: Final = "tensorwire"


class NumPyFront(Front):
    """`tensorwire.tensor.Front` for ndarrays and NumPy scalars."""

    read_only = True

    def view(self, value: object) -> TensorView | None:
        """An ndarray or NumPy scalar as a view."""
        if not isinstance(value, (np.ndarray, np.generic)):
            return None
        array = np.asarray(value)
        dtype = _dtype(array.dtype)
        if dtype is None:
            raise EncodeError(f"dtype {array.dtype} cannot be sent; convert with .astype() first")
        if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not _LITTLE):
            array = array.astype(array.dtype.newbyteorder("<"))
        identity = None
        if array.size and isinstance(value, np.ndarray):
            identity = (array.ctypes.data, array.shape, array.strides, dtype.number)
        return TensorView(dtype, array.shape, reader(array, dtype.itemsize), identity=identity)

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """An array over `data`."""
        try:
            return data.view(_numpy_dtype(dtype)).reshape(shape)
        except ValueError:  # NumPy 1 has 32 dimensions
            raise UnsupportedError(f"NumPy {np.__version__} has no arrays of {len(shape)} dimensions") from None

    def target(self, value: object) -> memoryview:
        """The bytes of a writable C-contiguous array."""
        if not isinstance(value, np.ndarray) or not value.flags.c_contiguous or not value.flags.writeable:
            raise EncodeError("into= takes writable C-contiguous arrays")
        if not value.dtype.isnative:
            raise EncodeError("into= takes arrays in native byte order")
        return value.reshape(-1).view(np.uint8).data


_LITTLE: Final = np.dtype("<u2").isnative


def _dtype(dtype: np.dtype[Any]) -> DType | None:
    if dtype.metadata and _METADATA in dtype.metadata:
        return dtypes.BY_NAME.get(dtype.metadata[_METADATA])
    native = _NATIVE.get(dtype.newbyteorder("="))
    if native is None and dtype.type.__module__.partition(".")[0] == "ml_dtypes":
        return dtypes.BY_NAME.get(dtype.name)
    return native


def _numpy_dtype(dtype: DType) -> np.dtype[Any]:
    native = np.dtype(dtype.name) if dtype in _NATIVE.values() else None
    if native is not None:
        return native
    try:
        import ml_dtypes

        foreign: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.name))
        return foreign
    except (ImportError, AttributeError):
        return np.dtype(_BITS[dtype.itemsize], metadata={_METADATA: dtype.name})


FRONT: Final = NumPyFront()
_api: Final = Api(FRONT)
encode = _api.encode
encode_async = _api.encode_async
encoded_size = _api.encoded_size
decode = _api.decode
decode_async = _api.decode_async
dumps = _api.dumps
loads = _api.loads
save_file = _api.save_file
load_file = _api.load_file
open_file = _api.open_file
schema = _api.schema
