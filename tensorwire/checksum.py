"""The checksum of frames and payloads, CRC-32C, for the rooms that know no kernels."""

from collections.abc import Callable
from typing import Any

from tensorwire.kernels import crc32c

__all__ = ["Checksum", "crc32c"]

# (buffer, CRC-32C of what came before it) -> CRC-32C of both.
Checksum = Callable[[Any, int], int]
