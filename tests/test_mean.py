"""`tensorwire.updates`: which mean, of what, and what the server makes of it."""

import os
import resource
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import tensorwire
from tensorwire.checksum import crc32c
from tensorwire.dtypes import FLOAT32
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.limits import DEFAULT
from tensorwire.streams import stream_info
from tensorwire.updates import (
    ErrorFeedback,
    Rules,
    ServerOptimizer,
    Terms,
    TrimmedMean,
    UpdateError,
    average,
    ceilings,
    check_update,
    clipped_to_median,
    encode,
    exact_vectors,
    normalized,
    proximal,
    receive,
    subtract,
    views,
    without_outliers,
)
from tensorwire.wire import ContainerItem, Kind, TensorItem, Writer

TERMS = Terms("run", 7, "ab" * 32, "c", "weights")


def joined(buffers):
    return b"".join(buffers)


def changes(state, base, kind):
    return views(state) if kind == "weights" else subtract(state, base)


def checked(model, number, state, *, kind="weights", weight=1.0, metrics=None, rules=None):
    """An update of client `number` that may count."""
    terms = replace(TERMS, client=f"c{number}", kind=kind, weight=weight, metrics=metrics or {})
    return check_update(joined(encode(changes(state, model, kind), terms)), model, terms, rules)


@pytest.mark.parametrize("name", ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float16"])
def test_every_kind_of_float_is_averaged(name):
    dtype = getattr(ml_dtypes, name, name)
    model = {"w": np.ones(8, dtype)}
    states = [{"w": (np.ones(8) * value).astype(dtype)} for value in (2, 4)]
    kinds = ["weights", "difference"]
    average([checked(model, n, s, kind=k) for n, (s, k) in enumerate(zip(states, kinds, strict=True))], into=model)
    assert (model["w"].astype(np.complex128) == 3).all()
    for part in (np.nan, np.inf, -1j * np.inf if name.startswith("complex") else -np.inf):
        if "e4m3fn" not in name or np.isnan(part):
            state = {"w": np.full(8, part).astype(dtype)}
            with pytest.raises(UpdateError, match="NaN, an infinity"):
                checked(model, 0, state)


def test_floats_that_cannot_be_averaged_are_refused_at_the_start():
    model = {"scale": np.ones(4, ml_dtypes.float8_e8m0fnu)}
    with pytest.raises(EncodeError, match=r"float8_e8m0fnu.*item 'scale'"):
        ceilings(model, "raw")


def test_what_a_narrow_dtype_drops_is_added_in_the_next_round():
    """Four clients, of which each moves other elements by one unit of bfloat16: a quarter of a unit for the mean."""
    unit, rounds = 2.0**-7, 40
    model = {"w": np.ones(64, ml_dtypes.bfloat16)}
    optimizer = ServerOptimizer()
    for _ in range(rounds):
        states = []
        for client in range(4):
            state = model["w"].astype(np.float32)
            state[client::4] += unit
            states.append({"w": state.astype(ml_dtypes.bfloat16)})
        updates = [checked(model, client, state, kind="difference") for client, state in enumerate(states)]
        average(updates, into=model, optimizer=optimizer)
    assert abs((model["w"].astype(np.float64).mean() - 1) / unit - rounds / 4) < 0.5


def plain_step(method, base, mean, state, *, rate, beta1=0.9, beta2=0.99, tau=1e-3):
    """Algorithm 2 of arXiv:2003.00295, and FedAvgM of arXiv:1909.06335."""
    change = mean - base
    if method == "average":
        return base + rate * change
    state["m"] = beta1 * state.get("m", 0) + (1 if method == "momentum" else 1 - beta1) * change
    if method == "momentum":
        return base + rate * state["m"]
    old = state.get("v", np.full(base.shape, tau**2))
    state["v"] = {
        "adagrad": old + change**2,
        "adam": beta2 * old + (1 - beta2) * change**2,
        "yogi": old - (1 - beta2) * change**2 * np.sign(old - change**2),
    }[method]
    return base + rate * state["m"] / (np.sqrt(state["v"]) + tau)


@pytest.mark.parametrize("method", ["average", "momentum", "adagrad", "adam", "yogi"])
def test_server_optimizers_are_those_of_their_papers(method, tmp_path):
    draw = np.random.default_rng(0)
    model, state = {"w": draw.standard_normal(1000).astype(np.float32)}, {}
    expected = model["w"].astype(np.float64)
    optimizer = ServerOptimizer(method, rate=0.3)
    for number in range(4):
        targets = [{"w": model["w"] + draw.standard_normal(1000).astype(np.float32)} for _ in range(2)]
        mean = (targets[0]["w"].astype(np.float64) + targets[1]["w"]) / 2
        expected = plain_step(method, model["w"].astype(np.float64), mean, state, rate=0.3)
        average([checked(model, n, target) for n, target in enumerate(targets)], into=model, optimizer=optimizer)
        assert np.allclose(model["w"], expected, rtol=1e-5, atol=1e-6)
        if number == 1:  # the process ends, and another goes on
            optimizer.save(tmp_path / "optimizer.tw")
            optimizer = ServerOptimizer(method, rate=0.3)
            optimizer.load(tmp_path / "optimizer.tw")


def test_an_unknown_server_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="average, momentum, adagrad, adam, yogi"):
        ServerOptimizer("adamw")
    with pytest.raises(ValueError, match="rate"):
        ServerOptimizer("adam", rate=0)
    tensorwire.numpy.save_file({"w": np.zeros(3)}, tmp_path / "other.tw")
    with pytest.raises(SchemaError, match=r"other\.tw is not the state"):
        ServerOptimizer().load(tmp_path / "other.tw")
    optimizer, model = ServerOptimizer("momentum"), {"w": np.zeros(3, np.float32)}
    average([checked(model, 0, {"w": np.ones(3, np.float32)})], into=model, optimizer=optimizer)
    other = {"w": np.zeros(5, np.float32)}
    with pytest.raises(SchemaError, match="of another model"):
        average([checked(other, 0, {"w": np.ones(5, np.float32)})], into=other, optimizer=optimizer)


