"""Buffers to tensors and values in memory."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tensorwire.dtypes import DType
from tensorwire.errors import ArgumentError, LimitError, SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import FixedMemory, GrowingMemory
from tensorwire.streams.receiver import Completed, Event, ItemStart, Piece, Receiver, check_codec, reject_files
from tensorwire.streams.schema import Schema
from tensorwire.streams.unflatten import Unflattener
from tensorwire.tensor import Front
from tensorwire.wire import AliasItem, DataItem, Item, StreamStart, TensorItem


def decode(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    base: bytes | None = None,
    metadata_into: dict[str, str] | None = None,
    limits: Limits = DEFAULT,
) -> Iterator[tuple[str, Any]]:
    """(name, value) of each item, as soon as it is complete and verified.

    Options: as for `tensorwire.decode`. If an error is raised, items already yielded are valid and the rest is not
    delivered, but tensors in `into` may hold parts of what was received.
    """
    memory = Items(front, into, expect, limits, base, metadata_into=metadata_into)
    with memory.receiver as receiver:
        for event in receiver.events(source):
            for item, value in memory.completed(event):
                yield item.name, value
    memory.check_complete()


async def decode_async(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    base: bytes | None = None,
    metadata_into: dict[str, str] | None = None,
    limits: Limits = DEFAULT,
) -> AsyncIterator[tuple[str, Any]]:
    """As `decode`; `source` may also be an asynchronous iterable of buffers, or have a coroutine `readinto`."""
    memory = Items(front, into, expect, limits, base, metadata_into=metadata_into)
    with memory.receiver as receiver:
        async for event in receiver.events_async(source):
            for item, value in memory.completed(event):
                yield item.name, value
    memory.check_complete()


def collect(
    source: Any,
    front: Front,
    *,
    into: Mapping[str, Any] | None = None,
    expect: Any = None,
    base: bytes | None = None,
    metadata_into: dict[str, str] | None = None,
    limits: Limits = DEFAULT,
) -> Any:
    """The whole container, after the whole stream has been verified."""
    memory, containers = Items(front, into, expect, limits, base, metadata_into=metadata_into), Unflattener()
    with memory.receiver as receiver:
        for event in receiver.events(source):
            if isinstance(event, ItemStart):
                containers.declare(event.item)
            for item, value in memory.completed(event):
                containers.fill(item.path, value)
    memory.check_complete()
    return containers.result()


class _Taken:
    """Takes memory for tensors that the caller has not preallocated. It knows no receiver: that would be a cycle."""

    __slots__ = ("_copied", "_expanded", "_limits", "_trusted", "memory")

    def __init__(self, copied: dict[int, Any], limits: Limits, *, trusted: bool) -> None:
        self._copied = copied
        self._limits = limits
        self._trusted = trusted
        self._expanded = 0
        self.memory: dict[int, GrowingMemory] = {}

    def __call__(self, number: int, item: DataItem) -> GrowingMemory | None:
        if not isinstance(item, TensorItem) or number in self._copied:
            return None
        if not self._trusted and check_codec(item).packer.expands:
            self._expanded += item.total * item.dtype.itemsize
            if self._expanded > self._limits.expanded:
                what = "sparse and low-rank tensors, decoded without expect="
                raise LimitError(what, self._limits.expanded, self._expanded, field="expanded", item=item.name)
        grown = self.memory[number] = GrowingMemory(item.total * item.dtype.itemsize, trusted=self._trusted)
        return grown


class Items:
    """Receives a stream into memory. `overlap`: as in `Receiver`."""

    def __init__(
        self,
        front: Front,
        into: Mapping[str, Any] | None,
        expect: Any,
        limits: Limits,
        base: bytes | None,
        *,
        metadata_into: dict[str, str] | None = None,
        overlap: bool = True,
    ) -> None:
        if into is not None and not isinstance(into, Mapping):
            raise ArgumentError(f"into= maps names to tensors to be filled; it is of type {type(into).__name__}")
        self._front = front
        self._into = dict(into or {})
        self._metadata = metadata_into
        self._schema = None if expect is None else Schema.of(expect, front, limits=limits)
        self._filled: set[str] = set()
        self._targets: dict[int, Any] = {}  # preallocated by the caller
        self._copied: dict[int, Any] = {}  # those of them on a device that pieces are copied to
        self._taken = _Taken(self._copied, limits, trusted=self._schema is not None)
        self.receiver = Receiver(limits, base=base, take=self._taken, overlap=overlap)

    def completed(self, event: Event) -> Sequence[tuple[DataItem | AliasItem, Any]]:
        """The items that this event completes, under all of their names."""
        if isinstance(event, Completed):
            value = self._value(event)
            return [(event.item, value), *((alias, self._other_name(alias, value)) for alias in event.aliases)]
        if isinstance(event, ItemStart):
            self._open(event.number, event.item)
        elif self._copied and isinstance(event, Piece) and event.number in self._copied:
            self._copy(event)
        elif self._metadata is not None and isinstance(event, StreamStart):
            self._metadata.update(event.info.metadata)
        return ()

    def check_complete(self) -> None:
        """Raise SchemaError if an expected or preallocated item has not arrived."""
        if self._schema is not None:
            self._schema.check_complete()
        for name in self._into.keys() - self._filled:
            raise SchemaError("into= has a tensor that the stream does not carry: it was not written", item=name)

    def _open(self, number: int, item: Item) -> None:
        reject_files(item)
        if self._schema is not None:
            self._schema.check(item)
        if isinstance(item, (TensorItem, AliasItem)) and self._into and item.name in self._into:
            self._filled.add(item.name)
            if isinstance(item, TensorItem):
                self._open_target(number, item)

    def _open_target(self, number: int, item: TensorItem) -> None:
        tensor = self._target(item.name, item.dtype, item.shape)
        self._targets[number] = tensor
        flat = self._front.device_target(tensor)
        if flat is None:
            self.receiver.land(number, FixedMemory(np.frombuffer(self._front.target(tensor), np.uint8)))
        elif check_codec(item).on_device:  # pragma: no cover - tests/test_cuda.py, where there is a CUDA device
            self.receiver.land(number, FixedMemory(flat, item.dtype.itemsize))
        else:
            self._copied[number] = flat

    def _value(self, event: Completed) -> Any:
        number, item = event.number, event.item
        if not isinstance(item, TensorItem):
            return event.value
        if number in self._targets:
            return self._targets[number]
        return self._front.wrap(self._taken.memory.pop(number).data, item.dtype, item.shape)

    def _other_name(self, alias: AliasItem, value: Any) -> Any:
        """The value for an alias: the tensor itself, or the tensor that `into` has for the alias, filled likewise."""
        if alias.name not in self._into:
            return value
        view = self._front.view(value)
        assert view is not None
        tensor = self._target(alias.name, view.dtype, view.shape)
        flat, data = self._front.device_target(tensor), np.frombuffer(view.read(0, view.numel), np.uint8)
        if flat is None:
            np.frombuffer(self._front.target(tensor), np.uint8)[:] = data
        else:
            flat.copy_(self._front.wrap(data, view.dtype, (view.numel,)))
        return tensor

    def _target(self, name: str, dtype: DType, shape: tuple[int, ...]) -> Any:
        """The tensor that `into` has under this name. Raises SchemaError if it does not match."""
        tensor = self._into[name]
        view = self._front.view(tensor)
        if view is None or (view.dtype, view.shape) != (dtype, shape):
            got = "no tensor" if view is None else f"{view.dtype} {list(view.shape)}"
            raise SchemaError(f"into= has {got} where the stream has {dtype} {list(shape)}")
        return tensor

    def _copy(self, piece: Piece) -> None:
        """Copy a piece to the device."""
        count = piece.data.size // piece.dtype.itemsize
        target = self._copied[piece.number][piece.start : piece.start + count]
        target.copy_(self._front.wrap(piece.data, piece.dtype, (count,)))
