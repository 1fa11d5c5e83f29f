"""How tensors of any library look to the layers below the fronts.

A front turns a foreign tensor into a `TensorView` to be sent, wraps received bytes as a foreign tensor, and opens
a preallocated foreign tensor for writing. The layers in between see only these.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError

ByteArray = npt.NDArray[np.uint8]
# What a stream is made of: contiguous bytes, in the memory of whoever has them.
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor to be read: shape, dtype and a way to its elements in C order.

    `read(start, stop)` returns elements [start, stop) of the flattened tensor as a C-contiguous buffer of
    little-endian bytes: the caller's own memory where it is contiguous, else a copy of those elements only.
    `device_read`, where the tensor lives on a CUDA device, gives those elements as a 1-D tensor there.
    `identity` is equal for two tensors that are the same view of the same memory, None when unknown.
    """

    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[int, int], Buffer | ByteArray]
    device_read: Callable[[int, int], Any] | None = None
    identity: tuple[object, ...] | None = None

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return prod(self.shape)


class Extent(NamedTuple):
    """Elements [start, start + count) of a flattened tensor of this dtype and shape: what one slice holds."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs of it

    @classmethod
    def whole(cls, dtype: DType, shape: tuple[int, ...]) -> "Extent":
        """All of a tensor."""
        return cls(dtype, shape, 0, prod(shape))


def as_buffer(data: Buffer | ByteArray) -> Buffer:
    """What `TensorView.read` gave as one type: an array as its memory. For type checkers; an array is a buffer, too."""
    return data.data if isinstance(data, np.ndarray) else data


def reader(array: npt.NDArray[Any], itemsize: int) -> Callable[[int, int], ByteArray]:
    """`TensorView.read` over a NumPy array of any layout; only a slice is ever copied."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        return lambda start, stop: flat[start * itemsize : stop * itemsize]
    return lambda start, stop: array.flat[start:stop].view(np.uint8)


class Front(ABC):
    """One foreign tensor library."""

    read_only: bool = False
    """Whether it has tensors that cannot be written to: `wrap` then takes bytes that cannot, too."""

    @abstractmethod
    def view(self, value: object) -> TensorView | None:
        """`value` as a view, or None when it is not a tensor of this library.

        Raises EncodeError for a tensor that cannot travel, with the remedy.
        """

    @abstractmethod
    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor over `data`, writable flat bytes that it takes over without a copy."""

    def on(self, device: Any) -> "Front":
        """The same, but that its tensors come on `device`; None: where they are made. Raises EncodeError."""
        if device is not None:
            raise EncodeError("device= is for torch tensors, which tensorwire.torch gives")
        return self

    @abstractmethod
    def target(self, value: object) -> memoryview:
        """The writable bytes of a preallocated contiguous tensor, flat. Raises EncodeError otherwise."""

    def device_target(self, value: object) -> Any:
        """A preallocated contiguous tensor on a CUDA device as a 1-D view of it; None when `value` is on the host."""
        return None


class ViewFront(Front):
    """Sends tensors that are views already: of a file, or computed as they are read. It receives none."""

    def view(self, value: object) -> TensorView | None:
        """`value` itself if it is a view."""
        return value if isinstance(value, TensorView) else None

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Any:
        """Raise EncodeError."""
        raise EncodeError("views can be sent only; receive with another front")

    def target(self, value: object) -> memoryview:
        """Raise EncodeError."""
        raise EncodeError("views can be sent only; receive with another front")
