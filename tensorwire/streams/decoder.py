"""Decodes a stream that is fed as it arrives: by callbacks, message queues, or engines that call their clients."""

from collections.abc import Mapping
from typing import Any

from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams.encoded import EncodedItems, Store
from tensorwire.streams.receiver import Event
from tensorwire.streams.sinks import Items
from tensorwire.tensor import Front
from tensorwire.wire import StreamStart
from tensorwire.wire.drive import Push


class Decoder:
    """Decodes one stream that is fed to it: made by `tensorwire.decoder`, which describes the options.

        decoder = tensorwire.decoder(expect=model.state_dict())
        def on_message(data):
            for name, tensor in decoder.feed(data): ...
        def on_close():
            decoder.finish()

    `metadata`: of the stream, once its beginning has been fed. `ended`: whether all of it has been fed.
    """

    def __init__(
        self,
        front: Front,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        limits: Limits = DEFAULT,
        keep: Store | None = None,
    ) -> None:
        self.metadata: dict[str, str] = {}
        if keep is None:
            self._items: Items | EncodedItems = Items(front, into, expect, limits, base, overlap=False)
        else:
            self._items = EncodedItems(front, expect, limits, base, keep)
        self._push: Push[Event] = Push(self._items.receiver)

    @property
    def ended(self) -> bool:
        """Whether the whole stream has been fed and is verified."""
        return self._push.ended

    def feed(self, data: Any) -> list[tuple[str, Any]]:
        """(name, value) of each item that these bytes complete.

        `data`: a buffer of any size, the next bytes of the stream. Its memory may be reused after the call, but `bytes`
        may be kept and shared with the results. Raises a WireError for bytes that cannot continue the stream, or that
        follow its end; afterwards the decoder only raises ClosedError.
        """
        given: list[tuple[str, Any]] = []
        with self._items.receiver:
            for event in self._push.feed(data):
                if isinstance(event, StreamStart):
                    self.metadata.update(event.info.metadata)
                given += [(item.name, value) for item, value in self._items.completed(event)]
        if self._push.ended:
            self._items.check_complete()
        return given

    def finish(self) -> None:
        """Declare that no more bytes will follow. Raises TruncatedError unless the whole stream has been fed."""
        with self._items.receiver:
            self._push.finish()
