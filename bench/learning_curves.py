"""What the benches of learning through an engine show alike: two sides, of which each seed has a curve."""

from statistics import mean
from typing import Any

SIDES = ("plain", "ours")


def table(curves: list[dict[str, Any]], size: str, share: int = 1) -> str:
    """Markdown: where each seed ends, and how far the sides are apart beside how far the seeds of one are.

    `size`: the head of the column of a curve's bytes, of which it has one in `share`.
    """
    ends = {side: [each["losses"][-1] for each in curves if each["side"] == side] for side in SIDES}
    sizes = {side: mean(each["bytes"] for each in curves if each["side"] == side) for side in SIDES}
    lines = [
        f"Loss before the first round {curves[0]['losses'][0]:.4f}; after {len(curves[0]['losses']) - 1} rounds:",
        "",
        f"| side | loss, by seed | mean | lowest to highest | {size} |",
        "|---|---|---|---|---|",
    ]
    for side, losses in ends.items():
        seeds, megabytes = ", ".join(f"{loss:.4f}" for loss in losses), sizes[side] / share / 1e6
        span = f"{min(losses):.4f} to {max(losses):.4f}"
        lines.append(f"| {side} | {seeds} | {mean(losses):.4f} | {span} | {megabytes:.2f} |")
    apart = [ours - plain for plain, ours in zip(ends["plain"], ends["ours"], strict=True)]
    spread = max(ends["plain"]) - min(ends["plain"])
    differences = (
        f"Ours minus plain, by seed: {', '.join(f'{each:+.4f}' for each in apart)}; the mean {mean(apart):+.4f}."
    )
    lines += ["", f"{differences} The seeds of plain are {spread:.4f} apart."]
    return "\n".join(lines)
