"""The one table of stages: their classes, by id and by name. Everything that lists codecs is made from it.

Ids up to 32767 belong to this library and its format. From 32768 on they are private: a program may register stages
of its own there, for itself and for those who register the same.
"""

import re
import textwrap
from dataclasses import Field
from inspect import isabstract
from itertools import zip_longest
from typing import Final, TypeVar

from tensorwire.codecs.cast import BFloat16, Float16
from tensorwire.codecs.entropy import Entropy
from tensorwire.codecs.fourbit import FP4, NF4
from tensorwire.codecs.int8 import Int8, Int8Linear
from tensorwire.codecs.lowrank import LowRank
from tensorwire.codecs.patch import Patch
from tensorwire.codecs.planes import Planes
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.sparse import Sparse
from tensorwire.codecs.stage import Compressor, Packer, Stage, Transform, spell
from tensorwire.codecs.zstd import Zstd
from tensorwire.errors import EncodeError, UnsupportedError, near, show

PRIVATE_IDS: Final = range(1 << 15, 1 << 16)
MAX_PARAMETERS: Final = 8  # of a stage in a descriptor
_HELP_WIDTH: Final = 100

BUILT_IN: Final[tuple[type[Stage], ...]] = (
    Raw,
    Float16,
    BFloat16,
    Int8,
    Int8Linear,
    NF4,
    FP4,
    Planes,
    Patch,
    Sparse,
    LowRank,
    Zstd,
    Entropy,
)
_BY_ID: Final[dict[int, type[Stage]]] = {stage.id: stage for stage in BUILT_IN}
_BY_NAME: Final[dict[str, type[Stage]]] = {stage.name: stage for stage in BUILT_IN}

# Common names of codecs that are not close to the spelling of ours.
_ELSEWHERE: Final = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "int4": "nf4",
    "4bit": "nf4",
    "8bit": "int8",
    "float32": "raw",
    "fp32": "raw",
    "none": "raw",
    "gzip": "zstd",
    "zlib": "zstd",
}

S = TypeVar("S", bound=type[Stage])


def register(stage: S) -> S:
    """Register a custom stage in this process, for reading, writing and spec strings; also usable as a decorator.

    `stage`: a subclass of `Transform`, `Packer` or `Compressor` with an `id` from 32768 to 65535 and a `name`.
    Registering a class again changes nothing. Raises EncodeError for an id or name that belongs to another class, and
    for anything but a stage.

        @register
        class Negated(Packer):
            id, name, lossless, exact_length = 40_000, "negated", True, True
            ...
    """
    _check_row(stage)
    for known in (_BY_ID.get(stage.id), _BY_NAME.get(stage.name)):
        if known not in (None, stage):
            assert known is not None
            raise EncodeError(f"codec {stage.name}, id {stage.id}: {known.__qualname__} is {known.name}, id {known.id}")
    _BY_ID[stage.id] = _BY_NAME[stage.name] = stage
    return stage


def _check_row(stage: type[Stage]) -> None:
    """Raise EncodeError unless the class is complete."""
    if not (isinstance(stage, type) and issubclass(stage, (Transform, Packer, Compressor))) or isabstract(stage):
        raise EncodeError(f"{stage!r} is not a complete Transform, Packer or Compressor")
    for attribute in ("id", "name", "lossless", "exact_length"):
        if not hasattr(stage, attribute):
            raise EncodeError(f"{stage.__qualname__} lacks the class attribute {attribute}")
    if any(isinstance(value, Field) for value in vars(stage).values()):
        raise EncodeError(f"{stage.__qualname__} has parameters: decorate it with @dataclass(frozen=True, repr=False)")
    if stage not in BUILT_IN and stage.id not in PRIVATE_IDS:
        raise EncodeError(f"id {stage.id!r} of {stage.__qualname__} is not from 32768 to 65535")
    if type(stage.name) is not str or not re.fullmatch(r"[a-z][a-z0-9_.-]{0,31}", stage.name):
        raise EncodeError(f"name {stage.name!r} of {stage.__qualname__} is not lower-case letters, digits and -_.")
    if sum(known.wire for known in stage.parameters()) > MAX_PARAMETERS:
        raise EncodeError(f"{stage.__qualname__} has more than {MAX_PARAMETERS} parameters in the descriptor")


def registered() -> tuple[type[Stage], ...]:
    """All rows, by id."""
    return tuple(_BY_ID[number] for number in known_ids())


def known_ids() -> tuple[int, ...]:
    """Ids of the stages that this process can decode, to be told to a peer."""
    return tuple(sorted(_BY_ID))


def by_id(number: int) -> type[Stage]:
    """The stage with this id. Raises an UnsupportedError that says what to do."""
    if number in _BY_ID:
        return _BY_ID[number]
    if number in PRIVATE_IDS:
        raise UnsupportedError(f"codec id {number} is private: register its class (tensorwire.register) before reading")
    raise UnsupportedError(f"unknown codec id {number}; a later version of tensorwire may know it")


def by_name(name: str) -> type[Stage]:
    """The stage with this name. Raises an EncodeError that lists the known ones."""
    if name not in _BY_NAME:
        meant = [_ELSEWHERE[name.lower()]] if name.lower() in _ELSEWHERE else near(name, _BY_NAME)
        raise EncodeError(f"unknown codec {show(name)}{did_you_mean(meant)}; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def did_you_mean(names: list[str]) -> str:
    """A question, for the middle of a message; nothing if there is no name to ask about."""
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def describe() -> str:
    """All stages with their parameters, the default and the legal values of each: lines for `--help`."""
    lines = []
    for row in registered():
        parameters = "; ".join(f"{p.name} {spell(p.default)} ({p.legal})" for p in row.parameters())
        wrapped = textwrap.wrap(parameters, _HELP_WIDTH) or [""]
        lines += [f"  {name:<12} {part}".rstrip() for name, part in zip_longest([row.name], wrapped, fillvalue="")]
    return "\n".join(lines)
