"""Where bytes come from: anything with `readinto`, any buffer, any iterable of buffers."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, Protocol

from tensorwire.errors import FormatError
from tensorwire.wire import NEED_DATA, Reader


class Source(Protocol):
    """A blocking byte source, as raw files and sockets are."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` with at least one byte and return how many; 0 at the end of input."""


class _Bytes:
    """One buffer that holds one stream and nothing else."""

    def __init__(self, data: Any) -> None:
        self._rest = memoryview(data).cast("B")
        # Nobody can change it between its verification and its use.
        self.lasting = type(data) is bytes

    def readinto(self, buffer: memoryview, /) -> int:
        data = self.take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def take(self, size: int) -> memoryview:
        """The next bytes where they stand, at most `size`."""
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def finish(self, offset: int) -> None:
        if self._rest:
            raise FormatError(f"{len(self._rest)} bytes after the end frame", offset=offset)


class _Chunks:
    """An iterable of buffers, which may be cut anywhere."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks: Iterator[Any] = iter(chunks)
        self._rest = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk).cast("B")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def finish(self, offset: int) -> None:
        if self._rest or any(memoryview(chunk).nbytes for chunk in self._chunks):
            raise FormatError("bytes after the end frame", offset=offset)


def as_source(data: Any) -> Source:
    """`data` as a Source. Raises TypeError for what is none."""
    if hasattr(data, "readinto"):
        return data
    try:
        return _Bytes(data)
    except TypeError:
        pass
    if isinstance(data, Iterable) and not isinstance(data, str):
        return _Chunks(data)
    raise TypeError(f"expected a buffer, an iterable of buffers or something with readinto, not {type(data).__name__}")


def may_wait(source: Source) -> bool:
    """Whether reading from it may take time that work can be done in."""
    return not isinstance(source, _Bytes)


def finish(source: Source, offset: int) -> None:
    """After the end frame, which ended at `offset`: refuse what is left of a buffer or iterable. A file or socket may carry on."""
    if isinstance(source, (_Bytes, _Chunks)):
        source.finish(offset)


class Consumer(Protocol):
    """What takes a stream in, without its input: `steps` yields NEED_DATA, after which `get_buffer()` is to be filled and
    `buffer_updated(n)` told (0: the input has ended), and results. Whoever drives it decides how bytes are waited for.
    """

    def steps(self) -> Generator[Any, None, None]: ...

    def get_buffer(self) -> memoryview: ...

    def buffer_updated(self, size: int) -> None: ...

    def lend(self, data: memoryview) -> None: ...


class FromReader(Consumer):
    """A Consumer around a Reader that can also be iterated over where it has a source of its own."""

    _reader: Reader
    _source: Source | None

    def __iter__(self) -> Iterator[Any]:
        assert self._source is not None
        return pull(self, self._source)

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        return self._reader.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes went there; 0: the input has ended."""
        self._reader.buffer_updated(size)

    def lend(self, data: memoryview) -> None:
        """`Reader.lend`."""
        self._reader.lend(data)


def pull(consumer: Consumer, source: Source) -> Iterator[Any]:
    """The results of a consumer that is fed from a blocking source."""
    offset = 0
    with closing(consumer.steps()) as steps:
        for step in steps:
            if step is not NEED_DATA:
                yield step
            elif isinstance(source, _Bytes) and source.lasting:
                data = source.take(len(consumer.get_buffer()))
                consumer.lend(data)
                offset += len(data)
            else:
                got = source.readinto(consumer.get_buffer()) or 0
                consumer.buffer_updated(got)
                offset += got
    finish(source, offset)
