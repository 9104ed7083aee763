"""What weighting changes in the mean of a score: plain and weighted means, and how far the weights can be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, normalized, rows_of_groups
from deradiff.algorithm.pareto import smoothed

EVEN = 0.3
"""The least share of effective samples at which a weighted mean is believed (`studies.closed_forms` shows why)."""

ENOUGH = 8.0
"""Effective images per prompt below which a weighted mean is mostly the bias of dividing by few weights."""


@dataclass(frozen=True)
class Comparison:
    """What weighting changes in the mean of a score.

    `plain` is Algorithm 1's mean, `weighted` the retrained model's by the same samples, `bias` weighted minus plain
    with a standard error of its own (the two share their samples). `covariance` predicts the weighted mean at first
    order, `plain + Cov(score, log W)`, and `skewed` at second, with `½ κ₃(score, log W, log W)`: where exponentials are
    hopeless they still point in the right direction. All within prompts, averaged over images.

    `smoothed` is the weighted mean after Pareto smoothing of the largest weights, and `tail` the k̂ of their tail
    (see `pareto`): where it is above `tail_limit`, the weights may be worse than the effective sample size says.
    """

    plain: Estimate
    weighted: Estimate
    bias: Estimate
    smoothed: Estimate
    covariance: float
    skewed: float
    tail: float
    tail_limit: float
    effective: float
    """Effective images, summed over prompts."""
    images: int
    prompts: int

    @property
    def evenness(self) -> float:
        """The share of effective images."""
        return self.effective / self.images


def compare(
    scores: Float[Tensor, " score"], log_weights: Float[Tensor, " image"], groups: Int[Tensor, " image"] | None = None
) -> Comparison:
    """Plain and weighted mean of `scores`, with standard errors for the given prompts.

    Raises `ValueError` for scores that are not as many as weights, or not finite.
    """
    if scores.shape != log_weights.shape or not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"a finite score for each of the {len(log_weights)} images is needed, got {len(scores)}, "
            f"{int((~torch.isfinite(scores)).sum())} of them not finite"
        )
    f, w, logs = scores.double().cpu(), normalized(log_weights.cpu(), groups), log_weights.double().cpu()
    images, rows, steady = len(f), rows_of_groups(groups, len(f)), smoothed(log_weights, groups)
    u = normalized(steady.log_weights, groups)
    plain = weighted = smooth = covariance = third = effective = 0.0
    variances = torch.zeros(4, dtype=torch.float64)
    for index in rows:
        x, v, n = f[index], w[index], len(index)
        share, centred, away = n / images, x - x.mean(), x - v @ x
        plain, weighted = plain + share * float(x.mean()), weighted + share * float(v @ x)
        smooth += share * float(u[index] @ x)
        effective += float(1 / v.square().sum())
        around = n * u[index] * (x - u[index] @ x)
        influences = torch.stack([centred, n * v * away, n * v * away - centred, around])
        variances += share**2 * (influences.square().sum(1) / (n * (n - 1)) if n > 1 else math.nan)
        log_w = logs[index] - logs[index].mean()
        covariance += share * float((centred * log_w).sum() / (n - 1)) if n > 1 else math.nan
        third += share * float((centred * log_w.square()).mean())
    errors = variances.sqrt().tolist()
    return Comparison(
        plain=Estimate(plain, errors[0]),
        weighted=Estimate(weighted, errors[1]),
        bias=Estimate(weighted - plain, errors[2]),
        smoothed=Estimate(smooth, errors[3]),
        covariance=plain + covariance,
        skewed=plain + covariance + third / 2,
        tail=steady.shape,
        tail_limit=steady.limit,
        effective=effective,
        images=images,
        prompts=len(rows),
    )
