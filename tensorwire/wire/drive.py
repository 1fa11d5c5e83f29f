"""Feeds a consumer: `pull` from a blocking source, `pull_async` from an asynchronous one, `Push` from a caller.

A source is anything with `readinto`; `as_source` and `as_async_source` make one from a buffer or from an iterable of
buffers. A buffer or an iterable is one stream and nothing else, so bytes after the end frame are an error there; a file
or a socket may continue after it.
"""

import io
import os
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from contextlib import closing
from inspect import isawaitable
from typing import Any, Generic, Protocol, TypeVar

from tensorwire.errors import ArgumentError, ClosedError, FormatError, TransportError
from tensorwire.wire.reader import NEED_DATA, NeedData

ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Source(Protocol):
    """A blocking byte source, as raw files are."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill `buffer` with at least one byte and return how many; 0 at the end of input.

        None, which a non-blocking file returns when it has no data yet, is refused by `pull` and `pull_async`.
        """


class AsyncSource(Protocol):
    """A byte source for coroutines."""

    async def readinto(self, buffer: memoryview, /) -> int | None:
        """As `Source.readinto`."""


class Consumer(Protocol[ResultT_co]):
    """What takes a stream in, without its input.

    `steps` yields results and NEED_DATA. After NEED_DATA the caller must fill `get_buffer()` and call
    `buffer_updated(n)` (0: the input has ended), or call `lend(data)` instead of both. The caller decides how to wait
    for bytes.
    """

    def steps(self) -> Generator[ResultT_co | NeedData, None, None]:
        """Results, and NEED_DATA."""

    def get_buffer(self) -> memoryview:
        """`Reader.get_buffer`."""

    def buffer_updated(self, size: int) -> None:
        """`Reader.buffer_updated`."""

    def lend(self, data: memoryview) -> None:
        """`Reader.lend`."""


class _Bytes:
    """One buffer."""

    def __init__(self, data: Any) -> None:
        self._rest = memoryview(data).cast("B")
        # An immutable buffer cannot change between its verification and its use.
        self.lasting = type(data) is bytes

    def readinto(self, buffer: memoryview, /) -> int:
        data = self.take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def take(self, size: int) -> memoryview:
        """The next bytes, at most `size`, without copying them."""
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def holds_more(self) -> bool:
        return len(self._rest) > 0


def _chunk(data: Any) -> _Bytes:
    try:
        return _Bytes(data)
    except TypeError:
        raise ArgumentError(f"an iterable gave {type(data).__name__} where it must give buffers") from None


