"""`tensorwire encode`: encode a model or any file as a stream."""

import argparse
import sys
from typing import Any, Final

import tensorwire
from tensorwire import Report, codecs
from tensorwire.cli import inputs
from tensorwire.cli.common import PIPE, add_limits, codec_choice, tracked, verb, write_stream
from tensorwire.cli.outputs import add_force, check_output

_TEXT: Final = f"""\
{inputs.HELP}
codecs, with parameters as in nf4:blocksize=128,double_quant=true; zstd and entropy may follow any of them:
{codecs.describe()}
Tensors that a codec cannot represent (integers, for example) are sent losslessly.
Rules by name, of which the first match wins: --codec '*.bias=raw,*=nf4'

examples:
  tensorwire encode model.safetensors model.tw --codec nf4:double_quant=true
  tensorwire encode model.safetensors careful.tw --codec '*norm*=raw,*=int8'
  tensorwire encode weights.npz - --codec 'bf16|zstd' | nc host 9000
  tar c folder | tensorwire encode - folder.tw --codec zstd
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "encode", _run, summary="encode a model or a file as a stream", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a file, or - for stdin")
    parser.add_argument("output", metavar="OUT", help="a .tw file, or - for stdout")
    parser.add_argument(
        "--codec", type=codec_choice, default="raw", metavar="SPEC", help="codec, or rules by name (raw)"
    )
    inputs.add_kind(parser)
    add_limits(parser)
    add_force(parser)


def _run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    check_output(output, inputs=inputs.files(arguments.input), force=arguments.force)
    report = Report()
    with inputs.opened(arguments) as source:
        if source.loads and output != PIPE:
            tensorwire.save_file(source.container, output, codec=source.codec, limits=source.limits, report=report)
        else:
            buffers = source.stream(at_rest=output != PIPE, report=report)
            write_stream(output, tracked(buffers, source.size(), lambda: report.bytes_in))
    print(report, file=sys.stderr)
    return 0
