"""What a caller is told of a stream: a report of what travelled how, and an error for a pattern that meant nothing."""

import asyncio
import io
from typing import Any

import numpy as np
import pytest

import tensorwire as tw
from tensorwire.cli import main
from tensorwire.errors import counted
from tensorwire.streams import size_text

WEIGHTS = {
    "layers": [
        {"weight": np.linspace(-1, 1, 4096, dtype=np.float32), "bias": np.zeros(64)},
        {"weight": np.linspace(-1, 1, 4096, dtype=np.float32), "bias": np.zeros(64)},
    ],
    "step": 7,
    "empty": np.zeros(0, np.float32),
}


async def drain(buffers: Any) -> int:
    return sum([len(memoryview(buffer).cast("B")) async for buffer in buffers])


def test_it_counts_codecs_and_lists_items_sent_otherwise():
    report = tw.Report()
    data = tw.dumps(WEIGHTS, codec={"*/weight": "nf4", "*/bias": "bf16|zstd"}, report=report)
    nf4, raw, lossless = report.codecs["nf4"], report.codecs["raw"], report.codecs["raw|zstd"]
    assert (nf4.items, nf4.bytes_in, nf4.bytes_out) == (2, 2 * 4 * 4096, 2 * (4096 // 2 + 4 * 64))
    assert (raw.items, raw.bytes_in, raw.bytes_out) == (2, 1, 1)  # a value of one byte, and a tensor of none
    assert (lossless.items, lossless.bytes_in) == (2, 2 * 8 * 64) and lossless.bytes_out < 2 * 8 * 64
    assert [*report.otherwise] == [(f"/layers/{n}/bias", "bf16|zstd", "raw|zstd", "float64") for n in (0, 1)]
    assert report.items == 6
    assert report.bytes_in == 2 * 4 * 4096 + 2 * 8 * 64 + 1
    assert report.bytes_out == len(data)


@pytest.mark.parametrize(
    ("spec", "value", "reason"),
    [
        ("nf4", np.zeros(4), "float64"),
        ("nf4", np.zeros(4, np.int32), "int32"),
        ("int8:nonfinite=raw", np.array([1, np.inf], np.float32), "nonfinite"),
        ("fp16:overflow=raw", np.array([1, 1e5], np.float32), "beyond float16"),
        ("bf16:overflow=raw", np.array([1, 3.4e38], np.float32), "beyond bfloat16"),
    ],
)
def test_it_gives_the_reason(spec, value, reason):
    report = tw.Report()
    tw.dumps({"w": value}, codec=spec, report=report)
    assert report.otherwise == [("w", spec, "raw", reason)]
    assert str(report).endswith(f", 1 item raw ({reason})")


def test_its_text_is_one_line():
    report = tw.Report()
    assert str(report) == "0 B -> 0 B"
    report.add_item("nf4")
    report.add_frame("nf4", 33_600_000, 4_700_000)
    for name in "abc":
        report.add_otherwise(name, "nf4", "raw", "float64")
    report.add_otherwise("d", "nf4", "raw", "nonfinite")
    line = "33.6 MB -> 4.7 MB (7.1x), 3 items raw (float64), 1 item raw (nonfinite)"
    assert str(report) == line and repr(report) == f"<Report: {line}>"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (10**18, "1000.0 PB")],
)
def test_sizes_are_readable(count, text):
    assert size_text(count) == text


