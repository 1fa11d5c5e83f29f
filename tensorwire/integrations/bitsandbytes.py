"""Quantized tensors to and from bitsandbytes without dequantizing: codes and absmax change hands as they are.

for name, value in bitsandbytes.decode(transport.receive()):
    if isinstance(value, Quantized):                     # nf4, fp4 and int8 items
        weight = functional.dequantize_4bit(value.data, value.state)

transport.send(bitsandbytes.encode({"weight": Quantized(data, state)}))   # also takes Params4bit
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit

from tensorwire import dtypes, streams
from tensorwire import torch as torch_front
from tensorwire.codecs import FP4, NF4, Codec, Encoded, Int8, Sizes, Zstd, from_stages
from tensorwire.codecs.base import Take
from tensorwire.codecs.fourbit import NESTED_BLOCKSIZE, FourBit, unnest
from tensorwire.codecs.int8 import checked_absmax, split
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError, SchemaError, UnsupportedError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import GrowingMemory
from tensorwire.streams import Completed, Payload, Receiver
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.tensor import Extent, TensorView
from tensorwire.wire import FileItem, ItemStart, TensorItem, ValueItem

_FOUR_BIT: Final = {"nf4": NF4, "fp4": FP4}
# bitsandbytes has no quant_type for its 8-bit states.
_TABLES: Final = {"nf4": NF4.table, "fp4": FP4.table, None: Int8.table}


class Quantized(NamedTuple):
    """A tensor as bitsandbytes holds it: packed codes (uint8) and their state."""

    data: torch.Tensor
    state: QuantState


def encode(
    obj: Any,
    *,
    codec: CodecChoice = "raw",
    frame_size: int = streams.FRAME_SIZE,
    limits: Limits = DEFAULT,
) -> Iterator[Any]:
    """Like `tensorwire.torch.encode`; `Quantized` and quantized `Params4bit` in it travel with the codes they have.

    Raises EncodeError for a state that is none of bitsandbytes' own: another code table, a block size that the
    format does not have, or weights repacked by a CPU forward pass (capture the state dict before it).
    """
    choose = rule(codec)
    front = _Front()

    def select(name: str, value: Any) -> Codec:
        if isinstance(value, (Quantized, Params4bit)):
            return _Ready(_codec(_quantized(value).state))
        return choose(name, value, front.view(value))

    return streams.encode(obj, front, codec=select, frame_size=frame_size, limits=limits)


def decode(source: Any, *, limits: Limits = DEFAULT) -> Iterator[tuple[str, Any]]:
    """(name, value) of each tensor of a stream: `Quantized` on the CPU for nf4, fp4 and int8 items, else a tensor.

    Raises what `tensorwire.decode` raises, and SchemaError for streams with plain values in them.
    """
    states: dict[int, _State] = {}
    tensors: dict[int, GrowingMemory] = {}
    with Receiver(limits) as receiver:
        for event in receiver.events(source):
            if isinstance(event, Payload):
                states[event.number].add(event)
            elif isinstance(event, Completed) and isinstance(event.item, TensorItem):
                state = states.pop(event.number, None)
                value = _tensor(event.item, tensors.pop(event.number)) if state is None else state.quantized()
                for item in (event.item, *event.aliases):
                    yield item.name, value
            elif isinstance(event, ItemStart) and isinstance(event.item, (ValueItem, FileItem)):
                raise SchemaError("only tensors can be handed to bitsandbytes; receive this stream with decode")
            elif isinstance(event, ItemStart) and isinstance(event.item, TensorItem):
                codec = from_stages(event.item.codec)
                if isinstance(codec.inner if isinstance(codec, Zstd) else codec, (FourBit, Int8)):
                    states[event.number] = _State(event.item, codec)
                    receiver.keep_encoded(event.number)
                else:
                    tensors[event.number] = GrowingMemory(event.item.total * event.item.dtype.itemsize)
                    receiver.land(event.number, tensors[event.number])


def _tensor(item: TensorItem, memory: GrowingMemory) -> torch.Tensor:
    return torch_front.FRONT.wrap(memory.data, item.dtype, item.shape)


def _quantized(value: Any) -> Quantized:
    if isinstance(value, Quantized):
        return value
    if value.quant_state is None:
        raise EncodeError("this Params4bit is not quantized yet; move it to its device first")
    return Quantized(value.data, value.quant_state)


def _codec(state: QuantState) -> Codec:
    """The codec whose codes a QuantState describes. Raises EncodeError."""
    if getattr(state, "packing_format_for_cpu", False):
        raise EncodeError("the weight was repacked by a CPU forward pass; capture its state dict before that")
    if state.quant_type not in _TABLES:
        raise EncodeError(f"unknown quant_type {state.quant_type!r}")
    if not np.array_equal(state.code.cpu().numpy(), _TABLES[state.quant_type]):
        raise EncodeError("the code table is not bitsandbytes' own; dequantize and send the tensor instead")
    wanted = torch.uint8 if state.nested else torch.float32
    if state.absmax.dtype != wanted:
        raise EncodeError(f"absmax is {state.absmax.dtype}, must be {wanted}")
    if state.nested and (state.quant_type is None or state.state2.blocksize != NESTED_BLOCKSIZE):
        raise EncodeError(f"only 4-bit absmax nested in blocks of {NESTED_BLOCKSIZE} can be sent")
    if state.quant_type is None:
        return Int8(blocksize=state.blocksize)
    return _FOUR_BIT[state.quant_type](blocksize=state.blocksize, double_quant=state.nested)


@dataclass(frozen=True, repr=False)
class _Ready(Codec):
    """Stands for `inner` on the wire; what it is given is the payload already."""

    inner: Codec

    name = "ready"

    def stages(self) -> tuple[tuple[int, ...], ...]:
        return self.inner.stages()

    def accepts(self, dtype: DType) -> bool:
        return self.inner.accepts(dtype)

    def block(self, dtype: DType) -> int:
        return self.inner.block(dtype)

    def sizes(self, count: int, dtype: DType) -> Sizes:
        return self.inner.sizes(count, dtype)

    def fit(self, budget: int, dtype: DType) -> int:
        return self.inner.fit(budget, dtype)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        return Encoded(data)

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        self.inner.decode(payload, extent, out, uncached)


class _Front(torch_front.TorchFront):
    """Sees a quantized tensor as the tensor it stands for, whose slices read as payloads."""

    def view(self, value: object) -> TensorView | None:
        if not isinstance(value, (Quantized, Params4bit)):
            return super().view(value)
        data, state = _quantized(value)
        if data.dtype != torch.uint8:
            raise EncodeError(f"quant_storage {data.dtype} cannot be sent; use torch.uint8")
        shape = tuple(data.shape if state.shape is None else state.shape)
        dtype = dtypes.BY_NAME.get(str(state.dtype).removeprefix("torch."))
        if dtype is None or not _codec(state).accepts(dtype):
            raise EncodeError(f"a quantized tensor of {state.dtype} cannot be sent")
        return TensorView(dtype, shape, _payload_reader(data, state, prod(shape)))


def _payload_reader(data: torch.Tensor, state: QuantState, numel: int) -> Any:
    codes = data.detach().cpu().contiguous().reshape(-1).numpy()
    absmax = state.absmax.detach().cpu().contiguous().numpy()
    per_byte = 1 if state.quant_type is None else 2
    if codes.size != -(-numel // per_byte) or absmax.size != -(-numel // state.blocksize):
        raise EncodeError("codes, absmax and shape of the quantized tensor do not match")
    nested, offset = np.empty(0, np.float32), np.empty(0, np.float32)
    if state.nested:
        nested = state.state2.absmax.detach().cpu().contiguous().numpy()
        offset = np.float32([float(state.offset)])
        if nested.dtype != np.float32 or nested.size != -(-absmax.size // NESTED_BLOCKSIZE):
            raise EncodeError("the nested absmax of the quantized tensor does not match its absmax")
    _check_scales(absmax, nested, offset)

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // state.blocksize, -(-stop // state.blocksize)
        parts = [absmax[first:last]]
        if state.nested:
            parts = [offset, nested[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)], *parts]
        parts.append(codes[start // per_byte : -(-stop // per_byte)])
        payload = np.concatenate([part.view(np.uint8) for part in parts])
        if per_byte == 2 and stop % 2:
            payload[-1] &= 0xF0  # bitsandbytes pads with the code of zero, the format with 0
        return payload

    return read


def _check_scales(absmax: np.ndarray, nested: np.ndarray, offset: np.ndarray) -> None:
    """Raise EncodeError for what a receiver would refuse: absmax that are negative, infinite or NaN."""
    try:
        if offset.size:
            unnest(np.concatenate([part.view(np.uint8) for part in (offset, nested, absmax)]), absmax.size)
        else:
            checked_absmax(absmax.view(np.uint8))
    except FormatError as error:
        raise EncodeError(f"{error.detail}: no quantizer made this state") from None


class _State:
    """The codes and absmax of one item, as they arrive."""

    def __init__(self, item: TensorItem, codec: Codec) -> None:
        self._item = item
        self._codec = codec
        self._inner = codec.inner if isinstance(codec, Zstd) else codec
        self._blocks = self._inner.blocks(item.total)
        self._per_byte = 2 if isinstance(self._inner, FourBit) else 1
        self._nested = isinstance(self._inner, FourBit) and self._inner.double_quant
        nested_blocks = -(-self._blocks // NESTED_BLOCKSIZE) if self._nested else 0
        self._codes = GrowingMemory(-(-item.total // self._per_byte))
        self._absmax = GrowingMemory(self._blocks * (1 if self._nested else 4))
        self._nested_absmax = GrowingMemory(nested_blocks * 4)
        self._offset: bytes | None = None

    def add(self, slice_: Payload) -> None:
        """Put a slice in its place."""
        start, count, payload = slice_.start, slice_.count, slice_.data
        if isinstance(self._codec, Zstd):
            payload = self._codec.decompress(payload, count, self._item.dtype)
        if isinstance(self._inner, FourBit):
            metadata, codes = self._inner.parts(payload, count, self._item.dtype)
        else:
            metadata, codes = split(
                np.frombuffer(payload, np.uint8), self._inner.sizes(count, self._item.dtype).metadata
            )
        _put(self._codes, start // self._per_byte, codes)
        first, blocks = start // self._inner.blocksize, self._inner.blocks(count)
        if not self._nested:
            _put(self._absmax, first * 4, checked_absmax(metadata).view(np.uint8))
            return
        unnest(metadata, blocks)  # bitsandbytes does this later, and would not look whether the result is finite
        head, absmax_codes = split(metadata, metadata.size - blocks)
        offset, nested_absmax = split(checked_absmax(head).view(np.uint8), 4)
        if self._offset not in (None, bytes(offset)):
            raise UnsupportedError("bitsandbytes has one offset a tensor, this one has several; use decode")
        self._offset = bytes(offset)
        _put(self._absmax, first, absmax_codes)
        _put(self._nested_absmax, first // NESTED_BLOCKSIZE * 4, nested_absmax)

    def quantized(self) -> Quantized:
        """The whole."""
        codes = torch.from_numpy(self._codes.data)
        dtype = getattr(torch, self._item.dtype.name)
        shape = torch.Size(self._item.shape)
        common = {"blocksize": self._inner.blocksize, "dtype": dtype}
        if self._per_byte == 1:
            absmax = torch.from_numpy(self._absmax.data.view(np.float32))
            return Quantized(codes.reshape(shape), QuantState(absmax, code=_table(None), **common))
        common |= {"shape": shape, "quant_type": self._inner.quant_type, "code": _table(self._inner.quant_type)}
        absmax = torch.from_numpy(self._absmax.data)
        if not self._nested:
            return Quantized(codes.reshape(-1, 1), QuantState(absmax.view(torch.float32), **common))
        state2 = QuantState(
            torch.from_numpy(self._nested_absmax.data.view(np.float32)),
            code=_table(None),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        offset = torch.tensor(np.frombuffer(self._offset or bytes(4), np.float32)[0])
        return Quantized(codes.reshape(-1, 1), QuantState(absmax, offset=offset, state2=state2, **common))


def _put(memory: GrowingMemory, start: int, data: np.ndarray) -> None:
    memory.region(start, start + data.size)[:] = data


def _table(quant_type: str | None) -> torch.Tensor:
    return torch.from_numpy(_TABLES[quant_type].copy())
