"""How tensors of any library look to the layers below the fronts.

A front turns a foreign tensor into a `TensorView` to be sent, wraps received bytes as a foreign tensor, and opens
a preallocated foreign tensor for writing. The layers in between see only these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

from tensorwire.dtypes import DType


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
    read: Callable[[int, int], Any]
    device_read: Callable[[int, int], Any] | None = None
    identity: tuple | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Extent(NamedTuple):
    """Elements [start, start + count) of a flattened tensor of this dtype and shape: what one slice holds."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    count: int

    @classmethod
    def whole(cls, dtype: DType, shape: tuple[int, ...]) -> "Extent":
        """All of a tensor."""
        return cls(dtype, shape, 0, prod(shape))


def reader(array: Any, itemsize: int) -> Callable[[int, int], Any]:
    """`TensorView.read` over a NumPy array of any layout; only a slice is ever copied."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view("u1")
        return lambda start, stop: flat[start * itemsize : stop * itemsize]
    return lambda start, stop: array.flat[start:stop].view("u1")


class Front(Protocol):
    """One foreign tensor library."""

    def view(self, value: object) -> TensorView | None:
        """`value` as a view, or None when it is not a tensor of this library.

        Raises EncodeError for a tensor that cannot travel, with the remedy.
        """

    def wrap(self, data: Any, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor over `data`, a writable flat uint8 array that it takes over without a copy."""

    def target(self, value: object) -> memoryview:
        """The writable bytes of a preallocated contiguous tensor, flat. Raises EncodeError otherwise."""

    def device_target(self, value: object) -> Any:
        """A preallocated contiguous tensor on a CUDA device as a 1-D view of it; None when `value` is on the host."""


class ViewFront:
    """The `Front` of tensors that are views already: for reading and describing, not for receiving."""

    def view(self, value: object) -> TensorView | None:
        return value if isinstance(value, TensorView) else None

    def wrap(self, data: Any, dtype: DType, shape: tuple[int, ...]) -> Any:
        raise NotImplementedError("a view holds no memory to receive into")

    def target(self, value: object) -> memoryview:
        raise NotImplementedError("a view holds no memory to receive into")

    def device_target(self, value: object) -> None:
        return None
