"""Limits on what a receiver accepts. Every limit has a name, a default and a reason."""

from dataclasses import dataclass, fields
from typing import Final

from tensorwire.errors import ArgumentError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Limits:
    """Receiver limits, in bytes unless noted. A size equal to its limit is accepted.

    Writers obey them too, so a receiver with the same limits accepts whatever a writer sends. A high limit by itself
    takes no memory: memory grows with the bytes received, not with the bytes announced.
    """

    descriptor: int = 64 * KIB
    """An item descriptor: many times what a 1 KiB name in a path of 32 keys and 64 dimensions need."""
    metadata: int = 64 * MIB
    """The stream's own metadata (the user's text pairs): 128 bytes for each of 500,000 tensors."""
    pairs: int = 524_288
    """Text pairs in the metadata: one for each of 500,000 tensors. Very short pairs take up to thirty times their bytes
    in Python, so `metadata` alone would not bound memory."""
    name: int = 1 * KIB
    """One key of a path, as UTF-8: far above what file systems and frameworks allow."""
    ndim: int = 64
    """Dimensions of a tensor: NumPy's own maximum."""
    items: int = 2_097_152
    """Items in a stream: four times those of the largest mixture-of-experts checkpoints of 2026 (494,868), which store
    each expert as separate tensors. Each item takes memory in proportion to the bytes that describe it."""
    nesting: int = 32
    """Containers within containers; an optimizer's state dict needs 4."""
    item: int = 256 * GIB
    """One decoded item: the fused experts of a layer take 20 GiB in bfloat16; three such matrices fused, in float32,
    take 120."""
    value: int = 256 * MIB
    """One text or bytes value; a tokenizer's JSON has up to 40 MiB."""
    composite: int = 64 * MIB
    """A list, tuple or dict that is sent as one value: seven million floats. Python needs up to 24 times as much for
    one (three bytes may be a string of their own). Larger ones are sent as containers, item by item."""
    containers: int = 1_048_576
    """Lists, tuples and dicts in one value: a record for each of a million steps. One byte may be an empty dict, which
    takes 72 in Python."""
    frame: int = 64 * MIB
    """One encoded data frame that has to be held in memory to be decoded. Raw frames land in place in their tensor
    and are bounded by `item` alone."""
    expanded: int = 1 * GIB
    """Decoded tensors, in one stream, of codecs that produce them from a thousandth of the bytes (sparse, lowrank).
    Expected tensors (`expect=`, `into=`) have no such limit: a receiver of updates knows its model."""
    skippable: int = 64 * MIB
    """A skippable frame; the largest is the index of a file with `items` items."""
    stream: int = 64 * TIB
    """A whole stream on the wire: a model of two trillion parameters takes 8 TiB in float32, and its optimizer state
    twice that."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise ArgumentError(f"the limit {field.name} must be a non-negative integer, not {value!r:.40}")

    def __repr__(self) -> str:
        """The values that differ from the defaults, so that signatures show `Limits()`."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return f"Limits({', '.join(f'{name}={value}' for name, value, default in given if value != default)})"


DEFAULT: Final = Limits()


def at_least_default(limits: Limits) -> Limits:
    """The larger of each limit and its default: for files of one's own, which hold more than what was received."""
    return Limits(**{each.name: max(getattr(limits, each.name), each.default) for each in fields(Limits)})


def check_limits(limits: object) -> None:
    """Raise ArgumentError for anything but `Limits`, including None, which does not mean no limits."""
    if not isinstance(limits, Limits):
        raise ArgumentError(
            f"limits must be a tensorwire.Limits, not {type(limits).__name__}; Limits() has the defaults"
        )
