"""A stream received to disk, frame by frame verified, and taken up again after either side was killed.

What is on disk is the stream itself under a temporary name, so that it says on its own how much of it is whole. The next
attempt verifies every frame in it again, cuts off a torn tail and asks the sender for the rest. Once the END frame has come and
all is synced, a journal notes the outcome, and the stream takes its final name. The journal stays until the sender has its
receipt: one that asks again is told the digest, and nothing is received twice.
"""

import errno
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from typing import Any, Final

from tensorwire.errors import SchemaError, StorageError, TensorwireError, WireError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage.atomic import sync_folder
from tensorwire.storage.output import Output, read_at
from tensorwire.transfer.frames import Frame, Frames
from tensorwire.transfer.position import Outcome, Position
from tensorwire.wire import NEED_DATA, Item, ItemStart, StreamEnd

try:
    import fcntl
except ImportError:  # Windows: two receivers of one transfer are not told from one another
    fcntl = None  # type: ignore[assignment]

_HELD: Final = 4 << 20  # a frame up to this size is written when it is verified, a larger one as it comes
_NAME_BYTES: Final = 200  # of the target's name in the temporary one; file systems stop at 255


class Recording:
    """The place of one transfer; a `wire.drive.Consumer` that gives no results.

    `path`: where the stream will stand. `transfer`: what tells this transfer from any other to `path`. `check` gives a function
    that is called with each item before its data is taken, and raises to refuse the stream (`lambda: schema(model).check`);
    it is called anew for every time that the stream is read from its beginning. `finish` is called instead of the
    renaming, with the path of the temporary file, and has to make `path` from it atomically, or to raise. What was received is
    removed where `check` or `finish` finds it wanting (SchemaError; any WireError of `finish`) and stays in all other cases.

    `position` says where the sender has to go on, `outcome` is set once the stream is whole. Raises StorageError, with errno
    EWOULDBLOCK where somebody else is receiving the same transfer.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        transfer: bytes,
        *,
        check: Callable[[], Callable[[Item], None]] = lambda: _accept,
        finish: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.path = os.fspath(path)
        self.position = Position()
        self.outcome: Outcome | None = None
        self._new_check = check
        self._finish = finish
        self._limits = limits
        folder, name = os.path.split(self.path)
        stem = os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
        self._stem = os.path.join(folder, f".{stem}.{sha256(transfer).hexdigest()[:16]}")
        self._fd: int | None = None
        self._events: Iterator[Any] = iter(())
        self._pending = bytearray()
        self._written = 0
        try:
            if not self._already_done():
                self._fd = _open_alone(self._part)
                self._output = Output(self._fd, self.path)
                self._take_up()
        except OSError as error:
            self.close()
            raise _storage(self.path, error) from error
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

    def steps(self) -> Generator[Any, None, None]:
        """NEED_DATA until the stream is whole."""
        try:
            for event in self._events:
                if event is NEED_DATA:
                    yield event
                else:
                    self._verified(event)
                    self._store()
        except SchemaError:
            self.discard()
            raise

    def commit(self) -> Outcome:
        """Give the whole stream its final name, once and for all. Raises StorageError, and what `finish` raises."""
        assert self.outcome is not None
        if self._fd is not None:
            try:
                os.fsync(self._fd)
                self._write_journal()
                if self._finish is None:
                    os.replace(self._part, self.path)
                else:
                    self._finish(self._part)
                    with suppress(FileNotFoundError):
                        os.unlink(self._part)
                sync_folder(os.path.dirname(self.path) or os.curdir)
            except WireError:
                self.discard()
                raise
            except TensorwireError:  # of `finish`, some of which are OSErrors too
                raise
            except OSError as error:
                raise _storage(self.path, error) from error
            self.close()
        return self.outcome

    def forget(self) -> None:
        """The sender has its receipt: the journal is no longer needed."""
        with suppress(OSError):
            os.unlink(self._journal)

    def discard(self) -> None:
        """Remove what was received."""
        self.close()
        for path in (self._part, self._journal):
            with suppress(OSError):
                os.unlink(path)

    def close(self) -> None:
        """Let go of the file; what is whole in it stays for the next attempt."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):  # what counts was synced
                os.close(fd)
        # Not to wait for the garbage collector where `check` or `finish` know this recording.
        self._events, self._pending = iter(()), bytearray()
        self._frames = Frames(limits=self._limits)

    @property
    def _part(self) -> str:
        return f"{self._stem}.part"

    @property
    def _journal(self) -> str:
        return f"{self._stem}.done"

    def _already_done(self) -> bool:
        if os.path.exists(self._part) or not os.path.lexists(self.path):
            return False
        try:
            with open(self._journal, encoding="ascii") as file:
                outcome = json.load(file)
            self.outcome = Outcome(Position(**outcome["end"]), outcome["digest"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        self.position = self.outcome.end
        return True

    def _write_journal(self) -> None:
        with open(self._journal, "w", encoding="ascii") as file:
            json.dump(asdict(self.outcome), file)  # type: ignore[call-overload]
            file.flush()
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(self.path) or os.curdir)  # there before the final name is

    def _take_up(self) -> None:
        """Verify what an earlier attempt left, and cut it off behind the last frame that is whole."""
        assert self._fd is not None
        whole = os.fstat(self._fd).st_size
        while not self._replay(whole):
            whole = self.position.offset
        os.ftruncate(self._fd, whole)
        self._written = whole

    def _replay(self, size: int) -> bool:
        """Feed the file's first `size` bytes back in. Returns whether they are whole frames."""
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
                    got = read_at(self._fd, self._frames.get_buffer()[: size - done], done)
                    self._frames.buffer_updated(got)
                    done += got
        except WireError:
            return False
        return self.position.offset == size

    def _verified(self, frame: Frame) -> None:
        if isinstance(frame.event, ItemStart):
            self._check(frame.event.item)
        end = Position(frame.header.sequence + 1, frame.offset + frame.size, frame.header.crc)
        if isinstance(frame.event, StreamEnd):
            self.outcome = Outcome(end, frame.event.summary.digest.hex())
        self.position = end

    def _store(self) -> None:
        try:
            self._output.write_at(memoryview(self._pending), self._written)
        except OSError as error:
            raise _storage(self.path, error) from error
        self._written += len(self._pending)
        self._pending = bytearray()


def _accept(item: Item) -> None:
    pass


def _open_alone(path: str) -> int:
    """Open a file for this process alone. Raises BlockingIOError where another has it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        fd = os.open(path, flags, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # whoever had it has just renamed or removed it


def _storage(path: str, error: OSError) -> StorageError:
    if isinstance(error, BlockingIOError):
        return StorageError(f"{path} is being received by somebody else", errno=errno.EWOULDBLOCK)
    if isinstance(error, StorageError):
        return StorageError(f"{error.detail}; what is verified stays and is resumed", errno=error.errno)
    return StorageError(
        f"cannot write {path}: {error.strerror}; what is verified stays and is resumed", errno=error.errno
    )
