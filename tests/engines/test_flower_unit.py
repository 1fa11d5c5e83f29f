"""`tensorwire.integrations.flower` with Flower's own classes, in one process.

Messages go the way that they take between processes: through Flower's own `deflate` and `inflate`.
"""

import copy
import gc
import itertools
import os
import pickle
import queue
import threading
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
pytest.importorskip("flwr", reason="Flower is not installed here: tests/engines/run flower makes it an environment")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp import Grid, strategy
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

import tensorwire
from tensorwire.errors import ArgumentError, EncodeError, SchemaError, TensorwireError, UnsupportedError
from tensorwire.integrations.flower import StreamingFedAvg, WireArray, WireGrid, to_record, to_state_dict, wire_mod
from tensorwire.updates import exact_vectors, subtract

torch.set_num_threads(1)  # which these sizes need, and which others on the machine do not disturb
with suppress(ImportError):  # in whose name messages are made, since some version
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 3


def carried(message):
    """A message as the other side inflates it."""
    contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    size = sum(map(len, contents.values()))
    received = inflate_object_from_contents(message.object_id, contents)
    received.metadata.__dict__["_message_id"] = message.object_id
    return received, size


class FakeGrid(Grid):
    """Nodes that answer at once, in this process."""

    def __init__(self, app, nodes=(11, 12), damage=None):
        self.app = app
        self.states = {node: RecordDict() for node in nodes}
        self.replies = {}
        self.down = self.up = 0
        self.pushed = []
        self.damage = damage

    run = SimpleNamespace(run_id=7)
    set_run = create_message = None

    def get_node_ids(self):
        return list(self.states)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            received, size = carried(message)
            self.down += size
            self.pushed.append(message)
            node = message.metadata.dst_node_id
            context = Context(run_id=7, node_id=node, node_config={}, state=self.states[node], run_config={})
            try:
                reply = self.app(received, context)
            except Exception as error:  # as run_clientapp does
                from flwr.app import Error

                reply = Message(Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=received)
            if self.damage:
                self.damage(reply)
            ids.append(message.metadata.message_id)
            self.replies[ids[-1]], size = carried(reply)
            self.up += size
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(number) for number in list(self.replies) if number in set(message_ids)]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def make_state(seed=0, scale=1.0):
    """Of every kind: a matrix that is tied, a norm, a counter, 0-d, bool, float64, bfloat16, nothing."""
    draw = torch.Generator().manual_seed(seed)
    embedding = torch.randn(60, 64, generator=draw) * scale
    return {
        "emb.weight": embedding,
        "fc.weight": torch.randn(64, 64, generator=draw) * scale,
        "bn.weight": torch.ones(64),
        "bn.running_var": torch.ones(64),
        "bn.num_batches_tracked": torch.tensor(41),
        "half.weight": torch.randn(32, 32, generator=draw).bfloat16(),
        "temperature": torch.tensor(0.5),
        "mask": torch.tensor([True, False, True]),
        "double": torch.randn(9, generator=draw, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "head.weight": embedding,
    }


STEP = 0.5  # which every codec here carries exactly, in a tensor that changes by it everywhere


def trained(state):
    """What a client makes of a model: floats one step further, two more batches, no more true."""
    made = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.int64:
            made[name] = tensor + 2
        elif tensor.dtype == torch.bool:
            made[name] = torch.zeros_like(tensor)
        else:
            made[name] = tensor + STEP
    return made


def app_of(train, mods=(wire_mod,)):
    app = ClientApp(mods=list(mods))
    app.train()(train)
    app.evaluate()(lambda message, context: reply_of(message, None))
    return app


def reply_of(message, record, examples=3, **more):
    metrics = MetricRecord({"num-examples": examples, "train_loss": 1.0, **more})
    return Message(
        RecordDict({"metrics": metrics} if record is None else {"arrays": record, "metrics": metrics}), reply_to=message
    )


def with_tensors(message, context):
    """A client that uses `to_record`."""
    return reply_of(message, to_record(trained(to_state_dict(message.content["arrays"]))))


def floats_only(state):
    return {name: tensor for name, tensor in state.items() if tensor.dtype != torch.bfloat16}


def unchanged_code(message, context):
    """A client that knows nothing of tensorwire."""
    state = message.content["arrays"].to_torch_state_dict()
    return reply_of(message, ArrayRecord({name: tensor.contiguous() for name, tensor in trained(state).items()}))


@pytest.mark.parametrize("train", [with_tensors, unchanged_code])
@pytest.mark.parametrize("kind", [strategy.FedAvg, StreamingFedAvg])
def test_two_rounds_keep_every_dtype_and_the_ties(train, kind):
    state = make_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    grid = WireGrid(FakeGrid(app_of(train)), poll=0)
    result = kind(fraction_evaluate=0.5).start(grid=grid, initial_arrays=to_record(state), num_rounds=2)
    model = to_state_dict(result.arrays, into={name: torch.empty_like(tensor) for name, tensor in state.items()})
    expected = trained(trained(state))
    for name, tensor in model.items():
        assert tensor.dtype == state[name].dtype
        if tensor.is_floating_point():
            assert torch.allclose(tensor, expected[name], atol=1e-6 if tensor.dtype != torch.bfloat16 else 0.05), name
        else:
            assert torch.equal(tensor, expected[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_tied_tensors_stay_tied_and_equal_tensors_are_not_tied():
    seen = []

    def train(message, context):
        seen.append(to_state_dict(message.content["arrays"]))
        return with_tensors(message, context)

    inner = FakeGrid(app_of(train))
    StreamingFedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(inner, poll=0), initial_arrays=to_record(make_state()), num_rounds=2
    )
    for state in seen:
        assert state["emb.weight"] is state["head.weight"]
        assert state["bn.weight"] is not state["bn.running_var"]
        assert state["half.weight"].dtype == torch.bfloat16
        assert state["bn.num_batches_tracked"].dtype == torch.int64
        assert state["bn.num_batches_tracked"].shape == ()


def test_encoded_size_matches_bytes_on_the_wire():
    inner = FakeGrid(app_of(with_tensors))
    state = {name: torch.randn(256, 256) for name in "abcd"} | make_state()
    StreamingFedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(inner, down="bf16", poll=0), initial_arrays=to_record(state), num_rounds=1
    )
    down = tensorwire.encoded_size(state, codec=exact_vectors("bf16"), at_rest=True)
    up = tensorwire.encoded_size(state, codec=exact_vectors("nf4"), at_rest=True)
    assert 1 <= inner.down / (2 * down) < 1.03
    assert 1 <= inner.up / (2 * up) < 1.03


def test_a_broadcast_is_encoded_once():
    inner = FakeGrid(app_of(with_tensors), nodes=range(20, 25))
    grid = WireGrid(inner, poll=0)
    record = RecordDict({"arrays": to_record(make_state()), "config": ConfigRecord({"server-round": 1})})
    messages = [Message(record, dst_node_id=node, message_type="train") for node in range(20, 25)]
    grid.push_messages(messages)
    assert len({id(message.content["arrays"]) for message in inner.pushed}) == 1
    assert all(message.content is record for message in messages)
    assert all(message.metadata.message_id for message in messages)
    assert list(record) == ["arrays", "config"]


def test_wire_arrays_give_fresh_writable_arrays():
    state = make_state()
    for name, array in to_record(state).items():
        values = array.numpy()
        assert values.flags.writeable
        assert not np.shares_memory(values, array.numpy())
        assert values.shape == array.shape == tuple(state[name].shape)
        assert str(values.dtype) == array.dtype
        plain = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
        assert np.array_equal(plain.numpy(), values)
        assert np.array_equal(values, state[name].double().numpy())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.float16, torch.uint8])
