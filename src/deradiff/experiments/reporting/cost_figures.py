"""The figure of gains at equal cost, in the markers of the trade-offs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.experiments.reporting.agreement_figures import dressed
from deradiff.experiments.reporting.front_figures import (
    BASE,
    STYLES,
    WIDTH,
    fill_of,
    legend,
    named,
    paint,
    plain,
    ringed,
    style_of,
)


class GainAtCost(NamedTuple):
    """What an arm gains over the reference, with the ends of its interval, and what it costs relative to it."""

    kind: str
    label: str
    look: int
    hollow: bool
    gain: float
    low: float
    high: float
    evaluations: float
    seconds: float
    front: bool


@dressed
def equal_cost(bought: Sequence[GainAtCost], gain: str) -> Figure:
    """Gain against cost: by network evaluations, arms of one cost side by side, and by measured seconds."""
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True, width_ratios=(1.8, 1))
    groups = by_cost(bought)
    places = _side_by_side(axes[0], groups)
    for ax, is_left in ((axes[0], True), (axes[1], False)):
        for arm, place in places:
            x = place if is_left else arm.seconds
            style, fill = style_of(arm.kind, arm.look), fill_of(arm.kind, arm.look)
            if math.isfinite(x):
                ax.errorbar(
                    x,
                    arm.gain,
                    yerr=[[arm.gain - arm.low], [arm.high - arm.gain]],
                    fmt=style.marker,
                    markersize=5.5,
                    elinewidth=0.9,
                    **paint(style, "none" if arm.hollow else fill),
                )
                named(ax, style, arm.label, fill)
        ax.axhline(0, color=BASE.colour, linewidth=1.2, label=BASE.label)
    ringed(axes[0], [(place, arm.gain) for arm, place in places if arm.front])
    axes[1].plot(1, 0, BASE.marker, color=BASE.colour, markersize=7, zorder=4)
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter(plain)
    axes[0].set_xlabel("network evaluations per image, in multiples of the reference's")
    axes[1].set_xlabel("seconds per image, in multiples of the reference's")
    axes[0].set_ylabel(gain)
    legend(figure)
    return figure


def by_cost(bought: Sequence[GainAtCost]) -> list[tuple[float, list[GainAtCost]]]:
    """The arms of each cost, the cheapest first; in each, methods together, by gain."""
    kinds = list(STYLES)
    ordered = sorted(bought, key=lambda arm: (round(arm.evaluations, 2), kinds.index(arm.kind), arm.gain))
    return [(cost, list(arms)) for cost, arms in groupby(ordered, lambda arm: round(arm.evaluations, 2))]


def _side_by_side(ax: Axes, groups: Sequence[tuple[float, Sequence[GainAtCost]]]) -> list[tuple[GainAtCost, float]]:
    """A place for every arm, on bands that are labelled with their cost; and the best gain so far as a line."""
    places, ticks, best, start = [], [], -math.inf, 0.0
    for number, (_, members) in enumerate(groups):
        end = start + max(len(members), 2) + 0.6
        middle = (start + end - len(members) + 1) / 2
        places += [(arm, middle + row) for row, arm in enumerate(members)]
        ticks.append((start + end) / 2)
        best = max([best, *(arm.gain for arm in members)])
        ax.plot(
            [start, end],
            [best, best],
            color="#444444",
            linewidth=1,
            linestyle=(0, (4, 2)),
            label="best at this cost or less",
            zorder=1,
        )
        if number % 2:
            ax.axvspan(start, end, color="#F1F1F1", zorder=0)
        start = end
    ax.set_xlim(0, start)
    ax.set_xticks(ticks, [f"{cost:g}×" for cost, _ in groups])
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")
    return places
