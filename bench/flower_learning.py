"""Does a model learn in Flower as it does without tensorwire? Both sides, several seeds, one table, one picture.

    python bench/flower_learning.py --out DIR

FedAvg in Flower's simulation engine over four clients, each with packages of its own of the standard library's
sources (tensorwire/fl/task.py divides them), of which a network of 140,000 weights learns the next byte from the eight
before it. `plain` is Flower alone; `ours` is `WireGrid` with its defaults, `wire_mod`, `StreamingFedAvg`, `to_record`
and `to_state_dict`. Writes DIR/flower-learning.json (one curve a line) and .png, and prints the table. Takes
flwr[simulation], torch and matplotlib; some minutes on 2 cores.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from learning_curves import SIDES, table
from torch import nn
from torch.nn import functional

from tensorwire.fl.task import split
from tensorwire.integrations.flower import StreamingFedAvg, WireGrid, to_record, to_state_dict, wire_mod

CLIENTS = 4
CONTEXT, STEPS, BATCH, RATE, EVALUATED = 8, 40, 64, 2e-3, 8192
LOOKS = {"plain": {"color": "#000000"}, "ours": {"color": "#D55E00", "linestyle": "--"}}


def made(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.GELU(), nn.Linear(256, 256)
    )


def loss_of(model, text, starts):
    windows = torch.from_numpy(np.stack([text[start : start + CONTEXT + 1] for start in starts]).astype(np.int64))
    return functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])


def train(model, text, draw):
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, text, draw.integers(0, len(text) - CONTEXT, BATCH)).backward()
        optimizer.step()


def evaluate(model):
    _, held_out = split(CLIENTS)
    with torch.no_grad():
        return float(loss_of(model, held_out, np.linspace(0, len(held_out) - CONTEXT - 1, EVALUATED).astype(int)))


client = ClientApp(mods=[wire_mod])


@client.train()
def fit(message, context):
    config, arrays = message.content["config"], message.content["arrays"]
    ours, number = config["side"] == "ours", int(context.node_config["partition-id"])
    model, (texts, _) = made(config["seed"]), split(CLIENTS)
    model.load_state_dict(to_state_dict(arrays) if ours else arrays.to_torch_state_dict())
    train(model, texts[number], np.random.default_rng([config["seed"], number, config["server-round"]]))
    record = (to_record if ours else ArrayRecord)(model.state_dict())
    metrics = MetricRecord({"num-examples": STEPS * BATCH})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


class Counted:
    """A grid that counts the bytes of the arrays that pass it."""

    def __init__(self, grid):
        self._grid = grid
        self.bytes = 0

    def __getattr__(self, name):
        return getattr(self._grid, name)

    def push_messages(self, messages):
        return self._grid.push_messages(self._count(messages))

    def pull_messages(self, message_ids):
        return self._count(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages, *, timeout=None):
        return self._count(self._grid.send_and_receive(self._count(messages), timeout=timeout))

    def _count(self, messages):
        messages = list(messages)
        for message in messages:
            if message.has_content():
                records = message.content.array_records.values()
                self.bytes += sum(len(array.data) for record in records for array in record.values())
        return messages


def curve(grid, side, seed, rounds):
    """The held-out loss before the first round and after each."""
    model, losses, counted, ours = made(seed), [], Counted(grid), side == "ours"
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def evaluated(number, arrays):
        model.load_state_dict(to_state_dict(arrays))
        losses.append(round(evaluate(model), 5))

    strategy = (StreamingFedAvg if ours else FedAvg)(fraction_evaluate=0.0)
    strategy.start(
        grid=WireGrid(counted, poll=0.1) if ours else counted,
        initial_arrays=(to_record if ours else ArrayRecord)(start),
        train_config=ConfigRecord({"side": side, "seed": seed}),
        num_rounds=rounds,
        evaluate_fn=evaluated,
    )
    return {"side": side, "seed": seed, "losses": losses, "bytes": counted.bytes}


def within(curves):
    """After how many rounds the mean of ours is within the seeds of plain."""
    plain, ours = (
        list(zip(*(each["losses"] for each in curves if each["side"] == side), strict=True))[1:] for side in SIDES
    )
    inside = sum(min(seeds) <= mean(point) <= max(seeds) for seeds, point in zip(plain, ours, strict=True))
    return f"The mean of ours is within the seeds of plain after {inside} of {len(plain)} rounds."


def draw(curves, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in SIDES:
        points = list(zip(*(each["losses"] for each in curves if each["side"] == side), strict=True))[1:]
        across = range(1, len(points) + 1)
        axes.plot(across, [mean(point) for point in points], label=side, linewidth=1.4, **LOOKS[side])
        low, high = [*map(min, points)], [*map(max, points)]
        axes.fill_between(across, low, high, color=LOOKS[side]["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("rounds")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for flower-learning.json and .png")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    curves, server = [], ServerApp()

    @server.main()
    def run(grid, context):
        for seed in range(options.seeds):
            for side in SIDES:
                curves.append(curve(grid, side, seed, options.rounds))
                print(f"{side} {seed}: {curves[-1]['losses'][-1]}", file=sys.stderr)

    run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1}})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "flower-learning.json").write_text("".join(json.dumps(each) + "\n" for each in curves))
    draw(curves, options.out / "flower-learning.png")
    print(table(curves, "MB a round and client", options.rounds * CLIENTS))
    print(within(curves))


if __name__ == "__main__":
    main()
