"""Disks that fill up, fail or crash, targets that are traps, and Ctrl-C: the final name is absent, old, or complete."""

import errno
import functools
import io
import itertools
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from leaks import left_open, open_files
from storage_faults import FaultyOs, Op, RecordingOs, replace_os

import tensorwire
from tensorwire import errors
from tensorwire.cli import main
from tensorwire.errors import CorruptError, StorageError
from tensorwire.memory import buffers as pool
from tensorwire.memory import spare
from tensorwire.storage import atomic, rename
from tensorwire.storage.atomic import replacing
from tensorwire.storage.output import Output
from tensorwire.storage.parts import Part, discard_parts, scratch

RNG = np.random.default_rng(9)
TIED = RNG.standard_normal(900).astype(np.float32)
MODEL = {"w": RNG.standard_normal((30, 130)).astype(np.float32), "n": np.arange(5), "tied": TIED, "again": TIED}
BLOB = RNG.bytes(20_000)
OLD = b"what was here before"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tensorwire.save_file(MODEL, folder / "model.tw")
    np.savez(folder / "model.npz", **MODEL)
    tensorwire.safetensors.decode(tensorwire.encode(MODEL), folder / "model.safetensors")
    (folder / "blob").write_bytes(BLOB)
    (folder / "blob.tw").write_bytes(b"".join(tensorwire.encode_file(io.BytesIO(BLOB), codec="zstd")))
    return folder


def cli(*arguments: object) -> None:
    """A command line that raises what its exit code says."""
    code = main([str(argument) for argument in arguments])
    if code == 3:
        raise StorageError("exit code 3")
    assert code == 0


def save(inputs: Path, target: Path) -> None:
    tensorwire.save_file(MODEL, target, codec="int8")


def receive_file(inputs: Path, target: Path) -> None:
    tensorwire.decode_file(tensorwire.encode_file(inputs / "blob", codec="zstd", frame_size=4096), target)


def receive_safetensors(inputs: Path, target: Path) -> None:
    tensorwire.safetensors.decode(tensorwire.encode(MODEL, codec="bf16", frame_size=4096), target)


ACTIONS: dict[str, Callable[[Path, Path], None]] = {
    "save_file": save,
    "decode_file": receive_file,
    "safetensors.decode": receive_safetensors,
    "encode .npz": lambda inputs, target: cli("encode", inputs / "model.npz", target, "--force"),
    "encode .safetensors": lambda inputs, target: cli("encode", inputs / "model.safetensors", target, "--force"),
    "encode a file": lambda inputs, target: cli("encode", inputs / "blob", target, "--codec", "zstd", "--force"),
    "decode to .safetensors": lambda inputs, target: cli(
        "decode", inputs / "model.tw", target, "--to", "safetensors", "--force"
    ),
    "decode to .npz": lambda inputs, target: cli("decode", inputs / "model.tw", target, "--to", "npz", "--force"),
    "decode to a file": lambda inputs, target: cli("decode", inputs / "blob.tw", target, "--force"),
}
actions = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)


def content(target: Path) -> bytes:
    """A file's bytes; of an .npz, whose entries carry the time, those of its arrays."""
    data = target.read_bytes()
    if data[:2] != b"PK":
        return data
    with np.load(io.BytesIO(data)) as arrays:
        return b"".join(name.encode() + arrays[name].tobytes() for name in arrays)


@functools.cache
def expected(action: Callable[[Path, Path], None], inputs: Path) -> bytes:
    target = inputs / "expected"
    action(inputs, target)
    return content(target)


@contextmanager
def faults(monkeypatch: pytest.MonkeyPatch, faulty: object) -> Iterator[None]:
    with monkeypatch.context() as patch:
        replace_os(patch, faulty)
        yield


def check_refused(target: Path, old: bytes | None) -> None:
    assert [path.name for path in target.parent.iterdir()] == ([] if old is None else [target.name])
    assert old is None or target.read_bytes() == old


