import json
from pathlib import Path

import torch
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from mixed.model import made
from tensorwire.integrations.flower import StreamingFedAvg, WireGrid, to_record, to_state_dict

app = ServerApp()
STRATEGIES = {"FedAvg": FedAvg, "StreamingFedAvg": StreamingFedAvg}


def loopback_bytes():
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


@app.main()
def main(grid, context):
    folder = str(context.run_config["folder"])
    model = made(int(context.run_config["width"]))
    strategy = STRATEGIES[str(context.run_config["strategy"])](fraction_evaluate=0.0)
    before = loopback_bytes()
    result = strategy.start(  # a codec whose payloads have a size that is known ahead
        grid=WireGrid(grid, down="bf16"), initial_arrays=to_record(model.state_dict()), num_rounds=2
    )
    used = loopback_bytes() - before
    state = model.state_dict()
    to_state_dict(result.arrays, into=state)
    torch.save(state, f"{folder}/final.pt")
    Path(f"{folder}/result.json").write_text(json.dumps({"loopback": used}))
