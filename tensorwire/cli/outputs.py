"""What a command may write: over an existing file only with --force, and never over a file that it reads."""

import argparse
import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from tensorwire.cli.common import PIPE, UsageError
from tensorwire.errors import StorageError
from tensorwire.storage import Target

_STDIN: Final = 0
_STDOUT: Final = 1


def add_force(parser: argparse.ArgumentParser, what: str = "OUT") -> None:
    """The option that allows replacing existing files."""
    parser.add_argument("--force", action="store_true", help=f"replace {what} if present")


def check_output(path: str, *, inputs: Iterable[str | None] = (), force: bool) -> None:
    """Refuse an output that must not be written, before anything is read. `inputs`: what is read, `-` for stdin.

    Raises UsageError for a file that is also an input, by this name or another (a link, a redirection), and for one
    that exists, unless `force`; StorageError if the system would refuse it.
    """
    for name in inputs:
        if name is not None and _same(path, name):
            written = "standard output" if path == PIPE else repr(path)
            read = "standard input" if name == PIPE else repr(name)
            raise UsageError(f"{written} is the same file as {read}, which is read: give another name")
    if path == PIPE:
        return
    if not force and exists(path):
        raise UsageError(f"{path!r} exists: give another name, or --force to replace it")
    with Target(path):
        pass
    folder = os.path.dirname(path) or os.curdir
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {path!r}: choose a folder that you may write to", errno=errno.EACCES)


def exists(path: str) -> bool:
    """Whether a file or link of this name exists. `Target` refuses anything else."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _same(output: str, name: str) -> bool:
    """Whether both are the same regular file."""
    try:
        written = os.stat(_STDOUT if output == PIPE else output)
        read = os.stat(_STDIN if name == PIPE else name)
    except OSError:
        return False
    return stat.S_ISREG(written.st_mode) and os.path.samestat(written, read)
