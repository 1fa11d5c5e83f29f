"""A second reader of the tensorwire format: standard library only, slow, laid out as docs/format.md is.

It was written from that page alone and shares no line with the library, so that where the two agree, the page is
right. `read(data)` gives the tree of a whole stream as plain values (a tensor is dtype, shape and little-endian bytes)
or raises `Refused`; its subclass `Truncated` says that the stream was sound as far as it went. There is no zstd in the
standard library: pass `zstd_decompress(frame) -> content`, or such items come back with `data` None, everything
around the compressed blocks checked.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from functools import cache
from math import comb, cos, pi, prod, sqrt
from typing import Any, NamedTuple

__all__ = ["File", "Refused", "Stream", "Tensor", "Truncated", "crc32c", "decode_payload", "read", "unpack"]


class Refused(ValueError):
    """The bytes are not a stream of version 1."""


class Truncated(Refused):
    """The bytes end before the END frame does."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None


class File(NamedTuple):
    data: bytes | None


class Stream(NamedTuple):
    root: Any
    align: int
    id: bytes | None
    base: bytes | None
    target: bytes | None
    metadata: dict[str, str]
    frames: int
    index_frames: int


def check(truth: bool, otherwise: str) -> None:
    if not truth:
        raise Refused(otherwise)


# ------------------------------------------------------------------------------------------------ 1. Conventions


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


# First byte: what follows, the layout of its length or value, and the smallest (for negative integers, the largest)
# that does not fit the next shorter spelling.
_SPELLINGS: dict[int, tuple[str, str, int]] = {
    0xC4: ("bin", ">B", 0), 0xC5: ("bin", ">H", 1 << 8), 0xC6: ("bin", ">I", 1 << 16),
    0xC7: ("ext", ">B", 0), 0xC8: ("ext", ">H", 1 << 8), 0xC9: ("ext", ">I", 1 << 16),
    0xCB: ("float", ">d", 0),
    0xCC: ("uint", ">B", 1 << 7), 0xCD: ("uint", ">H", 1 << 8), 0xCE: ("uint", ">I", 1 << 16),
    0xCF: ("uint", ">Q", 1 << 32),
    0xD0: ("int", ">b", -(1 << 5) - 1), 0xD1: ("int", ">h", -(1 << 7) - 1), 0xD2: ("int", ">i", -(1 << 15) - 1),
    0xD3: ("int", ">q", -(1 << 31) - 1),
    0xD9: ("text", ">B", 1 << 5), 0xDA: ("text", ">H", 1 << 8), 0xDB: ("text", ">I", 1 << 16),
    0xDC: ("array", ">H", 1 << 4), 0xDD: ("array", ">I", 1 << 16),
    0xDE: ("map", ">H", 1 << 4), 0xDF: ("map", ">I", 1 << 16),
}  # fmt: skip
_FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_NESTING = 32


