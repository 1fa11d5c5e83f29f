"""How many bytes a stream takes, without making it: the wire format's own writer is driven with sizes."""

from collections.abc import Iterable
from dataclasses import dataclass

from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams.flatten import BareLeaf, Leaf, TensorLeaf
from tensorwire.streams.sender import FRAME_SIZE, cuts, stream_info
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
    leaves: Iterable[Leaf],
    *,
    info: StreamInfo | None = None,
    frame_size: int = FRAME_SIZE,
    at_rest: bool = False,
    limits: Limits = DEFAULT,
) -> StreamSize:
    """The size of a stream of these leaves; of a file whose size is not known ahead, without its data."""
    # Lengths do not depend on checksums, so nothing is checksummed.
    writer = Writer(lambda data, crc: 0, limits, index=at_rest)
    described = list(leaves)
    framing = len(writer.start(info or stream_info(None, at_rest=at_rest)))
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
