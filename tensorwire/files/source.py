"""Reads the bytes of a file, given by a path or as any seekable file object, at offsets.

Errors about the bytes of a file get its name here and, if it is not a stream at all, a hint about what it is.
"""

import codecs
import io
import mmap
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, BinaryIO, Final, TypeGuard

import numpy as np

from tensorwire.errors import (
    ArgumentError,
    ClosedError,
    CorruptError,
    EncodeError,
    TensorwireError,
    TransportError,
    TruncatedError,
    WireError,
    show,
)
from tensorwire.storage.output import name_of, open_to_read, read_at, storing
from tensorwire.wire.frames import MAGIC

Path = str | os.PathLike[str]
Memory = bytes | bytearray | memoryview
File = Path | BinaryIO

# Small reads are served from a window of the first size, which grows up to the second if they go from front to back.
_WINDOW: Final = 4 << 10
_MAX_WINDOW: Final = 256 << 10

# Kinds of files that are mistaken for streams, by their first bytes.
_KINDS: Final = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch that with `git lfs pull`"),
    (b"version https://hawser", "a git-lfs pointer, not the file itself: fetch that with `git lfs pull`"),
    (b"PK\x03\x04", "a zip file, as torch.save and np.savez write: load it with torch.load or np.load, then save_file"),
    (b"PK\x05\x06", "a zip file with nothing in it"),
    (b"\x93NUMPY", "a .npy file: load it with np.load, then save_file"),
    (b"GGUF", "a GGUF file, which this library does not read"),
    (b"\x89HDF\r\n", "an HDF5 file, which this library does not read"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first"),
    (b"\xfd7zXZ\x00", "an xz file: unpack it first"),
    (b"BZh", "a bzip2 file: unpack it first"),
    (b"\x04\x22\x4d\x18", "an lz4 file: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip file: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR file: unpack it first"),
    (MAGIC, "a tensorwire stream: open it with tensorwire.open_file or load_file"),
)
_PICKLES: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_PRINTED: Final = bytes([*b"\t\n\r", *range(0x20, 0x7F)])  # the bytes of ASCII text
_TEXT_SHOWN: Final = 40  # characters
HEAD: Final = 512  # bytes that `kind_of` looks at


def is_path(file: object) -> TypeGuard[Path]:
    """Whether `file` is a path, not a file object.

    Raises ArgumentError if it is neither, ClosedError for an object that is closed.
    """
    if hasattr(file, "fs") and hasattr(file, "mode") and not hasattr(file, "read"):  # fsspec.open has a path, too
        raise ArgumentError('an fsspec OpenFile is not open yet: use `with fsspec.open(..., "rb") as file`')
    if isinstance(file, (str, os.PathLike)):
        return True
    if isinstance(file, io.TextIOBase):
        raise ArgumentError(f"{name_of(file)} is open in text mode: open it in binary mode, with 'rb' or 'wb'")
    if hasattr(file, "read") or hasattr(file, "write"):
        if getattr(file, "closed", False) is True:
            raise closed(name_of(file))
        return False
    raise ArgumentError(f"expected a path or a binary file object, not {type(file).__name__}")


def check_paths(paths: object) -> None:
    """Raise ArgumentError for one path where there should be several: text is iterable, too."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise ArgumentError(f"expected a list of files, not one: give [{paths!r}]")


class Source:
    """Bytes at rest: `tensorwire.wire.RandomAccess`. Any thread may read.

    `name`: shown in errors and in the repr. Raises TruncatedError if the file has become shorter since it was opened.
    """

    name: str
    size: int

    def __init__(self) -> None:
        self._window: tuple[int, memoryview] = 0, memoryview(b"")

    def read(self, offset: int, size: int, /) -> memoryview:
        """Exactly `size` bytes from `offset` on."""
        begin, window = self._window
        if not begin <= offset <= offset + size <= begin + len(window):
            follows = begin <= offset <= begin + len(window)
            ahead = max(min(2 * len(window), _MAX_WINDOW) if follows else 0, _WINDOW, size)
            begin = max(min(offset, self.size - _WINDOW), 0)  # the end of a file is read backwards
            window = np.empty(min(ahead + offset - begin, self.size - begin), np.uint8).data
            self.read_into(begin, window)
            if len(window) <= _MAX_WINDOW:
                self._window = begin, window
        return window[offset - begin : offset - begin + size]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        got = self._read_some(offset, buffer)
        if got != len(buffer):
            raise self._shorter(offset + got)

    def map(self, offset: int, size: int, *, read_only: bool) -> memoryview:
        """A mapping of exactly these bytes: read-only, or writable as a private copy.

        Raises EncodeError if the source cannot be mapped, StorageError if the system refuses.
        """
        raise EncodeError("only a file that was opened by its path can be mapped; read it with file[name]")

    def close(self) -> None:
        """Release the file. Reading afterwards raises ClosedError."""
        self._window = 0, memoryview(b"")

    def _shorter(self, size: int) -> TruncatedError:
        error = TruncatedError("the file has become shorter since it was opened", offset=size)
        error.file = self.name
        return error

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        raise NotImplementedError


class PathSource(Source):
    """A file by its path."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = os.fsdecode(path)
        self._file = open_to_read(path)
        status = os.fstat(self._file.fileno())
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            self._file.close()
            raise _no_seek(self.name)
        self.size = status.st_size
        self.identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def map(self, offset: int, size: int, *, read_only: bool) -> memoryview:
        """`Source.map`."""
        end = os.fstat(self._file.fileno()).st_size
        if offset + size > end:
            raise self._shorter(end)
        page = offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_READ if read_only else mmap.ACCESS_COPY
        with storing(self.name, "map"):
            mapped = mmap.mmap(self._file.fileno(), page + size, access=access, offset=offset - page)
        return memoryview(mapped)[page:]

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if self._file.closed:
            raise closed(self.name)
        with storing(self.name, "read"):
            return read_at(self._file.fileno(), buffer, offset)


