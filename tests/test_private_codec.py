"""A third party's codecs, written against public names only: they go wherever the library's own go."""

import json
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
import reference
from vectors import stored

import tensorwire
from tensorwire import dtypes
from tensorwire.bench import Options, suite
from tensorwire.cli import main
from tensorwire.codecs import (
    Choice,
    Codec,
    Compressor,
    Encoded,
    Packer,
    Range,
    Raw,
    Sizes,
    Transform,
    from_stages,
    parameter,
    parse,
)
from tensorwire.errors import EncodeError, FormatError, NonFiniteError
from tensorwire.tensor import Extent
from tensorwire.transports import TcpListener, TcpTransport


@tensorwire.register
@dataclass(frozen=True, repr=False)
class Fixed(Packer):
    """float32 as multiples of 2^-bits in 16 bits: lossy, a length that follows from the count."""

    bits: int = parameter(12, Range(0, 30), wire=True)
    overflow: str = parameter("error", Choice(("error", "saturate")))

    id, name, lossless, exact_length = 40_000, "fixed", False, True

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype == dtypes.FLOAT32

    def sizes(self, count: int, dtype: dtypes.DType) -> Sizes:
        return Sizes(2 * count)

    def encode(self, data: Any, extent: Extent, take: Any, context: Any = None) -> Encoded:
        steps = np.rint(np.frombuffer(data, np.float32) * 2.0**self.bits)
        if self.overflow == "error" and (beyond := np.flatnonzero(~(np.abs(steps) <= 32767))).size:
            raise NonFiniteError("too large for fixed", index=int(beyond[0]))
        payload = take(2 * extent.count)
        payload.view(np.int16)[:] = np.clip(steps, -32767, 32767)
        return Encoded(payload)

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        steps = np.frombuffer(payload, np.int16)
        if (steps == -32768).any():
            raise FormatError("-32768 is not used")
        np.multiply(steps, np.float32(2.0**-self.bits), out=out.view(np.float32))


@tensorwire.register
class Runs(Packer):
    """Lengths of runs of equal bytes: lossless, a length that depends on the data."""

    id, name, lossless, exact_length = 40_001, "runs", True, False

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype.itemsize == 1

    def sizes(self, count: int, dtype: dtypes.DType) -> Sizes:
        return Sizes(5 * count)

    def encode(self, data: Any, extent: Extent, take: Any, context: Any = None) -> Encoded:
        values = np.frombuffer(data, np.uint8)
        starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        lengths = np.diff(np.append(starts, values.size)).astype("<u4")
        return Encoded(lengths.tobytes() + values[starts].tobytes())

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        runs, left = divmod(len(payload), 5)
        lengths = np.frombuffer(payload[: 4 * runs], "<u4")
        if left or lengths.sum(dtype=np.uint64) != extent.count:
            raise FormatError("runs that do not add up")
        out[:] = np.repeat(np.frombuffer(payload[4 * runs :], np.uint8), lengths)


@tensorwire.register
class Gray(Transform):
    """float32 to the Gray code of its bits: another dtype, in blocks of 3 for the sake of it."""

    id, name, lossless = 40_002, "gray", True

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype == dtypes.FLOAT32

    def output(self, dtype: dtypes.DType) -> dtypes.DType:
        return dtypes.UINT32

    def block(self, dtype: dtypes.DType) -> int:
        return 3

    def encode(self, data: Any, extent: Extent) -> Any:
        assert extent.dtype == dtypes.FLOAT32 and extent.start % 3 == 0
        bits = np.frombuffer(data, np.uint32)
        return (bits ^ bits >> 1).view(np.uint8)

    def decode(self, data: Any, extent: Extent, out: Any) -> None:
        assert extent.dtype == dtypes.FLOAT32 and out.size == 4 * extent.count
        bits = data.view(np.uint32).copy()
        for shift in (16, 8, 4, 2, 1):
            bits ^= bits >> shift
        out.view(np.uint32)[:] = bits


