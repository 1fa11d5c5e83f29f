"""From checked updates to the next global model, slice by slice.

An update is a recording: the encoded stream as the client sent it. `check_update` reads one through, while it
arrives or later, and says whether it may count. `aggregate` then reads all of them in step, each slice of
every client before the next slice of any, and writes their weighted mean over the model. Memory: the model
and a few slices, for any number of clients; no update is ever whole, decoded, anywhere.

    mean = sum(w[c] * v[c] for c in sorted(clients)) / fsum(w)
    v[c] = x[c], or base + d[c] where the client sent a difference

per element, in float64, in this order, and rounded once, to the model's own dtype. So the result depends on
the updates alone: not on who came first, nor on whether the server died in between.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

import tensorwire
from tensorwire import dtypes, kernels
from tensorwire.dtypes import DType
from tensorwire.errors import CorruptError, SchemaError, TensorwireError, show
from tensorwire.fl.updates import Kind, Terms, check_weight
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Scratch
from tensorwire.numpy import FRONT
from tensorwire.streams import Piece, Pieces, Schema
from tensorwire.wire import Item

Model = Mapping[str, np.ndarray]
Verdict = Literal["accept", "reject", "clip"]

# Elements that are worked on at a time: float64 temporaries of this size stay in the second-level cache.
_BLOCK: Final = 1 << 15
# The dtypes that are averaged and their largest finite values. Everything else stays as the server has it.
_LARGEST: Final = {
    dtypes.FLOAT16: 65504.0,
    dtypes.BFLOAT16: float.fromhex("0x1.fep127"),
    dtypes.FLOAT32: float(np.finfo(np.float32).max),
    dtypes.FLOAT64: float(np.finfo(np.float64).max),
}


class UpdateError(TensorwireError, ValueError):
    """A whole, well-formed update that must not count. `reason`: stale, client, weight, finite, norm or
    hook.
    """

    def __init__(self, detail: str, *, reason: str, item: object = None) -> None:
        super().__init__(detail, item=item)
        self.reason = reason


@dataclass(frozen=True)
class Update:
    """A client's update that was read through and may count.

    `recording`: the path of the stream, or a buffer that holds it. `norm`: L2 norm, over all averaged items,
    of what it adds to the base. `scale`: what that is multiplied with, less than 1 where it was clipped.
    `digest`: of the stream.
    """

    terms: Terms
    recording: Any
    norm: float
    digest: bytes
    scale: float = 1.0

    @property
    def client(self) -> str:
        return self.terms.client

    def slices(self, open_item: Callable[[Item], None] = lambda item: None, **options: Any) -> Iterator[Piece]:
        """The decoded slices, read once more. Raises WireError where the recording is not what it was."""
        in_file = isinstance(self.recording, (str, os.PathLike))
        with open(self.recording, "rb", buffering=0) if in_file else nullcontext(self.recording) as source:
            slices = Pieces(source, open_item, **options)
            yield from slices
        if slices.digest != self.digest:
            raise CorruptError("not the recording that was checked")


@dataclass(frozen=True)
class Rules:
    """What the server demands of an update beyond its schema.

    `max_norm`: larger updates are rejected or, with `on_norm="clip"`, scaled down to it. `validate` is called
    with each update that passes and the schema it was held against, and has the last word: accept, reject, or
    clip to `max_norm`.
    """

    max_weight: float = 1e9
    max_norm: float | None = None
    on_norm: Literal["reject", "clip"] = "reject"
    validate: Callable[[Update, Schema], Verdict] | None = None
    limits: Limits = field(default=DEFAULT)


def check_update(
    source: Any,
    model: Model,
    expected: Terms,
    rules: Rules,
    *,
    recording: Any = None,
) -> Update:
    """Read an update through and return it as one that may count. Takes O(frame) memory beside the model.

    `source`: as in `decode`. `expected`: the terms that the update must carry, all but its kind, weight and
    metrics. `recording`: where it can be read again (`source` itself). Names, their order, shapes and dtypes
    must be the model's. Raises UpdateError, SchemaError before any payload is read, or another WireError.
    """
    schema, names = tensorwire.schema(model), iter(model)
    terms: Terms | None = None

    def open_item(item: Item) -> None:
        nonlocal terms
        if terms is None:
            terms = _agreed(Terms.parse(slices.metadata), expected, rules)
        schema.check(item)
        if item.path and item.name != (name := next(names)):
            raise SchemaError(f"items come in another order: {name!r} was expected here")

    slices = Pieces(source, open_item, limits=rules.limits)
    energy = 0.0
    for piece in slices:
        assert terms is not None
        if piece.dtype in _LARGEST:
            energy += _energy(piece, _place(model, piece), terms.kind)
    schema.check_complete()
    assert terms is not None
    recording = source if recording is None else recording
    return _judged(Update(terms, recording, math.sqrt(energy), slices.digest), rules, tensorwire.schema(model))


def _agreed(terms: Terms, expected: Terms, rules: Rules) -> Terms:
    for name, reason in (("run", "stale"), ("round", "stale"), ("base", "stale"), ("client", "client")):
        got, wanted = getattr(terms, name), getattr(expected, name)
        if got != wanted:
            raise UpdateError(f"{name} is {show(got)}, this is {wanted!r}", reason=reason)
    try:
        check_weight(terms.weight, rules.max_weight)
    except ValueError as error:
        raise UpdateError(str(error), reason="weight") from None
    return terms


def _energy(piece: Piece, base: np.ndarray, kind: Kind) -> float:
    """The sum of squares of what a piece adds to the base. Raises UpdateError for what is not finite, or
    would not be once added.
    """
    dtype, energy = piece.dtype, 0.0
    for values, was in _blocks(piece.data, base, dtype):
        change = values - was if kind == "weights" else values
        target = values if kind == "weights" else values + was
        if not np.max(np.abs(target)) <= _LARGEST[dtype]:  # false for NaN too
            raise UpdateError(f"NaN, infinite or beyond {dtype}", reason="finite", item=piece.item.name)
        energy += float(np.sum(np.square(change)))
    return energy


def _judged(update: Update, rules: Rules, schema: Schema) -> Update:
    limit = math.inf if rules.max_norm is None else rules.max_norm
    clip = not update.norm <= limit
    if clip and rules.on_norm == "reject":
        raise UpdateError(f"norm {update.norm:.6g} is above {limit:.6g}", reason="norm")
    if rules.validate is not None:
        verdict = rules.validate(update, schema)
        if verdict == "reject":
            raise UpdateError("refused by the server's validate", reason="hook")
        if verdict not in ("accept", "clip") or (verdict == "clip" and rules.max_norm is None):
            raise ValueError(f"validate must return accept, reject, or where there is a max_norm clip, not {verdict!r}")
        clip = clip or (verdict == "clip" and update.norm > limit)
    return replace(update, scale=limit / update.norm) if clip else update


def aggregate(updates: Sequence[Update], model: dict[str, np.ndarray], *, limits: Limits = DEFAULT) -> None:
    """Write the weighted mean of `updates` over `model`, their base.

    A recording that has changed since it was checked raises a WireError with parts of the model already
    written: load it again from where the server keeps it.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    if not ordered or len({update.client for update in ordered}) < len(ordered):
        raise ValueError("aggregate takes at least one update, and one of each client")
    weight = math.fsum(update.terms.weight for update in ordered)
    scratch = Scratch()
    first, *others = (_Contribution(update, model, scratch, limits) for update in ordered)
    total = np.empty(0)
    for piece in first.pieces:
        dtype, place = piece.dtype, _place(model, piece)
        count = piece.data.size // dtype.itemsize
        if total.size < count:
            total = np.empty(count)
        sums = total[:count]
        sums.fill(0.0)
        first.add(piece.data, place, dtype, sums)
        for other in others:
            other.add_next(piece.item.name, place, dtype, sums)
        if dtype in _LARGEST:
            np.divide(sums, weight, out=sums)
            _narrow(sums, dtype, place)
    for other in others:
        other.finish()


