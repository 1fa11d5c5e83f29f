"""zstd: Zstandard (RFC 8878) behind any other codec, one zstd frame a slice.

The decompressed size follows from the slice, so a compressed payload can declare nothing: a frame must say exactly
that size, use no dictionary and a window of at most 8 MiB, and nothing may stand before or after it.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import zstandard

from tensorwire.codecs.base import Codec, Encoded, Sizes, Take
from tensorwire.codecs.raw import Raw
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError
from tensorwire.tensor import Extent, TensorView

_MAX_WINDOW: Final = 8 << 20
_MAGIC: Final = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, repr=False)
class Zstd(Codec):
    """`inner`'s payload, compressed. The level is the encoder's business and does not travel."""

    inner: Codec = field(default_factory=Raw)
    level: int = 3

    id = 64
    name = "zstd"

    def __post_init__(self) -> None:
        if isinstance(self.inner, Zstd):
            raise EncodeError("zstd behind zstd")
        if type(self.level) is not int or not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise EncodeError(f"level must be from 1 to {zstandard.MAX_COMPRESSION_LEVEL}, not {self.level!r}")

    def __repr__(self) -> str:
        return f"{self.inner}|zstd" + ("" if self.level == 3 else f":level={self.level}")

    @property
    def on_device(self) -> bool:  # type: ignore[override]
        return self.inner.on_device

    def stages(self) -> tuple[tuple[int, ...], ...]:
        return (*self.inner.stages(), (self.id,))

    def accepts(self, dtype: DType) -> bool:
        return self.inner.accepts(dtype)

    def block(self, dtype: DType) -> int:
        return self.inner.block(dtype)

    def sizes(self, count: int, dtype: DType) -> Sizes:
        return self.inner.sizes(count, dtype)

    def bound(self, count: int, dtype: DType) -> int:
        size = self.sizes(count, dtype).total
        return size + size // 256 + 64

    def fit(self, budget: int, dtype: DType) -> int:
        # ZSTD_COMPRESSBOUND: 1/256 of the input and, below 128 KiB, at most 64 bytes more.
        return self.inner.fit((budget - 64) * 256 // 257, dtype) if budget > 64 else 0

    def check_length(self, length: int, extent: Extent) -> None:
        size = self.sizes(extent.count, extent.dtype).total
        if length > size + size // 256 + 64:
            raise FormatError(f"{self} payload of {length} bytes for {size} uncompressed ones")

    def fallback(self, view: TensorView) -> bool:
        return self.inner.fallback(view)

    def prepare(self, view: TensorView) -> Any:
        return self.inner.prepare(view)

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        payload = self.inner.encode(data, extent, take, context).payload
        compressor = zstandard.ZstdCompressor(level=self.level, write_checksum=False, write_content_size=True)
        try:
            return Encoded(compressor.compress(payload))
        except zstandard.ZstdError as error:
            raise _memory_error(error) from error

    def decode(self, payload: memoryview, extent: Extent, out: np.ndarray, uncached: bool | None = None) -> None:
        self.inner.decode(self.decompress(payload, extent.count, extent.dtype), extent, out, uncached)

    def decompress(self, payload: memoryview, count: int, dtype: DType) -> memoryview:
        """The payload of the inner codec. Raises FormatError unless it is the one frame it must be."""
        size = self.inner.sizes(count, dtype).total
        self._check_frame(payload, size)
        try:
            data = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(
                payload, max_output_size=size, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise _memory_error(error, FormatError(f"not a zstd frame: {error}")) from None
        return memoryview(data)  # libzstd has refused content of another length than the frame says

    @staticmethod
    def _check_frame(payload: memoryview, size: int) -> None:
        if bytes(payload[:4]) != _MAGIC:
            raise FormatError("not a zstd frame")
        try:
            frame = zstandard.get_frame_parameters(payload)
        except zstandard.ZstdError as error:
            raise FormatError(f"not a zstd frame: {error}") from None
        if frame.content_size != size or frame.dict_id or frame.window_size > max(_MAX_WINDOW, size):
            raise FormatError(f"zstd frame must say {size} bytes, no dictionary and a window of at most 8 MiB")


def _memory_error(error: zstandard.ZstdError, otherwise: Exception | None = None) -> Exception:
    """MemoryError if that is what the library means, which has one kind of error for everything."""
    return MemoryError(str(error)) if "not enough memory" in str(error) else otherwise or error
