"""What containers become: dicts and lists of any kind, parts that are repeated, tied tensors, scales, skeletons."""

import collections
import enum
import time
import types
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

import tensorwire
import tensorwire.numpy as tn
from tensorwire import EncodeError, Report, SchemaError

BIG = np.linspace(-1, 1, 1 << 14, dtype=np.float32).reshape(128, 128)


# --------------------------------------------------------------------------------------------- Kinds of containers


class Lookup(dict):
    """A dict that is a list of other things for whoever asks it."""

    def items(self) -> Any:
        raise AssertionError("nobody asks a subclass")

    values = keys = __iter__ = items


class Layers(list):
    def __iter__(self) -> Any:
        raise AssertionError("nobody asks a subclass")


class Ordered(collections.OrderedDict):
    pass


def moved(kind: type) -> Any:
    value = kind(a=1, b=2)
    value.move_to_end("a")
    return value


AT_HEART = {
    "Counter": (collections.Counter([30, 60, 60]), {30: 1, 60: 2}),
    "Counter of NumPy ints": (collections.Counter(np.array([1, 1, 2])), {1: 2, 2: 1}),
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "OrderedDict": (moved(collections.OrderedDict), {"b": 2, "a": 1}),
    "subclass of OrderedDict": (moved(Ordered), {"b": 2, "a": 1}),
    "subclass of dict": (Lookup(a=1), {"a": 1}),
    "subclass of list": (Layers([1, 2]), [1, 2]),
    "nested": ([{"a": Layers([Lookup(b=collections.Counter("xx"))])}], [{"a": [{"b": {"x": 2}}]}]),
    "keys of an IntEnum": ({enum.IntEnum("Color", "RED").RED: 3}, {1: 3}),
}


@pytest.mark.parametrize("kind", AT_HEART)
@pytest.mark.parametrize("with_tensor", [False, True])
def test_a_container_subclass_is_sent_as_its_base_type(kind: str, with_tensor: bool) -> None:
    value, wanted = AT_HEART[kind]
    tree = {"x": [value, BIG[:1]] if with_tensor else value}
    got = tn.loads(tn.dumps(tree))["x"]
    got = got[0] if with_tensor else got
    assert (got, type(got), list(got)) == (wanted, type(wanted), list(wanted))
    if isinstance(wanted, dict):
        assert all(type(key) in (int, str) for key in got)
    assert tn.dumps(value) == tn.dumps(wanted)


@dataclass
class Config:
    a: int = 1


REMEDIES = {
    "UserDict": (collections.UserDict(a=1), r"dict\(\)"),
    "mappingproxy": (types.MappingProxyType({}), r"dict\(\)"),
    "items": ({}.items(), r"list\(\)"),
    "deque": (collections.deque(), r"list\(\)"),
    "set": ({1}, r"list\(\)"),
    "range": (range(3), r"list\(\)"),
    "generator": ((x for x in ()), r"list\(\).*state_dict"),
    "dataclass": (Config(), "asdict"),
    "class": (Config, "only tensors"),
    "namedtuple": (collections.namedtuple("P", "x")(1), r"tuple\(\)"),
    "Enum": (enum.Enum("E", "A").A, r"\.value"),
    "path": (PurePosixPath("x"), r"str\(\)"),
    "bytearray": (bytearray(b"x"), r"bytes\(\)"),
}


@pytest.mark.parametrize("kind", REMEDIES)
@pytest.mark.parametrize("front", [tn, tensorwire])
def test_other_objects_are_refused_with_a_remedy(kind: str, front: Any) -> None:
    value, says = REMEDIES[kind]
    with pytest.raises(EncodeError, match=f"cannot be sent.*{says}") as caught:
        front.dumps({"a": [1, {"b": value}], "t": BIG})
    assert caught.value.item == "/a/1/b"


def test_a_proxy_that_raises_on_any_access_is_refused() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("not bound")

    with pytest.raises(EncodeError, match=r"Proxy cannot be sent.*'a'"):
        tensorwire.dumps({"a": Proxy()})


def test_modules_are_refused_with_a_hint_at_state_dict() -> None:
    torch = pytest.importorskip("torch")
    import tensorwire.torch as tw

    module = torch.nn.Linear(2, 2)
    for value in (module, {"m": module}, module.parameters(), {"p": module.parameters()}, module.named_modules()):
        with pytest.raises(EncodeError, match="state_dict"):
            tw.dumps(value)
    with pytest.raises(EncodeError, match="state_dict"):
        tw.dumps(torch.optim.SGD(module.parameters(), 0.1))
    for pairs in (iter({"ab": 1}), iter(torch.ones(2, 2)), iter([("a", 1, 2)]), iter([3])):
        with pytest.raises(EncodeError, match="pairs"):
            tw.dumps(pairs)
    assert set(tw.loads(tw.dumps(module.named_parameters()))) == {"weight", "bias"}


