"""Compressors against a model of a few lines of NumPy: what they keep, what is lost, and how messages are added up."""

import copy
import pickle
from importlib import import_module
from math import comb, log2
from typing import Any

import numpy as np
import pytest

import tensorwire
from tensorwire import dtypes, updates
from tensorwire.codecs import signed
from tensorwire.errors import EncodeError, NonFiniteError, SchemaError
from tensorwire.tensor import Extent
from tensorwire.updates import Compressor, combine

SPECS = ["demo:k=4", "demo:k=32,beta=0.9,alpha=0.2", "topk:k=64,values=4bit", "topk:k=3,values=sign", "lowrank:bits=8"]
SPECS += ["demo:k=4,scale=chunk", "topk:k=64,scale=chunk"]
SHAPES = {"matrix": (70, 130), "conv": (6, 5, 3, 3), "vector": (5000,), "scalar": (), "empty": (0, 4), "thin": (300, 2)}


def state(seed: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def kept_of(compressor: Compressor) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in compressor.state_dict()["kept"].items()}


class Model:
    """What a compressor must keep: three lines, and what was sent."""

    def __init__(self, compressor: Compressor) -> None:
        self.beta, self.alpha = np.float32(compressor.method.beta), np.float32(compressor.method.alpha)
        self.kept: dict[str, np.ndarray] = {}

    def step(self, new: dict[str, np.ndarray], data: bytes) -> None:
        sent = tensorwire.loads(data)
        for name, tensor in new.items():
            total = self.beta * self.kept.get(name, np.zeros_like(tensor, np.float32)) + tensor.astype(np.float32)
            self.kept[name] = total - self.alpha * np.asarray(sent[name], np.float32)

    def lost(self, data: bytes) -> None:
        for name, tensor in tensorwire.loads(data).items():
            self.kept[name] = self.kept[name] + self.alpha * tensor

    def check(self, compressor: Compressor) -> None:
        kept = kept_of(compressor)
        assert kept.keys() == self.kept.keys()
        for name, tensor in self.kept.items():
            assert np.array_equal(kept[name], tensor), name


