"""`.safetensors` files through streams: same tensors, O(frame) memory, nothing trusted that the header says."""

import errno
import json
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tensorwire
import tensorwire.files.safetensors as front
from tensorwire.errors import (
    ClosedError,
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    StorageError,
    TruncatedError,
    UnsupportedError,
)
from tensorwire.files import checkpoint

MODEL = {
    "b": np.arange(3, dtype=np.int64),
    "flag": np.array([True, False]),
    "w": (np.random.default_rng(5).standard_normal((700, 513)) * 0.02).astype(np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float64),
}


def write(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(tensors, path, metadata)
    return path


def read(path: Path) -> dict:
    return pytest.importorskip("safetensors.numpy").load_file(path)


def handmade(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_raw_file_round_trips(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", MODEL, {"format": "np", "note": "é"})
    front.decode(front.encode(source), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes()[8:] != b""
    out = read(tmp_path / "out.safetensors")
    assert set(out) == set(MODEL) and all(np.array_equal(out[name], MODEL[name]) for name in MODEL)
    with front.SafetensorsFile(tmp_path / "out.safetensors") as file:
        assert file.metadata == {"format": "np", "note": "é"}


@pytest.mark.parametrize(
    "codec", ["nf4", "bf16|zstd", {"w": "int8"}, lambda name, view: "fp16" if name == "w" else "raw"]
)
def test_a_decoded_file_equals_decoding_in_memory(tmp_path: Path, codec: object) -> None:
    source = write(tmp_path / "in.safetensors", MODEL)
    stream = b"".join(front.encode(source, codec=codec, frame_size=1 << 16))
    front.decode(stream, tmp_path / "out.safetensors")
    expected = tensorwire.loads(stream)
    out = read(tmp_path / "out.safetensors")
    assert set(out) == set(MODEL) and all(np.array_equal(out[name], expected[name]) for name in MODEL)
    assert not np.array_equal(out["w"], MODEL["w"])


def test_neither_side_holds_a_tensor(tmp_path: Path) -> None:
    big = write(tmp_path / "in.safetensors", {"w": np.zeros(16 << 20, np.float32)})
    tracemalloc.start()
    front.decode(front.encode(big, codec="nf4"), tmp_path / "out.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20  # of 64 MiB: a frame is 7 MiB of float32 here, on either side
    assert (tmp_path / "out.safetensors").stat().st_size > 64 << 20


def test_tied_tensors_are_written_under_both_names(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((600, 700)).astype(np.float32)
    stream = tensorwire.dumps({"embed": weight, "z": np.ones(3, np.float16), "head": weight})
    front.decode(stream, tmp_path / "out.safetensors")
    out = read(tmp_path / "out.safetensors")
    assert np.array_equal(out["embed"], weight) and np.array_equal(out["head"], weight) and out["z"].dtype == np.float16


def test_expect_refuses_before_anything_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", MODEL)
    wrong = {**MODEL, "w": np.zeros((700, 512), np.float32)}
    with pytest.raises(SchemaError, match="shape"):
        front.decode(front.encode(source), tmp_path / "out.safetensors", expect=tensorwire.schema(wrong))
    front.decode(front.encode(source), tmp_path / "out.safetensors", expect=tensorwire.schema(MODEL))


@pytest.mark.parametrize(
    "value", [{"a": {"b": np.ones(3)}}, {"a": 1}, [np.ones(3)], np.ones(3), {"__metadata__": np.ones(2)}]
)
def test_streams_that_the_file_cannot_hold_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(SchemaError):
        front.decode(tensorwire.dumps(value), tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_descriptors_that_come_late_are_refused(tmp_path: Path) -> None:
    pairs = iter([("a", np.ones(3)), ("b", np.ones(3))])
    with pytest.raises(SchemaError, match="described after data"):
        front.decode(tensorwire.encode(pairs), tmp_path / "out.safetensors")


def test_a_broken_stream_leaves_an_existing_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    stream = tensorwire.dumps(MODEL)
    with pytest.raises(TruncatedError):
        front.decode(stream[:-1], target)
    assert target.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [target]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"not json", FormatError),
        (b"[1]", FormatError),
        ([], FormatError),
        ({"a": []}, FormatError),
        ({"a": {**ENTRY, "x": 1}}, FormatError),
        ({"a": {**ENTRY, "shape": [3]}}, FormatError),
        ({"a": {**ENTRY, "shape": [-2]}}, FormatError),
        ({"a": {**ENTRY, "shape": [True, 2]}}, FormatError),
        ({"a": {**ENTRY, "shape": 2}}, FormatError),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, FormatError),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, FormatError),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, FormatError),
        ({"a": ENTRY, "b": ENTRY}, FormatError),
        ({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}, FormatError),
        ({}, FormatError),
        ({"a": ENTRY, "__metadata__": {"k": 1}}, FormatError),
        ({"a": {**ENTRY, "dtype": "F4"}}, FormatError),
        ({"a": {**ENTRY, "dtype": "F3"}}, UnsupportedError),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, FormatError),
        ({"a\n": ENTRY}, EncodeError),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path: Path, header: object, error: type) -> None:
    path = handmade(tmp_path / "in.safetensors", header, bytes(8))
    with pytest.raises(error):
        list(front.encode(path))


def test_files_that_are_cut_or_huge_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    for content, error in ((b"", TruncatedError), (b"\x05" + bytes(7), TruncatedError), (b"\xff" * 8, LimitError)):
        path.write_bytes(content)
        with pytest.raises(error):
            list(front.encode(path))


# ------------------------------------------------------------------------------------- Dtypes of less than a byte


def raw_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A file by hand: (dtype, shape, bytes) by name."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    return handmade(path, header, b"".join(data for _, _, data in tensors.values()))


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[begin:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


SUB_BYTE = {
    "f4": ("F4", [3, 8], bytes(range(12))),
    "odd": ("F4", [4, 3], bytes(range(6))),
    "e2m3": ("F6_E2M3", [2, 4], bytes(range(6))),
    "e3m2": ("F6_E3M2", [4, 5], bytes(range(15))),
    "none": ("F6_E3M2", [0, 5], b""),
    "plain": ("F32", [2], bytes(8)),
}


def test_every_dtype_of_safetensors_round_trips(tmp_path: Path) -> None:
    native = pytest.importorskip("safetensors")
    names = dict.fromkeys([*checkpoint.NAMES.values(), *checkpoint.BITS])
    tensors = {}
    for name in names:
        bits = checkpoint.BITS.get(name) or checkpoint.DTYPES[name].itemsize * 8
        tensors[name] = (name, [2, 8], (bytes([0, 1]) * 64)[: 2 * bits])
    source = raw_file(tmp_path / "in.safetensors", tensors)
    assert set(native.safe_open(source, "np").keys()) == set(names)  # which knows them all, too
    for codec in ("raw", "zstd", "nf4"):
        front.decode(front.encode(source, codec=codec), tmp_path / "out.safetensors")
        out = stored(tmp_path / "out.safetensors")
        assert {name: out[name][:2] for name in names} == {name: tensors[name][:2] for name in names}
        if codec != "nf4":
            assert out == tensors


def test_elements_of_less_than_a_byte_pass_from_file_to_file(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "in.safetensors", SUB_BYTE)
    front.decode(front.encode(source), tmp_path / "out.safetensors")
    assert stored(tmp_path / "out.safetensors") == SUB_BYTE
    with front.open_checkpoint(tmp_path / "out.safetensors") as file:
        assert file["f4"].shape == (3, 4) and file["odd"].shape == (6,)
    loaded = tensorwire.loads(b"".join(front.encode(source)))
    assert loaded["e2m3"].tobytes() == bytes(range(6))
    front.decode(front.encode(source), tmp_path / "shards", max_shard_size=10)
    front.decode(front.encode(tmp_path / "shards"), tmp_path / "again.safetensors")
    assert stored(tmp_path / "again.safetensors") == SUB_BYTE


def test_float4_of_torch_equals_that_of_the_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    import tensorwire.torch as tw

    state = {"w": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "norm": torch.ones(3)}
    library.save_file(state, tmp_path / "in.safetensors")
    assert tw.loads(b"".join(front.encode(tmp_path / "in.safetensors")))["w"].dtype == torch.float4_e2m1fn_x2
    front.decode(tw.dumps(state), tmp_path / "out.safetensors")
    assert stored(tmp_path / "out.safetensors") == stored(tmp_path / "in.safetensors")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"w": 3}', '{"w": ["F6_E2M3", [-1]]}', '{"w": ["F4", [3]]}', '{"w": ["F32", [1]]}', "[" * 99999]
)
def test_metadata_about_packed_tensors_is_checked(tmp_path: Path, text: str) -> None:
    stream = tensorwire.dumps({"w": np.zeros(3, np.uint8)}, metadata={"tensorwire.safetensors": text})
    with pytest.raises(FormatError, match="metadata tensorwire.safetensors"):
        front.decode(stream, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ Sharded checkpoints


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    front.decode(tensorwire.dumps(MODEL, metadata={"format": "np"}), tmp_path / "model", max_shard_size=400_000)
    return tmp_path / "model"


def test_a_sharded_checkpoint_is_one_model(shards: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in shards.iterdir())
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert names == [*sorted({*index["weight_map"].values()}), "model.safetensors.index.json"] and len(names) > 2
    assert names[0] == f"model-00001-of-{len(names) - 1:05}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in MODEL.values())
    merged = {name: read(shards / file)[name] for name, file in index["weight_map"].items()}
    assert all(np.array_equal(merged[name], MODEL[name]) for name in MODEL)
    for way in (shards, str(shards / "model.safetensors.index.json")):
        loaded = tensorwire.loads(b"".join(front.encode(way)))
        assert set(loaded) == set(MODEL) and all(np.array_equal(loaded[name], MODEL[name]) for name in MODEL)
    (shards / "model.safetensors.index.json").unlink()
    with front.open_checkpoint(shards) as tensors:
        assert set(tensors) == set(MODEL) and tensors.metadata == {"format": "np"}


def test_a_checkpoint_of_one_shard_is_one_file(tmp_path: Path) -> None:
    tied = np.ones(100, np.float32)
    front.decode(tensorwire.dumps({"a": tied, "b": tied}), tmp_path / "one", max_shard_size=10_000)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    front.decode(tensorwire.dumps({"a": tied, "b": tied}), tmp_path / "two", max_shard_size=1)
    with front.open_checkpoint(tmp_path / "two") as tensors:
        assert np.array_equal(np.frombuffer(tensors["b"].read(0, 100), np.float32), tied)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A checkpoint of 100 shards, more than are opened at once."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(100):  # by hand, as `decode` has each of them on disk
        entry = {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}
        header = json.dumps({f"t{number:03}": entry}).encode()
        data = len(header).to_bytes(8, "little") + header + np.full(1000, number, np.float32).tobytes()
        (folder / f"model-{number + 1:05}-of-00100.safetensors").write_bytes(data)
    return folder


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux")
def test_of_many_shards_the_last_that_were_read_are_open(many: Path) -> None:
    before = open_files()
    with front.open_checkpoint(many) as tensors:
        assert len(tensors) == 100 and open_files() - before <= 64
        for number in (*range(100), *reversed(range(100)), 7, 93, 7):
            assert tensors[f"t{number:03}"].read(3, 5).tobytes() == np.full(2, number, np.float32).tobytes()
            assert open_files() - before <= 64
        view = tensors["t005"]
    assert open_files() == before
    with pytest.raises(ClosedError):
        view.read(0, 1)


def test_a_shard_that_is_replaced_while_it_is_not_open_is_found(many: Path) -> None:
    with front.open_checkpoint(many) as tensors:
        for name in sorted(tensors)[1:]:
            tensors[name].read(0, 1)
        front.decode(tensorwire.dumps({"t000": np.ones(1000, np.float32)}), many / "other.safetensors")
        (many / "other.safetensors").replace(many / "model-00001-of-00100.safetensors")
        with pytest.raises(CorruptError, match=r"replaced or written to since .*00001-of"):
            tensors["t000"].read(0, 1)


def test_threads_read_many_shards_at_once(many: Path) -> None:
    with front.open_checkpoint(many) as tensors, ThreadPoolExecutor(8) as executor:
        numbers = [number for turn in range(20) for number in range(turn, 100)]
        read = executor.map(lambda number: tensors[f"t{number:03}"].read(0, 1000).tobytes(), numbers)
        for number, data in zip(numbers, read, strict=True):
            assert data == np.full(1000, number, np.float32).tobytes()


def test_transformers_and_the_library_agree_on_shards(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert sum(len(read(shards / name)) for name in files) == len(MODEL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index["weight_map"].pop("flag"), "does not place this tensor"),
        (lambda index: index["weight_map"].update(more=index["weight_map"]["w"]), "which does not have it"),
        (lambda index: index["weight_map"].update(w=index["weight_map"]["b"]), "does not place|which does not have it"),
        (lambda index: index["weight_map"].update(w="../../etc/passwd"), "cannot be a file in its folder"),
        (lambda index: index["weight_map"].update(w=".."), "cannot be a file in its folder"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
    ],
)
def test_an_inconsistent_index_is_refused(shards: Path, change: object, says: str) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=says) as caught:
        front.encode(shards)
    assert caught.value.file == str(path)
    path.write_text("no JSON")
    with pytest.raises(FormatError, match="not JSON"):
        front.encode(path)


