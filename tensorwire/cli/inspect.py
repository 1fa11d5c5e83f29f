"""`tensorwire inspect`: show what a stream holds, as a summary or frame by frame, and where it is broken."""

import argparse
import sys
from math import prod
from typing import Any, Final

import tensorwire
from tensorwire.bench.tables import Column, render
from tensorwire.cli.common import add_limits, error_fields, line_width, print_json, reading, verb
from tensorwire.errors import counted, show
from tensorwire.files.examine import Inspection, ItemReport, describe_codec
from tensorwire.streams import size_text
from tensorwire.transfer import Frame
from tensorwire.wire import (
    AliasItem,
    ContainerItem,
    FileItem,
    Item,
    ItemsStart,
    StreamEnd,
    StreamStart,
    TensorItem,
    ValueItem,
)

_TEXT: Final = """\
Reads the whole stream and checks its checksums, but does not decode payloads; `verify` does that too.

examples:
  tensorwire inspect model.tw
  tensorwire inspect model.tw --frames | head
  tensorwire inspect model.tw --json | jq '.items[] | select(.codec == "raw")'
"""
_COLUMNS: Final = (
    Column("name", "item"),
    Column("kind", "kind"),
    Column("dtype", "dtype"),
    Column("shape", "shape", lambda shape: " x ".join(map(str, shape)) or "0-d"),
    Column("codec", "codec"),
    Column("bytes", "size", size_text),
    Column("wire_bytes", "encoded", size_text),
    Column("ratio", "ratio", ".2f"),
)


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "inspect", _run, summary="show a stream item by item or frame by frame", text=_TEXT)
    parser.add_argument("input", metavar="FILE", help="a .tw file, or - for stdin")
    parser.add_argument("--frames", action="store_true", help="one line per frame")
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    listed: list[dict[str, Any]] = []

    def on_frame(frame: Frame) -> None:
        if arguments.frames and arguments.json:
            listed.append(_frame_fields(frame))
        elif arguments.frames:
            print(_frame_line(frame))

    with reading(arguments.input) as source:
        report = tensorwire.inspect(source, on_frame=on_frame, limits=arguments.limits)
        if arguments.json:
            print_json(_fields(report) | ({"frames": listed} if arguments.frames else {}))
        elif report.frames or report.error is None:
            if report.broken is not None and arguments.frames:
                print(f"{_frame_line(report.broken)}  <- breaks here")
            print(_text(report, items=not arguments.frames))
        if report.error is not None:
            raise report.error
    return 0


def _fields(report: Inspection) -> dict[str, Any]:
    """The report as JSON fields."""
    fields = {
        "align": report.info.align,
        "id": report.info.id.hex(),
        "metadata": dict(report.info.metadata),
        **_versions(report),
        "items": [_item_fields(item) for item in report.items],
        "totals": {
            "items": len(report.items),
            "frames": report.frames,
            "bytes": report.size,
            "wire_bytes": report.wire_size,
            "framing_bytes": report.framing,
        },
        "stream_digest": report.digest,
        "error": None if report.error is None else error_fields(report.error),
    }
    if report.error is not None:
        fields["broken_frame"] = None if report.broken is None else _frame_fields(report.broken)
    return fields


def _versions(report: Inspection) -> dict[str, Any]:
    """What a patch says of itself; nothing of another stream."""
    if not report.info.base:
        return {}
    fields = {"base": report.info.base.hex(), "target": report.info.target.hex()}
    return fields | {"changed": report.changed, "slices": dict(report.ways)}


def _item_fields(report: ItemReport) -> dict[str, Any]:
    item = report.item
    fields: dict[str, Any] = {
        "name": item.name,
        "path": list(item.path),
        "kind": item.kind.name.lower(),
        "dtype": report.dtype,
        "shape": None if report.shape is None else list(report.shape),
        "codec": report.codec,
        "bytes": report.size,
        "wire_bytes": report.wire_size,
        "ratio": report.ratio,
        "complete": report.complete,
    }
    if report.ways:
        fields |= {"changed": report.changed, "slices": dict(report.ways)}
    return fields if report.alias_of is None else fields | {"alias_of": report.alias_of}


