"""`tensorwire publish`: publish a model as the next version of a store."""

import argparse
import sys
from typing import Any, Final

import tensorwire
from tensorwire.cli import inputs
from tensorwire.cli.common import Progress, UsageError, add_limits, codec_spec, print_json, verb
from tensorwire.streams import size_text
from tensorwire.versions import ANCHOR_EVERY, KEEP, Published, Publisher

_TEXT: Final = """\
IN, by its name or by --from: *.safetensors, *.index.json, *.npz, *.npy, *.pt or *.pth, as for encode

STORE:
  a folder       created if missing; any web server can serve it to followers
  s3://... etc.  an object store, through fsspec

A version becomes visible when it is complete. A model equal to the last version is not published again. Each
further version is written as a patch, and from time to time as a whole (an anchor) for new followers.

examples:
  tensorwire publish model.safetensors /srv/versions
  tensorwire publish checkpoint.pt s3://bucket/versions --json
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "publish", _run, summary="publish a model as the next version of a store", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a model")
    parser.add_argument("store", metavar="STORE", help="a folder or an fsspec URL")
    inputs.add_kind(parser)
    parser.add_argument(
        "--anchor-every",
        type=int,
        default=ANCHOR_EVERY,
        metavar="N",
        help=f"write an anchor, the whole model, every N versions ({ANCHOR_EVERY})",
    )
    parser.add_argument(
        "--keep", type=int, default=KEEP, metavar="N", help=f"keep the last N anchors and all later files ({KEEP})"
    )
    parser.add_argument(
        "--codec",
        type=codec_spec,
        default="planes",
        metavar="SPEC",
        dest="anchors",
        help="the codec of anchors, a lossless one (planes)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.set_defaults(codec="raw")
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.anchor_every < 1 or arguments.keep < 1:
        raise UsageError("--anchor-every and --keep must be at least 1")
    with inputs.opened(arguments) as source:
        if source.kind == "file":
            raise UsageError(f"{arguments.input!r} does not have the name of a model: give its kind with --from")
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
