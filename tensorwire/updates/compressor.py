"""Compressors send a step's update in a thousandth of its bytes, and send what they left out in later steps.

For each tensor a compressor keeps what it has not sent yet:

    kept = beta * kept + new
    message = encode(kept)                     # with the method's codec
    kept = kept - alpha * decode(message)      # exactly what receivers decode, to the bit

Calculated in float32, one rounding for each product and each sum. A message is an ordinary stream.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from tensorwire import dtypes, kernels, streams
from tensorwire.codecs import (
    RAW,
    Codec,
    LowRank,
    Packer,
    Readymade,
    Sparse,
    as_floats,
    from_floats,
    from_stages,
    kernel_view,
    largest,
    largest_of,
)
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, NonFiniteError
from tensorwire.limits import DEFAULT
from tensorwire.streams import ItemStart, Leaf, Payload, Piece, Receiver
from tensorwire.tensor import Extent, TensorView, ViewFront
from tensorwire.updates.difference import Views, key_of, views
from tensorwire.updates.methods import Method, codec_for, method
from tensorwire.updates.terms import Terms
from tensorwire.wire import Item, TensorItem, Unpack, sharing

Float32 = npt.NDArray[np.float32]

_TAKEN: Final = (dtypes.FLOAT32, dtypes.FLOAT16, dtypes.BFLOAT16)
# No element of a sparse slice is so many times as large as the largest that was given, and what is left neither.
_DECODED: Final = 2.0**16
_BLOCK: Final = 1 << 16  # numbers that are worked on at a time: they stay in the second-level cache


class Message:
    """The message of one step. `data`: a stream that every decoding function accepts, `tensorwire.loads` for example.

    `settled`: whether `ack` or `nack` has been called for it.
    """

    __slots__ = ("data", "settled")

    def __init__(self, data: bytes, *, settled: bool = False) -> None:
        self.data = data
        self.settled = settled

    def __len__(self) -> int:
        return len(self.data)


class Compressor:
    """The compressor of one sender. `spec`: a method of `tensorwire.updates.methods`.

    compressor = Compressor("demo:k=4")
    message = compressor.compress(gradients)           # every step
    total = combine([message.data, *others])           # at every receiver
    """

    def __init__(self, spec: str | Method) -> None:
        self._method = method(spec)
        self._kept: dict[str, Float32] = {}
        # The right factor of each slice of low rank, as it was sent: the next one begins with it.
        self._factors: dict[tuple[str, int], Float32] = {}
        # Above the magnitudes that are kept, of tensors of which such a bound is known without looking.
        self._bounds: dict[str, float] = {}
        self._last = Message(b"", settled=True)
        # What a message is made of, for the tensors of the last step: it reads what is kept.
        self._layout: list[tuple[str, str, DType, tuple[int, ...]]] = []
        self._leaves: list[Leaf] = []
        self._unpack = sharing()
        self._new: Views = {}  # what is being compressed

    def __getstate__(self) -> dict[str, Any]:
        """All but what reads this compressor's own memory, and what was read from it."""
        return {**self.__dict__, "_layout": [], "_leaves": [], "_unpack": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_unpack": sharing()}

    @property
    def method(self) -> Method:
        """The method; its repr is the spec."""
        return self._method

    def compress(self, state: Mapping[str, Any], *, terms: Terms | None = None) -> Message:
        """Add `state` to what is kept, and return the message to send.

        `state`: names to tensors of float32, float16 or bfloat16, torch or NumPy; the same names, shapes and dtypes
        every time, or fewer of them. `terms`: the stream's metadata. The tensors are not written to.
        A message counts as sent even if `ack` is never called. Raises EncodeError, or NonFiniteError for values that
        are not finite or beyond 2^99; what is kept is then unchanged.
        """
        tensors = views(state)
        for name, view in tensors.items():
            self._check(name, view)
        owners = _owners(tensors)
        for name in dict.fromkeys(owners.values()):
            self._take_in(name, tensors[name])
        info = streams.stream_info(terms.metadata() if terms is not None else None)
        sender = streams.Sender(info, self._method.frame_size, DEFAULT)
        self._new = tensors
        self._last = Message(b"".join(sender.container(self._leaves_of(tensors, owners))))
        self._new = {}
        self._add(self._last, -self._method.alpha)
        return self._last

    def ack(self, message: Message | None = None) -> None:
        """Note that a message has arrived: the last one, if none is given. Repeated calls have no effect."""
        (message or self._last).settled = True

    def nack(self, message: Message | None = None) -> None:
        """Keep the content of a lost message again: the last one, if none is given. Repeated calls have no effect."""
        lost = message or self._last
        if not lost.settled:
            lost.settled = True
            self._bounds.clear()
            self._add(lost, self._method.alpha)

    def age(self, factor: float) -> None:
        """Multiply what is kept by `factor`, from 0 to 1, after steps that this sender missed. Raises ValueError."""
        if not 0 <= factor <= 1:
            raise ValueError(f"factor must be a number from 0 to 1, not {factor!r}")
        for kept in self._kept.values():
            kept *= np.float32(factor)

    def state_dict(self) -> dict[str, Any]:
        """The state of the compressor, as a container that `tensorwire.save_file` takes.

        The arrays are the compressor's own: it writes to them in the next step.
        """
        pending = b"" if self._last.settled else self._last.data
        return {
            "spec": repr(self._method),
            "kept": dict(self._kept),
            "factors": [[name, start, factor] for (name, start), factor in self._factors.items()],
            "pending": np.frombuffer(pending, np.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`, in torch or NumPy arrays. Raises EncodeError for another method's."""
        if state["spec"] != repr(self._method):
            raise EncodeError(f"this is the state of {state['spec']!r:.80}, not of {self._method}")
        kept = {name: np.array(array, np.float32) for name, array in state["kept"].items()}
        factors = {(name, start): np.array(factor, np.float32) for name, start, factor in state["factors"]}
        pending = np.asarray(state["pending"], np.uint8).tobytes()
        self._kept, self._factors, self._bounds = kept, factors, {}
        self._layout, self._leaves = [], []
        self._last = Message(pending, settled=not pending)

    def _check(self, name: str, view: TensorView) -> None:
        """Raise for a tensor that cannot be taken in."""
        if view.dtype not in _TAKEN:
            raise EncodeError(f"compressors take float32, float16 and bfloat16, not {view.dtype}", item=name)
        kept = self._kept.get(name)
        if kept is not None and kept.shape != view.shape:
            raise EncodeError(f"the tensor has shape {list(view.shape)}, but had {list(kept.shape)} before", item=name)
        codec = codec_for(self._method, view.shape)
        most, new = codec.ceiling(view.dtype), largest(view)
        before = 0.0 if kept is None else self._bounds.get(name, math.inf)
        if kept is not None and not new + before <= most:
            before = largest_of(kept.reshape(-1))
        if not new + before <= most:
            raise _too_large(name, view, most)

    def _take_in(self, name: str, view: TensorView) -> None:
        """Kept = beta * kept + new; of tensors that are `_selected_from`, when the message is made."""
        if name not in self._kept:
            self._kept[name] = np.zeros(view.shape, np.float32)
        self._bounds.pop(name, None)
        packer = codec_for(self._method, view.shape).packer
        if _selected_from(packer, view):
            return
        kept, top, beta = self._kept[name].reshape(-1), 0.0, self._method.beta
        for start in range(0, kept.size, _BLOCK):
            part = kept[start : start + _BLOCK]
            new = kernel_view(view.read(start, start + part.size), view.dtype)
            top = max(top, kernels.decay_and_add(part, new, beta=beta))
        if isinstance(packer, Sparse):
            self._bounds[name] = _DECODED * top

    def _leaves_of(self, tensors: Views, owners: Mapping[str, str]) -> list[Leaf]:
        """What is kept of tensors, described: the same in every step that has the same tensors."""
        layout = [(name, owners[name], view.dtype, view.shape) for name, view in tensors.items()]
        if layout != self._layout:
            kept = {name: self._view(owners[name], view) for name, view in tensors.items()}
            rule = streams.rule(_codecs(self._method))
            self._layout, self._leaves = layout, [*streams.flatten(kept, ViewFront(), rule, DEFAULT)]
            self._unpack = sharing()
        return self._leaves

    def _view(self, name: str, view: TensorView) -> TensorView:
        """What is kept of a tensor, in its dtype, or already encoded."""
        kept, codec, dtype = self._kept[name].reshape(-1), codec_for(self._method, view.shape), view.dtype
        packer = codec.packer

        def read(start: int, stop: int) -> Any:
            return from_floats(kept[start:stop], dtype)

        if not isinstance(packer, LowRank) and not _selected_from(packer, view):
            return TensorView(dtype, view.shape, read, identity=view.identity)

        def payload(start: int, stop: int) -> Any:
            part = kept[start:stop]
            if isinstance(packer, LowRank):
                return packer.factorize(part, self._factors.get((name, start)))
            assert isinstance(packer, Sparse)
            new = kernel_view(self._new[name].read(start, stop), dtype)
            extent = Extent(dtype, view.shape, start, stop - start)
            made, top = packer.take_in(part, new, extent, beta=self._method.beta)
            self._bounds[name] = max(self._bounds.get(name, 0.0), _DECODED * top)
            return made

        return TensorView(dtype, view.shape, payload, identity=view.identity, codec=Readymade(codec.pipeline))

    def _add(self, message: Message, weight: float) -> None:
        """Add what a message decodes to, times a weight, to what is kept."""
        for item, codec, payload, extent in slices(message.data, self._unpack):
            kept = self._kept[key_of(item)].reshape(-1)[extent.start : extent.start + extent.count]
            packer = codec.packer
            if isinstance(packer, LowRank):
                self._factors[key_of(item), extent.start] = packer.factors(payload, extent).right
            if item.dtype != dtypes.FLOAT32:
                decoded = np.empty(extent.count * item.dtype.itemsize, np.uint8)
                codec.decode(payload, extent, decoded)
                with kernels.default_environment():
                    kept += np.float32(weight) * as_floats(decoded, item.dtype).astype(np.float32)
            elif isinstance(packer, LowRank):
                packer.add(packer.factors(payload, extent), kept, weight)
            else:
                assert isinstance(packer, Sparse)  # what methods choose
                packer.add(packer.selected(payload, extent), kept, weight)


def _selected_from(packer: Packer, view: TensorView) -> TypeGuard[Sparse]:
    """Whether elements are selected from what is kept as it stands, and can be while new ones are taken in."""
    return isinstance(packer, Sparse) and view.dtype == dtypes.FLOAT32


def _too_large(name: str, view: TensorView, most: float) -> NonFiniteError:
    """The error for a tensor that cannot be taken in. It names a NaN or the element of the largest magnitude."""
    top, index = 0.0, 0
    for start in range(0, view.numel, _BLOCK):
        data = kernel_view(view.read(start, min(start + _BLOCK, view.numel)), view.dtype)
        magnitudes = np.abs(as_floats(np.asarray(data).view(np.uint8), view.dtype).astype(np.float64))
        place = int(np.argmax(magnitudes))  # of a NaN, if there is one
        if not magnitudes[place] <= top:
            top, index = float(magnitudes[place]), start + place
        if math.isnan(top):
            break
    error = NonFiniteError(f"{top:g}, and magnitudes may not exceed {most:g} with what was kept of them", index=index)
    error.item = name
    return error


def message_size(spec: str | Method, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size in bytes of a message for float32 tensors of these shapes, framing included; for Rice codes, at most.

    message_size("demo:k=4", {"layer.weight": (2048, 8192)})
    """
    chosen = method(spec)
    tensors = {
        name: TensorView(dtypes.FLOAT32, tuple(shape), lambda start, stop: b"") for name, shape in shapes.items()
    }
    leaves = streams.flatten(tensors, ViewFront(), streams.rule(_codecs(chosen)), DEFAULT)
    return streams.stream_size(leaves, frame_size=chosen.frame_size).total


def _codecs(chosen: Method) -> Callable[[str, Any], Codec]:
    return lambda name, view: codec_for(chosen, view.shape)


def slices(
    source: Any, unpack: Unpack, open_item: Callable[[int, Item], None] = lambda number, item: None
) -> Iterator[tuple[TensorItem, Codec, memoryview, Extent]]:
    """The slices of a message, verified and encoded. `open_item`: told of each item. Raises a WireError.

    `unpack`: `wire.sharing()`, for messages that describe the same tensors.
    """
    with Receiver(DEFAULT, encoded=True, unpack=unpack) as receiver:
        for event in receiver.events(source):
            if isinstance(event, ItemStart):
                open_item(event.number, event.item)
            elif isinstance(event, Payload) and isinstance(event.item, TensorItem):
                item = event.item
                extent = Extent(item.dtype, item.shape, event.start, event.count)
                yield item, from_stages(item.codec), event.data, extent
            elif isinstance(event, Piece) and isinstance(event.item, TensorItem):  # of a raw item
                item, count = event.item, event.data.size // event.dtype.itemsize
                yield item, RAW, event.data.data, Extent(item.dtype, item.shape, event.start, count)


def _owners(tensors: Views) -> dict[str, str]:
    """The name under which each tensor's residual is kept: tied tensors share one."""
    first: dict[object, str] = {}
    return {
        name: name if view.identity is None else first.setdefault((view.identity, view.shape), name)
        for name, view in tensors.items()
    }
