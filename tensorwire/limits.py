"""What a receiver is willing to accept. Every limit has a name, a default and a reason."""

from dataclasses import dataclass
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Receiver limits, in bytes unless said otherwise; writers hold to the same defaults."""

    # An item descriptor: a 1 KiB name in a path of 32 and 64 dimensions fit many times over.
    descriptor: int = 64 * KIB
    # The stream's own metadata (user's text pairs), as much as safetensors files carry in practice.
    metadata: int = 1 * MIB
    # Text pairs in it: so many short ones that Python needs thirty times their bytes are nobody's.
    pairs: int = 16_384
    # One key of a path, as UTF-8; file systems and frameworks stop far below.
    name: int = 1 * KIB
    # NumPy's own ceiling.
    ndim: int = 64
    # Items in a stream: ten times the largest mixture-of-experts checkpoints of 2026.
    items: int = 262_144
    # Containers within containers; an optimizer's state dict needs 4.
    nesting: int = 32
    # Bytes of one decoded item; the largest embedding in use is 4 GiB in fp32.
    item: int = 16 * GIB
    # Bytes of one text or bytes value; a tokenizer's JSON fits.
    value: int = 16 * MIB
    # Bytes of a list, tuple or dict that travels as one value. Python needs up to 72 times as much for it (a byte
    # may be an empty dict), so that larger ones travel as containers, item by item.
    composite: int = 128 * KIB
    # Bytes of one encoded data frame that has to be held before it can be decoded. Raw frames land in place
    # in their tensor and are bound by `item` alone.
    frame: int = 64 * MIB
    # Bytes of a skippable frame; the index of a file with `items` items is the largest there is.
    skippable: int = 8 * MIB
    # Bytes of a whole stream on the wire.
    stream: int = 64 * GIB


DEFAULT: Final = Limits()
