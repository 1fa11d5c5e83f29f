"""What compressed training loses: loss over bytes of DeMo, DiLoCo and their kin, in real processes over gloo.

    python bench/convergence_updates.py --out DIR
    python bench/convergence_updates.py --out DIR --seeds 3 --methods AdamW "DeMo k=32"
    python bench/convergence_updates.py --out DIR --tiny       # whether it runs at all

Four workers, each with packages of the Python standard library of its own, train a model of bytes of 1.06 million
parameters from a common warm start. All methods of a seed see the same text in the same order. Writes DIR/updates.json
(one run a line, as soon as it is done; runs that are there already are not repeated), .md and .png.

Bytes are those that a worker gives to its process group (up) and gets from it (down), framing included; of a method
with a server, those of a worker that is not the server. Seconds are of the processor: of a worker's whole step, and of
what the method has of it (its optimizer, compression, exchange).
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

import tensorwire
from tensorwire.fl.task import split
from tensorwire.integrations.torch_distributed import DeMo, DiLoCo
from tensorwire.updates import Compressor, Normalizer, combine

Run = dict[str, Any]
Text = np.ndarray[Any, np.dtype[np.uint8]]

WORKERS: Final = 4
_WIDTH: Final = 128
_LAYERS: Final = 5
_HEADS: Final = 4
_CONTEXT: Final = 64
_BATCH: Final = 4
_WINDOWS: Final = 96  # of held-out text
_EVALUATIONS: Final = 10
_WARM: Final = (3e-3, 200)  # learning rate and steps of the warm start
# Of lines, darkest first, and their markers, by what a row exchanges.
_COLOURS: Final = {
    "whole gradients": (("#000000", "#888888"), "s"),
    "each step": (
        (
            *("#08306B", "#2171B5", "#6BAED6", "#00695C", "#26A69A", "#7B1FA2", "#BA68C8", "#AFB42B", "#E91E63"),
            *("#5D4037", "#A1887F", "#455A64", "#90A4AE", "#D50000", "#00C853"),
        ),
        "o",
    ),
    "outer steps": (("#7F2704", "#D94801", "#FD8D3C", "#FDBE85", "#FFC107", "#8D6E63", "#FF6F00"), "^"),
}
_SERVER: Final = WORKERS - 1  # the rank of it; the first rank writes down what a worker sends
_LENGTH: Final = 8  # bytes, before a message
_WARM_UP: Final = 20  # steps until the learning rate is reached; then it falls to a tenth along a cosine


class Method(NamedTuple):
    """A row: how the workers learn. `every`: steps between outer steps, of DiLoCo; 0 for an exchange at each step.

    `beta2`: of the mean squares that DeMo divides gradients by; None: it does not. `down`: what a server compresses the
    workers' sum with; empty: there is no server, and all send to all. `feedback`: what a codec drops from an outer step
    is added to the next one.
    """

    spec: str
    lr: float = 2e-3
    beta2: float | None = None
    every: int = 0
    rate: float = 0.7
    momentum: float = 0.9
    overlap: bool = False
    down: str = ""
    feedback: bool = False


METHODS: Final[dict[str, Method]] = {
    "AdamW": Method("adamw"),
    "DeMo k=40 normalized": Method("demo:k=40,beta=0.99,alpha=0.1", beta2=0.99),
    "DeMo k=40 alpha=0.1": Method("demo:k=40,beta=0.99,alpha=0.1"),
    "DeMo k=32 alpha=0.2": Method("demo:k=32,beta=0.995,alpha=0.2"),
    "DeMo k=32": Method("demo:k=32"),
    "DeMo k=15 normalized": Method("demo:k=15,beta=0.99,alpha=0.1", beta2=0.99),
    "DeMo k=40 normalized, server k=64": Method(
        "demo:k=40,beta=0.99,alpha=0.1", beta2=0.99, down="topk:k=64,dct=true,values=sign"
    ),
    "DeMo k=40 normalized, server k=40": Method(
        "demo:k=40,beta=0.99,alpha=0.1", beta2=0.99, down="topk:k=40,dct=true,values=sign"
    ),
    "DeMo k=5 no DCT": Method("demo:k=5,dct=false"),
    "DeMo k=32 one step late": Method("demo:k=32", overlap=True),
    "DiLoCo fp32": Method("raw", every=20),
    "DiLoCo nf4": Method("nf4", every=20),
    "DiLoCo nf4 with feedback": Method("nf4:double_quant=true", every=20, feedback=True),
    "SparseLoCo k=600 2bit, rate 1.5": Method("topk:k=600", every=20, rate=1.5, momentum=0.0),
    "SparseLoCo k=64 2bit, rate 3": Method("topk:k=64,beta=0.95", every=20, rate=3.0, momentum=0.0),
    "SparseLoCo k=24 sign, rate 3": Method("topk:k=24,values=sign,beta=0.95", every=20, rate=3.0, momentum=0.0),
    "DiLoCo rank 3, rate 1": Method("lowrank:rank=3,k=8", every=20, rate=1.0, momentum=0.0),
    "AdamW lr 0.004": Method("adamw", lr=4e-3),
    "DeMo k=40 normalized, alpha=1, lr 0.004": Method("demo:k=40", lr=4e-3, beta2=0.99),
    "DeMo k=15 normalized, alpha=1, lr 0.004": Method("demo:k=15", lr=4e-3, beta2=0.99),
    "DeMo k=5 normalized, alpha=1, lr 0.004": Method("demo:k=5", lr=4e-3, beta2=0.99),
    "DeMo k=4 normalized, alpha=1, lr 0.004": Method("demo:k=4", lr=4e-3, beta2=0.99),
    "DeMo k=40 normalized lr 0.004": Method("demo:k=40,beta=0.99,alpha=0.1", lr=4e-3, beta2=0.99),
}
# One of each class.
TINY: Final = (
    "AdamW",
    "DeMo k=32",
    "DeMo k=40 normalized, server k=40",
    "DiLoCo nf4 with feedback",
    "SparseLoCo k=64 2bit, rate 3",
)


# ---- the model -------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Attention and a feed-forward net, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(_WIDTH), torch.nn.LayerNorm(_WIDTH)
        self.qkv, self.out = torch.nn.Linear(_WIDTH, 3 * _WIDTH), torch.nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = torch.nn.Linear(_WIDTH, 4 * _WIDTH), torch.nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(torch.nn.Module):
    """A transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = torch.nn.Embedding(256, _WIDTH), torch.nn.Embedding(_CONTEXT, _WIDTH)
        self.layers = torch.nn.Sequential(*(Layer() for _ in range(_LAYERS)))
        self.norm, self.head = torch.nn.LayerNorm(_WIDTH), torch.nn.Linear(_WIDTH, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * _LAYERS) if "out" in name else 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))

    def loss(self, windows: Text) -> torch.Tensor:
        """Nats a byte, of windows of text."""
        tokens = torch.from_numpy(windows.astype(np.int64))
        return functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def evaluate(model: Model, text: Text) -> float:
    """The loss on windows all over a text; only the first worker looks."""
    if dist.get_rank():
        return 0.0
    starts = np.linspace(0, len(text) - _CONTEXT - 1, _WINDOWS).astype(int)
    with torch.no_grad():
        return round(float(model.loss(_windows(text, starts))), 5)


