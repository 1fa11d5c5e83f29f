"""`.safetensors` files through streams: same tensors, O(frame) memory, nothing trusted that the header says."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import tensorwire
import tensorwire.files.safetensors as front
from tensorwire.errors import (
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    TruncatedError,
    UnsupportedError,
)

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


def test_a_raw_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
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
def test_a_file_through_a_codec_holds_what_decoding_in_memory_gives(tmp_path: Path, codec: object) -> None:
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
        ({"a": {**ENTRY, "dtype": "F4"}}, UnsupportedError),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, FormatError),
        ({"a\n": ENTRY}, EncodeError),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, error: type) -> None:
    path = handmade(tmp_path / "in.safetensors", header, bytes(8))
    with pytest.raises(error):
        list(front.encode(path))


def test_files_that_are_cut_or_huge_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    for content, error in ((b"", TruncatedError), (b"\x05" + bytes(7), TruncatedError), (b"\xff" * 8, LimitError)):
        path.write_bytes(content)
        with pytest.raises(error):
            list(front.encode(path))
