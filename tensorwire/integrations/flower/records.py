"""Records on the wire: each is one stream at rest, so that any of its tensors can be read by itself."""

import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord

import tensorwire
from tensorwire import updates
from tensorwire.codecs import Codec, as_floats, is_calculated
from tensorwire.errors import SchemaError, TensorwireError
from tensorwire.integrations.flower.arrays import STYPE, Received, WireArray, record_views
from tensorwire.streams import CodecChoice, Pieces, encode
from tensorwire.tensor import ViewFront
from tensorwire.updates import Terms, Views
from tensorwire.wire import Item

LOG: Final = logging.getLogger("flwr")
KEY: Final = "tensorwire"  # of the array that stands for a record, and of the terms of a reply
_PART: Final = 12 * (5 << 20)  # bytes, whole chunks: Flower puts an array together in three times its memory
_COPIES: Final = 6  # chunks that are on their way; Flower sends a few at a time
_PATIENCE: Final = 60.0  # seconds in which a chunk is sent


def encoded(views: Views, codec: CodecChoice, terms: Terms) -> list[bytes]:
    """A stream in parts of some `_PART` bytes, which are never held beside a whole."""
    parts, part = [], BytesIO()
    for buffer in encode(views, ViewFront(), codec=codec, at_rest=True, metadata=terms.metadata()):
        part.write(buffer)
        if part.tell() >= _PART:
            parts.append(part.getvalue())
            part = BytesIO()
    return [*parts, part.getvalue()] if part.tell() else parts


def record_of(parts: list[bytes]) -> ArrayRecord:
    """A record whose arrays are the parts of a stream."""
    record = ArrayRecord()
    for name, data in zip(_part_names(len(parts)), parts, strict=True):
        record[name] = _EncodedArray(dtype="", shape=(), stype=STYPE, data=data)
    return record


def _part_names(count: int) -> list[str]:
    return [KEY, *(f"{KEY}.{number}" for number in range(1, count))]


_FlowerChunk: Any = type(Array(np.zeros(1)).slice_array()[0][1])


class _Chunk(_FlowerChunk):
    """A part of an array that goes through a gate on its way."""

    __qualname__ = _FlowerChunk.__qualname__
    gate: "_Gate"

    def deflate(self) -> bytes:
        """The bytes that are sent."""
        return self.gate.let(super().deflate)


class _EncodedArray(Array):
    """An array whose chunks are not all copied at once to be sent: Flower makes the bytes of each, and queues them."""

    __qualname__ = "Array"

    def slice_array(self) -> Any:
        """Flower's chunks, which go through one gate."""
        chunks, gate = super().slice_array(), _Gate()
        for _, chunk in chunks:
            if not isinstance(chunk, _Chunk):
                chunk.__class__ = _Chunk
                chunk.__dict__["gate"] = gate
        return chunks

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


class _Gate:
    """Lets copies of chunks be made only while few are there: the next waits until one was sent, and dropped.

    Whoever keeps them makes the next one wait in vain, once: then the gate stays open.
    """

    def __init__(self) -> None:
        self._places = threading.Semaphore(_COPIES)
        self._open = False

    def let(self, make: Callable[[], bytes]) -> bytes:
        """What `make` makes."""
        if self._open or not self._places.acquire(timeout=_PATIENCE):
            self._open = True
            return make()
        copied = _Copy(make())
        copied.dropped = self._places.release
        return copied


class _Copy(bytes):
    """Bytes that tell when nobody has them any more."""

    dropped: Callable[[], None]

    def __del__(self) -> None:
        self.dropped()


def is_encoded(record: object) -> bool:
    """Whether a record is one that `record_of` made."""
    return isinstance(record, ArrayRecord) and KEY in record and record[KEY].stype == STYPE


def joined(record: ArrayRecord) -> bytes:
    """The stream of an encoded record."""
    names = _part_names(len(record))
    if record.keys() != set(names):
        raise SchemaError(f"an encoded record has the arrays {names}, not {list(record)[: len(names)]}")
    return b"".join(record[name].data for name in names)


def opened(record: ArrayRecord, *, finite: bool) -> Received:
    """The content of an encoded record, which is read and verified once.

    `finite`: refuse NaN and infinities, which would spoil a mean. Raises a WireError.
    """
    data = joined(record)
    pieces = Pieces(data, _check_flat)
    for piece in pieces:
        if finite and is_calculated(piece.dtype) and not np.isfinite(as_floats(piece.data, piece.dtype)).all():
            raise SchemaError("the update holds NaN or an infinity", item=piece.item.name)
    file = tensorwire.open_file(data)
    views = {str(tensorwire.path_of(name)[0]): file.view(name) for name in file}
    return Received(data, Terms.parse(pieces.metadata), views)


def _check_flat(item: Item) -> None:
    if len(item.path) > 1:
        raise SchemaError("a record is a flat mapping of names to tensors")


def lazy_record(views: Views, origin: Received) -> ArrayRecord:
    """A record of arrays that are decoded as they are read."""
    record = ArrayRecord()
    for name, view in views.items():
        record[name] = WireArray(view, origin=origin)
    return record


def by_role(codec: CodecChoice) -> CodecChoice:
    """One codec for all leaves alone what must stay exact; a choice by name or function is taken as it is."""
    return updates.exact_vectors(codec) if isinstance(codec, (str, Codec)) else codec


def sendable(key: str, record: object) -> Views | None:
    """The tensors of a record; None if it is not a record of arrays, or is sent as Flower sends it."""
    if not isinstance(record, ArrayRecord) or not record:
        return None
    try:
        return record_views(record)
    except TensorwireError as error:
        say_once(f"tensorwire: the record {key!r} is sent as without tensorwire: {error}")
        return None


@lru_cache(maxsize=256)
def say_once(text: str) -> None:
    """Warn of it, the first time."""
    LOG.warning("%s", text)
