"""Plain Python values <-> their msgpack bytes (docs/format.md, section 5.2).

None, bool, int of 64 bits, float, str, bytes, and dict, list and tuple of them; types come back exact. A tuple is
an extension of type 1 around an array. Each value has one encoding: bytes that do not re-encode to themselves are
refused.

Values of millions of elements are common (histories, vocabularies), so no Python code runs per element: types are
checked level by level, in loops of C.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final

import msgpack

from tensorwire.errors import EncodeError, FormatError, LimitError, UnsupportedError, WireError, show
from tensorwire.limits import Limits
from tensorwire.wire.items import MAX_INT_KEY

_TUPLE: Final = 1
SCALARS: Final[frozenset[type]] = frozenset({type(None), bool, int, float, str, bytes})
_KEYS: Final[frozenset[type]] = frozenset({str, int})
# The possible first bytes of an array or a map. They may also occur within text and numbers.
_CONTAINERS: Final = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])


def pack_value(value: Any, limits: Limits) -> bytes:
    """The bytes of a value. Raises EncodeError for anything that would not come back equal and with the same types."""
    try:
        containers = 0
        for depth, level in enumerate(levels(value), 1):
            _check_depth(depth, limits.nesting)
            containers += len(level)
            if containers > limits.containers:
                raise LimitError("containers in a value", limits.containers, containers, field="containers")
        return pack_plain(value)
    except WireError as error:
        raise EncodeError(error.detail) from None


def pack_plain(value: Any) -> bytes:
    """The bytes of a value that `levels` has checked. Raises EncodeError for ints and text that cannot be encoded."""
    try:
        return _pack(value)
    except UnicodeEncodeError:
        raise EncodeError("text with lone surrogates cannot be sent") from None


def _pack(value: Any) -> bytes:
    # One packer per level of nested tuples, because a packer cannot be used within its own callback.
    packers: list[msgpack.Packer] = []
    depth = 0

    def pack(value: Any) -> bytes:
        nonlocal depth
        if depth == len(packers):
            # Strict: tuples, and subclasses such as OrderedDict, go through `to_wire`.
            packers.append(msgpack.Packer(default=to_wire, strict_types=True, buf_size=_BUFFER))
        depth += 1
        payload: bytes = packers[depth - 1].pack(value)
        depth -= 1
        return payload

    def to_wire(value: Any) -> Any:
        if isinstance(value, OrderedDict):
            return dict(value)
        if type(value) is int:
            raise EncodeError("an int beyond 64 bits cannot be sent; send it as text")
        return msgpack.ExtType(_TUPLE, pack([*value]))

    return pack(value)


_BUFFER: Final = 256  # initial bytes of a packer's buffer: most values are small


def unpack_value(payload: bytes, limits: Limits) -> Any:
    """The value of received bytes. Raises FormatError, LimitError or UnsupportedError.

    Nothing is built before all of its bytes are known to be there, and never more containers than `limits` allows.
    """
    if payload[:1] and not _is_text(payload[0]) and len(payload) > limits.composite:
        raise LimitError("composite value", limits.composite, len(payload), field="composite")
    try:
        value = _unpack(payload, limits)
        for depth, _ in enumerate(levels(value), 1):
            _check_depth(depth, limits.nesting)
        canonical = _pack(value) == payload
    except msgpack.StackError:
        raise LimitError("nesting", limits.nesting, limits.nesting + 1) from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        if isinstance(error, WireError):
            raise
        raise FormatError(f"a value is not msgpack: {show(str(error))}") from None
    if not canonical:
        raise FormatError("a value is not in canonical form, or a dict key appears twice")
    return value


def _unpack(payload: bytes, limits: Limits) -> Any:
    # Counting containers and checking keys take a call per container. They are left out if there can be neither too
    # many containers nor tuples, from which an attacker can make keys that all have the same hash.
    if len(payload) - len(payload.translate(None, _CONTAINERS)) <= limits.containers:
        try:
            return _unpackb(payload, _refuse_tuple)
        except _TupleSeenError:
            pass
    return _Careful(limits).unpack(payload)


def _unpackb(payload: bytes, extension: Callable[[int, bytes], Any], **hooks: Callable[[Any], Any]) -> Any:
    if len(payload) > _SMALL:
        unpacker = msgpack.Unpacker(max_buffer_size=len(payload))
        unpacker.feed(payload)
        unpacker.skip()  # builds nothing, and raises if an array lacks elements that it claims
    return msgpack.unpackb(payload, strict_map_key=False, use_list=True, ext_hook=extension, **hooks)


_SMALL: Final = 1 << 12  # bytes; the sizes that so short a value can claim cost no memory to speak of


class _TupleSeenError(Exception):
    """A value has an extension in it."""


def _refuse_tuple(code: int, data: bytes) -> Any:
    raise _TupleSeenError


class _Careful:
    """Unpacks a value and counts its containers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._depth = 0
        self._built = 0

    def unpack(self, payload: bytes) -> Any:
        return _unpackb(payload, self._extension, list_hook=self._list, object_pairs_hook=self._dict)

    def _extension(self, code: int, data: bytes) -> tuple[Any, ...]:
        if code != _TUPLE:
            raise UnsupportedError(f"a value holds an unknown extension, type {code}")
        self._depth += 1
        _check_depth(self._depth, self._limits.nesting)
        items = self.unpack(data)
        self._depth -= 1
        if type(items) is not list:
            raise FormatError("a tuple is not an array")
        return tuple(items)

    def _list(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _dict(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self._count()
        if not {type(key) for key, _ in pairs} <= _KEYS:
            raise FormatError("a dict key is neither text nor an int")
        return dict(pairs)

    def _count(self) -> None:
        self._built += 1
        if self._built > self._limits.containers:
            raise LimitError("containers in a value", self._limits.containers, self._built, field="containers")


def levels(value: Any) -> Iterator[list[Any]]:
    """The containers of a value, level by level from the outermost. Raises for types that cannot be sent.

    A container that appears in several places is returned for each.
    """
    level = _containers([value])
    while level:
        yield level
        dicts = [each for each in level if isinstance(each, dict)]
        children: Iterable[Any] = chain.from_iterable(map(dict.values, dicts))
        if dicts:
            _check_keys(dicts)
        if len(dicts) < len(level):
            children = chain(children, chain.from_iterable(each for each in level if not isinstance(each, dict)))
        level = _containers(list(children))


def _containers(values: list[Any]) -> list[Any]:
    """The containers among some values."""
    types = list(map(type, values))
    kinds = set(types[:1] if types.count(types[0]) == len(types) else types) if types else set()
    holding = kinds - SCALARS
    for kind in holding:
        _check_container(kind)
    return values if holding == kinds else [value for value in values if type(value) in holding] if holding else []


def _check_container(kind: type) -> None:
    if kind not in (dict, list, OrderedDict) and not (issubclass(kind, tuple) and not hasattr(kind, "_fields")):
        raise UnsupportedError(
            f"a {kind.__module__}.{kind.__qualname__} cannot be sent: "
            "only tensors, None, bool, int, float, str, bytes and dict, list and tuple of them"
        )


def _check_keys(dicts: list[dict[Any, Any]]) -> None:
    kinds = set(map(type, chain.from_iterable(dicts)))
    if kinds <= {str}:
        return
    for key in chain.from_iterable(dicts):
        if type(key) not in _KEYS or (type(key) is int and abs(key) > MAX_INT_KEY):
            raise FormatError(f"dict key {show(key)} is neither text nor an int within 2^53")


def _check_depth(depth: int, nesting: int) -> None:
    if depth > nesting:
        raise LimitError("nesting", nesting, depth)


def is_plain_dict(value: Any) -> bool:
    """Whether `value` is a dict; an OrderedDict counts and comes back as a dict."""
    return type(value) in (dict, OrderedDict)


def is_plain_tuple(value: Any) -> bool:
    """Whether `value` is a tuple but not a named one (torch.Size counts as a tuple)."""
    return isinstance(value, tuple) and not hasattr(value, "_fields")


def _is_text(first: int) -> bool:
    """Whether a msgpack object with this first byte is str or bin."""
    return 0xA0 <= first <= 0xBF or 0xC4 <= first <= 0xC6 or 0xD9 <= first <= 0xDB
