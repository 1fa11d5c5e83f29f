"""Buffers to tensors."""

from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from math import prod
from typing import Any, Final

import numpy as np

from tensorwire.codecs import Raw
from tensorwire.errors import SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import GrowingMemory
from tensorwire.streams.receiver import Receiver, Sink, check_codec, reject_files
from tensorwire.streams.schema import Schema
from tensorwire.streams.unflatten import Tree
from tensorwire.tensor import Front
from tensorwire.wire import NEED_DATA, AliasItem, Item, TensorItem, ValueItem
from tensorwire.wire.drive import as_async_source, as_source, may_wait, pull, pull_async
from tensorwire.wire.values import unpack_value


def decode(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    limits: Limits = DEFAULT,
) -> Iterator[tuple[str, Any]]:
    """(name, value) of each item, as soon as it is complete and verified.

    `source`: a buffer, an iterable of buffers, or anything with `readinto`. `into`: preallocated tensors by name,
    written in place. `expect`: a Schema, or a container like the one expected; anything else is refused before
    memory is taken. When an error is raised, items already given are good and the rest is not delivered, but
    tensors in `into` may hold parts of what was received.
    """
    source = as_source(source)
    for _, item, value in pull(_Memory(front, into, expect, limits, overlap=may_wait(source)), source):
        yield item.name, value


async def decode_async(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    limits: Limits = DEFAULT,
) -> AsyncIterator[tuple[str, Any]]:
    """As `decode`; iterables may be asynchronous and `readinto` a coroutine function.

    What is neither is called on the event loop and must not wait.
    """
    source = as_async_source(source)
    async for _, item, value in pull_async(_Memory(front, into, expect, limits, overlap=may_wait(source)), source):
        yield item.name, value


def collect(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    limits: Limits = DEFAULT,
) -> Any:
    """The whole container, once the whole stream is verified."""
    source = as_source(source)
    memory = _Memory(front, into, expect, limits, overlap=may_wait(source))
    for _, item, value in pull(memory, source):
        memory.tree.fill(item.path, value)
    return memory.tree.result()


# Tensors of more bytes would leave the caches before they are whole: half of a common L3.
_UNCACHED_FROM: Final = 16 << 20


class _Memory:
    """Receives a stream into memory."""

    def __init__(
        self,
        front: Front,
        into: Mapping[str, Any] | None,
        expect: Any,
        limits: Limits,
        *,
        overlap: bool = True,
    ) -> None:
        self.tree = Tree()
        self._front = front
        self._into = into or {}
        self._filled: set[str] = set()
        self._schema = None if expect is None else Schema.of(expect, front, limits=limits)
        self._limits = limits
        self._receiver = Receiver(None, self._open, limits, overlap=overlap)
        self._aliases: dict[int, list[tuple[int, AliasItem]]] = {}
        receiver = self._receiver
        self.get_buffer, self.buffer_updated, self.lend = receiver.get_buffer, receiver.buffer_updated, receiver.lend

    def steps(self) -> Generator[Any, None, None]:
        """NEED_DATA, and (number, item, value) of what is complete."""
        for step in self._receiver.steps():
            yield step
            if step is NEED_DATA:
                continue
            number, item, value = step
            for alias_number, alias in self._aliases.pop(number, ()):
                yield alias_number, alias, self._other_name(alias, item, value)
        if self._schema is not None:
            self._schema.check_complete()
        for name in self._into.keys() - self._filled:
            raise SchemaError("into= has a tensor that the stream does not carry: it was not written", item=name)

    def _other_name(self, alias: AliasItem, item: TensorItem, value: Any) -> Any:
        """What an alias gives: the tensor itself, or the tensor that `into` has for it, filled alike."""
        if alias.name not in self._into:
            return value
        source = self._front.view(value)
        raw = TensorItem(alias.path, item.dtype, item.shape, Raw().stages())
        sink = _into_sink(raw, self._into[alias.name], self._front)
        region = sink.region(0, source.numel * source.dtype.itemsize)
        region[:] = np.frombuffer(source.read(0, source.numel), np.uint8)
        sink.commit(0, region)
        return sink.close()

    def _open(self, number: int, item: Item) -> Sink | None:
        reject_files(item)
        if self._schema is not None:
            self._schema.check(item)
        self.tree.declare(item)
        if isinstance(item, AliasItem):
            self._filled.add(item.name)
            self._aliases.setdefault(item.of, []).append((number, item))
            return None
        if isinstance(item, ValueItem):
            return ValueSink(self._limits)
        if not isinstance(item, TensorItem):
            return None
        if item.name in self._into:
            self._filled.add(item.name)
            return _into_sink(item, self._into[item.name], self._front)
        return TensorSink(item, self._front, trusted=self._schema is not None)


