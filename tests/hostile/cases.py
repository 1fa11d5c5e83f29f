"""Hostile streams beyond those stored in tests/golden/bad: whole families, made by loops, one for each field, code
point, codec or limit that a peer can get wrong.

`CASES` maps a name to what the library must say and the recipe. All is put together by hand, every other check
satisfied.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from bad import (
    ALIAS,
    BF16,
    BOOL,
    DATA_A,
    DICT,
    FILE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FP4,
    FP16,
    GOOD,
    INT8,
    INT64,
    ITEM_A,
    LINEAR,
    LIST,
    NF4,
    RAW,
    ROOT,
    START,
    TENSOR,
    TUPLE,
    UINT8,
    VALUE,
    ZRAW,
    ZSTD,
    bare,
    carried,
    data,
    item,
    items,
    patched,
    scales,
    tensor,
    value,
    zstd_frame,
)  # fmt: skip
from frames import END, INDEX, ITEM, STREAM, Frame, assemble, preamble, take_apart
from msgpack import packb
from vectors import stored

from tensorwire.limits import DEFAULT, Limits

__all__ = ["CASES", "INDEXES", "Case"]


class Case(NamedTuple):
    """A stream, the error it must get and a word of its message.

    `limits`: where the defaults would need a huge stream.
    """

    error: str
    says: str
    recipe: Callable[[], bytes]
    limits: Limits = DEFAULT


CASES: dict[str, Case] = {}


def case(name: str, error: str, says: str, stream: Any, limits: Limits = DEFAULT) -> None:
    """`stream`: bytes, the frames of one, or a function that gives either."""

    def recipe() -> bytes:
        made = stream() if callable(stream) else stream
        return made if isinstance(made, bytes) else assemble(made)

    assert name not in CASES
    CASES[name] = Case(error, says, recipe, limits)


# ------------------------------------------------------------------------------------------------------------ Framing
case("one-byte", "TruncatedError", "ended", b"\x93")
for at in range(8):
    case(f"magic-byte-{at}", "FormatError", "magic", lambda at=at: patched(at, b"\x00"))
for major in (0, 255):
    case(
        f"major-{major}",
        "UnsupportedError",
        "version",
        lambda major=major: assemble(GOOD, head=preamble(major=major)),
    )
for bit in range(8):
    case(
        f"critical-feature-{bit}", "UnsupportedError", "critical",
        lambda bit=bit: assemble(GOOD, head=preamble(minor=7, flags=1 << bit)),
    )  # fmt: skip
for what, junk in {
    "elf": b"\x7fELF\x02\x01\x01", "gzip": b"\x1f\x8b\x08\0", "pdf": b"%PDF-1.7\n",
    "png": b"\x89PNG\r\n\x1a\n", "bom": b"\xef\xbb\xbf",
    "pickle": b"\x80\x04\x95", "zeros": bytes(16), "html": b"<!doctype html>",
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "zstd": b"\x28\xb5\x2f\xfd",
}.items():  # fmt: skip
    case(f"before-{what}", "FormatError", "magic", lambda junk=junk: junk + assemble(GOOD))
    case(f"behind-{what}", "FormatError", "after the end", lambda junk=junk: assemble(GOOD) + junk)

HEADER = (
    "type",
    "reserved1",
    "pad",
    "reserved2",
    "sequence",
    "length",
    "item",
    "link",
    "start",
    "count",
    "payload_crc",
    "crc",
)
for at, field in zip((0, 1, 2, 3, 4, 8, 16, 20, 24, 32, 40, 44), HEADER, strict=True):
    case(f"damaged-{field}", "CorruptError", "header checksum", lambda at=at: patched(16 + at, b"\x55"))
for field in ("reserved1", "reserved2"):
    for bits in (0x80, 0xFF):
        case(f"{field}-{bits:#x}", "FormatError", "reserved", (START, ROOT.having(**{field: bits})))
for number in (6, 64, 100, 126):
    case(f"frame-type-{number}", "UnsupportedError", "frame type", (START, Frame(number)))
for sequence in (0, 3, 0xFFFFFFFF):
    case(
        f"sequence-{sequence}",
        "SequenceError",
        "expected frame 2",
        (START, ROOT, ITEM_A.having(sequence=sequence)),
    )

# Lengths: what each frame type says to nothing, one byte, its limit with nothing behind it, and to all beyond.
TYPES = {
    "stream": ((), START, 64 << 20), "item": ((START,), ROOT, 64 << 10),
    "skipped": ((START, ROOT), Frame(0x90), 64 << 20),
    "index": ((START, ROOT), Frame(INDEX, b""), 64 << 20),
}  # fmt: skip
for what, (before, frame, limit) in TYPES.items():
    for length in (limit + 1, 1 << 31, 1 << 63, (1 << 64) - 1):
        case(f"length-{what}-{length}", "LimitError", "limit", (*before, frame.having(length=length)))
    case(f"length-{what}-at-limit", "TruncatedError", "ended", (*before, frame.having(length=limit)))
    if what in ("stream", "item"):
        case(f"length-{what}-0", "FormatError", "not msgpack", (*before, Frame(frame.type, b"")))
        case(f"length-{what}-1", "FormatError", "must be a map", (*before, Frame(frame.type, b"\xc0")))
for length, error in (
    (0, "FormatError"),
    (2, "FormatError"),
    (1 << 31, "FormatError"),
    (1 << 63, "LimitError"),
):
    case(f"length-data-{length}", error, "", (START, ROOT, ITEM_A, DATA_A.having(length=length)))
for length, error in (
    (0, "FormatError"),
    (1, "FormatError"),
    (1 << 31, "FormatError"),
    ((1 << 64) - 1, "FormatError"),
):
    case(f"length-end-{length}", error, "", (START, ROOT, Frame(END, b"").having(length=length)))
case("length-16-gib-of-1-kib", "TruncatedError", "ended",
     (START, ROOT, tensor(1, ["a"], [16 << 30]), data(1, bytes(1024), 16 << 30).having(length=16 << 30)))  # fmt: skip

# Every spelling of a number but the shortest, wherever one stands. (Frames have no integers of variable length.)
WIDE = {
    "uint8": b"\xcc\x01", "uint16": b"\xcd\0\x01", "uint32": b"\xce\0\0\0\x01", "uint64": b"\xcf\0\0\0\0\0\0\0\x01",
    "int8": b"\xd0\x01", "int16": b"\xd1\0\x01", "int32": b"\xd2\0\0\0\x01", "int64": b"\xd3\0\0\0\0\0\0\0\x01",
}  # fmt: skip
for spelling, one in WIDE.items():
    case(f"wide-align-{spelling}", "FormatError", "canonical", (Frame(STREAM, b"\x81\xa5align" + one),))
    payload = b"\x82\xa5forms\x91\x84\xa4kind\x01\xa5dtype\x02\xa5shape\x91" + one
    payload += b"\xa5codec\x91\x91\x01\xa5items\x91\x92\0\xa1a"
    case(f"wide-dimension-{spelling}", "FormatError", "canonical", (START, ROOT, Frame(ITEM, payload, 1)))
for spelling, array in (("array16", b"\xdc\0\x02"), ("array32", b"\xdd\0\0\0\x02")):
    case(f"wide-path-{spelling}", "FormatError", "canonical", (START, ROOT, bare(array + b"\0\xa1a")))

# Floods. The limit of items is lowered: at its default the stream would be 17 MiB.
FEW = Limits(items=2000)
case(
    "flood-of-items",
    "LimitError",
    "items",
    lambda: (START, ROOT, *(item(n, DICT, [n]) for n in range(1, 2001))),
    FEW,
)
case(
    "flood-of-items-in-a-frame",
    "LimitError",
    "items",
    lambda: (START, ROOT, items(1, [{"kind": DICT}], [[0, n] for n in range(2000)])),
    FEW,
)
case("flood-of-claims", "TruncatedError", "ended",
     lambda: (START, ROOT, *(tensor(n, [n], [4 << 20]) for n in range(1, 10_001))))  # fmt: skip
case("flood-of-aliases", "TruncatedError", "ended",
     lambda: (START, ROOT, tensor(1, ["a"], [1 << 20]),
              *(item(n, ALIAS, [n], of=1) for n in range(2, 10_000))))  # fmt: skip
case("flood-of-empty-frames", "TruncatedError", "ended", lambda: (START, ROOT, *[Frame(0x90)] * 30_000))
case("flood-of-empty-data", "FormatError", "empty", lambda: (START, ROOT, ITEM_A, *[data(1, b"")] * 1000))
case("flood-of-slices", "TruncatedError", "ended",
     lambda: (START, ROOT, tensor(1, ["a"], [1 << 20]), *(data(1, b"x", 1, n) for n in range(10_000))))  # fmt: skip
# Keys whose hashes share their low 38 bits.
case("colliding-item-keys", "TruncatedError", "ended",
     lambda: (START, ROOT, *(item(n + 1, DICT, [n << 38]) for n in range(8000))))  # fmt: skip
case("colliding-value-keys", "FormatError", "canonical",
     lambda: value(b"\xdf" + struct.pack(">I", 10_000) + packb({n << 38: 0 for n in range(10_000)})[3:]))  # fmt: skip
# A byte of a value may be an empty dict, which takes 72 in Python.
for what, unit in (
    ("dicts", b"\x80"),
    ("lists", b"\x90"),
    ("maps", b"\x81\xa0\x80"),
    ("tuples", b"\xd4\x01\x90"),
):
    count = ((128 << 10) - 5) // len(unit)
    full = (b"\xdd" + struct.pack(">I", count) if count > 0xFFFF else b"\xdc" + struct.pack(">H", count)) + unit * count
    case(f"value-of-{what}", "TruncatedError", "ended", lambda full=full: value(full)[:-1])
    case(
        f"value-of-{what}-too-long",
        "LimitError",
        "composite",
        lambda full=full, unit=unit: value(full + unit * 2)[:-1],
        Limits(composite=128 << 10),
    )
    case(
        f"value-of-{what}-too-many",
        "LimitError",
        "containers",
        lambda unit=unit: value(b"\xdc\x03\xe8" + unit * 1000),
        Limits(containers=1000),
    )
    for name, before in (("stream", ()), ("item", (START,))):
        payload = full if name == "stream" else b"\xdd" + struct.pack(">I", 9000) + unit * 9000
        frame = Frame(STREAM if name == "stream" else ITEM, payload)
        case(f"{name}-of-{what}", "FormatError", "must be a map", (*before, frame))
        for key in (b"\xa8metadata",) if name == "stream" else (b"\xa5forms", b"\xa5items"):
            wrapped = b"\x81" + key + payload if name == "stream" else b"\x82\xa5forms\x90" + key + payload
            spelled = "" if key != b"\xa5forms" else "-as-forms"
            case(f"{name}-with-{what}{spelled}", "FormatError", "", (*before, Frame(frame.type, wrapped)))
PAIRS = {f"{n:04x}": "" for n in range(16_385)}
case("metadata-pairs", "LimitError", "pairs", lambda: (Frame(STREAM, packb({"align": 1, "metadata": PAIRS})),),
     Limits(pairs=16_384))  # fmt: skip

# ------------------------------------------------------------------------------------------------------ Tensor header
for name, shape in {
    "2^64": [1 << 32, 1 << 32], "2^64-1": [(1 << 64) - 1], "2^64-1-twice": [(1 << 64) - 1] * 2,
    "wraps-to-1": [3, 0xAAAAAAAAAAAAAAAB],
    "wraps-to-0": [1 << 63, 2], "64-times": [(1 << 64) - 1] * 64, "2^63": [1 << 63, 1], "0-and-2^62": [0, 1 << 62],
}.items():  # fmt: skip
    case(f"shape-{name}", "LimitError", "item", (START, ROOT, tensor(1, ["a"], shape)))
    case(
        f"shape-{name}-4-bit",
        "LimitError",
        "item",
        (START, ROOT, tensor(1, ["a"], shape, FLOAT16, [[NF4, 64, 0]])),
    )
case("shape-16-bytes-wrap", "LimitError", "item", (START, ROOT, tensor(1, ["a"], [1 << 60], 26)))
case("ndim-255", "LimitError", "ndim", (START, ROOT, tensor(1, ["a"], [1] * 255)))
case("ndim-60000", "LimitError", "ndim", (START, ROOT, tensor(1, ["a"], [1] * 60_000)))
case("ndim-65535", "LimitError", "descriptor", (START, ROOT, tensor(1, ["a"], [1] * 65_535)))
# More digits than Python turns into text, were the product printed.
case(
    "dimensions-beyond-print",
    "LimitError",
    "item",
    (START, ROOT, tensor(1, ["a"], [(1 << 64) - 1] * 1000)),
    Limits(ndim=10_000),
)
for dimension in (-1, -(1 << 31), -(1 << 63)):
    case(f"dimension-{dimension}", "FormatError", "shape", (START, ROOT, tensor(1, ["a"], [dimension, 3])))
for what, dimension in (("text", "3"), ("nil", None), ("bool", True), ("list", [3]), ("nan", float("nan"))):
    case(f"dimension-{what}", "FormatError", "shape", (START, ROOT, tensor(1, ["a"], [dimension])))
for number in (10, 15, 20, 23, 27, 31, 37, 39, 41, 255, 1 << 63):
    case(f"dtype-{number}", "UnsupportedError", "dtype", (START, ROOT, tensor(1, ["a"], dtype=number)))
for number in (-1, 1.0, None, True):
    error = "UnsupportedError" if number == -1 else "FormatError"
    case(f"dtype-is-{number}", error, "dtype", (START, ROOT, tensor(1, ["a"], dtype=number)))
QUANTIZERS = {
    "int8": [INT8, 64], "int8-linear": [LINEAR, 64], "nf4": [NF4, 64, 0], "fp4": [FP4, 64, 0],
    "nf4-double": [NF4, 64, 1],
    "fp4-double": [FP4, 64, 1],
}  # fmt: skip
OTHERS = {
    "bool": BOOL,
    "uint8": UINT8,
    "int64": INT64,
    "float64": FLOAT64,
    "complex64": 25,
    "float8_e4m3fn": 32,
}
for codec, stage in {**QUANTIZERS, "fp16": [FP16], "bf16": [BF16]}.items():
    for dtype, number in OTHERS.items():
        frame = tensor(1, ["a"], dtype=number, codec=[stage])
        case(f"{codec}-of-{dtype}", "FormatError", "cannot carry", (START, ROOT, frame))
        if dtype == "int64":
            frame = tensor(1, ["a"], dtype=number, codec=[stage, [ZSTD]])
            case(f"{codec}-zstd-of-{dtype}", "FormatError", "cannot carry", (START, ROOT, frame))
for key, extra in {
    "strides": [1],
    "device": "cuda",
    "requires_grad": True,
    "offset": 0,
    "__class__": "x",
}.items():
    case(f"tensor-with-{key}", "UnsupportedError", "does not define",
         (START, ROOT, item(1, TENSOR, ["a"], dtype=UINT8, shape=[3], codec=[[RAW]], **{key: extra})))  # fmt: skip

# -------------------------------------------------------------------------------------------------- Names, containers
FORBIDDEN = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
for point in FORBIDDEN:
    case(f"name-U+{point:04X}", "FormatError", "control", (START, ROOT, tensor(1, ["a" + chr(point)])))


def named(raw: bytes) -> tuple:
    """A dict item whose name is these bytes."""
    return START, ROOT, bare(b"\x92\0" + bytes([0xA0 | len(raw)]) + raw)


for name, raw in {
    "overlong-2": b"\xc1\xa1", "overlong-3": b"\xe0\x80\xaf", "overlong-4": b"\xf0\x80\x80\xaf",
    "overlong-nul": b"\xc0\x80",
    "high-surrogate": b"\xed\xa0\xbd", "low-surrogate": b"\xed\xb8\x80", "surrogate-pair": b"\xed\xa0\xbd\xed\xb8\x80",
    "beyond-unicode": b"\xf4\x90\x80\x80", "lead-alone": b"\xe2\x82", "tail-alone": b"\x80",
    "fe": b"\xfe", "latin-1": b"\xe4",
}.items():  # fmt: skip
    case(f"utf-8-{name}", "FormatError", "not msgpack", named(raw))
for tag, size in ((b"\xdb", 4), (b"\xda", 2)):
    frame = bare(b"\x92\0" + tag + b"\xff" * size + b"abc")
    case(f"name-claims-2^{8 * size}", "FormatError", "not msgpack", (START, ROOT, frame))
for what, head in {"array": b"\xdd", "map": b"\xdf", "binary": b"\xc6", "extension": b"\xc9"}.items():
    case(f"path-claims-4-gi-{what}", "FormatError", "not msgpack", (START, ROOT, bare(head + b"\xff" * 4 + b"\x01")))
case("path-10000", "LimitError", "nesting", (START, ROOT, item(1, DICT, [0] * 10_000)))
for kind in (LIST, TUPLE):
    for what, key in {"2^53": 1 << 53, "-1": -1, "1": 1, "text": "0"}.items():
        case(
            f"element-{kind}-{what}",
            "FormatError",
            "expected element 0",
            (START, item(0, kind, []), tensor(1, [key])),
        )
    case(f"element-{kind}-2^63", "FormatError", "key must", (START, item(0, kind, []), tensor(1, [1 << 63])))
for what, head in {"lists": b"\x91", "dicts": b"\x81\xa1a"}.items():
    for depth in (33, 1000, 40_000):
        case(
            f"value-{what}-{depth}-deep",
            "LimitError",
            "nesting",
            lambda head=head, depth=depth: value(head * depth + b"\xc0"),
        )
for depth in (33, 100):
    nested: bytes = b"\x90"
    for _ in range(depth):
        inner = b"\x91" + nested
        size = len(inner)
        fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}
        head = fixed.get(size) or (b"\xc7" + bytes([size]) if size < 256 else b"\xc8" + struct.pack(">H", size))
        nested = head + b"\x01" + inner
    case(f"value-tuples-{depth}-deep", "LimitError", "nesting", lambda nested=nested: value(nested))
case("digits-10^6", "FormatError", "msgpack", lambda: value(b"1" * 1_000_000))
case("digits-10^5", "FormatError", "msgpack", lambda: value(b"1" * 100_000))
case("alias-text", "FormatError", "alias", (START, ROOT, ITEM_A, item(2, ALIAS, ["b"], of="a")))
case("alias-2^64-1", "FormatError", "alias", (START, ROOT, ITEM_A, item(2, ALIAS, ["b"], of=(1 << 64) - 1)))
case(
    "alias-of-scalar",
    "FormatError",
    "alias",
    (START, item(0, DICT, []), tensor(1, ["a"], [2, 0]), item(2, ALIAS, ["b"], of=1)),
)

# ------------------------------------------------------------------------------------------------------------- Codecs
for codec, stage in QUANTIZERS.items():
    for blocksize in (0, 1, 7, 8, 63, 96, 1 << 17, 1 << 31, (1 << 64) - 1):
        frame = tensor(1, ["a"], dtype=FLOAT32, codec=[[stage[0], blocksize, *stage[2:]]])
        case(f"{codec}-blocksize-{blocksize}", "FormatError", "blocksize", (START, ROOT, frame))
    # 200 elements in 4 blocks: one statistic less, one more, none, too many; half of the elements.
    width, fixed, halves = (
        (2 if codec == "int8-linear" else 1 if "double" in codec else 4),
        8 if "double" in codec else 0,
        stage[0] > LINEAR,
    )
    body = bytes(100 if halves else 200)
    for what, length in {"less": 3, "more": 5, "none": 0, "1000": 1000}.items():
        payload = bytes(fixed + width * length) + body
        case(f"{codec}-absmax-{what}", "FormatError", "must have", carried(payload, 200, [stage]))
    case(
        f"{codec}-half-of-the-codes",
        "FormatError",
        "must have",
        carried(bytes(fixed + width * 4) + body[::2], 200, [stage]),
    )
    inside = zstd_frame(bytes(fixed + width * 3) + body)
    case(f"{codec}-absmax-less-in-zstd", "FormatError", "declares", carried(inside, 200, [stage, [ZSTD]]))
for codec in ("nf4", "fp4"):
    for value_of in (2, 3, 255, 1 << 32):
        frame = tensor(1, ["a"], dtype=FLOAT32, codec=[[QUANTIZERS[codec][0], 64, value_of]])
        case(f"{codec}-double_quant-{value_of}", "FormatError", "double_quant", (START, ROOT, frame))
    odd = scales(0x3F800000) + b"\x77\x01"
    case(f"{codec}-unused-half", "FormatError", "unused half", carried(odd, 3, [QUANTIZERS[codec]]))
    odd = scales(0x3F800000, 0x3F800000) + b"\x7f\x77\x01"
    case(
        f"{codec}-double-unused-half",
        "FormatError",
        "unused half",
        carried(odd, 3, [QUANTIZERS[f"{codec}-double"]]),
    )
for codec, stage in QUANTIZERS.items():
    for what, high in {"nan": 0xFF, "infinite": 0x7F, "minus-zero": 0x80, "negative": 0xBF}.items():
        low = {"nan": 0xC0, "infinite": 0x80, "minus-zero": 0, "negative": 0x80}[what]
        number = bytes([low, high]) if codec == "int8-linear" else bytes([0, 0, low, high])
        rest = bytes(4 + 1) if "double" in codec else b""
        payload = number + rest + (bytes(2) if stage[0] > LINEAR else bytes(3))
        word = "scale" if codec == "int8-linear" else "absmax"
        case(f"{codec}-first-{what}", "FormatError", word, carried(payload, 3, [stage]))
        case(
            f"{codec}-first-{what}-in-zstd",
            "FormatError",
            word,
            carried(zstd_frame(payload), 3, [stage, [ZSTD]]),
        )
for stages in (
    [[ZSTD], [RAW]],
    [[RAW], [INT8, 64]],
    [[ZSTD], [INT8, 64]],
    [[INT8, 64], [RAW]],
    [[RAW]] * 8,
    [[RAW], [ZSTD, 3]],
):
    name = "-".join(str(stage[0]) for stage in stages) + ("-3" if stages[-1][-1] == 3 else "")
    case(f"stages-{name}", "FormatError", "", (START, ROOT, tensor(1, ["a"], dtype=FLOAT32, codec=stages)))
for what, stage in {"negative": [-1], "wide": [1, 1 << 63] + [0] * 8, "float": [1.0], "nil": [None]}.items():
    case(f"stage-{what}", "FormatError", "stage", (START, ROOT, tensor(1, ["a"], codec=[stage])))

RLE_ZEROS = ((128 << 10) << 3 | 2).to_bytes(3, "little") + b"\0"  # a block of 128 KiB of zeros, in 4 bytes


def zeros(blocks: int, size: int) -> bytes:
    """A zstd frame that says `size` and holds `blocks` times 128 KiB."""
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", size) + RLE_ZEROS * blocks + b"\x01\0\0"


case(
    "zstd-1-gib-in-4-kib",
    "FormatError",
    "at most",
    lambda: carried(zeros(8192, 4096), 4096, ZRAW, UINT8),
)
case("zstd-128-mib-in-4-kib", "FormatError", "zstd", lambda: carried(zeros(1000, 4096), 4096, ZRAW, UINT8))
case("zstd-1-gib-in-1-mib", "FormatError", "zstd", lambda: carried(zeros(8192, 1 << 20), 1 << 20, ZRAW, UINT8))
case(
    "zstd-one-byte-more",
    "FormatError",
    "zstd",
    lambda: carried(zeros(1, (128 << 10) - 1), (128 << 10) - 1, ZRAW, UINT8),
)
case(
    "zstd-one-byte-less",
    "FormatError",
    "zstd",
    lambda: carried(zeros(1, (128 << 10) + 1), (128 << 10) + 1, ZRAW, UINT8),
)
for log in range(24, 32):
    payload = zstd_frame(b"abc", window=(log - 10) << 3)
    case(f"zstd-window-2^{log}", "FormatError", "has a window of", carried(payload, 3, ZRAW, UINT8))
case("zstd-window-2^41", "FormatError", "zstd", carried(zstd_frame(b"abc", window=0xFF), 3, ZRAW, UINT8))
for size in (2, 4):
    frame = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0xA0 | {2: 2, 4: 3}[size]])
        + b"\x09" * size
        + struct.pack("<I", 3)
        + b"\x19\0\0abc"
    )
    case(f"zstd-dictionary-{size}", "FormatError", "must not use one", carried(frame, 3, ZRAW, UINT8))
skippable = b"\x50\x2a\x4d\x18\0\0\0\0"
case(
    "zstd-skippable-100",
    "FormatError",
    "not a zstd frame",
    carried(skippable * 100 + zstd_frame(bytes(300_000)), 300_000, ZRAW, UINT8),
)
case(
    "zstd-skippable-8-behind",
    "FormatError",
    "zstd",
    carried(zstd_frame(bytes(9000)) + skippable * 8, 9000, ZRAW, UINT8),
)
case(
    "zstd-reserved-bit",
    "FormatError",
    "zstd",
    carried(zstd_frame(b"abc").replace(b"\xfd\xa0", b"\xfd\xa8"), 3, ZRAW, UINT8),
)
case(
    "zstd-no-last-block",
    "FormatError",
    "zstd",
    carried(zstd_frame(b"abc").replace(b"\x19\0\0abc", b"\x18\0\0abc"), 3, ZRAW, UINT8),
)
case("zstd-magic-alone", "FormatError", "zstd", carried(zstd_frame(b"abc")[:4], 3, ZRAW, UINT8))
case(
    "zstd-old-magic",
    "FormatError",
    "not a zstd frame",
    carried(b"\x27" + zstd_frame(b"abc")[1:], 3, ZRAW, UINT8),
)
case("zstd-file-cut", "FormatError", "zstd",
     (START, ROOT, item(1, FILE, ["f"], size=None, codec=ZRAW), data(1, zstd_frame(b"abc")[:-1], 3)))  # fmt: skip
for count in (0, 1 << 31, (1 << 64) - 1):
    frame = data(1, b"abc", count)
    case(f"slice-count-{count}", "FormatError", "", (START, ROOT, ITEM_A, frame))
case("slice-count-of-open-file", "LimitError", "file",
     (START, ROOT, item(1, FILE, ["f"], size=None, codec=[[RAW]]), data(1, b"abc", (1 << 64) - 1)))  # fmt: skip
case("value-size-2^63", "LimitError", "value", (START, ROOT, item(1, VALUE, ["v"], size=1 << 63)))


# ---------------------------------------------------------------------------------- Files: indexes that point elsewhere
INDEXES: dict[str, tuple[str, Callable[[], bytes]]] = {}
_ENTRY = struct.Struct("<QII")


def index(name: str, error: str, change: Callable[[list[list[int]], int], None]) -> None:
    """A `.tw` file whose index was changed, which reading from front to back does not look at."""

    def recipe() -> bytes:
        good = stored("at-rest")
        *frames, _, last = take_apart(good)
        begin = int.from_bytes(good[-40:-32], "little") + 48
        # Of one ITEM frame; of the items, the first of which is a dict.
        entries = [[*entry] for entry in _ENTRY.iter_unpack(good[begin:-112])]
        change(entries, len(good))
        packed = b"".join(_ENTRY.pack(*entry) for entry in entries)
        return assemble([*frames, Frame(INDEX, packed), last], align=64)

    INDEXES[name] = (error, recipe)


def entry(number: int, field: int, to: Any) -> Callable[[list[list[int]], int], None]:
    def change(entries: list[list[int]], size: int) -> None:
        entries[number][field] = to(entries, size) if callable(to) else to

    return change


for name, where in {
    "preamble": 0, "2^63": 1 << 63, "2^64-1": (1 << 64) - 1,
    "end": lambda entries, size: size - 112, "beyond": lambda entries, size: size,
    "odd": lambda entries, size: entries[0][0] + 1,
}.items():  # fmt: skip
    index(f"item-at-{name}", "FormatError", entry(0, 0, where))
    index(f"data-at-{name}", "FormatError", entry(2, 0, where))
index("item-is-another", "FormatError", entry(0, 0, lambda entries, size: entries[2][0]))
index("data-is-another", "FormatError", entry(2, 0, lambda entries, size: entries[3][0]))
index("data-is-an-item", "FormatError", entry(2, 0, lambda entries, size: entries[0][0]))
for field, name in enumerate(("item-sequence", "item-link"), 1):
    index(f"{name}", "FormatError", entry(0, field, 77))
    index(f"data-{name[5:]}", "FormatError", entry(2, field, 77))
index("item-twice", "FormatError", lambda entries, size: entries.insert(0, entries[0]))
index("data-none", "FormatError", lambda entries, size: entries[2].__setitem__(slice(None), [0, 0, 0]))
index("data-half", "FormatError", lambda entries, size: entries[1].__setitem__(2, 77))
index("data-of-a-dict", "FormatError", lambda entries, size: entries[1].__setitem__(slice(None), entries[2]))
index("data-in-front", "FormatError", lambda entries, size: entries[2].__setitem__(1, 1))
index("one-less", "FormatError", lambda entries, size: entries.pop())
index("one-more", "FormatError", lambda entries, size: entries.append(entries[-1]))
index("descending", "FormatError", lambda entries, size: entries.reverse())
