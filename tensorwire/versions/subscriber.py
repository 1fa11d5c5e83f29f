"""Follows versions: fetches and verifies a version beside the current state, then applies it."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from time import perf_counter
from typing import Any, Final

import tensorwire
from tensorwire import Patch, streams
from tensorwire.errors import (
    ArgumentError,
    CorruptError,
    FormatError,
    MissingFileError,
    SchemaError,
    SequenceError,
    StorageError,
    TensorwireError,
    WireError,
    check_function,
)
from tensorwire.limits import DEFAULT, Limits
from tensorwire.numpy import FRONT
from tensorwire.storage import storing
from tensorwire.streams import OnDisk
from tensorwire.tensor import AnyFront, ViewFront
from tensorwire.versions.manifest import MAX_BYTES, NAME, Manifest, Route, Stored, Version, is_digest
from tensorwire.versions.stores import Store, open_store
from tensorwire.versions.whole import Overwriting

Progress = Callable[[int, int], None]  # bytes fetched, and bytes in all

_ARRAYS: Final = AnyFront(FRONT)
_VIEWS: Final = ViewFront()
_PART: Final = 1 << 16
_ATTEMPTS: Final = 8  # files that may turn out missing or damaged in one fetch


class Subscriber:
    """Reads versions from a store.

    `store`: a folder, a URL or a `Store`. `have`: the content digest of the current state (`tensorwire.digest`), None
    if there is none. `staging`: a folder in which fetched files wait until they are applied, in an unnamed file, so
    that they take no memory; without it, they wait in memory.

        subscriber = tensorwire.versions.Subscriber("https://host/versions", have=tensorwire.digest(weights))
        subscriber.fetch().apply(weights)

    It remembers the applied version and the last manifest, and keeps nothing open between calls. Only one thread may
    use it at a time.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store,
        *,
        have: str | None = None,
        staging: str | os.PathLike[str] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        if have is not None and not (isinstance(have, str) and is_digest(have)):
            raise ArgumentError(f"have must be a content digest from tensorwire.digest, not {have!r}")
        self.have = have
        self.staging = None if staging is None else os.path.abspath(os.fspath(staging))
        self._store = open_store(store)
        self._limits = limits
        self._seen: Manifest | None = None

    def manifest(self) -> Manifest:
        """The store's current manifest.

        Raises MissingFileError before the first version is published, SequenceError if it does not continue the
        manifest that was read before: a fork, another store, an older state.
        """
        manifest = read_manifest(self._store)
        if self._seen is not None:
            manifest.check_follows(self._seen)
        self._seen = manifest
        return manifest

    def fetch(self, *, number: int | None = None, whole: bool = False, progress: Progress | None = None) -> "Staged":
        """Fetch a version, the newest if no number is given, and verify all of it. Applies nothing.

        Fetches the patches from the current version, or an anchor and the patches after it, whichever takes fewer
        bytes; with `whole`, always the latter. If a file is missing or damaged, another route is taken if there is one.
        If nothing is new, only the manifest is read. `progress`: called with the bytes fetched and the total.

        Raises a WireError or MissingFileError that names the version, SequenceError if the chain to it is broken,
        StorageError and TransportError for a store that does not answer.
        """
        check_function(progress, "progress", "done", "total")
        if number is not None and type(number) is not int:
            raise ArgumentError(f"the number of a version is an int, not {number!r:.40}")
        have = None if whole else self.have
        avoid: set[str] = set()
        first: TensorwireError | None = None
        while True:
            manifest = self.manifest()
            try:
                route = manifest.route(have, number, avoid)
            except SequenceError as error:
                raise first or error from None  # an error about a file says more
            staged = Staged(self, route, self._limits)
            try:
                staged.stage(self._store, progress)
            except (WireError, MissingFileError) as error:
                first = first or error
                avoid.add(staged.reading)
                if len(avoid) == _ATTEMPTS:
                    raise first from None
            else:
                return staged


