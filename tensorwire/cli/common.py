"""What the commands share: codec arguments, streams in and out of files and pipes, progress, JSON."""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import sha256
from textwrap import fill
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, TextIO, TypeAlias, TypeVar

import tensorwire
from tensorwire import codecs
from tensorwire.errors import AuthError, EncodeError, TensorwireError, near
from tensorwire.files import opened
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import write_file

if TYPE_CHECKING:
    import tqdm
    from _typeshed import ReadableBuffer

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]
CodecArgument: TypeAlias = str | dict[str, str]
_Buffer = TypeVar("_Buffer", bound="ReadableBuffer")

PIPE: Final = "-"
_RULE: Final = re.compile("[^:|=]+=")  # begins rules by name: in a spec, ':' comes before any '='
_CHUNK: Final = 1 << 20
_WIDEST: Final = 120  # characters of a line of help
_COMMAND: Final = "  tensorwire "
_ROW: Final = re.compile(r"  \S+(?: \S+)*  +(?=\S)")  # the first column of two
_POWERS: Final[dict[str, int]] = {"": 1, "kB": 1000} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("KMGT", 1)
    for unit, base in (("iB", 1 << 10), ("B", 1000))
}
_NUMBER: Final = re.compile(f"([0-9]+)({'|'.join(_POWERS)})")
_MAX_KEY: Final = 4096
_PROGRESS_DELAY: Final = 1.0  # seconds; what is done sooner needs no bar


class UsageError(Exception):
    """A command line that cannot be carried out, found after parsing."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and help that fits the terminal."""

    def format_help(self) -> str:
        """The help, with its epilog wrapped to the width of the terminal."""
        self.epilog = self.epilog and _filled(self.epilog, min(shutil.get_terminal_size().columns, _WIDEST) - 1)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print it and exit."""
        self.exit(2, f"tensorwire: error: {message} (see {self.prog} --help)\n")


def _filled(text: str, width: int) -> str:
    """`text` in lines of at most `width`: prose, and rows of two columns, but not the commands among the examples.

    A line that is indented by more than two characters continues the one before.
    """
    blocks: list[str] = []
    for line in text.splitlines():
        last = blocks[-1] if blocks else ""
        is_prose = line[:1] != " " and last[:1] != " " and not last.endswith(":")
        if line and last and not last.startswith(_COMMAND) and (is_prose or line.startswith("   ")):
            blocks[-1] += f" {line.lstrip()}"
        else:
            blocks.append(line)
    return "\n".join(block if block.startswith(_COMMAND) else _wrapped(block, width) for block in blocks)


def _wrapped(block: str, width: int) -> str:
    row = _ROW.match(block)
    indent = " " * (row.end() if row else 0)
    return fill(block, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def verb(verbs: Verbs, name: str, run: Run | None, *, summary: str, text: str) -> argparse.ArgumentParser:
    """A parser for one command, whose help ends with `text`. `run`: None if it has subcommands."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def codec_spec(text: str) -> str:
    """An argument that is a codec spec, checked."""
    try:
        tensorwire.codec(text)
    except EncodeError as error:
        raise argparse.ArgumentTypeError(error.detail) from None
    return text


def codec_choice(text: str) -> CodecArgument:
    """An argument that is a codec spec, or rules by name, PATTERN=SPEC,PATTERN=SPEC; the first match wins."""
    if not _RULE.match(text):
        return codec_spec(text)
    rules: dict[str, str] = {}
    pattern = ""
    for part in text.split(","):
        name, equals, spec = part.partition("=")
        # A comma also separates the parameters of a spec, which have plain names and values that are not codecs.
        if rules and ":" in rules[pattern] and name.isidentifier() and not _names_codec(spec):
            rules[pattern] += f",{part}"
        elif not (name and equals):
            raise argparse.ArgumentTypeError(f"{part!r} is not a rule PATTERN=SPEC")
        elif name in rules:
            raise argparse.ArgumentTypeError(f"there are two rules for {name!r}")
        else:
            pattern = name
            rules[pattern] = spec
    return {name: codec_spec(spec) for name, spec in rules.items()}


def _names_codec(spec: str) -> bool:
    return re.split("[:|]", spec)[0] in {stage.name for stage in codecs.registered()}


