"""`tensorwire digest`: print what to publish beside a file, so that others can check who made it."""

import argparse
import sys
from typing import Any, Final

from tensorwire.cli.common import PIPE, UsageError, add_limits, read_key, verb
from tensorwire.files import authenticity, versions
from tensorwire.limits import DEFAULT

_TEXT: Final = """\
Prints one line per file, as sha256sum does: its SHA-256 or, with --key-file, its HMAC-SHA256. With --manifest, prints
an in-toto statement of all files instead, as JSON, for cosign, gpg, openssl or the like to sign. With --content, prints
the content digest of each model, which identifies its version: it depends on names, dtypes, shapes and values, and not
on the kind of file. The key is every byte of the key file: openssl rand -out key 32

examples:
  tensorwire digest model.tw
  tensorwire digest model.tw --key-file key
  tensorwire digest model.safetensors --content
  tensorwire digest model.tw adapter.tw --manifest > manifest.json
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "digest", _run, summary="print digests, keyed digests or a manifest of files", text=_TEXT)
    parser.add_argument("files", metavar="FILE", nargs="+", help="a file, or - for stdin")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--key-file", metavar="KEY", help="a file that holds the key, at least 16 bytes")
    how.add_argument("--content", action="store_true", help="content digests of models, which identify versions")
    how.add_argument("--manifest", action="store_true", help="an in-toto statement on stdout")
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.limits != DEFAULT and not arguments.content:
        raise UsageError("--limit goes with --content: otherwise files are read as bytes, which have no limits")
    if arguments.manifest:
        if PIPE in arguments.files:
            raise UsageError("a manifest names files; stdin has no name")
        sys.stdout.write(authenticity.manifest(arguments.files))
        return 0
    if arguments.content:
        if PIPE in arguments.files:
            raise UsageError("--content reads models by their index, which stdin has not: give a file")
        for path in arguments.files:
            print(f"{versions.digest(path, limits=arguments.limits)}  {path}")
        return 0
    key = None if arguments.key_file is None else read_key(arguments.key_file)
    for path in arguments.files:
        file = sys.stdin.buffer if path == PIPE else path
        result = authenticity.digest(file) if key is None else authenticity.tag(file, key)
        print(f"{result}  {path}")
    return 0
