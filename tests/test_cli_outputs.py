"""Commands and what they write: nothing is lost by a name, a link, a redirection or a signal."""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import tensorwire
from tensorwire.cli import main
from tensorwire.cli.common import codec_choice
from tensorwire.files import safetensors

_LOCAL: Final = ("encode", "decode", "inspect", "verify", "digest")
HOME: Final = Path(tensorwire.__file__).parents[1]
# As the installed command, which does not look for packages in the current folder.
COMMAND: Final = "import sys; sys.path = [p for p in sys.path if p]; from tensorwire.cli import main; sys.exit(main())"
MODEL: Final = {
    "w": (np.random.default_rng(1).standard_normal((64, 130)) * 0.02).astype(np.float32),
    "w.bias": np.arange(130, dtype=np.float32),
    "double": np.arange(5, dtype=np.float64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model in every kind of file, and streams of them."""
    tensorwire.safetensors.decode(tensorwire.encode(MODEL), tmp_path / "model.safetensors")
    np.savez(tmp_path / "weights.npz", **MODEL)
    np.save(tmp_path / "array.npy", MODEL["w"])
    (tmp_path / "any.bin").write_bytes(bytes(range(256)) * 400)
    tensorwire.save_file(MODEL, tmp_path / "in.tw")
    tensorwire.save_file(MODEL["w"], tmp_path / "array.tw")
    (tmp_path / "file.tw").write_bytes(b"".join(tensorwire.encode_file(tmp_path / "any.bin")))
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def process(*arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {"env": {**os.environ, "PYTHONPATH": str(HOME)}}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], **pipes | environment | options)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


WRITING: Final[list[tuple[str, str, str]]] = [
    ("encode", "model.safetensors", "out.tw"),
    ("encode", "weights.npz", "out.tw"),
    ("encode", "array.npy", "out.tw"),
    ("encode", "any.bin", "out.tw"),
    ("decode", "in.tw", "out.safetensors"),
    ("decode", "in.tw", "out.npz"),
    ("decode", "in.tw", "out.pt"),
    ("decode", "array.tw", "out.npy"),
    ("decode", "file.tw", "out.bin"),
]
WITHOUT_TORCH: Final = pytest.mark.skipif(find_spec("torch") is None, reason="a .pt file takes torch")
writing = pytest.mark.parametrize(
    ("verb", "source", "target"),
    [pytest.param(*each, marks=[WITHOUT_TORCH] if each[2].endswith(".pt") else []) for each in WRITING],
)


# Names


@writing
def test_inputs_are_never_overwritten(
    verb: str, source: str, target: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(folder / source, folder / f"link-{target}")
    os.link(folder / source, folder / f"hard-{target}")
    before = contents(folder)
    for name in (source, f"link-{target}", f"hard-{target}", f"../{folder.name}/{source}"):
        assert run(verb, folder / source, folder / name, "--force") == 2
        assert run(verb, folder / name, folder / source, "--force") == 2
        assert "is the same file as" in capsys.readouterr().err
    assert contents(folder) == before and (folder / f"link-{target}").is_symlink()


@writing
def test_existing_files_are_replaced_only_with_force(
    verb: str, source: str, target: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / target).write_bytes(b"old")
    os.symlink("nowhere", folder / f"dangling-{target}")
    before = contents(folder)
    for name in (target, f"dangling-{target}"):
        assert run(verb, folder / source, folder / name) == 2
        assert "--force" in capsys.readouterr().err
    assert contents(folder) == before
    assert run(verb, folder / source, folder / target, "--force") == 0
    assert {name for name, digest in contents(folder).items() if before[name] != digest} == {target}


def test_redirections_count_as_names(folder: Path) -> None:
    before = contents(folder)
    with (folder / "any.bin").open("rb") as source, (folder / "any.bin").open("ab") as target:
        for arguments, options in (
            (["encode", folder / "any.bin", "-"], {"stdout": target}),
            (["encode", "-", folder / "any.bin", "--force"], {"stdin": source}),
            (["encode", "-", "-"], {"stdin": source, "stdout": target}),
            (["decode", folder / "any.bin", "-"], {"stdout": target}),
        ):
            command = process(*arguments, **options)
            assert b"is the same file as" in command.communicate()[1]
            assert command.returncode == 2
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["received.tw", "model.safetensors"])
def test_a_receiver_refuses_before_it_listens(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "received.tw").write_bytes(b"old")
    before = contents(folder)
    assert run("receive", folder / name, "--listen", "127.0.0.1:0") == 2
    assert run("receive", folder / "missing" / name, "--listen", "127.0.0.1:0") == 3
    cert = folder / name
    assert run("receive", cert, "--force", "--cert", cert, "--key", cert) == 2
    assert "listening" not in capsys.readouterr().err
    assert contents(folder) == before


def test_a_file_that_appears_while_a_receiver_waits_is_kept(folder: Path) -> None:
    receiver = process("receive", folder / "received.bin", "--listen", "127.0.0.1:0")
    where = receiver.stderr.readline().split()[-1].decode()
    (folder / "received.bin").write_bytes(b"mine")
    assert run("send", folder / "any.bin", where) == 1
    assert (folder / "received.bin").read_bytes() == b"mine"
    receiver.terminate()
    receiver.communicate()


def test_bench_overwrites_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    command = ["bench", "size", "--codec", "nf4", "--model", folder / "model.safetensors"]
    assert run(*command, "--json", folder / "model.safetensors", "--force") == 2
    assert run(*command, "--json", folder / "any.bin") == 2
    assert contents(folder) == before
    assert run(*command, "--json", folder / "any.bin", "--force") == 0
    (folder / "plots").mkdir()
    (folder / "plots" / "size.png").write_bytes(b"old")
    assert run(*command, "--plot", folder / "plots") == 2
    assert (folder / "plots" / "size.png").read_bytes() == b"old"


def test_a_run_starts_in_a_folder_of_its_own(folder: Path) -> None:
    before = contents(folder)
    (folder / "rows.json").write_bytes(b"old")
    assert run("fl", "run", "--out", folder, "--task", "nothing:here") == 2
    assert contents(folder) == {**before, "rows.json": sha256(b"old").hexdigest()}


def test_the_examples_in_help_run_in_order_harm_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "key").write_bytes(bytes(32))
    (folder / "adapter.tw").write_bytes((folder / "in.tw").read_bytes())
    before, ran = contents(folder), []
    for verb in ("", *_LOCAL):
        with pytest.raises(SystemExit):
            main([*filter(None, [verb]), "--help"])
        examples = capsys.readouterr().out.partition("examples:\n")[2]
        for line in examples.splitlines():
            words = shlex.split(re.split(r"[|>]", line.strip().replace("'bf16|zstd'", "bf16"))[0])
            if words[:1] == ["tensorwire"] and words[1] in _LOCAL and "-" not in words:
                ran.append((words[1], main(words[1:])))
                assert {name: contents(folder)[name] for name in before} == before
    assert len(ran) > 10 and [code for verb, code in ran if verb in ("encode", "inspect")].count(0) >= 3


# What goes in comes out


def test_every_input_round_trips(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    nested = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "lr": 0.5, "betas": (0.9, 0.99), "steps": [1, None]}
    nested["half"] = torch.ones(3, dtype=torch.bfloat16)
    torch.save(nested, folder / "in.pt")
    for name in ("model.safetensors", "weights.npz", "array.npy", "in.pt"):
        stream, back = folder / f"{name}.tw", folder / f"back-{name}"
        assert run("encode", folder / name, stream) == 0
        assert run("decode", stream, back) == 0
    assert (folder / "back-array.npy").read_bytes() == (folder / "array.npy").read_bytes()
    with np.load(folder / "back-weights.npz") as got:
        assert all(np.array_equal(got[key], MODEL[key]) for key in MODEL)
    got = torch.load(folder / "back-in.pt", weights_only=True)
    assert str(got) == str(nested) and got["half"].dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy", "pt"])
def test_a_model_on_stdin(kind: str, folder: Path) -> None:
    names = {"safetensors": "model.safetensors", "npz": "weights.npz", "npy": "array.npy", "pt": "in.pt"}
    if kind == "pt":
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.ones(3)}, folder / "in.pt")
    command = process("encode", "-", "-", "--from", kind)
    out, _ = command.communicate((folder / names[kind]).read_bytes())
    (folder / "piped.tw").write_bytes(out)
    assert run("encode", folder / names[kind], folder / "named.tw") == 0
    piped, named = (tensorwire.loads((folder / name).read_bytes()) for name in ("piped.tw", "named.tw"))
    assert str(piped) == str(named)


def test_one_line_reports_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("encode", folder / "model.safetensors", folder / "m.tw", "--codec", "nf4")
    assert re.fullmatch(r"33.8 kB -> [\d.]+ kB \([\d.]+x\), 1 item raw \(float64\)\n", capsys.readouterr().err)
    run("encode", folder / "weights.npz", folder / "n.tw", "--codec", "nf4")
    assert "1 item raw (float64)" in capsys.readouterr().err
    run("decode", folder / "m.tw", folder / "m.npz")
    assert re.fullmatch(r"[\d.]+ kB -> [\d.]+ kB\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("nf4", "nf4"),
        ("nf4:blocksize=128,double_quant=true", "nf4:blocksize=128,double_quant=true"),
        ("*.bias=raw,*=nf4", {"*.bias": "raw", "*": "nf4"}),
        (
            "a=nf4:blocksize=128,double_quant=true,b=bf16|zstd:level=3,*=raw",
            {"a": "nf4:blocksize=128,double_quant=true", "b": "bf16|zstd:level=3", "*": "raw"},
        ),
        ("*=nf4:blocksize=64,blocksize=raw", {"*": "nf4:blocksize=64", "blocksize": "raw"}),
    ],
)
def test_rules_by_name(text: str, rules: object) -> None:
    assert codec_choice(text) == rules


@pytest.mark.parametrize("text", ["*=", "=nf4", "*=rwa", "*=nf4,*=raw", "*=raw,x", "*=nf4:blocksize=128,*x=rwa"])
def test_invalid_rules_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        codec_choice(text)


def test_rules_reach_the_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", folder / "model.safetensors", folder / "m.tw", "--codec", "*.bias=raw,w=nf4,*=zstd") == 0
    with tensorwire.open_file(folder / "m.tw") as file:
        assert [len(file.item(name).codec) for name in ("w.bias", "w", "double")] == [1, 1, 2]
    assert run("encode", folder / "any.bin", folder / "a.tw", "--codec", "*=raw") == 2
    assert run("encode", folder / "model.safetensors", folder / "x.tw", "--codec", "*.weigth=nf4") == 1
    assert "weigth" in capsys.readouterr().err and not (folder / "x.tw").exists()


# Errors


def broken_files(folder: Path) -> dict[str, bytes]:
    whole = (folder / "weights.npz").read_bytes()
    array = (folder / "array.npy").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    files = {
        "cut.npz": whole[: len(whole) // 2],
        "flipped.npz": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "cut.npy": array[:-1],
        "head.npy": array[:20],
        "huge.npy": array.replace(b"(64, 130)", b"(6 << 90)"),
        "flipped.npy": bytes([array[0] ^ 255]) + array[1:],
        "text.npy": b"hello\n" * 10,
        "text.pt": b"hello\n" * 10,
        "zip.pt": whole,
        "zip.safetensors": whole,
        "cut.safetensors": (folder / "model.safetensors").read_bytes()[:-1],
    }
    for suffix in ("npz", "npy", "pt", "safetensors"):
        files |= {f"empty.{suffix}": b"", f"pointer.{suffix}": pointer, f"page.{suffix}": b"<!DOCTYPE html><html>"}
    return files


def test_a_broken_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in broken_files(folder).items():
        if name.endswith(".pt"):
            pytest.importorskip("torch")
        (folder / name).write_bytes(data)
        assert run("encode", folder / name, folder / "never.tw") in (1, 3), name
        error = capsys.readouterr().err
        assert error.startswith("tensorwire: error: ") and error.count("\n") == 1, name
        assert name.endswith("safetensors") or name in error
        assert not name.startswith("pointer") or "git-lfs" in error
        assert not name.startswith("page") or "an HTML or XML page, not the file" in error
        assert name != "text.pt" or "text, not the file; it begins with 'hello" in error
        assert not (folder / "never.tw").exists()


def test_an_internal_error_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: object, **options: object) -> None:
        raise LookupError("two\nlines")

    monkeypatch.setattr(safetensors, "encode", fault)
    assert run("encode", folder / "model.safetensors", folder / "m.tw") == 4
    assert "a bug in tensorwire: LookupError: two lines" in capsys.readouterr().err
    monkeypatch.setenv("TENSORWIRE_TRACEBACK", "1")
    with pytest.raises(LookupError):
        run("encode", folder / "model.safetensors", folder / "m.tw")


@pytest.mark.skipif(sys.platform == "win32", reason="shells of another kind")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("verify in.tw >&-", 3),
        ("verify in.tw 2>&-", 0),
        ("verify in.tw > /dev/full", 3),
        ("encode weights.npz - > /dev/full", 3),
        ("encode - out.tw <&-", 3),
        ("encode weights.npz out.tw <&- >&- 2>&-", 0),
        ("encode missing.npz out.tw 2> /dev/full", 3),
    ],
)
def test_closed_and_full_streams(line: str, code: int, folder: Path) -> None:
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    command = f"{sys.executable} -m tensorwire {line}"
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == code and done.stderr.count(b"\n") <= 1
    if code == 0 and "out.tw" in line:
        assert run("verify", folder / "out.tw") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only UTF-8 names")
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_names_that_are_not_utf_8(locale: str, folder: Path) -> None:
    environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(HOME)
    name = os.fsencode(folder) + b"/\xff\xe9.bin"
    with open(name, "wb") as file:
        file.write(b"hello")
    for arguments in ((b"digest", name), (b"encode", name, name + b".tw"), (b"verify", name + b".tw"),
                      (b"inspect", name + b".tw"), (b"decode", name + b".tw", name + b".back")):  # fmt: skip
        command = [sys.executable.encode(), b"-m", b"tensorwire", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert arguments[0] != b"digest" or name in done.stdout
    with open(name + b".back", "rb") as file:
        assert file.read() == b"hello"


# Signals

ENDING: Final = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] if hasattr(signal, "SIGHUP") else []


def large(folder: Path) -> None:
    values = {str(number): np.zeros(1 << 20, np.float32) for number in range(8)}
    tensorwire.safetensors.decode(tensorwire.encode(values), folder / "model.safetensors")
    np.savez(folder / "weights.npz", **values)
    np.save(folder / "array.npy", values["0"])
    (folder / "any.bin").write_bytes(bytes(16 << 20))
    tensorwire.save_file(values, folder / "in.tw")
    tensorwire.save_file(values["0"], folder / "array.tw")
    (folder / "file.tw").write_bytes(b"".join(tensorwire.encode_file(folder / "any.bin")))


@pytest.mark.skipif(not ENDING, reason="no such signals")
@writing
def test_killed_at_random_moments(verb: str, source: str, target: str, tmp_path: Path) -> None:
    """Nothing half written is left, and what was there stays. TENSORWIRE_EXHAUSTIVE=1: 60 times."""
    large(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "temporary").mkdir()
    path = tmp_path / "out" / target
    environment = {**os.environ, "PYTHONPATH": str(HOME), "TMPDIR": str(tmp_path / "temporary")}
    rng, began = random.Random(f"{verb} {target}"), time.monotonic()
    assert process(verb, tmp_path / source, path).communicate() and path.exists()
    whole, longest = path.read_bytes(), time.monotonic() - began
    for number in range(60 if os.environ.get("TENSORWIRE_EXHAUSTIVE") == "1" else 6):
        path.write_bytes(b"old")
        to = "-" if number % 3 == 2 else path
        extra = ["--to", target.rpartition(".")[2].replace("bin", "file")] if verb == "decode" else []
        command = process(verb, tmp_path / source, to, "--force", *extra, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1) * longest)
        ending = ENDING[number % len(ENDING)]
        command.send_signal(ending)
        if number % 2:
            command.send_signal(ending)  # as `timeout` does
        _, said = command.communicate(timeout=60)
        # Before it has begun and once it is done, the interpreter alone is there, and the signal kills it.
        assert command.returncode in (0, 128 + ending, -ending), said
        if command.returncode == 128 + ending:
            assert said == b"" or b"->" in said
        assert path.read_bytes() == b"old" or path.stat().st_size == len(whole)
        assert os.listdir(path.parent) == [path.name] and not os.listdir(tmp_path / "temporary")


@pytest.mark.skipif(not ENDING, reason="no such signals")
@pytest.mark.parametrize("ending", ENDING)
def test_a_stopped_receiver_keeps_its_data_and_says_so(ending: int, folder: Path) -> None:
    out = folder / "received.bin"
    receiver = process("receive", out, "--listen", "127.0.0.1:0")
    where = receiver.stderr.readline().split()[-1].decode()
    sender = process("send", "-", where)
    sender.stdin.write(bytes(3 << 20))
    sender.stdin.flush()
    until(lambda: any(part.stat().st_size > 1 << 20 for part in folder.glob(".received*.part")))
    receiver.send_signal(ending)
    _, said = receiver.communicate(timeout=30)
    sender.kill()
    sender.communicate()
    assert receiver.returncode == 128 + ending
    assert b"are kept for the next attempt" in said and b"Traceback" not in said
    assert not out.exists()


@pytest.mark.skipif(not ENDING, reason="no such signals")
def test_ignored_signals_stay_ignored(folder: Path) -> None:
    """`nohup tensorwire ...`"""
    ignored: Callable[[], object] = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    command = process("encode", "-", folder / "out.tw", preexec_fn=ignored)
    command.stdin.write(bytes(1 << 20))
    command.stdin.flush()
    until(lambda: bool(list(folder.glob(".out*.part"))))
    command.send_signal(signal.SIGHUP)
    command.communicate()
    assert command.returncode == 0 and (folder / "out.tw").exists()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.002)


# fl run


TASK: Final = """
import time
import numpy as np
from tensorwire.fl.task import Task

def task(*, clients, wait=0.0):
    def train(state, client, round):
        time.sleep(wait)
        return {"w": state["w"] + 0.5}, 1.0, {}
    return Task(lambda: {"w": np.zeros(64, np.float32)}, train, lambda state: float(np.asarray(state["w"]).sum()))
"""


def children(parent: int) -> list[int]:
    """Processes that `parent` has started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = entry.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == parent and rest.split()[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("ending", [*ENDING, getattr(signal, "SIGKILL", None)])
def test_a_killed_run_ends_its_processes(ending: int, tmp_path: Path) -> None:
    (tmp_path / "mytask.py").write_text(TASK)
    command = ["fl", "run", "--task", "mytask:task", "--set", "wait=60", "--clients", "2", "--out", "run"]
    parent = process(*command, cwd=tmp_path)
    until((tmp_path / "run" / "client-1" / "model.tw").exists)
    started = children(parent.pid)
    assert len(started) == 3
    parent.send_signal(ending)
    parent.communicate(timeout=30)
    if ending == getattr(signal, "SIGKILL", None):  # nobody is left to wait for them
        until(lambda: not any(map(running, started)))
    assert not any(map(running, started))
    assert parent.returncode in (128 + ending, -ending)


def test_a_task_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mytask.py").write_text(TASK)
    command = ["fl", "run", "--task", "mytask:task", "--clients", "1", "--rounds", "2", "--out", "run"]
    done = process(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HOME), "PYTHONSAFEPATH": "1"})
    assert done.wait(60) == 0, done.stderr.read()
    assert b"in 2 rounds" in done.communicate()[1]
    log = (tmp_path / "run" / "client-0.log").read_text()
    assert "round 0: received the model" in log and "round 1: delivered the update" in log
    assert process(*command, cwd=tmp_path).wait(60) == 2  # there is a run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--clients", "0"], "clients must be above 0"),
        (["client", "127.0.0.1:1", "--folder", "f", "--number", "0", "--clients", "0"], "--clients (0)"),
        (["client", "127.0.0.1:1", "--folder", "f", "--number", "4"], "--number must be at least 0"),
        (["run", "--task", "nothing:here"], "no task 'nothing:here'"),
    ],
)
def test_invalid_plans_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fl", *arguments]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


