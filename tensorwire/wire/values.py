"""Plain Python values <-> their msgpack bytes (docs/format.md, section 5.2).

None, bool, int of 64 bits, float, str, bytes, and dict, list and tuple of them; types come back exact. A tuple is
an extension of type 1 around an array. Each value has one encoding: bytes that do not re-encode to themselves are
refused.

Values of millions of elements are common (histories, vocabularies), so no Python code runs per element: types are
checked level by level, in loops of C.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, compress
from typing import Any, Final

import msgpack

from tensorwire.errors import EncodeError, FormatError, LimitError, UnsupportedError, WireError, show
from tensorwire.limits import Limits
from tensorwire.wire.items import MAX_INT_KEY

_TUPLE: Final = 1
SCALARS: Final[frozenset[type]] = frozenset({type(None), bool, int, float, str, bytes})
_DICTS: Final[frozenset[type]] = frozenset({dict, OrderedDict})
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
    return _packing()(value)


def _packing() -> Callable[[Any], bytes]:
    """A function that packs values; what is in their tuples it leaves to another such, since it cannot call itself."""
    pack_in_tuple: Callable[[Any], bytes] | None = None

    def to_wire(value: Any) -> Any:
        nonlocal pack_in_tuple
        if isinstance(value, tuple):
            pack_in_tuple = pack_in_tuple or _packing()
            return _extension(_ExtType, (_TUPLE, pack_in_tuple([*value])))
        if isinstance(value, OrderedDict):
            return dict(value)
        raise EncodeError("an int beyond 64 bits cannot be sent; send it as text")

    # Strict: a tuple, and what is not exactly a list or dict, goes through `to_wire`.
    pack: Callable[[Any], bytes] = msgpack.Packer(default=to_wire, strict_types=True, buf_size=_BUFFER).pack
    return pack


# A msgpack.ExtType, made without the checks of its own constructor, which take longer than all else of a small tuple.
_ExtType: Final = msgpack.ExtType
_extension: Final = tuple.__new__


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
    # Counting takes a call for each container: it is left out where there cannot be too many. Tuples are never keys: an
    # attacker can make some that all have one hash.
    if len(payload) - len(payload.translate(None, _CONTAINERS)) <= limits.containers:
        try:
            return _unpackb(payload, _refuse_tuple)
        except _TupleSeenError:
            return _with_tuples(payload, limits.nesting, 0)
    return _Careful(limits).unpack(payload)


def _with_tuples(payload: bytes, nesting: int, depth: int) -> Any:
    """A value with tuples in it: they are unpacked together, those in them in the same way, then put in their places.

    Bytes that only together, and not each by itself, are values come out of this as something that packs differently.
    """
    _check_depth(depth, nesting)
    bodies: list[bytes] = []

    def put_aside(code: int, data: bytes) -> Any:
        if code != _TUPLE:
            raise UnsupportedError(f"a value holds an unknown extension, type {code}")
        bodies.append(data)
        return bodies  # which is no key of a dict

    value = _unpackb(payload, put_aside)
    if not bodies:
        return value
    del value
    items = _with_tuples(b"\xdd%b%b" % (len(bodies).to_bytes(4, "big"), b"".join(bodies)), nesting, depth + 1)
    if set(map(type, items)) != {list}:
        raise FormatError("a tuple is not an array")
    tuples = map(tuple, items)
    return _unpackb(payload, lambda code, data: next(tuples))


def _unpackb(payload: bytes, extension: Callable[[int, bytes], Any], **hooks: Callable[[Any], Any]) -> Any:
    if len(payload) > _SMALL:
        unpacker = msgpack.Unpacker(max_buffer_size=len(payload))
        unpacker.feed(payload)
        unpacker.skip()  # builds nothing, and raises where an array does not have the elements that it claims
    try:
        return msgpack.unpackb(payload, strict_map_key=False, use_list=True, ext_hook=extension, **hooks)
    except TypeError:  # it cannot be hashed
        raise FormatError("a dict key is neither text nor an int") from None


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
    level, kinds = _containers([value])
    while level:
        yield level
        dicts = _of(kinds & _DICTS, level, kinds)
        _check_keys(dicts)
        children = chain.from_iterable(map(dict.values, dicts))
        others = chain.from_iterable(_of(kinds - _DICTS, level, kinds))
        level, kinds = _containers([*children, *others])


def _containers(values: list[Any]) -> tuple[list[Any], set[type]]:
    """Those of some values that hold others, and the types of those."""
    types = list(map(type, values))
    kinds = set(types[:1] if types.count(types[0]) == len(types) else types) if types else set()
    holding = kinds - SCALARS
    for kind in holding:
        _check_container(kind)
    return _of(holding, values, kinds), holding


def _of(wanted: set[type], values: list[Any], kinds: set[type]) -> list[Any]:
    """Those of some values, which are of these kinds, that are of a wanted one."""
    if not wanted or wanted == kinds:
        return values if wanted else []
    return list(compress(values, map(wanted.__contains__, map(type, values))))


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
