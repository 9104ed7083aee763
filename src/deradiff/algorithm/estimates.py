"""Means with their standard errors, and what weights of samples are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; unpacks into the two."""

    value: float
    error: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.error))

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


def mean(values: Float[Tensor, " sample"] | Sequence[float]) -> Estimate:
    """The mean of independent values."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return Estimate(x.mean().item(), (x.std(correction=1) / len(x) ** 0.5).item() if len(x) > 1 else float("nan"))


# -- weights ----------------------------------------------------------------------------------------------------------


def effective_sample_size(log_weights: Float[Tensor, "*group sample"]) -> Float[Tensor, "*group"]:
    """Kish's `(Σ w)²/Σ w²`, 1 (one survivor) to the number of samples (all equal), from logarithms."""
    logs = log_weights.double()
    return torch.exp(2 * torch.logsumexp(logs, -1) - torch.logsumexp(2 * logs, -1))


def normalized(
    log_weights: Float[Tensor, " sample"], groups: Int[Tensor, " sample"] | None = None
) -> Float[Tensor, " sample"]:
    """Weights that sum to one in every group.

    Raises `ValueError` where a group has no weight at all: NaN, or -∞ for all of its samples.
    """
    weights = torch.empty_like(log_weights, dtype=torch.float64)
    for rows in rows_of_groups(groups, len(log_weights)):
        weights[rows] = torch.softmax(log_weights[rows].double(), 0)
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("the log weights hold NaN, or are -∞ for all images of a prompt: nothing can be weighted")
    return weights


def rows_of_groups(groups: Tensor | None, images: int) -> list[Tensor]:
    """The images of each prompt."""
    if groups is None:
        return [torch.arange(images)]
    if len(groups) != images:
        raise ValueError(f"{images} images need a prompt each, got {len(groups)}")
    return [torch.nonzero(groups.cpu() == group).flatten() for group in groups.unique().cpu()]


def covariance(a: Tensor, b: Tensor, groups: Tensor | None) -> float:
    """The covariance of `a` and `b` within prompts, averaged over images."""
    total = 0.0
    for index in rows_of_groups(groups, len(a)):
        x, y = a.double().cpu()[index], b.double().cpu()[index]
        total += (
            float(((x - x.mean()) * (y - y.mean())).sum()) * len(x) / max(len(x) - 1, 1) if len(x) > 1 else math.nan
        )
    return total / len(a)
