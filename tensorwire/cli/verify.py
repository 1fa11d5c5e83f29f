"""`tensorwire verify`: read everything, keep nothing, say whether it is good."""

import argparse
from typing import Any, Final

import numpy as np

from tensorwire.cli.common import error_fields, print_json, reading, verb
from tensorwire.errors import WireError
from tensorwire.limits import DEFAULT
from tensorwire.streams.decode import ValueSink
from tensorwire.streams.pool import Pool
from tensorwire.streams.receive import Receiver, Sink
from tensorwire.streams.source import as_source
from tensorwire.wire import Item, Kind
from tensorwire.wire.frames import HEADER_SIZE
from tensorwire.wire.ledger import END_SIZE

_TEXT: Final = """\
Every checksum, link, descriptor and payload is checked as a receiver would check it: exit code 0 says that
the whole stream decodes, 1 that it does not, with the frame, item and byte where it breaks.

examples:
  tensorwire verify model.tw
  tensorwire verify model.tw --json | jq .digest
"""
_WITH_DATA: Final = (Kind.TENSOR, Kind.FILE)


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "verify", _run, summary="check a stream from its first byte to its last", text=_TEXT)
    parser.add_argument("input", metavar="FILE", help="a .tw file, or - for stdin")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def _run(arguments: argparse.Namespace) -> int:
    with reading(arguments.input) as source:
        receiver = Receiver(as_source(source), _Nowhere(), DEFAULT)
        try:
            for _ in receiver:
                pass
        except WireError as error:
            if arguments.json:
                print_json({"ok": False, "error": error_fields(error)})
            raise
    assert receiver.end is not None
    summary = receiver.end.summary
    result = {
        "items": summary.items,
        "frames": summary.frames + 1,  # the END frame counts those before it
        "bytes": summary.size + HEADER_SIZE + END_SIZE,
        "digest": summary.digest.hex(),
    }
    if arguments.json:
        print_json({"ok": True, **result})
    else:
        print("ok: {items} items, {frames} frames, {bytes} bytes, SHA-256 {digest}".format(**result))
    return 0


class _Nowhere(Sink):
    """Lends every item the same few buffers."""

    def __init__(self) -> None:
        self._pool = Pool()

    def __call__(self, number: int, item: Item) -> Sink | None:
        if item.kind == Kind.VALUE:
            return ValueSink(DEFAULT)
        return self if item.kind in _WITH_DATA else None

    def region(self, start: int, stop: int) -> np.ndarray:
        return self._pool.take(stop - start)

    def close(self) -> None:
        return None
