"""Containers <-> frames: where codecs and the wire format meet."""

from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.pieces import Pieces
from tensorwire.streams.receiver import Completed, Payload, Piece, Receiver
from tensorwire.streams.schema import Schema
from tensorwire.streams.sender import FRAME_SIZE, encode, encode_async
from tensorwire.streams.sinks import collect, decode, decode_async
from tensorwire.streams.size import StreamSize, stream_size

__all__ = [
    "FRAME_SIZE",
    "CodecChoice",
    "Completed",
    "Payload",
    "Piece",
    "Pieces",
    "Receiver",
    "Schema",
    "StreamSize",
    "collect",
    "decode",
    "decode_async",
    "encode",
    "encode_async",
    "rule",
    "stream_size",
]