@pytest.mark.parametrize("spec", SPECS)
def test_a_compressor_subtracts_what_receivers_decode(spec: str) -> None:
    compressor = Compressor(spec)
    model = Model(compressor)
    for step in range(4):
        given = state(step)
        before = {name: tensor.copy() for name, tensor in given.items()}
        model.step(given, compressor.compress(given).data)
        model.check(compressor)
        assert all(np.array_equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize("bits", [1, 2, 16])
def test_each_chunk_has_a_scale_of_its_own(bits: int) -> None:
    codec = tensorwire.codec("sparse", k=4, bits=bits, rows=8, cols=8, width=24, scaled=True)
    values = np.random.default_rng(bits).standard_normal((16, 24)).astype(np.float32)
    below = np.array([[0, 3, 14], [20, 90, 1]], np.int32)  # a chunk is so many times smaller
    values = np.ldexp(values, -np.kron(below, np.ones((8, 8), np.int32)))
    values[8:, 8:16] = 0
    sent = tensorwire.loads(tensorwire.dumps(values, codec=codec))
    tops = [[np.abs(values[i : i + 8, j : j + 8]).max() for j in (0, 8, 16)] for i in (0, 8)]
    exponents = np.frexp(np.array(tops))[1]
    scales = np.where(np.array(tops) > 0, np.minimum(exponents.max() - exponents, 15), 0)
    plain = np.ldexp(values, np.kron(scales, np.ones((8, 8), np.int32)))
    expected = tensorwire.loads(tensorwire.dumps(plain, codec=tensorwire.codec(f"{codec}".replace("true", "false"))))
    assert np.array_equal(sent, np.ldexp(expected, -np.kron(scales, np.ones((8, 8), np.int32))))


def test_with_scales_of_chunks_what_is_quiet_comes_nearer_with_each_message() -> None:
    """With one step for all, beside what is loud it is sent many times too large, and never settles."""
    left = {}
    for scale in ("tensor", "chunk"):
        compressor, rng = Compressor(f"topk:k=64,dct=true,scale={scale}"), np.random.default_rng(0)
        given = np.zeros((128, 64), np.float32)
        given[64:] = quiet = 2.0**-8 * rng.standard_normal((64, 64), np.float32)
        total = np.zeros_like(given)
        for _ in range(30):
            given[:64] = rng.standard_normal((64, 64), np.float32)
            total += tensorwire.loads(compressor.compress({"w": given}).data)["w"]
            given[64:] = 0
        left[scale] = np.linalg.norm(total[64:] - quiet) / np.linalg.norm(quiet)
    assert left["chunk"] < 0.8
    assert left["tensor"] > 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_kept_in_float32(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    compressor, kept = Compressor("demo:k=4"), {}
    for step in range(3):
        given = {"w": torch.tensor(state(step)["matrix"]).to(getattr(torch, dtype))}
        data = compressor.compress(given).data
        sent = tensorwire.torch.loads(data)["w"]
        assert sent.dtype == given["w"].dtype
        kept = 0.999 * kept + given["w"].float() if step else given["w"].float()
        kept = kept - sent.float()
        assert np.array_equal(kept_of(compressor)["w"], kept.numpy())


def test_torch_and_numpy_make_the_same_messages() -> None:
    torch = pytest.importorskip("torch")
    given = state(0)
    tensors = {name: torch.tensor(tensor) for name, tensor in given.items()}
    tensors["matrix"] = torch.tensor(given["matrix"].T.copy()).T  # not in its order in memory
    assert Compressor("demo:k=4").compress(tensors).data == Compressor("demo:k=4").compress(given).data


def test_a_lost_message_is_kept_again_once() -> None:
    compressor = Compressor("topk:k=8,values=sign")
    model = Model(compressor)
    first = compressor.compress(state(0))
    model.step(state(0), first.data)
    second = compressor.compress(state(1))
    model.step(state(1), second.data)
    compressor.nack(first)  # it was overtaken by the second
    model.lost(first.data)
    compressor.nack(first)
    compressor.ack(second)
    compressor.nack(second)
    compressor.nack()
    model.check(compressor)


def test_missed_rounds_reduce_the_kept_values() -> None:
    compressor = Compressor("demo:k=8")
    compressor.compress(state(0))
    before = kept_of(compressor)
    compressor.age(0.5)
    assert all(np.array_equal(kept, before[name] * np.float32(0.5)) for name, kept in kept_of(compressor).items())
    with pytest.raises(ValueError, match="from 0 to 1"):
        compressor.age(1.5)


@pytest.mark.parametrize("spec", SPECS)
def test_a_restart_goes_on_as_if_nothing_had_been(spec: str, tmp_path) -> None:
    through, restarted = Compressor(spec), Compressor(spec)
    for step in range(2):
        assert through.compress(state(step)).data == restarted.compress(state(step)).data
    tensorwire.save_file(restarted.state_dict(), tmp_path / "state.tw")
    restarted = Compressor(spec)
    restarted.load_state_dict(tensorwire.load_file(tmp_path / "state.tw"))
    for compressor in (through, restarted):
        compressor.nack()
    assert through.compress(state(2)).data == restarted.compress(state(2)).data
    with pytest.raises(EncodeError, match="not of demo:k=5"):
        Compressor("demo:k=5").load_state_dict(through.state_dict())


def test_tied_tensors_are_sent_and_kept_once() -> None:
    tensor = state(0)["matrix"]
    compressor = Compressor("demo:k=4")
    data = compressor.compress({"a": tensor, "b": tensor}).data
    sent = tensorwire.loads(data)
    assert sent["a"] is sent["b"]
    assert kept_of(compressor).keys() == {"a"}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"w": np.array([1, np.nan], np.float32)}, NonFiniteError, "element 1 is nan"),
        ({"w": np.array([-np.inf, 1], np.float32)}, NonFiniteError, "element 0 is inf"),
        ({"w": np.array([1, 3e38], np.float32)}, NonFiniteError, "element 1 is 3e.38.*may not exceed"),
        ({"w": np.zeros(2)}, EncodeError, "float64"),
        ({"w": np.zeros(3, np.float32)}, EncodeError, "had"),
        ({"w": "text"}, EncodeError, "tensors"),
    ],
)
def test_refused_input_changes_nothing(given, error, says) -> None:
    compressor = Compressor("topk:k=1")
    good = {"v": np.ones(5, np.float32), "w": np.array([1, 2], np.float32)}
    compressor.compress(good)
    before = kept_of(compressor)
    with pytest.raises(error, match=says) as caught:
        compressor.compress(good | given)
    assert caught.value.item == "w"
    assert all(np.array_equal(kept, before[name]) for name, kept in kept_of(compressor).items())


