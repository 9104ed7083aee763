"""Figures of anchors and targets: heat maps, reward against β, particles beside Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from deradiff.experiments.reporting.agreement_pairs import COSINES, ComparedPair, Study
from deradiff.files.figure_styles import ARMS, LOOK

RETRAINED, REFERENCE = "#222222", "#8A8A8A"
ABSENT = "#EFEFEF"

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

P = ParamSpec("P")
R = TypeVar("R")


def dressed(draw: Callable[P, R]) -> Callable[P, R]:
    """`draw` in the look that all figures share."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(LOOK):
            return draw(*args, **kwargs)

    return inside


def unit(score: str) -> str:
    """What an axis of mean scores is called."""
    return f"mean {score}, cosine" if is_cosine(score) else f"mean {score} score"


def is_cosine(score: str) -> bool:
    """Whether a score is a cosine of embeddings, on the scale of the papers' numbers."""
    return score.partition("=")[0] in COSINES


# -- heat maps --------------------------------------------------------------------------------------------------------


@dressed
def heat_maps(study: Study) -> Figure:
    """DeRaDiff's figures 12 and 13, and their like in A.9 to A.11: approximated means, and what they miss."""
    rows, columns = study.anchors, study.targets
    beside = len(columns) <= 7
    height = 0.62 * (len(rows) + 1) + 1.9
    figure = Figure(figsize=(11.5, height) if beside else (11.5, 2 * height), layout="constrained")
    axes: Any = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
    cells = [[study.at(anchor, target) for target in columns] for anchor in rows]
    retrained = [study.retrained[target].value for target in columns]

    means = np.vstack([_table(cells, lambda pair: pair.approximated), retrained])
    digits = _decimals(means, 4)
    _paint(axes[0], means, "viridis", Normalize(np.nanmin(means), np.nanmax(means)), unit(study.score))
    away = _table(cells, lambda pair: float("nan") if pair.alone else pair.difference.value)
    power = _power(away)
    away = away / 10.0**power
    limit = (float(np.nanmax(np.abs(away))) if np.isfinite(away).any() else 0.0) or 1.0
    finest = _decimals(away, 4)
    scale = f", in 10{str(power).translate(SUPERSCRIPTS)}" if power else ""
    _paint(axes[1], away, "PuOr", Normalize(-limit, limit), f"approximated − retrained mean{scale}")
    for (i, j), pair in np.ndenumerate(np.array(cells, dtype=object)):
        if pair is not None:
            difference = "anchor" if pair.alone else signed(float(away[i, j]), most=finest)
            for ax, text in zip(axes, (f"{pair.approximated:.{digits}f}", difference), strict=True):
                _write(ax, i, j, _counted(pair, text), pair.certain and not pair.alone)
    for j, value in enumerate(retrained):
        _write(axes[0], len(rows), j, f"{value:.{digits}f}", False)
    axes[0].axhline(len(rows) - 0.5, color="white", linewidth=5)
    axes[0].set_title("approximated mean; below the bar: retrained")
    axes[1].set_title(f"difference{scale}; below the orange line: λ > 1")

    for ax in axes:
        _mark(ax, cells)
        _staircase(ax, [[study.betas[anchor] <= study.betas[target] for target in columns] for anchor in rows])
        long = max(map(len, columns)) > (9 if len(columns) <= 5 else 7)
        turned: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
        ax.set_xticks(range(len(columns)), [study.label(name) for name in columns], fontsize=8, **turned)
        ax.set_xlabel("target: the model that is stood for")
    names = [study.label(name) for name in rows]
    axes[0].set_yticks(range(len(rows) + 1), [*names, "retrained"], fontsize=8)
    axes[1].set_yticks(range(len(rows)), names, fontsize=8)
    for ax in axes[:1] if beside else axes:
        ax.set_ylabel("anchor: the model that is realigned")
    return figure


def _table(cells: Sequence[Sequence[ComparedPair | None]], value: Callable[[ComparedPair], float]) -> np.ndarray:
    return np.array([[float("nan") if pair is None else value(pair) for pair in row] for row in cells])


def _paint(ax: Axes, values: np.ndarray, colours: str, norm: Normalize, label: str) -> None:
    ax.set_facecolor(ABSENT)
    painted = ax.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    assert ax.figure is not None
    ax.figure.colorbar(painted, ax=ax, label=label, fraction=0.05, pad=0.02).outline.set_visible(False)


