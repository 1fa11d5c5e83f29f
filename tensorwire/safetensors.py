"""The short name of `tensorwire.files.safetensors`.

from tensorwire.safetensors import decode, encode
"""

from tensorwire.files.safetensors import (
    Checkpoint,
    SafetensorsFile,
    SafetensorsShards,
    decode,
    encode,
    open_checkpoint,
)

__all__ = ["Checkpoint", "SafetensorsFile", "SafetensorsShards", "decode", "encode", "open_checkpoint"]
