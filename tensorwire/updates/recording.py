"""Limits what a stream of a model may cost its receiver, in proportion to the model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import tensorwire
from tensorwire.errors import LimitError
from tensorwire.limits import DEFAULT, KIB, MIB, Limits
from tensorwire.transfer import Recording
from tensorwire.updates.difference import views
from tensorwire.wire import Item

_FRAME: Final = 2 * KIB  # bytes of elements that frames must carry on average: each costs some 50 us
_ITEM: Final = 8 * KIB  # bytes that an item's description, headers and scales may take
_SPARE: Final = 1 * MIB


class BoundedRecording(Recording):
    """A recording of a stream of exactly the tensors of `model`, of bounded size, number of frames and metadata.

    `patch`: the stream is a patch to such a model, whose items have ranks for names; `tensorwire.apply` checks them.
    `convert`, `finish`: as in `Recording`.

    Raises SchemaError and LimitError, and keeps nothing of what it refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transfer: bytes,
        model: Mapping[str, Any],
        *,
        patch: bool = False,
        convert: Callable[[str, str], None] | None = None,
        finish: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        schema, size = tensorwire.schema(model), _bytes_of(model)
        self._most_frames = 2 * len(model) + size // _FRAME + 16
        limits = replace(
            limits,
            stream=min(limits.stream, 2 * size + _ITEM * len(model) + _SPARE),
            skippable=min(limits.skippable, _ITEM),
            metadata=min(limits.metadata, 256 * KIB),
        )
        super().__init__(
            path,
            transfer,
            check=lambda: _accept if patch else tensorwire.schema(schema).check,
            convert=convert,
            finish=finish,
            limits=limits,
        )

    def buffer_updated(self, size: int) -> None:
        """`Recording.buffer_updated`."""
        try:
            super().buffer_updated(size)
            if self.position.frames > self._most_frames:
                raise LimitError("frames of the stream", self._most_frames, self.position.frames)
        except LimitError:
            self.discard()
            raise


def _accept(item: Item) -> None:
    pass


def _bytes_of(model: Mapping[str, Any]) -> int:
    return sum(view.numel * view.dtype.itemsize for view in views(model).values())
