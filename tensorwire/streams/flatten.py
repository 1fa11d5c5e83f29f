"""Containers to leaves: the items that are sent."""

import dataclasses
import enum
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from tensorwire import dtypes
from tensorwire.codecs import Codec
from tensorwire.errors import EncodeError, LimitError, WireError
from tensorwire.limits import Limits
from tensorwire.tensor import ByteArray, Front, TensorView
from tensorwire.wire import AliasItem, ContainerItem, FileItem, Kind, TensorItem, ValueItem
from tensorwire.wire.items import check_key
from tensorwire.wire.names import Key, Path, name_of
from tensorwire.wire.values import SCALARS, is_plain_dict, is_plain_tuple, levels, pack_plain, pack_value

# A container that appears in several places is written out at each. Beyond this many values it is refused: a few lines
# of nested lists could describe more than any disk holds.
_REPEATED: Final = 1 << 22
# The children of an outermost dict or list become items of their own if there are at most this many. A larger one
# without tensors is a vocabulary or a history, and is sent as one value.
_NAMED: Final = 1 << 14
_BUILTIN: Final = frozenset({dict, list, tuple})
_PLAIN: Final = SCALARS | _BUILTIN | {OrderedDict}


class Rule(Protocol):
    """Which codec each tensor gets."""

    def notice(self, name: str, view: TensorView, /) -> None:
        """Note the name of a tensor. Called for all tensors of a container before the first codec is requested."""

    def __call__(self, name: str, value: Any, view: TensorView, /, *, others: Sequence[str] = ()) -> Codec:
        """The codec of a tensor, which has these `others` names as well."""

    def finish(self) -> None:
        """Note that there are no more tensors. Raises EncodeError if the rule names a tensor that does not exist."""


class TensorLeaf(NamedTuple):
    """A tensor, whose slices `codec` encodes as `view` reads them; or a file, which its codec treats as bytes."""

    item: TensorItem | FileItem
    view: TensorView
    codec: Codec


class ValueLeaf(NamedTuple):
    """A plain value, as bytes (`wire.values`)."""

    item: ValueItem
    data: bytes


class BareLeaf(NamedTuple):
    """An item that is described and has no data of its own."""

    item: AliasItem | ContainerItem


Leaf = TensorLeaf | ValueLeaf | BareLeaf


def flatten(
    value: Any, front: Front, rule: Rule, limits: Limits, *, path: Path = (), tie: bool = True
) -> Iterator[Leaf]:
    """The leaves of the container at `path`, depth-first, in the order of its dicts.

    `rule` gives the codec of each tensor; its `finish` is called after the last leaf of a whole container.
    `tie`: of tensors that are the same view of the same memory, all but the first become aliases of it. Subclasses of
    dict and list are sent as dict and list. Raises EncodeError, naming the item, for anything that cannot be sent.
    """
    found = _Walk(front, limits).leaves(value, path)
    aliases, others = _ties(found) if tie else ({}, {})
    for leaf in found:
        if type(leaf) is _Tensor:
            rule.notice(leaf.name, leaf.view)
    found.reverse()
    for number in range(len(found)):
        leaf = found.pop()  # keeps no second reference
        if type(leaf) is not _Tensor:
            yield leaf  # type: ignore[misc]  # which narrows with isinstance only, and that takes twice as long
        elif number in aliases:
            yield BareLeaf(AliasItem(leaf.path, aliases[number]))
        else:
            yield _with_codec(leaf, rule, others.get(number, ()))
    if not path:
        rule.finish()


def as_pair(pair: Any) -> tuple[Any, Any]:
    """What an iterator of (name, tensor) pairs gave. Raises EncodeError for anything else."""
    if not issubclass(type(pair), (tuple, list)) or len(pair) != 2:
        raise EncodeError(
            f"an iterator must give (name, tensor) pairs, not a {_type(pair)}; of a module send .state_dict(), or "
            ".named_parameters()"
        )
    return pair[0], pair[1]


class _Tensor(NamedTuple):
    """A tensor that has no codec yet."""

    path: Path
    name: str
    value: Any
    view: TensorView


def _ties(found: list[Leaf | _Tensor]) -> tuple[dict[int, int], dict[int, list[str]]]:
    """For each tensor, the number of the first one with the same memory; and by that number, its other names."""
    firsts: dict[tuple[object, ...], int] = {}
    aliases: dict[int, int] = {}
    names: dict[int, list[str]] = {}
    for number, leaf in enumerate(found):
        if type(leaf) is _Tensor and leaf.view.identity is not None:
            first = firsts.setdefault(leaf.view.identity, number)
            if first != number:
                aliases[number] = first
                names.setdefault(first, []).append(leaf.name)
    return aliases, names


