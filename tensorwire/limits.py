"""What a receiver is willing to accept. Every limit has a name, a default and a reason."""

from dataclasses import dataclass, fields
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Receiver limits, in bytes unless said otherwise. A size equal to its limit is accepted.

    Writers hold to the defaults, so that whatever one sends, a receiver with the defaults accepts.
    """

    descriptor: int = 64 * KIB
    """An item descriptor: a 1 KiB name in a path of 32 and 64 dimensions fit many times over."""
    metadata: int = 1 * MIB
    """The stream's own metadata (the user's text pairs): as much as safetensors files carry in practice."""
    pairs: int = 16_384
    """Text pairs in the metadata. Python needs up to thirty times the bytes of very short pairs, so `metadata` alone
    would not bound memory."""
    name: int = 1 * KIB
    """One key of a path, as UTF-8; file systems and frameworks stop far below."""
    ndim: int = 64
    """Dimensions of a tensor: NumPy's own ceiling."""
    items: int = 262_144
    """Items in a stream: ten times those of the largest mixture-of-experts checkpoints of 2026."""
    nesting: int = 32
    """Containers within containers; an optimizer's state dict needs 4."""
    item: int = 16 * GIB
    """One decoded item; the largest embedding in use is 4 GiB in float32."""
    value: int = 16 * MIB
    """One text or bytes value; a tokenizer's JSON fits."""
    composite: int = 128 * KIB
    """A list, tuple or dict that travels as one value. Python needs up to 72 times as much for it (one byte may be an
    empty dict), so larger ones travel as containers, item by item."""
    frame: int = 64 * MIB
    """One encoded data frame that has to be held before it can be decoded. Raw frames land in place in their tensor
    and are bounded by `item` alone."""
    skippable: int = 8 * MIB
    """A skippable frame; the index of a file with `items` items is the largest there is."""
    stream: int = 64 * GIB
    """A whole stream on the wire."""

    def __repr__(self) -> str:
        """What differs from the defaults: signatures show `Limits()`."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return f"Limits({', '.join(f'{name}={value}' for name, value, default in given if value != default)})"


DEFAULT: Final = Limits()
