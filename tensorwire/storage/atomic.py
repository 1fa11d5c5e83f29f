"""Files that appear under their name only when they are complete."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final

from tensorwire.errors import StorageError
from tensorwire.storage.output import Output, file_name, storing

# Do not follow links, and do not wait for a writer when opening a FIFO.
_ALWAYS: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NAME_SHOWN: Final = 24  # characters of the target's name in the temporary one: at most 96 bytes, names may have 255
_HAS_FOLDER_FDS: Final = os.open in os.supports_dir_fd  # not on Windows: there, names are joined to the folder's path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[int]:
    """A file descriptor, open for reading and writing, of a new file that takes the name `path` on success.

    The file is made beside its target (O_EXCL, no links followed), synced, closed, renamed over it, and the folder
    synced. On any error it is removed and a file already at `path` stays untouched. Raises StorageError; for the
    last sync, when the file is complete under its name but may not survive a loss of power, its detail says so.
    """
    with Target(path) as target:
        temporary = target.temporary()
        try:
            fd = target.create(temporary)
            try:
                yield fd
                with target.storing("sync"):
                    os.fsync(fd)
            except BaseException:
                with suppress(OSError):  # the first error counts
                    os.close(fd)
                raise
            with target.storing("close"):  # network file systems report a full disk here
                os.close(fd)
            target.rename(temporary)
        except BaseException:
            target.remove(temporary)
            raise
        target.sync()


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """The path of a new folder that takes the name `path` on success, to make files in with `replacing`.

    On any error it is removed with everything in it. Raises StorageError, at once if `path` exists and is not an empty
    folder. The current folder may change meanwhile.
    """
    shown = file_name(path)
    path = os.path.abspath(shown)
    parent, name = os.path.split(path)
    folder = os.path.join(parent, f".{name[:_NAME_SHOWN]}.{os.urandom(8).hex()}.part")
    with storing(shown, "make the folder"):
        _check_new_folder(path)
        os.mkdir(folder)
    try:
        yield folder
        with storing(shown, "rename a folder to"):
            os.replace(folder, path)
    except BaseException:
        import shutil  # which loads three compressors

        shutil.rmtree(folder, ignore_errors=True)
        raise
    if _HAS_FOLDER_FDS:
        with storing(shown, "sync the folder of"):
            fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _sync_folder(fd)
            finally:
                os.close(fd)


def _check_new_folder(path: str) -> None:
    """Raise OSError unless a folder may take this name: it is free, or an empty folder other than the current one."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode) or os.listdir(path):
        raise FileExistsError(errno.EEXIST, "it exists and is not an empty folder")
    if os.path.samefile(path, os.curdir):
        raise FileExistsError(errno.EEXIST, "it is the current folder")


class Target:
    """The name of a file to be written, in a folder that is held open; a context manager. Raises StorageError.

    `name`: the last part of `path`. `mode`: the permissions for the file, which are those of the file that it replaces.

    Files are made, renamed and removed relative to the open folder, so swapping the folder for a link meanwhile has no
    effect. A folder, FIFO, socket or device at `path`, or a link to one, such as /dev/stdout, is refused here; any
    other symbolic link is replaced, never followed. Whatever takes the name between here and `rename` is replaced like
    a file (a folder raises an error), and never written through.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = file_name(path)
        folder, self.name = os.path.split(self.path)
        self._folder = folder or os.curdir
        self._fd: int | None = None
        with self.storing("write"):
            if _HAS_FOLDER_FDS:
                self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.mode = self._check()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Target":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def temporary(self) -> str:
        """An unused name in the same folder."""
        return f".{self.name[:_NAME_SHOWN]}.{os.urandom(8).hex()}.part"

    def create(self, name: str) -> int:
        """A descriptor of a new file in the folder, as `open` makes it."""
        with self.storing("create a file beside"):
            return self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a file in the folder, not of a link. A new file gets the permissions `mode`, less the umask.

        Raises OSError.
        """
        return os.open(self._at(name), flags | _ALWAYS, self.mode, dir_fd=self._fd)

    def status(self, name: str) -> os.stat_result:
        """The status of the file or link with this name in the folder. Raises OSError."""
        return os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Whether a file or link in the folder has this name. Raises OSError."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def is_at(self, name: str, status: os.stat_result) -> bool:
        """Whether `status` belongs to the file with this name in the folder. Raises OSError."""
        try:
            return os.path.samestat(status, self.status(name))
        except FileNotFoundError:
            return False

    def rename(self, name: str) -> None:
        """Give a file in the folder the final name, replacing any file that has it."""
        with self.storing("rename a file to"):
            os.replace(self._at(name), self._at(self.name), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file from the folder, if possible."""
        with suppress(OSError):
            os.unlink(self._at(name), dir_fd=self._fd)

    def sync(self) -> None:
        """Sync the folder, and with it any renaming, if the system can."""
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
        """Turn an OSError inside into a StorageError that names the path."""
        with storing(self.path, doing):
            yield

    def _at(self, name: str) -> str:
        return name if self._fd is not None else os.path.join(self._folder, name)

    def _check(self) -> int:
        """The permissions that the file may have. Raises OSError for a target that is neither file nor link."""
        if self.name in ("", os.curdir, os.pardir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            mode = self.status(self.name).st_mode
        except FileNotFoundError:
            return 0o666
        is_link = stat.S_ISLNK(mode)
        if is_link:
            try:
                mode = os.stat(self._at(self.name), dir_fd=self._fd).st_mode
            except OSError:  # it leads nowhere
                return 0o666
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISREG(mode):
            return 0o666 if is_link else stat.S_IMODE(mode) & 0o777
        raise StorageError(
            f"cannot write {self.path!r}: it is a FIFO, socket or device, which a rename would replace; "
            "write to a pipe instead",
            errno=errno.EEXIST,
        )


def rename(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Give a complete file the name `new`, replacing any file that has it, and sync the folder.

    Both names must be in the same folder. Raises StorageError.
    """
    folder, name = os.path.split(file_name(old))
    with Target(new) as target:
        if os.path.split(target.path)[0] != folder:
            raise StorageError(
                f"cannot rename {old!r} to {target.path!r}: they are in different folders", errno=errno.EXDEV
            )
        target.rename(name)
        target.sync()


def write_file(path: str | os.PathLike[str], buffers: Iterable[Any], late: Iterable[tuple[int, bytes]] = ()) -> int:
    """Write buffers to a file that appears only when it is complete; returns its size. Raises StorageError.

    `late`: pairs of offset and bytes that are known only after the last buffer, and overwrite what is there.
    """
    with replacing(path) as fd:
        output = Output(fd, path)
        size = output.append(buffers)
        for offset, data in late:
            output.write_at(memoryview(data), offset)
        return size


def _sync_folder(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that cannot sync folders
            raise
