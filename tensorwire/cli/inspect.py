"""`tensorwire inspect`: what a stream holds, as a summary or frame by frame, and where it breaks."""

import argparse
from typing import Any, Final

from tensorwire.bench.tables import Column, render
from tensorwire.cli.common import error_fields, print_json, reading, verb
from tensorwire.codecs import from_stages
from tensorwire.errors import WireError, show
from tensorwire.transfer.frames import Frame, Frames
from tensorwire.wire import (
    AliasItem,
    FileItem,
    Item,
    ItemStart,
    Slice,
    StreamEnd,
    StreamInfo,
    StreamStart,
    TensorItem,
    ValueItem,
)
from tensorwire.wire.drive import as_source
from tensorwire.wire.frames import PREAMBLE_SIZE

_TEXT: Final = """\
The whole stream is read and its checksums are checked, but payloads are not decoded; `verify` does that too.

examples:
  tensorwire inspect model.tw
  tensorwire inspect model.tw --frames | head
  tensorwire inspect model.tw --json | jq '.items[] | select(.codec == "raw")'
"""
_CONTAINERS: Final = ("dict", "list", "tuple")
_COLUMNS: Final = (
    Column("name", "item"),
    Column("kind", "kind"),
    Column("dtype", "dtype"),
    Column("shape", "shape", lambda shape: " x ".join(map(str, shape)) or "0-d"),
    Column("codec", "codec"),
    Column("bytes", "bytes", ","),
    Column("wire_bytes", "encoded", ","),
    Column("ratio", "ratio", ".2f"),
)


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "inspect", _run, summary="explain a stream: items, or frame by frame", text=_TEXT)
    parser.add_argument("input", metavar="FILE", help="a .tw file, or - for stdin")
    parser.add_argument("--frames", action="store_true", help="one line a frame")
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout")


def _run(arguments: argparse.Namespace) -> int:
    account = _Account()
    listed: list[dict[str, Any]] = []
    error: WireError | None = None
    with reading(arguments.input) as source:
        frames = Frames(as_source(source))
        try:
            for frame in frames:
                account.enter(frame)
                if arguments.frames and arguments.json:
                    listed.append(_frame_fields(frame))
                elif arguments.frames:
                    print(_frame_line(frame))
        except WireError as caught:
            error = caught
    if arguments.json:
        print_json(account.fields() | ({"frames": listed} if arguments.frames else {}) | _broken(frames, error))
    else:
        if error is not None and frames.broken is not None and arguments.frames:
            print(f"{_frame_line(frames.broken)}  <- breaks here")
        print(account.text(items=not arguments.frames, whole=error is None))
    if error is not None:
        raise error
    return 0


def _broken(frames: Frames, error: WireError | None) -> dict[str, Any]:
    if error is None:
        return {"error": None}
    frame = None if frames.broken is None else _frame_fields(frames.broken)
    return {"error": error_fields(error), "broken_frame": frame}


class _Account:
    """What has passed: the stream's own fields, items, and bytes."""

    def __init__(self) -> None:
        self._info: StreamInfo | None = None
        self._items: list[dict[str, Any]] = []
        self._frames = 0
        self._size = PREAMBLE_SIZE
        self._digest: str | None = None

    def enter(self, frame: Frame) -> None:
        """Add one verified frame."""
        self._frames += 1
        self._size += frame.size
        event = frame.event
        if isinstance(event, StreamStart):
            self._info = event.info
        elif isinstance(event, ItemStart):
            self._items.append(_item_fields(event.item))
        elif isinstance(event, StreamEnd):
            self._digest = event.summary.digest.hex()
        elif isinstance(event, Slice):
            fields = self._items[event.number]
            itemsize = event.item.dtype.itemsize if isinstance(event.item, TensorItem) else 1
            fields["bytes"] += event.count * itemsize
            fields["wire_bytes"] += frame.header.length
            fields["complete"] = event.last
            fields["ratio"] = fields["bytes"] / fields["wire_bytes"] if fields["wire_bytes"] else None

    def fields(self) -> dict[str, Any]:
        """The summary as JSON has it."""
        info = self._info or StreamInfo()
        return {
            "align": info.align,
            "id": info.id.hex(),
            "metadata": dict(info.metadata),
            "items": self._items,
            "totals": {
                "items": len(self._items),
                "frames": self._frames,
                "bytes": self._decoded,
                "wire_bytes": self._size,
                "framing_bytes": self._framing,
            },
            "digest": self._digest,
        }

    def text(self, *, items: bool, whole: bool) -> str:
        """The summary for people, with or without its items."""
        info = self._info or StreamInfo()
        lines = [f"metadata {show(key)}: {show(text)}" for key, text in info.metadata]
        if info.id:
            lines.append(f"stream id {info.id.hex()}")
        rows = [item | {"name": show(item["name"])} for item in self._items if item["kind"] not in _CONTAINERS]
        if items and rows:
            lines.append(render(rows, _COLUMNS))
        lines.append(
            f"{len(self._items)} items in {self._frames} frames: {self._decoded:,} bytes as {self._size:,}, "
            f"ratio {self._decoded / self._size:.2f}, framing {100 * self._framing / self._size:.3f} %"
            + ("" if whole else "; then the stream breaks")
        )
        return "\n".join(lines)

    @property
    def _decoded(self) -> int:
        return sum(item["bytes"] for item in self._items)

    @property
    def _framing(self) -> int:
        return self._size - sum(item["wire_bytes"] for item in self._items)


