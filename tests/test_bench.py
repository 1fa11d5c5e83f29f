"""`tensorwire bench`: published sizes to the digit, every suite on something tiny, no word about time."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tensorwire
from tensorwire import dtypes
from tensorwire.bench import SUITES, BenchError, Options, memory, models, rivals, shapes, size, speed, suite, summary
from tensorwire.bench.error import error_row
from tensorwire.bench.rss import Rise
from tensorwire.bench.tables import Column, render
from tensorwire.cli import main
from tensorwire.codecs import Transform
from tensorwire.tensor import Extent
from tensorwire.updates import Compressor

MIB = 1 << 20
CODECS = ("raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true")
TINY = shapes.llama(vocabulary=500, hidden=64, layers=1, feed_forward=96, key_value=16)
KEYS = {
    "size": {"suite", "model", "codec", "payload_mib", "meta_mib", "wire_mib", "percent_of_fp32"},
    "speed": {"suite", "codec", "op", "impl", "threads", "size_mib", "gbps", "vs_memcpy"},
    "memory": {"suite", "mode", "codec", "model_mib", "sender_extra_mib", "receiver_extra_mib", "seconds"},
    "error": {"suite", "codec", "rel_l2", "max_abs", "sqnr_db"},
    "patch": {"suite", "data", "codec", "changed", "bits_per_changed", "bits_per_weight"},
    "lossless": {"suite", "data", "codec", "impl", "ratio", "encode_gbps", "decode_gbps"},
    "updates": {
        "suite",
        "model",
        "method",
        "bits_per_param",
        "mb_per_step",
        "times_bf16",
        "energy",
        "compress_gbps",
        "decompress_gbps",
    },
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.NAMED, "tiny", TINY)


def quiet(line: str) -> None:
    """Nobody reads these notes."""


def test_the_model_has_its_published_shape() -> None:
    table = shapes.NAMED["llama-3.2-1b"]
    assert len(table) == 147
    assert sum(int(np.prod(shape)) for shape in table.values()) == 1_498_482_688


@pytest.mark.parametrize(
    ("codec", "payload", "meta", "percent"),
    [
        ("raw", 5716.26, 0, 100.00),
        ("fp16", 2858.13, 0, 50.00),
        ("bf16", 2858.13, 0, 50.00),
        ("int8", 1429.06, 1.54, 25.03),
        ("nf4", 714.53, 89.33, 14.06),
        ("fp4", 714.53, 89.33, 14.06),
    ],
)
def test_published_sizes(codec: str, payload: float, meta: float, percent: float) -> None:
    row = next(size.run(Options(model="llama-3.2-1b", codecs=(codec,)), quiet))
    assert row["codec"] == ("fp32" if codec == "raw" else codec)
    got = [round(row[key], 2) for key in ("payload_mib", "meta_mib", "percent_of_fp32")]
    assert got == [payload, meta, percent]
    assert row["framing_percent"] < 0.1


def test_double_quantization_needs_less_than_23_mib() -> None:
    for spec in ("nf4:double_quant=true", "fp4:double_quant=true"):
        row = next(size.run(Options(model="llama-3.2-1b", codecs=(spec,)), quiet))
        assert row["meta_mib"] < 23 and row["wire_meta_mib"] < 23


@pytest.mark.parametrize("codec", [*CODECS, "nf4|zstd"])
def test_wire_size_is_that_of_the_stream(codec: str) -> None:
    generator = np.random.default_rng(3)
    state = {name: generator.standard_normal(shape, np.float32) for name, shape in TINY.items()}
    state["large"] = generator.standard_normal((1000, 1201), np.float32)
    state |= {
        "odd": np.float32(generator.standard_normal(77)),
        "steps": np.arange(9),
        "empty": np.zeros((0, 2)),
    }
    model = models.from_state_dict("state", state)
    row = size.compressed_row(model, codec) if "zstd" in codec else size.size_row(model, codec)
    assert row["wire_mib"] * MIB == len(tensorwire.dumps(state, codec=codec))


def test_a_compressor_is_not_guessed() -> None:
    notes: list[str] = []
    assert list(size.run(Options(model="tiny", codecs=("nf4|zstd",)), notes.append)) == []
    assert "depends on values" in notes[0]


def test_seeded_weights_are_the_same_however_they_are_read() -> None:
    view = models.resolve("tiny").tensors["lm_head.weight"]
    whole = view.read(0, view.numel)
    parts = np.concatenate([view.read(0, 1001), view.read(1001, view.numel)])
    assert np.array_equal(whole, parts)
    assert abs(whole.view(np.float32).std() - 0.02) < 0.001
    around = models.weights(100, phase=(4 << 20) - 50)  # across the end of the block
    assert np.array_equal(around[50:], models.weights(50)) and not np.array_equal(around[:50], around[50:])


@pytest.mark.parametrize("codec", CODECS)
def test_error_of_known_weights(codec: str) -> None:
    values = (np.random.default_rng(4).standard_normal(300_000) * 0.02).astype(np.float32)
    row = error_row(models.from_state_dict("x", {"x": values, "steps": np.arange(3)}), codec)
    back = tensorwire.loads(tensorwire.dumps(values, codec=codec)).astype(np.float64)
    noise = np.linalg.norm(values - back)
    assert row["max_abs"] == pytest.approx(np.abs(values - back).max())
    assert row["rel_l2"] == pytest.approx(noise / np.linalg.norm(values.astype(np.float64)))
    assert (row["sqnr_db"] is None) == (noise == 0)
    assert row["sqnr_db"] is None or row["sqnr_db"] == pytest.approx(-20 * np.log10(row["rel_l2"]))


def test_error_of_a_bfloat16_model_is_measured_in_its_own_values() -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(5000).to(torch.bfloat16)
    row = error_row(models.from_state_dict("x", {"x": values}), "nf4")
    assert 15 < row["sqnr_db"] < 25
    assert error_row(models.from_state_dict("x", {"x": values}), "bf16")["sqnr_db"] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_speed_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(rivals, "import_rivals", lambda codecs, threads, note: None)
    monkeypatch.setattr(rivals, "contenders", lambda codec, values, out, threads: iter(()))
    options = Options(codecs=("bf16", "nf4:double_quant=true", "raw"), threads=threads, sizes_mib=(1,))
    rows = list(speed.run(options, quiet))
    assert all(KEYS["speed"] <= row.keys() and row["gbps"] > 0 for row in rows)
    assert rows[0]["impl"] == "memcpy" and rows[0]["vs_memcpy"] == 1
    ours = {
        (row["codec"], row["op"], row["output"]) for row in rows if row["impl"] == tensorwire.kernels.implementation
    }
    assert {("bf16", op, output) for op in ("encode", "decode") for output in ("warm", "fresh", "reused")} <= ours
    assert {("raw", "decode_stream", output) for output in ("warm", "fresh", "reused")} <= ours
    assert ("raw", "encode_stream", "warm") in ours
    assert ("raw", "encode", "warm") not in ours


@tensorwire.register
@dataclass(frozen=True, repr=False)
class Flipped(Transform):
    """Bit patterns upside down, as a third party would write it."""

    id, name, lossless = 41_000, "flipped", True

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype == dtypes.FLOAT32

    def encode(self, data: Any, extent: Extent) -> npt.NDArray[np.uint8]:
        return np.invert(np.frombuffer(data, np.uint8))

    def decode(self, data: npt.NDArray[np.uint8], extent: Extent, out: npt.NDArray[np.uint8]) -> None:
        np.invert(data, out=out)


@pytest.mark.parametrize("spec", ["flipped|raw", "flipped|zstd"])
def test_private_codecs_are_measured_like_any_other(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    rows = list(speed.run(Options(codecs=(spec,), sizes_mib=(1,)), quiet))
    ours = {(row["op"], row["output"]) for row in rows if row["codec"] == repr(tensorwire.codec(spec))}
    assert ours >= {(op, output) for op in ("encode", "decode") for output in ("warm", "fresh", "reused")}
    state = {"x": models.weights(5000), "steps": np.arange(9)}
    model = models.from_state_dict("state", state)
    row = size.compressed_row(model, spec) if "zstd" in spec else size.size_row(model, spec)
    assert row["wire_mib"] * MIB == len(tensorwire.dumps(state, codec=spec))
    assert error_row(model, spec)["sqnr_db"] is None


def test_tied_tensors_are_counted_once() -> None:
    shared = models.weights(5000)
    state = {"a": shared, "b": shared}
    row = size.size_row(models.from_state_dict("state", state), "nf4")
    assert row["wire_mib"] * MIB == len(tensorwire.dumps(state, codec="nf4"))
    assert row["payload_mib"] * MIB == 2500


def test_rivals_do_the_work_they_are_timed_for() -> None:
    pytest.importorskip("bitsandbytes")
    values = models.weights(64 * 4096)
    for spec in ("bf16", "fp16", "int8", "nf4", "fp4", "nf4:double_quant=true", "zstd"):
        out = np.zeros_like(values)
        found = list(rivals.contenders(tensorwire.codec(spec), values, out, 1))
        assert {contender.op for contender in found} == {"encode", "decode"}
        for contender in found:
            contender.run()
            if (contender.op, contender.output) == ("decode", "warm"):
                assert np.abs(out - values).max() < 0.02
                out[:] = 0


def test_a_rival_is_compared_with_like_outputs() -> None:
    def row(impl: str, output: str, gbps: float) -> dict:
        return {"codec": "nf4", "op": "decode", "impl": impl, "output": output, "gbps": gbps}

    ours = tensorwire.kernels.implementation
    rows = [row("memcpy", "warm", 10.0), row(ours, "warm", 20.0), row(ours, "fresh", 8.0), row(ours, "reused", 12.0)]
    rows += [row("bitsandbytes", "warm", 5.0), row("bitsandbytes", "fresh", 2.0)]
    ratios = [(r["vs_memcpy"], r["vs_rival"]) for r in speed._with_ratios(rows)]
    assert ratios == [(1.0, None), (2.0, 4.0), (0.8, 4.0), (1.2, 6.0), (0.5, None), (0.2, None)]


def test_memory_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RIVALS", {})
    tensorwire.safetensors.decode(models.resolve("tiny").encode(), tmp_path / "tiny.safetensors")
    options = Options(model=str(tmp_path / "tiny.safetensors"), codecs=("nf4",))
    rows = list(memory.run(options, quiet))
    assert [row["mode"] for row in rows] == ["regular", "container", "file"]
    for row in rows:
        assert KEYS["memory"] <= row.keys() and row["seconds"] > 0
        assert 0 <= row["sender_extra_mib"] < 16 and row["receiver_extra_mib"] < 16
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_models_that_do_not_fit_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    notes: list[str] = []
    options = Options(model="llama-3.2-1b", codecs=("raw",), modes=("regular",))
    assert list(memory.run(options, notes.append)) == []
    assert "regular raw left out: both processes together need" in notes[0]


def test_a_process_that_fails_says_why() -> None:
    job = {"method": "regular", "codec": "nonsense", "model": "llama-tiny"}
    with pytest.raises(BenchError, match="unknown codec"):
        memory.transfer(job, job)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory can be reset on Linux only")
def test_a_memory_rise_is_the_peak_and_not_the_remainder() -> None:
    rise = Rise()
    data = np.ones(32 * MIB, np.uint8)
    del data
    assert 31 * MIB < rise.peak() < 48 * MIB


def test_json_is_one_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "size", "error", "--model", "tiny", "--codec", "nf4", "bf16", "--json", "-"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [(row["suite"], row["codec"]) for row in rows] == [
        ("size", "nf4"),
        ("size", "bf16"),
        ("error", "nf4"),
        ("error", "bf16"),
    ]
    assert all(KEYS[row["suite"]] <= row.keys() for row in rows)
    assert "| nf4 " in captured.err and "tensorwire 0" in captured.err
    assert main(["bench", "size", "--model", "tiny", "--json", str(tmp_path / "rows.json")]) == 0
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(CODECS)


def test_every_suite_has_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tensorwire.bench import plots

    assert list(plots._PICTURES) == list(SUITES)
    common = {"suite": "speed", "output": "warm", "threads": 1, "size_mib": 4}
    speed_rows = [
        common | {"codec": "raw", "op": "copy", "impl": "memcpy", "gbps": 9.0},
        common | {"codec": "nf4", "op": "encode", "impl": "native", "gbps": 12.0},
    ]
    memory_row = {"suite": "memory", "model": "tiny", "mode": "file", "codec": "nf4", "model_mib": 1.0}
    memory_row |= {"sender_extra_mib": 0.0, "receiver_extra_mib": -0.5, "seconds": 1.0}
    rows = [
        *size.run(Options(model="tiny"), quiet),
        *suite("error").run(Options(model="tiny", codecs=("raw", "nf4")), quiet),
        *speed_rows,
        memory_row,
        {"suite": "patch", "model": "tiny", "data": "made up", "codec": "patch", "impl": "native", "changed": 0.1}
        | {"bits_per_changed": 5.0},
        {"suite": "lossless", "model": "tiny", "data": "bf16", "codec": "planes", "impl": "native", "ratio": 0.66},
        *suite("updates").run(Options(model="tiny", methods=("demo:k=4",)), quiet),
    ]
    paths = plots.draw(rows, str(tmp_path / "new"))
    assert [path.name for path in paths] == [f"{name}.png" for name in SUITES]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_lossless_rows_count_the_compressed_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    """Each contender, where it is installed, gives the content back, or there would be an error."""
    assert main(["bench", "lossless", "--model", "tiny", "--codec", "planes", "zstd", "--json", "-"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    ours = {(row["data"], row["codec"]): row["ratio"] for row in rows if row["impl"] in ("native", "numpy")}
    assert [data for data, codec in ours if codec == "planes"] == ["bf16", "fp32", "bf16 in fp32"]
    assert all(KEYS["lossless"] <= row.keys() for row in rows)
    assert 0.64 < ours["bf16", "planes"] < 0.69 and 0.3 < ours["bf16 in fp32", "planes"] < 0.35
    assert all(ours[data, "planes"] < ours[data, "raw|zstd"] for data, _ in ours)
    assert "updates left out" in captured.err and "as planes" in captured.err


def test_a_compressor_after_a_quantizer_is_measured_as_lossless(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "lossless", "--model", "tiny", "--codec", "nf4|entropy", "bf16|entropy", "--json", "-"]
    assert main(command) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["impl"] in ("native", "numpy")]
    assert [row["data"] for row in rows if row["codec"] == "bf16|entropy"] == ["fp32", "bf16 in fp32"]
    assert all(0.1 < row["ratio"] < 0.35 for row in rows)


def test_patch_rows_count_all_of_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """The patch is applied, or there would be an error; others send more."""
    assert main(["bench", "patch", "--model", "tiny", "--json", "-"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert all(KEYS["patch"] <= row.keys() for row in rows)
    for data in {row["data"] for row in rows}:
        ours, *others = (row["bits_per_changed"] for row in rows if row["data"] == data)
        assert (
            (ours is None and not others) if data.startswith("unchanged") else len(others) == 3 and ours < min(others)
        )
    assert "made up" in captured.err and "bits a changed weight" in captured.err


def test_step_bytes_are_those_that_a_compressor_sends(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["demo:k=4", "topk:k=64,values=16bit", "lowrank:rank=2"]
    assert main(["bench", "updates", "--model", "tiny", "--method", *methods, "--json", "-"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["method"] for row in rows] == ["fp32 all-reduce", "bf16 all-reduce", *methods]
    assert all(row.keys() == KEYS["updates"] for row in rows)
    parameters = sum(int(np.prod(shape)) for shape in TINY.values())
    assert [row["mb_per_step"] * 1e6 for row in rows[:2]] == [4 * parameters, 2 * parameters]
    gradients = {name: view.read(0, view.numel) for name, view in models.resolve("tiny").tensors.items()}
    gradients = {name: data.view(np.float32).reshape(TINY[name]) for name, data in gradients.items()}
    for row in rows[2:]:
        message = Compressor(row["method"]).compress(gradients)
        assert row["mb_per_step"] * 1e6 == len(message)
        assert row["bits_per_param"] == pytest.approx(8 * len(message) / parameters)
        assert row["times_bf16"] == pytest.approx(2 * parameters / len(message))
        sent = tensorwire.loads(message.data)
        lost = sum(np.linalg.norm(gradients[name] - sent[name]) ** 2 for name in TINY)
        whole = sum(np.linalg.norm(each) ** 2 for each in gradients.values())
        assert row["energy"] == pytest.approx(1 - lost / whole, abs=1e-5)
    assert "seeded normal numbers" in captured.err and "MB as demo:k=4" in captured.err


def test_the_published_run_is_shown_for_its_model() -> None:
    table = shapes.NAMED["llama-2-1.2b"]
    assert sum(int(np.prod(shape)) for shape in table.values()) == 1_204_881_408
    rows = suite("updates").run(Options(model="llama-2-1.2b"), quiet)
    assert [next(rows)["method"] for _ in range(3)][2] == "DisTrO, published"


def test_invalid_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "updates", "--method", "demo:q=1"])
    assert "no parameter 'q'" in capsys.readouterr().err


def test_tables_align_numbers_and_leave_gaps() -> None:
    text = render([{"a": "x", "b": 1.5}, {"a": "longer", "b": None}], [Column("a", "name"), Column("b", "n", ".2f")])
    assert text.splitlines() == [
        "| name   |    n |",
        "| ------ | ---: |",
        "| x      | 1.50 |",
        "| longer |      |",
    ]


def test_the_core_install_is_enough() -> None:
    """size, and the imports of every suite, with nothing but what the core needs."""
    code = """
