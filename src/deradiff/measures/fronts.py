"""Pareto fronts: of several settings, those that no other beats in every respect.

For reward against diversity (Annealed Importance Guidance, figure 4), reward against divergence, or more at once.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["non_dominated"]


def non_dominated(points: Float[Tensor, "point objective"], maximize: Sequence[bool]) -> Bool[Tensor, " point"]:
    """Which points no other dominates.

    A point dominates another that it is at least as good as in every objective and better than in one. Equal points
    do not dominate each other: both are kept. Infinite values are compared like any; noise in the values is not looked
    at, so a point just behind the front may belong to it.

    Args:
        points: one row per setting, for example mean reward and FID.
        maximize: for each objective, whether more is better.

    Raises:
        ValueError: NaN, no points, or not one direction per objective.
    """
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must be a matrix (point, objective) of one row at least, not {tuple(points.shape)}")
    if len(maximize) != points.shape[1]:
        raise ValueError(f"{points.shape[1]} objectives need a direction each, got {len(maximize)}")
    if bool(points.isnan().any()):
        broken = points.isnan().any(1).nonzero().flatten().tolist()
        raise ValueError(f"points {broken} hold NaN, which is neither better nor worse: leave them out")
    upwards = torch.where(torch.tensor(maximize), points.double().cpu(), -points.double().cpu())
    # One objective at a time: memory is points², not that times objectives.
    at_least = torch.ones(len(points), len(points), dtype=torch.bool)
    better = torch.zeros_like(at_least)
    for values in upwards.unbind(1):
        at_least &= values[:, None] >= values
        better |= values[:, None] > values
    return ~(at_least & better).any(0)