def _item_fields(item: Item) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": item.name,
        "path": list(item.path),
        "kind": item.kind.name.lower(),
        "dtype": item.dtype.name if isinstance(item, TensorItem) else None,
        "shape": list(item.shape) if isinstance(item, TensorItem) else None,
        "codec": _codec(item.codec) if isinstance(item, (TensorItem, FileItem)) else None,
        "bytes": 0,
        "wire_bytes": 0,
        "ratio": None,
        "complete": item.total == 0,
    }
    return fields | ({"alias_of": item.of} if isinstance(item, AliasItem) else {})


def _codec(stages: tuple[tuple[int, ...], ...]) -> str:
    try:
        return repr(from_stages(stages))
    except WireError:
        return f"unknown {[list(stage) for stage in stages]}"


def _frame_fields(frame: Frame) -> dict[str, Any]:
    header = frame.header
    fields = {
        "sequence": header.sequence,
        "offset": frame.offset,
        "type": frame.type_name,
        "length": header.length,
    }
    if frame.type_name == "ITEM":
        fields |= {"item": header.item}
    if frame.type_name == "DATA":
        fields |= {"item": header.item, "start": header.start, "count": header.count, "pad": header.pad}
    return fields | {"payload_crc": f"{header.payload_crc:08x}", "crc": f"{header.crc:08x}"}


def _frame_line(frame: Frame) -> str:
    header = frame.header
    place = f"{header.sequence:>6}  {frame.offset:>12}  {frame.type_name:<6}  {header.length:>10}"
    return f"{place}  {_explain(frame)}".rstrip()


def _explain(frame: Frame) -> str:
    header, event = frame.header, frame.event
    if frame.type_name == "DATA":
        return f"#{header.item} elements [{header.start}, {header.start + header.count})"
    if isinstance(event, ItemStart):
        return f"#{event.number} {_describe(event.item)}"
    if isinstance(event, StreamStart):
        extra = [f"id {event.info.id.hex()}"] if event.info.id else []
        extra += [f"{len(event.info.metadata)} metadata"] if event.info.metadata else []
        return ", ".join([f"align {event.info.align}", *extra])
    if isinstance(event, StreamEnd):
        return f"{event.summary.items} items, SHA-256 {event.summary.digest.hex()[:16]}..."
    return f"#{header.item}" if frame.type_name == "ITEM" else ""


def _describe(item: Item) -> str:
    name = show(item.name) if item.path else "root"
    if isinstance(item, TensorItem):
        return f"{name} {item.dtype} {list(item.shape)} {_codec(item.codec)}"
    if isinstance(item, AliasItem):
        return f"{name} is #{item.of}"
    if isinstance(item, FileItem):
        size = "unknown length" if item.size is None else f"{item.size} bytes"
        return f"{name} file of {size}, {_codec(item.codec)}"
    size = f" of {item.size} bytes" if isinstance(item, ValueItem) else ""
    return f"{name} {item.kind.name.lower()}{size}"
