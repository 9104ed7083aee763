"""Undoing reward hacking: how far hacked models and their realignments are from the healthy one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.reporting.picture_sheets import (
    SAME_NOISE,
    SheetColumn,
    best_set,
    drawn,
    key,
    sheet,
    shots,
    strength,
    substitute,
    uncurated,
)
from deradiff.experiments.results import Results
from deradiff.measures.frechet import Frechet, frechet_distance
from deradiff.measures.statistics import Statistics, compressed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECTION = "Reward hacking"

RESAMPLES = 100
"""Of the bootstrap: its standard errors are within 7% of what more would make them; each costs as many distances."""

INK, VERMILLION, BLUE, GREY = "#222222", "#D55E00", "#0072B2", "#777777"  # Okabe and Ito's, but for the greys


class Undoing(NamedTuple):
    """A hacked model, a realignment of it towards the healthy one, and the healthy one."""

    hacked: Arm
    realigned: Arm
    healthy: Arm


@dataclass(frozen=True)
class Distances:
    """One row of DeRaDiff's Table 3. Errors are standard errors by the bootstrap over prompts; NaN for one prompt."""

    undoing: Undoing
    prompts: str
    hacked: Frechet
    realigned: Frechet
    errors: dict[str, float]
    """Of `hacked`, `realigned`, `undone` and `percent`."""
    prompt_count: int
    apart: dict[str, float]
    """The distances of `hacked`, `realigned` and `healthy` from the healthy model with other seeds, half as many."""

    @property
    def undone(self) -> float:
        """By how much realigning has shortened the distance."""
        return self.hacked.value - self.realigned.value

    @property
    def percent(self) -> float:
        """The same in percent of the hacked model's distance; NaN if that is 0."""
        return percent(self.hacked.value, self.realigned.value)

    @property
    def caveat(self) -> str:
        """What is to be said of too few samples; nothing if there are enough."""
        return self.hacked.caveat or ""


def percent(hacked: float, realigned: float) -> float:
    """By how many percent realigning has shortened the distance; NaN if it was 0."""
    return 100 * (hacked - realigned) / hacked if hacked else math.nan


def exhibits(results: Results) -> Iterator[Exhibit]:
    """Those that the plan names hacked models and a healthy one for, and has their images."""
    yield from triples(results)
    for features in results.plan.features:
        yield from table(results, features)


def undoings(results: Results) -> list[Undoing]:
    """For every hacked model, its realignments towards the healthy one: by Algorithm 1, and by particles."""
    wanted = results.plan.report
    healthy = results.model(wanted.healthy) if wanted.healthy else None
    if healthy is None:
        return []
    pairs = [*results.pairs(), *results.pairs(particles=True)]
    return [
        Undoing(hacked, pair.approximated, healthy)
        for name in wanted.hacked
        if (hacked := results.model(name)) is not None
        for pair in pairs
        if (pair.anchor, pair.target) == (name, wanted.healthy) and name != wanted.healthy
    ]


# -- pictures ---------------------------------------------------------------------------------------------------------


def triples(results: Results) -> Iterator[Exhibit]:
    """For each hacked model: hacked, realigned, healthy (DeRaDiff, figures 7 and 11)."""
    plan = results.plan
    for undoing in undoings(results):
        prompts = best_set(results, undoing)
        of = shots(results, prompts)
        if len(drawn(results, undoing, of)) < len(undoing):
            continue
        (hacked, lam), *_ = undoing.realigned.anchors
        healthy = undoing.realigned.target
        how = f"λ = {lam:.3g}" + (f", {undoing.realigned.particles} particles" if undoing.realigned.particles else "")
        columns = [
            SheetColumn(f"{hacked}, hacked\n{strength(plan, hacked, 1.0)}", undoing.hacked),
            SheetColumn(f"realigned\n{how}\n{strength(plan, hacked, lam)}", undoing.realigned),
            SheetColumn(f"{healthy}, healthy\n{strength(plan, healthy, 1.0)}", undoing.healthy),
        ]
        noise = "" if undoing.realigned.particles else f"{SAME_NOISE}. "
        yield sheet(
            results,
            key("hacking", undoing.realigned.name),
            f"Undoing the reward hacking of {hacked}",
            f"Left: {hacked} ({strength(plan, hacked, 1.0)}), reward-hacked; centre: DeRaDiff from it at {how}; right: "
            f"{healthy} ({strength(plan, healthy, 1.0)}), aligned from scratch and healthy. {noise}"
            f"{uncurated(results, prompts, of)} After DeRaDiff, figures 7 and 11.",
            columns,
            of,
            section=SECTION,
        )


# -- distances --------------------------------------------------------------------------------------------------------


