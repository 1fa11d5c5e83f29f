"""What lossless codecs make of weights and of updates, beside what a user would otherwise pick, in one run.

Each contender compresses the same bytes on one thread: ours slice by slice, as streams do, others in one call. The
content is compared once. After that rounds go over all contenders in turn; GB/s are of uncompressed bytes and come
from the least processor time of the rounds, so that other load on the machine counts little.

A codec that rounds may be measured, too, for what its compressors gain: it has to give what it gives without them.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import Any, Final

import numpy as np
import zstandard

import tensorwire
from tensorwire import dtypes, kernels
from tensorwire.bench import finetune
from tensorwire.bench.models import TRAINED, Model, Weights, default, read_all, resolve
from tensorwire.bench.options import BenchError, Note, Options
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import Codec, from_floats
from tensorwire.dtypes import DType
from tensorwire.memory import Pool
from tensorwire.streams import FRAME_SIZE
from tensorwire.tensor import Extent, TensorView

DEFAULT_CODECS: Final = ("planes",)
ROUNDS: Final = 5
COLUMNS: Final = (
    Column("data", "data"),
    Column("codec", "codec"),
    Column("impl", "by"),
    Column("ratio", "ratio", ".4f"),
    Column("encode_gbps", "encode GB/s", ".2f"),
    Column("decode_gbps", "decode GB/s", ".2f"),
)


@dataclass(frozen=True, eq=False)
class Data:
    """What is compressed: little-endian elements."""

    name: str
    content: bytes
    dtype: DType


@dataclass(frozen=True, eq=False)
class Contender:
    """`encode` takes the content, in memory that it may spoil, and gives the bytes it takes; `decode` gives it back.

    `rounded`: what it gives instead, where it rounds.
    """

    impl: str
    codec: str
    encode: Callable[[bytearray], int]
    decode: Callable[[], Any]
    rounded: bytes | None = None


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"lossless compression of {rows[0]['model']}, one thread, GB/s of processor time"


def run(options: Options, note: Note) -> Iterator[Row]:
    """Rows for weights in each dtype and, where they can be made, for updates."""
    model = resolve(options.model or default())
    if not model.values:
        note(f"weights of {model.name} are seeded: real ones compress otherwise")
    codecs = [tensorwire.codec(spec) for spec in options.codecs or DEFAULT_CODECS]
    rivals = [rival for name, rival in _RIVALS if _is_there(name, note)]
    for data in _all_data(model, note):
        contenders = [_ours(codec, data) for codec in codecs if codec.accepts(data.dtype)]
        contenders += [made for rival in rivals for made in rival(data)]
        yield from _measured(model.name, data, contenders)


def _all_data(model: Model, note: Note) -> Iterator[Data]:
    parts = [read_all(view) for view in model.tensors.values() if view.dtype == dtypes.FLOAT32]
    if not parts:
        raise BenchError(f"{model.name} has no tensors in float32")
    weights = np.concatenate(parts).view(np.float32)
    brain = from_floats(weights, dtypes.BFLOAT16)
    yield Data("bf16", brain.tobytes(), dtypes.BFLOAT16)
    yield Data("fp32", weights.tobytes(), dtypes.FLOAT32)
    yield Data("bf16 in fp32", (brain.view(np.uint16).astype(np.uint32) << 16).tobytes(), dtypes.FLOAT32)
    update = _update(model, note)
    if update is not None:
        yield Data("fp32 update", update.tobytes(), dtypes.FLOAT32)
        yield Data("bf16 update", from_floats(update, dtypes.BFLOAT16).tobytes(), dtypes.BFLOAT16)


def _update(model: Model, note: Note) -> Weights | None:
    if model.name != TRAINED:
        note(f"updates left out: only {TRAINED} is fine-tuned")
        return None
    try:
        return finetune.updates(model)
    except ImportError:
        note("updates left out: torch is not installed")
        return None


def _measured(model: str, data: Data, contenders: list[Contender]) -> Iterator[Row]:
    sizes = {one: one.encode(bytearray(data.content)) for one in contenders}
    for one in contenders:
        if bytes(one.decode()) != (data.content if one.rounded is None else one.rounded):
            raise BenchError(f"{one.impl} does not give {data.name} back")
    best = {(one, op): float("inf") for one in contenders for op in ("encode", "decode")}
    for _ in range(ROUNDS):
        for one in contenders:
            content = bytearray(data.content)
            best[one, "encode"] = min(best[one, "encode"], _seconds(partial(one.encode, content)))
            best[one, "decode"] = min(best[one, "decode"], _seconds(one.decode))
    for one in contenders:
        yield {
            "suite": "lossless",
            "model": model,
            "data": data.name,
            "codec": one.codec,
            "impl": one.impl,
            "ratio": sizes[one] / len(data.content),
            "encode_gbps": len(data.content) / 1e9 / best[one, "encode"],
            "decode_gbps": len(data.content) / 1e9 / best[one, "decode"],
        }


def _seconds(call: Callable[[], Any]) -> float:
    before = process_time()
    call()
    return max(process_time() - before, 1e-9)


def _ours(codec: Codec, data: Data) -> Contender:
    pool, out = Pool(), np.zeros(len(data.content), np.uint8)
    step, width = codec.fit(FRAME_SIZE, data.dtype), data.dtype.itemsize
    count = len(data.content) // width
    extents = [Extent(data.dtype, (count,), at, min(step, count - at)) for at in range(0, count, step)]

    def encode(content: bytearray) -> int:
        return sum(len(payload) for payload in payloads(codec, content))

    def payloads(codec: Codec, content: Any) -> Iterator[Any]:
        view = memoryview(content)
        context = codec.prepare(
            TensorView(data.dtype, (count,), lambda start, stop: view[start * width : stop * width])
        )
        for extent in extents:
            part = view[extent.start * width : (extent.start + extent.count) * width]
            yield memoryview(codec.encode(part, extent, pool.take, context).payload)

    def decoded(codec: Codec, made: list[bytes]) -> Any:
        for extent, payload in zip(extents, made, strict=True):
            part = out[extent.start * width : (extent.start + extent.count) * width]
            codec.decode(memoryview(payload), extent, part)
        return out.data

    made = [payload.tobytes() for payload in payloads(codec, data.content)]
    rounded = None
    if not codec.lossless:
        plain = Codec((*codec.transforms, codec.packer))
        rounded = bytes(decoded(plain, [payload.tobytes() for payload in payloads(plain, data.content)]))
    return Contender(kernels.implementation, repr(codec), encode, partial(decoded, codec, made), rounded)


# ---- rivals ------------------------------------------------------------------------------------------------


def _is_there(name: str, note: Note) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        note(f"{name} left out: not installed; the dev extra has it")
        return False
    return True


def _zstd(data: Data) -> Iterator[Contender]:
    for level in (1, 3):
        compressor = zstandard.ZstdCompressor(level=level)
        decompress = zstandard.ZstdDecompressor().decompress
        decode = partial(decompress, compressor.compress(data.content))
        yield Contender("zstd", f"level {level}", partial(_length, compressor.compress), decode)


def _zipnn(data: Data) -> Iterator[Contender]:
    zipnn: Any = importlib.import_module("zipnn")
    codec = zipnn.ZipNN(input_format="byte", bytearray_dtype=data.dtype.name, threads=1)
    made = codec.compress(bytearray(data.content))
    yield Contender("zipnn", "huffman", partial(_length, codec.compress), partial(codec.decompress, made))


def _blosc2(data: Data) -> Iterator[Contender]:
    blosc2: Any = importlib.import_module("blosc2")
    options = {"typesize": data.dtype.itemsize, "codec": blosc2.Codec.ZSTD, "filters": [blosc2.Filter.SHUFFLE]}
    compress = partial(blosc2.compress2, clevel=1, nthreads=1, **options)
    decode = partial(blosc2.decompress2, compress(data.content), nthreads=1)
    yield Contender("blosc2", "shuffle, zstd 1", partial(_length, compress), decode)


def _pcodec(data: Data) -> Iterator[Contender]:
    pcodec: Any = importlib.import_module("pcodec")
    standalone, config = importlib.import_module("pcodec.standalone"), pcodec.ChunkConfig()
    kind = np.uint16 if data.dtype == dtypes.BFLOAT16 else np.float32  # of bfloat16 it knows nothing
    made = standalone.simple_compress(np.frombuffer(data.content, kind), config)

    def encode(content: bytearray) -> int:
        return len(standalone.simple_compress(np.frombuffer(content, kind), config))

    yield Contender("pcodec", "level 8", encode, lambda: standalone.simple_decompress(made).data)


def _openzl(data: Data) -> Iterator[Contender]:
    openzl: Any = importlib.import_module("openzl.ext")
    brain = data.dtype == dtypes.BFLOAT16
    kind, node = (
        (np.uint16, openzl.nodes.BFloat16Deconstruct) if brain else (np.uint32, openzl.nodes.Float32Deconstruct)
    )
    compressor, reader = openzl.Compressor(), openzl.DCtx()
    store, huffman = openzl.graphs.Store()(compressor), openzl.graphs.Huffman()(compressor)
    compressor.set_parameter(openzl.CParam.FormatVersion, openzl.MAX_FORMAT_VERSION)
    compressor.select_starting_graph(node()(compressor, sign_frac=store, exponent=huffman))

    def compress(content: Any) -> bytes:
        context = openzl.CCtx()
        context.ref_compressor(compressor)
        made: bytes = context.compress([openzl.Input(openzl.Type.Numeric, np.frombuffer(content, kind))])
        return made

    made = compress(data.content)

    def decode() -> Any:
        return reader.decompress(made)[0].content.as_nparray().data

    yield Contender("openzl", "exponents, huffman", partial(_length, compress), decode)


def _length(compress: Callable[[Any], Any], content: Any) -> int:
    return len(compress(content))


# The library that each takes, and what it does.
_RIVALS: Final = (
    ("zstandard", _zstd),
    ("zipnn", _zipnn),
    ("blosc2", _blosc2),
    ("pcodec", _pcodec),
    ("openzl.ext", _openzl),
)
