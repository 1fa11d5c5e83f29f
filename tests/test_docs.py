"""The Python snippets of README and docs run, page by page, as a reader would type them."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in path.read_text()
]


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
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    found = {name: int(number.replace(",", "")) * units[unit] for name, number, unit in rows}
    assert found == {name: getattr(DEFAULT, name) for name in DEFAULT.__slots__}
    assert [name for name, _, _ in rows] == [*DEFAULT.__slots__]


def test_the_files_that_the_security_page_names_are_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for path in re.findall(r"tests/[\w/.]+", text):
        assert (ROOT / path).exists(), path


def test_the_promises_of_transports_name_tests_that_there_are() -> None:
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
