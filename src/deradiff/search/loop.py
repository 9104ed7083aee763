"""The search itself: evaluate, model, propose; again until another evaluation is not worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deradiff.search.answers import Best, Front, best, front
from deradiff.search.goals import Goal, Tables
from deradiff.search.knees import Knee, knee, towards_knee
from deradiff.search.proposals import Proposal, Surrogates, propose
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.surrogate import Observed

FRACTION = 0.05
"""The search stops where another evaluation is expected to gain less than this share of the gain's own error."""

Evaluate = Callable[[Sequence[Point]], Tables]
"""Measures all of these points, the last of which is new. Raises `PointRefused` for a point that cannot be used."""


class PointRefused(ValueError):
    """A point has no distribution, or next to no scores; the search goes on without it and what lies beyond it."""


@dataclass
class SearchState:
    """How far a search has come: what figures and records are made from."""

    points: list[Point] = field(default_factory=list)
    refused: dict[Point, str] = field(default_factory=dict)
    tables: Tables | None = None
    models: Surrogates | None = None
    proposal: Proposal | None = None


def maximise(
    space: SearchSpace,
    goal: Goal,
    evaluate: Evaluate,
    *,
    budget: int = 8,
    seed: int = 0,
    fraction: float = FRACTION,
    state: SearchState | None = None,
    report: Callable[[SearchState], None] | None = None,
) -> Best | Front | Knee:
    """Find the point of `space` that `goal` likes best, the Pareto set of several objectives, or the knee of a front.

    The end points come first, then what log noisy expected improvement proposes (DeRaDiff's Algorithm 2 with the noise
    taken seriously). Everything random follows from `seed` and the number of evaluations, so a search that is begun
    again with the same evaluations goes the same way.

    Args:
        space: what is searched (`spaces.lam` and its siblings).
        goal: what is wanted.
        evaluate: measures points, always all of them, in the same units.
        budget: evaluations altogether; the end points count.
        seed: of everything random in the search. The images have seeds of their own.
        fraction: stop where the expected gain is below this share of the standard error of the gain so far. 0 uses the
            whole budget, as does a search for several objectives or for a knee.
        state: what the search leaves behind, for figures.
        report: told of the state after every evaluation.

    Raises:
        ValueError: a budget below the number of end points; fewer than two units; a score that is the same everywhere;
            the reference or an anchor being `PointRefused`.
        ImportError: BoTorch is not installed.
    """
    now = SearchState() if state is None else state
    _require_budget(space, budget)
    for point in space.first():
        _take(now, point, evaluate)
        if point == space.first()[0] and not now.points:
            raise ValueError(f"the search cannot begin: {now.refused[point]}")
    while True:
        now.tables = evaluate(now.points)
        _require_differences(goal, now.tables)
        chance = _chance(seed, len(now.points))
        now.models = Surrogates.of(space, goal, now.points, now.tables, chance)
        candidates = space.candidates(chance, now.points, _promising(space, now.models, now.points), now.refused)
        look = propose if goal.knee is None else towards_knee
        now.proposal = look(space, now.models, now.points, candidates, chance)
        if report is not None:
            report(now)
        stopped = _why_stop(now, goal, budget, fraction)
        if stopped:
            break
        assert now.proposal.point is not None
        _take(now, now.proposal.point, evaluate)
    if goal.knee is not None:
        candidates = now.proposal.candidates
        return knee(space, goal, now.points, now.tables, now.models, candidates, stopped, chance)
    if len(goal.objectives) > 1:
        return front(space, goal, now.points, now.tables, now.models, stopped, chance)
    return best(space, goal, now.points, now.tables, now.models, now.proposal, stopped, chance)


def _take(now: SearchState, point: Point, evaluate: Evaluate) -> None:
    """Evaluate a point and keep it, or why it cannot be."""
    try:
        now.tables = evaluate([*now.points, point])
        now.points.append(point)
    except PointRefused as error:
        now.refused[point] = str(error)


def _why_stop(now: SearchState, goal: Goal, budget: int, fraction: float) -> str:
    """Why no more is evaluated; empty where more is."""
    assert now.tables is not None and now.proposal is not None
    if now.proposal.point is None:
        return "every point was evaluated"
    if len(now.points) >= budget:
        return f"all {budget} evaluations are used"
    if len(goal.objectives) > 1:
        return ""
    error = _error_of_gain(goal, now.tables)
    assert now.proposal.gain is not None
    if now.proposal.gain < fraction * error:
        return (
            f"another evaluation is expected to gain {now.proposal.gain:.2g}, less than {fraction:g} of the gain's "
            f"standard error, {error:.2g}"
        )
    return ""


def _error_of_gain(goal: Goal, tables: Tables) -> float:
    """The standard error of the best point's gain over the reference, or over the next best if that is the best."""
    (objective,) = goal.objectives
    gains = Observed.of(objective.table(tables) - objective.at_reference(tables))
    order = gains.means.argsort(descending=True).tolist()
    error = float(gains.covariance[order[0], order[0]].sqrt())
    return error or gains.error_of_difference(order[0], order[1])


def _promising(space: SearchSpace, models: Surrogates, points: Sequence[Point]) -> list[Point]:
    """The two best points of each objective, around which candidates are added."""
    at = space.unit(points)
    ranked = [gain.mean(at).argsort(descending=True)[:2].tolist() for gain in models.gains]
    return list(dict.fromkeys(points[k] for places in ranked for k in places))


def _require_budget(space: SearchSpace, budget: int) -> None:
    needed = len(space.first())
    if budget < needed:
        raise ValueError(
            f"a budget of {budget} evaluations does not reach the points to begin with, {needed} of them "
            f"({'; '.join(space.text(point) for point in space.first())}): give at least {needed}, better "
            f"{needed + 5}"
        )


def _require_differences(goal: Goal, tables: Tables) -> None:
    for objective in goal.objectives:
        table, reference = objective.table(tables), objective.at_reference(tables)
        if bool((table == reference[0]).all() and (reference == reference[0]).all()):
            raise ValueError(
                f"{objective} is {float(reference[0]):g} for every image: a constant score has no best λ; check it"
            )
        if bool((table == reference).all()):
            raise ValueError(
                f"{objective} is the same at every point, image by image: the anchor seems to be the reference itself"
            )


def _chance(seed: int, evaluations: int) -> int:
    """A seed that follows from the search's own and the number of evaluations."""
    return int(np.random.SeedSequence([seed, evaluations]).generate_state(1)[0])


__all__ = ["FRACTION", "Evaluate", "PointRefused", "SearchState", "maximise"]
