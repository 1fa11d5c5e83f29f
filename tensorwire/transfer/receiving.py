"""A stream received to disk, frame by frame verified, and taken up again after either side was killed.

What is on disk is the stream itself under a temporary name, so that it says on its own how much of it is whole. The
next attempt verifies every frame in it again, cuts off a torn tail and asks the sender for the rest. Once the END frame
has come and all is synced, a journal notes the outcome and which file it is about, and that takes the final name. The
journal stays until the sender has its receipt: one that asks again is told the digest, and nothing is received twice.
It is believed only while that very file has the name; docs/transports.md has the states as a table.
"""

import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from typing import Final

from tensorwire.errors import SchemaError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage.parts import Part
from tensorwire.transfer.frames import Frame, Frames
from tensorwire.transfer.position import Outcome, Position
from tensorwire.transfer.session import RefusedError
from tensorwire.wire import NEED_DATA, Item, ItemsStart, StreamEnd
from tensorwire.wire.reader import NeedData

_HELD: Final = 4 << 20  # a frame up to this size is written when it is verified, a larger one as it comes


class Recording:
    """The place of one transfer; a `wire.drive.Consumer` that gives no results.

    `path`: where the stream will stand. `transfer`: what tells this transfer from any other to `path`. `check` gives a
    function that is called with each item before its data is taken, and raises to refuse the stream (`lambda:
    schema(model).check`); it is called anew for every time that the stream is read from its beginning. `convert` makes
    another file of the stream, given the paths of both, and that takes the name `path`. `finish` is called instead of
    the renaming, with the path of the temporary file, and has to rename it to `path`, or to raise. What was received is
    removed where one of them finds it wanting (SchemaError; any WireError of the last two) and stays otherwise.

    `position` says where the sender has to go on, `outcome` is set once the stream is whole. Raises StorageError, with
    errno EWOULDBLOCK where somebody else is receiving the same transfer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transfer: bytes,
        *,
        check: Callable[[], Callable[[Item], None]] = lambda: _accept,
        convert: Callable[[str, str], None] | None = None,
        finish: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.path = os.fspath(path)
        self.position = Position()
        self.outcome: Outcome | None = None
        self._done = False
        self._new_check = check
        self._convert = convert
        self._finish = finish
        self._limits = limits
        self._part = Part(path, transfer)
        self._events: Iterator[NeedData | Frame] = iter(())
        self._pending = bytearray()
        self._written = 0
        try:
            if not self._already_done():
                self._take_up()
        except BaseException:
            self.close()
            raise

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        return self._frames.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes went there; 0: the input has ended."""
        self._pending += self._frames.get_buffer()[:size]
        self._frames.buffer_updated(size)
        if len(self._pending) >= _HELD:
            self._store()

    def lend(self, data: memoryview) -> None:
        """The next bytes, which are copied."""
        self.get_buffer()[: len(data)] = data
        self.buffer_updated(len(data))

    def steps(self) -> Generator[NeedData, None, None]:
        """NEED_DATA until the stream is whole."""
        try:
            for event in self._events:
                if event is NEED_DATA:
                    yield NEED_DATA
                else:
                    self._verified(event)
                    self._store()
        except SchemaError:
            self.discard()
            raise

    def begin_anew(self) -> None:
        """Begin with nothing: what was received is of another stream. Raises RefusedError where that is complete."""
        if self._done:
            raise RefusedError(
                "another stream has already arrived under this name: send this one as a new transfer", kind="done"
            )
        self._part.truncate(0)
        self._written, self._pending = 0, bytearray()
        self._replay(self._part.read_at, 0)

    def commit(self) -> Outcome:
        """Give the whole stream its final name, once and for all. Raises StorageError, and what `finish` raises."""
        assert self.outcome is not None
        if not self._done:
            try:
                note = json.dumps(asdict(self.outcome)).encode("ascii")
                self._part.finish(note, convert=self._convert, name=self._finish)
            except WireError:
                self.discard()
                raise
            self._done = True
            self.close()
        return self.outcome

    def forget(self) -> None:
        """The sender has its receipt: the journal is no longer needed."""
        self._part.forget()

    def discard(self) -> None:
        """Remove what was received."""
        self.close()
        self._part.discard()

    def close(self) -> None:
        """Let go of the file; what is whole in it stays for the next attempt."""
        self._part.close()
        # Not to wait for the garbage collector where `check` or `finish` know this recording.
        self._events, self._pending = iter(()), bytearray()
        self._frames = Frames(limits=self._limits)

    def _already_done(self) -> bool:
        """Whether the whole stream has its final name and is still what it was then."""
        journal = self._part.note()
        if journal is None:
            return False
        try:
            fields = json.loads(journal)
            outcome = Outcome(Position(**fields["end"]), fields["digest"])
        except (ValueError, KeyError, TypeError):
            return False
        if self._convert is None and not self._stands(outcome):
            return False
        self.position, self.outcome = outcome.end, outcome
        self._events = iter(())
        self._done = True
        self._part.close()
        self._part.tidy()
        return True

    def _stands(self, outcome: Outcome) -> bool:
        with self._part.named() as read_at:
            return self._replay(read_at, outcome.end.offset) and self.outcome == outcome

    def _take_up(self) -> None:
        """Verify what an earlier attempt left, and cut it off behind the last frame that is whole."""
        whole = self._part.open()
        if not whole and self._already_done():  # somebody else had it until now
            return
        while not self._replay(self._part.read_at, whole):
            whole = self.position.offset
        self._part.truncate(whole)
        self._written = whole

    def _replay(self, read_at: Callable[[memoryview, int], int], size: int) -> bool:
        """Feed the first `size` bytes of a file back in. Returns whether they are whole frames."""
        self._frames = Frames(limits=self._limits)
        self._events = self._frames.steps()
        self._check = self._new_check()
        self.position, self.outcome = Position(), None
        done = 0
        try:
            for event in self._events:
                if event is not NEED_DATA:
                    self._verified(event)
                elif done == size:
                    break
                else:
                    got = read_at(self._frames.get_buffer()[: size - done], done)
                    self._frames.buffer_updated(got)
                    done += got
        except WireError:
            return False
        return self.position.offset == size

    def _verified(self, frame: Frame) -> None:
        if isinstance(frame.event, ItemsStart):
            for item in frame.event.items:
                self._check(item)
        end = Position(frame.header.sequence + 1, frame.offset + frame.size, frame.header.crc)
        if isinstance(frame.event, StreamEnd):
            self.outcome = Outcome(end, frame.event.summary.digest.hex())
        self.position = end

    def _store(self) -> None:
        self._part.write_at(memoryview(self._pending), self._written)
        self._written += len(self._pending)
        self._pending = bytearray()


def _accept(item: Item) -> None:
    pass
