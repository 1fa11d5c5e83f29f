"""Where versions are kept: a folder, a web server that shows one, or whatever fsspec reaches. The only I/O of the room.

    store = open_store("versions")                       # a folder
    store = open_store("https://host/versions")          # the same, served by any web server: to read
    store = open_store("s3://bucket/versions")           # an object store, by fsspec

A store has files, written once under names of their own, and the manifest, which is replaced as a whole. What is
`replace`d is never seen in part. In a folder everything appears by a rename.
"""

import errno
import io
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, BinaryIO, Final, Protocol, cast
from urllib.parse import urlsplit

from tensorwire.errors import ArgumentError, MissingFileError, StorageError, TensorwireError, TransportError
from tensorwire.storage import open_to_read, write_file

try:
    import fcntl
except ImportError:  # Windows: two publishers are told apart when the second one writes
    fcntl = None  # type: ignore[assignment]

TIMEOUT: Final = 60.0  # seconds that a web server may be silent
_LOCK: Final = ".publisher.lock"
_PART: Final = re.compile(r"\.([0-9]{12}-[0-9a-f]{11}|manifest\.json)\.[0-9a-f]{16}\.part")  # see `storage.atomic`


class Store(Protocol):
    """What a publisher and a subscriber need of a store. `name` stands in errors.

    Raises MissingFileError for what is not there, StorageError and TransportError for what does not work.
    """

    name: str

    def open(self, name: str, /) -> BinaryIO:
        """A file, to be read from front to back and closed."""

    def write(self, name: str, buffers: Iterable[Any], /) -> int:
        """Write a new file; returns its size. Nobody looks for it before it is there."""

    def replace(self, name: str, data: bytes, /) -> None:
        """Write a small file over the one that is there, so that a reader gets the one or the other."""

    def names(self) -> list[str]:
        """The names of all files."""

    def remove(self, name: str, /) -> None:
        """Remove a file, if it is there."""

    def lock(self) -> AbstractContextManager[None]:
        """A context in which nobody else holds this lock, where the store has one. Raises StorageError if one does."""


def open_store(location: "str | os.PathLike[str] | Store") -> Store:
    """The store at a path or URL; a store is given back as it is.

    `http://` and `https://` are read with what Python brings, other URLs with fsspec.
    """
    if not isinstance(location, (str, os.PathLike)):
        if hasattr(location, "replace") and hasattr(location, "open"):
            return location
        raise ArgumentError(f"a store is a folder, a URL or a Store, not {type(location).__name__}")
    text = os.fspath(location)
    if "://" not in text:
        return FolderStore(text)
    if text.startswith("file://"):
        return FolderStore(urllib.request.url2pathname(urlsplit(text).path))
    if text.startswith(("http://", "https://")):
        return HttpStore(text)
    return FsspecStore(text)


class FolderStore:
    """A folder, which a publisher makes where it is missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.path.abspath(os.fspath(path))  # the current folder may change

    def open(self, name: str) -> BinaryIO:
        """`Store.open`."""
        return cast(BinaryIO, open_to_read(self._path(name)))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """`Store.write`: synced, under its name when complete."""
        return write_file(self._path(name), buffers)

    def replace(self, name: str, data: bytes) -> None:
        """`Store.replace`: by a rename."""
        write_file(self._path(name), [data])

    def names(self) -> list[str]:
        """`Store.names`."""
        return os.listdir(self.name)

    def remove(self, name: str) -> None:
        """`Store.remove`."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """`Store.lock`: of a hidden file, let go of by the system when the process ends, however it does.

        A process that was forked meanwhile holds it as well.
        """
        try:
            os.makedirs(self.name, exist_ok=True)
            fd = os.open(self._path(_LOCK), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise StorageError(f"cannot publish in {self.name!r}: {error.strerror}", errno=error.errno) from error
        try:
            if fcntl is not None:
                self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        """Take the lock, and remove what a publisher that was killed has half written."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another publisher has {self.name!r} open: stop that one, or publish elsewhere",
                errno=errno.EWOULDBLOCK,
            ) from None
        except OSError as error:
            raise StorageError(f"{self.name!r} cannot be locked: {error.strerror}", errno=error.errno) from error
        with suppress(OSError):  # they harm nobody
            for name in filter(_PART.fullmatch, self.names()):
                self.remove(name)

    def _path(self, name: str) -> str:
        return os.path.join(self.name, name)


