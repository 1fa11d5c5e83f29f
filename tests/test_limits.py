"""Limits: models of today are within them, every function takes others, and who is past one is told which and how."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorwire
import tensorwire.numpy as tw
from tensorwire import EncodeError, LimitError, Limits
from tensorwire.dtypes import FLOAT32
from tensorwire.errors import ArgumentError
from tensorwire.limits import DEFAULT, GIB, TIB
from tensorwire.wire import TensorItem
from tensorwire.wire.items import ItemPacker

ONE = np.zeros(1 << 20, np.uint8)
MODEL = {f"layer.{number}": ONE for number in range(8)}
SMALL = Limits(stream=8 << 20)

# What goes past a limit: the field, and a function that encodes under it.
PAST: dict[str, tuple[Limits, Callable[[Limits], Any]]] = {
    "stream": (SMALL, lambda limits: tw.encode(MODEL, tie=False, limits=limits)),
    "stream, quantized": (SMALL, lambda limits: tw.encode({"x": np.ones(9 << 20, "f2")}, codec="int8", limits=limits)),
    "stream, message": (SMALL, lambda limits: tw.dumps({"x": np.zeros(9 << 20, np.uint8)}, limits=limits)),
    "stream, size": (SMALL, lambda limits: tw.encoded_size(MODEL, tie=False, limits=limits)),
    "stream, file": (SMALL, lambda limits: tw.save_file({"x": np.zeros(9 << 20, np.uint8)}, "x.tw", limits=limits)),
    "items": (Limits(items=8), lambda limits: tw.dumps(MODEL, limits=limits)),
    "item": (Limits(item=1000), lambda limits: tw.dumps(MODEL, limits=limits)),
    "nesting, schema": (Limits(nesting=1), lambda limits: tw.schema({"a": [ONE]}, limits=limits)),
    "metadata": (Limits(metadata=50), lambda limits: tw.encode(MODEL, metadata={"a": "b" * 50}, limits=limits)),
    "pairs": (Limits(pairs=1), lambda limits: tw.encode(MODEL, metadata={"a": "", "b": ""}, limits=limits)),
    "name": (Limits(name=6), lambda limits: tw.dumps(MODEL, limits=limits)),
    "ndim": (Limits(ndim=0), lambda limits: tw.dumps(MODEL, limits=limits)),
    "descriptor": (Limits(descriptor=20), lambda limits: tw.dumps(MODEL, limits=limits)),
    "nesting": (Limits(nesting=1), lambda limits: tw.dumps({"a": [ONE]}, limits=limits)),
    "nesting, value": (Limits(nesting=2), lambda limits: tw.dumps({"a": [[1]]}, limits=limits)),
    "value": (Limits(value=9), lambda limits: tw.dumps({"a": "0123456789"}, limits=limits)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAST)
def test_a_writer_past_a_limit_is_told_which_and_how_to_raise_it_before_the_first_byte(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits, encode = PAST[name]
    field = name.partition(",")[0]
    with pytest.raises(EncodeError) as caught:
        encode(limits)
    allowed = getattr(limits, field)
    assert f"more than the limit of {allowed}" in str(caught.value)
    assert f"limits=tensorwire.Limits({field}=" in str(caught.value) and f"--limit {field}=" in str(caught.value)
    assert not [*tmp_path.iterdir()]
    encode(DEFAULT)


def test_limits_on_unknown_sizes_apply_when_reached():
    def pairs() -> Iterator[tuple[str, Any]]:
        yield from MODEL.items()

    passed = 0
    with pytest.raises(EncodeError, match=r"Limits\(stream=") as caught:
        for buffer in tw.encode(pairs(), limits=SMALL):
            passed += memoryview(buffer).nbytes
    assert caught.value.item == "layer.7" and passed <= SMALL.stream


def test_a_receiver_gets_the_same_message():
    with pytest.raises(LimitError, match=r"Limits\(stream=") as caught:
        tw.loads(tw.dumps(MODEL), limits=Limits(stream=1 << 19))
    assert caught.value.field == "stream"


def test_every_function_that_encodes_or_decodes_takes_limits():
    for name in tensorwire.__all__:
        function = getattr(tensorwire, name)
        if inspect.isroutine(function) and not name.endswith("_threads"):  # of which nanobind gives no signature
            parameters = {*inspect.signature(function).parameters}
            assert "limits" in parameters or not {"obj", "source", "file", "data"} & parameters, name
    for function in (tensorwire.safetensors.encode, tensorwire.safetensors.decode, tensorwire.TensorFile):
        assert "limits" in inspect.signature(function).parameters


def test_a_model_of_two_trillion_parameters_is_within_the_defaults():
    assert 3 * 4 * 2 * 10**12 < DEFAULT.stream <= 64 * TIB
    assert DEFAULT.items > 3 * 494_868
    assert DEFAULT.items * 32 <= DEFAULT.skippable
    experts = TensorItem(("experts",), FLOAT32, (384, 3, 7168, 2048), ((1,),))
    assert experts.total * 4 > 60 * GIB
    packer = ItemPacker(DEFAULT)
    assert packer.add(experts) and packer.take()[1][0] == experts


def test_many_items_are_refused_as_soon_as_there_are_too_many():
    tensors = {str(number): np.zeros(1) for number in range(2000)}
    with pytest.raises(EncodeError, match="items is 101, more than the limit of 100") as caught:
        tw.dumps(tensors, limits=Limits(items=100))
    assert caught.value.item == "99"


def test_a_function_of_files_names_the_limit(tmp_path: Path):
    tw.save_file({"x": np.zeros(100)}, tmp_path / "x.tw")
    with pytest.raises(LimitError, match=r"Limits\(item="):
        tw.load_file(tmp_path / "x.tw", limits=Limits(item=100))


@pytest.mark.parametrize("limits", [None, {}, 3, "stream=1"])
def test_invalid_limits_are_refused_with_a_clear_error(limits: Any):
    for call in (lambda: tw.dumps(MODEL, limits=limits), lambda: tw.loads(tw.dumps({}), limits=limits)):
        with pytest.raises(ArgumentError, match=r"limits must be a tensorwire\.Limits, not"):
            call()


@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_a_limit_is_a_non_negative_integer(value: Any):
    with pytest.raises(ArgumentError, match="the limit items must be a non-negative integer"):
        Limits(items=value)


@pytest.mark.parametrize("metadata", ["x", 3, ["a"], {"a": 1}, {"a": "\ud800"}])
def test_invalid_metadata_is_refused_with_a_clear_error(metadata: Any):
    with pytest.raises(EncodeError, match="metadata"):
        tw.dumps(MODEL, metadata=metadata)


@pytest.mark.parametrize("into", [3, "x", [ONE]])
def test_into_must_be_a_mapping(into: Any):
    with pytest.raises(ArgumentError, match="into= maps names to tensors"):
        list(tw.decode(tw.dumps(MODEL), into=into))
