"""The mean of encoded updates, slice by slice.

All updates are read in step, one slice of every update before the next slice of any, and their mean is written over
the model. Memory: the model and a few slices, for any number of updates; no update is ever decoded whole. At most
`_OPEN` files are open at a time.

`WeightedMean`, the default, is the mean of federated averaging (McMahan et al., arXiv:1602.05629):

    mean = (sum(w[c] * s[c] * u[c] for c in sorted(clients)) + b * base) / fsum(w)
    b    = fsum(w[c] * (1 if u[c] is a difference else 1 - s[c]))

where u[c] are the numbers that client c sent, w[c] is its weight and s[c] its clipping factor. `TrimmedMean` leaves
out the largest and the smallest of each number (Yin et al., arXiv:1803.01498). Both calculate in float64, in this
order, and round once, to the model's own dtype. So the result depends on the updates alone: not on the order of
arrival, nor on whether the process was killed and read them again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from tensorwire.codecs import as_floats, from_floats, is_calculated
from tensorwire.kernels import default_environment
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Scratch
from tensorwire.streams import CodecChoice
from tensorwire.updates.check import Update, ceilings
from tensorwire.updates.difference import Bytes, key_of, views
from tensorwire.updates.message import Arrays, place_of
from tensorwire.updates.optimizer import ServerOptimizer
from tensorwire.updates.reading import Float64, OpenFiles, Reader, Values
from tensorwire.wire import TensorItem, sharing

_OPEN: Final = 16
# Numbers that the mean is worked out for at a time: temporaries of this size stay in the second-level cache.
_BLOCK: Final = 1 << 15


class Mean(Protocol):
    """How updates are averaged. It gets the same numbers of every update, in the order of the clients' names.

    A number is a float element, or half of a complex one.
    """

    def begin(self, updates: Sequence[Update]) -> None:
        """Begin a mean of these updates. Raises ValueError if they have none."""

    def clear(self, count: int) -> None:
        """Begin the next `count` numbers."""

    def add(self, number: int, place: slice, values: Values) -> None:
        """Add the numbers at `place` of update `number`."""

    def result(self, place: slice, base: Float64) -> Float64:
        """The mean of the numbers at `place`, once all updates are added; `base`: the model's numbers."""


class WeightedMean:
    """The mean weighted by each client's weight."""

    def begin(self, updates: Sequence[Update]) -> None:
        """See `Mean`."""
        self._factors = [update.terms.weight * update.scale for update in updates]
        self._total = math.fsum(update.terms.weight for update in updates)
        self._base = math.fsum(update.terms.weight * update.base_share for update in updates)
        self._sums = np.empty(0)

    def clear(self, count: int) -> None:
        """See `Mean`."""
        if self._sums.size < count:
            self._sums = np.empty(count)
        self._sums[:count] = 0.0

    def add(self, number: int, place: slice, values: Values) -> None:
        """See `Mean`."""
        values.accumulate(self._sums[place], self._factors[number])

    def result(self, place: slice, base: Float64) -> Float64:
        """See `Mean`."""
        sums = self._sums[place]
        return (sums + self._base * base if self._base else sums) / self._total


@dataclass
class TrimmedMean:
    """The mean of each number without the `share` of largest and the `share` of smallest values, rounded down.

    Weights are ignored. A share just below one half gives the median. Memory: one slice per value left out.
    """

    share: float = 0.1

    def begin(self, updates: Sequence[Update]) -> None:
        """See `Mean`."""
        if not 0 <= self.share < 0.5:
            raise ValueError(f"share must be at least 0 and less than 0.5, not {self.share!r}")
        self._trimmed = int(self.share * len(updates))
        self._left = len(updates) - 2 * self._trimmed
        self._sums = np.empty(0)
        self._ends = np.empty((2 * self._trimmed, 0))  # the smallest so far, then the largest

    def clear(self, count: int) -> None:
        """See `Mean`."""
        if self._sums.size < count:
            self._sums, self._ends = np.empty(count), np.empty((2 * self._trimmed, count))
        self._sums[:count] = 0.0

    def add(self, number: int, place: slice, values: Values) -> None:
        """See `Mean`."""
        new, ends, trimmed = values.numbers(), self._ends[:, place], self._trimmed
        if number < 2 * trimmed:
            ends[number] = new
            if number == 2 * trimmed - 1:
                ends.sort(axis=0)
            return
        for row in ends[:trimmed]:
            new, row[:] = np.maximum(row, new), np.minimum(row, new)
        for row in ends[trimmed:]:
            new, row[:] = np.minimum(row, new), np.maximum(row, new)
        self._sums[place] += new

    def result(self, place: slice, base: Float64) -> Float64:
        """See `Mean`."""
        mean: Float64 = self._sums[place] / self._left
        return mean


def average(
    updates: Sequence[Update],
    *,
    into: Arrays,
    mean: Mean | None = None,
    optimizer: ServerOptimizer | None = None,
    down: CodecChoice = "raw",
    limits: Limits = DEFAULT,
) -> None:
    """Write the mean of `updates` over `into`, the model that is their base.

    `mean`: WeightedMean(), if None. `optimizer`: moves the model towards the mean, and carries over what rounding to a
    narrow dtype drops; without one, the model becomes the rounded mean. `down`: the codec that the model will be sent
    with; values beyond its range become the largest value that it can carry.

    Only floats and complex numbers are averaged; integers and bools keep the model's values. Updates may differ in
    codec, frame size and kind. Raises a WireError for a recording that has changed since it was checked; the model is
    then partly written and must be loaded again. Raises ValueError for no update, or two of one client.

        average([update_of_ann, update_of_bob], into=model)
        average(updates, into=model, mean=TrimmedMean(0.2), optimizer=ServerOptimizer("adam", rate=0.01))
    """
    ordered = sorted(updates, key=lambda update: update.client)
    if not ordered or len({update.client for update in ordered}) < len(ordered):
        raise ValueError("the mean takes at least one update, and one of each client")
    mean = mean or WeightedMean()
    mean.begin(ordered)
    highest, described = ceilings(into, down), views(into)
    scratch, unpack = Scratch(), sharing()
    with OpenFiles(_OPEN) as files:
        readers = [
            Reader(update, described, files, scratch=scratch, unpack=unpack, limits=limits) for update in ordered
        ]
        first, *others = readers
        for item, start, count in first.places():
            place = place_of(into, key_of(item), item.dtype, start, count)
            counted = is_calculated(item.dtype)
            if counted:
                mean.clear(place.size // item.dtype.part_size)
            for number, reader in enumerate(readers):
                for part, values in reader.take(item, place):
                    if counted:
                        mean.add(number, part, values)
            if counted:
                _write(item, start, place, mean, optimizer, highest[key_of(item)])
        for reader in others:
            reader.finish()


def _write(
    item: TensorItem, start: int, place: Bytes, mean: Mean, optimizer: ServerOptimizer | None, highest: float
) -> None:
    """Let the mean of the elements at `place`, from `start` on in their item, be the model's."""
    size = item.dtype.part_size
    before = start * item.dtype.itemsize // size
    for begin in range(0, place.size // size, _BLOCK):
        data = place[begin * size : (begin + _BLOCK) * size]
        part = slice(begin, begin + data.size // size)
        with default_environment():
            base = as_floats(data, item.dtype).astype(np.float64)
            target = mean.result(part, base)
            if optimizer is not None:
                target = optimizer.step(item, before + begin, base, target)
            target = np.clip(target, -highest, highest)
            from_floats(target, item.dtype, data)
            if optimizer is not None:
                optimizer.keep(item, before + begin, target, as_floats(data, item.dtype))
