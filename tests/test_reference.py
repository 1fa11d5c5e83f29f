"""The reference reader is a second opinion: it shares nothing with the library, its tables and arithmetic are the same
bits, and on any msgpack and any payload both say the same.
"""

import ast
import random
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import read_reference, same, stored, zstd_decompress

from tensorwire import dtypes
from tensorwire.checksum import crc32c
from tensorwire.codecs import from_floats, from_stages, parse
from tensorwire.errors import WireError
from tensorwire.kernels import cast, tables
from tensorwire.limits import DEFAULT
from tensorwire.tensor import Extent
from tensorwire.wire.values import unpack_value

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def test_it_needs_only_the_standard_library():
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_its_checksum_is_crc_32c():
    # RFC 3720, B.4, and the check value of the polynomial.
    assert reference.crc32c(b"123456789") == 0xE3069283
    assert reference.crc32c(bytes(32)) == 0x8A9136AA
    assert reference.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert reference.crc32c(bytes(range(32))) == 0x46DD794E
    for size in (0, 1, 7, 8, 63, 64, 65, 1000):
        data = random.Random(size).randbytes(size)
        assert reference.crc32c(data) == crc32c(data, 0)


def test_its_tables_are_those_of_the_kernels_bit_for_bit():
    for ours, theirs in (
        (reference.INT8_TABLE, tables.INT8_CODE),
        (reference.NF4_TABLE, tables.NF4_CODE),
        (reference.FP4_TABLE, tables.FP4_CODE),
    ):
        assert np.array(ours, np.float32).tobytes() == theirs.tobytes()


def test_it_widens_every_float16_and_narrows_as_ieee_754_says():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(every.size, np.float32)
    cast(every.view(np.float16), wide)
    assert [reference.float16_to_float32(int(bits)) for bits in every] == wide.view(np.uint32).tolist()
    finite = np.random.default_rng(0).integers(0, 1 << 32, 20_000, np.uint32)
    values = finite[finite & 0x7F800000 != 0x7F800000].view(np.float32)
    for dtype, narrow in (("float16", np.float16), ("bfloat16", np.uint16)):
        out = np.empty(values.size, narrow)
        cast(values, out, saturate=True)
        assert b"".join(reference.to_dtype(float(value), dtype) for value in values) == out.tobytes()


# ------------------------------------------------------------------------------------------------------- msgpack


def both_unpack(data: bytes) -> Any:
    """What the library says to a value's bytes, after the reference reader has said the same."""
    try:
        ours = unpack_value(data, DEFAULT)
    except WireError:
        with pytest.raises(reference.Refused):
            reference.read_value(data)
        return WireError
    assert same(reference.read_value(data), ours)
    return ours


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(width=64) | st.binary() | st.text()
values = st.recursive(
    scalars | st.just(msgpack.ExtType(1, b"\x90")),
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=3) | st.integers(-(2**53), 2**53), inner, max_size=20)
        | st.lists(inner, max_size=3).map(lambda items: msgpack.ExtType(1, msgpack.packb(items)))
    ),
)


@given(values)
def test_both_accept_every_value_in_canonical_form(value):
    data = msgpack.packb(value)
    assert both_unpack(data) is not WireError


@given(values, st.randoms(use_true_random=False))
def test_both_agree_on_changed_values(value, spread):
    data = bytearray(msgpack.packb(value))
    for _ in range(3):
        at = spread.randrange(len(data))
        data[at] = spread.choice([data[at] ^ 1 << spread.randrange(8), spread.randrange(256)])
        both_unpack(bytes(data))


@given(
    st.binary(max_size=12)
    | st.tuples(st.integers(0xC0, 0xDF), st.binary(max_size=20)).map(lambda p: bytes([p[0]]) + p[1])
)
def test_both_agree_on_any_bytes(data):
    both_unpack(data)


