"""Many small tensors beside safetensors, in processor time: `python bench/many_tensors.py [COUNT [TURNS]]`."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

import tensorwire.torch as tw

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 60_000
TURNS = int(sys.argv[2]) if len(sys.argv) > 2 else 3


def seconds(job: Callable[[], Any]) -> float:
    """Of the fastest turn."""
    best = float("inf")
    for _ in range(TURNS):
        began = process_time()
        job()
        best = min(best, process_time() - began)
    return best


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    mine, other = seconds(ours), seconds(theirs)
    print(f"{name}: tensorwire {mine:.3f} s, safetensors {other:.3f} s, ratio {mine / other:.2f}", flush=True)


def main(folder: Path) -> None:
    names = [f"model.layers.{n // 1000}.mlp.experts.{n % 1000 // 3}.w{n % 3}" for n in range(COUNT)]
    state = {name: torch.full((16,), float(number)) for number, name in enumerate(names)}
    ours, theirs, one = folder / "m.tw", folder / "m.safetensors", names[COUNT // 2]
    compare("save", lambda: tw.save_file(state, ours), lambda: safetensors.torch.save_file(state, theirs))
    compare("load", lambda: tw.load_file(ours), lambda: safetensors.torch.load_file(theirs))
    compare("dumps", lambda: tw.dumps(state), lambda: safetensors.torch.save(state))
    message, other = tw.dumps(state), safetensors.torch.save(state)
    compare("loads", lambda: tw.loads(message), lambda: safetensors.torch.load(other))
    compare("open and read one", lambda: tw.open_file(ours)[one], lambda: safe_open(theirs, "pt").get_tensor(one))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
