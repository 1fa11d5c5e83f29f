"""What the user asked of a bench run; None means that each suite picks something small."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MODES: Final = ("regular", "container", "file")

# Takes a line that belongs to no row: what was left out, and why.
Note = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`model` as in models.py, `codecs` and `methods` (of compressors) as spec strings, `sizes_mib` in MiB of fp32."""

    model: str | None = None
    codecs: tuple[str, ...] | None = None
    threads: int = 1
    sizes_mib: tuple[int, ...] | None = None
    modes: tuple[str, ...] = MODES
    repeat: int = 1
    methods: tuple[str, ...] | None = None


class BenchError(RuntimeError):
    """A measurement that cannot be taken here, and why."""
