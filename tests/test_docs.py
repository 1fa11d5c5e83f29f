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
