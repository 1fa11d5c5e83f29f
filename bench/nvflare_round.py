"""A round of NVIDIA FLARE without training: plain, with FLARE's own float16 filters, and with tensorwire, in turns.

    python bench/nvflare_round.py --size-mb 256 --turns 3
    python bench/nvflare_round.py --size-mb 1000

Needs Linux, root for a network of its own (`unshare -n`) in which bytes are counted, and nvflare in the environment.
Server and two clients run in FLARE's simulator, tensors on the wire (`ExchangeFormat.PYTORCH`), FedAvg, four rounds.
`seconds`: the median of all rounds but the first, which are `each`, from where FLARE has saved a model to where it has
the next one. FLARE's clients ask for a task every two seconds, so that rounds of one job differ by that.
`job_cpu_seconds`: processor time of the whole job, start of its processes included. `mb`: what the sockets carried in a
round. `peak_mb`: of all processes together, memory of their own (RssAnon + RssShmem), in all rounds.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

VARIANTS = ("plain", "float16", "wire")
ROUNDS = 4
WIDTH = 1024
_STAMP = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+) .*%s"


class Bulk(torch.nn.Module):
    """So many megabytes of fp32 in the shapes of a decoder: a quarter of them in one embedding."""

    def __init__(self, size_mb: int = 256) -> None:
        super().__init__()
        self.size_mb = size_mb
        rows = size_mb * 250_000 // WIDTH
        block = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02
        repeat = -(-(rows // 4) // 4096)
        self.embedding = torch.nn.Parameter(block.repeat(repeat, 1)[: rows // 4].clone())
        self.layers = torch.nn.ParameterList(block.roll(n) for n in range(max((rows - rows // 4) // 4096, 1)))
        self.norms = torch.nn.ParameterList(torch.ones(WIDTH) for _ in self.layers)


def client(size_mb: int) -> None:
    """What a site runs."""
    import nvflare.client as flare

    flare.init()
    model = Bulk(size_mb)
    block = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1)) * 1e-3
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        del received
        with torch.no_grad():
            for parameter in model.layers:
                parameter.add_(block)
        flare.send(flare.FLModel(params=model.state_dict()))


def recipe(variant: str, size_mb: int, rounds: int = ROUNDS) -> Any:
    """The job that is measured."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat

    from tensorwire.integrations.nvflare import WireAggregator, add_to

    recipe = FedAvgRecipe(
        name="bench",
        model={"class_path": "nvflare_round.Bulk", "args": {"size_mb": size_mb}},  # which only the server makes
        min_clients=2,
        num_rounds=rounds,
        train_script=__file__,
        train_args=f"--client --size-mb {size_mb}",
        server_expected_format=ExchangeFormat.PYTORCH,
        aggregator=WireAggregator() if variant == "wire" else None,
    )
    if variant == "wire":
        add_to(recipe)
    if variant == "float16":  # which imports bitsandbytes
        from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
        from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

        recipe.add_server_output_filter(ModelQuantizer("float16"), tasks=["train"])
        recipe.add_client_input_filter(ModelDequantizer(), tasks=["train"])
        recipe.add_client_output_filter(ModelQuantizer("float16"), tasks=["train"])
        recipe.add_server_input_filter(ModelDequantizer(), tasks=["train"])
    return recipe


def job(variant: str, size_mb: int, rounds: int, workspace: str) -> None:
    """The simulator."""
    from nvflare.recipe.sim_env import SimEnv

    measured = recipe(variant, size_mb, rounds)
    before = carried()
    measured.execute(SimEnv(num_clients=2, workspace_root=workspace))
    print(json.dumps({"carried": carried() - before}))


def carried() -> int:
    """Bytes that the loopback of this network has carried."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


UP = (
    "import fcntl, os, socket, struct, sys; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1)); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Peak(threading.Thread):
    """The most memory that a process and its descendants have had together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self.bytes = 0

    def run(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = max(self.bytes, sum(memory for _, memory in self._family()))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes

    def _family(self) -> list[tuple[int, int]]:
        parents, memory = {}, {}
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            except OSError:
                continue
            pid = int(path.parent.name)
            parents[pid] = int(fields["PPid"])
            memory[pid] = sum(int(fields.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "RssShmem"))
        family = {self._pid}
        while found := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= found
        return [(pid, memory.get(pid, 0)) for pid in family]


def measure(variant: str, size_mb: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as workspace:
        options = ["--size-mb", str(size_mb), "--rounds", str(rounds), "--workspace", workspace]
        inner = [sys.executable, __file__, "--run", variant, *options]
        command = ["unshare", "-n", sys.executable, "-c", UP, *inner]
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        started = time.time()
        with open(Path(workspace) / "log", "w+") as log:
            environment = {**os.environ, "PYTHONPATH": path}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=workspace, env=environment)
            peak = Peak(process.pid)
            peak.start()
            _, status, usage = os.wait4(process.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            log.seek(0)
            text = log.read()
        if code or "Finished FedAvg" not in text:
            sys.exit(text[-5000:])
        seconds = [round_seconds(text, number) for number in range(1, rounds)]
        return {
            "variant": variant,
            "seconds": round(statistics.median(seconds), 2),
            "each": seconds,
            "job_seconds": round(time.time() - started, 1),
            "job_cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "mb": round(json.loads(text.splitlines()[-1])["carried"] / rounds / 1e6, 1),
            "peak_mb": round(peak.stop() / 1e6),
        }


def round_seconds(log: str, number: int) -> float:
    """How long a round took, from where FLARE had saved the model of the one before to where it has the next model."""
    saved, again = stamp(log, "End persist model", number - 1), stamp(log, "Start persist model", number)
    return round((again - saved).total_seconds(), 2)


def stamp(text: str, words: str, number: int) -> datetime:
    """When a line was logged for the n-th time."""
    stamp = re.findall(_STAMP % words, text, re.MULTILINE)[number]
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")  # noqa: DTZ007 - taken from others of the same log only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workspace", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.size_mb)
    elif options.run:
        job(options.run, options.size_mb, options.rounds, options.workspace)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from tensorwire.bench.machine import describe

    print(describe())
    for _ in range(options.turns):
        for variant in options.variants:
            print(json.dumps(measure(variant, options.size_mb, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
