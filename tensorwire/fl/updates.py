"""What travels between server and clients: models and updates, as lazy views that are encoded slice by slice.

    views(state)                    the weights themselves
    views(state, base)              what training changed, to be added to the round's base; or, from the
                                    server, what the last round changed, to be added to what clients hold
    views(state, base, feedback)    and what earlier rounds' quantization dropped

Nothing is computed until `encode` reads a slice, so a difference takes no memory of its own.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

import tensorwire
from tensorwire import dtypes, kernels, streams
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.numpy import FRONT
from tensorwire.streams import Pieces
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.wire import Item

Kind = Literal["weights", "difference"]
Views = dict[str, TensorView]

_KINDS: Final = ("weights", "difference")
_METADATA: Final = "tensorwire.fl"
_BF16: Final = tensorwire.codec("bf16").stages()[0]
_FLOATS: Final = {dtypes.FLOAT16: np.float16, dtypes.FLOAT32: np.float32, dtypes.FLOAT64: np.float64}


@dataclass(frozen=True)
class Terms:
    """What a stream of the loop says of itself, in its metadata.

    `base`: digest, as hex, of the broadcast that an update was trained on, or that a broadcast of kind
    difference adds to. `weight`: what an update counts in the mean, the number of examples for instance.
    `metrics`: what the client reports.
    """

    run: str
    round: int
    base: str = ""
    client: str = ""
    kind: Kind = "weights"
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As the stream's metadata. Raises EncodeError for a weight that is no finite number above 0."""
        try:
            check_weight(self.weight)
        except ValueError as error:
            raise EncodeError(str(error)) from None
        return {_METADATA: json.dumps(asdict(self), allow_nan=False)}

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> "Terms":
        """From the metadata of a received stream. Raises SchemaError; a weight is left to `check_weight`."""
        try:
            terms = cls(**json.loads(metadata[_METADATA]))
            types = [type(value) for value in (terms.run, terms.round, terms.base, terms.client, terms.metrics)]
            good = types == [str, int, str, str, dict] and terms.kind in _KINDS
            good = good and all(type(value) in (int, float) for value in terms.metrics.values())
        except (KeyError, TypeError, ValueError, RecursionError):
            good = False
        if not good:
            raise SchemaError("the stream is no model or update of the learning loop")
        return terms


def check_weight(weight: Any, most: float = math.inf) -> None:
    """Raise ValueError unless `weight` is a finite number, 0 < weight <= most. True and "3" are none."""
    if type(weight) not in (int, float) or not 0 < weight <= min(most, sys.float_info.max):
        raise ValueError(f"a weight must be a number above 0 and at most {most:g}, not {weight!r:.40}")


def views(
    state: Mapping[str, Any], base: Mapping[str, Any] | None = None, feedback: "ErrorFeedback | None" = None
) -> Views:
    """The tensors of `state`, torch or NumPy, to be encoded; less `base`, plus `feedback`, where given.

    Only float tensors are subtracted from; others are what they are. Names, shapes and dtypes stay.
    Raises EncodeError for what is no tensor or does not match the base.
    """
    if feedback is not None and base is None:
        raise EncodeError("error feedback is for differences; give their base")
    made = {}
    for name, tensor in state.items():
        view = _view(name, tensor)
        if base is not None and _is_float(view.dtype):
            old = _view(name, base.get(name))
            if (view.dtype, view.shape) != (old.dtype, old.shape):
                detail = f"{view.dtype} {list(view.shape)} now, {old.dtype} {list(old.shape)} before"
                raise EncodeError(detail, item=name)
            read = _subtract(view, old, None if feedback is None else feedback.of(name, view))
            view = TensorView(view.dtype, view.shape, read, identity=view.identity)
        made[name] = view
    return made


def encode(
    tensors: Views,
    terms: Terms,
    *,
    codec: CodecChoice = "raw",
    stochastic: int | None = None,
    frame_size: int = streams.FRAME_SIZE,
    limits: Limits = DEFAULT,
) -> Iterator[Any]:
    """The buffers of a stream of `tensors` under `terms`; `codec` as in `tensorwire.encode`, of TensorViews.

    `stochastic`: a seed; items under bf16 are then rounded up or down at random, so that they are right on
    average and a change of less than half a unit in the last place is not lost in every round. The same seed
    gives the same bytes.
    """
    if stochastic is not None:
        choose = rule(codec)
        tensors = {
            name: _dithered(view, [stochastic, number]) if choose(name, view, view).stages()[0] == _BF16 else view
            for number, (name, view) in enumerate(tensors.items())
        }
    return streams.encode(
        tensors, ViewFront(), codec=codec, frame_size=frame_size, metadata=terms.metadata(), limits=limits
    )


