"""The client's side: a mod that decodes messages and encodes replies."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Message, RecordDict

import tensorwire
from tensorwire import updates
from tensorwire.codecs import Codec, parse
from tensorwire.errors import ArgumentError, SchemaError, UnsupportedError
from tensorwire.integrations.flower.arrays import comparable, shaped_like
from tensorwire.integrations.flower.records import (
    KEY,
    by_role,
    encoded,
    is_encoded,
    joined,
    lazy_record,
    opened,
    record_of,
    sendable,
)
from tensorwire.integrations.flower.seams import trim
from tensorwire.streams import CodecChoice
from tensorwire.updates import ErrorFeedback, Terms, Views

ClientAppCallable = Callable[[Message, Context], Message]
UpCodec = str | Codec | Mapping[str, str | Codec]


class Asked(NamedTuple):
    """How to encode a reply: sent by the server beside its records."""

    up: str | dict[str, str]
    difference: bool
    feedback: bool

    @classmethod
    def of(cls, up: UpCodec, difference: bool, feedback: bool) -> "Asked":
        """Raises ArgumentError for a choice that cannot be sent to a client."""
        if isinstance(up, Mapping):
            return cls({str(pattern): repr(parse(spec)) for pattern, spec in up.items()}, difference, feedback)
        if not isinstance(up, (str, Codec)):
            raise ArgumentError(f"up= is sent to the clients: give a spec or a mapping, not a {type(up).__name__}")
        return cls(repr(parse(up)), difference, feedback)

    def record(self) -> ConfigRecord:
        """The settings as a record to be sent."""
        return ConfigRecord({"version": 1, **self._replace(up=json.dumps(self.up))._asdict()})

    @classmethod
    def parse(cls, record: ConfigRecord) -> "Asked":
        """What `record` made. Raises SchemaError; UnsupportedError for those of a later version."""
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

    It does nothing if the server does not use `WireGrid`. Raises a WireError for a damaged message, EncodeError and
    NonFiniteError for a reply that cannot be sent; Flower reports each to the server as an error of this node.
    """
    if not msg.has_content() or not isinstance(terms := msg.content.get(KEY), ConfigRecord):
        return call_next(msg, context)
    trim()
    asked, bases, records = Asked.parse(terms), {}, {}
    for key, record in msg.content.items():
        if is_encoded(record):
            received = opened(record, finite=False)
            bases[key], record = received.views, lazy_record(received.views, received)
        records[key] = record
    del records[KEY]
    msg.content = RecordDict(records)
    del records, record, terms
    reply = call_next(msg, context)
    if not reply.has_error():
        trim()
        answer = _Answer(asked, bases, msg, context)
        reply.content = RecordDict({key: answer.record(key, record) for key, record in reply.content.items()})
    return reply


class _Answer:
    """How the records of one reply are encoded."""

    def __init__(self, asked: Asked, bases: Mapping[str, Views], message: Message, context: Context) -> None:
        self._asked = asked
        self._bases = bases
        self._metadata = message.metadata
        self._state = context.state

    def record(self, key: str, record: Any) -> Any:
        """A record as it is to be sent: encoded, where it is one of arrays."""
        views = sendable(key, record)
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
        codec = by_role(self._asked.up)
        if base is None:
            return record_of(encoded(views, codec, terms))
        old = self._bases[base]
        views = {name: views[name] for name in old if name in views}  # in its order, which a mean relies on
        change = updates.subtract(shaped_like(views, old), old)
        if not (self._asked.feedback and self._metadata.message_type.startswith("train")):
            return record_of(encoded(change, codec, terms))
        return record_of(self._with_feedback(base, change, codec, terms))

    def _base_of(self, key: str, views: Views) -> str | None:
        """The record of the message that this one is a new version of."""
        for name in (key, *self._bases):
            base = self._bases.get(name, {})
            if views.keys() <= base.keys() and all(comparable(view, base[item]) for item, view in views.items()):
                return name
        return None

    def _with_feedback(self, base: str, change: Views, codec: CodecChoice, terms: Terms) -> list[bytes]:
        """A change with what was dropped of those before it; what is dropped now is kept in the node's state."""
        place = f"{KEY}.feedback.{base}"
        kept = self._state.get(place)
        residual = dict(tensorwire.numpy.loads(joined(kept))) if is_encoded(kept) else {}
        feedback = ErrorFeedback(residual=residual)
        change = feedback.add(change)
        data = encoded(change, codec, terms)
        feedback.settle(change, data)
        self._state[place] = record_of([tensorwire.dumps(feedback.residual)])
        return data