@tensorwire.register
class Negated(Transform):
    """float32 with its sign changed, in blocks of 3: something that quantizers may stand behind."""

    id, name, lossless = 40_003, "negated", True

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype == dtypes.FLOAT32

    def block(self, dtype: dtypes.DType) -> int:
        return 3

    def encode(self, data: Any, extent: Extent) -> Any:
        assert extent.start % 3 == 0
        return (-np.frombuffer(data, np.float32)).view(np.uint8)

    def decode(self, data: Any, extent: Extent, out: Any) -> None:
        np.negative(data.view(np.float32), out=out.view(np.float32))


@tensorwire.register
@dataclass(frozen=True, repr=False)
class Deflate(Compressor):
    """zlib."""

    level: int = parameter(6, Range(0, 9))

    id, name = 40_004, "deflate"

    def bound(self, size: int) -> int:
        return size + size // 1000 + 64

    def encode(self, data: Any, extent: Extent) -> bytes:
        return zlib.compress(data, self.level)

    def decode(self, payload: memoryview, extent: Extent, size: int, *, exact: bool) -> bytes:
        try:
            return zlib.decompressobj().decompress(payload, size + 1)
        except zlib.error as error:
            raise FormatError(f"not deflated: {error}") from None


VALUES = (np.random.default_rng(5).standard_normal((701, 999)) * 0.5).astype(np.float32)
MODEL = {
    "w": VALUES,
    "ids": np.repeat(np.arange(9, dtype=np.uint8), 999),
    "scalar": np.float32(0.25),
    "n": np.zeros((0, 3)),
}
LOSSLESS = [
    "gray",
    "gray|zstd",
    "gray|deflate",
    "zstd|deflate",
    "raw|deflate:level=1|zstd",
    "runs",
    "runs|zstd",
    "runs|deflate|zstd",
]
LOSSY = ["fixed", "fixed:bits=9,overflow=saturate", "fixed|zstd", "negated|fixed:bits=10|deflate"]
BEFORE_BUILT_IN = {
    "negated|nf4:double_quant=true": "nf4:double_quant=true",
    "negated|int8-linear:nonfinite=raw|zstd": "int8-linear:nonfinite=raw",
    "negated|bf16:overflow=raw": "bf16",
}  # fmt: skip


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Equal names, dtypes, shapes and values; 0.0 is -0.0."""
    return left.keys() == right.keys() and all(
        np.asarray(left[name]).dtype == np.asarray(right[name]).dtype and np.array_equal(left[name], right[name])
        for name in left
    )


def expected(spec: str) -> dict[str, Any]:
    """What the model is once it went through a codec."""
    if spec in LOSSLESS:
        return MODEL
    if spec in BEFORE_BUILT_IN:
        straight = tensorwire.loads(
            tensorwire.dumps({**MODEL, "w": -VALUES, "scalar": -MODEL["scalar"]}, codec=BEFORE_BUILT_IN[spec])
        )
        return {**straight, "w": -straight["w"], "scalar": -straight["scalar"]}
    bits = parse(spec).packer.values()["bits"]
    return MODEL | {
        name: np.rint(MODEL[name] * 2.0**bits).astype(np.float32) * np.float32(2.0**-bits) for name in ("w", "scalar")
    }


ALL = [*LOSSLESS, *LOSSY, *BEFORE_BUILT_IN]


@pytest.mark.parametrize("spec", ALL)
def test_it_works_in_messages_streams_and_files(spec: str, tmp_path: Path) -> None:
    wanted = expected(spec)
    assert same(tensorwire.loads(tensorwire.dumps(MODEL, codec=spec)), wanted)
    buffers = [bytes(buffer) for buffer in tensorwire.encode(MODEL, codec=spec, frame_size=1 << 17)]
    assert len(buffers) > 10 and same(dict(tensorwire.decode(buffers)), wanted)
    tensorwire.save_file(MODEL, tmp_path / "model.tw", codec=spec)
    assert same(tensorwire.load_file(tmp_path / "model.tw"), wanted)
    with tensorwire.open_file(tmp_path / "model.tw") as file:
        assert same({name: file[name] for name in file}, wanted)


@pytest.mark.parametrize("spec", ["fixed|zstd", "gray|deflate"])
def test_it_crosses_a_socket(spec: str) -> None:
    with ThreadPoolExecutor(1) as executor, TcpListener("127.0.0.1", 0) as listener:
        accepting = executor.submit(listener.accept)
        with TcpTransport.connect("127.0.0.1", listener.port) as client, accepting.result() as server:
            sending = executor.submit(client.send, tensorwire.encode(MODEL, codec=spec))
            assert same(dict(tensorwire.decode(server.receive())), expected(spec))
            sending.result()


@pytest.mark.parametrize("spec", ALL)
def test_inspect_and_verify_name_it(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensorwire.save_file(MODEL, tmp_path / "model.tw", codec=spec)
    assert main(["inspect", str(tmp_path / "model.tw"), "--json"]) == 0
    found = {item["codec"] for item in json.loads(capsys.readouterr().out)["items"]} - {None}
    known = [repr(from_stages(codec.stages())) for codec in (parse(spec), parse(spec).lossless_fallback())]
    assert known[0] in found and found <= {*known}
    assert main(["verify", str(tmp_path / "model.tw")]) == 0


def test_bench_measures_it() -> None:
    for spec in ("fixed", "negated|nf4", "fixed|deflate"):
        (row,) = suite("error").run(Options(model="llama-tiny", codecs=(spec,)), print)
        assert row["codec"] == spec and 0 < row["rel_l2"] < 1
    (row,) = suite("size").run(Options(model="llama-tiny", codecs=("fixed",)), print)
    assert 49 < row["percent_of_fp32"] < 51
    notes: list[str] = []
    assert [*suite("size").run(Options(model="llama-tiny", codecs=("gray|deflate",)), notes.append)] == []
    assert "depends on values" in notes[0]


def test_a_stage_can_be_given_for_a_codec() -> None:
    assert tensorwire.dumps(MODEL, codec=Fixed(bits=9)) == tensorwire.dumps(MODEL, codec="fixed:bits=9")
    assert tensorwire.dumps(MODEL, codec={"w": Gray()}) == tensorwire.dumps(MODEL, codec={"w": "gray|raw"})
    assert repr(parse(Fixed(9, "saturate"))) == "fixed:bits=9,overflow=saturate"
    assert parse("gray|deflate") == Codec((Gray(), Raw(), Deflate()))


def test_its_descriptor_is_its_id_and_what_a_reader_needs() -> None:
    assert parse("negated|fixed:bits=9,overflow=saturate|deflate:level=1").stages() == (
        (40_003,),
        (40_000, 9),
        (40_004,),
    )
    assert {40_000, 40_001, 40_002, 40_003, 40_004} <= {*tensorwire.codecs.known_ids()}


def test_a_reader_without_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.tw").write_bytes(tensorwire.dumps(MODEL, codec="fixed"))
    read = f"import tensorwire; tensorwire.load_file({str(tmp_path / 'model.tw')!r})"
    done = subprocess.run(
        [sys.executable, "-c", read], capture_output=True, text=True, cwd=Path(tensorwire.__file__).parents[1]
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "UnsupportedError: codec id 40000 is private" in last and "tensorwire.register" in last and "item 'w'" in last
    )


def test_the_stored_vector_is_read_by_who_registered_its_stage_and_refused_by_others() -> None:
    data = stored("private/complement")
    assert make.complement() == data
    root = tensorwire.loads(data)
    assert np.array_equal(root["f32"], make.weights((3, 5), "complement")) and root["u8"].tolist() == [*range(7)]
    assert root["bool"].tolist() == [True, False]
    with pytest.raises(reference.Refused, match="codec 45000"):
        reference.read(data)


def test_an_unregistered_codec_is_not_written() -> None:
    class Mine(Fixed):
        id, name = 40_100, "mine"

    with pytest.raises(EncodeError, match="not registered"):
        tensorwire.dumps(MODEL, codec=Mine())

    class Stranger(Runs):
        id = 40_000  # another's

    with pytest.raises(EncodeError, match="id 40000"):
        tensorwire.dumps(MODEL, codec=Stranger())


def test_an_id_or_name_belongs_to_one_class() -> None:
    assert tensorwire.register(Fixed) is Fixed

    class OtherId(Fixed):
        id = 40_200

    class OtherName(Fixed):
        name = "fixed2"

    for other in (OtherId, OtherName):
        with pytest.raises(EncodeError, match="Fixed"):
            tensorwire.register(other)
    assert parse("fixed") == Codec((Fixed(),))


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"id": 100}, "32768"),
        ({"id": 1 << 16}, "32768"),
        ({"id": "40300"}, "32768"),
        ({"name": "Mine"}, "lower-case"),
        ({"name": "a|b"}, "lower-case"),
    ],
)
def test_registration_checks_the_class(attributes: dict[str, Any], says: str) -> None:
    row = type("Row", (Runs,), {"id": 40_300, "name": "row"} | attributes)
    with pytest.raises(EncodeError, match=says):
        tensorwire.register(row)


def test_an_incomplete_stage_is_not_registered() -> None:
    class Half(Packer):
        id, name, lossless, exact_length = 40_400, "half", True, True

    class Undecorated(Runs):
        id, name = 40_401, "undecorated"
        width: int = parameter(1, Range(1, 8), wire=True)

    class Unsaid(Transform):
        id, name = 40_402, "unsaid"
        accepts = Gray.accepts
        encode, decode = Gray.encode, Gray.decode

    @dataclass(frozen=True, repr=False)
    class Plain(Runs):
        id, name = 40_403, "plain"
        width: int = 1

    for row, says in (
        (Half, "complete"),
        (Plain, r"width .* parameter\("),
        (int, "complete"),
        (Undecorated, "decorate"),
        (Unsaid, "lossless"),
    ):
        with pytest.raises(EncodeError, match=says):
            tensorwire.register(row)  # type: ignore[type-var]


def test_a_payload_that_its_own_reader_would_refuse_is_not_sent() -> None:
    class TooLong(Fixed):
        def encode(self, *arguments: Any) -> Encoded:
            return Encoded(bytes(super().encode(*arguments).payload) + b"\0")

    with pytest.raises(EncodeError, match="bug in one of its stages"):
        tensorwire.dumps(MODEL, codec=TooLong())


@pytest.mark.parametrize("codec", ["runs", "runs|zstd", "runs|deflate"])
def test_a_length_that_depends_on_data_is_bounded(codec: str) -> None:
    stages, extent = parse(codec), Extent.whole(dtypes.UINT8, (1000,))
    bound = stages.bound(1000, dtypes.UINT8)
    assert not stages.exact_length and bound >= 5000
    stages.check_length(bound, extent)
    stages.check_length(0, extent)
    with pytest.raises(FormatError, match="at most"):
        stages.check_length(bound + 1, extent)
    for size in (0, 1, 4, 6, 5000, 5001):  # whatever is unpacked, the packer sees no more than it can have made
        payload: Any = bytes(size)
        for compressor in stages.compressors:
            payload = compressor.encode(payload, extent)
        with pytest.raises(FormatError):
            stages.decode(memoryview(payload), extent, np.empty(1000, np.uint8))


def test_unsupported_values_are_found_after_a_transform() -> None:
    bad = VALUES.copy()
    bad[5, 7] = np.inf
    with pytest.raises(NonFiniteError) as caught:
        tensorwire.dumps({"w": bad}, codec="negated|nf4")
    assert caught.value.index == 5 * 999 + 7 and "item 'w'" in str(caught.value)
    assert same(tensorwire.loads(tensorwire.dumps({"w": bad}, codec="negated|nf4:nonfinite=raw")), {"w": bad})


def test_accumulate_works_for_private_codecs() -> None:
    """Without a method of their own for it: they are decoded first."""
    values = np.linspace(-3, 3, 96, dtype=np.float32)
    extent = Extent.whole(dtypes.FLOAT32, (96,))
    for spec in ALL:
        codec, sums = parse(spec), np.ones(96)
        if codec.accepts(dtypes.FLOAT32):
            data = tensorwire.tensor.TensorView(dtypes.FLOAT32, (96,), lambda start, stop: values[start:stop])
            encoded = codec.encode(values.view(np.uint8), extent, lambda n: np.empty(n, np.uint8), codec.prepare(data))
            payload, out = memoryview(bytes(encoded.payload)), np.empty(384, np.uint8)
            codec.decode(payload, extent, out)
            codec.accumulate(payload, extent, sums, 2.0)
            assert np.array_equal(sums, 1 + 2.0 * out.view(np.float32).astype(np.float64))
            assert codec.ceiling(dtypes.FLOAT32) == np.inf
