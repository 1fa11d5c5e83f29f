"""Containers to leaves: what is sent, item by item."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from tensorwire.codecs import Codec
from tensorwire.errors import EncodeError, WireError
from tensorwire.limits import Limits
from tensorwire.tensor import Front, TensorView
from tensorwire.wire import AliasItem, ContainerItem, FileItem, Kind, TensorItem, ValueItem
from tensorwire.wire.items import Key, Path, check_key
from tensorwire.wire.values import is_plain_dict, is_plain_tuple, pack_value


class Rule(Protocol):
    """Which codec each tensor gets."""

    def __call__(self, name: str, value: Any, view: TensorView, /) -> Codec:
        """The codec of a tensor."""

    def seen(self, name: str, /) -> None:
        """A tensor of this name needs no codec of its own: its data travel under another name."""

    def finish(self) -> None:
        """There are no more tensors. Raises EncodeError where the rule was about one that is not there."""


class TensorLeaf(NamedTuple):
    """A tensor, whose slices `codec` makes of what `view` reads; or a file, for its codec a tensor of bytes."""

    item: TensorItem | FileItem
    view: TensorView
    codec: Codec


class ValueLeaf(NamedTuple):
    """A plain value, as bytes (`wire.values`)."""

    item: ValueItem
    data: bytes


class BareLeaf(NamedTuple):
    """What is described and has no data of its own."""

    item: AliasItem | ContainerItem


Leaf = TensorLeaf | ValueLeaf | BareLeaf


def flatten(
    value: Any, front: Front, rule: Rule, limits: Limits, *, path: Path = (), tie: bool = True
) -> Iterator[Leaf]:
    """The leaves of a container that stands at `path`, depth-first, in the order of its dicts.

    `rule` gives the codec of each tensor; behind the last leaf of a whole container it is told that this was all.
    `tie`: of tensors that are the same view of the same memory, all but the first become aliases of it. Raises
    EncodeError naming the item for whatever cannot be sent.
    """
    yield from _Flattener(front, rule, limits, tie=tie).leaves(value, path)
    if not path:
        rule.finish()


class _Flattener:
    """What the leaves of one container have in common."""

    def __init__(self, front: Front, rule: Rule, limits: Limits, *, tie: bool) -> None:
        self._front = front
        self._rule = rule
        self._limits = limits
        self._tie = tie
        self._count = 0
        self._seen: dict[tuple[object, ...], int] = {}  # the number of the first item with this identity

    def leaves(self, value: Any, path: Path) -> Iterator[Leaf]:
        try:
            leaf = self._leaf(value, path)
        except (EncodeError, WireError) as error:
            raise EncodeError(error.detail, item=_name(path)) from None
        self._count += 1
        yield leaf
        if isinstance(leaf.item, ContainerItem):
            children = value.items() if leaf.item.kind is Kind.DICT else enumerate(value)
            for key, child in children:
                yield from self.leaves(child, (*path, self._key(key, path)))

    def _leaf(self, value: Any, path: Path) -> Leaf:
        view = self._front.view(value)
        if view is not None:
            return self._tensor(value, view, path)
        kind = _container(value)
        if kind is None:
            return _value(path, pack_value(value, self._limits))
        if path and not self._holds_tensor(value, self._limits.nesting - len(path)):
            try:
                packed = pack_value(value, self._limits)
            except EncodeError:
                pass  # Something in this container cannot be sent: the walk comes to it, and names it.
            else:
                if len(packed) <= self._limits.composite:
                    return _value(path, packed)
        if len(path) == self._limits.nesting:
            raise EncodeError("nested too deep")
        return BareLeaf(ContainerItem(path, kind))

    def _tensor(self, value: Any, view: TensorView, path: Path) -> Leaf:
        if self._tie and view.identity is not None:
            first = self._seen.setdefault(view.identity, self._count)
            if first != self._count:
                self._rule.seen(_name(path))
                return BareLeaf(AliasItem(path, first))
        codec = self._rule(_name(path), value, view)
        return TensorLeaf(TensorItem(path, view.dtype, view.shape, codec.stages()), view, codec)

    def _key(self, key: Any, path: Path) -> Key:
        try:
            check_key(key, self._limits)
        except WireError as error:
            raise EncodeError(error.detail, item=_name(path)) from None
        return key  # type: ignore[no-any-return]  # which has just been checked

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


def _value(path: Path, packed: bytes) -> ValueLeaf:
    return ValueLeaf(ValueItem(path, len(packed)), packed)


def _container(value: Any) -> Kind | None:
    if is_plain_dict(value):
        return Kind.DICT
    if type(value) is list:
        return Kind.LIST
    return Kind.TUPLE if is_plain_tuple(value) else None


def _name(path: Path) -> str:
    return ".".join(map(str, path))