def test_a_training_checkpoint_round_trips(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import tensorwire.torch as tw

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    tw.save_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "x.tw")
    got = tw.load_file(tmp_path / "x.tw")
    scheduler.load_state_dict(got["scheduler"])
    assert scheduler.milestones == {30: 1, 60: 1}


# ------------------------------------------------------------------------------------------------------ Repetition


def doubled(depth: int, leaf: Any = 1.5) -> list:
    tree = [leaf]
    for _ in range(depth):
        tree = [tree, tree]
    return tree


def processor_seconds(job: Any) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


def test_a_list_in_several_places_comes_back_in_each() -> None:
    shared = {"lr": 0.1, "steps": [1, 2]}
    tree = {"a": shared, "b": [shared, shared], "t": BIG[:1]}
    assert repr(tn.loads(tn.dumps(tree))) == repr(tree)
    assert tn.loads(tn.dumps({"x": doubled(10)})) == {"x": doubled(10)}


def test_repetition_costs_its_bytes_and_too_much_is_refused() -> None:
    few, many = (processor_seconds(lambda: tn.dumps({"x": doubled(depth)})) for depth in (10, 14))
    assert many < 64 * few + 0.2
    for depth in (24, 30):
        for leaf in (1.5, BIG[:1]):
            with pytest.raises(EncodeError, match="several places.*'/?x"):
                tn.dumps({"x": doubled(depth, leaf)})


def test_cyclic_and_too_deep_containers_are_refused() -> None:
    ring: dict = {}
    ring["again"] = [ring]
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    with pytest.raises(EncodeError, match=r"holds itself.*'/x/again/0'"):
        tn.dumps({"x": ring})
    with pytest.raises(EncodeError, match="too deep.*'/x/0"):
        tn.dumps({"x": deep})
    with pytest.raises(EncodeError, match="too deep"):
        tn.dumps([doubled(20), [[[[[[[[[[[[doubled(20)]]]]]]]]]]]]])  # seen before, and here too deep
    with pytest.raises(EncodeError, match="holds itself"):
        tn.dumps(iter([("x", ring)]))


# ------------------------------------------------------------------------------------------------- Codecs of tied ones


@pytest.mark.parametrize(
    ("rules", "exact", "error"),
    [
        ({"lm_head": "raw", "*": "nf4"}, True, 0),
        ({"lm_head": "zstd", "*": "nf4"}, True, 0),
        ({"lm_head": "bf16", "*": "nf4"}, False, 0.004),
        ({"embed": "int8", "*": "fp4"}, False, 0.01),
        ({"lm_head": "nf4", "*": "nf4"}, False, 0.2),
    ],
)
def test_a_tied_tensor_gets_the_codec_that_keeps_most_whatever_the_order(
    rules: dict, exact: bool, error: float
) -> None:
    names = ("embed", "lm_head", "other")
    streams = []
    for order in (names, names[::-1], (names[1], names[0], names[2])):
        data = tn.dumps(dict.fromkeys(order, BIG), codec=rules)
        got = tn.loads(data)
        assert got["embed"] is got["lm_head"] is got["other"]
        assert np.array_equal(got["embed"], BIG) == exact
        assert np.abs(got["embed"] - BIG).max() <= error
        streams.append(got["embed"].tobytes())
    assert len(set(streams)) == 1


def test_a_function_is_asked_for_every_name_of_a_tied_tensor() -> None:
    asked = []

    def codec(name: str, value: Any) -> str:
        asked.append(name)
        return "raw" if name == "b" else "nf4"

    report = Report()
    got = tn.loads(tn.dumps({"a": BIG, "b": BIG, "c": BIG[:2]}, codec=codec, report=report))
    assert asked == ["a", "b", "c"] and np.array_equal(got["a"], BIG)
    assert report.otherwise == [] and set(report.codecs) == {"raw", "nf4"}


# ---------------------------------------------------------------------------------------------------------- Scales

