"""How far a transfer has come, and its result."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a stream is there, in complete frames.

    The number of frames, their bytes including the preamble, and the CRC of the last header. The next frame repeats
    this CRC as its link, so it identifies everything before it.
    """

    frames: int = 0
    offset: int = 0
    link: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A completely received stream: where it ended, and the SHA-256 in its END frame, in hexadecimal."""

    end: Position
    digest: str
