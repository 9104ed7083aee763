"""Figures of errors: their distribution, scatter and Bland-Altman plots, and the verdicts beside the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED
from deradiff.experiments.reporting.agreement_figures import dressed, intervals, is_cosine, signed, unit
from deradiff.experiments.reporting.agreement_pairs import ComparedPair, Study
from deradiff.experiments.reporting.agreement_verdicts import Judged
from deradiff.files.figure_styles import KINDS, Style
from deradiff.measures.agreement import (
    LIMITS,
    Agreement,
    ErrorDistribution,
    Scatter,
    agreement_of,
    error_distribution,
    scatter_of,
)

PARTS = {True: Style("λ ≤ 1", "#0072B2", "o"), False: Style("λ > 1", "#D55E00", "^")}
"""How pairs are drawn where predictions are interpolated, and where they are extrapolated."""

THRESHOLDS = (5e-4, 1e-3)
"""Of DeRaDiff's figure 4."""

PAPER_SD = 0.001434
"""The standard deviation of the retrained models' PickScore in DeRaDiff's figure 4."""

NOISE = "#8A8A8A"
LABELLED = 3
"""Points of a panel that bear their names: those that are farthest off."""


@dataclass(frozen=True)
class Numbers:
    """What a study says of its pairs at λ ≤ 1, or of those at λ > 1; what needs more pairs is None."""

    agreement: Agreement | None
    errors: ErrorDistribution | None
    scatter: Scatter | None


def numbers(study: Study, interpolated: bool) -> Numbers:
    """All statistics of one part of a study."""
    part = study.part(interpolated)
    approximated, retrained = [pair.approximated for pair in part], [pair.retrained for pair in part]
    if len(part) < 2:
        return Numbers(None, None, None)
    fits = len(part) >= 3 and np.ptp(approximated) > 0 and np.ptp(retrained) > 0
    return Numbers(
        agreement_of(approximated, retrained, original_mean=study.original_mean),
        error_distribution(
            approximated,
            retrained,
            retrained=[estimate.value for estimate in study.retrained.values()],
            thresholds=thresholds(study),
        ),
        scatter_of(approximated, retrained) if fits else None,
    )


def thresholds(study: Study) -> tuple[float, ...]:
    """The errors whose shares are counted: the paper's for cosines.

    On another scale, what has the same size beside the standard deviation of the retrained means as the paper's had
    beside its own: 0.35 and 0.70 of it. None where a single model was retrained.
    """
    if is_cosine(study.score):
        return THRESHOLDS
    scale = study.original_sd / PAPER_SD
    return tuple(scale * bound for bound in THRESHOLDS) if math.isfinite(scale) else ()


# -- distribution of errors -------------------------------------------------------------------------------------------


