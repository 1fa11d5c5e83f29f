"""The two msgpack payloads: stream metadata and descriptions of items (docs/format.md, sections 4 and 5).

Each value has one encoding: keys in their fixed order, smallest msgpack forms. `unpack_*` re-encodes what it read and
compares, so that any other encoding is refused. An item that exists is valid; none of its fields is optional, except
the size of a file whose size is not known in advance.

Many items differ only in their path. A frame that describes items contains each form once, and for each item the number
of its form and its path. A hundred thousand items are therefore checked as columns, and become objects only on request.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import chain
from math import prod
from typing import Any, ClassVar, Final

import msgpack

from tensorwire import dtypes
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, SchemaError, UnsupportedError, WireError, show
from tensorwire.limits import Limits
from tensorwire.wire.names import Path, name_of

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
    """The content of the STREAM frame.

    `align`: data payloads begin at multiples of it. `id`: free for the application. `metadata`: text. `base`, `target`:
    content digests of the version that the stream is against and of the one that it makes, empty if there is none.
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
    """What every item has: its path through the containers of the stream, () for the root."""

    path: Path

    @property
    def name(self) -> str:
        """The name that belongs to the path, as shown and as used in mappings (`wire.names`)."""
        return name_of(self.path)


@dataclass(frozen=True, slots=True)
class TensorItem(_Named):
    """A tensor. `shape`: outermost dimension first. `codec`: the stages that its slices went through."""

    dtype: DType
    shape: tuple[int, ...]
    codec: CodecSpec
    kind: ClassVar[Kind] = Kind.TENSOR

    @property
    def total(self) -> int:
        """Elements that its data frames carry."""
        return prod(self.shape)

    def at(self, path: Path) -> "TensorItem":
        """The same at another place."""
        return TensorItem(path, self.dtype, self.shape, self.codec)


@dataclass(frozen=True, slots=True)
class ValueItem(_Named):
    """A plain value: `size` bytes of its encoding (`wire.values`), carried as they are."""

    size: int
    kind: ClassVar[Kind] = Kind.VALUE

    @property
    def total(self) -> int:
        """Bytes that its data frames carry."""
        return self.size

    def at(self, path: Path) -> "ValueItem":
        """The same at another place."""
        return ValueItem(path, self.size)


@dataclass(frozen=True, slots=True)
class FileItem(_Named):
    """A file of `size` bytes, None if that is not known in advance. Its codec treats it as a tensor of bytes."""

    size: int | None
    codec: CodecSpec
    kind: ClassVar[Kind] = Kind.FILE
    dtype: ClassVar[DType] = dtypes.UINT8

    @property
    def total(self) -> int | None:
        """Bytes that its data frames carry; None: data continues until a closing frame."""
        return self.size

    def at(self, path: Path) -> "FileItem":
        """The same at another place."""
        return FileItem(path, self.size, self.codec)


@dataclass(frozen=True, slots=True)
class AliasItem(_Named):
    """Another name of the tensor that item number `of` is."""

    of: int
    kind: ClassVar[Kind] = Kind.ALIAS
    total: ClassVar[int] = 0

    def at(self, path: Path) -> "AliasItem":
        """The same at another place."""
        return AliasItem(path, self.of)


@dataclass(frozen=True, slots=True)
class ContainerItem(_Named):
    """A dict, list or tuple, whose children follow as items of their own."""

    kind: Kind
    total: ClassVar[int] = 0

    def at(self, path: Path) -> "ContainerItem":
        """The same at another place."""
        return ContainerItem(path, self.kind)


Item = TensorItem | ValueItem | FileItem | AliasItem | ContainerItem
# Items that data frames belong to.
DataItem = TensorItem | ValueItem | FileItem

_STREAM_KEYS: Final = ("align", "id", "base", "target", "metadata")
_ITEM_KEYS: Final = ("forms", "items")
# The fields of each kind, by its number on the wire.
_FIELDS: Final[dict[int, tuple[Kind, tuple[str, ...]]]] = {
    1: (Kind.TENSOR, ("kind", "dtype", "shape", "codec")),
    2: (Kind.VALUE, ("kind", "size")),
    3: (Kind.FILE, ("kind", "size", "codec")),
    4: (Kind.ALIAS, ("kind", "of")),
    5: (Kind.DICT, ("kind",)),
    6: (Kind.LIST, ("kind",)),
    7: (Kind.TUPLE, ("kind",)),
}
# Forms and paths of more bytes than this are split over several frames, so that a frame stays within the limit.
_FULL: Final = 63 << 10