@pytest.mark.parametrize("clients", [1, 2, 5, 9])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.34, 0.49])
def test_the_trimmed_mean_leaves_out_both_ends_of_every_element(clients, share):
    model = {"w": np.zeros(500, np.float32)}
    states = np.random.default_rng(clients).standard_normal((clients, 500)).astype(np.float32)
    states[0] *= np.float32(1e30)  # one of them means harm
    updates = [
        checked(model, number, {"w": state}, kind=("weights", "difference")[number % 2])
        for number, state in enumerate(states)
    ]
    average(updates, into=model, mean=TrimmedMean(share))
    trimmed = int(share * clients)
    expected = np.sort(states.astype(np.float64), axis=0)[trimmed : clients - trimmed].mean(axis=0)
    assert np.allclose(model["w"], expected, rtol=1e-6)


def test_a_trimmed_mean_cannot_leave_out_everything():
    model = {"w": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="less than 0.5"):
        average([checked(model, 0, model)], into=model, mean=TrimmedMean(0.5))


def test_one_client_is_not_the_model():
    model = {"w": np.zeros(4, np.float32)}
    says = [(1.0, 600), (1.1, 550), (0.9, 700), (-50.0, 1e9)]
    states = [({"w": np.full(4, value, np.float32)}, weight) for value, weight in says]
    updates = [checked(model, n, state, kind="difference", weight=w) for n, (state, w) in enumerate(states)]
    kept, left_out = without_outliers(updates)
    assert [each.client for each in left_out] == ["c3"] and "times the median" in left_out[0].reason
    average(kept, into=model)
    assert model["w"] == pytest.approx((600 + 1.1 * 550 + 0.9 * 700) / 1850)

    heavy = [
        replace(update, terms=replace(update.terms, weight=weight))
        for update, weight in zip(kept, (1, 2, 1e9), strict=True)
    ]
    kept, left_out = without_outliers(heavy)
    assert [update.terms.weight for update in kept] == [1, 2, 20] and not left_out
    assert without_outliers(heavy[1:]) == (heavy[1:], [])


def test_norms_are_clipped_to_their_median():
    model = {"w": np.zeros(4, np.float32)}
    states = [{"w": np.full(4, value, np.float32)} for value in (1.0, 2.0, 1000.0)]
    updates = clipped_to_median([checked(model, n, state, kind="difference") for n, state in enumerate(states)])
    average(updates, into=model)
    assert model["w"] == pytest.approx((1 + 2 + 2) / 3)


def test_fedprox_pulls_towards_the_base():
    """The gradient of mu / 2 * ||w - base||^2, by differences."""
    draw = np.random.default_rng(0)
    base, weights = {"w": draw.standard_normal(5)}, {"w": draw.standard_normal(5)}
    pull, step = proximal(weights, base, 0.1)["w"], 1e-6
    for place in range(5):
        ends = [weights["w"] + np.eye(5)[place] * way * step for way in (1, -1)]
        penalties = [0.05 * np.sum((end - base["w"]) ** 2) for end in ends]
        assert pull[place] == pytest.approx((penalties[0] - penalties[1]) / (2 * step), rel=1e-5)


