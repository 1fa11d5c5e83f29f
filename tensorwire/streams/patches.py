"""Patches: streams from one version of a container to the next.

    for buffer in encode_patch(new, old, front): ...          # both digests, and the changes

A patch is a stream with a `base` and a `target`. Its root is a dict of the items that changed, each under its rank: its
position among the items of the base in the order of their names, which both sides know. Tensors are sent in blocks of
4 MiB encoded by `patch`, values as they are. `applying` is the other side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from tensorwire.checksum import crc32c
from tensorwire.codecs import CHUNK, Checksums, binding_of, count_unequal, parse
from tensorwire.codecs import Patch as Stage
from tensorwire.errors import EncodeError, WireError
from tensorwire.limits import DEFAULT, Limits, check_limits
from tensorwire.memory import Pool
from tensorwire.streams.report import Report
from tensorwire.streams.sender import stream_info
from tensorwire.streams.versions import Entry, Sums, Version, about, content_digest, parts, version_of
from tensorwire.tensor import Buffer, Extent, Front
from tensorwire.wire import AliasItem, ContainerItem, Item, Kind, TensorItem, ValueItem, Writer
from tensorwire.wire.frames import MOST_BUNDLED, bundle_table

CODEC: Final = parse(Stage())
BLOCK: Final = 4 << 20  # bytes of elements that are applied or skipped together: a whole number of chunks
_BUNDLE: Final = 128 << 10  # bytes of payloads in one frame
_PART: Final = 1 << 20  # bytes of a value in one frame


def encode_patch(
    new: Any,
    base: Any,
    front: Front,
    *,
    metadata: Mapping[str, str] | None = None,
    stream_id: bytes = b"",
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of the patch from `base` to `new`.

    Both are read once before the first buffer, and changed items once more after it. Raises EncodeError for containers
    that differ in more than values.
    """
    check_limits(limits)
    change = _Change(version_of(new, front, limits), version_of(base, front, limits))
    info = replace(stream_info(metadata, stream_id), base=change.base_digest, target=change.target_digest)
    writer = Writer(crc32c, limits)
    try:
        head = writer.start(info) + b"".join(writer.items(item for item, _ in change.items))
    except WireError as error:
        raise EncodeError(error.detail, item=error.item) from None
    return _framed(change, writer, head, report or Report())


class _Change:
    """What changed between two versions of the same names, dtypes and shapes."""

    def __init__(self, new: Version, base: Version) -> None:
        _check_alike(new, base)
        self.new = new
        self.base = base
        self._changed = {name for name, entry in new.items() if entry.data != base[name].data}
        self.sums: Sums = {}
        base_sums: Sums = {}
        compared: dict[tuple[object, ...], str] = {}
        for name, entry in new.items():
            if entry.view is None:
                continue
            pair = _pair(entry, base[name])
            first = compared.setdefault(pair, name) if pair is not None else name
            if first == name:
                with about(name):
                    self.sums[name], base_sums[name], changed = _compared(entry, base[name])
            else:
                self.sums[name], base_sums[name], changed = self.sums[first], base_sums[first], first in self._changed
            if changed:
                self._changed.add(name)
        self.base_digest, self.target_digest = content_digest(base, base_sums), content_digest(new, self.sums)
        self.items = list(self._described())

    def _described(self) -> Iterator[tuple[Item, str]]:
        """Items, each with its name: the root, then what changed. Tensors tied in both versions are sent once."""
        yield ContainerItem((), Kind.DICT), ""
        numbers: dict[tuple[object, ...], int] = {}
        number = 0
        for rank, (name, entry) in enumerate(self.new.items()):
            if name not in self._changed:
                continue
            number += 1
            if entry.view is None:
                yield ValueItem((rank,), len(entry.data)), name
                continue
            pair = _pair(entry, self.base[name])
            if pair is not None and numbers.setdefault(pair, number) != number:
                yield AliasItem((rank,), numbers[pair]), name
            else:
                yield TensorItem((rank,), entry.view.dtype, entry.view.shape, CODEC.stages()), name


def _check_alike(new: Version, base: Version) -> None:
    """Raise EncodeError unless two versions have the same names, dtypes and shapes."""
    for name in new.keys() ^ base.keys():
        missing, there = ("base", "new version") if name in new else ("new version", "base")
        raise EncodeError(f"the {missing} has no such item, but the {there} has; send the new one whole", item=name)
    for name, entry in new.items():
        if entry.describe() != base[name].describe():
            raise EncodeError(
                f"{entry.describe()} now, {base[name].describe()} in the base; send the new one whole", item=name
            )