def pack_stream(info: StreamInfo, limits: Limits) -> bytes:
    """The STREAM payload. Raises FormatError or LimitError for what `unpack_stream` would refuse."""
    optional = {"id": info.id, "base": info.base, "target": info.target, "metadata": dict(info.metadata)}
    payload = _packed({"align": info.align} | {key: value for key, value in optional.items() if value})
    unpack_stream(payload, limits)
    return payload


def unpack_stream(payload: bytes, limits: Limits) -> StreamInfo:
    """The validated STREAM payload."""
    if len(payload) > limits.metadata:
        raise LimitError("stream metadata", limits.metadata, len(payload), field="metadata")
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

    A payload of this size may hold a million empty containers, so nothing is built that is not allowed here.
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
        raise LimitError("pairs of stream metadata", limits.pairs, count, field="pairs")
    pairs = {}
    for _ in range(count):
        key, value = unpacker.unpack(), unpacker.unpack()
        _check(type(key) is str and type(value) is str, "metadata must map text to text")
        pairs[key] = value
    return pairs


def _is_map(first: bytes) -> bool:
    """Whether a msgpack object with this first byte is a map."""
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


class Described:
    """The items of one ITEM frame, in order.

    `forms`: the distinct items apart from their paths, as items at the root. `numbers`: for each item, the number of
    its form. `carriers`: the indexes of the items that have data frames.
    """

    __slots__ = ("_items", "_rows", "carriers", "forms", "numbers")

    def __init__(self, forms: tuple[Item, ...], rows: tuple[tuple[Any, ...], ...], numbers: list[int]) -> None:
        self.forms = forms
        self._rows = rows
        self.numbers = numbers
        carry = [not isinstance(form, (AliasItem, ContainerItem)) and form.total != 0 for form in forms]
        self.carriers: Sequence[int] = (
            range(len(rows)) if all(carry) else [at for at, number in enumerate(numbers) if carry[number]]
        )
        self._items: list[Item] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Item:
        if self._items is not None:
            return self._items[index]
        row = self._rows[index]
        form: Item = self.forms[row[0]]
        return form.at(row[1:])

    @property
    def rows(self) -> Sequence[tuple[Any, ...]]:
        """For each item, the number of its form and the keys of its path."""
        if self._items is None:
            return self._rows
        return [(number, *item.path) for number, item in zip(self.numbers, self._items, strict=True)]

    def items(self) -> list[Item]:
        """All items, which are kept from now on, instead of `rows`."""
        if self._items is None:
            makers = [form.at for form in self.forms]
            self._items = [makers[row[0]](row[1:]) for row in self._rows]
            self._rows = ()
        return self._items

    def names(self) -> Iterator[str]:
        """Their names. Must not be called after `items`."""
        return (
            row[1] if len(row) == 2 and type(row[1]) is str and row[1][:1] not in ("", "/") else name_of(row[1:])
            for row in self._rows
        )


Unpack = Callable[[bytes | memoryview, Limits], Described]


