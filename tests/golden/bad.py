"""Streams that must be refused, one for each kind of refusal, put together by hand with every other check satisfied.

`BAD` maps a name to the error that the library must raise, words of its message, and the recipe.
"""

import struct
from collections.abc import Callable
from typing import Any

from frames import BUNDLE, DATA, INDEX, ITEM, STREAM, Frame, assemble, cut, end, preamble
from msgpack import packb
from reference import crc32c

__all__ = ["BAD"]

Layout = Callable[..., bytes]

BAD: dict[str, tuple[str, str, Callable[..., bytes]]] = {}

TENSOR, VALUE, FILE, ALIAS, DICT, LIST, TUPLE = range(1, 8)
RAW, FP16, BF16, INT8, LINEAR, NF4, FP4, PLANES, PATCH, SPARSE, LOWRANK = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
ZSTD, ENTROPY = 64, 65
BOOL, UINT8, INT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = 1, 2, 9, 16, 17, 18, 19
START = Frame(STREAM, packb({"align": 1}))


def item(number: int, kind: int, path: list, **fields: Any) -> Frame:
    return items(number, [{"kind": kind, **fields}], [[0, *path]])


def items(number: int, forms: Any, rows: Any) -> Frame:
    return Frame(ITEM, packb({"forms": forms, "items": rows}), number)


def bare(path: bytes) -> Frame:
    """A dict item whose row, of a form number and keys, is spelled like this."""
    return Frame(ITEM, b"\x82\xa5forms\x91\x81\xa4kind\x05\xa5items\x91" + path, 1)


def tensor(number: int, path: list, shape: Any = (3,), dtype: Any = UINT8, codec: Any = ((RAW,),)) -> Frame:
    return item(number, TENSOR, path, dtype=dtype, shape=shape, codec=codec)


def data(number: int, payload: bytes, count: int | None = None, start: int = 0) -> Frame:
    return Frame(DATA, payload, number, start, len(payload) if count is None else count)


def bundle(first: int, payloads: list[bytes], lengths: list[int] | None = None) -> Frame:
    table = [len(payload) for payload in payloads] if lengths is None else lengths
    packed = struct.pack(f"<{len(table)}I", *table) + b"".join(payloads)
    return Frame(BUNDLE, packed, first, 0, len(payloads))


def bad(name: str, error: str, says: str, stream: Any) -> None:
    """`stream`: bytes, or the frames of one, or a function that gives either from a way to lay out frames.

    The recipe makes the vector, or, given `frames.at_rest` for a layout, a file with an index that has the same flaw.
    """

    def recipe(layout: Layout = assemble) -> bytes:
        made = stream(layout) if callable(stream) else stream
        return made if isinstance(made, bytes) else layout(made)

    BAD[name] = (error, says, recipe)


TENSOR_FORM = {"kind": TENSOR, "dtype": UINT8, "shape": [3], "codec": [[RAW]]}
ROOT = item(0, DICT, [])
ITEM_A, DATA_A = tensor(1, ["a"]), data(1, b"abc")
GOOD = (START, ROOT, ITEM_A, DATA_A, end())


def patched(at: int, value: bytes, layout: Layout = assemble) -> bytes:
    """A good stream with bytes replaced and no checksum mended."""
    stream = layout(GOOD)
    return stream[:at] + value + stream[at + len(value) :]


# -------------------------------------------------------------------------------------------------- Preamble
bad("empty", "TruncatedError", "ended", b"")
bad("magic", "FormatError", "magic", lambda layout: layout(GOOD, head=preamble(magic=b"\x93TWIX\r\n\x1a")))
bad("magic-big-endian", "UnsupportedError", "big-endian", lambda _: preamble(magic=b"\x1a\n\rRIWT\x93"))
bad("zip", "FormatError", "magic", b"PK\x03\x04" + bytes(30))
bad("text-mode", "FormatError", "magic", lambda layout: layout(GOOD).replace(b"\r\n", b"\n"))
bad("junk-before", "FormatError", "magic", lambda layout: b"\n" + layout(GOOD))
bad("major", "UnsupportedError", "version 2.0", lambda layout: layout(GOOD, head=preamble(major=2)))
bad("critical-feature", "UnsupportedError", "critical", lambda layout: layout(GOOD, head=preamble(flags=0x0080)))
bad("preamble-crc", "CorruptError", "preamble", lambda layout: patched(9, b"\x01", layout))

# ----------------------------------------------------------------------------------------------------- Header
bad("header-crc", "CorruptError", "header checksum", lambda layout: patched(16 + 8, b"\x09", layout))
for number in (1, 2):
    broken = START.having(**{f"reserved{number}": 1})
    bad(f"header-reserved-{number}", "FormatError", "reserved", (broken,))
bad("frame-type-0", "UnsupportedError", "frame type 0", (START, Frame(0)))
bad("frame-type-127", "UnsupportedError", "frame type 127", (START, Frame(127)))
bad("pad-outside-data", "FormatError", "must leave", (START, Frame(ITEM, ROOT.payload, padding=b"\0")))
bad("start-outside-data", "FormatError", "must leave", (START, ROOT.having(start=1)))
bad("count-outside-data", "FormatError", "must leave", (START, ROOT.having(count=1)))
bad("item-in-stream", "FormatError", "must leave", (START.having(item=1),))
bad("item-in-skippable", "FormatError", "must leave", (START, Frame(0x90, item=1)))
bad("sequence-gap", "SequenceError", "expected frame 1", (START, ROOT.having(sequence=2)))
bad("sequence-repeat", "SequenceError", "expected frame 1", (START, ROOT.having(sequence=0)))
bad("link", "SequenceError", "spliced", (START, ROOT.having(link=0)))
bad("payload-crc", "CorruptError", "payload checksum", (START, ROOT, ITEM_A, DATA_A.having(payload_crc=1)))
bad("payload-crc-item", "CorruptError", "payload checksum", (START, ROOT.having(payload_crc=1)))
bad(
    "payload-crc-skipped",
    "CorruptError",
    "payload checksum",
    (START, Frame(0x90, b"?").having(payload_crc=1)),
)
bad("length-metadata", "LimitError", "metadata", (START.having(length=(64 << 20) + 1),))
bad("length-descriptor", "LimitError", "descriptor", (START, ROOT.having(length=(64 << 10) + 1)))
bad("length-skippable", "LimitError", "skippable", (START, Frame(0x90).having(length=(64 << 20) + 1)))
for exponent in (63, 64):
    frame = ROOT.having(length=(1 << exponent) - 1)
    bad(f"length-2-{exponent}", "LimitError", "stream", (START, frame))

