"""Gradients in multiples of their usual size, so that a compressor also selects rows and tensors of small gradients."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorwire import kernels
from tensorwire.codecs import largest_of
from tensorwire.errors import NonFiniteError, SchemaError
from tensorwire.memory import float32_arrays

Float32 = npt.NDArray[np.float32]


class Normalizer:
    """Divides the gradients of one sender by their root mean square, element by element.

    This is Adam's second moment (Kingma and Ba, arXiv:1412.6980), applied before compression. The mean square is a
    moving average that decays by `beta` at each step; `eps` is added to its root. Calculated in float64; the root is
    kept in float32. Raises ValueError.

        normalizer = Normalizer(0.99)
        message = compressor.compress(normalizer.divide(gradients))
    """

    def __init__(self, beta: float = 0.99, *, eps: float = 1e-8) -> None:
        if not (0 <= beta < 1 and 0 < eps < np.inf):
            raise ValueError(f"beta must be at least 0 and less than 1, eps above 0, not {beta} and {eps}")
        self._beta = float(beta)
        self._eps = eps
        self._left = 1.0  # of the zeros that a mean square begins with
        self._roots: dict[str, Float32] = {}

    def divide(self, gradients: Mapping[str, Float32]) -> dict[str, Float32]:
        """The gradients of a step, float32 arrays by name, in multiples of their usual size, which they update.

        Names and shapes must be the same every time. Raises SchemaError for others and NonFiniteError for values that
        are not finite, before the state changes. The gradients are not written to.
        """
        for name, gradient in gradients.items():
            self._check(name, gradient)
        self._left *= self._beta
        made = float32_arrays({name: gradient.shape for name, gradient in gradients.items()})
        options = {"beta": self._beta, "scale": 1 / sqrt(1 - self._left), "eps": self._eps}
        for name, gradient in gradients.items():
            if name not in self._roots:
                self._roots[name] = np.zeros(gradient.shape, np.float32)
            flat, roots, out = (array.reshape(-1) for array in (gradient, self._roots[name], made[name]))
            kernels.divide_by_rms(flat, roots, out, **options)
        return made

    def state_dict(self) -> dict[str, Any]:
        """The state. The arrays are the normalizer's own: it writes to them in the next step."""
        return {"beta": self._beta, "left": self._left, "roots": dict(self._roots)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`, in torch or NumPy arrays. Raises SchemaError for another beta."""
        if state["beta"] != self._beta:
            raise SchemaError(f"this is the state of a normalizer with a beta of {state['beta']}, not of {self._beta}")
        roots = {name: np.array(root, np.float32) for name, root in state["roots"].items()}
        self._left, self._roots = state["left"], roots

    def _check(self, name: str, gradient: Float32) -> None:
        if self._roots and (name not in self._roots or self._roots[name].shape != gradient.shape):
            raise SchemaError(f"there was no gradient of shape {list(gradient.shape)} before", item=name)
        flat = gradient.reshape(-1)
        if largest_of(flat) == np.inf:
            index = int(np.flatnonzero(~np.isfinite(flat))[0])
            error = NonFiniteError(f"{flat[index]}, which cannot be averaged", index=index)
            error.item = name
            raise error