def test_both_refuse_non_canonical_values():
    wide = [
        b"\xcc\x7f", b"\xcd\x00\xff", b"\xce\x00\x00\xff\xff", b"\xcf\0\0\0\0\xff\xff\xff\xff",
        b"\xd0\x00", b"\xd0\xe0", b"\xd1\xff\x80", b"\xd2\xff\xff\x80\x00", b"\xd3\xff\xff\xff\xff\x80\0\0\0",
        b"\xd9\x01a", b"\xda\x00\x20" + b"a" * 32, b"\xdb\x00\x00\x01\x00" + b"a" * 256,
        b"\xc5\x00\x01a", b"\xc6\x00\x00\x00\x01a", b"\xdc\x00\x01\xc0", b"\xdd\x00\x00\x00\x01\xc0",
        b"\xde\x00\x01\xa0\xc0", b"\xdf\x00\x00\x00\x01\xa0\xc0", b"\xca\x00\x00\x00\x00",
        b"\xc7\x01\x01\x90", b"\xc8\x00\x01\x01\x90", b"\xc9\x00\x00\x00\x01\x01\x90", b"\xd5\x01\xdc\x00",
    ]  # fmt: skip
    for data in wide:
        assert both_unpack(data) is WireError, data


def test_both_stop_at_the_same_depth():
    for depth in (31, 32, 33, 500):
        assert (both_unpack(b"\x91" * depth + b"\xc0") is WireError) == (depth > 32)
        nested: Any = 0
        for _ in range(depth):
            nested = msgpack.ExtType(1, msgpack.packb([nested]))
        assert (both_unpack(msgpack.packb(nested)) is WireError) == (depth > 32)


# ------------------------------------------------------------------------------------------------------ Payloads

CODECS = [
    ((2,),), ((3,),), ((4, 16),), ((4, 4096),), ((5, 16),), ((5, 256),),
    ((6, 32, 0),), ((6, 64, 1),), ((7, 64, 0),), ((7, 32, 1),),
]  # fmt: skip