# ------------------------------------------------------------------------------------------------------ Order
bad("no-stream-frame", "SequenceError", "ITEM frame cannot", (ROOT,))
bad("no-frame", "SequenceError", "END frame cannot", (end(),))
bad("skippable-first", "SequenceError", "cannot come", (Frame(0x90), START))
bad("stream-frame-twice", "SequenceError", "STREAM frame cannot", (START, START))
bad("data-first", "SequenceError", "without an item", (START, data(0, b"a")))
bad("data-of-container", "SequenceError", "without an item", (START, ROOT, data(0, b"a")))
bad(
    "item-within-item",
    "SequenceError",
    "ITEM frame cannot",
    (START, ROOT, ITEM_A, data(1, b"a"), tensor(2, ["b"])),
)
bad("end-within-item", "SequenceError", "END frame cannot", (START, ROOT, ITEM_A, data(1, b"a"), end()))
bad("end-before-data", "SequenceError", "before the data", (START, ROOT, ITEM_A, end()))
bad("end-without-items", "SequenceError", "root", (START, end()))
bad("end-missing", "TruncatedError", "ended", lambda layout: layout(GOOD)[:-112])
bad("end-twice", "FormatError", "after the end", (*GOOD, end()))
bad("after-end", "FormatError", "after the end", lambda layout: layout(GOOD) + b"\0")
bad("two-streams", "FormatError", "after the end", lambda layout: layout(GOOD) * 2)
bad("item-number", "SequenceError", "expected item 1", (START, ROOT, tensor(2, ["a"])))
bad(
    "data-item",
    "SequenceError",
    "expected data of item 1",
    (START, ROOT, ITEM_A, tensor(2, ["b"]), data(2, b"abc")),
)
bad(
    "slice-gap",
    "SequenceError",
    "expected element 1",
    (START, ROOT, ITEM_A, data(1, b"a"), data(1, b"c", 1, 2)),
)
bad(
    "slice-overlap",
    "SequenceError",
    "expected element 2",
    (START, ROOT, ITEM_A, data(1, b"ab"), data(1, b"bc", 2, 1)),
)
bad("slice-empty", "FormatError", "empty", (START, ROOT, ITEM_A, data(1, b"")))
bad("slice-without-bytes", "FormatError", "empty", (START, ROOT, ITEM_A, data(1, b"", 3)))
bad("slice-beyond", "FormatError", "beyond", (START, ROOT, ITEM_A, data(1, b"abcd")))
bad("slice-wraps", "FormatError", "beyond", (START, ROOT, ITEM_A, data(1, b"abc", (1 << 64) - 1)))


def aligned(pad: bytes, layout: Layout) -> bytes:
    return layout((Frame(STREAM, packb({"align": 64})), ROOT, ITEM_A, Frame(DATA, b"abc", 1, 0, 3, pad)), align=64)


bad("pad-missing", "FormatError", "padding is 0", lambda layout: aligned(b"", layout))
bad("pad-too-long", "FormatError", "padding is 113", lambda layout: aligned(bytes(113), layout))
bad(
    "pad-unaligned-stream",
    "FormatError",
    "padding is 1,",
    (START, ROOT, ITEM_A, Frame(DATA, b"abc", 1, 0, 3, b"\0")),
)
bad("pad-not-zero", "FormatError", "not zero", lambda layout: aligned(bytes(29) + b"\1", layout))

# ----------------------------------------------------------------------------------------------- STREAM payload
for name, says, payload in (
    ("not-msgpack", "not msgpack", b"\xc1"),
    ("cut", "not msgpack", b"\x81\xa5al"),
    ("two-objects", "not msgpack", b"\x81\xa5align\x01\xc0"),
    ("not-a-map", "must be a map", packb(["align", 1])),
    ("without-align", "keys", packb({})),
    ("key-order", "keys", packb({"id": b"i", "align": 1})),
    ("wide-integer", "canonical", b"\x81\xa5align\xcc\x01"),
    ("wide-text", "canonical", b"\x81\xd9\x05align\x01"),
    ("wide-map", "canonical", b"\xde\x00\x01\xa5align\x01"),
    ("key-twice", "canonical", b"\x82\xa5align\x01\xa5align\x01"),
    ("align-2", "alignment", packb({"align": 2})),
    ("align-true", "alignment", packb({"align": True})),
    ("id-empty", "1 to 64 bytes", packb({"align": 1, "id": b""})),
    ("id-long", "64 bytes", packb({"align": 1, "id": bytes(65)})),
    ("id-text", "64 bytes", packb({"align": 1, "id": "i"})),
    ("base-31", "32 bytes", packb({"align": 1, "base": bytes(31)})),
    ("base-empty", "32 bytes", packb({"align": 1, "base": b""})),
    ("base-text", "32 bytes", packb({"align": 1, "base": "b" * 32})),
    ("target-33", "32 bytes", packb({"align": 1, "target": bytes(33)})),
    ("target-before-base", "keys", packb({"align": 1, "target": bytes(32), "base": bytes(32)})),
    ("metadata-before-target", "keys", packb({"align": 1, "metadata": {"a": ""}, "target": bytes(32)})),
    ("metadata-empty", "non-empty", packb({"align": 1, "metadata": {}})),
    ("metadata-unsorted", "sorted", packb({"align": 1, "metadata": {"b": "", "a": ""}})),
    ("metadata-number", "text to text", packb({"align": 1, "metadata": {"a": 1}})),
):
    bad(f"stream-{name}", "FormatError", says, (Frame(STREAM, payload),))
for name, key in (
    ("", "zone"),
    ("-case", "Align"),
    ("-bytes", b"align"),
    ("-number", 1),
):  # what a later version may add
    frame = Frame(STREAM, packb({"align": 1, key: 1}))
    bad(f"stream-unknown-key{name}", "UnsupportedError", f"key {key!r}", (frame,))
AGAINST = Frame(STREAM, packb({"align": 1, "base": bytes(range(32))}))
bad("stream-base", "SchemaError", "against version 000102", (AGAINST, *GOOD[1:]))

# ----------------------------------------------------------------------------------------------------- Bundles
TWO = items(1, [TENSOR_FORM], [[0, "a"], [0, "b"]])
PAIR = bundle(1, [b"abc", b"def"])
for name, error, says, frames in (
    ("first", "SequenceError", "without an item", (bundle(0, [b"a", b"b"]),)),
    ("of-another", "SequenceError", "expected data of item 1", (TWO, bundle(2, [b"abc", b"def"]))),
    ("of-a-container", "SequenceError", "expected data of item 1", (TWO, bundle(0, [b"abc", b"def"]))),
    ("of-too-many", "SequenceError", "2 are still to come", (TWO, bundle(1, [b"abc"] * 3))),
    ("within-item", "SequenceError", "BUNDLE frame cannot", (TWO, data(1, b"a"), bundle(1, [b"bc", b"def"]))),
    ("twice", "SequenceError", "without an item", (TWO, PAIR, PAIR)),
    ("of-none", "FormatError", "bundle of 0 items", (TWO, bundle(1, []))),
    ("of-one", "FormatError", "bundle of 1 item", (TWO, bundle(1, [b"abc"]))),
    ("of-65", "FormatError", "bundle of 65 items", (TWO, bundle(1, [b"abc"] * 65))),
    ("of-2-64", "FormatError", "a bundle of", (TWO, PAIR.having(count=(1 << 64) - 1))),
    ("with-start", "FormatError", "must leave", (TWO, PAIR.having(start=1))),
    ("with-padding", "FormatError", "must leave", (TWO, Frame(BUNDLE, PAIR.payload, 1, 0, 2, b"\0"))),
    ("empty", "FormatError", "empty bundle", (TWO, bundle(1, [b"", b""]))),
    ("cut", "FormatError", "empty bundle", (TWO, Frame(BUNDLE, b"\3\0\0\0", 1, 0, 2))),
    ("with-nothing-for-one", "FormatError", "do not match its table", (TWO, bundle(1, [b"abcdef", b""]))),
    ("table-less", "FormatError", "do not match its table", (TWO, bundle(1, [b"abc", b"def"], [3, 2]))),
    ("table-more", "FormatError", "do not match its table", (TWO, bundle(1, [b"abc", b"def"], [3, 4]))),
    ("table-wraps", "FormatError", "do not match its table", (TWO, bundle(1, [b"abc", b"def"], [7, 0xFFFFFFFF]))),
    ("other-lengths", "FormatError", "must have 3", (TWO, bundle(1, [b"abcd", b"ef"]))),
    ("crc", "CorruptError", "payload checksum", (TWO, PAIR.having(payload_crc=1))),
    ("length", "LimitError", "frame", (TWO, PAIR.having(length=(64 << 20) + 1))),
    (
        "of-bools",
        "FormatError",
        "bool",
        (items(1, [{**TENSOR_FORM, "dtype": BOOL}], [[0, "a"], [0, "b"]]), bundle(1, [b"\0\0\0", b"\0\1\2"])),
    ),
    (
        "of-values",
        "FormatError",
        "msgpack",
        (items(1, [{"kind": VALUE, "size": 1}], [[0, "a"], [0, "b"]]), bundle(1, [b"\1", b"\xc1"])),
    ),
):
    bad(f"bundle-{name}", error, says, (START, ROOT, *frames, end()))