def _windows(text: Text, starts: Any) -> Text:
    return np.stack([text[start : start + _CONTEXT + 1] for start in starts])


# ---- what the rows do ------------------------------------------------------------------------------------------


class AllReduce:
    """AdamW on the mean of whole gradients, in fp32: what everything else is compared with."""

    def __init__(self, model: Model, method: Method) -> None:
        self._model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr)
        self.sent = 0

    @property
    def received(self) -> int:
        return self.sent

    def step(self) -> None:
        """Exchange and move."""
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        self.sent += flat.nbytes
        self.optimizer.step()


class Decoupled:
    """DeMo."""

    def __init__(self, model: Model, method: Method) -> None:
        options: dict[str, Any] = {"spec": method.spec, "beta2": method.beta2, "overlap": method.overlap}
        self.optimizer = DeMo(model.named_parameters(), method.lr, **options)

    @property
    def sent(self) -> int:
        return self.optimizer.sent

    @property
    def received(self) -> int:
        return self.optimizer.sent * (WORKERS - 1)

    def step(self) -> None:
        """Exchange and move."""
        self.optimizer.step()


class ThroughServer:
    """DeMo whose workers send to one of them only, the server.

    The server compresses the sum of the messages for the way back and keeps what that leaves out. What a worker sends
    and receives does not grow with the number of workers.
    """

    def __init__(self, model: Model, method: Method) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=method.lr)
        self._matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
        self._vectors = [weight for weight in model.parameters() if weight.dim() == 1]
        self._worker, self._server = Compressor(method.spec), Compressor(method.down)
        self._normalizer = None if method.beta2 is None else Normalizer(method.beta2)
        self.sent = self.received = 0

    def step(self) -> None:
        """Exchange and move."""
        gradients = {name: weight.grad.numpy() for name, weight in self._matrices.items()}
        gradients["vectors"] = torch.cat([weight.grad for weight in self._vectors]).numpy()
        if self._normalizer is not None:
            gradients = self._normalizer.divide(gradients)
        message = self._exchange(self._worker.compress(gradients).data)
        signs = {name: torch.from_numpy(np.sign(change)) for name, change in combine([message]).items()}
        for name, weight in self._matrices.items():
            weight.grad = signs[name]
        parts = signs["vectors"].split([weight.numel() for weight in self._vectors])
        for weight, part in zip(self._vectors, parts, strict=True):
            weight.grad = part
        self.optimizer.step()  # by the learning rate times the signs

    def _exchange(self, message: bytes) -> bytes:
        """The server's message, for a worker's."""
        if dist.get_rank() == _SERVER:
            messages = [message if rank == _SERVER else _receive(rank) for rank in range(WORKERS)]
            message = self._server.compress(combine(messages)).data
        else:
            self.sent += _send(message, _SERVER)
        message = _broadcast(message)
        self.received += len(message) + _LENGTH
        return message


