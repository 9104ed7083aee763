"""How far can a realigned run be trusted? Weighted means beside plain ones, effective sample sizes, and a verdict.

Algorithm 1's samples are off from the retrained model's by a weight that is known (`path_weights`). Two numbers have
to be read together. The *effective sample size* says whether the weighted mean can be believed; the *bias*, weighted
minus plain mean, says how far off Algorithm 1 is, for that score. Even weights alone prove nothing: in a plane with
four modes 89% of the samples were effective while the plain mean was off by a third (`studies.closed_forms`).

Weights compare images of one prompt with one another, never those of different prompts: every prompt has a normaliser
of its own. So everything here takes `groups`, the prompt of each image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.characters import MEANINGS, Character, covers
from deradiff.algorithm.comparisons import ENOUGH, EVEN, Comparison, compare
from deradiff.algorithm.estimates import Estimate, covariance, mean
from deradiff.algorithm.guided_weights import left_out
from deradiff.algorithm.pair_terms import LAMS
from deradiff.algorithm.path_weights import ImportanceWeights, Obstacle

TRUSTED = 0.02
"""A run is called trustworthy where its error is below this share of the whole shift, two standard errors included."""

GUIDED_TRUSTED = 0.03
"""As `TRUSTED`, under guidance, with the margin for what the weights leave out (`margin`) included."""

MOST_LEFT_OUT = 0.2
"""The largest bound of what guided weights leave out (`left_out`), as a share of the shift, at which a verdict says
something. Chosen on the first cases of `studies.closed_forms.guidance`, judged on the others."""

OBSTACLES: dict[Obstacle, str] = {
    "guidance": "guided predictions are no model's own, so no retrained model is the target (guidance scale 1 has one)",
    "annealing": "λ changes along the run, and an annealed λ has no retrained model as its target",
    "partial": "the run starts inside the schedule, from an image: what that image held is not resampled",
    "renoising": "this scheduler's stochastic step noises its estimate anew each time and is no discretised diffusion; "
    "FlowMatchSDEScheduler is one",
    "unknown noise": "this scheduler does not tell its signal-to-noise ratio",
    "several schedulers": "several schedulers step parts of each sample, and only one part is weighed",
    "reuse": "some predictions were estimated from earlier steps (reuse), and with them the weights",
}


TRUSTING = ("exact", "trust", "plain")
"""The kinds of verdict that tell a person to believe the plain mean."""


# -- the verdict ------------------------------------------------------------------------------------------------------

Kind = Literal["exact", "trust", "plain", "off", "depends", "unclear", "uneven", "few", "no target"]


@dataclass(frozen=True)
class Verdict:
    """How far a realigned run can be trusted, for one score at one λ.

    `kind` is "exact" (one model alone), "trust", "plain" (samples of a stepwise anchor, without weights), "off" (use
    the weighted mean), "depends" (on the score; none is given), "unclear" (more images would tell), "uneven" (use
    particles), "few" (images per prompt) or "no target". `error` is the bias as a share of the shift from the
    reference, None where that shift is not known. `target` is the model that the verdict compares with, in words.
    """

    kind: Kind
    words: str
    score: str
    comparison: Comparison
    error: Estimate | None
    path_kl: Estimate | None
    target: str = ""

    def __str__(self) -> str:
        return self.words

    def record(self) -> dict[str, Any]:
        """The verdict and its numbers as JSON; estimates as `[value, error]`, None for what is not known."""
        compared = self.comparison
        numbers = {
            "plain": compared.plain,
            "weighted": compared.weighted,
            "bias": compared.bias,
            "smoothed": compared.smoothed,
            "error": self.error,
            "path_kl": self.path_kl,
        }
        plain = {"covariance": compared.covariance, "skewed": compared.skewed, "effective": compared.effective}
        plain |= {"tail": compared.tail, "tail_limit": compared.tail_limit}
        return (
            {"kind": self.kind, "words": self.words, "score": self.score, "target": self.target}
            | {"images": compared.images, "prompts": compared.prompts}
            | {name: None if x is None else [_finite(x.value), _finite(x.error)] for name, x in numbers.items()}
            | {name: _finite(x) for name, x in plain.items()}
        )


def _finite(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None


def verdict(
    run: ImportanceWeights,
    scores: Float[Tensor, " image"] | None = None,
    groups: Int[Tensor, " image"] | None = None,
    *,
    baseline: float | None = None,
    name: str = "score",
    character: Character | None = None,
) -> Verdict:
    """Judge a run at one λ.

    Args:
        run: `Dial.importance_weights`, or `ImportanceWeights.rows` of it where a batch holds several λ.
        scores: a score of every image. By default the exponent `Σ λ_i log p_i/p_0` of the paths, which is the anchors'
            implicit reward in units of β, or log W itself where the sampler is not memoryless.
        groups: the prompt of every image, as an index; all the same by default.
        baseline: the reference's own mean score (λ = 0, at the same guidance), from which the shift is counted. Without
            it, and without guidance, the shift is estimated by `Cov(score, Σ λ_i log p_i/p_0)`, its first-order value,
            where the sampler is memoryless.
        name: what the score is called in the words.
        character: what kind of anchor it is, where it was examined. Without, the verdict presumes a tilt, and says so.

    Raises:
        ValueError: the images have different λ, or a character is given for several anchors; see also `compare`.
    """
    lams = run.lams
    if character is not None and len(lams) != 1:
        raise ValueError(f"a character is one anchor's, and this run has {len(lams)}: leave it out")
    if not bool((lams == lams[:, :1]).all()):
        raise ValueError("the images of this run have different λ: judge run.rows(...) of one λ at a time")
    alone = sorted({0.0, *lams[:, 0].tolist()}) in ([0.0], [0.0, 1.0]) and float(lams[:, 0].sum()) <= 1
    guidance = run.guidance if run.obstacles == {"guidance"} else None
    log_weights, exponent = run.log_weights, _exponent(run)
    if guidance is not None:  # whose paths' densities are those of the guided predictions, which are no rewards
        log_weights, exponent = guidance.combined, None
    if scores is not None:
        given = name
    elif exponent is not None:
        scores, given = exponent, "implicit reward"
    else:
        scores, given = log_weights, "log W"
    comparison = compare(scores, log_weights, groups)
    spread = covariance(log_weights, log_weights, groups) ** 0.5
    shift = None
    if baseline is not None:
        shift = comparison.weighted.value - baseline
    elif exponent is not None and given != "log W":
        shift = covariance(scores, exponent, groups)
    error = None
    if shift:
        error = Estimate(comparison.bias.value / abs(shift), comparison.bias.error / abs(shift))
    path_kl = None if run.path_kl is None else mean(run.path_kl)
    kind: Kind
    if alone and "annealing" not in run.obstacles:
        kind, words = "exact", "exact: one model alone, nothing is mixed"
    elif guidance is not None and len(lams) == 1 and 0 < float(lams[0, 0]) < 1:
        deviation = covariance(scores, scores, groups) ** 0.5
        unknown = left_out(guidance, groups) * (1.0 if given == "log W" else deviation / abs(shift or math.nan))
        kind, words = _judged_guided(comparison, error, given, spread, guidance.scale, unknown)
    elif run.obstacles:
        kind, words = "no target", _without_target(run.obstacles, spread)
    else:
        kind, words = _judged(comparison, error, given, spread)
    if kind != "exact":
        kind, words = _for_character(character, kind, words, run)
    return Verdict(kind, words, given, comparison, error, path_kl, _target(character, kind))


def _for_character(character: Character | None, kind: Kind, words: str, run: ImportanceWeights) -> tuple[Kind, str]:
    """What a verdict that presumes a tilt comes to for an anchor of this character."""
    if character is None:
        if kind == "off":
            words += ", if the anchor is the optimum of its alignment (deradiff examine)"
        return kind, words
    if character.kind == "tilt" or (character.kind == "unknown" and kind == "trust"):
        return kind, words
    if character.kind == "unknown":
        return "no target", "no claim: what kind of anchor it is did not show when it was examined"
    if character.kind == "neither":
        return "no target", f"no claim: the anchor is {MEANINGS['neither']}"
    if run.obstacles & {"annealing", "reuse"}:
        return kind, words
    if not covers(float(run.lams[0, 0])):
        return (
            "no target",
            f"no claim: the anchor is stepwise between λ = {min(LAMS):g} and 1, and was not tested beyond",
        )
    return "plain", "plain samples: take the images as they are; the anchor is stepwise, and mixing is retraining"


def _target(character: Character | None, kind: Kind) -> str:
    """The model that a verdict compares with."""
    if kind == "exact":
        return "the model itself"
    if kind == "no target":
        return "none"
    if kind == "plain":
        return "the model retrained at β/λ, which mixing predictions is"
    presumed = "" if character is not None and character.kind == "tilt" else ", if the anchor is the optimum of its own"
    return f"the optimum of alignment at β/λ{presumed}"


def _without_target(obstacles: frozenset[Obstacle], spread: float) -> str:
    reasons = "; ".join(OBSTACLES[obstacle] for obstacle in sorted(obstacles))
    drops = f". As a diagnostic, log W varies by {spread:.2g} within a prompt" if math.isfinite(spread) else ""
    return f"no exact target: {reasons}{drops}"


def _judged(comparison: Comparison, error: Estimate | None, given: str, spread: float) -> tuple[Kind, str]:
    """What the numbers of a run with a target say, of the score called `given`; `spread` is that of log W."""
    if (poor := _too_poor(comparison, given, "use particles")) is not None:
        return poor
    if given == "log W":
        if spread <= TRUSTED:
            return "trust", f"trust: no score is off by more than {spread:.1%} of its standard deviation"
        return "depends", f"depends on the score: off by up to {spread:.2g} of its standard deviations"
    if error is None:
        return "depends", f"{given} is off by {comparison.bias}; its shift from the reference is not known"
    if abs(error.value) + 2 * error.error <= TRUSTED:
        return "trust", f"trust: {given} is off by {abs(error.value):.1%} of its shift or less"
    if abs(error.value) > 2 * error.error:
        return "off", f"{given} is off by about {abs(error.value):.0%} of its shift, use the weighted mean"
    share = f"{abs(error.value):.0%} ± {error.error:.0%}"
    return "unclear", f"off by {share} of the shift of the {given}: more images would tell"


def _judged_guided(
    comparison: Comparison, error: Estimate | None, given: str, spread: float, scale: float, unknown: float
) -> tuple[Kind, str]:
    """As `_judged`, under guidance of this `scale`: the target is the retrained model sampled with the same.

    `unknown` bounds what the weights leave out: a share of the shift, or of log W in standard deviations of any score.
    """
    if (poor := _too_poor(comparison, given, "use particles")) is not None:
        return poor
    same = f"the retrained model at guidance {scale:.3g}"
    if given == "log W":
        whole = spread + unknown
        if whole <= TRUSTED:
            return "trust", f"trust: against {same} no score is off by more than {whole:.1%} of its standard deviation"
        return "depends", f"depends on the score: against {same} off by up to {whole:.2g} of its standard deviations"
    if error is None:
        return "depends", f"against {same} {given} is off by {comparison.bias}; its whole shift is not known"
    off, within = abs(error.value), 2 * error.error + margin(unknown)
    words = {
        "trust": f"trust: against {same} {given} is off by {off + within:.1%} of its shift or less",
        "off": f"against {same} {given} is off by {off:.0%} ± {within:.0%} of its shift, use the weighted mean",
        "unclear": f"against {same} {given} is off by {off:.0%} ± {within:.0%} of its shift",
        "no target": f"no claim: at guidance {scale:.3g} the weights may leave out up to {unknown:.0%} of the shift "
        f"of the {given}, and {MOST_LEFT_OUT:.0%} is the most at which their error was measured to be small",
    }
    kind = guided_kind(error, unknown)
    return kind, words[kind]


def guided_kind(error: Estimate, unknown: float) -> Kind:
    """The verdict on a guided run, from the `error` that its weights tell and the bound on what they leave out.

    Both as shares of the shift; `unknown` is `guided_weights.left_out` times the score's deviation, by the shift.
    """
    off, within = abs(error.value), 2 * error.error + margin(unknown)
    if not unknown <= MOST_LEFT_OUT:
        return "no target"
    if off + within <= GUIDED_TRUSTED:
        return "trust"
    return "off" if off > within else "unclear"


def margin(unknown: float) -> float:
    """By how much of the shift a guided weighted mean is taken to be off, of the bound on what it leaves out.

    A quarter of the bound, which supposes that what is left out and the score go together wholly, and one percent.
    """
    return unknown / 4 + 0.01


def _too_poor(comparison: Comparison, given: str, cure: str) -> tuple[Kind, str] | None:
    """Why a weighted mean of the score called `given` cannot be believed: too few images, or too few effective ones."""
    if comparison.images < ENOUGH * comparison.prompts:
        each = comparison.images / comparison.prompts
        return "few", f"cannot tell: {each:.3g} image{'s' * (each != 1)} of a prompt, {ENOUGH:g} at least are needed"
    if comparison.evenness < EVEN or comparison.effective / comparison.prompts < ENOUGH:
        effective = f"{comparison.effective:.3g} of {comparison.images} effective"
        if comparison.tail > comparison.tail_limit:
            effective += f", k̂ = {comparison.tail:.2f} where {comparison.tail_limit:.2f} is the most"
        words = f"cannot tell: weights too uneven ({effective}), {cure}"
        raised = comparison.covariance - comparison.plain.value
        if given != "log W" and raised:
            words += f"; as a direction, weights would {'raise' if raised > 0 else 'lower'} the {given}"
        return "uneven", words
    return None


# -- helpers ----------------------------------------------------------------------------------------------------------


def _exponent(run: ImportanceWeights) -> Tensor | None:
    """`Σ λ_i log p_i/p_0` of every path, None where the sampler is not memoryless."""
    if not run.memoryless or not run.log_ratios:
        return None
    return sum((row.to(ratio) * ratio for row, ratio in zip(run.lams, run.log_ratios.values(), strict=True)), 0)
