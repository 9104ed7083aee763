"""Draws docs/images/price.png from benchmarks/price.json, and prints the tables of docs/tasks/price.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from deradiff.files.writing import whole

HERE = Path(__file__).parent
STYLES: Mapping[str, tuple[str, str]] = {  # Okabe and Ito's colours
    "tolerance 0.05": ("#0072B2", "o"),
    "tolerance 0.15": ("#56B4E9", "o"),
    "tolerance 0.05, weights carry": ("#D55E00", "s"),
    "tolerance 0.15, weights carry": ("#E69F00", "s"),
    "every 4th": ("#009E73", "^"),
    "every 4th, held": ("#777777", "v"),
}
SIZES = {0.25: 30, 0.5: 70, 0.75: 130}


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The median image's error against evaluations a step; a panel for each kind of anchor and number of steps."""
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, anchor in enumerate(("full weights", "LoRA")):
        for line, steps in enumerate((50, 25)):
            ax = axes[line][column]
            for mode, (colour, marker) in STYLES.items():
                if anchor == "LoRA" and "weights carry" in mode:
                    continue  # what a tolerance takes there by itself
                chosen = [
                    row
                    for row in rows
                    if (row["anchor"], row["steps"], row["mode"], row["guidance_scale"]) == (anchor, steps, mode, 1)
                ]
                ax.scatter(
                    [row["evaluations"] for row in chosen],
                    [100 * row["median"] for row in chosen],
                    s=[SIZES[row["lam"]] for row in chosen],
                    c=colour,
                    marker=marker,
                    label=mode,
                    alpha=0.75,
                    linewidths=0,
                )
            for bound in (5, 15):
                ax.axhline(bound, color="#bbbbbb", linewidth=0.8, zorder=0)
            ax.set_yscale("log")
            ax.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20], labels=["0.2%", "0.5%", "1%", "2%", "5%", "10%", "20%"])
            ax.minorticks_off()
            ax.set_title(f"{anchor}, {steps} steps", fontsize=11, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("network evaluations a step (plain sampling: 1, exact: 2)")
    for ax in axes[:, 0]:
        ax.set_ylabel("error of the median image,\nrelative to λ's effect")
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    figure.suptitle("Price and error on the digits; size of a mark: λ = ¼, ½, ¾; DDIM and Euler ancestral", fontsize=11)
    return figure


def table(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Worst and best of the two samplers, by anchor, mode and λ, as Markdown."""
    lines = ["| anchor | mode | λ | evaluations a step | median image | all latents | became other images | reward |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for anchor in ("full weights", "LoRA"):
        for mode in STYLES:
            if anchor == "LoRA" and "weights carry" in mode:
                continue
            for lam in SIZES:
                two = [
                    row
                    for row in rows
                    if (row["anchor"], row["mode"], row["lam"], row["steps"], row["guidance_scale"])
                    == (anchor, mode, lam, steps, 1)
                ]
                cells = [_both([f"{row['evaluations']:.2f}" for row in two])]
                cells += [_both([f"{row[name]:.1%}" for row in two]) for name in ("median", "whole", "changed")]
                cells.append(
                    _both([f"{row['reward']['error']:+.1%} ± {row['reward']['standard_error']:.1%}" for row in two])
                )
                lines.append(f"| {anchor} | {mode} | {lam:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds relative to plain sampling, as Markdown."""
    lines = ["| anchor | mode | 50 steps | 25 steps |", "|---|---|---|---|"]
    for anchor, mode in dict.fromkeys((row["anchor"], row["mode"]) for row in rows if row["mode"] != "plain"):
        cells = []
        for steps in (50, 25):
            (row,) = [r for r in rows if (r["anchor"], r["mode"], r["steps"]) == (anchor, mode, steps)]
            cells.append(f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
        lines.append(f"| {anchor} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(cells: Sequence[str]) -> str:
    """DDIM's and Euler ancestral's."""
    return ", ".join(dict.fromkeys(cells))


def main() -> None:
    """Draw the figure and print the tables."""
    told = json.loads((HERE.parent / "benchmarks" / "price.json").read_text())
    with whole(HERE / "images" / "price.png") as file:
        draw(told["errors"]).savefig(file, dpi=140, format="png")
    for steps in (50, 25):
        print(f"\n{steps} steps\n")
        print(table(told["errors"], steps))
    print()
    print(times(told["times"]))


if __name__ == "__main__":
    main()
