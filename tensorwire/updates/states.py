"""Memory for a model's tensors, copies of them, and trained states matched to them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.errors import SchemaError, show
from tensorwire.updates.difference import Views, views
from tensorwire.updates.message import arrays
from tensorwire.updates.tensors import is_equal


def empty_like(state: Mapping[str, Any]) -> dict[str, Any]:
    """Memory for tensors like those of `state`, of the same library, on the CPU, contiguous, tied as they are."""
    ties = _ties(views(state))
    made = {key: _empty(state[name]) for name, key in ties.items()}
    return {name: made[key] for name, key in ties.items()}


def copies(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `state` in memory of their own, tied as they are."""
    made = empty_like(state)
    for name, array in arrays(made).items():
        view = views({name: state[name]})[name]
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(view.read(0, view.numel), np.uint8)
    return made


def matched(state: Any, base: Mapping[str, Any]) -> Views:
    """The trained `state` with the names, order and ties of `base`.

    Raises SchemaError, naming the item, for a state that does not match the base.
    """
    if not isinstance(state, Mapping):
        raise SchemaError(f"training must give a mapping of names to tensors, not a {type(state).__name__}")
    got, wanted = views(state), views(base)
    for name in wanted.keys() - got.keys():
        raise SchemaError("training gave no tensor of this name, which the model has", item=name)
    for name in got.keys() - wanted.keys():
        raise SchemaError("training gave a tensor of this name, which the model does not have", item=name)
    made: Views = {}
    firsts: dict[object, str] = {}
    for (name, key), was in zip(_ties(wanted).items(), wanted.values(), strict=True):
        view, first = got[name], firsts.setdefault(key, name)
        if (view.dtype, view.shape) != (was.dtype, was.shape):
            detail = f"training gave {view.dtype} {list(view.shape)}, the model has {was.dtype} {list(was.shape)}"
            raise SchemaError(detail, item=name)
        if first != name and view.identity != got[first].identity and not is_equal(view, got[first]):
            raise SchemaError(
                f"the model has one tensor for this name and {show(first)}, but training gave two", item=name
            )
        made[name] = replace(view, identity=was.identity)
    return made


def fingerprint(state: Mapping[str, Any]) -> int:
    """A value that changes when the tensors of `state`, contiguous and on the CPU, are written to."""
    crc = 0
    for array in arrays(state).values():
        crc = crc32c(array.reshape(-1).view(np.uint8), crc)
    return crc


def _ties(tensors: Views) -> dict[str, object]:
    """For each name what those share that are one tensor."""
    return {name: name if view.identity is None else view.identity for name, view in tensors.items()}


def _empty(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return np.empty(tensor.shape, tensor.dtype.newbyteorder("="))
    return tensor.new_empty(tensor.shape, device="cpu")
