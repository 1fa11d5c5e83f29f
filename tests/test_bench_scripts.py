"""Every script of bench/ on something tiny: that it runs and what its output looks like, not how fast anything was."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tensorwire

BENCH = Path(__file__).parent.parent / "bench"
NUMBER = r"-?\d+(\.\d+)?"
SECONDS = rf"{NUMBER} s"


def run(script, *arguments, allowed=(0,)):
    """The lines that a script prints."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tensorwire.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # some import the script beside them
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in allowed, done.stderr
    return done.stdout.strip().splitlines()


def all_match(lines, *patterns):
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def native():
    return pytest.importorskip("tensorwire.kernels._native", reason="needs the C++ extension")


def test_age():
    title, _, _, _, *rows = run("age.py", "--rounds=1", "--seeds=1")
    assert re.fullmatch(rf"clients that pull apart: fp32 ends at {NUMBER} after 1 rounds", title)
    assert [row.split("|")[1].strip() for row in rows] == ["no feedback", "age 1", "age 0.9", "age 0.5"]


def test_aggregate():
    lines = run("aggregate.py", 2, "nf4")
    all_match(
        lines[2:],
        rf"2 MiB, nf4: difference encoded to \d+ MiB in {SECONDS}",
        rf"checked in {SECONDS}, \d+ MiB",
        *(rf"{count} clients averaged in {SECONDS}, \d+ MiB" for count in (2, 4, 8, 16)),
        r"a further client: -?[\d.]+ GB/s of fp32, -?[\d.]+ of memcpy \([\d.]+ GB/s\)",
    )


def test_bare_socket():
    all_match(run("bare_socket.py", "llama-tiny"), *[rf"bare {SECONDS}, tensorwire {SECONDS}"] * 3)


@pytest.mark.skipif(shutil.which("nice") is None, reason="needs the command nice")
def test_contention():
    places = ("alone", "beside two niced processes", "beside two equal processes")
    figures = rf"{NUMBER} GB/s with one thread, {NUMBER} with two"
    all_match(run("contention.py", "--mib=1", "--calls=1"), *(f"{place}: {figures}" for place in places))


def test_convergence(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    lines = run("convergence.py", "--tiny", f"--out={tmp_path}")
    runs = [json.loads(line) for line in (tmp_path / "convergence.json").read_text().splitlines()]
    settings = [(start, name) for start in ("random", "pre-trained") for name in ("fp32", "nf4")]
    assert [(run["start"], run["setting"]) for run in runs] == settings
    assert all(len(run["losses"]) == len(run["bytes"]) == 2 for run in runs)
    assert runs[1]["bytes"][1] < runs[0]["bytes"][1] / 6
    assert sum(line.startswith("| nf4 |") for line in lines) == 2
    assert (tmp_path / "convergence.md").read_text().strip().splitlines() == lines
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_exhaustive():
    tiers = native().supported()
    lines = run("exhaustive.py", "--every=1024")
    what = [f"{half} to float32" for half in ("float16", "bfloat16")]
    what += [f"{codec} {kind}" for codec in ("nf4", "fp4", "int8") for kind in ("float32", "float16", "bfloat16")]
    what += [f"float32 to {half} saturate={on}" for half in ("float16", "bfloat16") for on in (False, True)]
    assert lines == [f"{tier} {check}: 0 mismatches" for check in what for tier in tiers]


def test_many_tensors():
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    figures = rf"tensorwire {SECONDS}, safetensors {SECONDS}, ratio {NUMBER}"
    names = ("save", "load", "dumps", "loads", "open and read one")
    all_match(run("many_tensors.py", 100, 1), *(f"{name}: {figures}" for name in names))


def test_file_writes(tmp_path):
    all_match(run("file_writes.py", tmp_path, 8), *[rf"page cache {SECONDS}, written behind {SECONDS}"] * 3)


def test_fl_round():
    rows = [json.loads(line) for line in run("fl_round.py", "--size-mb=17", "--clients", 1, 2)]
    assert [row["clients"] for row in rows] == [1, 2]
    for row in rows:
        assert row["model_mb"] == 4 * (4096 * 1024) / 1e6
        assert len(row["seconds"]) == 2 and row["server_mib"] > 0
        assert 1 <= row["wire"] < 1.001


def test_fl_clients():
    rows = [json.loads(line) for line in run("fl_clients.py", "--size-mb=16", "--clients", 2, 20)]
    assert [row["clients"] for row in rows] == [2, 20] and not any(row["missing"] for row in rows)
    assert rows[1]["peak_mib"] < 1.1 * rows[0]["peak_mib"]


def test_fl_hours():
    rows = [json.loads(line) for line in run("fl_hours.py", "--seconds=0.1")]
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]


