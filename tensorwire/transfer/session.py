"""The messages that two ends exchange around a stream: greeting, offer, position, receipt.

Without I/O: a conversation is a generator that yields what to do next, `Fill`, `Send` or `Do`, and is sent the result.
The same conversations run over blocking sockets (`TcpTransport.run`) and under asyncio (`AsyncTransport.run`).

    greet               greet
    send_stream  ---->  receive_stream      offer, have (position), the rest of the stream, receipt, bye
    say          ---->  hear                a message of the application's own

Messages are small msgpack maps after 12 bytes of magic, length and CRC-32. docs/transports.md lists them all.
"""

import errno
import os
import struct
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol, TypeVar

from tensorwire.codecs import known_ids
from tensorwire.errors import (
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SequenceError,
    StorageError,
    TensorwireError,
    TransportError,
    TruncatedError,
    UnsupportedError,
    show,
)
from tensorwire.limits import DEFAULT
from tensorwire.transfer.position import Outcome, Position
from tensorwire.transfer.sending import Outgoing
from tensorwire.wire.frames import MAJOR as FORMAT
from tensorwire.wire.values import pack_value, unpack_value

VERSION: Final = 1
_MAGIC: Final = b"\x93TWM"
_HEAD: Final = struct.Struct("<II")  # after the magic: length, CRC-32
_MESSAGE_LIMIT: Final = 64 << 10  # bytes that an unknown peer can make us hold
_TEXT_LIMIT: Final = 500
_TRANSFER_LIMIT: Final = 64
_MOST_WAITS: Final = 1000  # in a row; at one every 15 s, four hours of work between two bytes
_LAST_WORDS: Final = 2.0  # seconds to exchange the reason once a stream has failed
_SCRATCH: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Fill:
    """Receive at least one byte into `buffer`; the answer is how many, 0 once the peer has closed.

    `steady`: data is expected now, so a peer that sends too slowly is dropped. `within`: seconds to wait at most, if
    less than the transport's timeout.
    """

    buffer: memoryview
    steady: bool = False
    within: float | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send all buffers; the answer is the number of bytes. `alert`: stop as soon as the peer sends anything."""

    buffers: Iterable[Any]
    alert: bool = False


@dataclass(frozen=True, slots=True)
class Do:
    """Call `work`, which may take long, and answer with its result.

    `meanwhile` is sent from time to time until it is done, so that the peer knows that we are alive. Whatever happens,
    `work` has ended when the conversation continues.
    """

    work: Callable[[], Any]
    meanwhile: bytes = b""


T = TypeVar("T")
Conversation = Generator[Fill | Send | Do, Any, T]


@dataclass(frozen=True, slots=True)
class Peer:
    """What the other end has declared. `codecs`: ids that it can decode. `software`: for people."""

    format: int
    codecs: tuple[int, ...]
    software: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A stream that a sender offers.

    `transfer`: a key of 1 to 64 bytes, the same on every attempt. `name`: what the stream is, for display and never a
    path. `size`: bytes of the stream, if known. `anew`: the receiver must drop what it has under this key, which is the
    beginning of another stream. `about`: free for the application.
    """

    transfer: bytes
    name: str = ""
    size: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """A stream has arrived completely, is verified, and is on disk or wherever the receiver keeps it.

    `sent`: bytes that this attempt sent. `about`: free for the application.
    """

    digest: str
    size: int
    sent: int
    about: Mapping[str, Any] = field(default_factory=dict)


class RefusedError(TransportError):
    """The receiver refuses.

    `kind`: the reason in one word: "busy", "storage", "corrupt", "schema", or a word of the application.
    """

    def __init__(self, detail: str, *, kind: str, retryable: bool = False) -> None:
        super().__init__(detail, retryable=retryable)
        self.kind = kind