def _text(report: Inspection, *, items: bool) -> str:
    """The report for people, with or without its items."""
    lines = [f"metadata {show(key)}: {show(text)}" for key, text in report.info.metadata]
    if report.info.id:
        lines.append(f"stream id {report.info.id.hex()}")
    rows = [
        _item_fields(item) | {"name": show(item.item.name)}
        for item in report.items
        if not isinstance(item.item, ContainerItem)
    ]
    if items and rows:
        columns = [
            column for column in _COLUMNS if column.key != "kind" or any(row["kind"] != "tensor" for row in rows)
        ]
        lines.append(render(rows, columns, width=line_width(sys.stdout)))
    if report.info.base:
        lines += [f"a patch for version {report.info.base.hex()}", f"that makes version {report.info.target.hex()}"]
        ways = ", ".join(f"{count} {way}" for way, count in sorted(report.ways.items()))
        numbers = sum(prod(item.shape) for item in report.items if item.shape is not None)
        lines.append(f"{report.changed:,} of {counted(numbers, 'number')} changed; slices: {ways or 'none'}")
        if items and rows:
            lines.append("a patch holds no names: /0 is the first item of its base in the order of names, /1 the next")
    counts = f"{counted(len(report.items), 'item')} in {counted(report.frames, 'frame')}"
    lines.append(
        f"{counts}: {counted(report.size, 'byte')} as {report.wire_size:,}, "
        f"ratio {report.size / report.wire_size:.2f}, framing {100 * report.framing / report.wire_size:.3f} %"
        + ("" if report.error is None else "; then the stream breaks")
    )
    return "\n".join(lines)


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
    if frame.type_name == "BUNDLE":
        fields |= {"item": header.item, "count": header.count}
    if frame.type_name == "DATA":
        fields |= {"item": header.item, "start": header.start, "count": header.count, "pad": header.pad}
    return fields | {"payload_crc": f"{header.payload_crc:08x}", "crc": f"{header.crc:08x}"}


def _frame_line(frame: Frame) -> str:
    header = frame.header
    place = f"{header.sequence:>6}  {frame.offset:>12}  {frame.type_name:<6}  {header.length:>10}"
    lines = _explain(frame).splitlines()
    return "\n".join([f"{place}  {''.join(lines[:1])}".rstrip(), *(f"{'':{len(place)}}  {line}" for line in lines[1:])])


def _explain(frame: Frame) -> str:
    """What a frame says: a line, of an ITEM frame one for each item."""
    header, event = frame.header, frame.event
    if frame.type_name == "DATA":
        return f"#{header.item} elements [{header.start}, {header.start + header.count})"
    if frame.type_name == "BUNDLE":
        return f"#{header.item} and {counted(header.count - 1, 'more item')}"
    if isinstance(event, ItemsStart):
        return "\n".join(f"#{number} {_describe(item)}" for number, item in enumerate(event.items, event.number))
    if isinstance(event, StreamStart):
        extra = [f"id {event.info.id.hex()}"] if event.info.id else []
        extra += [f"{len(event.info.metadata)} metadata"] if event.info.metadata else []
        return ", ".join([f"align {event.info.align}", *extra])
    if isinstance(event, StreamEnd):
        return f"{counted(event.summary.items, 'item')}, stream digest {event.summary.digest.hex()[:16]}..."
    return f"#{header.item}" if frame.type_name == "ITEM" else ""


def _describe(item: Item) -> str:
    name = show(item.name) if item.path else "root"
    if isinstance(item, TensorItem):
        return f"{name} {item.dtype} {list(item.shape)} {describe_codec(item.codec)}"
    if isinstance(item, AliasItem):
        return f"{name} is #{item.of}"
    if isinstance(item, FileItem):
        size = "unknown length" if item.size is None else counted(item.size, "byte")
        return f"{name} file of {size}, {describe_codec(item.codec)}"
    size = f" of {counted(item.size, 'byte')}" if isinstance(item, ValueItem) else ""
    return f"{name} {item.kind.name.lower()}{size}"
