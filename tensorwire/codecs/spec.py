"""Spec strings, stages and wire ids to codecs."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

from tensorwire.codecs.pipeline import Codec
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.registry import by_id, by_name, did_you_mean
from tensorwire.codecs.stage import Compressor, Packer, Spelled, Stage, Value
from tensorwire.errors import EncodeError, FormatError, near, show

# The codec of tensors for which none was chosen.
RAW: Final = Codec((Raw(),))
_REAL: Final = re.compile(r"[0-9]+\.[0-9]+|[0-9]+(\.[0-9]+)?e[-+]?[0-9]+")

Row = TypeVar("Row", bound=Spelled)


def parse(spec: str | Stage | Codec, /, **parameters: Value) -> Codec:
    """The codec that a spec string names: `"nf4"`, `"nf4:blocksize=128,double_quant=true"`, `"bf16|zstd"`.

    A single stage is a codec too; without a packer, raw is used: `"zstd"` is `"raw|zstd"`. With the name of one stage,
    its parameters may be given as keyword arguments. Raises an EncodeError that lists what is known and the nearest
    match.

        codec = tensorwire.codec("nf4", blocksize=128, double_quant=True)
    """
    if parameters:
        return _completed([_with_parameters(spec, parameters)])
    if isinstance(spec, Codec):
        return spec
    if isinstance(spec, Stage):
        return _completed([spec])
    if isinstance(spec, str):
        return _spelled(spec)
    raise EncodeError(f"a codec is a spec string, a stage or a codec, not {_kind(spec)}")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _with_parameters(name: object, parameters: dict[str, Value]) -> Stage:
    if not isinstance(name, str) or "|" in name or ":" in name:
        raise EncodeError(f"give parameters in the spec, or as keywords with the name of one stage, not with {name!r}")
    return _made(by_name(name.strip()), parameters)


@lru_cache(maxsize=256)
def _spelled(spec: str) -> Codec:
    return _completed([_stage(part) for part in spec.split("|")])


def _completed(stages: list[Stage]) -> Codec:
    if not any(isinstance(stage, Packer) for stage in stages):
        stages.insert(sum(not isinstance(stage, Compressor) for stage in stages), Raw())
    return Codec(tuple(stages))


@lru_cache(maxsize=256)
def from_stages(stages: tuple[tuple[int, ...], ...]) -> Codec:
    """The codec of an item descriptor.

    Raises UnsupportedError for an id that is not known here, FormatError for parameters or an order of stages that no
    writer produces.
    """
    pipeline = tuple(by_id(number).from_wire(tuple(parameters)) for number, *parameters in stages)
    try:
        return Codec(pipeline)
    except EncodeError as error:
        raise FormatError(error.detail) from None


def _stage(text: str) -> Stage:
    return spelled(text, by_name)


def spelled(text: str, by_name: Callable[[str], type[Row]]) -> Row:
    """The name and parameters in `"name:parameter=value,parameter=value"`. Raises EncodeError."""
    name, _, arguments = text.strip().partition(":")
    cls = by_name(name)
    values: dict[str, Value] = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or key in values:
            raise EncodeError(f"codec parameters are written name=value, once each: {text!r}")
        values[key] = _value(value)
    return _made(cls, values)


def _made(cls: type[Row], values: dict[str, Value]) -> Row:
    """A stage with these parameters. Raises EncodeError for a parameter that it does not have."""
    legal = [known.name for known in cls.parameters()]
    for key in values:
        if key not in legal:
            meant = did_you_mean(near(key, legal))
            raise EncodeError(f"{cls.name} has no parameter {show(key)}{meant}; it has {', '.join(legal) or 'none'}")
    return cls(**values)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isdecimal():
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
