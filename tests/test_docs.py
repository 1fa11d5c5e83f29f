"""The Python snippets of README and docs run, page by page, as a reader would type them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_snippets_run(page: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    namespace: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), namespace)


def test_the_figure_of_the_frame_order_is_the_table() -> None:
    """docs/format.md, section 7, against the table that reader and writer obey."""
    from tensorwire.wire.ledger import TRANSITIONS, State, Step

    columns = [Step.STREAM, Step.ITEM, Step.SLICE, Step.LAST, Step.SKIP, Step.END]
    text = (ROOT / "docs" / "format.md").read_text()
    for state in State:
        row = re.search(rf"^\| {state.name.lower()}\b.*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.group(0).split("|")[2:-1]] if row else [""] * len(columns)
        expected = [TRANSITIONS[state].get(step) for step in columns]
        assert cells == [target.name.lower() if target else "" for target in expected], state


def test_the_limits_of_the_security_page_are_those_of_the_code() -> None:
    """docs/security.md, Limits: every limit, in the order of tensorwire/limits.py, with its default."""
    from tensorwire.limits import DEFAULT

    text = (ROOT / "docs" / "security.md").read_text()
    table = text[text.index("## Limits") : text.index("## Transports")]
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+)(?: (\w+))? \|", table, re.MULTILINE)
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    found = {name: int(number.replace(",", "")) * units[unit] for name, number, unit in rows}
    assert found == {name: getattr(DEFAULT, name) for name in DEFAULT.__slots__}
    assert [name for name, _, _ in rows] == [*DEFAULT.__slots__]


def test_the_files_that_the_security_page_names_are_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for path in re.findall(r"tests/[\w/.]+", text):
        assert (ROOT / path).exists(), path
