"""The two msgpack payloads: stream metadata and item descriptors (docs/format.md, sections 4 and 5).

One encoding per value: keys in their fixed order, smallest msgpack forms. `unpack_*` re-encodes what it read and
compares, so that any other spelling is refused. Holding an item means that it is valid; it has no field that may be
missing, but for the size of a file that is not known ahead.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Any, ClassVar, Final

import msgpack

from tensorwire import dtypes
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, UnsupportedError, WireError, show
from tensorwire.limits import Limits

# Integers a double represents exactly: JSON-safe, and no two of them share a Python hash, so that a hostile
# stream cannot build colliding dictionary keys.
MAX_INT_KEY: Final = 1 << 53
ALIGNMENTS: Final = (1, 64)
DIGEST_SIZE: Final = 32
_MAX_ID: Final = 64
_MAX_STAGES: Final = 8
_MAX_PARAMETERS: Final = 8
_MAX_UINT64: Final = (1 << 64) - 1

# Control characters, format controls that change how surrounding text is shown, lone surrogates: names end up in
# terminals and logs.
_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Key = str | int
Path = tuple[Key, ...]
CodecSpec = tuple[tuple[int, ...], ...]


class Kind(IntEnum):
    """The number of each kind of item on the wire. 8 is reserved for compound tensors."""

    TENSOR = 1
    VALUE = 2
    FILE = 3
    ALIAS = 4
    DICT = 5
    LIST = 6
    TUPLE = 7


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What the STREAM frame says.

    `align`: data payloads begin at multiples of it. `id`: the application's. `metadata`: text. `base`, `target`:
    content digests of the version that the stream is against and of the one that it makes, empty where it has none.
    """

    align: int = 1
    id: bytes = b""
    metadata: tuple[tuple[str, str], ...] = ()
    base: bytes = b""
    target: bytes = b""

    def check_base(self, base: bytes | None = None) -> None:
        """Raise SchemaError unless the stream stands alone or is against the version whose content digest is `base`."""
        if self.base and base is None:
            raise SchemaError(f"the stream is against version {self.base.hex()}: apply it to that version")
        if self.base and self.base != base:
            raise SchemaError(f"the stream is against version {self.base.hex()}, not {(base or b'').hex()}")


@dataclass(frozen=True, slots=True)
class _Named:
    """What every item has: its place among the containers of the stream, () for the root."""

    path: Path

    @property
    def name(self) -> str:
        """The path, dotted: how state dicts spell nesting."""
        return ".".join(map(str, self.path))


