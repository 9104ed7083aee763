"""Agreement over all scores: DeRaDiff's Tables 1 and 2, particles beside Algorithm 1, verdicts beside the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deradiff.algorithm.verdict import TRUSTED
from deradiff.experiments.reporting import agreement_figures, agreement_statistics
from deradiff.experiments.reporting.agreement_pairs import Study
from deradiff.experiments.reporting.agreement_rows import (
    BARS,
    COUNTS,
    NUMBERS,
    exhibit,
    images,
    names,
    numbers,
    percent,
)
from deradiff.experiments.reporting.agreement_verdicts import Judged, counts
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results


def table_1(results: Results, studies: Sequence[Study]) -> Exhibit | None:
    """Table 1: mean absolute errors at λ in [0, 1], of every score."""
    rows = []
    for study in studies:
        part = study.part(True)
        if part:
            mae = sum(abs(pair.difference.value) for pair in part) / len(part)
            noise, in_sd = study.noise(True), mae / study.original_sd if study.original_sd else float("nan")
            rows.append(
                (
                    study.score,
                    len(part),
                    mae,
                    study.relative(mae),
                    noise.error,
                    noise.floor,
                    in_sd,
                    study.original_mean,
                    study.original_sd,
                )
            )
    if not rows:
        return None
    caption = (
        "Mean absolute error (MAE) between the mean scores of DeRaDiff's approximations and of the retrained models at "
        "λ in [0, 1], anchors that stand for themselves left out; μ is the mean over the retrained models, SD their "
        "standard deviation (DeRaDiff, Table 1). Not in the paper: the MAE's standard error over prompts (bootstrap, "
        "all models on the same resampled prompts), and the MAE that the noise of these prompts alone would make if "
        "every approximation agreed with its retrained model."
    )
    header = (
        "score",
        "pairs",
        "MAE",
        "MAE, % of μ",
        "s.e. of the MAE over prompts",
        "MAE of noise alone",
        "MAE / SD",
        "μ",
        "SD",
    )
    return exhibit(results, "table-1", studies[0], "Approximation errors at λ in [0, 1]", caption, header, rows)


def table_2(results: Results, studies: Sequence[Study]) -> Exhibit:
    """Table 2: retrained and approximated means side by side, for the middle anchor."""
    first = studies[0]
    anchor, targets = middle(first), first.targets
    rows: list[tuple[Any, ...]] = []
    for study in studies:
        cells = [study.at(anchor, target) for target in targets]
        rows += [
            (study.score, "retrained", *(None if pair is None else pair.retrained for pair in cells)),
            (study.score, "approximated", *(None if pair is None else pair.approximated for pair in cells)),
            (
                study.score,
                "absolute difference, %",
                *(None if pair is None else pair.percent for pair in cells),
            ),
        ]
    caption = (
        f"Mean scores of the retrained models and of their approximations from {first.inline(anchor)}, the middle one "
        "of the anchors by β, and the absolute difference in per cent of the retrained mean (DeRaDiff, Table 2). The "
        "same of all other anchors is in the heat maps' CSV files."
    )
    header = ("score", "mean", *map(first.inline, targets))
    return exhibit(results, "table-2", first, "One anchor for every target", caption, header, rows)


def middle(study: Study) -> str:
    """The anchor in the middle by β, of those that stand for most targets: DeRaDiff's Table 2 has the third of six."""
    reach = {anchor: sum(pair.models.anchor == anchor for pair in study.pairs) for anchor in study.anchors}
    widest = [anchor for anchor in study.anchors if reach[anchor] == max(reach.values())]
    return widest[(len(widest) - 1) // 2]


def particles(results: Results, studies: Sequence[Study], plain: Sequence[Study]) -> Exhibit:
    """Particles beside Algorithm 1 and the retrained model; `plain` are Algorithm 1's studies of the same scores."""
    by_score = {study.score: study for study in plain}
    rows: list[tuple[Any, ...]] = []
    for study in studies:
        other = by_score.get(study.score)
        for pair in study.pairs:
            diagnostics = results.diagnostics(pair.models.approximated, study.prompts)
            effective = [item["effective"] for item in diagnostics if item.get("effective") is not None]
            collapsed = [item["collapsed"] for item in diagnostics if item.get("collapsed") is not None]
            drawn = f"{pair.models.approximated.particles} particles", pair, (_mean(effective), _mean(collapsed))
            same = other.at(pair.models.anchor, pair.models.target) if other is not None else None
            for name, shown, extra in (("Algorithm 1", same, (None, None)), drawn):
                if shown is not None:
                    rows.append((*names(shown), name, study.score, *numbers(shown), *images(shown), *extra))
    caption = (
        "Difference of Algorithm 1's and of particles' mean score to the retrained model's, which is the line at 0; "
        f"bars are {BARS}. Particles remove what Algorithm 1 leaves out of the target where models are exact; where "
        "they are learned, as by Diffusion-DPO, they may overshoot. Follows no figure of the papers."
    )
    header = ("anchor", "target", "method", "score", *NUMBERS, *COUNTS, "effective_particles", "collapsed")
    return exhibit(
        results,
        "particles",
        studies[0],
        "Particles beside Algorithm 1",
        caption,
        header,
        rows,
        figure=agreement_figures.particles_beside([(study, by_score.get(study.score)) for study in studies]),
    )


def verdict_counts(results: Results, studies: Sequence[Study], claims: Callable[[], list[Judged]]) -> Exhibit | None:
    """How often the verdicts were right, by score and kind."""
    if not claims():
        return None
    caption = (
        "How often the verdicts were right that weights give before anything is retrained. Shares are of the shift "
        "from the reference to the retrained model. Exact or trust: right where the true error is within "
        f"{TRUSTED:.0%} after two standard errors, else a miss. Off: right where Algorithm 1 is off beyond two "
        "standard errors and the weighted mean is nearer, else a false alarm. All others claim nothing, and are open."
    )
    header = ("score", "verdict", "approximations", "right", "false alarms", "misses", "open")
    return exhibit(results, "verdicts", studies[0], "How often verdicts were right", caption, header, counts(claims()))


def verdict_errors(results: Results, studies: Sequence[Study], claims: Callable[[], list[Judged]]) -> Exhibit | None:
    """Every verdict beside its true error; drawn where both are known."""
    rows = [
        (
            *names(claim.pair),
            claim.score,
            claim.pair.models.lam,
            claim.kind,
            claim.judgement,
            *percent(claim.estimated),
            *percent(claim.true),
            None if claim.weighted is None else 100 * claim.weighted,
            claim.evenness,
            claim.sentence,
        )
        for claim in claims()
    ]
    if not rows:
        return None
    known: dict[str, list[Judged]] = {}
    for claim in claims():
        if claim.estimated is not None and claim.true is not None:
            known.setdefault(claim.score, []).append(claim)
    caption = (
        "Errors of Algorithm 1's mean in per cent of the shift from the reference to the retrained model: as the "
        "verdict estimated it from the weights, and as it is. In the table ± is one standard error, of the true error "
        "by a paired bootstrap over prompts; the weighted mean is of the same images; ESS/n is the share of effective "
        "images."
    )
    if known:
        caption += (
            " Dots on the diagonal are errors that the verdict estimated right; bars are 95% intervals of the true "
            f"error, the band is {TRUSTED:.0%} of the shift, and axes are linear within 10%, logarithmic beyond."
        )
    header = (
        "anchor",
        "target",
        "score",
        "λ",
        "verdict",
        "which is",
        "estimated error, %",
        "estimate's ±",
        "true error, %",
        "true error's ±",
        "weighted mean's error, %",
        "ESS/n",
        "in words",
    )
    return exhibit(
        results,
        "verdict-errors",
        studies[0],
        "The verdict against the true error",
        caption,
        header,
        rows,
        figure=agreement_statistics.verdicts(known) if known else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
