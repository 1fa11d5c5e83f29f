"""Files that appear under their name only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[int]:
    """A file descriptor, open for reading and writing, of a new file that takes the name `path` on success.

    The file is made beside its target (O_EXCL, no links followed), synced, renamed over it, and the folder synced.
    On any error it is removed and a file already at `path` stays untouched.
    """
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{os.urandom(4).hex()}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(temporary, flags, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder or os.curdir)


def write_all(fd: int, buffers: Iterator) -> int:
    """Write every buffer at the descriptor's position; returns the bytes written."""
    total = 0
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        total += len(rest)
        while rest:
            rest = rest[os.write(fd, rest) :]
    return total


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    rest = memoryview(data).cast("B")
    while rest:
        size = os.pwrite(fd, rest, offset)
        rest, offset = rest[size:], offset + size


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns fewer bytes only at the end of the file."""
    rest = memoryview(buffer).cast("B")
    size = len(rest)
    while rest:
        got = os.preadv(fd, [rest], offset)
        if got == 0:
            break
        rest, offset = rest[got:], offset + got
    return size - len(rest)


def _sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