@dataclass(frozen=True, slots=True)
class TensorItem(_Named):
    """A tensor: `shape` outermost dimension first, `codec` the stages that its slices went through."""

    dtype: DType
    shape: tuple[int, ...]
    codec: CodecSpec
    kind: ClassVar[Kind] = Kind.TENSOR

    @property
    def total(self) -> int:
        """Elements that its data frames carry."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ValueItem(_Named):
    """A plain value: `size` bytes of its encoding (`wire.values`), carried as they are."""

    size: int
    kind: ClassVar[Kind] = Kind.VALUE

    @property
    def total(self) -> int:
        """Bytes that its data frames carry."""
        return self.size


@dataclass(frozen=True, slots=True)
class FileItem(_Named):
    """A file of `size` bytes, None where that is not known ahead; for its codec a tensor of bytes."""

    size: int | None
    codec: CodecSpec
    kind: ClassVar[Kind] = Kind.FILE
    dtype: ClassVar[DType] = dtypes.UINT8

    @property
    def total(self) -> int | None:
        """Bytes that its data frames carry; None: until a closing frame comes."""
        return self.size


@dataclass(frozen=True, slots=True)
class AliasItem(_Named):
    """Another name of the tensor that item number `of` is."""

    of: int
    kind: ClassVar[Kind] = Kind.ALIAS
    total: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class ContainerItem(_Named):
    """A dict, list or tuple, whose children follow as items of their own."""

    kind: Kind
    total: ClassVar[int] = 0


Item = TensorItem | ValueItem | FileItem | AliasItem | ContainerItem
# Items that data frames belong to.
DataItem = TensorItem | ValueItem | FileItem

_STREAM_KEYS: Final = ("align", "id", "base", "target", "metadata")
_NAMED: Final = ("kind", "path")
# By the number on the wire.
_FIELDS: Final[dict[int, tuple[Kind, tuple[str, ...]]]] = {
    1: (Kind.TENSOR, (*_NAMED, "dtype", "shape", "codec")),
    2: (Kind.VALUE, (*_NAMED, "size")),
    3: (Kind.FILE, (*_NAMED, "size", "codec")),
    4: (Kind.ALIAS, (*_NAMED, "of")),
    5: (Kind.DICT, _NAMED),
    6: (Kind.LIST, _NAMED),
    7: (Kind.TUPLE, _NAMED),
}


def pack_stream(info: StreamInfo, limits: Limits) -> bytes:
    """The STREAM payload. Raises FormatError or LimitError for what `unpack_stream` would refuse."""
    optional = {"id": info.id, "base": info.base, "target": info.target, "metadata": dict(info.metadata)}
    payload = _packed({"align": info.align} | {key: value for key, value in optional.items() if value})
    unpack_stream(payload, limits)
    return payload


def unpack_stream(payload: bytes, limits: Limits) -> StreamInfo:
    """The validated STREAM payload."""
    if len(payload) > limits.metadata:
        raise LimitError("stream metadata", limits.metadata, len(payload))
    body = _unpack_stream(payload, limits)
    align, metadata = body.get("align"), body.get("metadata", {})
    ordered = [key for key in _STREAM_KEYS if key in body]
    _check("align" in body and list(body) == ordered, "stream metadata has wrong keys")
    _check(_is_int(align) and align in ALIGNMENTS, "stream alignment must be 1 or 64")
    _check(_is_bytes(body, "id", 1, _MAX_ID), "stream id must be 1 to 64 bytes; an empty one is left out")
    for key in ("base", "target"):
        _check(_is_bytes(body, key, DIGEST_SIZE, DIGEST_SIZE), f"stream {key} must be a content digest of 32 bytes")
    _check("metadata" not in body or metadata, "metadata must be a non-empty map")
    _check(list(metadata) == sorted(metadata), "metadata must be sorted by key")
    digests = body.get("base", b""), body.get("target", b"")
    return StreamInfo(body["align"], body.get("id", b""), tuple(metadata.items()), *digests)


def _unpack_stream(payload: bytes, limits: Limits) -> dict[str, Any]:
    """The map of a STREAM payload, read object by object.

    A payload of this size may hold a million empty containers: nothing is built of what has no place here.
    """
    unpacker = msgpack.Unpacker(max_array_len=0, max_map_len=0, max_ext_len=0, max_buffer_size=len(payload) or 1)
    body: dict[str, Any] = {}
    try:
        unpacker.feed(payload)
        unpacker.skip()
        _check(unpacker.tell() == len(payload), "stream metadata is not msgpack: something follows it")
        _check(_is_map(payload[:1]), "stream metadata must be a map")
        unpacker.feed(payload)
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            _check_known([key], _STREAM_KEYS, "stream metadata")
            body[key] = _text_pairs(unpacker, limits) if key == "metadata" else unpacker.unpack()
        canonical = _packed(body) == payload
    except (ValueError, msgpack.UnpackException) as error:
        if isinstance(error, WireError):
            raise
        raise FormatError(f"stream metadata is not msgpack: {show(str(error))}") from None
    _check(canonical, "stream metadata is not in canonical form")
    return body


def _text_pairs(unpacker: Any, limits: Limits) -> dict[str, str]:
    count = unpacker.read_map_header()
    if count > limits.pairs:
        raise LimitError("pairs of stream metadata", limits.pairs, count)
    pairs = {}
    for _ in range(count):
        key, value = unpacker.unpack(), unpacker.unpack()
        _check(type(key) is str and type(value) is str, "metadata must map text to text")
        pairs[key] = value
    return pairs


def _is_map(first: bytes) -> bool:
    """Whether a msgpack object with this first byte is a map."""
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def pack_item(item: Item, limits: Limits) -> bytes:
    """The ITEM payload. Raises FormatError or LimitError for what `unpack_item` would refuse."""
    body: dict[str, Any] = {"kind": int(item.kind), "path": item.path}
    match item:
        case TensorItem():
            body |= {"dtype": item.dtype.number, "shape": item.shape, "codec": item.codec}
        case ValueItem():
            body |= {"size": item.size}
        case FileItem():
            body |= {"size": item.size, "codec": item.codec}
        case AliasItem():
            body |= {"of": item.of}
    try:
        payload = _packed(body)
    except (OverflowError, UnicodeEncodeError, ValueError) as error:
        raise FormatError(f"cannot be described: {error}", item=item.name) from None
    unpack_item(payload, limits)
    return payload


def unpack_item(payload: bytes | memoryview, limits: Limits) -> Item:
    """The validated ITEM payload."""
    if len(payload) > limits.descriptor:
        raise LimitError("item descriptor", limits.descriptor, len(payload))
    body = _unpack_map(payload, "item descriptor")
    number = body.get("kind")
    _check(_is_int(number), "item descriptor without a kind")
    if number not in _FIELDS:
        raise UnsupportedError(f"unknown item kind {number}")
    kind, fields = _FIELDS[number]
    if tuple(body) != fields:
        _check_known(body, fields, f"item descriptor of a {kind.name.lower()}")
        raise FormatError(f"item descriptor of a {kind.name.lower()} has wrong keys")
    path = _path(body["path"], limits)
    if kind == Kind.TENSOR:
        dtype, shape = _tensor(body["dtype"], body["shape"], limits)
        return TensorItem(path, dtype, shape, _codec(body["codec"]))
    if kind == Kind.VALUE:
        return ValueItem(path, _size(body["size"], "value", limits.value))
    if kind == Kind.FILE:
        size = None if body["size"] is None else _size(body["size"], "file", limits.stream)
        return FileItem(path, size, _codec(body["codec"]))
    if kind == Kind.ALIAS:
        _check(_is_int(body["of"]) and body["of"] >= 0, "an alias must name an earlier item")
        return AliasItem(path, body["of"])
    return ContainerItem(path, kind)


def _path(keys: Any, limits: Limits) -> Path:
    _check(type(keys) is list, "path must be an array")
    if len(keys) > limits.nesting:
        raise LimitError("nesting", limits.nesting, len(keys))
    for key in keys:
        check_key(key, limits)
    return tuple(keys)


def check_key(key: Any, limits: Limits) -> None:
    """Raise unless `key` may name an item: an int within +-2^53, or printable text within the limit."""
    if type(key) is str:
        size = len(key) if key.isascii() else len(key.encode("utf-8", "surrogatepass"))
        if size > limits.name:
            raise LimitError("name", limits.name, size)
        if _FORBIDDEN.search(key):
            raise FormatError(f"name {show(key)} holds control or bidirectional characters or lone surrogates")
    else:
        _check(_is_int(key) and -MAX_INT_KEY <= key <= MAX_INT_KEY, "a key must be text or an int within 2^53")


def _tensor(number: Any, dims: Any, limits: Limits) -> tuple[DType, tuple[int, ...]]:
    _check(_is_int(number), "dtype must be a number")
    if number not in dtypes.BY_NUMBER:
        raise UnsupportedError(f"unknown dtype number {number}")
    dtype = dtypes.BY_NUMBER[number]
    _check(type(dims) is list, "shape must be an array")
    size = dtype.itemsize
    for dim in dims:
        if type(dim) is not int or dim < 0:
            raise FormatError("shape must be non-negative ints")
        # Python's integers do not wrap. A zero counts as one: no tensor library holds (0, 2**62).
        # Beyond 64 bits the exact product is nobody's business, and may have more digits than Python prints.
        size = min(size * (dim or 1), 1 << 64)
    if len(dims) > limits.ndim:
        raise LimitError("ndim", limits.ndim, len(dims))
    _size(size, "item", limits.item)
    return dtype, tuple(dims)


def _codec(stages: Any) -> CodecSpec:
    _check(type(stages) is list and 1 <= len(stages) <= _MAX_STAGES, "codec must be 1 to 8 stages")
    wrong = "a codec stage must be an id and up to 8 unsigned parameters"
    for stage in stages:
        _check(type(stage) is list and 1 <= len(stage) <= 1 + _MAX_PARAMETERS, wrong)
        for parameter in stage:
            if type(parameter) is not int or not 0 <= parameter <= _MAX_UINT64:
                raise FormatError(wrong)
    return tuple(map(tuple, stages))


def _size(value: Any, what: str, limit: int) -> int:
    _check(_is_int(value) and value >= 0, f"{what} size must be a non-negative int")
    if value > limit:
        raise LimitError(what, limit, value)
    return int(value)


def _packed(body: Any) -> bytes:
    payload: bytes = msgpack.packb(body)
    return payload


def _unpack_map(payload: bytes | memoryview, what: str) -> dict[Any, Any]:
    try:
        body = msgpack.unpackb(payload, strict_map_key=True)
        canonical = _packed(body) == payload
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FormatError(f"{what} is not msgpack: {show(str(error))}") from None
    if type(body) is not dict:
        raise FormatError(f"{what} must be a map")
    _check(canonical, f"{what} is not in canonical form")
    return body


def _check_known(keys: Iterable[Any], known: tuple[str, ...], what: str) -> None:
    """What a later version adds is refused by name: a key says what the rest of the stream means."""
    for key in keys:
        if key not in known:
            raise UnsupportedError(f"{what} has the key {show(key)}, which this version does not define")


def _is_bytes(body: dict[str, Any], key: str, least: int, most: int) -> bool:
    """Whether a key is absent or holds as many bytes."""
    return key not in body or (type(body[key]) is bytes and least <= len(body[key]) <= most)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise FormatError(message)
