"""Reports how the items of a stream were encoded."""

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from tensorwire.errors import ArgumentError, counted

_UNITS: Final = ("kB", "MB", "GB", "TB", "PB")


@dataclass(slots=True)
class Carried:
    """The items that one codec carried, their original bytes, and the bytes of their payloads."""

    items: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Otherwise(NamedTuple):
    """An item that was not sent as requested: the requested spec, the one used, and the reason."""

    name: str
    asked: str
    used: str
    reason: str


class Report:
    """How the items of a stream were encoded. Filled during encoding, complete once the last buffer has been taken.

        report = tensorwire.Report()
        data = tensorwire.dumps(weights, codec="nf4", report=report)
        print(report)                        # 33.6 MB -> 4.7 MB (7.1x), 3 items raw (float64)

    `codecs`: a `Carried` for each codec, by spec; plain values count as raw, other names of a tied tensor do not
    count. `otherwise`: the items that were not sent as requested. `framing`: bytes of headers and descriptors. A report
    that is given to several streams adds them up.
    """

    __slots__ = ("codecs", "framing", "otherwise")

    def __init__(self) -> None:
        self.codecs: dict[str, Carried] = {}
        self.otherwise: list[Otherwise] = []
        self.framing = 0

    @property
    def items(self) -> int:
        """Tensors, values and files."""
        return sum(carried.items for carried in self.codecs.values())

    @property
    def bytes_in(self) -> int:
        """Bytes of all items before they were encoded."""
        return sum(carried.bytes_in for carried in self.codecs.values())

    @property
    def bytes_out(self) -> int:
        """Bytes of the stream: payloads and framing."""
        return self.framing + sum(carried.bytes_out for carried in self.codecs.values())

    def __str__(self) -> str:
        ratio = f" ({self.bytes_in / self.bytes_out:.1f}x)" if self.bytes_in else ""
        parts = [f"{size_text(self.bytes_in)} -> {size_text(self.bytes_out)}{ratio}"]
        for (used, reason), count in Counter((row.used, row.reason) for row in self.otherwise).items():
            parts.append(f"{counted(count, 'item')} {used} ({reason})")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"<Report: {self}>"

    # Called by streams.

    def add_item(self, spec: str) -> None:
        """Add an item that `spec` will carry."""
        self._carried(spec).items += 1

    def add_frame(self, spec: str, bytes_in: int, bytes_out: int) -> None:
        """Add a slice that was encoded."""
        carried = self._carried(spec)
        carried.bytes_in += bytes_in
        carried.bytes_out += bytes_out

    def add_otherwise(self, name: str, asked: str, used: str, reason: str) -> None:
        """Add an item that `asked` cannot carry."""
        self.otherwise.append(Otherwise(name, asked, used, reason))

    def _carried(self, spec: str) -> Carried:
        if spec not in self.codecs:
            self.codecs[spec] = Carried()
        return self.codecs[spec]


def check_report(report: object) -> None:
    """Raise ArgumentError for anything but a `Report`, or None."""
    if report is not None and not isinstance(report, Report):
        raise ArgumentError(f"report must be a tensorwire.Report to be filled, not {type(report).__name__}")


def size_text(count: int) -> str:
    """A number of bytes as readable text: `33.6 MB`."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, 0
    while value >= 999.95 and unit < len(_UNITS) - 1:  # larger values would be shown as 1000.0
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"
