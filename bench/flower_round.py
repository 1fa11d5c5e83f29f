"""A round of FedAvg on Flower's deployment engine with 2 clients and no training: plain, and with tensorwire, in turns.

    unshare -rn sh -c 'ip link set lo up && python bench/flower_round.py --model decoder --turns 2'

Prints, for each side and turn: seconds of `Strategy.start`, bytes over loopback, the peak of each kind of process; and
the ratios of the medians to plain. `wire` is `WireGrid` and `wire_mod` with Flower's own FedAvg and `ArrayRecord`,
`ours` takes `StreamingFedAvg` in place, `to_record` and `to_state_dict`. It needs flwr and torch. The machine should do
nothing else: times are on the wall.
"""

import argparse
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from flower_deployment import Peaks, deployment, is_alone_on_loopback, run, written

APP = Path(__file__).parent / "flower_app"
ROLES = ("ServerApp", "ClientApp", "SuperNode", "SuperLink", "total")


def measured(side, options):
    """One run on an engine of its own, so that nothing is left of the one before."""
    with tempfile.TemporaryDirectory(prefix="flower-") as folder, deployment(folder) as environment, Peaks() as peaks:
        config = {
            "folder": folder, "side": side, "model": options.model, "scale": options.scale, "rounds": options.rounds,
        }  # fmt: skip
        run(APP, environment, config=config, timeout=900)
        return written(folder) | peaks.most


def row(name, done, form):
    return f"{name:<14}" + "".join(f"{form(done[key], key):>12}" for key in ("seconds", "bytes", *ROLES))


def amount(value, key):
    return f"{value:.1f}" if key == "seconds" else f"{value / 1e6:,.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["decoder", "adapters"], default="decoder")
    parser.add_argument("--scale", type=float, default=1.0, help="of the model: 1.00 GB, or 40 MB of adapters")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=["plain", "wire", "ours"], default=["plain", "wire", "ours"])
    options = parser.parse_args()
    if not is_alone_on_loopback():
        parser.error("others use this network: start it in one of its own, as --help shows")
    print(
        f"{platform.machine()}, flwr {version('flwr')}, torch {version('torch')}; {options.model} x {options.scale:g}"
    )
    print(f"{'':<14}" + "".join(f"{key:>12}" for key in ("s", "MB", *(f"{role} MB" for role in ROLES))))
    runs = {side: [] for side in options.sides}
    for turn in range(options.turns):
        for side in options.sides:
            runs[side].append(measured(side, options))
            print(row(f"{side} {turn + 1}", runs[side][-1], amount), flush=True)
    middle = {side: {key: median(done[key] for done in rows) for key in rows[0]} for side, rows in runs.items()}
    for side in options.sides:
        if side != "plain" and "plain" in middle:
            ratio = {key: middle[side][key] / middle["plain"][key] for key in middle[side]}
            print(row(f"{side} / plain", ratio, lambda value, key: f"{value:.3f}"))


if __name__ == "__main__":
    main()