def test_other_dtypes_round_trip(dtype):
    state = {"w": (torch.randn(40, 3) * 4).to(dtype)}
    seen = []

    def train(message, context):
        seen.append(to_state_dict(message.content["arrays"])["w"])
        return reply_of(message, to_record({"w": seen[-1]}))

    result = strategy.FedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(train)), down="raw", poll=0), initial_arrays=to_record(state), num_rounds=2
    )
    assert all(torch.equal(got.view(torch.uint8), state["w"].view(torch.uint8)) for got in seen)
    assert np.allclose(next(iter(result.arrays.values())).numpy(), state["w"].to(torch.complex64).numpy())


def same_start():
    return {name: np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32) for name in ("a", "b")} | {
        "bias": np.arange(5, dtype=np.float32),
        "scale": np.array(2.0, np.float32),
    }


def record_of(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


STRATEGIES = {
    "FedAvg": lambda: strategy.FedAvg(fraction_evaluate=0.0),
    "FedAvgM": lambda: strategy.FedAvgM(fraction_evaluate=0.0, server_momentum=0.9),
    "FedAdam": lambda: strategy.FedAdam(fraction_evaluate=0.0),
    "FedAdagrad": lambda: strategy.FedAdagrad(fraction_evaluate=0.0),
    "FedYogi": lambda: strategy.FedYogi(fraction_evaluate=0.0),
    "FedProx": lambda: strategy.FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
    "FedMedian": lambda: strategy.FedMedian(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: strategy.FedTrimmedAvg(fraction_evaluate=0.0),
    "QFedAvg": lambda: strategy.QFedAvg(client_learning_rate=0.1, fraction_evaluate=0.0),
    "Krum": lambda: strategy.Krum(fraction_evaluate=0.0),
    "MultiKrum": lambda: strategy.MultiKrum(fraction_evaluate=0.0, num_nodes_to_select=2),
    "Bulyan": lambda: strategy.Bulyan(fraction_evaluate=0.0, num_malicious_nodes=0),
    "server-side clipping": lambda: strategy.DifferentialPrivacyServerSideFixedClipping(
        strategy.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=4
    ),
}


def stepping(message, context):
    """Client code of Flower alone; nodes differ in what they do and count."""
    far = 2 ** (context.node_id - 11)
    arrays = {name: array.numpy() + np.float32(STEP * far) for name, array in message.content["arrays"].items()}
    return reply_of(message, record_of(arrays), examples=far)


def run_strategy(made, *, wire, train=stepping, rounds=2, live=False):
    grid = FakeGrid(app_of(train, [wire_mod] if wire else []), nodes=(11, 12, 13, 14))
    grid = WireGrid(grid, down="raw", poll=0) if wire else grid
    arrays = to_record(same_start()) if live else record_of(same_start())
    return made.start(grid=grid, initial_arrays=arrays, num_rounds=rounds).arrays


@pytest.mark.parametrize("name", STRATEGIES)
def test_averaging_strategies_give_the_same_result_as_without_the_grid(name):
    plain, ours = run_strategy(STRATEGIES[name](), wire=False), run_strategy(STRATEGIES[name](), wire=True)
    assert list(plain) == list(ours)
    for key in plain:
        assert np.allclose(plain[key].numpy(), ours[key].numpy(), atol=1e-5)


def behind(base, *, in_place, **options):
    kind = StreamingFedAvg if base is strategy.FedAvg else type("Strategy", (base, StreamingFedAvg), {})
    made = kind(fraction_evaluate=0.0, **options)
    made.in_place = in_place
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", {}),
        ("FedAvgM", {"server_momentum": 0.9}),
        ("FedAdam", {}),
        ("FedYogi", {}),
        ("FedAdagrad", {}),
        ("FedProx", {"proximal_mu": 0.1}),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_mean_is_the_same_under_another_strategy(name, options, in_place):
    ours = behind(getattr(strategy, name), in_place=in_place, **options)
    plain = run_strategy(STRATEGIES[name](), wire=False)
    streamed = run_strategy(ours, wire=True, live=True)
    for key in plain:
        assert np.allclose(plain[key].numpy(), streamed[key].numpy(), atol=1e-5)


def test_only_in_place_overwrites_the_callers_arrays():
    for in_place in (False, True):
        model = {"w": np.zeros((32, 32), np.float32)}
        held = to_record(model)
        result = behind(strategy.FedAvg, in_place=in_place).start(
            grid=WireGrid(FakeGrid(app_of(stepping)), poll=0), initial_arrays=held, num_rounds=1
        )
        assert result.arrays["w"].numpy().any()
        assert model["w"].any() == in_place


def test_nodes_without_the_mod_take_part():
    """Where the server speaks tensorwire and a node does not: its error, and the round goes on with the others."""
    apps = {11: app_of(stepping), 12: app_of(stepping, mods=[])}
    grid = FakeGrid(lambda message, context: apps[context.node_id](message, context))
    replies = WireGrid(grid, poll=0).send_and_receive(messages_to(11, 12))
    assert {reply.metadata.src_node_id: reply.has_error() for reply in replies} == {11: False, 12: True}


def messages_to(*nodes, **records):
    content = RecordDict({"arrays": record_of(same_start()), **records})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def test_the_mod_is_transparent_without_the_grid():
    plain = FakeGrid(app_of(stepping, mods=[])).send_and_receive(messages_to(11))
    ours = FakeGrid(app_of(stepping)).send_and_receive(messages_to(11))
    assert plain[0].content["arrays"] == ours[0].content["arrays"]


def test_plain_replies_count_in_the_streamed_mean():
    """Such as a node sends that changed its arrays behind the mod."""

    def undecorated(message, context):
        return stepping(message, context)

    def app(message, context):
        reply = app_of(undecorated)(message, context)
        if context.node_id == 12:
            reply.content["arrays"] = record_of({k: v + np.float32(1) for k, v in same_start().items()})
        return reply

    made = StreamingFedAvg(fraction_evaluate=0.0)
    result = made.start(
        grid=WireGrid(FakeGrid(app), down="raw", poll=0),
        initial_arrays=record_of(same_start()),
        num_rounds=1,
    )
    start = same_start()
    for key, array in result.arrays.items():
        assert np.allclose(array.numpy(), start[key] + (1 * STEP + 2 * 1.0) / 3, atol=1e-6)


@pytest.mark.parametrize(
    "mods",
    [
        [message_size_mod, wire_mod],
        [wire_mod, message_size_mod],
        [wire_mod, arrays_size_mod],
        [wire_mod, LocalDpMod(clipping_norm=1e6, sensitivity=1e-9, epsilon=1.0, delta=1e-5)],
    ],
)
def test_other_mods_can_run_beside_it(mods):
    result = strategy.FedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(stepping, mods)), poll=0),
        initial_arrays=record_of(same_start()),
        num_rounds=1,
    )
    assert result.arrays is not None


