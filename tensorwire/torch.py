"""torch tensors to and from streams and `.tw` files, in the style of `safetensors.torch`.

Tensors come back on the CPU, contiguous, without gradients, whatever torch's default device, dtype or mode. Tensors of
one storage, shape and layout are tied. NumPy arrays and scalars can be sent too and come back as tensors.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tensorwire import dtypes
from tensorwire.api import Api
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, UnsupportedError
from tensorwire.memory.strided import pieces, reader
from tensorwire.tensor import AnyFront, ByteArray, Front, TensorView, attributes

# Every wire dtype that this torch has; looked up by our own names, never by a peer's.
_TORCH: Final = {
    dtype: getattr(torch, dtype.name)
    for dtype in dtypes.ALL
    if isinstance(getattr(torch, dtype.name, None), torch.dtype)
}
_OURS: Final = {theirs: ours for ours, theirs in _TORCH.items()}
# Types of the same width, used for raw bits.
_BITS: Final = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}
_FLOATS: Final = (dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.FLOAT64)
# Types that carry nothing but their memory.
_WHOLE: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

_Read = Callable[[int, int], ByteArray]
_DeviceRead = Callable[[int, int], torch.Tensor]


class TorchFront(Front):
    """`tensorwire.tensor.Front` for torch tensors, received on `device`."""

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self._device = device

    def on(self, device: Any) -> Front:
        """A front whose tensors are received on `device`. Raises EncodeError for a device that is not there."""
        if device is None:
            return self
        try:
            torch.empty(0, device=device)  # it has to be there, not only to have a name
            return TorchFront(torch.device(device))
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            raise EncodeError(f"device={device!r}: {str(error).partition(chr(10))[0]}") from None

    def view(self, value: object) -> TensorView | None:
        """A tensor, on any device, as a view."""
        if not isinstance(value, torch.Tensor):
            return None
        try:
            _check(value)
            return _view(value)
        except EncodeError:
            raise
        except Exception as error:  # torch raises many kinds for tensors without readable memory
            raise _unreadable(value, error) from error

    def describe(self, value: object) -> TensorView | None:
        """A tensor, possibly a fake one or one on the meta device, which have no values."""
        if not isinstance(value, torch.Tensor) or not _is_skeleton(value):
            return self.view(value)
        _check_dense(value)
        # It has no address, but it has a storage.
        place = (value.untyped_storage()._cdata, value.storage_offset())
        dtype, shape = _OURS[value.dtype], tuple(value.shape)
        return TensorView(dtype, shape, _no_values, identity=("meta", *place, shape, value.stride(), dtype.number))

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over `data`, or a copy of it on the front's device."""
        if dtype not in _TORCH:
            raise UnsupportedError(f"this torch ({torch.__version__}) has no {dtype}")
        if torch.is_inference_mode_enabled():  # a tensor made in this mode can never take part in autograd
            with torch.inference_mode(False):
                return self._placed(_tensor(data, _TORCH[dtype], shape))
        return self._placed(_tensor(data, _TORCH[dtype], shape))

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._device is None else tensor.to(self._device)

    def target(self, value: object) -> memoryview:
        """The bytes of a contiguous tensor on the CPU."""
        if not isinstance(value, torch.Tensor) or not value.is_contiguous() or value.device.type != "cpu":
            raise EncodeError("into= takes contiguous tensors on the CPU or a CUDA device")
        if value.is_conj() or value.is_neg():
            raise EncodeError("into= cannot write through a conjugate or negative view")
        self.view(value)  # refuses a tensor that extends beyond its storage
        if not value.numel():
            return memoryview(bytearray())
        return _array(value, value.untyped_storage()).view(np.uint8).data

    def device_target(self, value: object) -> torch.Tensor | None:
        """A 1-D view of a contiguous tensor on a CUDA device."""
        if not isinstance(value, torch.Tensor) or not value.is_cuda or not value.is_contiguous() or value.is_conj():
            return None
        self.view(value)
        return value.detach().reshape(-1)


