"""Flower's arrays and records as tensors: arrays decoded when they are read; records to state dicts and back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

import tensorwire
from tensorwire import dtypes, updates
from tensorwire.codecs import as_floats, from_floats, is_calculated
from tensorwire.dtypes import DType
from tensorwire.errors import SchemaError, UnsupportedError
from tensorwire.tensor import TensorView
from tensorwire.updates import Terms, Views

STYPE: Final = "tensorwire/1"
NUMPY: Final = "numpy.ndarray"
NPY: Final = b"\x93NUMPY"
_BLOCK: Final = 1 << 20  # elements that are calculated with at a time
_COPIED: Final = 1 << 22  # and copied: at the ends of what is read, frames are decoded twice
# What NumPy has of its own, and what the others are read as: wider numbers or, of those that are none, bits.
_NATIVE: Final = {
    dtype: np.dtype(dtype.name) for dtype in dtypes.ALL if hasattr(np, dtype.name) or dtype == dtypes.BOOL
}

Numbers = npt.NDArray[Any]


class Received(NamedTuple):
    """A received record, every byte of it verified."""

    data: bytes | list[bytes]
    terms: Terms
    views: Views


class WireArray(Array):
    """An `Array` that is decoded or computed each time it is read. To Flower it looks like a NumPy array.

    `view`: the tensor, in its own dtype. bfloat16 and 8-bit floats are read as float32, so that no strategy adds up
    bit patterns. `tensor`: the caller's own tensor, if the array represents one in memory.
    """

    __qualname__ = "Array"  # by which Flower knows the kind of what it has received

    def __init__(self, view: TensorView, tensor: Any = None, *, origin: "Received | None" = None) -> None:
        # Not Flower's constructor, which takes the bytes.
        self.__dict__.update(
            view=view,
            tensor=tensor,
            origin=origin,
            dtype=str(_readable(view.dtype)),
            shape=tuple(view.shape),
            stype=NUMPY,
        )

    view: TensorView
    tensor: Any
    origin: "Received | None"

    @property
    def data(self) -> bytes:
        """The bytes of a .npy file, as in any `Array` of NumPy."""
        values = self.numpy()
        head = BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(values))
        return b"".join((head.getvalue(), values.reshape(-1).view(np.uint8).data))

    def numpy(self) -> Numbers:
        """A new array of the values."""
        view = self.view
        values = np.empty(view.numel, _readable(view.dtype))
        for start, stop in _blocks(view.numel):
            values[start:stop] = _numbers(view.read(start, stop), view.dtype)
        return values.reshape(view.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def to_record(state: Mapping[str, Any]) -> ArrayRecord:
    """Tensors, torch or NumPy, as an `ArrayRecord` that copies none of them.

    Unlike `ArrayRecord(state)` it takes every dtype, including bfloat16, and sends tied tensors once. The tensors are
    read when the record is sent or its arrays are read: do not change them before. Raises EncodeError for a value that
    is not a tensor.

        return Message(RecordDict({"arrays": to_record(model.state_dict()), "metrics": metrics}), reply_to=message)
    """
    record = ArrayRecord()
    for name, view in updates.views(state).items():
        record[name] = WireArray(view, state[name])
    return record


def to_state_dict(record: ArrayRecord, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arrays of a record as torch tensors, in the dtypes that they were sent with, tied as they were.

    `into`: tensors of the same names and shapes, on any device, which are overwritten and returned; each keeps its
    dtype, whatever the dtype after an aggregation. Raises SchemaError if names or shapes differ.

        to_state_dict(message.content["arrays"], into=model.state_dict())
    """
    views = record_views(record)
    if into is None:
        made: dict[object, Any] = {}
        for name, view in views.items():
            made[name] = once(made, view, name, partial(_torch, view))
        return {name: made[name] for name in views}
    if views.keys() != into.keys():
        raise SchemaError(f"the record and into= differ in names, such as {sorted(views.keys() ^ into.keys())[:3]}")
    for name, target in updates.views(into).items():
        if target.shape != views[name].shape:
            raise SchemaError(f"shape is {list(views[name].shape)}, expected {list(target.shape)}", item=name)
        into[name].detach().copy_(_torch(converted(views[name], target.dtype)))
    return dict(into)


def _torch(view: TensorView) -> Any:
    return tensorwire.torch.FRONT.wrap(bytes_of(view), view.dtype, view.shape)


def once(made: dict[object, Any], view: TensorView, name: str, make: Callable[[], Any]) -> Any:
    """What `make` makes of a tensor, once for all names of it."""
    key = name if view.identity is None else view.identity
    if key not in made:
        made[key] = make()
    return made[key]


