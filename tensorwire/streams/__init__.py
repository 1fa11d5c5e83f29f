"""Containers and files <-> streams: where codecs and the wire format meet."""

from tensorwire.streams.chunks import decode_file, encode_file
from tensorwire.streams.decode import collect, decode, decode_async
from tensorwire.streams.encode import FRAME_SIZE, encode
from tensorwire.streams.files import TensorFile, iterate_file, load_file, save_file
from tensorwire.streams.schema import Schema

__all__ = [
    "FRAME_SIZE",
    "Schema",
    "TensorFile",
    "collect",
    "decode",
    "decode_async",
    "decode_file",
    "encode",
    "encode_file",
    "iterate_file",
    "load_file",
    "save_file",
]
