"""Error feedback adds to the next update what a lossy codec dropped from the last one.

Seide et al., 1-Bit SGD (Interspeech 2014); Karimireddy et al., arXiv:1901.09847.
"""

import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire.codecs import as_floats, from_floats, is_calculated
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, SchemaError, show
from tensorwire.kernels import default_environment
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams import Pieces
from tensorwire.tensor import TensorView
from tensorwire.updates.difference import Bytes, Views, derived, key_of

Floats = npt.NDArray[np.floating[Any]]

_ROUND: Final = "tensorwire.round"


class ErrorFeedback:
    """The residual of one sender, in float32 (for float64 tensors in float64); initially zeros.

    `path`: a file written by `save`, to continue from if it exists. `residual`: a flat array for each tensor, to
    continue from a residual that was kept elsewhere; it is used, not copied. `round`: the round of the last update
    that left a residual, -1 before the first.

        sent = feedback.add(subtract(trained, base))
        message = b"".join(encode(sent, terms, codec="nf4"))
        ...                                     # once the update has counted:
        feedback.settle(sent, message)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        residual: dict[str, Floats] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.residual: dict[str, Floats] = {} if residual is None else residual
        self.round = -1
        if path is not None and os.path.exists(path):
            about: dict[str, str] = {}
            self.residual = tensorwire.numpy.load_file(path, metadata_into=about, limits=limits)
            self.round = _number(about.get(_ROUND, "-1"))

    def add(self, tensors: Views) -> Views:
        """The tensors with their residuals added; tensors that are not floating-point are unchanged.

        Raises EncodeError if a residual belongs to a tensor of another size or dtype.
        """
        return {
            name: derived(view, _sum(view, self._of(name, view))) if is_calculated(view.dtype) else view
            for name, view in tensors.items()
        }

    def settle(self, sent: Views, message: Any, *, limits: Limits = DEFAULT) -> None:
        """Keep the difference between `sent`, a result of `add`, and what receivers decode from `message`.

        `message`: the encoded stream, as in `tensorwire.decode`. Raises a WireError if it is damaged.
        """
        for piece in Pieces(message, lambda item: None, limits=limits):
            residual = self.residual.get(key_of(piece.item))
            if residual is not None:
                start, stop = piece.start, piece.start + piece.data.size // piece.dtype.itemsize
                wanted = as_floats(sent[key_of(piece.item)].read(start, stop), piece.dtype)
                with default_environment():
                    residual[_numbers(piece.dtype, start, stop)] = wanted - as_floats(piece.data, piece.dtype)

    def age(self, factor: float) -> None:
        """Multiply the residual by `factor`, after rounds in which its sender was not asked."""
        for residual in self.residual.values():
            residual *= factor

    def begin(self, number: int, factor: float) -> None:
        """Begin round `number`: multiply the residual by `factor` for each round since its own that did not ask us."""
        self.age(factor ** max(number - self.round - 1, 0))
        self.round = number

    def save(self, path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> None:
        """Write the residual to a `.tw` file, which appears under its name only when complete."""
        tensorwire.numpy.save_file(self.residual, path, metadata={_ROUND: str(self.round)}, limits=limits)

    def _of(self, name: str, view: TensorView) -> Floats:
        dtype = np.dtype(np.float64 if view.dtype.part_size == np.dtype(np.float64).itemsize else np.float32)
        count = _numbers(view.dtype, 0, view.numel).stop
        residual = self.residual.setdefault(name, np.zeros(count, dtype))
        if residual.size != count or residual.dtype != dtype:
            raise EncodeError("the residual kept for error feedback is of another model", item=name)
        return residual


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SchemaError(f"the residual is for round {show(text)}, which is not a number") from None


def _sum(view: TensorView, residual: Floats) -> Callable[[int, int], Bytes]:
    def read(start: int, stop: int) -> Bytes:
        kept = residual[_numbers(view.dtype, start, stop)]
        with default_environment():
            data: Bytes = from_floats(as_floats(view.read(start, stop), view.dtype) + kept, view.dtype)
        return data

    return read


def _numbers(dtype: DType, start: int, stop: int) -> slice:
    """Elements [start, stop) as numbers, of which a complex one has two."""
    return slice(start * dtype.parts, stop * dtype.parts)
