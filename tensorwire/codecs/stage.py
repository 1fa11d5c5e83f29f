"""The contract of stages, of which codecs are made.

A codec is a sequence of stages: any number of transforms (array -> array), one packer (array -> bytes), any number of
compressors (bytes -> bytes). Each gets a slice of a tensor (a whole number of its blocks; the last slice may end in a
partial block) with its extent: dtype, the tensor's shape and the slice's place in it. Slices are independent of one
another.

A stage is a small frozen dataclass (a subclass without fields of its own needs no decorator). Its fields, made by
`parameter`, are the parameters in spec strings; those marked `wire` are also in the item's descriptor. It keeps no
state and never writes to its input. Its class is a row of the registry: `id`, `name`, kind (the base class),
parameters, `lossless`, `exact_length`. docs/codecs.md defines the layout and arithmetic of every stage of this library;
an id never changes its meaning.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError
from tensorwire.tensor import Extent, TensorView

Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.float64]
Take = Callable[[int], Bytes]
Value = int | float | bool | str
Row = TypeVar("Row", bound="Stage")


class Range(NamedTuple):
    """Integers from `low` to `high`, both included, or only the powers of two among them."""

    low: int
    high: int
    power_of_two: bool = False

    def allows(self, value: object) -> bool:
        """Whether a parameter may have this value."""
        return (
            type(value) is int
            and self.low <= value <= self.high
            and not (self.power_of_two and (value <= 0 or value & (value - 1)))
        )

    def __str__(self) -> str:
        return f"{'a power of two ' if self.power_of_two else ''}from {self.low} to {self.high}"

    def to_wire(self, value: Any) -> int:
        """The number for a value in a descriptor: the value itself."""
        return int(value)

    def from_wire(self, number: int) -> Value:
        """The value that a number in a descriptor stands for."""
        return number


class Real(NamedTuple):
    """Numbers from `low` to `high`, both included. Allowed in specs, but not in descriptors."""

    low: float
    high: float

    def allows(self, value: object) -> bool:
        """Whether a parameter may have this value."""
        return isinstance(value, (int, float)) and type(value) is not bool and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def to_wire(self, value: Any) -> int:
        """Raise EncodeError: a descriptor holds only integers."""
        raise EncodeError(f"{value!r} cannot be stored in a descriptor, which holds integers only")

    def from_wire(self, number: int) -> Value:
        """The number itself, to be checked by `allows`."""
        return number


class Choice(NamedTuple):
    """One of a few values; on the wire, its index among them."""

    values: tuple[bool | str, ...]

    def allows(self, value: object) -> bool:
        """Whether a parameter may have this value."""
        return any(value is known or (type(value) is str and value == known) for known in self.values)

    def __str__(self) -> str:
        *others, last = map(spell, self.values)
        return f"{', '.join(others)} or {last}" if others else last

    def to_wire(self, value: Any) -> int:
        """The number that stands for a value in a descriptor."""
        return self.values.index(value)

    def from_wire(self, number: int) -> Value:
        """The value that a number in a descriptor stands for; a number without one is returned as it is."""
        return self.values[number] if number < len(self.values) else number


class Parameter(NamedTuple):
    """One parameter of a stage. `wire`: whether readers need it, so that it is in descriptors."""

    name: str
    default: Value
    legal: Range | Choice | Real
    wire: bool


def parameter(default: Value, legal: Range | Choice | Real, *, wire: bool = False) -> Any:
    """A field of a stage: its default, the values it may have, and whether it is in descriptors."""
    return field(default=default, metadata={"default": default, "legal": legal, "wire": wire})


def spell(value: Value) -> str:
    """A value as it is written in a spec string."""
    return str(value).lower() if type(value) is bool else str(value)


class Sizes(NamedTuple):
    """Bytes of a payload: `data` (the elements themselves) and `metadata` (absmax, scales, offsets)."""

    data: int
    metadata: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.data + self.metadata


class Part(NamedTuple):
    """Numbers in a payload: the bytes of all of them, and of each: 1, 2, 4 or 8."""

    size: int
    width: int


class Encoded(NamedTuple):
    """A payload, as one buffer, and its CRC-32C if that was computed while it was made."""

    payload: Any
    crc: int | None = None


@dataclass(frozen=True, repr=False)
class Spelled:
    """A name with parameters. The repr is the spec string that rebuilds it."""

    # In spec strings.
    name: ClassVar[str]

    def __post_init__(self) -> None:
        for known in self.parameters():
            value = getattr(self, known.name)
            if not known.legal.allows(value):
                raise EncodeError(f"{known.name} of {self.name} must be {known.legal}, not {value!r}")

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """The parameters, in the order in which a stage's descriptor has them."""
        for row in fields(cls):
            if not row.metadata:
                raise EncodeError(f"{row.name} of {cls.__qualname__} must be made by parameter(...)")
        return tuple(Parameter(row.name, **row.metadata) for row in fields(cls))

    def __repr__(self) -> str:
        given = [
            f"{known.name}={spell(getattr(self, known.name))}"
            for known in self.parameters()
            if getattr(self, known.name) != known.default
        ]
        return self.name + (":" + ",".join(given) if given else "")