class _Chunks:
    """An iterable of buffers, which may be cut anywhere."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks = iter(chunks)
        self._current = _Bytes(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        return self._current.readinto(buffer) if self.holds_more() else 0

    def holds_more(self) -> bool:
        if self._current.holds_more():
            return True
        for chunk in self._chunks:
            self._current = _chunk(chunk)
            if self._current.holds_more():
                return True
        return False


class _AsyncChunks:
    """The same, of an asynchronous iterable."""

    def __init__(self, chunks: AsyncIterable[Any]) -> None:
        self._chunks = aiter(chunks)
        self._current = _Bytes(b"")

    async def readinto(self, buffer: memoryview, /) -> int:
        return self._current.readinto(buffer) if await self.holds_more() else 0

    async def holds_more(self) -> bool:
        if self._current.holds_more():
            return True
        async for chunk in self._chunks:
            self._current = _chunk(chunk)
            if self._current.holds_more():
                return True
        return False


async def _each(chunks: Iterable[Any]) -> AsyncIterator[Any]:
    for chunk in chunks:
        yield chunk


class _Either:
    """What has a `readinto` that may or may not be a coroutine function."""

    def __init__(self, source: Any) -> None:
        self._source = source

    async def readinto(self, buffer: memoryview, /) -> int | None:
        got = self._source.readinto(buffer)
        return await got if isawaitable(got) else got  # type: ignore[no-any-return]  # what it gives is checked later


def as_source(data: Any) -> Source:
    """`data` as a Source: a buffer, an iterable of buffers, or what has `readinto`.

    Raises ArgumentError for anything else.
    """
    _check_kind(data)
    if hasattr(data, "readinto"):
        return data  # type: ignore[no-any-return]  # what its readinto gives is checked when it is called
    try:
        return _Bytes(data)
    except TypeError:
        pass
    if isinstance(data, Iterable):
        return _Chunks(data)
    raise ArgumentError(
        f"expected a buffer, an iterable of buffers or something with readinto, not {type(data).__name__}"
    )


def _check_kind(data: Any) -> None:
    """Raise ArgumentError for what is often passed in place of bytes: a path, a file in text mode."""
    if isinstance(data, (str, os.PathLike)):
        raise ArgumentError(
            f"expected a buffer, an iterable of buffers or a file, not {type(data).__name__}: see load_file, open_file"
        )
    if isinstance(data, io.TextIOBase):
        raise ArgumentError("the source is in text mode: open it in binary mode, with 'rb'")


def as_async_source(data: Any) -> AsyncSource | _Bytes:
    """`data` for `pull_async`: a buffer, an iterable or asynchronous iterable of buffers, or what has `readinto`.

    `readinto` may be a coroutine function; one that is not is called on the event loop, as iterables are, and must not
    wait. Raises ArgumentError for anything else.
    """
    _check_kind(data)
    if hasattr(data, "readinto"):
        return _Either(data)
    if isinstance(data, AsyncIterable):
        return _AsyncChunks(data)
    source = as_source(data)
    return source if isinstance(source, _Bytes) else _AsyncChunks(_each(data))


def may_wait(source: Source | AsyncSource) -> bool:
    """Whether reading from it may take time that work can be done in."""
    return not isinstance(source, _Bytes)


def pull(consumer: Consumer[ResultT], source: Source) -> Iterator[ResultT]:
    """The results of a consumer that is fed from a blocking source.

    Raises FormatError for bytes after the end frame in a buffer or iterable, TransportError for a source that is
    non-blocking.
    """
    fed = 0
    with closing(consumer.steps()) as steps:
        for step in steps:
            if step is not NEED_DATA:
                yield step
            elif isinstance(source, _Bytes):
                fed += _feed_bytes(consumer, source)
            else:
                fed += _feed(consumer, source.readinto(consumer.get_buffer()))
    if isinstance(source, (_Bytes, _Chunks)) and source.holds_more():
        raise FormatError("bytes after the end frame", offset=fed)


async def pull_async(consumer: Consumer[ResultT], source: AsyncSource | _Bytes) -> AsyncIterator[ResultT]:
    """As `pull`, from what `as_async_source` gives, or any other source whose `readinto` is a coroutine function."""
    fed = 0
    with closing(consumer.steps()) as steps:
        for step in steps:
            if step is not NEED_DATA:
                yield step
            elif isinstance(source, _Bytes):
                fed += _feed_bytes(consumer, source)
            else:
                fed += _feed(consumer, await source.readinto(consumer.get_buffer()))
    more = await source.holds_more() if isinstance(source, _AsyncChunks) else False
    if more or (isinstance(source, _Bytes) and source.holds_more()):
        raise FormatError("bytes after the end frame", offset=fed)


def _feed_bytes(consumer: Consumer[Any], source: _Bytes) -> int:
    """Hand over what the consumer lacks, where it stands if it may; returns its size."""
    data = source.take(len(consumer.get_buffer()))
    if source.lasting:
        consumer.lend(data)
        return len(data)
    consumer.get_buffer()[: len(data)] = data
    return _feed(consumer, len(data))


def _feed(consumer: Consumer[Any], size: int | None) -> int:
    """Say that `size` bytes were read into the consumer's buffer; returns it."""
    if size is None:
        raise TransportError("the source is non-blocking and has no data yet: give one that blocks", retryable=False)
    consumer.buffer_updated(size)
    return size


class Push(Generic[ResultT]):
    """A consumer that is handed bytes as they come, in whatever portions."""

    def __init__(self, consumer: Consumer[ResultT]) -> None:
        self._consumer = consumer
        self._steps = consumer.steps()
        self._fed = 0
        self._wanting = False
        self._broken = False
        self.ended = False  # whether the consumer has everything that it wanted

    def feed(self, data: Any) -> Iterator[ResultT]:
        """The results that these bytes complete. Iterate to the end before feeding the next bytes.

        Raises what the consumer raises, FormatError for bytes after the end frame, and ClosedError after any error.
        """
        if self._broken:
            raise ClosedError("the stream has already failed: start again with a new decoder")
        self._broken = True  # until all of it has succeeded
        yield from self._feed(_chunk(data))
        self._broken = False

    def finish(self) -> None:
        """Note that the input has ended. Raises TruncatedError if the consumer needs more."""
        if not self.ended:
            self._broken = True
            self._consumer.buffer_updated(0)
            next(self._steps)

    def _feed(self, source: _Bytes) -> Iterator[ResultT]:
        while not self.ended:
            if self._wanting:
                if not source.holds_more():
                    return
                self._fed += _feed_bytes(self._consumer, source)
                self._wanting = False
            step = next(self._steps, None)
            if step is NEED_DATA:
                self._wanting = True
            elif step is None:
                self.ended = True
            else:
                yield step
        if source.holds_more():
            raise FormatError("bytes after the end frame", offset=self._fed)
