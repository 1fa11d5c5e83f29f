"""The schema that a receiver expects: names, kinds, dtypes, shapes and, if wanted, codecs."""

from typing import Any, Final

from tensorwire.errors import SchemaError, counted, show
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.flatten import flatten
from tensorwire.tensor import AnyFront, Front, TensorView
from tensorwire.wire import Item, Kind
from tensorwire.wire.names import Path, name_of

# The fields that must be equal, by kind of item. The size of a value may differ.
_COMPARED: Final = {Kind.TENSOR: ("dtype", "shape", "codec"), Kind.ALIAS: ("of",)}


class _Describing(AnyFront):
    """A front that only looks at the descriptions of tensors."""

    def view(self, value: object) -> TensorView | None:
        return self.describe(value)


class Schema:
    """A set of item descriptors that a stream must equal exactly: no broadcasting, nothing missing."""

    def __init__(self, items: dict[Path, Item], *, codecs: bool) -> None:
        self._items = items
        self._codecs = codecs
        self._missing = dict.fromkeys(items)

    @classmethod
    def of(cls, value: Any, front: Front, *, codec: CodecChoice | None = None, limits: Limits = DEFAULT) -> "Schema":
        """The schema of a container like the one expected, or `value` if it is one.

        The values of its tensors do not matter; they may be on torch's meta device, where they have none. With `codec`,
        items must come encoded as `encode(value, codec=codec)` would encode them.
        """
        if isinstance(value, Schema):
            return cls(value._items, codecs=value._codecs)
        leaves = flatten(value, _Describing(front), rule(codec or "raw"), limits)
        return cls({leaf.item.path: leaf.item for leaf in leaves}, codecs=codec is not None)

    def check(self, item: Item) -> None:
        """Raise SchemaError unless `item` is as expected."""
        expected = self._items.get(item.path)
        if expected is None:
            raise SchemaError(f"not expected; this receiver expects {counted(len(self._items), 'other item')}")
        if item.kind is not expected.kind:
            raise SchemaError(f"kind is {_text(item.kind)}, expected {_text(expected.kind)}")
        for field in _COMPARED.get(item.kind, ()):
            got, wanted = getattr(item, field), getattr(expected, field)
            if got != wanted and (field != "codec" or self._codecs):
                raise SchemaError(f"{field} is {_text(got)}, expected {_text(wanted)}")
        del self._missing[item.path]

    def check_complete(self) -> None:
        """Raise SchemaError if an expected item has not come."""
        for path in self._missing:
            missing = counted(len(self._missing), "expected item")
            raise SchemaError(f"the stream ends with {missing} missing", item=name_of(path))


def _text(value: Any) -> str:
    return show(list(value)) if isinstance(value, tuple) else str(getattr(value, "name", value))