def _write(ax: Axes, row: int, column: int, text: str, bold: bool) -> None:
    """The number in a cell, in black or white after the cell's lightness."""
    painted = ax.images[0]
    value = painted.get_array()[row, column]  # type: ignore[index]
    colour = "#222222"
    if not np.ma.is_masked(value):
        red, green, blue, _ = painted.cmap(painted.norm(value))
        colour = "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
    ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8.5, weight="bold" if bold else None)


def _counted(pair: ComparedPair, text: str) -> str:
    """A cell's words, with the number of its images where some are missing."""
    return text if pair.images == pair.planned else f"{text}\nn = {pair.images}"


def _mark(ax: Axes, cells: Sequence[Sequence[ComparedPair | None]]) -> None:
    """A dashed frame inside the cells where an anchor stands for itself; hatching where there is no pair."""
    for (i, j), pair in np.ndenumerate(np.array(cells, dtype=object)):
        if pair is None:
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", ec="#D8D8D8", lw=0))
        elif pair.alone:
            ax.add_patch(Rectangle((j - 0.43, i - 0.41), 0.86, 0.82, fill=False, ls=(0, (3, 2)), ec="#B0B0B0"))


def _staircase(ax: Axes, inside: Sequence[Sequence[bool]]) -> None:
    """A line between the cells at λ ≤ 1 (`inside`) and those at λ > 1, over a white one that sets it off."""
    for i, row in enumerate(inside):
        for j, this in enumerate(row):
            edges = []
            if j + 1 < len(row) and row[j + 1] != this:
                edges.append(([j + 0.5, j + 0.5], [i - 0.5, i + 0.5]))
            if i + 1 < len(inside) and inside[i + 1][j] != this:
                edges.append(([j - 0.5, j + 0.5], [i + 0.5, i + 0.5]))
            for x, y in edges:
                ax.plot(x, y, color="white", linewidth=4.5, solid_capstyle="projecting")
                ax.plot(x, y, color="#D55E00", linewidth=2.2, solid_capstyle="projecting", zorder=3)


def _power(values: np.ndarray) -> int:
    """The power of ten in which small `values` are told, 0 for others: cells have room for few digits."""
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    return math.floor(math.log10(largest)) if 0 < largest < 0.01 else 0


def _decimals(values: Any, figures: int) -> int:
    """Decimals that show the largest of `values` with so many figures."""
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    return min(6, max(0, figures - 1 - math.floor(math.log10(largest)))) if largest else 1


def signed(value: float, figures: int = 2, most: int = 6) -> str:
    """A difference with its sign and so many figures, in at most so many decimals, never as a power of ten."""
    decimals = min(most, _decimals(value, figures))
    shown = round(value, decimals)
    return f"{shown:+.{decimals}f}".replace("-", "−") if shown else f"{0:.{decimals}f}"


# -- reward against β -------------------------------------------------------------------------------------------------


