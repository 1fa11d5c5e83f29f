"""`tensorwire fl run` with rounds that last: training of 90 s, a client killed in every round, one stalled, one NaN.

    python bench/fl_hours.py                      # some 9 minutes
    python bench/fl_hours.py --seconds 1          # whether it runs at all

Prints the rows, and ends with an error unless they are those that must come of it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np

from tensorwire.cli import local
from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task

_START: Final = 6.0  # seconds that a process may take to start again


def unlucky(*, clients: int, seconds: float, marks: str) -> Task:
    """Client 1 is killed once in every round, client 2 stalls in round 2, client 3 always gives NaN.

    `marks`: a folder where it is noted that client 1 was killed.
    """

    def train(state: dict[str, np.ndarray], client: int, round: int) -> tuple[object, int, dict[str, float]]:
        mark = Path(marks, f"killed-{round}")
        if client == 1 and not mark.exists():
            time.sleep(seconds / 3)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        if (client, round) == (2, 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"w": state["w"] + np.float32("nan" if client == 3 else 1)}, 1, {}

    return Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: float(state["w"][0]))


def start_again(out: Path, asked: list[str]) -> None:
    """What a service manager does with client 1, as often as it is killed."""
    port = (out / "server.log").read_text().partition("listening on 127.0.0.1:")[2].split()[0]
    command = [sys.executable, "-m", "tensorwire", "fl", "client", f"127.0.0.1:{port}", "--number=1"]
    command += [f"--folder={out / 'client-1'}", *asked]
    while subprocess.run(command, check=False).returncode == -signal.SIGKILL:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    plan = Plan(clients=4, rounds=4, deadline=1.5 * options.seconds + _START, up="raw", down="raw")
    came = []
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--task=fl_hours:unlucky", f"--set=seconds={options.seconds}", f"--set=marks={folder}"]
        task = unlucky(clients=4, seconds=options.seconds, marks=folder)
        manager = threading.Thread(target=start_again, args=(Path(folder), asked), daemon=True)

        def on_note(text: str) -> None:
            print(text, file=sys.stderr)
            if text.startswith("client-1 "):
                manager.start()

        for row in local.run(task, plan, Path(folder), asked, on_note=on_note):
            print(json.dumps(row), flush=True)
            came.append({name[-1] for name in row.get("clients", {})})
        manager.join(_START)
        killed = len([*Path(folder).glob("killed-*")])
    right = [set(), {"0", "1", "2"}, {"0", "1", "2"}, {"0", "1"}, {"0", "1"}]
    if options.seconds > 2 * _START:  # otherwise rounds may be over before client 1 is back
        assert came == right and killed == plan.rounds, (came, killed)
    assert [each | {"1"} for each in came] == [each | {"1"} for each in right], came


if __name__ == "__main__":
    sys.exit(main())