def receive(source: Any, into: Mapping[str, Any], *, held: str = "", limits: Limits = DEFAULT) -> tuple[Terms, str]:
    """Decode a stream of the loop into the tensors `into`; its terms and the digest of the stream, as hex.

    A difference is added to what `into` holds, which must be what the broadcast with digest `held` made of
    it. Server and clients do this alike and so hold the same bits. Raises a WireError, with `into` maybe
    partly written, for whatever is not a whole stream of just these tensors: take differences from a
    recording that has been verified.
    """
    memory = arrays(into)
    schema = tensorwire.schema(memory)
    terms: Terms | None = None

    def open_item(item: Item) -> None:
        nonlocal terms
        if terms is None:
            terms = Terms.parse(slices.metadata)
            if terms.kind == "difference" and terms.base != held:
                raise SchemaError(
                    f"a difference to {terms.base[:16] or 'nothing'}..., not to the {held[:16]}... held here"
                )
        schema.check(item)

    slices = Pieces(source, open_item, limits=limits)
    for piece in slices:
        assert terms is not None
        data, dtype, begin = piece.data, piece.dtype, piece.start * piece.dtype.itemsize
        place = np.frombuffer(FRONT.target(memory[piece.item.name]), np.uint8)[begin : begin + data.size]
        if terms.kind == "difference" and _is_float(dtype):
            data = _bytes(_floats(place, dtype) + _floats(data, dtype), dtype)
        place[:] = data
    schema.check_complete()
    assert terms is not None
    return terms, slices.digest.hex()


def arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same tensors, torch or NumPy, as NumPy arrays over the same memory."""
    made = {}
    for name, tensor in state.items():
        view, front = _view(name, tensor), FRONT if isinstance(tensor, np.ndarray) else tensorwire.torch.FRONT
        made[name] = FRONT.wrap(np.frombuffer(front.target(tensor), np.uint8), view.dtype, view.shape)
    return made


class ErrorFeedback:
    """What quantization dropped of the updates that counted, to be added to the next one.

    Seide et al., 1-Bit SGD (Interspeech 2014); Karimireddy et al., arXiv:1901.09847. A client keeps one, of
    the size of the model, and with `path` in a file, so that it outlives the process.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        self._residual: dict[str, np.ndarray] = {}
        if path is not None and os.path.exists(path):
            self._residual = tensorwire.numpy.load_file(path)

    def of(self, name: str, view: TensorView) -> np.ndarray:
        """The flat residual of a tensor, zeros at first."""
        dtype = np.float32 if view.dtype == dtypes.BFLOAT16 else _FLOATS[view.dtype]
        residual = self._residual.setdefault(name, np.zeros(view.numel, dtype))
        if (residual.size, residual.dtype) != (view.numel, dtype):
            raise EncodeError("the residual kept for error feedback is of another model", item=name)
        return residual

    def settle(self, sent: Views, recording: Any, *, limits: Limits = DEFAULT) -> None:
        """`sent`, encoded as `recording`, has counted: keep the difference between the two."""
        for piece in Pieces(recording, lambda item: None, limits=limits):
            residual = self._residual.get(piece.item.name)
            if residual is not None:
                dtype = piece.dtype
                start, stop = piece.start, piece.start + piece.data.size // dtype.itemsize
                wanted = _floats(sent[piece.item.name].read(start, stop), dtype)
                residual[start:stop] = wanted - _floats(piece.data, dtype)

    def save(self, path: str | os.PathLike) -> None:
        """To a file, which appears under its name only when complete."""
        tensorwire.numpy.save_file(self._residual, path)


def _view(name: str, tensor: Any) -> TensorView:
    view = FRONT.view(tensor)
    if view is None and "torch" in sys.modules:
        view = tensorwire.torch.FRONT.view(tensor)
    if view is None:
        raise EncodeError(f"a state must map names to tensors, not to {type(tensor).__name__}", item=name)
    return view


def _subtract(new: TensorView, old: TensorView, residual: np.ndarray | None) -> Callable[[int, int], Any]:
    def read(start: int, stop: int) -> Any:
        change = _floats(new.read(start, stop), new.dtype) - _floats(old.read(start, stop), new.dtype)
        if residual is not None:
            change += residual[start:stop]
        return _bytes(change, new.dtype)

    return read


def _dithered(view: TensorView, seed: list[int]) -> TensorView:
    """float32 values as bfloat16 ones, up or down with the probability that makes them right on average."""

    def read(start: int, stop: int) -> Any:
        noise = np.random.default_rng([*seed, start]).integers(0, 1 << 16, stop - start, np.uint32)
        bits = np.frombuffer(view.read(start, stop), np.uint32)
        finite = bits & 0x7F800000 < 0x7F000000  # and no carry into infinity
        return np.where(finite, (bits + noise) & 0xFFFF0000, bits).view(np.uint8)

    return TensorView(view.dtype, view.shape, read, identity=view.identity)


def _is_float(dtype: DType) -> bool:
    return dtype == dtypes.BFLOAT16 or dtype in _FLOATS


def _floats(data: Any, dtype: DType) -> np.ndarray:
    """The bytes of a float tensor as an array to calculate with: bfloat16 becomes float32."""
    if dtype == dtypes.BFLOAT16:
        out = np.empty(memoryview(data).nbytes // 2, np.float32)
        kernels.cast(np.frombuffer(data, np.uint16), out)
        return out
    return np.frombuffer(data, _FLOATS[dtype])


def _bytes(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == dtypes.BFLOAT16:
        out = np.empty(values.size, np.uint16)
        kernels.cast(values, out)
        return out.view(np.uint8)
    return values.view(np.uint8)