# Faults, one after the other


@actions
@pytest.mark.parametrize("call", ["open", "stat", "pwrite", "fsync", "close", "replace"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_every_failing_call(
    action: Callable, call: str, lasting: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every call of a kind fails once, or for good: the complete file or an error, and nothing left beside it."""
    good, before, target = expected(action, inputs), open_files(), tmp_path / "target"
    for first in itertools.count(1):
        error = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE)[first % 4]
        old = OLD if first % 2 else None
        target.unlink(missing_ok=True)
        if old is not None:
            target.write_bytes(old)
        faulty = FaultyOs(call, first, error, lasting=lasting)
        try:
            with faults(monkeypatch, faulty):
                action(inputs, target)
        except StorageError as caught:
            assert faulty.struck
            said = capsys.readouterr().err or caught.detail
            assert "target" in said and os.strerror(error) in said and "Traceback" not in said
            if "complete under its name" not in said:
                check_refused(target, old)
                continue
            assert call == "fsync" and faulty.count == 2  # the folder's
        # Closing the folder at the very end may fail: nothing depends on it any more.
        assert not faulty.struck or call == "close" or "complete under its name" in said
        assert content(target) == good and len(list(tmp_path.iterdir())) == 1
        if not faulty.struck:
            break
    assert first > 1 or call == "preadv"
    assert not left_open(before)


@actions
def test_every_failing_allocation(
    action: Callable, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, before, target, empty = expected(action, inputs), open_files(), tmp_path / "target", np.empty
    target.write_bytes(OLD)
    for first in itertools.count(1):
        countdown = itertools.count(1)

        def failing(*arguments: object, **options: object) -> np.ndarray:
            if next(countdown) in (first, first + 1):  # it is tried again without spare memory
                raise MemoryError
            return empty(*arguments, **options)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", failing)
                patch.setattr(pool, "SPARE", spare.SpareMemory(0))  # so that all comes from there
                action(inputs, target)
            break
        except (MemoryError, StorageError):  # as exit code 3 has it
            check_refused(target, OLD)
    assert first > 1 or action is ACTIONS["encode .npz"]  # raw from memory: it takes none
    assert content(target) == good
    assert not left_open(before)


@actions
@pytest.mark.parametrize("short", [1, 7, 4096])
def test_short_writes_and_reads(
    action: Callable, short: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = expected(action, inputs)
    with faults(monkeypatch, FaultyOs(short=short)):
        action(inputs, tmp_path / "target")
    assert content(tmp_path / "target") == good


def test_a_system_that_accepts_no_bytes_raises(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: 0)
        with pytest.raises(StorageError, match="accepts no bytes"):
            Output(file.fileno(), "file").write_at(memoryview(b"x"), 0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_signals_all_the_time(inputs: Path, tmp_path: Path) -> None:
    """EINTR for real: every system call may be interrupted, 5000 times a second."""
    count = itertools.count()
    before = signal.signal(signal.SIGALRM, lambda *_: next(count))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for name, action in ACTIONS.items():
            if not name.startswith("decode to"):
                action(inputs, tmp_path / "target")
                assert content(tmp_path / "target") == expected(action, inputs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert next(count) > 1


def test_errors_of_the_source_are_not_blamed_on_the_target(tmp_path: Path) -> None:
    def source() -> Iterator[bytes]:
        yield b"".join(tensorwire.encode_file(io.BytesIO(BLOB)))[:5000]
        raise OSError(errno.EIO, "the input broke")

    with pytest.raises(OSError, match="the input broke") as caught:
        tensorwire.decode_file(source(), tmp_path / "target")
    assert not isinstance(caught.value, StorageError)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        tensorwire.load_file(tmp_path / "missing")


def test_without_calls_that_windows_lacks(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})
    for name in ("pwrite", "preadv", "posix_fadvise"):
        if hasattr(lacking, name):
            delattr(lacking, name)
    for name, action in ACTIONS.items():
        with monkeypatch.context() as patch:
            replace_os(patch, lacking)
            patch.setattr(atomic, "_HAS_FOLDER_FDS", False)
            action(inputs, tmp_path / name)
        assert content(tmp_path / name) == expected(action, inputs)
    assert {path.name for path in tmp_path.iterdir()} == {*ACTIONS}


def test_two_threads_at_one_descriptor_where_seeking_takes_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = SimpleNamespace(
        **{name: getattr(os, name) for name in ("lseek", "write", "read", "SEEK_SET", "fsdecode")}
    )
    seek, lacking.lseek = lacking.lseek, lambda *place: (seek(*place), time.sleep(0.0001))  # the other thread's turn
    replace_os(monkeypatch, lacking)
    pieces = [bytes([number]) * 100 for number in range(200)]
    with open(tmp_path / "file", "w+b") as file:
        output = Output(file.fileno(), "file")

        def write(parity: int) -> None:
            for number in range(parity, 200, 2):
                output.write_at(memoryview(pieces[number]), number * 100)

        threads = [threading.Thread(target=write, args=(parity,)) for parity in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


# The errors themselves


def test_errors_say_where_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        tensorwire.save_file(MODEL, tmp_path / "missing" / "model.tw")
    error = caught.value
    assert error.errno == errno.ENOENT and isinstance(error, OSError)
    assert str(tmp_path / "missing" / "model.tw") in error.detail and "create it first" in error.detail
    assert isinstance(error.__cause__, FileNotFoundError)


def test_all_errors_pickle() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TensorwireError)
    ]
    assert len(kinds) > 12
    for kind in kinds:
        extra = {
            errors.LimitError: {"limit": "x", "allowed": 1, "got": 2, "item": "w"},
            errors.NonFiniteError: {"detail": "NaN", "index": 3},
            errors.TransportError: {"detail": "gone", "retryable": False},
            errors.StorageError: {"detail": "full", "errno": errno.ENOSPC},
            errors.MissingFileError: {"detail": "gone", "errno": errno.ENOENT},
        }.get(kind, {"detail": "d", "item": "w", "frame": 2, "offset": 9})
        error = kind(**extra)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
        assert getattr(again, "errno", None) == getattr(error, "errno", None)


# Targets that are no plain file


def test_a_symbolic_link_is_replaced_and_never_followed(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(OLD)
    for destination in ("elsewhere", "nowhere", "target"):  # to a file, dangling, to itself
        target = tmp_path / "target"
        target.unlink(missing_ok=True)
        target.symlink_to(destination)
        receive_file(inputs, target)
        assert not target.is_symlink() and target.read_bytes() == BLOB
        assert (tmp_path / "elsewhere").read_bytes() == OLD
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "target"}


def test_a_folder_fifo_socket_or_device_is_refused_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # names of sockets are short
    try:
        listener.bind("socket")
    finally:
        os.chdir(here)
        listener.close()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.Target, "create", lambda *_: pytest.fail("went on"))
        targets = ["folder", "fifo", "socket", "folder/", ".", "..", "folder/.", "folder/.."]
        for target in [*(f"{tmp_path}/{name}" for name in targets), os.devnull, "/", ""]:
            with pytest.raises(StorageError):
                receive_file(inputs, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_link_to_a_device_or_folder_is_refused(kind: str, inputs: Path, tmp_path: Path) -> None:
    """/dev/stdout is one: a rename would take it from every process of the machine."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").symlink_to(kind)
    with pytest.raises(StorageError):
        receive_file(inputs, tmp_path / "target")
    assert os.readlink(tmp_path / "target") == kind and not list((tmp_path / "folder").iterdir())


NO_NAMES = {
    "a\0b": "NUL",
    "\ud800": "surrogates",
    "": "give a path",
    "x" * 300: "shorter",
    3: "expected a path, not int",
    None: "expected a path, not NoneType",
}


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_impossible_file_names_are_refused_at_once(name: Any, tmp_path: Path) -> None:
    path = os.path.join(tmp_path, name) if isinstance(name, str) and name else name
    stream = b"".join(tensorwire.encode({"w": np.ones(3)}))
    for write in (
        lambda: tensorwire.decode_file(pytest.fail, path),
        lambda: tensorwire.safetensors.decode(pytest.fail, path),
        lambda: tensorwire.safetensors.decode([stream], path, max_shard_size=100),
    ):
        with pytest.raises((StorageError, errors.ArgumentError), match=NO_NAMES[name]):
            write()
    assert not list(tmp_path.iterdir())
    for read in (tensorwire.load_file, tensorwire.open_file, tensorwire.verify, tensorwire.encode_file):
        with pytest.raises((StorageError, errors.ArgumentError)):
            read(path)


def test_a_new_folder_ignores_a_changed_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def stream() -> Iterator[bytes]:
        yield b"".join(tensorwire.encode({"w": np.ones(3)}))
        os.chdir(tmp_path)

    tensorwire.safetensors.decode(stream(), "model", max_shard_size=100)
    assert os.listdir(tmp_path) == ["here"] and os.listdir(tmp_path / "here") == ["model"]
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", "model"):
        with pytest.raises(StorageError, match="not an empty folder"):
            tensorwire.safetensors.decode(stream(), name, max_shard_size=100)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(StorageError, match="current folder"):
        tensorwire.safetensors.decode(stream(), ".", max_shard_size=100)


def test_a_file_is_opened_when_it_is_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blob").write_bytes(b"right")
    stream = tensorwire.encode_file("blob")
    monkeypatch.chdir("/")
    tensorwire.decode_file(stream, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"right"


@pytest.mark.parametrize("trap", ["link", "fifo", "folder"])
def test_a_target_replaced_while_writing_is_never_written_through(trap: str, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.write_bytes(OLD)

    def write() -> None:
        with replacing(target) as fd:
            {"link": lambda: target.symlink_to(elsewhere), "fifo": lambda: os.mkfifo(target), "folder": target.mkdir}[
                trap
            ]()
            os.write(fd, BLOB)

    if trap == "folder":
        with pytest.raises(StorageError, match="choose another name"):
            write()
        assert target.is_dir()
    else:
        write()
        assert target.is_file() and not target.is_symlink() and target.read_bytes() == BLOB
    assert elsewhere.read_bytes() == OLD
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "target"}


@pytest.mark.parametrize("trap", ["file", "link", "fifo"])
def test_an_existing_temporary_name_is_not_written_to(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if somebody could guess it between the choice of the name and the open."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(OLD)
    monkeypatch.setattr(atomic.Target, "temporary", lambda _: "guessed")
    {"file": elsewhere.rename, "link": lambda to: to.symlink_to(elsewhere), "fifo": os.mkfifo}[trap](
        tmp_path / "guessed"
    )
    with pytest.raises(StorageError) as caught, replacing(tmp_path / "target"):
        pytest.fail("went on")
    assert caught.value.errno == errno.EEXIST
    assert not (tmp_path / "target").exists()
    assert trap == "file" or elsewhere.read_bytes() == OLD


def test_a_folder_swapped_for_a_link_redirects_nothing(tmp_path: Path) -> None:
    folder, attacker = tmp_path / "folder", tmp_path / "attacker"
    folder.mkdir()
    attacker.mkdir()
    with replacing(folder / "target") as fd:
        os.write(fd, BLOB)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(attacker)
    assert not list(attacker.iterdir())
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["target"]


def test_a_folder_removed_midway(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(StorageError, match="folder does not exist, or no longer"), replacing(folder / "target") as fd:
        os.write(fd, BLOB)
        shutil.rmtree(folder)
        folder.mkdir()  # a new one of the same name is not the one that was chosen
    assert not list(folder.iterdir())


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_the_longest_names_fit(letter: str, inputs: Path, tmp_path: Path) -> None:
    longest = letter * (255 // len(letter.encode()))
    receive_file(inputs, tmp_path / longest)
    assert (tmp_path / longest).read_bytes() == BLOB
    with pytest.raises(StorageError, match="shorter name"):
        receive_file(inputs, tmp_path / (longest + letter))
    assert len(list(tmp_path.iterdir())) == 1


def test_names_of_any_bytes(inputs: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe\n name"
    receive_file(inputs, name)
    with open(name, "rb") as file:
        assert file.read() == BLOB


def test_permissions_follow_the_umask_and_never_widen(inputs: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    before = os.umask(0o027)
    try:
        receive_file(inputs, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        for mode, then in ((0o600, 0o600), (0o444, 0o440), (0o666, 0o640)):
            target.chmod(mode)
            receive_file(inputs, target)
            assert stat.S_IMODE(target.stat().st_mode) == then and target.read_bytes() == BLOB
    finally:
        os.umask(before)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission(inputs: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="may write to"):
            receive_file(inputs, tmp_path / "target")
    finally:
        tmp_path.chmod(0o755)
    assert not list(tmp_path.iterdir())


def test_a_target_on_another_file_system(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    monkeypatch.chdir(tmp_path)
    target = shared / f"tensorwire-{os.getpid()}"
    try:
        receive_file(inputs, target)
        assert target.read_bytes() == BLOB
    finally:
        target.unlink(missing_ok=True)


def test_a_fifo_is_an_input_of_unknown_length(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(BLOB,))
    writer.start()
    tensorwire.decode_file(tensorwire.encode_file(tmp_path / "fifo"), tmp_path / "target")
    writer.join()
    assert (tmp_path / "target").read_bytes() == BLOB


# Disks that are full or read-only for real

HOME = Path(tensorwire.__file__).parents[1]
PYTHON = [sys.executable, "-W", "ignore"]

ON_A_SMALL_DISK = """
import errno, os, sys, numpy as np, tensorwire
folder = sys.argv[1]
target = os.path.join(folder, "model.tw")
def save(mebibytes):
    tensorwire.save_file({"w": np.ones(mebibytes << 18, np.float32)}, target)
save(1)
old = open(target, "rb").read()
ballast = os.path.join(folder, "ballast")
with open(ballast, "wb") as file:
    file.write(bytes(1 << 20))
for _ in range(20):
    try:
        save(2)
        sys.exit("wrote 4 MiB and more to a disk of 4 MiB")
    except tensorwire.StorageError as error:
        assert error.errno == errno.ENOSPC and "free some space" in error.detail, error
    assert open(target, "rb").read() == old and sorted(os.listdir(folder)) == ["ballast", "model.tw"]
os.unlink(ballast)
save(2)  # space returns
assert tensorwire.load_file(target)["w"].size == 2 << 18 and os.listdir(folder) == ["model.tw"]
"""
WITHOUT_INODES = """
import errno, os, sys, tensorwire
target = os.path.join(sys.argv[1], "model.tw")
try:
    tensorwire.save_file({}, target)
    sys.exit("made a file on a disk without inodes")
except tensorwire.StorageError as error:
    assert error.errno == errno.ENOSPC, error
assert os.listdir(sys.argv[1]) == []
"""
READ_ONLY = WITHOUT_INODES.replace("ENOSPC", "EROFS")


def in_namespace(options: str, script: str, folder: Path) -> None:
    """Run a script with a tmpfs mounted on `folder`, in a mount namespace of its own, which leaves nothing behind."""
    if not shutil.which("unshare"):
        pytest.skip("takes unshare, of util-linux")
    mount = f'mount -t tmpfs -o {options} none "$1"'
    begin = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*begin, mount, "sh", str(folder)], capture_output=True, timeout=60).returncode:
        pytest.skip("may not mount a tmpfs here, not even in a namespace of its own")
    command = [*begin, f'{mount} && shift && exec "$@"', "sh", str(folder), *PYTHON, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=60, cwd=HOME, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "script"),
    [("size=4m", ON_A_SMALL_DISK), ("size=4m,nr_inodes=1", WITHOUT_INODES), ("size=4m,ro", READ_ONLY)],
    ids=["full", "no inodes", "read-only"],
)
def test_a_real_disk_that_is_full_or_read_only(options: str, script: str, tmp_path: Path) -> None:
    in_namespace(options, script, tmp_path)


def test_the_limit_on_the_size_of_files(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from tensorwire.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    target = tmp_path / "target"
    target.write_bytes(OLD)
    command = [*PYTHON, "-c", script, "encode", "-", str(target), "--force"]
    done = subprocess.run(command, input=bytes(200_000), capture_output=True, timeout=60, cwd=HOME)
    assert done.returncode == 3 and b"ulimit -f" in done.stderr and b"Traceback" not in done.stderr
    check_refused(target, OLD)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("verb", ["encode blob -", "decode blob.tw -", "verify blob.tw", "inspect blob.tw --frames"])
def test_a_full_disk_behind_a_pipe(verb: str, inputs: Path) -> None:
    command = [*PYTHON, "-m", "tensorwire", *(str(inputs / word) if "blob" in word else word for word in verb.split())]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, cwd=HOME)
    assert done.returncode == 3 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


OUT_OF_MEMORY = """
import io, os, resource, sys, tensorwire
target, extra = sys.argv[1], int(sys.argv[2])
def transfer():  # in frames that no helper thread is begun for: CPython may wait for ever for one without memory
    stream = tensorwire.encode_file(io.BytesIO(bytes(3 << 20)), codec="zstd", frame_size=200_000)
    tensorwire.decode_file(b"".join(stream), target)
transfer()
with open(target, "wb") as file:
    file.write(b"what was here before")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
try:
    transfer()
    code = 0
except (MemoryError, tensorwire.StorageError):
    code = 3
os._exit(code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS bites on Linux only")
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """Address space ends at places between nothing left and enough."""
    target, codes = tmp_path / "target", []
    for extra in (0, 200_000, 400_000, 800_000, 1_600_000, 64 << 20):
        command = [*PYTHON, "-c", OUT_OF_MEMORY, str(target), str(extra)]
        done = subprocess.run(command, capture_output=True, timeout=60, cwd=HOME)
        assert done.returncode in (0, 3), done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert target.read_bytes() == (OLD if done.returncode else bytes(3 << 20))
        codes.append(done.returncode)
    assert codes[0] == 3 and codes[-1] == 0


# Crashes: what the disk may hold after one (the method of ALICE: Pillai et al., OSDI 2014)

MANY = 64  # subsets of unsynced changes tried at one point, where there are more


def subsets(lost: list[int], rng: random.Random) -> Iterator[set[int]]:
    """Sets of changes that did not reach the disk: all, or all and none, each alone, each alone kept, and some."""
    if 2 ** len(lost) <= MANY:
        for size in range(len(lost) + 1):
            yield from map(set, itertools.combinations(lost, size))
        return
    yield set()
    yield {*lost}
    for one in lost:
        yield {one}
        yield {*lost} - {one}
    for _ in range(MANY):
        yield {one for one in lost if rng.random() < 0.5}


def after_crash(ops: list[Op], lost: set[int], torn: bool, names: dict[str, bytes]) -> dict[str, bytes]:
    """Names and contents on the disk if these changes were lost; `torn`: of a lost write, the first half came."""
    files: dict[int, bytearray] = {}
    folder: dict[str, int | bytes] = dict(names)
    for number, op in enumerate(ops):
        if op.kind == "write":
            file, offset, data = op.arguments
            if number in lost:
                data = data[: len(data) // 2] if torn else b""
            if data:
                memory = files.setdefault(file, bytearray())
                memory.extend(bytes(max(0, offset + len(data) - len(memory))))
                memory[offset : offset + len(data)] = data
        elif op.kind == "create" and number not in lost:
            folder[op.arguments[1]] = op.arguments[0]
        elif op.kind == "rename" and number not in lost:
            name, to = op.arguments
            first = next((o.arguments[0] for o in ops[:number] if o.kind == "create" and o.arguments[1] == name), None)
            made = folder.pop(name, first)  # which another rename may have put there
            folder[to] = made
        elif op.kind == "unlink" and number not in lost:
            folder.pop(op.arguments[0], None)
    return {name: file if isinstance(file, bytes) else bytes(files.get(file, b"")) for name, file in folder.items()}


def crashes(ops: list[Op], names: dict[str, bytes]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(operations done, names and contents) of every crash: at every point, any of what was not synced is lost."""
    rng = random.Random(4)
    for done in range(len(ops) + 1):
        before = ops[:done]
        lost = []
        for number, op in enumerate(before):
            later = before[number + 1 :]
            if (op.kind == "write" and Op("sync", op.arguments[:1]) not in later) or (
                op.kind in ("create", "rename", "unlink") and Op("sync folder") not in later
            ):
                lost.append(number)
        for chosen in subsets(lost, rng):
            for torn in (False, True):
                yield done, after_crash(before, chosen, torn, names)


@functools.cache
def recorded(action: Callable[[Path, Path], None], inputs: Path) -> tuple[Op, ...]:
    """What an action does to the disk."""
    recording = RecordingOs()
    folder = inputs / f"recorded {len(list(inputs.iterdir()))}"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        replace_os(patch, recording)
        action(inputs, folder / "target")
    assert content(folder / "target") == content_of(after_crash(recording.ops, set(), False, {})["target"], folder)
    return tuple(recording.ops)


def content_of(data: bytes, folder: Path) -> bytes:
    (folder / "replayed").write_bytes(data)
    return content(folder / "replayed")


@actions
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "over an old file"])
def test_a_crash_at_any_point_leaves_no_partial_file(
    action: Callable, old: bytes | None, inputs: Path, tmp_path: Path
) -> None:
    ops = [*recorded(action, inputs)]
    assert [op.kind for op in ops if op.kind != "write"] == ["create", "sync", "rename", "sync folder"]
    names = {} if old is None else {"target": old}
    complete = after_crash(ops, set(), False, {})["target"]
    assert content_of(complete, tmp_path) == expected(action, inputs)
    seen = set()
    for done, disk in crashes(ops, names):
        assert disk.get("target") in (old, complete)
        assert done < len(ops) or disk == {"target": complete}  # the call has returned: nothing may be lost any more
        seen.add(disk.get("target"))
    assert seen == {old, complete}


@pytest.mark.parametrize("missing", ["sync", "sync folder"])
def test_the_check_of_crashes_finds_a_sync_that_is_missing(missing: str, inputs: Path) -> None:
    ops = [op for op in recorded(save, inputs) if op.kind != missing]
    complete = after_crash(ops, set(), False, {})["target"]
    states = [(done, disk.get("target")) for done, disk in crashes(ops, {})]
    if missing == "sync":
        assert any(found not in (None, complete) for _, found in states)
    else:
        assert any(done == len(ops) and found is None for done, found in states)


# Renaming and scratch


def test_a_file_takes_another_name_at_once(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(OLD)
    rename(tmp_path / "new", tmp_path / "old")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
    (tmp_path / "folder").mkdir()
    for source, target in [("missing", "old"), ("old", "folder"), ("old", "folder/old")]:
        with pytest.raises(StorageError, match="cannot rename|cannot write"):
            rename(tmp_path / source, tmp_path / target)
    assert (tmp_path / "old").read_bytes() == b"new"


def test_a_rename_is_on_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_bytes(b"new")
    disk = RecordingOs()
    replace_os(monkeypatch, disk)
    rename(tmp_path / "new", tmp_path / "target")
    assert [op.kind for op in disk.ops] == ["rename", "sync folder"]


def test_leftover_parts_are_removed_except_named_ones(tmp_path: Path) -> None:
    target = tmp_path / "model.tw"
    for key in (b"old", b"new"):
        part = Part(target, key)
        part.open()
        part.close()
        (tmp_path / Path(part.path).with_suffix(".done").name).write_bytes(b"a note")
    others = [tmp_path / name for name in ("model.tw", ".model.twin.0.part", "model.tw.part", ".hidden")]
    for other in others:
        other.write_bytes(b"not ours")
    kept = Part(target, b"new").path
    discard_parts(target, but=[b"new"], notes=False)
    left = {path for path in tmp_path.iterdir() if path not in others}
    assert {path.suffix for path in left} == {".part", ".done"} and len(left) == 3 and Path(kept) in left
    discard_parts(target, but=[b"new"])
    assert {path.stem for path in tmp_path.iterdir() if path not in others} == {Path(kept).stem}
    discard_parts(target)
    assert {*tmp_path.iterdir()} == {*others}


def test_scratch_is_removed_with_its_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch() as path:
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        Path(path).write_bytes(BLOB)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="temporary"), scratch():
        pass


# Ctrl-C


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_ctrl_c_halfway(verb: str, tmp_path: Path) -> None:
    """The command waits for more input when SIGINT comes."""
    data = RNG.bytes(3 << 20)
    stream = b"".join(tensorwire.encode_file(io.BytesIO(data)))
    target = tmp_path / "target"
    target.write_bytes(OLD)
    process = start([verb, "-", str(target), "--force"])
    process.stdin.write((data if verb == "encode" else stream)[: 5 << 19])
    process.stdin.flush()
    await_temporary(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")
    check_refused(target, OLD)


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_ctrl_c_at_random_moments(verb: str, inputs: Path, tmp_path: Path) -> None:
    """All input is there, and SIGINT comes while it is worked on, or just after. TENSORWIRE_EXHAUSTIVE=1: 100 times."""
    data = bytes(24 << 20)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source, target = tmp_path / "in" / "source", tmp_path / "out" / "target"
    (source if verb == "encode" else target).write_bytes(data)
    if verb == "decode":
        source.write_bytes(b"".join(tensorwire.encode_file(target)))
    rng, codes = random.Random(1), []
    for _ in range(100 if os.environ.get("TENSORWIRE_EXHAUSTIVE") == "1" else 4):
        target.write_bytes(OLD)
        process = start([verb, str(source), str(target), "--force"])
        await_temporary(process, tmp_path / "out")
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        codes.append(process.returncode)
        # Once the file stands, Ctrl-C may find the interpreter on its way out, where the signal kills it.
        assert codes[-1] in (0, 130, -signal.SIGINT), said
        if target.read_bytes() == OLD:
            assert (codes[-1], said) == (130, b"")
        elif verb == "decode":
            assert target.read_bytes() == data
        else:
            assert main(["verify", str(target)]) == 0
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert codes


def start(arguments: list[str]) -> subprocess.Popen:
    """The command, to which Ctrl-C means something even where the tests run in the background of a shell."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([*PYTHON, "-m", "tensorwire", *arguments], cwd=HOME, preexec_fn=heard, **pipes)


def await_temporary(process: subprocess.Popen, folder: Path) -> None:
    """Wait until the command has begun to write, or has ended."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.part")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_broken_stream_is_still_a_wire_error(tmp_path: Path) -> None:
    data = bytearray(b"".join(tensorwire.encode_file(io.BytesIO(BLOB))))
    data[-500] ^= 1
    with pytest.raises(CorruptError):
        tensorwire.decode_file(bytes(data), tmp_path / "target")
    assert not list(tmp_path.iterdir())
