"""Tensor slices <-> payloads. One file a family; the contract is in base.py, the layouts in docs/codecs.md."""

from tensorwire.codecs.base import Codec, Encoded, Sizes
from tensorwire.codecs.cast import BFloat16, Float16
from tensorwire.codecs.floats import as_floats, from_floats, is_float
from tensorwire.codecs.fourbit import FP4, NF4
from tensorwire.codecs.int8 import Int8, Int8Linear
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.spec import CODECS, from_stages, known_ids, parse
from tensorwire.codecs.zstd import Zstd

__all__ = [
    "CODECS",
    "FP4",
    "NF4",
    "BFloat16",
    "Codec",
    "Encoded",
    "Float16",
    "Int8",
    "Int8Linear",
    "Raw",
    "Sizes",
    "Zstd",
    "as_floats",
    "from_floats",
    "from_stages",
    "is_float",
    "known_ids",
    "parse",
]
