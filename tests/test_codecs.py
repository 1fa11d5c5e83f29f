"""Codecs as values: specs, wire ids, slices; and the metadata that a peer may not send."""

import ctypes
import ctypes.util
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

import tensorwire
from tensorwire import dtypes, kernels
from tensorwire.checksum import crc32c
from tensorwire.codecs import (
    BUILT_IN,
    NF4,
    Codec,
    Raw,
    Zstd,
    as_floats,
    describe,
    from_floats,
    from_stages,
    is_float,
    parse,
)
from tensorwire.codecs.stage import spell
from tensorwire.errors import EncodeError, FormatError, NonFiniteError, UnsupportedError
from tensorwire.tensor import Extent, TensorView

SPECS = [
    "raw",
    "fp16",
    "fp16:overflow=saturate",
    "bf16:overflow=raw",
    "int8",
    "int8:blocksize=256",
    "int8-linear",
    "int8-linear:nonfinite=raw",
    "nf4",
    "nf4:blocksize=128,double_quant=true",
    "fp4:double_quant=true",
    "raw|zstd",
    "bf16|zstd:level=9",
    "nf4:blocksize=32|zstd",
    "planes",
    "planes|zstd",
    "bf16|entropy",
    "nf4:double_quant=true|entropy",
    "raw|entropy",
    "patch",
]
LOSSY = ["fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "bf16|zstd", "nf4|entropy"]
VALUES = (np.random.default_rng(3).standard_normal(70_001) * 0.02).astype(np.float32)


@pytest.mark.parametrize("spec", ["fp16", "bf16", "int8", "int8-linear", "nf4", "fp4"])
def test_a_checksum_comes_with_the_payload(spec: str) -> None:
    for count in (0, 1, 63, 4096, VALUES.size):
        encoded = parse(spec).encode(VALUES[:count], Extent.whole(dtypes.FLOAT32, (count,)), take)
        assert encoded.crc == crc32c(encoded.payload)


@contextmanager
def rounding(mode: int) -> Iterator[None]:
    """The rounding mode of this thread, by its number in <fenv.h> on x86."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    assert library.fesetround(mode) == 0
    yield
    library.fesetround(0)


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.skipif(kernels.implementation == "numpy", reason="NumPy cannot say how the processor rounds")
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="numbers of one platform")
@pytest.mark.parametrize("environment", [subnormals_flushed, *(partial(rounding, mode) for mode in (0x400, 0x800))])
@pytest.mark.parametrize("spec", [*LOSSY, "fp4:double_quant=true,blocksize=128"])
def test_bits_do_not_depend_on_how_the_host_rounds(spec: str, environment: Any) -> None:
    for dtype in (np.float32, np.float16):
        tiny = np.finfo(dtype).smallest_normal
        for values in (VALUES[:5000].astype(dtype), (VALUES[:5000] * 50 * tiny).astype(dtype)):
            data = tensorwire.dumps(values, codec=spec)
            decoded = tensorwire.loads(data).tobytes()
            with environment():
                assert tensorwire.dumps(values, codec=spec) == data
                assert tensorwire.loads(data).tobytes() == decoded


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [dtypes.FLOAT32, dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT64, dtypes.COMPLEX64])
def test_accumulate_adds_the_decoded_values(spec: str, dtype: Any) -> None:
    """sum + weight * value, each rounded once, whether straight from the codes or not."""
    codec = parse(spec)
    if not codec.accepts(dtype):
        return
    data = from_floats(VALUES[:6000], dtype)
    count = data.size // dtype.itemsize
    extent = Extent.whole(dtype, (count,))
    view = TensorView(dtype, (count,), lambda start, stop: data)
    payload = memoryview(bytes(codec.encode(data, extent, take, codec.prepare(view)).payload))
    out = np.empty(data.size, np.uint8)
    codec.decode(payload, extent, out)
    sums = np.arange(6000) / 7
    expected = sums + 0.3 * as_floats(out, dtype).astype(np.float64)
    codec.accumulate(payload, extent, sums, 0.3)
    assert sums.tobytes() == expected.tobytes()


def test_accumulate_refuses_codes_that_no_encoder_makes() -> None:
    codec, extent = parse("int8-linear:blocksize=16"), Extent.whole(dtypes.FLOAT32, (16,))
    for payload, says in ((b"\x80\x3f" + b"\x80" * 16, "-128"), (b"\xff\xff" + bytes(16), "scale")):
        with pytest.raises(FormatError, match=says):
            codec.accumulate(memoryview(payload), extent, np.zeros(16), 1.0)


def take(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def payload_of(codec: Codec, values: np.ndarray) -> bytearray:
    view = TensorView(dtypes.FLOAT32, values.shape, lambda start, stop: values[start:stop])
    encoded = codec.encode(values, Extent.whole(dtypes.FLOAT32, values.shape), take, codec.prepare(view))
    assert encoded.crc in (None, crc32c(encoded.payload))
    return bytearray(encoded.payload)


def decoded(codec: Codec, payload: bytes | bytearray, count: int) -> np.ndarray:
    extent = Extent.whole(dtypes.FLOAT32, (count,))
    codec.check_length(len(payload), extent)
    out = np.empty(count, np.float32)
    codec.decode(memoryview(payload), extent, out.view(np.uint8))
    return out


@pytest.mark.parametrize("spec", SPECS)
def test_the_repr_is_the_spec_that_rebuilds_it(spec: str) -> None:
    codec = parse(spec)
    assert repr(codec) == str(codec) == spec
    assert parse(repr(codec)) == codec and hash(parse(spec)) == hash(codec)


def test_zstd_alone_means_raw_then_zstd() -> None:
    assert parse("zstd") == parse("raw|zstd")
    assert parse("zstd:level=9") == parse("raw|zstd:level=9")


@pytest.mark.parametrize("spec", SPECS)
def test_descriptors_carry_everything_that_decoding_needs(spec: str) -> None:
    codec = parse(spec)
    received = from_stages(codec.stages())
    assert received.stages() == codec.stages()
    if spec != "raw":
        payload = payload_of(codec, VALUES)
        assert np.array_equal(decoded(received, payload, VALUES.size), decoded(codec, payload, VALUES.size))


@pytest.mark.parametrize(
    ("spec", "lossless", "exact", "in_place", "on_device", "fallback"),
    [
        ("raw", True, True, True, False, "raw"),
        ("raw|zstd:level=9", True, False, False, False, "raw|zstd:level=9"),
        ("planes", True, False, False, False, "raw"),
        ("patch", True, False, False, False, "raw"),
        ("bf16", False, True, False, True, "raw"),
        ("nf4:double_quant=true|zstd", False, False, False, True, "raw|zstd"),
    ],
)
def test_a_codec_has_the_properties_that_streams_need(
    spec: str, lossless: bool, exact: bool, in_place: bool, on_device: bool, fallback: str
) -> None:
    codec = parse(spec)
    assert (codec.lossless, codec.exact_length, codec.in_place, codec.on_device) == (
        lossless,
        exact,
        in_place,
        on_device,
    )
    assert repr(codec.lossless_fallback()) == fallback and codec.lossless_fallback().lossless
    size = codec.sizes(1000, dtypes.FLOAT32).total
    assert codec.bound(1000, dtypes.FLOAT32) == (size + size // 256 + 64 if codec.compressors else size)


def test_stages_make_a_codec_in_one_order_only() -> None:
    assert Codec((NF4(), Zstd(9))) == parse("nf4|zstd:level=9")
    for stages in ((), (Zstd(),), (Zstd(), NF4()), (NF4(), NF4(128)), (Raw(), Zstd(), Zstd(9)), (Raw(), "zstd")):
        with pytest.raises(EncodeError):
            Codec(stages)


def test_help_lists_every_stage_and_parameter() -> None:
    text = describe()
    listed = [line.split()[0] for line in text.splitlines() if line.strip()]
    for stage in BUILT_IN:
        assert stage.name in listed
        assert all(
            f"{known.name} {spell(known.default)} ({known.legal})" in text.replace("\n" + " " * 15, " ")
            for known in stage.parameters()
        )


FLOATS = [dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.FLOAT64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bytes_of_floats_can_be_calculated_with_and_rounded_back(dtype: dtypes.DType) -> None:
    values = np.concatenate([VALUES[:1000], [0.0, -0.0, np.inf, -np.inf, 1e-40]]).astype(np.float64)
    data = from_floats(values, dtype)
    assert data.dtype == np.uint8 and data.size == values.size * dtype.itemsize
    floats = as_floats(data, dtype)
    assert np.allclose(floats, values, rtol=2**-8, atol=1e-7)
    assert np.array_equal(from_floats(floats, dtype), data)
    out = np.empty_like(data)
    assert from_floats(floats, dtype, out) is out and np.array_equal(out, data)
    if dtype != dtypes.BFLOAT16:
        assert np.shares_memory(floats, data)


def test_bytes_of_other_dtypes_are_refused() -> None:
    assert [dtype for dtype in dtypes.ALL if is_float(dtype)] == FLOATS
    for call in (as_floats, from_floats):
        with pytest.raises(EncodeError, match="int64"):
            call(np.zeros(8, np.uint8), dtypes.INT64)


def test_ids_are_fixed() -> None:
    assert {stage.name: stage.id for stage in BUILT_IN} == {
        "raw": 1,
        "fp16": 2,
        "bf16": 3,
        "int8": 4,
        "int8-linear": 5,
        "nf4": 6,
        "fp4": 7,
        "planes": 8,
        "sparse": 10,
        "lowrank": 11,
        "patch": 9,
        "zstd": 64,
        "entropy": 65,
    }


@pytest.mark.parametrize(
    "spec",
    ["", "nf5", "nf4:blocksize=63", "nf4:blocksize=8192", "nf4:size=64", "nf4:blocksize", "zstd|nf4", "raw|zstd|zstd",
     "fp16:overflow=maybe", "nf4:nonfinite=0", "raw:x=1", "zstd:level=99", "nf4:blocksize=64,blocksize=64", 7],
)  # fmt: skip
def test_a_wrong_spec_is_refused(spec: object) -> None:
    with pytest.raises(EncodeError):
        parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [("NF4", "nf4"), ("bfloat16", "bf16"), ("int4", "nf4"), ("int8_linear", "int8-linear"), ("bf16|Gzip", "zstd"),
     ("nf4:block_size=64", "blocksize"), ("nf4:double-quant=true", "double_quant"), ("nf4|zstd:lvl=3", "level")],
)  # fmt: skip
def test_a_misspelling_gets_suggestions_in_one_line(spec: str, nearest: str) -> None:
    with pytest.raises(EncodeError, match=rf"did you mean {nearest}\?") as raised:
        parse(spec)
    assert "\n" not in str(raised.value) and ("known: raw," in str(raised.value) or "it has" in str(raised.value))


@pytest.mark.parametrize(
    ("spec", "says"),
    [("q4_0", "unknown codec 'q4_0'; known"), ("nf4:double_quant=yes", "must be false or true, not 'yes'"),
     (NF4, "not the class NF4"), (None, "not NoneType")],
)  # fmt: skip
def test_an_unlike_name_is_refused_without_a_suggestion(spec: Any, says: str) -> None:
    with pytest.raises(EncodeError, match=says):
        parse(spec)


def test_parameters_may_be_given_as_python_values() -> None:
    wanted = parse("nf4:blocksize=128,double_quant=true")
    assert parse("nf4", blocksize=128, double_quant=True) == wanted
    assert parse("nf4:blocksize=128,double_quant=True") == wanted
    with pytest.raises(EncodeError, match=r"'block_size' \(did you mean blocksize\?\)"):
        parse("nf4", block_size=128)
    for spec in ("nf4|zstd", "nf4:blocksize=64", wanted):
        with pytest.raises(EncodeError, match="give parameters in the spec"):
            parse(spec, double_quant=True)
    assert parse(wanted) is wanted


@pytest.mark.parametrize(
    "stages",
    [
        ((1, 1),),
        ((4,),),
        ((4, 0),),
        ((4, 63),),
        ((4, 1 << 31),),
        ((6, 64),),
        ((6, 64, 2),),
        ((6, 16, 0),),
        ((7, 8192, 1),),
    ],
)
def test_wrong_parameters_on_the_wire_are_refused(stages: tuple) -> None:
    with pytest.raises(FormatError):
        from_stages(stages)


@pytest.mark.parametrize(
    "stages",
    [((64,),), ((1,), (2,)), ((1,), (64,), (1,)), ((64,), (1,)), ((1,), (64,), (64,)), ((1,), (64, 3)), ()],
)
def test_stages_in_an_order_that_no_writer_makes_are_refused(stages: tuple) -> None:
    with pytest.raises(FormatError):
        from_stages(stages)


@pytest.mark.parametrize("stages", [((0,),), ((99,),), ((1,), (66,)), ((32768,),), ((65535, 1), (64,))])
def test_unknown_codecs_on_the_wire_are_unsupported(stages: tuple) -> None:
    with pytest.raises(UnsupportedError):
        from_stages(stages)


@pytest.mark.parametrize("spec", LOSSY)
def test_slices_decode_alone_to_the_same_values(spec: str) -> None:
    codec = parse(spec)
    whole = decoded(codec, payload_of(codec, VALUES), VALUES.size)
    step = codec.block(dtypes.FLOAT32) * 3
    if "double_quant" in spec:  # the offset is the whole tensor's
        step = VALUES.size
    for start in range(0, VALUES.size, step):
        part = VALUES[start : start + step]
        assert np.array_equal(decoded(codec, payload_of(codec, part), part.size), whole[start : start + step])


@pytest.mark.parametrize("spec", [*LOSSY, "raw"])
@pytest.mark.parametrize("budget", [100, 5000, 100_000])
def test_fit_stays_within_its_budget(spec: str, budget: int) -> None:
    codec = parse(spec)
    count = min(codec.fit(budget, dtypes.FLOAT32), VALUES.size)
    assert count % codec.block(dtypes.FLOAT32) == 0 or count == VALUES.size
    if count:
        noise = np.random.default_rng(0).integers(0, 1 << 30, count).astype(np.uint32).view(np.float32)
        assert len(payload_of(codec, noise)) <= budget


@pytest.mark.parametrize("spec", ["int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "nf4|zstd"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 5000, 70_000])
def test_nonfinite_input_is_refused_with_its_index(spec: str, bad: float, index: int) -> None:
    values = VALUES.copy()
    values[index] = bad
    with pytest.raises(NonFiniteError) as caught:
        payload_of(parse(spec), values)
    assert caught.value.index == index


def test_overflow_of_a_cast_is_refused_or_saturated() -> None:
    values = VALUES.copy()
    values[123] = -1e5
    with pytest.raises(NonFiniteError, match="element 123 is -1"):
        payload_of(parse("fp16"), values)
    saturating = parse("fp16:overflow=saturate")
    assert decoded(saturating, payload_of(saturating, values), values.size)[123] == -65504


def test_casts_keep_infinities_and_nan() -> None:
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 1e-40], np.float32)
    for spec in ("fp16", "bf16"):
        out = decoded(parse(spec), payload_of(parse(spec), values), values.size)
        assert out[0] == np.inf and out[1] == -np.inf and np.isnan(out[2]) and np.signbit(out[3])


@pytest.mark.parametrize("spec", ["int8", "nf4", "fp4", "nf4:double_quant=true"])
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0xFF800000, 0x80000000, 0xBF800000])
def test_an_impossible_absmax_is_refused(spec: str, bits: int) -> None:
    codec = parse(spec)
    payload = payload_of(codec, VALUES)
    payload[:4] = bits.to_bytes(4, "little")
    with pytest.raises(FormatError):
        decoded(codec, payload, VALUES.size)


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0x8000, 0xBF80])
def test_an_impossible_scale_is_refused(bits: int) -> None:
    codec = parse("int8-linear")
    payload = payload_of(codec, VALUES)
    payload[:2] = bits.to_bytes(2, "little")
    with pytest.raises(FormatError):
        decoded(codec, payload, VALUES.size)


def test_codes_that_no_encoder_writes_are_refused() -> None:
    linear = parse("int8-linear")
    payload = payload_of(linear, VALUES)
    payload[-1] = 0x80
    with pytest.raises(FormatError):
        decoded(linear, payload, VALUES.size)
    nf4 = parse("nf4")
    payload = payload_of(nf4, VALUES)
    payload[-1] |= 1
    with pytest.raises(FormatError):
        decoded(nf4, payload, VALUES.size)


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("change", [-1, 1, -1000])
def test_a_payload_of_another_length_is_refused(spec: str, change: int) -> None:
    codec = parse(spec)
    payload = payload_of(codec, VALUES)
    payload = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(FormatError):
        decoded(codec, payload, VALUES.size)


def test_inconsistent_zstd_frames_are_refused() -> None:
    zstandard = pytest.importorskip("zstandard")
    codec, count = parse("raw|zstd"), 1024
    bomb = zstandard.compress(bytes(1 << 30))
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4 * count))
    good = zstandard.compress(bytes(4 * count))
    skippable = b"\x50\x2a\x4d\x18\x00\x00\x00\x00"
    for payload in (
        bomb,
        no_size,
        good + skippable,
        skippable + good,
        good + good,
        good[:-1],
        b"",
        b"\x28\xb5\x2f\xfd",
    ):
        with pytest.raises(FormatError):
            decoded(codec, payload, count)
    assert not decoded(codec, good, count).any()


def zstd_frame(head: bytes, *blocks: bytes) -> bytes:
    return b"\x28\xb5\x2f\xfd" + head + b"".join(blocks)


def zstd_block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


SINGLE, WINDOWED = 0xA0, 0x80  # descriptors with four bytes of content size: all in one segment, or with a window
RAW_BLOCK, RUN = 0, 1


def test_a_zstd_frame_may_have_a_window_as_large_as_its_content() -> None:
    count, blocks = 10 << 20, 80
    size = count.to_bytes(4, "little")
    runs = [zstd_block(RUN, 128 << 10, b"\x07", last=number == blocks - 1) for number in range(blocks)]
    for head in (bytes([SINGLE]) + size, bytes([WINDOWED, 13 << 3 | 2]) + size):  # 2^23 bytes and 2/8 more
        assert (unpacked(zstd_frame(head, *runs), count) == 7).all()
    with pytest.raises(FormatError, match="window"):
        unpacked(zstd_frame(bytes([WINDOWED, 13 << 3 | 3]) + size, *runs), count)


def test_a_zstd_frame_may_name_dictionary_0_and_have_a_checksum() -> None:
    zstandard = pytest.importorskip("zstandard")
    block = zstd_block(RAW_BLOCK, 3, b"abc", last=True)
    assert bytes(unpacked(zstd_frame(b"\xa1\x00\x03\0\0\0", block), 3)) == b"abc"
    with pytest.raises(FormatError, match="dictionary"):
        unpacked(zstd_frame(b"\xa1\x01\x03\0\0\0", block), 3)
    summed = zstandard.ZstdCompressor(write_checksum=True).compress(b"abc" * 1000)
    assert bytes(unpacked(summed, 3000)) == b"abc" * 1000
    with pytest.raises(FormatError):
        unpacked(summed[:-1] + bytes([summed[-1] ^ 1]), 3000)


@pytest.mark.parametrize(
    ("blocks", "count"),
    [
        ([zstd_block(RUN, 200_000, b"x", last=True)], 200_000),
        ([zstd_block(RUN, 128 << 10, b"x"), zstd_block(RUN, (128 << 10) + 1, b"x", last=True)], (256 << 10) + 1),
        ([zstd_block(3, 3, b"abc", last=True)], 3),
        ([zstd_block(RAW_BLOCK, 3, b"abc")], 3),
        ([zstd_block(RAW_BLOCK, 4, b"abc", last=True)], 3),
        ([zstd_block(RAW_BLOCK, 3, b"abc", last=True), zstd_block(RAW_BLOCK, 0, b"", last=True)], 3),
        ([zstd_block(RAW_BLOCK, 3, b"abc", last=True), b"\0"], 3),
        ([b"\x19"], 3),
        ([], 3),
    ],
)
def test_zstd_blocks_obey_the_rfc(blocks: list[bytes], count: int) -> None:
    with pytest.raises(FormatError, match="zstd"):
        unpacked(zstd_frame(bytes([SINGLE]) + count.to_bytes(4, "little"), *blocks), count)


def unpacked(payload: bytes, count: int) -> np.ndarray:
    codec, extent, out = parse("raw|zstd"), Extent.whole(dtypes.UINT8, (count,)), np.empty(count, np.uint8)
    codec.check_length(len(payload), extent)
    codec.decode(memoryview(payload), extent, out)
    return out


@pytest.mark.parametrize("level", [1, 3, 6, 9, 13, 17, 19, 22])
def test_every_frame_that_zstd_makes_is_accepted(level: int) -> None:
    spread = np.random.default_rng(level)
    for values in (
        np.cumsum(spread.standard_normal(100_000)).astype(np.float32),
        spread.integers(0, 3, 300_000).astype(np.float32),
        spread.random(50_000, np.float32),
        np.zeros(200_000, np.float32),
        np.arange(7, dtype=np.float32),
    ):
        codec = parse(f"zstd:level={level}")
        assert np.array_equal(decoded(codec, payload_of(codec, values), values.size), values)
