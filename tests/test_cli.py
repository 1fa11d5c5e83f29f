"""The command line: what each verb reads and writes, and what its exit code says."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network import Certificates

import tensorwire
from tensorwire.bench.models import from_state_dict
from tensorwire.cli import inputs, main
from tensorwire.cli.common import _filled
from tensorwire.cli.network import address
from tensorwire.cli.send import _transfer
from tensorwire.codecs import Encoded
from tensorwire.errors import TruncatedError
from tensorwire.transfer import Conversation, Offer, Recording, RefusedError, Regenerated, Send, greet, send_stream
from tensorwire.transports import TcpTransport
from tensorwire.wire.drive import as_source, pull

MODEL = {
    "w": (np.random.default_rng(1).standard_normal((40, 130)) * 0.02).astype(np.float32),
    "steps": np.arange(5, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "model.npz", **MODEL)
    return tmp_path / "model.npz"


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    tensorwire.save_file(MODEL, tmp_path / "model.tw", codec="nf4")
    return tmp_path / "model.tw"


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    tensorwire.safetensors.decode(tensorwire.encode(MODEL), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# `python -m` puts the working directory first: run where the package under test is, installed or not.
HOME = Path(tensorwire.__file__).parents[1]


def shell(arguments: list[object], data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "tensorwire", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=60, cwd=HOME)


def test_arrays_round_trip(npz: Path, tmp_path: Path) -> None:
    assert run("encode", npz, tmp_path / "a.tw") == 0
    assert run("decode", tmp_path / "a.tw", tmp_path / "b.npz") == 0
    with np.load(tmp_path / "b.npz") as got:
        assert set(got) == set(MODEL)
        assert all(got[name].dtype == MODEL[name].dtype for name in MODEL)
        assert all(np.array_equal(got[name], MODEL[name]) for name in MODEL)


def test_an_encoded_container_file_has_an_index(npz: Path, tmp_path: Path) -> None:
    run("encode", npz, tmp_path / "a.tw", "--codec", "nf4")
    with tensorwire.open_file(tmp_path / "a.tw") as file:
        assert file.item("w").codec[0][0] == 6
        assert np.array_equal(file["steps"], MODEL["steps"])


def test_a_single_array_is_a_root(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", MODEL["w"])
    run("encode", tmp_path / "x.npy", tmp_path / "x.tw")
    assert np.array_equal(tensorwire.load_file(tmp_path / "x.tw"), MODEL["w"])
    assert run("decode", tmp_path / "x.tw", tmp_path / "y.npz") == 0
    with np.load(tmp_path / "y.npz") as got:
        assert np.array_equal(got["arr_0"], MODEL["w"])


def test_safetensors_round_trip(safetensors: Path, tmp_path: Path) -> None:
    assert run("encode", safetensors, tmp_path / "a.tw", "--codec", "raw|zstd") == 0
    assert run("decode", tmp_path / "a.tw", tmp_path / "back.safetensors") == 0
    assert (tmp_path / "back.safetensors").read_bytes() == safetensors.read_bytes()


def test_a_checkpoint_that_loads_safely(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.from_numpy(MODEL["w"]), "epoch": 3}, tmp_path / "c.pt")
    assert run("encode", tmp_path / "c.pt", tmp_path / "c.tw") == 0
    got = tensorwire.load_file(tmp_path / "c.tw")
    assert np.array_equal(got["w"], MODEL["w"]) and got["epoch"] == 3


def test_a_checkpoint_that_needs_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"path": tmp_path}, tmp_path / "c.pt")
    assert run("encode", tmp_path / "c.pt", tmp_path / "c.tw") == 1
    assert "weights_only" in capsys.readouterr().err
    assert not (tmp_path / "c.tw").exists()


def test_any_file_through_pipes() -> None:
    data = bytes(range(256)) * 20_000
    encoded = shell(["encode", "-", "-", "--codec", "zstd"], data)
    assert encoded.returncode == 0 and len(encoded.stdout) < len(data) / 10
    decoded = shell(["decode", "-", "-"], encoded.stdout)
    assert (decoded.returncode, decoded.stdout) == (0, data)
    assert re.fullmatch(rb"[\d.]+ kB -> 5.1 MB\n", decoded.stderr)


def test_tensors_through_a_pipe_to_safetensors(safetensors: Path) -> None:
    encoded = shell(["encode", safetensors, "-"])
    decoded = shell(["decode", "-", "-", "--to", "safetensors"], encoded.stdout)
    assert decoded.stdout == safetensors.read_bytes()


def test_a_reader_may_close_the_pipe_early(stream: Path) -> None:
    command = f"{sys.executable} -m tensorwire inspect {stream} --frames --json | head -c 20"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60, cwd=HOME)
    assert len(done.stdout) == 20 and done.stderr == b""


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_every_truncation_and_every_flip_is_refused(verb: str, tmp_path: Path) -> None:
    whole = tensorwire.dumps({"x": np.arange(3, dtype=np.float32)}, codec="int8")
    broken = tmp_path / "broken.tw"
    for cut in range(0, len(whole), 7):
        broken.write_bytes(whole[:cut])
        assert run(verb, broken, "--json") == 1
    for place in range(0, len(whole), 3):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert run(verb, broken, "--json") == 1
    broken.write_bytes(whole + b"x")
    assert run(verb, broken) == 1


def test_a_broken_stream_gives_one_line_and_no_output(stream: Path, tmp_path: Path) -> None:
    broken = stream.read_bytes()[:-1]
    out = tmp_path / "out.safetensors"
    done = shell(["decode", "-", out], broken)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"tensorwire: error: ") and done.stderr.count(b"\n") == 1
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_bytes_after_the_stream_leave_no_file(tmp_path: Path) -> None:
    data = b"".join(tensorwire.encode_file(io.BytesIO(b"hello"))) + b"!"
    assert shell(["decode", "-", tmp_path / "f"], data).returncode == 1
    assert not list(tmp_path.iterdir())


def test_verify_reports_what_it_read(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", stream) == 0
    assert capsys.readouterr().out.startswith("ok: 4 items")
    assert run("verify", stream, "--sha256") == 0
    assert f"{sha256(stream.read_bytes()).hexdigest()}  {stream}" in capsys.readouterr().out
    assert run("verify", stream, "--json", "--sha256") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["bytes"] == stream.stat().st_size and len(result["stream_digest"]) == 64
    assert result["sha256"] == sha256(stream.read_bytes()).hexdigest() != result["stream_digest"]


def test_verify_finds_errors_that_checksums_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(tensorwire.codecs.Int8):
        """Writes a NaN for its absmax, under a good checksum."""

        def encode(self, *arguments: object) -> Encoded:
            payload = super().encode(*arguments).payload
            payload[:4] = 0xFF
            return Encoded(payload)

    (tmp_path / "wrong.tw").write_bytes(tensorwire.dumps({"x": np.ones(8, np.float32)}, codec=Wrong()))
    assert run("inspect", tmp_path / "wrong.tw") == 0
    assert run("verify", tmp_path / "wrong.tw", "--json") == 1
    captured = capsys.readouterr()
    assert '"ok": false' in captured.out and "absmax" in captured.err


def test_inspect_counts_every_byte(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", stream, "--json", "--frames") == 0
    report = json.loads(capsys.readouterr().out)
    frames, totals = report["frames"], report["totals"]
    assert [frame["type"] for frame in frames][:2] == ["STREAM", "ITEM"]
    assert [frame["type"] for frame in frames][-2:] == ["INDEX", "END"]
    assert [frame["sequence"] for frame in frames] == list(range(totals["frames"]))
    assert totals["wire_bytes"] == stream.stat().st_size
    assert totals["bytes"] == sum(array.nbytes for array in MODEL.values())
    assert report["error"] is None
    items = {item["name"]: item for item in report["items"]}
    assert (items["w"]["dtype"], items["w"]["shape"], items["w"]["codec"]) == ("float32", [40, 130], "nf4")
    assert (items["steps"]["codec"], items["steps"]["ratio"]) == ("raw", 1.0)
    assert all(item["complete"] for item in items.values())


def test_inspect_describes_a_stream(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", stream) == 0
    summary = capsys.readouterr().out
    assert "| 'w'" in summary and "40 x 130" in summary and "4 items in" in summary
    assert run("inspect", stream, "--frames") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#1 'w' float32 [40, 130] nf4" in lines[2] and "stream digest" in lines[-2]


def test_inspect_shows_where_a_stream_breaks(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(stream.read_bytes())
    run("inspect", stream, "--frames", "--json")
    frame = next(f for f in json.loads(capsys.readouterr().out)["frames"] if f["type"] == "DATA")
    data[frame["offset"] + 200] ^= 1
    stream.write_bytes(data)
    assert run("inspect", stream, "--frames") == 1
    captured = capsys.readouterr()
    assert f"{frame['offset']}  DATA" in captured.out and "breaks here" in captured.out
    assert "payload checksum mismatch" in captured.err
    assert run("inspect", stream, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["error"]["kind"] == "CorruptError" and report["broken_frame"]["offset"] == frame["offset"]
    assert not report["items"][1]["complete"]


def test_inspect_names_aliases_values_and_containers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = np.ones(4, np.float32)
    tensorwire.save_file({"a": shared, "b": shared, "n": 1, "l": [shared + 1]}, tmp_path / "t.tw", metadata={"k": "v"})
    assert run("inspect", tmp_path / "t.tw", "--frames") == 0
    out = capsys.readouterr().out
    assert "'b' is #1" in out and "'n' value of 1 byte" in out and "'l' list" in out and "1 metadata" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["encode", "missing.npz", "out.tw"], 3),
        (["decode", "missing.tw", "out.npz"], 3),
        (["verify", "missing.tw"], 3),
        (["bench", "nonsense"], 2),
        (["bench", "size", "--model", "nonsense"], 2),
        (["bench", "size", "--model", "json:nonsense"], 2),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out.count("\n") <= 2 and "error: " in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("verb", ["verify", "inspect", "decode"])
def test_a_file_that_is_not_a_stream_is_identified(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointer, cut = tmp_path / "pointer.tw", tmp_path / "cut.tw"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    cut.write_bytes(tensorwire.dumps({"w": np.ones(9)})[:-1])
    more = [str(tmp_path / "out.npz")] if verb == "decode" else []
    assert main([verb, str(pointer), *more]) == 1
    said = capsys.readouterr().err
    assert "this is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`" in said
    assert "pointer.tw" in said
    assert main([verb, str(cut), *more]) == 1
    said = capsys.readouterr().err
    assert "the input ended before the end frame" in said and "cut.tw" in said


@pytest.mark.parametrize("verb", [["receive", "out.tw"], ["fl", "server", "--state", "state"]])
def test_listening_beyond_this_machine_suggests_a_certificate(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if verb[0] == "fl":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    assert main([*verb, "--listen", "0.0.0.0"]) == 3
    assert "`tensorwire certificate` makes a pair" in capsys.readouterr().err


def test_a_port_in_use_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["receive", str(tmp_path / "out.tw"), "--listen", f"127.0.0.1:{port}"]) == 3
    assert capsys.readouterr().err.endswith(f"cannot listen on 127.0.0.1:{port}: Address already in use\n")


@pytest.mark.parametrize("arguments", [[], ["encode", "a", "b", "--codec", "nonsense"], ["bench", "--threads", "0"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


def test_an_impossible_encoding_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "nan.npz", x=np.array([1, np.nan], np.float32))
    assert run("encode", tmp_path / "nan.npz", tmp_path / "nan.tw", "--codec", "nf4") == 1
    assert "element 1" in capsys.readouterr().err
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    assert run("encode", tmp_path / "object.npy", tmp_path / "o.tw") == 1
    (tmp_path / "text.txt").write_text("hi")
    assert run("encode", tmp_path / "text.txt", tmp_path / "o.tw", "--codec", "nf4") == 1
    assert [path.name for path in tmp_path.glob("*.tw")] == []


def test_an_npz_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    bits = np.zeros(2, np.dtype(np.uint16, metadata={"tensorwire": "bfloat16"}))
    for obj in ({"x": bits}, {"n": 3}):
        tensorwire.save_file(obj, tmp_path / "in.tw")
        assert run("decode", tmp_path / "in.tw", tmp_path / "out.npz") == 1
        assert not (tmp_path / "out.npz").exists()


def test_an_archive_holds_no_paths_outside_its_folder(tmp_path: Path) -> None:
    """A name is data: neither what it was sent as, nor where an item stood, may become a place when it is unpacked."""
    names = ["../../.ssh/keys", "/etc/cron.d/x", "C:x", "a\\..\\b", "ok", "dense/kernel:0"]
    value = {name: np.full(3, number) for number, name in enumerate(names)} | {"m": {"w": np.ones(2)}}
    tensorwire.save_file(value, tmp_path / "in.tw")
    assert run("decode", tmp_path / "in.tw", tmp_path / "out.npz") == 0
    with np.load(tmp_path / "out.npz") as got:
        assert len(got.files) == len(names) + 1 and "dense/kernel:0" in got.files and "%2Fm/w" in got.files
        for name in got.files:
            assert ".." not in name.split("/") and name[0] != "/" and "\\" not in name and not name.startswith("C:")
    tensorwire.save_file({"": np.zeros(3), "arr_0": np.ones(3)}, tmp_path / "two.tw")
    assert run("decode", tmp_path / "two.tw", tmp_path / "two.npz") in (0, 1)
    if (tmp_path / "two.npz").exists():
        assert len(np.load(tmp_path / "two.npz").files) == 2


def test_json_reports_errors_about_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "missing.tw", tmp_path):
        assert run("verify", path, "--json") == 3
        said = json.loads(capsys.readouterr().out)
        assert said["ok"] is False and str(path) in said["error"]["detail"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_model_in_a_named_pipe_is_read(npz: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.npz").write_bytes(npz.read_bytes()))
    writer.start()
    assert run("encode", tmp_path / "pipe.npz", tmp_path / "a.tw") == 0
    writer.join()
    assert tensorwire.load_file(tmp_path / "a.tw").keys() == MODEL.keys()


def test_a_state_dict_of_a_module_is_a_model() -> None:
    torch = pytest.importorskip("torch")
    model = from_state_dict("linear", torch.nn.Linear(4, 3))
    assert {name: view.shape for name, view in model.tensors.items()} == {"weight": (3, 4), "bias": (3,)}
    assert from_state_dict("numpy", lambda: MODEL).nbytes == sum(array.nbytes for array in MODEL.values())


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "bench",
        "encode",
        "decode",
        "diff",
        "patch",
        "inspect",
        "verify",
        "digest",
        "send",
        "receive",
        "certificate",
        "fl",
    ],
)
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main([*filter(None, [verb]), "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "examples:" in text
    assert max(map(len, text.splitlines())) <= 80
    assert verb or "exit codes:" in text


def test_help_is_wrapped_as_prose_rows_and_commands() -> None:
    text = """\