# ------------------------------------------------------------------------------------------------- ITEM payload
for name, error, says, frame in (
    ("not-a-map", "FormatError", "must be a map", Frame(ITEM, packb([1]), 1)),
    (
        "canonical",
        "FormatError",
        "canonical",
        Frame(ITEM, b"\x82\xa5forms\x91\x81\xa4kind\xcc\x07\xa5items\x91\x92\x00\xa1a", 1),
    ),
    ("empty", "FormatError", "not msgpack", Frame(ITEM, b"", 1)),
    ("without-forms", "FormatError", "wrong keys", Frame(ITEM, packb({"items": [[0, "a"]]}), 1)),
    (
        "items-before-forms",
        "FormatError",
        "wrong keys",
        Frame(ITEM, packb({"items": [[0, "a"]], "forms": [{"kind": DICT}]}), 1),
    ),
    ("unknown-key", "UnsupportedError", "key 'notes'", Frame(ITEM, packb({"forms": [], "items": [], "notes": 1}), 1)),
    ("none", "FormatError", "one item at least", items(1, [], [])),
    ("forms-a-map", "FormatError", "must be arrays", items(1, {}, [[0, "a"]])),
    ("items-a-map", "FormatError", "must be arrays", items(1, [{"kind": DICT}], {})),
    ("form-a-number", "FormatError", "must be a map", items(1, [5], [[0, "a"]])),
    ("row-a-map", "FormatError", "must be an array", items(1, [{"kind": DICT}], [{"a": 0}])),
    ("row-empty", "FormatError", "must be an array", items(1, [{"kind": DICT}], [[]])),
    ("row-nil", "FormatError", "must be a number", items(1, [{"kind": DICT}], [[None, "a"]])),
    ("row-of-text", "FormatError", "forms are not", items(1, [{"kind": DICT}], [["a"]])),
    ("form-beyond", "FormatError", "forms are not", items(1, [{"kind": DICT}], [[1, "a"]])),
    ("form-negative", "FormatError", "forms are not", items(1, [{"kind": DICT}], [[-1, "a"]])),
    ("form-unused", "FormatError", "forms are not", items(1, [{"kind": DICT}, {"kind": LIST}], [[0, "a"]])),
    ("form-order", "FormatError", "forms are not", items(1, [{"kind": DICT}, {"kind": LIST}], [[1, "a"], [0, "b"]])),
    ("form-twice", "FormatError", "twice", items(1, [{"kind": DICT}, {"kind": DICT}], [[0, "a"], [1, "b"]])),
    ("second-key-bool", "FormatError", "key must", items(1, [{"kind": DICT}], [[0, "a"], [0, True]])),
    ("kind-9-second", "UnsupportedError", "kind 9", items(1, [{"kind": DICT}, {"kind": 9}], [[0, "a"], [1, "b"]])),
    ("without-kind", "FormatError", "without a kind", items(1, [{}], [[0, "a"]])),
    ("kind-0", "UnsupportedError", "kind 0", item(1, 0, ["a"])),
    ("kind-8", "UnsupportedError", "kind 8", item(1, 8, ["a"])),
    ("kind-true", "FormatError", "without a kind", item(1, True, ["a"])),
    ("keys-missing", "FormatError", "wrong keys", item(1, VALUE, ["a"])),
    ("keys-of-another", "UnsupportedError", "key 'size'", item(1, DICT, ["a"], size=1)),
    ("keys-order", "FormatError", "wrong keys", items(1, [{"size": 1, "kind": VALUE}], [[0, "a"]])),
    ("path-text", "FormatError", "array", items(1, [{"kind": DICT}], ["a"])),
    ("path-33", "LimitError", "nesting", item(1, DICT, ["a"] * 33)),
    ("name-1025", "LimitError", "name", item(1, DICT, ["a" * 1025])),
    ("name-1025-bytes", "LimitError", "name", item(1, DICT, ["ä" * 512 + "a"])),
    ("name-newline", "FormatError", "control", item(1, DICT, ["a\n"])),
    ("name-escape", "FormatError", "control", item(1, DICT, ["\x1b[2J"])),
    ("name-c1", "FormatError", "control", item(1, DICT, ["\x85"])),
    ("name-bidi", "FormatError", "control", item(1, DICT, ["a\u202egpj"])),
    ("name-isolate", "FormatError", "control", item(1, DICT, ["\u2066"])),
    ("name-arabic-mark", "FormatError", "control", item(1, DICT, ["a\u061c"])),
    ("name-left-mark", "FormatError", "control", item(1, DICT, ["\u200ea"])),
    ("name-right-mark", "FormatError", "control", item(1, DICT, ["a\u200fb"])),
    ("name-not-utf-8", "FormatError", "not msgpack", bare(b"\x92\x00\xa1\xff")),
    (
        "name-overlong",
        "FormatError",
        "not msgpack",
        bare(b"\x92\x00\xa2\xc0\x80"),
    ),
    (
        "name-surrogate",
        "FormatError",
        "not msgpack",
        bare(b"\x92\x00\xa3\xed\xa0\x80"),
    ),
    ("key-float", "FormatError", "key must", item(1, DICT, [1.0])),
    ("key-nan", "FormatError", "key must", item(1, DICT, [float("nan")])),
    ("key-bool", "FormatError", "key must", item(1, DICT, [True])),
    ("key-nil", "FormatError", "key must", item(1, DICT, [None])),
    ("key-bytes", "FormatError", "key must", item(1, DICT, [b"a"])),
    ("key-2-53", "FormatError", "key must", item(1, DICT, [2**53 + 1])),
    ("dtype-0", "UnsupportedError", "dtype number 0", tensor(1, ["a"], dtype=0)),
    ("dtype-99", "UnsupportedError", "dtype number 99", tensor(1, ["a"], dtype=99)),
    ("dtype-text", "FormatError", "dtype must", tensor(1, ["a"], dtype="float32")),
    ("shape-number", "FormatError", "shape", tensor(1, ["a"], 3)),
    ("shape-negative", "FormatError", "shape", tensor(1, ["a"], [-1])),
    ("shape-float", "FormatError", "shape", tensor(1, ["a"], [3.0])),
    ("shape-65", "LimitError", "ndim", tensor(1, ["a"], [1] * 65)),
    ("shape-too-large", "LimitError", "item", tensor(1, ["a"], [(256 << 30) + 1])),
    ("shape-wraps-to-3", "LimitError", "item", tensor(1, ["a"], [2**32, 2**32, 3])),
    ("shape-itemsize-wraps", "LimitError", "item", tensor(1, ["a"], [2**61], INT64)),
    ("shape-zero-and-huge", "LimitError", "item", tensor(1, ["a"], [2**62, 0], FLOAT32)),
    ("value-size", "LimitError", "value", item(1, VALUE, ["a"], size=(256 << 20) + 1)),
    ("value-size-0", "FormatError", "msgpack", item(1, VALUE, ["a"], size=0)),
    ("value-size-nil", "FormatError", "size", item(1, VALUE, ["a"], size=None)),
    ("value-size-negative", "FormatError", "size", item(1, VALUE, ["a"], size=-1)),
    ("alias-of-itself", "FormatError", "alias", item(1, ALIAS, ["a"], of=1)),
    ("alias-of-later", "FormatError", "alias", item(1, ALIAS, ["a"], of=2)),
    ("alias-of-container", "FormatError", "alias", item(1, ALIAS, ["a"], of=0)),
    ("alias-negative", "FormatError", "alias", item(1, ALIAS, ["a"], of=-1)),
    ("codec-none", "FormatError", "1 to 8 stages", tensor(1, ["a"], codec=[])),
    ("codec-9", "FormatError", "1 to 8 stages", tensor(1, ["a"], codec=[[RAW]] + [[ZSTD]] * 8)),
    ("codec-empty-stage", "FormatError", "stage", tensor(1, ["a"], codec=[[]])),
    ("codec-text", "FormatError", "stage", tensor(1, ["a"], codec=["raw"])),
    ("codec-0", "UnsupportedError", "codec id 0", tensor(1, ["a"], codec=[[0]])),
    ("codec-99", "UnsupportedError", "codec id 99", tensor(1, ["a"], codec=[[99]])),
    ("codec-private", "UnsupportedError", "codec id 65000 is private", tensor(1, ["a"], codec=[[65_000, 1]])),
    ("codec-zstd-first", "FormatError", "stages", tensor(1, ["a"], codec=[[ZSTD]])),
    ("codec-zstd-twice", "FormatError", "stages", tensor(1, ["a"], codec=[[RAW], [ZSTD], [ZSTD]])),
    ("codec-zstd-inside", "FormatError", "stages", tensor(1, ["a"], codec=[[RAW], [ZSTD], [RAW]])),
    (
        "codec-quantized-twice",
        "FormatError",
        "stages",
        tensor(1, ["a"], dtype=18, codec=[[INT8, 64], [INT8, 64]]),
    ),
    ("codec-raw-parameter", "FormatError", "parameters", tensor(1, ["a"], codec=[[RAW, 1]])),
    ("codec-int8-no-blocksize", "FormatError", "parameters", tensor(1, ["a"], dtype=FLOAT32, codec=[[INT8]])),
    (
        "codec-nf4-one-parameter",
        "FormatError",
        "parameters",
        tensor(1, ["a"], dtype=FLOAT32, codec=[[NF4, 64]]),
    ),
    (
        "codec-double-quant-2",
        "FormatError",
        "double_quant",
        tensor(1, ["a"], dtype=FLOAT32, codec=[[NF4, 64, 2]]),
    ),
    (
        "codec-nf4-of-int64",
        "FormatError",
        "cannot carry",
        tensor(1, ["a"], dtype=INT64, codec=[[NF4, 64, 0]]),
    ),
    ("codec-fp16-of-float64", "FormatError", "cannot carry", tensor(1, ["a"], dtype=FLOAT64, codec=[[FP16]])),
    ("codec-bf16-of-float16", "FormatError", "cannot carry", tensor(1, ["a"], dtype=FLOAT16, codec=[[BF16]])),
    ("codec-int8-of-file", "FormatError", "cannot carry", item(1, FILE, ["a"], size=3, codec=[[INT8, 64]])),
):
    bad(f"item-{name}", error, says, (START, ROOT, frame))
