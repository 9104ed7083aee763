"""Draws docs/images/undo-hacking.png from benchmarks/undo_hacking.json (`python benchmarks/undo_hacking.py`)."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREEN = "#222222", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's


def front(axes: Axes, name: str, part: dict[str, Any]) -> None:
    """How often the reference is beaten against the drift, as the search saw it, and the knee."""
    answer = part["constant"]
    lams, beats, errors, drifts, _ = zip(*answer["evaluations"], strict=True)
    axes.errorbar(drifts, beats, errors, fmt="o", color=INK, markersize=4, capsize=2, linewidth=1)
    labelled = -1.0
    for lam, x, y in sorted(zip(lams, drifts, beats, strict=True)):
        if x - labelled > max(drifts) / 25:  # those in between have no room
            axes.annotate(f"{lam:g}", (x, y), xytext=(5, -10), textcoords="offset points", fontsize="x-small")
            labelled = x
    if answer["point"] is not None:
        value, low, high = answer["drift"]
        axes.axvspan(low, high, color=ORANGE, alpha=0.15, linewidth=0)
        axes.axvline(value, color=ORANGE, linewidth=1.5)
    axes.set(xlabel="drift, √(path KL)", ylabel="reference's images beaten")
    axes.set_title(f"{name}: what the search sees, λ beside each point", fontsize="medium")
    axes.grid(alpha=0.25)


def judged(axes: Axes, part: dict[str, Any]) -> None:
    """What becomes of reward and legibility, on other prompts."""
    value, _ = part["legibility of the reference"]
    found = part["constant"]
    answer = {found["point"][0]: [*found["gain"], *found["legibility"]]} if "gain" in found else {}
    rows = sorted(({0.0: [0.0] * 4} | answer | {float(lam): row for lam, row in part["grid"].items()}).items())
    lams = [lam for lam, _ in rows]
    lost, errors = [100 * (value + row[2]) for _, row in rows], [100 * row[3] for _, row in rows]
    axes.errorbar(lams, lost, errors, fmt="o-", color=BLUE, markersize=4, capsize=2, label="legible, %")
    axes.axhline(100 * (value - 0.01), color=BLUE, linestyle=":", linewidth=1, label="1% below the reference")
    other = axes.twinx()
    gains = [row[0] for _, row in rows]
    other.plot(lams, gains, "s-", color=GREEN, markersize=4, label="reward, gain in points")
    other.set_ylabel("reward, gain in points", color=GREEN)
    if found["point"] is not None:
        axes.axvline(found["point"][0], color=ORANGE, linewidth=1.5, label="the answer")
    axes.set(xlabel="λ", ylabel="legible, %")
    axes.legend(fontsize="small", loc="center left")
    axes.set_title("what it does not see", fontsize="medium")
    axes.grid(alpha=0.25)


def main() -> None:
    """Draw a row for each anchor."""
    told = json.loads((HERE.parent / "benchmarks" / "undo_hacking.json").read_text())
    anchors = {name: part for name, part in told.items() if "grid" in part}
    figure = Figure(figsize=(10.6, 3.9 * len(anchors)), layout="constrained")
    for row, (name, part) in zip(figure.subplots(len(anchors), 2, squeeze=False), anchors.items(), strict=True):
        front(row[0], name, part)
        judged(row[1], part)
    figure.savefig(HERE / "images" / "undo-hacking.png", dpi=130)


if __name__ == "__main__":
    main()
