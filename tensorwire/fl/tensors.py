"""Tensors and numbers on their way into and out of a task, which need not know how they travel."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.errors import SchemaError, show
from tensorwire.fl.plan import Answer
from tensorwire.storage import write_file
from tensorwire.tensor import TensorView
from tensorwire.updates import ErrorFeedback, Terms, Views, arrays, encode, exact_vectors, subtract, views

_STEP: Final = 1 << 20  # elements that are compared at a time
_METRICS: Final = 500  # that a client may report of a round
_NAME: Final = 64  # characters of the name of one


def empty_like(state: Mapping[str, Any]) -> dict[str, Any]:
    """Memory for tensors like those of `state`, of the same library, on the CPU, contiguous, tied as they are."""
    ties = _ties(views(state))
    made = {key: _empty(state[name]) for name, key in ties.items()}
    return {name: made[key] for name, key in ties.items()}


def copies(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `state` in memory of their own, tied as they are."""
    made = empty_like(state)
    for name, array in arrays(made).items():
        view = views({name: state[name]})[name]
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(view.read(0, view.numel), np.uint8)
    return made


def fingerprint(state: Mapping[str, Any]) -> int:
    """What changes when somebody writes to the tensors of `state`, which are contiguous and on the CPU."""
    crc = 0
    for array in arrays(state).values():
        crc = crc32c(array.reshape(-1).view(np.uint8), crc)
    return crc


def matched(state: Any, base: Mapping[str, Any]) -> Views:
    """What training made of `base`, under its names, in its order, tied as it is.

    Raises SchemaError, naming the item, for what is not a model of the same kind.
    """
    if not isinstance(state, Mapping):
        raise SchemaError(f"training must give a mapping of names to tensors, not a {type(state).__name__}")
    got, wanted = views(state), views(base)
    for name in wanted.keys() - got.keys():
        raise SchemaError("training gave no tensor of this name, which the model has", item=name)
    for name in got.keys() - wanted.keys():
        raise SchemaError("training gave a tensor of this name, which the model has not", item=name)
    made: Views = {}
    firsts: dict[object, str] = {}
    for (name, key), was in zip(_ties(wanted).items(), wanted.values(), strict=True):
        view, first = got[name], firsts.setdefault(key, name)
        if (view.dtype, view.shape) != (was.dtype, was.shape):
            detail = f"training gave {view.dtype} {list(view.shape)}, the model has {was.dtype} {list(was.shape)}"
            raise SchemaError(detail, item=name)
        if first != name and view.identity != got[first].identity and not _equal(view, got[first]):
            raise SchemaError(f"the model has one tensor for this and {show(first)}, training gave two", item=name)
        made[name] = replace(view, identity=was.identity)
    return made


def write_update(
    path: str | os.PathLike[str],
    answer: Answer,
    base: Mapping[str, Any],
    state: Any,
    terms: Terms,
    feedback: ErrorFeedback | None,
) -> None:
    """Write the update that training answers with, having made `state` of `base`, and settle what it leaves out.

    Raises what `matched` and `encode` raise.
    """
    sent = matched(state, base)
    if answer.kind == "difference":
        sent = subtract(sent, base)
    if feedback is not None:
        sent = feedback.add(sent)
    seed = answer.seed_of(terms.run, terms.round, terms.client)
    write_file(path, encode(sent, terms, codec=exact_vectors(answer.up), stochastic=seed))
    if feedback is not None:
        with open(path, "rb", buffering=0) as file:
            feedback.settle(sent, file)


def numbers(metrics: Any) -> tuple[dict[str, float], list[str]]:
    """Metrics as plain finite numbers, and the names of those that are none, or too many, or of too long a name."""
    kept: dict[str, float] = {}
    dropped = []
    for name, value in dict(metrics or {}).items():
        number = plain(value)
        name = str(name)
        if number is None or not math.isfinite(number) or len(kept) == _METRICS or len(name) > _NAME:
            dropped.append(name[:_NAME])
        else:
            kept[name] = number
    return kept, dropped


def plain(value: Any) -> float | None:
    """A number of any library, a tensor of one element too, as Python's own; None for what is no number."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, (bool, int, float)) else None
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None


def _ties(tensors: Views) -> dict[str, object]:
    """For each name what those share that are one tensor."""
    return {name: name if view.identity is None else view.identity for name, view in tensors.items()}


def _empty(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return np.empty(tensor.shape, tensor.dtype.newbyteorder("="))
    return tensor.new_empty(tensor.shape, device="cpu")


def _equal(left: TensorView, right: TensorView) -> bool:
    for start in range(0, left.numel, _STEP):
        stop = min(start + _STEP, left.numel)
        if bytes(left.read(start, stop)) != bytes(right.read(start, stop)):
            return False
    return True
