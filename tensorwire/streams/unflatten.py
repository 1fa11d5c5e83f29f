"""Items to containers: rebuilds flattened containers as items arrive."""

from typing import Any, Final

from tensorwire.wire import ContainerItem, Item, Kind
from tensorwire.wire.names import Path

_MISSING: Final = object()


class Unflattener:
    """Rebuilds the containers that a stream describes."""

    def __init__(self) -> None:
        self._root: Any = _MISSING
        self._nodes: dict[Path, Any] = {}
        self._tuples: list[Path] = []

    def declare(self, item: Item) -> None:
        """Reserve the place of an item, so that dicts keep the order of the sender."""
        node: Any = _MISSING
        if isinstance(item, ContainerItem):
            node = self._nodes[item.path] = {} if item.kind == Kind.DICT else []
            if item.kind == Kind.TUPLE:
                self._tuples.append(item.path)
        self._put(item.path, node, grow=True)

    def fill(self, path: Path, value: Any) -> None:
        """Put a received value in its place."""
        self._put(path, value, grow=False)

    def result(self) -> Any:
        """The complete container, once everything is filled in."""
        for path in reversed(self._tuples):
            self._put(path, tuple(self._nodes[path]), grow=False)
        return self._root  # the ledger makes sure that a stream has one

    def _put(self, path: Path, value: Any, *, grow: bool) -> None:
        if not path:
            self._root = value
            return
        node = self._nodes[path[:-1]]
        if grow and type(node) is list:
            node.append(value)
        else:
            node[path[-1]] = value