rows of two columns:
  one    a text that goes on
         for a while
  two *  more

Prose that goes
on as well.

examples:
  tensorwire encode with a command that is longer
      --than a line
"""
    assert _filled(text, 24).splitlines() == [
        "rows of two columns:",
        "  one    a text that",
        "         goes on for a",
        "         while",
        "  two *  more",
        "",
        "Prose that goes on as",
        "well.",
        "",
        "examples:",
        "  tensorwire encode with a command that is longer",
        "      --than a line",
    ]
    assert _filled(_filled(text, 24), 100) == _filled(text, 100)


# send and receive.


@contextmanager
def receiving(*arguments: object) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """`tensorwire receive` on a free port, and the address it listens on."""
    command = [sys.executable, "-m", "tensorwire", "receive", *map(str, arguments)]
    if "--listen" not in arguments:
        command += ["--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HOME)
    try:
        line = process.stderr.readline().decode()
        found = re.match(r"listening on (.*)$", line)
        assert found, line + process.stderr.read().decode()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, bytes, str]:
    out, error = process.communicate(timeout=30)
    return process.returncode, out, error.decode()


def test_a_model_goes_to_another_machine(safetensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with receiving(tmp_path / "out.safetensors", "--json") as (process, where):
        assert run("send", safetensors, where, "--json") == 0
        code, out, _ = ended(process)
    sent, received = json.loads(capsys.readouterr().out), json.loads(out)
    assert (
        code == 0
        and sent["stream_digest"] == received["stream_digest"]
        and sent["moved"] == sent["bytes"] == received["bytes"]
    )
    assert (tmp_path / "out.safetensors").read_bytes() == safetensors.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.tw", "out.npz"])
def test_out_decides_the_kind_of_file(name: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with receiving(tmp_path / name) as (process, where):
        assert run("send", npz, where, "--codec", "nf4") == 0
        assert "sent" in capsys.readouterr().err
        code, _, error = ended(process)
    assert code == 0 and "stream digest" in error
    if name == "out.tw":
        assert run("verify", tmp_path / name) == 0
    else:
        with np.load(tmp_path / name) as got:
            assert np.array_equal(got["steps"], MODEL["steps"])


def test_any_file_from_stdin_to_stdout() -> None:
    data = bytes(range(256)) * 9_999
    with receiving("-") as (process, where), ThreadPoolExecutor(1) as executor:
        came = executor.submit(ended, process)  # the sender has its receipt once the pipe has taken everything
        assert shell(["send", "-", where], data).returncode == 0
        assert came.result()[:2] == (0, data)


def test_no_receipt_if_nobody_reads_the_output(tmp_path: Path) -> None:
    """The reader of the pipe leaves, as `head` does, or reads nothing and the receiver is stopped."""
    (tmp_path / "in.bin").write_bytes(bytes(9 << 20))
    with receiving("-") as (process, where):
        sender = subprocess.Popen(
            [sys.executable, "-m", "tensorwire", "send", str(tmp_path / "in.bin"), where], cwd=HOME
        )
        assert len(process.stdout.read(1000)) == 1000
        process.stdout.close()
        assert sender.wait(60) == 1
        assert process.wait(60) == 3
    with receiving("-") as (process, where):
        command = ["send", str(tmp_path / "in.bin"), where, "--patience", "0.1"]
        sender = subprocess.Popen([sys.executable, "-m", "tensorwire", *command], cwd=HOME)
        assert len(process.stdout.read(1000)) == 1000
        process.terminate()
        assert process.wait(60) == 143
        assert sender.wait(60) == 3
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "tensorwire", "receive", "-", "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, cwd=HOME)
        where = process.stderr.readline().decode().split()[-1]
        assert run("send", tmp_path / "in.bin", where) == 1
        process.stderr.close()
        assert process.wait(60) == 3


def test_no_other_sender_is_admitted_before_the_goodbye(tmp_path: Path) -> None:
    """A transfer is through when its sender is told so, not when the sender has said that it heard."""
    with receiving(tmp_path / "out.tw", "--force") as (process, where):
        host, _, port = where.rpartition(":")
        with TcpTransport.connect(host, int(port)) as first, TcpTransport.connect(host, int(port)) as second:
            first.run(greet())
            sending = send_stream(Offer(b"A"), Regenerated(lambda: tensorwire.encode(MODEL)))
            with pytest.raises(Gone):
                first.run(until_goodbye(sending))
            whole = (tmp_path / "out.tw").read_bytes()
            second.run(greet())
            with pytest.raises(RefusedError) as caught:
                second.run(send_stream(Offer(b"B"), Regenerated(lambda: tensorwire.encode({"w": MODEL["steps"]}))))
            assert (caught.value.kind, caught.value.retryable) == ("done", False)
            with TcpTransport.connect(host, int(port)) as again:
                again.run(greet())
                receipt = again.run(send_stream(Offer(b"A"), Regenerated(lambda: tensorwire.encode(MODEL))))
            assert receipt.sent == 0 and receipt.digest == whole[-32:].hex()
        assert ended(process)[0] == 0
    assert (tmp_path / "out.tw").read_bytes() == whole


@pytest.mark.parametrize("source", ["in.safetensors", "in.npz", "in.bin", "shards"])
def test_a_source_written_to_while_it_is_sent_is_refused(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / source
    model = {f"w{n}": np.ones(300_000, np.float32) for n in range(9)}
    np.savez(tmp_path / "in.npz", **model)
    (tmp_path / "in.bin").write_bytes(bytes(9 << 20))
    tensorwire.safetensors.decode(tensorwire.encode(model), tmp_path / "in.safetensors")
    tensorwire.safetensors.decode(tensorwire.encode(model), tmp_path / "shards", max_shard_size=3 << 20)
    changed = max(path.glob("*.safetensors")) if path.is_dir() else path
    before = changed.read_bytes()

    def tracked(buffers: Iterator[Any], *_: object) -> Iterator[Any]:
        for number, buffer in enumerate(buffers):
            if number == 5:
                with changed.open("r+b") as file:
                    file.seek(-4, os.SEEK_END)
                    file.write(b"torn")
            yield buffer

    name = "out.bin" if source == "in.bin" else "out.tw"
    with receiving(tmp_path / name) as (process, where):
        with monkeypatch.context() as patch:
            patch.setattr("tensorwire.cli.send.tracked", tracked)
            assert run("send", path, where, "--patience", "0.1") == 1
        assert "changed while it was being sent" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
        changed.write_bytes(before)
        assert run("send", path, where) == 0
        assert ended(process)[0] == 0


def test_a_named_pipe_is_sent_although_its_times_change(tmp_path: Path) -> None:
    """As the shell's <(command) gives."""
    os.mkfifo(tmp_path / "pipe")
    data = bytes(range(256)) * 9_999

    def write() -> None:
        with (tmp_path / "pipe").open("wb") as pipe:
            pipe.write(data)

    with receiving(tmp_path / "out.bin") as (process, where), ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write)
        assert run("send", tmp_path / "pipe", where) == 0
        writing.result()
        assert ended(process)[0] == 0
    assert (tmp_path / "out.bin").read_bytes() == data