class Outer:
    """AdamW on each worker, and outer steps."""

    def __init__(self, model: Model, method: Method) -> None:
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr)
        options = {"every": method.every, "rate": method.rate, "momentum": method.momentum}
        self._outer = DiLoCo(model.named_parameters(), spec=method.spec, **options)

    @property
    def sent(self) -> int:
        return self._outer.sent

    @property
    def received(self) -> int:
        return self._outer.sent * (WORKERS - 1)

    def step(self) -> None:
        """Move, and maybe exchange."""
        self.optimizer.step()
        self._outer.step()


class OuterWithFeedback(Outer):
    """The same with a codec: what it drops from an outer step is added to the next one."""

    def __init__(self, model: Model, method: Method) -> None:
        super().__init__(model, method)
        self._codec, self._every, self._steps = method.spec, method.every, 0
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._base = {name: weight.clone() for name, weight in self._weights.items()}
        self._dropped = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}

    def step(self) -> None:
        """Move, and maybe exchange."""
        self._steps += 1
        due = self._steps % self._every == 0
        self.optimizer.step()
        if due:
            self._add_dropped()
        self._outer.step()
        if due:
            self._base = {name: weight.clone() for name, weight in self._weights.items()}

    def _add_dropped(self) -> None:
        """Move the weights so that the change, which is the base minus the weights, has what was dropped before."""
        for name, weight in self._weights.items():
            weight -= self._dropped[name]
        changes = {name: self._base[name] - weight for name, weight in self._weights.items()}
        sent = tensorwire.torch.loads(tensorwire.torch.dumps(changes, codec=self._codec))
        self._dropped = {name: change - sent[name] for name, change in changes.items()}


