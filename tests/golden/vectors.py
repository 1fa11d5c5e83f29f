"""The stored vectors, and what each of the two readers says to some bytes, in terms that can be compared."""

import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reference
import zstandard

import tensorwire.numpy as tw
from tensorwire import TensorwireError, decode_file
from tensorwire.checksum import crc32c
from tensorwire.files.items import read_item
from tensorwire.streams.receiver import check_codec
from tensorwire.wire import Archive, FileItem

__all__ = [
    "GOOD",
    "WAYS",
    "InMemory",
    "Verdict",
    "by_file",
    "by_index",
    "content",
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
    return _verdict(lambda: _received(data) if file else Verdict(plain(tw.loads(data))))


def by_file(data: bytes, *, file: bool = False) -> Verdict:
    """The same of a file that is streamed from front to back."""
    path = _at_rest(data)
    if not file:
        return _verdict(lambda: Verdict(plain(tw.load_file(path))))
    with open(path, "rb", buffering=0) as source:
        return _verdict(lambda: _received(source))


def by_index(data: bytes, *, file: bool = False) -> Verdict:
    """The same of a file that is opened by its index and of which every item is read."""
    path = _at_rest(data)
    return _verdict(lambda: _carried(data) if file else _opened(path))


def single_bytes(data: bytes) -> Iterable[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def bytewise(data: bytes, *, file: bool = False) -> Verdict:
    """The library's reading of single bytes."""
    return library(single_bytes(data), file=file)


# From front to back, however the bytes come. Whatever they say, `by_index` must say.
WAYS = (library, bytewise, by_file)


def _verdict(read: Callable[[], Verdict]) -> Verdict:
    try:
        return read()
    except TensorwireError as error:
        return Verdict(None, type(error).__name__, str(error), error.frame, error.offset)


def _received(source: Any) -> Verdict:
    target = _FOLDER / "received"
    target.unlink(missing_ok=True)
    try:
        name = decode_file(source, target)
    except TensorwireError:
        assert not target.exists(), "a failure left something behind"
        raise
    return Verdict(reference.File(target.read_bytes()), name=name)


def _at_rest(data: bytes) -> Path:
    path = _FOLDER / "stream.tw"
    path.write_bytes(data)
    return path


def _opened(path: Path) -> Verdict:
    """Items by name, in the order of the file."""
    with tw.open_file(path) as opened:
        return Verdict({name: plain(opened[name]) for name in opened})


class InMemory(NamedTuple):
    """`tensorwire.wire.RandomAccess` over bytes."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> memoryview:
        assert offset >= 0 and size >= 0 and offset + size <= len(self.data)
        return memoryview(self.data)[offset : offset + size]


def _carried(data: bytes) -> Verdict:
    """The one file in a stream, which `open_file` leaves to the functions for files."""
    archive = Archive(InMemory(data), crc32c, accept=lambda what: isinstance(what, FileItem) and check_codec(what))
    ((number, item),) = (pair for pair in enumerate(archive.items) if isinstance(pair[1], FileItem))
    return Verdict(reference.File(read_item(archive, number, item, check_codec(item)).tobytes()), name=item.name)


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