def table(results: Results, features: str) -> Iterator[Exhibit]:
    """DeRaDiff's Table 3, and its figure 10, by one feature extractor."""
    rows = [
        row
        for prompts in results.plan.prompts
        for undoing in undoings(results)
        if (row := distances(results, undoing, prompts, features)) is not None
    ]
    if not rows:
        return
    name = "FID" if features == "inception" else f"Fréchet distance in {features} features"
    caption = _caption(results, rows, name)
    cells = tuple(_cells(features, row) for row in rows)
    title = f"Undoing reward hacking by {name}"
    yield Exhibit(key("hacking-table", features), SECTION, title, f"{caption} After DeRaDiff, Table 3.", HEADER, cells)
    yield Exhibit(
        key("hacking-distance", features),
        SECTION,
        title,
        f"{caption} After DeRaDiff, figure 10.",
        HEADER,
        cells,
        figure=draw(rows, name),
    )


def distances(results: Results, undoing: Undoing, prompts: str, features: str) -> Distances | None:
    """Both distances from the healthy model, over the prompts and seeds that all three have; None for under 2."""
    known = [results.features_by_place(arm, prompts, features) for arm in undoing]
    places = sorted(set.intersection(*map(set, known)))
    if len(places) < 2:
        return None
    hacked, realigned, healthy = (np.stack([vectors[place] for place in places]) for vectors in known)
    rows, columns = (np.asarray(side) for side in zip(*places, strict=True))
    count = len(np.unique(rows))
    return Distances(
        undoing,
        prompts,
        distance(healthy, hacked),
        distance(healthy, realigned),
        bootstrapped(hacked, realigned, healthy, rows),
        count,
        apart(hacked, realigned, healthy, columns),
    )


Vectors = Float[np.ndarray, "image feature"]


def distance(healthy: Vectors, other: Float[np.ndarray, "other feature"]) -> Frechet:
    """Of two sets of features, of as many images or not."""
    return frechet_distance(torch.from_numpy(healthy), torch.from_numpy(other))


def bootstrapped(
    hacked: Vectors, realigned: Vectors, healthy: Vectors, rows: Int[np.ndarray, " image"], resamples: int = RESAMPLES
) -> dict[str, float]:
    """Standard errors of both distances, of their difference and of that in percent, over resampled prompts.

    All three sets are resampled by the same prompts, each with all its images: what prompts do to all of them cancels
    in the difference. `rows` is the prompt of each image.
    """
    names = ("hacked", "realigned", "undone", "percent")
    prompts = np.unique(rows)
    if len(prompts) < 2:
        return dict.fromkeys(names, math.nan)
    random = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        picks = random.choice(prompts, len(prompts))
        times = np.bincount(picks, minlength=rows.max() + 1)[rows]
        far, near, base = (repeated(vectors, times) for vectors in (hacked, realigned, healthy))
        first, second = frechet_distance(base, far).value, frechet_distance(base, near).value
        values.append((first, second, first - second, percent(first, second)))
    return dict(zip(names, np.std(values, axis=0, ddof=1).tolist(), strict=True))


def repeated(vectors: Vectors, times: Int[np.ndarray, " image"]) -> Statistics:
    """The statistics of a set in which each vector stands so often, at the price of the distinct ones."""
    there = times > 0
    x, counts = torch.from_numpy(vectors[there]).double(), torch.from_numpy(times[there]).double()[:, None]
    total = counts.sum()
    mean = (counts * x).sum(0) / total
    return Statistics(mean, compressed((counts / (total - 1)).sqrt() * (x - mean)), int(total))


def apart(
    hacked: Vectors, realigned: Vectors, healthy: Vectors, columns: Int[np.ndarray, " image"]
) -> dict[str, float]:
    """The distances that images of other seeds have: the first half of the seeds against the second, and reversed.

    What is left of the healthy model's own is what independent samples of this size cannot go below.
    """
    seeds = np.unique(columns)
    half = len(seeds) // 2
    first, second = np.isin(columns, seeds[:half]), np.isin(columns, seeds[half : 2 * half])
    if first.sum() < 2 or second.sum() < 2:
        return dict.fromkeys(("hacked", "realigned", "healthy"), math.nan)
    return {
        name: (distance(healthy[first], other[second]).value + distance(healthy[second], other[first]).value) / 2
        for name, other in (("hacked", hacked), ("realigned", realigned), ("healthy", healthy))
    }


HEADER = (
    "features",
    "prompts",
    "hacked",
    "realigned",
    "healthy",
    "λ",
    "distance of hacked",
    "s.e. (hacked)",
    "distance of realigned",
    "s.e. (realigned)",
    "Δ",
    "s.e. (Δ)",
    "Δ in %",
    "s.e. (Δ in %)",
    "prompts (n)",
    "images (n)",
    "hacked, other seeds",
    "realigned, other seeds",
    "healthy, other seeds",
    "few samples",
)