for blocksize in (0, 1, 8, 63, 131072, 2**31, 2**64 - 1):
    frame = tensor(1, ["a"], dtype=FLOAT32, codec=[[LINEAR, blocksize]])
    bad(f"item-blocksize-{blocksize}", "FormatError", "blocksize", (START, ROOT, frame))
for blocksize in (16, 8192):
    frame = tensor(1, ["a"], dtype=FLOAT32, codec=[[FP4, blocksize, 0]])
    bad(f"item-blocksize-fp4-{blocksize}", "FormatError", "blocksize", (START, ROOT, frame))

# --------------------------------------------------------------------------------------------- Tree and aliases
bad("root-twice", "FormatError", "root", (START, ROOT, item(1, DICT, [])))
bad("root-missing", "FormatError", "outside", (START, tensor(0, ["a"])))
bad("root-alias", "FormatError", "alias", (START, item(0, ALIAS, [], of=0)))
bad("parent-missing", "FormatError", "outside", (START, ROOT, tensor(1, ["a", "b"])))
bad("parent-no-container", "FormatError", "outside", (START, ROOT, ITEM_A, tensor(2, ["a", "b"])))
bad(
    "parent-closed", "FormatError", "outside",
    (START, ROOT, item(1, DICT, ["a"]), tensor(2, ["b"], [0]), tensor(3, ["a", "b"])),
)  # fmt: skip
bad("key-twice", "FormatError", "twice", (START, ROOT, ITEM_A, tensor(2, ["a"])))
bad(
    "key-twice-apart", "FormatError", "twice",
    (START, ROOT, item(1, DICT, ["a"]), tensor(2, ["a", "x"]), tensor(3, ["b"]), item(4, LIST, ["a"])),
)  # fmt: skip
bad("list-gap", "FormatError", "expected element 0", (START, item(0, LIST, []), tensor(1, [1])))
bad("list-negative", "FormatError", "expected element 0", (START, item(0, LIST, []), tensor(1, [-1])))
bad("list-text", "FormatError", "expected element 0", (START, item(0, LIST, []), tensor(1, ["0"])))
bad(
    "list-repeat",
    "FormatError",
    "expected element 1",
    (START, item(0, TUPLE, []), tensor(1, [0]), tensor(2, [0])),
)
bad(
    "alias-of-value",
    "FormatError",
    "alias",
    (START, ROOT, item(1, VALUE, ["v"], size=1), item(2, ALIAS, ["a"], of=1)),
)
bad(
    "alias-of-alias",
    "FormatError",
    "alias",
    (START, ROOT, ITEM_A, item(2, ALIAS, ["b"], of=1), item(3, ALIAS, ["c"], of=2)),
)
bad(
    "alias-of-empty",
    "FormatError",
    "alias",
    (START, ROOT, tensor(1, ["a"], [0]), item(2, ALIAS, ["b"], of=1)),
)
bad(
    "alias-of-later-in-its-frame",
    "FormatError",
    "alias",
    (START, ROOT, items(1, [{"kind": ALIAS, "of": 2}, TENSOR_FORM], [[0, "a"], [1, "b"]])),
)
bad("key-twice-in-a-frame", "FormatError", "twice", (START, ROOT, items(1, [TENSOR_FORM], [[0, "a"], [0, "a"]])))
bad("root-twice-in-a-frame", "FormatError", "root", (START, items(0, [{"kind": DICT}], [[0], [0]])))
bad("root-second-in-a-frame", "FormatError", "root", (START, items(0, [{"kind": DICT}], [[0], [0, "a"], [0]])))
bad(
    "parent-closed-in-a-frame", "FormatError", "outside",
    (START, ROOT, items(1, [{"kind": DICT}], [[0, "a"], [0, "b"], [0, "a", "c"]])),
)  # fmt: skip
bad("list-gap-in-a-frame", "FormatError", "element 1", (START, items(0, [{"kind": LIST}], [[0], [0, 0], [0, 2]])))
bad("item-number-in-a-frame", "SequenceError", "item 3", (START, ROOT, items(1, [TENSOR_FORM], [[0, "a"], [0, "b"]]),
    tensor(2, ["c"])))  # fmt: skip
