"""The parts of `tensorwire.integrations.nvflare`, without FLARE's processes: filters, decomposer, aggregator, jobs."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="needs nvflare, in an environment of its own: tests/engines/run nvflare")
torch = pytest.importorskip("torch")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.fuel.f3.streaming.download_service import ProduceRC
from nvflare.fuel.utils import fobs

import tensorwire
from tensorwire.errors import ArgumentError, EncodeError, NonFiniteError, SchemaError
from tensorwire.integrations import nvflare as wire
from tensorwire.integrations.nvflare import decomposer as messages

APP = Path(__file__).parent / "nvflare_app"
sys.path.insert(0, str(APP))
from net import Net

State = dict[str, Any]


def model() -> State:
    """What models are made of."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 200, generator=generator)
    return {
        "matrix": matrix,
        "bias": torch.randn(300, generator=generator),
        "half": torch.randn(64, 64, generator=generator).bfloat16(),
        "norm.running_var": torch.rand(40000, generator=generator),
        "norm.num_batches_tracked": torch.tensor(41),
        "scale": torch.tensor(0.5),
        "mask": torch.tensor([True, False]),
        "double": torch.randn(5, dtype=torch.float64, generator=generator),
        "none": torch.empty(0, 3),
        "tied": matrix.detach(),
    }


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def filtered(one: Any, data: Any, kind: str = DataKind.WEIGHTS, context: FLContext | None = None) -> DXO:
    """What a filter makes of a DXO, the way FLARE calls it; `data` must be the same afterwards."""
    before = dict(data)
    shareable = DXO(kind, data, {"client_name": "ann"}).to_shareable()
    made = from_shareable(one.process(shareable, context or FLContext()))
    assert list(data) == list(before) and all(data[name] is before[name] for name in before)
    assert made.meta["client_name"] == "ann"
    return made


class Cell:
    """As much of FLARE's as a download looks at."""

    def __init__(self, context: dict[str, Any] | None = None) -> None:
        self._context = context or {}

    def get_fobs_context(self) -> dict[str, Any]:
        return self._context


def download(monkeypatch: Any, downloadable: Any, decomposer: Any, cell: Cell | None = None, spoil: Any = None) -> Any:
    """(error, items) of one receiver that asks for everything twice, as after a lost reply."""

    def fetch(ref_id: str, consumer: Any, **others: Any) -> None:
        state = None
        while True:
            first, again = downloadable.produce(state, "b"), downloadable.produce(state, "b")
            assert first == again
            if first[0] == ProduceRC.EOF:
                consumer.download_completed(ref_id)
                return
            portion = spoil(first[1]) if spoil else first[1]
            try:
                assert consumer.consume(ref_id, first[2], portion) == first[2]
            except Exception as error:
                consumer.download_failed(ref_id, str(error))
                return
            state = json.loads(json.dumps(first[2]))

    monkeypatch.setattr(messages, "download_object", fetch)
    return decomposer.download("a", "ref", 1.0, cell or Cell(), progress_cb=None)


def sent(monkeypatch: Any, data: State, portion: int = 20_000, **options: Any) -> State:
    """What arrives of marked data, under its names."""
    numbers: dict[int, str] = {}
    items = {}
    for value in data.values():
        if id(value) not in numbers:
            numbers[id(value)] = f"T{len(numbers)}"
            items[numbers[id(value)]] = value
    sender = wire.WireDecomposer()
    downloadable = sender.to_downloadable(items, portion, {})
    error, got = download(monkeypatch, downloadable, wire.WireDecomposer(**options))
    assert error is None and got.keys() == items.keys()
    return {name: got[numbers[id(value)]] for name, value in data.items()}


