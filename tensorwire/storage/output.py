"""Writes to open files: completely, at an offset, with write-behind, and with errors that say what to do."""

import errno
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from tensorwire.errors import ArgumentError, MissingFileError, StorageError, TensorwireError, show

_WINDOW: Final = 64 << 20  # bytes that may wait to be written to the disk
_SEEKING: Final = threading.Lock()  # for systems where reading or writing at an offset takes two calls
_REMEDIES: Final = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "the quota is used up: free some space, have it raised, and try again",
    errno.EFBIG: "the file is larger than its file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENOTEMPTY: "choose another name, or remove what is there",
    errno.ENOENT: "the folder does not exist, or no longer: create it first",
    errno.ENOTDIR: "part of the path is a file: choose another",
    errno.EISDIR: "there is a folder of this name: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: close some, or raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.EIO: "the device failed: check it before trying again",
}
# The same for files that are read.
_READ_REMEDIES: Final = {
    **_REMEDIES,
    errno.EACCES: "you may not read it: ask whose it is",
    errno.EPERM: "you may not read it: ask whose it is",
    errno.ENOENT: "check the name, and the folder that it is relative to",
    errno.EISDIR: "it is a folder: name a file in it",
    errno.ELOOP: "it is a link that leads to itself: name the file",
    errno.ENXIO: "it is a socket: connect to it instead",
}


class Output:
    """Writes to an open file, and makes the system write data to disk continuously. Raises StorageError.

    Otherwise the system would collect gigabytes in the page cache and write them at the sync. This takes twice as long
    as writing while more data arrives, and evicts everything else from the cache.
    `path`: the name that the file will have, for errors.
    """

    def __init__(self, fd: int, path: str | os.PathLike[str]) -> None:
        self._fd = fd
        self._path = os.fsdecode(path)
        self._begin = self._pushed = self._end = 0

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        if offset != self._end:
            self._begin = self._pushed = offset
        self._end = offset + len(rest)
        with storing(self._path, "write"):
            while rest:
                size = _write_some(self._fd, rest, offset)
                if size == 0:  # or this would not end
                    raise OSError(errno.EIO, "the system accepts no bytes")
                rest, offset = rest[size:], offset + size
        if self._end - self._pushed >= _WINDOW:
            self._push()

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what was written from `offset` on."""
        with storing(self._path, "read back"):
            if read_at(self._fd, buffer, offset) != memoryview(buffer).nbytes:
                raise OSError(errno.EIO, "the file became shorter while it was written")

    def append(self, buffers: Iterable[Any]) -> int:
        """Write every buffer one after the other from the start; returns the bytes written."""
        total = 0
        for buffer in buffers:
            self.write_at(buffer, total)
            total += memoryview(buffer).nbytes
        return total

    def _push(self) -> None:
        # This advice starts writing dirty pages, and drops pages that were written after an earlier call.
        begin = max(self._begin, self._pushed - _WINDOW)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # only advice: the sync will report an error of the disk
                os.posix_fadvise(self._fd, begin, self._end - begin, os.POSIX_FADV_DONTNEED)
        self._pushed = self._end


class OutputFile(io.RawIOBase):
    """An Output as a file object, for code such as zipfile that writes and seeks. Does not close the descriptor."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._offset = self._end = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Change the position; returns it."""
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._end}[whence]
        return self._offset

    def write(self, data: Any, /) -> int:
        """Write all of `data`; returns its size."""
        size = memoryview(data).nbytes
        self._output.write_at(data, self._offset)
        self._offset += size
        self._end = max(self._end, self._offset)
        return size


def write_object(file: Any, buffers: Iterable[Any]) -> int:
    """Write every buffer into a file object, from its current position; returns the bytes written.

    Raises StorageError if the object accepts no bytes, or raises an OSError.
    """
    total = 0
    name = name_of(file)
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        total += len(rest)
        while rest:
            with storing(name, "write"):
                size = file.write(rest)
            if not size:
                raise StorageError(
                    "the file object accepted no bytes: give one that blocks until it can", errno=errno.EAGAIN
                )
            rest = rest[size:]
    return total


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns fewer bytes only at the end of the file."""
    rest = memoryview(buffer).cast("B")
    size = len(rest)
    while rest:
        got = _read_some(fd, rest, offset)
        if got == 0:
            break
        rest, offset = rest[got:], offset + got
    return size - len(rest)


def _write_some(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def name_of(file: Any) -> str:
    """The name of a file. Files of fsspec have a path, others a name, which may be a descriptor."""
    if isinstance(file, (str, os.PathLike)):
        return os.fsdecode(file)
    name = getattr(file, "path", None) or getattr(file, "name", None)
    return name if isinstance(name, str) else f"<{type(file).__name__}>"


def file_name(path: str | os.PathLike[str]) -> str:
    """A path as text. Raises ArgumentError if it is not a path, StorageError if no file can have it."""
    try:
        name = os.fsdecode(path)
        os.fsencode(name)
    except TypeError:
        raise ArgumentError(f"expected a path, not {type(path).__name__}") from None
    except UnicodeEncodeError:
        raise StorageError(f"{show(path)} cannot be a file name: it has lone surrogates", errno=errno.EINVAL) from None
    if "\0" in name:
        raise StorageError(f"{show(name)} cannot be a file name: it has a NUL character", errno=errno.EINVAL)
    if not name:
        raise MissingFileError("a file name cannot be empty: give a path", errno=errno.ENOENT)
    return name


def open_to_read(path: str | os.PathLike[str]) -> io.FileIO:
    """A file, open for reading, without a buffer. Raises StorageError."""
    name = file_name(path)
    with storing(name, "open", _READ_REMEDIES):
        return open(name, "rb", buffering=0)


@contextmanager
def storing(path: str, doing: str, remedies: Mapping[int, str] = _REMEDIES) -> Iterator[None]:
    """Turn an OSError inside into a StorageError that names the path and says what to do."""
    try:
        yield
    except TensorwireError:  # some of them are OSErrors too
        raise
    except OSError as error:
        remedy = remedies.get(error.errno or 0, "try again, or choose another place")
        kind = MissingFileError if isinstance(error, FileNotFoundError) else StorageError
        raise kind(f"cannot {doing} {path!r}: {error.strerror or error}; {remedy}", errno=error.errno) from error
