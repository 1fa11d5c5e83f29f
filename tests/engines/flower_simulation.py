"""Two rounds in Flower's simulation engine, which needs ray; prints what the end differs in from what it should be."""

import sys

import torch
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from test_flower_unit import app_of, make_state, trained, with_tensors

from tensorwire.integrations.flower import StreamingFedAvg, WireGrid, to_record, to_state_dict

server = ServerApp()
ends = []


@server.main()
def main(grid, context):
    strategy = StreamingFedAvg(fraction_evaluate=0.0)
    ends.append(strategy.start(grid=WireGrid(grid), initial_arrays=to_record(make_state()), num_rounds=2).arrays)


if __name__ == "__main__":
    run_simulation(server, app_of(with_tensors), 2, backend_config={"client_resources": {"num_cpus": 1}})
    expected = trained(trained(make_state()))
    got = to_state_dict(ends[0], into={name: torch.empty_like(tensor) for name, tensor in expected.items()})
    wrong = [n for n, t in got.items() if not torch.allclose(t.double(), expected[n].double(), atol=0.05)]
    sys.exit(f"these differ: {wrong}" if wrong else 0)