class HttpStore:
    """A folder that a web server shows, to read. `headers` go with every request; `timeout`: seconds of silence."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> None:
        if "?" in url or "#" in url:
            raise ArgumentError("the URL of a store is that of a folder; what a server wants besides goes into headers")
        self.name = url.rstrip("/")
        self._headers = {"Cache-Control": "no-cache", **(headers or {})}
        self._timeout = timeout

    def open(self, name: str) -> BinaryIO:
        """`Store.open`."""
        url = f"{self.name}/{name}"
        request = urllib.request.Request(url, headers=self._headers)
        try:
            response = urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise MissingFileError(f"{url} is not there ({error.code})", errno=errno.ENOENT) from None
            again = error.code >= 500 or error.code in (408, 429)
            raise TransportError(f"{url}: the server answers {error.code} {error.reason}", retryable=again) from None
        except Exception as error:
            raise TransportError(f"{url}: {getattr(error, 'reason', error)}") from error
        return cast(BinaryIO, _Remote(url, response, response.length))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """No."""
        raise self._read_only()

    def replace(self, name: str, data: bytes) -> None:
        """No."""
        raise self._read_only()

    def names(self) -> list[str]:
        """No."""
        raise self._read_only()

    def remove(self, name: str) -> None:
        """No."""
        raise self._read_only()

    def lock(self) -> AbstractContextManager[None]:
        """`Store.lock`: nobody publishes by HTTP."""
        raise self._read_only()

    def _read_only(self) -> StorageError:
        return StorageError(
            f"{self.name} is read only: publish into the folder that the server shows, or to an object store",
            errno=errno.EROFS,
        )


class FsspecStore:
    """Files behind an fsspec URL, such as `s3://bucket/folder`. `options`: what that file system takes.

    It has to be a store whose objects appear when they are complete, as object stores' do. It has no lock.
    """

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None) -> None:
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError:
            raise ArgumentError(f"to reach {url} takes fsspec: pip install fsspec") from None
        self.name = url.rstrip("/")
        with _reaching(url):
            self._fs, root = url_to_fs(url, **(options or {}))
        self._root = root.rstrip("/")

    def open(self, name: str) -> BinaryIO:
        """`Store.open`."""
        with _reaching(f"{self.name}/{name}"):
            file = self._fs.open(self._path(name), "rb")
        return cast(BinaryIO, _Remote(f"{self.name}/{name}", file, None))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """`Store.write`."""
        size = 0
        with _reaching(f"{self.name}/{name}"):
            try:
                with self._fs.open(self._path(name), "wb") as file:
                    for buffer in buffers:
                        size += memoryview(buffer).nbytes
                        file.write(buffer)
            except BaseException:
                with suppress(Exception):  # the first error counts
                    self._fs.rm_file(self._path(name))
                raise
        return size

    def replace(self, name: str, data: bytes) -> None:
        """`Store.replace`: in one request."""
        with _reaching(f"{self.name}/{name}"):
            self._fs.pipe_file(self._path(name), data)

    def names(self) -> list[str]:
        """`Store.names`."""
        with _reaching(self.name):
            self._fs.invalidate_cache(self._root)
            return [str(path).rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]

    def remove(self, name: str) -> None:
        """`Store.remove`."""
        with suppress(MissingFileError), _reaching(f"{self.name}/{name}"):
            self._fs.rm_file(self._path(name))

    def lock(self) -> AbstractContextManager[None]:
        """`Store.lock`: there is none."""
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Remote(io.RawIOBase):
    """A file elsewhere. What goes wrong on the way is a TransportError, an end before `size` bytes too."""

    def __init__(self, name: str, file: Any, size: int | None) -> None:
        super().__init__()
        self.name = name
        self._file = file
        self._left = size

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` as far as one read does."""
        with _reaching(self.name):
            data = self._file.read(len(buffer))
        if self._left is not None:
            self._left -= len(data)
            if not data and len(buffer) and self._left > 0:
                raise TransportError(f"{self.name}: the connection ended {self._left} bytes before the file does")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            with suppress(Exception):  # what was read is verified on its own
                self._file.close()
        super().close()


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Whatever a library raises that reaches elsewhere, which is written down nowhere, becomes an error of ours."""
    try:
        yield
    except TensorwireError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{name} is not there", errno=errno.ENOENT) from error
    except Exception as error:
        raise TransportError(f"{name}: {type(error).__name__}: {error}") from error
