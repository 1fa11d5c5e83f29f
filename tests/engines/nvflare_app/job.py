"""Runs the job in the simulator: the folder of its workspace, then what to do otherwise than the defaults."""

import json
import sys
from pathlib import Path

from net import Net
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe.sim_env import SimEnv

from tensorwire.integrations.nvflare import WireAggregator, add_to


def carried() -> int:
    """Bytes that the loopback of this network namespace has carried."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


workspace, options = sys.argv[1], json.loads(sys.argv[2])
recipe = FedAvgRecipe(
    name="engines",
    model=Net(),
    min_clients=2,
    num_rounds=options["rounds"],
    train_script="client.py",
    server_expected_format=ExchangeFormat.PYTORCH,
    aggregator=WireAggregator() if options["aggregator"] else None,
    enable_tensor_disk_offload=options["offload"],
)
add_to(recipe, **options["add_to"])
before = carried()
recipe.execute(SimEnv(num_clients=2, workspace_root=workspace))
print(json.dumps({"carried": carried() - before}))
