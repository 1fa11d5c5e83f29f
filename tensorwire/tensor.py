"""Tensors of any library, as the layers below the fronts see them.

A front turns a foreign tensor into a `TensorView` for sending, wraps received bytes as a foreign tensor, and opens
a preallocated foreign tensor for writing. Other layers see only these.
"""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError

ByteArray = npt.NDArray[np.uint8]
# What a stream is made of: contiguous bytes, in the memory of whoever has them.
Buffer = bytes | bytearray | memoryview
# The front of each library, loaded once there are tensors of it.
_FRONTS: Final = {"numpy": "tensorwire.numpy", "torch": "tensorwire.torch"}


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor that can be read: shape, dtype and access to its elements in C order.

    `read(start, stop)` returns elements [start, stop) of the flattened tensor as a C-contiguous buffer of
    little-endian bytes: the caller's own memory if it is contiguous, else a copy of those elements only.
    `device_read`, for a tensor on a CUDA device, returns those elements as a 1-D tensor there.
    `identity` is equal for two tensors that are the same view of the same memory, None if unknown.
    `codec`, for elements that exist only in encoded form: `read` returns the payload that this codec (a
    `tensorwire.codecs.Readymade`) passes on unchanged.
    """

    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[int, int], Buffer | ByteArray]
    device_read: Callable[[int, int], Any] | None = None
    identity: tuple[object, ...] | None = None
    codec: Any = None

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return prod(self.shape)


class Extent(NamedTuple):
    """Elements [start, start + count) of a flattened tensor of this dtype and shape: the extent of one slice."""

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


def attributes(value: object) -> list[str]:
    """The names of what a tensor of a subclass carries beside its memory."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return [*getattr(value, "__dict__", ()), *slots]


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


class Front(ABC):
    """One foreign tensor library."""

    read_only: bool = False
    """Whether it has tensors that cannot be written to: `wrap` then takes bytes that cannot, too."""

    @abstractmethod
    def view(self, value: object) -> TensorView | None:
        """`value` as a view, or None when it is not a tensor of this library.

        Raises EncodeError, with the remedy, for a tensor that cannot be sent: one that reaches outside its memory, or
        carries more than its memory.
        """

    def describe(self, value: object) -> TensorView | None:
        """As `view`, also of a tensor without values, like torch's on the meta device: only its description is used."""
        return self.view(value)

    @abstractmethod
    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor over `data`, writable flat bytes that it takes over without a copy."""

    def on(self, device: Any) -> "Front":
        """The same front, with received tensors on `device`; None: where they are made. Raises EncodeError."""
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
    """Sends tensors that are already views: of a file, or computed as they are read. It cannot receive."""

    def view(self, value: object) -> TensorView | None:
        """`value` itself if it is a view."""
        return value if isinstance(value, TensorView) else None

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Any:
        """Raise EncodeError."""
        raise EncodeError("views can be sent only; receive with another front")

    def target(self, value: object) -> memoryview:
        """Raise EncodeError."""
        raise EncodeError("views can be sent only; receive with another front")


class AnyFront(Front):
    """Sends tensors of every loaded library and of `front`; receives tensors of `front`."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.read_only = front.read_only

    def on(self, device: Any) -> Front:
        """The same front, with received tensors on `device`."""
        return self if device is None else AnyFront(self._front.on(device))

    def view(self, value: object) -> TensorView | None:
        """A tensor of any library as a view."""
        view = self._front.view(value)  # which it is nearly always
        if view is not None:
            return view
        return next((view for front in self._fronts() if (view := front.view(value)) is not None), None)

    def describe(self, value: object) -> TensorView | None:
        """As `view`, also of a tensor without values."""
        return next((view for front in self._fronts() if (view := front.describe(value)) is not None), None)

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor of the library of `front`."""
        return self._front.wrap(data, dtype, shape)

    def target(self, value: object) -> memoryview:
        """The bytes of a preallocated tensor of any library."""
        return self._owner(value).target(value)

    def device_target(self, value: object) -> Any:
        """A preallocated tensor of any library on a CUDA device."""
        return self._owner(value).device_target(value)

    def _owner(self, value: object) -> Front:
        return next((front for front in self._fronts() if front.view(value) is not None), self._front)

    def _fronts(self) -> Iterator[Front]:
        yield self._front
        for library, module in _FRONTS.items():
            if library in sys.modules:  # else nobody has a tensor of it
                front: Front = importlib.import_module(module).FRONT
                if front is not self._front:
                    yield front
