"""Files as strangers find them: changed while they are written, cut while they are read, behind objects, in parts."""

import asyncio
import copy
import errno
import http.server
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import tensorwire
import tensorwire.numpy as tw
from tensorwire.errors import (
    ArgumentError,
    ClosedError,
    CorruptError,
    EncodeError,
    MissingFileError,
    StorageError,
    TransportError,
    TruncatedError,
    WireError,
)

LARGE = np.arange(3 << 18, dtype=np.float32).reshape(3, -1, 64)  # of three MiB: in one frame, raw
MODEL = {"large": LARGE, "small": np.arange(5), "n": {"step": 7}, "tied": LARGE, "none": np.zeros((0, 3))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tw.save_file(MODEL, tmp_path / "model.tw", metadata={"k": "v"})
    return tmp_path / "model.tw"


# ------------------------------------------------------------------------------------------ Changed while it is written


def changing(monkeypatch: pytest.MonkeyPatch, array: np.ndarray) -> None:
    """Let the array change after every read of a part of it."""
    real = tw.NumPyFront.view

    def view(self: object, value: object) -> object:
        made = real(self, value)
        if value is not array:
            return made

        def read(start: int, stop: int) -> object:
            data = made.read(start, stop)
            array.reshape(-1)[:] += 1
            return data

        return type(made)(made.dtype, made.shape, read)

    monkeypatch.setattr(tw.NumPyFront, "view", view)


@pytest.mark.parametrize("count", [10, 1 << 18, 1 << 20])
@pytest.mark.parametrize("codec", ["raw", "zstd", "int8", "bf16|zstd"])
def test_files_and_messages_hold_the_checksummed_bytes(tmp_path, monkeypatch, count, codec) -> None:
    array = np.zeros(count, np.float32)
    changing(monkeypatch, array)
    tw.save_file({"w": array}, tmp_path / "x.tw", codec=codec)
    assert tw.load_file(tmp_path / "x.tw")["w"].max() > 0
    with tw.open_file(tmp_path / "x.tw") as file:
        assert file["w"].shape == (count,)
    assert tw.loads(tw.dumps({"w": array}, codec=codec))["w"].shape == (count,)


def test_a_thread_that_trains_while_another_saves(tmp_path) -> None:
    weight, stop = np.zeros(4 << 20, np.float32), threading.Event()

    def train() -> None:
        while not stop.is_set():
            weight.__iadd__(1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(5):
            tw.save_file({"w": weight}, tmp_path / "x.tw")
            assert tw.load_file(tmp_path / "x.tw")["w"].shape == weight.shape
            assert tw.loads(tw.dumps({"w": weight}))["w"].shape == weight.shape
    finally:
        stop.set()
        thread.join()


def test_changed_tensors_are_refused_if_output_cannot_seek(monkeypatch) -> None:
    array = np.zeros(1 << 20, np.float32)
    changing(monkeypatch, array)
    with pytest.raises(EncodeError, match="was changed while it was written.*item 'w'"):
        tw.save_file({"w": array}, io.BytesIO())


def test_a_late_header_makes_the_same_bytes(tmp_path) -> None:
    written = io.BytesIO()
    assert tw.save_file(MODEL, written) == tw.save_file(MODEL, tmp_path / "x.tw") == len(written.getvalue())
    assert written.getvalue() == (tmp_path / "x.tw").read_bytes()


# ---------------------------------------------------------------------------------------------- Read, and rarely mapped


def test_map_returns_the_content_of_the_file(path: Path) -> None:
    torch = pytest.importorskip("torch")
    import tensorwire.torch as front

    with front.open_file(path) as file:
        first = file.map("large")
        first.mul_(0.5)
        assert torch.equal(file.map("large"), torch.from_numpy(LARGE))
        assert torch.equal(first, torch.from_numpy(LARGE) * 0.5)
    with tw.open_file(path) as file, pytest.raises(ValueError, match="WRITEABLE|writeable"):
        file.map("large").flags.writeable = True


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_map_maps_one_item_and_nothing_else_does(path: Path) -> None:
    def mapped() -> list[int]:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        return [int(end, 16) - int(begin, 16) for begin, end in (line[0].split("-") for line in lines)]

    with tw.open_file(path) as file:
        assert file["large"].shape == LARGE.shape and file.get_slice("large")[0].shape == LARGE.shape[1:]
        assert mapped() == []
        view = file.map("small")
        assert view[4] == 4 and sum(mapped()) <= 2 * 65536


def test_a_file_truncated_while_open_raises_an_error(path: Path) -> None:
    code = """
import os, sys, tensorwire.numpy as tw
file = tw.open_file(sys.argv[1])
os.truncate(sys.argv[1], 4096)
for read in (lambda: file["large"], lambda: file.get_slice("large")[1]):
    try:
        read()
    except Exception as error:
        print(type(error).__name__, error.file == sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["TruncatedError", "True"] * 2


def test_reading_an_item_reads_little_else(tmp_path) -> None:
    tw.save_file({f"t{i}": np.zeros(1 << 16, np.float32) for i in range(64)}, tmp_path / "x.tw")
    with open(tmp_path / "x.tw", "rb") as raw:
        counting = Counting(raw)
        with tw.open_file(counting) as file:
            opening = counting.read_bytes
            assert opening < 200_000
            file["t5"]
            assert counting.read_bytes - opening < 300_000


# ------------------------------------------------------------------------------------------------ A mapping, and closed


def test_a_file_behaves_as_a_mapping(path: Path) -> None:
    with tw.open_file(path) as file:
        names = [name for name, _ in tw.decode(path.read_bytes())]
        assert sorted(file) == sorted(file.keys()) == sorted(names)
        assert [np.shape(value) for value in file.values()] == [np.shape(value) for _, value in file.items()]
        assert file.get("absent", 3) == 3 and "absent" not in file and "small" in file
        assert repr(file) == f"TensorFile({str(path)!r}, {len(names)} items)"
        assert file == file and file != {} and len({file}) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda file: file["small"],
        lambda file: file.map("small"),
        lambda file: file.get_slice("small"),
        lambda file: file.item("small"),
        lambda file: file.metadata,
        list,
        len,
        lambda file: "small" in file,
        lambda file: file.get("small"),
        pickle.dumps,
        copy.copy,
    ],
)
def test_a_closed_file_says_so(path: Path, use: Callable[[object], object]) -> None:
    file = tw.open_file(path)
    part = file.get_slice("small")
    file.close()
    for used in (lambda: use(file), lambda: part[0]):
        with pytest.raises(ClosedError, match="closed.*model.tw|model.tw") as caught:
            used()
        assert isinstance(caught.value, ValueError)
    assert repr(file) == f"TensorFile({str(path)!r}, closed)"


def test_an_unpickled_file_opens_on_first_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    for module in (tensorwire, tw):
        data = pickle.dumps(module.open_file("model.tw", limits=tensorwire.Limits(items=100)))
        monkeypatch.chdir("/")
        again = pickle.loads(data)
        assert repr(again) == f"TensorFile({str(path)!r})"
        assert again["small"].tolist() == [0, 1, 2, 3, 4]
        assert copy.copy(again).metadata == {"k": "v"}
        monkeypatch.chdir(path.parent)
    data = pickle.dumps(tw.open_file(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)["small"]


# --------------------------------------------------------------------------------------------------------------- Parts


INDEXES = [
    0,
    -1,
    np.int64(1),
    slice(0, 2),
    slice(None),
    slice(5, 2),
    slice(1, None, 2),
    slice(-100, 100),
    (1, 5),
    (1, slice(3, 9)),
    (1, 5, slice(7, None, 3)),
    (2, 7, 1),
    (slice(1, 3), 4),
    (slice(1, 3), slice(2, 5), slice(0, 2)),
    ...,
    (..., 3),
    (1, ..., 0),
    None,
    (),
    (slice(0, 2), ..., slice(0, 3)),
    [0, 1],
    np.array([0, 1]),
    np.array([1]),
    np.array(1),
    True,
    np.bool_(True),
    (slice(0, 2), np.array([1, 0])),
    (0, np.array([1, 0, 1])),
]


@pytest.mark.parametrize("codec", ["raw", "nf4", "zstd"])
def test_a_slice_equals_indexing_the_tensor(tmp_path: Path, codec: str) -> None:
    for value in (LARGE, np.arange(24, dtype=np.int64).reshape(2, 12), np.float32(3), np.zeros((0, 4))):
        tw.save_file({"w": value}, tmp_path / "x.tw", codec=codec)
        with tw.open_file(tmp_path / "x.tw") as file:
            whole, part = file["w"], file.get_slice("w")
            assert part.get_shape() == list(whole.shape) and part.get_dtype() == whole.dtype.name
            for index in INDEXES:
                try:
                    wanted = whole[index]
                except IndexError:
                    with pytest.raises(IndexError):
                        part[index]
                else:
                    got = part[index]
                    assert np.array_equal(got, wanted) and np.shape(got) == np.shape(wanted), index
            if whole.ndim:
                with pytest.raises(EncodeError, match="step"):
                    part[::-1]


class Counting(io.RawIOBase):
    """A seekable object, which counts what is read."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__()
        self._file = file
        self.read_bytes = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, *arguments: int) -> int:
        return self._file.seek(*arguments)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        data = self._file.read(min(len(buffer), 100_000))  # fewer than asked for, as sockets give
        self.read_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)