def learner(model: Model, method: Method) -> Any:
    """What makes the steps of a method."""
    kind: Callable[[Model, Method], Any] = Decoupled
    if method.every:
        kind = OuterWithFeedback if method.feedback else Outer
    elif method.spec == "adamw":
        kind = AllReduce
    elif method.down:
        kind = ThroughServer
    return kind(model, method)


def train(model: Model, method: Method, text: Text, held_out: Text, *, seed: int, steps: int) -> Run:
    """One run on this worker: losses and bytes at the same steps, seconds of a step."""
    made = learner(model, method)
    draw = np.random.default_rng([seed, dist.get_rank()])
    losses, sent, whole, spent = [evaluate(model, held_out)], [0], 0.0, 0.0
    for step in range(steps):
        begin = time.process_time()
        for group in made.optimizer.param_groups:
            group["lr"] = method.lr * _share(step, steps)
        made.optimizer.zero_grad()
        model.loss(_windows(text, draw.integers(0, len(text) - _CONTEXT - 1, _BATCH))).backward()
        computed = time.process_time()
        made.step()
        spent += time.process_time() - computed
        whole += time.process_time() - begin
        if (step + 1) % max(steps // _EVALUATIONS, 1) == 0:
            losses.append(evaluate(model, held_out))
            sent.append(made.sent)
    milliseconds = {"ms": 1e3 * whole / steps, "method_ms": 1e3 * spent / steps}
    return {"losses": losses, "bytes": sent, "received": made.received, **milliseconds}


def _share(step: int, steps: int) -> float:
    """Of the learning rate."""
    warm = min(1.0, (step + 1) / _WARM_UP)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


# ---- messages of any length ------------------------------------------------------------------------------------


def _send(message: bytes, rank: int) -> int:
    """Send a message after its length; returns the bytes sent."""
    dist.send(torch.tensor([len(message)]), rank)
    dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), rank)
    return len(message) + _LENGTH


def _receive(rank: int) -> bytes:
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, rank)
    message = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(message, rank)
    return message.numpy().tobytes()


def _broadcast(message: bytes) -> bytes:
    """The server's message, on every rank; what the others give does not matter."""
    length = torch.tensor([len(message)])
    dist.broadcast(length, _SERVER)
    data = torch.empty(int(length), dtype=torch.uint8)
    if dist.get_rank() == _SERVER:
        data.numpy()[:] = np.frombuffer(message, np.uint8)
    dist.broadcast(data, _SERVER)
    return data.numpy().tobytes()


# ---- processes -------------------------------------------------------------------------------------------------


def worker(rank: int, folder: str, jobs: list[tuple[str, Method, int]], steps: int, warm: int) -> None:
    """One of the workers: all runs, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORKERS)
    texts, held_out = split(WORKERS)
    starts: dict[int, dict[str, torch.Tensor]] = {}
    for name, method, seed in jobs:
        torch.manual_seed(seed)
        model = Model()
        if seed not in starts:
            train(model, Method("adamw", lr=_WARM[0]), texts[rank], held_out, seed=1000 + seed, steps=warm)
            starts[seed] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.load_state_dict(starts[seed])
        run = {"method": name, **method._asdict(), "seed": seed, "steps": steps}
        method = method._replace(every=min(method.every, max(steps // 2, 1)))
        run |= train(model, method, texts[rank], held_out, seed=seed, steps=steps)
        if rank == 0:
            with open(Path(folder) / "runs", "a") as file:
                file.write(json.dumps(run) + "\n")
    dist.destroy_process_group()


def experiment(out: Path, names: list[str], *, seeds: range, steps: int, warm: int) -> list[Run]:
    """The runs that are not in `out` yet, in processes of their own; all runs, in the order of the rows."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "updates.json"
    runs = _read(path)
    there = {(run["method"], run["seed"], run["steps"]) for run in runs}
    jobs = [(name, METHODS[name], seed) for seed in seeds for name in names if (name, seed, steps) not in there]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=worker, args=(rank, folder, jobs, steps, warm), daemon=True)
            for rank in range(WORKERS if jobs else 0)
        ]
        for process in processes:
            process.start()
        shown = 0
        while any(process.is_alive() for process in processes):
            time.sleep(1)
            done = _read(Path(folder) / "runs")
            for run in done[shown:]:
                print(f"{run['method']} {run['seed']}: {run['losses'][-1]}", file=sys.stderr, flush=True)
                path.write_text("".join(json.dumps(each) + "\n" for each in runs + done))
            shown = len(done)
        runs += _read(Path(folder) / "runs")
        failed = [process.exitcode for process in processes if process.exitcode]
    path.write_text("".join(json.dumps(each) + "\n" for each in runs))
    if failed:
        raise SystemExit("a worker failed")
    order = list(METHODS)
    return sorted(runs, key=lambda run: (order.index(run["method"]), run["seed"]))