def _with_codec(leaf: _Tensor, rule: Rule, others: Sequence[str]) -> TensorLeaf:
    view = leaf.view
    try:
        codec: Codec = view.codec or rule(leaf.name, leaf.value, view, others=others)
    except (EncodeError, WireError) as error:
        raise EncodeError(error.detail, item=leaf.name) from None
    return TensorLeaf(TensorItem(leaf.path, view.dtype, view.shape, codec.stages()), view, codec)


class _Survey(NamedTuple):
    """What is known about a container, including its children, before it is walked."""

    plain: bool  # holds only values, so it may be sent as one
    builtin: bool  # only exact types of values, no subclasses
    height: int  # levels of containers below it
    values: int  # a container in several places counts at each
    containers: int  # counted likewise, including itself


class _Walk:
    """The leaves of one container. Each container in it is surveyed once, in however many places it stands."""

    def __init__(self, front: Front, limits: Limits) -> None:
        self._front = front
        self._limits = limits
        self._found: list[Leaf | _Tensor] = []
        self._surveys: dict[int, _Survey] = {}  # by id; the outermost container keeps all of them alive
        self._packed: dict[int, bytes | None] = {}
        self._around: set[int] = set()  # the containers around the one that is being surveyed
        self._values = 0  # surveyed so far; a container in several places counts once

    def leaves(self, value: Any, path: Path) -> list[Leaf | _Tensor]:
        if _container(value) is not None:
            self._survey(value, path)
        self._add(value, path)
        return self._found

    def _add(self, value: Any, path: Path) -> None:
        found, most = self._found, self._limits.items
        try:
            leaf = self._leaf(value, path)
            if len(found) == most:
                raise LimitError("items", most, most + 1)
        except (EncodeError, WireError) as error:
            raise EncodeError(error.detail, item=name_of(path)) from None
        found.append(leaf)
        if type(leaf) is BareLeaf:
            for key, child in _children(value):
                self._add(child, (*path, self._key(key, path)))

    def _leaf(self, value: Any, path: Path) -> Leaf | _Tensor:
        kind = _container(value)
        if kind is None:
            if type(value) in SCALARS:
                return _value(path, pack_value(value, self._limits))
            view = self._front.view(value)
            if view is None:
                raise EncodeError(f"a {_type(value)} cannot be sent: {_remedy(value)}")
            return _Tensor(path, name_of(path), value, view if view.dtype != dtypes.BOOL else _zeros_and_ones(view))
        packed = self._pack(value, path) if path or len(value) > _NAMED else None
        return BareLeaf(ContainerItem(path, kind)) if packed is None else _value(path, packed)

    def _pack(self, value: Any, path: Path) -> bytes | None:
        """A container as one value; None if it must be sent item by item."""
        survey, place, most = self._survey(value, path), id(value), min(self._limits.composite, self._limits.value)
        if not survey.plain or survey.containers > self._limits.containers:
            return None
        if survey.values > most:  # each takes at least a byte
            return None
        if place not in self._packed:
            self._packed[place] = None
            with suppress(EncodeError):  # something in it cannot be sent: the walk will find and name it
                packed = pack_plain(value) if survey.builtin else pack_value(_builtin(value), self._limits)
                self._packed[place] = packed if len(packed) <= most else None
        return self._packed[place]

    def _key(self, key: Any, path: Path) -> Key:
        try:
            key = _builtin_key(key)
            check_key(key, self._limits)
        except WireError as error:
            raise EncodeError(error.detail, item=name_of(path)) from None
        return key  # type: ignore[no-any-return]  # which has just been checked

    def _survey(self, value: Any, path: Path) -> _Survey:
        """Survey a container. Raises EncodeError if it is nested too deep, holds itself, or repeats too much."""
        place = id(value)
        if place in self._around:
            raise EncodeError("nested too deep: the container holds itself", item=name_of(path))
        if place not in self._surveys and len(path) < self._limits.nesting:
            self._around.add(place)
            self._surveys[place] = self._surveyed(value, path)
            self._around.remove(place)
        survey = self._surveys.get(place)
        most, deep = self._limits.nesting, len(path) + 1 + (0 if survey is None else survey.height)
        if survey is None or deep > most:
            raise EncodeError(f"nested too deep: {LimitError('nesting', most, deep).detail}", item=name_of(path))
        return survey

    def _surveyed(self, value: Any, path: Path) -> _Survey:
        if type(value) in _BUILTIN:
            survey, children = _plain_tree(value, self._limits.nesting)
            if survey is not None:
                self._values += survey.values
                if survey.values <= self._limits.composite and survey.containers <= self._limits.containers:
                    # Containers in it satisfy the same limits: a history in a dict is not surveyed twice.
                    inner = survey._replace(height=survey.height - 1)
                    self._surveys |= dict.fromkeys(map(id, children), inner)
                return survey
        plain, builtin, height, values, containers = True, _is_builtin(value), 0, 0, 1
        for key, child in _children(value):
            values += 1
            self._values += 1
            kind = type(child)
            if kind in SCALARS:
                continue
            if _container(child) is None:
                plain = False
            else:
                inner = self._survey(child, (*path, key))
                plain, builtin = plain and inner.plain, builtin and inner.builtin
                height = max(height, inner.height + 1)
                values += inner.values
                containers += inner.containers
        if values - self._values > _REPEATED:
            detail = f"lists or dicts that appear in several places come to {values:,} values once written out; "
            raise EncodeError(detail + "send each once, and refer to it by name", item=name_of(path))
        return _Survey(plain, builtin, height, values, containers)