def equal(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


@pytest.mark.parametrize("portion", [5000, 1 << 20])
def test_every_kind_of_tensor_arrives_with_its_dtype_its_shape_and_its_ties(monkeypatch: Any, portion: int) -> None:
    state = model()
    got = sent(monkeypatch, filtered(wire.WireFilter("raw"), state).data, portion)
    assert list(got) == list(state) and all(equal(got[name], state[name]) for name in state)
    assert got["tied"] is got["matrix"]


def test_small_and_sensitive_items_are_exact_and_the_rest_is_as_the_codec_says(monkeypatch: Any) -> None:
    state = model()
    marked = filtered(wire.WireFilter("nf4"), state).data
    assert {name for name, value in marked.items() if value.codec == "nf4"} == {"matrix", "tied", "half", "none"}
    got = sent(monkeypatch, marked)
    assert all(equal(got[name], state[name]) for name in state.keys() - {"matrix", "tied", "half"})
    assert 0 < (got["matrix"] - state["matrix"]).abs().max() < 0.6
    marked = filtered(wire.WireFilter({"matrix": "int8", "tied": "int8", "*": "bf16"}), state).data
    assert marked["matrix"].codec == "int8" and marked["bias"].codec == "bf16" and marked["half"].codec == "raw"
    with pytest.raises(EncodeError, match="matches no tensor"):
        filtered(wire.WireFilter({"matrixx": "int8"}), state)


def test_numpy_arrives_as_numpy_even_beside_torch(monkeypatch: Any) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(3), "c": np.float16([1, 2])}
    got = sent(monkeypatch, filtered(wire.WireFilter("raw"), arrays).data)
    assert all(isinstance(got[name], np.ndarray) and equal(got[name], arrays[name]) for name in arrays)
    mixed = {**arrays, "t": torch.arange(3)}
    for options in ({}, {"lazy": True}):
        got = sent(monkeypatch, filtered(wire.WireFilter("raw"), mixed).data, **options)
        values = {name: value.materialize() if options else value for name, value in got.items()}
        assert all(type(values[name]) is type(mixed[name]) and equal(values[name], mixed[name]) for name in mixed)


def test_numbers_of_numpy_are_arrays_without_axes(monkeypatch: Any) -> None:
    """Which is what FLARE makes of them when it adds."""
    state = {"count": np.int64(41), "scale": np.float32(0.5), "flag": np.bool_(True), "word": np.str_("x")}
    marked = filtered(wire.WireFilter("raw"), state).data
    assert marked.pop("word") == "x"
    got = sent(monkeypatch, marked)
    assert all(equal(got[name], np.asarray(state[name])) for name in got) and len(got) == 3
    aggregator = wire.WireAggregator()
    for client in "ab":
        aggregator.accept_model(reply(client, {"count": state["count"], "scale": state["scale"]}))
    assert aggregator.aggregate_model().params == {"count": 41, "scale": 0.5}


def test_filters_ignore_other_values_and_other_messages(monkeypatch: Any) -> None:
    data = {"a": torch.ones(3), "words": ["x", {"deep": torch.zeros(2)}], "none": None, "number": 3}
    marked = filtered(wire.WireFilter("raw"), data).data
    assert marked["words"][0] == "x" and marked["none"] is None and marked["number"] == 3
    assert isinstance(marked["words"][1]["deep"], wire.Wire) and isinstance(data["words"][1]["deep"], torch.Tensor)
    assert filtered(wire.WireFilter("raw"), {"accuracy": 0.5}, DataKind.METRICS).data == {"accuracy": 0.5}
    assert filtered(wire.WireFilter("raw"), marked).data["a"] is marked["a"]  # which was marked before


def test_a_collection_of_models(monkeypatch: Any) -> None:
    inner = {"a": torch.ones(3)}
    shareable = DXO(DataKind.COLLECTION, {"x": DXO(DataKind.WEIGHTS, inner)}).to_shareable()
    made = from_shareable(wire.WireFilter("raw").process(shareable, FLContext()))
    assert isinstance(made.data["x"].data["a"], wire.Wire) and isinstance(inner["a"], torch.Tensor)