@dressed
def lines(study: Study, particles: Study | None) -> Figure:
    """DeRaDiff's figures 5 and 9: mean score against β, retrained and approximated, a panel for each anchor."""
    anchors = study.anchors
    columns = min(3, len(anchors)) if len(anchors) != 4 else 2
    rows = math.ceil(len(anchors) / columns)
    figure = Figure(figsize=(min(11, 1.2 + 4.9 * columns), 3.1 * rows + 0.7), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for place, (ax, anchor) in enumerate(zip(axes, anchors, strict=False)):
        _retrained_line(ax, study)
        pairs = [pair for pair in study.pairs if pair.models.anchor == anchor]
        pairs.sort(key=lambda pair: study.betas[pair.models.target])
        _approximated(ax, study, pairs, "plain", "Algorithm 1")
        if particles is not None:
            also = [pair for pair in particles.pairs if pair.models.anchor == anchor and not pair.alone]
            _approximated(ax, study, also, "particles", "particles")
        _mark_anchor(ax, study, anchor)
        ax.set_title(f"anchor {study.inline(anchor)}")
        ax.set_xlabel("target β (log scale)" if place + columns >= len(anchors) else "")
        ax.tick_params(axis="x", labelbottom=place + columns >= len(anchors))
    for ax in axes[len(anchors) :]:
        ax.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel(unit(study.score))
    _beta_axis(axes[0], study, 9.2 / columns)
    _legend(figure, axes[: len(anchors)])
    return figure


def _retrained_line(ax: Axes, study: Study) -> None:
    ordered = sorted((study.betas[name], *mean) for name, mean in study.retrained.items())
    betas, values, errors = np.array(ordered).T
    ax.plot(betas, values, "o-", color=RETRAINED, markersize=6, mfc="white", linewidth=1.4, label="retrained")
    ax.fill_between(betas, values - errors, values + errors, color=RETRAINED, alpha=0.12, linewidth=0, label="± 1 s.e.")
    if study.reference is not None:
        ax.axhline(study.reference.value, color=REFERENCE, linestyle=":", linewidth=1.3, label="reference (β → ∞)")


def _approximated(ax: Axes, study: Study, pairs: Sequence[ComparedPair], arm: str, label: str) -> None:
    if not pairs:
        return
    style = ARMS[arm]
    ax.errorbar(
        [study.betas[pair.models.target] for pair in pairs],
        [pair.approximated for pair in pairs],
        intervals(pairs),
        fmt=style.marker,
        color=style.colour,
        markersize=5,
        linewidth=1.2,
        linestyle=(0, (4, 2)) if arm == "plain" else "none",
        capsize=2.5,
        label=label,
    )


def _mark_anchor(ax: Axes, study: Study, anchor: str) -> None:
    """The anchor's own β, and the side on which λ exceeds 1."""
    beta = study.betas[anchor]
    ax.axvspan(ax.get_xlim()[0] if beta <= 0 else 1e-12, beta, color="#F4EFE6", zorder=0, linewidth=0, label="λ > 1")
    ax.axvline(beta, color="#B9A77C", linewidth=1, zorder=1)
    if anchor in study.retrained:
        value = study.retrained[anchor].value
        ax.plot(beta, value, "*", color="#E69F00", markersize=13, mec="#222222", mew=0.6, zorder=4, label="anchor")


def _beta_axis(ax: Axes, study: Study, inches: float) -> None:
    """A logarithmic axis with a tick for every β; upright where labels would touch."""
    betas = sorted(set(study.betas.values()))
    ax.set_xscale("log")
    low, high = betas[0], betas[-1]
    ax.set_xlim(low / 1.25 * (low / high) ** 0.03, high * 1.25 * (high / low) ** 0.03)
    ax.minorticks_off()
    span = math.log(ax.get_xlim()[1] / ax.get_xlim()[0])
    gaps = [math.log(b / a) / span * inches for a, b in pairwise(betas)]
    crowded = min(gaps, default=1.0) < 0.075 * max(len(f"{beta:g}") for beta in betas)
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
    for other in ax.figure.axes if ax.figure is not None else ():
        other.tick_params(axis="x", labelrotation=90 if crowded else 0, labelsize=8.5)


def intervals(pairs: Sequence[ComparedPair]) -> np.ndarray:
    """The 95% intervals of differences as bars below and above, of shape (2, pair)."""
    bars = [(pair.difference.value - pair.interval[0], pair.interval[1] - pair.difference.value) for pair in pairs]
    return np.maximum(np.nan_to_num(np.array(bars).T), 0.0)


def legend_entries(axes: Iterable[Axes]) -> dict[str, Any]:
    """What stands in the legends of some panels, each label once, with the handle of the last that has it."""
    return {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend above all panels."""
    entries = legend_entries(axes)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=min(7, int(0.65 * figure.get_figwidth())),
        columnspacing=1.3,
        handlelength=1.8,
    )


# -- particles --------------------------------------------------------------------------------------------------------


@dressed
def particles_beside(by_score: Sequence[tuple[Study, Study | None]]) -> Figure:
    """What Algorithm 1 and particles miss of the retrained model: a row for each pair, a panel for each score.

    Each entry is the particles' study of one score, and Algorithm 1's of the same.
    """
    most = max(len(study.pairs) for study, _ in by_score)
    figure = Figure(figsize=(min(11.5, 3 + 3.2 * len(by_score)), 1.7 + 0.6 * most), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(by_score), squeeze=False).flat)
    for ax, (study, plain) in zip(axes, by_score, strict=True):
        ax.axvline(0, color=RETRAINED, linewidth=1.3, label="retrained")
        for y, pair in enumerate(study.pairs):
            other = plain.at(pair.models.anchor, pair.models.target) if plain is not None else None
            for arm, label, away, shown in (
                ("plain", "Algorithm 1", -0.14, other),
                ("particles", "particles", 0.14, pair),
            ):
                if shown is not None:
                    ax.errorbar(
                        shown.difference.value,
                        y + away,
                        xerr=intervals([shown]),
                        fmt=ARMS[arm].marker,
                        color=ARMS[arm].colour,
                        markersize=6,
                        capsize=3,
                        linewidth=1.3,
                        label=label,
                    )
        names = [pair.models.approximated.name.replace(", ", ",\n", 1) for pair in study.pairs]
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.margins(x=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.set_title(study.score)
    figure.supxlabel("difference to the retrained mean", fontsize=axes[0].xaxis.label.get_fontsize())
    _legend(figure, axes)
    return figure
