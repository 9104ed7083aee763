"""What is searched: λ of one anchor or of several, the power of an annealing schedule, or a spline's λ at its knots.

A space has coordinates, a point is a value for each. The model of the score sees them scaled to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from deradiff.algorithm.schedules import finite
from deradiff.experiments.plan import Arm, Plan
from deradiff.sweep.notation import plain

Point = tuple[float, ...]

Kind = Literal["lam", "lams", "power", "knots"]

DECIMALS = 2
"""Of every coordinate: nobody can tell λ = 0.437 from 0.44, and what is rounded is met again instead of drawn anew."""

LARGEST = 2.0
"""The largest λ that can be searched."""

SCATTERED = 256
"""Candidates in a space of several coordinates."""


@dataclass(frozen=True)
class Coordinate:
    """One number that is searched, from `low` to `high`; evenly by its logarithm if `log`."""

    name: str
    low: float
    high: float
    log: bool = False

    def unit(self, value: float) -> float:
        """The value's place, 0 at `low` to 1 at `high`."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low)

    def value(self, place: float) -> float:
        """The value at a place in [0, 1], rounded to `DECIMALS`."""
        if self.log:
            value = math.exp(math.log(self.low) + place * math.log(self.high / self.low))
        else:
            value = self.low + place * (self.high - self.low)
        return min(max(round(value, DECIMALS), self.low), self.high)

    def values(self) -> list[float]:
        """All that can be told apart: every hundredth, or 101 of them evenly by logarithm."""
        steps = 100 if self.log else max(1, round((self.high - self.low) * 10**DECIMALS))
        return list(dict.fromkeys(self.value(i / steps) for i in range(steps + 1)))


@dataclass(frozen=True)
class SearchSpace:
    """A space to be searched. Made by `lam`, `lams`, `power` or `knots`."""

    kind: Kind
    coordinates: tuple[Coordinate, ...]
    anchors: tuple[str, ...]
    simplex: bool = False
    """Whether the coordinates may sum to at most 1, so that no model has a negative weight."""
    places: tuple[float, ...] = ()
    """Of the knots, in sampling progress."""

    # -- points -------------------------------------------------------------------------------------------------------

    def first(self) -> list[Point]:
        """The points to begin with: those where one model acts alone, the reference first, then what is between."""
        ends = [coordinate.low for coordinate in self.coordinates]
        if self.kind == "power":
            (powers,) = self.coordinates
            return [(powers.low,), (powers.high,), (powers.value(0.5),)]
        if self.kind == "knots":
            highs = [coordinate.high for coordinate in self.coordinates]
            return [tuple(ends), tuple(highs), self._middle()]
        points = [tuple(0.0 for _ in ends), *self.alone()]
        if max(coordinate.high for coordinate in self.coordinates) > 1:
            points.append(tuple(coordinate.high for coordinate in self.coordinates))
        return list(dict.fromkeys(point for point in [*points, self._middle()] if self.holds(point)))

    def alone(self) -> list[Point]:
        """Where each anchor acts alone: its λ is 1, those of the others are 0."""
        return [tuple(row) for row in np.eye(len(self.coordinates)).tolist()] if self.kind in ("lam", "lams") else []

    def _middle(self) -> Point:
        if self.simplex:
            return tuple(round(1 / (len(self.coordinates) + 1), DECIMALS) for _ in self.coordinates)
        return tuple(coordinate.value(0.5) for coordinate in self.coordinates)

    def holds(self, point: Point) -> bool:
        """Whether the point lies in the space."""
        inside = all(c.low <= value <= c.high for c, value in zip(self.coordinates, point, strict=True))
        return inside and not (self.simplex and sum(point) > 1 + 1e-9)

    def unit(self, points: Sequence[Point]) -> Float[Tensor, "point coordinate"]:
        """The points with every coordinate scaled to [0, 1]."""
        rows = [[c.unit(value) for c, value in zip(self.coordinates, point, strict=True)] for point in points]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(points), len(self.coordinates))

    def candidates(
        self, seed: int, known: Sequence[Point], around: Sequence[Point] = (), refused: Collection[Point] = ()
    ) -> list[Point]:
        """Where the score is predicted: all points of one coordinate, or so many scattered ones of several.

        The `known` points are among them and, of several coordinates, the neighbours of those `around` which to look
        closer. What lies further out than half the way from a known point to a `refused` one is left out: so the
        edge of what can be used is met in a few steps.
        """
        limits = [self._limit(point, known) for point in refused]
        if len(self.coordinates) == 1:
            candidates: list[Point] = [(value,) for value in self.coordinates[0].values()]
        else:
            candidates = [*self._scattered(seed), *(near for point in around for near in self._near(point))]
        kept = [
            point
            for point in dict.fromkeys([*known, *candidates])
            if point in known or (self.holds(point) and not any(_beyond(point, limit) for limit in limits))
        ]
        return sorted(kept) if len(self.coordinates) == 1 else kept

    def _limit(self, refused: Point, known: Sequence[Point]) -> Point:
        """Half the way to a refused point from the nearest known one that is not further out in any coordinate."""
        inside = [point for point in known if _beyond(refused, point)]
        nearest = min(inside, key=lambda point: math.dist(point, refused), default=refused)
        return tuple((a + b) / 2 for a, b in zip(nearest, refused, strict=True))

    def _scattered(self, seed: int) -> list[Point]:
        """Sobol points; on a simplex the gaps between their sorted coordinates, which are uniform there."""
        places = SobolEngine(len(self.coordinates), scramble=True, seed=seed).draw(SCATTERED, dtype=torch.float64)
        if self.simplex:
            places = places.sort(1).values.diff(dim=1, prepend=torch.zeros(len(places), 1, dtype=torch.float64))
        return [tuple(c.value(x) for c, x in zip(self.coordinates, row, strict=True)) for row in places.tolist()]

    def _near(self, point: Point) -> list[Point]:
        steps = [(0.0, 0.05, -0.05, 0.15, -0.15)] * len(point)
        units = self.unit([point])[0].tolist()
        moves = [move for move in product(*steps) if np.count_nonzero(move) <= 2]
        return [
            tuple(c.value(min(max(u + m, 0.0), 1.0)) for c, u, m in zip(self.coordinates, units, move, strict=True))
            for move in moves
        ]

    # -- as part of a plan --------------------------------------------------------------------------------------------

    def method(self, point: Point) -> dict[str, Any]:
        """The method of a plan that draws this point."""
        match self.kind:
            case "lam":
                return {"method": "realign", "anchors": self.anchors, "lam": point}
            case "lams":
                return {"method": "combine", "lams": [dict(zip(self.anchors, point, strict=True))]}
            case _:
                return {"method": "anneal", "anchors": self.anchors, "schedules": [self.schedule(point)]}

    def schedule(self, point: Point) -> str:
        """The point's schedule in the notation of `notation.schedule`; empty where λ stays the same."""
        if self.kind == "power":
            return f"power:{plain(point[0])}"
        if self.kind == "knots":
            return "spline:" + ",".join(f"{plain(s)}/{plain(x)}" for s, x in zip(self.places, point, strict=True))
        return ""

    def arm(self, plan: Plan, point: Point) -> Arm:
        """The arm that draws this point. Raises `LookupError` where the plan has none."""
        schedule = self.schedule(point)
        lams = (1.0,) if schedule else point
        wanted = Arm("", self.method(point)["method"], tuple(zip(self.anchors, lams, strict=True)), schedule).content
        return next(arm for arm in plan.arms() if arm.content == wanted)

    def text(self, point: Point) -> str:
        """The point for people."""
        return ", ".join(f"{c.name} = {plain(value)}" for c, value in zip(self.coordinates, point, strict=True))


