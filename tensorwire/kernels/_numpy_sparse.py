"""The kernels of patches in NumPy, which is their definition: differences to a base, and sparse changes of floats.

The numbers of sparse changes have 16 bits, those of bfloat16 or float16. Each has a class, which is its exponent in the
base; runs of classes are groups, and a group's changes are told by the gaps between them, in Rice codes.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]

_CLASSES: Final = 32
_MOST_RICE: Final = 24
_GROUP_BITS: Final = 40  # what a group costs beside its gaps, about: its counts and parameters
_COUNT_BITS: Final = 5
_LARGEST: Final = 0x7FFE  # beyond 2


def difference(base: Array, values: Array, out: Array, *, width: int) -> None:
    """Out = the differences of numbers to those of a base, as zig-zag, turned as planes turn back."""
    word: Any = np.dtype(f"<u{width}").type
    change = values.view(word) - base.view(word)
    zigzag = (change << word(1)) ^ (word(0) - (change >> word(8 * width - 1)))
    out.view(word)[:] = _turned(zigzag, width, right=True)


def add_difference(differences: Array, values: Array, *, width: int) -> None:
    """Values += what `difference` was taken to."""
    word: Any = np.dtype(f"<u{width}").type
    zigzag = _turned(differences.view(word), width, right=False)
    values.view(word)[:] += (zigzag >> word(1)) ^ (word(0) - (zigzag & word(1)))


def _turned(numbers: Array, width: int, *, right: bool) -> Array:
    """The upper 16 bits of each number rotated by one."""
    if width == 1:
        return numbers
    word = numbers.dtype.type
    low = word(8 * width - 16)
    upper, rest = numbers >> low, numbers & word((1 << int(low)) - 1)
    turned = upper >> word(1) | upper << word(15) if right else upper << word(1) | upper >> word(15)
    rotated: Array = (turned & word(0xFFFF)) << low | rest
    return rotated


def sparse_encode(base: Array, values: Array, codes: Array) -> tuple[int, int]:
    """Write what changed; the bytes that it takes, or 0, and how many values that is."""
    classes = _classes(base)
    changes = values.view(np.uint16) - base.view(np.uint16)
    changed = int(np.count_nonzero(changes))
    if not 0 < changed <= values.size // 2:
        return 0, changed
    groups = _groups(_tallies(classes, changes))
    parts = [_number(sum(1 << first for first, _ in groups), 32)]
    for first, end in groups:
        mine = changes[(classes >= first) & (classes < end)]
        parts += _group_bits(mine)
    payload = np.packbits(np.concatenate(parts), bitorder="little")
    if payload.size > codes.size:
        return 0, changed
    codes[: payload.size] = payload
    return int(payload.size), changed


def sparse_decode(codes: Array, values: Array) -> int:
    """Make the changes; how many there are, or 0 where no encoder writes such codes."""
    numbers, bits = values.view(np.uint16), _Reader(np.unpackbits(codes, bitorder="little"))
    try:
        begins = bits.number(32)
        if not begins & 1:
            return 0
        firsts = [number for number in range(_CLASSES) if begins >> number & 1]
        groups = list(_taken(bits, values.size, len(firsts)))
        if not bits.finished():
            return 0
    except _BadError:
        return 0
    classes = _classes(values)
    for first, end, group in zip(firsts, [*firsts[1:], _CLASSES], groups, strict=True):
        mine = np.flatnonzero((classes >= first) & (classes < end))
        if group.changes.size == 0:
            continue
        if group.listed.size and group.listed[-1] >= mine.size:
            return 0
        places = np.delete(mine, group.listed) if group.inverted else mine[group.listed]
        if places.size != group.changes.size:
            return 0
        numbers[places] += group.changes
    return sum(group.changes.size for group in groups)


def _classes(numbers: Array) -> Array:
    """Exponents of float16, and those of bfloat16 from 2^-31 to 1."""
    bits = numbers.view(np.uint16).astype(np.int64)
    if numbers.dtype == np.float16:
        return bits >> 10 & 31
    classes: Array = np.clip((bits >> 7 & 255) - 96, 0, _CLASSES - 1)
    return classes


def _tallies(classes: Array, changes: Array) -> Array:
    """Of each class its numbers, those that changed, by more than 1, and how far beyond 2 that is, added up."""
    sizes = abs(changes.view(np.int16).astype(np.int64))
    rows = (np.ones(sizes.size, np.int64), sizes > 0, sizes > 1, np.maximum(sizes - 2, 0))
    tallies: Array = np.array([np.bincount(classes, row, _CLASSES) for row in rows]).astype(np.int64).T
    return tallies


def _groups(tallies: Array) -> list[tuple[int, int]]:
    """The runs of classes [first, end) that take the fewest bits."""
    best, begins = [0], [0]
    for end in range(1, _CLASSES + 1):
        choices = []
        for begin in reversed(range(end)):
            bits = _bits_of_group(*tallies[begin:end].sum(axis=0).tolist())
            choices.append((best[begin] + bits, -begin))
        bits, begin = min(choices)
        best.append(bits)
        begins.append(-begin)
    groups, end = [], _CLASSES
    while end:
        groups.append((begins[end], end))
        end = begins[end]
    return groups[::-1]


def _bits_of_group(every: int, changed: int, larger: int, beyond: int) -> int:
    if changed == 0:
        return _COUNT_BITS
    gaps = _rice_bits(*sorted((changed, every - changed)))
    some = _rice_bits(larger, changed - larger) + _rice_bits(larger, beyond)
    return _GROUP_BITS + gaps + min(some, _rice_bits(changed, larger + beyond))


def _rice_bits(count: int, total: int) -> int:
    """The least bits that Rice codes of so many numbers take, about, whose sum is this."""
    return min(count * (k + 1) + (total >> k) for k in range(_MOST_RICE + 1))


def _group_bits(changes: Array) -> Iterator[Bits]:
    """What is written of a group whose numbers change by so much."""
    places = np.flatnonzero(changes)
    yield _count(places.size)
    if places.size == 0:
        return
    others = np.flatnonzero(changes == 0)
    inverted = others.size < places.size
    yield _number(int(inverted), 1)
    if inverted:
        yield _count(others.size)
    yield from _rice(_gaps(others if inverted else places))
    signed = changes[places].view(np.int16).astype(np.int64)
    yield (signed < 0).astype(np.uint8)
    larger = np.flatnonzero(abs(signed) > 1)
    some = [_count(larger.size), *_rice(_gaps(larger)), *_rice(abs(signed[larger]) - 2)]
    each = [*_rice(abs(signed) - 1)]
    shorter = sum(part.size for part in each) <= sum(part.size for part in some)
    yield _number(int(shorter), 1)
    yield from each if shorter else some


def _gaps(places: Array) -> Array:
    gaps: Array = np.diff(places, prepend=-1) - 1
    return gaps


def _number(number: int, count: int) -> Bits:
    """The lowest bits of a number."""
    return np.array([number >> bit & 1 for bit in range(count)], np.uint8)


def _count(number: int) -> Bits:
    """How many bits a number has, and those but for the highest."""
    length = number.bit_length()
    return np.concatenate([_number(length, _COUNT_BITS), _number(number, max(length - 1, 0))])


def _rice(numbers: Array) -> Iterator[Bits]:
    """The parameter; the lower bits of all numbers; of each the others, as so many zeros and a one."""
    if numbers.size == 0:
        return
    near = min((int(numbers.sum()) // numbers.size + 1).bit_length() - 1, _MOST_RICE)
    nearest = range(max(near - 1, 0), min(near + 1, _MOST_RICE) + 1)
    k = min(nearest, key=lambda k: numbers.size * (k + 1) + int((numbers >> k).sum()))
    yield _number(k, 5)
    yield (numbers[:, None] >> np.arange(k) & 1).astype(np.uint8).reshape(-1)
    ones = np.cumsum((numbers >> k) + 1) - 1
    unary = np.zeros(ones[-1] + 1, np.uint8)
    unary[ones] = 1
    yield unary


class _BadError(Exception):
    """No encoder writes such bits."""


class _Taken(NamedTuple):
    """What is read of a group: the places that are listed, whether those are the unchanged ones, and all changes."""

    listed: Array
    inverted: bool
    changes: Array


def _taken(bits: "_Reader", count: int, groups: int) -> Iterator[_Taken]:
    """So many groups of `count` numbers."""
    left = count // 2
    for _ in range(groups):
        changed = bits.count(left)
        left -= changed
        if changed == 0:
            yield _Taken(np.empty(0, np.int64), False, np.empty(0, np.uint16))
            continue
        inverted = bool(bits.number(1))
        listed = bits.count(changed - 1) if inverted else changed
        places = np.cumsum(bits.rice(listed, count) + 1) - 1
        signs = np.where(bits.take(changed) == 1, -1, 1)
        sizes = bits.rice(changed, _LARGEST + 1) + 1 if bits.number(1) else _some_larger(bits, changed)
        if (sizes * signs == 1 << 15).any():
            raise _BadError
        yield _Taken(places, inverted, (sizes * signs).astype(np.uint16))


def _some_larger(bits: "_Reader", changed: int) -> Array:
    """The sizes of so many changes, of which some are larger than 1."""
    larger = bits.count(changed)
    which = np.cumsum(bits.rice(larger, changed) + 1) - 1
    beyond = bits.rice(larger, _LARGEST)
    if larger and which[-1] >= changed:
        raise _BadError
    sizes = np.ones(changed, np.int64)
    sizes[which] = beyond + 2
    return sizes


class _Reader:
    """Bits from front to back. Raises _BadError for what no encoder writes."""

    def __init__(self, bits: Bits) -> None:
        self._bits = bits
        self._at = 0

    def take(self, count: int) -> Bits:
        """The next bits."""
        part = self._bits[self._at : self._at + count]
        if part.size < count:
            raise _BadError
        self._at += count
        return part

    def number(self, count: int) -> int:
        """A number of so many bits."""
        return int.from_bytes(np.packbits(self.take(count), bitorder="little").tobytes(), "little")

    def count(self, most: int) -> int:
        """What `_count` was given, no more than `most`."""
        length = self.number(_COUNT_BITS)
        if length == 0:
            return 0
        count = 1 << length - 1 | self.number(length - 1)
        if count > most:
            raise _BadError
        return count

    def rice(self, count: int, most: int) -> Array:
        """So many numbers, each no more than `most`."""
        if count == 0:
            return np.empty(0, np.int64)
        k = self.number(5)
        if k > _MOST_RICE:
            raise _BadError
        low = self.take(count * k).reshape(count, k) @ (1 << np.arange(k, dtype=np.int64))
        ones = np.flatnonzero(self._bits[self._at :])[:count]
        if ones.size < count:
            raise _BadError
        self._at += int(ones[-1]) + 1
        numbers: Array = _gaps(ones) << k | low
        if numbers.max() > most:
            raise _BadError
        return numbers

    def finished(self) -> bool:
        """Whether all was read but for fewer than 8 bits, which are 0."""
        return self._bits.size - self._at < 8 and not self._bits[self._at :].any()