class TensorSink(Sink):
    """A new tensor."""

    def __init__(self, item: TensorItem, front: Front, *, trusted: bool) -> None:
        self._item = item
        self._front = front
        self._memory = GrowingMemory(prod(item.shape) * item.dtype.itemsize, trusted=trusted)
        self.stable = trusted

    def region(self, start: int, stop: int) -> np.ndarray:
        region = self._memory.region(start, stop)
        self.uncached = (self._memory.reused and self._memory.data.size >= _UNCACHED_FROM) or None
        return region

    def close(self) -> Any:
        return self._front.wrap(self._memory.data, self._item.dtype, self._item.shape)


def _into_sink(item: TensorItem, tensor: Any, front: Front) -> Sink:
    """The sink of a tensor that the caller preallocated. Raises SchemaError where it does not match the item."""
    view = front.view(tensor)
    if view is None or (view.dtype, view.shape) != (item.dtype, item.shape):
        got = "no tensor" if view is None else f"{view.dtype} {list(view.shape)}"
        raise SchemaError(f"into= has {got} where the stream has {item.dtype} {list(item.shape)}")
    flat = front.device_target(tensor)
    if flat is not None:  # pragma: no cover - tests/test_cuda.py, where there is a CUDA device
        return _DeviceSink(item, tensor, flat, front)
    return _HostSink(tensor, np.frombuffer(front.target(tensor), np.uint8))


class _HostSink(Sink):
    """A preallocated tensor in host memory."""

    def __init__(self, tensor: Any, data: np.ndarray) -> None:
        self._tensor = tensor
        self._data = data
        self.uncached = data.size >= _UNCACHED_FROM or None

    def region(self, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]

    def close(self) -> Any:
        return self._tensor


class _DeviceSink(Sink):  # pragma: no cover - tests/test_cuda.py, where there is a CUDA device
    """A preallocated tensor on a CUDA device: what a codec cannot decode there is copied to it, slice by slice."""

    def __init__(self, item: TensorItem, tensor: Any, flat: Any, front: Front) -> None:
        self._tensor = tensor
        self._flat = flat
        self._front = front
        self._dtype = item.dtype
        self._on_device = check_codec(item).on_device

    def region(self, start: int, stop: int) -> Any:
        if self._on_device:
            return self._flat[start // self._dtype.itemsize : stop // self._dtype.itemsize]
        return np.empty(stop - start, np.uint8)

    def commit(self, start: int, region: Any) -> None:
        if not self._on_device:
            first, count = start // self._dtype.itemsize, region.size // self._dtype.itemsize
            self._flat[first : first + count].copy_(self._front.wrap(region, self._dtype, (count,)))

    def close(self) -> Any:
        return self._tensor


class ValueSink(Sink):
    """A plain Python value."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._data = bytearray()

    def region(self, start: int, stop: int) -> np.ndarray:
        return np.empty(stop - start, np.uint8)

    def commit(self, start: int, region: np.ndarray) -> None:
        self._data += memoryview(region)

    def close(self) -> Any:
        return unpack_value(bytes(self._data), self._limits)
