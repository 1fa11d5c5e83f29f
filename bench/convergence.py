"""Does quantizing the messages hurt learning? Every setting, several seeds, one table, one picture.

    python bench/convergence.py --out DIR
    python bench/convergence.py --out DIR --tiny      # two settings, one round: whether it runs at all

Writes DIR/convergence.json (one run a line), .md and .png. Takes the extra `fl`; some 10 minutes on 2 cores.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

import tensorwire
from tensorwire.fl.plan import Plan
from tensorwire.fl.simulate import simulate
from tensorwire.fl.task import State, language_model
from tensorwire.updates import UpdateKind

Run = dict[str, Any]

CLIENTS: Final = 4
FP32: Final = "fp32"
CENTRAL: Final = "centralized"
PRETRAINED: Final = "pre-trained"
_CODECS: Final = ("bf16", "fp16", "int8", "nf4", "fp4")


class Setting(NamedTuple):
    """How models and updates travel."""

    down: str = "raw"
    up: str = "raw"
    down_kind: UpdateKind = "weights"
    up_kind: UpdateKind = "weights"
    feedback: bool = False


_WEIGHTS: Final = {CENTRAL: Setting(), FP32: Setting()} | {codec: Setting(codec, codec) for codec in _CODECS}
_DIFFERENCES: Final = {
    f"{codec} differences": Setting(codec, codec, "difference", "difference") for codec in ("nf4", "fp4")
}

# start -> setting. A random start moves far and forgives much; fine-tuning takes steps that are smaller
# than what four bits of a weight can tell apart.
SETTINGS: Final[dict[str, dict[str, Setting]]] = {
    "random": _WEIGHTS | _DIFFERENCES,
    PRETRAINED: _WEIGHTS
    | {"nf4 differences up": Setting("nf4", "nf4", up_kind="difference")}
    | {"bf16 down, nf4 differences up": Setting("bf16", "nf4", up_kind="difference")}
    | _DIFFERENCES
    | {f"{name}, feedback": setting._replace(feedback=True) for name, setting in _DIFFERENCES.items()},
}
TINY: Final = {start: {name: named[name] for name in (FP32, "nf4")} for start, named in SETTINGS.items()}
# Of Okabe and Ito; the first whose name is part of a setting's.
_COLOURS: Final = {
    CENTRAL: "#999999",
    FP32: "#000000",
    "bf16 down": "#CC79A7",
    "bf16": "#56B4E9",
    "fp16": "#0072B2",
    "int8": "#009E73",
    "nf4": "#E69F00",
    "fp4": "#D55E00",
}
_MODEL: Final = {"hidden": 96, "layers": 2, "context": 64}
_STEPS: Final = 20
_BATCH: Final = 4
_RATES: Final = {"random": 3e-3, PRETRAINED: 3e-4}
_PRETRAINING: Final = ((3e-3, 1000), (1e-3, 600))  # learning rate, steps of four times the batch


def experiment(
    out: Path,
    settings: dict[str, dict[str, Setting]] = SETTINGS,
    *,
    rounds: int = 20,
    seeds: int = 3,
    processes: int | None = None,
    pretraining: tuple[tuple[float, int], ...] = _PRETRAINING,
) -> list[Run]:
    """Every setting with every seed, in as many processes as there are cores; writes and returns the runs."""
    out.mkdir(parents=True, exist_ok=True)
    pretrained = out / "start.tw"
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        ready = pool.submit(pretrain, pretrained, pretraining)
        jobs = []
        for start, named in settings.items():
            if start == PRETRAINED:
                ready.result()
            for name, setting in named.items():
                jobs += [pool.submit(run, start, name, setting, seed, rounds, pretrained) for seed in range(seeds)]
        for number, job in enumerate(as_completed(jobs), 1):
            done = job.result()
            name = f"{done['start']} {done['setting']} {done['seed']}"
            print(f"{number}/{len(jobs)} {name}: {done['losses'][-1]}", file=sys.stderr)
    runs = [job.result() for job in jobs]
    (out / "convergence.json").write_text("".join(json.dumps(each) + "\n" for each in runs))
    (out / "convergence.md").write_text(table(runs))
    draw(runs, out / "convergence.png")
    return runs


def pretrain(path: Path, schedule: tuple[tuple[float, int], ...]) -> None:
    """Train a start on the text of all clients, by (learning rate, steps), and save it."""
    _one_thread()
    state: State = {}
    for number, (rate, steps) in enumerate(schedule):
        task = language_model(clients=1, batch=4 * _BATCH, steps=steps, rate=rate, start=state or None, **_MODEL)
        state, _, _ = task.train(task.initial(), 0, number)
    tensorwire.torch.save_file(dict(state), path)


def run(start: str, name: str, setting: Setting, seed: int, rounds: int, pretrained: Path) -> Run:
    """One curve: losses and bytes so far, from before the first round to after the last."""
    _one_thread()
    state = tensorwire.torch.load_file(pretrained) if start == PRETRAINED else None
    # One client with everybody's text and as many examples a step: training before it was federated.
    clients, batch = (1, CLIENTS * _BATCH) if name == CENTRAL else (CLIENTS, _BATCH)
    task = language_model(
        clients=clients, batch=batch, seed=seed, steps=_STEPS, rate=_RATES[start], start=state, **_MODEL
    )
    plan = Plan(
        rounds=rounds,
        clients=clients,
        down=setting.down,
        down_kind=setting.down_kind,
        up=setting.up,
        kind=setting.up_kind,
        feedback=setting.feedback,
    )
    curve = list(simulate(task, plan))
    losses, sent = [round(point.loss, 5) for point in curve], [point.bytes for point in curve]
    return {"start": start, "setting": name, "seed": seed, "losses": losses, "bytes": sent}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def table(runs: list[Run]) -> str:
    """Markdown: where each setting ends, against FL in fp32 and how far its own seeds are apart."""
    lines = []
    for start, curves in _by_setting(runs).items():
        ends = {setting: sorted(each["losses"][-1] for each in found) for setting, found in curves.items()}
        low, high = ends[FP32][0], ends[FP32][-1]
        rounds = len(curves[FP32][0]["losses"]) - 1
        begin = mean(each["losses"][0] for each in curves[FP32])
        ends_between = f"between {low:.4f} and {high:.4f}, {high - low:.4f} apart"
        lines += [
            f"Start: {start}, loss {begin:.4f}. After {rounds} rounds FL in fp32 ends {ends_between}.",
            "",
            "| setting | MB a round and client | loss, mean | lowest to highest | above fp32 | within |",
            "|---|---|---|---|---|---|",
        ]
        for setting, losses in ends.items():
            above = mean(losses) - mean(ends[FP32])
            size = f"{curves[setting][0]['bytes'][-1] / rounds / CLIENTS / 1e6:.2f}"
            verdict = "yes" if mean(losses) <= high else "no"
            lines.append(
                f"| {setting} | {'' if setting == CENTRAL else size} | {mean(losses):.4f} "
                f"| {losses[0]:.4f} to {losses[-1]:.4f} | {'' if setting == FP32 else f'{above:+.4f}'} "
                f"| {'' if setting in (CENTRAL, FP32) else verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def _by_setting(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Start -> setting -> its seeds, in the order of the runs."""
    found: dict[str, dict[str, list[Run]]] = {}
    for each in runs:
        found.setdefault(each["start"], {}).setdefault(each["setting"], []).append(each)
    return found


