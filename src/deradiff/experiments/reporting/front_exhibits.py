"""Trade-offs: reward against diversity and divergence (AIG, figures 3, 4, 17 to 24), and scores against λ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting import cost_exhibits, diversity_exhibits
from deradiff.experiments.reporting.agreement_figures import unit
from deradiff.experiments.reporting.arm_series import (
    aimed_at,
    arms_on,
    change,
    distinct,
    is_about,
    keys,
    kind_of,
    model_label,
    series_of,
    short,
    substitutes,
)
from deradiff.experiments.reporting.diversity_exhibits import (
    FID,
    LSCD,
    RECALL,
    SCD,
    VENDI,
    Measure,
    Measured,
    diversity,
)
from deradiff.experiments.reporting.exhibits import Exhibit, table
from deradiff.experiments.reporting.front_figures import ArmPoint, Strip, TradeOffPanel, attributes, trade_offs
from deradiff.experiments.results import Results, over_prompts
from deradiff.measures import non_dominated

SECTION = "Trade-offs"

FRONTS = {
    FID: "FID (← closer)",
    RECALL: "recall (closer →)",
    SCD: "SCD (← closer)",
    LSCD: "LSCD (← closer)",
    VENDI: "Vendi (more diverse →)",
}
"""The columns of AIG's figure 4, and Vendi, with what their axes are called."""

FARTHEST = 2.0
"""The largest λ that scores are drawn against: beyond the anchor it is no longer about what comes back."""


def exhibits(results: Results) -> Iterator[Exhibit]:
    """Those that the plan has data for: trade-offs, diversity, cost."""
    diversities = {extractor: diversity(results, extractor) for extractor in results.plan.features}
    yield from fronts(results, diversities)
    yield from divergence(results)
    yield from returning(results)
    yield from diversity_exhibits.exhibits(results, diversities)
    yield from cost_exhibits.exhibits(results)


# -- fronts -----------------------------------------------------------------------------------------------------------


def fronts(results: Results, diversities: dict[str, dict[Arm, Measured]]) -> Iterator[Exhibit]:
    """For each score and extractor: the score on every prompt set against every measure of diversity."""
    scores, extractors = keys(results.plan.scores), keys(list(diversities))
    for score in results.plan.scores:
        for extractor, by_arm in diversities.items():
            grid = {prompts: front(results, prompts, score, by_arm) for prompts in results.plan.prompts}
            grid = {prompts: row for prompts, row in grid.items() if row}
            if grid:
                rows = [_front_rows(results, prompts, score, by_arm, panels) for prompts, panels in grid.items()]
                yield Exhibit(
                    f"front-{scores[score]}-{extractors[extractor]}",
                    SECTION,
                    f"{short(score)} against diversity, by {short(extractor)} features",
                    _front_caption(results, score, extractor, by_arm, list(grid)),
                    *table(list(chain(*rows))),
                    trade_offs([list(row.values()) for row in grid.values()]),
                )


def front(results: Results, prompts: str, score: str, by_arm: Mapping[Arm, Measured]) -> dict[Measure, TradeOffPanel]:
    """The panels of one prompt set, one for each measure that the reference and two more arms have."""
    upwards = {
        arm: mean
        for arm in distinct(results, prompts, results.diversity_on)
        if arm in by_arm
        and is_about(results.plan, dict(arm.anchors), score)
        and math.isfinite((mean := results.mean(arm, prompts, score))[0])
    }
    panels = {}
    for measure, across in FRONTS.items():
        points = {
            arm: ArmPoint(arm, by_arm[arm].values[measure], mean, by_arm[arm].errors[measure], error)
            for arm, (mean, error) in upwards.items()
            if math.isfinite(by_arm[arm].values[measure])
        }
        label = f"“{prompts}”\n{unit(short(score))}"
        panel = panel_of(results, points, label, across, measure.maximize, measure.squared)
        if panel is not None:
            panels[measure] = panel
    return panels


def panel_of(
    results: Results,
    points: Mapping[Arm, ArmPoint],
    upwards: str,
    across: str,
    maximize: bool,
    squared: bool,
    title: str = "",
) -> TradeOffPanel | None:
    """The trade-off of these points; None where there are not two to compare with the reference.

    The ideal point is the best mean score at what the reference has across, as in AIG's figure 4.
    """
    reference = results.reference
    if reference is None or reference not in points or len(points) < 3:
        return None
    plane = torch.tensor([[point.y, point.x] for point in points.values()], dtype=torch.float64)
    best = non_dominated(plane, (True, maximize)).tolist()
    unregularised = [results.model(name) for name in results.plan.report.every_unregularised]
    series = [(line, tuple(points[arm] for arm in line.arms if arm in points)) for line in series_of(results)]
    return TradeOffPanel(
        series=tuple((line, some) for line, some in series if some),
        base=points[reference],
        unregularised=tuple(points[arm] for arm in unregularised if arm is not None and arm in points),
        ideal=(points[reference].x, max(point.y for point in points.values())),
        front=frozenset(arm for arm, is_best in zip(points, best, strict=True) if is_best),
        across=across,
        upwards=upwards,
        squared=squared,
        title=title,
    )


