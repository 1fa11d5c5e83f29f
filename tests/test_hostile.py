"""The duty of the decoder to every hostile stream: the error that it must get, with its place, in a second, in memory
that follows what was fed; nothing of the broken item delivered and what came before it whole; and the same verdict
whole, byte by byte, from a file, by its index, from the command line and from the reference reader.
"""

import contextlib
import fnmatch
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bad
import numpy as np
import pytest
import reference
from bad import ALIAS, DICT, FILE, START, UINT8, data, item, tensor, value
from frames import assemble, end, take_apart
from hostile.cases import CASES, INDEXES, Case
from hostile.rows import ROWS
from msgpack import packb
from vectors import Verdict, library, plain, read_reference, same, single_bytes, stored, zstd_decompress

import tensorwire
import tensorwire.numpy as tw
from tensorwire import LimitError, StorageError, WireError, decode_file
from tensorwire.cli import main
from tensorwire.limits import DEFAULT, Limits

HERE = Path(__file__).parent
ALL = {f"bad/{name}": Case(error, says, recipe) for name, (error, says, recipe) in bad.BAD.items()} | CASES
MEMORY = 16 << 20


def is_file(name: str) -> bool:
    """Whether a case must reach the functions for files: others refuse them before they look."""
    return "file" in name


def verdict(stream: object, limits: Limits) -> Verdict:
    try:
        return Verdict(plain(tw.loads(stream, limits=limits)))
    except WireError as error:
        return Verdict(None, type(error).__name__, str(error), error.frame, error.offset)