def draw(runs: list[Run], path: Path) -> None:
    """Loss over rounds and over bytes: means of the seeds, and from the lowest to the highest of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    starts = _by_setting(runs)
    figure = Figure(figsize=(11, 4.6 * len(starts)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), (start, curves) in zip(
        figure.subplots(len(starts), 2, squeeze=False), starts.items(), strict=True
    ):
        for setting, found in curves.items():
            points = list(zip(*(each["losses"] for each in found), strict=True))
            sent = [count / 1e6 for count in found[0]["bytes"]]
            look = {
                "color": _colour(setting),
                "linestyle": _dashes(setting),
                "linewidth": 1.3,
                "label": setting,
            }
            for axes, across in ((left, range(len(points))), (right, sent)):
                if axes is left or setting != CENTRAL:  # which sends nothing
                    shown = list(zip(across, points, strict=True))[1:]
                    places, levels = [place for place, _ in shown], [point for _, point in shown]
                    axes.plot(places, [mean(level) for level in levels], **look)
                    low, high = [min(level) for level in levels], [max(level) for level in levels]
                    axes.fill_between(places, low, high, color=look["color"], alpha=0.12, linewidth=0)
        for axes, label in ((left, "rounds"), (right, f"MB between the server and {CLIENTS} clients")):
            axes.set_xlabel(label)
            axes.set_ylabel("held-out loss, nats a byte")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#DDDDDD", linewidth=0.6)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_xscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_title(f"{start} start", loc="left")
        left.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def _colour(setting: str) -> str:
    return next(colour for name, colour in _COLOURS.items() if name in setting)


def _dashes(setting: str) -> str:
    if setting in _WEIGHTS:
        return "-"
    return "--" if setting.endswith(" differences") else ":" if "feedback" in setting else "-."


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for convergence.json, .md and .png")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="at a time; one a core")
    parser.add_argument(
        "--tiny", action="store_true", help="two settings, one round, one seed, hardly any pre-training"
    )
    options = parser.parse_args()
    if options.tiny:
        runs = experiment(options.out, TINY, rounds=1, seeds=1, processes=1, pretraining=((3e-3, 1),))
    else:
        runs = experiment(options.out, rounds=options.rounds, seeds=options.seeds, processes=options.processes)
    print(table(runs))


if __name__ == "__main__":
    main()
