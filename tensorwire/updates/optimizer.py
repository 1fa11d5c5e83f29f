"""How a server applies the mean of a round to the model.

`ServerOptimizer("average")` moves to the mean, which is federated averaging. The others treat the difference to the
mean as a negative gradient: momentum (Hsu et al., arXiv:1909.06335), and adagrad, adam and yogi (Reddi et al.,
Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2).

Calculations are in float64; moments are kept in float32. Rounding a model to a narrow dtype drops most of one round's
change. The dropped part is kept in float32 and added in the next round.
"""

import os
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire.errors import SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire import TensorItem

Method = Literal["average", "momentum", "adagrad", "adam", "yogi"]

_METHODS: Final = get_args(Method)
_WIDE: Final = 4  # bytes of a number that drops nothing worth keeping

Float64 = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.float32]


class ServerOptimizer:
    """Applies the means of rounds to a model, and keeps moments and rounding errors between rounds.

    `rate`: the fraction of the way to the mean, or the learning rate. `beta1`, `beta2`: decay of the first and second
    moments. `tau`: added to the divisor of the adaptive methods. Raises ValueError.

        optimizer = ServerOptimizer("yogi", rate=0.01)
        average(updates, into=model, optimizer=optimizer)
        optimizer.save("optimizer.tw")                     # and optimizer.load("optimizer.tw") in another process
    """

    def __init__(
        self,
        method: Method = "average",
        *,
        rate: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"a server optimizer is one of {', '.join(_METHODS)}, not {method!r:.40}")
        if not (0 < rate < np.inf and 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 < tau < np.inf):
            raise ValueError("rate and tau must be above 0, beta1 and beta2 at least 0 and less than 1")
        self._method = method
        self._rate = rate
        self._beta1 = beta1
        self._beta2 = beta2
        self._tau = tau
        # Of each item, as many as it has numbers: what rounding dropped, and the moments.
        self._kept: dict[str, dict[str, Numbers]] = {"dropped": {}, "first": {}, "second": {}}

    def step(self, item: TensorItem, start: int, base: Float64, mean: Float64) -> Float64:
        """The new values of an item's numbers from `start` on. `base`: the model's values; `mean`: of the round."""
        place = slice(start, start + base.size)
        dropped = self._kept["dropped"].get(item.name)
        before = base if dropped is None else base + dropped[place]
        change = mean - base
        if self._method == "average":
            return (mean if self._rate == 1.0 else base + self._rate * change) + (before - base)
        first = self._of("first", item)
        share = 1.0 if self._method == "momentum" else 1.0 - self._beta1
        first[place] = self._beta1 * first[place].astype(np.float64) + share * change
        if self._method == "momentum":
            return before + self._rate * first[place]
        second = self._of("second", item, self._tau**2)
        old, square = second[place].astype(np.float64), np.square(change)
        if self._method == "adagrad":
            second[place] = old + square
        elif self._method == "adam":
            second[place] = self._beta2 * old + (1.0 - self._beta2) * square
        else:
            second[place] = old - (1.0 - self._beta2) * square * np.sign(old - square)
        step: Float64 = first[place] / (np.sqrt(second[place].astype(np.float64)) + self._tau)
        return before + self._rate * step

    def keep(self, item: TensorItem, start: int, target: Float64, rounded: npt.NDArray[Any]) -> None:
        """Keep what rounding `target` to the model's dtype has dropped."""
        if item.dtype.part_size < _WIDE:
            self._of("dropped", item)[start : start + target.size] = target - rounded

    def save(self, path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> None:
        """Write the state to a `.tw` file, which appears under its name only when complete."""
        tensorwire.numpy.save_file(self._kept, path, limits=limits)

    def load(self, path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> None:
        """Restore the state from a file written by `save`. Raises SchemaError for any other."""
        kept = tensorwire.numpy.load_file(path, limits=limits)
        if not isinstance(kept, dict) or kept.keys() != self._kept.keys():
            raise SchemaError(f"{os.fspath(path)} is not the state of a server optimizer")
        self._kept = kept

    def _of(self, kind: str, item: TensorItem, initial: float = 0.0) -> Numbers:
        count = item.total * item.dtype.parts
        numbers = self._kept[kind].setdefault(item.name, np.full(count, initial, np.float32))
        if numbers.size != count:
            raise SchemaError("the server optimizer's state is of another model", item=item.name)
        return numbers