def fed(stream: bytes, limits: Limits, *, encoded: bool) -> Verdict:
    """The verdict of a decoder that is handed a stream in two halves."""
    decoder = tw.decoder(limits=limits, keep_encoded=tensorwire.InMemory() if encoded else None)
    try:
        for half in (stream[: len(stream) // 2], stream[len(stream) // 2 :]):
            decoder.feed(half)
        decoder.finish()
    except WireError as error:
        return Verdict(None, type(error).__name__, str(error), error.frame, error.offset)
    return Verdict(None)


def read_by_index(path: Path, limits: Limits) -> None:
    with tw.open_file(path, limits=limits) as file:
        for tensor_name in file:
            file[tensor_name]


@pytest.mark.parametrize("name", CASES)
def test_a_case_gets_its_error_however_it_arrives(name, tmp_path):
    error, says, recipe, limits = CASES[name]
    stream = recipe()
    whole = library(stream, file=True) if is_file(name) else verdict(stream, limits)
    assert whole.error == error, whole
    assert says in whole.message
    assert whole.offset is not None
    assert whole.frame is not None or whole.offset <= 16 or "after the end" in whole.message
    if len(stream) < 100_000:
        bytewise = single_bytes(stream)
        again = library(bytewise, file=True) if is_file(name) else verdict(bytewise, limits)
        assert again.place == whole.place
    if not is_file(name):
        assert fed(stream, limits, encoded=False).place == whole.place
        assert fed(stream, limits, encoded=True).error in (error, "SchemaError")  # which takes nothing but tensors
        path = tmp_path / "x.tw"
        path.write_bytes(stream)
        with pytest.raises(WireError) as caught:
            tw.load_file(path, limits=limits)
        assert (type(caught.value).__name__, caught.value.frame, caught.value.offset) == whole.place
        with pytest.raises(WireError) as caught:
            read_by_index(path, limits)
        # Most have no index or no end, and are refused for that where it takes their data to see the fault.
        assert type(caught.value).__name__ in (error, "SchemaError", "TruncatedError")
    if limits is DEFAULT:
        with pytest.raises(reference.Truncated if error == "TruncatedError" else reference.Refused):
            read_reference(stream)


@pytest.mark.parametrize("name", ALL)
def test_earlier_items_are_delivered_and_the_broken_one_is_not(name):
    stream = ALL[name].recipe()
    if is_file(name):
        return  # a file is delivered as a whole or not: test_a_refused_stream_leaves_no_file
    delivered, broken = {}, None
    try:
        delivered.update(tw.decode(stream, limits=ALL[name].limits))
    except WireError as error:
        broken = error.item
    assert broken is None or broken not in delivered
    reader = reference._Reader(stream, zstd_decompress)
    with contextlib.suppress(reference.Refused):
        reader.read()
    complete = {}
    for entry in reader.items:
        source = reader.items[entry.of] if entry.kind == reference.ALIAS else entry
        if source.complete and source.kind in (reference.TENSOR, reference.VALUE):
            complete[tensorwire.name_of(tuple(entry.path))] = source
    for key, got in delivered.items():
        source = complete[key]
        if source.kind == reference.VALUE:
            assert same(got, reference.read_value(source.data))
        else:
            assert same(plain(got), reference.Tensor(source.dtype, source.shape, source.data))


@pytest.mark.parametrize("name", ALL)
def test_the_command_line_gives_the_same_verdict(name, tmp_path, capsys):
    case = ALL[name]
    if case.limits is not DEFAULT:
        pytest.skip("the command line has the default limits")
    path = tmp_path / "x.tw"
    path.write_bytes(case.recipe())
    code = main(["verify", "--json", str(path)])
    said = json.loads(capsys.readouterr().out)
    if name == "bad/stream-base":
        assert code == 0 and said["ok"]  # sound in itself: it is for whoever holds that version, as a patch is
        return
    assert code == 1
    assert said["ok"] is False
    assert said["error"]["kind"] == case.error
    assert main(["inspect", str(path)]) in (0, 1)  # it explains frames, and does not decode payloads
    assert "\x1b" not in capsys.readouterr().out


def test_every_case_is_bounded_in_time_and_memory():
    """Resident memory by the kernel's own high-water mark, in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux, to reset the high-water mark of memory")
    command = [sys.executable, HERE / "hostile" / "measure.py"]
    home = str(Path(tensorwire.__file__).parents[1])  # the package under test, installed or not
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": home})
    measured = [json.loads(line) for line in run.stdout.splitlines()]
    assert {case["name"] for case in measured} == {*ALL}
    for case in measured:
        assert case["error"] is not None
        assert case["seconds"] <= 1, case
        assert case["rise"] <= MEMORY + 2 * case["fed"], case


@pytest.mark.parametrize("name", INDEXES)
def test_a_wrong_index_is_refused_only_by_random_access(name, tmp_path):
    error, recipe = INDEXES[name]
    stream = recipe()
    assert same(library(stream).value, library(stored("at-rest")).value)
    path = tmp_path / "x.tw"
    path.write_bytes(stream)
    with pytest.raises(WireError) as caught:
        read_by_index(path, DEFAULT)
    assert type(caught.value).__name__ == error


def test_an_index_obeys_the_limit_of_items(tmp_path):
    path = tmp_path / "x.tw"
    tw.save_file({"a": np.zeros(3), "b": np.ones(3)}, path)
    with tw.open_file(path, limits=Limits(items=3)) as file:
        assert len(file) == 2
    with pytest.raises(LimitError, match="items"):
        tw.open_file(path, limits=Limits(items=2))


# ---------------------------------------------------------------------------------------------------- The catalogue


def test_every_row_of_the_catalogue_is_covered_and_every_case_belongs_to_one():
    names = {name.removeprefix("bad/") for name in ALL} | {f"index/{name}" for name in INDEXES}
    assert sorted(ROWS) == list(range(1, 62))
    claimed = set()
    for number, row in ROWS.items():
        assert row.cases or row.tests or row.absent, number
        for pattern in row.cases.split():
            matching = set(fnmatch.filter(names, pattern))
            assert matching, (number, pattern)
            claimed |= matching
        for test in row.tests.split():
            path, _, function = test.partition("::")
            assert re.search(rf"^ *def {function}\(", (HERE / path).read_text(), re.MULTILINE), test
    general = {  # about the order of frames and the fields of payloads, which the catalogue has no row for
        name
        for name in names - claimed
        if re.match(
            r"(stream|item|value|data|file|codec|no-|skippable|payload-crc|count|start|zstd-|alias|end|wide)",
            name,
        )
    }
    assert names - claimed - general == set()
    assert len(names) > 800


# ------------------------------------------------------------------------------------------------------- Other rows

NAMES = ["..", "/etc/passwd", "C:\\x", "CON", "a/../../b", "x" * 1024, ".hidden", "a\\b", "~", "$HOME"]


@pytest.mark.parametrize("name", NAMES)
def test_file_names_are_never_paths(name, tmp_path):
    stream = assemble((START, item(0, DICT, []), item(1, FILE, [name], size=3, codec=[[1]]), data(1, b"abc"), end()))
    target = tmp_path / "target"
    assert decode_file(stream, target) == name
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_bytes() == b"abc"


def test_a_target_is_replaced_and_never_written_through(tmp_path):
    stream = assemble((START, item(0, DICT, []), item(1, FILE, ["f"], size=3, codec=[[1]]), data(1, b"abc"), end()))
    victim, link, pipe, there = (tmp_path / name for name in ("victim", "link", "pipe", "there"))
    victim.write_bytes(b"mine")
    there.write_bytes(b"old")
    link.symlink_to(victim)
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="FIFO"):
        decode_file(stream, pipe)
    for target in (link, there):
        decode_file(stream, target)
        assert target.read_bytes() == b"abc"
        assert not target.is_symlink()
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("name", [name for name in ALL if is_file(name)])
def test_a_refused_stream_leaves_no_file(name, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(WireError):
        decode_file(ALL[name].recipe(), target)
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_bytes() == b"old"


def test_aliases_are_one_tensor():
    aliases = [item(n, ALIAS, [n], of=1) for n in range(2, 5000)]
    root = tw.loads(assemble((START, item(0, DICT, []), tensor(1, ["a"], [3]), *aliases, data(1, b"abc"), end())))
    assert len(root) == 4999
    assert len({id(value) for value in root.values()}) == 1


def test_aliases_cannot_fill_a_disk(tmp_path):
    """A .safetensors file has no ties: there each name of a tensor is another copy of it."""
    aliases = [item(n, ALIAS, [str(n)], of=1) for n in range(2, 100)]
    payload = bytes(10_000)
    frames = (START, item(0, DICT, []), tensor(1, ["a"], [10_000]), *aliases, data(1, payload), end())
    stream = assemble(frames)
    tensorwire.safetensors.decode(stream, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size > 990_000
    with pytest.raises(LimitError, match="safetensors file"):
        tensorwire.safetensors.decode(stream, tmp_path / "y", limits=Limits(stream=900_000))
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]


def test_colliding_keys_cost_no_more():
    """Keys within 2^53 have hashes of their own; what little the low bits of a table collide is bounded."""

    def seconds(keys: list[int]) -> float:
        stream = assemble((*value(packb(dict.fromkeys(keys, 0)))[:-1], end()))
        best = 1.0
        for _ in range(3):
            began = time.process_time()
            assert tw.loads(stream)["v"] == dict.fromkeys(keys, 0)
            best = min(best, time.process_time() - began)
        return best

    colliding = [n << 38 for n in range(1, 12_000)]
    assert seconds(colliding) < 0.2
    assert seconds(colliding) < 10 * seconds([(1 << 37) + n for n in range(1, 12_000)])


def test_a_dtype_that_the_receivers_library_lacks_is_unsupported(monkeypatch):
    pytest.importorskip("torch")
    import tensorwire.torch as front

    monkeypatch.setattr(front, "_TORCH", {})
    with pytest.raises(tensorwire.UnsupportedError, match="has no float32"):
        front.loads(tw.dumps({"a": np.ones(3, np.float32)}))


def test_dimensions_that_the_receivers_numpy_lacks_are_unsupported():
    ndim = 65  # NumPy 2 has 64, NumPy 1 has 32
    stream = assemble((START, tensor(0, [], [1] * ndim, UINT8), data(0, b"a"), end()))
    with pytest.raises(tensorwire.UnsupportedError, match="65 dimensions"):
        tw.loads(stream, limits=Limits(ndim=ndim))


def test_errors_in_values_say_where():
    with pytest.raises(WireError) as caught:
        tw.loads(stored("bad/value-two-objects"))
    assert (caught.value.item, caught.value.frame) == ("v", 3)
    assert caught.value.offset == len(assemble(take_apart(stored("bad/value-two-objects"))[:3]))
