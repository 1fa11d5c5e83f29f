"""The codec contract.

A codec turns a slice of a tensor (a whole number of its blocks; the last slice of a tensor may end in a partial
block) into one payload and back. Slices are independent of one another. A codec is a small frozen value: its repr
is the spec string that rebuilds it, it keeps no state and never writes to its input.

Layout and arithmetic of every codec stand in docs/codecs.md; an id names one of them for ever.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tensorwire.codecs.floats import widen
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError, NonFiniteError
from tensorwire.tensor import Extent, TensorView

Take = Callable[[int], np.ndarray]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a payload: `data` (the elements themselves) and `metadata` (absmax, scales, offsets)."""

    data: int
    metadata: int = 0

    @property
    def total(self) -> int:
        return self.data + self.metadata


class Encoded(NamedTuple):
    """A payload, as one buffer, and its CRC-32C where that was taken while it was made."""

    payload: Any
    crc: int | None = None


@dataclass(frozen=True, repr=False)
class Codec(ABC):
    """One way to encode slices. Subclasses are frozen dataclasses whose fields are the spec's parameters."""

    id: ClassVar[int]
    name: ClassVar[str]
    # The payload is the tensor's own bytes: it can land in its destination and be mapped from a file.
    in_place: ClassVar[bool] = False
    # Slices of tensors on a CUDA device are encoded and decoded there.
    on_device: ClassVar[bool] = False

    @abstractmethod
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The codec as it stands in an item descriptor."""

    @abstractmethod
    def accepts(self, dtype: DType) -> bool:
        """Whether tensors of this dtype can be encoded; others travel losslessly."""

    def block(self, dtype: DType) -> int:
        """Elements that cannot be divided between slices."""
        return 1

    @abstractmethod
    def sizes(self, count: int, dtype: DType) -> Sizes:
        """Bytes that `count` elements take; for compressors, before compression."""

    def bound(self, count: int, dtype: DType) -> int:
        """The most bytes that a payload of `count` elements has."""
        return self.sizes(count, dtype).total

    def fit(self, budget: int, dtype: DType) -> int:
        """The most elements, a whole number of blocks, whose payload surely fits in `budget` bytes; maybe 0."""
        block = self.block(dtype)
        blocks = budget // self.sizes(block, dtype).total
        return blocks * block

    def check_length(self, length: int, extent: Extent) -> None:
        """Raise FormatError unless the payload of a slice can have `length` bytes."""
        expected = self.sizes(extent.count, extent.dtype).total
        if length != expected:
            raise FormatError(f"{self} payload of {extent.count} elements has {length} bytes, must have {expected}")

    def fallback(self, view: TensorView) -> bool:
        """Whether this tensor's values ask for a lossless codec instead, as the spec's policy says."""
        return False

    def prepare(self, view: TensorView) -> Any:
        """What must be known of the whole tensor before its first slice; handed to `encode` as `context`."""
        return None

    @abstractmethod
    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The payload of a slice.

        `data`: the slice's little-endian bytes, or with `on_device` maybe a 1-D device tensor; `take(n)`: a uint8
        array of n bytes to write into.
        Raises NonFiniteError with the offending element's index in the slice.
        """

    @abstractmethod
    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        """Write a slice's elements to `out`, a flat uint8 array of exactly their bytes, or with `on_device` maybe a
        1-D device tensor of them. `uncached`: as kernels take it.

        Raises FormatError for a payload that no encoder produces.
        """

    def __repr__(self) -> str:
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                given.append(f"{field.name}={str(value).lower()}")
        return self.name + (":" + ",".join(given) if given else "")


def refuse_nonfinite(values: Any, codec: Codec) -> None:
    """Raise NonFiniteError naming the first NaN or infinity."""
    wide = widen(values)
    index = int(np.flatnonzero(~np.isfinite(wide))[0])
    raise NonFiniteError(
        f"{wide[index]}, which {codec.name} cannot carry; use nonfinite=raw to send such items losslessly",
        index=index,
    )


def check_power_of_two(name: str, value: Any, low: int, high: int) -> None:
    """Raise EncodeError unless `value` is a power of two in [low, high]."""
    if type(value) is not int or not low <= value <= high or value & (value - 1):
        raise EncodeError(f"{name} must be a power of two from {low} to {high}, not {value!r}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise EncodeError unless `value` is one of `choices`."""
    if value not in choices:
        raise EncodeError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
