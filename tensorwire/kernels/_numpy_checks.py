"""What the twins say to wrong arguments: the same as the extension."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def check_array(name: str, array: Array, *dtypes: type[np.generic], output: bool = False) -> None:
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        kind = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: expected an array of {expected}, got {kind}")
    if array.ndim != 1:
        raise TypeError(f"{name}: expected 1 dimension, got {array.ndim}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: not contiguous")
    if output and not array.flags.writeable:
        raise ValueError(f"{name}: read-only")


def check_size(name: str, array: Array, expected: int) -> None:
    if array.size != expected:
        raise ValueError(f"{name}: expected {expected} elements, got {array.size}")


def check_overlap(outputs: dict[str, Array], inputs: dict[str, Array]) -> None:
    # 1-D contiguous arrays are intervals of memory: comparing bounds is exact.
    names = list(outputs)
    for i, name in enumerate(names):
        others = inputs | {other: outputs[other] for other in names[i + 1 :]}
        for other, array in others.items():
            if np.may_share_memory(outputs[name], array):
                raise ValueError(f"{name} overlaps {other}")
