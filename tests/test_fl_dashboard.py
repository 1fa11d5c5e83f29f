"""The dashboard: what it shows, that it is read-only, and that nothing a client says becomes part of the page."""

import json
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

import tensorwire
from tensorwire.cli import main
from tensorwire.errors import TransportError
from tensorwire.fl.dashboard import dashboard, metrics, page

CLIENT = {"name": "ann", "state": "refused: <script>", "seen": 1.0, "seconds": 2.5, "up": 10, "down": 20, "refused": 1}
ROW = {
    "round": 0,
    "seconds": 1.0,
    "up": 10,
    "down": 20,
    "clients": {"ann": {"loss": 1.5, "weight": 1.0}},
    "missing": {"bob": "left: <b>"},
    "ended": "the deadline",
    "counted": True,
}
STATUS = {"run": "a <run>", "round": 1, "rounds": 3, "clients": [CLIENT], "rows": [ROW]}


def test_the_page_shows_rounds_and_clients_and_no_markup_of_theirs():
    text = page(STATUS)
    for shown in ("round 1 of 3", "ann", "refused: &lt;script&gt;", "bob: left: &lt;b&gt;", "1.5", "the deadline"):
        assert shown in text
    assert "<script" not in text and "a <run>" not in text
    assert "not yet" in page({**STATUS, "clients": [{**CLIENT, "seen": 0.0}], "rows": []})


def test_metrics_are_in_the_format_of_prometheus():
    lines = metrics(STATUS).splitlines()
    assert "tensorwire_fl_round 1" in lines and "tensorwire_fl_loss 1.5" in lines
    assert 'tensorwire_fl_client_up{client="ann"} 10' in lines
    samples = [line for line in lines if not line.startswith("#")]
    assert all(float(line.rpartition(" ")[2]) >= 0 for line in samples)


def test_it_serves_what_there_is_read_only():
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    with dashboard(lambda: STATUS, "127.0.0.1", 0) as port:
        where = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(where) as answer:
            assert answer.read().decode().startswith("<!doctype html>")
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        with urllib.request.urlopen(f"{where}/metrics") as answer:
            assert b"tensorwire_fl_round 1" in answer.read()
        with urllib.request.urlopen(f"{where}/status.json") as answer:
            assert json.load(answer) == STATUS
        for path, data in (("/", b"x"), ("/metrics", b"x"), ("/other", None), ("/../etc/passwd", None)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(where + path, data=data)
            assert caught.value.code in (404, 405)
        with pytest.raises(TransportError, match="cannot listen"), dashboard(lambda: STATUS, "127.0.0.1", port):
            pass


def test_without_the_extra_the_command_says_which(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    tensorwire.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.tw")
    files = [f"--state={tmp_path / 'state'}", f"--initial={tmp_path / 'model.tw'}"]
    assert main(["fl", "server", "--listen=127.0.0.1:0", "--dashboard=127.0.0.1:0", *files]) == 2
    assert "tensorwire[dashboard]" in capsys.readouterr().err
