"""The `tensorwire` command line: thin commands over the public API, one per file.

Data goes to stdout, messages for people to stderr. A command raises; `main` alone turns errors and signals into
one line and an exit code.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import tensorwire
from tensorwire.bench import BenchError
from tensorwire.cli import (
    bench,
    certificate,
    decode,
    diff,
    digest,
    encode,
    fl,
    follow,
    inspect,
    patch,
    publish,
    receive,
    send,
    verify,
)
from tensorwire.cli.common import Parser, Run, UsageError
from tensorwire.cli.process import Stopped, drop_output, open_streams, stoppable
from tensorwire.errors import StorageError, TensorwireError, TransportError
from tensorwire.transfer import RefusedError

OK: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
IO_TROUBLE: Final = 3
FAULT: Final = 4
SIGNALLED: Final = 128
_TRACEBACK: Final = "TENSORWIRE_TRACEBACK"  # an environment variable

_VERBS: Final = (
    bench,
    encode,
    decode,
    diff,
    patch,
    inspect,
    verify,
    digest,
    send,
    receive,
    publish,
    follow,
    certificate,
    fl,
)
_EPILOG: Final = """\
exit codes:
  0    success: the stream is valid
  1    refused: the stream is broken, not what was asked for or not from the expected author, or the input cannot be
       encoded as asked
  2    wrong usage, or the output already exists or is also an input
  3    a problem with a file, a pipe or this machine's resources
  4    a bug in tensorwire
  130  ended by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP. No partial output is left.

An existing file is replaced only with --force, and an input file never.

examples:
  tensorwire bench
  tensorwire encode model.safetensors model.tw --codec nf4
  tensorwire inspect model.tw --frames | head
  tensorwire decode model.tw restored.safetensors
  tensorwire encode model.safetensors - --codec bf16 | \\
      ssh host tensorwire decode - received.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    open_streams()
    try:
        with stoppable():
            return _run(argv)
    except KeyboardInterrupt as stopped:
        return SIGNALLED + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has closed it
        return IO_TROUBLE
    except UsageError as error:
        return _fail(error, USAGE)
    except (TransportError, StorageError) as error:
        return _fail(error, REFUSED if isinstance(error, RefusedError) and not error.retryable else IO_TROUBLE)
    except TensorwireError as error:
        return _fail(error, REFUSED)
    except (OSError, MemoryError, BenchError) as error:
        return _fail(error, IO_TROUBLE)
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        name = type(error).__name__
        return _fail(f"a bug in tensorwire: {name}: {error}; please report it with the output of {_TRACEBACK}=1", FAULT)
    finally:
        drop_output()


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    run: Run = arguments.run
    code = run(arguments)
    sys.stdout.flush()
    return code


def _fail(error: BaseException | str, code: int) -> int:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename or repr(error.filename)}: {error.strerror}"
    with suppress(OSError):  # stderr may be closed; the exit code tells too
        print(f"tensorwire: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(
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