@pytest.mark.parametrize(
    "spec", ["demo", "demo:k=6", "topk:k=32,values=4bit,dct=true", "lowrank:rank=2", "demo:beta=0.5"]
)
def test_a_spec_is_rebuilt_by_its_repr(spec: str) -> None:
    method = Compressor(spec).method
    assert repr(method) == spec
    assert Compressor(repr(method)).method == method


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("damo", "known: demo, topk, lowrank"),
        ("demo:q=1", "no parameter 'q'"),
        ("demo:k=0", "from 1"),
        ("demo:beta=2", "0 to 1"),
    ],
)
def test_invalid_specs_are_refused(spec: str, says: str) -> None:
    with pytest.raises(EncodeError, match=says):
        Compressor(spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_the_sum_of_messages_is_that_of_what_they_decode_to(spec: str, how: str) -> None:
    messages = [Compressor(spec).compress(state(seed)).data for seed in range(5)]
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    total = combine(iter(messages), how=how, weights=weights)
    decoded = [tensorwire.loads(message) for message in messages]
    for name, got in total.items():
        dense = sum(w * d[name].astype(np.float64) for w, d in zip(weights, decoded, strict=True))
        dense = dense / sum(weights) if how == "mean" else dense
        assert got.dtype == np.float32 and got.shape == SHAPES[name]
        assert np.allclose(got, dense, rtol=0, atol=4e-6 * np.abs(dense).max(initial=0))


def test_the_mean_of_those_present_and_the_vote_are_of_what_was_sent() -> None:
    a, b, c = (np.zeros(8, np.float32) for _ in range(3))
    a[1], b[1], b[5], c[1] = 4, 2, -6, -1
    messages = [Compressor("topk:k=2,values=16bit").compress({"w": w}).data for w in (a, b, c)]
    sent = [tensorwire.loads(message)["w"] for message in messages]
    held = [[0, 1], [1, 5], [0, 1]]
    expected = np.zeros(8)
    for at in (0, 1, 5):
        expected[at] = np.mean([s[at] for s, h in zip(sent, held, strict=True) if at in h])
    assert np.allclose(combine(messages, how="present")["w"], expected, rtol=1e-6)
    assert combine(messages, how="vote")["w"].tolist() == [1, 1, 0, 0, 0, -1, 0, 0]  # a zero that is kept counts as +


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_goes_on_by_itself_and_other_tensors_may_come_and_go(spec: str) -> None:
    """What a step has in common with the last one is remembered: never another compressor's, nor other tensors'."""
    first = Compressor(spec)
    first.compress(state(0))
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), Compressor(spec)]
    copies[2].load_state_dict(first.state_dict())
    alone = first.compress(state(1)).data
    assert [each.compress(state(1)).data for each in copies] == [alone] * 3
    fewer = {name: tensor for name, tensor in state(2).items() if name != "conv"}
    tied = state(3) | {"tied": (shared := state(4)["matrix"]), "to": shared}
    for tensors in (fewer, state(2), tied, {**tied, "to": shared.copy()}, state(5)):
        made = [each.compress(tensors).data for each in copies]
        assert made == [made[0]] * 3 and set(tensorwire.loads(made[0])) == set(tensors)