def test_a_slice_reads_the_frames_that_it_needs(tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((64, 1 << 17)).astype(np.float32)  # 32 MiB: 8 frames under bf16
    for codec, most in (("bf16", 2.3 * 2**20), ("nf4", 1.2 * 2**20)):
        stored = io.BytesIO()
        tw.save_file({"w": big}, stored, codec=codec)
        counting = Counting(stored)
        with tw.open_file(counting) as file:
            before = counting.read_bytes
            assert file.get_slice("w")[3:5].shape == (2, 1 << 17)
            assert counting.read_bytes - before < most


def test_of_a_raw_tensor_all_is_read_for_the_first_part_and_what_is_asked_for_later_ones(tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((64, 1 << 17)).astype(np.float32)  # 32 MiB in one frame
    stored = io.BytesIO()
    tw.save_file({"w": big, "v": big[:3]}, stored)
    counting = Counting(stored)
    with tw.open_file(counting) as file:
        part, before = file.get_slice("w"), counting.read_bytes
        assert np.array_equal(part[3:5], big[3:5])
        assert 32 * 2**20 <= counting.read_bytes - before < 33 * 2**20
        for begin, end in ((3, 5), (0, 1), (63, 64), (17, 17), (5, 12)):
            before = counting.read_bytes
            assert np.array_equal(part[begin:end], big[begin:end])
            assert counting.read_bytes - before <= (end - begin) * 2**19 + 2 * 2**20
        view = file.view("v")  # which a file object cannot map
        before = counting.read_bytes
        pieces = [view.read(start, start + (1 << 17)) for start in range(0, 3 << 17, 1 << 17)]
        assert np.array_equal(np.concatenate(pieces).view(np.float32), big[:3].reshape(-1))
        assert counting.read_bytes - before <= 5 * 2**20


def test_a_part_that_has_changed_since_is_found_although_all_was_verified_before(tmp_path: Path) -> None:
    big = np.arange(1 << 20, dtype=np.int64)  # 8 MiB
    tw.save_file({"w": big}, tmp_path / "model.tw")
    with tw.open_file(tmp_path / "model.tw") as file:
        part = file.get_slice("w")
        assert np.array_equal(part[:10], big[:10])
        with open(tmp_path / "model.tw", "r+b") as other:
            other.seek((4 << 20) + (64 << 10))
            other.write(b"something else")
        assert np.array_equal(part[:10], big[:10]) and np.array_equal(part[-10:], big[-10:])
        with pytest.raises(CorruptError, match=r"changed since it was verified: open the file again \(.*item 'w'"):
            part[1 << 19]
    with tw.open_file(tmp_path / "model.tw") as file:
        for _ in range(2):  # nothing is kept of what does not match
            with pytest.raises(CorruptError, match="checksum"):
                file.get_slice("w")[:10]


def test_only_tensors_have_slices(path: Path) -> None:
    with tw.open_file(path) as file:
        (name,) = (name for name in file if name.startswith("n") and name != "none")
        with pytest.raises(EncodeError, match="only tensors"):
            file.get_slice(name)
        with pytest.raises(KeyError):
            file.get_slice("absent")
        assert np.array_equal(file.get_slice("tied")[0], LARGE[0])


# ------------------------------------------------------------------------------------------------------------- Objects


def test_a_file_object_is_as_good_as_a_path(path: Path) -> None:
    stored = io.BytesIO(path.read_bytes())
    about: dict[str, str] = {}
    assert np.array_equal(tw.load_file(stored, metadata_into=about)["large"], LARGE) and about == {"k": "v"}
    with tw.open_file(Counting(stored)) as file:
        assert np.array_equal(file["large"], LARGE)
        with pytest.raises(EncodeError, match="by its path"):
            file.map("large")
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(tw.open_file(path.open("rb")))
    assert pickle.loads(pickle.dumps(tw.open_file(stored)))["small"].size == 5


def test_an_object_that_writes_a_little_at_a_time(path: Path) -> None:
    class Slow(io.BytesIO):
        def write(self, data: memoryview) -> int:
            return super().write(bytes(data[:1000]))

    slow = Slow()
    assert tw.save_file(MODEL, slow, metadata={"k": "v"}) == len(slow.getvalue())
    assert slow.getvalue() == path.read_bytes()


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with open(tmp_path / "x") as text:
        for call in (tw.load_file, tw.open_file, lambda file: tw.save_file({}, file)):
            with pytest.raises(ArgumentError, match="text mode"):
                call(text)
    for wrong in (3, None, [b"x"]):
        with pytest.raises(ArgumentError, match="expected a path"):
            tw.open_file(wrong)
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read, "rb") as pipe, pytest.raises(EncodeError, match="cannot seek"):
        tw.open_file(pipe)


def test_closed_and_wrong_mode_file_objects_are_refused(path: Path, tmp_path: Path) -> None:
    for use in (tensorwire.load_file, tensorwire.open_file, lambda file: tensorwire.save_file(MODEL, file)):
        with pytest.raises(ClosedError, match="closed"), open(path, "rb") as file:
            file.close()
            use(file)
    for read in (tensorwire.load_file, tensorwire.open_file):
        with pytest.raises(ArgumentError, match="not open for reading"), open(tmp_path / "new", "wb") as file:
            read(file)
    with pytest.raises(ArgumentError, match="not open for writing"), open(path, "rb") as file:
        tensorwire.save_file(MODEL, file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_an_object() -> None:
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(StorageError, match="/dev/full.*free some space"):
        tensorwire.save_file(MODEL, file)


def test_a_file_that_is_missing_is_named_and_found_by_either_name_of_the_error(tmp_path: Path) -> None:
    names = ("m.tw", "m.safetensors", "m.safetensors.index.json", "folder/m.tw")
    for name in names:
        for read in (tensorwire.load_file, tensorwire.open_file, tensorwire.verify, tensorwire.inspect,
                     tensorwire.encode_file, tensorwire.safetensors.open_checkpoint):  # fmt: skip
            with pytest.raises(MissingFileError, match=f"{name}.*check the name") as caught:
                read(tmp_path / name)
            assert isinstance(caught.value, FileNotFoundError) and caught.value.errno == errno.ENOENT


def test_a_pipe_is_read_from_front_to_back_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "pipe", "r+b", buffering=0):  # or opening it would wait
        for read in (tensorwire.open_file, tensorwire.safetensors.open_checkpoint):
            with pytest.raises(EncodeError, match="cannot seek"):
                read(tmp_path / "pipe")


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    size = tw.save_file(MODEL, tmp_path / "x.tw", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (size, size) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    calls.clear()
    tw.load_file(tmp_path / "x.tw", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (size, size)


def test_tensors_are_loaded_to_the_requested_device(path: Path) -> None:
    torch = pytest.importorskip("torch")
    import tensorwire.torch as front

    for load in (front.load_file, lambda path, device: front.loads(path.read_bytes(), device=device)):
        loaded = load(path, device="cpu")
        assert loaded["large"].device.type == "cpu" and loaded["tied"] is loaded["large"]
        assert load(path, device=torch.device("meta"))["small"].is_meta
        with pytest.raises(EncodeError, match="device"):
            load(path, device="warp")
    with front.open_file(path, device="meta") as file:
        assert file["none"].is_meta and file.get_slice("large")[0:2].shape == (2, *LARGE.shape[1:])
    with pytest.raises(EncodeError, match="torch"):
        tw.load_file(path, device="cpu")


def test_the_log_says_what_was_saved(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "tensorwire"):
        tw.save_file({}, path)
        tw.load_file(path)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True, True]


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.tw"
    tw.save_file(MODEL, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    for call in (tw.load_file, tw.open_file, tensorwire.verify):
        with pytest.raises(WireError, match="model.tw") as caught:
            call(path)
        assert caught.value.file == str(path)
        assert pickle.loads(pickle.dumps(caught.value)).file == str(path)
    assert tensorwire.inspect(path).error.file == str(path)
    for call in (tw.loads, lambda file: dict(tw.decode(file)), lambda file: tensorwire.decode_file(file, path)):
        with open(path, "rb") as file, pytest.raises(WireError, match="model.tw"):
            call(file)
    with pytest.raises(TruncatedError) as caught:
        tw.loads(whole[:1000])
    assert caught.value.file is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(200), "zip file"),
        (b"\x80\x02}q\x00." + bytes(200), "pickle"),
        (b"\n<!DOCTYPE html><html>" + bytes(100), "HTML"),
        (b"\x93NUMPY\x01\x00" + bytes(120), "npy"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b'{"error": "Unauthorized"}', "JSON"),
        (bytes(4096), "zeros"),
        (b"version https://hawser.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x05\x06" + bytes(18), "zip file with nothing"),
        (b"\xfd7zXZ\x00" + bytes(100), "xz file"),
        (b"BZh91AY" + bytes(100), "bzip2"),
        (b"\x04\x22\x4d\x18" + bytes(9), "lz4"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "7-Zip"),
        (b"Rar!\x1a\x07\x01", "RAR|too short"),
        (b"\xef\xbb\xbf<html>", "HTML"),
        (b"Entry not found", "it begins with 'Entry not found'"),
        (b"Invalid username or password.\n" * 20, "it begins with 'Invalid username"),
        (b"", "empty|ended before|too short"),
    ],
)
def test_other_kinds_of_files_are_identified(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.tw"
    path.write_bytes(content)
    calls = [tw.load_file, tw.open_file, tensorwire.verify, tensorwire.safetensors.SafetensorsFile]
    for call in calls:
        with pytest.raises(WireError, match=f"({says}).*model.tw"):
            call(path)
    with open(path, "rb") as file, pytest.raises(WireError, match=f"({says}).*model.tw"):
        tw.load_file(file)


def test_one_kind_of_file_taken_for_another(path: Path, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="a tensorwire stream"):
        tensorwire.safetensors.SafetensorsFile(path)
    pytest.importorskip("safetensors.numpy").save_file({"w": np.ones(3)}, tmp_path / "m")
    with pytest.raises(WireError, match="a .safetensors file"):
        tw.load_file(tmp_path / "m")


def test_a_non_blocking_source_without_data_raises(tmp_path: Path) -> None:
    class NonBlocking(io.RawIOBase):
        def readinto(self, buffer: memoryview) -> None:
            return None

        def read(self, size: int = -1) -> None:
            return None

    for call in (
        tw.loads,
        tw.load_file,
        tensorwire.verify,
        lambda source: list(tensorwire.encode_file(source)),
        lambda source: tensorwire.decode_file(source, tmp_path / "x"),
        tensorwire.authenticity.digest,
    ):
        with pytest.raises(TransportError, match="non-blocking"):
            call(NonBlocking())


def test_text_sources_are_refused(path: Path, tmp_path: Path) -> None:
    for call in (
        tw.loads,
        tw.load_file,
        tw.open_file,
        tensorwire.verify,
        lambda source: list(tensorwire.encode_file(source)),
        lambda source: tensorwire.decode_file(source, tmp_path / "x"),
        tensorwire.authenticity.digest,
    ):
        with open(path) as text, pytest.raises(ArgumentError, match="text"):
            call(text)
        with pytest.raises(ArgumentError):
            call(io.StringIO("x"))
    for wrong in (["text"], [3], (part for part in (b"", "text"))):
        with pytest.raises(ArgumentError, match="buffers"):
            tw.loads(wrong)
    for path_like in ("model.tw", path):
        with pytest.raises(ArgumentError, match="load_file"):
            tw.loads(path_like)


# ------------------------------------------------------------------------------------------------ Over HTTP, by fsspec


class Ranges(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of one file, with ranges, as object stores answer."""

    content = b""
    asked: ClassVar[list[tuple[int, int]]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        begin, end = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = self.content[int(begin) : int(end) + 1]
        self.asked.append((int(begin), len(part)))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(part) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    stored = io.BytesIO()
    big = np.random.default_rng(0).standard_normal((8, 1 << 20)).astype(np.float32)
    tw.save_file({"big": big, "cast": big.copy(), "small": np.arange(5)}, stored, codec={"cast": "bf16"})
    Ranges.content, Ranges.asked = stored.getvalue(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/model.tw"
        server.shutdown()
        thread.join()


class Fetched(io.RawIOBase):
    """A file behind a URL, in twenty lines of the standard library."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.name = url
        self._place = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self._size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:
        end = min(self._place + len(buffer), self._size)
        if end == self._place:
            return 0
        wanted = {"Range": f"bytes={self._place}-{end - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self.name, headers=wanted)) as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def look_at(file: object, most: int) -> None:
    """Open a remote file, read what is small, and a part of what is large."""
    with tw.open_file(file) as opened:
        assert opened["small"].tolist() == [0, 1, 2, 3, 4]
        rows = opened.get_slice("cast")[2]
        assert sum(size for _, size in Ranges.asked) < most < len(Ranges.content)
        assert np.array_equal(rows, opened["cast"][2])
        assert np.array_equal(opened["big"], tw.loads(Ranges.content)["big"])


def test_a_file_behind_a_url_is_read_in_ranges(url: str) -> None:
    look_at(Fetched(url), 6 << 20)
    assert len(Ranges.asked) < 100  # two for each frame of a MiB


def test_a_file_behind_a_url_is_read_in_ranges_by_fsspec(url: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with fsspec.open(url, "rb", block_size=1 << 18) as file:
        look_at(file, 8 << 20)
        again = pickle.loads(pickle.dumps(tw.open_file(file)))
        assert again["small"].size == 5
        file.seek(0)
        assert set(tw.load_file(file)) == {"big", "cast", "small"}


def test_a_file_of_fsspec_is_written_and_read(path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    target = fsspec.open("memory://model.tw", "wb")
    with pytest.raises(ArgumentError, match="not open yet"):
        tw.save_file(MODEL, target)
    with target as file:
        tw.save_file(MODEL, file, metadata={"k": "v"})
    with fsspec.open("memory://model.tw", "rb") as file:
        assert file.read() == path.read_bytes()
        with tw.open_file(file) as opened:
            assert np.array_equal(opened["tied"], LARGE)


def test_a_truncated_http_answer_raises(url: str) -> None:
    file = Fetched(url)
    Ranges.content = Ranges.content[:-1000]
    with pytest.raises(WireError, match=re.escape(url)):
        tw.open_file(file)
    with pytest.raises(TruncatedError, match=re.escape(url)):
        tw.load_file(Fetched(url))


# ------------------------------------------------------------------------------------------------------ What help shows


def test_signatures_show_what_differs_from_the_defaults() -> None:
    assert "limits: tensorwire.limits.Limits = Limits()" in str(inspect.signature(tensorwire.encode))
    assert repr(tensorwire.Limits(items=3)) == "Limits(items=3)"


FUNCTIONS = {name for name in tensorwire.__all__ if name[0].islower()} - {"get_threads", "set_threads"}  # of C++


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_public_function_has_an_example(name: str) -> None:
    doc = inspect.getdoc(getattr(tensorwire, name)) or ""
    assert re.search(rf"\n    .*(tensorwire\.(torch\.)?|@(\w+\.)*){name}\b", doc)


def test_a_cut_file_is_not_mapped(path: Path) -> None:
    with tw.open_file(path) as file:
        os.truncate(path, 2 << 20)
        with pytest.raises(TruncatedError, match="model.tw"):
            file.map("large")


def test_the_metadata_of_a_stream_comes_before_its_values(path: Path) -> None:
    stream = tw.dumps({"a": 1}, metadata={"step": "7"})
    about: dict[str, str] = {}
    values = tw.decode(stream, metadata_into=about)
    next(values)
    assert about == {"step": "7"}

    async def received() -> dict[str, str]:
        about: dict[str, str] = {}
        async for _ in tw.decode_async(stream, metadata_into=about):
            assert about == {"step": "7"}
        return about

    assert asyncio.run(received()) == {"step": "7"}


def test_file_objects_need_only_read(path: Path) -> None:
    class Reads:
        def __init__(self) -> None:
            self._file = io.BytesIO(path.read_bytes())

        def read(self, size: int) -> bytes:
            return self._file.read(min(size, 1000))

    assert np.array_equal(tw.load_file(Reads())["large"], LARGE)
    assert tensorwire.authenticity.digest(Reads()) == tensorwire.authenticity.digest(path)
