"""What a receiver is willing to accept. Every limit has a name, a default and a reason."""

from dataclasses import dataclass, fields
from typing import Final

from tensorwire.errors import ArgumentError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Limits:
    """Receiver limits, in bytes unless said otherwise. A size equal to its limit is accepted.

    Writers hold to them too, so that whatever one sends, a receiver with the same limits accepts. A high limit is no
    invitation: memory follows the bytes that came, not those that were announced.
    """

    descriptor: int = 64 * KIB
    """An item descriptor: a 1 KiB name in a path of 32 and 64 dimensions fit many times over."""
    metadata: int = 64 * MIB
    """The stream's own metadata (the user's text pairs): 128 bytes for each of 500,000 tensors."""
    pairs: int = 524_288
    """Text pairs in the metadata: one for each of 500,000 tensors. Python needs up to thirty times the bytes of very
    short pairs, so `metadata` alone would not bound memory."""
    name: int = 1 * KIB
    """One key of a path, as UTF-8; file systems and frameworks stop far below."""
    ndim: int = 64
    """Dimensions of a tensor: NumPy's own ceiling."""
    items: int = 2_097_152
    """Items in a stream: four times those of the largest mixture-of-experts checkpoints of 2026, whose experts are
    tensors of their own (494,868). Each takes memory in proportion to the bytes that describe it."""
    nesting: int = 32
    """Containers within containers; an optimizer's state dict needs 4."""
    item: int = 256 * GIB
    """One decoded item: the fused experts of a layer have 20 GiB in bfloat16, and three matrices of them in float32,
    fused once more, 120."""
    value: int = 256 * MIB
    """One text or bytes value; a tokenizer's JSON has up to 40 MiB."""
    composite: int = 64 * MIB
    """A list, tuple or dict that travels as one value: seven million floats. Python needs up to 24 times as much for
    one (three bytes may be a text of its own). Larger ones travel as containers, item by item."""
    containers: int = 1_048_576
    """Lists, tuples and dicts in one value: a record for each of a million steps. One byte may be an empty dict, for
    which Python needs 72."""
    frame: int = 64 * MIB
    """One encoded data frame that has to be held before it can be decoded. Raw frames land in place in their tensor
    and are bounded by `item` alone."""
    expanded: int = 1 * GIB
    """Tensors, decoded, of codecs that make them out of a thousandth of the bytes (sparse, lowrank), in one stream. For
    those that are expected (`expect=`, `into=`) there is no such limit: a receiver of updates knows its model."""
    skippable: int = 64 * MIB
    """A skippable frame; the index of a file with `items` items is the largest there is."""
    stream: int = 64 * TIB
    """A whole stream on the wire: a model of two trillion parameters has 8 TiB in float32, and its optimizer twice
    that."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise ArgumentError(f"the limit {field.name} is a whole number from 0 on, not {value!r:.40}")

    def __repr__(self) -> str:
        """What differs from the defaults: signatures show `Limits()`."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return f"Limits({', '.join(f'{name}={value}' for name, value, default in given if value != default)})"


DEFAULT: Final = Limits()


def check_limits(limits: object) -> None:
    """Raise ArgumentError for anything but `Limits`: for None, say, which does not mean that there are none."""
    if not isinstance(limits, Limits):
        raise ArgumentError(f"limits is a tensorwire.Limits, not {type(limits).__name__}; Limits() has the defaults")
