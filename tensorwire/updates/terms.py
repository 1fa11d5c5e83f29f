"""The terms of a stream of a model or an update: run, round, base, client and weight, in its metadata."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from tensorwire.errors import EncodeError, SchemaError

UpdateKind = Literal["weights", "difference"]

_KEY: Final = "tensorwire.terms"
_METRICS: Final = 500  # that an update may report
_NAME: Final = 64  # characters of the name of one
_KINDS: Final = get_args(UpdateKind)
_TYPES: Final = {"run": str, "round": int, "base": str, "client": str, "metrics": dict}


@dataclass(frozen=True)
class Terms:
    """The run and round of a stream, its sender, its base and its weight.

    `run`, `round`: names that sender and receiver agreed on. `client`: the sender of an update, "" for a model from the
    server. `kind`: whole weights, or a difference to add to the base. `base`: digest, as hex, of the stream from which
    both sides have the base; "" if there is none. `weight`: the update's weight in a mean, for instance the number of
    examples. `metrics`: other numbers that the sender reports.
    """

    run: str
    round: int
    base: str = ""
    client: str = ""
    kind: UpdateKind = "weights"
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The metadata of a stream under these terms.

        Raises EncodeError for terms that `parse` would refuse, and a weight that `check_weight` does.
        """
        if not self._are_typed():
            raise EncodeError(
                "terms are a run, a base and a client as text, an int as round, a kind (weights or difference), and "
                "metrics that are a dict of finite numbers"
            )
        try:
            check_weight(self.weight)
            return {_KEY: json.dumps(asdict(self), allow_nan=False)}
        except (ValueError, TypeError) as error:
            raise EncodeError(f"these terms cannot be sent: {error}") from None

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> "Terms":
        """The terms in the metadata of a received stream. Raises SchemaError; `check_weight` is left to the caller."""
        try:
            terms = cls(**json.loads(metadata[_KEY]))
            if terms._are_typed():
                return terms
        except (KeyError, TypeError, ValueError, RecursionError):
            pass
        raise SchemaError("the stream's metadata has no valid terms (run, round, base, weight)")

    def _are_typed(self) -> bool:
        """Whether all but the weight is of the type that it must be."""
        if self.kind not in _KINDS or any(type(getattr(self, name)) is not kind for name, kind in _TYPES.items()):
            return False
        return all(type(value) in (int, float) for value in self.metrics.values())


def check_weight(weight: object, most: float = math.inf) -> None:
    """Raise ValueError unless `weight` is a finite number with 0 < weight <= `most`; True and "3" are not numbers."""
    bound = min(most, sys.float_info.max)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight <= bound:
        raise ValueError(f"a weight must be a finite number above 0 and at most {bound:g}, not {weight!r:.40}")


def finite_metrics(metrics: Any) -> tuple[dict[str, float], list[str]]:
    """Metrics as plain finite numbers, and the names of those left out: not finite numbers, too many, or too long."""
    kept: dict[str, float] = {}
    dropped = []
    for name, value in dict(metrics or {}).items():
        number = as_number(value)
        name = str(name)
        if number is None or not math.isfinite(number) or len(kept) == _METRICS or len(name) > _NAME:
            dropped.append(name[:_NAME])
        else:
            kept[name] = number
    return kept, dropped


def as_number(value: Any) -> float | None:
    """A number of any library, or a tensor of one element, as a float; None for anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, (bool, int, float)) else None
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None