def test_every_encoding_function_takes_a_report(tmp_path):
    sizes = {}
    for name in ("dumps", "encode", "pairs", "encode_async", "save_file", "encode_file", "pipe", "safetensors"):
        report = tw.Report()
        if name == "dumps":
            size = len(tw.dumps(WEIGHTS, codec="nf4", report=report))
        elif name in ("encode", "pairs"):
            value = iter(WEIGHTS.items()) if name == "pairs" else WEIGHTS
            size = len(b"".join(tw.encode(value, codec="nf4", report=report)))
        elif name == "encode_async":
            size = asyncio.run(drain(tw.encode_async(WEIGHTS, codec="nf4", report=report)))
        elif name == "save_file":
            size = tw.save_file(WEIGHTS, tmp_path / "w.tw", codec="nf4", report=report)
        elif name == "encode_file":
            size = len(b"".join(tw.encode_file(tmp_path / "w.tw", codec="zstd", report=report)))
        elif name == "pipe":
            size = len(b"".join(tw.encode_file(io.BytesIO(bytes(3000)), report=report)))
            assert report.bytes_in == 3000
        else:
            flat = tw.dumps({"w": WEIGHTS["layers"][0]["weight"]})
            tw.safetensors.decode(flat, tmp_path / "w.safetensors")
            buffers = tw.safetensors.encode(tmp_path / "w.safetensors", codec="nf4", report=report)
            size = len(b"".join(buffers))
        sizes[name] = size, report.bytes_out
    assert all(size == reported for size, reported in sizes.values()), sizes


def test_several_streams_add_up():
    report = tw.Report()
    total = sum(len(tw.dumps(WEIGHTS, codec="nf4", report=report)) for _ in range(3))
    assert (report.items, report.bytes_out, len(report.otherwise)) == (18, total, 6)


# ---- patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("*/weigth", "/layers/0/weight"),
        ("layer.*", "/layers/0/weight"),
        ("/layers/0/wieght", "/layers/0/weight"),
        ("/layers/?/bais", "/layers/0/bias"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(pattern, nearest):
    for codec in ({pattern: "nf4"}, {"*/bias": "raw", pattern: "nf4"}):
        with pytest.raises(tw.EncodeError, match="matches no tensor; nearest: ") as raised:
            tw.dumps(WEIGHTS, codec=codec)
        assert repr(pattern) in str(raised.value) and repr(nearest) in str(raised.value)


def test_without_similar_names_some_are_listed():
    with pytest.raises(
        tw.EncodeError, match=r"'zzz' matches no tensor; there are '/layers/0/weight', '/layers/0/bias'"
    ):
        tw.dumps(WEIGHTS, codec={"zzz": "nf4"})


def test_it_is_refused_before_the_first_buffer_and_by_all_who_take_patterns(tmp_path):
    codec = {"*.weigth": "nf4"}
    for take in (tw.encode, tw.encoded_size, tw.schema):
        with pytest.raises(tw.EncodeError, match="matches no tensor"):
            take(WEIGHTS, codec=codec)
    with pytest.raises(tw.EncodeError, match="matches no tensor"):
        tw.save_file(WEIGHTS, tmp_path / "w.tw", codec=codec)
    assert not [*tmp_path.iterdir()]


def test_an_iterator_ends_without_an_end_frame():
    buffers = tw.encode(iter(WEIGHTS.items()), codec={"*.weigth": "nf4"})
    received = []
    with pytest.raises(tw.EncodeError, match="matches no tensor"):
        received.extend(bytes(buffer) for buffer in buffers)
    with pytest.raises(tw.TruncatedError):
        tw.loads(b"".join(received))

    async def pairs():
        yield "w", np.zeros(4)

    with pytest.raises(tw.EncodeError, match="matches no tensor"):
        asyncio.run(drain(tw.encode_async(pairs(), codec={"*.weigth": "nf4"})))


def test_patterns_pass_with_ties_or_without_tensors():
    weight = np.zeros(64, np.float32)
    tw.dumps({"a": weight}, codec={"a": "nf4", "*": "raw"})
    tw.dumps({"a": weight, "b": weight}, codec={"a": "nf4", "b": "nf4"})
    tw.dumps({"step": 1}, codec={"*": "nf4"})
    tw.dumps({}, codec={"*.weight": "nf4"})


def test_an_unreachable_pattern_is_refused():
    pairs = [("*", "*/bias"), ("/layers/*", "/layers/0/*"), ("*/weight", "/layers/?/weight"), ("*ias", "*/bias")]
    for wide, narrow in pairs:
        with pytest.raises(tw.EncodeError, match="put it before"):
            tw.dumps(WEIGHTS, codec={wide: "nf4", narrow: "raw"})

        tw.dumps(WEIGHTS, codec={narrow: "raw", wide: "nf4"})
    tw.dumps(WEIGHTS, codec={"/layers/?/*": "raw", "/layers/*": "nf4"})
    tw.dumps(WEIGHTS, codec={"/layers/[01]/weight": "raw", "*/weight": "nf4"})


@pytest.mark.parametrize(
    ("codec", "said"),
    [({7: "nf4"}, "a codec pattern is text, not 7"), (bytes, "not the class bytes"), (None, "not NoneType")],
)
def test_an_invalid_choice_is_refused(codec, said):
    with pytest.raises(tw.EncodeError, match=said):
        tw.dumps(WEIGHTS, codec=codec)


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (lambda name: "raw", r"takes \(name\): too many positional arguments"),
        (lambda: "raw", r"takes \(\): too many"),
        (lambda name, tensor, step: "raw", "missing a required argument: 'step'"),
    ],
)
def test_a_function_must_take_a_name_and_a_tensor(codec, said):
    with pytest.raises(tw.ArgumentError, match=rf"^codec must be a function that takes \(name, tensor\).*{said}"):
        tw.dumps(WEIGHTS, codec=codec)


