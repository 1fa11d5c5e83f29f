"""zstd: Zstandard (RFC 8878), one zstd frame a slice.

The decompressed size follows from the slice, so a compressed payload can declare nothing: a frame must say that size,
use no dictionary and a window of at most 8 MiB (or that size, if it is more), and nothing may come before or after it.

libzstd takes frames that the RFC does not allow, and two versions of it may decode such a frame to different bytes.
What the block headers show of that is refused here, in a few microseconds a frame; damage inside a compressed block
can be seen only by decoding it, and is libzstd's to judge.
"""

from dataclasses import dataclass
from typing import Any, Final

import zstandard

from tensorwire.codecs.stage import Compressor, Range, parameter
from tensorwire.errors import FormatError, counted
from tensorwire.tensor import Extent

_MAX_WINDOW: Final = 8 << 20
_MAX_BLOCK: Final = 128 << 10
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# Types of blocks (RFC 8878, 3.1.1.2.2): one byte repeated, and none.
_RLE: Final = 1
_RESERVED: Final = 3


@dataclass(frozen=True, repr=False)
class Zstd(Compressor):
    """A compressed payload. The level is not sent."""

    level: int = parameter(3, Range(1, 22))

    id = 64
    name = "zstd"

    def bound(self, size: int) -> int:
        """ZSTD_COMPRESSBOUND: 1/256 of the input and, below 128 KiB, at most 64 bytes more."""
        return size + size // 256 + 64

    def encode(self, data: Any, extent: Extent) -> bytes:
        """One frame that says its content's size."""
        return compress(data, zstandard.ZstdCompressor(level=self.level, write_checksum=False, write_content_size=True))

    def decode(self, payload: memoryview, extent: Extent, size: int, *, exact: bool) -> bytes:
        """The content. Raises FormatError unless the payload is the one frame it must be."""
        return decompress(payload, size, exact=exact)


def compress(data: Any, compressor: zstandard.ZstdCompressor) -> bytes:
    """One frame. Raises MemoryError."""
    try:
        return compressor.compress(data)
    except zstandard.ZstdError as error:
        raise _memory_error(error) from error


def decompress(payload: memoryview, size: int, *, exact: bool) -> bytes:
    """The content of one frame, `size` bytes or, unless `exact`, at most `size`. Raises FormatError."""
    _check_frame(payload, size, exact=exact)
    try:
        # libzstd refuses content of another length than the frame says.
        return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(
            payload, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise _memory_error(error, FormatError(f"not a zstd frame: {error}")) from None


def _check_frame(payload: memoryview, size: int, *, exact: bool) -> None:
    if bytes(payload[:4]) != _MAGIC:
        raise FormatError("not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(payload)
        begin = zstandard.frame_header_size(payload)
    except zstandard.ZstdError as error:
        raise FormatError(f"not a zstd frame: {error}") from None
    content = frame.content_size
    if content == zstandard.CONTENTSIZE_UNKNOWN:
        raise FormatError("zstd frame does not declare the size of its content")
    if content > size or (exact and content != size):
        raise FormatError(f"zstd frame declares {content} bytes, expected {'' if exact else 'at most '}{size}")
    if frame.dict_id:
        raise FormatError(f"zstd frame needs dictionary {frame.dict_id}: frames must not use one")
    # The window is the memory that decoding takes beside the content.
    if frame.window_size > max(_MAX_WINDOW, size):
        most = f"{_MAX_WINDOW} or, of more content, its size"
        raise FormatError(f"zstd frame has a window of {frame.window_size} bytes, more than {most}")
    _check_blocks(payload, begin, min(frame.window_size, _MAX_BLOCK), 4 if frame.has_checksum else 0)


def _check_blocks(payload: memoryview, at: int, most: int, behind: int) -> None:
    """Raise FormatError unless blocks of at most `most` bytes stand from `at` to `behind` bytes before the end."""
    end, last = len(payload) - behind, 0
    while not last:
        head = int.from_bytes(payload[at : at + 3], "little")
        last, kind, size = head & 1, head >> 1 & 3, head >> 3
        at += 3 + (1 if kind == _RLE else size)
        if at > end:
            raise FormatError("zstd frame ends within a block")
        if kind == _RESERVED or size > most:
            raise FormatError(f"zstd block of a reserved type or of {size} bytes, more than {most}")
    if at != end:
        raise FormatError(f"zstd frame has {counted(end - at, 'byte')} after its end")


def _memory_error(error: zstandard.ZstdError, otherwise: Exception | None = None) -> Exception:
    """MemoryError if that is what the library means, which has one kind of error for everything."""
    return MemoryError(str(error)) if "not enough memory" in str(error) else otherwise or error
