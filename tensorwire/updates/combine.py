"""Adds up the messages of many senders without making any of them dense.

Sparse messages are added at their positions: DCT coefficients are added as coefficients and transformed back once, at
the end. Messages are added in the order in which they are given, and sums are in float64, so that everyone who adds
the same messages in the same order gets the same bits.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from tensorwire import kernels
from tensorwire.codecs import NOTHING, Codec, Selected, Sparse, as_floats, is_float
from tensorwire.errors import ArgumentError, SchemaError
from tensorwire.memory import float32_arrays
from tensorwire.tensor import Extent
from tensorwire.updates.compressor import slices
from tensorwire.updates.difference import key_of
from tensorwire.updates.terms import check_weight
from tensorwire.wire import AliasItem, ContainerItem, Item, TensorItem, sharing

How = Literal["mean", "present", "sum", "vote"]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_HOW: Final = get_args(How)
_SUMS: Final = 16  # bytes that the sums of an element take, with what is present of it


def combine(
    messages: Iterable[Any], *, how: How = "mean", weights: Sequence[float] | None = None
) -> dict[str, Float32]:
    """Add up messages of compressors, and return float32 arrays by name.

    `messages`: streams as `tensorwire.decode` takes them, all with the same tensors and codecs, and nothing else.
    `how`: the `mean`, the `sum`, the mean over the messages that hold an element or coefficient (`present`, as in
    DeMo), or the sign of the weighted sum of signs (`vote`). `weights`: one for each message. Takes memory for two or
    three models, whatever the number of messages. Raises a WireError for a damaged message, ValueError if there is no
    message, if a weight is not a positive number, or if there are not as many weights as messages; ArgumentError for a
    single message.

        for name, change in combine([mine.data, *received]).items():
            weights[name] -= rate * np.sign(change)
    """
    if how not in _HOW:
        raise ValueError(f"how must be one of {', '.join(_HOW)}, not {how!r:.40}")
    if not isinstance(messages, Iterable) or isinstance(messages, (bytes, bytearray, memoryview)):
        raise ArgumentError(f"expected an iterable of messages, not {type(messages).__name__}")
    totals: dict[str, _Total] = {}
    names: _Names | None = None
    weight_sum, unpack = 0.0, sharing()
    for message, weight in zip(messages, repeat(1.0) if weights is None else weights, strict=weights is not None):
        check_weight(weight)
        weight_sum += weight
        found = _Names()
        for item, codec, payload, extent in slices(message, unpack, found.note):
            name = key_of(item)
            if names is None and name not in totals:
                totals[name] = _Total(item, codec, how)
            if name in totals:
                totals[name].add(item, codec, payload, extent, weight)
        if names is not None and found.owners != names.owners:
            differing = next(iter(found.owners.items() ^ names.owners.items()))[0]
            raise SchemaError("this message holds other tensors than the first one", item=differing)
        names = found
    if names is None:
        raise ValueError("there is no message to be combined")
    made = float32_arrays(names.shapes)
    for name, total in totals.items():
        total.finish(weight_sum, made[name].reshape(-1))
    return {name: made[owner] for name, owner in names.owners.items()}


class _Names:
    """The tensors of a message; of those that are tied, under which name the elements come."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._numbers: dict[int, str] = {}

    def note(self, number: int, item: Item) -> None:
        """Note an item. Raises SchemaError if it cannot be added up."""
        if isinstance(item, TensorItem) and item.path:
            if not is_float(item.dtype):
                raise SchemaError(f"floats are added up, not {item.dtype}", item=item.name)
            self.owners[key_of(item)] = self._numbers[number] = key_of(item)
            self.shapes[key_of(item)] = item.shape
        elif isinstance(item, AliasItem):
            self.owners[str(item.path[0])] = self._numbers[item.of]
        elif item.path or not isinstance(item, ContainerItem):
            raise SchemaError("only tensors, in a dict, are added up", item=item.name)