class _Unpacker:
    """Canonical msgpack, and no other encoding."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.containers = data, 0, 0

    def take(self, size: int) -> bytes:
        check(self.at + size <= len(self.data), "msgpack: runs over its end")
        self.at += size
        return self.data[self.at - size : self.at]

    def object(self, depth: int = 0) -> Any:
        tag = self.take(1)[0]
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.map(tag & 15, depth)
        if tag < 0xA0:
            return self.array(tag & 15, depth)
        if tag < 0xC0:
            return self.text(tag & 31)
        if tag >= 0xE0:
            return tag - 0x100
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag in _FIXEXT:
            return self.tuple(_FIXEXT[tag], depth)
        check(tag in _SPELLINGS, f"msgpack: byte {tag:#x} is not in the format")
        what, layout, least = _SPELLINGS[tag]
        (number,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        if what == "float":
            return number
        check(number <= least if what == "int" else number >= least, "msgpack: not the shortest spelling")
        if what in ("int", "uint"):
            return number
        if what == "bin":
            return self.take(number)
        if what == "text":
            return self.text(number)
        if what == "ext":
            check(number not in _FIXEXT.values(), "msgpack: not the shortest spelling")
            return self.tuple(number, depth)
        return self.array(number, depth) if what == "array" else self.map(number, depth)

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("msgpack: text that is not UTF-8") from None

    def enter(self, depth: int) -> None:
        check(depth < _NESTING, "msgpack: nested too deep")
        self.containers += 1
        check(self.containers <= LIMIT_CONTAINERS, "msgpack: too many containers")

    def array(self, size: int, depth: int) -> list:
        self.enter(depth)
        check(size <= len(self.data) - self.at, "msgpack: runs over its end")
        return [self.object(depth + 1) for _ in range(size)]

    def map(self, size: int, depth: int) -> dict:
        self.enter(depth)
        result = {}
        for _ in range(size):
            key = self.object(_NESTING)
            check(is_key(key), "msgpack: a key that is neither text nor a small integer")
            check(key not in result, "msgpack: a key twice")
            result[key] = self.object(depth + 1)
        return result

    def tuple(self, size: int, depth: int) -> tuple:
        check(self.take(1) == b"\x01", "msgpack: an extension type other than 1")
        end = self.at + size
        value = self.object(depth)
        check(type(value) is list and self.at == end, "tuple: not one array")
        return tuple(value)


def is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def is_key(value: Any) -> bool:
    return type(value) is str or is_int(value, -(1 << 53), 1 << 53)


def unpack(data: bytes) -> Any:
    """The one msgpack object in `data`."""
    unpacker = _Unpacker(data)
    value = unpacker.object()
    check(unpacker.at == len(data), "msgpack: something after its end")
    return value


# -------------------------------------------------------------------------------------- 2. Preamble, 3. Frame header

_MAGIC = b"\x93TWIR\r\n\x1a"
STREAM, ITEM, DATA, END, BUNDLE, INDEX = 1, 2, 3, 4, 5, 0x81


class Header(NamedTuple):
    type: int
    reserved1: int
    pad: int
    reserved2: int
    sequence: int
    length: int
    item: int
    link: int
    start: int
    count: int
    payload_crc: int
    crc: int


_HEADER = struct.Struct("<BBBBIQIIQQII")


def read_preamble(data: bytes) -> None:
    check(data[:8] == _MAGIC, "not a tensorwire stream")
    major, _minor, flags, crc = struct.unpack("<BBHI", data[8:])
    check(crc == crc32c(data[:12]), "preamble: CRC")
    check(major == 1, f"major version {major}")
    check(flags & 0xFF == 0, f"unknown critical feature {flags:#x}")


def read_header(data: bytes, at: int, sequence: int, link: int, align: int) -> Header:
    """The header at `at`, with all checks that need nothing else."""
    header = Header(*_HEADER.unpack(data))
    check(header.crc == crc32c(data[:44]), "header: CRC")
    check(header.reserved1 == header.reserved2 == 0, "header: reserved bits")
    check(header.type in (STREAM, ITEM, DATA, END, BUNDLE) or header.type >= 0x80, f"frame type {header.type}")
    if header.type == DATA:
        check(header.pad == -(at + 48) % align, "header: pad")
    else:
        check(header.pad == header.start == 0, "header: a field that must be 0")
        check(header.type == BUNDLE or header.count == 0, "header: a field that must be 0")
        check(header.type in (ITEM, BUNDLE) or header.item == 0, "header: a field that must be 0")
    check(header.sequence == sequence, "header: sequence")
    check(header.link == link, "header: link")
    return header


# ------------------------------------------------------------------------------------------------ 4. STREAM payload


def read_stream_payload(payload: bytes, base: bytes | None) -> dict:
    entries = unpack(payload)
    check(type(entries) is dict, "STREAM: not a map")
    keys = ("align", "id", "base", "target", "metadata")
    check([*entries] == [key for key in keys if key in entries], "STREAM: keys")
    check(type(entries.get("align")) is int and entries["align"] in (1, 64), "STREAM: align")
    if "id" in entries:
        check(type(entries["id"]) is bytes and 1 <= len(entries["id"]) <= 64, "STREAM: id")
    for key in {"base", "target"} & {*entries}:
        check(type(entries[key]) is bytes and len(entries[key]) == 32, f"STREAM: {key}")
    check(entries.get("base") in (None, base), "STREAM: against another version")
    if "metadata" in entries:
        metadata = entries["metadata"]
        check(type(metadata) is dict and 0 < len(metadata) <= LIMIT_PAIRS, "STREAM: metadata")
        check(all(type(text) is str for pair in metadata.items() for text in pair), "STREAM: metadata")
        check([*metadata] == sorted(metadata), "STREAM: order of the metadata")
    return entries


# -------------------------------------------------------------------------------------------------- 5. ITEM payload

TENSOR, VALUE, FILE, ALIAS, DICT, LIST, TUPLE = range(1, 8)
_FIELDS = {
    TENSOR: ["kind", "dtype", "shape", "codec"],
    VALUE: ["kind", "size"],
    FILE: ["kind", "size", "codec"],
    ALIAS: ["kind", "of"],
    DICT: ["kind"],
    LIST: ["kind"],
    TUPLE: ["kind"],
}

DTYPES: dict[int, tuple[str, int]] = {
    1: ("bool", 1),
    2: ("uint8", 1), 3: ("int8", 1), 4: ("uint16", 2), 5: ("int16", 2),
    6: ("uint32", 4), 7: ("int32", 4), 8: ("uint64", 8), 9: ("int64", 8),
    16: ("float16", 2), 17: ("bfloat16", 2), 18: ("float32", 4), 19: ("float64", 8),
    24: ("complex32", 4), 25: ("complex64", 8), 26: ("complex128", 16),
    32: ("float8_e4m3fn", 1), 33: ("float8_e5m2", 1), 34: ("float8_e4m3fnuz", 1), 35: ("float8_e5m2fnuz", 1),
    36: ("float8_e8m0fnu", 1), 40: ("float4_e2m1fn_x2", 1),
}  # fmt: skip

_FORBIDDEN = {*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}


def read_item_payload(payload: bytes) -> list["Item"]:
    """The items that an ITEM frame describes."""
    described = unpack(payload)
    check(type(described) is dict and [*described] == ["forms", "items"], "ITEM: keys")
    forms, rows = described["forms"], described["items"]
    check(type(forms) is list and type(rows) is list and len(rows) > 0, "ITEM: forms and items")
    items, used = [], 0
    for row in rows:
        check(type(row) is list and len(row) > 0, "ITEM: an item")
        number, *path = row
        check(is_int(number, 0, min(used, len(forms) - 1)), "ITEM: number of a form")
        used = max(used, number + 1)
        items.append(Item(forms[number], path))
    check(used == len(forms), "ITEM: a form that no item has")
    check(all(form not in forms[:place] for place, form in enumerate(forms)), "ITEM: a form twice")
    return items


class Item:
    """The description of an item, and the data received for it so far."""

    def __init__(self, fields: Any, path: list) -> None:
        check(type(fields) is dict, "ITEM: a form that is no map")
        self.kind = fields.get("kind")
        check(type(self.kind) is int and self.kind in _FIELDS, f"ITEM: kind {self.kind}")
        check([*fields] == _FIELDS[self.kind], "ITEM: keys")
        self.path = path
        check(len(path) <= 32, "ITEM: path")
        for key in self.path:
            check(is_key(key), "ITEM: key of the path")
            if type(key) is str:
                check(len(key.encode()) <= 1024 and not _FORBIDDEN & {*map(ord, key)}, "ITEM: key of the path")
        self.of = fields.get("of")
        self.shape: tuple[int, ...] = ()
        self.dtype, self.width, self.codec = "uint8", 1, [[1]]
        self.size: int | None = 0  # Elements to come.
        if self.kind == TENSOR:
            check(type(fields["dtype"]) is int and fields["dtype"] in DTYPES, f"ITEM: dtype {fields['dtype']}")
            self.dtype, self.width = DTYPES[fields["dtype"]]
            shape = fields["shape"]
            check(type(shape) is list and len(shape) <= 64, "ITEM: shape")
            check(all(is_int(dimension, 0, 1 << 64) for dimension in shape), "ITEM: shape")
            check(prod(dimension or 1 for dimension in shape) * self.width <= LIMIT_ITEM, "limit: item")
            self.shape, self.size = tuple(shape), prod(shape)
        elif self.kind in (VALUE, FILE):
            self.size = fields["size"]
            least, most = (1, LIMIT_TEXT) if self.kind == VALUE else (0, LIMIT_STREAM)
            check(is_int(self.size, least, most) or (self.kind == FILE and self.size is None), "ITEM: size")
        if self.kind in (TENSOR, FILE):
            self.codec = fields["codec"]
            check_codec(self.codec, self.dtype)
        self.done = 0
        self.complete = self.size == 0
        self.opaque = False
        self.parts: list[bytes] = []
        self.built: Tensor | None = None

    @property
    def data(self) -> bytes | None:
        return None if self.opaque else b"".join(self.parts)


# 5.2 Values


def read_value(data: bytes) -> Any:
    value = unpack(data)
    if type(value) in (list, dict, tuple):
        check(len(data) <= LIMIT_COMPOSITE, "value: too large")
    return value


# --------------------------------------------------------------------------------------- 6. Codecs and DATA payloads

RAW, FP16, BF16, INT8, INT8_LINEAR, NF4, FP4, PLANES, PATCH, SPARSE, LOWRANK = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
ZSTD, ENTROPY = 64, 65


def _floats(text: str) -> list[float]:
    return [*struct.unpack(f">{len(text) // 8}f", bytes.fromhex(text))]


_POSITIVE = _floats(
    "3513A3B7365A1A94370205FF37B2420638378034388AEFB338BA1F4B3923D70B398CE70539C7E2833A016F013A1EECC1"
    "3A3C6A803A59E83E3A7765FF3AA7EF9D3AF1A9FC3B1DB22D3B428F5C3B676C8A3B8624DD3B9893743BAB020D3BBD70A4"
    "3BCFDF3B3BE24DD33BF4BC6A3C0395813C0CCCCD3C1604183C1F3B643C3AE1483C68F5C33C8B851F3CA28F5D3CB9999A"
    "3CD0A3D73CE7AE153CFEB8523D0AE1483D1666673D21EB853D2D70A33D38F5C33D447AE13D5000003D5B851F3D670A3D"
    "3D728F5D3D7E147B3D84CCCD3D8A8F5D3D9051EB3D96147B3D9BD70A3DA1999A3DA75C2A3DAD1EB83DB2E1483DB8A3D7"
    "3DBE66673DC428F73DC9EB853DDB33343DF800003E0A66663E18CCCD3E2733333E35999A3E4400003E5266663E60CCCD"
    "3E6F33333E7D99993E8600003E8D33343E9466663E9B999A3EA2CCCC3EAA00003EB133333EB866663EBF999A3EC6CCCC"
    "3ECE00003ED533333EDC66663EE3999A3EEACCCC3EF200003EF933323F0033333F03CCCC3F0766663F0B00003F0E999A"
    "3F1233343F15CCCD3F1966663F1D00003F20999A3F2433343F27CCCD3F2B66663F2F00003F32999A3F3633343F39CCCD"
    "3F3D66663F4100003F44999A3F4833333F4BCCCD3F4F66663F5300003F56999A3F5A33333F5DCCCD3F6166663F650000"
    "3F68999A3F6C33333F6FCCCD3F7366663F7700003F7A999A3F7E3333"
)
INT8_TABLE = [*(-value for value in reversed(_POSITIVE)), 0.0, *_POSITIVE, 1.0]
NF4_TABLE = _floats(
    "BF800000BF3239B1BF066B30BECA32A0BE91A24DBE3D353FBDBA787100000000"
    "3DA2FAFF3E24CAE33E7C04DD3EAD033A3EE1A4B83F1007AB3F3913B33F800000"
)
FP4_TABLE = _floats(
    "000000003BAAAAAB3F2AAAAB3F8000003EAAAAAB3F0000003E2AAAAB3E800000"
    "00000000BBAAAAABBF2AAAABBF800000BEAAAAABBF000000BE2AAAABBE800000"
)


def check_codec(codec: Any, dtype: str) -> None:
    check(type(codec) is list and 1 <= len(codec) <= 8, "codec: stages")
    check(all(type(stage) is list and len(stage) > 0 for stage in codec), "codec: stage")
    check(all(is_int(number, 0, 1 << 32) for stage in codec for number in stage), "codec: stage")
    (number, *parameters), *behind = codec
    known = [stage for stage in ([ZSTD], [ENTROPY]) if stage in behind]
    check(len(known) == len(behind), "codec: only zstd and entropy, once each, stand behind another")
    if number in (RAW, FP16, BF16, PATCH):
        check(parameters == [], "codec: parameters")
        check(number in (RAW, PATCH) or dtype == "float32", f"codec: not for {dtype}")
        return
    if number == PLANES:
        check(parameters == [], "codec: parameters")
        check("float" in dtype or "complex" in dtype, f"codec: not for {dtype}")
        return
    check(number in (INT8, INT8_LINEAR, NF4, FP4, SPARSE, LOWRANK), f"codec {number}")
    check(dtype in ("float32", "float16", "bfloat16"), f"codec: not for {dtype}")
    if number == SPARSE:
        check(len(parameters) == 7, "codec: parameters")
        k, bits, dct, rows, cols, width, scaled = parameters
        check(1 <= k <= 4096 and bits in (1, 2, 4, 8, 16), "codec: k or bits")
        check(dct in (0, 1) and scaled in (0, 1), "codec: dct or scaled")
        check(
            1 <= rows <= 64 and 1 <= cols <= width and rows * cols <= 4096 and cols <= 4096 >> 6 * dct, "codec: chunk"
        )
        return
    if number == LOWRANK:
        check(len(parameters) == 3, "codec: parameters")
        rank, bits, width = parameters
        check(1 <= rank <= 64 and bits in (1, 2, 4, 8, 16) and rank <= width <= 1 << 17, "codec: rank, bits or width")
        return
    least, most = (32, 4096) if number in (NF4, FP4) else (16, 65536)
    check(len(parameters) == (2 if number in (NF4, FP4) else 1), "codec: parameters")
    blocksize = parameters[0]
    check(least <= blocksize <= most and blocksize & (blocksize - 1) == 0, "codec: blocksize")
    check(number in (INT8, INT8_LINEAR) or parameters[1] in (0, 1), "codec: double_quant")


def block_of(codec: list) -> int:
    """Elements in a block: slices begin at multiples of it."""
    number, *parameters = codec[0]
    if number in (RAW, FP16, BF16):
        return 1
    if number in (PLANES, PATCH):
        return 1024
    if number == SPARSE:
        return parameters[3] * parameters[5]
    if number == LOWRANK:
        return parameters[2]
    return parameters[0] * (256 if number in (NF4, FP4) and parameters[1] else 1)


def payload_length(codec: list, dtype: str, width: int, count: int) -> int:
    """Bytes of the payload of `count` elements, before zstd and entropy; of planes, sparse and patch, the most."""
    number, *parameters = codec[0]
    if number in (PLANES, PATCH):
        around = 5 + 8 * mebibytes_of(count * width) if number == PATCH else 0
        width, count = floats_of(dtype, width, count)
        return around + 1 + -(-count // 512) + width * (count + 1)
    if number == SPARSE:
        k, bits, _, rows, cols, across, scaled = parameters
        rice = (rows * cols // k).bit_length() - 1 if k < rows * cols else 0
        sizes = [height * width for _, height, width, _ in chunks_of(count, across, rows, cols)]
        index = sum(position_bits(size, k) if k <= 6 else 0 for size in sizes)
        index += sum(min(k, size) * (1 + rice) + (size - min(k, size) >> rice) + 1 if k > 6 else 0 for size in sizes)
        values = sum(min(k, size) for size in sizes) * bits
        return (4 if k <= 6 else 5) + -(-index // 8) + -(-len(sizes) * scaled // 2) + -(-values // 8)
    if number == LOWRANK:
        rank, bits, across = parameters
        return 8 * rank + -(-(across + -(-count // across)) * rank * bits // 8)
    if number == RAW:
        return count * width
    if number in (FP16, BF16):
        return count * 2
    blocks = -(-count // parameters[0])
    if number == INT8:
        return 4 * blocks + count
    if number == INT8_LINEAR:
        return 2 * blocks + count
    halves = -(-count // 2)
    return (4 + 4 * -(-blocks // 256) + blocks if parameters[1] else 4 * blocks) + halves


def floats_of(dtype: str, width: int, count: int) -> tuple[int, int]:
    """Bytes and number of the floats that `count` elements are."""
    return (width // 2, 2 * count) if dtype.startswith("complex") else (width, count)


def read_zstd(
    frame: bytes, length: int, decompress: Callable[[bytes], bytes] | None, *, exact: bool = True
) -> bytes | None:
    """The content of one zstd frame. Checks everything in RFC 8878 except compressed blocks.

    It has `length` bytes or, unless `exact`, at most so many.
    """
    check(len(frame) >= 6 and frame[:4] == b"\x28\xb5\x2f\xfd", "zstd: magic")
    descriptor, at = frame[4], 5
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    check(descriptor & 0x08 == 0, "zstd: reserved bit")
    window, dictionary = 0, [0, 1, 2, 4][descriptor & 3]
    if not single:
        exponent, mantissa = frame[at] >> 3, frame[at] & 7
        window, at = (8 + mantissa) << (7 + exponent), at + 1
    check(not any(frame[at : at + dictionary]), "zstd: dictionary")
    at += dictionary
    size = [single, 2, 4, 8][descriptor >> 6]
    check(size > 0 and len(frame) >= at + size, "zstd: no content size")
    content = int.from_bytes(frame[at : at + size], "little") + (256 if size == 2 else 0)
    at += size
    check(content == length or (content < length and not exact), "zstd: content size")
    window = content if single else window
    check(window <= max(8 << 20, length), "zstd: window")
    last = 0
    while not last:
        check(len(frame) >= at + 3, "zstd: runs over its end")
        block = int.from_bytes(frame[at : at + 3], "little")
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        check(kind != 3 and size <= min(window, 128 << 10), "zstd: block type or size")
        at += 3 + (1 if kind == 1 else size)
    check(len(frame) == at + 4 * checksum, "zstd: not one frame")
    if decompress is None:
        return None
    try:
        plain = decompress(frame)
    except Exception as error:
        raise Refused("zstd: content") from error
    check(len(plain) == content, "zstd: content")
    return plain


def most_behind(stage: list, length: int) -> int:
    """The most bytes that `length` bytes become."""
    return length + 1 if stage == [ENTROPY] else length + length // 256 + 64


def read_entropy(
    payload: bytes, length: int, decompress: Callable[[bytes], bytes] | None, *, exact: bool = True
) -> bytes | None:
    """The content of an entropy payload: `length` bytes or, unless `exact`, at most `length`."""
    check(len(payload) > 0 and payload[0] <= 8, "entropy: number of parts")
    if payload[0] == 0:
        check(len(payload) - 1 == length or (len(payload) - 1 < length and not exact), "entropy: length")
        return payload[1:]
    at, total, parts = 1, 0, []
    for _ in range(payload[0]):
        check(at + 10 <= len(payload), "entropy: cut")
        size, width, fill, coded = struct.unpack_from("<IBBI", payload, at)
        check(size > 0 and width in (1, 2, 4, 8) and size % width == 0, "entropy: part")
        check(at + 10 + coded <= len(payload), "entropy: part cut")
        parts.append((width, size // width, fill, payload[at + 10 : at + 10 + coded]))
        at, total = at + 10 + coded, total + size
    check(total == length or (total < length and not exact), "entropy: length")
    check(at == len(payload) <= total, "entropy: bytes behind, or none saved")
    planes = [decode_floats(width, count, coded, decompress) for width, count, _, coded in parts]
    if any(part is None for part in planes):
        return None
    return b"".join(bytes(byte ^ part[2] for byte in plane) for part, plane in zip(parts, planes, strict=True))


class _Planes:
    """A payload of planes, from front to back."""

    def __init__(self, payload: bytes, decompress: Callable[[bytes], bytes] | None) -> None:
        self.payload, self.at, self.decompress = payload, 0, decompress

    def take(self, size: int) -> bytes:
        check(self.at + size <= len(self.payload), "planes: end too early")
        self.at += size
        return self.payload[self.at - size : self.at]

    def plane(self, count: int) -> bytes | None:
        mode = self.take(1)[0]
        check(mode <= 3, "planes: mode")
        if mode == 0:
            return self.take(count)
        if mode == 1:
            return self.take(1) * count
        size = int.from_bytes(self.take(4), "little")
        check(size + 4 < count, "planes: a frame that saves nothing")
        if mode == 3:
            return read_zstd(self.take(size), count, self.decompress)
        return read_huffman(self.take(size), count)


def read_huffman(data: bytes, count: int) -> bytes:
    out = b""
    while len(out) < count:
        data, segment = read_segment(data, min(count - len(out), 1 << 17))
        out += segment
    check(not data, "huffman: bytes behind")
    return out


def read_segment(data: bytes, count: int) -> tuple[bytes, bytes]:
    """What follows a segment, and the bytes in it."""
    check(len(data) >= 3 and data[0] < data[1], "huffman: bytes")
    first, last = data[0], data[1]
    at = 2 + (last - first) // 2 + 1
    check(len(data) >= at + 8, "huffman: cut")
    halves = [half for byte in data[2:at] for half in (byte & 15, byte >> 4)]
    lengths = dict(zip(range(first, last + 1), halves, strict=False))
    check(lengths[first] and lengths[last] and not any(halves[len(lengths) :]), "huffman: ends")
    check(max(halves) <= 11 and sum(2048 >> length for length in halves if length) == 2048, "huffman: lengths")
    codes, code = {}, 0
    for length in range(1, 12):
        for byte, its in lengths.items():
            if its == length:
                codes[length, code] = byte
                code += 1
        code *= 2
    sizes = struct.unpack_from("<4H", data, at)
    at += 8
    out, quarter = b"", -(-count // 4)
    for number, size in enumerate(sizes):
        check(at + size <= len(data), "huffman: stream cut")
        out += read_codes(data[at : at + size], codes, max(min(quarter, count - number * quarter), 0))
        at += size
    return data[at:], out


def read_codes(data: bytes, codes: dict, count: int) -> bytes:
    bits = iter([byte >> bit & 1 for byte in data for bit in range(8)])
    out = bytearray()
    while len(out) < count:
        length = code = 0
        while (length, code) not in codes:
            bit = next(bits, None)
            check(bit is not None, "huffman: stream ends early")
            length, code = length + 1, code << 1 | bit
        out.append(codes[length, code])
    rest = [*bits]
    check(len(rest) < 8 and not any(rest), "huffman: bits behind")
    return bytes(out)


def decode_planes(
    dtype: str, width: int, count: int, payload: bytes, decompress: Callable[[bytes], bytes] | None
) -> bytes | None:
    return decode_floats(*floats_of(dtype, width, count), payload, decompress)


def decode_floats(width: int, count: int, payload: bytes, decompress: Callable[[bytes], bytes] | None) -> bytes | None:
    given = _Planes(payload, decompress)
    form, blocks = given.take(1)[0], -(-count // 64)
    check(form <= 2, "planes: first byte")
    marked = [form == 0] * blocks
    if form == 1:
        bits = int.from_bytes(given.take(-(-blocks // 8)), "little")
        check(0 < bits < (1 << blocks) - 1, "planes: marks")
        marked = [bool(bits >> block & 1) for block in range(blocks)]
    standing = [at for at in range(count) if marked[at // 64]]
    planes = [given.plane(len(standing)) for _ in range(width if form < 2 else 0)]
    check(given.at == len(payload), "planes: bytes behind")
    if None in planes:
        return None
    out = bytearray(count * width)
    for place, at in enumerate(standing):
        number = int.from_bytes(bytes(plane[place] for plane in planes), "little")
        if width > 1:
            upper = number >> 8 * width - 16
            number ^= (upper ^ (upper >> 1 | (upper & 1) << 15)) << 8 * width - 16
        out[at * width : (at + 1) * width] = number.to_bytes(width, "little")
    return bytes(out)


def chunks_of(count: int, width: int, rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    """(first element, rows, columns, elements from row to row) of the chunks of a slice."""
    start = 0
    while start < count:
        height, across = min(rows, (count - start) // width), width
        if height == 0:
            height, across = 1, count - start
        for at in range(0, across, cols):
            yield start + at, height, min(cols, across - at), across
        start += height * across


def position_bits(size: int, k: int) -> int:
    """Bits of the number of up to 6 positions in a chunk."""
    return (comb(size, min(k, size)) - 1).bit_length()


class _Bits:
    """Bits from the lowest of the first byte on."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        check(count <= self.left, "bits: end too early")
        taken = self.value & (1 << count) - 1
        self.value, self.left = self.value >> count, self.left - count
        return taken

    def end(self) -> None:
        check(self.left < 8 and self.value == 0, "bits: something behind")


