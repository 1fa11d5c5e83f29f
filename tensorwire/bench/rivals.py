"""The same work done by what a user would otherwise pick: torch's casts, bitsandbytes, zstd, zlib.

`contenders(...)` gives one group a rival; a rival that is not installed gives none and a note. bitsandbytes
is measured twice: through its public functions, which allocate what they return (`fresh`), and where its CPU
library has the kernel, by calling that with warm buffers (`warm`), so that kernels are compared with kernels.
"""

import ctypes
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from tensorwire.bench.models import Weights
from tensorwire.bench.options import Note
from tensorwire.codecs import Codec

# Packers by name, and the library that does the same.
_TORCH: Final = frozenset({"fp16", "bf16"})
_BITSANDBYTES: Final = frozenset({"int8", "nf4", "fp4"})


@dataclass(frozen=True)
class Contender:
    """One thing to be timed: `run()` processes the whole input once. `output`: warm, fresh or none."""

    codec: str
    op: str
    impl: str
    output: str
    run: Callable[[], Any]


def import_rivals(codecs: list[Codec], threads: int, note: Note) -> None:
    """Import what `contenders` will need, with its thread pools set to `threads`."""
    if not any(codec.packer.name in _TORCH | _BITSANDBYTES for codec in codecs):
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        note("torch and bitsandbytes left out: not installed")
        return
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what its import advises on is not used here
        import bitsandbytes  # noqa: F401
    except ImportError:
        note("bitsandbytes left out: not installed")


def contenders(codec: Codec, values: Weights, out: Weights, threads: int) -> Iterator[Contender]:
    """The rivals of one codec. `values`: the fp32 input; `out`: warm memory of its size."""
    name, parameters = codec.packer.name, codec.packer.values()
    if [stage.name for stage in codec.pipeline] == ["raw", "zstd"]:
        yield from _zstd(codec, values, threads)
    elif codec.compressors or codec.transforms:
        return
    elif name in _TORCH:
        yield from _torch(codec, values, out)
    elif name == "int8":
        yield from _bitsandbytes_int8(repr(codec), parameters, values, out)
    elif name in _BITSANDBYTES:
        yield from _bitsandbytes_4bit(repr(codec), name, parameters, values, out)


def crc32(values: Weights) -> Contender:
    """Zlib's checksum, the one Python users have at hand."""
    return Contender("crc32c", "checksum", "zlib.crc32", "none", lambda: zlib.crc32(values.data))


def _torch(codec: Codec, values: Weights, out: Weights) -> Iterator[Contender]:
    try:
        import torch
    except ImportError:
        return
    name = repr(codec)
    wide, wide_out = torch.from_numpy(values), torch.from_numpy(out)
    narrow = wide.to(torch.float16 if codec.packer.name == "fp16" else torch.bfloat16)
    narrow_out = torch.zeros_like(narrow)
    yield Contender(name, "encode", "torch", "warm", lambda: narrow_out.copy_(wide))
    yield Contender(name, "encode", "torch", "fresh", lambda: wide.to(narrow.dtype))
    yield Contender(name, "decode", "torch", "warm", lambda: wide_out.copy_(narrow))
    yield Contender(name, "decode", "torch", "fresh", lambda: narrow.to(torch.float32))


def _bitsandbytes_4bit(
    name: str, quant_type: str, parameters: dict[str, Any], values: Weights, out: Weights
) -> Iterator[Contender]:
    try:
        import bitsandbytes.functional as bnb
        import torch
    except ImportError:
        return
    wide, blocksize, nested = torch.from_numpy(values), parameters["blocksize"], parameters["double_quant"]

    def encode() -> Any:
        return bnb.quantize_4bit(wide, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)

    codes, state = encode()
    yield Contender(name, "encode", "bitsandbytes", "fresh", encode)
    yield Contender(name, "decode", "bitsandbytes", "fresh", lambda: bnb.dequantize_4bit(codes, state))
    kernel = _kernel(f"cdequantize_blockwise_cpu_{quant_type}_fp32")
    if kernel is not None and not nested:
        sizes = (ctypes.c_longlong(blocksize), ctypes.c_longlong(1), ctypes.c_longlong(values.size))
        pointers = _pointers(codes, state.absmax, torch.from_numpy(out))
        yield Contender(name, "decode", "bitsandbytes", "warm", lambda: kernel(*pointers, *sizes))


def _bitsandbytes_int8(name: str, parameters: dict[str, Any], values: Weights, out: Weights) -> Iterator[Contender]:
    try:
        import bitsandbytes.functional as bnb
        import torch
    except ImportError:
        return
    wide, blocksize = torch.from_numpy(values), parameters["blocksize"]
    codes, state = bnb.quantize_blockwise(wide, blocksize=blocksize)

    def encode() -> Any:
        return bnb.quantize_blockwise(wide, blocksize=blocksize)

    yield Contender(name, "encode", "bitsandbytes", "fresh", encode)
    yield Contender(name, "decode", "bitsandbytes", "fresh", lambda: bnb.dequantize_blockwise(codes, state))
    quantize, dequantize = _kernel("cquantize_blockwise_cpu_fp32"), _kernel("cdequantize_blockwise_cpu_fp32")
    if quantize is not None and dequantize is not None:
        sizes = (ctypes.c_longlong(blocksize), ctypes.c_longlong(values.size))
        forth = _pointers(state.code, wide, torch.zeros_like(state.absmax), torch.zeros_like(codes))
        back = _pointers(state.code, codes, state.absmax, torch.from_numpy(out))
        yield Contender(name, "encode", "bitsandbytes", "warm", lambda: quantize(*forth, *sizes))
        yield Contender(name, "decode", "bitsandbytes", "warm", lambda: dequantize(*back, *sizes))


def _kernel(name: str) -> Any:
    """A function of bitsandbytes' CPU library, None where this build has no such library or function."""
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return None
    return getattr(lib, name, None)


class _Pointer(ctypes.c_void_p):
    """An address that keeps the tensor behind it alive."""


def _pointers(*tensors: Any) -> list[_Pointer]:
    pointers = []
    for tensor in tensors:
        pointer = _Pointer(tensor.data_ptr())
        pointer.tensor = tensor  # type: ignore[attr-defined]
        pointers.append(pointer)
    return pointers


def _zstd(codec: Codec, values: Weights, threads: int) -> Iterator[Contender]:
    level = int(codec.compressors[0].values()["level"])
    compressor = zstandard.ZstdCompressor(level=level, threads=threads if threads > 1 else 0)
    decompressor = zstandard.ZstdDecompressor()
    data = values.data.cast("B")
    payload = compressor.compress(data)
    yield Contender(repr(codec), "encode", "zstd", "fresh", lambda: compressor.compress(data))
    yield Contender(repr(codec), "decode", "zstd", "fresh", lambda: decompressor.decompress(payload))