def test_shards_that_contradict_one_another_are_refused(shards: Path, tmp_path: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    write(shards / "more.safetensors", {"w": MODEL["w"]})
    with pytest.raises(FormatError, match="two files"):
        front.encode(shards)
    write(shards / "more.safetensors", {"more": MODEL["w"]}, {"format": "pt"})
    with pytest.raises(FormatError, match="metadata 'format'"):
        front.encode(shards)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="has no .safetensors"):
        front.encode(tmp_path / "empty")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    stream = tensorwire.dumps(MODEL)
    with pytest.raises(TruncatedError):
        front.decode(stream[:-1], tmp_path / "model", max_shard_size=1000)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    front.decode(stream, tmp_path / "model", max_shard_size=1000)  # an empty folder may be there
    before = sorted((tmp_path / "model").iterdir())
    for taken in (tmp_path / "model", before[0]):
        with pytest.raises(StorageError, match="not an empty folder"):
            front.decode(stream, taken, max_shard_size=1000)
    assert sorted((tmp_path / "model").iterdir()) == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(EncodeError, match="max_shard_size"):
        front.decode(stream, tmp_path / "x", max_shard_size=0)


def test_a_safetensors_file_behind_an_object(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", MODEL)
    with open(source, "rb") as file:
        assert set(tensorwire.loads(b"".join(front.encode(file)))) == set(MODEL)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"cut short.*in.safetensors|in.safetensors.*cut short"):
        front.encode(source)