class Chunks:
    """A stream read in chunks, with progress; an iterable, so that bytes after its end are an error.

    `size`: bytes read. `sha256`: the digest of all of them, or None if it was not requested.
    """

    def __init__(self, read: Callable[[], bytes], total: int | None, *, hashed: bool) -> None:
        self._read = read
        self._total = total
        self._hash = sha256() if hashed else None
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        with Progress(self._total) as progress:
            while chunk := self._read():
                self.size += len(chunk)
                if self._hash is not None:
                    self._hash.update(chunk)
                yield chunk
                progress.reach(self.size)

    @property
    def sha256(self) -> str | None:
        """In hexadecimal."""
        return None if self._hash is None else self._hash.hexdigest()


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The option that changes a limit."""
    names = ", ".join(each.name for each in fields(Limits))
    parser.add_argument(
        "--limit",
        dest="limits",
        type=_limit,
        action=_AddLimit,
        default=DEFAULT,
        metavar="NAME=VALUE",
        help=f"change a default limit, as in stream=2TiB; one of {names}",
    )


def limit_options(limits: Limits) -> list[str]:
    """Those of some limits that are not the default, as values of the option."""
    return [f"{each.name}={value}" for each in fields(Limits) if (value := getattr(limits, each.name)) != each.default]


class _AddLimit(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, value = values
        namespace.limits = replace(namespace.limits, **{name: value})


def _limit(text: str) -> tuple[str, int]:
    """NAME=VALUE as a limit and its number."""
    name, equals, value = text.partition("=")
    names = [each.name for each in fields(Limits)]
    if name not in names:
        close = near(name, names)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"there is no limit {name!r}{hint}")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, as in {text}=1000")
    return name, byte_size(value)


def positive_size(text: str) -> int:
    """An argument that is a number of bytes, at least one."""
    size = byte_size(text)
    if size < 1:
        raise argparse.ArgumentTypeError("must be at least one byte")
    return size


def byte_size(text: str) -> int:
    """An argument that is a number, usually of bytes."""
    number = _NUMBER.fullmatch(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4096, 64KiB, 20GiB, 2TiB or 5GB")
    return int(number[1]) * _POWERS[number[2]]


@contextmanager
def reading(path: str, *, hashed: bool = False) -> Iterator[Chunks]:
    """The bytes of a file, which WireErrors then name, or of stdin."""
    if path == PIPE:
        stdin = sys.stdin.buffer
        # read1 passes on what a pipe has at once.
        yield Chunks(lambda: stdin.read1(_CHUNK), None, hashed=hashed)  # type: ignore[union-attr]  # BufferedReader
        return
    with opened(path) as file:
        yield Chunks(lambda: file.read(_CHUNK), os.fstat(file.fileno()).st_size, hashed=hashed)


def read_key(path: str) -> bytes:
    """The key in a file: all of its bytes. Raises AuthError for a file too large to be a key."""
    with open(path, "rb") as file:
        key = file.read(_MAX_KEY + 1)
    if len(key) > _MAX_KEY:
        raise AuthError(f"{path} has more than {_MAX_KEY} bytes, too many for a key")
    return key


def write_stream(path: str, buffers: Iterable["ReadableBuffer"]) -> None:
    """Write a stream to a file, which appears only when complete, or to stdout."""
    if path != PIPE:
        write_file(path, buffers)
        return
    out = binary_stdout()
    for buffer in buffers:
        out.write(buffer)
    out.flush()


def binary_stdout() -> BinaryIO:
    """Stdout for bytes. Raises UsageError if it is a terminal."""
    if sys.stdout.isatty():
        raise UsageError("cannot write binary output to a terminal; redirect it")
    return sys.stdout.buffer


def tracked(buffers: Iterable[_Buffer], total: int | None, done: Callable[[], int]) -> Iterator[_Buffer]:
    """`buffers`, with a progress bar of `done()` of `total` bytes."""
    with Progress(total) as progress:
        for buffer in buffers:
            yield buffer
            progress.reach(done())


class Progress:
    """A bar of bytes on stderr, if that is a terminal and tqdm is installed. `begin`: bytes already there."""

    def __init__(self, total: int | None, begin: int = 0) -> None:
        self._bar: tqdm.tqdm[NoReturn] | None = None
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm as bar
        except ImportError:
            return
        self._bar = bar(
            total=total,
            initial=begin,
            delay=_PROGRESS_DELAY,
            leave=False,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        )

    def reach(self, done: int) -> None:
        """Show that `done` bytes in total are finished."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def line_width(out: TextIO) -> int | None:
    """The width of the terminal that `out` is; None for a pipe or a file, which have no limit."""
    return shutil.get_terminal_size().columns if out.isatty() else None


def error_fields(error: TensorwireError | OSError) -> dict[str, object]:
    """An error as JSON fields."""
    where = {key: getattr(error, key, None) for key in ("frame", "item", "offset")}
    detail = error.detail if isinstance(error, TensorwireError) else str(error)
    return {"kind": type(error).__name__, "detail": detail, **where}


def print_json(value: object) -> None:
    """Print `value` on stdout."""
    json.dump(value, sys.stdout, indent=1)
    print()
