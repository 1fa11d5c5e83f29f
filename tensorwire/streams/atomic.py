"""Files that appear under their name only when they are complete."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_WINDOW: Final = 64 << 20


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
    sync_folder(folder or os.curdir)


class Output:
    """Writes to an open file, and has the system put on disk what was written a while ago.

    Left alone, it would let gigabytes gather in the page cache and write them at the sync, twice as slow in all as
    when writing goes on beside receiving; and the cache of whatever else the machine does would be gone.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begin = self._pushed = self._end = 0

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        if offset != self._end:
            self._begin = self._pushed = offset
        self._end = offset + len(rest)
        while rest:
            size = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[size:], offset + size
        if self._end - self._pushed >= _WINDOW:
            self._push()

    def append(self, buffers: Iterable) -> int:
        """Write every buffer one after the other from the start; returns the bytes written."""
        total = 0
        for buffer in buffers:
            self.write_at(buffer, total)
            total += memoryview(buffer).nbytes
        return total

    def _push(self) -> None:
        # Advice on dirty pages starts writing them, and drops those that an earlier advice has had written.
        begin = max(self._begin, self._pushed - _WINDOW)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, self._end - begin, os.POSIX_FADV_DONTNEED)
        self._pushed = self._end


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


def sync_folder(folder: str) -> None:
    """Put on disk which names a folder holds."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
