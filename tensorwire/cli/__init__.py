"""The `tensorwire` command: thin verbs over the public API, one a file.

Data goes to stdout, everything meant for people to stderr. A verb raises; `main` alone turns errors into one
line and an exit code.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

import tensorwire
from tensorwire.bench import BenchError
from tensorwire.cli import bench, decode, digest, encode, fl, inspect, receive, send, verify
from tensorwire.cli.common import Run, UsageError
from tensorwire.errors import StorageError, TensorwireError, TransportError
from tensorwire.transfer import RefusedError

OK: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
IO_TROUBLE: Final = 3
INTERRUPTED: Final = 130

_VERBS: Final = (bench, encode, decode, inspect, verify, digest, send, receive, fl)
_EPILOG: Final = """\
exit codes:
  0    done, and the stream is good
  1    refused: the stream is broken, not what was asked for or not from whom it should be, or the input cannot be
       encoded as asked
  2    usage
  3    trouble with a file, a pipe, or what this machine has
  130  interrupted

examples:
  tensorwire bench
  tensorwire encode model.safetensors model.tw --codec nf4
  tensorwire inspect model.tw --frames | head
  tensorwire decode model.tw restored.safetensors
  tensorwire encode model.safetensors - --codec bf16 | ssh host tensorwire decode - model.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        run: Run = arguments.run
        code = run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output wants no more. Python must not run into that again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return IO_TROUBLE
    except UsageError as error:
        return _fail(error, USAGE)
    except (TransportError, StorageError) as error:
        return _fail(error, REFUSED if isinstance(error, RefusedError) and not error.retryable else IO_TROUBLE)
    except TensorwireError as error:
        return _fail(error, REFUSED)
    except (OSError, MemoryError, BenchError) as error:
        return _fail(error, IO_TROUBLE)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(error: BaseException, code: int) -> int:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"tensorwire: error: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tensorwire",
        description="Compress, stream, check and measure tensors.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tensorwire {tensorwire.__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser
