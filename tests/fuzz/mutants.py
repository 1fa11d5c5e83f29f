"""Changes to good streams that know what a stream is made of, with every sequence number, link, checksum and total
mended behind them: what gets past the checksums is what the checks behind them have to see.
"""

import random
import struct
from collections.abc import Callable

from frames import DATA, END, INDEX, ITEM, STREAM, Frame, assemble
from msgpack import packb, unpackb

__all__ = ["changed", "damaged", "mended_mutant", "mutate"]

Change = Callable[[bytes], bytes]

# fmt: off
NUMBERS = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 53) + 1,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -32, -33, -128, -(1 << 63)]
TOKENS = [b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xc0", b"\xcc\x01", b"\x90", b"\xc1", b"\xd4\x01\x90",
          b"\xcb" + bytes(8), b"\xa0", b"\xc4\0", b"\xdd\xff\xff\xff\xff", b"\xca" + bytes(4),
          b"\x28\xb5\x2f\xfd", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\0\x80"]
# fmt: on
FIELDS = ("type", "item", "start", "count", "length", "pad")
WIDTH = {"type": 8, "pad": 8, "item": 32}


def changed(payload: bytes, spread: random.Random) -> bytes:
    """A payload with a small change; the values are those that tend to matter."""
    at = spread.randrange(len(payload) + 1)
    new = spread.randbytes(1) if spread.random() < 0.3 else spread.choice(TOKENS)
    kind = spread.randrange(5)
    if kind == 0:
        return payload[:at] + payload[at + spread.choice((1, 1, 4)) :]
    if kind == 1:
        return payload[:at] + new + payload[at:]
    if kind == 2 and payload:
        at = min(at, len(payload) - 1)
        return payload[:at] + bytes([payload[at] ^ 1 << spread.randrange(8)]) + payload[at + 1 :]
    if kind == 3:
        return payload[: spread.randrange(len(payload) + 1)]
    return payload[:at] + new + payload[at + len(new) :]


def _described(payload: bytes, spread: random.Random) -> bytes:
    """The msgpack of a descriptor with one of its values, maybe deep inside, replaced by one that tends to matter."""
    try:
        body = unpackb(payload)
    except Exception:
        return changed(payload, spread)
    if type(body) is not dict or not body:
        return changed(payload, spread)
    holder, key = body, spread.choice([*body])
    while type(holder[key]) in (list, dict) and holder[key] and spread.random() < 0.8:
        holder = holder[key]
        key = spread.randrange(len(holder)) if type(holder) is list else spread.choice([*holder])
    value = holder[key]
    options = [spread.choice(NUMBERS), None, True, 1.0, "", "a", b"", [], {}, [value, value], str(value)]
    if type(value) is int:
        options += [
            value + 1,
            value - 1,
            value * 2,
            spread.choice(NUMBERS),
            spread.choice(NUMBERS),
            spread.randrange(70),
        ]
    if type(value) is list:
        options += [value[:-1], value[::-1], value * 2]
    holder[key] = spread.choice(options)
    try:
        return packb(body)
    except OverflowError:  # a number doubled out of 64 bits
        return changed(payload, spread)


def mutate(frames: list[Frame], spread: random.Random, change: Change | None = None) -> list[Frame]:
    """Frames with one change. `change` makes another payload of one, where the caller has a way of its own."""
    at = spread.randrange(len(frames))
    frame = frames[at]
    kind = spread.random()
    if kind < 0.65 and frame.payload is not None:
        described = frame.type in (STREAM, ITEM) and spread.random() < 0.5
        payload = change(frame.payload) if change else (_described if described else changed)(frame.payload, spread)
        count = frame.count
        if frame.type == DATA and spread.random() < 0.5 and frame.count == len(frame.payload):
            count = len(payload)
        mutants = [Frame(frame.type, payload, frame.item, frame.start, count)]
    elif kind < 0.7:
        mutants = []
    elif kind < 0.75:
        mutants = [frame, frame]
    elif kind < 0.8:
        other = spread.randrange(len(frames))
        frames = [*frames]
        frames[at], frames[other] = frames[other], frame
        return frames
    elif kind < 0.85:
        mutants = [Frame(spread.choice((0x80, 0x81, 0xFF, 5, 6)), spread.randbytes(spread.randrange(4))), frame]
    else:
        field = spread.choice(FIELDS)
        value = (
            getattr(frame, field, 0) + spread.choice([-1, 1, 2, 1 << 31])
            if spread.random() < 0.6
            else spread.choice(NUMBERS)
        )
        mutants = [frame.having(**{field: max(0, min(value, (1 << WIDTH.get(field, 64)) - 1))})]
    return [*frames[:at], *mutants, *frames[at + 1 :]]


def mended_mutant(frames: list[Frame], align: int, spread: random.Random) -> bytes:
    """A stream with one change and every sequence number, link, checksum and total right again."""
    return assemble(mutate(frames, spread), align=align)


def damaged(stream: bytes, spread: random.Random) -> bytes:
    """A stream with bytes changed, lost or moved, and nothing mended."""
    return changed(stream, spread)


def forgiving(stream: bytes) -> tuple[list[Frame], int] | None:
    """The frames of a stream of which nothing may be right, and its alignment; None where there are none."""
    header, frames, at, align = struct.Struct("<BBBBIQIIQQII"), [], 16, 1
    while at + 48 <= len(stream):
        kind, _, pad, _, _, length, item, _, start, count, _, _ = header.unpack_from(stream, at)
        begin = at + 48 + pad
        if length > len(stream) - begin:
            break
        payload = stream[begin : begin + length]
        if kind == STREAM and b"align\x40" in payload:
            align = 64
        frames.append(Frame(kind, None if kind in (END, INDEX) else payload, item, start, count))
        at = begin + length
    return (frames, align) if frames else None
