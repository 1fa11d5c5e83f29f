"""Authenticity at rest: proves who made a stream or file, while checksums prove only that it is undamaged.

There are two ways. Both are kept beside the bytes, not in them, and both are formats that other tools know: a keyed
digest (HMAC-SHA256) for parties that share a secret, and a manifest, an in-toto Statement, for publishers that sign
with their own key.

    tag = authenticity.tag("model.tw", key)              # the same as openssl dgst -sha256 -mac HMAC
    authenticity.check_tag("model.tw", key, tag)         # before anything is decoded

    manifest = authenticity.manifest(["model.tw"])       # to be signed by cosign, gpg, openssl ...
    authenticity.check_manifest(manifest, ["model.tw"])  # once its signature is verified
"""

import hmac
import json
import os
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Final

from tensorwire.errors import (
    ArgumentError,
    AuthError,
    EncodeError,
    FormatError,
    LimitError,
    UnsupportedError,
    counted,
    show,
)
from tensorwire.files.source import File, check_paths, opened, read_some

# RFC 2104 discourages keys shorter than the digest, 32 bytes; less than 16 can be guessed.
MIN_KEY: Final = 16
MAX_MANIFEST: Final = 16 << 20  # bytes: about 100,000 files

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
# The type that OpenSSF model-signing uses for a statement whose subjects are files, each with its SHA-256.
PREDICATE_TYPE: Final = "https://model_signing/Digests/v0.1"

_PIECE: Final = 1 << 20
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class Tagged:
    """Passes buffers on to a transport or file, and computes their keyed digest.

    Iterate once, then read `tag`. Raises AuthError for a key that is too short.
    """

    def __init__(self, buffers: Iterable[Any], key: bytes) -> None:
        self._buffers = buffers
        self._mac = _mac(key)
        self._complete = False

    def __iter__(self) -> Iterator[Any]:
        for buffer in self._buffers:
            self._mac.update(buffer)
            yield buffer
        self._complete = True

    @property
    def tag(self) -> str:
        """HMAC-SHA256 of all bytes, in hexadecimal. Raises AuthError before the last one has passed."""
        if not self._complete:
            raise AuthError("the stream has not passed to its end yet: a tag covers all of it")
        return self._mac.hexdigest()


def tag(file: File, key: bytes) -> str:
    """HMAC-SHA256 over all bytes of a file, in hexadecimal. `key`: at least 16 bytes, better 32 random ones.

    `file`: a path, or an open binary file, read from its current position. Raises AuthError for a short key.
    """
    mac = _mac(key)
    for piece in _pieces(file):
        mac.update(piece)
    return mac.hexdigest()


def check_tag(file: File, key: bytes, expected: str) -> None:
    """Raise AuthError unless `expected` is the tag of `file` under `key`. The comparison takes constant time.

    An open file is returned to its position, so that it can be decoded from there. Unlike a path, nobody can replace it
    in between.
    """
    if not isinstance(expected, str) or not _DIGEST.fullmatch(expected):
        raise AuthError("a tag has 64 hexadecimal digits")
    if isinstance(file, (str, os.PathLike)):
        found = tag(file, key)
    else:
        begin = file.tell()
        found = tag(file, key)
        file.seek(begin)
    if not hmac.compare_digest(bytes.fromhex(found), bytes.fromhex(expected)):
        raise AuthError(
            f"{_called(file)} does not have this tag: its bytes or the tag were changed, or the key is wrong"
        )


def digest(file: File) -> str:
    """SHA-256 over all bytes of a file, in hexadecimal."""
    hasher = sha256()
    for piece in _pieces(file):
        hasher.update(piece)
    return hasher.hexdigest()


def manifest(paths: Iterable[str | os.PathLike[str]]) -> str:
    """An in-toto Statement v1 as JSON: a name, without its folder, and a SHA-256 for each file.

    It proves nothing by itself: sign it. Raises EncodeError for no file, and for two of one name.
    """
    subjects = {}
    check_paths(paths)
    for path in paths:
        name = os.path.basename(os.fsdecode(path))
        if name in subjects:
            raise EncodeError(f"two files are called {show(name)}: a manifest names files without their folders")
        subjects[name] = digest(path)
    if not subjects:
        raise EncodeError("a manifest must list at least one file")
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"hash_type": "sha256"},
    }
    return json.dumps(statement, indent=1) + "\n"


def check_manifest(manifest: str | bytes, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Raise AuthError unless each file is listed under its name with its digest.

    Verify the manifest's signature first. It may list more files; its names are compared, never opened. Raises
    FormatError, UnsupportedError or LimitError if it is not such a manifest.
    """
    subjects = _subjects(manifest)
    check_paths(paths)
    for path in paths:
        name = os.path.basename(os.fsdecode(path))
        if name not in subjects:
            raise AuthError(f"{show(name)} is not in the manifest")
        if not hmac.compare_digest(digest(path), subjects[name]):
            raise AuthError(f"{show(name)} is not the file that the manifest describes")


def _mac(key: bytes) -> hmac.HMAC:
    if not isinstance(key, (bytes, bytearray)):
        raise ArgumentError(f"a key is bytes, not {type(key).__name__}")
    if len(key) < MIN_KEY:
        raise AuthError(f"a key of {counted(len(key), 'byte')}: take at least {MIN_KEY}, better 32 random ones")
    return hmac.new(key, digestmod=sha256)


def _pieces(file: File) -> Iterator[bytes]:
    with opened(file) as raw:
        while piece := read_some(raw, _PIECE):
            yield piece


def _called(file: File) -> str:
    return show(os.path.basename(os.fsdecode(file))) if isinstance(file, (str, os.PathLike)) else "the file"


def _subjects(text: str | bytes) -> dict[str, str]:
    """SHA-256 by name. Fields that this version does not know are ignored, as in-toto requires."""
    if len(text) > MAX_MANIFEST:
        raise LimitError("manifest", MAX_MANIFEST, len(text), field=None)
    try:
        statement = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the manifest is not JSON: {error}") from None
    if type(statement) is not dict or type(statement.get("subject")) is not list:
        raise FormatError("the manifest is not an in-toto statement")
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise UnsupportedError(f"the manifest must be of type {STATEMENT_TYPE} and {PREDICATE_TYPE}")
    subjects: dict[str, str] = {}
    for subject in statement["subject"]:
        name = subject.get("name") if type(subject) is dict else None
        digests = subject.get("digest") if type(subject) is dict else None
        found = digests.get("sha256") if type(digests) is dict else None
        if type(name) is not str or type(found) is not str or not _DIGEST.fullmatch(found):
            raise FormatError("a subject of the manifest lacks its name or its SHA-256")
        if name in subjects:
            raise FormatError(f"the manifest lists {show(name)} twice")
        subjects[name] = found.lower()
    return subjects


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # parsers differ in which one they use, so the signer may have meant the other one
        raise ValueError("a key appears twice in one object")
    return found
