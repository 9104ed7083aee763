"""What a search has found: the best point or a Pareto set, how sure that is, and which conditions hold there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.measures.fronts import non_dominated
from deradiff.search.goals import Goal, Tables
from deradiff.search.proposals import Proposal, Surrogates
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.surrogate import Observed, Surrogate

LEVEL = 0.9
"""The probability that lies in every interval."""

ENDS = (1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2
"""The quantiles that an interval ends at."""

MET = 0.8
"""A condition counts as met where it holds with this probability."""

DRAWS = 4096
"""Draws from the posterior that intervals are read from."""


@dataclass(frozen=True)
class Interval:
    """A number, and the equal-tailed interval that holds it with probability `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class EvaluatedPoint:
    """What was measured at one point."""

    point: Point
    scores: tuple[float, ...]
    """Mean of each objective."""
    gains: tuple[float, ...]
    """Over the reference."""
    errors: tuple[float, ...]
    """Standard errors of the gains, unit by unit."""


@dataclass(frozen=True)
class Condition:
    """How a condition is met at a point: by how much, and how probably."""

    text: str
    margin: Interval
    probability: float

    def __str__(self) -> str:
        amount = f"{abs(self.margin.value):.3g} [{self.margin.low:.3g}, {self.margin.high:.3g}]"
        how = "met" if self.probability >= MET else "missed" if self.margin.value < 0 else "not surely met"
        return f"{self.text}: {how} by {amount}, holds with probability {self.probability:.0%}"


@dataclass(frozen=True)
class Best:
    """The best point for one objective.

    The point is where the posterior mean is largest among those that meet the conditions; `ranges` hold each of its
    coordinates with probability `LEVEL`, by where the maxima of draws from the posterior lie.
    """

    point: Point
    ranges: tuple[tuple[float, float], ...]
    gain: Interval
    """Over the reference's score, from paired differences."""
    score: Interval
    """The score itself, for other prompts of this kind."""
    conditions: tuple[Condition, ...]
    reachable: bool
    """Whether any point meets all conditions; if none does, the point is that which comes nearest."""
    evaluations: tuple[EvaluatedPoint, ...]
    stopped: str
    """Why no more points were evaluated."""


@dataclass(frozen=True)
class OnFront:
    """A point that no other beats in every objective."""

    point: Point
    gains: tuple[Interval, ...]
    probability: float
    """That no other evaluated point is better in every objective."""
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Front:
    """The Pareto set of several objectives, of the points that were evaluated and meet the conditions."""

    points: tuple[OnFront, ...]
    evaluations: tuple[EvaluatedPoint, ...]
    stopped: str


def best(
    space: SearchSpace,
    goal: Goal,
    points: Sequence[Point],
    tables: Tables,
    models: Surrogates,
    proposal: Proposal,
    stopped: str,
    seed: int,
) -> Best:
    """The answer of a search for one objective after evaluating `points`."""
    at = space.unit(proposal.candidates)
    gains = models.gains[0].samples(at, DRAWS, seed)
    margins = [margin.samples(at, DRAWS, seed + 1 + k) for k, margin in enumerate(models.margins)]
    holds = _all([margin >= 0 for margin in margins], gains)
    sure = holds.double().mean(0)
    mean = models.gains[0].mean(at)
    reachable = bool((sure >= MET).any())
    place = int(torch.where(sure >= MET, mean, -torch.inf).argmax()) if reachable else _nearest(models, at)
    tops = torch.where(holds, gains, -torch.inf).argmax(1)[holds.any(1)]
    where = torch.tensor(proposal.candidates, dtype=torch.float64)[tops]
    point = proposal.candidates[place]
    raw = Surrogate(space.unit(points), Observed.of(goal.objectives[0].table(tables)), seed)
    return Best(
        point=point,
        ranges=tuple(_range(column, value) for column, value in zip(where.T, point, strict=True)),
        gain=_interval(gains[:, place]),
        score=_interval(raw.samples(at[place : place + 1], DRAWS, seed)[:, 0]),
        conditions=_conditions(goal, [margin[:, place] for margin in margins]),
        reachable=reachable,
        evaluations=evaluations(goal, points, tables),
        stopped=stopped,
    )


def front(
    space: SearchSpace, goal: Goal, points: Sequence[Point], tables: Tables, models: Surrogates, stopped: str, seed: int
) -> Front:
    """The answer of a search for several objectives after evaluating `points`."""
    at, count = space.unit(points), len(models.gains)
    gains = torch.stack([gain.samples(at, DRAWS, seed + k) for k, gain in enumerate(models.gains)], 2)
    margins = [margin.samples(at, DRAWS, seed + count + k) for k, margin in enumerate(models.margins)]
    sure = _all([margin >= 0 for margin in margins], gains[..., 0]).double().mean(0) >= MET
    allowed = sure.nonzero().flatten()
    if not len(allowed):
        return Front((), evaluations(goal, points, tables), stopped)
    means = torch.stack([gain.mean(at) for gain in models.gains], 1)[allowed]
    kept = allowed[non_dominated(means, [True] * count)]
    on_front = _undominated(gains[:, allowed])
    chances = dict(zip(allowed.tolist(), on_front.tolist(), strict=True))
    members = [
        OnFront(
            points[k],
            tuple(_interval(gains[:, k, j]) for j in range(count)),
            chances[k],
            _conditions(goal, [margin[:, k] for margin in margins]),
        )
        for k in kept.tolist()
    ]
    return Front(tuple(sorted(members, key=lambda member: member.point)), evaluations(goal, points, tables), stopped)


def evaluations(goal: Goal, points: Sequence[Point], tables: Tables) -> tuple[EvaluatedPoint, ...]:
    """What was measured, point by point."""
    scores = [objective.table(tables) for objective in goal.objectives]
    gains = [Observed.of(s - o.at_reference(tables)) for o, s in zip(goal.objectives, scores, strict=True)]
    return tuple(
        EvaluatedPoint(
            point,
            tuple(float(table[k].mean()) for table in scores),
            tuple(float(gain.means[k]) for gain in gains),
            tuple(float(gain.covariance[k, k].sqrt()) for gain in gains),
        )
        for k, point in enumerate(points)
    )


# -- helpers ----------------------------------------------------------------------------------------------------------


def _all(conditions: Sequence[Tensor], like: Tensor) -> Tensor:
    """Whether all hold, draw by draw."""
    return torch.stack([torch.ones_like(like, dtype=torch.bool), *conditions]).all(0)


def _nearest(models: Surrogates, at: Float[Tensor, "candidate coordinate"]) -> int:
    """The candidate whose worst margin is best, each margin in standard deviations."""
    margins = torch.stack([margin.mean(at) / margin.scale for margin in models.margins])
    return int(margins.amin(0).argmax())


def _interval(draws: Float[Tensor, " draw"]) -> Interval:
    return Interval(float(draws.mean()), *torch.quantile(draws, draws.new_tensor(ENDS)).tolist())


def _range(values: Float[Tensor, " draw"], value: float) -> tuple[float, float]:
    """The interval that holds a coordinate; the point itself where no draw meets the conditions."""
    if not len(values):
        return value, value
    low, high = torch.quantile(values, values.new_tensor(ENDS), interpolation="nearest").tolist()
    return low, high


def _conditions(goal: Goal, draws: Sequence[Float[Tensor, " draw"]]) -> tuple[Condition, ...]:
    return tuple(
        Condition(condition.text, _interval(margin), float((margin >= 0).double().mean()))
        for condition, margin in zip(goal.constraints, draws, strict=True)
    )


def _undominated(gains: Float[Tensor, "draw point objective"]) -> Float[Tensor, " point"]:
    """How often no other point is at least as good in every objective and better in one."""
    own, others = gains[:, :, None], gains[:, None]
    beaten = (others >= own).all(3) & (others > own).any(3)
    return 1 - beaten.any(2).double().mean(0)
