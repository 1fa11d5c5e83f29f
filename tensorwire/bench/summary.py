"""What a run of `tensorwire bench` comes to, in lines that one would repeat to somebody."""

from collections.abc import Callable, Sequence
from typing import Final

from tensorwire.bench.tables import Row

_OURS: Final = ("native", "numpy")
_TOLD: Final = ("nf4", "int8", "bf16")  # codecs to tell of, where they were measured: the smallest first


def lines(rows: Sequence[Row]) -> list[str]:
    """One sentence a suite that has rows."""
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row["suite"], []).append(row)
    return [_LINES[suite](found) for suite, found in by_suite.items()]


def _size(rows: Sequence[Row]) -> str:
    told = _told(rows, lambda row: f"{row['wire_mib']:,.0f} as {row['codec']} ({row['percent_of_fp32']:.0f} %)")
    return f"{rows[0]['model']} is {100 * _fp32(rows[0]):,.0f} MiB in fp32, {told}."


def _fp32(row: Row) -> float:
    return float((row["payload_mib"] + row["meta_mib"]) / row["percent_of_fp32"])


def _speed(rows: Sequence[Row]) -> str:
    speeds = {
        (row["codec"], row["op"], row["impl"] in _OURS): row["gbps"]
        for row in sorted(rows, key=_is_warm)
        if _counts(row)
    }
    copy = next(row["gbps"] for row in rows if row["impl"] == "memcpy")
    codecs = [codec for codec, op, ours in speeds if ours and op == "encode"]
    if not codecs:
        return f"memcpy runs at {copy:.1f} GB/s; the codecs measured send memory as it is."
    codec = next((name for name in _TOLD if name in codecs), codecs[0])
    rivals = {row["impl"] for row in rows if row["codec"] == codec and row["impl"] not in _OURS}
    pairs = [[speeds.get((codec, op, ours)) for op in ("encode", "decode")] for ours in (True, False)]
    ours, theirs = (" and ".join("-" if gbps is None else f"{gbps:.1f}" for gbps in pair) for pair in pairs)
    against = f" ({min(rivals)}: {theirs})" if rivals else ""
    return f"{codec} encodes and decodes fp32 at {ours} GB/s{against}; memcpy runs at {copy:.1f}."


def _counts(row: Row) -> bool:
    """Ours into warm memory; of others, whose memory is often their own, what they have."""
    return bool(row["output"] == "warm" or (row["impl"] not in _OURS and row["op"] in ("encode", "decode")))


def _is_warm(row: Row) -> bool:
    return bool(row["output"] == "warm")


def _memory(rows: Sequence[Row]) -> str:
    streamed = [row for row in rows if row["mode"] != "regular"] or list(rows)
    rival = next((row for row in rows if row["codec"] == "torch.save"), None)
    other = "" if rival is None else f"; torch.save takes {_extra(rival):,.0f} MiB"
    model = f"{rows[0]['model']} ({rows[0]['model_mib']:,.0f} MiB)"
    return f"Sending {model} takes at most {max(map(_extra, streamed)):,.0f} MiB of memory beyond the model{other}."


def _extra(row: Row) -> float:
    return float(max(row["sender_extra_mib"], row["receiver_extra_mib"], 0))


def _error(rows: Sequence[Row]) -> str:
    told = _told(rows, lambda row: f"{100 * row['rel_l2']:.2g} % as {row['codec']}")
    return f"{rows[0]['model']} loses {told} (relative L2)."


def _lossless(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row["impl"] in _OURS]
    codec = ours[0]["codec"]
    told = ", ".join(f"{100 * row['ratio']:.1f} % ({row['data']})" for row in ours if row["codec"] == codec)
    return f"{rows[0]['model']} takes {told} as {codec}."


def _patch(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row["impl"] in _OURS and row["bits_per_changed"]]
    told = ", ".join(f"{row['bits_per_changed']:.1f} at {100 * row['changed']:.2g} %" for row in ours)
    return f"A patch of {rows[0]['model']} takes bits a changed weight: {told}."


def _updates(rows: Sequence[Row]) -> str:
    told = ", ".join(
        f"{row['mb_per_step']:,.3f} MB as {row['method']} ({row['times_bf16']:,.0f} times less than bf16)"
        for row in rows
        if row["compress_gbps"] is not None
    )
    return f"A step of {rows[0]['model']} takes {told}."


def _told(rows: Sequence[Row], text: Callable[[Row], str]) -> str:
    """The rows of the codecs to tell of; where none of these was measured, of the first few."""
    chosen = [row for codec in _TOLD for row in rows if row["codec"] == codec]
    return ", ".join(map(text, chosen or rows[: len(_TOLD)]))


_LINES: Final[dict[str, Callable[[Sequence[Row]], str]]] = {
    "size": _size,
    "speed": _speed,
    "memory": _memory,
    "error": _error,
    "lossless": _lossless,
    "patch": _patch,
    "updates": _updates,
}