@dressed
def distribution(study: Study, parts: Mapping[bool, Numbers]) -> Figure:
    """DeRaDiff's figure 4: the ECDF of absolute errors, beside it the table of its inset."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    ax, aside = figure.subplots(1, 2, width_ratios=(1.25, 1))
    known = {interpolated: part.errors for interpolated, part in parts.items() if part.errors is not None}
    positive = [error for part in known.values() for error in part.errors if error > 0]
    low, high = (min(positive) / 1.6, max(positive) * 1.6) if positive else (0.1, 1.0)
    bounds = thresholds(study)
    if bounds:
        low, high = min(low, bounds[0] / 1.6), max(high, bounds[-1] * 1.6)
    for interpolated, part in known.items():
        style = PARTS[interpolated]
        errors = np.maximum(np.array([low, *part.errors, high]), low)
        shares = np.array([0.0, *part.shares, 1.0])
        ax.step(errors, shares, where="post", color=style.colour, linewidth=1.8, ls="-" if interpolated else "--")
        ax.plot(
            errors[1:-1],
            shares[1:-1],
            style.marker,
            color=style.colour,
            markersize=5,
            clip_on=False,
            label=f"{style.label} (n = {part.pairs})",
        )
    grid = np.geomspace(low, high, 200)
    if (chance := noise_distribution(study, grid)) is not None:
        ax.plot(grid, chance, color=NOISE, linewidth=1.4, ls=":", label="noise of the prompts alone, λ ≤ 1")
    for bound in bounds:
        ax.axvline(bound, color="#999999", linewidth=1, zorder=1)
        text = f"{bound:g}" if is_cosine(study.score) else f"{bound / study.original_sd:.2f} SD"
        ax.annotate(
            text,
            (bound, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=8,
            color="#666666",
            va="bottom",
            ha="left",
        )
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel(f"|approximated − retrained|, {unit(study.score)} (log scale)")
    ax.set_ylabel("share of pairs with at most that error")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=9, columnspacing=1.2, handlelength=1.6)
    _inset(aside, study, known)
    return figure


def noise_distribution(study: Study, errors: np.ndarray) -> np.ndarray | None:
    """The ECDF at `errors` that resampling prompts alone would make of pairs at λ ≤ 1 that agree perfectly."""
    away = study.chance(True)
    if away is None:
        return None
    known = np.sort(np.abs(away[np.isfinite(away)]))
    return np.searchsorted(known, errors, side="right") / len(known)


def inset_rows(study: Study, errors: ErrorDistribution) -> list[tuple[str, float]]:
    """The lines of figure 4's table, errors also as shares of the retrained models' standard deviation."""
    rows: list[tuple[str, float]] = [("n (pairs)", errors.pairs), ("MAE", errors.mae)]
    rows += [("median" if p == 0.5 else f"{100 * p:g}th percentile", error) for p, error in errors.quantiles.items()]
    rows.append(("maximum", errors.maximum))
    rows += [(f"share ≤ {_bound(study, bound)}", share) for bound, share in errors.fractions.items()]
    sd = study.original_sd
    if sd > 0:
        rows.append(("MAE / SD of retrained", errors.mae / sd))
        rows.append(("median / SD of retrained", errors.quantiles[0.5] / sd))
    rows.append(("retrained mean", study.original_mean))
    rows.append(("retrained SD", sd))
    return rows


def _bound(study: Study, bound: float) -> str:
    return f"{bound:.3g}" if is_cosine(study.score) else f"{bound:.3g} ({bound / study.original_sd:.2f} SD)"


def _inset(ax: Axes, study: Study, known: Mapping[bool, ErrorDistribution]) -> None:
    ax.set_axis_off()
    columns = {interpolated: dict(inset_rows(study, errors)) for interpolated, errors in known.items()}
    names = list(next(iter(columns.values())))
    cells = [[_shown(name, columns[part][name]) for part in columns] for name in names]
    width = 0.25
    table = ax.table(
        cells,
        rowLabels=names,
        colLabels=[PARTS[part].label for part in columns],
        loc="center right",
        cellLoc="right",
        colWidths=[width] * len(columns),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    table.scale(1, 1.4)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "B" if row == 0 else ""
        cell.set_edgecolor("#888888")
        if row == 0 and column >= 0:
            cell.set_text_props(weight="bold", color=PARTS[list(columns)[column]].colour)


def _shown(name: str, value: float) -> str:
    if name.startswith("n "):
        return f"{value:g}"
    return f"{value:.1%}" if name.startswith("share") or "/" in name else f"{value:.4g}"


# -- scatter and Bland-Altman -----------------------------------------------------------------------------------------


@dressed
def scatter(study: Study, parts: Mapping[bool, Numbers]) -> Figure:
    """DeRaDiff's figure 6a: retrained means against approximations, with the identity and a linear fit."""

    def panel(ax: Axes, interpolated: bool, pairs: Sequence[ComparedPair]) -> tuple[np.ndarray, np.ndarray]:
        x, y = (np.array([getattr(pair, name) for pair in pairs]) for name in ("approximated", "retrained"))
        bars = intervals(pairs)[::-1]  # upright is the retrained mean: approximated - difference
        ax.errorbar(x, y, bars, fmt="none", ecolor="#777777", elinewidth=1, capsize=2, zorder=2)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        ends = ends + np.array([-0.06, 0.06]) * max(np.ptp(ends), 1e-12)
        ax.plot(ends, ends, color="#222222", linewidth=1.2, ls="--", label="identity", zorder=1)
        fit = parts[interpolated].scatter
        if fit is not None:
            line = np.array([x.min(), x.max()])
            ax.plot(
                line,
                fit.intercept.value + fit.slope.value * line,
                color="#CC79A7",
                linewidth=1.8,
                zorder=1,
                label=f"fit: slope {fit.slope.value:.2f} ± {fit.slope.error:.2f}, r = {fit.correlation:.3f}",
            )
        ax.set_xlabel(f"approximated: {unit(study.score)}")
        ax.set_ylabel(f"retrained: {unit(study.score)}")
        ax.legend(loc="best", fontsize=9)
        return x, y

    return _by_part(study, panel)


