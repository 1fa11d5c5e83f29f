"""entropy: compresses the payloads of other stages as planes of bytes.

Codes of quantized tensors are not equally frequent, updates quantize to runs of one code, and scales and rounded floats
have few different exponents. A packer states which numbers its payload consists of. Each such part is coded as `planes`
codes floats (docs/format.md describes the layout), except that blocks of the part's most frequent byte are left out. A
payload that would not shrink is stored as it is, after one byte.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tensorwire.codecs.planes import planes_bound, put_planes, take_planes
from tensorwire.codecs.stage import Bytes, Compressor, Part
from tensorwire.errors import FormatError
from tensorwire.tensor import Extent

_MAX_PARTS: Final = 8
_HEAD: Final = np.dtype([("size", "<u4"), ("width", "u1"), ("fill", "u1"), ("coded", "<u4")])
_WIDTHS: Final = (1, 2, 4, 8)
# Shorter payloads are stored as they are: codes and their headers would take as many bytes.
_LEAST: Final = 256
# Equally frequent bytes have one equal pair in 256. At one in 240, codes save 2 %.
_WORTH: Final = 240
# Bytes, approximately, that are sampled to find the most frequent one.
_SAMPLE: Final = 1 << 13


class Entropy(Compressor):
    """Codes a payload by the frequencies of its bytes. The same on every machine, except for planes in zstd frames."""

    id = 65
    name = "entropy"

    def bound(self, size: int) -> int:
        """One byte more."""
        return size + 1

    def encode(self, data: Any, extent: Extent) -> Bytes:
        """A payload whose parts are not known."""
        return self.encode_parts(data, (Part(memoryview(data).nbytes, 1),), extent)

    def encode_parts(self, data: Any, parts: Sequence[Part], extent: Extent) -> Bytes:
        """The planes of each part, or the payload as it is if that is not longer."""
        content = np.frombuffer(data, np.uint8)
        if content.size < _LEAST:
            return _as_it_is(content)
        room = sum(_HEAD.itemsize + planes_bound(part.size, part.width) for part in parts)
        payload = _array(1 + room)
        payload[0] = len(parts)
        at, start = 1, 0
        for part in parts:
            at += _put_part(content[start : start + part.size], part.width, payload[at:])
            start += part.size
        return payload[:at] if at <= content.size else _as_it_is(content)

    def decode(self, payload: memoryview, extent: Extent, size: int, *, exact: bool) -> Bytes:
        """The parts, one after the other. Raises FormatError."""
        given = np.frombuffer(payload, np.uint8)
        if not given.size or given[0] > _MAX_PARTS:
            raise FormatError(f"entropy payload does not state its number of parts, or states more than {_MAX_PARTS}")
        if given[0] == 0:
            return given[1:]
        parts = _read_parts(given, size, exact=exact)
        content, start = _array(sum(length for length, _, _, _ in parts)), 0
        for length, width, fill, coded in parts:
            out = content[start : start + length]
            take_planes(coded, width, out)
            if fill:
                np.bitwise_xor(out, np.uint8(fill), out=out)
            start += length
        return content


def _as_it_is(content: Bytes) -> Bytes:
    payload = _array(1 + content.size)
    payload[0] = 0
    payload[1:] = content
    return payload


def _put_part(content: Bytes, width: int, payload: Bytes) -> int:
    """Write the header and the planes of a part. Returns the bytes that they take."""
    fill = _most_frequent(content) if width == 1 else 0
    values = content ^ np.uint8(fill) if fill else content
    coded = put_planes(values, width, payload[_HEAD.itemsize :], _array, worth=_WORTH)
    payload[: _HEAD.itemsize].view(_HEAD)[0] = content.size, width, fill, coded
    return _HEAD.itemsize + coded


def _most_frequent(content: Bytes) -> int:
    """The most frequent byte of a sample; of several, the lowest."""
    return int(np.bincount(content[:: max(content.size // _SAMPLE, 1)], minlength=256).argmax())


def _read_parts(given: Bytes, size: int, *, exact: bool) -> list[tuple[int, int, int, Bytes]]:
    """Size, width, fill and planes of each part, after checking their sizes. Raises FormatError."""
    parts, at, total = [], 1, 0
    for _ in range(int(given[0])):
        head = given[at : at + _HEAD.itemsize]
        at += _HEAD.itemsize
        if at > given.size:
            raise FormatError("entropy payload ends within the header of a part")
        length, width, fill, coded = head.view(_HEAD)[0].tolist()
        total += length
        if not length or width not in _WIDTHS or length % width:
            raise FormatError(f"a part of {length} bytes cannot hold numbers of {width} bytes")
        if coded > given.size - at:
            raise FormatError(f"entropy payload ends after {given.size - at} of the {coded} bytes of a part")
        parts.append((length, width, fill, given[at : at + coded]))
        at += coded
    if total > size or (exact and total != size):
        raise FormatError(f"the parts decode to {total} bytes, expected {'' if exact else 'at most '}{size}")
    if at != given.size or at > total:
        raise FormatError(f"entropy payload has {given.size} bytes; its parts take {at} and decode to {total}")
    return parts


def _array(size: int) -> Bytes:
    return np.empty(size, np.uint8)
