"""What comes of training: the update that answers it."""

import os
from collections.abc import Mapping
from typing import Any, Final

from tensorwire.fl.plan import Answer
from tensorwire.storage import write_file
from tensorwire.updates import ErrorFeedback, Terms, encode, exact_vectors, matched, subtract

_METRICS: Final = 500  # that a client may report of a round
_NAME: Final = 64  # characters of the name of one


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
