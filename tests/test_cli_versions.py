"""`tensorwire publish` and `tensorwire follow`: what they write, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tensorwire
from tensorwire.cli import main

HOME = Path(__file__).parent.parent


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def models(folder: Path, count: int) -> list[Path]:
    state = {"w": np.random.default_rng(1).normal(size=(40, 130)).astype(np.float32), "b": np.zeros(7)}
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        state["w"][number] *= 1.01
        tensorwire.safetensors.decode(tensorwire.encode(state), path)
    return paths


def held(path: Path) -> str:
    return tensorwire.digest(tensorwire.loads(tensorwire.safetensors.encode(path)))


def test_publish_and_follow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "store", tmp_path / "out.safetensors"
    inputs = models(tmp_path, 3)
    for path in inputs[:2]:
        assert run("publish", path, store, "--json") == 0
    done = json.loads(capfd.readouterr().out.rpartition("}\n{")[2].join(["{", ""]))
    assert (done["version"], done["digest"], done["new"]) == (2, held(inputs[1]), True)
    assert (
        done["patch_bytes"] and done["anchor_bytes"] is None and done["seconds"]["encode"] > 0 and done["notes"] == []
    )

    shown = [
        sys.executable,
        "-c",
        "import os; print(os.environ['TENSORWIRE_VERSION'], os.environ['TENSORWIRE_DIGEST'])",
    ]
    assert run("follow", store, out, "--timeout", 0, "--run", *shown) == 0
    text = capfd.readouterr()
    assert held(out) == held(inputs[1]) and text.out.split() == ["2", held(inputs[1])]
    assert "version 2" in text.err and "fetched" in text.err

    assert run("publish", inputs[1], store) == 0 and "unchanged: version 2" in capfd.readouterr().err
    assert run("publish", inputs[2], store, "--anchor-every", 1, "--keep", 1) == 0
    assert "patch" in (said := capfd.readouterr().err) and "whole" in said
    failing = [sys.executable, "-c", "print('hello'); raise SystemExit(5)"]
    assert run("follow", store, out, "--timeout", 0, "--json", "--run", *failing) == 0
    text = capfd.readouterr()
    (line,) = text.out.splitlines()  # the command's own goes to stderr
    followed = json.loads(line)
    assert (followed["version"], followed["digest"], followed["exit_code"]) == (3, held(inputs[2]), 5)
    assert followed["bytes"] > 0 and {"fetch", "stage", "verify", "apply"} == {*followed["seconds"]}
    assert "hello" in text.err and "ended with 5 at version 3" in text.err
    assert run("follow", store, out, "--timeout", 0, "--json") == 0
    text = capfd.readouterr()
    assert text.out == "" and "nothing new" in text.err


@pytest.mark.parametrize("name", ["npz", "pt", "file"])
def test_any_kind_of_model_can_be_published(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": np.ones(5, np.float32)}
    path = tmp_path / f"model.{name}"
    if name == "pt":
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.ones(5)}, path)
    else:
        np.savez(tmp_path / "model.npz", **state)
        (tmp_path / "model.npz").rename(path)
    assert run("publish", path, tmp_path / "store") == (2 if name == "file" else 0)
    if name == "file":
        assert "--from" in capsys.readouterr().err
        assert run("publish", path, tmp_path / "store", "--from", "npz") == 0
    assert tensorwire.versions.Subscriber(tmp_path / "store").manifest().head.digest == tensorwire.digest(state)


def test_invalid_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "store", tmp_path / "out.safetensors"
    (path,) = models(tmp_path, 1)
    for code, *arguments in (
        (2, "publish", path, store, "--keep", "0"),
        (2, "follow", store, tmp_path / "out.npz"),
        (2, "follow", store, out, "--interval", "0"),
        (2, "follow", store, path),
        (1, "publish", path, store, "--codec", "nf4"),
        (3, "follow", store, out, "--timeout", "0"),
        (3, "publish", path, "http://127.0.0.1:1/store"),
    ):
        assert run(*arguments) == code, arguments
        assert capsys.readouterr().err.startswith("tensorwire: error: ")
    assert run("publish", path, store) == 0
    before = path.read_bytes()
    assert run("follow", store, path) == 2 and path.read_bytes() == before
    assert run("follow", store, path, "--force", "--timeout", 0) == 0 and path.read_bytes() == before  # it is that
    assert run("follow", store, out, "--timeout", 0, "--run", tmp_path / "no-such-command") == 2
    for seconds in ("x", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            run("follow", store, out, "--timeout", seconds)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_cleanly_and_its_command_too(tmp_path: Path, busy: bool) -> None:
    store, out, note = tmp_path / "store", tmp_path / "out.safetensors", tmp_path / "pid"
    (path,) = models(tmp_path, 1)
    assert run("publish", path, store) == 0
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep({60 if busy else 0})"
    command = [sys.executable, "-m", "tensorwire", "follow", store, out, "--interval", "0.05"]
    process = subprocess.Popen(
        [*map(str, command), "--run", sys.executable, "-c", script], cwd=HOME, stderr=subprocess.PIPE, text=True
    )
    while not (note.exists() and note.read_text().endswith(".")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0 if busy else 0.3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert held(out) == held(path) and not [*tmp_path.glob(".*")]
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()[:-1]), 0)
