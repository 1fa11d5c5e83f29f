"""A stream of tensors as pieces, one at a time.

Use it to inspect, add up or forward tensors without holding them whole, and to read many streams in step in the
memory of one slice.
"""

from collections.abc import Callable, Iterator
from typing import Any

from tensorwire.errors import SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import Scratch
from tensorwire.streams.receiver import ItemStart, Piece, Receiver, reject_files
from tensorwire.wire import Item, StreamEnd, StreamStart, ValueItem
from tensorwire.wire.drive import as_source


class Pieces:
    """Iterate, once, for every `Piece` of the tensors in a stream, in order.

    `source` and `base`: as in `tensorwire.decode`. `open_item` is called with each item as it is described, and raises
    for an unwanted one. `scratch`: memory for one slice, which other streams may share: a piece's data is valid until
    one of them advances. `metadata` is available from the first item on, `digest` at the end. Raises a WireError for
    anything but a complete, valid stream of tensors.
    """

    def __init__(
        self,
        source: Any,
        open_item: Callable[[Item], None],
        *,
        base: bytes | None = None,
        scratch: Scratch | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.metadata: dict[str, str] = {}
        self.digest = b""
        self._source = as_source(source)
        self._open_item = open_item
        self._scratch = scratch
        self._limits = limits
        self._base = base

    def __iter__(self) -> Iterator[Piece]:
        with Receiver(self._limits, base=self._base, scratch=self._scratch or Scratch()) as receiver:
            for event in receiver.events(self._source):
                if isinstance(event, Piece):
                    yield event
                elif isinstance(event, ItemStart):
                    self._open(event.item)
                elif isinstance(event, StreamStart):
                    self.metadata = dict(event.info.metadata)
                elif isinstance(event, StreamEnd):
                    self.digest = event.summary.digest

    def _open(self, item: Item) -> None:
        reject_files(item)
        self._open_item(item)
        if isinstance(item, ValueItem):
            raise SchemaError("the stream carries values that are not tensors; receive it with decode")
