"""Tensors as views, and their differences, computed slice by slice as they are read."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire.codecs import as_floats, from_floats, is_calculated
from tensorwire.errors import ArgumentError, EncodeError
from tensorwire.kernels import default_environment
from tensorwire.numpy import FRONT
from tensorwire.tensor import TensorView
from tensorwire.wire import FileItem, TensorItem

Bytes = npt.NDArray[np.uint8]
Views = dict[str, TensorView]


def check_state(state: object) -> None:
    """Raise ArgumentError for anything but a mapping."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"expected a mapping of names to tensors, not {type(state).__name__}")


def views(state: Mapping[str, Any]) -> Views:
    """The tensors of `state` (torch, NumPy, or views already) as views. Raises EncodeError for any other value."""
    check_state(state)
    return {name: view_of(name, tensor) for name, tensor in state.items()}


def subtract(new: Mapping[str, Any], base: Mapping[str, Any]) -> Views:
    """The difference `new` - `base`, tensor by tensor, in the dtype of each.

    Only floating-point tensors are subtracted; others are those of `new`. `base` may hold more than `new`.
    Raises EncodeError for a value that is not a tensor, or that has another dtype or shape in the base.
    """
    changes = {}
    for name, view in views(new).items():
        changes[name] = view
        if is_calculated(view.dtype):
            if name not in base:
                raise EncodeError("the base has no tensor of this name", item=name)
            old = view_of(name, base[name])
            if (view.dtype, view.shape) != (old.dtype, old.shape):
                detail = f"{view.dtype} {list(view.shape)} now, {old.dtype} {list(old.shape)} before"
                raise EncodeError(detail, item=name)
            changes[name] = derived(view, _subtraction(view, old))
    return changes


def added(change: Mapping[str, Any], base: Mapping[str, Any]) -> Views:
    """The sum `base` + `change`, the inverse of `subtract`: tensor by tensor, in the dtype that each has in the base.

    Tensors that are not floating-point are those of `change`. `base` may hold more than `change`. Raises EncodeError
    for a value that is not a tensor, has another shape in the base, or is floating-point in only one of the two.

        trained = added(subtract(trained, base), base)
    """
    sums = {}
    for name, view in views(change).items():
        sums[name] = view
        if is_calculated(view.dtype):
            if name not in base:
                raise EncodeError("the base has no tensor of this name", item=name)
            old = view_of(name, base[name])
            if view.shape != old.shape or view.dtype.parts != old.dtype.parts or not is_calculated(old.dtype):
                detail = f"a change of {view.dtype} {list(view.shape)} to {old.dtype} {list(old.shape)}"
                raise EncodeError(detail, item=name)
            sums[name] = TensorView(old.dtype, old.shape, _addition(view, old), identity=view.identity)
    return sums


def key_of(item: TensorItem | FileItem) -> str:
    """The key of an item in its mapping, which may be spelled differently from its name."""
    return str(item.path[0])


def proximal(weights: Mapping[str, Any], base: Mapping[str, Any], mu: float) -> dict[str, Any]:
    """FedProx's term of the gradient of each weight: `mu` times its difference to the base.

    Li et al., Federated Optimization in Heterogeneous Networks, arXiv:1812.06127, equation 2. Torch or NumPy, as given.

        for name, pull in proximal(weights, base, mu=0.01).items():
            gradients[name] += pull
    """
    return {name: mu * (weight - base[name]) for name, weight in weights.items()}


def view_of(name: str, tensor: Any) -> TensorView:
    """One tensor as a view. Raises EncodeError with `name` for any other value."""
    if isinstance(tensor, TensorView):
        return tensor
    view = FRONT.view(tensor)
    if view is None and "torch" in sys.modules:
        view = tensorwire.torch.FRONT.view(tensor)
    if view is None:
        raise EncodeError(f"a state must map names to tensors, not to {type(tensor).__name__}", item=name)
    return view


def derived(view: TensorView, read: Callable[[int, int], Bytes]) -> TensorView:
    """A tensor computed from another, element by element. Tied tensors stay tied."""
    return TensorView(view.dtype, view.shape, read, identity=view.identity)


def _addition(change: TensorView, old: TensorView) -> Callable[[int, int], Bytes]:
    def read(start: int, stop: int) -> Bytes:
        # Whoever encodes or checks an infinity finds the overflow.
        with default_environment(), np.errstate(over="ignore", invalid="ignore"):
            total = as_floats(old.read(start, stop), old.dtype) + as_floats(change.read(start, stop), change.dtype)
            data: Bytes = from_floats(total, old.dtype)
        return data

    return read


def _subtraction(new: TensorView, old: TensorView) -> Callable[[int, int], Bytes]:
    def read(start: int, stop: int) -> Bytes:
        with default_environment(), np.errstate(over="ignore", invalid="ignore"):
            change = as_floats(new.read(start, stop), new.dtype) - as_floats(old.read(start, stop), new.dtype)
            data: Bytes = from_floats(change, new.dtype)
        return data

    return read
