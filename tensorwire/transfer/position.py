"""How far a transfer is, and what came of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a stream is whole.

    The number of frames, their bytes with the preamble, and the last header's CRC, which the next frame repeats as its
    link and which stands for all before it.
    """

    frames: int = 0
    offset: int = 0
    link: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A stream that was received whole: where it ended and the SHA-256 that its END frame carries, in hexadecimal."""

    end: Position
    digest: str
