"""Keeps a file at the newest version of a store; readers always find a whole version."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import tensorwire
from tensorwire import safetensors, streams
from tensorwire.errors import (
    ArgumentError,
    CorruptError,
    FormatError,
    MissingFileError,
    TensorwireError,
    TransportError,
    TruncatedError,
    check_function,
)
from tensorwire.limits import DEFAULT, Limits
from tensorwire.tensor import ViewFront
from tensorwire.versions.manifest import Version
from tensorwire.versions.stores import Store
from tensorwire.versions.subscriber import Progress, Staged, Subscriber

INTERVAL: Final = 1.0
MARK: Final = "tensorwire.version"  # the metadata key for the number of the version in a file
# Errors that may be gone a moment later: the store is being written to, or does not answer.
_PASSING: Final = (MissingFileError, TransportError, CorruptError, FormatError, TruncatedError)


@dataclass(frozen=True, slots=True)
class Followed:
    """A version that has been written. `size`: bytes fetched. `seconds`: by phase, as in `Staged`."""

    version: Version
    size: int
    seconds: dict[str, float]


def follow(
    store: str | os.PathLike[str] | Store,
    path: str | os.PathLike[str],
    *,
    interval: float = INTERVAL,
    timeout: float | None = None,
    on_note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    limits: Limits = DEFAULT,
) -> Iterator[Followed]:
    """Keep a `.safetensors` file at the newest version of a store; yields each version once the file holds it.

    The file is replaced by a rename, so that a reader always finds one whole version. If the file exists already and
    holds a version of the store, `follow` continues from it. If several versions appear while the caller works on one,
    only the newest is fetched. `interval`: seconds between reads of the manifest. `timeout`: ends after this many
    seconds without a new version; None: never; 0: after the current version. `on_note`: called with a line of text
    when the store does not answer or a file is damaged; the fetch is then retried. Fetched files wait on disk, beside
    the file, so that memory is a few frames, whatever the model.

        for followed in tensorwire.versions.follow("https://host/versions", "model.safetensors"):
            print(followed.version)

    Raises SequenceError for a fork, an older store or a broken chain, SchemaError for versions that a `.safetensors`
    file cannot hold, StorageError if the file cannot be written; and, at `timeout`, the store's last error if its last
    answer was one.
    """
    if not os.fspath(path).endswith(".safetensors"):
        raise ArgumentError(f"{os.fspath(path)!r} must end in .safetensors, because that is its format")
    are_numbers = all(isinstance(each, (int, float)) for each in (interval, timeout) if each is not None)
    if not are_numbers or not interval > 0 or (timeout is not None and not timeout >= 0):
        raise ArgumentError(f"interval and timeout are seconds, not {interval!r} and {timeout!r}")
    check_function(progress, "progress", "done", "total")
    check_function(on_note, "on_note", "note")
    return _following(_File(store, path, progress, limits), interval, timeout, on_note or (lambda note: None))


def version_in(path: str | os.PathLike[str]) -> int | None:
    """The number of the version that `follow` has written to a file; None for any other file, or none."""
    try:
        with safetensors.open_checkpoint(path) as file:
            number = file.metadata.get(MARK, "")
    except (TensorwireError, OSError):
        return None
    return int(number) if number.isascii() and number.isdigit() else None


def _following(
    file: "_File", interval: float, timeout: float | None, on_note: Callable[[str], None]
) -> Iterator[Followed]:
    last, noted = time.monotonic(), ""
    while True:
        trouble: TensorwireError | None = None
        staged: Staged | None = None
        file.check_folder()
        try:
            staged = file.fetch()
        except _PASSING as error:
            if isinstance(error, TransportError) and not error.retryable:
                raise
            trouble = error
        if staged is not None and staged.is_new:
            yield file.take(staged)
            last, noted = time.monotonic(), ""
            continue
        waited = time.monotonic() - last
        if timeout is not None and waited >= timeout:
            if trouble is not None:
                raise trouble
            return
        if trouble is not None and str(trouble) != noted:
            noted = str(trouble)
            on_note(f"{noted}; trying again")
        time.sleep(interval if timeout is None else min(interval, timeout - waited))


class _File:
    """The file that is kept at the newest version."""

    def __init__(
        self,
        store: str | os.PathLike[str] | Store,
        path: str | os.PathLike[str],
        progress: Progress | None,
        limits: Limits,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self._progress = progress
        self._limits = limits
        self._held = self._digest()
        self._subscriber = Subscriber(store, staging=os.path.dirname(self._path), limits=limits)

    def check_folder(self) -> None:
        """Raise MissingFileError if there is no folder for the file: this is not a fault of the store."""
        if not os.path.isdir(folder := os.path.dirname(self._path)):
            raise MissingFileError(f"the folder {folder!r} does not exist: create it first", errno=errno.ENOENT)

    def fetch(self) -> Staged:
        """Fetch the newest version, unless the file holds it already."""
        self._subscriber.have = self._held
        return self._subscriber.fetch(progress=self._progress)

    def take(self, staged: Staged) -> Followed:
        """Write a version to the file."""
        began = perf_counter()
        metadata = {MARK: str(staged.target.number), "tensorwire.digest": staged.target.digest}
        if staged.is_whole:
            safetensors.decode(staged.encode(metadata=metadata), self._path, limits=self._limits)
        else:
            tensorwire.patch(self._path, staged.patches, self._path, metadata=metadata, limits=self._limits)
        self._held = staged.target.digest
        return Followed(staged.target, staged.size, {**staged.seconds, "apply": perf_counter() - began})

    def _digest(self) -> str | None:
        """The content digest of the existing file, which `follow` may not have written."""
        try:
            with safetensors.open_checkpoint(self._path) as file:
                return streams.digest(dict(file), ViewFront(), self._limits)
        except (TensorwireError, OSError):
            return None