def record_views(record: Mapping[str, Array]) -> Views:
    """The arrays of a record as views. Raises UnsupportedError for one that is not of NumPy."""
    return {name: view_of(name, array) for name, array in record.items()}


def view_of(name: str, array: Array) -> TensorView:
    """An array as a view. Raises UnsupportedError for one that is not of NumPy."""
    if isinstance(array, WireArray):
        return array.view
    if array.stype == STYPE:
        raise UnsupportedError("this record is encoded: let wire_mod be the first of the ClientApp's mods", item=name)
    if array.stype != NUMPY or not array.data.startswith(NPY):
        raise UnsupportedError(f"an array of type {array.stype!r} is not a NumPy array", item=name)
    file = BytesIO(array.data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns, dtype = read_header(file)
    if dtype.hasobject:
        raise UnsupportedError("an array of Python objects cannot be sent", item=name)
    values = np.ndarray(shape, dtype, array.data, file.tell(), order="F" if columns else "C")
    # Equal arrays of a message are one in memory once Flower has received them: that is no tie.
    return replace(updates.views({name: values})[name], identity=None)


def _readable(dtype: DType) -> np.dtype[Any]:
    """The NumPy type that an array of this dtype is read as."""
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    if dtype == dtypes.COMPLEX32:
        return np.dtype(np.complex64)
    return np.dtype(np.float32 if is_calculated(dtype) else np.uint8)


def _numbers(data: Any, dtype: DType) -> Numbers:
    """Elements as NumPy can calculate with them; bits of those that are no numbers."""
    if dtype in _NATIVE or not is_calculated(dtype):
        return np.frombuffer(data, _readable(dtype))
    floats = as_floats(data, dtype)
    return floats.astype(np.float32).view(np.complex64) if dtype == dtypes.COMPLEX32 else floats


def _blocks(count: int, block: int = _BLOCK) -> Iterator[tuple[int, int]]:
    for start in range(0, count, block):
        yield start, min(start + block, count)


def bytes_of(view: TensorView) -> npt.NDArray[np.uint8]:
    """All of a tensor, in memory of its own."""
    size = view.dtype.itemsize
    data = np.empty(view.numel * size, np.uint8)
    for start, stop in _blocks(view.numel, _COPIED):
        data[start * size : stop * size] = np.frombuffer(view.read(start, stop), np.uint8)
    return data


def converted(view: TensorView, dtype: DType) -> TensorView:
    """The same numbers in another dtype; integers are rounded to, as an aggregation makes floats of counters."""
    if view.dtype == dtype:
        return view

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        numbers = _numbers(view.read(start, stop), view.dtype)
        if is_calculated(dtype):
            wide = numbers.astype(_readable(dtype))
            floats = wide.view(np.float32 if wide.itemsize == 8 else np.float64) if wide.dtype.kind == "c" else wide
            data: npt.NDArray[np.uint8] = from_floats(floats, dtype)
            return data
        return rounded(numbers, _readable(dtype)).view(np.uint8)

    return TensorView(dtype, view.shape, read, identity=view.identity)


def rounded(numbers: Numbers, dtype: np.dtype[Any]) -> Numbers:
    """Numbers as integers or bools, to the nearest; beyond what the dtype has, near its largest; NaN as 0."""
    if numbers.dtype.kind == "f":
        numbers = np.rint(numbers)
    if dtype.kind in "iu" and numbers.dtype.kind == "f":
        limits = np.iinfo(dtype)
        most = np.float64(limits.max)
        most = most if int(most) <= limits.max else np.nextafter(most, 0)
        numbers = np.clip(np.nan_to_num(numbers.astype(np.float64)), float(limits.min), most)
    return numbers.astype(dtype)


def comparable(new: TensorView, old: TensorView) -> bool:
    """Whether two tensors are of one shape and kind, so that one can be a version of the other."""
    if new.shape != old.shape:
        return False
    return new.dtype == old.dtype or (new.dtype.parts == old.dtype.parts == 1 and _is_number(new) and _is_number(old))


def _is_number(view: TensorView) -> bool:
    return view.dtype in _NATIVE or is_calculated(view.dtype)


def shaped_like(views: Views, base: Views) -> Views:
    """The same tensors in the dtypes of `base` where it has them, tied where it ties them and they are still the same.

    What an aggregation or a `state_dict` has taken apart is so put together again, and sent once.
    """
    leaders: dict[object, str] = {}
    made: Views = {}
    for name, view in views.items():
        old = base.get(name)
        if old is None or not comparable(view, old):
            made[name] = replace(view, identity=None)
            continue
        view = replace(converted(view, old.dtype), identity=(id(base), name))
        leader = made.get(leaders.setdefault(old.identity or name, name))
        made[name] = leader if leader is not None and updates.is_equal(leader, view) else view
    return made
