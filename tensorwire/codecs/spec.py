"""Spec strings, stages and wire ids to codecs."""

from functools import lru_cache
from typing import Final

from tensorwire.codecs.pipeline import Codec
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.registry import by_id, by_name
from tensorwire.codecs.stage import Compressor, Packer, Stage, Value
from tensorwire.errors import EncodeError, FormatError

# What carries whatever nobody chose a codec for.
RAW: Final = Codec((Raw(),))


def parse(spec: str | Stage | Codec) -> Codec:
    """The codec that a spec string names: `"nf4"`, `"nf4:blocksize=128,double_quant=true"`, `"bf16|zstd"`.

    A stage is a codec of its own, and where no stage makes bytes, raw does: `"zstd"` is `"raw|zstd"`. Raises
    EncodeError with what is known.

        codec = tensorwire.codec("nf4:blocksize=128")
    """
    if isinstance(spec, Codec):
        return spec
    if isinstance(spec, Stage):
        return _completed([spec])
    if isinstance(spec, str):
        return _spelled(spec)
    raise EncodeError(f"a codec is a spec string, a stage or a codec, not {type(spec).__name__}")


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
    name, _, arguments = text.strip().partition(":")
    cls = by_name(name)
    legal = {known.name for known in cls.parameters()}
    values: dict[str, Value] = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or key in values:
            raise EncodeError(f"codec parameters are written name=value, once each: {text!r}")
        if key not in legal:
            raise EncodeError(f"{name} has no parameter {key}; it has {', '.join(sorted(legal)) or 'none'}")
        values[key] = _value(value)
    return cls(**values)


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text