def _beyond(point: Point, limit: Point) -> bool:
    return all(value >= far for value, far in zip(point, limit, strict=True))


# -- the four kinds ---------------------------------------------------------------------------------------------------


def lam(anchor: str, low: float | int = 0.0, high: float | int = 1.0) -> SearchSpace:
    """λ of one anchor (DeRaDiff, equation 39): from `low` to `high`, at most from 0 to 2; above 1 it extrapolates.

    Raises `ValueError` for a range that is empty or reaches further.
    """
    return SearchSpace("lam", (_range("λ", low, high),), (anchor,))


def lams(
    anchors: Sequence[str], low: float | int = 0.0, high: float | int = 1.0, *, simplex: bool = True
) -> SearchSpace:
    """λ for each of several anchors (DeRaDiff, appendix A.4), each from `low` to `high`.

    On the `simplex` they sum to at most 1, what is left being the reference's weight; otherwise they fill a box, in
    which the reference's weight may be negative. Raises `ValueError` for fewer than two anchors, one named twice, and a
    range as `lam` does, which on the simplex cannot reach above 1.
    """
    if len(set(anchors)) < len(anchors) or len(anchors) < 2:
        raise ValueError(f"λ of several anchors needs two different ones at least, got {', '.join(anchors) or 'none'}")
    if simplex and high > 1:
        raise ValueError(f"λ that sum to at most 1 cannot reach {high:g}: search a box instead of the simplex")
    return SearchSpace("lams", tuple(_range(f"λ of {name}", low, high) for name in anchors), tuple(anchors), simplex)


def power(anchor: str, low: float | int = 0.25, high: float | int = 5.0) -> SearchSpace:
    """The power p of `λ(s) = s**p` (Annealed Importance Guidance, appendix A.7.3), evenly by its logarithm.

    Raises `ValueError` unless 0 < `low` < `high`.
    """
    low, high = finite(low, "the smallest p"), finite(high, "the largest p")
    if not 0 < low < high:
        raise ValueError(f"a power is searched from a positive p to a larger one, not from {low:g} to {high:g}")
    return SearchSpace("power", (Coordinate("p", low, high, log=True),), (anchor,))


def knots(
    anchor: str, places: Sequence[float | int] = (0.0, 0.5, 1.0), low: float | int = 0.0, high: float | int = 1.0
) -> SearchSpace:
    """λ of a spline (`schedules.Spline`) at each of `places`, in progress from 0 (noise) to 1 (image).

    Raises `ValueError` for fewer than two places, places that do not rise within [0, 1], and a range as `lam` does.
    """
    at = tuple(finite(place, "a knot's place") for place in places)
    if len(at) < 2 or at[0] < 0 or at[-1] > 1 or any(b <= a for a, b in pairwise(at)):
        raise ValueError(f"a spline's knots are two places at least that rise from 0 to 1, got {list(at)}")
    return SearchSpace("knots", tuple(_range(f"λ at s = {plain(s)}", low, high) for s in at), (anchor,), places=at)


def _range(name: str, low: float | int, high: float | int) -> Coordinate:
    low, high = finite(low, f"the smallest {name}"), finite(high, f"the largest {name}")
    if not 0 <= low < high <= LARGEST:
        raise ValueError(f"{name} is searched within 0 to {LARGEST:g}, not from {low:g} to {high:g}")
    return Coordinate(name, low, high)
