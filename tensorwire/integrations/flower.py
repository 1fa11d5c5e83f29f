"""Flower with tensorwire on its wire: a line in the server app, a line in the client app.

    strategy.start(grid=WireGrid(grid), initial_arrays=ArrayRecord(model.state_dict()), num_rounds=3)
    app = ClientApp(mods=[wire_mod])                     # the first of its mods

Each `ArrayRecord` of a message travels as one encoded stream: the model down with one codec, what a client changed
in it up with another. Where they arrive, arrays look like Flower's own and are decoded as they are read, so that a
strategy that was never changed holds encoded replies and one decoded tensor. Strategies, mods, `NumPyClient`, the
simulation engine and the deployment engine see what they always saw.

A message that cannot be used becomes an error reply, which strategies count as a failure of its node.
"""

import ctypes
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import flwr
import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

import tensorwire
from tensorwire import dtypes, numpy, updates
from tensorwire.codecs import Codec, as_floats, from_floats, is_calculated, parse
from tensorwire.dtypes import DType
from tensorwire.errors import ArgumentError, SchemaError, TensorwireError, UnsupportedError
from tensorwire.streams import CodecChoice, Pieces, encode
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.updates import ErrorFeedback, Rules, Terms, Update, Views
from tensorwire.wire import Item

__all__ = ["StreamingFedAvg", "WireArray", "WireGrid", "to_record", "to_state_dict", "wire_mod"]

_LOG: Final = logging.getLogger("flwr")
_KEY: Final = "tensorwire"  # of the array that stands for a record, and of the terms of a reply
_STYPE: Final = "tensorwire/1"
_NUMPY: Final = "numpy.ndarray"
_NPY: Final = b"\x93NUMPY"
_FAILED: Final = 6  # Flower's ErrorCode.MOD_FAILED_PRECONDITION
_PART: Final = 12 * (5 << 20)  # bytes, whole chunks: Flower puts an array together in three times its memory
_COPIES: Final = 6  # chunks that are on their way; Flower sends a few at a time
_PATIENCE: Final = 60.0  # seconds in which a chunk is sent
_BLOCK: Final = 1 << 20  # elements that are calculated with at a time
_COPIED: Final = 1 << 22  # and copied: at the ends of what is read, frames are decoded twice
# What NumPy has of its own, and what the others are read as: wider numbers or, of those that are none, bits.
_NATIVE: Final = {
    dtype: np.dtype(dtype.name) for dtype in dtypes.ALL if hasattr(np, dtype.name) or dtype == dtypes.BOOL
}

_LIBC: Final = ctypes.CDLL(None) if os.name == "posix" else None

Numbers = npt.NDArray[Any]
ClientAppCallable = Callable[[Message, Context], Message]
UpCodec = str | Codec | Mapping[str, str | Codec]


# What Flower holds, as tensors.