class OpenFiles:
    """The files that were read last, of many, open: at most `most`, but for those that are being read."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[str, PathSource] = {}  # the one that was used last stands last
        self._readers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, path: str) -> PathSource:
        """The file of this path, which stays open until `give_back`."""
        with self._lock:
            file = self._open.pop(path, None) or PathSource(path)
            self._open[path] = file
            self._readers[path] += 1
            if len(self._open) > self._most:
                for idle in [each for each in self._open if not self._readers[each]][: len(self._open) - self._most]:
                    self._open.pop(idle).close()
            return file

    def give_back(self, path: str) -> None:
        """One reader less."""
        with self._lock:
            self._readers[path] -= 1

    def close(self) -> None:
        """Close those that are open."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()


class OneOfMany(Source):
    """A file by its path that is open only while it is among the last ones of `files` that were read.

    Raises CorruptError where another file has its path by then, or its content was changed.
    """

    def __init__(self, path: str, files: OpenFiles) -> None:
        super().__init__()
        self.name = path
        self._files: OpenFiles | None = files
        file = files.take(path)
        self.size, self._identity = file.size, file.identity
        files.give_back(path)

    def close(self) -> None:
        """Let go of the file, which others may still read."""
        super().close()
        self._files = None

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        files = self._files
        if files is None:
            raise closed(self.name)
        file = files.take(self.name)
        try:
            if file.identity != self._identity:
                error = CorruptError("the file was replaced or written to since it was opened: open it again")
                error.file = self.name
                raise error
            return file._read_some(offset, buffer)
        finally:
            files.give_back(self.name)


class ObjectSource(Source):
    """A seekable file object of the caller. It is not closed, and nothing else may read it meanwhile."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.name = name_of(file)
        self._file: Any = file
        self._lock = threading.Lock()  # seeking and reading are two calls
        _check_readable(file)
        if not _seekable(file):
            raise _no_seek(self.name)
        self.size = file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Release the object."""
        super().close()
        self._file = None

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if self._file is None:
            raise closed(self.name)
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(buffer) and (data := read_some(self._file, len(buffer) - done)):
                buffer[done : done + len(data)] = data
                done += len(data)
        return done