bad("alias-too-late", "FormatError", "alias", (START, ROOT, ITEM_A, DATA_A, item(2, ALIAS, ["b"], of=1)))
bad(
    "alias-of-file", "FormatError", "alias",
    (START, ROOT, item(1, FILE, ["f"], size=3, codec=[[RAW]]), item(2, ALIAS, ["b"], of=1)),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- DATA payloads
def carried(payload: bytes, count: int, codec: list, dtype: int = FLOAT32, shape: int | None = None) -> tuple:
    described = tensor(1, ["a"], [count if shape is None else shape], dtype, codec)
    return (START, ROOT, described, data(1, payload, count), end())


def scales(*bits: int) -> bytes:
    return struct.pack(f"<{len(bits)}I", *bits)


ONE, MINUS_ZERO, MINUS_ONE, INFINITY, NAN = (
    0x3F800000,
    0x80000000,
    0xBF800000,
    0x7F800000,
    0x7FC00000,
)

for name, payload, count, codec, dtype in (
    ("raw-short", bytes(11), 3, [[RAW]], FLOAT32),
    ("raw-long", bytes(13), 3, [[RAW]], FLOAT32),
    ("fp16-short", bytes(5), 3, [[FP16]], FLOAT32),
    ("int8-short", bytes(4 + 16), 17, [[INT8, 16]], FLOAT32),
    ("int8-one-absmax-short", bytes(4 + 17), 17, [[INT8, 16]], FLOAT32),
    ("int8-one-absmax-long", bytes(12 + 17), 17, [[INT8, 16]], FLOAT32),
    ("linear-float32-scale", bytes(4 + 16), 16, [[LINEAR, 16]], FLOAT32),
    ("nf4-short", bytes(4 + 16), 33, [[NF4, 64, 0]], FLOAT32),
    ("nf4-double-without-offset", bytes(4 + 1 + 2), 3, [[NF4, 64, 1]], FLOAT32),
    ("fp4-long", bytes(4 + 3), 3, [[FP4, 64, 0]], FLOAT16),
):
    bad(f"data-{name}", "FormatError", "must have", carried(payload, count, codec, dtype))
bad("data-bool-2", "FormatError", "neither 0 nor 1", carried(b"\0\2\1", 3, [[RAW]], BOOL))
bad(
    "data-block-cut",
    "FormatError",
    "between blocks",
    carried(bytes(4 + 15), 15, [[INT8, 16]], FLOAT32, shape=17),
)
bad(
    "data-nested-block-cut",
    "FormatError",
    "between blocks",
    carried(bytes(9 + 32), 64, [[NF4, 64, 1]], FLOAT32, shape=65),
)
for name, bits in (("nan", NAN), ("infinite", INFINITY), ("negative", MINUS_ONE), ("minus-zero", MINUS_ZERO)):
    for codec_name, codec in (("int8", [[INT8, 16]]), ("fp4", [[FP4, 64, 0]])):
        codes = bytes(3) if codec_name == "int8" else bytes(2)
        bad(
            f"data-{codec_name}-absmax-{name}",
            "FormatError",
            "absmax",
            carried(scales(bits) + codes, 3, codec),
        )
    double = [[NF4, 64, 1]]
    bad(f"data-offset-{name}", "FormatError", "absmax", carried(scales(bits, ONE) + bytes(3), 3, double))
    bad(
        f"data-nested-absmax-{name}",
        "FormatError",
        "absmax",
        carried(scales(ONE, bits) + bytes(3), 3, double),
    )
    short = struct.pack("<H", bits >> 16)
    bad(f"data-scale-{name}", "FormatError", "scale", carried(short + bytes(3), 3, [[LINEAR, 16]]))
bad("data-code-minus-128", "FormatError", "-128", carried(b"\x80\x3f\0\x80\0", 3, [[LINEAR, 16]]))
bad("data-unused-half", "FormatError", "unused half", carried(scales(ONE) + b"\x12\x34", 3, [[NF4, 64, 0]]))
bad("data-fp16-absmax-nan", "FormatError", "absmax", carried(scales(NAN) + bytes(3), 3, [[INT8, 16]], FLOAT16))


# A zstd frame of uncompressed blocks: magic, descriptor, window, content size, blocks of a 3-byte head and bytes.
def zstd_frame(content: bytes, *, size: int | None = None, window: int | None = None, dictionary: bytes = b"") -> bytes:
    length = len(content) if size is None else size
    descriptor = 0x80 | (0x20 if window is None else 0) | len(dictionary)
    head = bytes([descriptor]) + (b"" if window is None else bytes([window])) + dictionary + struct.pack("<I", length)
    return b"\x28\xb5\x2f\xfd" + head + (len(content) << 3 | 1).to_bytes(3, "little") + content


ZRAW = [[RAW], [ZSTD]]
for name, says, payload in (
    ("garbage", "not a zstd frame", b"no zstandard"),
    ("cut-header", "zstd", zstd_frame(b"abc")[:5]),
    ("cut", "zstd", zstd_frame(b"abc")[:-1]),
    ("content-size-missing", "does not declare the size", b"\x28\xb5\x2f\xfd\x00\x58\x19\x00\x00abc"),
    ("content-size-more", "declares 4 bytes, expected 3", zstd_frame(b"abcd")),
    ("content-size-less", "declares 2 bytes, expected 3", zstd_frame(b"ab")),
    ("content-size-lies-up", "zstd", zstd_frame(b"ab", size=3)),
    ("content-size-lies-down", "zstd", zstd_frame(b"abcd", size=3)),
    (
        "content-size-1-tib",
        "declares 1099511627776 bytes, expected 3",
        b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\x19\0\0abc",
    ),
    ("dictionary", "needs dictionary", zstd_frame(b"abc", dictionary=b"\x07")),
    ("window-16-mib", "window of 16777216 bytes, more than 8388608", zstd_frame(b"abc", window=(24 - 10) << 3)),
    ("two-frames", "zstd", zstd_frame(b"abc") + zstd_frame(b"")),
    ("garbage-behind", "zstd", zstd_frame(b"abc") + b"\0"),
    ("skippable-before", "not a zstd frame", b"\x50\x2a\x4d\x18\0\0\0\0" + zstd_frame(b"abc")),
    ("skippable-behind", "zstd", zstd_frame(b"abc") + b"\x50\x2a\x4d\x18\0\0\0\0"),
    ("reserved-block", "zstd", zstd_frame(b"abc").replace(b"\x19\0\0abc", b"\x1f\0\0abc")),
    ("checksum", "zstd", zstd_frame(b"abc").replace(b"\xfd\xa0", b"\xfd\xa4") + b"\0\0\0\0"),
    ("longer-than-compressors-make", "at most", zstd_frame(b"") * 8),
):
    bad(f"zstd-{name}", "FormatError", says, carried(payload, 3, ZRAW, UINT8))
# Blocks larger than RFC 8878 has them, which libzstd takes: over 128 KiB, and over the window.
LONG_RUN = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 200_000) + (200_000 << 3 | 3).to_bytes(3, "little") + b"x"
bad("zstd-block-over-128-kib", "FormatError", "zstd block", carried(LONG_RUN, 200_000, ZRAW, UINT8))
WIDE = zstd_frame(bytes(1025), window=0)  # of 1 KiB
bad("zstd-block-over-window", "FormatError", "zstd block", carried(WIDE, 1025, ZRAW, UINT8))
# 2^31 bytes out of a run-length block: refused by what it declares, before anything is unpacked.
BOMB = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 31) + b"\x0b\0\x10\0"
bad("zstd-bomb", "LimitError", "frame", carried(BOMB, 1 << 31, ZRAW, UINT8))
bad(
    "zstd-inside",
    "FormatError",
    "unused half",
    carried(zstd_frame(scales(ONE) + b"\x12\x34"), 3, [[NF4, 64, 0], [ZSTD]]),
)

