"""The dashboard: what it shows, that it is read-only, and that nothing a client says becomes part of the page."""

import asyncio
import functools
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tensorwire
from tensorwire.cli import main
from tensorwire.errors import TransportError
from tensorwire.fl.client import Client
from tensorwire.fl.dashboard import dashboard, metrics, page
from tensorwire.fl.plan import Plan
from tensorwire.fl.server import Server
from tensorwire.fl.task import Task
from tensorwire.transports import AsyncListener, TcpTransport

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


def test_it_is_read_only():
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


def test_the_loss_is_drawn_once_there_are_two_rounds():
    assert "<svg" not in page(STATUS)
    rows = [{**ROW, "round": n, "clients": {"ann": {"loss": loss}}} for n, loss in enumerate((3.0, 1.0, 2.0))]
    drawn = page({**STATUS, "rows": [*rows, {**ROW, "clients": {}}]})
    assert "loss 3 to 2<" in drawn and 'points="0.0,2.0 300.0,118.0 600.0,60.0"' in drawn
    level = page({**STATUS, "rows": [ROW, ROW]})
    assert 'points="0.0,2.0 600.0,2.0"' in level


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_shows_a_run_while_it_goes_on(tmp_path):
    """The page loads itself anew, breaks none of its own rules, and fits its window."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    looks = []

    def status():
        looks.append(server.status())
        return looks[-1]

    def train(state, client, round):
        while len(looks) <= 2 * round:  # until the browser has seen the round, and looks again
            time.sleep(0.01)
        return {"w": state["w"] + 1}, 1, {"loss": 1.0 / (round + 1)}

    task = Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: 0.0)
    plan = Plan(name="<i>of mine</i>", rounds=3, clients=1, up="raw", down="raw")
    server = Server(plan, task.initial, tmp_path / "state")

    async def serve():
        async with AsyncListener(server.serve) as listener:
            connect = functools.partial(TcpTransport.connect, "127.0.0.1", listener.port)
            client = Client("client-0", 0, task, connect, tmp_path / "client-0")
            training = asyncio.get_running_loop().run_in_executor(pool, client.run)
            await server.run()
            await training

    with ThreadPoolExecutor() as pool, dashboard(status, "127.0.0.1", 0) as port:
        running = threading.Thread(target=lambda: asyncio.run(serve()))
        running.start()
        shown = browse(f"http://127.0.0.1:{port}/", tmp_path, until=lambda: len(looks) > 6)
        running.join(60)
    assert not running.is_alive() and {look["round"] for look in looks} >= {0, 1, 2}
    assert "Content Security Policy" not in shown and "CONSOLE" not in shown
    last = browse(snapshot(tmp_path, page(server.status())), tmp_path)
    assert int(last.partition("<title>beyond: ")[2].partition("<")[0]) <= 0
    for text in (
        "round 3 of 3",
        "client-0",
        "delivered",
        "everybody has answered",
        "loss 1 to 0.3333",
        "&lt;i&gt;of mine",
    ):
        assert text in last


def snapshot(folder, text):
    """A page that is not loaded anew, as a file; it says how wide it is and how wide the window."""
    told = "<script>document.title = `beyond: ${document.documentElement.scrollWidth - innerWidth}`</script>"
    path = folder / "page.html"
    path.write_text(text.replace('<meta http-equiv="refresh" content="2">', "") + told)
    return path.as_uri()


def browse(where, folder, until=None):
    """What a browser makes of a page, as text: its elements, or what it has to say until something happens."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=700,900", "--enable-logging=stderr", *([] if until else ["--dump-dom"]), where]
    if until is None:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    with subprocess.Popen([*command, "--remote-debugging-port=0"], stderr=subprocess.PIPE, text=True) as browser:
        end = time.monotonic() + 120
        while not until() and time.monotonic() < end:
            time.sleep(0.05)
        browser.terminate()
        assert browser.stderr is not None and until()
        return browser.stderr.read()


def test_the_command_names_the_missing_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    tensorwire.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.tw")
    files = [f"--state={tmp_path / 'state'}", f"--initial={tmp_path / 'model.tw'}"]
    assert main(["fl", "server", "--listen=127.0.0.1:0", "--dashboard=127.0.0.1:0", *files]) == 2
    assert "tensorwire[dashboard]" in capsys.readouterr().err