@given(
    st.sampled_from(CODECS),
    st.sampled_from([*FLOATS]),
    st.integers(1, 600),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_both_decode_any_payload_to_the_same_bits_or_refuse_it(stages, dtype, count, seed, wild):
    codec, described = from_stages(stages), dtypes.BY_NAME[dtype]
    if not codec.accepts(described):
        described = dtypes.FLOAT32
    rng = np.random.default_rng(seed)
    sizes = codec.sizes(count, described)
    payload = rng.integers(0, 256, sizes.total, np.uint8)
    if not wild:  # numbers that are fit to be scales, codes that are used
        scales = np.abs(rng.standard_normal(sizes.metadata + 1) * 10.0 ** rng.integers(-39, 38)).astype(np.float32)
        halves = (scales.view(np.uint32) >> 16).astype(np.uint16)
        fit = halves if stages[0][0] == 5 else scales
        payload[: sizes.metadata] = fit.view(np.uint8)[: sizes.metadata]
        if stages[0][0] == 5:
            payload[sizes.metadata :][payload[sizes.metadata :] == 0x80] = 0
        elif stages[0][0] in (6, 7) and count % 2:
            payload[-1] &= 0xF0
    out = np.empty(count * described.itemsize, np.uint8)
    try:
        with np.errstate(over="ignore"):
            codec.decode(memoryview(payload), Extent.whole(described, (count,)), out)
    except WireError:
        with pytest.raises(reference.Refused):
            decode(stages, described, count, payload)
    else:
        assert decode(stages, described, count, payload) == out.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(["float8_e5m2", "bfloat16", "float32", "float64", "complex64"]),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    damage=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=2),
    cut=st.integers(-3, 3),
)
def test_both_read_planes_alike_or_refuse_them(dtype, count, seed, damage, cut):
    described, rng = dtypes.BY_NAME[dtype], np.random.default_rng(seed)
    codec, extent = parse("planes"), Extent.whole(described, (count,))
    data = rng.integers(0, 256, count * described.itemsize, np.uint8) & rng.choice([0xFF, 0x83, 0x01]).astype(np.uint8)
    data[data.size // 3 : data.size // 3 * 2] *= rng.integers(0, 2, dtype=np.uint8)
    payload = bytearray(codec.encode(data, extent, lambda size: np.empty(size, np.uint8)).payload)
    for at, value in damage:
        payload[at % min(len(payload), 40)] = value
    payload = bytes(payload[:cut] if cut < 0 else payload + bytes(cut))
    out = np.empty(data.size, np.uint8)
    try:
        codec.decode(memoryview(payload), extent, out)
    except WireError:
        with pytest.raises(reference.Refused):
            reference.decode_planes(dtype, described.itemsize, count, payload, zstd_decompress)
    else:
        assert reference.decode_planes(dtype, described.itemsize, count, payload, zstd_decompress) == out.tobytes()
        assert damage or cut or np.array_equal(out, data)


SPARSE = ["k=1", "k=4,bits=2", "k=6,dct=true", "k=7,bits=8", "k=9,dct=true,bits=16", "k=40,bits=4"]
SPARSE += ["k=3,scaled=true", "k=9,bits=2,dct=true,scaled=true"]


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from([f"sparse:{spec},rows=3,cols=7,width=11" for spec in SPARSE] + ["lowrank:width=11,rank=2"]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    count=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    damage=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=2),
    cut=st.sampled_from([0, 0, 0, -1, 1]),
)
def test_both_read_sparse_and_low_rank_alike_or_refuse_them(spec, dtype, count, seed, damage, cut):
    described, rng, codec = dtypes.BY_NAME[dtype], np.random.default_rng(seed), parse(spec)
    extent = Extent.whole(described, (count,))
    values = rng.standard_normal(count).astype(np.float32) * (rng.random(count) < rng.choice([0.1, 1])) * 1e3
    values *= np.ldexp(np.float32(1), -rng.integers(0, rng.choice([1, 20]), count).astype(np.int32))
    data = from_floats(values, described)
    payload = bytearray(codec.encode(data, extent, lambda size: np.empty(size, np.uint8)).payload)
    for at, value in damage:
        payload[at % len(payload)] = value
    payload = bytes(payload[:cut] if cut < 0 else payload + bytes(cut))
    (number, *parameters) = codec.stages()[0]
    read = reference.decode_sparse if number == reference.SPARSE else reference.decode_lowrank
    most = reference.payload_length([[number, *parameters]], dtype, described.itemsize, count)
    assert codec.sizes(count, described).total == most
    out = np.empty(data.size, np.uint8)
    try:
        codec.check_length(len(payload), extent)
        codec.decode(memoryview(payload), extent, out)
    except WireError:
        if len(payload) <= most and (number == reference.SPARSE or len(payload) == most):
            with pytest.raises(reference.Refused):
                read(parameters, dtype, count, payload)
    else:
        assert read(parameters, dtype, count, payload) == out.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from(["raw", "nf4:blocksize=32", "fp4:double_quant=true", "int8-linear:blocksize=16", "planes"]),
    count=st.integers(1, 900),
    seed=st.integers(0, 2**32 - 1),
    damage=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=2),
    cut=st.integers(-3, 3),
)
def test_both_unpack_entropy_alike_or_refuse_it(spec, count, seed, damage, cut):
    codec, extent = parse(f"{spec}|entropy"), Extent.whole(dtypes.FLOAT32, (count,))
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    values[rng.integers(0, count) :][: count // 2] = 0
    made = codec.encode(values.view(np.uint8), extent, lambda size: np.empty(size, np.uint8), 1.0).payload
    payload, content = bytearray(made), codec.unpack(memoryview(made), extent)
    for at, value in damage:
        payload[at % min(len(payload), 40)] = value
    payload = bytes(payload[:cut] if cut < 0 else payload + bytes(cut))
    size, exact = codec.sizes(count, dtypes.FLOAT32).total, codec.packer.exact_length
    try:
        unpacked = bytes(codec.unpack(memoryview(payload), extent))
    except WireError:
        with pytest.raises(reference.Refused):
            reference.read_entropy(payload, size, zstd_decompress, exact=exact)
    else:
        assert reference.read_entropy(payload, size, zstd_decompress, exact=exact) == unpacked
        assert damage or cut or unpacked == content


def decode(stages: tuple, dtype: dtypes.DType, count: int, payload: np.ndarray) -> bytes:
    codec = [list(stage) for stage in stages]
    assert reference.payload_length(codec, dtype.name, dtype.itemsize, count) == payload.size
    return reference.decode_payload(codec, dtype.name, dtype.itemsize, count, payload.tobytes())


def test_without_a_decompressor_it_checks_uncompressed_data():
    whole = read_reference(stored("zstd")).root
    without = reference.read(stored("zstd")).root
    assert [*without] == [*whole]
    assert all(tensor.data is None for tensor in without.values() if isinstance(tensor, reference.Tensor))
    assert without["text"] == whole["text"]
    for name in (
        "zstd-cut",
        "zstd-window-16-mib",
        "zstd-dictionary",
        "zstd-two-frames",
        "zstd-content-size-more",
    ):
        with pytest.raises(reference.Refused, match="zstd"):
            reference.read(stored(f"bad/{name}"))
