"""Files that appear under their name only when they are complete, and a StorageError for whatever keeps them from it."""

import errno
import io
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final

from tensorwire.errors import StorageError

_WINDOW: Final = 64 << 20
_BINARY: Final = getattr(os, "O_BINARY", 0)
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | _BINARY
_NAME_SHOWN: Final = 24  # characters of the target's name in the temporary one: at most 96 bytes, names may have 255
_HAS_FOLDER_FDS: Final = os.open in os.supports_dir_fd  # not on Windows: there, names are joined to the folder's path
_SEEKING: Final = threading.Lock()  # where reading and writing at an offset takes two calls
_REMEDIES: Final = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "the quota is used up: free some space, have it raised, and try again",
    errno.EFBIG: "the file is larger than its file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOENT: "the folder does not exist, or no longer: create it first",
    errno.ENOTDIR: "part of the path is a file: choose another",
    errno.EISDIR: "there is a folder of this name: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: close some, or raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.EIO: "the device failed: check it before trying again",
}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[int]:
    """A file descriptor, open for reading and writing, of a new file that takes the name `path` on success.

    The file is made beside its target (O_EXCL, no links followed), synced, closed, renamed over it, and the folder
    synced. On any error it is removed and a file already at `path` stays untouched. Raises StorageError; for the
    last sync, when the file is complete under its name but may not survive a loss of power, its detail says so.
    """
    with Place(path) as place:
        temporary = place.temporary()
        try:
            fd = place.create(temporary)
            try:
                yield fd
                with place.storing("sync"):
                    os.fsync(fd)
            except BaseException:
                with suppress(OSError):  # the first error counts
                    os.close(fd)
                raise
            with place.storing("close"):  # network file systems report a full disk here
                os.close(fd)
            place.rename(temporary)
        except BaseException:
            place.remove(temporary)
            raise
        place.sync()


class Place:
    """The name of a file to come, in a folder that is held open; a context manager. Raises StorageError.

    Files are made, renamed and removed relative to the open folder: one that is swapped for a link meanwhile redirects
    nothing. A folder, FIFO, socket or device at `path` is refused here; a symbolic link is replaced, never followed.
    What else takes the name between here and `rename` is replaced like a file (a folder fails): nothing is ever
    written through it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fsdecode(path)
        folder, self._name = os.path.split(self.path)
        self._folder = folder or os.curdir
        self._fd: int | None = None
        with self.storing("write"):
            if _HAS_FOLDER_FDS:
                self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._mode = self._check()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def temporary(self) -> str:
        """A name nobody else uses, in the same folder."""
        return f".{self._name[:_NAME_SHOWN]}.{os.urandom(8).hex()}.part"

    def create(self, name: str) -> int:
        """A descriptor of a new file in the folder, with the permissions of the one to be replaced, less the umask."""
        with self.storing("create a file beside"):
            return os.open(self._at(name), _NEW, self._mode, dir_fd=self._fd)

    def rename(self, name: str) -> None:
        """Give a file in the folder the final name, over whatever has it."""
        with self.storing("rename a file to"):
            os.replace(self._at(name), self._at(self._name), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file from the folder as far as that is possible."""
        with suppress(OSError):
            os.unlink(self._at(name), dir_fd=self._fd)

    def sync(self) -> None:
        """Put the folder on disk, where the system can, and so what was renamed."""
        if self._fd is None:
            return
        try:
            _sync_folder(self._fd)
        except OSError as error:
            detail = f"{self.path!r} is complete under its name, but its folder could not be synced"
            raise StorageError(
                f"{detail} ({error.strerror}): it may not survive a loss of power", errno=error.errno
            ) from error

    @contextmanager
    def storing(self, doing: str) -> Iterator[None]:
        """What the system refuses inside becomes a StorageError that names the path."""
        with _storing(self.path, doing):
            yield

    def _at(self, name: str) -> str:
        return name if self._fd is not None else os.path.join(self._folder, name)

    def _check(self) -> int:
        """The permissions that the file may have. Raises OSError for a target that is neither file nor link."""
        if self._name in ("", os.curdir, os.pardir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            mode = os.stat(self._at(self._name), dir_fd=self._fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0o666
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISREG(mode):
            return stat.S_IMODE(mode) & 0o777
        if stat.S_ISLNK(mode):
            return 0o666
        raise StorageError(
            f"cannot write {self.path!r}: it is a FIFO, socket or device, which a rename would replace; "
            "write to a pipe instead",
            errno=errno.EEXIST,
        )


def write_file(path: str | os.PathLike, buffers: Iterable) -> int:
    """Write a file that appears only when complete, of these buffers; returns its size. Raises StorageError."""
    with replacing(path) as fd:
        return Output(fd, path).append(buffers)


class Output:
    """Writes to an open file, and has the system put on disk what was written a while ago. Raises StorageError.

    Left alone, it would let gigabytes gather in the page cache and write them at the sync, twice as slow in all as
    when writing goes on beside receiving; and the cache of whatever else the machine does would be gone.
    `path`: the name that the file will have, for errors.
    """

    def __init__(self, fd: int, path: str | os.PathLike) -> None:
        self._fd = fd
        self._path = os.fsdecode(path)
        self._begin = self._pushed = self._end = 0

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        if offset != self._end:
            self._begin = self._pushed = offset
        self._end = offset + len(rest)
        with _storing(self._path, "write"):
            while rest:
                size = _write_some(self._fd, rest, offset)
                if size == 0:  # or this would not end
                    raise OSError(errno.EIO, "the system takes no bytes")
                rest, offset = rest[size:], offset + size
        if self._end - self._pushed >= _WINDOW:
            self._push()

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what was written from `offset` on."""
        with _storing(self._path, "read back"):
            if read_at(self._fd, buffer, offset) != memoryview(buffer).nbytes:
                raise OSError(errno.EIO, "the file became shorter while it was written")

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
            with suppress(OSError):  # advice only: an error of the disk comes back from the sync
                os.posix_fadvise(self._fd, begin, self._end - begin, os.POSIX_FADV_DONTNEED)
        self._pushed = self._end


class OutputFile(io.RawIOBase):
    """An Output for code that wants a file to write and seek in, such as zipfile. Does not close the descriptor."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._offset = self._end = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._end}[whence]
        return self._offset

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self._output.write_at(data, self._offset)
        self._offset += size
        self._end = max(self._end, self._offset)
        return size


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


def sync_folder(folder: str) -> None:
    """Put on disk which names a folder holds. Raises OSError."""
    if not _HAS_FOLDER_FDS:
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync_folder(fd)
    finally:
        os.close(fd)


def _sync_folder(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that know no sync of folders
            raise


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


@contextmanager
def _storing(path: str, doing: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "try again, or choose another place")
        raise StorageError(
            f"cannot {doing} {path!r}: {error.strerror or error}; {remedy}", errno=error.errno
        ) from error
