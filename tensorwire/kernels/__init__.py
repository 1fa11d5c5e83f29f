"""Arrays in, arrays out: the one door to the C++ extension, and its readable twin in NumPy.

Every kernel exists twice with the same signature (contract.py) and the same bits: in ``_native`` (csrc/) and in
``_numpy``, which is the definition. All arrays are 1-D, C-contiguous and owned by the caller; outputs are given, never
allocated, never overlap an input, and their sizes are checked against one another before anything is written.
A *float array* is float32, float16, or uint16 holding bfloat16 bit patterns (NumPy has no bfloat16).

A quantizer returns whether all its input was finite; when it returns False the outputs are to be thrown away.
`crc`, a uint32 array of one element, receives the CRC-32C of the absmax or scales followed by the codes, or of `out`:
taken while they are made where the instruction set allows, which costs less than reading them again.
`uncached`: whether `out` is written past the caches, which is right for memory that was written before and will not be
read soon; None: if it is larger than they are.
`default_environment()` is for whoever calculates beside the kernels, which are in it anyway: torch may have been told
to flush subnormals, and then the same input would give other bytes. The twin has no way to do that.

A wrong dtype raises TypeError, wrong sizes or overlap ValueError: callers pass checked sizes, so either is a bug.

The implementation is chosen once, at import: ``TENSORWIRE_ISA=numpy`` forces the twins, ``portable``, ``avx2``,
``avx512`` or ``neon`` an instruction set; `isa` says which one serves. A call uses one thread unless ``set_threads`` or
``TENSORWIRE_THREADS`` says otherwise; the twin always does.
"""

import os
import warnings
from typing import Final

from tensorwire.kernels.contract import HostKernels

__all__ = [
    "accumulate",
    "accumulate_4bit",
    "accumulate_int8",
    "accumulate_linear",
    "add_difference",
    "add_selected",
    "blockwise_absmax",
    "byte_histogram",
    "cast",
    "combine_selected",
    "crc32c",
    "decay_and_add",
    "decay_and_select",
    "decode_changes",
    "decode_positions",
    "default_environment",
    "dequantize_4bit",
    "dequantize_int8",
    "dequantize_linear",
    "difference",
    "divide_by_rms",
    "encode_changes",
    "encode_positions",
    "get_threads",
    "huffman_decode",
    "huffman_encode",
    "implementation",
    "isa",
    "merge_planes",
    "nonzero_blocks",
    "pack_values",
    "quantize_4bit",
    "quantize_int8",
    "quantize_linear",
    "select_largest",
    "set_threads",
    "split_planes",
    "sum_magnitudes",
    "unpack_values",
]


def _choose() -> tuple[HostKernels, str]:
    # The twin is imported only where it serves: it costs a fifth of the whole import.
    if os.environ.get("TENSORWIRE_ISA") == "numpy":
        return _twin(), "numpy"
    try:
        import tensorwire.kernels._native as _native
    except ModuleNotFoundError as error:
        warnings.warn(
            f"tensorwire: the C++ extension is missing ({error}). {_remedy()} "
            "Until then NumPy serves, 10 to 200 times slower; set TENSORWIRE_ISA=numpy to accept this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return _twin(), "numpy"
    native: HostKernels = _native
    return native, _native.isa()


def _twin() -> HostKernels:
    from tensorwire.kernels import _numpy

    return _numpy


def _remedy() -> str:
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not os.path.isdir(os.path.join(checkout, "csrc")):
        return "Reinstall with a C++17 compiler."
    return (
        f"This is the source checkout {checkout}, which hides an installed tensorwire, because `python -m` and "
        "`python -c` look into the current directory first: run `pip install -e .` in it, or start Python elsewhere."
    )


_module, isa = _choose()
implementation: Final = "numpy" if isa == "numpy" else "native"

crc32c = _module.crc32c
cast = _module.cast
accumulate = _module.accumulate
accumulate_4bit = _module.accumulate_4bit
accumulate_int8 = _module.accumulate_int8
accumulate_linear = _module.accumulate_linear
default_environment = _module.default_environment
blockwise_absmax = _module.blockwise_absmax
quantize_4bit = _module.quantize_4bit
dequantize_4bit = _module.dequantize_4bit
quantize_int8 = _module.quantize_int8
dequantize_int8 = _module.dequantize_int8
quantize_linear = _module.quantize_linear
dequantize_linear = _module.dequantize_linear
nonzero_blocks = _module.nonzero_blocks
byte_histogram = _module.byte_histogram
huffman_encode = _module.huffman_encode
huffman_decode = _module.huffman_decode
split_planes = _module.split_planes
merge_planes = _module.merge_planes
select_largest = _module.select_largest
add_selected = _module.add_selected
combine_selected = _module.combine_selected
encode_positions = _module.encode_positions
decode_positions = _module.decode_positions
sum_magnitudes = _module.sum_magnitudes
pack_values = _module.pack_values
unpack_values = _module.unpack_values
decay_and_add = _module.decay_and_add
decay_and_select = _module.decay_and_select
divide_by_rms = _module.divide_by_rms
difference = _module.difference
add_difference = _module.add_difference
encode_changes = _module.encode_changes
decode_changes = _module.decode_changes
set_threads = _module.set_threads
get_threads = _module.get_threads
