"""Streams by hand: take a stream apart into frames, and put frames together with every field right or as told.

Needs only msgpack and the reference reader's CRC, so that what it builds owes nothing to the library.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from msgpack import unpackb
from reference import crc32c

__all__ = [
    "BUNDLE",
    "DATA",
    "END",
    "INDEX",
    "ITEM",
    "STREAM",
    "TARGET",
    "Frame",
    "assemble",
    "at_rest",
    "cut",
    "end",
    "preamble",
    "take_apart",
]

STREAM, ITEM, DATA, END, BUNDLE, INDEX, TARGET = 1, 2, 3, 4, 5, 0x81, 0x82
PREAMBLE_SIZE, HEADER_SIZE = 16, 48
_HEADER = struct.Struct("<BBBBIQIIQQII")


@dataclass(frozen=True)
class Frame:
    """A frame; `fields` overrides header fields that `assemble` would compute, `padding` the bytes before the payload.

    An INDEX or END frame without a payload gets the right one; `fields` of END are items, frames, size, index, digest.
    """

    type: int
    payload: bytes | None = b""
    item: int = 0
    start: int = 0
    count: int = 0
    padding: bytes | None = None
    fields: tuple[tuple[str, Any], ...] = ()

    def having(self, **fields: Any) -> "Frame":
        return replace(self, fields=(*self.fields, *fields.items()))


def preamble(*, magic: bytes = b"\x93TWIR\r\n\x1a", major: int = 1, minor: int = 0, flags: int = 0) -> bytes:
    body = struct.pack("<8sBBH", magic, major, minor, flags)
    return body + struct.pack("<I", crc32c(body))


def end(**fields: Any) -> Frame:
    return Frame(END, None).having(**fields)


def assemble(frames: Iterable[Frame], *, align: int = 1, head: bytes | None = None) -> bytes:
    """The stream of these frames, sequence, links, padding, checksums and totals computed."""
    stream = bytearray(preamble() if head is None else head)
    digest = hashlib.sha256(stream)
    link = int.from_bytes(stream[-4:], "little")
    index = 0
    described: list[list[int]] = []  # of the INDEX frame: where ITEM frames stand,
    entries: list[list[int]] = []  # and the data of items,
    carries: list[bool] = []  # of those that have some
    for sequence, frame in enumerate(frames):
        fields = dict(frame.fields)
        payload = frame.payload
        if payload is None and frame.type == INDEX:
            payload = b"".join(struct.pack("<QII", *entry) for entry in [*described, *entries])
        elif payload is None:
            totals = {"items": len(entries), "frames": sequence, "size": len(stream), "index": index}
            totals |= {key: fields.pop(key) for key in [*totals] if key in fields}
            payload = struct.pack("<QQQQ", *totals.values()) + fields.pop("digest", digest.digest())
        padding = frame.padding
        if padding is None:
            padding = bytes(-(len(stream) + HEADER_SIZE) % align if frame.type == DATA else 0)
        header = {
            "type": frame.type,
            "reserved1": 0,
            "pad": len(padding),
            "reserved2": 0,
            "sequence": sequence,
            "length": len(payload),
            "item": frame.item,
            "link": link,
            "start": frame.start,
            "count": frame.count,
            "payload_crc": crc32c(payload),
            "crc": 0,
        } | fields
        packed = _HEADER.pack(*header.values())[:-4]
        packed += struct.pack("<I", header["crc"] or crc32c(packed))
        place = [len(stream), sequence, link]
        if frame.type == INDEX:
            index = len(stream)
        elif frame.type == ITEM:
            described.append(place)
            carries += items_in(payload)
            entries += [[0, 0, 0] for _ in carries[len(entries) :]]
        elif frame.type == DATA and frame.item < len(entries) and entries[frame.item][1] == 0:
            entries[frame.item] = place
        elif frame.type == BUNDLE and frame.item < len(entries) and frame.count <= 64:
            carried = [number for number in range(frame.item, len(entries)) if carries[number]]
            for number in carried[: frame.count]:
                entries[number] = place
        stream += packed + padding + payload
        digest.update(packed)
        link = int.from_bytes(packed[-4:], "little")
    return bytes(stream)


def items_in(payload: bytes) -> list[bool]:
    """Whether each item that an ITEM payload describes, which may be anything, has data."""
    with suppress(Exception):
        body = unpackb(payload)
        return [_has_data(body["forms"][number]) for number, *_ in body["items"]]
    return [True]


def _has_data(form: dict[str, Any]) -> bool:
    return prod(form["shape"]) > 0 if "shape" in form else form.get("size", 0) != 0


def at_rest(frames: Iterable[Frame], *, head: bytes | None = None, align: int = 1) -> bytes:
    """The same frames as a file: aligned to 64 where the STREAM frame says 1, with an index and an end frame.

    What is there already stays as it is, with every flaw.
    """
    first, *others = frames
    payload = first.payload or b""
    if first.type == STREAM and payload[1:8] in (b"\xa5align\x01", b"\xa5align\x40"):
        first = replace(first, payload=payload[:7] + b"\x40" + payload[8:])
        align = 64
    if not others or others[-1].type != END:
        others.append(end())
    if all(frame.type != INDEX for frame in others):
        others.insert(-1, Frame(INDEX, None))
    return assemble([first, *others], align=align, head=head)


def cut(stream: bytes) -> Iterator[bytes]:
    """The preamble, then each frame of a good stream, as bytes."""
    yield stream[:PREAMBLE_SIZE]
    at = PREAMBLE_SIZE
    while at < len(stream):
        header = _HEADER.unpack(stream[at : at + HEADER_SIZE])
        size = HEADER_SIZE + header[2] + header[5]
        yield stream[at : at + size]
        at += size


def take_apart(stream: bytes) -> list[Frame]:
    """The frames of a good stream, such that `assemble` gives it back."""
    frames = []
    for raw in [*cut(stream)][1:]:
        kind, _, pad, _, _, _, item, _, start, count, _, _ = _HEADER.unpack(raw[:HEADER_SIZE])
        payload = None if kind in (INDEX, END) else raw[HEADER_SIZE + pad :]
        frames.append(Frame(kind, payload, item, start, count))
    return frames