def test_coefficients_are_added_before_they_are_transformed() -> None:
    messages = [Compressor("demo:k=4").compress({"w": state(seed)["matrix"]}).data for seed in range(3)]
    assert np.array_equal(combine(messages)["w"], combine(messages)["w"])
    present = combine(messages, how="present")["w"]
    assert not np.allclose(present, combine(messages)["w"])  # few coefficients are in all three


@pytest.mark.parametrize("dct", ["true", "false"])
def test_messages_that_are_cut_elsewhere_are_added_up_all_the_same(dct: str) -> None:
    rng, codec = np.random.default_rng(0), f"sparse:k=32,bits=4,dct={dct},rows=16,cols=64,width=64"
    tensors = [{"w": rng.standard_normal(10_000).astype(np.float32)} for _ in range(3)]
    alike, cut = (
        [
            b"".join(tensorwire.encode(each, codec=codec, frame_size=size))
            for each, size in zip(tensors, sizes, strict=True)
        ]
        for sizes in ((1 << 14,) * 3, (1 << 14, 1 << 12, 1 << 13))
    )
    assert np.array_equal(combine(cut, how="vote")["w"], combine(alike, how="vote")["w"])
    dense = sum(tensorwire.loads(message)["w"].astype(np.float64) for message in cut)
    assert np.allclose(combine(cut, how="sum")["w"], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "present", "sum", "vote"])
