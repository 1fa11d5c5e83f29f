"""Tensor slices <-> payloads: codecs, each a sequence of stages.

The contract is in stage.py, the layouts are in docs/codecs.md; each family of stages has a file.
"""

from tensorwire.codecs.cast import BFloat16, Float16
from tensorwire.codecs.entropy import Entropy
from tensorwire.codecs.floats import (
    add_weighted,
    as_floats,
    from_floats,
    is_calculated,
    is_float,
    kernel_view,
    largest,
    largest_of,
)
from tensorwire.codecs.fourbit import FP4, NESTED_BLOCKSIZE, NF4, unnest
from tensorwire.codecs.int8 import Int8, Int8Linear
from tensorwire.codecs.lowrank import Factors, LowRank
from tensorwire.codecs.patch import (
    CHUNK,
    Binding,
    Checksums,
    Patch,
    binding_of,
    chunk_checksums,
    count_unequal,
    patch_slice,
)
from tensorwire.codecs.pipeline import Codec, Readymade
from tensorwire.codecs.planes import Planes
from tensorwire.codecs.quantizer import QuantizedState, TableQuantizer, checked_absmax
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.registry import BUILT_IN, describe, known_ids, register, registered
from tensorwire.codecs.sparse import NOTHING, Selected, Sparse
from tensorwire.codecs.spec import RAW, from_stages, parse, spelled
from tensorwire.codecs.stage import (
    Choice,
    Compressor,
    Encoded,
    Packer,
    Parameter,
    Part,
    Range,
    Real,
    Sizes,
    Spelled,
    Stage,
    Take,
    Transform,
    parameter,
)
from tensorwire.codecs.zstd import Zstd

__all__ = [
    "BUILT_IN",
    "CHUNK",
    "FP4",
    "NESTED_BLOCKSIZE",
    "NF4",
    "NOTHING",
    "RAW",
    "BFloat16",
    "Binding",
    "Checksums",
    "Choice",
    "Codec",
    "Compressor",
    "Encoded",
    "Entropy",
    "Factors",
    "Float16",
    "Int8",
    "Int8Linear",
    "LowRank",
    "Packer",
    "Parameter",
    "Part",
    "Patch",
    "Planes",
    "QuantizedState",
    "Range",
    "Raw",
    "Readymade",
    "Real",
    "Selected",
    "Sizes",
    "Sparse",
    "Spelled",
    "Stage",
    "TableQuantizer",
    "Take",
    "Transform",
    "Zstd",
    "add_weighted",
    "as_floats",
    "binding_of",
    "checked_absmax",
    "chunk_checksums",
    "count_unequal",
    "describe",
    "from_floats",
    "from_stages",
    "is_calculated",
    "is_float",
    "kernel_view",
    "known_ids",
    "largest",
    "largest_of",
    "parameter",
    "parse",
    "patch_slice",
    "register",
    "registered",
    "spelled",
    "unnest",
]