def test_works_after_differential_privacy_clipping():
    wrapped = strategy.DifferentialPrivacyClientSideFixedClipping(
        strategy.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=2
    )
    result = wrapped.start(
        grid=WireGrid(FakeGrid(app_of(stepping, [wire_mod, fixedclipping_mod])), poll=0),
        initial_arrays=record_of(same_start()),
        num_rounds=2,
    )
    assert result.arrays is not None


def test_order_of_names_is_kept():
    names = [f"{number}.w" for number in (5, 3, 9, 1)]
    state = {name: np.full((8, 8), index, np.float32) for index, name in enumerate(names)}

    def shuffled(message, context):
        arrays = message.content["arrays"]
        assert list(arrays) == names
        return reply_of(message, ArrayRecord({name: Array(arrays[name].numpy()) for name in sorted(names)}))

    (reply,) = WireGrid(FakeGrid(app_of(shuffled)), poll=0).send_and_receive(
        [Message(RecordDict({"arrays": to_record(state)}), dst_node_id=11, message_type="train")]
    )
    assert list(reply.content["arrays"]) == names
    assert all(np.array_equal(reply.content["arrays"][name].numpy(), state[name]) for name in names)


def test_differences_are_against_the_servers_model():
    """Not to what the codec has made of it on the way: steps below half a unit of bf16 add up."""
    state = {"w": np.full((64, 64), 1.0, np.float32)}

    def train(message, context):
        values = message.content["arrays"]["w"].numpy()
        return reply_of(message, ArrayRecord({"w": Array(values + np.float32(2**-10))}))

    result = strategy.FedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(train)), poll=0), initial_arrays=to_record(state), num_rounds=8
    )
    assert np.allclose(result.arrays["w"].numpy(), 1 + 8 * 2**-10, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"difference": False}, {"up": {"a": "bf16"}}, {"up": "raw|zstd", "down": {"a": "nf4"}}]
)
def test_other_terms(options):
    inner = FakeGrid(app_of(stepping))
    replies = WireGrid(inner, poll=0, **options).send_and_receive(messages_to(11))
    arrays, start = replies[0].content["arrays"], same_start()
    near = options.get("down") or options.get("difference") is False
    for name in start:
        assert np.allclose(arrays[name].numpy(), start[name] + STEP, atol=0.7 if near else 1e-5)


