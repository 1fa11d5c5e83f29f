"""Which codec each tensor gets: one for all, by pattern over names, or by a function."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tensorwire.codecs import RAW, Codec, Stage, parse
from tensorwire.errors import EncodeError
from tensorwire.streams.flatten import Rule
from tensorwire.tensor import TensorView

CodecSpec = str | Stage | Codec
CodecChoice = CodecSpec | Mapping[str, CodecSpec] | Callable[[str, Any], CodecSpec]


def rule(choice: CodecChoice) -> Rule:
    """What `codec=` means, as a function of (name, tensor, view).

    A mapping's keys are shell patterns over dotted names, the first match wins, and what none matches is raw. A
    tensor that its codec cannot represent (another dtype, or values that the codec's policy sends raw) travels
    losslessly, compressed where the codec compresses. Raises EncodeError.
    """
    select = _selector(choice)

    def resolve(name: str, value: Any, view: TensorView) -> Codec:
        chosen = select(name, value)
        if chosen.accepts(view.dtype) and not chosen.fallback(view):
            return chosen
        return chosen.lossless_fallback()

    return resolve


def _selector(choice: CodecChoice) -> Callable[[str, Any], Codec]:
    if isinstance(choice, Mapping):
        patterns = [(pattern, parse(spec)) for pattern, spec in choice.items()]
        return lambda name, value: next((codec for pattern, codec in patterns if fnmatchcase(name, pattern)), RAW)
    if isinstance(choice, (str, Stage, Codec)):
        codec = parse(choice)
        return lambda name, value: codec
    if callable(choice):
        return lambda name, value: parse(choice(name, value))
    raise EncodeError(
        f"codec must be a spec, a stage, a mapping of patterns or a function, not {type(choice).__name__}"
    )
