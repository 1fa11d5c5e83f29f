"""Makes the golden vectors: `python tests/golden/make.py` writes those that are missing, `--all` every one.

A vector is a name and a recipe. Values come from SHA-256 in counter mode, so that a recipe means the same bytes for
ever; the streams come from the library, a few are put together by hand. README.md says what made the stored ones.
"""

import argparse
import hashlib
import io
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]

import numpy as np
from bad import BAD
from frames import TARGET, Frame, assemble, at_rest, take_apart
from reference import crc32c
from vectors import InMemory

import tensorwire.numpy as tw
from tensorwire import dtypes, encode_file, register, streams
from tensorwire.checksum import crc32c as tw_crc32c
from tensorwire.codecs import RAW, Encoded, LowRank, Packer, Range, Readymade, Sizes, parameter
from tensorwire.files.items import read_item
from tensorwire.streams.receiver import check_codec
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.wire import AliasItem, Archive, FileItem, TensorItem, ValueItem

LIBZSTD = (1, 5, 7)  # of the stored vectors: another version may compress to other bytes
GOLDEN: dict[str, Callable[[], bytes]] = {}

NATIVE = {dtype.name for dtype in dtypes.ALL if dtype.name in np.sctypeDict and dtype.name != "complex32"}
SPECIAL = np.array(
    [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFA00001,
     0x3F800000, 0x477FE000, 0x33000000, 0x33800001, 0x3F808000, 0x3F818000, 0x387FE000, 0x00800000],
    np.uint32,
).view(np.float32)  # fmt: skip