def signed_values(data: bytes, bits: int, steps: list[float]) -> list[float]:
    """A number for each of `steps`: its sign, and a magnitude of m + 1/2 steps."""
    given, values = _Bits(data), []
    for step in steps:
        code = given.take(bits)
        magnitude = float32(((code & (1 << bits - 1) - 1) + 0.5) * step)
        values.append(-magnitude if code >> bits - 1 else magnitude)
    given.end()
    return values


def read_steps(data: bytes, bits: int, exponent: int) -> list[float]:
    (*patterns,) = struct.unpack(f"<{len(data) // 4}I", data)
    (*steps,) = struct.unpack(f"<{len(data) // 4}f", data)
    check(all(pattern < 0x7F800000 for pattern in patterns), "payload: a step that is negative or not finite")
    check(all(step <= 2.0 ** (exponent - bits + 1) for step in steps), "payload: a step that is too large")
    return steps


def read_positions(given: _Bits, size: int, k: int, rice: int) -> list[int] | None:
    """The positions that are kept of a chunk; None if nothing is kept."""
    kept = min(k, size)
    if k <= 6:
        number, found = given.take(position_bits(size, k)), []
        check(number <= comb(size, kept), "sparse: number of positions")
        if number == comb(size, kept):
            return None
        for i in range(kept, 0, -1):
            place = i - 1
            while comb(place + 1, i) <= number:
                place += 1
            number -= comb(place, i)
            found.insert(0, place)
        return found
    found = []
    for _ in range(kept):
        high = 0
        while given.take(1) == 0:
            high += 1
        gap = high << rice | given.take(rice)
        found.append((found[-1] if found else -1) + 1 + gap)
        if found == [size]:
            return None
        check(found[-1] < size, "sparse: position")
    return found


