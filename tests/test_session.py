"""Conversations without a network: both ends driven in turn, every byte between them at hand."""

import errno
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import (
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    SequenceError,
    StorageError,
    TensorwireError,
    TransportError,
    TruncatedError,
    UnsupportedError,
)
from tensorwire.transfer import (
    Do,
    Fill,
    Offer,
    Position,
    Receipt,
    Recording,
    RefusedError,
    Regenerated,
    greet,
    hear,
    receive_stream,
    say,
    send_stream,
)
from tensorwire.transfer import receiving as recording
from tensorwire.transfer.session import Conversation
from tensorwire.wire.values import pack_value

MODEL = {"a": np.arange(3000, dtype=np.float32), "b": np.ones(50, np.float32)}
STREAM = b"".join(tensorwire.encode(MODEL, frame_size=4096))
DIGEST = STREAM[-32:].hex()
OFFER = Offer(b"transfer 1", "model", len(STREAM), {"round": 3})


def outgoing() -> Regenerated:
    return Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096))


class End:
    """One end of a conversation that is driven by hand."""

    def __init__(self, conversation: Conversation, inbox: bytes = b"", *, closed: bool = False) -> None:
        self.inbox, self.sent, self.closed = bytearray(inbox), b"", closed
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = False
        self._conversation = conversation
        self._step = self._resume(conversation.__next__)

    def run(self) -> bytes:
        """Go on as far as there is something to read. Returns what was sent."""
        before = len(self.sent)
        while not self.over:
            step = self._step
            if isinstance(step, Fill):
                if not self.inbox and not self.closed:
                    break
                size = min(len(step.buffer), len(self.inbox))
                step.buffer[:size] = self.inbox[:size]
                del self.inbox[:size]
                self._step = self._resume(self._conversation.send, size)
            elif isinstance(step, Do):
                try:
                    answer = step.work()
                except BaseException as error:
                    self._step = self._resume(self._conversation.throw, error)
                else:
                    self._step = self._resume(self._conversation.send, answer)
            else:
                data = b""
                try:
                    for buffer in step.buffers:
                        data += bytes(buffer)
                        if step.alert and self.inbox:
                            break
                except TensorwireError as error:
                    self._step = self._resume(self._conversation.throw, error)
                    continue
                self.sent += data
                self._step = self._resume(self._conversation.send, len(data))
        return self.sent[before:]

    def _resume(self, how: Callable, *argument: Any) -> Any:
        try:
            return how(*argument)
        except StopIteration as stop:
            self.result, self.over = stop.value, True
        except Exception as error:
            self.error, self.over = error, True
        return None


def converse(left: Conversation, right: Conversation, *, piece: int = 1 << 30) -> tuple[End, End]:
    """Both conversations, to their ends; `piece`: most bytes that are handed over at once."""
    ends = End(left), End(right)
    ways = [(ends[0], ends[1], bytearray()), (ends[1], ends[0], bytearray())]
    moving = True
    while moving:
        moving = False
        for here, there, under_way in ways:
            under_way += here.run()
            if under_way:
                moving = True
                there.inbox += under_way[:piece]
                del under_way[:piece]
        for here, there, under_way in ways:
            if here.over and not under_way and not there.closed:
                there.closed = moving = True
    return ends


def alone(conversation: Conversation, inbox: bytes) -> Any:
    """The result of a conversation with a peer that says `inbox` and closes."""
    end = End(conversation, inbox, closed=True)
    end.run()
    if end.error is not None:
        raise end.error
    return end.result


def message(kind: str, fields: Mapping[str, Any]) -> bytes:
    return raw_message(pack_value([kind, dict(fields)], tensorwire.Limits()))


def raw_message(body: bytes) -> bytes:
    return b"\x93TWM" + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


HELLO = {"session": 1, "format": 1, "codecs": [0, 1], "software": "test"}
HAVE = message("have", {"frames": 0, "offset": 0, "link": 0})
RECEIPT = message("receipt", {"digest": DIGEST, "size": len(STREAM), "about": {}})


def receiver(folder: Path, **options: Any) -> Conversation:
    return receive_stream(lambda offer: Recording(folder / "m.tw", offer.transfer, **options))


