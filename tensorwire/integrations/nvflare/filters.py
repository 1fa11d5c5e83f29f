"""FLARE's filters at its four points: inputs and outputs of server and clients. They return new DXOs."""

from collections.abc import Mapping
from typing import Any, Final

import tensorwire
from tensorwire.errors import EncodeError
from tensorwire.integrations.nvflare.decomposer import WireRef, module
from tensorwire.integrations.nvflare.flare import DXO, DataKind, DXOFilter, FLContext, Shareable
from tensorwire.integrations.nvflare.marking import Ties, marked
from tensorwire.integrations.nvflare.model import (
    CodecSpec,
    Path,
    checked,
    chooser,
    leaves,
    library,
    named,
    replaced,
)
from tensorwire.streams import gather

_KINDS: Final = (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF)
_BASE: Final = "tensorwire.base"  # in the context of a task
_MESSAGE: Final = "tensorwire.message"
_OTHERS: Final = "tensorwire.others"
_LIBRARY: Final = "tensorwire.library"
_MESSAGE_PORTION: Final = 64 << 20  # of a whole message: an object of FLARE's must stay below 4 GiB


class WireFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Marks outgoing tensors with the codec to send them with: for the output of server or clients.

    `codec`: a spec for all tensors, or a dict of name patterns to specs as in `tensorwire.encode`. With a single spec,
    statistics of norms, scalars and vectors of up to 16,384 elements are sent exactly. `difference`: if weights answer
    a task, send their difference to the weights that a `BaseFilter` received with it. Weights and differences are
    marked, all else is unchanged. Nothing is encoded yet, and the caller's tensors and dicts are not changed. Raises
    EncodeError, which FLARE reports, for NaN and infinities that a quantizer cannot carry.
    """

    def __init__(self, codec: CodecSpec = "bf16", difference: bool = False) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)
        self.codec = checked(codec)
        self.difference = difference
        self._ties = Ties()

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with `Wire`s."""
        if not self.difference or dxo.data_kind != DataKind.WEIGHTS:
            return DXO(dxo.data_kind, marked(dxo.data, self.codec, self._ties), dict(dxo.meta or {}))
        base = fl_ctx.get_prop(_BASE)
        if base is None:
            raise EncodeError("the task of this reply had no weights: is there a BaseFilter at the input?")
        return DXO(DataKind.WEIGHT_DIFF, marked(dxo.data, self.codec, self._ties, base), dict(dxo.meta or {}))


class BaseFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Decodes tensors that were kept encoded, and keeps them as the base of differences: for the input of clients.

    It keeps the received, encoded form, whatever happens to the tensors, in as much memory as was sent.
    """

    def __init__(self) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with tensors."""
        refs = {tensorwire.name_of(path): ref for path, ref in leaves(dxo.data, _is_ref)}
        fl_ctx.set_prop(_BASE, {name: ref.encoded for name, ref in refs.items()}, private=True, sticky=False)
        tensors = {id(ref): ref.materialize() for ref in {id(ref): ref for ref in refs.values()}.values()}
        return DXO(dxo.data_kind, replaced(dxo.data, tensors), dict(dxo.meta or {}))


def _is_ref(value: Any) -> bool:
    return isinstance(value, WireRef)


class EncodeFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Replaces the tensors of a DXO by one encoded message: for outputs, with `DecodeFilter` at the other end.

    For jobs that can have filters but no decomposer: it takes the memory of a whole encoded model on either side.
    `codec`: as in `WireFilter`. The caller's dict is not changed.
    """

    def __init__(self, codec: CodecSpec = "bf16") -> None:
        DXOFilter.__init__(self, list(_KINDS), None)
        self.codec = checked(codec)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with the message in it; one that has a message already stays as it is."""
        if _MESSAGE in dxo.data:
            return dxo
        tensors = named(dxo.data)
        buffers = tensorwire.encode(tensors, codec=chooser(self.codec))
        data = {
            _MESSAGE: list(gather(buffers, _MESSAGE_PORTION)),
            _LIBRARY: "torch" if any(library(tensor) == "torch" for tensor in tensors.values()) else "numpy",
            _OTHERS: replaced(dxo.data, {id(tensor): None for tensor in tensors.values()}),
        }
        return DXO(dxo.data_kind, data, dict(dxo.meta or {}))


class DecodeFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Decodes the message of an `EncodeFilter` into tensors: for inputs. All else is unchanged."""

    def __init__(self) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with the tensors in it."""
        if _MESSAGE not in dxo.data:
            return dxo
        tensors = module(dxo.data[_LIBRARY]).loads(iter(dxo.data[_MESSAGE]))
        return DXO(dxo.data_kind, _refilled(dxo.data[_OTHERS], tensors, ()), dict(dxo.meta or {}))


def _refilled(data: Any, tensors: Mapping[str, Any], path: Path) -> Any:
    """The data of a DXO with its tensors in their places again."""
    if path and data is None:
        return tensors.get(tensorwire.name_of(path))
    if isinstance(data, dict):
        return {key: _refilled(value, tensors, (*path, key)) for key, value in data.items()}
    if type(data) in (list, tuple):
        return type(data)(_refilled(value, tensors, (*path, index)) for index, value in enumerate(data))
    return data