@cache
def cosines(n: int) -> list[list[float]]:
    """Row x has those of all frequencies. cos is not exactly 0 at odd multiples of pi / 2."""
    angles = [[(2 * x + 1) * u % (4 * n) for u in range(n)] for x in range(n)]
    return [[float32(cos(pi * a / (2 * n)) if a % (2 * n) != n else 0.0) for a in row] for row in angles]


def inverse_dct(x: list[float]) -> list[float]:
    n = len(x)
    if n == 1:
        return x
    if n % 2:
        return [sum_of_products(row, x) for row in cosines(n)]
    even = inverse_dct(x[::2])
    odd = inverse_dct([x[1], *(float32(a + b) for a, b in zip(x[1:-1:2], x[3::2], strict=True))])
    odd = [float32(o * float32(0.5 / cos(pi * (2 * i + 1) / (2 * n)))) for i, o in enumerate(odd)]
    front = [float32(e + o) for e, o in zip(even, odd, strict=True)]
    back = [float32(e - o) for e, o in zip(even, odd, strict=True)]
    return front + back[::-1]


def inverse_dct2(coefficients: list[float], height: int, width: int) -> list[float]:
    """The elements of a chunk, row by row."""
    scaled = []
    for at, coefficient in enumerate(coefficients):
        factor = sqrt((1 + (at >= width)) * (1 + (at % width > 0)) / (height * width))
        scaled.append(float32(coefficient * float32(factor)))
    rows = [
        [sum_of_products(row, scaled[at : at + width]) for row in cosines(width)]
        for at in range(0, height * width, width)
    ]
    columns = [inverse_dct(list(column)) for column in zip(*rows, strict=True)]
    return [element for row in zip(*columns, strict=True) for element in row]


