"""Tensors under terms as a stream, and back into the memory of a receiver."""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire import streams
from tensorwire.codecs import as_floats, from_floats, is_calculated
from tensorwire.dtypes import DType
from tensorwire.errors import SchemaError, TensorwireError
from tensorwire.kernels import default_environment
from tensorwire.limits import DEFAULT, Limits
from tensorwire.numpy import FRONT
from tensorwire.streams import CodecChoice, Piece, Pieces
from tensorwire.tensor import ViewFront
from tensorwire.transfer import Frames
from tensorwire.updates.difference import Bytes, Views, check_state, key_of, view_of
from tensorwire.updates.rounding import stochastic_bf16
from tensorwire.updates.terms import Terms
from tensorwire.wire import Item, StreamStart

Arrays = Mapping[str, npt.NDArray[Any]]


def encode(
    tensors: Views,
    terms: Terms,
    *,
    codec: CodecChoice = "raw",
    stochastic: int | None = None,
    frame_size: int = streams.FRAME_SIZE,
    limits: Limits = DEFAULT,
    report: streams.Report | None = None,
) -> Iterator[Any]:
    """The buffers of a stream of `tensors` under `terms`.

    `codec`, `frame_size`, `report`: as in `tensorwire.encode`. `stochastic`: a seed for `stochastic_bf16`.
    Raises EncodeError.
    """
    if stochastic is not None:
        tensors = stochastic_bf16(tensors, stochastic, codec=codec)
    return streams.encode(
        tensors,
        ViewFront(),
        codec=codec,
        frame_size=frame_size,
        metadata=terms.metadata(),
        limits=limits,
        report=report,
    )


def receive(source: Any, into: Mapping[str, Any], *, held: str = "", limits: Limits = DEFAULT) -> tuple[Terms, str]:
    """Decode a stream into the tensors `into`; returns its terms and its digest as hex.

    `source`: as in `tensorwire.decode`. A difference is added to the values of `into`, which must come from the stream
    with digest `held`: everyone who adds the same differences to the same base gets the same bits.

    Raises a WireError for anything but a complete stream of exactly these tensors. `into` may then be partly written,
    so take differences from a verified recording.
    """
    memory = arrays(into)
    schema = tensorwire.schema(memory)
    terms: Terms | None = None

    def open_item(item: Item) -> None:
        nonlocal terms
        if terms is None:
            terms = Terms.parse(pieces.metadata)
            if terms.kind == "difference" and terms.base != held:
                other = f"{terms.base[:16]}..." if terms.base else "nothing"
                ours = f"{held[:16]}..." if held else "nothing"
                raise SchemaError(f"the stream is a difference to {other}, but what is held here comes from {ours}")
        schema.check(item)

    pieces = Pieces(source, open_item, limits=limits)
    for piece in pieces:
        assert terms is not None
        place, data = place_of_piece(memory, piece), piece.data
        if terms.kind == "difference" and is_calculated(piece.dtype):
            with default_environment():
                data = from_floats(as_floats(place, piece.dtype) + as_floats(data, piece.dtype), piece.dtype)
        place[:] = data
    schema.check_complete()
    assert terms is not None
    return terms, pieces.digest.hex()


def encode_patch(new: Arrays, base: Arrays, terms: Terms, *, limits: Limits = DEFAULT) -> Iterator[Any]:
    """The buffers of the patch from `base` to `new` under `terms`. Raises as `tensorwire.encode` with `base=`."""
    return streams.encode_patch(new, base, FRONT, metadata=terms.metadata(), limits=limits)


def receive_patch(source: Any, into: Mapping[str, Any], *, held: str, limits: Limits = DEFAULT) -> Terms:
    """Apply a patch to the tensors `into`, which come from the stream with digest `held`; returns the patch's terms.

    `source`: as in `tensorwire.decode`. Raises a WireError for an incomplete or damaged patch, and SchemaError for a
    patch to another base; nothing is written then.
    """
    patch = tensorwire.Patch.read(source, limits=limits)
    terms = Terms.parse(patch.metadata)
    if not held or terms.base != held:
        raise SchemaError("the patch is for another version than the one that is held here. Nothing was written")
    patch.apply(arrays(into), FRONT, limits=limits)
    return terms


def terms_of(path: str | os.PathLike[str]) -> Terms | None:
    """The terms of a stream on disk; None if there is no file, or if it is incomplete or damaged."""
    terms = None
    try:
        with open(path, "rb", buffering=0) as file:
            for frame in Frames(file):
                if isinstance(frame.event, StreamStart):
                    terms = Terms.parse(dict(frame.event.info.metadata))
    except (OSError, TensorwireError):
        return None
    return terms


def arrays(state: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The same tensors, torch or NumPy, as NumPy arrays over the same memory.

    bfloat16 becomes an array as `tensorwire.numpy` gives it. Raises EncodeError for tensors that are not contiguous,
    writable and on the CPU.
    """
    check_state(state)
    made = {}
    for name, tensor in state.items():
        view = view_of(name, tensor)
        front = FRONT if isinstance(tensor, np.ndarray) or "torch" not in sys.modules else tensorwire.torch.FRONT
        made[name] = FRONT.wrap(np.frombuffer(front.target(tensor), np.uint8), view.dtype, view.shape)
    return made


def place_of(model: Arrays, name: str, dtype: DType, start: int, count: int) -> Bytes:
    """The bytes of `count` elements of an item of the model, from `start` on."""
    part = slice(start * dtype.itemsize, (start + count) * dtype.itemsize)
    return np.frombuffer(FRONT.target(model[name]), np.uint8)[part]


def place_of_piece(model: Arrays, piece: Piece) -> Bytes:
    """The bytes of the model that a piece is about."""
    return place_of(model, key_of(piece.item), piece.dtype, piece.start, piece.data.size // piece.dtype.itemsize)
