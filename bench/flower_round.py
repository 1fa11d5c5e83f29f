"""A round of FedAvg on Flower's deployment engine with 2 clients and no training: plain, and with tensorwire, in turns.

    unshare -rn sh -c 'ip link set lo up && python bench/flower_round.py --model decoder --turns 2'

Prints, for each side and turn: seconds of `Strategy.start`, processor seconds of all processes from their start, bytes
over loopback, the peak of each kind of process; and the ratios of the medians to plain. `wire` is `WireGrid` and
`wire_mod` with Flower's own FedAvg and `ArrayRecord`, `ours` takes `StreamingFedAvg` in place, `to_record` and
`to_state_dict`. It needs flwr and torch. The machine should do nothing else: times are on the wall.

Over a link that delays and paces, from the clients' end of two network namespaces (root):

    ip netns exec NODES python bench/flower_round.py --scale 0.25 --address 10.77.0.2 --interface e0 \\
        --server "ip netns exec SERVER"
"""

import argparse
import platform
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from flower_deployment import Peaks, deployment, is_alone_on_loopback, run, written

APP = Path(__file__).parent / "flower_app"
ROLES = ("ServerApp", "ClientApp", "SuperNode", "SuperLink", "total")
SECONDS = ("seconds", "cpu")


def measured(side, options):
    """One run on an engine of its own, so that nothing is left of the one before."""
    with (
        tempfile.TemporaryDirectory(prefix="flower-") as folder,
        deployment(folder, address=options.address, prefix=options.server.split()) as environment,
        Peaks(folder) as peaks,
    ):
        config = {
            "folder": folder, "side": side, "model": options.model, "scale": options.scale, "rounds": options.rounds,
            "interface": options.interface,
        }  # fmt: skip
        run(APP, environment, config=config, timeout=900)
        return written(folder) | {"cpu": peaks.processor_seconds} | peaks.most


def row(name, done, form):
    return f"{name:<14}" + "".join(f"{form(done[key], key):>12}" for key in (*SECONDS, "bytes", *ROLES))


def amount(value, key):
    return f"{value:.1f}" if key in SECONDS else f"{value / 1e6:,.0f}"


def main():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the engine is stopped, too
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["decoder", "adapters"], default="decoder")
    parser.add_argument("--scale", type=float, default=1.0, help="of the model: 1.00 GB, or 40 MB of adapters")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=["plain", "wire", "ours"], default=["plain", "wire", "ours"])
    parser.add_argument("--address", default="127.0.0.1", help="of the SuperLink, as the nodes see it")
    parser.add_argument("--server", default="", help="what starts a command at the SuperLink's end of the network")
    parser.add_argument("--interface", default="lo", help="there, whose bytes are counted")
    options = parser.parse_args()
    if options.interface == "lo" and not is_alone_on_loopback():
        parser.error("others use this network: start it in one of its own, as --help shows")
    print(
        f"{platform.machine()}, flwr {version('flwr')}, torch {version('torch')}; {options.model} x {options.scale:g}"
    )
    print(f"{'':<14}" + "".join(f"{key:>12}" for key in ("s", "cpu s", "MB", *(f"{role} MB" for role in ROLES))))
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
