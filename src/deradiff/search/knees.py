"""Where a front bends: up to which drift from the reference more of the anchor still buys what it buys at first.

A front is what is gained against how far the model has drifted. Two straight lines are laid through it, from the origin
to a knee and from there on. It is a knee where the second line rises less than `FLATTER` of the first. The draws of the
surrogates' posterior have a knee each, or none, so that its uncertainty holds that of the prompts that were drawn and
of what lies between the evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deradiff.search.answers import ENDS, MET, EvaluatedPoint, Interval, evaluations
from deradiff.search.goals import Goal, Tables
from deradiff.search.proposals import Proposal, Surrogates
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.surrogate import Observed, Surrogate

FLATTER = 0.5
"""The share of the first rate below which a front counts as bent."""

LEAST = 0.1
"""The gain up to the knee, in shares of the reference's images beaten, below which a front counts as level: noise rises
and falls, too."""

DRAWS = 1024
"""Draws from the posterior, each with a knee of its own."""

PLACES = 64
"""Places along the drift, evenly from the origin to the largest, at which the lines are fitted."""

EDGE = 4
"""Places that a line is fitted to at least."""


class Fit(NamedTuple):
    """Two lines through each of several fronts."""

    drift: Float[Tensor, " front"]
    """Where the lines meet."""
    before: Float[Tensor, " front"]
    """The rate of the first line, in units of gain by drift."""
    after: Float[Tensor, " front"]

    @property
    def bent(self) -> Bool[Tensor, " front"]:
        """Whether the front has a knee: it rises by `LEAST`, and then less than `FLATTER` as fast."""
        return (self.before * self.drift >= LEAST) & (self.after < FLATTER * self.before)


def fit(drifts: Float[Tensor, "front point"], gains: Float[Tensor, "front point"]) -> Fit:
    """Lay two lines through every front, by least squares over places that are even in the drift.

    A front is the largest gain of the points up to each drift, from the reference's, no gain at no drift. The knee may
    lie at any of `PLACES` but the first and the last few. Fronts without any drift have rates of 0.
    """
    along, height = _front(drifts, gains)
    reach = along[:, -1].clamp(min=1e-12)
    places = torch.linspace(0, 1, PLACES, dtype=torch.float64)
    level = _interpolated(along / reach[:, None], height, places)
    knees = places[EDGE:-EDGE, None]
    lines = torch.stack([torch.minimum(places, knees), (places - knees).clamp(min=0)], 2)
    rates = torch.einsum("kip,fp->fki", torch.linalg.pinv(lines), level)
    missed = (level[:, None] - torch.einsum("kpi,fki->fkp", lines, rates)).square().sum(2)
    best = missed.argmin(1)
    chosen = rates.gather(1, best[:, None, None].expand(-1, 1, 2))[:, 0] / reach[:, None]
    return Fit(knees[best, 0] * reach, chosen[:, 0], chosen[:, 1])


@dataclass(frozen=True)
class Knee:
    """How far λ can go before more of the anchor buys less.

    `point` is the best that surely lies before the knee: its drift is below that of the knee with probability 95%. None
    where no knee was found, in `probability` of the draws or fewer than `MET` of them.
    """

    point: Point | None
    ranges: tuple[tuple[float, float], ...]
    """Of each coordinate, what holds the knee with probability `answers.LEVEL`; empty where there is none."""
    drift: Interval
    """Of the knee."""
    probability: float
    """That there is a knee."""
    slowing: Interval
    """The rate of gain beyond the knee, as a share of the rate before."""
    beats: Interval | None
    """How often an image at `point` scores more than one of the reference for the same prompt."""
    gain: Interval | None
    """Of the score at `point`, over the reference's."""
    evaluations: tuple[EvaluatedPoint, ...]
    stopped: str
    """Why no more points were evaluated."""


class Places(NamedTuple):
    """The knees of the posterior's draws, among candidates."""

    fit: Fit
    at: Int[Tensor, " draw"]
    """The candidate at which each front reaches its knee."""
    drifts: Float[Tensor, "draw candidate"]
    gains: Float[Tensor, "draw candidate"]


def drawn(space: SearchSpace, models: Surrogates, candidates: Sequence[Point], seed: int) -> Places:
    """Draws of gain and drift at all `candidates`, and where each has its knee."""
    at = space.unit(candidates)
    gains = models.gains[0].samples(at, DRAWS, seed).clamp(-0.5, 0.5)  # none or all of the reference's are beaten
    drifts = (-models.gains[1].samples(at, DRAWS, seed + 1)).clamp(min=0)
    lines = fit(drifts, gains)
    before = drifts <= lines.drift[:, None]
    return Places(lines, torch.where(before, gains, -torch.inf).argmax(1), drifts, gains)


