"""Stochastic rounding: up or down at random, with the probability that makes the result right on average.

It matters if weights themselves are sent as bf16 and training moves them by less than half a unit in the last
place per round, which rounding to nearest loses every time. Differences do not have this problem.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

import tensorwire
from tensorwire import dtypes
from tensorwire.streams import CodecChoice, rule
from tensorwire.tensor import TensorView
from tensorwire.updates.difference import Bytes, Views, derived

_BF16: Final = tensorwire.codec("bf16").stages()[0]
_EXPONENT: Final = np.uint32(0x7F800000)
_LARGE: Final = np.uint32(0x7F000000)  # from here on adding might carry into infinity
_KEPT: Final = np.uint32(0xFFFF0000)  # the bits that bfloat16 has


def stochastic_bf16(tensors: Views, seed: int, *, codec: CodecChoice = "bf16") -> Views:
    """Round at random the float32 tensors that `codec` sends as bf16; leave others unchanged.

    The same seed gives the same bytes. NaN, infinities and the largest values are left to the codec.
    """
    choose = rule(codec)
    for name, view in tensors.items():
        choose.notice(name, view)
    return {
        name: derived(view, _rounded(view, [seed, number]))
        if view.dtype == dtypes.FLOAT32 and choose(name, view, view).stages()[0] == _BF16
        else view
        for number, (name, view) in enumerate(tensors.items())
    }


def _rounded(view: TensorView, seed: list[int]) -> Callable[[int, int], Bytes]:
    def read(start: int, stop: int) -> Bytes:
        noise = np.random.default_rng([*seed, start]).integers(0, 1 << 16, stop - start, np.uint32)
        bits = np.frombuffer(view.read(start, stop), np.uint32)
        return np.where(bits & _EXPONENT < _LARGE, (bits + noise) & _KEPT, bits).view(np.uint8)

    return read
