"""Publishes versions: each as a patch against the previous one, and from time to time whole, as an anchor."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import BytesIO
from time import perf_counter
from typing import Any, Final, NamedTuple

import tensorwire
from tensorwire import Patch
from tensorwire.errors import (
    ArgumentError,
    ClosedError,
    EncodeError,
    MissingFileError,
    SequenceError,
    TensorwireError,
    TransportError,
    check_function,
)
from tensorwire.limits import DEFAULT, Limits
from tensorwire.versions.manifest import (
    MAX_BYTES,
    NAME,
    Manifest,
    Stored,
    Version,
    check_metadata,
    file_name,
    file_number,
)
from tensorwire.versions.stores import Store, open_store
from tensorwire.versions.subscriber import Progress, Subscriber, manifest_bytes, parse_manifest

ANCHOR_EVERY: Final = 20
KEEP: Final = 3


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish` did.

    `number`, `digest`: of the version. `is_new`: False if it already was the store's newest version. `patch`,
    `anchor`: bytes written as either, None if not written. `seconds`: by phase: "encode" (comparing and encoding; for
    a whole version also copying), "write", "apply" (to the publisher's own copy). `notes`: lines for a log.
    """

    number: int
    digest: str
    is_new: bool = True
    patch: int | None = None
    anchor: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Publisher:
    """Publishes versions of a container into a store; a context manager.

    `store`: a folder, a URL that fsspec can write to, or a `Store`. `anchor_every`: an anchor is written every
    `anchor_every` versions, and whenever the patches since the last anchor take more bytes than it. `keep`: the number
    of anchors that stay, with the versions after the oldest of them; older files are removed one publish later. Choose
    it so that an anchor outlasts a subscriber's fetch. `codec`: the lossless codec of anchors.

        with tensorwire.versions.Publisher("versions") as publisher:
            publisher.publish(model.state_dict())

    It keeps a copy of the last version in memory, as many bytes as the state has, which it first reads from the store
    if that has versions. (A patch is made of the old values; digests would not do. `tensorwire.diff` of two files holds
    neither.) A publisher belongs to one thread, and a store to one publisher at a time. A folder is locked, and a
    second publisher raises StorageError at once. An object store has no lock: a publisher that finds a manifest it did
    not write stops with a SequenceError, on S3 even if the manifest changes between its read and its write.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store,
        *,
        anchor_every: int = ANCHOR_EVERY,
        keep: int = KEEP,
        codec: str = "planes",
        limits: Limits = DEFAULT,
    ) -> None:
        for name, value in (("anchor_every", anchor_every), ("keep", keep)):
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name} must be a number of versions, at least 1, not {value!r}")
        if not tensorwire.codec(codec).lossless:
            raise EncodeError(f"{codec} loses bits, and a version is exact: anchors are planes, zstd or raw")
        self._store = open_store(store)
        self._every = anchor_every
        self._keep = keep
        self._codec = codec
        self._limits = limits
        self._id = os.urandom(8).hex()
        self._manifest: Manifest | None = None
        self._there: bytes | None = None  # the manifest as it is in the store
        self._base: Any = None  # a copy of the version of `_base_digest`
        self._base_digest = ""
        self._is_closed = False
        self._open = ExitStack()
        self._open.enter_context(self._store.lock())
        try:
            self._manifest = self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store and the copy of the last version."""
        self._is_closed = True
        self._open.close()
        self._base, self._base_digest = None, ""

    @property
    def head(self) -> Version | None:
        """The newest version; None in an empty store."""
        return None if self._manifest is None else self._manifest.head

    def publish(
        self, state: Any, *, metadata: Mapping[str, str] | None = None, progress: Progress | None = None
    ) -> Published:
        """Publish a container as the next version. Readers see it once it is complete.

        `state`: as for `tensorwire.encode`, except iterators. `metadata`: text pairs stored with the version.
        `progress`: called with the bytes of an anchor written so far and an upper bound of the total. A state equal
        to the newest version is not published again. Tensors must not change during the call. If it fails, the store
        is unchanged or already has the version, and the call can be repeated.

        Raises EncodeError for a state that cannot be encoded, StorageError and TransportError if the store cannot be
        written to, SequenceError if another publisher has written to it, ClosedError after `close`.
        """
        if self._is_closed:
            raise ClosedError(f"this publisher of {self._store.name} is closed: make a new one")
        pairs = check_metadata(metadata)
        check_function(progress, "progress", "done", "total")
        if isinstance(state, Iterator):
            raise EncodeError("a version is read more than once: give a container such as a dict, not an iterator")
        before = self._check_alone()
        done = _Done(progress)
        self._load_base(done)
        number = 1 if before is None else before.head.number + 1
        patch = self._patch(state, done)
        if patch is None:
            version, size = self._write_whole(state, number, done)
        else:
            version, size = self._write_patch(patch, number, done)
        if before is not None and version.digest == before.head.digest:
            return Published(before.head.number, version.digest, is_new=False, seconds=done.seconds)
        version = replace(version, metadata=pairs)
        self._write_manifest(version)
        anchor = size if patch is None else None
        if patch is not None:
            self._advance(patch.patch, version.digest, done)
            if self._manifest is not None and self._manifest.wants_anchor(self._every):
                stored, anchor = self._write_anchor(number, done)
                self._write_manifest(replace(version, anchor=stored))
        self._sweep(before, done)
        return Published(
            number,
            version.digest,
            patch=None if patch is None else size,
            anchor=anchor,
            seconds=done.seconds,
            notes=tuple(done.notes),
        )

    def _read(self) -> Manifest | None:
        try:
            self._there = manifest_bytes(self._store)
        except MissingFileError:
            self._there = None
            return None
        return parse_manifest(self._store, self._there)

    def _check_alone(self) -> Manifest | None:
        """The manifest. Raises SequenceError unless it is the one that this publisher knows."""
        there = self._read()
        if there is not None and there.publisher == self._id:  # an interrupt may have come just after it was written
            self._manifest = there
        if there != self._manifest:
            what = "nothing" if there is None else f"{there.head} of publisher {there.publisher}"
            raise SequenceError(
                f"{self._store.name} has {what} now, which publisher {self._id} has not written: another one is at "
                "work. Stop one of them, and begin with a new Publisher"
            )
        return there

    def _load_base(self, done: "_Done") -> None:
        """Read the newest version, unless this publisher has written it."""
        head = self.head
        if head is None or head.digest == self._base_digest:
            return
        self._base, self._base_digest = None, ""
        began = perf_counter()
        try:
            self._base = Subscriber(self._store, limits=self._limits).fetch(whole=True).state
            self._base_digest = head.digest
        except TransportError:
            raise
        except TensorwireError as error:
            done.notes.append(f"{head} could not be read, so that the next one is published whole: {error}")
        done.count("read", began)

    def _patch(self, state: Any, done: "_Done") -> "_Made | None":
        """The patch that makes `state` of the newest version; None where only a whole version will do."""
        if not self._base_digest or self._base is None:  # of None there is no patch
            return None
        began = perf_counter()
        try:
            buffers = tensorwire.encode(state, base=self._base, limits=self._limits)
        except (
            EncodeError
        ) as error:  # names, dtypes or shapes have changed; a state that cannot be sent at all fails again
            done.notes.append(f"published whole, because there is no patch from the version before: {error}")
            return None
        stream = BytesIO()  # unlike a join, this never holds the parts and the whole at once
        for buffer in buffers:
            stream.write(buffer)
        made = _Made(stream.getvalue(), Patch.read(stream.getvalue(), limits=self._limits))
        done.count("encode", began)
        return made

    def _write_patch(self, made: "_Made", number: int, done: "_Done") -> tuple[Version, int]:
        patch = made.patch
        if patch.base == patch.target:
            return Version(number, patch.target), 0
        began = perf_counter()
        name = file_name(number, self._id, "patch")
        size = self._store.write(name, [made.stream])
        done.count("write", began)
        return Version(number, patch.target, patch=Stored(name, size, patch.base)), size

    def _write_whole(self, state: Any, number: int, done: "_Done") -> tuple[Version, int]:
        """Take a copy of `state`, and write it as an anchor."""
        began = perf_counter()
        self._base_digest = ""
        self._base = tensorwire.loads(tensorwire.encode(state, limits=self._limits), limits=self._limits)
        digest = tensorwire.digest(self._base, limits=self._limits)
        done.count("encode", began)
        head = self.head
        if head is not None and head.digest == digest:
            self._base_digest = digest
            return Version(number, digest), 0
        stored, size = self._write_anchor(number, done)
        self._base_digest = digest
        return Version(number, digest, anchor=stored), size

    def _write_anchor(self, number: int, done: "_Done") -> tuple[Stored, int]:
        """Write an anchor from the copy, which cannot change meanwhile."""
        began = perf_counter()
        name = file_name(number, self._id, "anchor")
        buffers = tensorwire.encode(self._base, codec=self._codec, limits=self._limits)
        if done.progress is not None:
            total = tensorwire.encoded_size(self._base, codec=self._codec, limits=self._limits)
            buffers = _told(buffers, total, done.progress)
        size = self._store.write(name, buffers)
        done.count("write", began)
        return Stored(name, size), size

    def _write_manifest(self, version: Version) -> None:
        """Write the manifest, which makes the version visible."""
        if self._manifest is None:
            manifest = Manifest(os.urandom(8).hex(), self._id, (version,))
        else:
            manifest = self._manifest.adding(version, self._id).keeping(self._keep)
        data = manifest.dump()
        if len(data) > MAX_BYTES:
            raise EncodeError(f"the manifest has grown to {len(data)} bytes: keep fewer versions, or less metadata")
        self._store.replace(NAME, data, self._there)
        self._manifest, self._there = manifest, data

    def _advance(self, patch: Patch, digest: str, done: "_Done") -> None:
        """Apply the patch to the copy. If this is interrupted, the next publish reads the copy from the store again."""
        began = perf_counter()
        self._base_digest = ""
        tensorwire.apply(patch, self._base, limits=self._limits)
        self._base_digest = digest
        done.count("apply", began)

    def _sweep(self, before: Manifest | None, done: "_Done") -> None:
        """Remove files that neither this manifest nor the previous one lists, and that are not being written."""
        manifest = self._manifest
        assert manifest is not None
        listed = manifest.files | (before.files if before is not None else set())
        try:
            for name in self._store.names():
                number = file_number(name)
                if number is not None and number <= manifest.head.number and name not in listed:
                    self._store.remove(name)
        except OSError as error:  # the version is published nevertheless
            done.notes.append(f"what was dropped could not be removed: {error}")


class _Made(NamedTuple):
    """A patch as a stream, and as it is read from the stream, in the same memory."""

    stream: bytes
    patch: Patch


class _Done:
    """The times, notes and progress callback of one publish."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def count(self, phase: str, began: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - began


def _told(buffers: Iterator[Any], total: int, progress: Progress) -> Iterator[Any]:
    """The same buffers; `progress` is called after each that was written."""
    done = 0
    for buffer in buffers:
        yield buffer
        done += memoryview(buffer).nbytes
        progress(done, total)
