"""Containers <-> frames: where codecs and the wire format meet."""

from tensorwire.streams.applying import Applied, Patch, setter, value_at
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.decoder import Decoder
from tensorwire.streams.encoded import EncodedTensor, InMemory, OnDisk, Store, collect_encoded
from tensorwire.streams.flatten import Leaf, Rule, TensorLeaf, ValueLeaf, as_pair, flatten
from tensorwire.streams.patches import encode_patch
from tensorwire.streams.pieces import Pieces
from tensorwire.streams.receiver import Completed, ItemStart, Payload, Piece, Receiver
from tensorwire.streams.report import Report, size_text
from tensorwire.streams.schema import Schema
from tensorwire.streams.sender import FLUSH, FRAME_SIZE, Sender, StreamSize, encode, gather, stream_info, stream_size
from tensorwire.streams.sinks import collect, decode, decode_async
from tensorwire.streams.versions import digest

__all__ = [
    "FLUSH",
    "FRAME_SIZE",
    "Applied",
    "CodecChoice",
    "Completed",
    "Decoder",
    "EncodedTensor",
    "InMemory",
    "ItemStart",
    "Leaf",
    "OnDisk",
    "Patch",
    "Payload",
    "Piece",
    "Pieces",
    "Receiver",
    "Report",
    "Rule",
    "Schema",
    "Sender",
    "Store",
    "StreamSize",
    "TensorLeaf",
    "ValueLeaf",
    "as_pair",
    "collect",
    "collect_encoded",
    "decode",
    "decode_async",
    "digest",
    "encode",
    "encode_patch",
    "flatten",
    "gather",
    "rule",
    "setter",
    "size_text",
    "stream_info",
    "stream_size",
    "value_at",
]