def test_idle_connections():
    lines = run("idle_connections.py", "--idle=2", "--trickling=2", "--mib=1", "--turns=1", allowed=(0, 1))
    row = json.loads("".join(lines))
    assert {"idle": 2, "trickling": 2, "mib": 1.0, "tls": False}.items() <= row.items()
    assert row["ratio"] == pytest.approx(row["crowded_s"] / row["alone_s"])


def test_convergence_updates(tmp_path):
    pytest.importorskip("matplotlib")
    lines = run("convergence_updates.py", "--tiny", "--out", tmp_path)
    row = rf"1 \| {NUMBER} \| ([+-]{NUMBER} % )?\| {NUMBER} \| \d+ \| {NUMBER} \| \d+ \| {NUMBER} \|"
    server, feedback = "DeMo k=40 normalized, server k=40", "DiLoCo nf4 with feedback"
    methods = ("AdamW", "DeMo k=32", server, feedback, "SparseLoCo k=64 2bit, rate 3")
    all_match(
        lines,
        rf"Loss at the start {NUMBER} nats a byte; 4 steps. Means of seeds \(lowest to highest\); least times.",
        "",
        *[r"\|.*\|"] * 2,
        *(rf"\| {name} \| {row}" for name in methods),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"updates.json", "updates.md", "updates.png"}
    runs = [json.loads(line) for line in (tmp_path / "updates.json").read_text().splitlines()]
    up, down = ({run["method"]: run[key] for run in runs} for key in ("bytes", "received"))
    assert tuple(up) == tuple(down) == methods
    # Without a server, a worker gets the messages of the three others; with one, a message like its own.
    assert down["DeMo k=32"] == 3 * up["DeMo k=32"][-1]
    assert down[server] < 1.1 * up[server][-1]


def test_integrity():
    figures = rf"{SECONDS} with, {SECONDS} without; pair by pair [+-]{NUMBER}%"
    lines = run("integrity.py", "--mib=2", "--turns=1")
    all_match(lines, *(f"{codec}: {figures}" for codec in ("raw", "bf16", "int8", "nf4")))


KERNELS = ["memcpy", "crc32c", "absmax"]
KERNELS += [f"{codec} {op}" for codec in ("nf4", "fp4", "int8", "linear") for op in ("encode", "decode")]
KERNELS += [f"{codec} {op}" for codec in ("float16", "bfloat16") for op in ("encode", "decode")]


def kernel_rows(*options):
    lines = run("kernels.py", "--mib=0.25", "--repeats=1", *options)
    return lines[2], [re.split(r" {2,}|(?<=[a-z]) (?= *\d)", line.strip()) for line in lines[3:]]


def test_kernels():
    tiers = native().supported()
    head, rows = kernel_rows()
    assert head.split() == ["0.25", "MiB", *tiers]
    assert [row[0] for row in rows] == KERNELS


def test_kernels_and_their_checksums():
    native()
    head, rows = kernel_rows("--checksums")
    assert head.split()[2:] == ["encode", "with", "CRC32C", "it", "costs"]
    assert [row[0] for row in rows] == ["nf4", "fp4", "int8", "int8-linear", "fp16", "bf16", "raw"]


def test_kernels_and_what_memory_allows():
    if "avx512" not in native().supported() or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler and AVX-512")
    head, rows = kernel_rows("--limits")
    assert head.split()[2:] == ["GB/s", "of", "memcpy", "bytes/element", "limit", "of", "it"]
    assert [row[0] for row in rows] == KERNELS


def test_partial_updates():
    lines = run("partial_updates.py", "--layers=3", "--every=0.05", "--mib=0.5", allowed=(0, 1))
    row = json.loads("".join(lines))
    assert (row["codec"], row["layer_mib"], len(row["delays_s"])) == ("nf4", 0.5, 3)
    assert all(delay > 0 for delay in row["delays_s"])


def test_flower_round():
    pytest.importorskip("flwr", reason="Flower is not installed here: tests/engines/run flower makes it an environment")
    if {name for _, name in socket.if_nameindex()} != {"lo"}:
        pytest.skip("it counts bytes in a network of its own: start pytest as the script says")
    lines = run("flower_round.py", "--model=adapters", "--scale=0.01", "--turns=1", "--sides", "plain", "ours")
    assert [line.split()[:2] for line in lines[2:4]] == [["plain", "1"], ["ours", "1"]]
    assert lines[4].startswith("ours / plain")


