"""docs/codecs.md says what the code does: its tables are made from the registry and from kernels/tables.py."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from tensorwire import codecs, dtypes
from tensorwire.codecs.stage import spell
from tensorwire.kernels import tables

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "codecs.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, without its head."""
    table = re.search(r"\n\|.*?\n\n", PAGE[PAGE.index(f"\n## {heading}\n") :], re.DOTALL)
    assert table is not None
    lines = table.group().strip().splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def carried(stage: codecs.Stage) -> str:
    if isinstance(stage, codecs.Compressor):
        return "bytes"
    names = [dtype.name for dtype in dtypes.ALL if stage.accepts(dtype)]
    return "every dtype" if len(names) == len(dtypes.ALL) else ", ".join(names)


def bits(stage: codecs.Stage) -> str:
    """Of an element of a large tensor, scales included, where they do not depend on the values."""
    if isinstance(stage, codecs.Compressor) or stage.in_place or not stage.exact_length:
        return ""
    count = 1 << 24
    return f"{round(8 * stage.sizes(count, dtypes.FLOAT32).total / count, 4):g}"


def test_the_table_of_stages_is_the_registry() -> None:
    assert rows("Stages") == [
        [
            f"`{row.name}`",
            str(row.id),
            row.kind.replace("->", "→"),
            carried(row()),
            bits(row()),
            "yes" if row.lossless else "no",
            "exact" if row.exact_length else "at most",
        ]
        for row in codecs.BUILT_IN
    ]


def test_the_table_of_parameters_is_the_registry() -> None:
    assert rows("Parameters") == [
        [f"`{row.name}`", f"`{p.name}`", f"`{spell(p.default)}`", str(p.legal), "yes" if p.wire else ""]
        for row in codecs.BUILT_IN
        for p in row.parameters()
    ]


@pytest.mark.parametrize(("heading", "table"), [("nf4", tables.NF4_CODE), ("fp4", tables.FP4_CODE)])
def test_the_tables_of_16_codes_are_printed_in_full(heading: str, table: np.ndarray) -> None:
    printed = [cell for row in rows(heading) for cell in row]
    found = {int(printed[at]): printed[at + 1 : at + 3] for at in range(0, len(printed), 3)}
    assert [*sorted(found)] == [*range(16)]
    for code, (value, pattern) in found.items():
        assert pattern == f"`{table[code : code + 1].view(np.uint32)[0]:08X}`"
        assert np.float32(value).view(np.uint32) == table[code : code + 1].view(np.uint32)[0], code


def test_the_table_of_256_codes_is_printed_in_full() -> None:
    (block,) = re.findall(r"```\n((?:[0-9A-F]{8}[ \n])+)```", PAGE)
    patterns = np.array([int(word, 16) for word in block.split()], np.uint32)
    assert np.array_equal(patterns, tables.INT8_CODE.view(np.uint32))
    assert f"`{hashlib.sha256(tables.INT8_CODE.tobytes()).hexdigest()}`" in PAGE


def test_the_thresholds_of_fp4_are_printed() -> None:
    printed = re.findall(r"(?<![\d.])\.\d{6,8}", PAGE[PAGE.index("\n## fp4\n") : PAGE.index("\n## double_quant\n")])
    assert [np.float32(text) for text in printed] == [*tables.FP4_THRESHOLDS]


def test_the_format_page_lists_the_parameters_of_descriptors() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    section = text[text.index("\n## 6.") : text.index("\n## 7.")]
    found = {}
    for number, name, cell in re.findall(r"^\| (\d+) \| ([a-z0-9-]+) \|([^|]*)\|", section, re.MULTILINE):
        found[int(number), name] = re.findall(r"[a-z_]+", cell.replace("(0 or 1)", ""))
    assert found == {
        (row.id, row.name): [known.name for known in row.parameters() if known.wire] for row in codecs.BUILT_IN
    }


def test_the_page_names_the_private_ids() -> None:
    assert "from 32768 to 65535" in PAGE
    assert range(32768, 65536) == codecs.registry.PRIVATE_IDS
