"""How many bytes a model takes: as published tables count them, and on the wire.

Published tables count the elements (payload) and, as metadata, the fp32 absmax together with the fp32 code
table of every item. On the wire a codec id stands for its table, and frames and descriptors come on top. Both
are computed from shapes alone: the wire format's own writer is driven with sizes, so that not a byte of the
model is needed.
"""

from collections.abc import Iterator
from typing import Final

import tensorwire
from tensorwire.bench.models import MIB, Model, resolve
from tensorwire.bench.options import Note, Options
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import Codec

DEFAULT_MODEL: Final = "llama-3.2-1b"
DEFAULT_CODECS: Final = ("raw", "fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true")

COLUMNS: Final = (
    Column("codec", "codec"),
    Column("payload_mib", "payload", ".2f"),
    Column("meta_mib", "meta", ".2f"),
    Column("percent_of_fp32", "% of fp32", ".2f"),
    Column("wire_mib", "wire", ".2f"),
    Column("framing_percent", "framing %", ".4f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"size of {rows[0]['model']}, MiB"


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
    tensors = list(model.codecs(spec))
    sizes = [codec.sizes(view.numel, view.dtype) for view, codec in tensors]
    tables = sum(table_bytes(codec) for view, codec in tensors if view.numel > 0)
    payload = sum(size.data for size in sizes)
    meta = sum(size.metadata for size in sizes) + tables
    wire = model.stream_size(spec)
    return _row(model, spec, payload=payload, meta=meta, wire=wire.total, wire_meta=wire.metadata)


def compressed_row(model: Model, spec: str) -> Row:
    """Sizes of payloads that depend on values, known only by encoding; its metadata is compressed along."""
    wire = sum(memoryview(buffer).nbytes for buffer in model.encode(spec))
    framing = model.stream_size(spec).framing
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
