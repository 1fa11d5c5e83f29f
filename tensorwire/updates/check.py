"""Decides whether an update is accepted: reads it once, while it arrives or later, and checks it slice by slice."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire import Schema, TensorwireError, dtypes
from tensorwire.codecs import as_floats, is_calculated
from tensorwire.dtypes import DType
from tensorwire.errors import ArgumentError, CorruptError, EncodeError, SchemaError, check_function, show
from tensorwire.limits import DEFAULT, Limits, check_limits
from tensorwire.memory import Scratch
from tensorwire.streams import CodecChoice, Piece, Pieces, rule
from tensorwire.updates.difference import Bytes, key_of, views
from tensorwire.updates.message import Arrays, place_of_piece
from tensorwire.updates.terms import Terms, UpdateKind, check_weight
from tensorwire.wire import Item

Verdict = Literal["accept", "reject", "clip"]
OnNorm = Literal["reject", "clip"]
Recording = str | os.PathLike[str] | bytes | bytearray | memoryview

# Elements that are worked on at a time: float64 temporaries of this size stay in the second-level cache.
_BLOCK: Final = 1 << 15
_SLICE: Final = 2048  # bytes of elements that the slices of an update must have on average
# The largest finite number of each dtype that is averaged; of complex ones, of their parts.
_LARGEST: Final = {
    dtypes.FLOAT16: 65504.0,
    dtypes.BFLOAT16: float.fromhex("0x1.fep127"),
    dtypes.FLOAT32: float(np.finfo(np.float32).max),
    dtypes.FLOAT64: float(np.finfo(np.float64).max),
    dtypes.COMPLEX32: 65504.0,
    dtypes.COMPLEX64: float(np.finfo(np.float32).max),
    dtypes.COMPLEX128: float(np.finfo(np.float64).max),
    dtypes.FLOAT8_E4M3FN: 448.0,
    dtypes.FLOAT8_E5M2: 57344.0,
    dtypes.FLOAT8_E4M3FNUZ: 240.0,
    dtypes.FLOAT8_E5M2FNUZ: 57344.0,
}
# Floats that cannot be calculated with: a mean would leave them as they are, and nobody would notice.
_NO_NUMBERS: Final = (dtypes.FLOAT8_E8M0FNU, dtypes.FLOAT4_E2M1FN_X2)


class UpdateError(TensorwireError, ValueError):
    """A complete, well-formed update is refused. `reason`: stale, client, weight, cost, finite, norm or hook."""

    def __init__(self, detail: str, *, reason: str, item: object = None) -> None:
        super().__init__(detail, item=item)
        self.reason = reason


@dataclass(frozen=True)
class Update:
    """An encoded update that was read and accepted.

    `recording`: the path of the stream, or a buffer that holds it. `norm`: L2 norm, over all floating-point items, of
    the change to the base. `scale`: the factor to apply to this change, less than 1 if it was clipped.
    `digest`: of the stream.
    """

    terms: Terms
    recording: Recording
    norm: float
    digest: bytes
    scale: float = 1.0

    @property
    def client(self) -> str:
        """The name of the client that made it."""
        return self.terms.client

    @property
    def base_share(self) -> float:
        """The share of the base in the model after this update: 1 for a difference."""
        return 1.0 if self.terms.kind == "difference" else 1.0 - self.scale

    def pieces(
        self,
        open_item: Callable[[Item], None] = lambda item: None,
        *,
        scratch: Scratch | None = None,
        limits: Limits = DEFAULT,
    ) -> Iterator[Piece]:
        """The decoded pieces, read again. Raises a WireError if the recording has changed since it was checked."""
        with _opened(self.recording) as source:
            pieces = Pieces(source, open_item, scratch=scratch, limits=limits)
            yield from pieces
        if pieces.digest != self.digest:
            raise CorruptError("this is not the recording that was checked")


@dataclass(frozen=True)
class Rules:
    """Limits for updates, beyond the schema of the model.

    `down`: the codec of the next model, which must be able to carry the updated values. `max_norm`: updates with a
    larger norm are rejected or, with `on_norm="clip"`, scaled down to it. `validate`: called with each update that
    passes and with its schema; returns the final verdict: accept, reject, or clip to `max_norm`.
    """

    max_weight: float = 1e9
    max_norm: float | None = None
    on_norm: OnNorm = "reject"
    validate: Callable[[Update, Schema], Verdict] | None = None
    limits: Limits = DEFAULT
    down: CodecChoice = "raw"

    def __post_init__(self) -> None:
        check_function(self.validate, "validate", "update", "schema")
        check_limits(self.limits)
        if self.on_norm not in get_args(OnNorm):
            raise ArgumentError(f"on_norm must be one of {', '.join(get_args(OnNorm))}, not {self.on_norm!r:.40}")
        for name, number in (("max_weight", self.max_weight), ("max_norm", self.max_norm)):
            if number is not None and (not isinstance(number, (int, float)) or not number > 0):
                raise ArgumentError(f"{name} must be a number above 0, not {number!r:.40}")


def ceilings(model: Arrays, down: CodecChoice) -> dict[str, float]:
    """The largest magnitude that the codec `down` can carry, for each floating-point item of a model.

    Raises EncodeError for floats that cannot be averaged, and for an invalid codec choice.
    """
    choose, highest = rule(down), {}
    described = views(model)
    for name, view in described.items():
        if view.dtype in _NO_NUMBERS:
            raise EncodeError(
                f"no mean can be taken of {view.dtype}; send it beside the model, or as float32", item=name
            )
        choose.notice(name, view)
    for name, view in described.items():
        if view.dtype in _LARGEST:
            codec = choose(name, model[name], view)
            highest[name] = min(_LARGEST[view.dtype], codec.ceiling(view.dtype))
    return highest


def check_update(
    source: Any, model: Arrays, expected: Terms, rules: Rules | None = None, *, recording: Recording | None = None
) -> Update:
    """Read and check an update, and return it if it is accepted. Takes O(frame) memory beside the model.

    `source`: as in `tensorwire.decode`. `model`: the base. `expected`: the terms that the update must carry, except
    its kind, weight and metrics. `recording`: where to read the update again, if not from `source` itself. Names, their
    order, shapes and dtypes must be the model's. Raises UpdateError, SchemaError before any payload is read, or
    another WireError.
    """
    rules = rules or Rules()
    schema, names, highest = tensorwire.schema(model), iter(model), ceilings(model, rules.down)
    terms: Terms | None = None

    def open_item(item: Item) -> None:
        nonlocal terms
        if terms is None:
            terms = _agreed(Terms.parse(pieces.metadata), expected, rules)
        schema.check(item)
        if item.path and item.path != (name := next(names),):
            raise SchemaError(f"items come in another order: {name!r} was expected here")

    pieces = Pieces(source, open_item, limits=rules.limits)
    energy, left = 0.0, _most_slices(model)
    for piece in pieces:
        assert terms is not None
        left -= 1
        if left < 0:
            detail = f"the slices of the update have less than {_SLICE} bytes on average: send it in larger frames"
            raise UpdateError(detail, reason="cost", item=piece.item.name)
        if is_calculated(piece.dtype):
            energy += _energy(piece, place_of_piece(model, piece), terms.kind, highest[key_of(piece.item)])
    schema.check_complete()
    assert terms is not None
    update = Update(terms, source if recording is None else recording, math.sqrt(energy), pieces.digest)
    return _judged(update, rules, tensorwire.schema(schema))


def _most_slices(model: Arrays) -> int:
    """How many slices an update may come in: each costs some 50 us, whatever is in it."""
    return 2 * len(model) + sum(array.nbytes for array in model.values()) // _SLICE + 16


def _blocks(
    data: Bytes, base: Bytes, dtype: DType
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """The numbers of an update and of its base as pairs of float64 blocks, exactly."""
    step = _BLOCK * dtype.itemsize
    for start in range(0, data.size, step):
        part, was = data[start : start + step], base[start : start + step]
        yield as_floats(part, dtype).astype(np.float64), as_floats(was, dtype).astype(np.float64)


def _opened(recording: Recording) -> AbstractContextManager[Any]:
    return open(recording, "rb", buffering=0) if isinstance(recording, (str, os.PathLike)) else nullcontext(recording)


def _agreed(terms: Terms, expected: Terms, rules: Rules) -> Terms:
    for name, reason in (("run", "stale"), ("round", "stale"), ("base", "stale"), ("client", "client")):
        got, wanted = getattr(terms, name), getattr(expected, name)
        if got != wanted:
            raise UpdateError(f"{name} is {show(got)}, expected {wanted!r}", reason=reason)
    try:
        check_weight(terms.weight, rules.max_weight)
    except ValueError as error:
        raise UpdateError(str(error), reason="weight") from None
    return terms


def _energy(piece: Piece, base: Bytes, kind: UpdateKind, highest: float) -> float:
    """The sum of squares of what a piece adds to the base.

    Raises UpdateError for values that are not finite, or whose sum with the base is not, or cannot be sent.
    """
    energy = 0.0
    for values, was in _blocks(piece.data, base, piece.dtype):
        change = values - was if kind == "weights" else values
        target = values if kind == "weights" else values + was
        if not np.max(np.abs(target)) <= highest:  # false for NaN too
            detail = f"the update holds NaN, an infinity, or makes of the model what cannot be sent: beyond {highest:g}"
            raise UpdateError(detail, reason="finite", item=piece.item.name)
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
            raise UpdateError("the receiver's validate function refuses this update", reason="hook")
        if verdict not in ("accept", "clip") or (verdict == "clip" and rules.max_norm is None):
            raise ValueError(f"validate must return accept, reject or, if there is a max_norm, clip; not {verdict!r}")
        clip = clip or (verdict == "clip" and update.norm > limit)
    return replace(update, scale=limit / update.norm) if clip else update