def test_functions_that_take_more_kinds_of_arguments_are_called():
    assert tw.dumps(WEIGHTS, codec=lambda *names: "raw") == tw.dumps(WEIGHTS)
    assert tw.dumps(WEIGHTS, codec=lambda name, tensor, step=0: "raw") == tw.dumps(WEIGHTS)


def test_every_function_that_a_caller_gives_is_checked_first(tmp_path):
    def alone(done):
        raise AssertionError("it is never called")

    path = tmp_path / "model.tw"
    with pytest.raises(tw.ArgumentError, match=r"^progress .*\(done, total\); 'alone' takes \(done\)"):
        tw.save_file(WEIGHTS, path, progress=alone)
    assert not path.exists()
    tw.save_file(WEIGHTS, path)
    with pytest.raises(tw.ArgumentError, match="^progress must be a function"):
        tw.load_file(path, progress=alone)
    with pytest.raises(tw.ArgumentError, match="^progress must be a function"):
        tw.load_file(path, progress=7)
    with tw.versions.Publisher(tmp_path / "store") as publisher:
        with pytest.raises(tw.ArgumentError, match="^progress must be a function"):
            publisher.publish(WEIGHTS, progress=alone)
        publisher.publish(WEIGHTS)
    with pytest.raises(tw.ArgumentError, match="^progress must be a function"):
        tw.versions.Subscriber(tmp_path / "store").fetch(progress=alone)
    with pytest.raises(tw.ArgumentError, match=r"^on_note must be a function that takes \(note\)"):
        tw.versions.follow(tmp_path / "store", tmp_path / "held.safetensors", on_note=lambda: None)
    with pytest.raises(tw.ArgumentError, match=r"^validate must be a function that takes \(update, schema\)"):
        tw.updates.Rules(validate=alone)


def test_one_of_something_is_in_the_singular(tmp_path, capsys):
    assert [counted(count, "item") for count in (0, 1, 2, 1000)] == ["0 items", "1 item", "2 items", "1,000 items"]
    for name, value in (("old", 1), ("new", 2)):
        tw.safetensors.decode(tw.encode({"w": np.full(1, value, np.int8)}), tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / name) for name in ("old.safetensors", "new.safetensors", "patch.tw")]
    assert main(["diff", *paths]) == 0
    assert " 1 item changed" in capsys.readouterr().err
    assert main(["encode", paths[0], paths[0] + ".tw"]) == 0
    assert main(["inspect", paths[0] + ".tw"]) == 0
    assert ": 1 byte as " in capsys.readouterr().out
    assert main(["verify", paths[0] + ".tw"]) == 0
    assert "ok: 2 items, " in capsys.readouterr().out  # the dict is one
    assert main(["decode", paths[0] + ".tw", str(tmp_path / "shards"), "--max-shard-size=1MiB"]) == 0
    assert " in 1 file\n" in capsys.readouterr().err