# 200 float32: 4 blocks of 64, the last of 8. Planes of 200 bytes: three raw or constant, then the last.
SAME = b"\x01\x07"
HUFFMAN = b"\0" + SAME * 3 + b"\x02"
ZEROS = [bytes(7)] * 4  # four streams of 50 codes of one bit


def huffman(lengths: bytes, streams: list[bytes], *, cut: int = 0) -> bytes:
    codes = lengths + struct.pack("<4H", *map(len, streams[:4])) + b"".join(streams)
    codes = codes[: len(codes) - cut]
    return HUFFMAN + struct.pack("<I", len(codes)) + codes


for name, says, payload in (
    ("first-byte-3", "the form of a slice is 3", b"\x03" + SAME * 4),
    ("mode-4", "mode of a plane is 4", b"\0" + SAME * 3 + b"\x04\x07"),
    ("cut", "ends too early", b"\0" + SAME * 3),
    ("raw-cut", "ends too early", b"\0" + SAME * 3 + b"\0" + bytes(199)),
    ("behind", "1 byte after its end", b"\0" + SAME * 4 + b"\0"),
    ("behind-nothing", "1 byte after its end", b"\x02\0"),
    ("marks-none", "0 of 4 blocks", b"\x01\0" + SAME * 4),
    ("marks-all", "4 of 4 blocks", b"\x01\x0f" + SAME * 4),
    ("marks-beyond", "blocks of a slice", b"\x01\x11" + SAME * 4),
    ("marks-cut", "ends too early", b"\x01"),
    ("raw-of-unmarked", "64 bytes after its end", b"\x01\x05" + SAME * 3 + b"\0" + bytes(192)),
    ("frame-saves-nothing", "saves nothing", b"\0" + SAME * 3 + b"\x03" + struct.pack("<I", 196) + bytes(196)),
    ("frame-cut", "ends too early", b"\0" + SAME * 3 + b"\x03" + struct.pack("<I", 100) + bytes(99)),
    ("frame-garbage", "not a zstd frame", b"\0" + SAME * 3 + b"\x03" + struct.pack("<I", 4) + b"zstd"),
    (
        "frame-short",
        "expected 200",
        b"\0" + SAME * 3 + b"\x03" + struct.pack("<I", 15) + zstd_frame(b"abc"),
    ),
    ("huffman-empty", "not valid Huffman codes", HUFFMAN + struct.pack("<I", 0)),
    ("huffman-one-code", "not valid Huffman codes", huffman(b"\x05\x05\x01", ZEROS)),
    ("huffman-incomplete", "not valid Huffman codes", huffman(b"\x05\x06\x21", ZEROS)),
    ("huffman-too-many", "not valid Huffman codes", huffman(b"\x05\x07\x11\x01", ZEROS)),
    ("huffman-length-12", "not valid Huffman codes", huffman(b"\x05\x06\xc1", ZEROS)),
    ("huffman-unused-half", "not valid Huffman codes", huffman(b"\x05\x07\x21\x12", ZEROS)),
    ("huffman-first-without-code", "not valid Huffman codes", huffman(b"\x05\x07\x10\x01", ZEROS)),
    ("huffman-stream-short", "not valid Huffman codes", huffman(b"\x05\x06\x11", [*ZEROS[:3], bytes(6)])),
    ("huffman-stream-long", "not valid Huffman codes", huffman(b"\x05\x06\x11", [*ZEROS[:3], bytes(8)])),
    ("huffman-bits-behind", "not valid Huffman codes", huffman(b"\x05\x06\x11", [*ZEROS[:3], b"\0\0\0\0\0\0\x80"])),
    ("huffman-stream-cut", "not valid Huffman codes", huffman(b"\x05\x06\x11", ZEROS, cut=1)),
    ("huffman-behind", "not valid Huffman codes", huffman(b"\x05\x06\x11", [*ZEROS, b"\0"])),
    ("longer", "at most", bytes(2 + 4 * 201 + 1)),
):
    bad(f"planes-{name}", "FormatError", says, carried(payload, 200, [[PLANES]], FLOAT32))
# A frame that says 200 bytes, of 128 KiB that repeat: never unpacked.
RUN = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 200) + (131_072 << 3 | 3).to_bytes(3, "little") + b"x"
bomb = b"\0" + SAME * 3 + b"\x03" + struct.pack("<I", len(RUN)) + RUN
bad("planes-bomb", "FormatError", "zstd block", carried(bomb, 200, [[PLANES]], FLOAT32))
bad("planes-of-integers", "FormatError", "cannot carry", (START, ROOT, tensor(1, ["a"], [3], INT64, [[PLANES]])))
bad("planes-parameter", "FormatError", "0 parameters", (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [[PLANES, 1]])))
bad(
    "planes-inside-zstd",
    "FormatError",
    "mode of a plane",
    carried(zstd_frame(b"\0\x09"), 200, [[PLANES], [ZSTD]], FLOAT32),
)