def test_fednova_counts_local_steps_once():
    """d = (sum w*tau / W) * sum(w * d / tau) / W, equation 6 of arXiv:2007.07481 for plain SGD."""
    model = {"w": np.zeros(4, np.float32)}
    says = [(1.0, 10, 4), (8.0, 30, 16)]
    updates = [
        checked(model, n, {"w": np.full(4, value, np.float32)}, kind="difference", weight=w, metrics={"steps": steps})
        for n, (value, w, steps) in enumerate(says)
    ]
    average(normalized(updates), into=model)
    expected = (10 * 4 + 30 * 16) / 40 * (10 * 1.0 / 4 + 30 * 8.0 / 16) / 40
    assert model["w"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="'c0' must report its number of epochs"):
        normalized(updates, "epochs")


@pytest.mark.parametrize("down", ["bf16", "fp16", "nf4"])
def test_the_mean_of_accepted_updates_can_be_encoded(down):
    """The next model can be encoded, whatever an update that may count makes of it."""
    for value in (3.4e38, 70000.0, 65519.0, -3.39e38):
        model = {"w": np.zeros(8, np.float32)}
        state = {"w": np.full(8, value, np.float32)}
        try:
            update = checked(model, 0, state, kind="difference", rules=Rules(down=down))
        except UpdateError as error:
            assert error.reason == "finite"
            continue
        average([update], into=model, down=down, optimizer=ServerOptimizer(rate=3.0))
        assert joined(encode(views(model), TERMS, codec=down))


def test_an_update_in_slices_of_one_element_is_refused():
    model = {"w": np.zeros(100_000, np.float32)}
    writer = Writer(crc32c, DEFAULT)
    parts = [writer.start(stream_info(replace(TERMS, kind="difference").metadata()))]
    parts += writer.items([ContainerItem((), Kind.DICT), TensorItem(("w",), FLOAT32, (100_000,), ((1,),))])
    for number in range(2000):
        data = np.ones(1, np.float32).tobytes()
        parts += [writer.data(number, 1, 4, crc32c(data)), data]
    with pytest.raises(UpdateError, match="larger frames") as caught:
        check_update(b"".join(parts), model, TERMS)
    assert caught.value.reason == "cost"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux counts them here")
def test_many_files_are_opened_in_turns(tmp_path):
    model, updates = {"w": np.zeros(8, np.float32)}, []
    for number in range(150):
        terms = replace(TERMS, client=f"c{number}", kind="difference")
        path = tmp_path / f"{number}.tw"
        path.write_bytes(joined(encode(views({"w": np.ones(8, np.float32)}), terms)))
        with path.open("rb", buffering=0) as file:
            updates.append(check_update(file, model, terms, recording=path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        average(updates, into=model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (model["w"] == 1).all()


def test_keys_with_a_leading_slash_work():
    """A key that begins with a slash has another name, in files and patterns."""
    model = {"/a": np.zeros(40, np.float32), "a/b": np.zeros(40, np.float32)}
    state = {name: array + number + 1 for number, (name, array) in enumerate(model.items())}
    feedback = ErrorFeedback()
    sent = feedback.add(subtract(state, model))
    message = joined(encode(sent, replace(TERMS, kind="difference"), codec="nf4"))
    feedback.settle(sent, message)
    average([check_update(message, model, TERMS)], into=model, optimizer=ServerOptimizer("adam"))
    held = {name: np.zeros_like(array) for name, array in state.items()}
    receive(joined(encode(views(model), TERMS)), held)
    assert all(np.array_equal(held[name], model[name]) and held[name].all() for name in model)


def test_statistics_and_vectors_are_sent_exactly():
    """A step of a block of nf4 takes a small running variance below zero."""
    base = {"0.running_var": np.ones((1, 64), np.float32), "0.weight": np.ones(64, np.float32)}
    base |= {"1.weight": np.ones((64, 64), np.float32), "flat": np.ones(1 << 15, np.float32)}
    state = {name: np.geomspace(0.02, 20, array.size, dtype=np.float32) for name, array in base.items()}
    state = {name: array.reshape(base[name].shape) for name, array in state.items()}
    report = tensorwire.Report()
    data = joined(encode(subtract(state, base), TERMS, codec=exact_vectors("nf4"), report=report))
    sent = tensorwire.loads(data)
    for name in ("0.running_var", "0.weight"):
        assert np.array_equal(base[name] + sent[name], base[name] + (state[name] - base[name]))
    assert {codec: carried.items for codec, carried in report.codecs.items()} == {"raw": 2, "nf4": 2}
