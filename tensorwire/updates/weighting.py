"""How much each update counts in the mean: functions from updates to updates that can be chained.

They use an update's terms and the norm that was measured when it was checked; none of them reads a recording.

    updates, left_out = without_outliers(updates)
    average(normalized(updates), into=model)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from tensorwire.updates.check import Update

_ENOUGH: Final = 3  # updates, of which one can be told from the others


class LeftOut(NamedTuple):
    """An update that is left out, and the reason."""

    client: str
    reason: str


def without_outliers(
    updates: Sequence[Update], *, weight: float = 10.0, norm: float = 10.0
) -> tuple[list[Update], list[LeftOut]]:
    """The updates without outliers, and the outliers that are left out.

    An update whose norm is more than `norm` times the median is left out. A weight of more than `weight` times the
    median weight is reduced to that limit: clients state their own weights, but many examples are no fault. With fewer
    than three updates, no outlier can be identified, and all are unchanged.
    """
    if len(updates) < _ENOUGH:
        return list(updates), []
    most, largest = weight * _median([u.terms.weight for u in updates]), norm * _median([u.norm for u in updates])
    kept, left_out = [], []
    for update in updates:
        if update.norm > largest > 0:
            reason = f"norm {update.norm:.4g}, more than {norm:g} times the median of the round"
            left_out.append(LeftOut(update.client, reason))
        else:
            kept.append(_weighing(update, min(update.terms.weight, most)))
    return kept, left_out


def clipped_to_median(updates: Sequence[Update], times: float = 1.0) -> list[Update]:
    """Updates scaled down to at most `times` the median of their norms, which no minority can move far.

    Norm clipping as in Sun et al., Can You Really Backdoor Federated Learning?, arXiv:1911.07963, with the bound taken
    from the round itself.
    """
    bound = times * _median([update.norm for update in updates])
    return [replace(u, scale=min(u.scale, bound / u.norm)) if u.norm > bound else u for u in updates]


def normalized(updates: Sequence[Update], metric: str = "steps") -> list[Update]:
    """Updates as if all clients had taken equally many local steps: FedNova (Wang et al., arXiv:2007.07481).

    `metric`: the metric with a client's number of steps. A client's change is divided by its own number of steps and
    multiplied by the weighted mean of all. Raises ValueError if a client does not report it.
    """
    steps = [update.terms.metrics.get(metric, 0) for update in updates]
    for update, number in zip(updates, steps, strict=True):
        if not 0 < number < math.inf:
            raise ValueError(
                f"{update.client!r} must report its number of {metric} as a finite number above 0, not {number!r}"
            )
    weight = math.fsum(update.terms.weight for update in updates)
    mean = math.fsum(u.terms.weight * number for u, number in zip(updates, steps, strict=True)) / weight
    return [replace(u, scale=u.scale * mean / number) for u, number in zip(updates, steps, strict=True)]


def _weighing(update: Update, weight: float) -> Update:
    return replace(update, terms=replace(update.terms, weight=weight))


def _median(values: Sequence[float]) -> float:
    """The middle one; of two, the smaller."""
    return sorted(values)[(len(values) - 1) // 2]