def test_flower_learning(tmp_path):
    for name in ("flwr", "ray", "torch", "matplotlib"):
        pytest.importorskip(name, reason="needs Flower with its simulation, and a plot")
    run("flower_learning.py", f"--out={tmp_path}", "--rounds=1", "--seeds=1")
    curves = [json.loads(line) for line in (tmp_path / "flower-learning.json").read_text().splitlines()]
    assert [curve["side"] for curve in curves] == ["plain", "ours"]
    assert all(len(curve["losses"]) == 2 for curve in curves)


def test_nvflare_round():
    pytest.importorskip("nvflare", reason="needs nvflare, in an environment of its own")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a network of its own")
    lines = run("nvflare_round.py", "--size-mb=16", "--variants", "plain", "wire")
    plain, wire = map(json.loads, lines[2:])
    assert (plain["variant"], wire["variant"]) == ("plain", "wire")
    assert 0.2 < wire["mb"] / plain["mb"] < 0.3


def test_nvflare_link(tmp_path):
    pytest.importorskip("nvflare", reason="needs nvflare, in an environment of its own")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a network of its own")
    link = tmp_path / "link"  # LINK -- SERVER -- SITES, both ends on the loopback of a network of their own
    link.write_text(
        "#!/bin/bash\n"
        'shift; server=(); while [ "$1" != -- ]; do server+=("$1"); shift; done; shift\n'
        'if [ -z "$INSIDE" ]; then INSIDE=1 exec unshare -n "$0" -- "${server[@]}" -- "$@"; fi\n'
        'ip link set lo up; "${server[@]}" & "$@"; wait\n'
    )
    link.chmod(0o755)
    options = ("--size-mb=4", "--rounds=2", "--address=127.0.0.1", "--variants=wire")
    lines = run("nvflare_link.py", f"--link={link}", *options)
    assert json.loads(lines[2])["seconds"] > 0


def test_nvflare_learning(tmp_path):
    pytest.importorskip("nvflare", reason="needs nvflare, in an environment of its own")
    pytest.importorskip("transformers", reason="the language model needs the extra fl")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a network of its own")
    lines = run("nvflare_learning.py", f"--out={tmp_path}", "--rounds=1", "--seeds=1")
    assert lines[0].startswith("Loss before the first round 5.")
    curves = [json.loads(line) for line in (tmp_path / "nvflare-learning.json").read_text().splitlines()]
    assert [len(curve["losses"]) for curve in curves] == [2, 2]


def test_update_step():
    lines = run("update_step.py", "--steps=1", "--ranks=2")
    assert re.fullmatch(r"demo:k=40: messages of \d+ bytes, 24 tensors", lines[2])
    parts = [line.split("|")[1].strip() for line in lines[6:]]
    assert parts[:3] == ["forward and backward", "step of AdamW", "normalize (beta2)"]
    assert parts[3:] == ["compress", "combine 2 messages", "sign and move"]


def test_every_script_is_run_here():
    modules = {"flower_deployment.py", "learning_curves.py"}  # of scripts and of tests/engines
    tested = {*re.findall(r'"(\w+\.py)"', Path(__file__).read_text())} | modules
    assert {path.name for path in BENCH.glob("*.py")} == tested


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory of a process's own is read as Linux shows it"
)
def test_fleet(tmp_path):
    for name in ("torch", "safetensors"):
        pytest.importorskip(name)
    weights = np.random.default_rng(0).normal(size=100_003).astype(np.float32)
    np.save(tmp_path / "tiles.npy", np.stack([weights, weights * np.float32(1.0001)]))
    tiny = ("--layers=1", "--vocabulary=200", "--hidden=64", f"--tiles={tmp_path / 'tiles.npy'}")
    lines = [line for line in run("fleet.py", *tiny, "--json") if line.startswith("{")]
    rows = {row["way"]: row for row in map(json.loads, lines)}
    assert [*rows] == ["a whole version", "patch", "raw", "nf4", "safetensors"]
    assert rows["patch"]["bytes"] < rows["a whole version"]["bytes"] < rows["raw"]["bytes"]
    assert {*rows["patch"]["phases"]} >= {"encode", "write", "fetch", "stage", "apply"}
    lines = run("fleet.py", "apply", *tiny, "--dtype=bfloat16", "--rounds=1")[3:]
    all_match(lines, *[rf"apply, 1 % changed .* read {SECONDS}, apply {SECONDS}: {NUMBER} times"] * 2)