class _Total:
    """The sum of one tensor: of its elements, or chunk after chunk of its coefficients.

    Sparse slices are held as received and added up at the end, unless they take more memory than the sums would.
    """

    def __init__(self, item: TensorItem, codec: Codec, how: How) -> None:
        self._item = item
        self._codec = codec
        self._how = how
        self._held: list[_Held] = []
        self._held_size = 0
        self._sums: Float64 | None = None
        # What the messages that hold a number weigh together.
        self._present: Float64 | None = None

    def add(self, item: TensorItem, codec: Codec, payload: memoryview, extent: Extent, weight: float) -> None:
        """Add a slice of a message."""
        same = item is self._item or (item.dtype, item.shape, codec) == (
            self._item.dtype,
            self._item.shape,
            self._codec,
        )
        if not same:
            raise SchemaError(
                f"{codec} {item.dtype} {list(item.shape)} here, in the first message {self._codec} "
                f"{self._item.dtype} {list(self._item.shape)}",
                item=item.name,
            )
        packer = codec.packer
        if isinstance(packer, Sparse) and not codec.compressors:
            self._hold(_Held(extent, packer.selected(payload, extent), weight))
        else:
            self._add_elements(codec, payload, extent, weight)

    def finish(self, weight: float, out: Float32) -> None:
        """Fill `out` with the result of the sums."""
        packer, slices = self._codec.packer, self._slices()
        if isinstance(packer, Sparse) and slices is not None:
            divisor = weight if self._how == "mean" else 1.0
            for place, held in slices.items():
                chosen, weights = [each.chosen for each in held], [each.weight for each in held]
                packer.combine(chosen, weights, out[place.start : place.stop], how=self._how, divisor=divisor)
            return
        self._settle()
        sums = self._in_sums()
        with kernels.default_environment():
            if self._how == "mean":
                sums /= weight
            elif self._how == "vote":
                np.sign(sums, out=sums)
            elif self._present is not None:
                np.divide(sums, self._present, out=sums, where=self._present > 0)
            out[:] = sums
        if isinstance(packer, Sparse):
            out[:] = packer.dense(out)

    def _hold(self, held: "_Held") -> None:
        self._held.append(held)
        self._held_size += held.chosen.positions.nbytes + held.chosen.values.nbytes
        if self._sums is not None or self._held_size > _SUMS * self._item.total:
            self._settle()

    def _slices(self) -> "dict[range, list[_Held]] | None":
        """What is held, by slices; None if it was not cut alike in all messages, or is in the sums already."""
        slices: dict[range, list[_Held]] = {}
        for held in self._held:
            slices.setdefault(range(held.extent.start, held.extent.start + held.extent.count), []).append(held)
        return slices if sum(map(len, slices)) == self._item.total else None

    def _settle(self) -> None:
        """Add what is held to the sums."""
        for held in self._held:
            self._add_selected(*held)
        self._held, self._held_size = [], 0

    def _in_sums(self) -> Float64:
        if self._sums is None:
            self._sums = np.zeros(self._item.total)
            self._present = np.zeros(self._item.total) if self._how == "present" else None
        return self._sums

    def _add_selected(self, extent: Extent, chosen: Selected, weight: float) -> None:
        packer, place = self._codec.packer, slice(extent.start, extent.start + extent.count)
        assert isinstance(packer, Sparse)  # what is held
        there = chosen.positions != NOTHING
        where, values = packer.places(chosen.positions, extent.count)[there], chosen.values[there]
        with kernels.default_environment():
            self._in_sums()[place][where] += weight * (np.sign(values) if self._how == "vote" else values).astype(
                np.float64
            )
            if self._present is not None:
                self._present[place][where] += weight

    def _add_elements(self, codec: Codec, payload: memoryview, extent: Extent, weight: float) -> None:
        place = slice(extent.start, extent.start + extent.count)
        sums = self._in_sums()[place]
        with kernels.default_environment():
            if self._how == "vote":
                data = np.empty(extent.count * extent.dtype.itemsize, np.uint8)
                codec.decode(payload, extent, data)
                sums += weight * np.sign(as_floats(data, extent.dtype)).astype(np.float64)
            else:
                codec.accumulate(payload, extent, sums, weight)
            if self._present is not None:
                self._present[place] += weight


class _Held(NamedTuple):
    """What a message holds of a slice."""

    extent: Extent
    chosen: Selected
    weight: float
