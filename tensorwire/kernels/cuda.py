"""The kernels for tensors on a CUDA device: bitsandbytes quantizes there, only the small result crosses.

The contract is that of `tensorwire.kernels`, except that the float side of each call (`values` of encoders, `out` of
decoders) is a 1-D torch tensor on the device and the other arrays are NumPy's, on the host. `uncached` is ignored.

Same bytes and values as on the CPU with four exceptions, which docs/codecs.md lists: bitsandbytes' device code takes an
approximate reciprocal, so values next to a threshold may get the neighbouring code; 4 NF4 thresholds lie one unit in
the last place apart; it decodes subnormal results to zero; the payload bits of a NaN may differ after a cast. What its
device code does to blocks of zeros and to NaN is corrected here.
"""

from functools import reduce
from typing import Any, Final

import numpy as np
import torch
from bitsandbytes import functional

from tensorwire.kernels import crc32c
from tensorwire.kernels.tables import INT8_CODE

# bitsandbytes has no types.
_QUANT_STATE: Final[Any] = functional.QuantState
_ZERO_NF4: Final = 0x77  # code 7 twice: 0.0 in both halves
_ZERO_INT8: Final = 127
_SMALLEST_SCALE: Final = torch.finfo(torch.bfloat16).tiny
_HALVES: Final = {np.dtype(np.uint16): torch.bfloat16, np.dtype(np.float16): torch.float16}


def cast(
    values: Any,
    out: Any,
    crc: np.ndarray | None = None,
    *,
    saturate: bool = False,
    uncached: bool | None = None,
) -> int:
    """Narrow a float32 device tensor into a host array, or widen a host array into a float32 device tensor."""
    if isinstance(out, torch.Tensor):
        out.copy_(_half_tensor(values).to(out.device).to(out.dtype))
        return 0
    dtype = _HALVES[out.dtype]
    narrow = values.to(dtype)
    overflowed = torch.isinf(narrow) & torch.isfinite(values)
    count = int(overflowed.sum())
    if count and saturate:
        limit = torch.finfo(dtype).max
        narrow = torch.where(overflowed, values.clamp(-limit, limit).to(dtype), narrow)
    _half_tensor(out).copy_(narrow)
    _sum(crc, out)
    return count


def blockwise_absmax(values: torch.Tensor, absmax: np.ndarray, *, blocksize: int) -> bool:
    """max|x| of each block."""
    torch.from_numpy(absmax).copy_(_absmax(values, blocksize))
    return bool(np.isfinite(absmax).all())


def quantize_4bit(
    values: torch.Tensor,
    codes: np.ndarray,
    absmax: np.ndarray,
    crc: np.ndarray | None = None,
    *,
    blocksize: int,
    quant_type: str,
) -> bool:
    """nf4 or fp4 codes and absmax."""
    if not torch.isfinite(values).all():
        return False
    packed, state = functional.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    torch.from_numpy(codes).copy_(packed.reshape(-1))
    torch.from_numpy(absmax).copy_(state.absmax)
    fill = _ZERO_NF4 if quant_type == "nf4" else 0
    for block in np.flatnonzero(absmax == 0):
        codes[block * blocksize // 2 : (block + 1) * blocksize // 2] = fill
    if values.numel() % 2:
        codes[-1] &= 0xF0
    _sum(crc, absmax, codes)
    return True


def dequantize_4bit(
    codes: np.ndarray,
    absmax: np.ndarray,
    out: torch.Tensor,
    *,
    blocksize: int,
    quant_type: str,
    uncached: bool | None = None,
) -> None:
    """table[code] * absmax, rounded to the dtype of `out`, which saturates."""
    state = _QUANT_STATE(_to(absmax, out), shape=out.shape, dtype=out.dtype, blocksize=blocksize, quant_type=quant_type)
    _put(functional.dequantize_4bit(_to(codes, out).reshape(-1, 1), state).reshape(-1), out)


def quantize_int8(
    values: torch.Tensor, codes: np.ndarray, absmax: np.ndarray, crc: np.ndarray | None = None, *, blocksize: int
) -> bool:
    """Dynamic 8-bit codes and absmax."""
    if not torch.isfinite(values).all():
        return False
    quantized, state = functional.quantize_blockwise(values, code=_to(INT8_CODE, values), blocksize=blocksize)
    torch.from_numpy(codes).copy_(quantized)
    torch.from_numpy(absmax).copy_(state.absmax)
    for block in np.flatnonzero(absmax == 0):
        codes[block * blocksize : (block + 1) * blocksize] = _ZERO_INT8
    _sum(crc, absmax, codes)
    return True


def dequantize_int8(
    codes: np.ndarray, absmax: np.ndarray, out: torch.Tensor, *, blocksize: int, uncached: bool | None = None
) -> None:
    """table[code] * absmax, rounded to the dtype of `out`, which saturates."""
    state = _QUANT_STATE(_to(absmax, out), code=_to(INT8_CODE, out), blocksize=blocksize, dtype=out.dtype)
    _put(functional.dequantize_blockwise(_to(codes, out), state), out)


def quantize_linear(
    values: torch.Tensor, codes: np.ndarray, scales: np.ndarray, crc: np.ndarray | None = None, *, blocksize: int
) -> bool:
    """Symmetric codes and bfloat16 scales; plain torch, whose device arithmetic is IEEE's."""
    if not torch.isfinite(values).all():
        return False
    scale = (_absmax(values, blocksize) / 127).to(torch.bfloat16)
    scale = torch.where(scale < _SMALLEST_SCALE, torch.zeros_like(scale), scale)
    inverse = torch.where(scale == 0, torch.zeros_like(scale, dtype=torch.float32), 1 / scale.float())
    scaled = values.float() * inverse.repeat_interleave(blocksize)[: values.numel()]
    torch.from_numpy(codes).copy_(scaled.round().clamp(-127, 127).to(torch.int8))
    _half_tensor(scales).copy_(scale)
    _sum(crc, scales, codes)
    return True


def dequantize_linear(
    codes: np.ndarray, scales: np.ndarray, out: torch.Tensor, *, blocksize: int, uncached: bool | None = None
) -> bool:
    """Code * scale, rounded to the dtype of `out`, which saturates; whether no code is -128."""
    scale = _half_tensor(scales).to(out.device).float().repeat_interleave(blocksize)[: out.numel()]
    _put(_to(codes, out).float() * scale, out)
    return not codes.size or int(codes.min()) > -128


def _sum(crc: np.ndarray | None, *outputs: np.ndarray) -> None:
    if crc is not None:
        crc[0] = reduce(lambda seed, output: crc32c(output, seed), outputs, 0)


def _absmax(values: torch.Tensor, blocksize: int) -> torch.Tensor:
    padding = -values.numel() % blocksize
    return torch.nn.functional.pad(values.float().abs(), (0, padding)).reshape(-1, blocksize).amax(1)


def _put(decoded: torch.Tensor, out: torch.Tensor) -> None:
    """Round to the dtype of `out`, saturated: clamped before the rounding or after it, that is the same."""
    largest = torch.finfo(out.dtype).max
    out.copy_(decoded.clamp(-largest, largest))


def _to(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return _tensor(array).to(like.device)


def _half_tensor(array: np.ndarray) -> torch.Tensor:
    """A float16 array, or uint16 bfloat16 bits, as a torch tensor: over the same memory, where it may be written to."""
    return _tensor(array.view(np.int16)).view(_HALVES[array.dtype])


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor; torch warns of read-only memory, which is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
