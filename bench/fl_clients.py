"""One simulated round by number of clients: does memory stay flat, and are seconds linear?

    python bench/fl_clients.py                                   # 10, 100 and 1,000 clients of a 16 MB model
    python bench/fl_clients.py --clients 10 --size-mb 1

Each number in a process of its own, which may open 1,024 files at most. Training is an addition; what is measured is
what the loop does for each client: copy, difference, nf4, check, mean. Prints a line of JSON for each.
"""

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter

import numpy as np

from tensorwire.bench import highest
from tensorwire.fl.plan import Plan
from tensorwire.fl.simulate import simulate
from tensorwire.fl.task import Task

_LAYER = 1 << 20  # elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--size-mb", type=int, default=16)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    options = parser.parse_args()
    for clients in options.clients:
        if options.here:
            print(json.dumps(measure(clients, options.size_mb)), flush=True)
        else:
            alone = [f"--clients={clients}", f"--size-mb={options.size_mb}", "--here"]
            subprocess.run([sys.executable, __file__, *alone], check=True)


def measure(clients: int, size_mb: int) -> dict[str, object]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    layers = -(-size_mb * 1_000_000 // 4 // _LAYER)
    block = np.random.default_rng(0).standard_normal(_LAYER, np.float32) * np.float32(0.02)
    model = {f"layer.{number}": block.copy() for number in range(layers)}

    def train(state: dict[str, np.ndarray], client: int, round: int) -> tuple[object, int, dict[str, float]]:
        return {name: array + np.float32(1e-3 * (client % 7)) for name, array in state.items()}, 1, {}

    began = perf_counter()
    last = [*simulate(Task(lambda: model, train, lambda state: 0.0), Plan(clients=clients, rounds=1))][-1]
    seconds = perf_counter() - began
    return {
        "clients": clients,
        "model_mb": sum(array.nbytes for array in model.values()) / 1e6,
        "seconds": round(seconds, 2),
        "ms_a_client": round(1000 * seconds / clients, 1),
        "peak_mib": round(highest() / (1 << 20), 1),
        "missing": len(last.missing),
    }


if __name__ == "__main__":
    sys.exit(main())