CODES = np.arange(1 << 14, dtype=np.uint8).reshape(128, 128)
SCALE = np.linspace(0.1, 0.3, 128, dtype=np.float32)
TABLE = np.linspace(-1, 1, 256, dtype=np.float32)
# State dicts of quantized models: what must stay exact in each.
QUANTIZED = {
    "fp8": ({"w": CODES.view("i1"), "w_scale_inv": SCALE}, ["w_scale_inv"]),
    "compressed-tensors": (
        {"l.weight": CODES, "l.weight_scale": SCALE, "l.input_scale": SCALE[:1]},
        ["l.weight_scale", "l.input_scale"],
    ),
    "bitsandbytes 4 bit": (
        {
            "l.weight": CODES,
            "l.weight.absmax": SCALE,
            "l.weight.quant_map": TABLE[:16],
            "l.weight.nested_absmax": SCALE[:3],
            "l.weight.nested_quant_map": TABLE,
            "l.weight.quant_state.bitsandbytes__nf4": CODES[0, :90],
        },
        ["l.weight.absmax", "l.weight.quant_map", "l.weight.nested_absmax", "l.weight.nested_quant_map"],
    ),
    "bitsandbytes 8 bit": ({"l.SCB": SCALE, "l.weight": CODES.view("i1")}, ["l.SCB"]),
    "gptq": (
        {"l.qweight": CODES.view(np.int32), "l.qzeros": CODES[:8].view(np.int32), "l.scales": SCALE.astype(np.float16)},
        ["l.scales"],
    ),
    "mlx": ({"l.weight": CODES.view(np.uint32), "l.scales": SCALE, "l.biases": SCALE + 1}, ["l.scales", "l.biases"]),
    "gpt-oss": ({"e.proj_blocks": CODES, "e.proj_scales": CODES[:4], "e.proj_bias": SCALE}, ["e.proj_bias"]),
    "nested dicts": ({"l": {"weight": {"data": CODES, "scale": SCALE}}}, ["/l/weight/scale"]),
    "8-bit Adam": (
        {"state": {0: {"step": 3, "state1": CODES, "qmap1": TABLE, "absmax1": SCALE}}},
        ["/state/0/qmap1", "/state/0/absmax1"],
    ),
    "a row of codes": ({"bias": CODES.view("i1")[0], "bias_scale": SCALE[:1]}, ["bias_scale"]),
    "tiny weights": ({"l.weight": CODES[:2, :16], "l.weight.quant_map": TABLE}, ["l.weight.quant_map"]),
}


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16", "nf4|zstd"])
@pytest.mark.parametrize("model", QUANTIZED)
def test_scales_of_quantized_weights_stay_exact_and_are_reported(model: str, codec: str) -> None:
    state, exact = QUANTIZED[model]
    other = {"other.weight": BIG, "norm.weight": SCALE.copy()}
    for order in ({**state, **other}, {**other, **dict(reversed(state.items()))}):
        report = Report()
        got = dict(tn.decode(tn.encode(order, codec=codec, report=report)))
        flat = dict(tn.decode(tn.encode(order)))
        for name in exact:
            assert np.array_equal(got[name], flat[name]), name
        told = {row.name: row.reason for row in report.otherwise}
        assert {told[name] for name in exact} <= {"scale of quantized weights", "float16"}  # which bf16 does not take
        assert not np.array_equal(got["other.weight"], BIG)
        assert "norm.weight" not in told and "other.weight" not in told


def test_codes_beside_large_tensors_do_not_prevent_compression() -> None:
    report = Report()
    got = tn.loads(
        tn.dumps(
            {"tokens": CODES[0], "v": BIG[0], "labels": CODES[1], "mask": BIG > 0, "w": BIG, "step": np.int64(3)},
            codec="nf4",
            report=report,
        )
    )
    assert not np.array_equal(got["w"], BIG)
    assert {row.name for row in report.otherwise} == {"tokens", "labels", "mask", "step"}


def test_a_function_decides_about_scales_and_pairs_look_back() -> None:
    state = QUANTIZED["fp8"][0]
    got = tn.loads(tn.dumps(state, codec=lambda name, value: "bf16"))
    assert not np.array_equal(got["w_scale_inv"], SCALE)
    got = tn.loads(tn.encode(iter(state.items()), codec="bf16"))
    assert np.array_equal(got["w_scale_inv"], SCALE)


# ------------------------------------------------------------------------------------------------------- Skeletons


def test_a_model_on_the_meta_device_is_a_schema_and_is_never_sent() -> None:
    torch = pytest.importorskip("torch")
    import tensorwire.torch as tw

    def model(device: str) -> Any:
        made = torch.nn.ModuleDict(
            {"a": torch.nn.Linear(3, 3, device=device), "b": torch.nn.Linear(3, 3, device=device)}
        )
        made["b"].weight = made["a"].weight
        return made.state_dict()

    data = tw.dumps(model("cpu"))
    for expect in (model("meta"), tw.schema(model("meta")), tensorwire.schema(model("meta"))):
        assert set(tw.loads(data, expect=expect)) == set(model("cpu"))
    assert tw.loads(tw.dumps(model("cpu"), codec="nf4"), expect=tw.schema(model("meta"), codec="nf4"))
    other = model("meta")
    other["a.bias"] = torch.empty(4, device="meta")
    with pytest.raises(SchemaError, match="shape"):
        tw.loads(data, expect=other)
    with pytest.raises(EncodeError, match="no values.*'a.weight'"):
        tw.dumps(model("meta"))
    with pytest.raises(EncodeError, match="no values"):
        tw.schema(model("meta"), codec="nf4:nonfinite=raw")