def test_both_ends_greet() -> None:
    left, right = converse(greet("left"), greet("right"))
    assert (left.result.software, right.result.software) == ("right", "left")
    assert left.result.format == 1 and 6 in left.result.codecs


@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
def test_a_stream_is_sent_and_a_receipt_returned(piece: int, tmp_path: Path) -> None:
    sending, receiving = converse(
        send_stream(OFFER, outgoing()),
        receive_stream(lambda offer: Recording(tmp_path / "m.tw", offer.transfer), about=lambda: {"x": 1}),
        piece=piece,
    )
    assert sending.result == Receipt(DIGEST, len(STREAM), len(STREAM), {"x": 1})
    offer, outcome, acknowledged = receiving.result
    assert (offer, outcome.digest, acknowledged) == (OFFER, DIGEST, True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.tw"]
    assert (tmp_path / "m.tw").read_bytes() == STREAM


def test_after_a_break_only_the_rest_is_sent(tmp_path: Path) -> None:
    whole = End(send_stream(OFFER, outgoing()), HAVE)
    whole.run()
    offer_size = len(whole.sent) - len(STREAM)
    for cut in range(0, len(STREAM), 211):
        folder = tmp_path / str(cut)
        folder.mkdir()
        first = End(receiver(folder), whole.sent[: offer_size + cut], closed=True)
        first.run()
        assert isinstance(first.error, TruncatedError)
        sending, receiving = converse(send_stream(OFFER, outgoing()), receiver(folder))
        assert len(STREAM) - cut <= sending.result.sent <= len(STREAM) - cut + 4096
        assert (folder / "m.tw").read_bytes() == STREAM and receiving.result[2]


def test_a_lost_receipt_is_sent_again(tmp_path: Path) -> None:
    first = End(send_stream(OFFER, outgoing()), HAVE)
    first.run()  # sends all, waits for the receipt
    lost = End(receiver(tmp_path), first.sent, closed=True)
    lost.run()
    assert lost.result[2] is False and lost.sent.endswith(RECEIPT)
    before = (tmp_path / "m.tw").stat()
    sending, receiving = converse(send_stream(OFFER, outgoing()), receiver(tmp_path))
    assert sending.result == Receipt(DIGEST, len(STREAM), 0, {})
    assert receiving.result[1:] == (lost.result[1], True)
    assert (tmp_path / "m.tw").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.tw"]  # the journal has gone with the sender's last word


def test_a_changed_source_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    first = End(send_stream(OFFER, outgoing()), HAVE)
    first.run()
    broken = End(receiver(tmp_path), first.sent[:-200], closed=True)
    broken.run()
    other = Regenerated(lambda: tensorwire.encode({**MODEL, "a": MODEL["a"] + 1}, frame_size=4096))
    sending, receiving = converse(send_stream(OFFER, other), receiver(tmp_path))
    assert isinstance(sending.error, SequenceError) and "another stream" in str(sending.error)
    assert isinstance(receiving.error, TruncatedError) and not (tmp_path / "m.tw").exists()


def test_a_receiver_with_another_complete_stream_is_detected(tmp_path: Path) -> None:
    converse(send_stream(OFFER, outgoing()), receive_stream(lambda offer: Keeping(tmp_path / "m.tw", offer.transfer)))
    other = Regenerated(lambda: tensorwire.encode({**MODEL, "a": MODEL["a"] + 1}, frame_size=4096))
    sending, _ = converse(send_stream(OFFER, other), receiver(tmp_path))
    assert isinstance(sending.error, SequenceError) and DIGEST in str(sending.error)


def test_the_beginning_of_another_stream_is_dropped_on_request(tmp_path: Path) -> None:
    first = End(send_stream(OFFER, outgoing()), HAVE)
    first.run()
    for cut in (1, 200, len(STREAM) - 1):  # nothing verified, some of it, nearly all
        End(receiver(tmp_path), first.sent[:-cut], closed=True).run()
        other = Regenerated(lambda: tensorwire.encode({**MODEL, "a": MODEL["a"] + 1}, frame_size=4096))
        sending, receiving = converse(send_stream(replace(OFFER, anew=True), other), receiver(tmp_path))
        assert sending.result.sent == sending.result.size == receiving.result[1].end.offset
        assert sending.result.digest == other.digest == (tmp_path / "m.tw").read_bytes()[-32:].hex()
        assert [path.name for path in tmp_path.iterdir()] == ["m.tw"]


def test_a_complete_stream_is_never_dropped(tmp_path: Path) -> None:
    converse(send_stream(OFFER, outgoing()), receive_stream(lambda offer: Keeping(tmp_path / "m.tw", offer.transfer)))
    other = Regenerated(lambda: tensorwire.encode({**MODEL, "a": MODEL["a"] + 1}, frame_size=4096))
    sending, _ = converse(send_stream(replace(OFFER, anew=True), other), receiver(tmp_path))
    assert isinstance(sending.error, RefusedError)
    assert (sending.error.kind, sending.error.retryable) == ("done", False)
    assert (tmp_path / "m.tw").read_bytes() == STREAM


class Keeping(Recording):
    """Keeps its journal, as where the sender's last word was lost."""

    def forget(self) -> None:
        pass


@pytest.mark.parametrize(
    ("theirs", "error", "text"),
    [
        ({**HELLO, "session": 2}, UnsupportedError, "session 2 and format 1, this end session 1 and format 1"),
        ({**HELLO, "format": 7, "software": "x\n"}, UnsupportedError, r"'x\\n'\) speaks session 1 and format 7"),
        ({**HELLO, "codecs": ["raw"]}, FormatError, "codecs"),
        ({**HELLO, "session": True}, FormatError, "session"),
        ({"session": 1}, FormatError, "fields"),
        ({}, FormatError, "fields"),
    ],
)
def test_incompatible_versions_are_named(theirs: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        alone(greet(), message("hello", theirs))


def test_later_versions_may_add_fields_to_the_greeting() -> None:
    assert alone(greet(), message("hello", {**HELLO, "colour": "blue"})).software == "test"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x16\x03\x01\x02\x00\x01",
        b"SSH-2.0-x\r\n",
        bytes(64),
    ],
    ids=["http", "tls alert", "tls hello", "ssh", "zeros"],
)
def test_a_peer_with_another_protocol_raises(garbage: bytes) -> None:
    for conversation in (greet(), hear(), receive_stream(lambda offer: pytest.fail("opened"))):
        with pytest.raises(FormatError, match="does not speak this protocol"):
            alone(conversation, garbage)


