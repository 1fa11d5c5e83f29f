"""What each hostile case costs a receiver: a line of JSON for each with the error, seconds of processor time, and
bytes that the process rose.

A process of its own, so that nothing else that runs, warm pools of tests for example, hides in the figure.

    python tests/hostile/measure.py | jq -s 'max_by(.rise)'
    python tests/hostile/measure.py --most                        # as many items as the default limit lets through
"""

import json
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "golden"),
]

from bad import BAD, DICT, START, item, tensor
from cases import CASES
from frames import assemble
from vectors import GOOD, stored

import tensorwire.numpy as tw
from tensorwire import TensorwireError
from tensorwire.bench.rss import Rise
from tensorwire.limits import DEFAULT


def measure(name: str, stream: bytes, limits: object) -> dict:
    rise, began, error = Rise(), time.process_time(), None
    try:
        tw.loads(stream, limits=limits)
    except TensorwireError as caught:
        error = type(caught).__name__
    seconds = time.process_time() - began
    return {"name": name, "fed": len(stream), "error": error, "seconds": seconds, "rise": rise.peak()}


def most() -> None:
    """Streams that describe many items, and bring none of their data."""
    count = 262_144
    deep = [f"{level:02}" for level in range(31)]
    containers = [item(level + 1, DICT, deep[: level + 1]) for level in range(31)]
    for name, frames in {
        "empty dicts": (item(n, DICT, [n]) for n in range(1, count)),
        "tensors": (tensor(n, [str(n)], [4 << 20]) for n in range(1, count)),
        "tensors 32 deep": (*containers, *(tensor(n, [*deep, str(n)], [1]) for n in range(32, count))),
    }.items():
        print(json.dumps(measure(name, assemble((START, item(0, DICT, []), *frames)), DEFAULT)), flush=True)


def main() -> None:
    for name in GOOD:  # what is imported and allocated once is no case's
        if not name.startswith("file"):
            tw.loads(stored(name))
    for name in BAD:
        print(json.dumps(measure(f"bad/{name}", stored(f"bad/{name}"), DEFAULT)))
    for name, case in CASES.items():
        print(json.dumps(measure(name, case.recipe(), case.limits)))


if __name__ == "__main__":
    most() if sys.argv[1:] == ["--most"] else main()