@pytest.mark.parametrize("spec", ["demo:k=8", "topk:k=64"])
def test_messages_that_are_more_than_their_sums_are_added_up_to_the_same_bits(
    spec: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [Compressor(spec).compress(state(seed)).data for seed in range(5)]
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    expected = combine(messages, how=how, weights=weights)
    for most in (0, 1):  # from the first message on, and from a later one
        monkeypatch.setattr(import_module("tensorwire.updates.combine"), "_SUMS", most)
        for name, got in combine(messages, how=how, weights=weights).items():
            assert got.tobytes() == expected[name].tobytes()


def test_messages_that_cannot_be_combined_are_refused() -> None:
    one = Compressor("demo:k=4").compress({"w": state(0)["matrix"]}).data
    other = Compressor("demo:k=5").compress({"w": state(0)["matrix"]}).data
    more = Compressor("demo:k=4").compress({"w": state(0)["matrix"], "x": np.ones(3, np.float32)}).data
    with pytest.raises(SchemaError, match="k=5") as caught:
        combine([one, other])
    assert caught.value.item == "w"
    for pair in ([one, more], [more, one]):
        with pytest.raises(SchemaError, match="tensor"):
            combine(pair)
    with pytest.raises(ValueError, match="no message"):
        combine([])
    for single in (one, None):
        with pytest.raises(tensorwire.ArgumentError, match="iterable of messages, not"):
            combine(single)
    for weights in ([1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"zip\(\)|weight"):
            combine([one, one], weights=weights)
    with pytest.raises(ValueError, match="mean, present"):
        combine([one], how="median")


def test_a_server_sends_less_back_than_it_got() -> None:
    """Both ways are small: what the server leaves out, it sends later."""
    server, target, reached = Compressor("topk:k=16,values=16bit"), np.zeros((64, 64), np.float32), np.zeros((64, 64))
    for step in range(400):
        if step == 0:
            messages = [
                Compressor("topk:k=4096,values=16bit").compress({"w": state(s)["matrix"][:64, :64]}) for s in (1, 2)
            ]
            target = combine([message.data for message in messages])["w"]
        down = server.compress({"w": target if step == 0 else np.zeros_like(target)})
        assert len(down) < 1000
        reached += tensorwire.loads(down.data)["w"]
    assert np.linalg.norm(reached - target) < 1e-3 * np.linalg.norm(target)


def test_unexpected_sparse_tensors_cannot_expand_to_gigabytes() -> None:
    data = Compressor("topk:k=1,values=sign").compress({"w": np.zeros((64, 64), np.float32)}).data
    limits = tensorwire.Limits(expanded=64 * 64 * 4 - 1)
    with pytest.raises(tensorwire.LimitError, match=r"Limits\(expanded=") as caught:
        tensorwire.loads(data, limits=limits)
    assert caught.value.item == "w"
    into = {"w": np.ones((64, 64), np.float32)}
    assert [*tensorwire.decode(data, limits=limits, into=into)] and not into["w"].any()
    tensorwire.loads(data, limits=limits, expect=into)
    tensorwire.loads(data)


def test_a_slice_that_would_be_large_is_refused_before_memory() -> None:
    data = Compressor("topk:k=1,values=sign").compress({"w": np.zeros(1 << 16, np.float32)}).data
    with pytest.raises(tensorwire.LimitError, match="frame"):
        tensorwire.loads(data, limits=tensorwire.Limits(frame=(1 << 16) - 1))


def test_messages_are_streams_that_count_as_updates() -> None:
    model = {"w": np.zeros((64, 64), np.float32)}
    terms = updates.Terms("run", 1, client="ann", kind="difference")
    message = Compressor("topk:k=64,values=16bit").compress({"w": np.ones((64, 64), np.float32)}, terms=terms)
    update = updates.check_update(message.data, model, updates.Terms("run", 1, client="ann"))
    updates.average([update], into=model)
    assert np.array_equal(model["w"], tensorwire.loads(message.data)["w"])


def published() -> dict[str, tuple[int, ...]]:
    """The 1,204,881,408 parameters of the largest public run of DeMo."""
    d, ffn = 2048, 8192
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, d), "lm_head.weight": (32000, d)}
    for layer in range(16):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{head}.mlp.{name}_proj.weight": (ffn, d) for name in ("gate", "up")}
        shapes |= {f"{head}.mlp.down_proj.weight": (d, ffn)}
        shapes |= {f"{head}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (d,)}


@pytest.mark.parametrize(
    ("spec", "most"), [("demo:k=4", 1.78e6), ("demo:k=6", 2.55e6), ("lowrank:rank=4,bits=2", 0.84e6)]
)
def test_a_step_of_the_published_run_takes_no_more_than_was_aimed_for(spec: str, most: float) -> None:
    shapes = published()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_204_881_408
    assert updates.message_size(spec, shapes) <= most


@pytest.mark.parametrize("spec", SPECS)
def test_the_size_of_a_message_is_known_ahead(spec: str) -> None:
    given = state(0)
    size = len(Compressor(spec).compress(given))
    ahead = updates.message_size(spec, SHAPES)
    assert size <= ahead
    if spec in ("demo:k=4", "topk:k=3,values=sign"):
        assert size == ahead


@pytest.mark.parametrize(("k", "most"), [(4, 1.015), (6, 1.015), (8, 1.025), (32, 1.025), (64, 1.025)])
def test_codes_of_positions_are_near_what_they_must_be(k: int, most: float) -> None:
    chunks = 1000
    values = np.random.default_rng(k).standard_normal(chunks * 4096).astype(np.float32)
    data = tensorwire.codecs.parse(f"sparse:k={k}").encode(
        values, Extent.whole(dtypes.FLOAT32, values.shape), lambda size: np.empty(size, np.uint8)
    )
    index = 8 * (len(data.payload) - 4 - (k > 6)) / chunks - k
    assert index <= most * log2(comb(4096, k))


@pytest.mark.parametrize("spec", ["sparse", "lowrank:width=10"])
def test_codecs_alone_refuse_what_they_cannot_carry(spec: str) -> None:
    for bad in (np.nan, -np.inf, 3e38):
        values = np.ones(50, np.float32)
        values[7] = bad
        with pytest.raises(NonFiniteError, match="cannot carry") as caught:
            tensorwire.dumps({"w": values}, codec=spec)
        assert (caught.value.item, caught.value.index) == ("w", 7)


@pytest.mark.parametrize("spec", ["sparse:k=9,dct=true,rows=4,cols=5,width=10", "lowrank:width=10"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_accumulate_adds_what_decode_returns(spec: str, dtype: type) -> None:
    codec = tensorwire.codec(spec)
    values = state(0)["vector"][:75].astype(dtype)
    extent = Extent.whole(dtypes.FLOAT32 if dtype is np.float32 else dtypes.FLOAT16, values.shape)
    payload = codec.encode(values, extent, lambda size: np.empty(size, np.uint8)).payload.data
    decoded, sums = np.empty_like(values), np.linspace(0, 1, 75)
    codec.decode(payload, extent, decoded.view(np.uint8))
    expected = sums + 0.3 * decoded.astype(np.float64)
    codec.accumulate(payload, extent, sums, 0.3)
    assert np.array_equal(sums, expected)


def test_dense_items_are_voted_on_and_present_everywhere() -> None:
    """Low rank has every element; and what travels raw is added, too."""
    messages = [Compressor("lowrank:rank=2").compress({"w": state(seed)["matrix"]}).data for seed in range(3)]
    dense = [tensorwire.loads(message)["w"].astype(np.float64) for message in messages]
    assert np.array_equal(combine(messages, how="vote")["w"], np.sign(sum(np.sign(each) for each in dense)))
    assert np.array_equal(combine(messages, how="present")["w"], combine(messages)["w"])
    raw = [tensorwire.dumps({"w": each.astype(np.float32)}) for each in dense]
    assert np.array_equal(combine(raw)["w"], combine(messages)["w"])


def test_tied_and_empty_tensors_are_combined_and_others_refused() -> None:
    tensor = state(0)["matrix"]
    data = Compressor("demo:k=4").compress({"a": tensor, "b": tensor, "e": np.zeros((0, 4), np.float32)}).data
    total = combine([data, data])
    assert [*total] == ["a", "b", "e"] and total["e"].shape == (0, 4)
    assert np.array_equal(total["a"], total["b"])
    for other in ({"w": np.arange(3)}, {"w": 1.5}, {"w": {"x": tensor}}, [tensor, 1], tensor, 1.5):
        with pytest.raises(SchemaError, match="added up"):
            combine([tensorwire.dumps(other)])


def test_descriptors_hold_only_integers() -> None:
    share = tensorwire.codecs.Real(0, 1)
    with pytest.raises(EncodeError, match="integers only"):
        share.to_wire(0.5)
    assert share.from_wire(1) == 1 and not share.allows(True) and str(share) == "a number from 0 to 1"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [7, 2047, 5001, 40_003])
def test_signed_values_decode_to_half_steps(bits: int, count: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, count).astype(np.int64)
    bit_rows = codes[:, None] >> np.arange(bits) & 1
    data = np.packbits(bit_rows.astype(np.uint8).reshape(-1), bitorder="little")
    step = np.array([0.3], np.float32)
    magnitudes = ((codes & (1 << bits - 1) - 1).astype(np.float32) + np.float32(0.5)) * step
    expected = np.where(codes >> bits - 1, -magnitudes, magnitudes)
    assert np.array_equal(signed.unpack(data, step, count, bits), expected)
    assert np.array_equal(signed.pack(expected, step, bits), data)
    if count * bits % 8:
        data[-1] |= 0x80
        with pytest.raises(tensorwire.FormatError, match="after the last"):
            signed.unpack(data, step, count, bits)


def test_what_is_added_up_is_made_dense_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is a shorter one."""
    monkeypatch.setattr(import_module("tensorwire.updates.combine"), "_SUMS", 0)
    gradient = np.random.default_rng(7).standard_normal((300, 1000)).astype(np.float32)
    message = Compressor("demo:k=2").compress({"w": gradient})
    assert np.array_equal(combine([message.data], how="sum")["w"], tensorwire.loads(message.data)["w"])