def _tensor(data: ByteArray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        if not prod(shape):
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
    except Exception as error:  # raised in modes in which torch creates no tensors with values
        raise UnsupportedError(
            f"torch cannot create a tensor here ({_said(error)}); leave its fake and tracing modes"
        ) from error


def _is_skeleton(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor" or (tensor.device.type == "meta" and type(tensor) in _WHOLE)


def _unreadable(tensor: torch.Tensor, error: Exception) -> EncodeError:
    """An error of this library for a tensor whose memory torch cannot give."""
    return EncodeError(
        f"{_kind(tensor)} has no memory that could be sent ({_said(error)}); send a plain tensor made of its values, "
        "outside of torch.func transforms and tracing"
    )


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _kind(tensor: torch.Tensor) -> str:
    return f"a {type(tensor).__module__}.{type(tensor).__qualname__}"


def _check(tensor: torch.Tensor) -> None:
    """Raise EncodeError, with the remedy, unless the tensor is dense, strided memory and nothing more."""
    if type(tensor) not in _WHOLE:
        _check_subclass(tensor)
    _check_dense(tensor)
    if tensor.device.type == "meta":
        _no_values()


def _no_values(*_: int) -> ByteArray:
    raise EncodeError("a tensor on the meta device has no values")


def _check_dense(tensor: torch.Tensor) -> None:
    if tensor.is_quantized:
        raise EncodeError("a quantized torch tensor cannot be sent; use .dequantize() or .int_repr()")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise EncodeError(f"a tensor of layout {tensor.layout} cannot be sent; use .to_dense()")
    if tensor.dtype not in _OURS:
        raise EncodeError(f"{tensor.dtype} cannot be sent; convert it with .to() first")


def _check_subclass(tensor: torch.Tensor) -> None:
    """Raise EncodeError for a tensor whose subclass carries more than its memory."""
    kind = type(tensor)
    if hasattr(tensor, "full_tensor"):
        raise EncodeError("a DTensor cannot be sent; use .full_tensor()")
    if kind.__name__ in ("FakeTensor", "FunctionalTensor"):
        raise EncodeError("a fake tensor has no values")
    if torch.nn.parameter.is_lazy(tensor):
        raise EncodeError(f"{_kind(tensor)} has no shape yet; run its module once before sending it")
    if kind.__module__.startswith("bitsandbytes"):
        raise EncodeError(
            f"{_kind(tensor)} holds only codes without their quantization state; send the state_dict() of its module, "
            "or use tensorwire.integrations.bitsandbytes.encode for a Params4bit"
        )
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise EncodeError(
            f"{_kind(tensor)} is made of other tensors, which would be lost; send those, or a plain tensor of its "
            "values (.dequantize(), .to_dense() or .get_data(), whichever the class has)"
        )
    if extra := attributes(tensor):
        raise EncodeError(
            f"{_kind(tensor)} carries more than its memory ({', '.join(extra)}), which would be lost; send its parts, "
            "or .as_subclass(torch.Tensor) of it for its memory alone"
        )


def _view(tensor: torch.Tensor) -> TensorView:
    dtype, shape, steps = _OURS[tensor.dtype], tuple(tensor.shape), tensor.stride()
    if not tensor.numel():
        return TensorView(dtype, shape, lambda start, stop: np.empty(0, np.uint8))
    flips = (tensor.is_conj(), tensor.is_neg())
    if any(flips) and not _flips(dtype):
        tensor, flips = tensor.detach().resolve_neg(), (False, False)
    storage, itemsize = tensor.untyped_storage(), dtype.itemsize
    address, base, held = tensor.data_ptr(), storage.data_ptr(), storage.nbytes()
    needed = int(tensor.storage_offset()) + 1
    for size, step in zip(shape, steps, strict=True):
        needed += (size - 1) * step
    needed *= itemsize
    if not address or held < needed:
        raise EncodeError(
            f"the tensor's storage holds {held if address else 0} of the {needed} bytes that the tensor needs: it was "
            "freed or resized; gather the full parameters first (FSDP: summon_full_params), or .clone() the tensor"
        )

    device = tensor.device
    if device.type == "cpu":
        fix = _flip(dtype, *flips) if any(flips) else None
        read: _Read = _HostReader(storage, base, needed, reader(_array(tensor, storage), fix))
        strides = steps if itemsize == 1 else tuple([step * itemsize for step in steps])
        return TensorView(dtype, shape, read, None, ("cpu", address, shape, strides, dtype.number, *flips))
    read, device_read = _device_readers(tensor, _Storage(storage, base, needed).check)
    place = (device.type, device.index)
    return TensorView(dtype, shape, read, device_read, (*place, address, shape, steps, dtype.number, *flips))


class _Storage:
    """Storage that is checked before each read: sharded training may free it between two slices.

    (One object per tensor rather than closures: there may be 500,000 of them.)
    """

    __slots__ = ("_address", "_needed", "_storage")

    def __init__(self, storage: torch.UntypedStorage, address: int, needed: int) -> None:
        self._storage = storage
        self._address = address
        self._needed = needed

    def check(self) -> None:
        """Raise EncodeError unless the storage is still at its address and long enough."""
        if self._storage.data_ptr() != self._address or self._storage.nbytes() < self._needed:
            raise EncodeError("the tensor's storage was freed or resized while it was being sent")


class _HostReader(_Storage):
    """`TensorView.read` of a tensor on the CPU."""

    __slots__ = ("_read",)

    def __init__(self, storage: torch.UntypedStorage, address: int, needed: int, read: _Read) -> None:
        super().__init__(storage, address, needed)
        self._read = read

    def __call__(self, start: int, stop: int) -> ByteArray:
        self.check()
        return self._read(start, stop)


class _Memory:
    """The elements of a tensor on the CPU, through NumPy's array interface.

    `Tensor.numpy()` would do too, but makes the storage non-resizable for ever, and sharded training resizes it.
    """

    __slots__ = ("__array_interface__", "_storage")

    def __init__(self, interface: dict[str, object], storage: torch.UntypedStorage) -> None:
        self.__array_interface__ = interface
        self._storage = storage


def _array(tensor: torch.Tensor, storage: torch.UntypedStorage) -> npt.NDArray[Any]:
    """The elements of a tensor on the CPU, as bits, without a copy: in one dimension if they are contiguous."""
    itemsize = tensor.element_size()
    interface = {"version": 3, "typestr": _BITS[itemsize], "data": (tensor.data_ptr(), False)}
    if tensor.is_contiguous():
        interface["shape"] = (tensor.numel(),)
    else:
        interface["shape"] = tuple(tensor.shape)
        interface["strides"] = tuple([step * itemsize for step in tensor.stride()])
    return np.asarray(_Memory(interface, storage))


def _flips(dtype: DType) -> bool:
    """Whether conjugation and negation of this dtype flip sign bits."""
    return dtype in _FLOATS or dtype.parts == 2


def _flip(dtype: DType, conj: bool, neg: bool) -> Callable[[npt.NDArray[Any]], None]:
    """A function that turns a slice of bits into its conjugate, its negative or both."""
    bits = np.dtype(f"u{dtype.part_size}").type
    sign = bits(1 << (bits().itemsize * 8 - 1))

    def fix(part: npt.NDArray[Any]) -> None:
        numbers = part.view(bits)
        if conj:
            numbers[1::2] ^= sign
        if neg:
            numbers ^= sign

    return fix


def _device_readers(tensor: torch.Tensor, check: Callable[[], None]) -> tuple[_Read, _DeviceRead]:
    """`TensorView.read` and `device_read`: only a slice is ever copied, on the device as on the host."""
    tensor = tensor.detach()  # keep the copies out of autograd
    flat = tensor.reshape(-1) if tensor.is_contiguous() else None

    def device_read(start: int, stop: int) -> torch.Tensor:
        check()
        if flat is not None:
            return flat[start:stop].resolve_conj().resolve_neg()
        out = torch.empty(stop - start, dtype=tensor.dtype, device=tensor.device)
        for place, index, shape in pieces(tuple(tensor.shape), start, stop):
            out[place : place + prod(shape)].view(shape).copy_(tensor[index])
        return out

    def read(start: int, stop: int) -> ByteArray:
        return device_read(start, stop).view(torch.uint8).cpu().numpy()

    return read, device_read


FRONT: Final = TorchFront()
_api: Final = Api(AnyFront(FRONT))
encode = _api.encode
encode_async = _api.encode_async
encoded_size = _api.encoded_size
decode = _api.decode
decode_async = _api.decode_async
decoder = _api.decoder
dumps = _api.dumps
loads = _api.loads
save_file = _api.save_file
load_file = _api.load_file
open_file = _api.open_file
schema = _api.schema
digest = _api.digest
apply = _api.apply