class WireArray(Array):
    """An `Array` that is decoded, or calculated, when it is read, each time anew: it looks like one of NumPy.

    `view`: the tensor, in its own dtype. bfloat16 and floats of eight bits are read as float32, so that no strategy
    adds up bit patterns. `tensor`: the caller's own, where the array stands for one that lives in memory.
    """

    __qualname__ = "Array"  # by which Flower knows the kind of what it has received

    def __init__(self, view: TensorView, tensor: Any = None, *, origin: "_Received | None" = None) -> None:
        # Not Flower's constructor, which takes the bytes.
        self.__dict__.update(
            view=view,
            tensor=tensor,
            origin=origin,
            dtype=str(_readable(view.dtype)),
            shape=tuple(view.shape),
            stype=_NUMPY,
        )

    view: TensorView
    tensor: Any
    origin: "_Received | None"

    @property
    def data(self) -> bytes:
        """The bytes of a .npy file, as in any `Array` of NumPy."""
        values = self.numpy()
        head = BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(values))
        return b"".join((head.getvalue(), values.reshape(-1).view(np.uint8).data))

    def numpy(self) -> Numbers:
        """A new array of the values."""
        view = self.view
        values = np.empty(view.numel, _readable(view.dtype))
        for start, stop in _blocks(view.numel):
            values[start:stop] = _numbers(view.read(start, stop), view.dtype)
        return values.reshape(view.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def to_record(state: Mapping[str, Any]) -> ArrayRecord:
    """Tensors, torch or NumPy, as an `ArrayRecord` that copies none of them.

    Unlike `ArrayRecord(state)` it takes every dtype, bfloat16 among them, and sends tied tensors once. The tensors are
    read when the record is sent, or its arrays are: do not change them before. Raises EncodeError for what is no
    tensor.

        return Message(RecordDict({"arrays": to_record(model.state_dict()), "metrics": metrics}), reply_to=message)
    """
    record = ArrayRecord()
    for name, view in updates.views(state).items():
        record[name] = WireArray(view, state[name])
    return record


def to_state_dict(record: ArrayRecord, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arrays of a record as torch tensors, in the dtypes that they were sent with, tied as they were.

    `into`: tensors of the same names and shapes, on any device, to be written over and given back; each keeps its
    dtype, whatever an aggregation has made of it. Raises SchemaError where names or shapes are not theirs.

        to_state_dict(message.content["arrays"], into=model.state_dict())
    """
    views = _record_views(record)
    if into is None:
        made: dict[object, Any] = {}
        for name, view in views.items():
            made[name] = _once(made, view, name, partial(_torch, view))
        return {name: made[name] for name in views}
    if views.keys() != into.keys():
        raise SchemaError(f"the record and into= differ in names, such as {sorted(views.keys() ^ into.keys())[:3]}")
    for name, target in updates.views(into).items():
        if target.shape != views[name].shape:
            raise SchemaError(f"shape is {list(views[name].shape)}, expected {list(target.shape)}", item=name)
        into[name].detach().copy_(_torch(_converted(views[name], target.dtype)))
    return dict(into)


def _torch(view: TensorView) -> Any:
    return tensorwire.torch.FRONT.wrap(_bytes_of(view), view.dtype, view.shape)


def _once(made: dict[object, Any], view: TensorView, name: str, make: Callable[[], Any]) -> Any:
    """What `make` makes of a tensor, once for all names of it."""
    key = name if view.identity is None else view.identity
    if key not in made:
        made[key] = make()
    return made[key]


def _record_views(record: Mapping[str, Array]) -> Views:
    """The arrays of a record as views. Raises UnsupportedError for one that is not of NumPy."""
    return {name: _view(name, array) for name, array in record.items()}


def _view(name: str, array: Array) -> TensorView:
    if isinstance(array, WireArray):
        return array.view
    if array.stype == _STYPE:
        raise UnsupportedError("this record is encoded: let wire_mod be the first of the ClientApp's mods", item=name)
    if array.stype != _NUMPY or not array.data.startswith(_NPY):
        raise UnsupportedError(f"an array of {array.stype!r} is no array of NumPy", item=name)
    file = BytesIO(array.data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns, dtype = read_header(file)
    if dtype.hasobject:
        raise UnsupportedError("an array of Python objects cannot be sent", item=name)
    values = np.ndarray(shape, dtype, array.data, file.tell(), order="F" if columns else "C")
    # Equal arrays of a message are one in memory once Flower has received them: that is no tie.
    return replace(updates.views({name: values})[name], identity=None)


def _readable(dtype: DType) -> np.dtype[Any]:
    """The NumPy type that an array of this dtype is read as."""
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    if dtype == dtypes.COMPLEX32:
        return np.dtype(np.complex64)
    return np.dtype(np.float32 if is_calculated(dtype) else np.uint8)


def _numbers(data: Any, dtype: DType) -> Numbers:
    """Elements as NumPy can calculate with them; bits of those that are no numbers."""
    if dtype in _NATIVE or not is_calculated(dtype):
        return np.frombuffer(data, _readable(dtype))
    floats = as_floats(data, dtype)
    return floats.astype(np.float32).view(np.complex64) if dtype == dtypes.COMPLEX32 else floats


def _blocks(count: int, block: int = _BLOCK) -> Iterator[tuple[int, int]]:
    for start in range(0, count, block):
        yield start, min(start + block, count)


def _bytes_of(view: TensorView) -> npt.NDArray[np.uint8]:
    """All of a tensor, in memory of its own."""
    size = view.dtype.itemsize
    data = np.empty(view.numel * size, np.uint8)
    for start, stop in _blocks(view.numel, _COPIED):
        data[start * size : stop * size] = np.frombuffer(view.read(start, stop), np.uint8)
    return data


def _converted(view: TensorView, dtype: DType) -> TensorView:
    """The same numbers in another dtype; integers are rounded to, as an aggregation makes floats of counters."""
    if view.dtype == dtype:
        return view

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        numbers = _numbers(view.read(start, stop), view.dtype)
        if is_calculated(dtype):
            wide = numbers.astype(_readable(dtype))
            floats = wide.view(np.float32 if wide.itemsize == 8 else np.float64) if wide.dtype.kind == "c" else wide
            data: npt.NDArray[np.uint8] = from_floats(floats, dtype)
            return data
        return _rounded(numbers, _readable(dtype)).view(np.uint8)

    return TensorView(dtype, view.shape, read, identity=view.identity)


def _rounded(numbers: Numbers, dtype: np.dtype[Any]) -> Numbers:
    """Numbers as integers or bools, to the nearest; beyond what the dtype has, near its largest; NaN as 0."""
    if numbers.dtype.kind == "f":
        numbers = np.rint(numbers)
    if dtype.kind in "iu" and numbers.dtype.kind == "f":
        limits = np.iinfo(dtype)
        most = np.float64(limits.max)
        most = most if int(most) <= limits.max else np.nextafter(most, 0)
        numbers = np.clip(np.nan_to_num(numbers.astype(np.float64)), float(limits.min), most)
    return numbers.astype(dtype)


# What travels: a record as one stream at rest, so that any of its tensors can be read by itself.


class _Received(NamedTuple):
    """A record that has come, every byte of it verified."""

    data: bytes | list[bytes]
    terms: Terms
    views: Views


def _encoded(views: Views, codec: CodecChoice, terms: Terms) -> list[bytes]:
    """A stream in parts of some `_PART` bytes, which are never held beside a whole."""
    parts, part = [], BytesIO()
    for buffer in encode(views, ViewFront(), codec=codec, at_rest=True, metadata=terms.metadata()):
        part.write(buffer)
        if part.tell() >= _PART:
            parts.append(part.getvalue())
            part = BytesIO()
    return [*parts, part.getvalue()] if part.tell() else parts


def _record_of(parts: list[bytes]) -> ArrayRecord:
    record = ArrayRecord()
    for name, data in zip(_part_names(len(parts)), parts, strict=True):
        record[name] = _EncodedArray(dtype="", shape=(), stype=_STYPE, data=data)
    return record


def _part_names(count: int) -> list[str]:
    return [_KEY, *(f"{_KEY}.{number}" for number in range(1, count))]


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


def _is_encoded(record: object) -> bool:
    return isinstance(record, ArrayRecord) and _KEY in record and record[_KEY].stype == _STYPE


def _joined(record: ArrayRecord) -> bytes:
    """The stream of an encoded record."""
    names = _part_names(len(record))
    if record.keys() != set(names):
        raise SchemaError(f"an encoded record has the arrays {names}, not {list(record)[: len(names)]}")
    return b"".join(record[name].data for name in names)


def _opened(record: ArrayRecord, *, finite: bool) -> _Received:
    """What an encoded record holds, read through once.

    `finite`: refuse NaN and infinities, which no mean survives. Raises a WireError.
    """
    data = _joined(record)
    pieces = Pieces(data, _check_flat)
    for piece in pieces:
        if finite and is_calculated(piece.dtype) and not np.isfinite(as_floats(piece.data, piece.dtype)).all():
            raise SchemaError("the update holds NaN or an infinity", item=piece.item.name)
    file = tensorwire.open_file(data)
    views = {str(tensorwire.path_of(name)[0]): file.view(name) for name in file}
    return _Received(data, Terms.parse(pieces.metadata), views)


def _check_flat(item: Item) -> None:
    if len(item.path) > 1:
        raise SchemaError("a record is a flat mapping of names to tensors")


def _lazy_record(views: Views, origin: _Received) -> ArrayRecord:
    record = ArrayRecord()
    for name, view in views.items():
        record[name] = WireArray(view, origin=origin)
    return record


def _by_role(codec: CodecChoice) -> CodecChoice:
    """One codec for all leaves alone what must stay exact; a choice by name or function is taken as it is."""
    return updates.exact_vectors(codec) if isinstance(codec, (str, Codec)) else codec


# The client's side.


class _Asked(NamedTuple):
    """How a reply is to travel: the terms that the server sends beside its records."""

    up: str | dict[str, str]
    difference: bool
    feedback: bool

    @classmethod
    def of(cls, up: UpCodec, difference: bool, feedback: bool) -> "_Asked":
        """Raises ArgumentError for a choice that cannot be sent to a client."""
        if isinstance(up, Mapping):
            return cls({str(pattern): repr(parse(spec)) for pattern, spec in up.items()}, difference, feedback)
        if not isinstance(up, (str, Codec)):
            raise ArgumentError(f"up= is sent to the clients: give a spec or a mapping, not a {type(up).__name__}")
        return cls(repr(parse(up)), difference, feedback)

    def record(self) -> ConfigRecord:
        return ConfigRecord({"version": 1, **self._replace(up=json.dumps(self.up))._asdict()})

    @classmethod
    def parse(cls, record: ConfigRecord) -> "_Asked":
        if record.get("version") != 1:
            raise UnsupportedError(
                f"the server speaks version {record.get('version')!r}, not 1: update tensorwire here"
            )
        try:
            up = json.loads(str(record["up"]))
            choice = {str(pattern): parse(spec) for pattern, spec in up.items()} if isinstance(up, dict) else parse(up)
            return cls.of(choice, record["difference"] is True, record["feedback"] is True)
        except (KeyError, ValueError) as error:
            raise SchemaError(f"the server does not say how to answer: {error!r}") from None


def wire_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod of a `ClientApp`, the first in its list, so that others see plain arrays.

    Where the server does not use `WireGrid` it does nothing. Raises a WireError for a damaged message, EncodeError and
    NonFiniteError for what cannot be sent, each of which Flower reports to the server as an error of this node.
    """
    if not msg.has_content() or not isinstance(terms := msg.content.get(_KEY), ConfigRecord):
        return call_next(msg, context)
    _trim()
    asked, bases, records = _Asked.parse(terms), {}, {}
    for key, record in msg.content.items():
        if _is_encoded(record):
            received = _opened(record, finite=False)
            bases[key], record = received.views, _lazy_record(received.views, received)
        records[key] = record
    del records[_KEY]
    msg.content = RecordDict(records)
    del records, record, terms
    reply = call_next(msg, context)
    if not reply.has_error():
        _trim()
        answer = _Answer(asked, bases, msg, context)
        reply.content = RecordDict({key: answer.record(key, record) for key, record in reply.content.items()})
    return reply


class _Answer:
    """How the records of one reply are encoded."""

    def __init__(self, asked: _Asked, bases: Mapping[str, Views], message: Message, context: Context) -> None:
        self._asked = asked
        self._bases = bases
        self._metadata = message.metadata
        self._state = context.state

    def record(self, key: str, record: Any) -> Any:
        """A record as it is to be sent: encoded, where it is one of arrays."""
        views = _sendable(key, record)
        if views is None:
            return record
        base = self._base_of(key, views) if self._asked.difference else None
        terms = Terms(
            run=str(self._metadata.run_id),
            round=0,
            base=f"{self._metadata.message_id}/{base or ''}",
            client=str(self._metadata.dst_node_id),
            kind="weights" if base is None else "difference",
        )
        codec = _by_role(self._asked.up)
        if base is None:
            return _record_of(_encoded(views, codec, terms))
        old = self._bases[base]
        views = {name: views[name] for name in old if name in views}  # in its order, which a mean relies on
        change = updates.subtract(_shaped_like(views, old), old)
        if not (self._asked.feedback and self._metadata.message_type.startswith("train")):
            return _record_of(_encoded(change, codec, terms))
        return _record_of(self._with_feedback(base, change, codec, terms))

    def _base_of(self, key: str, views: Views) -> str | None:
        """The record of the message that this one is a new version of."""
        for name in (key, *self._bases):
            base = self._bases.get(name, {})
            if views.keys() <= base.keys() and all(_comparable(view, base[item]) for item, view in views.items()):
                return name
        return None

    def _with_feedback(self, base: str, change: Views, codec: CodecChoice, terms: Terms) -> list[bytes]:
        """A change with what was dropped of those before it; what is dropped now is kept in the node's state."""
        place = f"{_KEY}.feedback.{base}"
        kept = self._state.get(place)
        residual = dict(tensorwire.numpy.loads(_joined(kept))) if _is_encoded(kept) else {}
        feedback = ErrorFeedback(residual=residual)
        change = feedback.add(change)
        data = _encoded(change, codec, terms)
        feedback.settle(change, data)
        self._state[place] = _record_of([tensorwire.dumps(feedback.residual)])
        return data


def _sendable(key: str, record: object) -> Views | None:
    """The tensors of a record; None for what is none, or travels as Flower sends it."""
    if not isinstance(record, ArrayRecord) or not record:
        return None
    try:
        return _record_views(record)
    except TensorwireError as error:
        _say_once(f"tensorwire: the record {key!r} travels as Flower sends it: {error}")
        return None


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    _LOG.warning("%s", text)


def _comparable(new: TensorView, old: TensorView) -> bool:
    """Whether two tensors are of one shape and kind, so that one can be a version of the other."""
    if new.shape != old.shape:
        return False
    return new.dtype == old.dtype or (new.dtype.parts == old.dtype.parts == 1 and _is_number(new) and _is_number(old))


def _is_number(view: TensorView) -> bool:
    return view.dtype in _NATIVE or is_calculated(view.dtype)


def _shaped_like(views: Views, base: Views) -> Views:
    """The same tensors in the dtypes of `base` where it has them, tied where it ties them and they are still the same.

    What an aggregation or a `state_dict` has taken apart is so put together again, and sent once.
    """
    leaders: dict[object, str] = {}
    made: Views = {}
    for name, view in views.items():
        old = base.get(name)
        if old is None or not _comparable(view, old):
            made[name] = replace(view, identity=None)
            continue
        view = replace(_converted(view, old.dtype), identity=(id(base), name))
        leader = made.get(leaders.setdefault(old.identity or name, name))
        made[name] = leader if leader is not None and updates.is_equal(leader, view) else view
    return made


# The server's side.


class _Sent(NamedTuple):
    """A message that waits for its reply, and the arrays that it carried."""

    message: Message
    records: dict[str, dict[str, Array]]


class WireGrid(Grid):
    """A `Grid` whose messages are encoded, for any strategy and any loop of one's own.

    `down`: the codec of what is sent, as in `tensorwire.encode`; one codec for all leaves norms, biases and counters
    as they are (`tensorwire.updates.exact_vectors`). `up`: that of the replies, a spec or a mapping of patterns.
    `difference`: clients send what they changed, which is added to the server's own model, rather than the whole.
    `feedback`: clients keep what `up` drops of one training for the next, in the state of their node, in memory of the
    size of the model. `poll`: seconds between two looks for replies.

    Every node must run `wire_mod`; a reply without it is taken as it is. Arrays keep the dtypes, and the ties,
    that they were first sent with, whatever an aggregation makes of them. Anything else is that of `grid`.

        strategy.start(grid=WireGrid(grid, down="bf16|entropy", up="nf4"), initial_arrays=arrays)
    """

    def __init__(
        self,
        grid: Grid,
        *,
        down: CodecChoice = "bf16|entropy",
        up: UpCodec = "nf4",
        difference: bool = True,
        feedback: bool = False,
        poll: float = 1.0,
    ) -> None:
        if feedback and not difference:
            raise ArgumentError("feedback= is for differences: there is nothing to add to whole weights")
        self.down: CodecChoice = _by_role(repr(parse(down)) if isinstance(down, (str, Codec)) else down)
        """The codec that the model is sent with."""
        self._asked = _Asked.of(up, difference, feedback)
        self._grid = grid
        self._poll = poll
        self._sent: dict[str, _Sent] = {}
        self._first: dict[str, Views] = {}  # what stood first under each record's key, without its values

    def __getattr__(self, name: str) -> Any:
        if "_grid" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self._grid, name)

    def set_run(self, *args: Any, **options: Any) -> None:
        """Of the grid within."""
        self._grid.set_run(*args, **options)

    @property
    def run(self) -> Any:
        """Of the grid within."""
        return self._grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Of the grid within."""
        return self._grid.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Of the grid within."""
        return self._grid.get_node_ids()  # type: ignore[no-any-return]  # Flower's types are not read

    def get_nodes(self) -> Any:
        """Of the grid within."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode the records of each message, once for all that share them, and push."""
        given = list(messages)
        sealed: dict[int, ArrayRecord] = {}
        ids = list(self._grid.push_messages([self._seal(message, sealed) for message in given]))
        sealed.clear()
        _trim()
        if len(ids) != len(given):  # of those that were not taken there is none
            given = [message for message in given if message.metadata.message_id in set(ids)]
        self._forget_expired()
        for number, message in zip(ids, given, strict=True):
            if number:
                records = {
                    key: dict(record) for key, record in message.content.items() if isinstance(record, ArrayRecord)
                }
                self._sent[number] = _Sent(message, records)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, verified, their arrays to be decoded as they are read."""
        return [self._received(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and wait for all replies or until `timeout` seconds have passed."""
        waiting = {number for number in self.push_messages(messages) if number}
        del messages
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            got = list(self.pull_messages(waiting))
            replies += got
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
            if not waiting or (end is not None and time.monotonic() >= end):
                break
            time.sleep(self._poll if end is None else min(self._poll, max(0.0, end - time.monotonic())))
        for number in waiting:  # nobody will ask for them again
            self._sent.pop(number, None)
        return replies

    def _seal(self, message: Message, sealed: dict[int, ArrayRecord]) -> Message:
        """The same message with its records encoded; the caller's keeps its own."""
        if _KEY in message.content:
            raise ArgumentError(f"a message of WireGrid has no record {_KEY!r} of its own: give yours another name")
        content = RecordDict({_KEY: self._asked.record()})
        for key, record in message.content.items():
            if id(record) not in sealed:
                sealed[id(record)] = self._sealed_record(key, record)
            content[key] = sealed[id(record)]
        copied = copy(message)
        copied.content = content
        if message.content is content or copied.metadata is not message.metadata:
            raise _changed_seam(
                "a copied Message shares its metadata, by which its reply is found, and not its content"
            )
        return copied

    def _sealed_record(self, key: str, record: Any) -> Any:
        views = _sendable(key, record)
        if views is None:
            return record
        first = self._first.setdefault(key, {name: replace(view, read=_never) for name, view in views.items()})
        return _record_of(_encoded(_shaped_like(views, first), self.down, Terms(run="", round=0)))

    def _received(self, reply: Message) -> Message:
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if not reply.has_content():
            return reply
        try:
            content = {key: self._decoded(reply, sent, record) for key, record in reply.content.items()}
        except TensorwireError as error:
            if sent is None:
                raise
            # As if the node had said so itself.
            return Message(Error(code=_FAILED, reason=f"tensorwire: {error}"), reply_to=sent.message)
        reply.content = RecordDict(content)
        return reply

    def _decoded(self, reply: Message, sent: _Sent | None, record: Any) -> Any:
        if not _is_encoded(record):
            if isinstance(record, ArrayRecord) and not record and sent is not None and sent.records:
                _say_once(
                    "tensorwire: arrays come back empty, as secure aggregation leaves them: what it has masked travels "
                    "as Flower sends it, up= has no part in it, and the mean is one of whole weights, so that down= "
                    "should be a lossless codec such as 'planes'"
                )
            return record
        received = _opened(record, finite=reply.metadata.message_type.startswith("train"))
        if received.terms.kind == "weights":
            return _lazy_record(received.views, received)
        number, _, key = received.terms.base.partition("/")
        if sent is None or number != reply.metadata.reply_to_message_id or key not in sent.records:
            raise SchemaError(
                "the reply is a difference to what this WireGrid has not sent, or has given up waiting for"
            )
        base = sent.records[key]
        wanted = {name: base[name] for name in received.views if name in base}
        return _lazy_record(updates.added(received.views, _record_views(wanted)), received)

    def _forget_expired(self) -> None:
        """Let go of messages that will never be replied to."""
        now = time.time()
        for number, sent in list(self._sent.items()):
            if sent.message.metadata.created_at + sent.message.metadata.ttl < now:
                del self._sent[number]


def _never(start: int, stop: int) -> bytes:
    raise AssertionError("only the description of this tensor is kept")


class StreamingFedAvg(FedAvg):
    """Flower's `FedAvg` in the memory of the model: updates are added up encoded, a slice of all of them at a time.

    Its arguments are those of `FedAvg`. The mean is calculated in float64 and in the order of the nodes, and every
    array keeps its dtype. An update that does not fit the model is left out, and the log says so.

    Behind another strategy it gives that its mean, where it builds on the one of `FedAvg`:

        class Strategy(FedAdam, StreamingFedAvg): ...
    """

    in_place: bool = False
    """Write the mean over the arrays that the round began with: over tensors that `to_record` was given, on the CPU.

    Otherwise each round makes a new model while the old one is still there, as always where another strategy stands
    before this one, which may want to compare the two."""

    _base: ArrayRecord | None = None
    _down: CodecChoice = "raw"
    _dtypes: Mapping[str, DType] = MappingProxyType({})  # those that arrays were first sent with

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's; the arrays are what the updates of this round are added to."""
        self._base = arrays
        self._dtypes = {name: view.dtype for name, view in _record_views(arrays).items()} | dict(self._dtypes)
        self._down = grid.down if isinstance(grid, WireGrid) else "raw"
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[no-any-return]  # Flower's types are not read

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As Flower's. Raises ArgumentError before `configure_train`."""
        if self._base is None:
            raise ArgumentError("aggregate_train is for the replies to what configure_train has sent")
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        alone = type(self).aggregate_train is StreamingFedAvg.aggregate_train
        model = _model(self._base, self._dtypes, in_place=self.in_place and alone)
        counted = self._checked(valid, model)
        if not counted:
            return None, None
        # Before the model moves, which the arrays of the replies are calculated from.
        metrics = self.train_metrics_aggr_fn([content for _, (_, content) in counted], self.weighted_by_key)
        updates.average([update for update, _ in counted], into=model, down=self._down)
        _average_integers(model, [(update.terms.weight, record) for update, (record, _) in counted])
        return to_record(model), metrics

    def _checked(
        self, replies: Iterable[Message], model: dict[str, Numbers]
    ) -> list[tuple[Update, tuple[ArrayRecord, RecordDict]]]:
        """The updates that count, in the order of their nodes, with the records that they came in."""
        counted = []
        for reply in replies:
            node, content = reply.metadata.src_node_id, reply.content
            record = next(iter(content.array_records.values()))
            weight = next(iter(content.metric_records.values()))[self.weighted_by_key]
            try:
                counted.append((_update(record, node, weight, model, self._down), (record, content)))
            except (TensorwireError, ValueError) as error:
                _LOG.warning("tensorwire: the update of node %s is left out: %s", node, error)
        return sorted(counted, key=lambda row: row[0].client)


def _model(record: ArrayRecord, dtypes: Mapping[str, DType], *, in_place: bool) -> dict[str, Numbers]:
    """The arrays of a record to be written to: the tensors in it, or copies."""
    made: dict[object, Numbers] = {}
    model = {}
    for name, array in record.items():
        view = _converted(_view(name, array), dtypes[name])
        model[name] = _once(made, view, name, partial(_writable, array, view, in_place))
    return model


def _writable(array: Array, view: TensorView, in_place: bool) -> Numbers:
    if in_place and isinstance(array, WireArray) and array.tensor is not None and array.view is view:
        try:
            return updates.arrays({"": array.tensor})[""]
        except TensorwireError:  # on a device, or not contiguous
            pass
    return numpy.FRONT.wrap(_bytes_of(view), view.dtype, view.shape)


def _update(record: ArrayRecord, node: int, weight: Any, model: dict[str, Numbers], down: CodecChoice) -> Update:
    """What a node has sent, checked. Raises a WireError, or ValueError for a weight that is none."""
    views = _record_views(record)
    origin: _Received | None = getattr(next(iter(record.values())), "origin", None)
    if origin is None or origin.views.keys() != record.keys() or not _all_of(record, origin):
        # From a node without the mod, or arrays that something on the way has changed.
        terms = Terms(run="", round=0, client=str(node))
        origin = _Received(_encoded(_shaped_like(views, updates.views(model)), "raw", terms), terms, views)
    update = updates.check_update(origin.data, model, origin.terms, Rules(down=down))
    updates.check_weight(weight)
    return replace(update, terms=replace(update.terms, client=str(node), weight=float(weight)))


def _all_of(record: ArrayRecord, origin: _Received) -> bool:
    return all(isinstance(array, WireArray) and array.origin is origin for array in record.values())


def _average_integers(model: dict[str, Numbers], updates_of: list[tuple[float, ArrayRecord]]) -> None:
    """The mean of counters and masks, which `updates.average` leaves as the model has them, rounded to the nearest."""
    total = sum(weight for weight, _ in updates_of)
    for name, array in model.items():
        if array.dtype.kind in "biu":
            mean = sum(weight * record[name].numpy().astype(np.float64) for weight, record in updates_of) / total
            array[...] = _rounded(np.asarray(mean), array.dtype)


# What this file relies on in Flower.


def _changed_seam(seam: str) -> UnsupportedError:
    version = getattr(flwr, "__version__", "of an unknown version")
    return UnsupportedError(
        f"flwr {version} is not one that tensorwire.integrations.flower works with: it relies on this: {seam}"
    )


def _check_seams() -> None:
    """Raise UnsupportedError where this version of Flower has changed what is relied on."""
    known = {"set_run", "run", "create_message", "get_node_ids", "push_messages", "pull_messages", "send_and_receive"}
    sample = Array(np.zeros(2, np.float32))
    seams = {
        f"a Grid has no abstract methods but {', '.join(sorted(known))}": Grid.__abstractmethods__ <= known,
        "Array(ndarray) holds the bytes of a .npy file": sample.stype == _NUMPY and sample.data[:6] == _NPY,
        "Array takes any text as stype": Array("", (), _STYPE, b"1").stype == _STYPE,
        "an Array is known by the name of its class": Array.__qualname__ == WireArray.__qualname__,
        "an ArrayRecord keeps the arrays that it is given": _keeps(WireArray(updates.views({"": np.zeros(2)})[""])),
        "FedAvg has _check_and_log_replies, train_metrics_aggr_fn and weighted_by_key": (
            hasattr(FedAvg, "_check_and_log_replies")
            and {"train_metrics_aggr_fn", "weighted_by_key"} <= vars(FedAvg()).keys()
        ),
    }
    for seam, holds in seams.items():
        if not holds:
            raise _changed_seam(seam)


def _keeps(array: Array) -> bool:
    record = ArrayRecord()
    record["a"] = array
    return record["a"] is array


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: it keeps the 5 MB chunks that a message was."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


_check_seams()
