"""`tensorwire verify`: read and check a whole stream without keeping anything."""

import argparse
from typing import Any, Final

import tensorwire
from tensorwire.cli.common import PIPE, UsageError, add_limits, error_fields, print_json, read_key, reading, verb
from tensorwire.errors import TensorwireError, counted
from tensorwire.files import authenticity

_TEXT: Final = """\
Checks every checksum, link, descriptor and payload as a receiver would. Exit code 0 means that the whole stream
decodes, 1 that it does not; the error then names the frame, item and byte.
Checksums do not prove who made a file. --tag (as printed by `tensorwire digest --key-file`) and --manifest (verify its
signature first) do, and are checked before anything is decoded.

examples:
  tensorwire verify model.tw
  tensorwire verify model.tw --key-file key --tag 6ba3...
  tensorwire verify model.tw --manifest manifest.json
  tensorwire verify model.tw --json | jq .stream_digest
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "verify", _run, summary="check a stream from its first byte to its last", text=_TEXT)
    parser.add_argument("input", metavar="FILE", help="a .tw file, or - for stdin")
    parser.add_argument("--key-file", metavar="KEY", help="a file that holds the key of --tag")
    parser.add_argument("--tag", metavar="HEX", help="the HMAC-SHA256 that FILE must have")
    parser.add_argument("--manifest", metavar="JSON", help="a manifest that must list FILE with its digest")
    parser.add_argument("--sha256", action="store_true", help="also print the SHA-256 of FILE, as sha256sum does")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    try:
        _check_origin(arguments)
        with reading(arguments.input, hashed=arguments.sha256) as source:
            verified = tensorwire.verify(source, limits=arguments.limits)
    except (TensorwireError, OSError) as error:
        if arguments.json:
            print_json({"ok": False, "error": error_fields(error)})
        raise
    result = {
        "items": verified.items,
        "frames": verified.frames,
        "bytes": verified.size,
        "stream_digest": verified.digest,
    }
    if source.sha256 is not None:
        result["sha256"] = source.sha256
    if arguments.json:
        print_json({"ok": True, **result})
    else:
        counts = (verified.items, "item"), (verified.frames, "frame"), (verified.size, "byte")
        print(f"ok: {', '.join(counted(*each) for each in counts)}")
        print(f"stream digest {verified.digest}")
        if source.sha256 is not None:
            print(f"SHA-256       {source.sha256}  {arguments.input}")
    return 0


def _check_origin(arguments: argparse.Namespace) -> None:
    path, key_file, tag = arguments.input, arguments.key_file, arguments.tag
    if (key_file is None) != (tag is None):
        raise UsageError("--key-file and --tag must be given together")
    if path == PIPE and (tag is not None or arguments.manifest is not None):
        raise UsageError("stdin cannot be checked before it is decoded; verify a file")
    if tag is not None:
        authenticity.check_tag(path, read_key(key_file), tag)
    if arguments.manifest is not None:
        with open(arguments.manifest, "rb") as file:
            authenticity.check_manifest(file.read(authenticity.MAX_MANIFEST + 1), [path])