def sum_of_products(left: list[float], right: list[float]) -> float:
    """Calculated in order, with each product and each sum rounded to float32."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        if a and b:
            total = float32(total + float32(a * b))
    return total


def decode_sparse(parameters: list, dtype: str, count: int, payload: bytes) -> bytes:
    k, bits, dct, rows, cols, width, scaled = parameters
    chunks = [*chunks_of(count, width, rows, cols)]
    kept = sum(min(k, height * across) for _, height, across, _ in chunks)
    head, behind = 4 if k <= 6 else 5, len(payload) - -(-kept * bits // 8)
    before = behind - -(-len(chunks) * scaled // 2)
    check(before >= head, "sparse: ends too early")
    rice = payload[4] if k > 6 else 0
    check(rice <= 12, "sparse: parameter of Rice's codes")
    (step,) = read_steps(payload[:4], bits, 110)
    values, given = signed_values(payload[behind:], bits, [step] * kept), _Bits(payload[head:before])
    scales = _Bits(payload[before:behind])
    codes, used, elements = _Bits(payload[behind:]), 0, [0.0] * count
    for start, height, across, stride in chunks:
        size = height * across
        positions = read_positions(given, size, k, rice)
        made = [0.0] * size
        mine, used = values[used : used + min(k, size)], used + min(k, size)
        signed = [codes.take(bits) for _ in mine]
        scale = scales.take(4) if scaled else 0
        if positions is None:
            check(not any(signed) and scale == 0, "sparse: values or a scale of nothing")
        for position, value in zip(positions or [], mine, strict=False):
            made[position] = float32(value / 2**scale)
        if dct:
            made = inverse_dct2(made, height, across)
        for i in range(height):
            elements[start + i * stride : start + i * stride + across] = made[i * across : (i + 1) * across]
    given.end()
    scales.end()
    return b"".join(to_dtype(element + 0.0, dtype) for element in elements)


def decode_lowrank(parameters: list, dtype: str, count: int, payload: bytes) -> bytes:
    rank, bits, width = parameters
    rows = -(-count // width)
    steps = read_steps(payload[: 8 * rank], bits, 56)
    each = steps[:rank] * width + steps[rank:] * rows
    values = signed_values(payload[8 * rank :], bits, each)
    factors = [values[at : at + rank] for at in range(0, len(values), rank)]
    return b"".join(
        to_dtype(sum_of_products(factors[width + at // width], factors[at % width]) + 0.0, dtype) for at in range(count)
    )


def mebibytes_of(size: int) -> int:
    return -(-size // (1 << 20))


def checksums_of(data: bytes) -> list[int]:
    """The CRC of each MiB."""
    return [crc32c(data[at : at + (1 << 20)]) for at in range(0, len(data), 1 << 20)]


def decode_patch(
    dtype: str, width: int, count: int, payload: bytes, decompress: Callable[[bytes], bytes] | None, base: bytes | None
) -> bytes | None:
    """The elements of the target, made by a slice from those of its base."""
    chunks = mebibytes_of(count * width)
    check(len(payload) > 0 and payload[0] <= 4, "patch: first byte")
    mode, begin = payload[0], 1 if payload[0] in (0, 4) else 5
    at = begin + 4 * chunks * (1 if begin == 1 else 2)
    check(len(payload) >= at, "patch: checksums")
    sums = [*struct.unpack_from(f"<{(at - begin) // 4}I", payload, begin)]
    made = base
    if mode != 0:
        check(base is not None and checksums_of(base) == sums[-chunks:], "patch: not its base")
    if mode == 4:
        check(len(payload) == at, "patch: bytes behind")
    elif mode == 3:
        made = change_floats(base or b"", dtype, payload[at:])
    else:
        made = decode_planes(dtype, width, count, payload[at:], decompress)
    if made is None:
        return None
    if mode == 2:
        made = add_difference(base or b"", made, *floats_of(dtype, width, count))
    check(checksums_of(made) == sums[:chunks], "patch: not its target")
    if begin == 5:
        size, numbers = floats_of(dtype, width, count)
        places = range(0, size * numbers, size)
        changed = sum(made[at : at + size] != (base or b"")[at : at + size] for at in places)
        check(int.from_bytes(payload[1:5], "little") == changed > 0, "patch: numbers that changed")
    return made


class _ChangeBits:
    """Bits from the lowest of the first byte on."""

    def __init__(self, data: bytes) -> None:
        self.bits, self.at = [byte >> bit & 1 for byte in data for bit in range(8)], 0

    def take(self, count: int) -> list[int]:
        self.at += count
        check(self.at <= len(self.bits), "sparse: bits end early")
        return self.bits[self.at - count : self.at]

    def number(self, count: int) -> int:
        return sum(bit << place for place, bit in enumerate(self.take(count)))

    def count(self, most: int) -> int:
        length = self.number(5)
        number = 1 << length - 1 | self.number(length - 1) if length else 0
        check(number <= most, "sparse: count")
        return number

    def rice(self, count: int, most: int) -> list[int]:
        k = self.number(5) if count else 0
        check(k <= 24, "sparse: parameter")
        numbers = [self.number(k) for _ in range(count)]
        for place in range(count):
            zeros = 0
            while not self.number(1):
                zeros += 1
            numbers[place] |= zeros << k
        check(all(number <= most for number in numbers), "sparse: number")
        return numbers


def places_of(gaps: list[int]) -> list[int]:
    places, at = [], -1
    for gap in gaps:
        at += gap + 1
        places.append(at)
    return places


def change_floats(base: bytes, dtype: str, payload: bytes) -> bytes:
    check(dtype in ("float16", "bfloat16"), "sparse: dtype")
    floats = [*struct.unpack(f"<{len(base) // 2}H", base)]
    classes = [x >> 10 & 31 if dtype == "float16" else min(max((x >> 7 & 255) - 96, 0), 31) for x in floats]
    bits = _ChangeBits(payload)
    begins = bits.number(32)
    check(begins & 1 == 1, "sparse: the first group")
    firsts = [number for number in range(32) if begins >> number & 1]
    left = len(floats) // 2
    for first, end in zip(firsts, [*firsts[1:], 32], strict=True):
        changed = bits.count(left)
        left -= changed
        if not changed:
            continue
        inverted = bits.number(1)
        listed = {*places_of(bits.rice(bits.count(changed - 1) if inverted else changed, len(floats)))}
        signs = bits.take(changed)
        if bits.number(1):
            sizes = dict(enumerate(size - 1 for size in bits.rice(changed, 0x7FFF)))
        else:
            larger = bits.count(changed)
            which, beyond = places_of(bits.rice(larger, changed)), bits.rice(larger, 0x7FFE)
            check(all(place < changed for place in which), "sparse: a larger change")
            sizes = dict(zip(which, beyond, strict=True))
        mine = [place for place, number in enumerate(classes) if first <= number < end]
        check(max(listed, default=0) < max(len(mine), 1), "sparse: a place behind the last one")
        places = [place for rank, place in enumerate(mine) if (rank in listed) != inverted]
        check(len(places) == changed, "sparse: places")
        for number, place in enumerate(places):
            size = sizes.get(number, -1) + 2
            check(size < 0x8000 or signs[number], "sparse: size")
            floats[place] = (floats[place] + (-size if signs[number] else size)) % 0x10000
    check(left < len(floats) // 2, "sparse: nothing changed")
    check(len(bits.bits) - bits.at < 8 and not any(bits.bits[bits.at :]), "sparse: bits behind")
    return struct.pack(f"<{len(floats)}H", *floats)


def add_difference(base: bytes, planes: bytes, width: int, count: int) -> bytes:
    out = bytearray()
    for at in range(0, width * count, width):
        number = int.from_bytes(planes[at : at + width], "little")
        if width > 1:
            upper, low = number >> 8 * width - 16, number & (1 << 8 * width - 16) - 1
            number = (upper << 1 & 0xFFFF | upper >> 15) << 8 * width - 16 | low
        difference = number >> 1 if number % 2 == 0 else -(number >> 1) - 1
        out += ((int.from_bytes(base[at : at + width], "little") + difference) % (1 << 8 * width)).to_bytes(
            width, "little"
        )
    return bytes(out)


def float32(value: float) -> float:
    """`value` rounded to float32. Products and sums of two float32 lose nothing by being taken in float64 first."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


