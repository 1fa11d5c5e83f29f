"""Pictures of the rows that suites and runs of the learning loop write. Takes matplotlib; colours of Okabe and Ito."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from tensorwire.bench.tables import Row
from tensorwire.errors import counted
from tensorwire.fl.plan import Plan

_BLUE: Final = "#0072B2"
_ORANGE: Final = "#E69F00"
_GREEN: Final = "#009E73"
_RED: Final = "#D55E00"
_PINK: Final = "#CC79A7"
_GREY: Final = "#666666"
_OURS: Final = ("native", "numpy")
_IMPLS: Final = {
    "tensorwire": _BLUE,
    "torch": _ORANGE,
    "bitsandbytes": _RED,
    "zstd": _GREEN,
    "zlib.crc32": _PINK,
}
_WIDTH: Final = 8.0
_BAR: Final = 0.34  # inches a bar
_BUDGET_MIB: Final = 16


def draw(rows: list[Row], folder: str) -> list[Path]:
    """Draw every suite that has rows into `folder`/SUITE.png; the paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for suite, picture in _PICTURES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            paths.append(target / f"{suite}.png")
            _save(picture(chosen), paths[-1])
    return paths


def draw_run(rows: list[Row], plan: Plan, path: Path) -> None:
    """Loss over rounds and over bytes, and the server's memory, of a run of the learning loop as one picture."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    names = {"weights": "weights", "difference": "differences", "patch": "patches"}
    up, down = f"{names[plan.kind]} up as {plan.up}", f"{names[plan.down_kind]} down as {plan.down}"
    figure.suptitle(f"{counted(plan.clients, 'client')}, {up}, {down}")
    by_round, by_bytes, memory = figure.subplots(1, 3)
    rounds, losses = [row["round"] for row in rows], [row["loss"] for row in rows]
    unit, name = (1e6, "MB") if rows[-1]["fp32_bytes"] >= 1e6 else (1e3, "kB")
    peaks = [row["server_mib"] for row in rows[1:]]
    by_round.plot(rounds, losses, marker="o", markersize=3)
    moved, plain = ([row[key] / unit for row in rows] for key in ("bytes", "fp32_bytes"))
    by_bytes.plot(moved, losses, marker="o", markersize=3, label=f"{plan.up} up, {plan.down} down")
    by_bytes.plot(plain, losses, linestyle="--", color=_GREY, label="the same rounds as fp32")
    by_bytes.legend(frameon=False)
    memory.plot(rounds[1:], peaks, marker="o", markersize=3)
    memory.set_ylim(0, 1.15 * max(peaks))
    for axes, x, y in (
        (by_round, "round", "loss on held-out data"),
        (by_bytes, f"{name} over the sockets", "loss on held-out data"),
        (memory, "round", "peak memory of the server, MiB"),
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
        if x == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def _size(rows: list[Row]) -> Figure:
    figure, axes = _horizontal(len(rows))
    places = range(len(rows))
    payload = [row["payload_mib"] for row in rows]
    metadata = [row["meta_mib"] for row in rows]
    axes.barh(places, payload, color=_BLUE, label="payload")
    axes.barh(places, metadata, left=payload, color=_ORANGE, label="metadata, as published")
    for place, row in zip(places, rows, strict=True):
        total = row["payload_mib"] + row["meta_mib"]
        _label(axes, total, place, f"{total:,.1f}  ({row['percent_of_fp32']:.1f} %)")
    axes.set_yticks(places, [row["codec"] for row in rows])
    axes.set_xlim(0, max(p + m for p, m in zip(payload, metadata, strict=True)) * 1.25)
    axes.set_xlabel("MiB (share of fp32)")
    axes.set_title(f"Bytes of {rows[0]['model']}", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _speed(rows: list[Row]) -> Figure:
    size = max(row["size_mib"] for row in rows)
    rows = [row for row in rows if row["size_mib"] == size]
    memcpy = next(row["gbps"] for row in rows if row["impl"] == "memcpy" and row["output"] == "warm")
    panels = {op: _best_outputs(rows, op) for op in ("encode", "decode")}
    panels = {op: bars for op, bars in panels.items() if bars}
    tallest = max((len(bars) for bars in panels.values()), default=1)
    figure = Figure(figsize=(1.4 * _WIDTH, 1.6 + _BAR * tallest), layout="constrained")
    all_axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    top = max([memcpy, *(gbps for bars in panels.values() for *_, gbps in bars)])
    for axes, (op, bars) in zip(all_axes, panels.items(), strict=False):
        _speed_panel(axes, op, bars, memcpy, top)
    shown = {impl for bars in panels.values() for _, impl, _, _ in bars}
    handles = [_patch(impl) for impl in _IMPLS if impl in shown]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(handles) or 1)
    threads = rows[0]["threads"]
    figure.suptitle(f"GB/s of fp32, {size} MiB, {counted(threads, 'thread')}, outputs warm (* fresh)")
    return figure


def _best_outputs(rows: list[Row], op: str) -> list[tuple[str, str, str, float]]:
    """(codec, who, output, GB/s), warm where there is such a row."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["op"] == op:
            key = (row["codec"], "tensorwire" if row["impl"] in _OURS else row["impl"])
            if key not in best or row["output"] == "warm":
                best[key] = row
    return [(codec, impl, row["output"], row["gbps"]) for (codec, impl), row in best.items()]


