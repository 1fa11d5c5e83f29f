"""Versions: the contents of a container by name, and their content digest.

Two containers with the same names, dtypes, shapes and values are one version, however they are sent: docs/format.md
says what is digested. The digest detects accidental differences; to prove who made a version, sign it
(`tensorwire.authenticity`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import numpy as np

from tensorwire.codecs import CHUNK, Checksums, chunk_checksums
from tensorwire.errors import EncodeError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams.codec_choice import rule
from tensorwire.streams.flatten import TensorLeaf, ValueLeaf, flatten
from tensorwire.tensor import ByteArray, Front, TensorView
from tensorwire.wire.names import Path, name_of
from tensorwire.wire.values import pack_plain

_READ: Final = 4 * CHUNK  # bytes that are read of a tensor at once; a read costs as much as a few KiB


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry of one name in a version: a tensor or, if `view` is None, the `data` of a value."""

    path: Path
    view: TensorView | None
    data: bytes = b""

    @property
    def tensor(self) -> TensorView:
        """The view of an entry that is known to be a tensor."""
        assert self.view is not None
        return self.view

    @property
    def size(self) -> int:
        """Bytes of the tensor's elements."""
        return self.tensor.numel * self.tensor.dtype.itemsize

    def read(self, start: int, stop: int) -> ByteArray:
        """Bytes [start, stop) of the tensor's elements."""
        width = self.tensor.dtype.itemsize
        return np.frombuffer(self.tensor.read(start // width, stop // width), np.uint8)

    def describe(self) -> str:
        """A description for errors."""
        return "a value" if self.view is None else f"{self.view.dtype} {list(self.view.shape)}"


# By name, in the order of the names.
Version = dict[str, Entry]
# The checksums of each chunk of each tensor.
Sums = dict[str, Checksums]


def version_of(value: Any, front: Front, limits: Limits = DEFAULT) -> Version:
    """The entries of a container, by name. Raises EncodeError as `flatten` does."""
    found: Version = {}
    for leaf in flatten(value, front, rule("raw"), limits, tie=False):
        if isinstance(leaf, TensorLeaf):
            found[name_of(leaf.item.path)] = Entry(leaf.item.path, leaf.view)
        elif isinstance(leaf, ValueLeaf):
            found[name_of(leaf.item.path)] = Entry(leaf.item.path, None, leaf.data)
    return {name: found[name] for name in sorted(found)}


def digest(value: Any, front: Front, limits: Limits = DEFAULT) -> str:
    """The content digest of a container, as hex."""
    version = version_of(value, front, limits)
    return content_digest(version, checksums(version)).hex()


def checksums(version: Version) -> Sums:
    """The checksums of all tensors; a tensor with several names is read once."""
    sums: Sums = {}
    known: dict[tuple[object, ...], Checksums] = {}
    for name, entry in version.items():
        if entry.view is None:
            continue
        identity = entry.view.identity
        found = known.get(identity) if identity is not None else None
        if found is None:
            with about(name):
                read = parts(entry.size, _READ)
                found = tuple([crc for part in read for crc in chunk_checksums(entry.read(*part))])
        if identity is not None:
            known[identity] = found
        sums[name] = found
    return sums


def content_digest(version: Version, sums: Sums) -> bytes:
    """The content digest of a version whose tensors have these checksums."""
    whole = sha256()
    for name, entry in version.items():
        if entry.view is None:
            said = pack_plain([name]) + entry.data
        else:
            described = pack_plain([name, entry.view.dtype.number, list(entry.view.shape)])
            said = described + np.array(sums[name], "<u4").tobytes()
        whole.update(sha256(said).digest())
    return whole.digest()


def parts(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each part of `size` bytes."""
    for start in range(0, size, step):
        yield start, min(start + step, size)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Adds the item's name to errors about a tensor that is being read."""
    try:
        yield
    except EncodeError as error:
        error.item = name
        raise