LARGEST = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127"), "float32": float.fromhex("0x1.fffffep127")}


def saturated(value: float, dtype: str) -> float:
    return max(-LARGEST[dtype], min(value, LARGEST[dtype]))


def to_dtype(value: float, dtype: str) -> bytes:
    """The float32 `value` rounded to nearest, ties to even; beyond the largest finite value, that value."""
    value = saturated(value, dtype)
    if dtype == "float16":
        return struct.pack("<e", value)
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    return struct.pack("<f", value)


def float16_to_float32(bits: int) -> int:
    """The bits of the float32 of the same value; a NaN keeps its sign and fraction and becomes quiet."""
    if bits & 0x7C00 == 0x7C00:
        quiet = 0x400000 if bits & 0x3FF else 0
        return (bits & 0x8000) << 16 | 0x7F800000 | quiet | (bits & 0x3FF) << 13
    return struct.unpack("<I", struct.pack("<f", struct.unpack("<e", struct.pack("<H", bits))[0]))[0]


def read_scales(payload: bytes, at: int, count: int) -> list[float]:
    scales = struct.unpack_from(f"<{count}f", payload, at)
    bits = struct.unpack_from(f"<{count}I", payload, at)
    check(all(pattern < 0x7F800000 for pattern in bits), "payload: an absmax that is negative or not finite")
    return [*scales]


