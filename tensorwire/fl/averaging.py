"""Turns the updates of a round into the next model. The server and the simulator both use it."""

import os
from collections.abc import Callable, Sequence

from tensorwire import Schema
from tensorwire.fl.plan import Plan
from tensorwire.limits import DEFAULT, Limits, at_least_default
from tensorwire.streams import CodecChoice
from tensorwire.updates import (
    Arrays,
    LeftOut,
    Rules,
    ServerOptimizer,
    TrimmedMean,
    Update,
    Verdict,
    WeightedMean,
    average,
    ceilings,
    exact_vectors,
    without_outliers,
)


class Averaging:
    """The mean of a plan, and the state of its optimizer between rounds."""

    def __init__(
        self, plan: Plan, *, validate: Callable[[Update, Schema], Verdict] | None = None, limits: Limits = DEFAULT
    ) -> None:
        self._plan = plan
        # With differences, a model is sent whole only where no difference can be taken, and then exactly.
        self._down: CodecChoice = "raw" if plan.down_kind == "difference" else exact_vectors(plan.down)
        self.rules = Rules(plan.max_weight, plan.max_norm, plan.on_norm, validate, limits, down=self._down)
        self._optimizer = self._new_optimizer()

    def check(self, model: Arrays) -> None:
        """Raise EncodeError if the model has floats that cannot be averaged."""
        ceilings(model, self._down)

    def average(self, updates: Sequence[Update], model: Arrays) -> list[LeftOut]:
        """Write the mean over `model`. Returns the updates that were left out. Raises as `average`."""
        kept, left_out = (list(updates), []) if self._plan.keep_outliers else without_outliers(updates)
        mean = WeightedMean() if self._plan.trim is None else TrimmedMean(self._plan.trim)
        average(kept, into=model, mean=mean, optimizer=self._optimizer, down=self._down, limits=self.rules.limits)
        return left_out

    def save(self, path: str) -> None:
        """Save the optimizer's state."""
        self._optimizer.save(path, limits=at_least_default(self.rules.limits))

    def load(self, path: str) -> None:
        """Restore the optimizer's state, if the file exists. Raises a WireError if it is damaged."""
        self._optimizer = self._new_optimizer()
        if os.path.exists(path):
            self._optimizer.load(path, limits=at_least_default(self.rules.limits))

    def _new_optimizer(self) -> ServerOptimizer:
        return ServerOptimizer(self._plan.optimizer, rate=self._plan.rate)
