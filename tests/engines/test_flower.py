"""The plug-in on Flower's deployment engine: a SuperLink and two SuperNodes on loopback, two rounds of a real model.

`tests/engines/run flower` runs it in an environment of its own and, so that its bytes can be counted, in a network of
its own.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "bench"), str(HERE / "flower_app")]

pytest.importorskip("flwr", reason="Flower is not installed here: tests/engines/run flower makes it an environment")

import torch
from flower_deployment import SETTINGS, deployment, is_alone_on_loopback, run, written
from mixed.model import made

import tensorwire
from tensorwire.updates import exact_vectors

WIDTH, ROUNDS, NODES = 2500, 2, 2
DOWN, UP = exact_vectors("bf16"), exact_vectors("nf4")
# Hops over loopback: the ServerApp to the SuperLink once, to each SuperNode, to each ClientApp; and back.
HOPS_DOWN, HOPS_UP = 1 + 2 * NODES, 3 * NODES


@pytest.fixture(scope="module")
def engine():
    with tempfile.TemporaryDirectory(prefix="flower-") as folder, deployment(folder, NODES) as environment:
        yield environment


@pytest.fixture(scope="module", params=["StreamingFedAvg", "FedAvg"])
def finished(request, engine):
    """The folder that a run has left, its strategy, and what it says of itself."""
    with tempfile.TemporaryDirectory(prefix="flower-") as folder:
        config = {"folder": folder, "strategy": request.param, "width": WIDTH}
        run(HERE / "flower_app", engine, config=config)
        yield Path(folder), request.param, written(folder)


def as_received(state, codec):
    """What is left of tensors that were sent with a codec."""
    return tensorwire.torch.loads(tensorwire.torch.dumps(state, codec=codec))


def changes(trained, received):
    return {
        name: (tensor.double() - received[name].double()).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


def mean(model, sent, weights):
    """Plain NumPy on what has been decoded: every float moves by the mean of the changes, counters are averaged."""
    made, total = {}, sum(weights)
    for name, tensor in model.items():
        new = sum(weight * each[name].double().numpy() for weight, each in zip(weights, sent, strict=True))
        if tensor.is_floating_point():
            made[name] = torch.from_numpy(np.asarray((new + total * tensor.double().numpy()) / total)).to(tensor.dtype)
        else:
            made[name] = torch.from_numpy(np.asarray(np.rint(new / total))).to(tensor.dtype)
    return made


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_the_model_is_the_numpy_mean_of_the_decoded_updates(finished):
    folder, strategy, _ = finished
    model = made(WIDTH).state_dict()
    for turn in range(1, ROUNDS + 1):
        sent, expected = [], as_received(model, DOWN)
        for node in range(NODES):
            received, trained = load(folder, f"received-{turn}-{node}"), load(folder, f"trained-{turn}-{node}")
            assert received.keys() == expected.keys()
            # FedAvg goes on with float32 where the model has bfloat16.
            slack = 0.0 if strategy == "StreamingFedAvg" or turn == 1 else 0.01
            assert all(torch.allclose(received[n], expected[n], rtol=slack, atol=slack) for n in expected)
            sent.append(as_received(changes(trained, received), UP))
        model = mean(model, sent, [node + 1 for node in range(NODES)])
    final = load(folder, "final")
    for name, tensor in model.items():
        assert final[name].dtype == tensor.dtype
        if strategy == "StreamingFedAvg":
            assert torch.equal(final[name], tensor), name
        else:
            assert torch.allclose(final[name].double(), tensor.double(), atol=0.01 if "narrow" in name else 1e-6), name
    assert final["norm.num_batches_tracked"] == 2 * ROUNDS
    assert torch.equal(final["middle.weight"], final["tied.weight"])
    assert not torch.equal(final["middle.weight"], made(WIDTH).state_dict()["middle.weight"])


def test_encoded_size_matches_bytes_on_the_sockets(finished):
    if not is_alone_on_loopback():
        pytest.skip("others use this network, too: tests/engines/run gives the engine one of its own")
    _, _, result = finished
    state = made(WIDTH).state_dict()
    down = tensorwire.encoded_size(state, codec=DOWN, at_rest=True)
    up = tensorwire.encoded_size(state, codec=UP, at_rest=True)
    assert 1 <= result["loopback"] / (ROUNDS * (HOPS_DOWN * down + HOPS_UP * up)) < 1.03


def test_the_documented_app_runs(engine, tmp_path):
    page = (HERE.parents[1] / "docs" / "flower.md").read_text()
    for name, text in re.findall(r'```\w+ title="(.*?)"\n(.*?)```', page, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    log = run(tmp_path, engine, config={})
    assert float(re.search(r"loss of the last round: (\S+)", log)[1]) < 2


def test_in_the_simulation_engine():
    pytest.importorskip("ray", reason='needs pip install "flwr[simulation]"')
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"}
    script = HERE / "flower_simulation.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
