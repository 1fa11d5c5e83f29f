"""The mean of single tensors, for engines that pass a model tensor by tensor, under their own names."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire.codecs import add_weighted, as_floats, from_floats, is_calculated
from tensorwire.dtypes import BOOL, INTEGERS, DType
from tensorwire.errors import SchemaError
from tensorwire.kernels import default_environment
from tensorwire.numpy import FRONT
from tensorwire.streams import EncodedTensor
from tensorwire.tensor import TensorView
from tensorwire.updates.difference import Bytes, view_of
from tensorwire.updates.terms import check_weight

_BLOCK: Final = 1 << 17  # elements that are added up at a time, where slices do not say


def mean_of(tensors: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted mean of tensors of one dtype and shape, as a tensor of the first one's library and dtype.

    `tensors`: torch, NumPy or `EncodedTensor`s, one per client and always in the same order, on which the last bit
    may depend. Calculated in float64 and rounded once, a slice at a time, with almost no memory beside the result.
    Integers are rounded to the nearest, or exact where all agree; a bool takes the value with the larger total weight.
    Raises SchemaError for tensors that differ in dtype or shape, or whose dtype cannot be averaged; ValueError for
    weights that `check_weight` refuses.

        mean = tensorwire.updates.mean_of([update["weight"] for update in updates], [100, 250])
    """
    if not tensors or len(tensors) != len(weights):
        raise ValueError(
            f"a mean takes at least one tensor, and as many weights: not {len(tensors)} and {len(weights)}"
        )
    for weight in weights:
        check_weight(weight)
    inputs = [tensor if isinstance(tensor, EncodedTensor) else view_of("", tensor) for tensor in tensors]
    first = inputs[0]
    for each in inputs:
        if (each.dtype, each.shape) != (first.dtype, first.shape):
            raise SchemaError(
                f"{each.dtype} {list(each.shape)} cannot be averaged with {first.dtype} {list(first.shape)}"
            )
    out, result = _result(tensors[0], first)
    spans = list(_spans(first))
    sums = np.empty(max((count for _, count in spans), default=0) * first.dtype.parts)
    for start, count in spans:
        place = out[start * first.dtype.itemsize : (start + count) * first.dtype.itemsize]
        if is_calculated(first.dtype):
            _mean(inputs, weights, first.dtype, start, place, sums[: count * first.dtype.parts])
        else:
            _whole_mean(inputs, weights, first.dtype, start, place)
    return result


def is_finite(tensor: Any) -> bool:
    """Whether a tensor (torch, NumPy or an `EncodedTensor`) has neither NaN nor infinities; always true of integers.

    if not tensorwire.updates.is_finite(update["weight"]): ...
    """
    described = tensor if isinstance(tensor, EncodedTensor) else view_of("", tensor)
    if not is_calculated(described.dtype):
        return True
    with default_environment(), np.errstate(over="ignore", invalid="ignore"):
        for start, count in _spans(described):
            values = as_floats(_bytes(described, start, count), described.dtype)
            # A sum is not finite where one of its terms is not, and costs a fraction of looking at each.
            if not np.isfinite(values.sum()) and not np.isfinite(values).all():
                return False
    return True


def is_equal(one: Any, other: Any) -> bool:
    """Whether two tensors (torch, NumPy or views) have the same dtype, shape and bytes. Reads them part by part.

    if tensorwire.updates.is_equal(update["head"], update["embedding"]): ...
    """
    left, right = view_of("", one), view_of("", other)
    return (left.dtype, left.shape) == (right.dtype, right.shape) and all(
        np.array_equal(_bytes(left, start, count), _bytes(right, start, count)) for start, count in _spans(left)
    )


def _result(tensor: Any, described: EncodedTensor | TensorView) -> tuple[Bytes, Any]:
    """Bytes to be written, and a tensor of the same library over them."""
    size = described.dtype.itemsize * int(np.prod(described.shape, dtype=np.int64))
    if isinstance(tensor, EncodedTensor):
        return tensor.empty()
    out = np.empty(size, np.uint8)
    front = (
        FRONT if isinstance(tensor, (np.ndarray, np.generic)) or "torch" not in sys.modules else tensorwire.torch.FRONT
    )
    return out, front.wrap(out, described.dtype, described.shape)


def _spans(first: EncodedTensor | TensorView) -> Iterator[tuple[int, int]]:
    if isinstance(first, EncodedTensor):
        yield from first.spans()
        return
    for start in range(0, first.numel, _BLOCK):
        yield start, min(_BLOCK, first.numel - start)


def _mean(
    inputs: Sequence[EncodedTensor | TensorView],
    weights: Sequence[float],
    dtype: DType,
    start: int,
    out: Bytes,
    sums: npt.NDArray[np.float64],
) -> None:
    """Write the mean of the floats from `start` on to `out`."""
    sums[:] = 0.0
    with default_environment():
        for each, weight in zip(inputs, weights, strict=True):
            _accumulate(each, sums, weight, start, out.size // dtype.itemsize)
        np.divide(sums, math.fsum(weights), out=sums)
        from_floats(sums, dtype, out)


def _whole_mean(
    inputs: Sequence[EncodedTensor | TensorView], weights: Sequence[float], dtype: DType, start: int, out: Bytes
) -> None:
    """Write the mean of the integers or bools from `start` on to `out`."""
    values = [_bytes(each, start, out.size // dtype.itemsize) for each in inputs]
    out[:] = values[0]
    differs = np.zeros(out.size // dtype.itemsize, np.bool_)
    for other in values[1:]:
        differs |= np.not_equal(other, values[0]).reshape(-1, dtype.itemsize).any(axis=1)
    if differs.any():
        _write_whole([value.view(_numpy_dtype(dtype))[differs] for value in values], weights, dtype, differs, out)


def _write_whole(
    values: list[npt.NDArray[Any]], weights: Sequence[float], dtype: DType, differs: npt.NDArray[np.bool_], out: Bytes
) -> None:
    """Write the mean of integers or bools, rounded, where they differ."""
    sums = np.zeros(values[0].size)
    for each, weight in zip(values, weights, strict=True):
        sums += each * float(weight)
    mean = np.rint(sums / math.fsum(weights))
    lowest, highest = np.min(values, axis=0), np.max(values, axis=0)
    with np.errstate(invalid="ignore"):
        whole = mean.astype(values[0].dtype)  # of a mean beyond 2**53 the last digits are rounded
    whole = np.where(mean >= highest, highest, np.where(mean <= lowest, lowest, whole))
    out.view(_numpy_dtype(dtype))[differs] = whole


def _numpy_dtype(dtype: DType) -> npt.DTypeLike:
    if dtype == BOOL:
        return np.uint8
    if dtype not in INTEGERS:
        raise SchemaError(f"no mean can be taken of {dtype}, unless all are equal")
    return np.dtype(dtype.name)


def _accumulate(
    each: EncodedTensor | TensorView, sums: npt.NDArray[np.float64], weight: float, start: int, count: int
) -> None:
    if isinstance(each, EncodedTensor):
        each.accumulate(sums, weight, start)
    else:
        add_weighted(_bytes(each, start, count), each.dtype, sums, weight)


def _bytes(each: EncodedTensor | TensorView, start: int, count: int) -> Bytes:
    data: Bytes = np.frombuffer(each.read(start, start + count), np.uint8)
    return data