def test_several_receivers_of_a_message_share_one_encoding(monkeypatch: Any) -> None:
    class Info:
        num_receivers = 2

    encodings = []
    plain = messages.encode
    monkeypatch.setattr(messages, "encode", lambda *args, **options: encodings.append(1) or plain(*args, **options))
    monkeypatch.setattr(messages.DownloadService, "get_transaction_info", lambda tx_id: Info)
    marked = filtered(wire.WireFilter("raw"), {"a": torch.randn(100_000)}).data
    outgoing = wire.WireDecomposer().to_downloadable({"T0": marked["a"]}, 10_000, {})
    outgoing.set_transaction("tx", "ref")
    got: dict[str, bytes] = {"x": b"", "y": b""}
    states: dict[str, Any] = {"x": None, "y": None}
    for step in range(200):
        for receiver in ("x", "y") if step > 20 else ("x",):  # one starts late
            rc, portion, state = outgoing.produce(states[receiver], receiver)
            if rc == ProduceRC.OK:
                got[receiver] += portion
                states[receiver] = state
    assert got["x"] == got["y"] and len(got["x"]) > 400_000 and len(encodings) == 1


def test_a_sender_keeps_one_portion(monkeypatch: Any) -> None:
    marked = filtered(wire.WireFilter("raw"), {"a": torch.randn(100_000)}).data
    outgoing = wire.WireDecomposer().to_downloadable({"T0": marked["a"]}, 10_000, {})
    state, portions = None, []
    while (made := outgoing.produce(state, "x"))[0] == ProduceRC.OK:
        state = made[2]
        portions.append(made[1])
        assert sum(map(len, outgoing._kept.values())) <= 10_000
    assert outgoing.produce({"portion": 3, "library": "torch"}, "x")[1] == portions[4]  # made anew
    outgoing.release()
    assert outgoing.base_obj == {}


@pytest.mark.parametrize("lazy", [False, True])
def test_a_broken_portion_raises_and_delivers_nothing(monkeypatch: Any, lazy: bool) -> None:
    marked = filtered(wire.WireFilter("raw"), model()).data
    items = {f"T{number}": value for number, value in enumerate(marked.values())}
    outgoing = wire.WireDecomposer().to_downloadable(items, 50_000, {})

    def flip(portion: bytes) -> bytes:
        return portion[:-9] + bytes([portion[-9] ^ 4]) + portion[-8:]

    error, got = download(monkeypatch, outgoing, wire.WireDecomposer(lazy), spoil=flip)
    assert error and got == {}
    outgoing = wire.WireDecomposer().to_downloadable(items, 50_000, {})
    error, got = download(monkeypatch, outgoing, wire.WireDecomposer(lazy), spoil=lambda portion: portion[:-1])
    assert error and got == {}


def test_an_empty_or_foreign_message_is_refused() -> None:
    consumer = messages._Incoming(None)
    with pytest.raises(SchemaError):
        consumer.download_completed("ref")
    with pytest.raises(SchemaError, match="torch or NumPy"):
        consumer.consume("ref", {"portion": 0, "library": "os"}, b"")
    for name in ("a", "os.T0", "torch."):
        with pytest.raises(SchemaError, match="of this name"):
            messages._Incoming(None).consume(
                "ref", {"portion": 0, "library": "numpy"}, tensorwire.dumps({name: np.zeros(1)})
            )


def test_what_cannot_be_quantized_is_named_as_the_model_names_it() -> None:
    tensor = torch.full((300, 300), 1.0)
    marked = filtered(wire.WireFilter("nf4"), {"matrix": tensor}).data
    tensor[:] = torch.nan
    with pytest.raises(EncodeError, match=r"NaN.*'matrix'"):
        filtered(wire.WireFilter("nf4"), {"matrix": tensor})
    outgoing = wire.WireDecomposer().to_downloadable({"T0": marked["matrix"]}, 50_000, {})
    for _ in range(2):  # whoever asks again is told again
        with pytest.raises(NonFiniteError, match="'matrix'"):
            outgoing.produce(None, "b")


