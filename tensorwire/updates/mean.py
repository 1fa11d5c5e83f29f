"""The weighted mean of encoded updates, slice by slice.

All updates are read in step, each slice of every one before the next slice of any, and their mean is written over the
model. Memory: the model and a few slices, for any number of updates; none is ever whole, decoded, anywhere.

    mean = sum(w[c] * v[c] for c in sorted(clients)) / fsum(w)
    v[c] = x[c], or base + d[c] where the update is a difference

per element, in float64, in this order, and rounded once, to the model's own dtype. So the result depends on the updates
alone: not on who came first, nor on whether the process died in between and read them again.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire.codecs import from_floats, is_float
from tensorwire.dtypes import DType
from tensorwire.errors import SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Scratch
from tensorwire.updates.check import Update, blocks
from tensorwire.updates.difference import Bytes
from tensorwire.updates.message import Arrays, place_of


def average(updates: Sequence[Update], *, into: Arrays, limits: Limits = DEFAULT) -> None:
    """Write the weighted mean of `updates` over `into`, the model that is their base.

    Only floating-point items are averaged; others stay as the model has them. Updates may differ in codec, frame size
    and kind. A recording that has changed since it was checked raises a WireError with parts of the model already
    written: load it again from where it is kept. Raises ValueError for no update, or two of one client.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    if not ordered or len({update.client for update in ordered}) < len(ordered):
        raise ValueError("the mean takes at least one update, and one of each client")
    weight = math.fsum(update.terms.weight for update in ordered)
    scratch = Scratch()
    first, *others = (_Contribution(update, into, scratch, limits) for update in ordered)
    total = np.empty(0)
    for piece in first.pieces:
        dtype, place = piece.dtype, place_of(into, piece)
        count = piece.data.size // dtype.itemsize
        if total.size < count:
            total = np.empty(count)
        sums = total[:count]
        sums.fill(0.0)
        first.add(piece.data, place, dtype, sums)
        for other in others:
            other.add_next(piece.item.name, place, dtype, sums)
        if is_float(dtype):
            np.divide(sums, weight, out=sums)
            from_floats(sums, dtype, place)
    for other in others:
        other.finish()


class _Contribution:
    """One update, read in step with the others through the scratch that they share."""

    def __init__(self, update: Update, model: Arrays, scratch: Scratch, limits: Limits) -> None:
        self._terms = update.terms
        self._scale = update.scale
        self.pieces = update.pieces(tensorwire.schema(model).check, scratch=scratch, limits=limits)
        self._rest: Bytes | None = None  # of a piece that was longer than what the others had

    def add_next(self, name: str, place: Bytes, dtype: DType, sums: npt.NDArray[np.float64]) -> None:
        """Add this update's elements of an item that belong at `place`."""
        done, itemsize = 0, dtype.itemsize
        while done < place.size:
            data, kept = self._next(name)
            size = min(data.size, place.size - done)
            part = slice(done // itemsize, (done + size) // itemsize)
            self.add(data[:size], place[done : done + size], dtype, sums[part])
            done += size
            if size < data.size:
                self._rest = data[size:] if kept else data[size:].copy()

    def _next(self, name: str) -> tuple[Bytes, bool]:
        """The next bytes of an item, and whether they are this update's own memory rather than shared scratch."""
        if self._rest is not None:
            rest, self._rest = self._rest, None
            return rest, True
        piece = next(self.pieces, None)
        if piece is None or piece.item.name != name:
            raise SchemaError("the updates do not hold their items in the same order", item=name)
        return piece.data, False

    def add(self, data: Bytes, place: Bytes, dtype: DType, sums: npt.NDArray[np.float64]) -> None:
        """Add weight * value to `sums`, for the values that this update has at `place`."""
        if not is_float(dtype):
            return
        done = 0
        for values, base in blocks(data, place, dtype):
            if self._terms.kind == "difference":
                values = base + self._scale * values
            elif self._scale != 1.0:
                values = base + self._scale * (values - base)
            sums[done : done + values.size] += self._terms.weight * values
            done += values.size

    def finish(self) -> None:
        """Read the end of the stream, which vouches for all of it."""
        if self._rest is not None or next(self.pieces, None) is not None:
            raise SchemaError("an update is longer than the others")