def decode_payload(codec: list, dtype: str, width: int, count: int, payload: bytes) -> bytes:
    """`count` elements of `dtype` from a payload of the right length."""
    number, *parameters = codec[0]
    if number == RAW:
        check(dtype != "bool" or not {*payload} - {0, 1}, "payload: a bool that is neither 0 nor 1")
        return payload
    halves = struct.unpack(f"<{count}H", payload) if number in (FP16, BF16) else ()
    if number == FP16:
        return struct.pack(f"<{count}I", *map(float16_to_float32, halves))
    if number == BF16:
        return struct.pack(f"<{count}I", *(half << 16 for half in halves))
    blocksize = parameters[0]
    blocks = -(-count // blocksize)
    codes = payload[-count:]
    if number == INT8:
        absmax = read_scales(payload, 0, blocks)
        values = [INT8_TABLE[code] for code in codes]
    elif number == INT8_LINEAR:
        wide = b"".join(b"\0\0" + payload[2 * block : 2 * block + 2] for block in range(blocks))
        absmax = read_scales(wide, 0, blocks)
        check(0x80 not in codes, "payload: code -128")
        values = [float(code) for code in struct.unpack(f"<{count}b", codes)]
    else:
        codes = payload[len(payload) - (count + 1) // 2 :]
        check(count % 2 == 0 or codes[-1] & 0x0F == 0, "payload: an unused half that is not 0")
        table = NF4_TABLE if number == NF4 else FP4_TABLE
        values = [table[half] for byte in codes for half in (byte >> 4, byte & 0x0F)][:count]
        if parameters[1]:
            groups = -(-blocks // 256)
            offset, *nested = read_scales(payload, 0, 1 + groups)
            scaled = payload[4 + 4 * groups :][:blocks]
            sums = (float32(float32(INT8_TABLE[code] * nested[j // 256]) + offset) for j, code in enumerate(scaled))
            absmax = [saturated(scale, "float32") for scale in sums]
        else:
            absmax = read_scales(payload, 0, blocks)
    return b"".join(to_dtype(float32(value * absmax[j // blocksize]), dtype) for j, value in enumerate(values))


# ----------------------------------------------------------------------- 7. Order of frames, 8. END and INDEX

LIMIT_STREAM_PAYLOAD = 64 << 20
LIMIT_ITEM_PAYLOAD = 64 << 10
LIMIT_ITEMS = 2_097_152
LIMIT_ITEM = 256 << 30
LIMIT_TEXT = 256 << 20
LIMIT_COMPOSITE = 64 << 20
LIMIT_CONTAINERS = 1_048_576
LIMIT_PAIRS = 524_288
LIMIT_DATA = 64 << 20
LIMIT_SKIPPABLE = 64 << 20
LIMIT_STREAM = 64 << 40


class _Reader:
    def __init__(
        self,
        data: bytes,
        decompress: Callable[[bytes], bytes] | None = None,
        base: bytes | None = None,
        held: list[tuple["Item", bytes]] | None = None,
    ) -> None:
        self.data, self.decompress, self.base = data, decompress, base
        self.held = held  # The items of the base and their bytes, by rank.
        self.at = 0
        self.items: list[Item] = []
        self.open: list[list] = []  # Paths of the containers that may still get children.
        self.children: dict[tuple, dict] = {}  # Path of a container: its children's keys and items.
        self.current = 0  # The first item whose data is not complete, or one past the last.

    def take(self, size: int) -> bytes:
        if len(self.data) - self.at < size:
            raise Truncated(f"{size} bytes wanted at {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def read(self) -> Stream:
        preamble = self.take(16)
        read_preamble(preamble)
        digest = hashlib.sha256(preamble)
        link = int.from_bytes(preamble[12:], "little")
        opening: dict = {}
        index, index_frames, sequence = 0, 0, 0
        while True:
            begin = self.at
            raw = self.take(48)
            header = read_header(raw, begin, sequence, link, opening.get("align", 1))
            self.check_limit(header)
            check((header.type == STREAM) == (sequence == 0), "order: STREAM is the first frame, and only it")
            if header.type == ITEM:
                check(header.item == len(self.items), "order: number of the item")
                check(
                    self.current == len(self.items) or self.items[self.current].done == 0,
                    "order: within an item",
                )
            elif header.type == DATA:
                self.check_slice(header)
            elif header.type == BUNDLE:
                self.check_bundle(header)
            elif header.type == END:
                check(self.items and self.current == len(self.items), "order: END before the data is complete")
                check(header.length == 64, "END: length")
            check(not any(self.take(header.pad)), "padding that is not 0")
            payload = self.take(header.length)
            check(crc32c(payload) == header.payload_crc, "payload: CRC")
            if header.type == STREAM:
                opening = read_stream_payload(payload, self.base)
            elif header.type == ITEM:
                for item in read_item_payload(payload):
                    self.add_item(item)
            elif header.type == DATA:
                self.add_data(header, payload)
            elif header.type == BUNDLE:
                self.add_bundle(header, payload)
            elif header.type == INDEX:
                index, index_frames = begin, index_frames + 1
            elif header.type == END:
                totals = struct.unpack("<QQQQ", payload[:32])
                check(totals == (len(self.items), sequence, begin, index), "END: totals")
                check(payload[32:] == digest.digest(), "END: digest")
                break
            digest.update(raw)
            link, sequence = header.crc, sequence + 1
        check(self.at == len(self.data), "something after END")
        root = self.build(self.items[0])
        named = [opening.get(key) for key in ("id", "base", "target")]
        return Stream(root, opening["align"], *named, opening.get("metadata", {}), sequence + 1, index_frames)

    def check_limit(self, header: Header) -> None:
        limit = {
            STREAM: LIMIT_STREAM_PAYLOAD, ITEM: LIMIT_ITEM_PAYLOAD, DATA: LIMIT_ITEM, BUNDLE: LIMIT_DATA, END: 64
        }  # fmt: skip
        check(header.length <= limit.get(header.type, LIMIT_SKIPPABLE), "limit: frame")
        check(self.at + header.pad + header.length <= LIMIT_STREAM, "limit: stream")

    def add_item(self, item: Item) -> None:
        check(len(self.items) < LIMIT_ITEMS, "limit: items")
        if not self.items:
            check(item.path == [] and item.kind != ALIAS, "order: the root comes first")
        else:
            check(item.path != [], "order: a second root")
            parent, key = item.path[:-1], item.path[-1]
            check(parent in self.open, "order: the parent is not open")
            del self.open[self.open.index(parent) + 1 :]
            kind = self.children[tuple(parent)]
            siblings = kind["children"]
            if kind["kind"] == DICT:
                check(key not in siblings, "order: a key twice")
            else:
                check(type(key) is int and key == len(siblings), "order: keys of a list are 0, 1, 2, ...")
            siblings[key] = item
        if item.kind in (DICT, LIST, TUPLE):
            self.open.append(item.path)
            self.children[tuple(item.path)] = {"kind": item.kind, "children": {}}
        if item.kind == ALIAS:
            check(is_int(item.of, 0, len(self.items) - 1), "alias: of an item not described")
            tensor = self.items[item.of]
            check(tensor.kind == TENSOR and tensor.size > 0 and tensor.done == 0, "alias: of no such tensor")
        self.items.append(item)
        self.advance()

    def advance(self) -> None:
        while self.current < len(self.items) and self.items[self.current].complete:
            self.current += 1

    def check_slice(self, header: Header) -> None:
        check(self.current < len(self.items) and header.item == self.current, "order: data of another item")
        item = self.items[self.current]
        check(header.start == item.done, "slice: start")
        if header.count == 0:
            check(item.size is None and header.length == 0, "slice: empty")
            return
        end = header.start + header.count
        check(item.size is None or end <= item.size, "slice: past the end of the item")
        check(end <= LIMIT_STREAM, "limit: file")
        check(end % block_of(item.codec) == 0 or end == item.size, "slice: not whole blocks")
        length = payload_length(item.codec, item.dtype, item.width, header.count)
        if item.codec != [[RAW]]:
            check(max(length, header.length) <= LIMIT_DATA, "limit: data frame")
        if item.codec[0][0] in (SPARSE, LOWRANK):
            check(header.count * item.width // 4 <= LIMIT_DATA, "limit: decoded slice")
        for stage in item.codec[1:]:
            length = most_behind(stage, length)
        exact = len(item.codec) == 1 and item.codec[0][0] not in (PLANES, SPARSE, PATCH)
        check(header.length == length or (header.length < length and not exact), "slice: length")

    def add_data(self, header: Header, payload: bytes) -> None:
        item = self.items[self.current]
        if header.count:
            part = self.decoded(item, header.count, payload)
            if part is None:
                item.opaque = True
            else:
                item.parts.append(part)
        item.done += header.count
        item.complete = item.done == item.size or header.count == 0
        if item.complete and item.kind == VALUE:
            read_value(item.data or b"")
        self.advance()

    def check_bundle(self, header: Header) -> None:
        check(2 <= header.count <= 64 and header.length > 4 * header.count, "bundle: items")
        waiting = [item for item in self.items[self.current :] if not item.complete][: header.count]
        check(len(waiting) == header.count and header.item == self.current, "order: a bundle of other items")
        check(all(item.done == 0 and item.size is not None for item in waiting), "bundle: an item that is not whole")

    def add_bundle(self, header: Header, payload: bytes) -> None:
        lengths = struct.unpack_from(f"<{header.count}I", payload)
        at = 4 * header.count
        check(all(lengths) and at + sum(lengths) == len(payload), "bundle: table")
        for length in lengths:
            whole = header._replace(item=self.current, count=self.items[self.current].size, length=length)
            self.check_slice(whole)
            self.add_data(whole, payload[at : at + length])
            at += length

    def decoded(self, item: Item, count: int, payload: bytes) -> bytes | None:
        (number, *parameters), length = item.codec[0], payload_length(item.codec, item.dtype, item.width, count)
        lengths = [length]
        for stage in item.codec[1:-1]:
            lengths.append(most_behind(stage, lengths[-1]))
        for place in range(len(item.codec) - 2, -1, -1):
            read_stage = read_entropy if item.codec[place + 1] == [ENTROPY] else read_zstd
            plain = read_stage(
                payload, lengths[place], self.decompress, exact=place == 0 and number not in (PLANES, SPARSE, PATCH)
            )
            if plain is None:
                return None
            payload = plain
        if number == PLANES:
            return decode_planes(item.dtype, item.width, count, payload, self.decompress)
        if number == PATCH:
            base = None
            if self.held is not None:
                check(is_int(item.path[0], 0, len(self.held) - 1), "patch: rank")
                old, data = self.held[item.path[0]]
                check((old.dtype, old.shape) == (item.dtype, item.shape), "patch: item")
                base = data[item.done * item.width : (item.done + count) * item.width]
            return decode_patch(item.dtype, item.width, count, payload, self.decompress, base)
        if number == SPARSE:
            return decode_sparse(parameters, item.dtype, count, payload)
        if number == LOWRANK:
            return decode_lowrank(parameters, item.dtype, count, payload)
        return decode_payload(item.codec, item.dtype, item.width, count, payload)

    def build(self, item: Item) -> Any:
        """The value of `item`; both names of a tied tensor give one object."""
        if item.kind == ALIAS:
            return self.build(self.items[item.of])
        if item.kind == TENSOR:
            if item.built is None:
                item.built = Tensor(item.dtype, item.shape, item.data)
            return item.built
        if item.kind == VALUE:
            return read_value(item.data or b"")
        if item.kind == FILE:
            return File(item.data)
        children = self.children[tuple(item.path)]["children"]
        values = {key: self.build(child) for key, child in children.items()}
        return values if item.kind == DICT else [*values.values()] if item.kind == LIST else (*values.values(),)


def read(data: bytes, *, zstd_decompress: Callable[[bytes], bytes] | None = None, base: bytes | None = None) -> Stream:
    """The stream in `data`, all of it; raises Refused. `base`: the version that it may be against."""
    return _Reader(bytes(data), zstd_decompress, base).read()


def name_of(path: list) -> str:
    if len(path) == 1 and type(path[0]) is str and path[0] and path[0][0] != "/":
        return path[0]
    return "".join("/" + (str(key) if type(key) is int else _escaped(key)) for key in path)


def _escaped(key: str) -> str:
    digits = key.removeprefix("-")
    number = digits.isascii() and digits.isdigit() and len(digits) <= 16 and (digits[0] != "0" or key == "0")
    return "~2" + key if number else key.replace("~", "~0").replace("/", "~1")


def pack(value: Any) -> bytes:
    """Text, numbers from 0 on and lists as msgpack."""
    if type(value) is int:
        for tag, layout, most in ((0, ">B", 127), (0xCC, ">BB", 255), (0xCD, ">BH", 65535), (0xCE, ">BI", 2**32 - 1)):
            if value <= most:
                return struct.pack(layout, value) if most == 127 else struct.pack(layout, tag, value)
        return struct.pack(">BQ", 0xCF, value)
    data = value.encode() if type(value) is str else b"".join(map(pack, value))
    size = len(data) if type(value) is str else len(value)
    short, sizes = (
        (0xA0, ((0xD9, ">BB", 255), (0xDA, ">BH", 65535))) if type(value) is str else (0x90, ((0xDC, ">BH", 65535),))
    )
    if size <= (31 if short == 0xA0 else 15):
        return bytes([short | size]) + data
    return next(struct.pack(layout, tag, size) for tag, layout, most in sizes if size <= most) + data


def version(items: list[Item]) -> dict[str, tuple[Item, bytes]]:
    """Tensors and values, and their bytes, in the order of their names; the place of each is its rank."""
    found = {}
    for item in items:
        if item.kind in (TENSOR, VALUE, ALIAS):
            stands = items[item.of] if item.kind == ALIAS else item
            found[name_of(item.path)] = stands, stands.data or b""
    return {name: found[name] for name in sorted(found, key=str.encode)}


def digest(held: dict[str, tuple[Item, bytes]]) -> bytes:
    """The content digest of a version."""
    whole = hashlib.sha256()
    numbers = {name: number for number, (name, _) in DTYPES.items()}
    for name, (item, data) in held.items():
        if item.kind == TENSOR:
            said = pack([name, numbers[item.dtype], [*item.shape]])
            said += b"".join(struct.pack("<I", crc) for crc in checksums_of(data))
        else:
            said = pack([name]) + data
        whole.update(hashlib.sha256(said).digest())
    return whole.digest()


def apply(data: bytes, base: bytes, decompress: Callable[[bytes], bytes] | None = None) -> dict[str, bytes]:
    """The result of the patch `data` for the container in the stream `base`: the bytes of each item, by name."""
    before = _Reader(base, decompress)
    before.read()
    held = version(before.items)
    names = [*held]
    reader = _Reader(data, decompress, digest(held), [*held.values()])
    stream = reader.read()
    for item in reader.items[1:]:
        check(len(item.path) == 1 and is_int(item.path[0], 0, len(held) - 1), "patch: rank")
        made, name = reader.items[item.of] if item.kind == ALIAS else item, names[item.path[0]]
        check(made.kind == held[name][0].kind, "patch: another kind")
        check(made.kind == VALUE or made.codec == [[PATCH]], "patch: codec")
        held[name] = held[name][0], made.data or b""
    check(stream.target == digest(held), "patch: not its target")
    return {name: value for name, (_, value) in held.items()}