# 128 elements of nf4: 2 absmax and 64 bytes of codes, 72 in all.
ABSMAX_PART = struct.pack("<IBBI", 8, 4, 0, 1) + b"\x02"
CODES_PART = struct.pack("<IBBI", 64, 1, 0x77, 1) + b"\x02"
for name, says, payload in (
    ("nine-parts", "more than 8", b"\x09" + (ABSMAX_PART + CODES_PART)),
    ("head-cut", "within the header of a part", b"\x02" + ABSMAX_PART + CODES_PART[:9]),
    ("part-cut", "ends after", b"\x02" + ABSMAX_PART + CODES_PART[:10]),
    ("part-of-nothing", "part of 0", b"\x02" + struct.pack("<IBBI", 0, 1, 0, 1) + b"\x02" + CODES_PART),
    ("width-3", "numbers of 3", b"\x02" + struct.pack("<IBBI", 9, 3, 0, 1) + b"\x02" + CODES_PART),
    ("broken-numbers", "numbers of 4", b"\x02" + struct.pack("<IBBI", 10, 4, 0, 1) + b"\x02" + CODES_PART),
    ("part-missing", "parts decode to 8 bytes, expected 72", b"\x01" + ABSMAX_PART),
    ("parts-beyond", "parts decode to 80 bytes, expected 72", b"\x03" + ABSMAX_PART * 2 + CODES_PART),
    ("part-of-4-gib", "parts decode to 4294967295", b"\x01" + struct.pack("<IBBI", 0xFFFFFFFF, 1, 0, 1) + b"\x02"),
    ("behind", "its parts take 23", b"\x02" + ABSMAX_PART + CODES_PART + b"\0"),
    ("saves-nothing", "decode to 72", b"\x01" + struct.pack("<IBBI", 72, 1, 0, 62) + bytes(62)),
    ("first-byte-of-planes", "the form of a slice", b"\x01" + struct.pack("<IBBI", 72, 1, 0, 1) + b"\x03"),
    ("bytes-behind-planes", "1 byte after its end", b"\x01" + struct.pack("<IBBI", 72, 1, 0, 2) + b"\x02\0"),
    ("whole-short", "gives 71 bytes", b"\0" + bytes(71)),
    ("absmax", "absmax", b"\x02" + struct.pack("<IBBI", 8, 1, 0xFF, 1) + b"\x02" + CODES_PART),
    ("longer", "at most", bytes(74)),
):
    bad(f"entropy-{name}", "FormatError", says, carried(payload, 128, [[NF4, 64, 0], [ENTROPY]]))
bad("entropy-parameter", "FormatError", "0 parameters", (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [[1], [65, 1]])))
bad("entropy-alone", "FormatError", "order", (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [[ENTROPY]])))


# Chunks of 16 elements, of which 2 are kept: 120 pairs, in 7 bits; or 7, in codes of Rice. Signs.
PAIRS = [[SPARSE, 2, 1, 0, 1, 16, 16, 0]]
SEVEN = [[SPARSE, 7, 1, 0, 1, 16, 16, 0]]
SCALED = [[SPARSE, 2, 1, 0, 1, 16, 16, 1]]
ONE = struct.pack("<f", 1)
# Positions 0 to 6 under the parameter 1, which is the best for 7 of 16: a 1 for the upper bits of 0, and a 0.
FIRST_SEVEN = (0b01010101010101).to_bytes(2, "little")
for name, says, stages, payload in (
    ("number", "no codes of 2 positions", PAIRS, ONE + b"\x79\0"),
    ("bit-behind-numbers", "no codes of 2 positions", PAIRS, ONE + b"\xf7\0"),
    ("bit-behind-values", "after the last value", PAIRS, ONE + b"\0\x04"),
    ("value-of-nothing", "nothing is kept", PAIRS, ONE + b"\x78\x01"),
    ("scale-of-nothing", "a scale that is not 1", SCALED, ONE + b"\x78\x01\0"),
    ("bit-behind-scales", "behind the last scale", SCALED, ONE + b"\0\x10\0"),
    ("scales-cut", "ends before 2 values", SCALED, ONE + b"\0"),
    ("cut", "ends before 2 values", PAIRS, ONE),
    ("without-positions", "0 bytes are no codes", PAIRS, ONE + b"\0"),
    ("longer", "at most 6", PAIRS, ONE + b"\0\0\0"),
    ("step-negative", "a step of values", PAIRS, struct.pack("<f", -0.0) + b"\0\0"),
    ("step-nan", "a step of values", PAIRS, struct.pack("<I", 0x7FC00000) + b"\0\0"),
    ("step-large", "a step of values", PAIRS, struct.pack("<f", 2.0**111) + b"\0\0"),
    ("rice-13", "no codes of 7", SEVEN, ONE + b"\x0d" + FIRST_SEVEN + b"\0"),
    ("position-16", "no codes of 7", SEVEN, ONE + b"\x03\x0c\0\0\0"),
    ("positions-cut", "no codes of 7", SEVEN, ONE + b"\x01" + FIRST_SEVEN[:1] + b"\0"),
    ("positions-none", "no codes of 7", SEVEN, ONE + b"\x01" + bytes(2) + b"\0"),
    ("positions-behind", "no codes of 7", SEVEN, ONE + b"\x01" + FIRST_SEVEN + b"\0\0"),
    ("nothing-late", "no codes of 7", SEVEN, ONE + b"\x01" + (0b01_01_1 << 8 | 1).to_bytes(2, "little") + b"\0"),
):
    bad(f"sparse-{name}", "FormatError", says, carried(payload, 16, stages, FLOAT32))
bad(
    "sparse-inside-zstd",
    "FormatError",
    "nothing is kept",
    carried(zstd_frame(ONE + b"\x78\x01"), 16, [*PAIRS, [ZSTD]], FLOAT32),
)
for name, says, codec in (
    ("k-0", "k of sparse", [SPARSE, 0, 1, 0, 1, 16, 16, 0]),
    ("bits-3", "bits of sparse", [SPARSE, 2, 3, 0, 1, 16, 16, 0]),
    ("dct-2", "dct of sparse", [SPARSE, 2, 1, 2, 1, 16, 16, 0]),
    ("rows-65", "rows of sparse", [SPARSE, 2, 1, 0, 65, 16, 16, 0]),
    ("chunk", "at most 4096", [SPARSE, 2, 1, 0, 64, 65, 65, 0]),
    ("dct-cols-65", "with dct", [SPARSE, 2, 1, 1, 1, 65, 65, 0]),
    ("cols-beyond-width", "no wider", [SPARSE, 2, 1, 0, 1, 16, 15, 0]),
    ("width-0", "width of sparse", [SPARSE, 2, 1, 0, 1, 16, 0, 0]),
    ("scaled-2", "scaled of sparse", [SPARSE, 2, 1, 0, 1, 16, 16, 2]),
    ("parameters", "7 parameters", [SPARSE, 2, 1, 0, 1, 16, 16]),
):
    bad(f"sparse-{name}", "FormatError", says, (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [codec])))
bad("sparse-of-float64", "FormatError", "cannot carry", (START, ROOT, tensor(1, ["a"], [3], FLOAT64, PAIRS)))
# 4 rows of 4 columns as one pair of factors, in signs: a step for each, 8 bits.
FACTORS = [[LOWRANK, 1, 1, 4]]
for name, says, payload in (
    ("short", "must have 9", ONE + ONE),
    ("long", "must have 9", ONE + ONE + bytes(2)),
    ("step-negative", "a step of values", ONE + struct.pack("<f", -1) + b"\0"),
    ("step-large", "a step of values", struct.pack("<f", 2.0**57) + ONE + b"\0"),
):
    bad(f"lowrank-{name}", "FormatError", says, carried(payload, 16, FACTORS, FLOAT32))
