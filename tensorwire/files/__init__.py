"""Files at rest: `.tw`, `.safetensors` and any other kind; how to inspect, verify and authenticate them."""

from tensorwire.files.any import decode_file, encode_file
from tensorwire.files.source import HEAD, File, kind_of, opened
from tensorwire.files.tw import Progress, TensorFile, TensorSlice, iterate_file, load_file, save_file

__all__ = [
    "HEAD",
    "File",
    "Progress",
    "TensorFile",
    "TensorSlice",
    "decode_file",
    "encode_file",
    "iterate_file",
    "kind_of",
    "load_file",
    "opened",
    "save_file",
]