def test_lazy_replies_stay_encoded_in_memory_or_on_disk(monkeypatch: Any, tmp_path: Path) -> None:
    state = model()
    marked = filtered(wire.WireFilter("nf4"), state).data
    expected = sent(monkeypatch, marked)
    got = sent(monkeypatch, marked, lazy=True)
    assert all(equal(got[name].materialize(), expected[name]) for name in state)
    assert got["matrix"].encoded.nbytes < 0.15 * 4 * 60_000 and got["tied"] is got["matrix"]
    cell = Cell({"tensor_disk_offload": True, "tensor_disk_offload_root_dir": str(tmp_path)})
    outgoing = wire.WireDecomposer().to_downloadable({"T0": marked["matrix"]}, 5000, {})
    error, items = download(monkeypatch, outgoing, wire.WireDecomposer(), cell)
    assert error is None and equal(items["T0"].materialize(), expected["matrix"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Exception, match="FOBS|serial"):
        fobs.dumps(items["T0"])  # rather than as some class with attributes


def test_without_a_cell_a_message_goes_through_flares_serializer_whole() -> None:
    wire.register()
    state = model() | {"array": np.arange(3)}
    marked = filtered(wire.WireFilter("raw"), state)
    got = fobs.loads(fobs.dumps(marked.to_shareable()))
    data = from_shareable(got).data
    assert all(type(data[name]) is type(state[name]) and equal(data[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "make", [model, lambda: {name: value.numpy() for name, value in model().items() if name != "half"}]
)
def test_whole_messages_by_two_filters(make: Any) -> None:
    state = make() | {"note": "x", "nested": [1, {"deep": torch.arange(2)}], "nothing": None}
    encoded = filtered(wire.EncodeFilter("nf4"), state)
    assert filtered(wire.EncodeFilter("nf4"), encoded.data).data is not None
    through = fobs.loads(fobs.dumps(encoded.to_shareable()))
    got = filtered(wire.DecodeFilter(), from_shareable(through).data).data
    assert list(got) == list(state) and got["note"] == "x" and got["nothing"] is None
    assert torch.equal(torch.as_tensor(got["nested"][1]["deep"]), torch.arange(2)) and got["nested"][0] == 1
    for name in state.keys() - {"matrix", "tied", "half", "note", "nested", "nothing"}:
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(state[name])), name
    assert 0 < abs(torch.as_tensor(got["matrix"]) - torch.as_tensor(state["matrix"])).max() < 0.6
    plain = {"a": torch.ones(1)}
    assert filtered(wire.DecodeFilter(), plain).data == plain


def received(monkeypatch: Any, state: State) -> tuple[State, FLContext]:
    """The tensors of a task, and the context that remembers what came."""
    context = FLContext()
    got = sent(monkeypatch, filtered(wire.WireFilter("bf16"), state).data, lazy=True)
    return filtered(wire.BaseFilter(), got, context=context).data, context


def test_differences_are_against_the_received_model_even_if_it_was_changed(monkeypatch: Any) -> None:
    state = model()
    params, context = received(monkeypatch, state)
    base = copied(params)
    trained = {name: tensor.clone() for name, tensor in base.items()}
    trained["matrix"] += 0.25
    trained["half"] += 0.5
    trained["norm.num_batches_tracked"] += 2
    trained["tied"] = trained["matrix"]
    for tensor in params.values():
        tensor.zero_()
    made = filtered(wire.WireFilter("raw", difference=True), trained, context=context)
    assert made.data_kind == DataKind.WEIGHT_DIFF
    got = sent(monkeypatch, made.data)
    assert got["tied"] is got["matrix"]
    for name, tensor in trained.items():
        change = torch.zeros(2, dtype=torch.bool) if name == "mask" else tensor - base[name]
        assert equal(got[name], change), name


def test_tensors_without_a_difference_are_refused_by_name(monkeypatch: Any) -> None:
    params, context = received(monkeypatch, model())
    turned = params | {"mask": ~params["mask"]}
    with pytest.raises(EncodeError, match=r"difference=False.*'mask'"):
        filtered(wire.WireFilter("raw", difference=True), turned, context=context)
    with pytest.raises(EncodeError, match=r"'new'"):
        filtered(wire.WireFilter("raw", difference=True), params | {"new": torch.ones(1)}, context=context)
    with pytest.raises(EncodeError, match="BaseFilter"):
        filtered(wire.WireFilter("raw", difference=True), params)
    already = filtered(wire.WireFilter("raw", difference=True), {"a": torch.ones(1)}, DataKind.WEIGHT_DIFF)
    assert already.data_kind == DataKind.WEIGHT_DIFF


def test_a_counter_that_flare_has_averaged_is_an_integer_again(monkeypatch: Any) -> None:
    _, context = received(monkeypatch, {"count": torch.tensor(41.7), "mask": torch.tensor([1.0, 0.0])})
    trained = {"count": torch.tensor(43), "mask": torch.tensor([True, False])}
    got = sent(monkeypatch, filtered(wire.WireFilter("raw", difference=True), trained, context=context).data)
    assert got["count"].item() == 2 and got["mask"].tolist() == [False, False] and got["mask"].dtype == torch.bool


def test_tensors_tied_only_at_the_client_give_two_differences(monkeypatch: Any) -> None:
    _, context = received(monkeypatch, {"a": torch.zeros(3), "b": torch.ones(3)})
    one = torch.full((3,), 5.0)
    got = sent(
        monkeypatch,
        filtered(wire.WireFilter("raw", difference=True), {"a": one, "b": one.detach()}, context=context).data,
    )
    assert got["a"].tolist() == [5.0] * 3 and got["b"].tolist() == [4.0] * 3


def test_tensors_that_were_tied_once_are_while_they_are_equal(monkeypatch: Any) -> None:
    state, one = model(), wire.WireFilter("raw")
    assert filtered(one, state).data["tied"] is not filtered(one, state).data["matrix"]
    marked = filtered(one, copied(state)).data
    assert marked["tied"] is marked["matrix"]
    marked = filtered(one, copied(state) | {"tied": state["tied"] + 1}).data
    assert marked["tied"] is not marked["matrix"]
    marked = filtered(wire.WireFilter("raw"), copied(state)).data  # equal, and nobody ever said that they are one
    assert marked["tied"] is not marked["matrix"]


def reply(client: str, params: State, weight: float | None = None, **options: Any) -> FLModel:
    meta = {"client_name": client} | ({} if weight is None else {"NUM_STEPS_CURRENT_ROUND": weight})
    return FLModel(params=params, params_type=ParamsType.DIFF, meta=meta, **options)


def test_the_aggregate_is_the_weighted_mean_in_the_dtypes_that_were_sent(monkeypatch: Any) -> None:
    states = [model(), {name: value + 1 if value.dtype != torch.bool else value for name, value in model().items()}]
    states[1]["tied"] = states[1]["matrix"]
    replies = [sent(monkeypatch, filtered(wire.WireFilter("nf4"), state).data, lazy=True) for state in states]
    decoded = [{name: ref.materialize() for name, ref in params.items()} for params in replies]
    results = []
    for order, params in (([0, 1], replies), ([1, 0], replies), ([1, 0], decoded)):
        aggregator = wire.WireAggregator(aggregation_weights={"site-0": 0.5})
        for number in order:
            aggregator.accept_model(
                reply(
                    f"site-{number}",
                    params[number],
                    10 * (number + 1),
                    metrics={"accuracy": number, "note": 1 - number},
                )
            )
        results.append(aggregator.aggregate_model())
    for result in results:
        assert result.params_type == ParamsType.DIFF and result.metrics == {"accuracy": 0.8, "note": 0.2}
        for name, tensor in results[0].params.items():
            assert equal(result.params[name], tensor) and tensor.dtype == states[0][name].dtype
    matrix = (5 * decoded[0]["matrix"].double() + 20 * decoded[1]["matrix"].double()) / 25
    assert torch.equal(results[0].params["matrix"], matrix.float())
    assert results[0].params["norm.num_batches_tracked"].item() == 42 and results[0].params["mask"].tolist() == [
        True,
        False,
    ]
    assert results[0].params["tied"] is results[0].params["matrix"]


def test_a_mismatched_reply_is_refused_and_the_others_count() -> None:
    aggregator = wire.WireAggregator()
    aggregator.accept_model(reply("a", {"x": torch.ones(2)}))
    with pytest.raises(SchemaError, match="answered already"):
        aggregator.accept_model(reply("a", {"x": torch.zeros(2)}))
    with pytest.raises(SchemaError, match="other tensors"):
        aggregator.accept_model(reply("b", {"y": torch.zeros(2)}))
    with pytest.raises(SchemaError, match="'x'"):
        aggregator.accept_model(reply("c", {"x": torch.zeros(3)}))
    with pytest.raises(SchemaError, match="NaN"):
        aggregator.accept_model(reply("d", {"x": torch.tensor([1.0, torch.nan])}))
    aggregator.accept_model(reply("e", {"x": torch.zeros(2)}))
    assert aggregator.aggregate_model().params["x"].tolist() == [0.5, 0.5]
    with pytest.raises(SchemaError, match="no client"):
        aggregator.aggregate_model()


def recipe(**options: Any) -> Any:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    return FedAvgRecipe(name="job", model=Net(8), min_clients=2, train_script=str(APP / "client.py"), **options)


def configuration(job: Any, folder: Path, site: str) -> dict[str, Any]:
    job.export(str(folder))
    (found,) = (folder / "job").rglob(f"config_fed_{site}.*")
    loaded: dict[str, Any] = json.loads(found.read_text())
    return loaded


def test_one_line_after_a_recipe_is_enough(tmp_path: Path) -> None:
    job = recipe(aggregator=wire.WireAggregator({"site-1": 2.0}))
    wire.add_to(job, down="fp16", up={"*": "int8"})
    name = "tensorwire.integrations.nvflare."
    server, client = configuration(job, tmp_path, "server"), configuration(job, tmp_path, "client")
    assert [entry["filters"] for entry in server["task_data_filters"]] == [
        [{"path": f"{name}filters.WireFilter", "args": {"codec": "fp16"}}]
    ]
    assert {"id": "tensorwire", "path": f"{name}decomposer.WireRegister", "args": {"lazy": True}} in server[
        "components"
    ]
    assert {"id": "tensorwire", "path": f"{name}decomposer.WireRegister", "args": {"lazy": True}} in client[
        "components"
    ]
    assert [entry["filters"] for entry in client["task_result_filters"]] == [
        [{"path": f"{name}filters.WireFilter", "args": {"codec": {"*": "int8"}, "difference": True}}]
    ]
    assert [entry["filters"][0]["path"] for entry in client["task_data_filters"]] == [f"{name}filters.BaseFilter"]
    assert f"{name}aggregator.WireAggregator" in json.dumps(server) and '"site-1": 2.0' in json.dumps(server)
    assert not [*tmp_path.rglob("tensorwire")]  # which sites have, and no job brings along


def test_a_quantizer_is_not_for_whole_weights() -> None:
    with pytest.raises(ArgumentError, match="for differences"):
        wire.add_to(recipe(), up="nf4", difference=False)
    with pytest.raises(ArgumentError, match="for differences"):
        wire.add_to(recipe(), up={"*": "int8|zstd"}, difference=False)
    wire.add_to(recipe(), up="bf16|zstd", difference=False)
    wire.add_to(recipe(params_transfer_type="DIFF"), up="nf4", difference=False)


def test_a_codec_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ArgumentError, match="function"):
        wire.WireFilter(lambda name, tensor: "nf4")
    for one in (wire.WireFilter, wire.EncodeFilter):
        with pytest.raises(EncodeError):
            one("nf5")


def test_a_download_type_used_by_another_package_is_reported(monkeypatch: Any) -> None:
    monkeypatch.setattr(messages.fobs, "get_dot_handler", lambda dot: object())
    with pytest.raises(RuntimeError, match="116"):
        wire.register()


def test_registering_again_reports_the_settings_in_use(monkeypatch: Any) -> None:
    wire.register(lazy=True)
    assert fobs.get_dot_handler(wire.DOWNLOAD_TYPE).lazy
    wire.WireRegister()
    assert not fobs.get_dot_handler(wire.DOWNLOAD_TYPE).lazy
    assert isinstance(Shareable(), dict)


def test_a_client_frees_memory_after_it_has_answered(monkeypatch: Any) -> None:
    """And not while a task is there: it takes a tenth of a second that the round would wait for."""
    given = []
    monkeypatch.setattr(messages, "cleanup_memory", lambda: given.append(True))
    component = wire.WireRegister(lazy=True)
    for event in (EventType.BEFORE_TASK_DATA_FILTER, EventType.BEFORE_SEND_TASK_RESULT):
        component.handle_event(event, FLContext())
    assert not given
    component.handle_event(EventType.AFTER_SEND_TASK_RESULT, FLContext())
    assert given