def towards_knee(
    space: SearchSpace, models: Surrogates, known: Sequence[Point], candidates: list[Point], seed: int
) -> Proposal:
    """The candidate that is likely to lie before the knee or at it, and of which little is known.

    Its worth is the posterior deviation of its gain times its leverage on the line from the origin: its drift as a
    share of the knee's, nothing beyond, in the mean of the draws. What lies beyond matters less, since the answer lies
    before the knee.
    """
    places = drawn(space, models, candidates, seed)
    way = places.drifts / places.fit.drift[:, None].clamp(min=1e-12)
    values = torch.where(way <= 1, way, 0).mean(0) * models.gains[0].deviation(space.unit(candidates))
    open_to = torch.tensor([point not in {*known} for point in candidates])
    if not bool(open_to.any()):
        return Proposal(None, None, candidates, values)
    best = int(torch.where(open_to, values, -torch.inf).argmax())
    return Proposal(candidates[best], None, candidates, values)


def knee(
    space: SearchSpace,
    goal: Goal,
    points: Sequence[Point],
    tables: Tables,
    models: Surrogates,
    candidates: Sequence[Point],
    stopped: str,
    seed: int,
) -> Knee:
    """The answer of a search for the knee after evaluating `points`."""
    places = drawn(space, models, candidates, seed)
    bent = places.fit.bent
    probability = float(bent.double().mean())
    slowing = _interval(places.fit.after / places.fit.before.clamp(min=1e-12))
    measured = evaluations(goal, points, tables)
    if probability < MET:
        reached = _interval(places.drifts.amax(1))
        return Knee(None, (), reached, probability, slowing, None, None, measured, stopped)
    drift = _interval(places.fit.drift[bent])
    at = space.unit(candidates)
    allowed = -models.gains[1].mean(at) <= drift.low
    best = int(torch.where(allowed, models.gains[0].mean(at), -torch.inf).argmax())
    where = torch.tensor(candidates, dtype=torch.float64)[places.at[bent]]
    assert goal.knee is not None
    own = tables.points[goal.knee].double() - tables.reference[goal.knee].double()
    score = Surrogate(space.unit(points), Observed.of(own), seed)
    return Knee(
        point=candidates[best],
        ranges=tuple(_ends(column) for column in where.T),
        drift=drift,
        probability=probability,
        slowing=slowing,
        beats=_shifted(_interval(places.gains[:, best]), 0.5),
        gain=_interval(score.samples(at[best : best + 1], DRAWS, seed)[:, 0]),
        evaluations=measured,
        stopped=stopped,
    )


# -- helpers ----------------------------------------------------------------------------------------------------------


def _front(
    drifts: Float[Tensor, "front point"], gains: Float[Tensor, "front point"]
) -> tuple[Float[Tensor, "front place"], Float[Tensor, "front place"]]:
    """Drifts in ascending order, and the largest gain up to each; the reference first."""
    order = drifts.argsort(1)
    nothing = torch.zeros(len(drifts), 1, dtype=drifts.dtype)
    height = torch.cat([nothing, gains.gather(1, order)], 1).cummax(1).values
    return torch.cat([nothing, drifts.gather(1, order)], 1), height


def _interpolated(
    x: Float[Tensor, "front place"], y: Float[Tensor, "front place"], at: Float[Tensor, " where"]
) -> Float[Tensor, "front where"]:
    """`y` at the places `at`, on straight lines between neighbours."""
    right = torch.searchsorted(x.contiguous(), at.expand(len(x), -1).contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1, y0, y1 = x.gather(1, right - 1), x.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)


def _interval(draws: Float[Tensor, " draw"]) -> Interval:
    """The median, which a knee that jumps does not move, and the interval around it."""
    low, middle, high = torch.quantile(draws, draws.new_tensor((ENDS[0], 0.5, ENDS[1]))).tolist()
    return Interval(middle, low, high)


def _shifted(interval: Interval, by: float) -> Interval:
    return Interval(interval.value + by, interval.low + by, interval.high + by)


def _ends(values: Float[Tensor, " draw"]) -> tuple[float, float]:
    low, high = torch.quantile(values, values.new_tensor(ENDS), interpolation="nearest").tolist()
    return low, high
