"""The code tables and decision thresholds of the quantized formats: read-only float32 constants.

A ``*_CODE`` table maps a code to its value relative to the block's absmax; decoding is ``code[q] * absmax``.
The values are those of bitsandbytes 0.50.2 bit for bit (its functional.py: `get_4bit_type`,
`create_dynamic_map`), and a format's table never changes: another table is another format. A ``*_THRESHOLDS``
array holds, in ascending order, the points where the nearest code changes. The arithmetic around them is in
`tensorwire.kernels._numpy`.
"""

import functools
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "FP4_CODE",
    "FP4_CODE_OF_LEVEL",
    "FP4_THRESHOLDS",
    "INT8_CODE",
    "INT8_THRESHOLDS",
    "NF4_CODE",
    "NF4_THRESHOLDS",
]

DCT_MOST: Final = 64  # numbers that are transformed together, in either direction

T = TypeVar("T", bound=np.generic)


def _constant(array: npt.NDArray[T]) -> npt.NDArray[T]:
    array.setflags(write=False)
    return array


def _midpoints(code: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """fl32(fl32(c[k] + c[k+1]) / 2) of a sorted table, as bitsandbytes' encoders take it."""
    points: npt.NDArray[np.float32] = (code[:-1] + code[1:]) * np.float32(0.5)
    return points


# Quantiles of the normal distribution, chosen so that 0 and both ends are exact (QLoRA, arXiv:2305.14314).
NF4_CODE: Final = _constant(
    np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    )
)
NF4_THRESHOLDS: Final = _constant(_midpoints(NF4_CODE))

# One sign, two exponent, one mantissa bit, over the largest value, 12. Code 8, "minus zero", is +0.0.
FP4_CODE: Final = _constant(
    np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
)
# Of the magnitude; the literals of bitsandbytes' CUDA encoder (csrc/kernels.cu: dQuantizeFP4), up to 14 ulp
# away from the midpoints of FP4_CODE. A magnitude above k of them has level k.
FP4_THRESHOLDS: Final = _constant(
    np.array(
        [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333],
        np.float32,
    )
)
FP4_CODE_OF_LEVEL: Final = _constant(np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8))


def _dynamic_code() -> npt.NDArray[np.float32]:
    """The signed 8-bit dynamic map (arXiv:1511.04561): 256 sorted values from -0.993 to 1, code 127 is 0.

    Decade i of seven, 10**(i-7) to 10**(i-6), holds the centres of 2**i equal steps, each sign; 0 and 1
    complete it. The grid of a decade is counted from its nearer end with one rounding a point, as
    `torch.linspace` does it: the float64 products and sums here are exact, so that the rounding to float32 is
    the only one.
    """
    lowest, highest = np.float32(0.1), np.float32(1)
    decades = []
    for i in range(7):
        count = 2**i
        step = np.float64((highest - lowest) / np.float32(count))
        k = np.arange(count + 1, dtype=np.float64)
        upward = np.float64(lowest) + k * step
        downward = np.float64(highest) - (count - k) * step
        edges = np.where(k < (count + 1) // 2, upward, downward).astype(np.float32)
        decades.append(np.float32(10.0 ** (i - 6)) * _midpoints(edges))
    positive = np.concatenate(decades)
    return np.concatenate([-positive[::-1], np.zeros(1, np.float32), positive, np.ones(1, np.float32)])


INT8_CODE: Final = _constant(_dynamic_code())
INT8_THRESHOLDS: Final = _constant(_midpoints(INT8_CODE))


@functools.lru_cache(maxsize=1)
def dct_tables() -> npt.NDArray[np.float32]:
    """What the DCT of all lengths from 1 to 64 takes: cosines, then secants, one length behind the other.

    Of length n, cos(pi * (2x + 1) * u / 2n), n rows (u) of n numbers (x); of even n, 1 / (2 * cos(pi * (2x + 1) / 2n)),
    n / 2 numbers. None is so close to the midpoint between two float32 values that an error of a few float64 units in
    the last place would matter (tests/kernels/test_sparse_kernels.py), so all machines have the same ones.
    """
    parts = []
    for n in range(1, DCT_MOST + 1):
        u, x = np.arange(n)[:, None], np.arange(n)
        angle = (2 * x + 1) * u % (4 * n)  # in units of pi / (2 * n): small, so that the cosine is exact
        cosines = np.cos(np.pi * angle / (2 * n))
        cosines[(angle % (2 * n)) == n] = 0.0  # odd multiples of pi / 2
        parts.append(cosines.reshape(-1))
    for half in range(1, DCT_MOST // 2 + 1):
        parts += [0.5 / np.cos(np.pi * (2 * np.arange(half) + 1) / (4 * half))]
    return _constant(np.concatenate(parts).astype(np.float32))
