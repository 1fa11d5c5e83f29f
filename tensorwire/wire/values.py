"""Plain Python values <-> their msgpack bytes (docs/format.md, section 5.2).

None, bool, int of 64 bits, float, str, bytes, and dict, list and tuple of them; types come back exact. A tuple is
an extension of type 1 around an array. One encoding per value: what does not re-encode to itself is refused.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import msgpack

from tensorwire.errors import EncodeError, FormatError, LimitError, UnsupportedError, WireError, show
from tensorwire.limits import Limits
from tensorwire.wire.items import MAX_INT_KEY

_TUPLE: Final = 1
_MIN_INT: Final = -(1 << 63)
_MAX_INT: Final = (1 << 64) - 1
_SCALARS: Final = frozenset({bool, float, str, bytes})


def pack_value(value: Any, limits: Limits) -> bytes:
    """The bytes of a value. Raises EncodeError for anything that would not come back equal, types included."""
    try:
        _check(value, 0, limits.nesting)
    except WireError as error:
        raise EncodeError(error.detail) from None
    return _pack(value)


def _pack(value: Any) -> bytes:
    # Strict: a tuple, and what is not exactly a list or dict, goes through `_to_wire`.
    try:
        payload: bytes = msgpack.packb(value, default=_to_wire, strict_types=True)
    except UnicodeEncodeError:
        raise EncodeError("text with lone surrogates cannot be sent") from None
    return payload


def _to_wire(value: Any) -> Any:
    if isinstance(value, OrderedDict):
        return dict(value)
    return msgpack.ExtType(_TUPLE, _pack([*value]))


def unpack_value(payload: bytes, limits: Limits) -> Any:
    """The value of received bytes. Raises FormatError, LimitError or UnsupportedError."""
    if payload[:1] and not _is_text(payload[0]) and len(payload) > limits.composite:
        raise LimitError("composite value", limits.composite, len(payload))
    depth = 0

    def extension(code: int, data: bytes) -> tuple[Any, ...]:
        nonlocal depth
        depth += 1
        if code != _TUPLE:
            raise UnsupportedError(f"a value holds an unknown extension, type {code}")
        _check_depth(depth, limits.nesting)
        items = unpack(data)
        depth -= 1
        if type(items) is not list:
            raise FormatError("a tuple is not an array")
        return tuple(items)

    def unpack(data: bytes) -> Any:
        return msgpack.unpackb(data, strict_map_key=False, ext_hook=extension, object_pairs_hook=_unique, use_list=True)

    try:
        value = unpack(payload)
        _check(value, 0, limits.nesting)
        canonical = _pack(value) == payload
    except msgpack.StackError:
        raise LimitError("nesting", limits.nesting, limits.nesting + 1) from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        if isinstance(error, WireError):
            raise
        raise FormatError(f"a value is not msgpack: {show(str(error))}") from None
    if not canonical:
        raise FormatError("a value is not in canonical form")
    return value


def _check(value: Any, depth: int, nesting: int) -> None:
    """Raise unless `value`, within `depth` containers, is of the types that travel.

    Copies nothing: a hostile value takes 70 times its bytes once, and must not take it twice.
    """
    if value is None or type(value) in _SCALARS:
        return
    if type(value) is int:
        if not _MIN_INT <= value <= _MAX_INT:
            raise FormatError("an int beyond 64 bits cannot be sent; send it as text")
        return
    if is_plain_dict(value):
        for key in value:
            if type(key) is not str and (type(key) is not int or abs(key) > MAX_INT_KEY):
                raise FormatError(f"dict key {show(key)} is neither text nor an int within 2^53")
        children: Iterable[Any] = value.values()
    elif type(value) is list or is_plain_tuple(value):
        children = value
    else:
        raise UnsupportedError(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: "
            "only tensors, None, bool, int, float, str, bytes and dict, list and tuple of them"
        )
    _check_depth(depth + 1, nesting)
    for child in children:
        _check(child, depth + 1, nesting)


def _check_depth(depth: int, nesting: int) -> None:
    if depth > nesting:
        raise LimitError("nesting", nesting, depth)


def is_plain_dict(value: Any) -> bool:
    """Whether `value` is a dict; an OrderedDict counts and comes back as a dict."""
    return type(value) in (dict, OrderedDict)


def is_plain_tuple(value: Any) -> bool:
    """Whether `value` is a tuple and no named one (torch.Size counts as a tuple)."""
    return isinstance(value, tuple) and not hasattr(value, "_fields")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, _ in pairs:
        if type(key) is not str and type(key) is not int:
            raise FormatError("a dict key is neither text nor an int")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("a dict key appears twice")
    return result


def _is_text(first: int) -> bool:
    """Whether a msgpack object with this first byte is str or bin."""
    return 0xA0 <= first <= 0xBF or 0xC4 <= first <= 0xC6 or 0xD9 <= first <= 0xDB
