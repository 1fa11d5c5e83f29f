"""tensorwire: the wire format and compression library for tensors.

    data = tensorwire.dumps(state_dict, codec="nf4")        # one message
    state_dict = tensorwire.torch.loads(data)

    transport.send(tensorwire.encode(state_dict, codec="bf16|zstd"))      # O(frame) memory on both sides
    for name, tensor in tensorwire.decode(transport.receive()): ...

The functions here take torch tensors and NumPy arrays and return NumPy arrays; `tensorwire.torch` has the same
functions returning torch tensors. Importing this package loads neither torch nor bitsandbytes.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if sys.byteorder != "little":  # as streams are; the kernels do not swap bytes, so values would be wrong
    raise ImportError("tensorwire runs on little-endian machines only; tests/reference.py reads streams on any")

try:
    from tensorwire import numpy as _numpy
except ImportError as error:
    # A bad environment variable is an ImportError in Python, but one line on the command line.
    # (-m: while Python looks for the module of `python -m tensorwire`)
    if "TENSORWIRE_" not in str(error):
        raise
    if os.path.basename(sys.argv[0]) not in ("-m", "tensorwire", "tensorwire.exe"):
        raise ImportError(str(error)) from None  # without the way through this library, which explains nothing
    print(f"tensorwire: {error}", file=sys.stderr)
    sys.exit(2)

from tensorwire.api import Api
from tensorwire.codecs import Codec, register
from tensorwire.codecs import parse as codec
from tensorwire.errors import (
    ArgumentError,
    AuthError,
    ClosedError,
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    MissingFileError,
    NonFiniteError,
    SchemaError,
    SequenceError,
    StorageError,
    TensorwireError,
    TransportError,
    TruncatedError,
    UnsupportedError,
    WireError,
)
from tensorwire.files import TensorFile, TensorSlice, decode_file, encode_file
from tensorwire.kernels import get_threads, set_threads
from tensorwire.limits import Limits
from tensorwire.memory import get_spare_memory, set_spare_memory
from tensorwire.streams import Decoder, EncodedTensor, InMemory, OnDisk, Patch, Report, Schema, gather
from tensorwire.tensor import AnyFront
from tensorwire.wire import name_of, path_of

if TYPE_CHECKING:
    from tensorwire import torch as torch
    from tensorwire.files.examine import inspect, verify
    from tensorwire.files.versions import diff, patch

__version__: Final = "0.1.0"

__all__ = [
    "ArgumentError",
    "AuthError",
    "ClosedError",
    "Codec",
    "CorruptError",
    "Decoder",
    "EncodeError",
    "EncodedTensor",
    "FormatError",
    "InMemory",
    "LimitError",
    "Limits",
    "MissingFileError",
    "NonFiniteError",
    "OnDisk",
    "Patch",
    "Report",
    "Schema",
    "SchemaError",
    "SequenceError",
    "StorageError",
    "TensorFile",
    "TensorSlice",
    "TensorwireError",
    "TransportError",
    "TruncatedError",
    "UnsupportedError",
    "WireError",
    "apply",
    "codec",
    "decode",
    "decode_async",
    "decode_file",
    "decoder",
    "diff",
    "digest",
    "dumps",
    "encode",
    "encode_async",
    "encode_file",
    "encoded_size",
    "gather",
    "get_spare_memory",
    "get_threads",
    "inspect",
    "load_file",
    "loads",
    "name_of",
    "open_file",
    "patch",
    "path_of",
    "register",
    "save_file",
    "schema",
    "set_spare_memory",
    "set_threads",
    "verify",
]

# Packages and modules that are loaded on first use.
_LAZY: Final = ("authenticity", "integrations", "safetensors", "torch", "transfer", "transports", "updates", "versions")


_api: Final = Api(AnyFront(_numpy.FRONT))
encode = _api.encode
encode_async = _api.encode_async
encoded_size = _api.encoded_size
decode = _api.decode
decode_async = _api.decode_async
decoder = _api.decoder
dumps = _api.dumps
loads = _api.loads
save_file = _api.save_file
load_file = _api.load_file
open_file = _api.open_file
schema = _api.schema
digest = _api.digest
apply = _api.apply


_LAZY_FUNCTIONS: Final = {
    "diff": "files.versions",
    "inspect": "files.examine",
    "patch": "files.versions",
    "verify": "files.examine",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"tensorwire.{name}")
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(f"tensorwire.{_LAZY_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'tensorwire' has no attribute {name!r}")
