"""Which codec each tensor gets: one for all, by pattern over names, or by a function."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tensorwire.codecs import Codec, Raw, Zstd, parse
from tensorwire.errors import EncodeError
from tensorwire.streams.flatten import Rule
from tensorwire.tensor import TensorView

CodecChoice = str | Codec | Mapping[str, "str | Codec"] | Callable[[str, Any], "str | Codec"]


def rule(choice: CodecChoice) -> Rule:
    """What `codec=` means, as a function of (name, tensor, view).

    A mapping's keys are shell patterns over dotted names, the first match wins, and what none matches is raw. A
    tensor that its codec cannot represent (another dtype, or values that the codec's policy sends raw) travels
    losslessly, compressed where the codec asked for compression.
    """
    if isinstance(choice, Mapping):
        patterns = [(pattern, parse(spec)) for pattern, spec in choice.items()]

        def select(name: str, value: Any) -> Codec:
            return next((codec for pattern, codec in patterns if fnmatchcase(name, pattern)), Raw())

    elif isinstance(choice, (str, Codec)):
        codec = parse(choice)

        def select(name: str, value: Any) -> Codec:
            return codec

    elif callable(choice):

        def select(name: str, value: Any) -> Codec:
            return parse(choice(name, value))

    else:
        raise EncodeError(f"codec must be a spec, a mapping of patterns or a function, not {type(choice).__name__}")

    def resolve(name: str, value: Any, view: TensorView) -> Codec:
        chosen = select(name, value)
        if chosen.accepts(view.dtype) and not chosen.fallback(view):
            return chosen
        return Zstd(Raw(), chosen.level) if isinstance(chosen, Zstd) else Raw()

    return resolve
