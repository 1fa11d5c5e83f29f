"""Holds the reference reader to vectors.json, without the library: `python tests/golden/check.py`.

What a reader in another language would do to test itself. Needs the standard library alone; where `zstandard` is not
installed, what is compressed is checked but for its values.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import reference

try:
    from zstandard import ZstdDecompressor
except ImportError:
    decompress = None
else:

    def decompress(frame: bytes) -> bytes:
        return ZstdDecompressor().decompress(frame, allow_extra_data=False)


KINDS = {
    reference.TENSOR: "tensor", reference.VALUE: "value", reference.FILE: "file", reference.ALIAS: "alias",
    reference.DICT: "dict", reference.LIST: "list", reference.TUPLE: "tuple",
}  # fmt: skip


def describe(reader: "reference._Reader", stream: reference.Stream) -> dict[str, Any]:
    items = []
    for item in reader.items:
        entry: dict[str, Any] = {"path": item.path, "kind": KINDS[item.kind]}
        if item.kind == reference.TENSOR:
            entry |= {"dtype": item.dtype, "shape": [*item.shape], "codec": item.codec}
        if item.kind == reference.ALIAS:
            entry |= {"of": item.of}
        if item.kind in (reference.TENSOR, reference.VALUE, reference.FILE):
            entry |= {"sha256": None if item.data is None else hashlib.sha256(item.data).hexdigest()}
        items.append(entry)
    told = {"id": (stream.id or b"").hex(), "target": (stream.target or b"").hex(), "metadata": stream.metadata}
    return {key: value for key, value in told.items() if value} | {"items": items}


def good(name: str, wanted: dict[str, Any]) -> None:
    reader = reference._Reader((HERE / f"{name}.tw").read_bytes(), decompress)
    got = describe(reader, reader.read())
    for ours, theirs in zip(got["items"], wanted["items"], strict=True):
        if ours.get("sha256", "") is None:
            theirs["sha256"] = None
    assert got == wanted, f"{name}: {got}, not {wanted}"


def bad(name: str, error: str) -> None:
    got: Exception | None = None
    try:
        reference.read((HERE / "bad" / f"{name}.tw").read_bytes(), zstd_decompress=decompress)
    except reference.Refused as refused:
        got = refused
    wanted = reference.Truncated if error == "TruncatedError" else reference.Refused
    assert type(got) is wanted, f"{name}: {got!r}, not {wanted.__name__}"


def main() -> None:
    vectors = json.loads((HERE / "vectors.json").read_text())
    for name, wanted in vectors["good"].items():
        good(name, wanted)
    for name, error in vectors["bad"].items():
        bad(name, error)
    assert not any(name.split(".")[0] == "tensorwire" for name in sys.modules), "this is a check without the library"
    print(f"{len(vectors['good'])} good and {len(vectors['bad'])} bad vectors: the reference reader agrees")


if __name__ == "__main__":
    main()
