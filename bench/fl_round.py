"""Rounds of the learning loop without any learning: what the loop itself costs in time and in the server's memory.

    python bench/fl_round.py --size-mb 1000 --clients 2                     # one big model
    python bench/fl_round.py --size-mb 256 --clients 2 4 8 16               # memory over the number of clients

Real processes and sockets; the first round also waits for the clients to start. Updates are whole weights, so that
nothing is all zeros. `wire` is what the sockets carried over what model and updates take as streams.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import tensorwire
from tensorwire.cli import local
from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task

_LAYER = 4096 * 1024  # elements


def frozen(*, clients: int, size_mb: int) -> Task:
    """A model of so many megabytes of fp32 that nobody trains."""
    block = np.random.default_rng(0).standard_normal(_LAYER, np.float32) * np.float32(0.02)
    layers = max(size_mb * 1_000_000 // 4 // _LAYER, 1)
    model = {f"layers.{n}.weight": np.roll(block, n * 4099).reshape(4096, 1024) for n in range(layers)}
    return Task(lambda: model, lambda state, client, round: (state, 1.0, {}), lambda state: 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size-mb", type=int, default=1000)
    parser.add_argument("--clients", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--up", default="nf4")
    parser.add_argument("--down", default="bf16")
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    for clients in options.clients:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), clients, options)), flush=True)


def measure(folder: Path, clients: int, options: argparse.Namespace) -> dict[str, object]:
    task = frozen(clients=clients, size_mb=options.size_mb)
    model = task.initial()
    size = sum(array.nbytes for array in model.values())
    predicted = sum(
        sum(map(len, map(bytes, tensorwire.encode(model, codec=codec)))) for codec in (options.down, options.up)
    )
    del model
    plan = Plan(clients=clients, rounds=options.rounds, up=options.up, down=options.down, kind="weights")
    asked = ["--task=fl_round:frozen", f"--set=size_mb={options.size_mb}"]
    rows = list(local.run(task, plan, folder, asked))[1:]
    return {
        "clients": clients,
        "model_mb": size / 1e6,
        "seconds": [round(row["seconds"], 2) for row in rows],
        "server_mib": rows[-1]["server_mib"],
        "server_peak_of_model": rows[-1]["server_mib"] * (1 << 20) / size,
        "wire": rows[-1]["bytes"] / (options.rounds * clients * predicted),
    }


if __name__ == "__main__":
    sys.exit(main())