class Staged:
    """A version that was fetched as a whole and verified, but not applied yet.

    `target`: the version. `size`: bytes fetched. `is_new`: whether it differs from the subscriber's version.
    `seconds`: by phase: "fetch" (waiting for the store), "stage" (decoding, and checking every file), "verify" (the
    digest of the state from an anchor and its patches) and "apply". Patches take memory of their size, an anchor that
    of the whole version, unless they are staged in a folder. `patches`: the fetched patches, if no anchor was fetched.
    `reading`: the file that is being read, or was read last.
    """

    def __init__(self, subscriber: Subscriber, route: Route, limits: Limits) -> None:
        self.target = route.target
        self.size = route.size
        self.is_new = bool(route.files)
        self.seconds = dict.fromkeys(("fetch", "stage", "verify", "apply"), 0.0)
        self.reading = ""
        self._subscriber = subscriber
        self._route = route
        self._limits = limits
        self.patches: list[Patch] = []
        self._disk: OnDisk | None = None
        self._whole: Any = None  # arrays, or views if staged in a folder
        self._sums: Any = None  # the checksums that these must have after a patch

    @property
    def is_whole(self) -> bool:
        """Whether an anchor was fetched, so that `state` and `encode` are available."""
        return self._route.anchor is not None

    @property
    def state(self) -> Any:
        """The whole version as a container of NumPy arrays. Raises SchemaError if no anchor was fetched.

        For torch tensors, `tensorwire.torch.loads(staged.encode())`.
        """
        if self.is_whole and self._disk is None:
            return self._whole
        return tensorwire.loads(self.encode(), limits=self._limits)

    def encode(self, *, metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The buffers of a stream of the whole version. Raises SchemaError if no anchor was fetched."""
        if not self.is_whole:
            raise SchemaError(
                "no whole version was fetched, but patches or nothing: apply them, or use fetch(whole=True)"
            )
        return streams.encode(self._whole, self._front, metadata=metadata, limits=self._limits)

    @property
    def _front(self) -> AnyFront | ViewFront:
        """The front for the tensors of the whole version."""
        return _ARRAYS if self._disk is None else _VIEWS

    def apply(self, state: Any) -> None:
        """Turn `state`, in place, into the fetched version; do nothing if it is not new.

        `state`: a container of writable tensors of the same names, dtypes and shapes, torch or NumPy. Patches apply to
        their base, or to a state that an earlier attempt left; an anchor applies to any values. Raises SchemaError for
        a state that does not fit, and EncodeError for a tensor that cannot be written, before anything is written.
        After an interruption, the call can be repeated.
        """
        if not self.is_new:
            return
        began = perf_counter()
        if self.is_whole:
            overwriting = Overwriting(self._whole, self._front, state, self._limits)
            self._subscriber.have = None  # until everything is written, the state is not a version
            overwriting.write()
        else:
            self._apply_patches(state)
        self._subscriber.have = self.target.digest
        self.seconds["apply"] += perf_counter() - began

    def stage(self, store: Store, progress: Progress | None) -> None:
        """Read and verify all files. Raises a WireError or MissingFileError that names the version."""
        began = perf_counter()
        if self._subscriber.staging is None or not self.is_new:
            self._read(store, progress)
        else:
            self._disk = _staging_in(self._subscriber.staging)
            with storing(self._subscriber.staging, "stage in"):
                self._read(store, progress)
        self.seconds["stage"] = perf_counter() - began - self.seconds["fetch"]
        if self.is_whole:
            began = perf_counter()
            self._verify()
            self.seconds["verify"] = perf_counter() - began

    def _read(self, store: Store, progress: Progress | None) -> None:
        done = 0
        for stored, version in self._route.files:
            self.reading = stored.file
            with _about(version, stored), closing(_Counted(store, stored, done, self.size, progress)) as file:
                try:
                    self._take(stored, version, file)
                    file.read(1)  # checks that the file ends here
                finally:
                    self.seconds["fetch"] += file.seconds
            done += stored.size

    def _take(self, stored: Stored, version: Version, file: Any) -> None:
        if not stored.base:
            if self._disk is None:
                self._whole = tensorwire.loads(file, limits=self._limits)
            else:
                self._whole = streams.collect_encoded(file, self._disk, limits=self._limits)
            return
        patch = Patch.read(file, keep=self._disk, limits=self._limits)
        if (patch.base, patch.target) != (stored.base, version.digest):
            raise SequenceError(
                f"this is the patch from {patch.base[:12]} to {patch.target[:12]}, not the one in the manifest"
            )
        if not self.is_whole:
            self.patches.append(patch)
        elif self._disk is None:
            tensorwire.apply(patch, self._whole, limits=self._limits)
        else:
            self._whole, self._sums = patch.views(self._whole, _VIEWS, sums=self._sums, limits=self._limits)

    def _verify(self) -> None:
        digest = streams.digest(self._whole, self._front, self._limits)
        if digest != self.target.digest:
            raise CorruptError(f"{self.target} has digest {digest[:12]}: the store's file holds another version")

    def _apply_patches(self, state: Any) -> None:
        """Apply the chain, starting at the first patch that fits: an earlier attempt may have applied some."""
        refused: list[SchemaError] = []
        for place, patch in enumerate(self.patches):
            try:
                tensorwire.apply(patch, state, limits=self._limits)
            except SchemaError as error:
                refused.append(error)
                continue
            for later in self.patches[place + 1 :]:
                tensorwire.apply(later, state, limits=self._limits)
            return
        refused[0].detail = f"{self.target} cannot be applied here: {refused[0].detail}"
        raise refused[0]


def read_manifest(store: Store) -> Manifest:
    """The manifest of a store. Raises MissingFileError before the first version is published."""
    return parse_manifest(store, manifest_bytes(store))


def manifest_bytes(store: Store) -> bytes:
    """The bytes of a store's manifest. Raises MissingFileError before the first version is published."""
    try:
        with closing(store.open(NAME)) as file:
            data = bytearray()
            while len(data) <= MAX_BYTES and (part := file.read(_PART)):
                data += part
    except MissingFileError as error:
        raise MissingFileError(
            f"nothing is published in {store.name} yet: it has no {NAME}", errno=error.errno
        ) from None
    return bytes(data)


def parse_manifest(store: Store, data: bytes) -> Manifest:
    """The manifest in these bytes of a store. Raises a WireError that names it."""
    with _named(f"{store.name}/{NAME}"):
        return Manifest.parse(data)


def _staging_in(folder: str) -> OnDisk:
    """Payloads on disk in a folder. Errors about it are StorageErrors, since MissingFileError is about the store."""
    try:
        return OnDisk(folder)
    except OSError as error:
        raise StorageError(
            f"cannot stage in {folder!r}: {error.strerror}; make the folder, or choose another", errno=error.errno
        ) from error


class _Counted(io.RawIOBase):
    """A file of a store that is being read; measures the time that the store takes, and reports progress."""

    def __init__(self, store: Store, stored: Stored, before: int, total: int, progress: Progress | None) -> None:
        super().__init__()
        began = perf_counter()
        self._file = store.open(stored.file)
        self.seconds = perf_counter() - began
        self._size = stored.size
        self._done = 0
        self._before, self._total, self._progress = before, total, progress

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` with the result of one read. Raises FormatError beyond the size in the manifest."""
        began = perf_counter()
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]  # a raw file has it
        self.seconds += perf_counter() - began
        self._done += count
        if self._done > self._size:
            raise FormatError(f"it is longer than the {self._size} bytes that the manifest states")
        if self._progress is not None:
            self._progress(self._before + self._done, self._total)
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _about(version: Version, stored: Stored) -> Iterator[None]:
    """Adds to errors about a file of the store the version that it leads to."""
    try:
        yield
    except TensorwireError as error:
        error.detail = f"{version}: {error.detail}"
        error.file = error.file or stored.file
        raise


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Adds the name of the file to errors about it."""
    try:
        yield
    except TensorwireError as error:
        error.file = file
        raise