# Limits, tables


def test_limits_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["verify", "in.tw"], ["inspect", "in.tw"], ["decode", "in.tw", "x.npz"],
                 ["encode", "model.safetensors", "x.tw"]):  # fmt: skip
        command = [verb[0], *(folder / name for name in verb[1:])]
        assert run(*command, "--limit", "item=1KiB") == 1
        assert "limit" in capsys.readouterr().err
        assert run(*command, "--limit", "item=1KiB", "--limit", "item=2TiB") == 0
    for wrong in ("items", "steam=1", "item=-1", "item=1XB", "item=1.5GiB"):
        with pytest.raises(SystemExit):
            run("verify", folder / "in.tw", "--limit", wrong)
    assert "did you mean stream?" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_tables_fit_the_terminal(tmp_path: Path) -> None:
    import pty

    names = {
        f"model.layers.{n}.feed_forward.gate_projection.weight": np.zeros((1000, 1200), np.float32) for n in (1, 2)
    }
    tensorwire.save_file(names, tmp_path / "long.tw", codec="nf4:blocksize=128,double_quant=true")
    ours, theirs = pty.openpty()
    command = process("inspect", tmp_path / "long.tw", stdout=theirs, env={
        **os.environ, "PYTHONPATH": str(HOME), "COLUMNS": "80"})  # fmt: skip
    command.wait(60)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert max(map(len, text.splitlines()[:-1])) <= 80 and "nf4" in text and "1000 x 1200" in text
    piped = process("inspect", tmp_path / "long.tw").communicate()[0].decode()
    assert all(name in piped for name in names)


