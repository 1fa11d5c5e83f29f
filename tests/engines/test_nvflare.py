"""Jobs on NVIDIA FLARE itself, its server and two clients in the simulator: they end where plain arithmetic ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="needs nvflare, in an environment of its own: tests/engines/run nvflare")
torch = pytest.importorskip("torch")

import tensorwire
import tensorwire.torch as tw
from tensorwire.integrations.nvflare.flare import ViaDownloaderDecomposer
from tensorwire.updates import exact_vectors, mean_of

APP = Path(__file__).parent / "nvflare_app"
sys.path.insert(0, str(APP))
from net import Net, train

ROUNDS = 2
State = dict[str, Any]


def run(workspace: Path, **options: Any) -> tuple[State, dict[str, Any]]:
    """The global model that a job ends with, and what it reports."""
    chosen = {"rounds": ROUNDS, "aggregator": True, "offload": False, "add_to": {}} | options
    environment = {**os.environ, "PYTHONPATH": f"{Path(tensorwire.__file__).parents[1]}:{APP}"}
    command = [sys.executable, "job.py", str(workspace), json.dumps(chosen)]
    done = subprocess.run(
        [*isolated(), *command], capture_output=True, text=True, cwd=APP, env=environment, timeout=240
    )
    log = done.stdout + done.stderr
    saved = workspace / "engines" / "server" / "simulate_job" / "app_server" / "FL_global_model.pt"
    assert done.returncode == 0 and saved.exists(), log[-6000:]
    return torch.load(saved, weights_only=True)["model"], json.loads(done.stdout.splitlines()[-1])


def isolated() -> list[str]:
    """A command that runs another in a network of its own, in which nobody else's bytes are counted; or nothing."""
    script = (
        "import fcntl, os, socket, struct, sys; s = socket.socket(); "
        "fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1)); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    for options in ([], ["-r"]):
        command = ["unshare", *options, "-n", sys.executable, "-c", script]
        try:
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
        except FileNotFoundError:
            break
    return []


def sent(state: State, codec: str) -> tuple[State, int]:
    """What arrives of a model, and the bytes that it took."""
    data = tw.dumps(state, codec=exact_vectors(codec))
    return tw.loads(data), len(data)


def expected(rounds: int = ROUNDS) -> tuple[State, int]:
    """The global model after so many rounds (bf16|entropy down, nf4 differences up), and the bytes of all messages."""
    model, total = Net().state_dict(), 0
    for _ in range(rounds):
        base, down = sent(model, "bf16|entropy")
        updates = []
        for site in (1, 2):
            trained = {name: tensor.clone() for name, tensor in base.items()}
            trained["head.weight"] = trained["embedding.weight"]
            train(trained, site)
            changes = {
                name: torch.zeros_like(tensor) if tensor.dtype == torch.bool else tensor - base[name]
                for name, tensor in trained.items()
            }
            changes["head.weight"] = changes["embedding.weight"]
            update, up = sent(changes, "nf4")
            updates.append(update)
            total += down + up
        model = {
            name: tensor + mean_of([update[name] for update in updates], [10, 20]) for name, tensor in model.items()
        }
        model["head.weight"] = model["embedding.weight"]
    return model, total


def assert_same(got: State, wanted: State) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), (name, (got[name].double() - tensor.double()).abs().max())


def test_a_job_ends_where_plain_arithmetic_does_and_sends_the_bytes_of_its_messages(tmp_path: Path) -> None:
    model, report = run(tmp_path)
    wanted, total = expected()
    assert_same(model, wanted)
    if isolated():
        assert report["carried"] == pytest.approx(total, rel=0.03)


def test_flares_own_average_over_lazy_replies_with_payloads_on_disk(tmp_path: Path) -> None:
    """It sums in float32, one client after the other, and makes float32 of integers: nearly the same."""
    model, _ = run(tmp_path, aggregator=False, offload=True, add_to={"lazy": True})
    wanted, _ = expected()
    assert list(model) == list(wanted)
    for name, tensor in wanted.items():
        tolerance = 1e-6 if tensor.dtype == torch.float32 else 2e-2 if tensor.is_floating_point() else 1
        assert torch.allclose(model[name].double(), tensor.double(), atol=tolerance), name


def test_flare_still_has_the_internals_that_are_used() -> None:
    """Each of FLARE's names that this rests on, beyond what the import of the module has found."""
    handler = ViaDownloaderDecomposer
    for seam in ("decompose", "recompose", "process_datum", "to_downloadable", "download", "get_download_dot"):
        assert callable(getattr(handler, seam, None)), f"FLARE's ViaDownloaderDecomposer has no {seam} any more"


@pytest.mark.parametrize("wire_format", ["tensors", "arrays"])
def test_the_documented_app_runs(wire_format: str, tmp_path: Path) -> None:
    """As it stands there, and with what FLARE has by default: NumPy arrays."""
    page = (Path(__file__).parents[2] / "docs" / "nvflare.md").read_text()
    files = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', page, re.DOTALL))
    assert files.keys() == {"net.py", "client.py", "job.py"}
    for name, text in files.items():
        chosen = text if wire_format == "tensors" else text.replace("ExchangeFormat.PYTORCH", "ExchangeFormat.NUMPY")
        (tmp_path / name).write_text(chosen)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(tensorwire.__file__).parents[1]}:{tmp_path}",
        "NVFLARE_SIMULATOR_WORKSPACE_ROOT": str(tmp_path / "workspace"),
    }
    command = [*isolated(), sys.executable, "job.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    log = done.stdout + done.stderr
    assert done.returncode == 0 and "Finished FedAvg" in log, log[-6000:]
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)$", log, re.MULTILINE)]
    assert len(losses) == 4 and sum(losses[2:]) < sum(losses[:2])
