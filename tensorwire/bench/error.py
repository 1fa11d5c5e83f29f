"""What each codec does to given weights: every float tensor is encoded, decoded and compared, slice by slice.

`rel_l2` is |x - y| / |x| over all elements together, `sqnr_db` the same in decibels (None where nothing is
lost), `max_abs` the largest difference, `bits` the payload's bits per element with its quantization metadata.
"""

from collections.abc import Iterator
from math import log10, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorwire.bench.models import Model, default, resolve
from tensorwire.bench.options import BenchError, Note, Options
from tensorwire.bench.size import DEFAULT_CODECS
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import Codec, as_floats, is_float
from tensorwire.memory import Pool
from tensorwire.streams import FRAME_SIZE
from tensorwire.tensor import Extent, TensorView

COLUMNS: Final = (
    Column("codec", "codec"),
    Column("bits", "bits", ".2f"),
    Column("rel_l2", "relative L2", ".3e"),
    Column("max_abs", "max abs", ".3e"),
    Column("sqnr_db", "SQNR dB", ".1f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"error on {rows[0]['model']}"


def run(options: Options, note: Note) -> Iterator[Row]:
    """One row a codec."""
    model = resolve(options.model or default())
    if not model.values:
        note(f"error of seeded normal weights ({model.name}); --model takes trained ones")
    for spec in options.codecs or DEFAULT_CODECS:
        yield error_row(model, spec)


def error_row(model: Model, spec: str) -> Row:
    """The error of one codec over all floating-point tensors of a model."""
    total = _Error()
    for view, codec in model.codecs(spec):
        if is_float(view.dtype):
            _measure(view, codec, total)
    if not total.elements:
        raise BenchError(f"{model.name} holds no floating-point tensors")
    ratio = total.noise / total.signal if total.signal else 0.0
    return {
        "suite": "error",
        "model": model.name,
        "codec": spec,
        "bits": 8 * total.payload / total.elements,
        "rel_l2": sqrt(ratio),
        "max_abs": total.largest,
        "sqnr_db": -10 * log10(ratio) if ratio else None,
    }


class _Error:
    """Sums over slices, in float64."""

    def __init__(self) -> None:
        self.elements = 0
        self.payload = 0
        self.signal = 0.0
        self.noise = 0.0
        self.largest = 0.0

    def add(self, before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], payload: int) -> None:
        """One slice and what came back of it."""
        difference = before - after
        self.elements += before.size
        self.payload += payload
        self.signal += float(np.dot(before, before))
        self.noise += float(np.dot(difference, difference))
        self.largest = max(self.largest, float(np.abs(difference).max()))


def _measure(view: TensorView, codec: Codec, total: _Error) -> None:
    pool = Pool()
    context = codec.prepare(view)
    step = codec.fit(FRAME_SIZE, view.dtype) or codec.block(view.dtype)
    for start in range(0, view.numel, step):
        count = min(step, view.numel - start)
        data = view.read(start, start + count)
        extent = Extent(view.dtype, view.shape, start, count)
        payload = memoryview(codec.encode(data, extent, pool.take, context).payload)
        out = np.empty(count * view.dtype.itemsize, np.uint8)
        codec.decode(payload, extent, out)
        before, after = (as_floats(part, view.dtype).astype(np.float64) for part in (data, out))
        total.add(before, after, payload.nbytes)
