"""A whole version written over another one, in place."""

from copy import deepcopy
from typing import Any, Final

import tensorwire
from tensorwire import streams
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.limits import Limits
from tensorwire.numpy import FRONT
from tensorwire.streams import TensorLeaf, ValueLeaf, flatten, setter, value_at
from tensorwire.tensor import AnyFront, Front
from tensorwire.wire import name_of

_FRONT: Final = AnyFront(FRONT)
_Leaves = dict[str, TensorLeaf | ValueLeaf]


class Overwriting:
    """Overwrites a container with the values of another that has the same names, dtypes and shapes.

    `front`: of the tensors of `whole`. The constructor writes nothing. It raises SchemaError, naming the item, for a
    container that does not fit, and EncodeError for a value that cannot be set in place. `write` writes.
    """

    def __init__(self, whole: Any, front: Front, state: Any, limits: Limits) -> None:
        self._whole = whole
        self._front = front
        self._limits = limits
        self._tensors: dict[str, Any] = {}  # of `state`, by name
        self._values: list[tuple[Any, Any, Any]] = []  # parent, key and new value
        held, wanted = _leaves(state, _FRONT, limits), _leaves(whole, front, limits)
        for name in sorted(held.keys() ^ wanted.keys()):
            raise SchemaError(
                f"the {'state' if name in wanted else 'version'} has no such item, so the version cannot be applied in "
                "place: use fetch(whole=True).state. Nothing was written",
                item=name,
            )
        first: dict[tuple[object, ...], str] = {}
        for name, leaf in wanted.items():
            there = held[name]
            if _described(there) != _described(leaf):
                raise SchemaError(
                    f"{_described(there)} in the state, {_described(leaf)} in the version. Nothing was written",
                    item=name,
                )
            if isinstance(there, TensorLeaf):
                self._add_tensor(name, there, state, first)
            elif isinstance(leaf, ValueLeaf) and there.data != leaf.data:
                self._add_value(leaf, state)

    def write(self) -> None:
        """Fill every tensor, and set every value."""
        if self._tensors:
            buffers = streams.encode(self._whole, self._front, tie=False, limits=self._limits)
            for _ in tensorwire.decode(buffers, into=self._tensors, limits=self._limits):
                pass
        for parent, key, value in self._values:
            parent[key] = deepcopy(value)

    def _add_tensor(self, name: str, there: TensorLeaf, state: Any, first: dict[tuple[object, ...], str]) -> None:
        tensor = self._tensors[name] = value_at(state, there.item.path)
        try:
            if _FRONT.device_target(tensor) is None:
                _FRONT.target(tensor)
        except EncodeError as error:
            error.item = name
            raise
        if there.view.identity is None:
            return
        other = first.setdefault(there.view.identity, name)
        whole = (value_at(self._whole, tensorwire.path_of(each)) for each in (name, other))
        if other != name and len({streams.digest(each, self._front, self._limits) for each in whole}) > 1:
            raise SchemaError(
                f"in the state it is one tensor with {other!r}, and the version has two. Nothing was written", item=name
            )

    def _add_value(self, leaf: ValueLeaf, state: Any) -> None:
        path = leaf.item.path
        self._values.append(setter(state, path, value_at(self._whole, path)))


def _leaves(value: Any, front: Front, limits: Limits) -> _Leaves:
    """Tensors and values by name, every tensor under each of its names."""
    leaves = flatten(value, front, streams.rule("raw"), limits, tie=False)
    return {name_of(leaf.item.path): leaf for leaf in leaves if isinstance(leaf, (TensorLeaf, ValueLeaf))}


def _described(leaf: TensorLeaf | ValueLeaf) -> str:
    return f"{leaf.view.dtype} {list(leaf.view.shape)}" if isinstance(leaf, TensorLeaf) else "a value"
