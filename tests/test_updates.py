"""`tensorwire.updates`: pieces, differences, feedback, rounding, checks, the mean."""

import json
import math
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorwire
from tensorwire.errors import (
    CorruptError,
    EncodeError,
    LimitError,
    SchemaError,
    TensorwireError,
    TruncatedError,
    WireError,
)
from tensorwire.limits import Limits
from tensorwire.streams import Pieces
from tensorwire.updates import (
    ErrorFeedback,
    Rules,
    Terms,
    UpdateError,
    added,
    arrays,
    as_number,
    average,
    check_update,
    copies,
    empty_like,
    encode,
    fingerprint,
    finite_metrics,
    matched,
    receive,
    stochastic_bf16,
    subtract,
    terms_of,
    views,
    write_update,
)

CODECS = [
    "raw",
    "fp16",
    "bf16",
    "int8",
    "int8-linear",
    "nf4",
    "fp4",
    "nf4:double_quant=true",
    "bf16|zstd",
    "raw|zstd",
]


def make_model(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "weight": draw.standard_normal((300, 70)).astype(np.float32),
        "bias": draw.standard_normal(7).astype(np.float32),
        "half": draw.standard_normal(4097).astype(np.float16),
        "double": draw.standard_normal((3, 5)),
        "scalar": np.array(0.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "steps": np.array(41),
        "mask": np.array([True, False]),
    }


def trained(model, seed):
    draw = np.random.default_rng(seed)
    return {
        name: (array + 0.1 * draw.standard_normal(array.shape)).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in model.items()
    }


def joined(buffers):
    return b"".join(map(bytes, buffers))


TERMS = Terms("run", 3, base="ab", client="c0", weight=2.0)


def upload(model, number, *, kind="difference", codec="nf4", frame_size=1 << 13, weight=None):
    """What client `number` sends, its terms, and what the server is to see of it, in float64."""
    terms = replace(TERMS, client=f"c{number}", kind=kind, weight=weight or 1.5 + number)
    state = trained(model, 100 + number)
    data = joined(encode(changes(state, model, kind), terms, codec=codec, frame_size=frame_size))
    return data, terms, {name: array.astype(np.float64) for name, array in tensorwire.loads(data).items()}


def plain_mean(model, uploads):
    """The definition, in plain NumPy."""
    ordered = sorted(uploads, key=lambda upload: upload[1].client)
    weight = math.fsum(terms.weight for _, terms, _ in ordered)
    share = math.fsum(terms.weight for _, terms, _ in ordered if terms.kind == "difference")
    mean = {}
    for name, array in model.items():
        total = np.zeros(array.shape)
        for _, terms, sent in ordered:
            total = total + terms.weight * sent[name]
        if share:
            total = total + share * array.astype(np.float64)
        mean[name] = (total / weight).astype(array.dtype) if array.dtype.kind == "f" else array
    return mean


def changes(state, base, kind):
    return views(state) if kind == "weights" else subtract(state, base)


def same(one, other):
    return all(one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one)


# Pieces of streams


@pytest.mark.parametrize("frame_size", [1 << 12, 1 << 16, 1 << 20])
@pytest.mark.parametrize("codec", CODECS)
def test_pieces_equal_the_result_of_decode(codec, frame_size):
    model = make_model()
    try:
        data = joined(tensorwire.encode(model, codec=codec, frame_size=frame_size))
    except EncodeError:
        pytest.skip("a block of this codec needs a larger frame")
    expected = tensorwire.loads(data)
    got = {name: bytearray() for name in model}
    for piece in Pieces(data, lambda item: None):
        assert piece.start * piece.item.dtype.itemsize == len(got[piece.item.name])
        got[piece.item.name] += piece.data.tobytes()
    assert got == {name: array.tobytes() for name, array in expected.items()}


def test_a_long_raw_slice_comes_in_pieces_and_is_verified_by_the_end(tmp_path):
    array = np.arange(3 << 20, dtype=np.float32)  # 12 MiB, one frame in a file
    tensorwire.save_file({"a": array}, tmp_path / "a.tw")
    data = bytearray((tmp_path / "a.tw").read_bytes())
    pieces = [(piece.start, piece.data.copy()) for piece in Pieces(bytes(data), lambda item: None)]
    assert [start for start, _ in pieces] == [0, 1 << 20, 2 << 20]
    assert np.array_equal(np.concatenate([piece for _, piece in pieces]).view(np.float32), array)
    data[8 << 20] ^= 1
    with pytest.raises(CorruptError):
        for _ in Pieces(bytes(data), lambda item: None):
            pass


def test_pieces_accept_only_tensors(tmp_path):
    with pytest.raises(SchemaError, match="not tensors"):
        list(Pieces(tensorwire.dumps({"a": 1}), lambda item: None))
    (tmp_path / "file").write_bytes(b"abc")
    with pytest.raises(SchemaError, match="decode_file"):
        list(Pieces(joined(tensorwire.encode_file(tmp_path / "file")), lambda item: None))


def test_a_broken_stream_raises_a_wire_error_wherever_it_breaks():
    data, terms, _ = upload({"a": np.ones(300, np.float32)}, 0, codec="int8:blocksize=64")
    model = {"a": np.zeros(300, np.float32)}
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        with pytest.raises(WireError):
            check_update(bytes(broken), model, terms, Rules())
        with pytest.raises(TruncatedError):
            check_update(data[:at], model, terms, Rules())


def test_an_error_inside_a_slice_names_its_item():
    model = {"a": np.ones(70, np.float32), "mask": np.array([True])}
    data = joined(encode(views(model), TERMS, codec="nf4"))
    with pytest.raises(LimitError) as caught:
        check_update(data, model, TERMS, Rules(limits=Limits(frame=32)))
    assert caught.value.item == "a" and caught.value.frame is not None


# Aggregation


@pytest.mark.parametrize("kind", ["weights", "difference"])
@pytest.mark.parametrize("codec", CODECS)
def test_the_mean_is_the_plain_numpy_one_to_the_bit_whatever_the_order(codec, kind):
    frame_size = 1 << 20 if codec.startswith("int8") or "double" in codec else 1 << 13
    uploads = [upload(make_model(), number, kind=kind, codec=codec, frame_size=frame_size) for number in range(4)]
    expected = plain_mean(make_model(), uploads)
    for order in range(3):
        random.Random(order).shuffle(uploads)
        model = make_model()
        average([check_update(data, model, terms, Rules()) for data, terms, _ in uploads], into=model)
        assert same(model, expected)


def test_clients_may_differ_in_codec_kind_and_frame_size():
    settings = [
        ("weights", "nf4", 1 << 12),
        ("difference", "raw", 1 << 13),
        ("weights", "int8", 1 << 20),
        ("difference", "bf16|zstd", 1 << 12),
    ]
    uploads = [
        upload(make_model(), number, kind=kind, codec=codec, frame_size=size)
        for number, (kind, codec, size) in enumerate(settings)
    ]
    for turn in range(4):  # each of them leads once, and cuts the others into pieces
        turned = [
            (data, replace(terms, client=f"c{(number + turn) % 4}"), values)
            for number, (data, terms, values) in enumerate(uploads)
        ]
        model = make_model()
        updates = [
            replace(check_update(data, model, original, Rules()), terms=terms)
            for (data, original, _), (_, terms, _) in zip(uploads, turned, strict=True)
        ]
        average(updates, into=model)
        assert same(model, plain_mean(make_model(), turned))


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    weights=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_weights(sizes, weights, seed):
    draw = np.random.default_rng(seed)
    model = {f"t{number}": draw.standard_normal(size).astype(np.float32) for number, size in enumerate(sizes)}
    before = {name: array.copy() for name, array in model.items()}
    uploads = [upload(before, number, codec="nf4", weight=weight) for number, weight in enumerate(weights)]
    average([check_update(data, model, terms, Rules()) for data, terms, _ in uploads], into=model)
    assert same(model, plain_mean(before, uploads))


def test_bfloat16_models_are_averaged_and_rounded_once():
    torch = pytest.importorskip("torch")
    base = {"a": torch.linspace(-3, 3, 1000).bfloat16()}
    states = [{"a": (base["a"].float() * scale).bfloat16()} for scale in (1.01, 0.97)]
    model = arrays({"a": base["a"].clone()})
    updates = []
    for number, state in enumerate(states):
        terms = replace(TERMS, client=f"c{number}", kind="weights", weight=1.0 + number)
        updates.append(check_update(joined(encode(views(state), terms)), model, terms, Rules()))
    expected = ((states[0]["a"].double() + 2 * states[1]["a"].double()) / 3).float().bfloat16()
    average(updates, into=model)
    assert model["a"].tobytes() == expected.view(torch.int16).numpy().tobytes()


def test_views_compose_with_views():
    model = make_model()
    state = trained(model, 1)
    plain = joined(encode(subtract(state, model), TERMS))
    assert joined(encode(ErrorFeedback().add(subtract(views(state), views(model))), TERMS)) == plain


def test_tied_tensors_stay_tied_and_are_sent_once():
    shared = np.ones((20, 10), np.float32)
    model = {"embed": shared, "head": shared, "bias": np.zeros(3, np.float32)}
    state_shared = np.full((20, 10), 3, np.float32)
    state = {"embed": state_shared, "head": state_shared, "bias": np.ones(3, np.float32)}
    for kind in ("weights", "difference"):
        terms = replace(TERMS, kind=kind)
        data = joined(encode(changes(state, model, kind), terms))
        assert len(data) < 1600
        update = check_update(data, model, terms, Rules())
        average([update], into=model)
        assert model["embed"] is model["head"] and (shared == 3).all() and (model["bias"] == 1).all()


def test_memory_does_not_grow_with_clients():
    model = {"a": np.zeros(8 << 20, np.float32)}  # 32 MiB
    terms = replace(TERMS, kind="weights")
    data = joined(encode(views(model), terms, codec="nf4"))
    peaks = []
    for clients in (2, 12):
        updates = [
            replace(check_update(data, model, terms, Rules()), terms=replace(terms, client=f"c{number:02}"))
            for number in range(clients)
        ]
        tracemalloc.start()
        average(updates, into=model)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[0] < 16 and peaks[1] < peaks[0] + 1.5, peaks


def test_equal_descriptions_are_kept_once():
    """16 KiB for another client with 100 tensors; three times as much where each has items of its own."""
    model = {f"layers.{number}.self_attn.weight": np.ones((16, 1024), np.float32) for number in range(100)}
    changed = subtract(model, model)
    updates = []
    for number in range(10):
        terms = Terms("run", 0, "", f"c{number}", "difference")
        data = joined(encode(changed, terms, codec="nf4", frame_size=4096))  # too small for items to share a frame
        updates.append(check_update(data, model, terms))
    peaks = []
    for clients in (2, 10):
        average(updates[:clients], into=model)  # so that what is made once is there
        tracemalloc.start()
        average(updates[:clients], into=model)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 8 * 20 * 1024


def test_a_recording_damaged_after_its_check_raises(tmp_path):
    model = make_model()
    data, terms, _ = upload(model, 0)
    path = tmp_path / "c0.tw"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        update = check_update(file, model, terms, Rules(), recording=path)
    average([update], into=model)  # as it is
    path.write_bytes(data[:-60] + bytes([data[-60] ^ 1]) + data[-59:])
    with pytest.raises(WireError):
        average([update], into=model)
    other, _, _ = upload({"weight": model["weight"]}, 1)
    path.write_bytes(other)
    with pytest.raises(CorruptError, match="not the recording"):
        average([update], into=model)
    with pytest.raises(WireError):
        average([update, replace(update, terms=replace(terms, client="c1"), recording=data)], into=model)


def test_average_needs_one_update_per_client():
    model = make_model()
    data, terms, _ = upload(model, 0)
    update = check_update(data, model, terms, Rules())
    for updates in ([], [update, update]):
        with pytest.raises(ValueError, match="one of each client"):
            average(updates, into=model)


# What the server refuses


def refused(data, model, rules=None, expected=None):
    before = {name: array.copy() for name, array in model.items()}
    with pytest.raises(TensorwireError) as caught:
        check_update(data, model, expected or replace(TERMS, client="c0"), rules or Rules())
    assert same(model, before)
    assert isinstance(caught.value, (WireError, UpdateError))
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"), [("run", "other"), ("round", 2), ("round", 4), ("base", "cd"), ("client", "c9")]
)
def test_another_run_round_base_or_client_is_refused(field, value):
    model = make_model()
    data, terms, _ = upload(model, 0)
    error = refused(data, model, expected=replace(terms, **{field: value}))
    assert error.reason == ("client" if field == "client" else "stale")
    assert repr(value) in str(error)


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape", "dtype", "order", "broadcast"])
def test_another_schema_is_refused_before_any_payload(change):
    model = make_model()
    state = dict(model)
    if change == "missing":
        del state["bias"]
    elif change == "extra":
        state["more"] = np.zeros(3, np.float32)
    elif change == "renamed":
        state = {("prejudice" if name == "bias" else name): array for name, array in state.items()}
    elif change == "shape":
        state["weight"] = state["weight"].reshape(70, 300)
    elif change == "dtype":
        state["bias"] = state["bias"].astype(np.float64)
    elif change == "order":
        state = dict(reversed(state.items()))
    else:
        state["weight"] = state["weight"][:1]
    data = joined(encode(views(state), replace(TERMS, kind="weights")))
    head = data.index(state["double"].tobytes())
    assert isinstance(refused(data, model), SchemaError)
    if change != "missing":
        assert isinstance(refused(data[: head - 100], model), SchemaError)


