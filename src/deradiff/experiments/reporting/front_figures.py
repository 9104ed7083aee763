"""Figures of trade-offs: the same colour and marker for the same method in all of them, after AIG's figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting.agreement_figures import dressed, legend_entries
from deradiff.experiments.reporting.arm_series import Change, Series
from deradiff.files.figure_styles import Style

WIDTH = 11.0
"""Inches."""

# Okabe and Ito's colours where they last; base, unregularised and ideal as in AIG's figure 4.
STYLES = {
    "model": Style("", "#0072B2", "o"),
    "realign": Style("", "#56B4E9", "D"),
    "particles": Style("", "#332288", "p"),
    "anneal": Style("", "#E69F00", "^"),
    "interpolate": Style("", "#CC79A7", "P"),
    "combine": Style("", "#000000", "h"),
    "soup": Style("", "#AA4499", "8"),
    "db-mpa-ls": Style("", "#777777", "H"),
    "optimize-noise": Style("", "#8C510A", "v"),
    "doodl": Style("", "#D8A35D", "v"),
    "das": Style("", "#882255", ">"),
    "tds": Style("", "#882255", "d"),
    "fk-steering": Style("", "#882255", "s"),
    "mpgd": Style("", "#999933", "*"),
    "best-of": Style("reference, best of n", "#666666", "<"),
}
BASE = Style("reference (base)", "#009E73", "s")
UNREGULARISED = Style("unregularised", "#D55E00", "X")
IDEAL = Style("ideal", "#F0C800", "*")

MODEL_MARKERS = ("o", "d", ">", "s", "<")
"""Families of models, which are all blue, one after the other."""
FILLS: tuple[Any, ...] = ("full", "left", "top")
"""Anchors of one method whose markers tell them apart; white halves, so that they do in print."""
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Anchors of one method, one after the other."""
GRADIENT = "viridis"


Fill = Literal["full", "left", "top", "none"]


class ArmPoint(NamedTuple):
    """An arm in a plane, with standard errors (NaN for none)."""

    arm: Arm
    x: float
    y: float
    dx: float
    dy: float


@dataclass(frozen=True)
class TradeOffPanel:
    """One trade-off: reward upwards, what it costs across."""

    series: tuple[tuple[Series, tuple[ArmPoint, ...]], ...]
    base: ArmPoint
    unregularised: tuple[ArmPoint, ...]
    ideal: tuple[float, float] | None
    front: frozenset[Arm]
    """The non-dominated arms."""
    across: str
    upwards: str
    squared: bool
    """Whether `across` is a squared distance, on a square-root axis."""
    title: str = ""


@dressed
def trade_offs(panels: Sequence[Sequence[TradeOffPanel]]) -> Figure:
    """A grid of panels; a row shares its reward."""
    columns = max(map(len, panels))
    width = min(WIDTH, max(6.6, 3.9 * columns + 0.8))
    figure = Figure(figsize=(width, 2.75 * len(panels) + 1.1), layout="constrained")
    axes: Any = figure.subplots(len(panels), columns, squeeze=False, sharey="row")
    for number, (row, some) in enumerate(zip(axes, panels, strict=True)):
        for column, (ax, panel) in enumerate(zip(row, some, strict=False)):
            _trade_off(ax, panel)
            if len(panels[number + 1 : number + 2]) and column < len(panels[number + 1]):
                ax.set_xlabel("")  # the panel below has the same
        for ax in row[len(some) :]:
            ax.set_visible(False)
        row[0].set_ylabel(some[0].upwards)
    legend(figure)
    return figure


def _trade_off(ax: Axes, panel: TradeOffPanel) -> None:
    for series, points in panel.series:
        style, fill = style_of(series.kind, series.look), fill_of(series.kind, series.look)
        if series.connected and len(points) > 1:
            ax.plot(
                [point.x for point in points],
                [point.y for point in points],
                color=style.colour,
                linewidth=1.1,
                linestyle=LINES[series.variant % len(LINES)],
                alpha=0.75,
                zorder=2,
            )
        for hollow in (False, True):
            some = [point for point in points if extrapolates(point.arm) == hollow]
            _marked(ax, some, style, None, fill="none" if hollow else fill)
        named(ax, style, series.label, fill)
    _marked(ax, [panel.base], BASE, BASE.label, size=7.5)
    if panel.unregularised:
        _marked(ax, panel.unregularised, UNREGULARISED, UNREGULARISED.label, size=8.5)
    if panel.ideal is not None:
        ax.plot(
            *panel.ideal,
            IDEAL.marker,
            color=IDEAL.colour,
            markersize=14,
            markeredgecolor="#222222",
            markeredgewidth=0.7,
            label=IDEAL.label,
            zorder=3.5,
        )
    every = {point.arm: point for point in (panel.base, *(point for _, points in panel.series for point in points))}
    ringed(ax, [(point.x, point.y) for arm, point in every.items() if arm in panel.front])
    ax.margins(0.09)
    if panel.squared:
        ax.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * np.abs(x)))
        ax.set_xticks(root_ticks(max(point.x for point in every.values())))
        ax.xaxis.set_major_formatter(plain)
    ax.set_xlabel(panel.across)
    ax.set_title(panel.title)


def extrapolates(arm: Arm) -> bool:
    """Whether an arm goes beyond its anchors."""
    return arm.method != "model" and sum(lam for _, lam in arm.anchors) > 1