@pytest.mark.parametrize("call", ["open", "mkdir", "fsync", "pwrite", "replace", "close"])
def test_a_folder_that_cannot_be_written_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    stream, real = tensorwire.dumps(MODEL), getattr(os, call)
    number = 0
    while True:
        number += 1
        calls = iter(range(1, 1000))

        def failing(*arguments: object, **options: object) -> object:
            if next(calls) == number:
                if call == "close":
                    real(*arguments)
                raise OSError(errno.EIO, "the device failed")
            return real(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing)
            try:
                front.decode(stream, tmp_path / "model", max_shard_size=400_000)
            except StorageError as error:
                assert "model" in str(error)
            else:
                if next(calls) <= number:  # the call was never made: nothing can fail any more
                    break
        left = [path.name for path in tmp_path.iterdir()]
        assert left in ([], ["model"]), left
        if left:
            assert set(front.open_checkpoint(tmp_path / "model")) == set(MODEL)
            shutil.rmtree(tmp_path / "model")
    assert number > 1


def test_a_checkpoint_pickles_and_has_a_repr(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    for path in ("model", "model/model-00001-of-00003.safetensors"):
        file = front.open_checkpoint(path)
        assert "tensors)" in repr(file) and "model" in repr(file)
        monkeypatch.chdir("/")
        assert set(pickle.loads(pickle.dumps(file))) == set(file)
        monkeypatch.chdir(shards.parent)
        file.close()
        with pytest.raises(ClosedError, match="safetensors"):
            file[next(iter(file))].read(0, 1)


def test_a_file_truncated_while_it_is_sent_raises(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", {"w": np.zeros(1 << 20, np.float32)})
    buffers = front.encode(source)
    os.truncate(source, 1 << 20)
    with pytest.raises(TruncatedError, match="shorter.*in.safetensors"):
        list(buffers)


def header_file(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.mark.parametrize(
    "part", [b'"":{},', b"[],", b'"a":[0],', b"0,0,", b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},']
)
def test_a_header_of_very_many_parts_is_refused_before_it_is_parsed(part: bytes, tmp_path: Path) -> None:
    """Python needs thirty times the bytes of small ones: 2.5 GB for what the limit of the header lets through."""
    number = 5_000_000 if b"dtype" not in part else 1_400_000
    path = header_file(tmp_path / "m.safetensors", b"{" + part * number + b'"x":[]}')
    tracemalloc.start()
    try:
        with pytest.raises(LimitError, match="parts of the safetensors header"):
            list(front.encode(path))
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_number_of_tensors_is_limited(tmp_path: Path) -> None:
    entry = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    header = ",".join(entry.format(number) for number in range(checkpoint.MAX_TENSORS + 2))
    with pytest.raises(LimitError, match="tensors of a safetensors file is 524290"):
        list(front.encode(header_file(tmp_path / "m.safetensors", f"{{{header}}}".encode())))
