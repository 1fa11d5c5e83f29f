"""The server's side: a grid whose messages are encoded."""

import time
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any, Final, NamedTuple

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from tensorwire import updates
from tensorwire.codecs import Codec, parse
from tensorwire.errors import ArgumentError, SchemaError, TensorwireError
from tensorwire.integrations.flower.arrays import record_views, shaped_like
from tensorwire.integrations.flower.mod import Asked, UpCodec
from tensorwire.integrations.flower.records import (
    KEY,
    by_role,
    encoded,
    is_encoded,
    lazy_record,
    opened,
    record_of,
    say_once,
    sendable,
)
from tensorwire.integrations.flower.seams import changed_seam, trim
from tensorwire.streams import CodecChoice
from tensorwire.updates import Terms, Views

_FAILED: Final = 6  # Flower's ErrorCode.MOD_FAILED_PRECONDITION


class _Sent(NamedTuple):
    """A message that waits for its reply, and the arrays that it carried."""

    message: Message
    records: dict[str, dict[str, Array]]


class WireGrid(Grid):
    """A `Grid` whose messages are encoded, for any strategy or custom loop.

    `down`: the codec of messages to clients, as in `tensorwire.encode`; a single codec leaves norms, biases and
    counters exact (`tensorwire.updates.exact_vectors`). `up`: the codec of replies, a spec or a mapping of patterns.
    `difference`: clients send their changes, which are added to the server's own model, instead of whole weights.
    `feedback`: clients add what `up` drops in one training to the next update; this keeps one model in the state of
    their node. `poll`: seconds between two polls for replies.

    Every node must run `wire_mod`; a reply without it is passed on unchanged. Arrays keep the dtypes and ties with
    which they were first sent, whatever an aggregation makes of them. All else is passed on to `grid`.

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
        self.down: CodecChoice = by_role(repr(parse(down)) if isinstance(down, (str, Codec)) else down)
        """The codec that the model is sent with."""
        self._asked = Asked.of(up, difference, feedback)
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
        trim()
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
        """The replies so far, verified; their arrays are decoded when they are read."""
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
        if KEY in message.content:
            raise ArgumentError(f"a message of WireGrid has no record {KEY!r} of its own: give yours another name")
        content = RecordDict({KEY: self._asked.record()})
        for key, record in message.content.items():
            if id(record) not in sealed:
                sealed[id(record)] = self._sealed_record(key, record)
            content[key] = sealed[id(record)]
        copied = copy(message)
        copied.content = content
        if message.content is content or copied.metadata is not message.metadata:
            raise changed_seam("a copied Message shares its metadata, by which its reply is found, but not its content")
        return copied

    def _sealed_record(self, key: str, record: Any) -> Any:
        views = sendable(key, record)
        if views is None:
            return record
        first = self._first.setdefault(key, {name: replace(view, read=_never) for name, view in views.items()})
        return record_of(encoded(shaped_like(views, first), self.down, Terms(run="", round=0)))

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
        if not is_encoded(record):
            if isinstance(record, ArrayRecord) and not record and sent is not None and sent.records:
                say_once(
                    "tensorwire: arrays come back empty, as with secure aggregation: masked values are sent as without "
                    "tensorwire, up= does not apply, and the mean is taken of whole weights, so down= should be a "
                    "lossless codec such as 'planes'"
                )
            return record
        received = opened(record, finite=reply.metadata.message_type.startswith("train"))
        if received.terms.kind == "weights":
            return lazy_record(received.views, received)
        number, _, key = received.terms.base.partition("/")
        if sent is None or number != reply.metadata.reply_to_message_id or key not in sent.records:
            raise SchemaError(
                "the reply is a difference to what this WireGrid has not sent, or has given up waiting for"
            )
        base = sent.records[key]
        wanted = {name: base[name] for name in received.views if name in base}
        return lazy_record(updates.added(received.views, record_views(wanted)), received)

    def _forget_expired(self) -> None:
        """Forget messages that will never be answered."""
        now = time.time()
        for number, sent in list(self._sent.items()):
            if sent.message.metadata.created_at + sent.message.metadata.ttl < now:
                del self._sent[number]


def _never(start: int, stop: int) -> bytes:
    raise AssertionError("only the description of this tensor is kept")
