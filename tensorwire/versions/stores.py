"""Where versions are kept: a folder, a web server for one, or any fsspec location. The only I/O of the room.

    store = open_store("versions")                       # a folder
    store = open_store("https://host/versions")          # the same, served by any web server: to read
    store = open_store("s3://bucket/versions")           # an object store, by fsspec

A store has files, each written once under a name of its own, and the manifest, which is replaced as a whole. Readers
never see part of a replaced file: in a folder it appears by a rename, in an object store by one request.
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

from tensorwire.errors import (
    ArgumentError,
    MissingFileError,
    SequenceError,
    StorageError,
    TensorwireError,
    TransportError,
    counted,
)
from tensorwire.storage import open_to_read, write_file

try:
    import fcntl
except ImportError:  # Windows: a second publisher is noticed only when it writes
    fcntl = None  # type: ignore[assignment]

TIMEOUT: Final = 60.0  # seconds that a web server may be silent
_REQUEST: Final = 16 << 20  # bytes per request to an object store, enough for any manifest
_LOCK: Final = ".publisher.lock"
_PART: Final = re.compile(r"\.([0-9]{12}-[0-9a-f]{11}|manifest\.json)\.[0-9a-f]{16}\.part")  # see `storage.atomic`

# Errors of botocore for missing credentials, which are not PermissionErrors.
_NOT_ALLOWED: Final = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")


class Store(Protocol):
    """What a publisher and a subscriber need from a store. `name` is used in errors.

    Methods raise MissingFileError for a missing file, StorageError and TransportError for other failures.
    """

    name: str

    def open(self, name: str, /) -> BinaryIO:
        """Open a file, to be read from front to back and closed."""

    def write(self, name: str, buffers: Iterable[Any], /) -> int:
        """Write a new file; returns its size. It is visible to readers only when complete."""

    def replace(self, name: str, data: bytes, before: bytes | None, /) -> None:
        """Replace a small file, so that a reader gets either the old or the new content.

        `before`: the content that the caller found, None for no file. If a store without a lock finds another content,
        it raises SequenceError and writes nothing.
        """

    def names(self) -> list[str]:
        """The names of all files."""

    def remove(self, name: str, /) -> None:
        """Remove a file, if it exists."""

    def lock(self) -> AbstractContextManager[None]:
        """A context that holds the store's lock, if it has one. Raises StorageError if another process holds it."""


def open_store(location: "str | os.PathLike[str] | Store") -> Store:
    """The store at a path or URL; a `Store` is returned as it is.

    `http://` and `https://` are read with Python's standard library, other URLs with fsspec.
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
    """A folder, which a publisher creates if it is missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise ArgumentError("an empty name is no store's: give a folder or a URL")
        self.name = os.path.abspath(os.fspath(path))  # the current folder may change

    def open(self, name: str) -> BinaryIO:
        """`Store.open`."""
        return cast(BinaryIO, open_to_read(self._path(name)))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """`Store.write`: synced, under its name when complete."""
        return write_file(self._path(name), buffers)

    def replace(self, name: str, data: bytes, before: bytes | None) -> None:
        """`Store.replace`: by a rename. The lock excludes other writers."""
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
        """`Store.lock`: on a hidden file. The system releases it when the process ends, however it ends.

        A process that is forked meanwhile holds it, too.
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
        """Take the lock, and remove incomplete files of a killed publisher."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another publisher has {self.name!r} open: stop that one, or publish elsewhere",
                errno=errno.EWOULDBLOCK,
            ) from None
        except OSError as error:
            raise StorageError(f"{self.name!r} cannot be locked: {error.strerror}", errno=error.errno) from error
        with suppress(OSError):  # they do no harm
            for name in filter(_PART.fullmatch, self.names()):
                self.remove(name)

    def _path(self, name: str) -> str:
        return os.path.join(self.name, name)