def test_adapters_alone_come_back():
    def train(message, context):
        return reply_of(message, ArrayRecord({"b": Array(message.content["arrays"]["b"].numpy() + np.float32(STEP))}))

    (reply,) = WireGrid(FakeGrid(app_of(train)), down="raw", poll=0).send_and_receive(messages_to(11))
    assert np.allclose(reply.content["arrays"]["b"].numpy(), same_start()["b"] + STEP, atol=1e-5)


def test_new_arrays_and_changed_shapes_are_sent_whole():
    def train(message, context):
        return reply_of(message, ArrayRecord({"b": Array(np.ones(4, np.float32)), "new": Array(np.ones(3))}))

    (reply,) = WireGrid(FakeGrid(app_of(train)), up="raw", poll=0).send_and_receive(messages_to(11))
    assert reply.content["arrays"]["b"].numpy().tolist() == [1.0] * 4
    assert reply.content["arrays"]["new"].numpy().tolist() == [1.0] * 3


def test_other_records_are_sent_unchanged(caplog):
    def train(message, context):
        content = message.content
        return Message(
            RecordDict({"arrays": content["arrays"], "other": content["other"], "c": content["c"]}), reply_to=message
        )

    other = ArrayRecord()
    other["tree"] = Array(dtype="", shape=(), stype="xgboost", data=b"\x01\x02")
    (reply,) = WireGrid(FakeGrid(app_of(train)), down="raw", up="raw", poll=0).send_and_receive(
        messages_to(11, other=other, c=ConfigRecord({"a": 1}))
    )
    assert reply.content["other"]["tree"].data == b"\x01\x02"
    assert reply.content["c"]["a"] == 1
    assert "'other' is sent as without tensorwire" in caplog.text


def test_feedback_is_kept_in_the_state_of_the_node():
    start = {"w": np.zeros((64, 64), np.float32)}
    step = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)

    def train(message, context):
        return reply_of(message, ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + step)}))

    def error(feedback):
        inner = FakeGrid(app_of(train))
        result = StreamingFedAvg(fraction_evaluate=0.0).start(
            grid=WireGrid(inner, down="raw", up="nf4", feedback=feedback, poll=0),
            initial_arrays=to_record(start),
            num_rounds=8,
        )
        kept = [list(state) for state in inner.states.values()]
        assert kept == ([["tensorwire.feedback.arrays"]] * 2 if feedback else [[], []])
        return np.abs(result.arrays["w"].numpy() - 8 * step).max()

    assert error(True) < error(False) / 4


# What is wrong is said, and counts as a failure of the node.