CONVERSATIONS = {
    "greet": (lambda folder: greet(), message("hello", HELLO)),
    "hear": (lambda folder: hear(), message("note", {"note": {"a": [1, (2, b"3")]}})),
    "send, have": (lambda folder: send_stream(OFFER, outgoing()), HAVE),
    "send, receipt": (lambda folder: send_stream(OFFER, outgoing()), RECEIPT),
    "send, refuse": (
        lambda folder: send_stream(OFFER, outgoing()),
        message("refuse", {"kind": "busy", "detail": "x", "retryable": True}),
    ),
    "receive, offer": (
        receiver,
        message("offer", {"transfer": b"t", "name": "n", "size": None, "about": {}}),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_byte_of_every_message_flipped_is_a_typed_error(name: str, tmp_path: Path) -> None:
    make, said = CONVERSATIONS[name]
    before = HAVE if name == "send, receipt" else b""
    for place in range(len(said)):
        for bit in range(8):
            broken = said[:place] + bytes([said[place] ^ 1 << bit]) + said[place + 1 :]
            with pytest.raises((FormatError, CorruptError, LimitError, TransportError)):
                alone(make(tmp_path), before + broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_prefix_of_every_message_is_a_transport_error(name: str, tmp_path: Path) -> None:
    make, said = CONVERSATIONS[name]
    before = HAVE if name == "send, receipt" else b""
    for cut in range(len(said)):
        with pytest.raises(TransportError, match="closed"):
            alone(make(tmp_path), before + said[:cut])


def test_a_broken_goodbye_counts_as_missing(tmp_path: Path) -> None:
    first = End(send_stream(OFFER, outgoing()), HAVE)
    first.run()
    for number, bye in enumerate([b"", b"x", message("bye", {"x": 1}), message("what", {}), message("refuse", {})]):
        (tmp_path / str(number)).mkdir()
        assert alone(receiver(tmp_path / str(number)), first.sent + bye)[2] is False


OFFERED = {"transfer": b"t", "name": "n", "size": 10, "about": {}, "anew": False}


@pytest.mark.parametrize(
    "fields",
    [
        {**OFFERED, "transfer": b""},
        {**OFFERED, "transfer": b"x" * 65},
        {**OFFERED, "transfer": "text"},
        {**OFFERED, "size": -1},
        {**OFFERED, "size": 1.0},
        {**OFFERED, "size": True},
        {**OFFERED, "name": b"n"},
        {**OFFERED, "about": []},
        {**OFFERED, "anew": 1},
        {**OFFERED, "more": 1},
        {"transfer": b"t"},
        {},
    ],
)
def test_invalid_offers_are_refused(fields: dict) -> None:
    with pytest.raises(FormatError):
        alone(receive_stream(lambda offer: pytest.fail("opened")), message("offer", fields))


@pytest.mark.parametrize(
    "have",
    [
        {"frames": -1, "offset": 0, "link": 0},
        {"frames": 0, "offset": -5, "link": 0},
        {"frames": 0, "offset": 0.0, "link": 0},
        {"frames": 0, "offset": False, "link": 0},
        {"frames": 0, "offset": 0},
        {"frames": 0, "offset": 0, "link": float("nan")},
    ],
)
def test_invalid_positions_are_refused(have: dict) -> None:
    with pytest.raises(FormatError):
        alone(send_stream(OFFER, outgoing()), message("have", have))


@pytest.mark.parametrize("offset", [1, 15, 16, 17, len(STREAM) - 1, len(STREAM) + 1, (1 << 64) - 1])
def test_positions_of_another_stream_are_refused(offset: int) -> None:
    with pytest.raises(SequenceError, match="another stream"):
        alone(send_stream(OFFER, outgoing()), message("have", {"frames": 1, "offset": offset, "link": 1}))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", pack_value({}, tensorwire.Limits()), pack_value(["a"], tensorwire.Limits()), b"\x92\xa1a\x81\x01"],
)
def test_invalid_message_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        alone(hear(), raw_message(body))


def test_a_message_out_of_place_is_a_sequence_error(tmp_path: Path) -> None:
    for conversation in (greet(), hear(), receiver(tmp_path), send_stream(OFFER, outgoing())):
        with pytest.raises(SequenceError, match="expected the message"):
            alone(conversation, message("nonsense", {}))


def test_messages_have_a_limit_on_either_side() -> None:
    with pytest.raises(EncodeError, match="is the most"):
        alone(say({"x": b"x" * (64 << 10)}), b"")
    assert alone(say({"x": b"x" * (63 << 10)}), b"") is None
    end = End(hear(), b"\x93TWM" + ((64 << 10) + 1).to_bytes(4, "little") + bytes(4))
    end.run()  # not a byte of the body is waited for
    assert isinstance(end.error, LimitError)


def test_waiting_is_limited(tmp_path: Path) -> None:
    wait = message("wait", {})
    note = message("note", {"note": {"a": 1}})
    assert alone(hear(), wait * 900 + note) == {"a": 1}
    with pytest.raises(TransportError, match="nothing but requests to wait"):
        alone(hear(), wait * 1000 + note)
    with pytest.raises(FormatError):
        alone(hear(), message("wait", {"for": "ever"}) + note)


def test_a_peer_that_owes_a_request_cannot_ask_to_wait(tmp_path: Path) -> None:
    """An offer, a goodbye and, where the caller says so, a request: or a place would be held for hours by nothing."""
    wait = message("wait", {})
    for conversation, rest in (
        (receiver(tmp_path), message("offer", OFFERED)),
        (hear(patient=False), message("note", {"note": {}})),
    ):
        with pytest.raises(SequenceError, match="'wait'"):
            alone(conversation, wait + rest)
    whole = End(send_stream(OFFER, outgoing()), HAVE)
    whole.run()
    assert alone(receiver(tmp_path), whole.sent + wait + message("bye", {}))[2] is False


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (SchemaError("not this", item="w"), "schema", False),
        (LimitError("items", 1, 2), "limit", False),
        (CorruptError("bad"), "corrupt", True),
        (StorageError("/secret/path is full", errno=errno.ENOSPC), "storage", True),
        (StorageError("/secret/path is taken", errno=errno.EWOULDBLOCK), "busy", True),
        (StorageError("/secret/path"), "storage", True),
        (RefusedError("not now", kind="late", retryable=True), "late", True),
        (MemoryError(), "storage", True),
    ],
)
def test_a_refused_offer_reaches_the_sender_in_its_own_kind(error: Exception, kind: str, retryable: bool) -> None:
    def refuse(offer: Offer) -> Any:
        raise error

    sending, receiving = converse(send_stream(OFFER, outgoing()), receive_stream(refuse))
    assert isinstance(sending.error, RefusedError)
    assert (sending.error.kind, sending.error.retryable) == (kind, retryable)
    assert "secret" not in str(sending.error)
    assert receiving.error is error or isinstance(receiving.error, StorageError)
    # Nothing of the stream was sent: the connection can go on.
    assert STREAM[:8] not in sending.sent