class Destination(Protocol):
    """Where a stream is received; `transfer.receiving.Recording` is one."""

    position: Position
    outcome: Outcome | None

    def steps(self) -> Generator[Any, None, None]:
        """Yields whenever bytes are needed, until the stream is complete."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""

    def buffer_updated(self, size: int) -> None:
        """Note that `size` bytes were written there; 0: the input has ended."""

    def begin_anew(self) -> None:
        """Drop the beginning of another stream. Raises RefusedError if that is not possible."""

    def commit(self) -> Any:
        """Keep the complete stream. The sender gets a receipt after this."""

    def forget(self) -> None:
        """Note that the sender has its receipt."""

    def close(self) -> None:
        """Release all resources, whatever has happened."""


def greet(software: str = "tensorwire", *, codecs: Iterable[int] | None = None) -> Conversation[Peer]:
    """Exchange greetings, as both ends do first: nothing is offered before each knows that it understands the other.

    `codecs`: ids that this end can decode; None for all that are registered here. A receiver that only stores streams
    may name any. Raises UnsupportedError naming both versions, FormatError if the peer speaks another protocol.
    """
    decodes = list(known_ids() if codecs is None else codecs)
    mine = {"session": VERSION, "format": FORMAT, "codecs": decodes, "software": software}
    yield Send([_pack("hello", mine)])
    try:
        kind, hello = yield from _read_any(None)
    except TransportError as error:  # a TLS alert does not reach us if the listener uses asyncio
        raise TransportError(
            f"{error.detail}, before its greeting: does it expect TLS, refuse our certificate, or have too many peers?"
        ) from error
    if kind != "hello":
        raise SequenceError(f"expected the message 'hello', got {show(kind)}")
    hello = {name: hello[name] for name in mine if name in hello}  # later versions may add fields
    _check_fields("hello", hello, session=int, format=int, codecs=list, software=str)
    theirs = hello["session"], hello["format"]
    if theirs != (VERSION, FORMAT):
        raise UnsupportedError(
            f"the peer ({show(hello['software'])}) speaks session {theirs[0]} and format {theirs[1]}, "
            f"this end session {VERSION} and format {FORMAT}"
        )
    if not all(type(codec) is int for codec in hello["codecs"]):
        raise FormatError("hello: codecs are not numbers")
    return Peer(hello["format"], tuple(hello["codecs"]), hello["software"])


def send_stream(offer: Offer, outgoing: Outgoing) -> Conversation[Receipt]:
    """Send a stream from the receiver's position on.

    Raises RefusedError, and SequenceError if the receiver has another stream, or the beginning of one, which an offer
    with `anew` replaces. After an error the connection cannot be used again, unless it was a RefusedError that came
    before any byte of the stream.
    """
    yield Send([_pack("offer", asdict(offer))])
    have = yield from _read("have", most_waits=_MOST_WAITS, frames=int, offset=int, link=int)
    position = Position(have["frames"], have["offset"], have["link"])
    if min(position.frames, position.offset, position.link) < 0:
        raise FormatError("have: a negative position")
    try:
        sent = yield Send(outgoing.after(position), alert=True)
    except TransportError:
        try:  # perhaps the peer has said why
            yield from _read("receipt", until=time.monotonic() + _LAST_WORDS, most_waits=_MOST_WAITS)
        except RefusedError:
            raise
        except TensorwireError:
            pass
        raise
    receipt = yield from _read("receipt", most_waits=_MOST_WAITS, digest=str, size=int, about=dict)
    if receipt["digest"] != outgoing.digest:
        raise SequenceError(
            f"the receiver has another stream: its digest is {show(receipt['digest'])}, ours {outgoing.digest}"
        )
    yield Send([_pack("bye", {})])
    return Receipt(receipt["digest"], receipt["size"], sent, receipt["about"])


def receive_stream(
    open_destination: Callable[[Offer], Destination], *, about: Callable[[], Mapping[str, Any]] = dict
) -> Conversation[tuple[Offer, Outcome, bool]]:
    """Receive a stream into the destination that `open_destination` returns.

    If `open_destination` raises an error of this library, the offer is refused; a RefusedError may give a reason in a
    word of the caller's own. The receipt is sent after `commit`, with the result of `about`.

    Returns the offer, the outcome, and whether the sender has confirmed its receipt. After any error, what was received
    so far stays for the next attempt, and the connection cannot be used again, unless `open_destination` has refused
    the offer.
    """
    offer = yield from _hear_offer()
    opened: list[Destination] = []  # filled by the work itself, which may end after this conversation was abandoned
    try:
        try:
            yield Do(lambda: opened.append(open_destination(offer)), _WAIT)
            destination = opened[0]
            if offer.anew:
                yield Do(destination.begin_anew, _WAIT)
            yield Send([_pack("have", asdict(destination.position))])
            for _ in destination.steps():
                destination.buffer_updated((yield Fill(destination.get_buffer(), steady=True)))
            yield Do(destination.commit, _WAIT)
            outcome = destination.outcome
            assert outcome is not None
            receipt = {"digest": outcome.digest, "size": outcome.end.offset, "about": dict(about())}
            yield Send([_pack("receipt", receipt)])
            acknowledged = yield from _acknowledged()
            if acknowledged:
                destination.forget()
        except MemoryError as error:
            raise StorageError("no memory left to receive with", errno=errno.ENOMEM) from error
        finally:
            for destination in opened:
                destination.close()
    except TensorwireError as error:
        if not isinstance(error, (TransportError, TruncatedError)) or isinstance(error, RefusedError):
            with suppress(TransportError):
                yield from _refuse(error, sending=bool(opened))
        raise
    return offer, outcome, acknowledged


def say(message: Mapping[str, Any]) -> Conversation[None]:
    """Send a message of the application: a map of plain values, 64 KiB at most."""
    yield Send([_pack("note", {"note": dict(message)})])


def hear(*, patient: bool = True) -> Conversation[dict[Any, Any]]:
    """Receive a message of the application. Do not trust it: check every field.

    `patient`: whether the peer may ask us to `wait`. A server that answers requests should not allow it.
    """
    message = yield from _read("note", most_waits=_MOST_WAITS if patient else 0, note=dict)
    note: dict[Any, Any] = message["note"]
    return note


def wait() -> Conversation[None]:
    """Tell a waiting peer that an answer will come."""
    yield Send([_WAIT])


def refuse(error: TensorwireError) -> Conversation[None]:
    """Refuse, whatever message the peer waits for: it gets a RefusedError that says why."""
    yield Send([_refusal(error)])


def _hear_offer() -> Conversation[Offer]:
    message = yield from _read("offer", transfer=bytes, name=str, size=(int, type(None)), anew=bool, about=dict)
    offer = Offer(**message)
    if not 0 < len(offer.transfer) <= _TRANSFER_LIMIT or (offer.size or 0) < 0:
        raise FormatError("an offer must have a transfer key of 1 to 64 bytes and a size of at least 0")
    return offer


def _acknowledged() -> Conversation[bool]:
    try:
        yield from _read("bye")
    except TensorwireError:
        return False
    return True


def _refuse(error: TensorwireError, *, sending: bool) -> Conversation[None]:
    """Send a refusal.

    If the peer is `sending`, keep receiving until it has noticed: closing at once would reset the connection, and the
    refusal would be lost.
    """
    yield Send([_refusal(error)])
    scratch = memoryview(bytearray(_SCRATCH))
    until = time.monotonic() + _LAST_WORDS
    while sending and (left := until - time.monotonic()) > 0:
        sending = bool((yield Fill(scratch, within=left)))


def _refusal(error: TensorwireError) -> bytes:
    detail = str(error)
    if isinstance(error, RefusedError):
        kind, retryable = error.kind, error.retryable
    elif isinstance(error, StorageError):  # its text has a path, which the peer must not see
        kind, retryable = "busy" if error.errno == errno.EWOULDBLOCK else "storage", True
        detail = "somebody else is sending this" if kind == "busy" else os.strerror(error.errno or errno.EIO)
    else:
        kind, retryable = type(error).__name__.removesuffix("Error").lower(), isinstance(error, CorruptError)
    return _pack("refuse", {"kind": kind, "detail": detail[:_TEXT_LIMIT], "retryable": retryable})


def _pack(kind: str, fields: Mapping[str, Any]) -> bytes:
    body = pack_value([kind, dict(fields)], DEFAULT)
    if len(body) > _MESSAGE_LIMIT:
        raise EncodeError(f"a message of {len(body)} bytes; {_MESSAGE_LIMIT} is the most")
    return _MAGIC + _HEAD.pack(len(body), zlib.crc32(body)) + body


_WAIT: Final = _pack("wait", {})


def _read(
    wanted: str, /, *, until: float | None = None, most_waits: int = 0, **fields: Any
) -> Conversation[dict[str, Any]]:
    """The next message that is not "wait", with exactly these fields of these types.

    `until`: the time at which to stop waiting. `most_waits`: how often in a row the peer may ask us to wait.
    """
    kind, message = yield from _read_any(until)
    for _ in range(1, most_waits):
        if kind != "wait":
            break
        _check_fields(kind, message)
        kind, message = yield from _read_any(until)
    if kind == "wait" and most_waits:
        raise TransportError("the peer sent nothing but requests to wait")
    if kind == "refuse":
        _check_fields(kind, message, kind=str, detail=str, retryable=bool)
        refused = message["kind"], message["retryable"]
        raise RefusedError(f"the receiver refuses: {show(message['detail'])}", kind=refused[0], retryable=refused[1])
    if kind != wanted:
        raise SequenceError(f"expected the message {wanted!r}, got {show(kind)}")
    _check_fields(kind, message, **fields)
    return message


def _read_any(until: float | None) -> Conversation[tuple[str, dict[str, Any]]]:
    magic = yield from _receive(1, until)
    magic += yield from _receive(len(_MAGIC) - 1, until, steady=True)
    if magic != _MAGIC:
        raise FormatError("the peer does not speak this protocol (does one end use TLS and the other not?)")
    length, crc = _HEAD.unpack((yield from _receive(_HEAD.size, until, steady=True)))
    if length > _MESSAGE_LIMIT:
        raise LimitError("message", _MESSAGE_LIMIT, length, field=None)
    body = yield from _receive(length, until, steady=True)
    if zlib.crc32(body) != crc:
        raise CorruptError("message checksum mismatch")
    message = unpack_value(body, DEFAULT)
    if not (type(message) is list and len(message) == 2 and type(message[0]) is str and type(message[1]) is dict):
        raise FormatError("a message must be a kind and a map")
    return message[0], message[1]


def _receive(size: int, until: float | None, *, steady: bool = False) -> Conversation[bytes]:
    buffer = memoryview(bytearray(size))
    done = 0
    while done < size:
        left = None if until is None else max(until - time.monotonic(), 0)
        got = yield Fill(buffer[done:], steady, left)
        if got == 0:
            raise TransportError("the peer has closed the connection")
        done += got
    return bytes(buffer)


def _check_fields(kind: str, message: dict[str, Any], /, **fields: Any) -> None:
    if message.keys() != fields.keys():
        raise FormatError(f"{kind}: has the fields {show(list(message))}, expected {list(fields)}")
    for name, types in fields.items():
        if type(message[name]) not in (types if isinstance(types, tuple) else (types,)):
            raise FormatError(f"{kind}: {name} is of the wrong type")
