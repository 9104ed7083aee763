"""Figures of how features spread: spectra of covariances, and what distances between spectra are about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import LogLocator, NullFormatter

from deradiff.experiments.reporting.agreement_figures import dressed
from deradiff.experiments.reporting.front_figures import BASE, LINES, WIDTH, graded, plain
from deradiff.files.figure_styles import Style
from deradiff.measures.spectral import Cloud


class SpectrumCurve(NamedTuple):
    """A labelled sequence over ranks."""

    label: str
    values: list[float]


@dressed
def spectra_figure(base: Sequence[float], panels: Mapping[str, Sequence[SpectrumCurve]]) -> Figure:
    """The reference's spectrum, and for each series a panel of ratios to it."""
    # The first panel is as wide as it takes for the others to fill their rows of three.
    width = 1 + -(1 + len(panels)) % 3
    places = [0] * width + [1 + number for number in range(len(panels))]
    rows: list[Any] = [places[start : start + 3] for start in range(0, len(places), 3)]
    figure = Figure(figsize=(WIDTH, 3.1 * len(rows)), layout="constrained")
    axes: Mapping[Any, Axes] = figure.subplot_mosaic(rows)
    axes[0].plot(range(1, len(base) + 1), base, color=BASE.colour, linewidth=1.6)
    axes[0].set_title("reference")
    axes[0].set_ylabel("eigenvalue, squared feature units")
    for number, (title, curves) in enumerate(panels.items(), 1):
        ax = axes[number]
        ax.axhline(1, color=BASE.colour, linewidth=1.2)
        for place, curve in enumerate(curves):
            ax.plot(
                range(1, len(curve.values) + 1),
                curve.values,
                linewidth=1.4,
                linestyle=LINES[place % len(LINES)],
                color=graded(place, len(curves)),
                label=curve.label,
            )
        ax.set_title(title)
        ax.set_ylabel("eigenvalue / reference's")
        ax.legend(fontsize=7.5, ncols=1 + (len(curves) > 4), handlelength=2.6, labelspacing=0.25, loc="lower left")
        if number > 1:
            ax.sharey(axes[1])
    for number, ax in axes.items():
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rank")
        ax.xaxis.set_major_formatter(plain)
        ax.xaxis.set_minor_formatter(NullFormatter())
        if number:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(plain)
            ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


CLOUDS = (Style("", "#009E73", "o"), Style("", "#D55E00", "s"), Style("", "#0072B2", "^"))


@dressed
def illustration(clouds: Mapping[str, Cloud]) -> Figure:
    """Three clouds of points, the first being the base, and the others' distances to it."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, 4, width_ratios=(2.4, 1, 1, 1))
    ax = axes[0]
    for (label, cloud), style in zip(clouds.items(), CLOUDS, strict=True):
        ax.plot(*cloud.points.T.numpy(), style.marker, color=style.colour, markersize=2, alpha=0.3)
        ax.plot(
            *cloud.mean.tolist(), style.marker, color=style.colour, markersize=8, markeredgecolor="white", label=label
        )
        variances, axes_of = np.linalg.eigh(cloud.covariance.numpy())
        angle = math.degrees(math.atan2(axes_of[1, 1], axes_of[0, 1]))
        for reach in (1, 2):
            short, long = 2 * reach * np.sqrt(variances)
            ax.add_patch(
                Ellipse(tuple(cloud.mean.tolist()), long, short, angle=angle, fill=False, color=style.colour, lw=1.6)
            )
    ax.set_aspect("equal", "datalim")
    ax.set_xlabel("first feature")
    ax.set_ylabel("second feature")
    ax.legend(loc="upper left")
    others = list(clouds.items())[1:]
    numbers = (
        ("FID to D1", "squared feature units", [cloud.frechet.value for _, cloud in others]),
        ("SCD to D1", "feature units to the fourth", [cloud.spectral.scd for _, cloud in others]),
        ("LSCD to D1", "squared logarithms", [cloud.spectral.lscd for _, cloud in others]),
    )
    for ax, (title, units, values) in zip(axes[1:], numbers, strict=True):
        bars = ax.bar([label.partition(",")[0] for label, _ in others], values, color=[s.colour for s in CLOUDS[1:]])
        for bar, hatch in zip(bars, ("//", ".."), strict=True):
            bar.set(hatch=hatch, edgecolor="white", linewidth=0)
        ax.bar_label(bars, labels=[f"{abs(value):.3g}" if value > 1e-9 else "0" for value in values], padding=2)
        nearer = "D2" if values[0] < values[1] else "D3"
        ax.set_title(f"{title}\nprefers {nearer}")
        ax.set_ylim(0, 1.12 * max(values))
        ax.set_ylabel(units)
        ax.grid(False, axis="x")
    return figure
