"""torch tensors to and from streams and `.tw` files, in the manner of `safetensors.torch`.

Tensors come back on the CPU, contiguous, without gradients. Tensors of one storage, shape and layout are tied.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Final

import numpy as np
import torch

from tensorwire import dtypes
from tensorwire.api import Api
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, UnsupportedError
from tensorwire.tensor import ByteArray, Front, TensorView, reader

# Every dtype of the wire that this torch has; looked up by our own names, never by a peer's.
_TORCH: Final = {
    dtype: getattr(torch, dtype.name)
    for dtype in dtypes.ALL
    if isinstance(getattr(torch, dtype.name, None), torch.dtype)
}
_OURS: Final = {theirs: ours for ours, theirs in _TORCH.items()}
# Integers of the same width, through which NumPy can see any layout of any dtype.
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class TorchFront(Front):
    """`tensorwire.tensor.Front` for torch tensors, which come on `device`."""

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self._device = device

    def on(self, device: Any) -> Front:
        """Tensors come on `device`. Raises EncodeError for what torch does not know as one."""
        if device is None:
            return self
        try:
            return TorchFront(torch.device(device))
        except (RuntimeError, TypeError) as error:
            raise EncodeError(f"device={device!r}: {str(error).partition(chr(10))[0]}") from None

    def view(self, value: object) -> TensorView | None:
        """A tensor, on any device, as a view."""
        if not isinstance(value, torch.Tensor):
            return None
        tensor = _plain(value)
        dtype = _OURS[tensor.dtype]
        identity = None
        if tensor.numel() and tensor.device.type != "meta":
            identity = (
                str(tensor.device),
                tensor.data_ptr(),
                tuple(tensor.shape),
                tensor.stride(),
                dtype.number,
            )
        read, device_read = _readers(tensor, dtype)
        return TensorView(dtype, tuple(tensor.shape), read, device_read, identity)

    def wrap(self, data: ByteArray, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over `data`, or a copy of it on the front's device."""
        if dtype not in _TORCH:
            raise UnsupportedError(f"this torch ({torch.__version__}) has no {dtype}")
        if not prod(shape):
            return torch.empty(shape, dtype=_TORCH[dtype], device=self._device or "cpu")
        tensor = torch.frombuffer(data, dtype=_TORCH[dtype]).reshape(shape)
        return tensor if self._device is None else tensor.to(self._device)

    def target(self, value: object) -> memoryview:
        """The bytes of a contiguous tensor on the CPU."""
        if not isinstance(value, torch.Tensor) or not value.is_contiguous() or value.device.type != "cpu":
            raise EncodeError("into= takes contiguous tensors on the CPU or a CUDA device")
        if value.is_conj() or value.is_neg():
            raise EncodeError("into= cannot write through a conjugate or negative view")
        array = _plain(value).view(_BITS[value.element_size()]).numpy()
        return array.reshape(-1).view(np.uint8).data

    def device_target(self, value: object) -> torch.Tensor | None:
        """A contiguous tensor on a CUDA device as a 1-D view of it."""
        if not isinstance(value, torch.Tensor) or not value.is_cuda or not value.is_contiguous() or value.is_conj():
            return None
        return _plain(value).reshape(-1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as dense strided memory, detached. Raises EncodeError with the remedy for every other kind."""
    if tensor.is_quantized:
        raise EncodeError("a quantized torch tensor cannot be sent; use .dequantize() or .int_repr()")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise EncodeError(f"a tensor of layout {tensor.layout} cannot be sent; use .to_dense()")
    if tensor.device.type == "meta":
        raise EncodeError("a tensor on the meta device has no values")
    if hasattr(tensor, "full_tensor"):
        raise EncodeError("a DTensor cannot be sent; use .full_tensor()")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and _is_fake(tensor):
        raise EncodeError("a fake tensor has no values")
    if tensor.dtype not in _OURS:
        raise EncodeError(f"{tensor.dtype} cannot be sent; convert with .to() first")
    return tensor.detach().resolve_conj().resolve_neg()


def _is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


_Read = Callable[[int, int], ByteArray]
_DeviceRead = Callable[[int, int], torch.Tensor]


def _readers(tensor: torch.Tensor, dtype: DType) -> tuple[_Read, _DeviceRead | None]:
    """`TensorView.read` and `device_read`."""
    if tensor.device.type == "cpu":
        return reader(tensor.view(_BITS[dtype.itemsize]).numpy(), dtype.itemsize), None
    flat = tensor.contiguous().reshape(-1)

    def read(start: int, stop: int) -> ByteArray:
        return flat[start:stop].view(torch.uint8).cpu().numpy()

    return read, lambda start, stop: flat[start:stop]


FRONT: Final = TorchFront()
_api: Final = Api(FRONT)
encode = _api.encode
encode_async = _api.encode_async
encoded_size = _api.encoded_size
decode = _api.decode
decode_async = _api.decode_async
dumps = _api.dumps
loads = _api.loads
save_file = _api.save_file
load_file = _api.load_file
open_file = _api.open_file
schema = _api.schema
