"""Training that is real, at tiny settings, and the loop in one process."""

from dataclasses import replace

import numpy as np
import pytest

from tensorwire.fl.plan import Plan
from tensorwire.fl.simulate import simulate
from tensorwire.fl.task import Task, load, split

TINY = {"hidden": 16, "layers": 1, "context": 16, "batch": 4, "steps": 3}


def exact(**changes):
    """A plan that loses nothing, but for the changes."""
    return Plan(**{"down": "raw", "up": "raw", "kind": "weights"} | changes)


def descend():
    """A task without torch: four clients, each drawn to a point of its own, whose mean is the best."""
    points = np.random.default_rng(0).standard_normal((4, 20, 50)).astype(np.float32)
    best = points.mean(axis=0)

    def train(state, client, round):
        assert state["x"].dtype == np.float32 and state["x"].shape == (20, 50)
        return (
            {"x": state["x"] + np.float32(0.3) * (points[client] - state["x"]), "round": state["round"]},
            1,
            {"client": client},
        )

    return Task(
        lambda: {"x": np.zeros((20, 50), np.float32), "round": np.array(7)},
        train,
        lambda state: float(np.abs(state["x"] - best).mean()),
    )


@pytest.mark.parametrize("kind", ["weights", "difference"])
def test_federated_averaging_in_fp32_equals_the_plain_mean(kind):
    rounds = list(simulate(descend(), exact(kind=kind, clients=4, rounds=5)))
    start = rounds[0].loss
    assert [point.number for point in rounds] == [0, 1, 2, 3, 4, 5]
    assert [point.loss for point in rounds] == pytest.approx([start * 0.7**number for number in range(6)], rel=1e-4)
    assert np.diff([point.bytes for point in rounds]) == pytest.approx(4 * 2 * 4000, rel=0.3)


def test_each_setting_changes_messages_as_documented():
    def ends(**plan):
        return list(simulate(descend(), exact(clients=4, rounds=30, **plan)))[-1]

    weights = ends(down="nf4", up="nf4")
    up = ends(down="nf4", up="nf4", kind="difference")
    both = ends(down_kind="difference", down="nf4", up="nf4", kind="difference")
    fed = ends(down_kind="difference", down="nf4", up="nf4", kind="difference", feedback=True)
    lossless = ends()
    assert weights.bytes < lossless.bytes / 3
    # Each step of the way helps where clients pull apart; see docs/fl.md for a language model.
    assert 2 * fed.loss < both.loss < up.loss < weights.loss
    assert lossless.loss < fed.loss / 100


def test_sparse_updates_need_feedback_and_small_outer_steps():
    """SparseLoCo's way of a round: what clients leave out waits, and the server takes smaller steps than one."""
    plan = exact(clients=4, rounds=60, kind="difference", up="sparse:k=100,bits=8", rate=0.3)
    fed, dropped = (list(simulate(descend(), replace(plan, feedback=each))) for each in (True, False))
    assert fed[-1].bytes < 2 * 60 * 4 * 4000
    assert fed[-1].loss < fed[0].loss / 4
    assert 2 * fed[-1].loss < dropped[-1].loss


def test_stochastic_rounding_keeps_steps_that_bf16_cannot_tell_apart():
    def train(state, client, round):
        return {"x": state["x"] + np.float32(2**-11)}, 1, {}  # a sixteenth of a unit in the last place

    task = Task(lambda: {"x": np.ones((100, 100), np.float32)}, train, lambda state: float(state["x"].mean()))
    plan = exact(down="bf16", up="bf16", clients=2, rounds=16)
    ends = {
        stochastic: list(simulate(task, replace(plan, stochastic=stochastic)))[-1].loss for stochastic in (False, True)
    }
    assert ends[False] == 1
    assert ends[True] == pytest.approx(1 + 2**-7, rel=1e-4)


def test_the_same_plan_gives_the_same_bits():
    plan = Plan(down="bf16", up="nf4", kind="difference", feedback=True, stochastic=True, clients=4, rounds=3)
    assert list(simulate(descend(), plan)) == list(simulate(descend(), plan))


def test_a_task_is_found_by_name():
    assert load(f"{__name__}:descend") is descend
    for spec in ("nothing", "no.such.module:f", f"{__name__}:missing", ":", "json:"):
        with pytest.raises(ValueError, match="module:function"):
            load(spec)


def test_clients_have_packages_of_their_own_and_equal_shares():
    texts, held_out = split(3)
    sizes = [text.size for text in texts]
    assert max(sizes) < 1.05 * min(sizes) and held_out.size > 100_000
    marks = [b"class JSONDecodeError", b"class Message:", b"class BaseEventLoop"]
    for mark in marks:
        assert sum(mark in text.tobytes() for text in (*texts, held_out)) <= 1


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which is faster for so small a model
    yield torch
    torch.set_num_threads(threads)


def test_the_language_model_learns_and_leaves_its_input_alone(torch):
    from tensorwire.fl.task import language_model

    task = language_model(clients=2, **TINY | {"steps": 30, "rate": 1e-2})
    state = task.initial()
    before = {name: tensor.clone() for name, tensor in state.items()}
    trained, weight, metrics = task.train(state, 1, 0)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert weight == 120 and metrics["train_loss"] > 0
    assert task.evaluate(trained) < task.evaluate(state) - 0.5
    again, _, _ = task.train(state, 1, 0)
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    other, _, _ = task.train(state, 0, 0)
    assert not torch.equal(other["lm_head.weight"], trained["lm_head.weight"])


def test_a_round_of_the_language_model_through_every_setting(torch):
    from tensorwire.fl.task import language_model

    task = language_model(clients=2, **TINY)
    losses = {}
    for codec in ("raw", "bf16", "nf4"):
        for kind in ("weights", "difference"):
            plan = Plan(down=codec, up=codec, kind=kind, feedback=kind == "difference", clients=2, rounds=2)
            losses[codec, kind] = list(simulate(task, replace(plan, down_kind=kind)))[-1].loss
    assert losses["bf16", "difference"] == pytest.approx(losses["raw", "weights"], abs=1e-3)
    assert losses["nf4", "difference"] == pytest.approx(losses["raw", "weights"], abs=0.02)
    assert all(loss < 5.7 for loss in losses.values()), losses


def test_adapters_are_all_that_is_trained_and_sent(torch):
    pytest.importorskip("peft")
    from tensorwire.fl.task import language_model

    start = language_model(clients=2, **TINY).initial()
    task = language_model(clients=2, lora=2, start=start, **TINY | {"rate": 3e-2})
    names = set(task.initial())
    assert names and all("lora_" in name for name in names)
    rounds = list(simulate(task, Plan(down="bf16", up="nf4", kind="difference", clients=2, rounds=2)))
    assert rounds[-1].loss < rounds[0].loss
    assert rounds[-1].bytes < 40_000
