"""What error feedback is worth to clients that are asked now and then, and how fast it should be forgotten meanwhile.

    python bench/age.py                         # clients that pull apart
    python bench/age.py --language DIR          # a pre-trained language model; ten minutes, takes the extra `fl`

Each round asks a quarter of 16 clients, who send differences in nf4. Printed is how far from fp32 each setting of
`age` ends, the mean of the seeds and from the lowest to the highest: of "no feedback", too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Final

import numpy as np

import tensorwire
from tensorwire.fl.plan import Plan
from tensorwire.fl.simulate import simulate
from tensorwire.fl.task import Task

CLIENTS: Final = 16
_SETTINGS: Final[dict[str, dict[str, object]]] = {
    "no feedback": {},
    **{f"age {age:g}": {"feedback": True, "age": age} for age in (1.0, 0.9, 0.5)},
}


def pulling(seed: int) -> Task:
    """Each client is drawn to a point of its own; the mean of all is the best that can be done."""
    points = np.random.default_rng(seed).standard_normal((CLIENTS, 100, 200)).astype(np.float32)
    best = points.mean(axis=0)

    def train(state: dict[str, np.ndarray], client: int, round: int) -> tuple[object, int, dict[str, float]]:
        return {"x": state["x"] + np.float32(0.1) * (points[client] - state["x"])}, 1, {}

    return Task(lambda: {"x": np.zeros_like(best)}, train, lambda state: float(np.square(state["x"] - best).mean()))


def language(start: Path, seed: int) -> Task:
    """Fine-tuning as in bench/convergence.py, with as many clients."""
    import torch

    from tensorwire.fl.task import language_model

    torch.set_num_threads(1)
    state = tensorwire.torch.load_file(start)
    sizes = {"hidden": 96, "layers": 2, "context": 64, "batch": 4, "steps": 20}
    return language_model(clients=CLIENTS, seed=seed, rate=3e-4, start=state, **sizes)


def table(title: str, tasks: list[Task], plan: Plan) -> str:
    """Where each setting ends, as Markdown: what it adds to fp32, task by task, which are the seeds."""

    def end(task: Task, seed: int, settings: dict[str, object]) -> float:
        return list(simulate(task, replace(plan, seed=seed, **settings)))[-1].loss

    exact = [end(task, seed, {"up": "raw"}) for seed, task in enumerate(tasks)]
    lines = [
        f"{title}: fp32 ends at {mean(exact):.5f} after {plan.rounds} rounds",
        "",
        "| setting | above fp32 |",
        "|---|---|",
    ]
    for name, settings in _SETTINGS.items():
        above = sorted(end(task, seed, settings) - exact[seed] for seed, task in enumerate(tasks))
        lines.append(f"| {name} | {mean(above):+.6f}, {above[0]:+.6f} to {above[-1]:+.6f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--language", type=Path, metavar="DIR", help="where start.tw of bench/convergence.py stands")
    options = parser.parse_args()
    plan = Plan(rounds=options.rounds, clients=CLIENTS, fraction=0.25, down="raw", up="nf4", keep_outliers=True)
    seeds = range(options.seeds)
    if options.language:
        tasks = [language(options.language / "start.tw", seed) for seed in seeds]
    else:
        tasks = [pulling(seed) for seed in seeds]
    print(table("language model" if options.language else "clients that pull apart", tasks, plan))


if __name__ == "__main__":
    sys.exit(main())
