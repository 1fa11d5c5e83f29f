"""Spec strings and wire ids to codecs: one table, closed."""

from typing import Any, Final

from tensorwire.codecs.base import Codec
from tensorwire.codecs.cast import BFloat16, Float16
from tensorwire.codecs.fourbit import FP4, NF4
from tensorwire.codecs.int8 import Int8, Int8Linear
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.zstd import Zstd
from tensorwire.errors import EncodeError, FormatError, UnsupportedError

CODECS: Final[tuple[type[Codec], ...]] = (Raw, Float16, BFloat16, Int8, Int8Linear, NF4, FP4)
_BY_NAME: Final = {codec.name: codec for codec in CODECS}
_BY_ID: Final = {codec.id: codec for codec in CODECS}


def known_ids() -> tuple[int, ...]:
    """Ids of the codecs that this process can decode, for a peer to know."""
    return tuple(sorted(codec.id for codec in (*CODECS, Zstd)))


def parse(spec: str | Codec) -> Codec:
    """The codec that a spec string names: `"nf4"`, `"nf4:blocksize=128,double_quant=true"`, `"bf16|zstd"`.

    `"zstd"` alone is `"raw|zstd"`. Raises EncodeError with what is known.
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise EncodeError(f"a codec is a spec string or a codec, not {type(spec).__name__}")
    first, *rest = (_stage(part) for part in spec.split("|"))
    if first[0] == Zstd.name:
        rest.insert(0, first)
        first = (Raw.name, {})
    if first[0] not in _BY_NAME:
        raise EncodeError(f"unknown codec {first[0]!r}; known: {', '.join([*_BY_NAME, Zstd.name])}")
    codec = _build(_BY_NAME[first[0]], first[1])
    for name, parameters in rest:
        if name != Zstd.name:
            raise EncodeError(f"only zstd may stand behind another codec, not {name!r}")
        codec = _build(Zstd, {"inner": codec, **parameters})
    return codec


def from_stages(stages: tuple[tuple[int, ...], ...]) -> Codec:
    """The codec of an item descriptor. Raises UnsupportedError or FormatError."""
    (number, *parameters), rest = stages[0], stages[1:]
    if number not in _BY_ID:
        raise UnsupportedError(f"unknown codec id {number}")
    cls = _BY_ID[number]
    names = ("blocksize", "double_quant") if cls in (NF4, FP4) else ("blocksize",) if cls in (Int8, Int8Linear) else ()
    if len(parameters) != len(names):
        raise FormatError(f"codec {cls.name} takes {len(names)} parameters, not {len(parameters)}")
    values: dict[str, Any] = dict(zip(names, parameters, strict=True))
    if "double_quant" in values:
        if values["double_quant"] > 1:
            raise FormatError("double_quant must be 0 or 1")
        values["double_quant"] = bool(values["double_quant"])
    try:
        codec = cls(**values)
    except EncodeError as error:
        raise FormatError(error.detail) from None
    if not rest:
        return codec
    if rest != ((Zstd.id,),):
        raise UnsupportedError(f"unknown codec stages {rest}; only zstd may stand behind another codec")
    return Zstd(codec)


def _stage(text: str) -> tuple[str, dict[str, Any]]:
    name, _, arguments = text.strip().partition(":")
    parameters = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if not equals or key.strip() in parameters:
            raise EncodeError(f"codec parameters are written name=value, once each: {text!r}")
        parameters[key.strip()] = _value(value.strip())
    return name, parameters


def _value(text: str) -> int | bool | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text


def _build(cls: type[Codec], parameters: dict[str, Any]) -> Codec:
    known = {name for name in cls.__dataclass_fields__}
    unknown = sorted(parameters.keys() - known)
    if unknown:
        raise EncodeError(
            f"{cls.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    return cls(**parameters)