class ItemPacker:
    """Packs descriptions of items into the payloads of ITEM frames, as many into each as fit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._forms: dict[Any, int] = {}  # the number of each packed form, by its key
        self._packed: list[bytes] = []
        self._rows: list[bytes] = []
        self._size = 0
        self._pack = msgpack.Packer().pack

    def add(self, item: Item) -> bool:
        """Add an item to the next payload. Returns False, and adds nothing, if it does not fit beside the others.

        Raises FormatError, naming the item, if msgpack cannot encode it.
        """
        key = _form_key(item)
        number = self._forms.get(key, len(self._packed))
        try:
            row: bytes = self._pack((number, *item.path))
            form = b"" if number < len(self._packed) else _packed(_form_body(item))
        except (OverflowError, UnicodeEncodeError, ValueError) as error:
            raise FormatError(f"cannot be described: {error}", item=item.name) from None
        size = self._size + len(row) + len(form)
        if self._rows and size > _FULL:
            return False
        if form:
            self._packed.append(form)
            self._forms[key] = number
        self._rows.append(row)
        self._size = size
        return True

    def take(self) -> tuple[bytes, Described]:
        """The payload of what was added, and its items. Empties the packer. Raises if a reader would refuse it."""
        parts = [b"\x82\xa5forms", _array(len(self._packed)), *self._packed]
        parts += [b"\xa5items", _array(len(self._rows)), *self._rows]
        self._forms, self._packed, self._rows, self._size = {}, [], [], 0
        payload = b"".join(parts)
        return payload, unpack_items(payload, self._limits)


def _form_key(item: Item) -> tuple[Any, ...]:
    """A key that is equal for two items with the same form."""
    if isinstance(item, TensorItem):
        return Kind.TENSOR, item.dtype.number, item.shape, item.codec
    return item.kind, *_form_body(item).values()


def _form_body(item: Item) -> dict[str, Any]:
    match item:
        case TensorItem():
            return {"kind": 1, "dtype": item.dtype.number, "shape": item.shape, "codec": item.codec}
        case ValueItem():
            return {"kind": 2, "size": item.size}
        case FileItem():
            return {"kind": 3, "size": item.size, "codec": item.codec}
        case AliasItem():
            return {"kind": 4, "of": item.of}
    return {"kind": int(item.kind)}


def _array(count: int) -> bytes:
    """The msgpack header of an array."""
    header: bytes = msgpack.Packer().pack_array_header(count)
    return header


def unpack_items(payload: bytes | memoryview, limits: Limits) -> Described:
    """The validated ITEM payload."""
    if len(payload) > limits.descriptor:
        raise LimitError("item descriptors", limits.descriptor, len(payload), field="descriptor")
    body = _unpack_map(payload, "a description of items")
    if tuple(body) != _ITEM_KEYS:
        _check_known(body, _ITEM_KEYS, "a description of items")
        raise FormatError("a description of items has wrong keys")
    forms, rows = body["forms"], body["items"]
    _check(
        type(forms) is tuple and type(rows) is tuple and len(rows) > 0,
        "forms and items must be arrays, of one item at least",
    )
    _check({*map(type, rows)} == {tuple} and min(map(len, rows)) > 0, "an item must be an array: its form and its path")
    _check_keys(rows, limits)
    numbers = [row[0] for row in rows]
    # Forms must be in the order of their first use, so that there is only one encoding.
    _check([*dict.fromkeys(numbers)] == [*range(len(forms))], "forms are not those of the items, in their order")
    _check(len(forms) == 1 or len({*map(_packed, forms)}) == len(forms), "a form appears twice")
    return Described(tuple(_forms(forms, rows, numbers, limits)), rows, numbers)


def sharing() -> Unpack:
    """An `unpack_items` to be shared by readers of similar streams: equal descriptions are unpacked only once."""
    return cache(unpack_items)


def _forms(forms: list[Any], rows: tuple[tuple[Any, ...], ...], numbers: list[int], limits: Limits) -> Iterator[Item]:
    for number, form in enumerate(forms):
        try:
            yield _form(form, limits)
        except WireError as error:
            error.item = name_of(rows[numbers.index(number)][1:])
            raise


def _form(body: Any, limits: Limits) -> Item:
    _check(type(body) is dict, "a form must be a map")
    number = body.get("kind")
    _check(_is_int(number), "a form without a kind")
    if number not in _FIELDS:
        raise UnsupportedError(f"unknown item kind {number}")
    kind, fields = _FIELDS[number]
    if tuple(body) != fields:
        _check_known(body, fields, f"the form of a {kind.name.lower()}")
        raise FormatError(f"the form of a {kind.name.lower()} has wrong keys")
    if kind == Kind.TENSOR:
        dtype, shape = _tensor(body["dtype"], body["shape"], limits)
        return TensorItem((), dtype, shape, _codec(body["codec"]))
    if kind == Kind.VALUE:
        return ValueItem((), _size(body["size"], "value", limits.value))
    if kind == Kind.FILE:
        size = None if body["size"] is None else _size(body["size"], "file", limits.stream)
        return FileItem((), size, _codec(body["codec"]))
    if kind == Kind.ALIAS:
        _check(_is_int(body["of"]) and body["of"] >= 0, "an alias must name an earlier item")
        return AliasItem((), body["of"])
    return ContainerItem((), kind)


def _check_keys(rows: tuple[tuple[Any, ...], ...], limits: Limits) -> None:
    """Raise unless each row is a number and a path within the limits, naming the item."""
    if max(map(len, rows)) <= limits.nesting + 1 and _are_keys([*chain.from_iterable(rows)], limits):
        return  # the loop below would find the same, in ten times the time
    for number, *path in rows:
        try:
            if len(path) > limits.nesting:
                raise LimitError("nesting", limits.nesting, len(path))
            _check(_is_int(number), "the form of an item must be a number")
            for key in path:
                check_key(key, limits)
        except WireError as error:
            error.item = name_of(tuple(path))
            raise


def _are_keys(values: list[Any], limits: Limits) -> bool:
    """Whether `check_key` certainly accepts all of these."""
    texts = [value for value in values if type(value) is str]
    ints = [value for value in values if type(value) is int]
    if len(texts) + len(ints) < len(values) or max(map(abs, ints), default=0) > MAX_INT_KEY:
        return False
    if max(map(len, texts), default=0) > limits.name // 4:  # a character takes 4 bytes at most
        return False
    return _FORBIDDEN.search("".join(texts)) is None


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
    _check(type(dims) is tuple, "shape must be an array")
    size = dtype.itemsize
    for dim in dims:
        if type(dim) is not int or dim < 0:
            raise FormatError("shape must be non-negative ints")
        # Python's integers do not wrap. A zero counts as one: no tensor library holds (0, 2**62).
        # Beyond 64 bits the exact product does not matter, and may have more digits than Python prints.
        size = min(size * (dim or 1), 1 << 64)
    if len(dims) > limits.ndim:
        raise LimitError("ndim", limits.ndim, len(dims))
    _size(size, "item", limits.item)
    return dtype, dims


def _codec(stages: Any) -> CodecSpec:
    _check(type(stages) is tuple and 1 <= len(stages) <= _MAX_STAGES, "codec must be 1 to 8 stages")
    wrong = "a codec stage must be an id and up to 8 unsigned parameters"
    for stage in stages:
        _check(type(stage) is tuple and 1 <= len(stage) <= 1 + _MAX_PARAMETERS, wrong)
        for parameter in stage:
            if type(parameter) is not int or not 0 <= parameter <= _MAX_UINT64:
                raise FormatError(wrong)
    return stages  # type: ignore[no-any-return]  # which has just been checked


def _size(value: Any, what: str, limit: int) -> int:
    _check(_is_int(value) and value >= 0, f"{what} size must be a non-negative int")
    if value > limit:
        raise LimitError(what, limit, value, field="stream" if what == "file" else what)
    return int(value)


def _packed(body: Any) -> bytes:
    payload: bytes = msgpack.packb(body)
    return payload


def _unpack_map(payload: bytes | memoryview, what: str) -> dict[Any, Any]:
    try:
        body = msgpack.unpackb(payload, use_list=False, strict_map_key=True)
        canonical = _packed(body) == payload
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FormatError(f"{what} is not msgpack: {show(str(error))}") from None
    if type(body) is not dict:
        raise FormatError(f"{what} must be a map")
    _check(canonical, f"{what} is not in canonical form")
    return body


def _check_known(keys: Iterable[Any], known: tuple[str, ...], what: str) -> None:
    """Raise UnsupportedError for a key of a later version: it may change what the rest of the stream means."""
    for key in keys:
        if key not in known:
            raise UnsupportedError(f"{what} has the key {show(key)}, which this version does not define")


def _is_bytes(body: dict[str, Any], key: str, least: int, most: int) -> bool:
    """Whether a key is absent, or holds from `least` to `most` bytes."""
    return key not in body or (type(body[key]) is bytes and least <= len(body[key]) <= most)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise FormatError(message)
