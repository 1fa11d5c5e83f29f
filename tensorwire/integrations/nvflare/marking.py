"""Marks the tensors of a model for sending: ties, differences and codecs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tensorwire.codecs import is_calculated
from tensorwire.dtypes import BOOL, FLOAT32, INTEGERS, DType
from tensorwire.errors import EncodeError
from tensorwire.integrations.nvflare.decomposer import Wire
from tensorwire.integrations.nvflare.model import (
    CodecSpec,
    chooser,
    is_quantizer,
    library,
    named,
    replaced,
)
from tensorwire.streams import EncodedTensor, rule
from tensorwire.tensor import TensorView
from tensorwire.updates import Views, is_equal, is_finite, subtract, views


def marked(data: Any, codec: CodecSpec, ties: "Ties", base: Mapping[str, EncodedTensor] | None = None) -> Any:
    """The data of a DXO with a `Wire` in place of every tensor, and one for those that are tied.

    `base`: send differences to it.
    """
    tensors = named(data)
    described = views(tensors)
    changes = described if base is None else _differences(described, base)
    choose = rule(chooser(codec))
    for name, view in described.items():
        choose.notice(name, view)
    wires = {}
    for name, *others in ties.groups(described, base or {}):
        chosen = choose(name, tensors[name], changes[name], others=others)
        if is_quantizer(chosen) and not is_finite(described[name]):
            raise EncodeError(f"holds NaN or an infinity, which {chosen} cannot carry", item=name)
        wire = Wire(changes[name], repr(chosen), library(tensors[name]), name)
        wires.update({id(tensors[each]): wire for each in (name, *others)})
    choose.finish()
    return replaced(data, wires)


class Ties:
    """The tied tensors of a model.

    FLARE adds differences name by name, after which tied tensors are equal but no longer tied. Tensors that were tied
    once and are equal now still count as tied; other equal tensors do not.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # of each name that was another tensor's: under which name that was found

    def groups(self, described: Views, base: Mapping[str, object]) -> list[list[str]]:
        """The names of a model, grouped by tied tensors; if there is a base, tied in both."""
        groups: dict[Any, list[str]] = {}
        for name, view in described.items():
            key = _identity(name, view)
            first = self._first.get(name, "")
            if (key, id(base.get(name))) not in groups and first in described and is_equal(view, described[first]):
                key = _identity(first, described[first])
            group = groups.setdefault((key, id(base.get(name))), [])
            if group:
                self._first[name] = group[0]
            group.append(name)
        return list(groups.values())


def _identity(name: str, view: TensorView) -> object:
    """Equal for tensors that are the same."""
    return name if view.identity is None else view.identity


def _differences(new: Views, base: Mapping[str, EncodedTensor]) -> Views:
    """What FLARE is to add to the base, tensor by tensor, to get `new`.

    Of bools it can add nothing. Raises EncodeError for one that has changed, and what is missing in the base.
    """
    floats = {name: view for name, view in new.items() if is_calculated(view.dtype)}
    changes = {}
    for name, view in new.items():
        if name not in base or base[name].shape != view.shape:
            raise EncodeError(
                "no tensor of this name and shape was received, so there is nothing to take a difference from",
                item=name,
            )
        was = _in_dtype(base[name].view(), view.dtype)
        if name in floats:
            changes[name] = subtract({name: view}, {name: was})[name]
        elif view.dtype in INTEGERS:
            changes[name] = _whole_difference(view, was)
        elif bytes(view.read(0, view.numel)) == bytes(was.read(0, view.numel)):
            changes[name] = TensorView(view.dtype, view.shape, partial(_zeros, view.dtype), identity=view.identity)
        else:
            raise EncodeError(
                f"{view.dtype} has changed, and FLARE cannot add such a difference: send weights (difference=False)",
                item=name,
            )
    return changes


def _in_dtype(view: TensorView, dtype: DType) -> TensorView:
    """The base in the dtype that a client has the tensor in: FLARE makes float32 of integers that it has averaged."""
    if view.dtype != FLOAT32 or dtype not in (*INTEGERS, BOOL):
        return view

    def read(start: int, stop: int) -> Any:
        values = np.frombuffer(view.read(start, stop), np.float32)
        return values.astype(dtype.name).view(np.uint8)  # cut off, as `load_state_dict` does

    return TensorView(dtype, view.shape, read)


def _whole_difference(new: TensorView, was: TensorView) -> TensorView:
    """Of integers, which wrap around as those do that it is added to."""
    unsigned = np.dtype(f"u{new.dtype.itemsize}")

    def read(start: int, stop: int) -> Any:
        return (np.frombuffer(new.read(start, stop), unsigned) - np.frombuffer(was.read(start, stop), unsigned)).view(
            np.uint8
        )

    return TensorView(new.dtype, new.shape, read, identity=new.identity)


def _zeros(dtype: DType, start: int, stop: int) -> Any:
    return np.zeros((stop - start) * dtype.itemsize, np.uint8)