def damaged(reply):
    if reply.metadata.src_node_id == 12 and reply.has_content():
        array = reply.content["arrays"]["tensorwire"]
        data = bytearray(array.data)
        data[len(data) // 2] ^= 1
        reply.content["arrays"]["tensorwire"] = Array("", (), array.stype, bytes(data))


@pytest.mark.parametrize("kind", [strategy.FedAvg, StreamingFedAvg])
def test_a_damaged_reply_is_an_error_of_its_node(kind):
    grid = WireGrid(FakeGrid(app_of(stepping), damage=damaged), down="raw", poll=0)
    (good, bad) = grid.send_and_receive(messages_to(11, 12))
    assert not good.has_error()
    assert bad.metadata.src_node_id == 12
    assert bad.metadata.reply_to_message_id
    assert "tensorwire" in bad.error.reason
    result = kind(fraction_evaluate=0.0).start(grid=grid, initial_arrays=record_of(same_start()), num_rounds=1)
    start = same_start()
    assert all(np.allclose(array.numpy(), start[key] + STEP, atol=1e-5) for key, array in result.arrays.items())


def test_nan_is_refused_at_the_node_that_makes_it():
    def train(message, context):
        arrays = {k: v.numpy() for k, v in message.content["arrays"].items()}
        arrays["a" if context.node_id == 11 else "bias"].flat[3] = np.nan
        return reply_of(message, record_of(arrays))

    quantized, exact = WireGrid(FakeGrid(app_of(train)), poll=0).send_and_receive(messages_to(11, 12))
    assert "NonFinite" in quantized.error.reason and "'a'" in quantized.error.reason
    assert "NaN" in exact.error.reason and "'bias'" in exact.error.reason


def test_an_update_of_another_shape_is_left_out_of_the_streamed_mean(caplog):
    def train(message, context):
        reply = stepping(message, context)
        if context.node_id == 12:
            reply.content["arrays"]["a"] = Array(np.zeros((2, 2), np.float32))
        return reply

    result = StreamingFedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(train)), down="raw", poll=0),
        initial_arrays=record_of(same_start()),
        num_rounds=1,
    )
    assert np.allclose(result.arrays["a"].numpy(), same_start()["a"] + STEP, atol=1e-5)
    assert "node 12 is left out" in caplog.text


@pytest.mark.parametrize("weight", [0, -1.0, float("nan")])
def test_an_invalid_weight_is_left_out_of_the_streamed_mean(weight):
    def train(message, context):
        reply = stepping(message, context)
        if context.node_id == 12:
            reply.content["metrics"]["num-examples"] = weight
        return reply

    result = StreamingFedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(train)), down="raw", poll=0),
        initial_arrays=record_of(same_start()),
        num_rounds=1,
    )
    assert np.allclose(result.arrays["a"].numpy(), same_start()["a"] + STEP, atol=1e-5)


def test_a_round_without_valid_updates_changes_nothing():
    def train(message, context):
        raise RuntimeError("out of memory")

    result = StreamingFedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(FakeGrid(app_of(train)), poll=0), initial_arrays=to_record(same_start()), num_rounds=1
    )
    assert not result.arrays


def test_a_difference_against_another_model_is_refused():
    inner = FakeGrid(app_of(stepping))
    grid = WireGrid(inner, poll=0)
    first, second = grid.push_messages(messages_to(11)), grid.push_messages(messages_to(12))
    inner.replies[first[0]].content["arrays"] = inner.replies[second[0]].content["arrays"]
    (reply,) = grid.pull_messages(first)
    assert "has not sent" in reply.error.reason


def test_a_reply_that_never_comes_is_forgotten():
    inner = FakeGrid(app_of(stepping))
    grid = WireGrid(inner, poll=0)
    inner.pull_messages = lambda ids: []
    assert grid.send_and_receive(messages_to(11), timeout=0.01) == []
    assert not grid._sent
    grid.push_messages([Message(messages_to(11)[0].content, dst_node_id=11, message_type="train", ttl=0.01)])
    assert len(grid._sent) == 1
    time.sleep(0.05)
    grid.push_messages([])
    assert not grid._sent


def test_both_sides_refuse_a_later_version():
    def newer(reply):
        array = reply.content["arrays"]["tensorwire"]
        reply.content["arrays"]["tensorwire"] = Array("", (), "tensorwire/2", array.data)

    (reply,) = WireGrid(FakeGrid(app_of(stepping), damage=newer), poll=0).send_and_receive(messages_to(11))
    with pytest.raises((UnsupportedError, TypeError)):
        reply.content["arrays"]["tensorwire"].numpy()
    content = messages_to(11)[0].content
    content["tensorwire"] = ConfigRecord({"version": 2})
    context = Context(run_id=7, node_id=11, node_config={}, state=RecordDict(), run_config={})
    message = Message(content, dst_node_id=11, message_type="train")
    with pytest.raises(UnsupportedError, match="version 2"):
        wire_mod(message, context, stepping)


@pytest.mark.parametrize(
    "terms",
    [{}, {"up": "nf4"}, {"up": '"nf5"', "difference": True, "feedback": False}, {"up": "[1]", "difference": True}],
)
def test_invalid_terms_are_refused(terms):
    content = RecordDict({"tensorwire": ConfigRecord({"version": 1, **terms})})
    context = Context(run_id=7, node_id=11, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(TensorwireError):
        wire_mod(Message(content, dst_node_id=11, message_type="train"), context, stepping)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"up": lambda name, tensor: "nf4"}, ArgumentError),
        ({"up": "nf5"}, EncodeError),
        ({"down": "nf5"}, EncodeError),
        ({"feedback": True, "difference": False}, ArgumentError),
    ],
)
def test_invalid_options_are_refused(options, error):
    with pytest.raises(error):
        WireGrid(FakeGrid(None), **options)


