"""patch: elements encoded against a base, and bound by checksums to what they are applied to and what they make.

Most of a new version of a model is what the other side has already. A slice states the checksums of the elements that
its base must have, and takes the smallest of these forms: nothing, if it is unchanged; for floats of 16 bits, which
ones changed and by how much; the differences of all bit patterns as planes; the new elements as planes. docs/format.md
describes the layout.
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
_WORD: Final = 4

# The forms of a slice: whole without a base; whole over a base; differences; listed changes; unchanged.
_WHOLE, _REPLACED, _DIFFERENCE, _SPARSE, _UNCHANGED = range(5)
WAYS: Final = ("whole", "replaced", "difference", "sparse", "unchanged")
# A form that takes more than one in this many of the elements' bytes is compared with the next one.
_WORTH_A_LOOK: Final = 8
# Floats whose changes can be listed one by one, and the dtypes that kernels take them as.
_SPARSE_DTYPES: Final = {dtypes.FLOAT16: np.float16, dtypes.BFLOAT16: np.uint16}

Checksums = tuple[int, ...]


def _fresh(size: int) -> Bytes:
    return np.empty(size, np.uint8)


class Binding(NamedTuple):
    """What a slice is applied to and what it makes: a CRC-32C for each MiB of its elements.

    `way`: one of `WAYS`. `changed`: how many numbers differ from the base; a complex element has two. `changed` and
    `base` are None for a slice that needs no base.
    """

    way: str
    changed: int | None
    base: Checksums | None
    target: Checksums


@dataclass(frozen=True, repr=False)
class Patch(Packer):
    """Lossless, any dtype, against a base; without one, planes under checksums.

    `encode` gets the base's elements of the slice as `context`. `patch_slice` decodes the result, and needs the base's
    elements too.
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
        """The bytes of the elements; and metadata for the form of the slice, its checksums and its planes."""
        size = count * dtype.itemsize
        return Sizes(size, 1 + _WORD * (1 + 2 * _chunks(size)) + planes_bound(size, dtype.part_size) - size)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The slice against `context`, the elements of the base; without a base if that is None."""
        values, width = np.frombuffer(data, np.uint8), extent.dtype.part_size
        payload = take(self.sizes(extent.count, extent.dtype).total)
        target = chunk_checksums(values)
        if context is None:
            at = _bind(payload, _WHOLE, target)
            return Encoded(payload[: at + put_planes(values, width, payload[at:], take)])
        base = np.frombuffer(context, np.uint8)
        bound = chunk_checksums(base)
        at = _bind(payload, _SPARSE, target, bound, 0)
        size, changed = _put_sparse(base, values, extent.dtype, payload[at:], take)
        if changed == 0:
            return Encoded(payload[: _bind(payload, _UNCHANGED, target)])
        _bind(payload, _SPARSE, target, bound, changed)
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
        """The elements of a slice without a base. Raises FormatError, and SchemaError for a slice with one."""
        if binding_of(payload, extent).base is not None:
            raise SchemaError("these elements are encoded against a base: use tensorwire.apply with it")
        patch_slice(payload, extent, out)


def patch_slice(payload: Any, extent: Extent, out: Bytes, take: Take = _fresh) -> None:
    """Turn the base's elements of a slice, in `out`, into those of the target.

    `take(size)` returns work space, a uint8 array with arbitrary content. Raises FormatError, and SchemaError if `out`
    is not the base; the content of `out` is then undefined.
    """
    given = np.frombuffer(payload, np.uint8)
    at, binding = _unbind(given, extent)
    if binding.base is not None and chunk_checksums(out) != binding.base:
        raise SchemaError("these elements are not the ones that the patch is against")
    if binding.way == WAYS[_UNCHANGED]:
        return
    changed = _MAKERS[WAYS.index(binding.way)](given[at:], extent.dtype, out, take)
    if chunk_checksums(out) != binding.target:
        raise FormatError("the result of the patch does not have the checksums that it states")
    if binding.changed not in (None, changed):
        raise FormatError(f"the patch changes {changed} numbers, but states {binding.changed}")


def binding_of(payload: Any, extent: Extent) -> Binding:
    """What the payload of a slice is applied to and what it makes. Raises FormatError."""
    return _unbind(np.frombuffer(payload, np.uint8), extent)[1]


def chunk_checksums(values: Bytes) -> Checksums:
    """The CRC-32C of each MiB of some elements."""
    return tuple([kernels.crc32c(values[at : at + CHUNK]) for at in range(0, values.size, CHUNK)])


def count_unequal(one: Bytes, other: Bytes, width: int = 8) -> int:
    """How many numbers of `width` bytes differ; a remainder of fewer bytes counts as one number."""
    whole = one.size - one.size % width
    words = f"u{width}"
    return int(np.count_nonzero(one[:whole].view(words) != other[:whole].view(words))) + int(
        not np.array_equal(one[whole:], other[whole:])
    )


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


def _bind(payload: Bytes, mode: int, target: Checksums, base: Checksums = (), changed: int | None = None) -> int:
    """Write the mode and checksums before the content of a slice. Returns the bytes that they take."""
    words = [*target, *base] if changed is None else [changed, *target, *base]
    said = np.array(words, "<u4").view(np.uint8)
    payload[0] = mode
    payload[1 : 1 + said.size] = said
    return 1 + said.size


def _unbind(payload: Bytes, extent: Extent) -> tuple[int, Binding]:
    """The offset of the content of a slice, and what the slice is bound to. Raises FormatError."""
    chunks = _chunks(extent.count * extent.dtype.itemsize)
    mode = int(payload[0]) if payload.size else len(WAYS)
    if mode >= len(WAYS):
        raise FormatError(f"the first byte of a patch is not a known mode: {payload[:1].tolist()}")
    alone = mode in (_WHOLE, _UNCHANGED)
    at = 1 + _WORD * (chunks if alone else 1 + 2 * chunks)
    if payload.size < at or (mode == _UNCHANGED and payload.size > at):
        raise FormatError(f"a patch has {payload.size} bytes, but {at} belong to its checksums")
    words = tuple(payload[1:at].view("<u4").tolist())
    if alone:
        return at, Binding(WAYS[mode], None if mode == _WHOLE else 0, None if mode == _WHOLE else words, words)
    changed, numbers = words[0], extent.count * extent.dtype.parts
    if not 0 < changed <= numbers:
        raise FormatError(f"a patch states that {changed} of {numbers} numbers change")
    return at, Binding(WAYS[mode], changed, words[1 + chunks :], words[1 : 1 + chunks])


def _put_all(mode: int, base: Bytes, values: Bytes, width: int, payload: Bytes, take: Take) -> int:
    """Write all elements, or their differences to the base, as planes. Returns the bytes that they take."""
    if mode == _DIFFERENCE:
        differences = take(values.size)
        kernels.difference(base, values, differences, width=width)
        values = differences
    return put_planes(values, width, payload, take)


def _put_sparse(base: Bytes, values: Bytes, dtype: DType, payload: Bytes, take: Take) -> tuple[int, int]:
    """Write which floats changed, and by how much. Returns its bytes, 0 if that is impossible, and the changes."""
    floats = _SPARSE_DTYPES.get(dtype)
    if floats is None:
        return 0, count_unequal(base, values, dtype.part_size)
    work = take(4 * values.size).view(np.uint32)
    return kernels.encode_changes(base.view(floats), values.view(floats), payload, work)


def _take_sparse(codes: Bytes, dtype: DType, out: Bytes, take: Take) -> int:
    """Apply the changes that `_put_sparse` wrote. Returns how many there are. Raises FormatError."""
    floats = _SPARSE_DTYPES.get(dtype)
    if floats is None:
        raise FormatError(f"changes cannot be listed one by one for {dtype}")
    changed = kernels.decode_changes(codes, out.view(floats), take(4 * out.size).view(np.uint32))
    if not changed:
        raise FormatError(f"{codes.size} bytes are not valid changes to {out.size} bytes of {dtype}")
    return changed


def _take_difference(payload: Bytes, dtype: DType, out: Bytes, take: Take) -> int:
    """Add differences. Returns how many are not 0. Raises FormatError."""
    differences = take(out.size)
    take_planes(payload, dtype.part_size, differences)
    kernels.add_difference(differences, out, width=dtype.part_size)
    return int(np.count_nonzero(differences.view(f"u{dtype.part_size}")))


def _take_whole(payload: Bytes, dtype: DType, out: Bytes, take: Take) -> int:
    """Replace the elements. Returns how many numbers differ. Raises FormatError."""
    before = take(out.size)
    before[:] = out
    take_planes(payload, dtype.part_size, out)
    return count_unequal(before, out, dtype.part_size)


_MAKERS: Final = (_take_whole, _take_whole, _take_difference, _take_sparse)
