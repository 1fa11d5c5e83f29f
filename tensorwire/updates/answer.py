"""A client's update after training."""

import os
from collections.abc import Mapping
from typing import Any

from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import write_file
from tensorwire.streams import CodecChoice
from tensorwire.updates.difference import subtract
from tensorwire.updates.feedback import ErrorFeedback
from tensorwire.updates.message import encode
from tensorwire.updates.states import matched
from tensorwire.updates.terms import Terms


def write_update(
    path: str | os.PathLike[str],
    state: Any,
    base: Mapping[str, Any],
    terms: Terms,
    *,
    codec: CodecChoice = "raw",
    stochastic: int | None = None,
    feedback: ErrorFeedback | None = None,
    limits: Limits = DEFAULT,
) -> None:
    """Encode the update from `base` to the trained `state` into a file, and keep in `feedback` what the codec drops.

    `terms.kind` decides whether weights or their difference to the base are sent. `codec`, `stochastic`: as in
    `encode`. The file appears under its name only when complete. Raises what `matched` and `encode` raise.

        terms = Terms("my run", 3, base=digest, client="ann", kind="difference", weight=100)
        write_update("update.tw", trained, base, terms, codec="nf4", feedback=ErrorFeedback("residual.tw"))
    """
    sent = matched(state, base)
    if terms.kind == "difference":
        sent = subtract(sent, base)
    if feedback is not None:
        sent = feedback.add(sent)
    write_file(path, encode(sent, terms, codec=codec, stochastic=stochastic, limits=limits))
    if feedback is not None:
        with open(path, "rb", buffering=0) as file:
            feedback.settle(sent, file, limits=limits)