def _read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- table and picture -----------------------------------------------------------------------------------------


def table(runs: list[Run]) -> str:
    """Markdown: where each method ends, against AdamW with the same learning rate, and what it sends and costs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    plain = {(run["lr"], run["seed"]): run["losses"][-1] for run in runs if run["spec"] == "adamw"}
    whole = max(run["bytes"][-1] for run in runs)
    begin, steps = f"{mean(run['losses'][0] for run in runs):.4f}", runs[0]["steps"]
    lines = [
        f"Loss at the start {begin} nats a byte; {steps} steps. Means of seeds (lowest to highest); least times.",
        "",
        "| method | seeds | loss | above AdamW, same rate | MB up | times fewer | MB down | ms a step | of it method |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        ratios = [
            100 * (run["losses"][-1] / plain[key] - 1) for run in each if (key := (run["lr"], run["seed"])) in plain
        ]
        sent, received = mean(run["bytes"][-1] for run in each), mean(run["received"] for run in each)
        whole_ms, method_ms = (min(run[key] for run in each) for key in ("ms", "method_ms"))
        loss = _spread([run["losses"][-1] for run in each], ".4f")
        lines.append(
            f"| {name} | {len(each)} | {loss} | {_spread(ratios, '+.2f', ' %')} | {sent / 1e6:.2f} "
            f"| {whole / sent:.0f} | {received / 1e6:.2f} | {whole_ms:.0f} | {method_ms:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str, unit: str = "") -> str:
    """The mean of values, with the lowest and the highest where there are several."""
    if not values:
        return ""
    around = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{unit}{around}"


def draw(runs: list[Run], path: Path) -> None:
    """Loss over the bytes that a worker has sent: means of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    # The legend has the order in which the lines end.
    ends = {name: mean(run["losses"][-1] for run in each) for name, each in found.items()}
    number = dict.fromkeys(_COLOURS, 0)
    for name in sorted(found, key=ends.__getitem__, reverse=True):
        each = found[name]
        points = list(zip(*(run["losses"] for run in each), strict=True))[1:]
        across = [mean(counts) / 1e6 for counts in zip(*(run["bytes"] for run in each), strict=True)][1:]
        shown = [(at, mean(point)) for at, point in zip(across, points, strict=True) if at]
        kind = "whole gradients" if each[0]["spec"] == "adamw" else "outer steps" if each[0]["every"] else "each step"
        colours, marker = _COLOURS[kind]
        colour = colours[number[kind] % len(colours)]
        number[kind] += 1
        axes.plot(
            *zip(*shown, strict=True), color=colour, marker=marker, markersize=4, label=f"{ends[name]:.3f}  {name}"
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB that a worker has sent")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.legend(loc="outside right center", frameon=False, fontsize=9, title="loss at the end")
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for updates.json, .md and .png")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0, help="settings are chosen on seeds that are not reported")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tiny", action="store_true", help="a method of each class, four steps")
    options = parser.parse_args()
    names, steps, warm = options.methods, options.steps, _WARM[1]
    if options.tiny:
        names, steps, warm = list(TINY), 4, 1
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = experiment(options.out, names, seeds=seeds, steps=steps, warm=warm)
    (options.out / "updates.md").write_text(table(runs))
    draw(runs, options.out / "updates.png")
    print(table(runs))


if __name__ == "__main__":
    main()
