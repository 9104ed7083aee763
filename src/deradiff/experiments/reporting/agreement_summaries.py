"""Agreement over all scores: DeRaDiff's Tables 1 and 2, particles beside Algorithm 1, verdicts beside the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deradiff.algorithm.verdict import TRUSTED
from deradiff.experiments.reporting import agreement_figures, agreement_statistics
from deradiff.experiments.reporting.agreement_pairs import Study
from deradiff.experiments.reporting.agreement_rows import BARS, exhibit, images, names, numbers
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
            noise = study.noise(True)
            rows.append(
                {
                    "score": study.score,
                    "pairs": len(part),
                    "MAE": mae,
                    "MAE, % of μ": study.relative(mae),
                    "s.e. of the MAE over prompts": noise.error,
                    "MAE of noise alone": noise.floor,
                    "MAE / SD": mae / study.original_sd if study.original_sd else float("nan"),
                    "μ": study.original_mean,
                    "SD": study.original_sd,
                }
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
    return exhibit(results, "table-1", studies, "Approximation errors at λ in [0, 1]", caption, rows)


def table_2(results: Results, studies: Sequence[Study]) -> Exhibit:
    """Table 2: retrained and approximated means side by side, for the middle anchor."""
    first = studies[0]
    anchor, targets = middle(first), first.targets
    means = {"retrained": "retrained", "approximated": "approximated", "absolute difference, %": "percent"}
    rows = [
        {"score": study.score, "mean": mean}
        | {first.inline(target): getattr(study.at(anchor, target), value, None) for target in targets}
        for study in studies
        for mean, value in means.items()
    ]
    caption = (
        f"Mean scores of the retrained models and of their approximations from {first.inline(anchor)}, the middle one "
        "of the anchors by β, and the absolute difference in per cent of the retrained mean (DeRaDiff, Table 2). The "
        "same of all other anchors is in the heat maps' CSV files."
    )
    return exhibit(results, "table-2", studies, "One anchor for every target", caption, rows)


def middle(study: Study) -> str:
    """The anchor in the middle by β, of those that stand for most targets: DeRaDiff's Table 2 has the third of six."""
    reach = {anchor: sum(pair.models.anchor == anchor for pair in study.pairs) for anchor in study.anchors}
    widest = [anchor for anchor in study.anchors if reach[anchor] == max(reach.values())]
    return widest[(len(widest) - 1) // 2]


def particles(results: Results, studies: Sequence[Study], plain: Sequence[Study]) -> Exhibit:
    """Particles beside Algorithm 1 and the retrained model; `plain` are Algorithm 1's studies of the same scores."""
    by_score = {study.score: study for study in plain}
    rows: list[dict[str, Any]] = []
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
                    about = names(shown) | {"method": name, "score": study.score} | numbers(shown) | images(shown)
                    rows.append(about | dict(zip(("effective_particles", "collapsed"), extra, strict=True)))
    caption = (
        "Difference of Algorithm 1's and of particles' mean score to the retrained model's, which is the line at 0; "
        f"bars are {BARS}. Particles remove what Algorithm 1 leaves out of the target where models are exact; where "
        "they are learned, as by Diffusion-DPO, they may overshoot. Follows no figure of the papers."
    )
    figure = agreement_figures.particles_beside([(study, by_score.get(study.score)) for study in studies])
    return exhibit(results, "particles", studies, "Particles beside Algorithm 1", caption, rows, figure)


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
    rows = [dict(zip(header, row, strict=True)) for row in counts(claims())]
    return exhibit(results, "verdicts", studies, "How often verdicts were right", caption, rows)


def verdict_errors(results: Results, studies: Sequence[Study], claims: Callable[[], list[Judged]]) -> Exhibit | None:
    """Every verdict beside its true error; drawn where both are known."""
    rows = [
        names(claim.pair)
        | {
            "score": claim.score,
            "λ": claim.pair.models.lam,
            "verdict": claim.kind,
            "which is": claim.judgement,
            "estimated error, %": claim.estimated and 100 * claim.estimated.value,
            "estimate's ±": claim.estimated and 100 * claim.estimated.error,
            "true error, %": claim.true and 100 * claim.true.value,
            "true error's ±": claim.true and 100 * claim.true.error,
            "weighted mean's error, %": None if claim.weighted is None else 100 * claim.weighted,
            "ESS/n": claim.evenness,
            "in words": claim.sentence,
        }
        for claim in claims()
    ]
    if not rows:
        return None
    known = [claim for claim in claims() if claim.estimated is not None and claim.true is not None]
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
    figure = agreement_statistics.verdicts(known) if known else None
    return exhibit(results, "verdict-errors", studies, "The verdict against the true error", caption, rows, figure)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