def _front_rows(
    results: Results, prompts: str, score: str, by_arm: Mapping[Arm, Measured], row: Mapping[Measure, TradeOffPanel]
) -> list[dict[str, Any]]:
    rows = []
    for arm in sorted({point.arm for panel in row.values() for point in _points(panel)}, key=results.arms.index):
        of_arm = by_arm[arm]
        about = _about(results, prompts, arm, score)
        for measure in FRONTS:
            about[measure.name] = of_arm.values[measure]
            about[f"s.e. of {measure.name}"] = of_arm.errors[measure]
            about[f"non-dominated in {measure.name}"] = _yes(measure in row and arm in row[measure].front)
        rows.append(about | {"images for diversity": of_arm.images})
    return rows


def _points(panel: TradeOffPanel) -> list[ArmPoint]:
    return [panel.base, *(point for _, points in panel.series for point in points)]


def _about(results: Results, prompts: str, arm: Arm, score: str) -> dict[str, Any]:
    """The first columns of a trade-off's rows."""
    series = next((line.label for line in series_of(results) if arm in line.arms), "reference")
    mean, error = results.mean(arm, prompts, score)
    return {
        "prompts": prompts,
        "arm": arm.name,
        "method": kind_of(arm),
        "series": series,
        "λ": arm.lam,
        "mean score": mean,
        "s.e. of mean score": error,
        "prompts (n)": int(np.isfinite(results.by_prompt(arm, prompts, score)).sum()),
    }


def _yes(is_so: bool) -> str:
    return "yes" if is_so else ""


_MARKS = (
    "Filled markers of realigned models and interpolated weights are at λ ≤ 1, hollow ones at λ > 1. Lines join the "
    "arms of one anchor, or the models of one family by their β. Rings mark the arms that no other beats both ways, "
    "noise in the values not looked at. Vertical bars: ±1 standard error over prompts. All arms share prompts and "
    "seeds: bars hold what prompts do to all of them alike, so that two arms may differ by less than their bars and "
    "still differ."
)


def _front_caption(
    results: Results, score: str, extractor: str, by_arm: Mapping[Arm, Measured], sets: Sequence[str]
) -> str:
    where, wanted = results.diversity_on, results.plan.report
    figures = "figures 4 and 17 to 20" if score in aimed_at(results.plan) else "figures 21 to 24"
    marked = [name for name in wanted.every_unregularised if is_about(results.plan, [name], score)]
    errors = (
        "Horizontal bars: ±1 standard error, for Vendi over prompts, else by a jackknife over prompts"
        if any(math.isfinite(of_arm.errors[FID]) for of_arm in by_arm.values())
        else "Horizontal bars: ±1 standard error over prompts, for Vendi alone"
    )
    images = sorted({of_arm.images for of_arm in by_arm.values()})
    return (
        f"Mean {short(score)} on each prompt set against diversity on “{where}” ({_span(images)} images of each arm), "
        f"by {short(extractor)} features, against the reference's images: Fréchet distance (FID where the features are "
        f"Inception's), recall with k = {wanted.neighbours}, SCD and LSCD; and the Vendi score within prompts, which "
        "needs no reference. FID, SCD and LSCD are squared distances, on square-root axes. The star is the best mean "
        "score at the reference's own diversity"
        + (f"; “unregularised” is {' and '.join(marked)}" if marked else "")
        + f". {_MARKS} {errors}. After Annealed Importance Guidance, {figures}."
        + substitutes(results.plan, list(dict.fromkeys([*sets, where])))
    )


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


# -- divergence -------------------------------------------------------------------------------------------------------


def divergence(results: Results) -> Iterator[Exhibit]:
    """The scores that models were aligned for against the path KL to the reference."""
    for score in aimed_at(results.plan):
        yield from _divergence(results, score)


