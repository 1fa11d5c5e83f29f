"""`tensorwire follow`: keep a file at the newest version of a store, and run a command after each."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any, Final

from tensorwire.cli.common import Progress, UsageError, add_limits, verb
from tensorwire.cli.outputs import add_force, check_output
from tensorwire.streams import size_text
from tensorwire.versions import INTERVAL, Followed, follow, version_in

_TEXT: Final = """\
OUT is a complete version whenever it is read: each new version replaces it by a rename. The command after --run runs
after each, with TENSORWIRE_VERSION and TENSORWIRE_DIGEST in its environment. If several versions are published while
it runs, only the newest is fetched next. `follow` continues from an OUT that it wrote earlier; any other existing file
is replaced only with --force.

examples:
  tensorwire follow https://host/versions model.safetensors
  tensorwire follow /srv/versions model.safetensors --timeout 0
  tensorwire follow s3://bucket/versions model.safetensors --run curl -X POST http://localhost:8000/reload
"""
_SUFFIX: Final = ".safetensors"
_GRACE: Final = 10.0  # seconds for a command to end


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "follow", _run, summary="keep a file at the newest version of a store", text=_TEXT)
    parser.add_argument("store", metavar="STORE", help="a folder, or an http(s) or fsspec URL")
    parser.add_argument("output", metavar="OUT", help="a .safetensors file")
    parser.add_argument(
        "--interval", type=_seconds, default=INTERVAL, metavar="S", help=f"read the manifest every S s ({INTERVAL:g})"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="exit after S s without a new version (never); 0: fetch the newest version and exit",
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON on stdout for each version")
    add_force(parser)
    add_limits(parser)
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        default=[],
        dest="command",
        metavar="COMMAND",
        help="the rest of the line: a command to run after each version",
    )


def _seconds(text: str) -> float:
    with suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds < 1e9:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if not output.endswith(_SUFFIX):
        raise UsageError(f"OUT must be named *{_SUFFIX}, not {output!r}")
    if arguments.interval == 0:
        raise UsageError("--interval must be more than 0")
    check_output(output, force=arguments.force or version_in(output) is not None)
    versions = follow(
        arguments.store,
        output,
        interval=arguments.interval,
        timeout=arguments.timeout,
        on_note=_note,
        progress=_Bars(),
        limits=arguments.limits,
    )
    came = False
    for followed in versions:
        came = True
        code = _command(arguments.command, followed, quiet=arguments.json) if arguments.command else None
        if arguments.json:
            print(json.dumps(_fields(followed, code)), flush=True)
        else:
            _note(_line(followed))
        if code:
            _note(f"{arguments.command[0]} ended with {code} at version {followed.version.number}")
    if not came:
        _note(f"nothing new: {output} is the newest version")
    return 0


class _Bars:
    """A progress bar for each fetch."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(total)
        self._bar.reach(done)
        if done == total:
            self._bar.close()
            self._bar = None


def _command(command: list[str], followed: Followed, *, quiet: bool) -> int:
    """Run the command to its end; a signal that ends us ends it too. `quiet`: its output goes to stderr."""
    version = followed.version
    environment = {**os.environ, "TENSORWIRE_VERSION": str(version.number), "TENSORWIRE_DIGEST": version.digest}
    try:
        child = subprocess.Popen(command, env=environment, stdout=sys.stderr if quiet else None)
    except OSError as error:
        raise UsageError(f"{command[0]!r} cannot be run: {error.strerror}") from None
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
        child.kill()
        child.wait()
        raise


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fields(followed: Followed, code: int | None) -> dict[str, Any]:
    return {
        "version": followed.version.number,
        "digest": followed.version.digest,
        "bytes": followed.size,
        "seconds": followed.seconds,
        "exit_code": code,
    }


def _line(followed: Followed) -> str:
    seconds = sum(followed.seconds.values())
    return f"{followed.version}: {size_text(followed.size)} fetched, written in {seconds:.1f} s"
