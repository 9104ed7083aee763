"""The mean at another λ, and its derivative in λ, from the samples of one run."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.comparisons import ENOUGH, EVEN, compare
from deradiff.algorithm.estimates import Estimate, normalized, rows_of_groups
from deradiff.algorithm.path_weights import ImportanceWeights


@dataclass(frozen=True)
class Elsewhere:
    """A mean at another λ than the run's, estimated from the run: `effective` of its `images` carry it."""

    mean: Estimate
    effective: float
    images: int


def at_other_lam(
    run: ImportanceWeights,
    scores: Float[Tensor, " image"],
    lam: float | int | dict[str, float],
    groups: Int[Tensor, " image"] | None = None,
) -> Elsewhere:
    """The retrained model's mean score at λ', from samples drawn at λ, by importance weights.

    A path drawn at λ has the weight `W exp(Σ (λ'_i - λ_i) log p_i/p_0)` at λ'.

    Raises:
        ValueError: the sampler is not memoryless, so that the path ratios are no function of the image; λ' is not given
            for exactly the anchors; or so few images are effective at λ' that the estimate would be noise.
    """
    if not run.memoryless or not run.log_ratios:
        raise ValueError(
            "other λ can be estimated from a memoryless run alone (DDPM, Euler ancestral, DDIM at η = 1) in which "
            "every model was evaluated at every step (λ neither 0 nor 1)"
        )
    names = list(run.log_ratios)
    wanted = lam if isinstance(lam, dict) else dict.fromkeys(names, float(lam))
    if set(wanted) != set(names) or (len(names) > 1 and not isinstance(lam, dict)):
        raise ValueError(f"λ must be given for exactly the anchors {names}, got {lam!r}")
    log_weights = run.log_weights
    for row, (anchor, ratio) in zip(run.lams, run.log_ratios.items(), strict=True):
        log_weights = log_weights + (wanted[anchor] - row.to(ratio)) * ratio
    comparison = compare(scores, log_weights, groups)
    if comparison.evenness < EVEN / 2 or comparison.effective < ENOUGH * comparison.prompts:
        raise ValueError(
            f"λ = {lam} is too far from the run's own: {comparison.effective:.3g} of {comparison.images} images would "
            f"carry the estimate. Choose a nearer λ, draw more images, or run it"
        )
    return Elsewhere(comparison.weighted, comparison.effective, comparison.images)


def slope(
    run: ImportanceWeights, scores: Float[Tensor, " image"], groups: Int[Tensor, " image"] | None = None
) -> dict[str, Estimate]:
    """The derivative of the retrained model's mean score in each λ: `Cov_W(score, log p_i/p_0)`.

    Raises `ValueError` as `at_other_lam` does.
    """
    if not run.memoryless or not run.log_ratios:
        raise ValueError("the derivative in λ needs a memoryless run with every model evaluated, like `at_other_lam`")
    weights, f = normalized(run.log_weights.cpu(), groups), scores.double().cpu()
    slopes = {}
    for anchor, ratio in run.log_ratios.items():
        value = variance = 0.0
        for index in rows_of_groups(groups, len(f)):
            w, n, share = weights[index], len(index), len(index) / len(f)
            product = (f[index] - w @ f[index]) * (ratio.cpu()[index] - w @ ratio.cpu()[index])
            inside = w @ product
            value += share * float(inside) * n / max(n - 1, 1)
            variance += share**2 * float((n * w * (product - inside)).square().sum() / (n * max(n - 1, 1)))
        slopes[anchor] = Estimate(value, variance**0.5)
    return slopes
