"""The manifest of a store: its versions, and the files that lead to each. No I/O.

    manifest = Manifest.parse(data)
    route = manifest.route(have, number=None)      # the files to fetch, the fewest bytes
    data = manifest.adding(version).dump()

A version has a number, one more than the version before, and a content digest. It is made either from its *anchor*, a
`.tw` file with all of it, or from the version before by its *patch*. A `Manifest` object is always valid: its numbers
have no gap, each patch is against the version before, and no file name is a path.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from tensorwire.errors import EncodeError, FormatError, LimitError, SequenceError, UnsupportedError, show

NAME: Final = "manifest.json"
FORMAT: Final = 1
MAX_BYTES: Final = 16 << 20  # of a manifest: some 40,000 versions, a hundred times what a store keeps
MAX_NUMBER: Final = 10**12 - 1
_FILE: Final = re.compile(r"([0-9]{12})-[0-9a-f]{16}\.(anchor|patch)\.tw")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_ID: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a store, and its size in bytes. `base`: the digest of the version that a patch is against."""

    file: str
    size: int
    base: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """A version: its number, its content digest, and at least one file that makes it.

    `metadata`: text pairs that its publisher gave.
    """

    number: int
    digest: str
    patch: Stored | None = None
    anchor: Stored | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The names of its files."""
        return [stored.file for stored in (self.anchor, self.patch) if stored is not None]

    def __str__(self) -> str:
        return f"version {self.number} ({self.digest[:12]})"


@dataclass(frozen=True, slots=True)
class Route:
    """How a version is made: from an anchor if there is one, else from the reader's version, by these patches."""

    target: Version
    anchor: Version | None
    patches: tuple[Version, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(stored.size for stored, _ in self.files)

    @property
    def files(self) -> list[tuple[Stored, Version]]:
        """The files to fetch, in order."""
        whole = [(self.anchor.anchor, self.anchor)] if self.anchor is not None else []
        patches = [(version.patch, version) for version in self.patches]
        return [(stored, version) for stored, version in whole + patches if stored is not None]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The versions of a store, oldest first. `run`: the store's own id; `publisher`: the last publisher."""

    run: str
    publisher: str
    versions: tuple[Version, ...]

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """The manifest in these bytes. Raises a WireError if they are not a manifest."""
        if len(data) > MAX_BYTES:
            raise LimitError("manifest", MAX_BYTES, len(data), field=None)
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise FormatError("the manifest is not JSON: check what the server returns, or fetch it again") from None
        if not isinstance(fields, dict) or fields.get("tensorwire") != "versions":
            raise FormatError("the manifest is not that of a store of versions")
        if fields.get("format") != FORMAT:
            raise UnsupportedError(f"the store has format {show(fields.get('format'))}, this build reads {FORMAT}")
        try:
            return _manifest(fields)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SequenceError):
                raise
            raise FormatError(f"the manifest is broken: {show(str(error))}") from None

    def dump(self) -> bytes:
        """Its bytes: the same for the same manifest."""
        head = {"tensorwire": "versions", "format": FORMAT, "run": self.run, "publisher": self.publisher}
        versions = [_dumped(version) for version in self.versions]
        return json.dumps({**head, "versions": versions}, indent=1, sort_keys=True).encode()

    @property
    def head(self) -> Version:
        """The newest version."""
        return self.versions[-1]

    @property
    def files(self) -> set[str]:
        """The names of all files that it lists."""
        return {file for version in self.versions for file in version.files}

    def version(self, number: int) -> Version:
        """The version with this number. Raises SequenceError if it does not exist, or no longer."""
        first = self.versions[0].number
        if not first <= number <= self.head.number:
            gone = "it was dropped" if 0 < number < first else "it was never published"
            raise SequenceError(
                f"there is no version {number} ({gone}): the store has {first} to {self.head.number}", item=number
            )
        return self.versions[number - first]

    def adding(self, version: Version, publisher: str) -> "Manifest":
        """A copy with one more version, or with a new entry for the head."""
        kept = self.versions[:-1] if version.number == self.head.number else self.versions
        return replace(self, publisher=publisher, versions=(*kept, version))

    def keeping(self, anchors: int) -> "Manifest":
        """A copy without the versions before the last `anchors` ones that have an anchor."""
        at = [place for place, version in enumerate(self.versions) if version.anchor is not None]
        return replace(self, versions=self.versions[at[-anchors] :]) if len(at) > anchors else self

    def wants_anchor(self, every: int) -> bool:
        """Whether the newest version should get an anchor.

        It should if it has none and is the `every`-th version since the last anchor, or if the patches since then take
        more bytes than that anchor.
        """
        chain = 0
        for count, version in enumerate(reversed(self.versions)):
            if version.anchor is not None:
                return count >= every or chain > version.anchor.size
            chain += version.patch.size if version.patch is not None else 0
        return True

    def check_follows(self, seen: "Manifest") -> None:
        """Raise SequenceError unless this manifest continues `seen`: not another store, a fork, or an older state."""
        if self.run != seen.run:
            raise SequenceError(
                f"a different store is here now: run {self.run}, not {seen.run}. Start again with a new Subscriber"
            )
        held = {version.number: version for version in seen.versions}
        for version in self.versions:
            if version.number in held and held[version.number].digest != version.digest:
                raise SequenceError(
                    f"a fork: {version} was {held[version.number].digest[:12]} before. Two publishers have written to "
                    "this store: stop one, and start again with a new Subscriber",
                    item=version.number,
                )
        if self.head.number < seen.head.number:
            raise SequenceError(
                f"the store went back from {seen.head} to {self.head}: it was restored, or an old copy answers",
                item=seen.head.number,
            )

    def route(self, have: str | None, number: int | None = None, avoid: Collection[str] = ()) -> Route:
        """The route with the fewest bytes to a version, the newest if no number is given.

        `have`: the content digest of the reader's version. `avoid`: files that are known to be bad. Raises
        SequenceError, naming the missing patch, if there is no route.
        """
        target = self.head if number is None else self.version(number)
        if have == target.digest:
            return Route(target, None, ())
        found: list[Route] = []
        patches: tuple[Version, ...] = ()
        broken = target
        for version in reversed(self.versions[: target.number - self.versions[0].number + 1]):
            if have == version.digest:
                found.append(Route(target, None, patches))
            if version.anchor is not None and version.anchor.file not in avoid:
                found.append(Route(target, version, patches))
            broken = version
            if version.patch is None or version.patch.file in avoid:
                break
            patches = (version, *patches)
            if version.number == self.versions[0].number and have == version.patch.base:
                found.append(Route(target, None, patches))
        if not found:
            raise SequenceError(
                f"{target} cannot be made: the chain of patches breaks at {broken}, and no anchor follows it. "
                "Have the publisher publish a whole version",
                item=broken.number,
            )
        return min(found, key=lambda route: (route.size, route.anchor is not None))