def _pair(new: Entry, base: Entry) -> tuple[object, ...] | None:
    """A key that is equal for names that share a tensor in both versions; None if that is not known."""
    if new.view is None or base.view is None or new.view.identity is None or base.view.identity is None:
        return None
    return new.view.identity, base.view.identity


def _compared(new: Entry, base: Entry) -> tuple[Checksums, Checksums, bool]:
    """The checksums of a tensor and of its base, and whether the two differ in any bit. Both are read once."""
    sums, base_sums, changed = [], [], False
    for start, stop in parts(new.size, CHUNK):
        values, before = new.read(start, stop), base.read(start, stop)
        sums.append(crc32c(values))
        base_sums.append(crc32c(before))
        changed = changed or sums[-1] != base_sums[-1] or count_unequal(values, before) > 0
    return tuple(sums), tuple(base_sums), changed


def _framed(change: _Change, writer: Writer, head: bytes, report: Report) -> Iterator[Buffer]:
    """All buffers; small items are sent together."""
    yield head
    report.framing += len(head)
    waiting: list[tuple[int, memoryview]] = []
    size, pool = 0, Pool()
    for item, name in change.items:
        if not isinstance(item, (TensorItem, ValueItem)):
            continue
        is_tensor = isinstance(item, TensorItem)
        report.add_item("patch" if is_tensor else "raw")
        slices = _tensor_slices(change, name, pool) if is_tensor else _value_slices(change.new[name].data)
        for start, count, payload in slices:
            width = item.dtype.itemsize if isinstance(item, TensorItem) else 1
            report.add_frame("patch" if is_tensor else "raw", count * width, len(payload))
            alone = count < (item.total or 0) or len(payload) > _BUNDLE
            if waiting and (alone or len(waiting) == MOST_BUNDLED or size + len(payload) > _BUNDLE):
                yield from _together(writer, waiting, report)
                waiting, size = [], 0
            if alone:
                header = writer.data(start, count, len(payload), crc32c(payload))
                report.framing += len(header)
                yield header
                yield payload
            else:
                waiting.append((count, payload))
                size += len(payload)
    yield from _together(writer, waiting, report)
    end = writer.end()
    report.framing += len(end)
    yield end


def _together(writer: Writer, waiting: list[tuple[int, memoryview]], report: Report) -> Iterator[Buffer]:
    """Whole items in one frame."""
    payloads = [payload for _, payload in waiting]
    if len(waiting) > 1:
        table = bundle_table([len(payload) for payload in payloads])
        data = b"".join([table, *payloads])
        header = writer.bundle(len(waiting), len(data), crc32c(data))
        report.framing += len(header) + len(table)
        yield header + data
    elif waiting:
        header = writer.data(0, waiting[0][0], len(payloads[0]), crc32c(payloads[0]))
        report.framing += len(header)
        yield header + payloads[0]


def _tensor_slices(change: _Change, name: str, pool: Pool) -> Iterator[tuple[int, int, memoryview]]:
    """(start, count, payload) of each block of a tensor."""
    new, base = change.new[name], change.base[name]
    view = new.tensor
    for begin, end in parts(new.size, BLOCK):
        extent = Extent(view.dtype, view.shape, begin // view.dtype.itemsize, (end - begin) // view.dtype.itemsize)
        with about(name):
            payload = CODEC.encode(new.read(begin, end), extent, pool.take, base.read(begin, end)).payload
        binding = binding_of(payload, extent)
        if binding.target != _of_block(change.sums[name], begin, end):
            raise EncodeError("it was changed while it was encoded: copy it before, or wait", item=name)
        if binding.changed and binding.base == binding.target:  # a collision, with a chance of 1 in 2^32
            raise EncodeError("no checksum tells the new elements from the old ones: send them whole", item=name)
        # A consumer that keeps a small payload must not keep the whole buffer of the block.
        yield extent.start, extent.count, memoryview(bytes(payload) if 2 * len(payload) < end - begin else payload)


def _value_slices(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    for start, stop in parts(len(data), _PART):
        yield start, stop - start, memoryview(data)[start:stop]


def _of_block(sums: Checksums, begin: int, end: int) -> Checksums:
    """The checksums of bytes [begin, end) of a tensor, from those of the whole tensor."""
    return sums[begin // CHUNK : -(-end // CHUNK)]
