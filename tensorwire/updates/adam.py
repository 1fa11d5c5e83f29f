"""Adam's direction, for those who have to get the same bits on every machine."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.errors import NonFiniteError, SchemaError
from tensorwire.kernels import default_environment

Float32 = npt.NDArray[np.float32]

_KEPT: Final = ("means", "roots")
_BLOCK: Final = 1 << 14  # numbers that are worked on at a time, in float64: they stay in the caches


class Adam:
    """Where Adam goes, step for step (Kingma and Ba, arXiv:1412.6980): mean / (root of the mean square + `eps`).

    `betas`: how much of the mean and of the mean square stays at each step. Calculated in float64, one rounding for
    each operation, and kept in float32, the mean square as its root. Raises ValueError.

        adam = Adam((0.9, 0.999))
        for name, direction in adam.directions(combine(messages)).items():
            weights[name] -= rate * direction
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), *, eps: float = 1e-8) -> None:
        if not (all(0 <= beta < 1 for beta in betas) and 0 < eps < np.inf):
            raise ValueError(f"betas must be at least 0 and less than 1, eps above 0, not {betas} and {eps}")
        self._betas = tuple(map(float, betas))
        self._eps = eps
        # The betas to the power of the steps, by products, as powers differ between machines.
        self._left = (1.0, 1.0)
        self._means: dict[str, Float32] = {}
        self._roots: dict[str, Float32] = {}

    def directions(self, changes: Mapping[str, Float32]) -> dict[str, Float32]:
        """Take in the gradients of a step, float32 arrays by name; where to go, by the same names.

        The same names and shapes every time. Raises SchemaError for others, NonFiniteError for what is not finite,
        before anything is taken in.
        """
        for name, change in changes.items():
            if self._means and (name not in self._means or self._means[name].shape != change.shape):
                raise SchemaError(f"there was no gradient of shape {list(change.shape)} before", item=name)
            if not np.isfinite(change).all():
                index = int(np.flatnonzero(~np.isfinite(change))[0])
                error = NonFiniteError(f"{change.reshape(-1)[index]}, of which there is no mean", index=index)
                error.item = name
                raise error
        self._left = (self._left[0] * self._betas[0], self._left[1] * self._betas[1])
        with default_environment():
            return {name: self._direction(name, change) for name, change in changes.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that it has to know to go on. The arrays are its own: it writes to them in the next step."""
        return {
            "betas": list(self._betas),
            "left": list(self._left),
            "means": dict(self._means),
            "roots": dict(self._roots),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, in arrays of torch or NumPy. Raises SchemaError for one of other betas."""
        if tuple(state["betas"]) != self._betas:
            raise SchemaError(f"this is the state of Adam with betas of {state['betas']}, not of {list(self._betas)}")
        means, roots = ({name: np.array(array, np.float32) for name, array in state[key].items()} for key in _KEPT)
        self._left, self._means, self._roots = tuple(state["left"]), means, roots

    def _direction(self, name: str, change: Float32) -> Float32:
        if name not in self._means:
            self._means[name], self._roots[name] = (np.zeros(change.shape, np.float32) for _ in _KEPT)
        made = np.empty(change.shape, np.float32)
        parts = [array.reshape(-1) for array in (change, self._means[name], self._roots[name], made)]
        first, second = self._betas
        # What the zeros of the beginning leave of the means.
        share, root_share = 1 - self._left[0], sqrt(1 - self._left[1])
        for start in range(0, change.size, _BLOCK):
            new, mean, root = (part[start : start + _BLOCK].astype(np.float64) for part in parts[:3])
            mean = first * mean + (1 - first) * new
            root = np.sqrt(second * np.square(root) + (1 - second) * np.square(new))
            place = slice(start, start + new.size)
            parts[1][place], parts[2][place] = mean, root
            parts[3][place] = mean / share / (root / root_share + self._eps)
        return made