def _divergence(results: Results, score: str) -> Iterator[Exhibit]:
    is_first = score == results.plan.scores[0]
    panels, rows = [], []
    for prompts in results.plan.prompts:
        points = {}
        for arm in distinct(results, prompts):
            if not is_about(results.plan, dict(arm.anchors), score):
                continue
            kl, kl_error = over_prompts(results.path_kl(arm, prompts))
            mean, error = results.mean(arm, prompts, score)
            if math.isfinite(kl) and math.isfinite(mean):
                points[arm] = ArmPoint(arm, kl, mean, kl_error, error)
        panel = panel_of(results, points, unit(short(score)), "path KL to the reference, nats", False, True, prompts)
        if panel is not None:
            panels.append(panel)
            rows += [
                _about(results, prompts, arm, score)
                | {"path KL, nats": point.x, "s.e. of path KL": point.dx, "non-dominated": _yes(arm in panel.front)}
                for arm, point in points.items()
            ]
    if panels:
        sets = [panel.title for panel in panels]
        yield Exhibit(
            "front-path-kl" if is_first else f"front-path-kl-{keys(results.plan.scores)[score]}",
            SECTION,
            f"{short(score)} against the divergence from the reference",
            (
                f"Mean {short(score)} against the KL divergence of the arm's sampling paths from the reference's, the "
                "sum over steps of the divergence of one step's Gaussian, averaged over the arm's own paths; an upper "
                "bound of the images' KL. Where aligning is a gentle tilt, the gain is in proportion to the square "
                "root of the KL, a straight line on this square-root axis. Interpolated weights, particles and "
                "optimised noise have no path KL of their own and are left out, as is whatever was sampled "
                f"deterministically. {_MARKS} Horizontal bars: ±1 standard error over prompts. After Annealed "
                "Importance Guidance, figure 3a, with realigned models beside those trained with KL regularisation, "
                "and the reward-divergence fronts that DeRaDiff's reviewers asked "
                "for." + substitutes(results.plan, sets)
            ),
            *table(rows),
            trade_offs([panels[start : start + 3] for start in range(0, len(panels), 3)]),
        )


# -- attributes against λ ---------------------------------------------------------------------------------------------


def returning(results: Results) -> Iterator[Exhibit]:
    """How each score comes back to the reference's as λ falls, for anchors with two λ or more between the two."""
    panels: dict[str, dict[str, list[Strip]]] = {}
    rows = []
    for prompts in results.plan.prompts:
        for score in results.plan.scores:
            for anchor, arms in strips(results, prompts).items():
                known = [
                    (lam, arm, moved)
                    for lam, arm in arms
                    if (moved := change(results, results.by_prompt(arm, prompts, score), prompts, score)) is not None
                ]
                if sum(0 < lam < 1 for lam, *_ in known) < 2:
                    continue
                whole = next((moved.value for lam, _, moved in known if lam == 1), math.nan)
                label = model_label(results.plan, anchor)
                strip = Strip(label, [lam for lam, *_ in known], [moved for *_, moved in known])
                panels.setdefault(prompts, {}).setdefault(short(score), []).append(strip)
                rows += [
                    {"prompts": prompts, "score": score, "anchor": anchor, "λ": lam, "arm": arm.name}
                    | dict(zip(("mean", "s.e. of mean"), results.mean(arm, prompts, score), strict=True))
                    | moved.cells
                    | {"share of the anchor's difference": moved.value / whole if whole else math.nan}
                    for lam, arm, moved in known
                ]
    if rows:
        yield Exhibit(
            "attributes-by-lambda",
            SECTION,
            "How attributes come back as λ falls",
            (
                "Every score of realigned models minus the reference's on the same prompts and seeds, against λ: 0 is "
                "the reference, 1 the anchor, beyond lies extrapolation. Mixing the reference in brings its attributes "
                "back, wanted ones and biases alike, as a reviewer of DeRaDiff remarked; the scores show at which λ "
                "each does. The last column of the numbers is what is left of the anchor's own change. Bars: 95% "
                "intervals by a paired bootstrap over prompts." + substitutes(results.plan, list(panels))
            ),
            *table(rows),
            attributes(panels),
        )


def strips(results: Results, prompts: str) -> dict[str, list[tuple[float, Arm]]]:
    """Every anchor with its arms by Algorithm 1 up to `FARTHEST`, by λ; the reference and the anchor included."""
    by_anchor: dict[str, dict[float, Arm]] = {}
    for arm in arms_on(results, prompts):
        if arm.method == "realign" and not arm.particles and arm.lam is not None and arm.lam <= FARTHEST:
            by_anchor.setdefault(arm.anchors[0][0], {})[arm.lam] = arm
    for anchor, arms in by_anchor.items():
        for lam, end in ((0.0, results.reference), (1.0, results.model(anchor))):
            if end is not None and end in arms_on(results, prompts):
                arms.setdefault(lam, end)
    return {anchor: sorted(arms.items(), key=lambda item: item[0]) for anchor, arms in by_anchor.items()}