class HttpStore:
    """A read-only folder on a web server. `headers`: sent with every request. `timeout`: seconds without data."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> None:
        if "?" in url or "#" in url:
            raise ArgumentError("the URL of a store must be that of a folder, without ? or #; use headers for options")
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
                raise MissingFileError(f"{url} does not exist ({error.code})", errno=errno.ENOENT) from None
            again = error.code >= 500 or error.code in (408, 429)
            raise TransportError(f"{url}: the server answers {error.code} {error.reason}", retryable=again) from None
        except Exception as error:
            raise TransportError(f"{url}: {getattr(error, 'reason', error)}") from error
        return cast(BinaryIO, _Remote(url, response, response.length))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """No."""
        raise self._read_only()

    def replace(self, name: str, data: bytes, before: bytes | None) -> None:
        """No."""
        raise self._read_only()

    def names(self) -> list[str]:
        """No."""
        raise self._read_only()

    def remove(self, name: str) -> None:
        """No."""
        raise self._read_only()

    def lock(self) -> AbstractContextManager[None]:
        """`Store.lock`: none, because HTTP stores are read-only."""
        raise self._read_only()

    def _read_only(self) -> StorageError:
        return StorageError(
            f"{self.name} is read only: publish into the folder that the server serves, or to an object store",
            errno=errno.EROFS,
        )


class FsspecStore:
    """Files at an fsspec URL, such as `s3://bucket/folder`. `options`: of that file system.

    Its objects must appear only when complete, as in object stores. There is no lock. On S3 the manifest is replaced
    only if it is still the one that was read, so that one of two publishers is refused. On other stores, a write by
    another publisher between the read and the write goes unnoticed.
    """

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None) -> None:
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError:
            raise ArgumentError(f"{url} needs fsspec: pip install fsspec") from None
        self.name = url.rstrip("/")
        with _reaching(url):
            self._fs, root = url_to_fs(url, **(options or {}))
        self._root = root.rstrip("/")
        self._has_conditions = url.startswith(("s3://", "s3a://"))

    def open(self, name: str) -> BinaryIO:
        """`Store.open`."""
        with _reaching(f"{self.name}/{name}"):
            file = _Ranges(self._fs, self._path(name))
        return cast(BinaryIO, _Remote(f"{self.name}/{name}", file, None))

    def write(self, name: str, buffers: Iterable[Any]) -> int:
        """`Store.write`."""
        size = 0
        with _writing(f"{self.name}/{name}"):
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

    def replace(self, name: str, data: bytes, before: bytes | None) -> None:
        """`Store.replace`: in one request. It succeeds if the request has arrived, even if its answer was lost."""
        with _writing(f"{self.name}/{name}"):
            condition = self._condition(name, before)
            try:
                self._fs.pipe_file(self._path(name), data, **condition)
            except OSError as error:
                there = self._content(name)
                if there == data:
                    return
                if there != before:
                    raise self._overtaken(name) from None
                if error.errno != errno.ENOSYS:
                    raise
                self._fs.pipe_file(self._path(name), data)  # S3 by its interface, but without conditions

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

    def _condition(self, name: str, before: bytes | None) -> dict[str, Any]:
        """Options that make a request fail unless the file is still `before`. Raises SequenceError if it is not now."""
        # The tag is requested first, so any later change gets a different one.
        tag = self._fs.info(self._path(name), refresh=True)["ETag"] if self._has_conditions and before else None
        if self._content(name) != before:
            raise self._overtaken(name)
        if not self._has_conditions:
            return {}
        return {"mode": "create"} if before is None else {"IfMatch": tag}

    def _content(self, name: str) -> bytes | None:
        """The bytes of a small file; None if it does not exist."""
        try:
            return bytes(self._fs.cat_file(self._path(name), start=0, end=_REQUEST))
        except FileNotFoundError:
            return None

    def _overtaken(self, name: str) -> SequenceError:
        return SequenceError(
            f"{self.name}/{name} is not what it was when it was read: another publisher is at work. Stop one of them, "
            "and begin with a new Publisher"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Ranges:
    """A file of an object store, read with one request per 16 MiB.

    A file object of fsspec would rely on the size in a listing, and keep memory for data that may be read again.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._end = 0
        self._part = memoryview(b"")
        self._is_last = False
        self._fetch()

    def read(self, size: int) -> memoryview:
        """The next bytes, at most `size`; none at the end."""
        if not self._part and not self._is_last:
            self._fetch()
        part, self._part = self._part[:size], self._part[size:]
        return part

    def close(self) -> None:
        """Drop what was read ahead."""
        self._part = memoryview(b"")

    def _fetch(self) -> None:
        try:
            data = self._fs.cat_file(self._path, start=self._end, end=self._end + _REQUEST)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._is_all():
                raise
            data = b""  # stores refuse a range that begins at the end of a file
        self._end += len(data)
        self._part = memoryview(data)
        self._is_last = len(data) < _REQUEST

    def _is_all(self) -> bool:
        self._fs.invalidate_cache(self._path)
        return bool(self._fs.info(self._path)["size"] == self._end)


class _Remote(io.RawIOBase):
    """A remote file. Failures on the way, and an end before `size` bytes, raise TransportError."""

    def __init__(self, name: str, file: Any, size: int | None) -> None:
        super().__init__()
        self.name = name
        self._file = file
        self._left = size

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` with the result of one read."""
        with _reaching(self.name):
            data = self._file.read(len(buffer))
        if self._left is not None:
            self._left -= len(data)
            if not data and len(buffer) and self._left > 0:
                raise TransportError(
                    f"{self.name}: the connection ended {counted(self._left, 'byte')} before the file does"
                )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            with suppress(Exception):  # what was read is verified independently
                self._file.close()
        super().close()


@contextmanager
def _writing(name: str) -> Iterator[None]:
    """As `_reaching`, for writing: if something is missing, it is the place for the file."""
    try:
        with _reaching(name):
            yield
    except MissingFileError as error:
        raise StorageError(
            f"{name} cannot be written: there is no such bucket or folder. Make it first", errno=error.errno
        ) from error


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Turn whatever a remote file system raises, which is undocumented, into an error of this library."""
    try:
        yield
    except TensorwireError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{name} does not exist", errno=errno.ENOENT) from error
    except Exception as error:
        again = not isinstance(error, PermissionError) and type(error).__name__ not in _NOT_ALLOWED
        raise TransportError(f"{name}: {type(error).__name__}: {error}", retryable=again) from error
