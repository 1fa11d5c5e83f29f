"""`tensorwire fl run` when clients die, stall, or send what cannot count: it ends, with the right rows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tensorwire

HOME = Path(tensorwire.__file__).parent.parent
TASK = """
import os, signal, time
import numpy as np
from tensorwire.fl.task import Task

def task(*, clients, seconds=0.0):
    def train(state, client, round):
        time.sleep(seconds)
        if client == 1 and round == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if client == 2 and round == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        value = np.float32("nan") if client == 3 else 1
        return {"w": state["w"] + value}, 1, {"train_loss": 1.0}
    return Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: float(np.asarray(state["w"])[0]))

def broken(*, clients):
    def train(state, client, round):
        raise ValueError(f"no data for {client}")
    return Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: 0.0)
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "mytask.py").write_text(TASK)
    command = [sys.executable, "-m", "tensorwire", "fl", "run", "--out", "run", *options]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped")
def test_a_run_with_clients_that_are_killed_stalled_or_send_nan(tmp_path, monkeypatch):
    """Four clients: one trains well, one is killed in round 1, one stalls in round 2, one always sends NaN."""
    done = run(tmp_path, "--task=mytask:task", "--clients=4", "--rounds=4", "--deadline=3", "--up=raw", "--down=raw")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert [row["loss"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0]
    came = [sorted(row["clients"]) for row in rows[1:]]
    assert came == [["client-0", "client-1", "client-2"], ["client-0", "client-2"], ["client-0"], ["client-0"]]
    missing = [row["missing"] for row in rows[1:]]
    assert all("NaN" in each["client-3"] for each in missing)
    assert "exit code -9" in missing[1]["client-1"] and missing[2]["client-2"] == "nothing came by the deadline"
    assert [row["ended"] for row in rows[1:]] == [
        "everybody has answered",
        "everybody has answered",
        "the deadline",
        "nobody else is there",
    ]
    assert "client-1 has failed (exit code -9)" in done.stderr and "round 1: received the model" in done.stderr
    assert "client-2 is still running" in done.stderr


def test_a_run_without_clients_left_says_which_and_why(tmp_path):
    done = run(tmp_path, "--task=mytask:broken", "--clients=2", "--rounds=5")
    assert done.returncode == 1 and "no client is left" in done.stderr
    assert "no data for 0" in done.stderr and "no data for 1" in done.stderr


def test_limits_hold_for_all_of_a_run(tmp_path):
    few = ["--task=mytask:task", "--clients=1", "--rounds=1", "--down=raw"]
    refused = run(tmp_path, *few, "--limit=items=1")
    assert refused.returncode == 1 and "items is 2, more than the limit of 1" in refused.stderr
    done = run(tmp_path, *few, "--limit=items=2", "--limit=name=1", "--force")
    assert done.returncode == 0, done.stderr
    for name in ("server", "client-0"):  # whose own options they are
        assert "error" not in (tmp_path / "run" / f"{name}.log").read_text()
