"""Quantized tensors to and from bitsandbytes without dequantizing: codes and absmax are passed unchanged.

for name, value in bitsandbytes.decode(transport.receive()):
    if isinstance(value, Quantized):                     # nf4, fp4 and int8 items
        weight = functional.dequantize_4bit(value.data, value.state)

transport.send(bitsandbytes.encode({"weight": Quantized(data, state)}))   # also takes Params4bit
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit

from tensorwire import dtypes, streams
from tensorwire import torch as torch_front
from tensorwire.codecs import (
    FP4,
    NESTED_BLOCKSIZE,
    NF4,
    Codec,
    Int8,
    QuantizedState,
    Readymade,
    TableQuantizer,
    checked_absmax,
    from_stages,
    parse,
    unnest,
)
from tensorwire.errors import EncodeError, FormatError, SchemaError, UnsupportedError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory import GrowingMemory
from tensorwire.streams import Completed, ItemStart, Payload, Receiver
from tensorwire.tensor import AnyFront, Extent, TensorView
from tensorwire.wire import FileItem, TensorItem, ValueItem

_QUANT_STATE: Final[Any] = QuantState  # bitsandbytes has no types
_NO_CODES: Final = np.empty(0, np.uint8)
_TABLES: Final = {row.quant_type: row.table for row in (NF4, FP4, Int8)}


class Quantized(NamedTuple):
    """A tensor as bitsandbytes holds it: packed codes (uint8) and their state."""

    data: torch.Tensor
    state: QuantState


def encode(
    obj: Any,
    *,
    codec: streams.CodecChoice = "raw",
    frame_size: int = streams.FRAME_SIZE,
    limits: Limits = DEFAULT,
    report: streams.Report | None = None,
) -> Iterator[Any]:
    """Like `tensorwire.torch.encode`; `Quantized` and quantized `Params4bit` are sent with their existing codes.

    Raises EncodeError for a state that bitsandbytes itself does not make: another code table, a block size that the
    format does not have, or weights repacked by a CPU forward pass (take the state dict before it).
    """
    return streams.encode(obj, AnyFront(_Front()), codec=codec, frame_size=frame_size, limits=limits, report=report)


def decode(source: Any, *, limits: Limits = DEFAULT) -> Iterator[tuple[str, Any]]:
    """(name, value) of each tensor of a stream: `Quantized` on the CPU for nf4, fp4 and int8 items, else a tensor.

    Raises what `tensorwire.decode` raises, and SchemaError for streams with plain values in them.
    """
    quantized: dict[int, _Collected] = {}
    tensors: dict[int, GrowingMemory] = {}
    with Receiver(limits) as receiver:
        for event in receiver.events(source):
            if isinstance(event, Payload):
                quantized[event.number].add(event)
            elif isinstance(event, Completed) and isinstance(event.item, TensorItem):
                collected = quantized.pop(event.number, None)
                value = collected.quantized() if collected else _tensor(event.item, tensors.pop(event.number))
                for item in (event.item, *event.aliases):
                    yield item.name, value
            elif isinstance(event, ItemStart) and isinstance(event.item, (ValueItem, FileItem)):
                raise SchemaError("only tensors can be handed to bitsandbytes; receive this stream with decode")
            elif isinstance(event, ItemStart) and isinstance(event.item, TensorItem):
                codec = from_stages(event.item.codec)
                if isinstance(codec.packer, TableQuantizer) and not codec.transforms:
                    quantized[event.number] = _Collected(event.item, codec, codec.packer)
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
    if state.code.dtype != torch.float32 or not np.array_equal(_Elements(state.code)[:], _TABLES[state.quant_type]):
        raise EncodeError("the code table is not bitsandbytes' own; dequantize and send the tensor instead")
    wanted = torch.uint8 if state.nested else torch.float32
    if state.absmax.dtype != wanted:
        raise EncodeError(f"absmax is {state.absmax.dtype}, must be {wanted}")
    if state.nested and (state.quant_type is None or state.state2.blocksize != NESTED_BLOCKSIZE):
        raise EncodeError(f"only 4-bit absmax nested in blocks of {NESTED_BLOCKSIZE} can be sent")
    if state.quant_type is None:
        return parse(Int8(blocksize=state.blocksize))
    four_bit = {"nf4": NF4, "fp4": FP4}[state.quant_type]
    return parse(four_bit(blocksize=state.blocksize, double_quant=state.nested))


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
        codec = _codec(state)
        if dtype is None or not codec.accepts(dtype):
            raise EncodeError(f"a quantized tensor of {state.dtype} cannot be sent")
        return TensorView(dtype, shape, _payload_reader(data, state, prod(shape)), codec=Readymade(codec.pipeline))


def _payload_reader(data: torch.Tensor, state: QuantState, numel: int) -> Callable[[int, int], Any]:
    codes = _Elements(data)
    absmax = _Elements(state.absmax)
    per_byte = 1 if state.quant_type is None else 2
    if codes.size != -(-numel // per_byte) or absmax.size != -(-numel // state.blocksize):
        raise EncodeError("codes, absmax and shape of the quantized tensor do not match")
    nested = offset = None
    if state.nested:
        nested = _Elements(state.state2.absmax)
        offset = np.array([float(state.offset)], np.float32)
        if nested.dtype != dtypes.FLOAT32 or nested.size != -(-absmax.size // NESTED_BLOCKSIZE):
            raise EncodeError("the nested absmax of the quantized tensor does not match its absmax")
    _check_scales(QuantizedState(_NO_CODES, absmax[:], None if nested is None else nested[:], offset))

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        first, last = start // state.blocksize, -(-stop // state.blocksize)
        part = QuantizedState(
            codes[start // per_byte : -(-stop // per_byte)],
            absmax[first:last],
            None if nested is None else nested[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)],
            offset,
        )
        payload = part.pack()
        if per_byte == 2 and stop % 2:
            payload[-1] &= 0xF0  # bitsandbytes pads with the code of zero, the format with 0
        return payload

    return read


class _Elements:
    """The elements of a uint8 or float32 tensor on any device, in one dimension; only a slice of them is fetched."""

    def __init__(self, tensor: torch.Tensor) -> None:
        view = torch_front.FRONT.view(tensor.detach())
        assert view is not None
        self._view = view
        self.dtype = view.dtype
        self.size = view.numel

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        start, stop, _ = part.indices(self.size)
        data = np.frombuffer(self._view.read(start, stop), np.uint8)
        return data.view(np.float32) if self.dtype == dtypes.FLOAT32 else data


def _check_scales(state: QuantizedState) -> None:
    """Raise EncodeError for what a receiver would refuse: absmax that are negative, infinite or NaN."""
    try:
        if state.nested_absmax is None or state.offset is None:
            checked_absmax(state.absmax.view(np.uint8))
        else:
            for scales in (state.offset, state.nested_absmax):
                checked_absmax(scales.view(np.uint8))
    except FormatError as error:
        raise EncodeError(f"{error.detail}: no quantizer made this state") from None


class _Collected:
    """The codes and absmax of one item, as they arrive."""

    def __init__(self, item: TensorItem, codec: Codec, packer: TableQuantizer) -> None:
        self._item = item
        self._codec = codec
        self._packer = packer
        self._blocks = packer.blocks(item.total)
        self._nested = len(packer.tables) > 1
        nested_blocks = -(-self._blocks // NESTED_BLOCKSIZE) if self._nested else 0
        self._codes = GrowingMemory(-(-item.total // packer.codes_per_byte))
        self._absmax = GrowingMemory(self._blocks * (1 if self._nested else 4))
        self._nested_absmax = GrowingMemory(nested_blocks * 4)
        self._offset: bytes | None = None

    def add(self, payload: Payload) -> None:
        """Put a slice in its place."""
        start, count = payload.start, payload.count
        extent = Extent(self._item.dtype, self._item.shape, start, count)
        state = self._packer.state(self._codec.unpack(payload.data, extent), count)
        self._check_range(unnest(state) if self._nested else state.absmax)
        first = start // self._packer.blocksize
        _put(self._codes, start // self._packer.codes_per_byte, state.codes)
        _put(self._absmax, first * state.absmax.itemsize, state.absmax)
        if state.nested_absmax is None or state.offset is None:
            return
        if self._offset not in (None, state.offset.tobytes()):
            raise UnsupportedError("bitsandbytes has one offset a tensor, this one has several; use decode")
        self._offset = state.offset.tobytes()
        _put(self._nested_absmax, first // NESTED_BLOCKSIZE * 4, state.nested_absmax)

    def _check_range(self, absmax: npt.NDArray[np.float32]) -> None:
        """Raise UnsupportedError where bitsandbytes, which does not saturate, would make infinities of the values."""
        most = absmax.max(initial=0)
        largest = torch.finfo(getattr(torch, self._item.dtype.name)).max
        if most > largest or (self._nested and most == np.finfo(np.float32).max):
            raise UnsupportedError(
                f"bitsandbytes would make infinities of values near the largest {self._item.dtype}; use decode",
                item=self._item.name,
            )

    def quantized(self) -> Quantized:
        """The whole, in tensors that gradients can flow through, whatever the mode of the caller."""
        with torch.inference_mode(False):
            return self._quantized()

    def _quantized(self) -> Quantized:
        codes = torch.from_numpy(self._codes.data)
        dtype = getattr(torch, self._item.dtype.name)
        shape = torch.Size(self._item.shape)
        common = {"blocksize": self._packer.blocksize, "dtype": dtype}
        if self._packer.quant_type is None:
            absmax = torch.from_numpy(self._absmax.data.view(np.float32))
            return Quantized(codes.reshape(shape), _QUANT_STATE(absmax, code=_table(None), **common))
        common |= {"shape": shape, "quant_type": self._packer.quant_type, "code": _table(self._packer.quant_type)}
        absmax = torch.from_numpy(self._absmax.data)
        if not self._nested:
            return Quantized(codes.reshape(-1, 1), _QUANT_STATE(absmax.view(torch.float32), **common))
        state2 = _QUANT_STATE(
            torch.from_numpy(self._nested_absmax.data.view(np.float32)),
            code=_table(None),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        offset = torch.frombuffer(bytearray(self._offset or bytes(4)), dtype=torch.float32).reshape(())
        return Quantized(codes.reshape(-1, 1), _QUANT_STATE(absmax, offset=offset, state2=state2, **common))


def _put(memory: GrowingMemory, start: int, data: npt.NDArray[Any]) -> None:
    memory.region(start, start + data.nbytes)[:] = data.view(np.uint8)


def _table(quant_type: str | None) -> torch.Tensor:
    return torch.from_numpy(_TABLES[quant_type].copy())
