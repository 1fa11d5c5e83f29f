"""Resumable transfers of any stream, without I/O: position, sender, receiver, and the messages between them."""

from tensorwire.transfer.frames import Frame, Frames
from tensorwire.transfer.position import Outcome, Position
from tensorwire.transfer.receiving import Recording
from tensorwire.transfer.resume import Backoff, Watched
from tensorwire.transfer.sending import Outgoing, Recorded, Regenerated, version_of
from tensorwire.transfer.session import (
    Conversation,
    Do,
    Fill,
    Offer,
    Peer,
    Receipt,
    RefusedError,
    Send,
    greet,
    hear,
    receive_stream,
    refuse,
    say,
    send_stream,
    wait,
)

__all__ = [
    "Backoff",
    "Conversation",
    "Do",
    "Fill",
    "Frame",
    "Frames",
    "Offer",
    "Outcome",
    "Outgoing",
    "Peer",
    "Position",
    "Receipt",
    "Recorded",
    "Recording",
    "RefusedError",
    "Regenerated",
    "Send",
    "Watched",
    "greet",
    "hear",
    "receive_stream",
    "refuse",
    "say",
    "send_stream",
    "version_of",
    "wait",
]
