"""Containers <-> frames: where codecs and the wire format meet."""

from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.flatten import Rule, as_pair, flatten
from tensorwire.streams.pieces import Pieces
from tensorwire.streams.receiver import Completed, ItemStart, Payload, Piece, Receiver
from tensorwire.streams.report import Report, size_text
from tensorwire.streams.schema import Schema
from tensorwire.streams.sender import FLUSH, FRAME_SIZE, Sender, StreamSize, encode, stream_info, stream_size
from tensorwire.streams.sinks import collect, decode, decode_async

__all__ = [
    "FLUSH",
    "FRAME_SIZE",
    "CodecChoice",
    "Completed",
    "ItemStart",
    "Payload",
    "Piece",
    "Pieces",
    "Receiver",
    "Report",
    "Rule",
    "Schema",
    "Sender",
    "StreamSize",
    "as_pair",
    "collect",
    "decode",
    "decode_async",
    "encode",
    "flatten",
    "rule",
    "size_text",
    "stream_info",
    "stream_size",
]
