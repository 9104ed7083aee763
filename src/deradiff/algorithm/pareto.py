"""Pareto-smoothed importance sampling: the largest weights made steadier, and how heavy their tail is.

The largest weights are fitted by a generalised Pareto distribution and replaced by its expected order statistics
(Vehtari, Simpson, Gelman, Yao and Gabry 2024, Journal of Machine Learning Research 25, section 3 and algorithm 1). Its
shape k̂ is a diagnostic: weights with k̂ below ½ have a variance, and above 0.7 so many samples would be needed that
a weighted mean is not to be believed, whatever the effective sample size says, which cannot see what was never drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.estimates import rows_of_groups

HEAVY = 0.7
"""The k̂ above which no practicable number of samples makes a weighted mean reliable (Vehtari et al. 2024)."""

LEAST_TAIL = 5
"""A tail of fewer weights has no shape to fit: fewer than 25 weights in all."""


@dataclass(frozen=True)
class Smoothed:
    """Weights after smoothing, and the shape of their tail before."""

    log_weights: Float[Tensor, " sample"]
    """With a mean weight of one in every group."""
    shape: float
    """k̂; NaN for fewer than 25 weights, and for a tail of equal ones."""
    limit: float
    """The k̂ up to which so many samples suffice: `min(1 - 1/log10(samples), 0.7)`."""


def smoothed(log_weights: Float[Tensor, " sample"], groups: Int[Tensor, " sample"] | None = None) -> Smoothed:
    """Smooth the tail of importance weights, given as logarithms.

    Weights of different groups (prompts) are compared as multiples of their group's mean weight and share one tail:
    alone, the 16 or 32 images of a prompt would leave three to seven weights to fit.
    """
    logs, count = log_weights.double().cpu().clone(), len(log_weights)
    for rows in rows_of_groups(groups, count):
        logs[rows] = logs[rows] - torch.logsumexp(logs[rows], 0) + math.log(len(rows))
    limit = min(1 - 1 / math.log10(count), HEAVY) if count > 1 else math.nan
    tail = int(min(count / 5, 3 * count**0.5))
    if tail < LEAST_TAIL:
        return Smoothed(logs, math.nan, limit)
    ordered, places = logs.exp().sort()
    cutoff = ordered[-tail - 1]
    excesses = ordered[-tail:] - cutoff
    if not float(excesses[0]) > 0:  # equal weights have no tail
        return Smoothed(logs, math.nan, limit)
    shape, scale = fit(excesses)
    shares = (torch.arange(tail, dtype=torch.float64) + 0.5) / tail
    replaced = (cutoff + quantiles(shares, shape, scale)).clamp(max=ordered[-1])
    logs[places[-tail:]] = replaced.log()
    for rows in rows_of_groups(groups, count):
        logs[rows] = logs[rows] - torch.logsumexp(logs[rows], 0) + math.log(len(rows))
    return Smoothed(logs, shape, limit)


def fit(excesses: Float[Tensor, " tail"]) -> tuple[float, float]:
    """Shape k and scale σ of a generalised Pareto distribution of positive values in ascending order.

    Zhang and Stephens 2009 (Technometrics 51): the mean of a quasi-posterior of `b = -k/σ` on a grid. k is drawn
    towards ½ as by ten more observations (Vehtari et al. 2024, appendix C), without which short tails are all noise.
    """
    x, n = excesses.double(), len(excesses)
    points = 30 + int(n**0.5)
    quartile = x[int(n / 4 + 0.5) - 1]
    grid = (1 - (points / (torch.arange(points, dtype=torch.float64) + 0.5)).sqrt()) / (3 * quartile) + 1 / x[-1]
    grid[grid == 0] = 1e-12 / x[-1]  # where shape and b vanish together
    shapes = torch.log1p(-grid[:, None] * x).mean(1)
    profile = n * ((-grid / shapes).log() - shapes - 1)
    b = float(torch.softmax(profile, 0) @ grid)
    shape = float(torch.log1p(-b * x).mean())
    scale = -shape / b
    return (shape * n + 0.5 * 10) / (n + 10), scale


def quantiles(shares: Float[Tensor, " point"], shape: float, scale: float) -> Float[Tensor, " point"]:
    """Where a generalised Pareto distribution has these shares of its probability below."""
    if abs(shape) < 1e-12:
        return -scale * torch.log1p(-shares)
    return scale * torch.expm1(-shape * torch.log1p(-shares)) / shape