def test_a_record_with_the_reserved_name_is_refused():
    with pytest.raises(ArgumentError, match="another name"):
        WireGrid(FakeGrid(app_of(stepping))).push_messages(messages_to(11, tensorwire=ConfigRecord()))


def test_mismatched_records_and_state_dicts_are_refused():
    record = to_record(make_state())
    with pytest.raises(SchemaError, match="names"):
        to_state_dict(record, into={})
    wrong = make_state() | {"bn.weight": torch.ones(3)}
    with pytest.raises(SchemaError, match="bn.weight"):
        to_state_dict(record, into=wrong)
    with pytest.raises(EncodeError):
        to_record({"a": 1})


def test_a_wire_array_pickles_as_a_plain_array():
    array = to_record(make_state())["half.weight"]
    for other in (pickle.loads(pickle.dumps(array)), copy.deepcopy(array)):
        assert type(other) is Array
        assert np.array_equal(other.numpy(), array.numpy())
    assert isinstance(array, WireArray)


def test_wire_arrays_can_be_sent_without_the_grid():
    message, _ = carried(Message(RecordDict({"arrays": to_record(make_state())}), dst_node_id=11, message_type="train"))
    for name, array in to_record(make_state()).items():
        assert np.array_equal(message.content["arrays"][name].numpy(), array.numpy())


@pytest.mark.parametrize("kind", [strategy.FedAvg, StreamingFedAvg])
def test_a_large_record_is_sent_in_parts(kind, monkeypatch):
    """As Flower holds an array three times while it puts it together."""
    from tensorwire.integrations.flower import records

    monkeypatch.setattr(records, "_PART", 3000)
    inner = FakeGrid(app_of(stepping))
    result = kind(fraction_evaluate=0.0).start(
        grid=WireGrid(inner, down="raw", poll=0), initial_arrays=record_of(same_start()), num_rounds=2
    )
    assert list(inner.pushed[0].content["arrays"]) == ["tensorwire", "tensorwire.1", "tensorwire.2"]
    for key, array in result.arrays.items():
        assert np.allclose(array.numpy(), same_start()[key] + 2 * STEP * 5 / 3, atol=1e-5)


def test_a_record_that_lacks_a_part_is_refused(monkeypatch):
    from tensorwire.integrations.flower import records

    def lost(reply):
        del reply.content["arrays"]["tensorwire.1"]

    monkeypatch.setattr(records, "_PART", 300)
    (reply,) = WireGrid(FakeGrid(app_of(stepping), damage=lost), down="raw", up="raw", poll=0).send_and_receive(
        messages_to(11)
    )
    assert "an encoded record has the arrays" in reply.error.reason


def test_two_thousand_small_arrays_are_one_object():
    state = {f"layer.{number}.lora": np.full((16, 8), number, np.float32) for number in range(2000)}
    inner = FakeGrid(app_of(with_tensors))
    grid = WireGrid(inner, poll=0)
    replies = grid.send_and_receive(
        [Message(RecordDict({"arrays": to_record(state)}), dst_node_id=11, message_type="train")]
    )
    assert len(get_all_nested_objects(inner.pushed[0])) < 8
    arrays = replies[0].content["arrays"]
    assert list(arrays) == list(state)
    assert all(
        np.allclose(arrays[name].numpy(), tensor + STEP)
        for name, tensor in itertools.islice(state.items(), 0, None, 97)
    )


def test_a_changed_flower_internal_is_named(monkeypatch):
    from tensorwire.integrations.flower import seams

    monkeypatch.delattr(strategy.FedAvg, "_check_and_log_replies")
    with pytest.raises(UnsupportedError, match=r"flwr .* _check_and_log_replies"):
        seams.check_seams()


def test_a_grid_forwards_unknown_attributes():
    inner = FakeGrid(None)
    inner.extra = 5
    assert WireGrid(inner).extra == 5
    assert isinstance(WireGrid(inner), Grid)


def test_subtract_of_views_is_used_as_it_is():
    """What a client sends is what `tensorwire.updates` says that it changed."""
    start = same_start()
    inner = FakeGrid(app_of(stepping))
    (reply,) = WireGrid(inner, down="raw", up="raw", poll=0).send_and_receive(messages_to(11))
    for name, view in subtract({n: v + np.float32(STEP) for n, v in start.items()}, start).items():
        change = np.frombuffer(view.read(0, view.numel), np.float32).reshape(view.shape)
        assert np.array_equal(reply.content["arrays"][name].numpy(), start[name] + change)