def _plain_tree(value: Any, nesting: int) -> tuple[_Survey | None, list[Any]]:
    """The survey of a container, and its direct children that are containers; None unless it is a tree of values."""
    height, values, containers, children = -1, 0, 0, []
    first = next(iter(value.values() if type(value) is dict else value), None)
    if type(first) not in _PLAIN:
        return None, []
    try:
        for level in levels(value):
            height += 1
            values += sum(map(len, level))
            containers += len(level)
            if height > nesting or len(set(map(id, level))) < len(level):
                return None, []
            if height == 1:
                children = level
    except WireError:
        return None, []
    return _Survey(plain=True, builtin=True, height=height, values=values, containers=containers), children


def _zeros_and_ones(view: TensorView) -> TensorView:
    """A tensor of bools with arbitrary bytes: all but 0 are true, as in torch and NumPy."""

    def read(start: int, stop: int) -> ByteArray:
        data = np.frombuffer(view.read(start, stop), np.uint8)
        return data if not data.size or data.max() <= 1 else (data != 0).view(np.uint8)

    return dataclasses.replace(view, read=read)


def _value(path: Path, packed: bytes) -> ValueLeaf:
    return ValueLeaf(ValueItem(path, len(packed)), packed)


def _container(value: Any) -> Kind | None:
    kind = type(value)
    if issubclass(kind, dict):
        return Kind.DICT
    if issubclass(kind, list):
        return Kind.LIST
    return Kind.TUPLE if is_plain_tuple(value) else None


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Keys and children of a container, even if a subclass overrides the methods of dict or list."""
    if isinstance(value, OrderedDict):  # its order is not that of the dict beneath it
        return OrderedDict.items(value)
    if isinstance(value, dict):
        return dict.items(value)
    return enumerate(list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value))


def _is_builtin(value: Any) -> bool:
    """Whether a container, apart from its children, has exact types of values."""
    if is_plain_dict(value):
        return set(map(type, value)) <= {str, int}
    return type(value) is list or isinstance(value, tuple)


def _builtin(value: Any) -> Any:
    """A container of values with subclasses replaced by their base types."""
    kind = _container(value)
    if kind is None:
        return value
    if kind is Kind.DICT:
        return {_builtin_key(key): _builtin(child) for key, child in _children(value)}
    children = [_builtin(child) for _, child in _children(value)]
    return children if kind is Kind.LIST else tuple(children)


def _builtin_key(key: Any) -> Any:
    """An int of NumPy or of a subclass as an int: both are the same key."""
    return int(key) if issubclass(type(key), (int, np.integer)) and type(key) is not bool else key


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _remedy(value: Any) -> str:
    """What to send instead of something that is neither tensor nor value. Looks only at its type."""
    kind = type(value)
    if callable(getattr(kind, "state_dict", None)):
        return "send its .state_dict()"
    if dataclasses.is_dataclass(kind):
        return "send dataclasses.asdict() of it"
    for bases, remedy in _REMEDIES:
        if issubclass(kind, bases):
            return remedy
    if hasattr(kind, "__array__"):
        return "send numpy.asarray() of it"
    return "only tensors, None, bool, int, float, str, bytes and dict, list and tuple of them"


_REMEDIES: Final[tuple[tuple[Any, str], ...]] = (
    (enum.Enum, "send its .value"),
    (tuple, "send tuple() of it, or ._asdict()"),
    (str, "send str() of it"),
    (int, "send int() of it"),
    (float, "send float() of it"),
    ((bytes, bytearray, memoryview), "send bytes() of it"),
    (os.PathLike, "send str() of it"),
    (Mapping, "send dict() of it"),
    (Iterator, "send list() of it; of a module's parameters its .state_dict()"),
    (Iterable, "send list() of it"),
)