def random_bytes(count: int, seed: str) -> bytes:
    blocks = (hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(-(-count // 32)))
    return b"".join(blocks)[:count]


def weights(shape: tuple[int, ...] | int, seed: str) -> np.ndarray:
    """float32 values near a normal distribution: sums of four uniform ones, exact in float32."""
    count = int(np.prod(shape))
    quarters = np.frombuffer(random_bytes(8 * count, seed), "<u2").reshape(count, 4).astype(np.int64)
    return ((quarters.sum(axis=1) - 131070) / 65536).astype(np.float32).reshape(shape)


def bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """Bit patterns as an array of a dtype that NumPy alone does not have."""
    return array.view(np.dtype(array.dtype, metadata={"tensorwire": dtype}))


def bfloat16(values: np.ndarray) -> np.ndarray:
    return bits((values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")


def every_dtype() -> dict[str, np.ndarray]:
    """Three elements of each dtype of the format."""
    tensors = {}
    for dtype in dtypes.ALL:
        raw = np.frombuffer(random_bytes(3 * dtype.itemsize, dtype.name), np.uint8)
        if dtype is dtypes.BOOL:
            tensors[dtype.name] = raw > 127
        elif dtype.name in NATIVE:
            tensors[dtype.name] = raw.view(dtype.name)
        else:
            tensors[dtype.name] = bits(raw.view(f"u{dtype.itemsize}"), dtype.name)
    return tensors


def floats(count: int, seed: str) -> dict[str, np.ndarray]:
    """What quantizing codecs carry: each float dtype, and a dtype and a value that they do not."""
    values = weights(count, seed)
    return {
        "f32": values,
        "f16": values[: count // 2].astype(np.float16),
        "bf16": bfloat16(values[: count // 2 + 1]),
        "zero": np.zeros(17, np.float32),
        "scalar": values[3],
        "none": np.zeros((0, 3), np.float32),
        "int64": np.arange(-1, 2),
    }


VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [
        0,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**32 - 1,
        2**32,
        2**64 - 1,
        -1,
        -32,
        -33,
        -128,
        -129,
        -(2**63),
    ],
    "floats": [0.0, -0.0, 1.5, float("inf"), float("-inf"), 5e-324],
    "text": ["", "weight", "größe ✓ \U0001d6fc", "\n\x00\x1b", "x" * 32],
    "bytes": [b"", b"\x00\xff", b"y" * 17],
    "tuple": (1, (), (2.0, [None]), {"k": ()}),
    "keys": {0: "int", "0": "text", -(2**53): 1, 2**53: 2, "": 3},
    "empty": [{}, [], ()],
}

# An optimizer's state dict: tensors, values and containers in one another, integer keys.
NESTED: dict[str, Any] = {
    "state": {
        0: {"step": np.float32(3), "exp_avg": np.arange(3, dtype=np.float32)},
        1: {"step": np.float32(4), "exp_avg": np.arange(2, dtype=np.float32)},
    },
    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "params": [0, 1]}],
    "pair": (np.int8(7), [], {"x": (np.bool_(True),)}),
}


@register
@dataclass(frozen=True, repr=False)
class Complement(Packer):
    """A private stage: each byte, exclusive or `mask`."""

    mask: int = parameter(0xFF, Range(0, 255), wire=True)

    id, name, lossless, exact_length = 45_000, "complement", True, True

    def accepts(self, dtype: dtypes.DType) -> bool:
        return dtype is not dtypes.BOOL

    def sizes(self, count: int, dtype: dtypes.DType) -> Sizes:
        return Sizes(count * dtype.itemsize)

    def encode(self, data: Any, extent: Any, take: Any, context: Any = None) -> Encoded:
        return Encoded(np.frombuffer(data, np.uint8) ^ np.uint8(self.mask))

    def decode(self, payload: memoryview, extent: Any, out: Any, uncached: bool | None = None) -> None:
        np.bitwise_xor(np.frombuffer(payload, np.uint8), np.uint8(self.mask), out=out)


def complement() -> bytes:
    numbers = np.arange(7, dtype=np.uint8)
    tensors = {"f32": weights((3, 5), "complement"), "bool": np.array([True, False]), "u8": numbers}
    return tw.dumps(tensors, codec={"f32": "complement", "*": "complement:mask=85"})


# Vectors with private stages, which a reader has to be told of: in a folder of their own.
PRIVATE: dict[str, Callable[[], bytes]] = {"complement": complement}


def golden(recipe: Callable[[], bytes]) -> Callable[[], bytes]:
    GOLDEN[recipe.__name__.strip("_").replace("_", "-")] = recipe
    return recipe


def join(buffers: Any) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


@golden
def dtypes_raw() -> bytes:
    return tw.dumps(every_dtype())


def many() -> dict[str, Any]:
    """Small items of every sort that travel in bundles, with what has no data and what is not small among them."""
    expert = {"w": weights((2, 20), "w"), "b": weights(2, "b"), "none": np.zeros((0, 2), np.float32), "rank": 8}
    experts = [{name: part + 1 if name == "w" else part for name, part in expert.items()} for _ in range(40)]
    experts[0]["again"] = experts[0]["w"]
    return {"experts": experts, "large": weights(1200, "large"), "names": [{"x": np.int8(n)} for n in range(20)]}


@golden
def bundles() -> bytes:
    return tw.dumps(many(), codec={"*/w": "nf4:blocksize=32|zstd", "*/b": "bf16", "*": "raw"})


@golden
def bundles_at_rest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tw.save_file(many(), Path(folder) / "x.tw")
        return (Path(folder) / "x.tw").read_bytes()


@golden
def values() -> bytes:
    return tw.dumps(VALUES)


@golden
def value_root() -> bytes:
    return tw.dumps((None, -1, "x"))


@golden
def tensor_root() -> bytes:
    return tw.dumps(np.float64(-0.0))


@golden
def empty() -> bytes:
    return tw.dumps({})


@golden
def nested() -> bytes:
    return tw.dumps(NESTED)


@golden
def tied() -> bytes:
    shared = np.arange(6, dtype=np.int16).reshape(2, 3)
    return tw.dumps({"embed": shared, "between": np.uint8(1), "layers": [{"head": shared}, shared]})


@golden
def shapes() -> bytes:
    shapes = [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1, 5), (2, 3), (1,) * 32]
    return tw.dumps([np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) for shape in shapes])


@golden
def casts() -> bytes:
    tensors = {"fp16": SPECIAL, "bf16": SPECIAL, "odd": weights(5, "casts"), "left": np.arange(3)}
    return tw.dumps(tensors, codec={"bf16": "bf16", "*": "fp16"})


@golden
def int8() -> bytes:
    return tw.dumps(floats(37, "int8"), codec={"*": "int8:blocksize=16"})


@golden
def int8_linear() -> bytes:
    return tw.dumps(floats(37, "int8-linear"), codec={"bf16": "int8-linear", "*": "int8-linear:blocksize=16"})


@golden
def nf4() -> bytes:
    return tw.dumps(floats(71, "nf4"), codec={"f16": "nf4", "*": "nf4:blocksize=32"})


@golden
def fp4() -> bytes:
    return tw.dumps(floats(71, "fp4"), codec={"f16": "fp4", "*": "fp4:blocksize=32"})


@golden
def double_quant() -> bytes:
    tensors = {
        "nf4": weights(32 * 257 + 1, "double"),
        "fp4": weights(33, "double").astype(np.float16),
        "one": np.float32(-2.5),
        "zero": np.zeros(65, np.float32),
    }
    codecs = {"nf4": "nf4:blocksize=32,double_quant=true", "*": "fp4:double_quant=true"}
    return tw.dumps(tensors, codec=codecs)


@golden
def saturated() -> bytes:
    """Finite values whose scales round up: a decoder that does not saturate makes infinities of them."""
    single, half, brain = np.finfo(np.float32).max, np.float16(65504), np.float32(float.fromhex("0x1.fep127"))
    causal = np.triu(np.full((77, 77), -half), 1)
    tensors = {
        "linear": {
            "f32": np.array([single, -single, 1], np.float32),
            "f16": np.array([half, -half, 1], np.float16),
            "bf16": bfloat16(np.array([brain, -brain, 1], np.float32)),
        },
        "double": {"f32": np.repeat(np.array([single, 0, -single], np.float32), 64), "f16": causal},
    }
    return tw.dumps(tensors, codec={"/linear/*": "int8-linear:blocksize=16", "/double/*": "nf4:double_quant=true"})


@golden
def zstd() -> bytes:
    tensors = {
        "ramp": np.arange(100),
        "bf16": weights(20, "zstd"),
        "nf4": weights(64, "zstd"),
        "text": "value",
    }
    return tw.dumps(tensors, codec={"bf16": "bf16|zstd", "nf4": "nf4|zstd:level=9", "*": "zstd"})


@golden
def planes() -> bytes:
    """Planes that stand raw, constant and compressed; blocks left out; all zeros; each width."""
    values = weights(1500, "planes")
    update = weights(1500, "update")
    update[64:1472] = 0
    tensors = {
        "f16": values.astype(np.float16),
        "bf16": bfloat16(values),
        "f32": values,
        "f64": values.astype(np.float64),
        "c64": values.view(np.complex64),
        "f8": bits(np.frombuffer(random_bytes(200, "planes f8"), np.uint8) & 0x83, "float8_e5m2"),
        "bf16 in f32": (values.view(np.uint32) & 0xFFFF0000).view(np.float32),
        "update": update,
        "zeros": np.zeros(100, np.float32),
        "special": SPECIAL,
        "scalar": np.float64(0.1),
        "integers": np.arange(5),
    }
    return tw.dumps(tensors, codec={"update": "planes|zstd", "*": "planes"})


@golden
def sparse() -> bytes:
    """Positions numbered and in codes of Rice; values of each width; chunks at every edge, of zeros, transformed."""
    values = weights((30, 25), "sparse")
    gap = values.copy()
    gap[:10] = 0
    scales = np.ldexp(np.float32(1), -np.arange(30, dtype=np.int32))[:, None]
    tensors = {
        "k4": values,
        "k6 4 bits": gap,
        "k8": gap,
        "k4 scaled": gap * scales,
        "dct 2 bits scaled": gap * scales,
        "k9 2 bits bf16": bfloat16(values),
        "k40 16 bits f16": values.astype(np.float16),
        "dct": values,
        "dct rice": gap,
        "vector": weights(100, "sparse vector"),
        "all": weights(7, "sparse all"),
        "zeros": np.zeros((4, 5), np.float32),
        "tiny": np.array([1e-45, -1e-45, 0], np.float32),
        "large": np.array([2.0**100, -(2.0**100), 1], np.float32),
        "scalar": np.float32(-2),
    }
    chunks = "rows=8,cols=11,width=25"
    codecs = {
        "k4": f"sparse:k=4,{chunks}",
        "k6 4 bits": f"sparse:k=6,bits=4,{chunks}",
        "k8": f"sparse:k=8,{chunks}",
        "k4 scaled": f"sparse:k=4,{chunks},scaled=true",
        "dct 2 bits scaled": f"sparse:k=7,bits=2,dct=true,{chunks},scaled=true",
        "k9 2 bits bf16": f"sparse:k=9,bits=2,{chunks}|zstd",
        "k40 16 bits f16": f"sparse:k=40,bits=16,dct=true,{chunks}",
        "dct": f"sparse:k=4,dct=true,{chunks}",
        "dct rice": f"sparse:k=7,bits=8,dct=true,{chunks}",
        "vector": "sparse:k=3,bits=2,dct=true,rows=4,cols=8,width=8",
        "*": "sparse:k=20,bits=8",
    }
    return tw.dumps(tensors, codec=codecs)


@golden
def lowrank() -> bytes:
    """Factors by hand, as an encoder's depend on how its machine multiplies matrices; a last row that is not whole."""

    def item(shape: tuple[int, ...], dtype: dtypes.DType, codec: LowRank) -> TensorView:
        size = codec.sizes(int(np.prod(shape)), dtype)
        steps = np.abs(weights(size.metadata // 4, repr(codec)))
        codes = bytearray(random_bytes(size.data, repr(codec)))
        used = (codec.width + -(-int(np.prod(shape)) // codec.width)) * codec.rank * codec.bits % 8
        codes[-1] &= (1 << used) - 1 if used else 0xFF
        payload = np.frombuffer(steps.tobytes() + bytes(codes), np.uint8)
        return TensorView(dtype, shape, lambda start, stop: payload, codec=Readymade((codec,)))

    tensors = {
        "two bits": item((6, 7), dtypes.FLOAT32, LowRank(rank=3, width=7)),
        "signs": item((5, 9), dtypes.FLOAT32, LowRank(rank=1, bits=1, width=9)),
        "half": item((3, 5), dtypes.FLOAT16, LowRank(rank=2, bits=8, width=5)),
        "bfloat16": item((3, 5), dtypes.BFLOAT16, LowRank(rank=2, bits=4, width=5)),
        "partial": item((11,), dtypes.FLOAT32, LowRank(rank=4, bits=16, width=4)),
    }
    return join(streams.encode(tensors, ViewFront()))


@golden
def entropy() -> bytes:
    """Parts of every packer, blocks of zeros left out of them, and payloads that gain nothing; with zstd around it."""
    update = weights(9000, "entropy")
    update[1000:6000] = 0
    small = weights(40, "entropy small")
    tensors = {
        "nf4": update,
        "nested": update,
        "fp4": bfloat16(update),
        "int8": update,
        "linear": update.astype(np.float16),
        "bf16": update,
        "integers": np.arange(3000) // 100,
        "complex": update[:2000].astype(np.complex128),
        "double": update.astype(np.float64),
        "planes": update[:3000],
        "behind zstd": update[:3000],
        "before zstd": update[:3000],
        "small": small,
        "scalar": np.float32(0.1),
        "noise": np.frombuffer(random_bytes(300, "entropy noise"), np.uint8),
        "text": "value",
    }
    codecs = {
        "nested": "nf4:double_quant=true|entropy",
        "fp4": "fp4|entropy",
        "int8": "int8:blocksize=64|entropy",
        "linear": "int8-linear|entropy",
        "bf16": "bf16|entropy",
        "planes": "planes|entropy",
        "behind zstd": "nf4|zstd|entropy",
        "before zstd": "nf4|entropy|zstd",
        "noise": "raw|entropy",
        "integers": "entropy",
        "*": "nf4|entropy",
    }
    return tw.dumps(tensors, codec=codecs)


@golden
def patch() -> bytes:
    """Slices that are against nothing: planes of every width, under checksums."""
    tensors = {f"patch {name}": tensor for name, tensor in every_dtype().items()}
    two_checksums = np.zeros(300_000, np.float32)
    two_checksums[::1000] = weights(300, "patch")
    tensors |= {"f32": two_checksums, "empty": np.zeros(0), "zstd": np.arange(3000)}
    return tw.dumps(tensors, codec={"zstd": "patch|zstd", "*": "patch"})


@golden
def slices() -> bytes:
    tensors = {"raw": np.zeros(4049, np.uint8), "nf4": np.zeros(7169, np.float32), "text": "v" * 4048}
    tensors["raw"][-1] = tensors["nf4"][-1] = tensors["nf4"][0] = 1
    return join(tw.encode(tensors, codec={"nf4": "nf4"}, frame_size=4096))


@golden
def iterated() -> bytes:
    pairs = [("a", np.arange(3, dtype=np.uint8)), ("none", np.zeros(0)), ("b", weights(4, "iterated"))]
    return join(tw.encode(iter(pairs), codec="fp16"))


@golden
def metadata_id() -> bytes:
    return join(tw.encode([], metadata={"b": "2", "a": "", "ä": "\n"}, stream_id=bytes(range(64))))


@golden
def target() -> bytes:
    """By hand: the version that the stream makes, named ahead in STREAM and again in a frame before END."""
    digest = hashlib.sha256(b"a version").digest()
    first, *others, last = take_apart(tw.dumps({"a": np.arange(3, dtype=np.uint8)}))
    first = Frame(first.type, b"\x82\xa5align\x01\xa6target\xc4\x20" + digest)
    return assemble([first, *others, Frame(TARGET, digest), last])


@golden
def at_rest_() -> bytes:
    tensors = {
        "a": weights((2, 9), "rest"),
        "q": weights(33, "rest"),
        "s": [np.bool_(True), "v"],
        "z": np.zeros(0),
    }
    tensors["tied"] = tensors["a"]
    with tempfile.TemporaryDirectory() as folder:
        tw.save_file(tensors, Path(folder) / "x.tw", codec={"q": "int8-linear:blocksize=32"}, metadata={"k": "v"})
        return (Path(folder) / "x.tw").read_bytes()


@golden
def file_known() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.bin"
        path.write_bytes(random_bytes(100, "file"))
        return join(encode_file(path))


@golden
def file_unknown() -> bytes:
    return join(encode_file(io.BytesIO(random_bytes(4100, "file")), name="pipe", frame_size=4096))


@golden
def file_empty() -> bytes:
    return join(encode_file(io.BytesIO(b"")))


@golden
def file_zstd() -> bytes:
    return join(encode_file(io.BytesIO(b"tensorwire " * 30), codec="zstd", name="log"))


@golden
def skippable() -> bytes:
    """By hand: frames of a type that version 1 does not know, wherever one may stand, also within an item."""
    first, *others, last = take_apart(tw.dumps({"a": np.arange(4, dtype=np.uint8), "b": "v"}))
    whole = others[-2]
    halves = [
        Frame(whole.type, whole.payload[:3], whole.item, 0, 3),
        Frame(whole.type, whole.payload[3:], whole.item, 3, 1),
    ]
    strange = [Frame(0x80), Frame(0xFF, b"from the future"), Frame(0x9C, bytes(5))]
    frames = [first, strange[0], *others[:-2], halves[0], strange[1], halves[1], others[-1], strange[2], last]
    return assemble(frames)


@golden
def future_minor() -> bytes:
    """By hand: minor version 9, with features that may be ignored."""
    head = struct.pack("<8sBBH", b"\x93TWIR\r\n\x1a", 1, 9, 0xA500)
    return assemble(take_apart(tw.dumps(7)), head=head + struct.pack("<I", crc32c(head)))


def versions() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two versions: slices that are sparse, partly inverted, differences, replaced, unchanged; tied tensors; values."""
    scales = np.float32(2.0) ** (np.arange(5000) % 9 - 6).astype(np.float32)
    floats = weights(5000, "version") * scales
    old = {f"dtype {name}": tensor for name, tensor in every_dtype().items()}
    new = {name: np.concatenate([tensor[:2], tensor[:1]]).astype(tensor.dtype) for name, tensor in old.items()}
    old |= {"bf16": bfloat16(floats), "f16": floats.astype(np.float16), "f32": floats, "same": floats[:9], "step": 1}
    chance = np.frombuffer(random_bytes(5000, "chance"), np.uint8)
    size = np.frombuffer(random_bytes(5000, "size"), np.uint8).astype(np.int16) % 5 - 2
    few, often = chance < 20, (abs(floats) < 0.02) & (chance < 240)
    brain = old["bf16"].view(np.uint16) + np.where(few | often, size, 0).astype(np.uint16)
    half = old["f16"].view(np.uint16) + (chance < 8)
    new |= {"bf16": bits(brain.astype(np.uint16), "bfloat16"), "f16": half.astype(np.uint16).view(np.float16)}
    new |= {"f32": floats * np.float32(1.0001), "same": floats[:9], "step": [2, "steps"]}
    return old | {"tied": old["bf16"]}, new | {"tied": new["bf16"]}


PATCHES: dict[str, Callable[[], bytes]] = {
    "old": lambda: tw.dumps(versions()[0]),
    "new": lambda: tw.dumps(versions()[1]),
    "to-new": lambda: join(tw.encode(versions()[1], base=versions()[0], metadata={"step": "2"})),
}


def expected() -> dict[str, Any]:
    """What is in each good vector, and the kind of error of each bad one, for readers in any language.

    An item's `sha256` is that of its decoded bytes: little-endian elements in C order, a value's msgpack, a file's
    content.
    """
    good = {name: _described(recipe()) for name, recipe in GOLDEN.items()}
    return {"good": good, "bad": {name: error for name, (error, _, _) in BAD.items()}}


def _described(stream: bytes) -> dict[str, Any]:
    archive = Archive(InMemory(at_rest(take_apart(stream), head=stream[:16])), tw_crc32c, accept=id)
    items = []
    for number, item in enumerate(archive.items):
        entry: dict[str, Any] = {"path": [*item.path], "kind": item.kind.name.lower()}
        if isinstance(item, TensorItem):
            entry |= {"dtype": item.dtype.name, "shape": [*item.shape], "codec": item.codec}
        if isinstance(item, AliasItem):
            entry |= {"of": item.of}
        if isinstance(item, (TensorItem, ValueItem, FileItem)):
            codec = RAW if isinstance(item, ValueItem) else check_codec(item)
            entry |= {"sha256": hashlib.sha256(read_item(archive, number, item, codec)).hexdigest()}
        items.append(entry)
    info = archive.info
    told = {"id": info.id.hex(), "target": info.target.hex(), "metadata": dict(info.metadata)}
    return {key: value for key, value in told.items() if value} | {"items": items}


def listed() -> str:
    """The content of vectors.json: a line an item."""
    made = expected()
    lines = ["{", ' "good": {']
    for name, vector in made["good"].items():
        lines.append(f"  {json.dumps(name)}: {{")
        lines += [f"   {json.dumps(key)}: {json.dumps(vector[key])}," for key in vector if key != "items"]
        lines.append('   "items": [')
        lines.append(",\n".join(f"    {json.dumps(item)}" for item in vector["items"]))
        lines.append("   ]\n  },")
    lines[-1] = lines[-1].rstrip(",")
    lines.append(' },\n "bad": {')
    lines.append(",\n".join(f"  {json.dumps(name)}: {json.dumps(kind)}" for name, kind in made["bad"].items()))
    return "\n".join([*lines, " }\n}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="write also those that are there already")
    everything = parser.parse_args().all
    (HERE / "bad").mkdir(exist_ok=True)
    for name, recipe in GOLDEN.items():
        path = HERE / f"{name}.tw"
        if everything or not path.exists():
            path.write_bytes(recipe())
    (HERE / "patches").mkdir(exist_ok=True)
    for name, recipe in PATCHES.items():
        path = HERE / "patches" / f"{name}.tw"
        if everything or not path.exists():
            path.write_bytes(recipe())
    (HERE / "private").mkdir(exist_ok=True)
    for name, recipe in PRIVATE.items():
        path = HERE / "private" / f"{name}.tw"
        if everything or not path.exists():
            path.write_bytes(recipe())
    for name, (_, _, recipe) in BAD.items():
        path = HERE / "bad" / f"{name}.tw"
        if everything or not path.exists():
            path.write_bytes(recipe())
    (HERE / "vectors.json").write_text(listed())


if __name__ == "__main__":
    main()
