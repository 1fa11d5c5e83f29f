"""Rows of a suite as a table that reads well in a terminal and in Markdown alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

Row = dict[str, Any]

_CUT: Final = "..."
_LEAST: Final = 8  # characters of a column of text


class Column(NamedTuple):
    """One column: the key of a row, its title, and a format spec such as `.2f` or a function."""

    key: str
    title: str
    format: str | Callable[[Any], str] = ""


def render(rows: Iterable[Row], columns: Sequence[Column], *, width: int | None = None) -> str:
    """A Markdown table; numbers are right-aligned, what is None or missing is left empty.

    `width`: characters that a line may have; texts of the widest columns are cut in the middle to get there.
    """
    rows = list(rows)
    cells = [[_text(row.get(column.key), column.format) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column.key)) for row in rows) for column in columns]
    titles = [column.title for column in columns]
    widths = [max(map(len, texts)) for texts in zip(titles, *cells, strict=True)]
    if width is not None:
        widths = _narrowed(widths, numeric, width - len(_line([""] * len(widths), [0] * len(widths), numeric)))
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join(_line(line, widths, numeric) for line in [titles, rule, *cells])


def _narrowed(widths: Sequence[int], numeric: Sequence[bool], room: int) -> list[int]:
    """Widths that fit into `room` together, as far as columns of text allow."""
    result = list(widths)
    texts = [place for place, is_number in enumerate(numeric) if not is_number]
    while sum(result) > room and texts and max(result[place] for place in texts) > _LEAST:
        result[max(texts, key=lambda place: result[place])] -= 1
    return result


def _cut(text: str, width: int) -> str:
    """The beginning and the end of a text that is too long: names differ there."""
    if len(text) <= width:
        return text
    front = (width - len(_CUT)) // 2
    return text[:front] + _CUT + text[len(text) - (width - len(_CUT) - front) :]


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else _cut(cell, width).ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _text(value: Any, spec: str | Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return spec(value) if callable(spec) else format(value, spec)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))