def test_a_refusal_in_mid_stream_reaches_the_sender(tmp_path: Path) -> None:
    def check() -> Callable:
        def refuse(item: Any) -> None:
            if item.name == "b":
                raise SchemaError("not b", item="b")

        return refuse

    sending, receiving = converse(send_stream(OFFER, outgoing()), receiver(tmp_path, check=check), piece=100)
    assert isinstance(sending.error, RefusedError) and sending.error.kind == "schema" and "not b" in str(sending.error)
    assert isinstance(receiving.error, SchemaError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_running_out_of_memory_is_refused_and_resumed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver's N-th allocation for what it holds fails."""
    left = [number]

    def allocate(*arguments: Any) -> bytearray:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return bytearray(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "bytearray", allocate, raising=False)
        sending, receiving = converse(send_stream(OFFER, outgoing()), receiver(tmp_path))
    assert isinstance(receiving.error, StorageError) and receiving.error.errno == errno.ENOMEM
    assert isinstance(sending.error, RefusedError) and sending.error.kind == "storage" and sending.error.retryable
    sending, _ = converse(send_stream(OFFER, outgoing()), receiver(tmp_path))
    assert sending.result.digest == DIGEST and (number < 3 or sending.result.sent < len(STREAM))


class Brittle:
    """A place whose N-th call fails."""

    def __init__(self, place: Recording, number: int) -> None:
        self._place, self._left = place, number
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        if name not in ("get_buffer", "buffer_updated", "commit"):
            return getattr(self._place, name)
        self._left -= 1
        if self._left == 0:
            raise StorageError("no", errno=errno.EIO)
        return getattr(self._place, name)

    def close(self) -> None:
        self._place.close()
        self.closed = True


def test_a_failing_destination_is_closed_and_reported(tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        places: list[Brittle] = []

        def open_place(offer: Offer) -> Brittle:
            places.append(Brittle(Recording(tmp_path / f"{number}.tw", offer.transfer), number))
            return places[0]

        sending, receiving = converse(send_stream(OFFER, outgoing()), receive_stream(open_place))
        assert places[0].closed
        if receiving.error is None:
            break
        assert isinstance(receiving.error, StorageError)
        assert isinstance(sending.error, RefusedError) and sending.error.kind == "storage"
        again, _ = converse(
            send_stream(OFFER, outgoing()),
            receive_stream(lambda offer: Recording(tmp_path / f"{number}.tw", offer.transfer)),
        )
        assert again.result.digest == DIGEST
        assert (tmp_path / f"{number}.tw").read_bytes() == STREAM
    assert number > 20
    assert not list(tmp_path.glob(".*.part"))


def test_an_abandoned_conversation_closes_its_destination(tmp_path: Path) -> None:
    end = End(receiver(tmp_path), message("offer", OFFERED))
    end.run()
    with pytest.raises(StorageError, match="somebody else"):
        Recording(tmp_path / "m.tw", b"t")
    with suppress(GeneratorExit):
        end._conversation.close()
    Recording(tmp_path / "m.tw", b"t").close()


def test_a_refusal_is_read_when_sending_fails() -> None:
    class Breaking:
        digest = ""

        def after(self, position: Position) -> Any:
            yield from ()
            raise TransportError("connection failed while sending: reset")

    refusal = message("refuse", {"kind": "schema", "detail": "no", "retryable": False})
    with pytest.raises(RefusedError, match="no"):
        alone(send_stream(OFFER, Breaking()), HAVE + refusal)
    with pytest.raises(TransportError, match="reset"):
        alone(send_stream(OFFER, Breaking()), HAVE)