def test_numpy_clients_and_older_strategies_work():
    """`NumPyClient` behind the mod, and a legacy strategy in a workflow over the grid."""
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg as LegacyFedAvg
    from flwr.server.workflow import DefaultWorkflow

    start = [*same_start().values()]

    class Client(NumPyClient):
        def fit(self, parameters, config):
            assert [array.shape for array in parameters] == [array.shape for array in start]
            return [array + np.float32(STEP) for array in parameters], 3, {}

        def evaluate(self, parameters, config):
            return float(parameters[0].mean()), 3, {}

    inner = FakeGrid(ClientApp(client_fn=lambda context: Client().to_client(), mods=[wire_mod]))
    context = LegacyContext(
        context=Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        config=ServerConfig(num_rounds=2),
        strategy=LegacyFedAvg(initial_parameters=ndarrays_to_parameters(start)),
    )
    seen = []
    context.strategy.evaluate_fn = lambda turn, parameters, config: seen.append(parameters)
    DefaultWorkflow()(WireGrid(inner, poll=0), context)
    assert len(context.history.losses_distributed) == 2
    for array, first in zip(seen[-1], start, strict=True):
        assert np.allclose(array, first + 2 * STEP, atol=1e-5)
    assert all("tensorwire" in message.content for message in inner.pushed)
    assert parameters_to_ndarrays(ndarrays_to_parameters(start))[0].shape == start[0].shape


def secure_aggregation(start, step, mods, grid=lambda inner: inner):
    """What a round of SecAgg+ over four nodes makes of a model, and the grid that carried it."""
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg as LegacyFedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

    class Client(NumPyClient):
        def fit(self, parameters, config):
            return [array + step for array in parameters], 3, {}

    inner = FakeGrid(ClientApp(client_fn=lambda context: Client().to_client(), mods=mods), nodes=(11, 12, 13, 14))
    seen = []
    context = LegacyContext(
        context=Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        config=ServerConfig(num_rounds=2),
        strategy=LegacyFedAvg(
            initial_parameters=ndarrays_to_parameters(start),
            fraction_evaluate=0.0,
            min_fit_clients=4,
            min_available_clients=4,
            evaluate_fn=lambda turn, parameters, config: seen.append(parameters),
        ),
    )
    secure = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5, max_weight=10.0)
    DefaultWorkflow(fit_workflow=secure)(grid(inner), context)
    assert parameters_to_ndarrays(ndarrays_to_parameters(start))[0].shape == start[0].shape
    return seen[-1], inner


def test_secure_aggregation_gives_the_same_result_as_without_the_grid(caplog):
    """Its masked numbers are bytes of a ConfigRecord, which travel as they are; the model still goes down encoded."""
    start, step = [np.linspace(-1, 1, 20_000, dtype=np.float32).reshape(100, 200)], np.float32(2**-12)
    plain, without = secure_aggregation(start, step, [secaggplus_mod])
    ours, inner = secure_aggregation(
        start, step, [wire_mod, secaggplus_mod], lambda inner: WireGrid(inner, down="planes", poll=0)
    )
    for array, alone, first in zip(ours, plain, start, strict=True):
        assert np.abs(array - (first + 2 * step)).max() < 1e-4
        assert np.abs(array - alone).max() < 1e-4
    assert inner.down < 0.9 * without.down
    assert "secure aggregation" in caplog.text


def test_secure_aggregation_before_the_mod_is_an_error_of_every_node():
    """What it gets to see there is encoded, which it cannot mask."""
    start = [np.zeros((100, 200), np.float32)]
    seen, _ = secure_aggregation(
        start, np.float32(1), [secaggplus_mod, wire_mod], lambda inner: WireGrid(inner, poll=0)
    )
    assert np.array_equal(seen[0], start[0])


def sealed_chunks(size):
    """The chunks of an array as it is sent, and of a plain one of the same bytes."""
    from tensorwire.integrations.flower.records import _EncodedArray

    data = np.random.default_rng(1).bytes(size)
    sealed, plain = _EncodedArray("", (), "tensorwire/1", data), Array("", (), "tensorwire/1", data)
    return [chunk for _, chunk in sealed.slice_array()], [chunk for _, chunk in plain.slice_array()]


def test_few_chunks_are_copied_at_a_time(monkeypatch):
    """The next copy is made once one of those before it was dropped."""
    from tensorwire.integrations.flower import records

    monkeypatch.setattr(records, "_COPIES", 2)
    chunks, plain = sealed_chunks(26 << 20)
    assert [chunk.object_id for chunk in chunks] == [chunk.object_id for chunk in plain]
    made, queued = queue.Queue(), threading.Thread(target=lambda: [made.put(chunk.deflate()) for chunk in chunks])
    queued.start()
    for number, chunk in enumerate(plain):
        first = made.get(timeout=60)
        assert first == chunk.deflate()
        assert made.qsize() <= 1, number
        del first
    queued.join()


def test_chunks_stay_valid_if_all_are_kept(monkeypatch):
    from tensorwire.integrations.flower import records

    monkeypatch.setattr(records, "_COPIES", 2)
    monkeypatch.setattr(records, "_PATIENCE", 0.01)
    chunks, plain = sealed_chunks(26 << 20)
    assert [chunk.deflate() for chunk in chunks] == [chunk.deflate() for chunk in plain]


def test_chunks_leave_no_cycle_behind():
    """Nothing but references keeps a message alive."""
    chunks, _ = sealed_chunks(12 << 20)
    gone = weakref.ref(chunks[0])
    gc.disable()
    try:
        del chunks
        assert gone() is None
    finally:
        gc.enable()


