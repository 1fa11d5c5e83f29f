"""The stored vectors, and what each of the two readers says to some bytes, in terms that can be compared."""

import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reference
import zstandard

import tensorwire.numpy as tw
from tensorwire import TensorwireError, decode_file

__all__ = [
    "GOOD",
    "Verdict",
    "library",
    "plain",
    "read_reference",
    "same",
    "single_bytes",
    "stored",
    "zstd_decompress",
]

FOLDER = Path(__file__).parent
GOOD = sorted(path.stem for path in FOLDER.glob("*.tw"))


def stored(name: str) -> bytes:
    """The bytes of a vector; `bad/...` for one that must be refused."""
    return (FOLDER / f"{name}.tw").read_bytes()


_KEPT = tempfile.TemporaryDirectory()  # until the process ends
_FOLDER = Path(_KEPT.name)


class Verdict(NamedTuple):
    """What a reader says: a value, or the kind and place of what is wrong."""

    value: Any = None
    error: str | None = None
    message: str = ""
    frame: int | None = None
    offset: int | None = None
    name: str | None = None  # of a file

    @property
    def place(self) -> tuple:
        return self.error, self.frame, self.offset


def library(data: bytes | Iterable[bytes], *, file: bool = False) -> Verdict:
    """The library's reading of a whole container, or of a stream that carries a file.

    Anything but a value or a TensorwireError is the caller's to see.
    """
    try:
        if not file:
            return Verdict(plain(tw.loads(data)))
        target = _FOLDER / "received"
        target.unlink(missing_ok=True)
        try:
            name = decode_file(data, target)
        except TensorwireError:
            assert not any(_FOLDER.iterdir()), "a failure left something behind"
            raise
        return Verdict(reference.File(target.read_bytes()), name=name)
    except TensorwireError as error:
        return Verdict(None, type(error).__name__, str(error), error.frame, error.offset)


def single_bytes(data: bytes) -> Iterable[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def zstd_decompress(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def content(root: Any) -> Any:
    """A tree, or the file in it where there is one."""
    files = [*root.values()] if type(root) is dict else [root]
    return files[0] if len(files) == 1 and isinstance(files[0], reference.File) else root


def read_reference(data: bytes) -> reference.Stream:
    return reference.read(data, zstd_decompress=zstd_decompress)


def plain(value: Any) -> Any:
    """What the library gave, as the reference reader would give it."""
    view = tw.FRONT.view(value)
    if view is not None:
        return reference.Tensor(view.dtype.name, view.shape, np.asarray(value).tobytes())
    if type(value) is dict:
        return {key: plain(child) for key, child in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def same(a: Any, b: Any) -> bool:
    """Equal with types: True is not 1, -0.0 is not 0.0, a NaN is itself, and dicts have an order."""
    if type(a) is not type(b):
        return False
    if type(a) is float:
        return struct.pack("<d", a) == struct.pack("<d", b)
    if type(a) is dict:
        return same([*a.items()], [*b.items()])
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
