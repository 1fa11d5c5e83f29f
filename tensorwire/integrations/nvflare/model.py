"""Models as FLARE hands them over: nested containers of torch or NumPy tensors; and which codec each of those gets."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire.codecs import Codec
from tensorwire.dtypes import FLOAT32
from tensorwire.errors import ArgumentError
from tensorwire.streams import CodecChoice
from tensorwire.updates import arrays, exact_vectors

ELEMENTS: Final = 1 << 16  # of a tensor that are looked at together
CodecSpec = str | dict[str, str]
Path = tuple[str | int, ...]


def is_tensor(value: Any) -> bool:
    """Whether a value of a model is a tensor for tensorwire rather than a value for FLARE.

    NumPy scalars are tensors, because FLARE turns arrays without axes into them when it adds.
    """
    return library(value) == "torch" or isinstance(value, (np.ndarray, np.number, np.bool_))


def library(tensor: Any) -> str:
    """Which library a tensor is of."""
    return "torch" if "torch" in sys.modules and isinstance(tensor, sys.modules["torch"].Tensor) else "numpy"


def as_sent(library: str, tensor: Any) -> Any:
    """A decoded tensor in the library that it was sent from."""
    return arrays({"": tensor})[""] if library == "numpy" and not isinstance(tensor, np.ndarray) else tensor


def chooser(codec: CodecSpec) -> CodecChoice:
    """What a filter's `codec` means: small and sensitive items go exactly, unless a mapping says otherwise."""
    return exact_vectors(codec) if isinstance(codec, str) else codec


def is_quantizer(codec: Codec) -> bool:
    """Whether a codec needs less than two bytes an element, which no cast and nothing lossless promises."""
    return codec.bound(ELEMENTS, FLOAT32) < 2 * ELEMENTS


def checked(codec: CodecSpec) -> CodecSpec:
    """A filter's `codec`, as it is. Raises ArgumentError or EncodeError for what can be none."""
    if not isinstance(codec, (str, dict)):
        raise ArgumentError(
            f"codec is a spec or a dict of name patterns to specs, not {type(codec).__name__}: "
            "FLARE writes it into the configuration of a job"
        )
    for spec in [codec] if isinstance(codec, str) else codec.values():
        tensorwire.codec(spec)
    return codec


def leaves(data: Any, wanted: Callable[[Any], bool], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What is wanted of the data of a DXO, nested as it may be, with its paths."""
    if wanted(data):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, wanted, (*path, key))
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from leaves(value, wanted, (*path, index))


def replaced(data: Any, values: Mapping[int, Any]) -> Any:
    """A copy of the data of a DXO in which tensors stand replaced, by `id`; containers are new, all else is shared."""
    if id(data) in values:
        return values[id(data)]
    if isinstance(data, dict):
        return {key: replaced(value, values) for key, value in data.items()}
    if type(data) in (list, tuple):
        return type(data)(replaced(value, values) for value in data)
    return data


def named(data: Any) -> dict[str, Any]:
    """The tensors in the data of a DXO by their names."""
    return {tensorwire.name_of(path): tensor for path, tensor in leaves(data, is_tensor)}