def test_equal_arrays_that_flower_deduplicated_are_not_tied():
    data = Array(np.ones((64, 64), np.float32)).data
    record = ArrayRecord()
    for name in ("gain", "variance"):
        record[name] = Array("float32", (64, 64), "numpy.ndarray", data)
    seen = []

    def train(message, context):
        seen.append(to_state_dict(message.content["arrays"]))
        return reply_of(message, None)

    WireGrid(FakeGrid(app_of(train)), poll=0).send_and_receive(
        [Message(RecordDict({"arrays": record}), dst_node_id=11, message_type="train")]
    )
    assert seen[0]["gain"] is not seen[0]["variance"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8, torch.bool])
def test_float_counters_are_rounded_and_clamped_to_integers(dtype):
    made = to_record({"n": np.array([-1e30, -0.4, 0.6, 1e30, np.nan])})
    (count,) = to_state_dict(made, into={"n": torch.ones(5, dtype=dtype)}).values()
    values = count.double().tolist()
    assert values[1:3] == [0.0, 1.0]
    if dtype != torch.bool:
        limits = torch.iinfo(dtype)
        assert values[0] == limits.min
        assert limits.max * (1 - 1e-9) <= values[3] <= limits.max
        assert values[4] == 0


def test_a_grid_can_be_copied():
    inner = FakeGrid(None)
    inner.extra = 5
    assert copy.copy(WireGrid(inner)).extra == 5


def test_an_array_replaced_on_the_server_is_used():
    def clipped(replies):
        for reply in replies:
            reply.content["arrays"]["a"] = Array(np.zeros((32, 32), np.float32))
            yield reply

    made, grid = behind(strategy.FedAvg, in_place=False), WireGrid(FakeGrid(app_of(stepping)), down="raw", poll=0)
    messages = made.configure_train(1, record_of(same_start()), ConfigRecord(), grid)
    arrays, _ = made.aggregate_train(1, clipped(grid.send_and_receive(messages)))
    assert not arrays["a"].numpy().any()
    assert np.allclose(arrays["b"].numpy(), same_start()["b"] + (1 * 1 + 2 * 2) / 3 * STEP, atol=1e-5)


def test_metrics_are_taken_of_the_replies_before_the_model_moves():
    seen = []

    def aggregated(contents, key):
        seen.extend(content["arrays"]["a"].numpy() for content in contents)
        return MetricRecord()

    made = StreamingFedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=aggregated)
    made.in_place = True
    made.start(grid=WireGrid(FakeGrid(app_of(stepping)), poll=0), initial_arrays=to_record(same_start()), num_rounds=1)
    for values, far in zip(seen, (1, 2), strict=True):
        assert np.allclose(values, same_start()["a"] + far * STEP, atol=0.02)


CLASSES, FEATURES, CLIENTS = 8, 16, 4


def learner(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 256), torch.nn.BatchNorm1d(256), torch.nn.ReLU(), torch.nn.Linear(256, CLASSES)
    )


def examples(seed, classes):
    """Noisy patterns, one for each class."""
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(100))
    labels = torch.tensor([label for label in classes for _ in range(30)])
    noise = torch.randn(len(labels), FEATURES, generator=torch.Generator().manual_seed(seed))
    return patterns[labels] + noise, labels


def loss_curve(seed, *, wire, rounds=12):
    """The loss of the global model on all classes, round by round; each client has seen two of them."""

    def fit(message, context):
        model, node = learner(0), context.node_id - 11
        state = message.content["arrays"].to_torch_state_dict()
        model.load_state_dict({name: tensor.to(model.state_dict()[name].dtype) for name, tensor in state.items()})
        batch, labels = examples(seed * 10 + node, [2 * node, 2 * node + 1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        return reply_of(message, ArrayRecord(model.state_dict()), examples=len(labels))

    def evaluated(turn, arrays):
        model, state = learner(0), to_state_dict(arrays)
        model.load_state_dict({name: tensor.to(model.state_dict()[name].dtype) for name, tensor in state.items()})
        batch, labels = examples(999, range(CLASSES))
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model.train()(batch), labels)))

    losses = []
    inner = FakeGrid(app_of(fit, [wire_mod] if wire else []), nodes=range(11, 11 + CLIENTS))
    strategy.FedAvg(fraction_evaluate=0.0).start(
        grid=WireGrid(inner, poll=0) if wire else inner,
        initial_arrays=ArrayRecord(learner(seed).state_dict()),
        num_rounds=rounds,
        evaluate_fn=evaluated,
    )
    return losses


def test_four_clients_of_different_classes_learn_as_without_it():
    plain = np.array([loss_curve(seed, wire=False) for seed in range(3)])
    ours = np.array([loss_curve(seed, wire=True) for seed in range(3)])
    spread = plain.max(axis=0) - plain.min(axis=0)
    assert plain[:, -1].mean() < 0.6 * plain[:, 0].mean()  # they learn
    assert (np.abs(ours - plain).mean(axis=0) <= spread).all()
    assert np.abs(ours - plain)[:, -1].max() < 0.05 * plain[:, -1].mean()