bad("lowrank-bit-behind", "FormatError", "after the last value", carried(ONE + ONE + b"\x80", 12, FACTORS, FLOAT32))
for name, says, codec in (
    ("rank-0", "rank of lowrank", [LOWRANK, 0, 1, 4]),
    ("rank-5", "more than the 4 columns", [LOWRANK, 5, 1, 4]),
    ("width-large", "width of lowrank", [LOWRANK, 1, 1, (1 << 17) + 1]),
):
    bad(f"lowrank-{name}", "FormatError", says, (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [codec])))
# 2^17 rows of 2^17 columns from 32 KiB.
many = (START, ROOT, tensor(1, ["a"], [1 << 17, 1 << 17], FLOAT32, [[LOWRANK, 1, 1, 1 << 17]]))
bad("lowrank-bomb", "LimitError", "frame", (*many, data(1, ONE + ONE + bytes(32768), 1 << 34)))
# 200 bfloat16 in a patch: a checksum of what is made, and of the base, which nobody here holds.
MADE = struct.pack("<I", crc32c(bytes(400)))
for name, error, says, payload in (
    ("first-byte-5", "FormatError", "first byte of a patch", b"\x05" + MADE),
    ("cut", "FormatError", "belong to its checksums", b"\0" + MADE[:3]),
    ("unchanged-longer", "FormatError", "belong to its checksums", b"\x04" + MADE + b"\0"),
    ("without-base", "SchemaError", "against", b"\x03" + struct.pack("<I", 1) + MADE * 2 + bytes(8)),
    ("unchanged-without-base", "SchemaError", "against", b"\x04" + struct.pack("<I", 0xBADBA5E)),
    ("of-no-change", "FormatError", "0 of 200 numbers", b"\x01" + bytes(4) + MADE * 2 + b"\x02"),
    ("of-more-than-all", "FormatError", "201 of 200 numbers", b"\x01" + struct.pack("<I", 201) + MADE * 2 + b"\x02"),
    ("makes-another", "FormatError", "does not have the checksums", b"\0" + struct.pack("<I", 0xBADBA5E) + b"\x02"),
    ("planes-behind", "FormatError", "1 byte after its end", b"\0" + MADE + b"\x02\0"),
    ("longer", "FormatError", "at most", bytes(5 + 8 + 1 + 1 + 2 * 201 + 1)),
):
    bad(f"patch-{name}", error, says, carried(payload, 200, [[PATCH]], BFLOAT16))
bad("patch-parameter", "FormatError", "0 parameters", (START, ROOT, tensor(1, ["a"], [3], FLOAT32, [[PATCH, 1]])))


# --------------------------------------------------------------------------------------------------------- Values
def value(payload: bytes) -> tuple:
    return (START, ROOT, item(1, VALUE, ["v"], size=len(payload)), data(1, payload), end())


for name, error, says, payload in (
    ("not-msgpack", "FormatError", "msgpack", b"\xc1"),
    ("cut", "FormatError", "msgpack", b"\x92\x01"),
    ("two-objects", "FormatError", "msgpack", b"\xc0\xc0"),
    ("float32", "FormatError", "canonical", b"\xca\x3f\x80\0\0"),
    ("wide-integer", "FormatError", "canonical", b"\xd1\0\x01"),
    ("signed-positive", "FormatError", "canonical", b"\xd2\x7f\xff\xff\xff"),
    ("wide-bytes", "FormatError", "canonical", b"\xc5\0\x01a"),
    ("not-utf-8", "FormatError", "msgpack", b"\xa1\xff"),
    ("extension-2", "UnsupportedError", "extension", b"\xd4\x02\x90"),
    ("extension-timestamp", "UnsupportedError", "Timestamp", b"\xd6\xff\0\0\0\0"),
    ("tuple-of-map", "FormatError", "not an array", b"\xd4\x01\x80"),
    ("tuple-with-more", "FormatError", "msgpack", b"\xd5\x01\x90\xc0"),
    ("tuple-wide", "FormatError", "canonical", b"\xc7\x01\x01\x90"),
    ("key-twice", "FormatError", "twice", b"\x82\xa1a\x01\xa1a\x02"),
    ("key-bool", "FormatError", "key", b"\x81\xc3\x01"),
    ("key-float", "FormatError", "key", packb({1.0: 1})),
    ("key-bytes", "FormatError", "key", packb({b"a": 1})),
    ("key-2-53", "FormatError", "key", packb({-(2**53) - 1: 1})),
    ("nested-33", "LimitError", "nesting", b"\x91" * 33 + b"\xc0"),
    ("nested-1000", "LimitError", "nesting", b"\x91" * 1000 + b"\xc0"),
    ("array-claims-4-gi", "FormatError", "msgpack", b"\xdd\xff\xff\xff\xff"),
    ("text-claims-4-gib", "FormatError", "msgpack", b"\xdb\xff\xff\xff\xff"),
):
    bad(f"value-{name}", error, says, value(payload))

# --------------------------------------------------------------------------------------------------- END and INDEX
BEFORE = GOOD[:-1]
bad("end-items", "FormatError", "items=3", (*BEFORE, end(items=3)))
bad("end-frames", "FormatError", "frames=9", (*BEFORE, end(frames=9)))
bad("end-size", "FormatError", "size=1", (*BEFORE, end(size=1)))
bad("end-index", "FormatError", "index_offset=64", (*BEFORE, end(index=64)))
bad("end-index-missing", "FormatError", "index_offset=0", (*BEFORE, Frame(INDEX, bytes(64)), end(index=0)))
bad("end-digest", "CorruptError", "digest", (*BEFORE, end(digest=bytes(32))))
bad("end-short", "FormatError", "63 bytes", (*BEFORE, Frame(4, bytes(63))))
bad("end-long", "FormatError", "65 bytes", (*BEFORE, Frame(4, bytes(65))))


def without(layout: Layout, *gone: int) -> bytes:
    """A good stream of twelve frames, thirteen with an index, without some of them."""
    slices = [data(1, bytes([number]), 1, number) for number in range(8)]
    pieces = [*cut(layout((START, ROOT, tensor(1, ["a"], [8]), *slices, end())))]
    return b"".join(piece for number, piece in enumerate(pieces) if number not in gone)


bad("frame-lost", "SequenceError", "expected frame 5", lambda layout: without(layout, 6))
bad("frames-lost", "SequenceError", "expected frame 3", lambda layout: without(layout, *range(4, 12)))

# ---------------------------------------------------------------------------------------------------------- Files
bad(
    "file-closed-with-bytes", "FormatError", "closing",
    (START, ROOT, item(1, FILE, ["f"], size=None, codec=[[RAW]]), data(1, b"a", 0)),
)  # fmt: skip
bad(
    "file-not-closed", "SequenceError", "END frame cannot",
    (START, ROOT, item(1, FILE, ["f"], size=None, codec=[[RAW]]), data(1, b"a"), end()),
)  # fmt: skip
bad(
    "file-size", "LimitError", "file",
    (START, ROOT, item(1, FILE, ["f"], size=(64 << 40) + 1, codec=[[RAW]])),
)  # fmt: skip
