"""Containers and files <-> streams: where codecs and the wire format meet."""

from tensorwire.codecs import CODECS, Zstd
from tensorwire.streams.chunks import decode_file, encode_file
from tensorwire.streams.decode import collect, decode, decode_async
from tensorwire.streams.encode import FRAME_SIZE, encode
from tensorwire.streams.files import TensorFile, iterate_file, load_file, save_file
from tensorwire.streams.outgoing import Outgoing, Recorded, Regenerated
from tensorwire.streams.pool import get_spare_memory, set_spare_memory
from tensorwire.streams.recording import Outcome, Position, Recording
from tensorwire.streams.schema import Schema

# Ids of the codecs that streams of this build can hold, for a peer to know.
CODEC_IDS = tuple(sorted(codec.id for codec in (*CODECS, Zstd)))

__all__ = [
    "CODEC_IDS",
    "FRAME_SIZE",
    "Outcome",
    "Outgoing",
    "Position",
    "Recorded",
    "Recording",
    "Regenerated",
    "Schema",
    "TensorFile",
    "collect",
    "decode",
    "decode_async",
    "decode_file",
    "encode",
    "encode_file",
    "get_spare_memory",
    "iterate_file",
    "load_file",
    "save_file",
    "set_spare_memory",
]
