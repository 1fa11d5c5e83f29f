"""What comes of training: the update that answers it, and numbers of whatever library."""

import math
import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.fl.plan import Answer
from tensorwire.storage import write_file
from tensorwire.updates import ErrorFeedback, Terms, arrays, encode, exact_vectors, matched, subtract

_METRICS: Final = 500  # that a client may report of a round
_NAME: Final = 64  # characters of the name of one


def fingerprint(state: Mapping[str, Any]) -> int:
    """What changes when somebody writes to the tensors of `state`, which are contiguous and on the CPU."""
    crc = 0
    for array in arrays(state).values():
        crc = crc32c(array.reshape(-1).view(np.uint8), crc)
    return crc


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
