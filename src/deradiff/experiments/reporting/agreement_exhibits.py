"""How well realigned models agree with retrained ones: DeRaDiff's figures 4 to 6, 9 and 12 on, Tables 1, 2 and 6 to 17.

Every exhibit is of one family of models and one prompt set, and where it says so of one score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from deradiff.algorithm.estimates import Estimate
from deradiff.experiments.reporting import agreement_figures, agreement_statistics
from deradiff.experiments.reporting.agreement_pairs import Study, studies
from deradiff.experiments.reporting.agreement_rows import BARS, exhibit, images, names, numbers
from deradiff.experiments.reporting.agreement_statistics import PARTS, Numbers
from deradiff.experiments.reporting.agreement_summaries import (
    particles,
    table_1,
    table_2,
    verdict_counts,
    verdict_errors,
)
from deradiff.experiments.reporting.agreement_verdicts import Judged, judged
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results


def exhibits(results: Results) -> Iterator[Exhibit]:
    """All exhibits that the results have pairs for: summaries, then score by score.

    One that cannot be made raises from `next`, which goes on with the others when it is asked again.
    """
    plain, beside = _grouped(studies(results)), _grouped(studies(results, particles=True))
    parts: list[partial[Any]] = []
    for members in plain.values():
        claims = cache(partial(_all_judged, results, members))
        parts += [partial(table_1, results, members), partial(table_2, results, members)]
        parts += [partial(verdict_counts, results, members, claims), partial(verdict_errors, results, members, claims)]
    for group, members in beside.items():
        parts.append(partial(particles, results, members, plain.get(group, [])))
    every = [study for members in plain.values() for study in members]
    for study in sorted(every, key=lambda study: results.plan.scores.index(study.score)):
        also = [other for other in beside.get(_group(study), []) if other.score == study.score]
        known = cache(partial(_parts, study))
        parts += [partial(heat_maps, results, study), partial(lines, results, study, next(iter(also), None))]
        parts += [partial(make, results, study, known) for make in (statistics, distribution, scatter, bland_altman)]
    return filter(None, map(_made, parts))


def _all_judged(results: Results, studies: Sequence[Study]) -> list[Judged]:
    return [claim for study in studies for claim in judged(results, study)]


def _parts(study: Study) -> dict[bool, Numbers]:
    return {part: agreement_statistics.numbers(study, part) for part in PARTS}


Known = Callable[[], dict[bool, Numbers]]
"""The statistics of both parts of a study, computed when they are first asked for."""


def _group(study: Study) -> tuple[str, str]:
    return study.family, study.prompts


def _grouped(every: Iterator[Study]) -> dict[tuple[str, str], list[Study]]:
    """The studies of each family and prompt set: one for every score."""
    groups: dict[tuple[str, str], list[Study]] = {}
    for study in every:
        groups.setdefault(_group(study), []).append(study)
    return groups


def _made(part: partial[Any]) -> Exhibit | None:
    """The exhibit; whatever it raises says which it was to be."""
    try:
        made: Exhibit | None = part()
    except Exception as error:
        about = part.args[1]
        study = about[0] if isinstance(about, list) else about
        error.add_note(f"{part.func.__name__}: {study.family}, prompts {study.prompts}, {study.score}")
        raise
    return made


# -- score by score ---------------------------------------------------------------------------------------------------


def heat_maps(results: Results, study: Study) -> Exhibit:
    """Figures 12 and 13, and their like in A.9 to A.11: every anchor for every target."""
    rows = [
        names(pair)
        | {"anchor_beta": study.betas[pair.models.anchor], "target_beta": study.betas[pair.models.target]}
        | numbers(pair)
        | images(pair)
        | {"difference_percent": pair.percent}
        for pair in study.pairs
    ]
    short = sum(pair.images < pair.planned for pair in study.pairs)
    caption = (
        f"Mean {study.score} score of each anchor (row) that stands for each target (column), retrained models in the "
        "row below, and at the right the approximated minus the retrained mean (DeRaDiff, figures 12, 13 and their "
        "like in A.9 to A.11). Above and to the right of the orange line λ ≤ 1, below it λ > 1; in dashed frames the "
        "anchor itself. Bold: the difference's 95% interval (paired bootstrap over prompts) leaves out 0. Standard "
        "errors are in the CSV file."
    )
    if short:
        caption += f" {short} of {len(study.pairs)} cells lack images and give the number n that they have."
    figure = agreement_figures.heat_maps(study)
    return exhibit(results, "heat", study, "Every anchor for every target", caption, rows, figure)


def lines(results: Results, study: Study, particles: Study | None) -> Exhibit:
    """Figures 5 and 9: reward against β of retrained and approximated models."""
    rows = [
        names(pair) | {"method": label, "target_beta": study.betas[pair.models.target]} | numbers(pair)
        for label, some in (("Algorithm 1", study), ("particles", particles))
        for pair in (some.pairs if some is not None else ())
    ]
    means = [
        {"target": name, "method": "retrained", "target_beta": study.betas[name]} | _mean(estimate)
        for name, estimate in study.retrained.items()
    ]
    if study.reference is not None:
        means.append({"method": "reference", "lambda": 0.0} | _mean(study.reference))
    caption = (
        f"Mean {study.score} score against the target's β, retrained and approximated from one anchor a panel "
        f"(DeRaDiff, figures 5 and 9). Bars are {BARS}: one that does not reach the retrained model is a difference "
        "which these prompts do not explain. The band is ± 1 standard error of the retrained mean over prompts, which "
        "all models share. Shaded: λ > 1. In the CSV file the standard error is that of the difference, of retrained "
        "models and the reference that of their mean."
    )
    figure = agreement_figures.lines(study, particles)
    absent = dict.fromkeys(rows[0])
    return exhibit(
        results, "lines", study, "Score against β", caption, [*(absent | mean for mean in means), *rows], figure
    )


def _mean(estimate: Estimate) -> dict[str, Any]:
    return {"retrained": estimate.value, "standard_error": estimate.error}


def statistics(results: Results, study: Study, known: Known) -> Exhibit | None:
    """Tables 6 to 17: all statistics of Table 5, at λ ≤ 1 and at λ > 1."""
    columns = {part: _statistics(study, part, numbers_of_part) for part, numbers_of_part in known().items()}
    lines = dict.fromkeys(line for column in columns.values() for line in column)
    if not lines:
        return None
    rows = [
        {"statistic": line}
        | {
            PARTS[part].label + suffix: value
            for part in PARTS
            for suffix, value in zip(("", ", % of mean"), columns[part].get(line, (None, None)), strict=True)
        }
        for line in lines
    ]
    caption = (
        f"Agreement of mean {study.score} scores, approximated minus retrained (y − x), after DeRaDiff's Table 5, as "
        f"in its Tables 6 to 17; per cent of the mean over retrained models, {study.original_mean:.6g}, each counted "
        "once. Anchors that stand for themselves are left out. Intervals of the MAE come from a bootstrap over pairs. "
        "What is said over prompts comes from a bootstrap over prompts, all models on the same resampled ones: the "
        "MAE's standard error, and the MAE that noise alone would make if every pair agreed. Of the linear fit "
        "(figure 6a) ± is one standard error."
    )
    return exhibit(results, "statistics", study, "Statistics of agreement", caption, rows)


def _statistics(study: Study, part: bool, known: Numbers) -> dict[str, tuple[Any, Any]]:
    """The lines of one part: by name a value, and per cent of the mean of retrained models."""
    agreement, noise, fit = known.agreement, study.noise(part), known.scatter
    if agreement is None:
        return {}
    scores = {
        "mean absolute error (MAE)": agreement.mae,
        "MAE, bootstrap mean over pairs": agreement.mae_bootstrap,
        "MAE, 95% interval over pairs, lower": agreement.mae_interval[0],
        "MAE, 95% interval over pairs, upper": agreement.mae_interval[1],
        "MAE, standard error over prompts": noise.error,
        "MAE of the noise of prompts alone": noise.floor,
        "root mean squared error": agreement.rmse,
        "median absolute error": agreement.median_absolute_error,
        "Bland-Altman bias, mean of y − x": agreement.bias,
        "Bland-Altman SD of differences": agreement.sd,
        "limit of agreement, lower": agreement.limits[0],
        "limit of agreement, upper": agreement.limits[1],
    }
    others = (
        {}
        if fit is None
        else {
            "linear fit, slope": fit.slope.value,
            "linear fit, slope, ±": fit.slope.error,
            "linear fit, intercept": fit.intercept.value,
            "linear fit, intercept, ±": fit.intercept.error,
            "Pearson's correlation": fit.correlation,
            "Lin's concordance": fit.concordance,
            "R² of the identity": fit.identity_r2,
        }
    )
    relative = {name: (value, study.relative(value)) for name, value in scores.items()}
    return {"pairs": (agreement.pairs, None), **relative, **{name: (value, None) for name, value in others.items()}}


def distribution(results: Results, study: Study, known: Known) -> Exhibit | None:
    """Figure 4: the distribution of absolute errors."""
    rows: list[tuple[Any, ...]] = []
    for part, statistics_of_part in known().items():
        if statistics_of_part.errors is not None:
            label, errors = PARTS[part].label, statistics_of_part.errors
            rows += [(label, name, None, value) for name, value in agreement_statistics.inset_rows(study, errors)]
            steps = zip(errors.errors, errors.shares, strict=True)
            rows += [(label, "share of pairs with at most this error", error, share) for error, share in steps]
    if not rows:
        return None
    scale = (
        "The thresholds are the paper's."
        if agreement_statistics.is_cosine(study.score)
        else "This score is no cosine: the thresholds have the size, beside the standard deviation (SD) of the "
        "retrained means, that the paper's 5e-4 and 1e-3 have beside its own, 0.35 and 0.70 SD."
    )
    caption = (
        f"Share of pairs whose mean {study.score} score is off from the retrained model's by at most so much "
        f"(DeRaDiff, figure 4), and the numbers of its inset. {scale} Dotted: what the noise of these prompts alone "
        "would make at λ ≤ 1 if every pair agreed (bootstrap over prompts); errors well to the right of it are not "
        "explained by noise."
    )
    named = [dict(zip(("part", "number", "error", "value"), row, strict=True)) for row in rows]
    figure = agreement_statistics.distribution(study, known())
    return exhibit(results, "errors", study, "Distribution of absolute errors", caption, named, figure)


def scatter(results: Results, study: Study, known: Known) -> Exhibit | None:
    """Figure 6a: retrained means against approximations."""
    rows = _points(study)
    if len(rows) < 2:
        return None
    caption = (
        f"Retrained against approximated mean {study.score} score, a point for each anchor and target, with the "
        "identity and the least-squares fit (DeRaDiff, figure 6a; slope ± one standard error, Pearson's r). Colour: "
        f"doublings of β from anchor to target. Bars are {BARS}: a pair whose bar crosses the identity may agree."
    )
    figure = agreement_statistics.scatter(study, known())
    return exhibit(results, "scatter", study, "Retrained against approximated", caption, rows, figure)


def bland_altman(results: Results, study: Study, known: Known) -> Exhibit | None:
    """Figure 6b: differences against means."""
    rows = _points(study)
    if len(rows) < 2:
        return None
    caption = (
        f"Bland-Altman plot of mean {study.score} scores (DeRaDiff, figure 6b): differences against the averages of "
        "approximated and retrained mean, their bias, and the limits of agreement at 1.96 standard deviations (SD), "
        f"the band between them shaded. Colour: doublings of β from anchor to target. Bars are {BARS}; the pairs "
        "farthest off are named by their β."
    )
    figure = agreement_statistics.bland_altman(study, known())
    return exhibit(results, "bland-altman", study, "Bland-Altman plot", caption, rows, figure)


def _points(study: Study) -> list[dict[str, Any]]:
    return [
        names(pair)
        | {"part": PARTS[part].label, "log2_beta_ratio": agreement_statistics.doublings(study, pair)}
        | numbers(pair)
        | {"average": pair.average}
        for part in PARTS
        for pair in study.part(part)
    ]