def test_another_file_of_the_same_name_size_and_time_is_sent(tmp_path: Path) -> None:
    """As from a git checkout, an OCI layer or Nix. Half of the first was received."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "in.bin").write_bytes(folder.encode() * (3 << 20))
        os.utime(tmp_path / folder / "in.bin", (1, 1))
    out = tmp_path / "out.bin"
    stream = b"".join(tensorwire.encode_file(tmp_path / "a" / "in.bin"))
    arguments = Namespace(input=str(tmp_path / "a" / "in.bin"), codec="raw", limits=None, kind=None)
    with inputs.opened(arguments) as source:
        transfer = _transfer(source.path, source)
    place = Recording(out, transfer)
    with pytest.raises(TruncatedError):
        list(pull(place, as_source(stream[: 2 << 20])))
    place.close()
    with receiving(out) as (process, where):
        assert run("send", tmp_path / "b" / "in.bin", where) == 0
        assert ended(process)[0] == 0
    assert out.read_bytes() == b"b" * (3 << 20)


class Gone(Exception):
    """A sender is no more."""


def until_goodbye(sending: Conversation[Any]) -> Conversation[Any]:
    """A conversation of a sender that has its receipt, and is silent then."""
    step = next(sending)
    sends = 0
    while True:
        sends += isinstance(step, Send)
        if sends == 3:
            raise Gone
        step = sending.send((yield step))


@pytest.mark.parametrize("name", ["out.tw", "out.npz"])
def test_a_file_that_appears_at_out_meanwhile_is_kept(name: str, npz: Path, tmp_path: Path) -> None:
    def late() -> Iterator[Any]:
        yield from tensorwire.encode(MODEL)
        (tmp_path / name).write_bytes(b"mine")

    with receiving(tmp_path / name) as (_, where):
        host, _, port = where.rpartition(":")
        with TcpTransport.connect(host, int(port)) as transport:
            transport.run(greet())
            with pytest.raises(RefusedError, match="already exists"):
                transport.run(send_stream(Offer(b"t"), Regenerated(late)))
    assert (tmp_path / name).read_bytes() == b"mine"


def test_an_unwanted_kind_is_refused_and_the_receiver_continues(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.bin").write_bytes(b"hello")
    with receiving(tmp_path / "out.bin") as (process, where):
        assert run("send", npz, where) == 1
        error = capsys.readouterr().err
        assert "the receiver expects a file" in error and str(tmp_path) not in error.replace(str(npz), "")
        assert run("send", tmp_path / "in.bin", where) == 0
        assert ended(process)[0] == 0
    assert (tmp_path / "out.bin").read_bytes() == b"hello"
    assert not list(tmp_path.glob(".*"))


def test_a_nonsense_peer_does_not_end_the_receiver(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"hello")
    with receiving(tmp_path / "out.bin") as (process, where):
        host, _, port = where.rpartition(":")
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01" + bytes(50), b""):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(words)
        assert run("send", tmp_path / "in.bin", where) == 0
        code, _, error = ended(process)
    assert code == 0 and error.count("does not speak this protocol") == 2


def test_tls_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificates = Certificates(tmp_path)
    (tmp_path / "in.bin").write_bytes(b"hello")
    cert, key = certificates.server
    with receiving(tmp_path / "out.bin", "--cert", cert, "--key", key, "--ca", certificates.ca) as (process, where):
        assert run("send", tmp_path / "in.bin", where, "--ca", certificates.foreign_ca) == 1
        assert "certificate is refused" in capsys.readouterr().err
        ours = ["--cert", certificates.client[0], "--key", certificates.client[1]]
        assert run("send", tmp_path / "in.bin", where, "--ca", certificates.ca, *ours) == 0
        assert ended(process)[0] == 0
    assert (tmp_path / "out.bin").read_bytes() == b"hello"


def test_ipv6_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"hello")
    with receiving(tmp_path / "out.bin", "--listen", "[::1]:0") as (process, where):
        assert where.startswith("[::1]:")
        assert run("send", tmp_path / "in.bin", where) == 0
        assert ended(process)[0] == 0


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("host:1", ("host", 1)),
        ("host", ("host", 7453)),
        (":1", ("", 1)),
        ("[::1]:1", ("::1", 1)),
        ("[::1]", ("::1", 7453)),
        ("::1", ("::1", 7453)),
        ("2001:db8::7", ("2001:db8::7", 7453)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert address(text) == parsed


@pytest.mark.parametrize("text", ["host:x", "host:70000", "host:-1"])
def test_invalid_addresses_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        address(text)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["send", "missing.bin", "127.0.0.1:1"], 3),
        (["send", __file__, ":1"], 2),
        (["send", __file__, "host:1", "--cert", "x"], 2),
        (["send", __file__, "host:1", "--plaintext", "--ca", "x"], 2),
        (["send", __file__, "127.0.0.1:1", "--patience", "0.1"], 3),
        (["send", __file__, "192.0.2.1:1", "--cert", "missing.pem", "--key", "missing.key"], 1),
        (["receive", "x", "--listen", "0.0.0.0:0"], 3),
        (["receive", "x", "--ca", "x"], 2),
        (["receive", "x", "--cert", "x"], 2),
        (["receive", "x", "--plaintext", "--cert", "x", "--key", "x"], 2),
        (["receive", os.path.join("missing", "folder"), "--listen", "192.0.2.1:0", "--plaintext"], 3),
    ],
)
def test_exit_codes_of_send_and_receive(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "error: " in captured.err and "Traceback" not in captured.err


def test_the_library_inspects_and_verifies_in_one_call(stream: Path) -> None:
    report, verified = tensorwire.inspect(stream), tensorwire.verify(stream)
    assert report.error is None and report.digest == verified.digest
    assert report.wire_size == verified.size == stream.stat().st_size
    assert [item.complete for item in report.items] == [True] * verified.items
    assert tensorwire.verify(stream.read_bytes()) == verified
    broken = stream.read_bytes()[:-200]
    assert isinstance(tensorwire.inspect(broken).error, tensorwire.TruncatedError)
    with pytest.raises(tensorwire.TruncatedError):
        tensorwire.verify(broken)


@pytest.mark.parametrize(
    ("ours", "theirs", "sender_says", "receiver_says"),
    [
        (True, [], "does it expect TLS", "does not use TLS"),
        (False, ["--ca", "authority.pem"], "does not use TLS", "does one end use TLS"),
        (True, ["--ca", "other.pem"], "certificate is refused", "refuses our certificate"),
    ],
)
def test_tls_mismatches_are_explained_at_both_ends(
    ours: bool,
    theirs: list[str],
    sender_says: str,
    receiver_says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.chdir(tmp_path)
    assert run("certificate", "localhost", "127.0.0.1") == 0
    (tmp_path / "elsewhere").mkdir()
    assert run("certificate", "elsewhere", "--folder", "elsewhere") == 0
    os.rename("elsewhere/authority.pem", "other.pem")
    (tmp_path / "in.bin").write_bytes(b"hello")
    secure = ["--cert", tmp_path / "localhost.pem", "--key", tmp_path / "localhost.key"] if ours else []
    with receiving(tmp_path / "out.bin", *secure) as (process, where):
        assert run("send", "in.bin", where, *theirs, "--patience", "0.3") in (1, 3)
        error = capsys.readouterr().err
        assert sender_says in error and where in error
        assert run("send", "in.bin", where, *(["--ca", "authority.pem"] if ours else [])) == 0
        code, _, said = ended(process)
    assert code == 0 and receiver_says in said
    assert (tmp_path / "out.bin").read_bytes() == b"hello"


def test_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("certificate", "a/b", "--folder", tmp_path) == 2
    assert run("certificate", "host", "--folder", tmp_path, "--days", 0) == 2
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert run("certificate", "host.example", "--folder", tmp_path) == 2
    assert "openssl req -x509" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("cryptography")
    assert run("certificate", "host.example", "192.0.2.7", "::1", "--folder", tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["authority.pem", "host.example.key", "host.example.pem"]
    assert os.name != "posix" or (tmp_path / "host.example.key").stat().st_mode & 0o077 == 0
    assert run("certificate", "other", "--folder", tmp_path) == 2  # it would replace authority.pem
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_send_reports_retries_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "in.bin").write_bytes(b"hello")
    assert run("send", tmp_path / "in.bin", f"127.0.0.1:{port}", "--patience", "0.3") == 3
    first, *_, last = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{port}" in first and "trying again" in first
    assert last.startswith("tensorwire: error: ") and f"127.0.0.1:{port}" in last
    assert run("send", tmp_path / "missing", f"127.0.0.1:{port}") == 3
    for option in ("--cert", "--key", "--ca"):
        pem = {"--cert": __file__, "--key": __file__, "--ca": __file__} | {option: tmp_path / "no.pem"}
        assert run("send", __file__, "host:1", *(word for pair in pem.items() for word in pair)) == 1
        assert "no.pem" in capsys.readouterr().err