import sys
for name in ("torch", "bitsandbytes", "safetensors", "matplotlib", "tqdm"):
    sys.modules[name] = None
from tensorwire.cli import main
from tensorwire.codecs import Transform
from tensorwire.tensor import Extent
from tensorwire.bench import SUITES, suite, peer
[suite(name) for name in SUITES]
assert main(["bench", "size", "--model", "llama-tiny"]) == 0
assert main(["bench", "size", "--plot", "x"]) == 2
"""
    home = Path(tensorwire.__file__).parents[1]  # `python -c` puts the working directory first
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=home)
    assert done.returncode == 0, done.stderr


def test_a_run_ends_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "size", "error", "--model", "tiny"]) == 0
    *_, heading, sizes, errors = capsys.readouterr().out.splitlines()
    assert heading == "in short:"
    assert sizes.startswith("  tiny is ") and "as nf4 (" in sizes
    assert errors.startswith("  tiny loses ") and "% as int8" in errors


def test_a_run_fits_a_terminal_of_80_columns_and_cuts_no_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorwire.cli.bench.line_width", lambda out: 80)
    assert (
        main(
            ["bench", "size", "speed", "error", "--model", "tiny", "--size-mib", "1", "--codec", "int8-linear", "fp16"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text
    assert "| int8-linear | encode   |" in text


def test_the_summary_has_one_line_per_suite() -> None:
    ours = tensorwire.kernels.implementation
    common = {"suite": "speed", "output": "warm"}
    speeds = [
        common | {"codec": "raw", "op": "copy", "impl": "memcpy", "gbps": 9.0},
        common | {"codec": "nf4", "op": "encode", "impl": ours, "gbps": 12.0},
        common | {"codec": "nf4", "op": "decode", "impl": ours, "gbps": 24.0},
        common | {"codec": "nf4", "op": "decode", "impl": "bitsandbytes", "gbps": 6.0},
        common | {"codec": "nf4", "op": "decode", "impl": "bitsandbytes", "gbps": 2.0, "output": "fresh"},
    ]
    memory_row = {"suite": "memory", "model": "m", "mode": "file", "codec": "nf4", "model_mib": 100.0, "seconds": 1.0}
    rows = [*speeds, memory_row | {"sender_extra_mib": 3.0, "receiver_extra_mib": -0.5}]
    rows.append(
        memory_row | {"mode": "regular", "codec": "torch.save", "sender_extra_mib": 90, "receiver_extra_mib": 1}
    )
    assert summary.lines(rows) == [
        "nf4 encodes and decodes fp32 at 12.0 and 24.0 GB/s (bitsandbytes: - and 6.0); memcpy runs at 9.0.",
        "Sending m (100 MiB) takes at most 3 MiB of memory beyond the model; torch.save takes 90 MiB.",
    ]
    assert summary.lines(speeds[:1]) == ["memcpy runs at 9.0 GB/s; the codecs measured send memory as it is."]


def test_wide_tables_are_cut() -> None:
    rows = [{"name": "a.long.name.of.a.tensor", "other": "x" * 30, "n": 1234}]
    columns = [Column("name", "name"), Column("other", "other"), Column("n", "n")]
    assert max(map(len, render(rows, columns, width=40).splitlines())) == 40
    assert "a....sor" in render(rows, columns, width=30) and "1234" in render(rows, columns, width=10)
