"""Figures of preferences: bars of the shares of two methods with Equal between them (AIG, figures 6 to 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deradiff.experiments.reporting.agreement_figures import dressed
from deradiff.study.preferences import Rate

# Okabe and Ito's blue and orange, which colour-blind people tell apart, and hatching for print without colour.
FIRST, EQUAL, SECOND = "#0072B2", "#E4E4E8", "#E69F00"
INK = ("#FFFFFF", "#222222", "#222222")
"""Of the numbers in the bars."""
NARROW = 0.06
"""Of the width: a bar that is narrower has no number in it."""
WIDEST = 44
"""Letters of a method's name in a line of the legend."""


class Bar(NamedTuple):
    """The three shares of one question, at one configuration or over all."""

    label: str
    votes: int
    rates: tuple[Rate, Rate, Rate]


class SharesPanel(NamedTuple):
    """Two methods, and their bars in groups that keep apart."""

    first: str
    second: str
    groups: Mapping[str, Sequence[Bar]]


@dressed
def shares(panels: Sequence[SharesPanel], across: str) -> Figure:
    """A panel for every two methods, a bar for every question and group; `across` says what shares are of."""
    rows = [sum(len(bars) + (0.9 if name else 0) for name, bars in panel.groups.items()) for panel in panels]
    figure = Figure(figsize=(9.5, 0.42 * sum(rows) + 1.25 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[max(count, 1) for count in rows])[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _panel(ax, panel)
    axes[-1].set_xlabel(across)
    return figure


@dressed
def histogram(votes: Sequence[int]) -> Figure:
    """How many participants answered how many pairs (AIG, figure 8b)."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    ax = figure.subplots()
    numbers, people = np.unique(votes, return_counts=True)
    ax.bar(numbers, people, color=FIRST, width=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlim(0, max(votes) + 1)
    ax.set_xlabel("pairs that were answered")
    ax.set_ylabel("participants")
    return figure


def _panel(ax: Axes, panel: SharesPanel) -> None:
    at, ticks, labels = 0.0, [], []
    for name, bars in panel.groups.items():
        if name:
            ax.text(0, at, name, weight="bold", fontsize=9.5, va="center")
            at += 0.9
        for bar in bars:
            _bar(ax, at, bar.rates)
            ticks.append(at)
            labels.append(f"{bar.label} (n = {bar.votes:,})")
            at += 1
    for colour, hatch, label in ((FIRST, "", panel.first), (EQUAL, "", "equal"), (SECOND, "///", panel.second)):
        ax.barh([0], [0], color=colour, hatch=hatch, edgecolor="#444444", linewidth=0.5, label=fill(label, WIDEST))
    ax.set_yticks(ticks, labels)
    ax.set_ylim(at - 0.35, -0.6)
    ax.set_xlim(0, 1)
    ax.axvline(0.5, color="#444444", linewidth=0.8, linestyle=":", zorder=3)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9.5, handlelength=1.6)


def _bar(ax: Axes, at: float, rates: tuple[Rate, Rate, Rate]) -> None:
    """Three shares end to end, and below them the intervals of where the first and the second one end."""
    first, equal, second = rates
    starts = (0.0, first.value, first.value + equal.value)
    for rate, start, colour, hatch, ink in zip(
        rates, starts, (FIRST, EQUAL, SECOND), ("", "", "///"), INK, strict=True
    ):
        ax.barh(at, rate.value, left=start, height=0.66, color=colour, hatch=hatch, edgecolor="#8A5F00", linewidth=0)
        if rate.value >= NARROW:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
            middle = start + rate.value / 2
            ax.text(
                middle, at, f"{rate.value:.0%}", ha="center", va="center", color=ink, fontsize=9, bbox=box, zorder=4
            )
    # The second a little lower: both may reach over the same stretch.
    for end, low, high, below, colour in (
        (first.value, first.low, first.high, 0.40, "#00507D"),
        (1 - second.value, 1 - second.high, 1 - second.low, 0.47, "#7A5200"),
    ):
        if np.isfinite(low):
            error = [[max(0.0, end - low)], [max(0.0, high - end)]]
            ax.errorbar(end, at + below, xerr=error, fmt="none", ecolor=colour, elinewidth=1.3, capsize=2.5, zorder=5)
