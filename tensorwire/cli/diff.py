"""`tensorwire diff`: make the patch from one version of a model to another."""

import argparse
import os
import sys
from typing import Any, Final

from tensorwire.cli import inputs
from tensorwire.cli.common import PIPE, UsageError, add_limits, tracked, verb, write_stream
from tensorwire.cli.outputs import add_force, check_output
from tensorwire.errors import counted
from tensorwire.files import versions
from tensorwire.streams import Report, size_text

_TEXT: Final = """\
OLD and NEW are .safetensors files, sharded checkpoints (their index or folder) or .tw files. Their tensors have the
same names, dtypes and shapes. Both are read block by block and never loaded.

examples:
  tensorwire diff step-100.safetensors step-200.safetensors to-200.tw
  tensorwire diff old/ new/ - | ssh host 'cat > to-200.tw'
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "diff", _run, summary="make the patch from one version of a model to another", text=_TEXT)
    parser.add_argument("old", metavar="OLD", help="the version that the other side has")
    parser.add_argument("new", metavar="NEW", help="the version that it will get")
    parser.add_argument("output", metavar="PATCH", help="a .tw file, or - for stdout")
    add_limits(parser)
    add_force(parser, "PATCH")


def _run(arguments: argparse.Namespace) -> int:
    if PIPE in (arguments.old, arguments.new):
        raise UsageError("both versions are read here and there, which stdin cannot be: give files")
    read = [*inputs.files(arguments.old), *inputs.files(arguments.new)]
    check_output(arguments.output, inputs=read, force=arguments.force)
    report = Report()
    buffers = versions.diff(arguments.old, arguments.new, limits=arguments.limits, report=report)
    write_stream(arguments.output, tracked(buffers, None, lambda: report.bytes_in))
    size = sum(map(os.path.getsize, inputs.files(arguments.new)))
    written = "" if arguments.output == PIPE else f": {arguments.output}"
    changed = f"{counted(report.items, 'item')} changed"
    print(f"{size_text(size)} -> {size_text(report.bytes_out)}, {changed}{written}", file=sys.stderr)
    return 0
