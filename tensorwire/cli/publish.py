"""`tensorwire publish`: a model as the next version of a store."""

import argparse
import sys
from typing import Any, Final

import tensorwire
from tensorwire.cli import inputs
from tensorwire.cli.common import Progress, UsageError, add_limits, codec_spec, print_json, verb
from tensorwire.streams import size_text
from tensorwire.versions import ANCHOR_EVERY, KEEP, Published, Publisher

_TEXT: Final = """\
what IN is, by its name or by --from: *.safetensors, *.index.json, *.npz, *.npy, *.pt or *.pth, as for encode
what STORE is:
  a folder       made where it is missing; any web server may show it to those who follow
  s3://... etc.  an object store, by fsspec

A version is visible when all of it is there. What is equal to the last one is not published again. From version to
version only what changed is written, and all of it now and then for those who come new.

examples:
  tensorwire publish model.safetensors /srv/versions
  tensorwire publish checkpoint.pt s3://bucket/versions --json
"""


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "publish", _run, summary="publish a model as the next version of a store", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a model")
    parser.add_argument("store", metavar="STORE", help="a folder or an fsspec URL")
    inputs.add_kind(parser)
    parser.add_argument(
        "--anchor-every",
        type=int,
        default=ANCHOR_EVERY,
        metavar="N",
        help=f"write all of the model at every N versions ({ANCHOR_EVERY})",
    )
    parser.add_argument(
        "--keep", type=int, default=KEEP, metavar="N", help=f"keep N of those, and what follows ({KEEP})"
    )
    parser.add_argument(
        "--codec",
        type=codec_spec,
        default="planes",
        metavar="SPEC",
        dest="anchors",
        help="a lossless one, for those (planes)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.set_defaults(codec="raw")
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.anchor_every < 1 or arguments.keep < 1:
        raise UsageError("--anchor-every and --keep are numbers from 1 on")
    with inputs.opened(arguments) as source:
        if source.kind == "file":
            raise UsageError(f"{arguments.input!r} is no model by its name: say what it is with --from")
        state = source.container if source.loads else tensorwire.loads(source.stream(), limits=arguments.limits)
    with Publisher(
        arguments.store,
        anchor_every=arguments.anchor_every,
        keep=arguments.keep,
        codec=arguments.anchors,
        limits=arguments.limits,
    ) as publisher:
        size = tensorwire.encoded_size(state, codec=arguments.anchors, limits=arguments.limits)
        with Progress(size) as bar:
            done = publisher.publish(state, progress=lambda written, total: bar.reach(written))
    for note in done.notes:
        print(note, file=sys.stderr)
    if arguments.json:
        print_json(_fields(done))
    else:
        print(_line(done), file=sys.stderr)
    return 0


def _fields(done: Published) -> dict[str, Any]:
    return {
        "version": done.number,
        "digest": done.digest,
        "new": done.is_new,
        "patch_bytes": done.patch,
        "anchor_bytes": done.anchor,
        "seconds": done.seconds,
        "notes": list(done.notes),
    }


def _line(done: Published) -> str:
    name = f"version {done.number} ({done.digest[:12]})"
    if not done.is_new:
        return f"unchanged: {name}"
    sizes = {"patch": done.patch, "whole": done.anchor}
    written = ", ".join(f"{kind} {size_text(size)}" for kind, size in sizes.items() if size is not None)
    return f"published {name}: {written} in {sum(done.seconds.values()):.1f} s"