class MemorySource(Source):
    """A buffer with the content of a file, which is not copied."""

    def __init__(self, buffer: Memory) -> None:
        super().__init__()
        self.name = name_of(buffer)
        self._memory = memoryview(buffer).cast("B").toreadonly()
        self.size = len(self._memory)

    def read(self, offset: int, size: int, /) -> memoryview:
        """`Source.read`."""
        return self._memory[offset : offset + size]

    def map(self, offset: int, size: int, *, read_only: bool) -> memoryview:
        """`Source.map`: the memory itself or, if it must be writable, a copy."""
        part = self._memory[offset : offset + size]
        return part if read_only else memoryview(bytearray(part))

    def close(self) -> None:
        """Release the buffer."""
        super().close()
        self._memory = memoryview(b"")

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        part = self._memory[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def source(file: File | Memory) -> Source:
    """A path, file object or buffer, to be read at offsets. Raises EncodeError for an object that cannot seek."""
    if isinstance(file, Memory):
        return MemorySource(file)
    return PathSource(file) if is_path(file) else ObjectSource(file)


def read_some(file: Any, size: int) -> bytes:
    """At most `size` bytes from a file object; none only at its end.

    Raises TransportError if it is non-blocking and has none yet, ArgumentError if it returns text.
    """
    data = file.read(size)
    if data is None:
        raise TransportError(
            f"{name_of(file)} is non-blocking and has no data yet: give one that blocks", retryable=False
        )
    if isinstance(data, str):
        raise ArgumentError(f"{name_of(file)} gives text: open it in binary mode, with 'rb'")
    return data  # type: ignore[no-any-return]  # a file object's bytes


@contextmanager
def opened(file: File) -> Iterator[Any]:
    """A file to be read from front to back: a path is opened, an object is read from its current position.

    WireErrors inside name it and, if it is not a stream, say what it is.
    """
    with _raw(file) as raw:
        begin = raw.tell() if _seekable(raw) else None
        try:
            yield raw if hasattr(raw, "readinto") else _Reads(raw)
        except WireError as error:
            name_error(error, name_of(file), b"" if begin is None else _head(raw, begin), MAGIC)
            raise


class _Reads(io.RawIOBase):
    """A file object that only has `read`."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.name = name_of(file)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` with the result of one read."""
        data = read_some(self._file, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _raw(file: Any) -> AbstractContextManager[Any]:
    if is_path(file):
        return open_to_read(file)
    _check_readable(file)
    return nullcontext(file)


def name_error(error: TensorwireError, name: str, head: bytes, magic: bytes) -> None:
    """Add to an error the name of the file and, if it begins like another kind of file, what it is."""
    error.file = error.file or name
    kind = kind_of(head, magic) if magic else kind_of(head)
    if kind is not None:
        error.detail = f"this is {kind}"


def bytes_left(file: Any) -> int | None:
    """Bytes from the current position of a file to its end, if that can be known."""
    if not _seekable(file):
        return None
    place: int = file.tell()
    end: int = file.seek(0, os.SEEK_END)
    file.seek(place)
    return end - place


def check_writable(file: Any) -> None:
    """Raise ArgumentError for a file that is open for reading only."""
    if not hasattr(file, "write") or (_says_how_it_is_open(file) and not file.writable()):
        raise ArgumentError(f"{name_of(file)} is not open for writing: open it with 'wb'")


def _check_readable(file: Any) -> None:
    if _says_how_it_is_open(file) and not file.readable():
        raise ArgumentError(f"{name_of(file)} is not open for reading: open it with 'rb'")


def _says_how_it_is_open(file: Any) -> bool:
    return isinstance(file, (io.FileIO, io.BufferedIOBase))  # other classes may say no by default


def _no_seek(name: str) -> EncodeError:
    return EncodeError(f"{name} cannot seek: read it from front to back with load_file or decode")


def closed(name: str) -> ClosedError:
    """The error of a file that was closed."""
    error = ClosedError("the file is closed: open it again to read from it")
    error.file = name
    return error


def _seekable(file: Any) -> bool:
    return hasattr(file, "seekable") and bool(file.seekable())


def _head(file: Any, begin: int) -> bytes:
    """The first bytes of a file, if they can be read; used only to explain another error."""
    with suppress(OSError, ValueError):
        place = file.tell()
        file.seek(begin)
        head = bytes(file.read(HEAD) or b"")
        file.seek(place)
        return head
    return b""


def kind_of(head: bytes, *expected: bytes) -> str | None:
    """What a file is whose first `HEAD` bytes are these; None where it is unknown, or begins as one of `expected` do.

    Where nothing is expected to begin it, a `.safetensors` file is.
    """
    if not head or head.startswith(expected):
        return None
    for begin, kind in _KINDS:
        if head.startswith(begin):
            return kind
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML or XML page, not the file: look at what the server answered"
    if head.startswith(_PICKLES):
        return "a pickle file, which can run code when it is loaded: convert it where it is trusted"
    if head[257:262] == b"ustar":
        return "a tar file: unpack it first"
    if head[8:10] == b'{"':
        return "a .safetensors file: read it with tensorwire.safetensors, or encode it first" if expected else None
    if len(head) == HEAD and not any(head):
        return "a file that begins with zeros: it was never written to its end"
    if text.startswith(b"{"):
        return "JSON text, not the file: look at what the server answered"
    if not head.translate(None, _PRINTED):
        return f"text, not the file; it begins with {show(head[:_TEXT_SHOWN].decode('ascii'))}"
    return None
