"""Receives a stream to disk, verifying frame by frame, and resumes after either side was killed.

The file on disk is the stream itself under a temporary name, so the file alone shows how much has arrived. The next
attempt verifies every frame in it again, cuts off an incomplete tail and asks the sender for the rest. Once the END
frame has arrived and everything is synced, a journal records the outcome and which file it is about, and the file gets
its final name. The journal stays until the sender has its receipt: a sender that asks again is told the digest, and
nothing is received twice. The journal is believed only while that very file has the name; docs/transports.md lists the
states in a table.
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

_HELD: Final = 4 << 20  # a frame up to this size is written once it is verified, a larger one as it arrives


class Recording:
    """The destination of one transfer; a `wire.drive.Consumer` without results.

    `path`: the final name of the file. `transfer`: the key that distinguishes this transfer from others to `path`.
    `check`: returns a function that is called with each item before its data is received, and raises to refuse the
    stream (`lambda: schema(model).check`); a new one is requested each time the stream is read from its beginning.
    `convert`: called with the path of the stream and that of a new file, which it writes from the stream and which then
    gets the name `path`. `finish`: called with the path of the temporary file instead of renaming it; it must rename
    the file to `path`, or raise. If `check` raises SchemaError, or `convert` or `finish` any WireError, what was
    received is removed; otherwise it stays for the next attempt.

    `position` says where the sender must continue; `outcome` is set once the stream is complete. Raises StorageError,
    with errno EWOULDBLOCK if another process or thread is receiving the same transfer.
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
        """Note that `size` bytes were written there; 0: the input has ended."""
        self._pending += self._frames.get_buffer()[:size]
        self._frames.buffer_updated(size)
        if len(self._pending) >= _HELD:
            self._store()

    def lend(self, data: memoryview) -> None:
        """Take `data` as the next bytes, by copying them."""
        self.get_buffer()[: len(data)] = data
        self.buffer_updated(len(data))

    def steps(self) -> Generator[NeedData, None, None]:
        """Yields NEED_DATA until the stream is complete."""
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
        """Drop what was received, because it is of another stream. Raises RefusedError if that stream is complete."""
        if self._done:
            raise RefusedError(
                "another stream has already arrived under this name: send this one as a new transfer", kind="done"
            )
        self._part.truncate(0)
        self._written, self._pending = 0, bytearray()
        self._replay(self._part.read_at, 0)

    def commit(self) -> Outcome:
        """Give the complete stream its final name, once. Raises StorageError, and what `finish` raises."""
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
        """Close the file; the complete frames in it stay for the next attempt."""
        self._part.close()
        # Breaks reference cycles through `check` or `finish`, so that nothing waits for the garbage collector.
        self._events, self._pending = iter(()), bytearray()
        self._frames = Frames(limits=self._limits)

    def _already_done(self) -> bool:
        """Whether the complete stream has its final name and has not changed since."""
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
        """Verify what an earlier attempt left, and cut it off after the last complete frame."""
        whole = self._part.open()
        if not whole and self._already_done():  # another receiver has just completed it
            return
        while not self._replay(self._part.read_at, whole):
            whole = self.position.offset
        self._part.truncate(whole)
        self._written = whole

    def _replay(self, read_at: Callable[[memoryview, int], int], size: int) -> bool:
        """Read the first `size` bytes of a file as if they arrived now. Returns whether they are complete frames."""
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
