"""Containers <-> frames: where codecs and the wire format meet."""

from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.schema import Schema
from tensorwire.streams.sender import FRAME_SIZE, encode
from tensorwire.streams.sinks import collect, decode, decode_async
from tensorwire.streams.slices import Piece, Pieces

__all__ = [
    "FRAME_SIZE",
    "CodecChoice",
    "Piece",
    "Pieces",
    "Schema",
    "collect",
    "decode",
    "decode_async",
    "encode",
    "rule",
]