def _marked(
    ax: Axes, points: Sequence[ArmPoint], style: Style, label: str | None, *, fill: Fill = "full", size: float = 5.5
) -> None:
    """Arms with a bar for each standard error that there is; `label` for the legend."""
    if not points:
        return
    x, y = [point.x for point in points], [point.y for point in points]
    bars = np.nan_to_num([[point.dx for point in points], [point.dy for point in points]])
    order = 3 if size < 7 else 4
    if bars.any():
        ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=style.colour, elinewidth=0.8, zorder=order)
    ax.plot(x, y, style.marker, markersize=size, zorder=order, label=label, **paint(style, fill))


def named(ax: Axes, style: Style, label: str, fill: Fill) -> None:
    """An entry for the legend, which is not hollow though the arms may be."""
    ax.plot([], [], style.marker, markersize=5.5, linestyle="none", label=label, **paint(style, fill))


def paint(style: Style, fill: Fill) -> dict[str, Any]:
    """How a marker is filled. White, not nothing, is what hollow and half-filled ones hide lines behind them with."""
    if fill == "none":
        return {"color": style.colour, "markerfacecolor": "white"}
    return {"color": style.colour, "fillstyle": fill, "markerfacecoloralt": "white"}


def ringed(ax: Axes, places: Sequence[tuple[float, float]]) -> None:
    """Rings around what is non-dominated."""
    ax.plot(
        [x for x, _ in places],
        [y for _, y in places],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="#222222",
        markeredgewidth=0.7,
        linestyle="none",
        label="non-dominated",
        zorder=5,
    )


def root_ticks(largest: float) -> list[float]:
    """Round numbers from 0 to `largest` that lie apart on a square-root axis."""
    if not largest > 0:
        return [0.0]
    exponents = range(math.floor(math.log10(largest)) - 3, math.floor(math.log10(largest)) + 1)
    round_numbers = sorted(m * 10.0**exponent for exponent in exponents for m in (1, 2, 5))
    ticks: list[float] = []
    for number in reversed([number for number in round_numbers if number <= largest]):
        if number**0.5 > 0.14 * largest**0.5 and (not ticks or ticks[-1] ** 0.5 - number**0.5 > 0.17 * largest**0.5):
            ticks.append(number)
    return [0.0, *reversed(ticks)]


def style_of(kind: str, look: int) -> Style:
    """Colour and marker of a series."""
    style = STYLES[kind]
    return style._replace(marker=MODEL_MARKERS[look % len(MODEL_MARKERS)]) if kind == "model" else style


def fill_of(kind: str, look: int) -> Fill:
    """How its markers are filled."""
    return "full" if kind == "model" else FILLS[look % len(FILLS)]


def legend(figure: Figure) -> None:
    """One legend above all panels, no wider than they; what has the same label is there once.

    The figure has room for three lines of it, and grows by what is more: panels keep their height.
    """
    entries = legend_entries(figure.axes)
    # A character of the legend's 10 points is 0.07 inches wide on average, the marker and the gap six of them.
    columns = max(1, int(figure.get_figwidth() / (0.07 * (6 + max(map(len, entries))))))
    figure.set_figheight(figure.get_figheight() + 0.24 * max(0, math.ceil(len(entries) / columns) - 3))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=min(columns, len(entries)),
        columnspacing=1.4,
        handletextpad=0.5,
    )


def plain(value: float, _: Any = None) -> str:
    """A tick's number without needless digits."""
    return f"{value:g}"


def graded(number: int, count: int) -> Any:
    """One of `count` colours in order, but for the palest, which paper swallows."""
    return colormaps[GRADIENT](0.85 * number / max(1, count - 1))


# -- attributes against λ ---------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """One score of one anchor's realignments minus the reference's, by λ."""

    anchor: str
    lams: list[float]
    changes: list[Change]


@dressed
def attributes(panels: Mapping[str, Mapping[str, Sequence[Strip]]]) -> Figure:
    """For each prompt set a row of panels, one for each score."""
    columns = max(map(len, panels.values()))
    figure = Figure(figsize=(min(WIDTH, 3.6 * columns + 0.6), 2.7 * len(panels) + 0.7), layout="constrained")
    axes: Any = figure.subplots(len(panels), columns, squeeze=False, sharex=True)
    drawn = [strip for row in panels.values() for strips in row.values() for strip in strips]
    anchors = list(dict.fromkeys(strip.anchor for strip in drawn))
    for row, (prompts, scores) in zip(axes, panels.items(), strict=True):
        for ax, (score, strips) in zip(row, scores.items(), strict=False):
            ax.axhline(0, color="#222222", linewidth=0.9)
            for strip in strips:
                number = anchors.index(strip.anchor)
                colour = graded(number, len(anchors))
                values, lows, highs, _ = zip(*strip.changes, strict=True)
                ax.errorbar(
                    strip.lams,
                    values,
                    yerr=[np.subtract(values, lows), np.subtract(highs, values)],
                    color=colour,
                    fmt=MODEL_MARKERS[number % len(MODEL_MARKERS)],
                    linestyle=LINES[number % len(LINES)],
                    markersize=4.5,
                    linewidth=1.2,
                    elinewidth=0.9,
                    label=f"anchor {strip.anchor}",
                )
            for lam, text in ((0, "reference"), (1, "anchor")):
                ax.axvline(lam, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
                ax.annotate(
                    text,
                    (lam, 1),
                    (2, -2),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    fontsize=7.5,
                    color="#666666",
                    va="top",
                )
            ax.set_title(f"{score} on “{prompts}”")
            ax.margins(y=0.14)
        row[0].set_ylabel("difference to the reference,\npoints of the score")
    for ax in axes[-1]:
        ax.set_xlabel("λ")
    legend(figure)
    return figure
