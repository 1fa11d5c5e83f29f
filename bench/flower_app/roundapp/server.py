import json
import time
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from roundapp.model import made
from tensorwire.integrations.flower import StreamingFedAvg, WireGrid, to_record

app = ServerApp()


def passed(interface):
    """Bytes that have passed a network interface so far, headers included; over loopback each goes out and in."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    counts = next(line for line in lines if line.strip().startswith(f"{interface}:")).partition(":")[2].split()
    return int(counts[0]) + (0 if interface == "lo" else int(counts[8]))


@app.main()
def main(grid, context):
    settings = context.run_config
    side, state = settings["side"], made(settings["model"], float(settings["scale"]))
    name, tensor = next(iter(state.items()))
    first = float(tensor.reshape(-1)[0])
    if side == "ours":
        strategy, arrays = StreamingFedAvg(fraction_evaluate=0.0), to_record(state)
        strategy.in_place = True
    else:
        arrays, strategy = ArrayRecord(state, keep_input=False), FedAvg(fraction_evaluate=0.0)
    del state, tensor
    before, start = passed(settings["interface"]), time.monotonic()
    result = strategy.start(
        grid=grid if side == "plain" else WireGrid(grid), initial_arrays=arrays, num_rounds=int(settings["rounds"])
    )
    done = {"seconds": time.monotonic() - start, "bytes": passed(settings["interface"]) - before}
    step = float(result.arrays[name].numpy().reshape(-1)[0]) - first
    assert abs(step - 0.5 * int(settings["rounds"])) < 1e-3, step
    Path(f"{settings['folder']}/result.json").write_text(json.dumps(done))
