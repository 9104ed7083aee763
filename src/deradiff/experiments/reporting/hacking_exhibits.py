"""Undoing reward hacking: how far hacked models and their realignments are from the healthy one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.experiments.reporting.agreement_figures import legend_entries
from deradiff.experiments.reporting.exhibits import Exhibit, table
from deradiff.experiments.reporting.hacking_distances import RESAMPLES, Distances, Undoing, distances
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

SECTION = "Reward hacking"

INK, VERMILLION, BLUE, GREY = "#222222", "#D55E00", "#0072B2", "#777777"  # Okabe and Ito's, but for the greys


def exhibits(results: Results) -> Iterator[Exhibit]:
    """Those that the plan names hacked models and a healthy one for, and has their images."""
    yield from triples(results)
    for features in results.plan.features:
        yield from distance_exhibits(results, features)


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


def distance_exhibits(results: Results, features: str) -> Iterator[Exhibit]:
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
    cells = table([_cells(features, row) for row in rows])
    title = f"Undoing reward hacking by {name}"
    yield Exhibit(key("hacking-table", features), SECTION, title, f"{caption} After DeRaDiff, Table 3.", *cells)
    figure = draw(rows, name)
    caption += " After DeRaDiff, figure 10."
    yield Exhibit(key("hacking-distance", features), SECTION, title, caption, *cells, figure)


def _cells(features: str, row: Distances) -> dict[str, Any]:
    undoing, errors = row.undoing, row.errors
    return {
        "features": features,
        "prompts": row.prompts,
        "hacked": undoing.hacked.name,
        "realigned": undoing.realigned.name,
        "healthy": undoing.healthy.name,
        "λ": undoing.realigned.lam,
        "distance of hacked": row.hacked.value,
        "s.e. (hacked)": errors["hacked"],
        "distance of realigned": row.realigned.value,
        "s.e. (realigned)": errors["realigned"],
        "Δ": row.undone,
        "s.e. (Δ)": errors["undone"],
        "Δ in %": row.percent,
        "s.e. (Δ in %)": errors["percent"],
        "prompts (n)": row.prompt_count,
        "images (n)": row.hacked.samples[0],
        **{f"{which}, other seeds": distance for which, distance in row.apart.items()},
        "few samples": row.caveat,
    }


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
    sets = _first(rows)
    most = max(sum(row.prompts == each.prompts for row in rows) for each in sets)
    figure = Figure(figsize=(4.2 * len(sets) + 1.4, 0.8 * most + 1.9), layout="constrained")
    grid = figure.subplots(1, len(sets), squeeze=False)
    for axes, each in zip(grid[0], sets, strict=True):
        _panel(axes, [row for row in rows if row.prompts == each.prompts])
        axes.set_title(f"{each.prompts}, {each.hacked.samples[0]} images", fontsize=10)
    figure.supxlabel(f"{name} from {rows[0].undoing.healthy.name}", fontsize=10)
    entries = legend_entries(grid[0])
    order = sorted(entries, key=LEGEND.index)
    figure.legend(
        [entries[label] for label in order],
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
