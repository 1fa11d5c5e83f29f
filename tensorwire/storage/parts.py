"""Files under hidden names: parts, which may take several attempts to complete, and scratch files."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Final

from tensorwire.errors import StorageError
from tensorwire.storage.atomic import Target
from tensorwire.storage.output import Output, read_at

try:
    import fcntl
except ImportError:  # Windows: two writers of the same part are not detected
    fcntl = None  # type: ignore[assignment]

_NAME_BYTES: Final = 200  # of the target's name in the hidden one; file systems stop at 255
_NOTE_LIMIT: Final = 64 << 10
_NO_NOTE: Final = (errno.ENOENT, errno.ELOOP, errno.ENXIO)  # nothing there, a link, or a socket: none is followed


class Part:
    """A file that several attempts may write, each in a process of its own, before it takes the name `path`.

    It is in the folder of its target, under a hidden name made from the target's name and `key`, so that the next
    attempt finds it. `open` gives exclusive access. Links are not followed: a part that is a link, or has a second
    name, is refused. Permissions are those of the file that it replaces, less the umask.

    A note outlives the part and tells later attempts its result. It is written once the file is complete, and before
    the file gets its final name. It identifies the file (inode, size and time of the last change), and is believed only
    while that very file has the name. It stays until `forget`. A crash leaves one of these states:

        part   note   file at `path`      the next attempt
        any    any    the noted file      gets the note, and removes what else is left
        yes    any    another, or none    continues the part
        no     any    another, or none    starts from the beginning

    Raises StorageError, with errno EWOULDBLOCK if the part is open elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str], key: bytes) -> None:
        self._target = Target(path)
        stem = _stem(self._target.name, key)
        self._name, self._made_name, self._note_name = f"{stem}.part", f"{stem}.made", f"{stem}.done"
        self._fd: int | None = None

    @property
    def path(self) -> str:
        """The path of the part itself."""
        return self._beside(self._name)

    def note(self) -> bytes | None:
        """The note about the file that has the name now; None if there is no such file or no note about it."""
        with self._keeping("look beside"):
            text = self._read_note()
            try:
                wanted, note = json.loads(text)
                done = wanted == self._identity(self._target.name) and isinstance(note, str)
            except (ValueError, TypeError, RecursionError, FileNotFoundError):  # incomplete, or something else
                return None
            return note.encode("utf-8", "surrogateescape") if done else None

    @contextmanager
    def named(self) -> Iterator[Callable[[memoryview, int], int]]:
        """A function that reads from the file that has the final name, as `read_at` does from the part."""
        with self._keeping("read back"):
            fd = self._target.open(self._target.name, os.O_RDONLY)
            try:
                yield lambda buffer, offset: read_at(fd, buffer, offset)
            finally:
                os.close(fd)

    def open(self) -> int:
        """Open the part exclusively, creating it if needed. Returns its size."""
        with self._keeping("write"):
            self._fd = self._open_alone()
            self._output = Output(self._fd, self._target.path)
            return os.fstat(self._fd).st_size

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns fewer bytes only at the end of the part."""
        with self._keeping("read back"):
            return read_at(self._open_fd, buffer, offset)

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        with self._keeping("write"):
            self._output.write_at(data, offset)

    def truncate(self, size: int) -> None:
        """Cut the part off after `size` bytes."""
        with self._keeping("cut"):
            os.ftruncate(self._open_fd, size)

    def finish(
        self,
        note: bytes,
        *,
        convert: Callable[[str, str], None] | None = None,
        name: Callable[[str], None] | None = None,
    ) -> None:
        """Give the part its final name, and leave a note, once everything is on disk.

        `convert`: writes another file from the part, which then gets the name instead; called with the paths of the
        part and of that file, which exists and has its permissions already. `name`: called with the path of the file
        instead of renaming it. If either raises, the part stays.
        """
        with self._keeping("sync"):
            os.fsync(self._open_fd)
        named = self._name
        if convert is not None:
            named = self._made_name
            self._convert(convert)
        with self._keeping("note beside"):
            self._write_note(json.dumps([self._identity(named), note.decode("utf-8", "surrogateescape")]).encode())
        self._target.sync()  # the note is there before the final name is
        if name is None:
            with self._keeping("rename"):
                self._target.rename(named)
        else:
            with self._keeping("make"):
                name(self._beside(named))
        self._target.sync()
        if convert is not None or name is not None:
            self._target.remove(self._name)
        self.close()

    def forget(self) -> None:
        """Remove the note."""
        self._remove(self._note_name)

    def discard(self) -> None:
        """Remove the part, the file converted from it, and its note."""
        self.close()
        self._remove(self._name, self._made_name, self._note_name)

    def tidy(self) -> None:
        """Remove what a crash has left, once the file has its name."""
        self._remove(self._name, self._made_name)

    def close(self) -> None:
        """Close the part; what was written stays for the next attempt."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # what matters was synced
                os.close(fd)
        self._target.close()

    @property
    def _open_fd(self) -> int:
        assert self._fd is not None, "the part is not open"
        return self._fd

    def _open_alone(self) -> int:
        while True:
            fd = self._target.open(self._name, os.O_RDWR | os.O_CREAT)
            try:
                if fcntl is not None:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(fd)
                if self._target.is_at(self._name, status):
                    self._check(fd, status)
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its previous owner has just renamed or removed it

    def _check(self, fd: int, status: os.stat_result) -> None:
        if not _is_own_file(status):
            raise self._not_ours(self._name)
        kept = status.st_mode & self._target.mode & 0o777
        if kept != status.st_mode & 0o777 and hasattr(
            os, "fchmod"
        ):  # the target has lost permissions since the part was made
            os.fchmod(fd, kept)

    def _convert(self, convert: Callable[[str, str], None]) -> None:
        with self._keeping("make"):
            self._target.remove(self._made_name)
            os.close(
                self._target.open(self._made_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            )  # created with the right mode
            try:
                convert(self.path, self._beside(self._made_name))
            except BaseException:
                self._target.remove(self._made_name)
                raise

    def _identity(self, name: str) -> list[int]:
        """An identity of the file with this name. It survives renaming, but not replacing the file or writing to it."""
        status = self._target.status(name)
        return [status.st_ino, status.st_size, status.st_mtime_ns]

    def _read_note(self) -> bytes:
        try:
            fd = self._target.open(self._note_name, os.O_RDONLY)
        except OSError as error:
            if error.errno in _NO_NOTE:
                return b""
            raise
        try:
            return os.read(fd, _NOTE_LIMIT) if _is_own_file(os.fstat(fd)) else b""
        finally:
            os.close(fd)

    def _write_note(self, note: bytes) -> None:
        with suppress(FileNotFoundError):  # replaces a link, or a note that was not believed, and nothing else
            mode = self._target.status(self._note_name).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise self._not_ours(self._note_name)
            self._target.remove(self._note_name)
        fd = self._target.open(self._note_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            Output(fd, self._target.path).append([note])
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove(self, *names: str) -> None:
        with suppress(StorageError), Target(self._target.path) as target:
            for name in names:
                target.remove(name)

    def _beside(self, name: str) -> str:
        return os.path.join(os.path.dirname(self._target.path), name)

    def _not_ours(self, name: str) -> StorageError:
        what = "is not a plain file, but a link, a pipe, a device or a second name of another file; remove it"
        return StorageError(f"{self._beside(name)!r} {what}", errno=errno.EEXIST)

    @contextmanager
    def _keeping(self, doing: str) -> Iterator[None]:
        """Turn an OSError inside into a StorageError that says what remains."""
        try:
            with self._target.storing(doing):
                yield
        except StorageError as error:
            if error.errno == errno.EWOULDBLOCK:
                busy = f"{self._target.path} is being written by somebody else"
                raise StorageError(busy, errno=error.errno) from error
            detail = f"{error.detail}; what was received stays and is resumed"
            raise StorageError(detail, errno=error.errno) from error


def has_note(path: str | os.PathLike[str]) -> bool:
    """Whether there is a note of a part for this name that was not forgotten yet."""
    try:
        return any(name.endswith(".done") for name in _left_beside(path))
    except OSError:
        return False


def discard_parts(path: str | os.PathLike[str], *, but: Iterable[bytes] = (), notes: bool = True) -> None:
    """Remove what parts for this name have left in its folder, except those with the keys in `but`.

    `notes`: remove their notes, too. The parts must not be open anywhere.
    """
    folder, name = os.path.split(os.fsdecode(path))
    kept = tuple(f"{_stem(name, key)}." for key in but)
    for left in _left_beside(path):
        if not left.startswith(kept) and (notes or not left.endswith(".done")):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, left))


def _left_beside(path: str | os.PathLike[str]) -> list[str]:
    """The names of files that parts for this name have left in its folder."""
    folder, name = os.path.split(os.fsdecode(path))
    begin = f".{_shortened(name)}."
    return [name for name in os.listdir(folder or os.curdir) if name.startswith(begin)]


def _is_own_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _stem(name: str, key: bytes) -> str:
    return f".{_shortened(name)}.{sha256(key).hexdigest()[:16]}"


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


@contextmanager
def scratch() -> Iterator[str]:
    """The path for a private temporary file, which is removed when the block ends. Raises StorageError.

    It is removed even if a signal handler raises: the folder's name is known before the folder is made, and a removal
    that is interrupted is tried again.
    """
    folder = ""
    try:
        try:
            folder = os.path.join(tempfile.gettempdir(), f"tensorwire-{os.urandom(16).hex()}")
            os.mkdir(folder, 0o700)
        except OSError as error:
            raise StorageError(f"no folder for temporary files: {error}", errno=error.errno) from error
        yield os.path.join(folder, "scratch")
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
