"""`tensorwire fl run` with rounds that last: training of 90 s, a client killed, one stalled, one sending NaN.

    python bench/fl_hours.py                      # some 8 minutes
    python bench/fl_hours.py --seconds 1          # whether it runs at all

Prints the rows, and ends with an error unless they are those that must come of it.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tensorwire.fl import local
from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task


def unlucky(*, clients: int, seconds: float) -> Task:
    """Client 1 dies in round 1, client 2 stalls in round 2, client 3 always gives NaN."""

    def train(state: dict[str, np.ndarray], client: int, round: int) -> tuple[object, int, dict[str, float]]:
        time.sleep(seconds)
        if (client, round) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if (client, round) == (2, 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"w": state["w"] + np.float32("nan" if client == 3 else 1)}, 1, {}

    return Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: float(state["w"][0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    plan = Plan(clients=4, rounds=4, deadline=1.5 * options.seconds + 3, up="raw", down="raw")
    asked = ["--task=fl_hours:unlucky", f"--set=seconds={options.seconds}"]
    task = unlucky(clients=4, seconds=options.seconds)
    came = []
    with tempfile.TemporaryDirectory() as folder:
        for row in local.run(task, plan, Path(folder), asked, on_note=lambda text: print(text, file=sys.stderr)):
            print(json.dumps(row), flush=True)
            came.append([name[-1] for name in sorted(row.get("clients", {}))])
    assert came == [[], ["0", "1", "2"], ["0", "2"], ["0"], ["0"]], came


if __name__ == "__main__":
    sys.exit(main())
