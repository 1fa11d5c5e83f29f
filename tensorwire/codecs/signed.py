"""Numbers as a sign and a magnitude of a few bits: (m + 1/2) * step, with m from 0 on.

The values that sparse and lowrank keep are stored this way; with one bit, only their signs. No code stands for 0,
because zeros are not kept.
"""

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorwire import kernels
from tensorwire.codecs.stage import Bytes
from tensorwire.errors import FormatError

# The magnitude, in multiples of the mean, above which all get the same code, by bits; with 16 bits it is the largest.
_CLIP: Final = {1: 2.0, 2: 2.0, 4: 4.0, 8: 32.0}
_WHOLE: Final = 2.0**32
_BYTE: Final = 8

Float32 = npt.NDArray[np.float32]


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // _BYTE)


def step_of(values: Float32, bits: int) -> float:
    """The difference between neighbouring magnitudes, a float32 that suits these numbers; 0 where all are 0.

    Follows from the mean magnitude of those that are not 0.
    """
    top, total, count = kernels.sum_magnitudes(values)
    if top == 0:
        return 0.0
    most = top if bits > 1 else 2 * top
    return float(np.float32(min(_CLIP.get(bits, np.inf) * (total / count / _WHOLE * top), most) / (1 << (bits - 1))))


def pack(values: Float32, steps: Float32, bits: int) -> Bytes:
    """The codes of numbers, packed from the lowest bit of the first byte on. `steps`: one for all, or one for each.

    The highest bit of a code is the sign, the others are the magnitude.
    """
    codes = np.empty(packed_size(values.size, bits), np.uint8)
    kernels.pack_values(values, steps, codes, bits=bits)
    return codes


def unpack(data: Bytes, steps: Float32, count: int, bits: int) -> Float32:
    """The numbers that `data`, of the right length, stands for. `steps`: one or `count`. Raises FormatError."""
    values = np.empty(count, np.float32)
    if not kernels.unpack_values(data, steps, values, bits=bits):
        raise FormatError("unused bits after the last value are not 0")
    return values


def checked_steps(data: Bytes, bits: int, largest: float) -> Float32:
    """Received steps as float32. Raises FormatError for one that is negative, NaN or makes numbers beyond `largest`."""
    steps: Float32 = data.view("<f4").astype(np.float32)
    # As whole numbers, floats are in the order of their magnitudes, and negative ones and NaN behind all others.
    if steps.view(np.uint32).max(initial=0) > _bits(largest / (1 << (bits - 1))):
        raise FormatError(f"a step of values is negative, NaN or beyond {largest:g}")
    return steps


@lru_cache(maxsize=64)
def _bits(number: float) -> int:
    """The bits of a number in float32."""
    return int(np.float32(number).view(np.uint32))
