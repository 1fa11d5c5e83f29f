"""`tensorwire patch`: apply patches to a version of a model, giving a later version."""

import argparse
import sys
from typing import Any, Final

from tensorwire.cli import inputs
from tensorwire.cli.common import PIPE, UsageError, add_limits, positive_size, verb
from tensorwire.cli.outputs import add_force, check_output
from tensorwire.files import versions

_TEXT: Final = """\
BASE is a .safetensors file, a sharded checkpoint (its index or folder) or a .tw file. PATCHes are made by `tensorwire
diff` and given in the order of their versions. OUT is a .tw file if it is named so, otherwise .safetensors. It appears
only when every tensor in it is verified against the last patch. BASE is not changed and never loaded.

examples:
  tensorwire patch step-100.safetensors to-200.tw to-300.tw step-300.safetensors
  tensorwire patch step-100/ to-200.tw step-200 --max-shard-size 5GB
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "patch", _run, summary="apply patches to a version of a model", text=_TEXT)
    parser.add_argument("base", metavar="BASE", help="the version that the first patch is for")
    parser.add_argument("patches", metavar="PATCH", nargs="+", help="patches, or - for stdin")
    parser.add_argument("output", metavar="OUT", help="a .safetensors or .tw file")
    parser.add_argument(
        "--max-shard-size",
        type=positive_size,
        metavar="SIZE",
        help="make OUT a folder of shards of at most SIZE, such as 5GB",
    )
    add_limits(parser)
    add_force(parser)


def _run(arguments: argparse.Namespace) -> int:
    output, patches = arguments.output, arguments.patches
    if PIPE in (arguments.base, output) or patches.count(PIPE) > 1:
        raise UsageError("BASE and OUT must be files, and at most one PATCH can be stdin")
    if arguments.max_shard_size is None:
        check_output(output, inputs=[*inputs.files(arguments.base), *patches], force=arguments.force)
    made = versions.patch(
        arguments.base,
        [sys.stdin.buffer if patch == PIPE else patch for patch in patches],
        output,
        max_shard_size=arguments.max_shard_size,
        limits=arguments.limits,
    )
    print(f"version {made}", file=sys.stderr)
    return 0
