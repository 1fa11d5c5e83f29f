"""Applies patches: turns a container into the next version, in place.

    patch = Patch.read(source)                                # read and verified before anything is applied
    patch.apply(state, front)                                 # in place: checked first, then block by block

Nothing is written before the whole state has been read once and every block matches the base or, after an earlier
attempt, the target. A block is made in other memory, checked, copied into place, and checked again there. So an
interrupted attempt can be repeated: the next one reaches the target, or raises an error that says why not.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tensorwire.codecs import CHUNK, Binding, Checksums, binding_of, chunk_checksums, patch_slice
from tensorwire.errors import CorruptError, EncodeError, SchemaError, TensorwireError, counted, show
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Pool
from tensorwire.streams.encoded import InMemory, Store
from tensorwire.streams.patches import CODEC
from tensorwire.streams.receiver import Completed, ItemStart, Payload, Receiver
from tensorwire.streams.versions import Entry, Sums, Version, checksums, content_digest, version_of
from tensorwire.tensor import ByteArray, Extent, Front, TensorView
from tensorwire.wire import AliasItem, DataItem, Item, Kind, StreamStart, TensorItem, ValueItem
from tensorwire.wire.names import Path, name_of
from tensorwire.wire.values import pack_plain


class _Block(NamedTuple):
    """A block of a tensor: bytes [begin, end), the checksums it is bound to, and the key of its payload."""

    begin: int
    end: int
    binding: Binding
    store: Store
    kept: Any


@dataclass(frozen=True, slots=True)
class _Changed:
    """A tensor of a patch, under all the ranks that it has."""

    item: TensorItem
    ranks: tuple[int, ...]
    blocks: tuple[_Block, ...]


class Applied(NamedTuple):
    """The result of `apply`: blocks of up to 4 MiB written, blocks that were already done, and values set."""

    written: int
    skipped: int
    values: int


class Made(NamedTuple):
    """A version made by a patch: a container, and the checksums that its tensors must have."""

    container: Any
    sums: Sums


class Patch:
    """A complete and verified patch. See the module's docstring.

    `base`, `target`: the digests, as hex, of the version that it applies to and of the version that it makes.
    `metadata`: of the stream. `size`: bytes of the payloads. `tensors`, `values`: the changes, by rank.
    """

    __slots__ = ("base", "metadata", "size", "target", "tensors", "values")

    def __init__(self, start: StreamStart, tensors: list[_Changed], values: dict[int, Any], size: int) -> None:
        self.base = start.info.base.hex()
        self.target = start.info.target.hex()
        self.metadata = dict(start.info.metadata)
        self.size = size
        self.tensors = tensors
        self.values = values

    @classmethod
    def read(cls, source: Any, *, keep: Store | None = None, limits: Limits = DEFAULT) -> "Patch":
        """Read and verify a whole patch from a source, as in `decode`. Raises a WireError for anything else.

        `keep`: where payloads are kept, `InMemory()` or `OnDisk()`. `InMemory` does not copy payloads of `bytes`.
        """
        reading = _Reading(limits, keep or InMemory())
        with reading.receiver as receiver:
            for event in receiver.events(source):
                reading.take(event)
        return cls(reading.start, reading.tensors, reading.values, reading.size)

    def apply(self, state: Any, front: Front, *, limits: Limits = DEFAULT) -> Applied:
        """Turn `state`, in place, into the patch's target.

        Every block of it must match the base or, after an earlier attempt, the target. Raises SchemaError if a block
        matches neither, or if an item is missing or different; nothing is written then.
        """
        plan = _Plan(self, version_of(state, front, limits))
        places = {
            name: _Place(name, plan.held[name], value_at(state, plan.held[name].path), front)
            for name in dict.fromkeys(name for name, _ in plan.todo)
        }
        setters = [setter(state, plan.held[name].path, value) for name, value in plan.values.items()]
        plan.check()
        pool = Pool()
        for name, block in plan.todo:
            places[name].write(block, pool)
        for parent, key, value in setters:
            parent[key] = value
        return Applied(len(plan.todo), plan.skipped, len(setters))

    def views(self, base: Any, front: Front, *, sums: Sums | None = None, limits: Limits = DEFAULT) -> "Made":
        """The target as views over `base`, computed block by block as they are read.

        `base` is not changed. It is read once here, unless it comes from a `Made`, whose `sums` are given. Raises as
        `apply`.
        """
        plan = _Plan(self, version_of(base, front, limits), sums)
        plan.check()
        made: dict[str, Any] = dict(plan.values)
        blocks: dict[str, list[_Block]] = {}
        for name, block in plan.todo:
            blocks.setdefault(name, []).append(block)
        last = _Last()
        for name, its in blocks.items():
            view = plan.held[name].tensor
            made[name] = TensorView(view.dtype, view.shape, _Patched(plan.held[name], its, last).read)
        return Made(replaced(base, made), plan.after)


class _Reading:
    """A patch that is being received."""

    def __init__(self, limits: Limits, keep: Store) -> None:
        self.receiver = Receiver(limits, any_base=True, overlap=False)
        self.size = 0
        self._keep = keep
        self.tensors: list[_Changed] = []
        self.values: dict[int, Any] = {}
        self.start: StreamStart
        self._blocks: list[_Block] = []

    def take(self, event: Any) -> None:
        if isinstance(event, Payload):
            self._add(event)
        elif isinstance(event, Completed):
            self._complete(event)
        elif isinstance(event, ItemStart):
            self._open(event.number, event.item)
        elif isinstance(event, StreamStart):
            if not event.info.base or not event.info.target:
                raise SchemaError("the stream is not a patch: load it instead of applying it")
            self.start = event

    def _open(self, number: int, item: Item) -> None:
        if not item.path and item.kind is Kind.DICT:
            return
        coded = isinstance(item, TensorItem) and item.codec == CODEC.stages()
        if not _is_rank(item.path) or not (coded or isinstance(item, (AliasItem, ValueItem))):
            raise SchemaError("a patch holds tensors coded by patch, and values, each under its rank")
        if coded:
            self.receiver.keep_encoded(number)

    def _add(self, event: Payload) -> None:
        item, data = event.item, event.data
        width = item.dtype.itemsize
        begin, end = event.start * width, (event.start + event.count) * width
        binding = binding_of(data, Extent(item.dtype, (), event.start, event.count))
        if binding.base is None or begin % CHUNK:
            raise SchemaError("a block of a patch is bound to its base, and begins at a whole MiB")
        self._blocks.append(_Block(begin, end, binding, self._keep, self._keep.put(data)))
        self.size += data.nbytes

    def _complete(self, event: Completed) -> None:
        rank = _rank(event.item)
        if isinstance(event.item, TensorItem):
            ranks = (rank, *map(_rank, event.aliases))
            self.tensors.append(_Changed(event.item, ranks, tuple(self._blocks)))
            self._blocks = []
        else:
            self.values[rank] = event.value


def _is_rank(path: Path) -> bool:
    return len(path) == 1 and type(path[0]) is int and path[0] >= 0


def _rank(item: DataItem | AliasItem) -> int:
    """The rank of an item, which was checked before."""
    rank = item.path[0]
    assert type(rank) is int
    return rank


class _Place:
    """The memory of one tensor of the state, which a patch is written to."""

    def __init__(self, name: str, entry: Entry, tensor: Any, front: Front) -> None:
        self.name = name
        self._entry = entry
        self._front = front
        try:
            self._flat = front.device_target(tensor)
            self._memory = np.frombuffer(front.target(tensor), np.uint8) if self._flat is None else None
        except EncodeError as error:
            raise EncodeError(f"it cannot be written in place: {error.detail}", item=name) from None

    def write(self, block: _Block, pool: Pool) -> None:
        """Make a block from its base, and check the result."""
        made = pool.take(block.end - block.begin)
        made[:] = self._entry.read(block.begin, block.end)
        try:
            _decode(block, self._entry, made, pool)
            self._put(block, made)
            if chunk_checksums(self._entry.read(block.begin, block.end)) != block.binding.target:
                raise CorruptError("it was written to while the patch was applied")
        except TensorwireError as error:
            error.item = self.name
            raise

    def _put(self, block: _Block, made: ByteArray) -> None:
        if self._memory is not None:
            self._memory[block.begin : block.end] = made
            return
        view = self._entry.tensor
        count, width = made.size // view.dtype.itemsize, view.dtype.itemsize
        self._flat[block.begin // width : block.end // width].copy_(self._front.wrap(made, view.dtype, (count,)))


class _Plan:
    """The steps that apply a patch to a state. Reads the whole state, and writes nothing.

    `todo`: names and blocks to make. `skipped`: number of blocks that are already done. `values`: values to set.
    `after`: the checksums of all tensors afterwards.
    """

    def __init__(self, patch: Patch, held: Version, sums: Sums | None = None) -> None:
        self.held = held
        self.todo: list[tuple[str, _Block]] = []
        self.skipped = 0
        self.values: dict[str, Any] = {}
        self._patch = patch
        self._names = list(held)
        self._sums = checksums(held) if sums is None else sums
        # The checksums with all blocks at the base, and with all blocks at the target.
        self._before, self.after, self._target = dict(self._sums), dict(self._sums), dict(held)
        self._planned: dict[tuple[object, ...], tuple[str, Checksums]] = {}  # by memory: its first name
        for changed in patch.tensors:
            for rank in changed.ranks:
                self._add(self._name(rank), changed)
        for rank, value in patch.values.items():
            self._add_value(self._name(rank), value)

    def check(self) -> None:
        """Raise SchemaError unless this leads from the base of the patch to its target."""
        patch = self._patch
        if content_digest(self._target, self.after).hex() != patch.target or (
            self.values and content_digest(self.held, self._before).hex() != patch.base
        ):
            raise SchemaError(
                f"the state is version {self._digest()}; the patch makes {patch.target} of {patch.base}. "
                "Nothing was written"
            )

    def _digest(self) -> str:
        return content_digest(self.held, self._sums).hex()

    def _name(self, rank: int) -> str:
        if rank >= len(self._names):
            raise SchemaError(
                f"the patch changes item {rank} of its base, and the state has "
                f"{counted(len(self._names), 'item')}: it is version "
                f"{self._digest()}, and the patch for {self._patch.base}. Nothing was written"
            )
        return self._names[rank]

    def _add(self, name: str, changed: _Changed) -> None:
        entry, item = self.held[name], changed.item
        if entry.view is None or (entry.view.dtype, entry.view.shape) != (item.dtype, item.shape):
            raise SchemaError(
                f"the patch is for {item.dtype} {list(item.shape)}, and the state has {entry.describe()} there: it is "
                f"version {self._digest()}, and the patch for {self._patch.base}. Nothing was written",
                item=name,
            )
        todo: list[_Block] = []
        before: list[int] = []
        after: list[int] = []
        for block in changed.blocks:
            binding = block.binding
            assert binding.base is not None
            held = self._sums[name][block.begin // CHUNK : -(-block.end // CHUNK)]
            if held not in (binding.base, binding.target):
                self._refuse(name, block)
            if held != binding.target:
                todo.append(block)
            before += binding.base
            after += binding.target
        self._before[name], self.after[name] = tuple(before), tuple(after)
        if not self._is_planned(name, entry, tuple(after)):
            self.todo += [(name, block) for block in todo]
            self.skipped += len(changed.blocks) - len(todo)

    def _is_planned(self, name: str, entry: Entry, after: Checksums) -> bool:
        """Whether the memory of a tensor is already written under another of its names."""
        assert entry.view is not None
        if entry.view.identity is None:
            return False
        planned = self._planned.setdefault(entry.view.identity, (name, after))
        if planned[1] != after:
            raise SchemaError(
                f"it is the same tensor as {show(planned[0])}, but the patch makes two of it. Nothing was written",
                item=name,
            )
        return planned[0] != name

    def _refuse(self, name: str, block: _Block) -> NoReturn:
        width = self.held[name].tensor.dtype.itemsize
        raise SchemaError(
            f"elements {block.begin // width} to {block.end // width} are neither what the patch is against nor what "
            f"it makes: the state is version {self._digest()}, and the patch for {self._patch.base}. Nothing was "
            "written",
            item=name,
        )

    def _add_value(self, name: str, value: Any) -> None:
        entry, data = self.held[name], pack_plain(value)
        if entry.view is not None:
            raise SchemaError("the patch has a value where the state has a tensor. Nothing was written", item=name)
        self._target[name] = replace(entry, data=data)
        if entry.data != data:
            self.values[name] = value


class _Last:
    """The last block that was made, shared by tensors that are read in turns."""

    def __init__(self) -> None:
        self.made: tuple[tuple[int, int] | None, ByteArray] = None, np.empty(0, np.uint8)
        self.pool = Pool()


class _Patched:
    """A tensor whose blocks are made from its base as they are read."""

    def __init__(self, base: Entry, blocks: list[_Block], last: _Last) -> None:
        self._base = base
        self._blocks = {block.begin: block for block in blocks}
        self._begins = sorted(self._blocks)
        self._last = last

    def read(self, start: int, stop: int) -> ByteArray:
        """Elements [start, stop)."""
        width = self._base.tensor.dtype.itemsize
        begin, end = start * width, stop * width
        out: ByteArray = np.empty(end - begin, np.uint8)
        place = begin
        first = max(bisect_right(self._begins, begin) - 1, 0)
        for block in map(self._blocks.__getitem__, self._begins[first:]):
            if block.begin >= end:
                break
            low, high = max(begin, block.begin), min(end, block.end)
            if low < high:
                out[place - begin : low - begin] = self._base.read(place, low)
                out[low - begin : high - begin] = self._made(block)[low - block.begin : high - block.begin]
                place = high
        out[place - begin :] = self._base.read(place, end)
        return out

    def _made(self, block: _Block) -> ByteArray:
        key = id(self), block.begin
        last, data = self._last.made  # read once: an encoder reads slices in two threads
        if last != key:
            data = self._base.read(block.begin, block.end).copy()
            _decode(block, self._base, data, self._last.pool)
            self._last.made = key, data
        return data


def _decode(block: _Block, base: Entry, data: ByteArray, pool: Pool) -> None:
    """Turn the base's elements of a block, in `data`, into those of the target."""
    view = base.tensor
    width = view.dtype.itemsize
    extent = Extent(view.dtype, view.shape, block.begin // width, (block.end - block.begin) // width)
    patch_slice(block.store.get(block.kept), extent, data, pool.take)


def replaced(value: Any, made: Mapping[str, Any], path: Path = ()) -> Any:
    """The container, with the tensors and values of these names replaced."""
    name = name_of(path)
    if name in made:
        return made[name]
    if isinstance(value, dict):
        return {key: replaced(child, made, (*path, key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(child, made, (*path, number)) for number, child in enumerate(value)])
    return value


def setter(state: Any, path: Path, value: Any) -> tuple[Any, Any, Any]:
    """Parent, key and value for setting a value in place. Raises EncodeError if that is impossible."""
    parent = value_at(state, path[:-1])
    if not path or not isinstance(parent, (dict, list)):
        raise EncodeError("a value outside of dicts and lists cannot be set in place", item=name_of(path))
    return parent, path[-1], value


def value_at(state: Any, path: Path) -> Any:
    """The value at a path of a container."""
    for key in path:
        state = state[key]
    return state