# Sharded checkpoints


def test_a_sharded_checkpoint_is_one_model_both_ways(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = folder / "shards"
    assert run("decode", folder / "in.tw", shards, "--max-shard-size", "20kB") == 0
    assert "files" in capsys.readouterr().err and len(list(shards.glob("*.safetensors"))) == 2
    index = next(shards.glob("*.index.json"))
    for source in (shards, index):
        assert run("encode", source, folder / "back.tw", "--force") == 0
        got = tensorwire.load_file(folder / "back.tw")
        assert all(np.array_equal(got[name], MODEL[name]) for name in MODEL)
    before = contents(shards)
    for source in (shards, index):
        for target in (index, next(shards.glob("*.safetensors"))):
            assert run("encode", source, target, "--force") == 2
    assert run("decode", folder / "in.tw", shards, "--max-shard-size", "20kB") != 0
    assert run("decode", folder / "in.tw", "-", "--max-shard-size", "20kB") == 2
    assert contents(shards) == before


def test_content_digests_take_limits_and_no_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", folder / "model.safetensors", folder / "m.tw") == 0
    assert run("digest", folder / "m.tw", "--content", "--limit", "items=1") == 1
    assert "items is" in capsys.readouterr().err
    assert run("digest", folder / "m.tw", "--content", "--limit", "items=100") == 0
    for arguments in ((folder / "m.tw", "--limit", "items=100"), ("-", "--content")):
        assert run("digest", *arguments) == 2
        assert "--content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "m.tw", "--limit", "items"], "'items' is not NAME=VALUE, as in items=1000"),
        (["verify", "m.tw", "--limit", "STREAM=1KB"], "there is no limit 'STREAM'; did you mean stream?"),
        (["decode", "m.tw", "out", "--max-shard-size", "0"], "must be at least one byte"),
        (["patch", "m.tw", "p.tw", "out", "--max-shard-size", "0"], "must be at least one byte"),
        (["patch", "-", "p.tw", "out.tw"], "BASE and OUT must be files"),
        (["diff", "-", "new.tw", "out.tw"], "which stdin cannot be: give files"),
        (["send", "m.tw", "localhost:99999"], "there is no port 99999: the last is 65535"),
        (["send", "m.tw", "localhost:http"], "'localhost:http' is not HOST:PORT"),
        (["certificate", "a b"], "NAME must be a host name or an address"),
        (["certificate", "../a"], "NAME must be a host name or an address"),
        (["bench", "speed", "--size-mib", "abc"], "'abc' is not a number from 1 on"),
        (["bench", "speed", "--threads", "0"], "'0' is not a number from 1 on"),
    ],
)
def test_what_an_argument_must_be_is_said(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    try:
        code = run(*arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_of_two_shards_with_one_tensor_both_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = folder / "twice"
    twice.mkdir()
    for name in ("a", "b"):
        shutil.copy(folder / "model.safetensors", twice / f"{name}.safetensors")
    assert run("encode", twice, folder / "never.tw") == 1
    assert "'a.safetensors' and 'b.safetensors'" in capsys.readouterr().err