@dressed
def bland_altman(study: Study, parts: Mapping[bool, Numbers]) -> Figure:
    """DeRaDiff's figure 6b: differences against the means of both models, with bias and limits of agreement."""

    def panel(ax: Axes, interpolated: bool, pairs: Sequence[ComparedPair]) -> tuple[np.ndarray, np.ndarray]:
        x = np.array([pair.average for pair in pairs])
        y = np.array([pair.difference.value for pair in pairs])
        ax.errorbar(x, y, intervals(pairs), fmt="none", ecolor="#777777", elinewidth=1, capsize=2, zorder=2)
        ax.axhline(0, color="#222222", linewidth=0.9, zorder=1)
        agreement = parts[interpolated].agreement
        if agreement is not None:
            ax.axhspan(*agreement.limits, color="#EAF1F6", zorder=0)
            low, high = agreement.limits
            for value, text, line in (
                (agreement.bias, "bias", "-"),
                (low, f"−{LIMITS:g} SD", "--"),
                (high, f"+{LIMITS:g} SD", "--"),
            ):
                ax.axhline(value, color="#0072B2", linewidth=1.2, ls=line, zorder=1)
                ax.annotate(
                    f"{text}\n{signed(value, 3)}",
                    (1.0, value),
                    xycoords=("axes fraction", "data"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color="#004B75",
                )
        ax.set_xlabel(f"average of both: {unit(study.score)}")
        ax.set_ylabel("approximated − retrained")
        ax.margins(x=0.1)
        _name_farthest(ax, study, pairs, x, y)
        return x, y

    return _by_part(study, panel)


def _by_part(
    study: Study, panel: Callable[[Axes, bool, Sequence[ComparedPair]], tuple[np.ndarray, np.ndarray]]
) -> Figure:
    """A panel for λ ≤ 1 and one for λ > 1, points coloured by how far apart the strengths of anchor and target are.

    `panel` draws what belongs to the points of some pairs, and returns where these are.
    """
    parts = {interpolated: pairs for interpolated in PARTS if (pairs := study.part(interpolated))}
    figure = Figure(figsize=(11.5 if len(parts) > 1 else 7, 4.6), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(parts), squeeze=False).flat)
    largest = max(abs(doublings(study, pair)) for pairs in parts.values() for pair in pairs) or 1.0
    for ax, (interpolated, pairs) in zip(axes, parts.items(), strict=True):
        style = PARTS[interpolated]
        points = ax.scatter(
            *panel(ax, interpolated, pairs),
            s=48,
            c=[doublings(study, pair) for pair in pairs],
            cmap="PuOr_r",
            norm=Normalize(-largest, largest),
            marker=style.marker,
            edgecolors="#222222",
            linewidths=0.7,
            zorder=3,
        )
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(f"{style.label} (n = {len(pairs)})")
    figure.colorbar(points, ax=axes, label="log₂(β target / β anchor)", fraction=0.04, pad=0.02)
    return figure


def _name_farthest(ax: Axes, study: Study, pairs: Sequence[ComparedPair], x: np.ndarray, y: np.ndarray) -> None:
    """The β of the pairs that are farthest off, where a label has room beside its point."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    across, upright = (x - left) / (right - left), (y - low) / (high - low)
    labels: list[tuple[float, float]] = []
    for i in sorted(range(len(pairs)), key=lambda i: -abs(y[i]))[:LABELLED]:
        for side in (-1, 1) if across[i] > 0.5 else (1, -1):
            middle = across[i] + 0.17 * side
            near = (np.abs(across - middle) < 0.16) & (np.abs(upright - upright[i]) < 0.03)
            taken = any(abs(other - middle) < 0.32 and abs(at - upright[i]) < 0.06 for other, at in labels)
            if taken or near.any() or not 0.15 < middle < 0.85:
                continue
            labels.append((middle, upright[i]))
            anchor, target = study.betas[pairs[i].models.anchor], study.betas[pairs[i].models.target]
            ax.annotate(
                f"β {anchor:g} → {target:g}",
                (x[i], y[i]),
                xytext=(8 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=8,
                color="#333333",
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.8},
            )
            break


def doublings(study: Study, pair: ComparedPair) -> float:
    """log₂(β_target / β_anchor): how many doublings of β lie between target and anchor, positive at λ < 1."""
    return math.log2(study.betas[pair.models.target] / study.betas[pair.models.anchor])


# -- verdicts ---------------------------------------------------------------------------------------------------------

OTHER = Style("other", "#8A8A8A", "x")


@dressed
def verdicts(claims: Sequence[Judged]) -> Figure:
    """The error that the verdict estimates against the true one: a panel for each score, dots by kind of verdict.

    Those whose errors are not known are left out.
    """
    shown: dict[str, list[tuple[str, Estimate, Estimate]]] = {}
    for claim in claims:
        if claim.estimated is not None and claim.true is not None:
            shown.setdefault(claim.score, []).append((claim.kind, claim.estimated, claim.true))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.8 * columns + 0.6, 3.8 * rows + 0.5), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    largest = max(abs(x.value) for points in shown.values() for _, *both in points for x in both)
    end = max(2.0, largest * 1.6)
    entries: dict[str, Any] = {}
    for ax, (score, points) in zip(axes, shown.items(), strict=False):
        ax.axhspan(-TRUSTED, TRUSTED, color="#EAF1F6", zorder=0)
        ax.plot([-end, end], [-end, end], color="#888888", linewidth=1)
        for kind in dict.fromkeys(kind for kind, _, _ in points):
            style = KINDS.get(kind, OTHER)
            some = [(estimated.value, *true) for other, estimated, true in points if other == kind]
            estimates, truths, errors = np.array(some).T
            entries[kind] = ax.errorbar(
                estimates,
                truths,
                1.96 * errors,
                fmt=style.marker,
                color=style.colour,
                markersize=6,
                elinewidth=0.9,
                label=kind,
            )
        for scale, limit in ((ax.set_xscale, ax.set_xlim), (ax.set_yscale, ax.set_ylim)):
            scale("symlog", linthresh=0.1, linscale=0.8)
            limit(-end, end)
        ticks = [tick for tick in (-10, -1, -0.1, 0, 0.1, 1, 10) if abs(tick) <= end]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(ticks, [f"{100 * tick:g}".replace("-", "−") for tick in ticks])
            axis.set_minor_locator(NullLocator())
        ax.set_title(score)
        ax.set_xlabel("estimated error, % of the shift")
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("true error, % of the shift")
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=6)
    return figure
