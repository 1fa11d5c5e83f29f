"""Plain Python values <-> their msgpack bytes (docs/format.md, section 5.2).

None, bool, int of 64 bits, float, str, bytes, and dict, list and tuple of them; types come back exact. A tuple is
an extension of type 1 around an array. One encoding per value: what does not re-encode to itself is refused.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import msgpack

from tensorwire.errors import EncodeError, FormatError, LimitError, show
from tensorwire.limits import Limits
from tensorwire.wire.items import MAX_INT_KEY

_TUPLE: Final = 1
_MIN_INT: Final = -(1 << 63)
_MAX_INT: Final = (1 << 64) - 1
_SCALARS: Final = frozenset({bool, float, str, bytes})


def pack_value(value: Any, limits: Limits) -> bytes:
    """The bytes of a value. Raises EncodeError for anything that would not come back equal, types included."""
    _check(value, limits.nesting)
    return _pack(value)


def _pack(value: Any) -> bytes:
    # Strict: a tuple, and what is not exactly a list or dict, goes through `_to_wire`.
    try:
        return msgpack.packb(value, default=_to_wire, strict_types=True)
    except UnicodeEncodeError:
        raise EncodeError("text with lone surrogates cannot be sent") from None


def _to_wire(value: Any) -> Any:
    if isinstance(value, OrderedDict):
        return dict(value)
    return msgpack.ExtType(_TUPLE, _pack([*value]))


def unpack_value(payload: bytes, limits: Limits) -> Any:
    """The value of received bytes. Raises FormatError or LimitError."""
    if payload[:1] and not _is_text(payload[0]) and len(payload) > limits.composite:
        raise LimitError("composite value", limits.composite, len(payload))
    depth = 0

    def extension(code: int, data: bytes) -> tuple:
        nonlocal depth
        depth += 1
        if code != _TUPLE or depth > limits.nesting:
            raise FormatError("a value holds an unknown extension, or tuples nested too deep")
        items = unpack(data)
        depth -= 1
        if type(items) is not list:
            raise FormatError("a tuple is not an array")
        return tuple(items)

    def unpack(data: bytes) -> Any:
        return msgpack.unpackb(data, strict_map_key=False, ext_hook=extension, object_pairs_hook=_unique, use_list=True)

    try:
        value = unpack(payload)
        canonical = pack_value(value, limits) == payload
    except EncodeError as error:
        raise FormatError(f"a value that no writer sends: {error.detail}") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"a value is not msgpack: {show(str(error))}") from None
    if not canonical:
        raise FormatError("a value is not in canonical form")
    return value


def _check(value: Any, depth: int) -> None:
    """Raise EncodeError unless `value` is of the types that travel, at most `depth` containers deep.

    Copies nothing: a hostile value takes 70 times its bytes once, and must not take it twice.
    """
    if value is None or type(value) in _SCALARS:
        return
    if type(value) is int:
        if not _MIN_INT <= value <= _MAX_INT:
            raise EncodeError("an int beyond 64 bits cannot be sent; send it as text")
        return
    if depth == 0:
        raise EncodeError("nested too deep")
    if is_plain_dict(value):
        for key in value:
            if type(key) is not str and (type(key) is not int or abs(key) > MAX_INT_KEY):
                raise EncodeError(f"dict key {show(key)} is neither text nor an int within 2^53")
        children: Iterable[Any] = value.values()
    elif type(value) is list or is_plain_tuple(value):
        children = value
    else:
        raise EncodeError(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: "
            "only tensors, None, bool, int, float, str, bytes and dict, list and tuple of them"
        )
    for child in children:
        _check(child, depth - 1)


def is_plain_dict(value: Any) -> bool:
    """Whether `value` is a dict; an OrderedDict counts and comes back as a dict."""
    return type(value) in (dict, OrderedDict)


def is_plain_tuple(value: Any) -> bool:
    """Whether `value` is a tuple and no named one (torch.Size counts as a tuple)."""
    return isinstance(value, tuple) and not hasattr(value, "_fields")


def _unique(pairs: list[tuple[Any, Any]]) -> dict:
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
