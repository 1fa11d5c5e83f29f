"""What a compressed training step costs, part by part: `python bench/update_step.py [SPEC] [--ranks 4] [--steps 40]`.

The model of bench/convergence_updates.py (1.07 million parameters) and its batches of 4 windows of 64 bytes, in one
process that plays one of RANKS ranks, with a Compressor(SPEC) for each. Prints milliseconds of processor time, the
median over the steps and the least, beside the forward and backward pass and the step of torch's AdamW (foreach).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from convergence_updates import Model

from tensorwire.bench import machine
from tensorwire.updates import Compressor, Normalizer, combine

State = dict[str, np.ndarray]


class Clock:
    """Processor time of the parts of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()
        made = work()
        self.parts.setdefault(part, []).append(1e3 * (time.process_time() - begin))
        return made


def sent_together(tensors: dict[str, torch.Tensor]) -> State:
    """As the DeMo optimizer sends them: each matrix by itself, all vectors one behind the other."""
    made = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dim() > 1}
    return {**made, "vectors": torch.cat([tensor for tensor in tensors.values() if tensor.dim() < 2]).numpy()}


def main(spec: str, ranks: int, steps: int) -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, clock, model = np.random.default_rng(0), Clock(), Model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    normalizer, compressors = Normalizer(), [Compressor(spec) for _ in range(ranks)]
    for _ in range(steps):
        adamw.zero_grad()
        windows = rng.integers(0, 256, (4, 65)).astype(np.uint8)
        clock("forward and backward", lambda windows=windows: model.loss(windows).backward())
        clock("step of AdamW", adamw.step)
        own = sent_together({name: parameter.grad for name, parameter in model.named_parameters()})
        clock("normalize (beta2)", lambda own=own: normalizer.divide(own))
        messages = []
        for rank, compressor in enumerate(compressors):
            noise = {name: rng.standard_normal(array.shape, np.float32) * array.std() for name, array in own.items()}
            given = {name: array + noise[name] for name, array in own.items()}
            part = "compress" if rank == 0 else "compress, other ranks"
            messages.append(clock(part, lambda one=compressor, given=given: one.compress(given)).data)
        changes = clock(f"combine {ranks} messages", lambda messages=messages: combine(messages, how="present"))
        clock("sign and move", lambda own=own, changes=changes: move(own, changes))
    del clock.parts["compress, other ranks"]
    whole = median(clock.parts["forward and backward"])
    print(machine.describe())
    print(f"{spec}: messages of {len(messages[0])} bytes, {len(own)} tensors\n")
    print("| part | ms, median | least | of forward and backward |\n|---|---|---|---|")
    for part, times in clock.parts.items():
        print(f"| {part} | {median(times):.2f} | {min(times):.2f} | {100 * median(times) / whole:.0f} % |")


def move(weights: State, changes: State) -> None:
    """As the DeMo optimizer does."""
    for name, change in changes.items():
        torch.from_numpy(weights[name]).add_(torch.from_numpy(change).sign_(), alpha=-1e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", default="demo:k=40", metavar="SPEC")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    main(options.spec, options.ranks, options.steps)
