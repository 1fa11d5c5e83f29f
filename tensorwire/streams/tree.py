"""Containers <-> items: the walk over what is sent, and the rebuilding of what arrives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tensorwire.codecs import Codec
from tensorwire.errors import EncodeError, SchemaError, WireError
from tensorwire.limits import Limits
from tensorwire.streams.values import is_plain_dict, is_plain_tuple, pack_value
from tensorwire.tensor import Front, TensorView
from tensorwire.wire import Item, Kind
from tensorwire.wire.descriptors import CONTAINERS, Key, Path, check_key

Rule = Callable[[str, Any, TensorView], Codec]


@dataclass(frozen=True, slots=True)
class Leaf:
    """An item to send and where its data comes from: a view with its codec, or a value's bytes."""

    item: Item
    view: TensorView | None = None
    codec: Codec | None = None
    value: bytes = b""


class Walk:
    """Turns one container into leaves, depth-first, in the order of its dicts.

    Raises EncodeError naming the item for whatever cannot be sent.
    """

    def __init__(self, front: Front, rule: Rule, limits: Limits, *, tie: bool = True) -> None:
        self._front = front
        self._rule = rule
        self._limits = limits
        self._tie = tie
        self._count = 0
        self._seen: dict[tuple, int] = {}

    def leaves(self, value: Any, path: Path = ()) -> Iterator[Leaf]:
        """The leaves of `value`, which stands at `path`."""
        try:
            leaf = self._leaf(value, path)
        except (EncodeError, WireError) as error:
            raise EncodeError(error.detail, item=_name(path)) from None
        self._count += 1
        yield leaf
        if leaf.item.kind in CONTAINERS:
            children = value.items() if leaf.item.kind == Kind.DICT else enumerate(value)
            for key, child in children:
                yield from self.leaves(child, (*path, self._key(key, path)))

    def _leaf(self, value: Any, path: Path) -> Leaf:
        view = self._front.view(value)
        if view is not None:
            return self._tensor(value, view, path)
        kind = _container(value)
        if kind is None or (path and not self._holds_tensor(value, self._limits.nesting - len(path))):
            try:
                packed = pack_value(value, self._limits)
            except EncodeError:
                if kind is None:
                    raise
                # Something in this container cannot be sent: the walk comes to it, and names it.
            else:
                if kind is None or len(packed) <= self._limits.composite:
                    return Leaf(Item(Kind.VALUE, path, size=len(packed)), value=packed)
        if len(path) == self._limits.nesting:
            raise EncodeError("nested too deep")
        return Leaf(Item(kind, path))

    def _tensor(self, value: Any, view: TensorView, path: Path) -> Leaf:
        if self._tie and view.identity is not None:
            first = self._seen.setdefault(view.identity, self._count)
            if first != self._count:
                return Leaf(Item(Kind.ALIAS, path, of=first))
        codec = self._rule(_name(path), value, view)
        return Leaf(Item(Kind.TENSOR, path, view.dtype, view.shape, codec.stages()), view, codec)

    def _key(self, key: Any, path: Path) -> Key:
        try:
            check_key(key, self._limits)
        except WireError as error:
            raise EncodeError(error.detail, item=_name(path)) from None
        return key

    def _holds_tensor(self, value: Any, depth: int) -> bool:
        """Whether there is a tensor in `value`, or what the walk has to refuse: a strange tensor, endless depth."""
        try:
            if self._front.view(value) is not None:
                return True
        except EncodeError:
            return True
        kind = _container(value)
        if kind is None:
            return False
        children = value.values() if kind == Kind.DICT else value
        return depth <= 0 or any(self._holds_tensor(child, depth - 1) for child in children)


def _container(value: Any) -> Kind | None:
    if is_plain_dict(value):
        return Kind.DICT
    if type(value) is list:
        return Kind.LIST
    return Kind.TUPLE if is_plain_tuple(value) else None


def _name(path: Path) -> str:
    return ".".join(map(str, path))


_MISSING: Final = object()


class Tree:
    """Rebuilds the containers that a stream describes."""

    def __init__(self) -> None:
        self._root: Any = _MISSING
        self._nodes: dict[Path, Any] = {}
        self._tuples: list[Path] = []

    def declare(self, item: Item) -> None:
        """Make the place for an item, so that dicts keep the order of the sender."""
        node: Any = _MISSING
        if item.kind in CONTAINERS:
            node = self._nodes[item.path] = {} if item.kind == Kind.DICT else []
            if item.kind == Kind.TUPLE:
                self._tuples.append(item.path)
        self._put(item.path, node, grow=True)

    def fill(self, path: Path, value: Any) -> None:
        """Put a received value in its place."""
        self._put(path, value, grow=False)

    def result(self) -> Any:
        """The whole, once everything is filled in."""
        for path in reversed(self._tuples):
            self._put(path, tuple(self._nodes[path]), grow=False)
        if self._root is _MISSING:
            raise SchemaError("the stream holds no value")
        return self._root

    def _put(self, path: Path, value: Any, *, grow: bool) -> None:
        if not path:
            self._root = value
            return
        node = self._nodes[path[:-1]]
        if grow and type(node) is list:
            node.append(value)
        else:
            node[path[-1]] = value