def _cells(features: str, row: Distances) -> tuple[Any, ...]:
    undoing, errors = row.undoing, row.errors
    return (
        features,
        row.prompts,
        undoing.hacked.name,
        undoing.realigned.name,
        undoing.healthy.name,
        undoing.realigned.lam,
        row.hacked.value,
        errors["hacked"],
        row.realigned.value,
        errors["realigned"],
        row.undone,
        errors["undone"],
        row.percent,
        errors["percent"],
        row.prompt_count,
        row.hacked.samples[0],
        row.apart["hacked"],
        row.apart["realigned"],
        row.apart["healthy"],
        row.caveat,
    )


def _caption(results: Results, rows: Sequence[Distances], name: str) -> str:
    healthy, sets = rows[0].undoing.healthy.name, _first(rows)
    swarm = " (but for particles)" if any(row.undoing.realigned.particles for row in rows) else ""
    sentences = [
        f"{name} of hacked models, and of DeRaDiff's realignments of them to {healthy}, from the healthy {healthy}: in "
        "squared units of the features, lower is closer; Δ is what realigning takes off.",
        *(f"“{row.prompts}”: {row.hacked.samples[0]} images of {row.prompt_count} prompts from each." for row in sets),
        f"±1 standard error, for other prompts with these seeds, by {RESAMPLES} resamples that all models share.",
        f"Every image has the prompt, seed and noise of one of {healthy}'s{swarm}. That makes distances smaller than "
        "between independent images: equal models are at 0 for any number of them.",
    ]
    floors = [row for row in sets if math.isfinite(row.apart["healthy"])]
    if floors:
        values = " and ".join(f"{row.apart['healthy']:.3g} (“{row.prompts}”)" for row in floors)
        sentences.append(
            "“Other seeds” and hollow marks compare one half of the seeds with the other, so half as many images: "
            f"{healthy} is then {values} from itself (dotted line), which independence alone makes."
        )
    few = [row for row in sets if row.caveat]
    sentences += [f"Few samples (“{row.prompts}”): {row.caveat}" for row in few[:1]]
    sentences += [f"The same holds for the {row.hacked.samples[0]} images of “{row.prompts}”." for row in few[1:]]
    return " ".join(sentences) + "".join(substitute(results.plan, row.prompts) for row in sets)


def _first(rows: Sequence[Distances]) -> list[Distances]:
    """The first row of every prompt set."""
    return list({row.prompts: row for row in reversed(rows)}.values())[::-1]


# -- figure -----------------------------------------------------------------------------------------------------------


LEGEND = (
    "hacked",
    "hacked, other seeds",
    "realigned by DeRaDiff",
    "realigned, other seeds",
    "healthy, other seeds",
)


def draw(rows: Sequence[Distances], name: str) -> Figure:
    """A panel for every prompt set; in it, a line for every realignment from the hacked model's distance to its own."""
    from matplotlib.figure import Figure

    sets = _first(rows)
    most = max(sum(row.prompts == each.prompts for row in rows) for each in sets)
    figure = Figure(figsize=(4.2 * len(sets) + 1.4, 0.8 * most + 1.9), layout="constrained")
    grid = figure.subplots(1, len(sets), squeeze=False)
    for axes, each in zip(grid[0], sets, strict=True):
        _panel(axes, [row for row in rows if row.prompts == each.prompts])
        axes.set_title(f"{each.prompts}, {each.hacked.samples[0]} images", fontsize=10)
    figure.supxlabel(f"{name} from {rows[0].undoing.healthy.name}", fontsize=10)
    named: dict[str, Any] = {}
    for axes in grid[0]:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    order = sorted(named, key=LEGEND.index)
    figure.legend(
        [named[labels] for labels in order],
        order,
        loc="outside upper center",
        ncols=3 if len(sets) > 1 else 2,
        frameon=False,
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Distances]) -> None:
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        ends = [row.hacked.value, row.realigned.value]
        axes.plot(ends, [place, place], color=GREY, lw=1.2, zorder=1)
        text = f"{-row.percent:+.0f}%".replace("-", "−")
        axes.annotate(
            text, (sum(ends) / 2, place), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    for which, label, marker, colour in (("hacked", LEGEND[0], "o", VERMILLION), ("realigned", LEGEND[2], "D", BLUE)):
        values = [getattr(row, which).value for row in rows]
        errors = [row.errors[which] for row in rows]
        axes.errorbar(
            values,
            places,
            xerr=errors,
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=3,
            lw=1.2,
            label=label,
            clip_on=False,
        )
        other = [row.apart[which] for row in rows]
        if np.isfinite(other).any():
            axes.plot(
                other, places + 0.25, marker, color=colour, mfc="white", markersize=6, label=f"{which}, other seeds"
            )
    if math.isfinite(floor := rows[0].apart["healthy"]):
        axes.axvline(floor, color=INK, lw=1.2, ls=":", zorder=0, label=LEGEND[-1])
    axes.set_yticks(places, [row.undoing.realigned.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)


__all__ = ["exhibits"]
