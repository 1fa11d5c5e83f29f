"""Does a model learn in NVIDIA FLARE as before, once tensorwire is on the wire? Both sides, several seeds, a table.

    python bench/nvflare_learning.py --out DIR

FedAvg in FLARE's simulator over four clients, each with packages of its own of the standard library's sources, on the
small language model of tensorwire/fl/task.py. `plain` is FLARE alone; `ours` is `add_to` with its defaults and
`WireAggregator`. The loss is that of the model that the first client received, on text that nobody trains on. Writes
DIR/nvflare-learning.json (one curve a line) and prints the table. Takes the extras `nvflare` and `fl`, and root for a
network of its own for each job (`unshare -n`), in which bytes are counted; some minutes on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from learning_curves import SIDES, table
from nvflare_round import UP, carried

from tensorwire.fl.task import Task, language_model

CLIENTS = 4
MODEL = {"hidden": 96, "layers": 2, "context": 64, "steps": 20, "batch": 4, "rate": 3e-3}


class Model(torch.nn.Module):
    """The parameters of the task, under their names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        for name, tensor in task_of(seed).initial().items():
            *path, last = name.split(".")
            place: torch.nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(last, torch.nn.Parameter(tensor))


def task_of(seed: int) -> Task:
    torch.set_num_threads(1)
    return language_model(clients=CLIENTS, seed=seed, **MODEL)


def client(seed: int, losses: str) -> None:
    """What a site runs."""
    import nvflare.client as flare

    flare.init()
    number = int(flare.get_site_name().removeprefix("site-")) - 1
    task = task_of(seed)
    while flare.is_running():
        received = flare.receive()
        if number == 0:
            with open(losses, "a") as file:
                file.write(f"{task.evaluate(received.params):.5f}\n")  # FLARE has a `print` of its own
        trained, weight, _ = task.train(received.params, number, received.current_round)
        flare.send(flare.FLModel(params=trained, meta={"NUM_STEPS_CURRENT_ROUND": weight}))


def job(side: str, seed: int, rounds: int, folder: str) -> None:
    """The simulator. The last round is only there for the model that it begins with."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat
    from nvflare.recipe.sim_env import SimEnv

    from tensorwire.integrations.nvflare import WireAggregator, add_to

    recipe = FedAvgRecipe(
        name="learning",
        model={"class_path": "nvflare_learning.Model", "args": {"seed": seed}},
        min_clients=CLIENTS,
        num_rounds=rounds + 1,
        train_script=__file__,
        train_args=f"--client {folder}/losses --seed {seed}",
        server_expected_format=ExchangeFormat.PYTORCH,
        aggregator=WireAggregator() if side == "ours" else None,
    )
    if side == "ours":
        add_to(recipe)
    before = carried()
    recipe.execute(SimEnv(num_clients=CLIENTS, workspace_root=folder))
    Path(folder, "bytes").write_text(str((carried() - before) // (rounds + 1)))


def curve(side: str, seed: int, rounds: int) -> dict[str, Any]:
    """The loss before the first round and after each, and the bytes that a round took on the sockets."""
    with tempfile.TemporaryDirectory() as folder:
        inner = [sys.executable, __file__, "--run", side, "--seed", str(seed), "--rounds", str(rounds), "--out", folder]
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(Path(folder, "log"), "wb") as log:
            subprocess.run(
                ["unshare", "-n", sys.executable, "-c", UP, *inner],
                env={**os.environ, "PYTHONPATH": path},
                cwd=folder,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        losses = [float(line) for line in Path(folder, "losses").read_text().split()]
        if len(losses) != rounds + 1:
            sys.exit(Path(folder, "log").read_text()[-5000:])
        return {"side": side, "seed": seed, "losses": losses, "bytes": int(Path(folder, "bytes").read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for nvflare-learning.json")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.seed, options.client)
    elif options.run:
        job(options.run, options.seed, options.rounds, str(options.out))
    elif options.out is None:
        parser.error("--out: where the curves go")
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    curves = []
    for seed in range(options.seeds):
        for side in SIDES:
            curves.append(curve(side, seed, options.rounds))
            print(f"{side} {seed}: {curves[-1]['losses'][-1]}", file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "nvflare-learning.json").write_text("".join(json.dumps(each) + "\n" for each in curves))
    print(table(curves, "MB a round"))


if __name__ == "__main__":
    main()