def _speed_panel(axes: Axes, op: str, bars: list[tuple[str, str, str, float]], memcpy: float, top: float) -> None:
    labels, place, previous = [], 0.0, None
    for codec, impl, output, gbps in bars:
        place += 1.0 if codec == previous else 1.5
        axes.barh(place, gbps, color=_IMPLS.get(impl, _GREY))
        _label(axes, gbps, place, f"{gbps:.2g}{'*' if output == 'fresh' else ''}" if gbps < 10 else f"{gbps:.0f}")
        if codec != previous:
            labels.append((place, codec))
        previous = codec
    axes.axvline(memcpy, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate("memcpy", (memcpy, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=_GREY)
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axes.set_xlim(0, top * 1.12)
    axes.set_title(op, loc="left")
    _plain(axes)


def _memory(rows: list[Row]) -> Figure:
    figure, axes = _horizontal(2 * len(rows))
    for number, row in enumerate(rows):
        for shift, key, color in ((-0.2, "sender_extra_mib", _BLUE), (0.2, "receiver_extra_mib", _ORANGE)):
            value = max(row[key], 0)
            axes.barh(number + shift, value, height=0.38, color=color)
            _label(axes, value, number + shift, f"{row[key]:.1f}" if row[key] < 100 else f"{row[key]:,.0f}")
    # From 0 and linear: the lengths of bars are compared.
    largest = max(max(row["sender_extra_mib"], row["receiver_extra_mib"]) for row in rows)
    axes.set_xlim(0, max(largest, _BUDGET_MIB) * 1.12)
    axes.axvline(_BUDGET_MIB, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate("16 MiB", (_BUDGET_MIB, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=_GREY)
    axes.set_yticks(range(len(rows)), [f"{row['mode']}  {row['codec']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("MiB beyond the model, at peak")
    axes.set_title(f"Sending {rows[0]['model']} ({rows[0]['model_mib']:,.0f} MiB)", loc="left", pad=18)
    handles = [_patch("sender", _BLUE), _patch("receiver", _ORANGE)]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _error(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["sqnr_db"] is not None]
    figure = Figure(figsize=(_WIDTH, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([row["bits"] for row in rows], [row["sqnr_db"] for row in rows], color=_BLUE, zorder=3)
    for row in rows:
        crowded = any(other is not row and _near(row, other) and other["bits"] > row["bits"] for other in rows)
        axes.annotate(
            row["codec"],
            (row["bits"], row["sqnr_db"]),
            xytext=(0, 8) if crowded else (8, 0),
            textcoords="offset points",
            ha="center" if crowded else "left",
            va="bottom" if crowded else "center",
        )
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_xlim(0, max((row["bits"] for row in rows), default=16) * 1.2)
    axes.set_ylim(0, max((row["sqnr_db"] for row in rows), default=80) * 1.12)
    axes.xaxis.set_major_locator(MultipleLocator(4))
    axes.set_xlabel("bits per element, metadata counted")
    axes.set_ylabel("SQNR, dB (higher is better)")
    axes.set_title(f"What is lost of {rows[0]['model'] if rows else 'nothing'}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lossless(rows: list[Row]) -> Figure:
    figure, axes = _horizontal(len(rows))
    for place, row in enumerate(rows):
        axes.barh(place, row["ratio"], color=_BLUE if row["impl"] in _OURS else _GREY)
        _label(axes, row["ratio"], place, f"{row['ratio']:.3f}")
    axes.set_yticks(range(len(rows)), [f"{row['data']}: {row['impl']}, {row['codec']}" for row in rows])
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("share of the bytes (less is better)")
    axes.set_title(f"Lossless compression of {rows[0]['model']}", loc="left")
    return figure


def _patches(rows: list[Row]) -> Figure:
    shown = [row for row in rows if row["bits_per_changed"]]
    figure, axes = _horizontal(len(shown))
    for place, row in enumerate(shown):
        axes.barh(place, row["bits_per_changed"], color=_BLUE if row["impl"] in _OURS else _GREY)
        _label(axes, row["bits_per_changed"], place, f"{row['bits_per_changed']:.1f}")
    axes.set_yticks(range(len(shown)), [f"{row['data']}: {row['codec']}" for row in shown])
    axes.set_xlabel("bits a changed weight (less is better)")
    axes.set_title(f"Patches of {rows[0]['model']}", loc="left")
    return figure


def _updates(rows: list[Row]) -> Figure:
    figure, axes = _horizontal(len(rows))
    for place, row in enumerate(rows):
        axes.barh(place, row["mb_per_step"], color=_GREY if row["compress_gbps"] is None else _BLUE)
        _label(axes, row["mb_per_step"], place, f"{row['mb_per_step']:,.3g} MB ({row['times_bf16']:,.0f} times)")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlim(right=20 * max(row["mb_per_step"] for row in rows))
    axes.set_xlabel("MB a step and worker (times fewer than bf16)")
    axes.set_title(f"A step of {rows[0]['model']}", loc="left")
    return figure


def _near(row: Row, other: Row) -> bool:
    return bool(abs(row["bits"] - other["bits"]) < 1 and abs(row["sqnr_db"] - other["sqnr_db"]) < 2)


_PICTURES: Final[dict[str, Callable[[list[Row]], Figure]]] = {
    "size": _size,
    "speed": _speed,
    "memory": _memory,
    "error": _error,
    "lossless": _lossless,
    "patch": _patches,
    "updates": _updates,
}


def _horizontal(bars: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 1.6 + _BAR * bars), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _patch(label: str, color: str | None = None) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color or _IMPLS[label], label=label)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
