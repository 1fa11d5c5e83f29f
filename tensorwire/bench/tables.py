"""Rows of a suite as a table that reads well in a terminal and in Markdown alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Column(NamedTuple):
    """One column: the key of a row, its title, and a format spec such as `.2f` or a function."""

    key: str
    title: str
    format: str | Callable[[Any], str] = ""


def render(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """A Markdown table; numbers are right-aligned, what is None or missing is left empty."""
    rows = list(rows)
    cells = [[_text(row.get(column.key), column.format) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column.key)) for row in rows) for column in columns]
    titles = [column.title for column in columns]
    widths = [max(map(len, texts)) for texts in zip(titles, *cells, strict=True)]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join(_line(line, widths, numeric) for line in [titles, rule, *cells])


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _text(value: Any, spec: str | Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return spec(value) if callable(spec) else format(value, spec)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))
