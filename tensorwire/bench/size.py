"""How many bytes a model takes: as published tables count them, and on the wire.

Published tables count the elements (payload) and, as metadata, the fp32 absmax together with the fp32 code
table of every item. On the wire a codec id stands for its table, and frames and descriptors come on top. Both
are computed from shapes alone: the wire format's own writer is driven with sizes, so that not a byte of the
model is needed.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import tensorwire
from tensorwire import dtypes
from tensorwire.bench.models import MIB, Model, resolve
from tensorwire.bench.options import Note, Options
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import RAW, Codec
from tensorwire.streams import FRAME_SIZE
from tensorwire.streams.flatten import Leaf
from tensorwire.streams.sender import slice_size
from tensorwire.wire import StreamInfo, Writer
from tensorwire.wire.frames import HEADER_SIZE

DEFAULT_MODEL: Final = "llama-3.2-1b"
DEFAULT_CODECS: Final = ("raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true")

COLUMNS: Final = (
    Column("codec", "codec"),
    Column("payload_mib", "payload MiB", ".2f"),
    Column("meta_mib", "metadata MiB", ".2f"),
    Column("percent_of_fp32", "% of fp32", ".2f"),
    Column("wire_mib", "on the wire MiB", ".2f"),
    Column("wire_meta_mib", "of it metadata", ".2f"),
    Column("framing_percent", "framing %", ".4f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"size of {rows[0]['model']}"


def run(options: Options, note: Note) -> Iterator[Row]:
    """One row a codec."""
    model = resolve(options.model or DEFAULT_MODEL)
    for spec in options.codecs or DEFAULT_CODECS:
        if tensorwire.codec(spec).exact_length:
            yield size_row(model, spec)
        elif model.values:
            yield compressed_row(model, spec)
        else:
            note(f"{spec} left out: its size on {model.name} depends on values, and it is only shapes")


def size_row(model: Model, spec: str) -> Row:
    """Sizes under a codec whose payloads have a known length."""
    leaves = model.leaves(spec)
    tensors = [(leaf.view, leaf.codec) for leaf in leaves if leaf.view is not None and leaf.codec is not None]
    sizes = [codec.sizes(view.numel, view.dtype) for view, codec in tensors]
    tables = sum(table_bytes(codec) for view, codec in tensors if view.numel > 0)
    payload = sum(size.data for size in sizes)
    meta = sum(size.metadata for size in sizes) + tables
    wire, wire_meta = wire_sizes(leaves)
    return _row(model, spec, payload=payload, meta=meta, wire=wire, wire_meta=wire_meta)


def compressed_row(model: Model, spec: str) -> Row:
    """Sizes of payloads that depend on values, known only by encoding; its metadata is compressed along."""
    wire = sum(memoryview(buffer).nbytes for buffer in model.encode(spec))
    framing = wire_sizes(model.leaves(spec), payloads=False)[0]
    return _row(model, spec, payload=wire - framing, meta=0, wire=wire, wire_meta=0)


def _row(model: Model, spec: str, *, payload: int, meta: int, wire: int, wire_meta: int) -> Row:
    whole_fp32 = spec == "raw" and model.nbytes == model.fp32_bytes
    return {
        "suite": "size",
        "model": model.name,
        "codec": "fp32" if whole_fp32 else spec,
        "payload_mib": payload / MIB,
        "meta_mib": meta / MIB,
        "wire_mib": wire / MIB,
        "percent_of_fp32": 100 * (payload + meta) / model.fp32_bytes,
        "wire_meta_mib": wire_meta / MIB,
        "framing_percent": 100 * (wire - payload - wire_meta) / wire,
    }


def table_bytes(codec: Codec) -> int:
    """The fp32 code tables that a published item carries; double quantization brings an 8-bit one too."""
    return sum(table.nbytes for table in codec.packer.tables)


def wire_sizes(leaves: Iterable[Leaf], *, payloads: bool = True) -> tuple[int, int]:
    """(bytes of the whole stream, bytes of quantization metadata in it) without any data.

    Without `payloads`, only preamble, headers, descriptors and the end frame are counted.
    """
    leaves = list(leaves)
    # Lengths do not depend on checksums, so nothing is checksummed.
    writer = Writer(lambda data, crc: 0)
    total = len(writer.start(StreamInfo()))
    total += sum(len(writer.item(leaf.item)) for leaf in leaves)
    metadata = 0
    for leaf in leaves:
        for start, count, size, scales in _slices(leaf):
            total += len(writer.data(start, count, size, 0)) + (size if payloads else 0)
            metadata += scales
    return total + len(writer.end()), metadata


def _slices(leaf: Leaf) -> Iterator[tuple[int, int, int, int]]:
    """(start, count, payload bytes, metadata bytes) of each data frame, as `tensorwire.encode` cuts them."""
    total = leaf.item.total or 0
    if not total:
        return
    codec = leaf.codec or RAW  # a plain value's bytes
    dtype = leaf.item.dtype or dtypes.UINT8
    step = slice_size(codec, leaf.item, FRAME_SIZE) if leaf.codec else FRAME_SIZE - HEADER_SIZE
    for start in range(0, total, step):
        count = min(step, total - start)
        sizes = codec.sizes(count, dtype)
        yield start, count, sizes.total, sizes.metadata
