"""What the verbs share: codec arguments, streams in and out of files and pipes, progress, JSON."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, Generic, NoReturn, TypeAlias, TypeVar

import tensorwire
from tensorwire import codecs
from tensorwire.errors import AuthError, EncodeError, TensorwireError
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
_MAX_KEY: Final = 4096
_UNITS: Final = "kMGT"
_PROGRESS_DELAY: Final = 1.0  # seconds; what is done sooner needs no bar


class UsageError(Exception):
    """A command line that means nothing, found after parsing."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit."""
        self.exit(2, f"tensorwire: error: {message} (see {self.prog} --help)\n")


def verb(verbs: Verbs, name: str, run: Run | None, *, summary: str, text: str) -> argparse.ArgumentParser:
    """A parser for one verb, whose help ends with `text` as it stands. `run`: None if it has verbs of its own."""
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
    """An argument that is a codec spec, or rules by name, PATTERN=SPEC,PATTERN=SPEC: the first that matches wins."""
    if not _RULE.match(text):
        return codec_spec(text)
    rules: dict[str, str] = {}
    pattern = ""
    for part in text.split(","):
        name, equals, spec = part.partition("=")
        # A comma also parts the parameters of a spec, which have plain names and values that are no codecs.
        if rules and ":" in rules[pattern] and name.isidentifier() and spec not in _codec_names():
            rules[pattern] += f",{part}"
        elif not (name and equals):
            raise argparse.ArgumentTypeError(f"{part!r} is no rule PATTERN=SPEC")
        elif name in rules:
            raise argparse.ArgumentTypeError(f"there are two rules for {name!r}")
        else:
            pattern = name
            rules[pattern] = spec
    return {name: codec_spec(spec) for name, spec in rules.items()}


def _codec_names() -> set[str]:
    return {stage.name for stage in codecs.registered()}


@contextmanager
def reading(path: str) -> Iterator[Iterator[bytes]]:
    """The bytes of a file or of stdin in chunks, with progress.

    Given to a decoder as an iterable, so that bytes after the end of the stream are an error.
    """
    if path == PIPE:
        # read1: what a pipe has is passed on at once.
        yield tracked(_chunks(lambda: sys.stdin.buffer.read1(_CHUNK)), None)  # type: ignore[union-attr]  # BufferedReader
        return
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        yield tracked(_chunks(lambda: file.read(_CHUNK)), size)


def _chunks(read: Callable[[], bytes]) -> Iterator[bytes]:
    while chunk := read():
        yield chunk


def read_key(path: str) -> bytes:
    """The key in a file: all of its bytes. Raises AuthError for what cannot be meant as one."""
    with open(path, "rb") as file:
        key = file.read(_MAX_KEY + 1)
    if len(key) > _MAX_KEY:
        raise AuthError(f"{path} has more than {_MAX_KEY} bytes: that is no key")
    return key


def write_stream(path: str, buffers: Iterable["ReadableBuffer"], total: int | None) -> None:
    """Write a stream to a file, which appears only when complete, or to stdout. `total`: about how many bytes."""
    if path != PIPE:
        write_file(path, tracked(buffers, total))
        return
    out = binary_stdout()
    for buffer in tracked(buffers, total):
        out.write(buffer)
    out.flush()


def binary_stdout() -> BinaryIO:
    """Stdout for bytes. Raises UsageError where they would land on a terminal."""
    if sys.stdout.isatty():
        raise UsageError("binary output to a terminal; redirect it")
    return sys.stdout.buffer


def tracked(buffers: Iterable[_Buffer], total: int | None) -> Iterator[_Buffer]:
    """`buffers`, with a progress bar on a terminal for those who have tqdm."""
    with Progress(total) as progress:
        for buffer in buffers:
            yield buffer
            progress.update(memoryview(buffer).nbytes)


class Counted(Generic[_Buffer]):
    """An iterable of buffers that counts their bytes as they pass."""

    def __init__(self, buffers: Iterable[_Buffer]) -> None:
        self._buffers = buffers
        self.size = 0

    def __iter__(self) -> Iterator[_Buffer]:
        for buffer in self._buffers:
            self.size += memoryview(buffer).nbytes
            yield buffer


def size_text(size: float) -> str:
    """Bytes as people read them: 33.6 MB."""
    if size < 1000:
        return f"{size:.0f} bytes"
    power = next(power for power in range(1, len(_UNITS) + 1) if size < 1000 ** (power + 1) or power == len(_UNITS))
    return f"{size / 1000**power:.1f} {_UNITS[power - 1]}B"


class Progress:
    """A bar of bytes on stderr, where that is a terminal and tqdm is installed. `begin`: bytes already there."""

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

    def update(self, size: int) -> None:
        """`size` more bytes are through."""
        if self._bar is not None:
            self._bar.update(size)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def error_fields(error: TensorwireError) -> dict[str, object]:
    """An error as JSON has it."""
    where = {key: getattr(error, key) for key in ("frame", "item", "offset")}
    return {"kind": type(error).__name__, "detail": error.detail, **where}


def print_json(value: object) -> None:
    """`value` on stdout."""
    json.dump(value, sys.stdout, indent=1)
    print()
