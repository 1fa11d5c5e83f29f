"""patch: elements against those of a base, bound by checksums to what they are applied to and to what they make.

Whoever sends a version of a model sends mostly what the other side has. A slice says which elements its base must
have there, and becomes the least of: nothing, where it is unchanged; of floats of 16 bits, which ones changed and by
how much; the differences of all bit patterns as planes; the new elements as planes. docs/format.md has the layout.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from tensorwire import dtypes, kernels
from tensorwire.codecs.planes import planes_bound, put_planes, take_planes
from tensorwire.codecs.stage import Bytes, Encoded, Packer, Sizes, Take
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, SchemaError
from tensorwire.tensor import Extent

CHUNK: Final = 1 << 20  # bytes of elements that have a checksum of their own
_BLOCK: Final = 1024
_CRC: Final = 4

# What a slice is made of: itself alone; itself, in place of what its base has there; what changed; nothing new.
_WHOLE, _REPLACED, _DIFFERENCE, _SPARSE, _UNCHANGED = range(5)
# What takes more of the elements' bytes than this is held against the next way.
_WORTH_A_LOOK: Final = 8
# Floats whose changes are told one by one, as kernels take them.
_SPARSE_DTYPES: Final = {dtypes.FLOAT16: np.float16, dtypes.BFLOAT16: np.uint16}

Checksums = tuple[int, ...]


class Binding(NamedTuple):
    """What a slice is applied to and what it makes: a CRC-32C for each MiB of its elements.

    `base` is None for a slice that takes nothing of a base.
    """

    base: Checksums | None
    target: Checksums


@dataclass(frozen=True, repr=False)
class Patch(Packer):
    """Lossless, any dtype, against a base; without one, planes under checksums.

    `encode` is given the base's elements of the slice as `context`, and `decode` finds them in `out`.
    """

    id = 9
    name = "patch"
    lossless = True
    exact_length = False

    def accepts(self, dtype: DType) -> bool:
        """Every dtype."""
        return True

    def block(self, dtype: DType) -> int:
        """1024 elements."""
        return _BLOCK

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """The bytes of the elements; and for what is said of the slice, its checksums and its planes."""
        size = count * dtype.itemsize
        return Sizes(size, 1 + 2 * _CRC * _chunks(size) + planes_bound(size, dtype.part_size) - size)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """What a slice makes of `context`, the elements that the base has there; of nothing where that is None."""
        values, width = np.frombuffer(data, np.uint8), extent.dtype.part_size
        payload = take(self.sizes(extent.count, extent.dtype).total)
        target = chunk_checksums(values)
        if context is None:
            at = _bind(payload, _WHOLE, target)
            return Encoded(payload[: at + put_planes(values, width, payload[at:], take)])
        base = np.frombuffer(context, np.uint8)
        bound = chunk_checksums(base)
        if same_bytes(base, values):
            return Encoded(payload[: _bind(payload, _UNCHANGED, target)])
        at = _bind(payload, _SPARSE, target, bound)
        size = _put_sparse(base, values, extent.dtype, payload[at:], take)
        for mode in (_DIFFERENCE, _REPLACED):
            if size and _WORTH_A_LOOK * size <= values.size:
                break
            other = take(payload.size)
            made = _put_all(mode, base, values, width, other[at:], take)
            if not size or made < size:
                other[:at] = payload[:at]
                payload, size = other, made
                payload[0] = mode
        return Encoded(payload[: at + size])

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Make the elements of those in `out`. Raises FormatError, and SchemaError where `out` is not the base."""
        given, width = np.frombuffer(payload, np.uint8), extent.dtype.part_size
        mode, at, binding = _unbind(given, out.size)
        if binding.base is not None and chunk_checksums(out) != binding.base:
            raise SchemaError("these elements are not those that the patch is against")
        if mode == _UNCHANGED:
            return
        if mode == _SPARSE:
            _take_sparse(given[at:], extent.dtype, out)
        elif mode == _DIFFERENCE:
            differences = np.empty(out.size, np.uint8)
            take_planes(given[at:], width, differences)
            kernels.add_difference(differences, out, width=width)
        else:
            take_planes(given[at:], width, out)
        if chunk_checksums(out) != binding.target:
            raise FormatError("the patch does not make what it says")


def binding_of(payload: Any, extent: Extent) -> Binding:
    """What the payload of a slice is applied to and what it makes. Raises FormatError."""
    return _unbind(np.frombuffer(payload, np.uint8), extent.count * extent.dtype.itemsize)[2]


def chunk_checksums(values: Bytes) -> Checksums:
    """The CRC-32C of each MiB of some elements."""
    return tuple([kernels.crc32c(values[at : at + CHUNK]) for at in range(0, values.size, CHUNK)])


def same_bytes(one: Bytes, other: Bytes) -> bool:
    """Whether two arrays of one length hold the same."""
    words = one.size - one.size % 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


def _bind(payload: Bytes, mode: int, target: Checksums, base: Checksums = ()) -> int:
    """Write what stands before the coding of a slice; the bytes that it takes."""
    checksums = np.array([*target, *base], "<u4").view(np.uint8)
    payload[0] = mode
    payload[1 : 1 + checksums.size] = checksums
    return 1 + checksums.size


def _unbind(payload: Bytes, size: int) -> tuple[int, int, Binding]:
    """How a slice of `size` bytes is coded, where that begins, and what it is bound to. Raises FormatError."""
    mode = int(payload[0]) if payload.size else _UNCHANGED + 1
    if mode > _UNCHANGED:
        raise FormatError(f"the first byte of a patch says nothing that is known: {payload[:1].tolist()}")
    chunks = _chunks(size)
    at = 1 + _CRC * chunks * (1 if mode in (_WHOLE, _UNCHANGED) else 2)
    if payload.size < at or (mode == _UNCHANGED and payload.size > at):
        raise FormatError(f"a patch has {payload.size} bytes, of which {at} say what it is bound to")
    checksums = tuple(payload[1:at].view("<u4").tolist())
    target = checksums[:chunks]
    if mode == _WHOLE:
        return mode, at, Binding(None, target)
    return mode, at, Binding(checksums[chunks:] or target, target)


def _put_all(mode: int, base: Bytes, values: Bytes, width: int, payload: Bytes, take: Take) -> int:
    """Write all elements, or their differences to the base, as planes; the bytes that they take."""
    if mode == _DIFFERENCE:
        differences = take(values.size)
        kernels.difference(base, values, differences, width=width)
        values = differences
    return put_planes(values, width, payload, take)


def _put_sparse(base: Bytes, values: Bytes, dtype: DType, payload: Bytes, take: Take) -> int:
    """Write which floats changed, and how; the bytes that it takes, or 0 where that is no way to tell it."""
    floats = _SPARSE_DTYPES.get(dtype)
    if floats is None:
        return 0
    work = take(4 * values.size).view(np.uint32)
    return kernels.sparse_encode(base.view(floats), values.view(floats), payload, work)


def _take_sparse(codes: Bytes, dtype: DType, out: Bytes) -> None:
    """Make the changes that `_put_sparse` was given. Raises FormatError."""
    floats = _SPARSE_DTYPES.get(dtype)
    if floats is None:
        raise FormatError(f"no {dtype} changes one by one")
    if not kernels.sparse_decode(codes, out.view(floats), np.empty(out.size, np.uint32)):
        raise FormatError(f"{codes.size} bytes are no changes of {out.size} bytes of {dtype}")
