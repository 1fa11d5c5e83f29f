"""How many bytes a stream takes, without making it: the wire format's own writer is driven with sizes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensorwire.errors import EncodeError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams.codec_choice import CodecChoice, rule
from tensorwire.streams.flatten import BareLeaf, Leaf, TensorLeaf, flatten
from tensorwire.streams.sender import FRAME_SIZE, cuts, stream_info
from tensorwire.tensor import Front
from tensorwire.wire import StreamInfo, Writer


@dataclass(frozen=True, slots=True)
class StreamSize:
    """Bytes of a stream: of payloads, `metadata` of them for absmax, scales and the like, and of all around them."""

    payloads: int
    metadata: int
    framing: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.payloads + self.framing


def stream_size(
    value: Any,
    front: Front,
    *,
    codec: CodecChoice = "raw",
    frame_size: int = FRAME_SIZE,
    metadata: Mapping[str, str] | None = None,
    stream_id: bytes = b"",
    tie: bool = True,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
) -> StreamSize:
    """The size of what `encode` makes of a container: exact where codecs have a fixed length, else an upper bound."""
    if isinstance(value, Iterator):
        raise EncodeError("the size of an iterator of pairs is known only once it was encoded; give a container")
    leaves = flatten(value, front, rule(codec), limits, tie=tie)
    info = stream_info(metadata, stream_id, at_rest=at_rest)
    return _size(leaves, info, frame_size, at_rest=at_rest, limits=limits)


def _size(leaves: Iterable[Leaf], info: StreamInfo, frame_size: int, *, at_rest: bool, limits: Limits) -> StreamSize:
    # Lengths do not depend on checksums, so nothing is checksummed.
    writer = Writer(lambda data, crc: 0, limits, index=at_rest)
    described = list(leaves)
    framing = len(writer.start(info))
    framing += sum(len(writer.item(leaf.item)) for leaf in described)
    payloads = metadata = 0
    for leaf in described:
        if isinstance(leaf, BareLeaf):
            continue
        for start, stop in cuts(leaf, frame_size, at_rest=at_rest):
            count = stop - start
            length = leaf.codec.bound(count, leaf.item.dtype) if isinstance(leaf, TensorLeaf) else count
            framing += len(writer.data(start, count, length, 0))
            payloads += length
            metadata += leaf.codec.sizes(count, leaf.item.dtype).metadata if isinstance(leaf, TensorLeaf) else 0
    return StreamSize(payloads, metadata, framing + len(writer.end()))