def file_name(number: int, token: str, kind: str) -> str:
    """The name for a new file. `kind`: "anchor" or "patch". `token`: 16 hexadecimal digits, unique to the file."""
    return f"{number:012}-{token}.{kind}.tw"


def file_number(name: str) -> int | None:
    """The number of the version that a file of a store belongs to; None for any other file."""
    match = _FILE.fullmatch(name)
    return None if match is None else int(match[1])


def is_digest(text: str) -> bool:
    """Whether `value` is a content digest."""
    return _DIGEST.fullmatch(text) is not None


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Metadata as a manifest holds it. Raises EncodeError."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise EncodeError(f"metadata must map text to text; it is of type {type(metadata).__name__}")
    pairs = dict(metadata or {})
    if not all(type(text) is str for pair in pairs.items() for text in pair):
        raise EncodeError("metadata must map text to text")
    return pairs


def _manifest(fields: dict[str, Any]) -> Manifest:
    """The manifest with these fields. Raises KeyError, TypeError, ValueError unless they are as `dump` makes them."""
    versions = tuple(_version(each) for each in fields["versions"])
    if not versions:
        raise ValueError("no versions")
    for before, version in pairwise(versions):
        if version.number != before.number + 1:
            raise SequenceError(f"the manifest has {version} after {before}: the versions between them are missing")
        if version.patch is not None and version.patch.base != before.digest:
            raise SequenceError(
                f"a fork: the patch of {version} is against {version.patch.base[:12]}, but it comes after {before}",
                item=version.number,
            )
    run, publisher = (_text(fields[key], _ID, key) for key in ("run", "publisher"))
    return Manifest(run, publisher, versions)


def _version(fields: dict[str, Any]) -> Version:
    number, digest = fields["number"], _text(fields["digest"], _DIGEST, "digest")
    if type(number) is not int or not 0 < number <= MAX_NUMBER:
        raise ValueError(f"number {number!r}")
    patch, anchor = (_stored(fields.get(kind), kind, number) for kind in ("patch", "anchor"))
    if patch is None and anchor is None:
        raise ValueError(f"version {number} has no file")
    metadata = fields["metadata"]
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise ValueError(f"metadata of version {number}")
    return Version(number, digest, patch, anchor, metadata)


def _stored(fields: dict[str, Any] | None, kind: str, number: int) -> Stored | None:
    if fields is None:
        return None
    file, size = fields["file"], fields["size"]
    match = _FILE.fullmatch(file)
    if match is None or (int(match[1]), match[2]) != (number, kind) or type(size) is not int or size < 0:
        raise ValueError(f"{kind} of version {number}")
    return Stored(file, size, _text(fields["base"], _DIGEST, "base") if kind == "patch" else "")


def _dumped(version: Version) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "number": version.number,
        "digest": version.digest,
        "metadata": dict(version.metadata),
    }
    if version.anchor is not None:
        fields["anchor"] = {"file": version.anchor.file, "size": version.anchor.size}
    if version.patch is not None:
        fields["patch"] = {"file": version.patch.file, "size": version.patch.size, "base": version.patch.base}
    return fields


def _text(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if type(value) is not str or not pattern.fullmatch(value):
        raise ValueError(f"{what} {value!r}")
    return value