@dataclass(frozen=True, repr=False)
class Stage(Spelled, ABC):
    """The base of transforms, packers and compressors. The repr is the spec string that rebuilds the stage."""

    # On the wire: up to 32767 of this library's, from there to 65535 private (see `tensorwire.codecs.register`).
    id: ClassVar[int]
    # Input and output, for people.
    kind: ClassVar[str]
    # Whether decoding gives back what was encoded, bit for bit.
    lossless: ClassVar[bool]
    # Whether the length of the output follows from that of the input; otherwise only an upper bound does.
    exact_length: ClassVar[bool]

    def values(self) -> dict[str, Value]:
        """The value of each parameter."""
        return {known.name: getattr(self, known.name) for known in self.parameters()}

    def to_wire(self) -> tuple[int, ...]:
        """The stage in a descriptor: its id, then the parameters that a reader needs."""
        wire = (known for known in self.parameters() if known.wire)
        return (self.id, *(known.legal.to_wire(getattr(self, known.name)) for known in wire))

    @classmethod
    def from_wire(cls: type[Row], numbers: tuple[int, ...]) -> Row:
        """The stage described by the numbers after its id. Raises FormatError."""
        wire = [known for known in cls.parameters() if known.wire]
        if len(numbers) != len(wire):
            raise FormatError(f"codec {cls.name} takes {len(wire)} parameters, not {len(numbers)}")
        try:
            return cls(**{known.name: known.legal.from_wire(n) for known, n in zip(wire, numbers, strict=True)})
        except EncodeError as error:
            raise FormatError(error.detail) from None


class Transform(Stage):
    """Array -> array: as many elements, possibly of another dtype. `data` and `out` are flat arrays of their bytes."""

    kind = "array -> array"
    exact_length = True

    @abstractmethod
    def accepts(self, dtype: DType) -> bool:
        """Whether tensors of this dtype can be transformed; others are sent losslessly."""

    def output(self, dtype: DType) -> DType:
        """The dtype that an accepted dtype becomes."""
        return dtype

    def block(self, dtype: DType) -> int:
        """Elements that cannot be divided between slices."""
        return 1

    @abstractmethod
    def encode(self, data: Any, extent: Extent) -> Bytes:
        """The transformed elements of a slice, in new memory. `extent`: of the input."""

    @abstractmethod
    def decode(self, data: Bytes, extent: Extent, out: Bytes) -> None:
        """Write to `out` the elements that `data` was made from. `extent`: of the output. Raises FormatError."""


class Packer(Stage):
    """Array -> bytes: the elements of a slice to a payload that can be decoded alone."""

    kind = "array -> bytes"
    # The payload is the tensor's own bytes: it can be received in place and be mapped from a file.
    in_place: ClassVar[bool] = False
    # Slices of tensors on a CUDA device are encoded and decoded there.
    on_device: ClassVar[bool] = False
    # Decoding may expand a payload many times, so the decoded slice must obey the limit for frames too.
    expands: ClassVar[bool] = False

    @property
    def tables(self) -> tuple[npt.NDArray[np.float32], ...]:
        """The code tables that decoding looks things up in."""
        return ()

    @abstractmethod
    def accepts(self, dtype: DType) -> bool:
        """Whether tensors of this dtype can be encoded; others are sent losslessly."""

    def block(self, dtype: DType) -> int:
        """Elements that cannot be divided between slices."""
        return 1

    @abstractmethod
    def sizes(self, count: int, dtype: DType) -> Sizes:
        """Bytes that `count` elements take; if `exact_length` is False, the most that they can take.

        Several blocks never take more than as many times the bytes of one.
        """

    def parts(self, count: int, dtype: DType) -> tuple[Part, ...]:
        """The numbers that the payload of `count` elements consists of, in order; nothing if it is just bytes."""
        return ()

    def fallback(self, view: TensorView) -> str:
        """Why this tensor's values need a lossless codec under a parameter's policy; empty if they do not."""
        return ""

    def ceiling(self, dtype: DType) -> float:
        """The largest magnitude that is never refused; infinity if no finite value is refused."""
        return float("inf")

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
    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Write a slice's elements to `out`.

        `payload` has a length that `sizes` allows. `out`: a flat uint8 array of exactly the elements' bytes, or with
        `on_device` maybe a 1-D device tensor of them. `uncached`: as kernels take it.
        Raises FormatError for a payload that no encoder produces.
        """

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> bool:
        """Add `weight` times each element of a slice to `sums`; returns False if the caller must `decode` instead.

        The elements are those that `decode` gives, with one rounding per product and one per sum. Raises as `decode`.
        """
        return False


class Compressor(Stage):
    """Bytes -> bytes: compresses a payload without loss."""

    kind = "bytes -> bytes"
    lossless = True
    exact_length = False

    @abstractmethod
    def bound(self, size: int) -> int:
        """The most bytes that `size` bytes can become; never decreases with `size`."""

    @abstractmethod
    def encode(self, data: Any, extent: Extent) -> Any:
        """The compressed payload, a buffer."""

    def encode_parts(self, data: Any, parts: Sequence[Part], extent: Extent) -> Any:
        """As `encode`, for compressors that can use the payload's parts, of which there is at least one."""
        return self.encode(data, extent)

    @abstractmethod
    def decode(self, payload: memoryview, extent: Extent, size: int, *, exact: bool) -> Any:
        """The uncompressed payload, a buffer of `size` bytes or, unless `exact`, at most `size`.

        Allocates no more than that, whatever the payload claims. Raises FormatError.
        """
