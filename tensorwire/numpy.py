"""NumPy arrays to and from streams and `.tw` files.

Native dtypes come back as they were (big-endian ones in native order); bfloat16, float8 and complex32 come back as
ml_dtypes arrays. float4_e2m1fn_x2, which ml_dtypes lacks, is received as bits: a void array, which cannot be mistaken
for numbers. Its `dtype.metadata["tensorwire"]` names the type, and it can be sent again. torch tensors can be sent too
and come back as arrays.
"""

import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes
from tensorwire.api import Api
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, UnsupportedError
from tensorwire.memory.strided import reader
from tensorwire.tensor import AnyFront, ByteArray, Front, TensorView, attributes

_NATIVE: Final = {
    np.dtype(dtype.name): dtype for dtype in dtypes.ALL if dtype.name in np.sctypeDict and dtype.name != "complex32"
}
# Types of the same width, used for raw bits.
_BITS: Final = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}
_METADATA: Final = "tensorwire"
# Types that carry nothing but their memory (a matrix, except for how it multiplies).
_WHOLE: Final = (np.ndarray, np.memmap, np.matrix)

Array = npt.NDArray[Any]


class NumPyFront(Front):
    """`tensorwire.tensor.Front` for ndarrays and NumPy scalars."""

    read_only = True

    def view(self, value: object) -> TensorView | None:
        """An ndarray or NumPy scalar as a view."""
        if not isinstance(value, (np.ndarray, np.generic)):
            return None
        dtype = _dtype(value.dtype)
        if dtype is None:
            raise EncodeError(f"dtype {value.dtype} cannot be sent; convert it with .astype() first")
        if isinstance(value, np.ndarray):
            if type(value) not in _WHOLE:
                _check_subclass(value)
            if value.base is not None and value.size:
                _check_memory(value)
        array = np.asarray(value)
        swapped = array.dtype.byteorder == ">"
        identity = None
        if array.size and isinstance(value, np.ndarray):
            identity = ("cpu", _address(array), array.shape, array.strides, dtype.number, swapped, False)
        bits = array if not swapped and array.flags.c_contiguous else array.view(_BITS[dtype.itemsize])
        read = reader(bits, _swap(array.dtype) if swapped else None)
        return TensorView(dtype, array.shape, read, identity=identity)

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Array:
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
        self.view(value)  # refuses an array that extends beyond its memory
        return np.asarray(value).reshape(-1).view(np.uint8).data


def _dtype(dtype: np.dtype[Any]) -> DType | None:
    if dtype.metadata and _METADATA in dtype.metadata:
        return dtypes.BY_NAME.get(dtype.metadata[_METADATA])
    native = _NATIVE.get(dtype if dtype.isnative else dtype.newbyteorder("="))
    if native is None and dtype.type.__module__.partition(".")[0] == "ml_dtypes":
        return dtypes.BY_NAME.get(dtype.name)
    return native


def _numpy_dtype(dtype: DType) -> np.dtype[Any]:
    native = np.dtype(dtype.name) if dtype in _NATIVE.values() else None
    if native is not None:
        return native
    import ml_dtypes

    if hasattr(ml_dtypes, dtype.name):
        foreign: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.name))
        return foreign
    return np.dtype(f"V{dtype.itemsize}", metadata={_METADATA: dtype.name})


def _swap(dtype: np.dtype[Any]) -> Any:
    """A function that swaps big-endian elements, as bits, to little-endian; for complex dtypes, each half by itself."""
    part = f"u{dtype.itemsize // 2 if dtype.kind == 'c' else dtype.itemsize}"
    return lambda bits: bits.view(part).byteswap(inplace=True)


def _check_subclass(array: Array) -> None:
    """Raise EncodeError for an array whose subclass carries more than its memory."""
    if extra := attributes(array):
        raise EncodeError(
            f"a {type(array).__module__}.{type(array).__qualname__} carries more than its memory "
            f"({', '.join(extra)}), which would be lost; send its parts (for a MaskedArray, .filled(), or .data and "
            ".mask), or numpy.asarray() of it for its memory alone"
        )


def _check_memory(array: Array) -> None:
    """Raise EncodeError for an array that extends beyond the memory of its owner, where the owner is known."""
    owner: Any = array
    while (base := owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)) is not None:
        owner = base
    begin, end = _span(array)
    if isinstance(owner, np.ndarray):
        low, high = _span(owner) if owner.size else (0, 0)
    elif isinstance(owner, (bytes, bytearray, mmap.mmap)):
        memory = np.frombuffer(owner, np.uint8)
        low = _address(memory)
        high = low + memory.size
        if isinstance(owner, mmap.mmap):
            high = min(high, low + owner.size() - _offset(array))
    else:
        return
    if begin < low or end > high:
        raise EncodeError("the array extends outside the memory that it was made over, or its file was truncated")


def _span(array: Array) -> tuple[int, int]:
    """The addresses at which the memory of a non-empty array begins and ends."""
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    address = _address(array)
    return (
        address + sum(step for step in steps if step < 0),
        address + sum(step for step in steps if step > 0) + array.itemsize,
    )


def _offset(array: Array) -> int:
    """The file offset at which the mapping of a memmap begins; 0 for other arrays, which do not tell."""
    offset = array.offset if isinstance(array, np.memmap) else 0
    return int(offset - offset % mmap.ALLOCATIONGRANULARITY)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


FRONT: Final = NumPyFront()
_api: Final = Api(AnyFront(FRONT))
encode = _api.encode
encode_async = _api.encode_async
encoded_size = _api.encoded_size
decode = _api.decode
decode_async = _api.decode_async
decoder = _api.decoder
dumps = _api.dumps
loads = _api.loads
save_file = _api.save_file
load_file = _api.load_file
open_file = _api.open_file
schema = _api.schema
digest = _api.digest
apply = _api.apply