class _Contribution:
    """One update, read in step with the others through the scratch that they share."""

    def __init__(self, update: Update, model: Model, scratch: Scratch, limits: Limits) -> None:
        self._schema = tensorwire.schema(model)
        self._terms = update.terms
        self._scale = update.scale
        self.pieces = update.slices(self._schema.check, scratch=scratch, limits=limits)
        self._rest: np.ndarray | None = None  # of a piece that was longer than what the others had

    def add_next(self, name: str, place: np.ndarray, dtype: DType, sums: np.ndarray) -> None:
        """Add this client's elements of an item that belong at `place`."""
        done, itemsize = 0, dtype.itemsize
        while done < place.size:
            data, kept = self._next(name)
            size = min(data.size, place.size - done)
            part = slice(done // itemsize, (done + size) // itemsize)
            self.add(data[:size], place[done : done + size], dtype, sums[part])
            done += size
            if size < data.size:
                self._rest = data[size:] if kept else data[size:].copy()

    def _next(self, name: str) -> tuple[np.ndarray, bool]:
        """The next bytes of an item, and whether they are this client's own memory rather than shared
        scratch.
        """
        if self._rest is not None:
            rest, self._rest = self._rest, None
            return rest, True
        piece = next(self.pieces, None)
        if piece is None or piece.item.name != name:
            raise SchemaError("not where the other updates have it", item=name)
        return piece.data, False

    def add(self, data: np.ndarray, place: np.ndarray, dtype: DType, sums: np.ndarray) -> None:
        """Sums += weight * value, for the values that this client has at `place`."""
        if dtype not in _LARGEST:
            return
        done = 0
        for values, base in _blocks(data, place, dtype):
            if self._terms.kind == "difference":
                values = base + self._scale * values
            elif self._scale != 1.0:
                values = base + self._scale * (values - base)
            sums[done : done + values.size] += self._terms.weight * values
            done += values.size

    def finish(self) -> None:
        """Read the end of the stream, which vouches for all of it."""
        if self._rest is not None or next(self.pieces, None) is not None:
            raise SchemaError("longer than the other updates")


def _place(model: Model, piece: Piece) -> np.ndarray:
    """The bytes of the model that a piece is about."""
    begin = piece.start * piece.dtype.itemsize
    return np.frombuffer(FRONT.target(model[piece.item.name]), np.uint8)[begin : begin + piece.data.size]


def _blocks(data: np.ndarray, base: np.ndarray, dtype: DType) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Bytes of an update and of its base as pairs of float64 blocks."""
    step = _BLOCK * dtype.itemsize
    for start in range(0, data.size, step):
        yield _widen(data[start : start + step], dtype), _widen(base[start : start + step], dtype)


def _widen(data: np.ndarray, dtype: DType) -> np.ndarray:
    """Float bytes as float64, exactly."""
    if dtype == dtypes.BFLOAT16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return data.view(dtype.name).astype(np.float64)


def _narrow(values: np.ndarray, dtype: DType, out: np.ndarray) -> None:
    """float64 rounded to nearest even into the bytes `out`; to bfloat16 by way of float32."""
    if dtype == dtypes.BFLOAT16:
        kernels.cast(values.astype(np.float32), out.view(np.uint16))
    else:
        out.view(dtype.name)[:] = values
