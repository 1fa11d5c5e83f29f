"""Names of items: one for each path, by every way in, and the path back."""

import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorwire
import tensorwire.numpy as tw
from tensorwire import ArgumentError, name_of, path_of
from tensorwire.cli import main
from tensorwire.cli.decode import entry_name

PAGE = Path(__file__).parents[1] / "docs" / "format.md"
AWKWARD = st.text("/~.\\0127-ab", max_size=6)
KEYS = AWKWARD | st.text(max_size=4) | st.integers(-(1 << 53), 1 << 53) | st.integers(-3, 12)
PATHS = st.lists(KEYS, max_size=4).map(tuple)


def scalar(value: float) -> Any:
    return np.array(value, np.float32)


# Containers that have two tensors under one name, if names are made by joining keys.
CONTAINERS: dict[str, Any] = {
    "dots": {"a.b": scalar(1), "a": {"b": scalar(2)}},
    "dots below the root": {"m": {"a.b": scalar(1), "a": {"b": scalar(2)}}},
    "ints": {1: scalar(1), "1": scalar(2)},
    "ints below the root": {"s": {1: scalar(1), "1": scalar(2), "-1": scalar(3), -1: scalar(4)}},
    "a list and a dict": {"x": [scalar(1)], "x.0": scalar(2), "x/0": scalar(3), "/x/0": scalar(4)},
    "slashes": {"/a/b": scalar(1), "a": {"b": scalar(2)}, "a/b": scalar(3), "/~1a~1b": scalar(4)},
    "escapes": {"m": {"~1": scalar(1), "/": scalar(2), "~": {"": scalar(3)}, "~/": scalar(4), "~01": scalar(5)}},
    "empty keys": {"": scalar(1), "/": scalar(2), "a": {"": {"": scalar(3)}, "/": scalar(4)}},
    "tied": {"a.b": (tied := scalar(1)), "a": {"b": tied}, "/a/b": tied},
}


@given(PATHS)
def test_a_name_is_read_back_to_its_path(path):
    assert path_of(name_of(path)) == path


@given(PATHS, PATHS)
def test_two_paths_never_have_one_name(one, other):
    def exact(path: tuple[Any, ...]) -> list[tuple[type, Any]]:
        return [(type(key), key) for key in path]

    assert (name_of(one) == name_of(other)) == (exact(one) == exact(other))


@given(st.text("/~012a.", max_size=8))
def test_invalid_names_are_refused(name):
    try:
        path = path_of(name)
    except ArgumentError as error:
        assert name.startswith("/") and "name" in str(error)
    else:
        assert name_of(path) == name


@given(st.text(string.ascii_letters + string.digits + "._-/:", min_size=1).filter(lambda key: key[0] != "/"))
def test_the_key_of_a_flat_container_is_its_name(key):
    assert name_of((key,)) == key and path_of(key) == (key,)


def test_the_page_shows_the_names_there_are():
    rows = re.findall(r"^\| `([\[{].*[\]}])` \| (`.*`) \|$", PAGE.read_text().partition("### 5.4")[2], re.MULTILINE)
    assert len(rows) == 7
    for container, names in rows:
        value = eval(container, {letter: scalar(0) for letter in "tuvw"})
        found = [name for name, _ in tw.decode(tw.dumps(value))]
        assert sorted(found) == sorted(re.findall("`([^`]*)`", names))


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_way_finds_an_item_by_the_same_name(name, tmp_path):
    container = CONTAINERS[name]
    data = tw.dumps(container)
    tw.save_file(container, tmp_path / "m.tw")
    report = tensorwire.inspect(tmp_path / "m.tw")
    paths = {item.item.name: item.item.path for item in report.items if item.dtype or item.alias_of is not None}
    wanted = {name: at(container, path) for name, path in paths.items()}

    assert {name: float(value) for name, value in tw.decode(data)} == wanted
    with tw.open_file(tmp_path / "m.tw") as file:
        assert {name: float(file[name]) for name in file} == wanted
    targets = {name: np.zeros((), np.float32) for name in wanted}
    for _ in tw.decode(data, into=targets, expect=tw.schema(container)):
        pass
    assert {name: float(value) for name, value in targets.items()} == wanted
    assert main(["decode", str(tmp_path / "m.tw"), str(tmp_path / "m.npz")]) == 0
    archive = np.load(tmp_path / "m.npz")
    assert {name: float(archive[name]) for name in archive.files} == {entry_name(name): wanted[name] for name in wanted}


@pytest.mark.parametrize("name", sorted(set(CONTAINERS) - {"tied"}))
def test_patterns_and_reports_use_the_same_names(name):
    container = CONTAINERS[name]
    for one, _ in tw.decode(tw.dumps(container)):
        report = tensorwire.Report()
        asked = []
        tw.dumps(container, codec=lambda name, _: asked.append(name) or "raw")
        assert sorted(asked) == sorted(dict(tw.decode(tw.dumps(container))))
        tw.dumps({"codec": container}, codec={name_of(("codec", *path_of(one))): "zstd"}, report=report)
        assert report.codecs["raw|zstd"].items == 1


@given(st.dictionaries(st.text("/~.\\01a", min_size=1, max_size=5), st.just(scalar(0)), min_size=1))
def test_a_safetensors_file_keeps_its_keys(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("keys")
    tensorwire.safetensors.decode(tw.encode(tensors), folder / "0.safetensors")
    tensorwire.safetensors.decode(tensorwire.safetensors.encode(folder / "0.safetensors"), folder / "1.safetensors")
    with tensorwire.safetensors.open_checkpoint(folder / "1.safetensors") as file:
        assert set(dict(file)) == set(tensors)


def at(container: Any, path: tuple[Any, ...]) -> float:
    for key in path:
        container = container[key]
    return float(container)
