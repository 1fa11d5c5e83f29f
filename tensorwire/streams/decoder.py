"""A stream that is handed over as it comes: by callbacks, message queues, engines that call and will not be called."""

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
    """One stream, fed: made by `tensorwire.decoder`, which says what the options mean.

        decoder = tensorwire.decoder(expect=model.state_dict())
        def on_message(data):
            for name, tensor in decoder.feed(data): ...
        def on_close():
            decoder.finish()

    `metadata` is that of the stream once its beginning has been fed. `ended`: whether all of it has.
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

        `data`: a buffer of any size, the bytes that follow those fed before. Its memory is free again afterwards, but
        `bytes` may be kept where they are shared with what is given. Raises a WireError for bytes that cannot go on the
        stream, bytes after its end included; the decoder is of no more use then and says so with a ClosedError.
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
        """Say that nothing more will come. Raises TruncatedError unless the whole stream has."""
        with self._items.receiver:
            self._push.finish()