@pytest.mark.parametrize("kind", ["weights", "difference"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weight", "half", "double"])
def test_nan_and_infinity_are_refused(name, value, kind):
    model = make_model()
    state = trained(model, 1)
    state[name].flat[-1] = value
    error = refused(joined(encode(views(state), replace(TERMS, kind=kind))), model)
    assert (error.reason, error.item) == ("finite", name)


def test_a_difference_that_would_overflow_the_model_is_refused():
    model = {"a": np.full(3, 3e38, np.float32)}
    data = joined(encode(views({"a": np.full(3, 1e38, np.float32)}), replace(TERMS, kind="difference")))
    assert refused(data, model).reason == "finite"


@pytest.mark.parametrize("weight", [True, "3", 0, -1.0, float("nan"), float("inf"), 1e10, None, 10**400])
def test_an_invalid_weight_is_refused(weight):
    model = {"a": np.ones(3, np.float32)}
    metadata = {"tensorwire.terms": json.dumps({**TERMS.__dict__, "weight": weight})}
    data = joined(tensorwire.encode(model, metadata=metadata))
    assert refused(data, model).reason == "weight"
    if weight != 1e10:
        with pytest.raises(EncodeError):
            encode(views(model), replace(TERMS, weight=weight))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", "[" * 100_000, '{"run": 1, "round": 0}', '{"run": "r", "round": true}',
             '{"run": "r", "round": 0, "kind": "sum"}', '{"run": "r", "round": 0, "more": 0}',
             '{"run": "r", "round": 0, "metrics": {"loss": "low"}}', '{"run": "r", "round": 0, "metrics": 3}'],
)  # fmt: skip
def test_invalid_terms_are_refused(text):
    model = {"a": np.ones(3, np.float32)}
    data = joined(tensorwire.encode(model, metadata={"tensorwire.terms": text}))
    assert isinstance(refused(data, model), SchemaError)
    assert isinstance(refused(joined(tensorwire.encode(model)), model), SchemaError)


@pytest.mark.parametrize("kind", ["weights", "difference"])
def test_norms_are_measured_from_the_base_rejected_and_clipped(kind):
    model = make_model()
    before = {name: array.copy() for name, array in model.items()}
    data, terms, sent = upload(model, 0, kind=kind)
    values = {name: sent[name] if kind == "weights" else model[name] + sent[name] for name in model}
    norm = math.sqrt(sum(np.sum((values[name] - model[name]) ** 2) for name in model if model[name].dtype.kind == "f"))
    assert check_update(data, model, terms, Rules(max_norm=norm * 1.001)).norm == pytest.approx(norm, rel=1e-6)
    assert refused(data, model, Rules(max_norm=norm / 2), terms).reason == "norm"

    update = check_update(data, model, terms, Rules(max_norm=norm / 2, on_norm="clip"))
    assert update.scale == pytest.approx(0.5, rel=1e-6)
    average([update], into=model)
    for name in ("weight", "double"):
        assert np.allclose(model[name] - before[name], (values[name] - before[name]) / 2, atol=1e-6)


def test_validate_decides_last():
    model = make_model()
    data, terms, _ = upload(model, 0, kind="weights")
    seen = []

    def validate(verdict):
        def judge(update, schema):
            assert {piece.item.name for piece in update.pieces()} == {*model} - {"empty"}
            seen.append(update.norm)
            return verdict

        return judge

    assert refused(data, model, Rules(validate=validate("reject")), terms).reason == "hook"
    assert check_update(data, model, terms, Rules(validate=validate("accept"))).scale == 1
    assert check_update(data, model, terms, Rules(validate=validate("clip"), max_norm=1e9)).scale == 1
    clip = Rules(validate=validate("clip"), max_norm=seen[0] / 4, on_norm="clip")
    assert check_update(data, model, terms, clip).scale == pytest.approx(0.25)
    for nonsense in ("clip", None):
        with pytest.raises(ValueError, match="validate"):
            check_update(data, model, terms, Rules(validate=validate(nonsense)))


# States


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_copies_keep_library_and_ties_in_new_memory(library):
    make = np.arange if library == "numpy" else pytest.importorskip("torch").arange
    one = make(6).reshape(2, 3)
    state = {"a": one, "b": one, "strided": make(6).reshape(2, 3).T, "scalar": make(1).reshape(())}
    made = copies(state)
    assert same(arrays(made), {name: np.asarray(tensor) for name, tensor in state.items()})
    assert made["a"] is made["b"] and type(made["a"]) is type(one)
    made["a"][0, 0] = 7
    assert one[0, 0] == 0
    assert [tuple(tensor.shape) for tensor in empty_like(state).values()] == [(2, 3), (2, 3), (3, 2), ()]


def test_trained_tensors_take_order_and_ties_of_the_model():
    shared = np.ones(3, np.float32)
    base = {"embed": shared, "head": shared, "bias": np.zeros(2, np.float32)}
    trained = {"bias": np.ones(2, np.float32), "head": np.full(3, 2, np.float32), "embed": np.full(3, 2, np.float32)}
    made = matched(trained, base)
    assert [*made] == [*base] and made["embed"].identity == made["head"].identity
    assert len(joined(encode(made, TERMS))) < len(joined(encode(views(trained), TERMS)))
    for wrong, says in (
        ({**trained, "head": np.zeros(3, np.float32)}, "training gave two"),
        ({**trained, "more": shared}, "which the model does not have"),
        ({"bias": trained["bias"]}, "which the model has"),
        ({**trained, "bias": np.ones(3, np.float32)}, "training gave float32"),
        ([shared], "must give a mapping"),
    ):
        with pytest.raises(SchemaError, match=says):
            matched(wrong, base)


# Updates


def test_a_client_receives_the_broadcast_model():
    model = make_model()
    data = joined(encode(views(model), Terms("run", 3), codec="bf16"))
    into = {name: np.zeros_like(array) for name, array in model.items()}
    terms, digest = receive(data, into)
    assert (terms, len(digest)) == (Terms("run", 3), 64)
    assert same(into, tensorwire.loads(data))
    with pytest.raises(SchemaError):
        receive(data, {"weight": into["weight"]})
    with pytest.raises(SchemaError):
        receive(data, {**into, "more": np.zeros(1)})


def test_flushing_subnormals_in_torch_does_not_change_differences():
    torch = pytest.importorskip("torch")
    base = {"w": np.linspace(1e-37, 2e-37, 4096, dtype=np.float32)}
    model = {"w": base["w"] + np.linspace(0, 1e-38, 4096, dtype=np.float32)}  # apart by subnormal numbers
    assert (np.abs(model["w"] - base["w"]) < np.finfo(np.float32).tiny).sum() > 1000

    def made():
        held, feedback = {"w": base["w"].copy()}, ErrorFeedback()
        sent = feedback.add(subtract(model, held))
        message = joined(encode(sent, Terms("run", 1, kind="difference"), codec="int8"))
        receive(message, held)
        feedback.settle(sent, message)
        again = added(subtract(model, base), {"w": base["w"] - base["w"]})
        return (
            message,
            held["w"].tobytes(),
            joined(encode(feedback.add(sent), Terms("run", 2))),
            joined(encode(again, Terms("run", 3))),
        )

    expected = made()
    assert torch.set_flush_denormal(True)
    try:
        found = made()
    finally:
        torch.set_flush_denormal(False)
    assert found == expected


def test_a_difference_applies_only_to_its_base():
    model = make_model()
    held = {name: np.zeros_like(array) for name, array in model.items()}
    first = joined(encode(views(model), Terms("run", 0), codec="bf16"))
    _, digest = receive(first, held)
    for number in range(1, 5):
        terms = Terms("run", number, digest, kind="difference")
        news = joined(encode(subtract(model, held), terms, codec="nf4"))
        for stale in ("", "0" * 64):
            with pytest.raises(SchemaError, match="difference to"):
                receive(news, {name: np.zeros_like(array) for name, array in model.items()}, held=stale)
        _, digest = receive(news, held, held=digest)
    # Each round leaves a part of what the one before it left.
    assert np.abs(held["weight"] - model["weight"]).max() < 1e-5
    assert held["steps"] == model["steps"] and (held["mask"] == model["mask"]).all()


def test_views_are_lazy_and_leave_their_input_alone():
    model, state = make_model(), trained(make_model(), 1)
    keep = {name: array.copy() for name, array in state.items()}
    difference = tensorwire.loads(joined(encode(subtract(state, model), TERMS)))
    for name, array in model.items():
        expected = state[name] - array if array.dtype.kind == "f" else array
        assert np.array_equal(difference[name], expected) and difference[name].dtype == array.dtype
    assert same(state, keep)
    with pytest.raises(EncodeError, match="bias"):
        encode(subtract({**state, "bias": "no tensor"}, model), TERMS)
    with pytest.raises(EncodeError, match="before"):
        subtract({**state, "bias": state["weight"]}, model)
    with pytest.raises(EncodeError, match="more"):
        subtract({**state, "more": state["weight"]}, model)


def test_codecs_are_chosen_by_item():
    codec = {"weight": "nf4", "b*": "bf16:overflow=saturate"}
    data = joined(encode(views(make_model()), TERMS, codec=codec, stochastic=1))
    assert data != joined(encode(views(make_model()), TERMS, codec=codec))
    received = {item.name: item for item in described(data)}
    assert [len(received[name].codec) for name in ("weight", "bias")] == [1, 1]
    assert len({received[name].codec[0][0] for name in ("weight", "bias", "half")}) == 3


def described(data):
    items = []
    for _ in Pieces(data, items.append):
        pass
    return items


@pytest.mark.parametrize("codec", ["nf4", "fp4", "int8", "bf16"])
def test_error_feedback_eventually_delivers_what_quantization_drops(codec):
    base = {"a": np.zeros(4096, np.float32)}
    state = {"a": np.random.default_rng(0).standard_normal(4096).astype(np.float32)}
    errors = {}
    for feedback in (None, ErrorFeedback()):
        total = np.zeros(4096)
        for _ in range(20):
            sent = subtract(state, base)
            if feedback is not None:
                sent = feedback.add(sent)
            data = joined(encode(sent, TERMS, codec=codec))
            total += tensorwire.loads(data)["a"]
            if feedback is not None:
                feedback.settle(sent, data)
        errors[feedback is not None] = np.abs(total / 20 - state["a"]).max()
    assert errors[True] < errors[False] / 8, errors


def test_error_feedback_survives_restarts_and_checks_its_model(tmp_path):
    model, state = make_model(), trained(make_model(), 1)
    feedback = ErrorFeedback(tmp_path / "residual.tw")
    sent = feedback.add(subtract(state, model))
    data = joined(encode(sent, TERMS, codec="nf4"))
    assert not (tmp_path / "residual.tw").exists()  # nothing has counted yet
    expected = {
        name: state[name] - model[name] - array
        for name, array in tensorwire.loads(data).items()
        if array.dtype.kind == "f"
    }
    feedback.settle(sent, data)
    feedback.save(tmp_path / "residual.tw")
    again = joined(encode(ErrorFeedback(tmp_path / "residual.tw").add(subtract(state, model)), TERMS))
    for name, residual in expected.items():
        assert np.allclose(
            tensorwire.loads(again)[name],
            state[name] - model[name] + residual,
            atol=2e-3 if name == "half" else 1e-6,
        )
    with pytest.raises(EncodeError, match="another model"):
        ErrorFeedback(tmp_path / "residual.tw").add(views({"bias": np.zeros(9, np.float32)}))


@pytest.mark.parametrize("kind", ["weights", "difference"])
def test_an_update_follows_its_terms_and_keeps_the_residual(tmp_path, kind):
    base, state = make_model(), trained(make_model(), 1)
    before, path, feedback = copies(base), tmp_path / "update.tw", ErrorFeedback()
    terms = Terms("run", 0, kind=kind)
    write_update(path, state, base, terms, codec="nf4", feedback=feedback if kind == "difference" else None)
    sent = subtract(state, base) if kind == "difference" else views(state)
    assert path.read_bytes() == joined(encode(sent, terms, codec="nf4")) and terms_of(path) == terms
    assert all(before[name].tobytes() == array.tobytes() for name, array in base.items())
    assert any(left.any() for left in feedback.residual.values()) == (kind == "difference")
    path.write_bytes(path.read_bytes()[:-1])
    assert terms_of(path) is None and terms_of(tmp_path / "none.tw") is None
    path.write_bytes(tensorwire.dumps(base))
    assert terms_of(path) is None


def test_error_feedback_fades_with_missed_rounds(tmp_path):
    path = tmp_path / "residual.tw"
    feedback = ErrorFeedback(path)
    feedback.begin(4, 0.5)  # its first, of which nothing is left
    feedback.residual["w"] = np.full(3, 8, np.float32)
    feedback.save(path)
    for number, left in ((5, 8), (7, 2), (4, 8), (3, 8)):  # the next, the next but two; the same again, one before
        again = ErrorFeedback(path)
        assert again.round == 4
        again.begin(number, 0.5)
        assert (again.residual["w"] == left).all() and again.round == number
    tensorwire.numpy.save_file({"w": np.ones(3, np.float32)}, path, metadata={"tensorwire.round": "soon"})
    with pytest.raises(SchemaError, match="'soon', which is not a number"):
        ErrorFeedback(path)


def test_metrics_are_finite_numbers_of_any_library_and_few():
    given = {"a": 1, "b": np.float32(0.5), "c": np.array([[2]]), "d": math.nan, "e": "3", "f": [1, 2], "g" * 65: 1.0}
    assert finite_metrics(given) == ({"a": 1.0, "b": 0.5, "c": 2.0}, ["d", "e", "f", "g" * 64])
    kept, dropped = finite_metrics({str(n): n for n in range(501)})
    assert len(kept) == 500 and dropped == ["500"] and finite_metrics(None) == ({}, [])
    assert [as_number(value) for value in (True, 10**400, np.arange(2), None)] == [1.0, None, None, None]


def test_a_fingerprint_changes_with_any_byte():
    model = make_model()
    before = fingerprint(model)
    assert fingerprint(copies(model)) == before
    for array in model.values():
        if array.size:
            kept = array.copy()
            array.reshape(-1).view(np.uint8)[-1] ^= 1
            assert fingerprint(model) != before
            array[...] = kept
    assert fingerprint(model) == before


def test_stochastic_rounding_is_right_on_average_and_the_same_for_the_same_seed():
    state = {
        "a": np.full(1 << 16, 1 + 2**-10, np.float32),
        "n": np.arange(3),
    }  # an eighth of a unit above 1 in bf16
    data = joined(encode(views(state), TERMS, codec="bf16", stochastic=7))
    assert data == joined(encode(views(state), TERMS, codec="bf16", stochastic=7))
    assert data == joined(encode(stochastic_bf16(views(state), 7), TERMS, codec="bf16"))
    assert data != joined(encode(views(state), TERMS, codec="bf16", stochastic=8))
    got = tensorwire.loads(data)["a"].astype(np.float64)
    assert {*got} == {1, 1 + 2**-7}
    assert abs(got.mean() - state["a"][0]) < 5 * np.sqrt(2**-14 * 7 / 64 / got.size)
    assert (tensorwire.loads(joined(encode(views(state), TERMS, codec="bf16")))["a"] == 1).all()
    edge = {"a": np.array([np.finfo(np.float32).max / 2, -0.0, np.inf, np.nan], np.float32)}
    got = tensorwire.loads(joined(encode(views(edge), TERMS, codec="bf16|zstd", stochastic=1)))["a"]
    assert np.isfinite(got[:2]).all() and np.isinf(got[2]) and np.isnan(got[3])


def test_equal_means_same_bits_dtype_and_shape():
    large = np.arange(1 << 18, dtype=np.float32)
    other = large.copy()
    assert tensorwire.updates.is_equal(large, other) and tensorwire.updates.is_equal(large, views({"w": other})["w"])
    other[-1] += 1
    assert not tensorwire.updates.is_equal(large, other)
    assert not tensorwire.updates.is_equal(large, large.view(np.int32))
    assert not tensorwire.updates.is_equal(large, large.reshape(512, 512))
    assert not tensorwire.updates.is_equal(np.zeros(3), -np.zeros(3)) and tensorwire.updates.is_equal(
        *[np.zeros((0, 2))] * 2
    )
