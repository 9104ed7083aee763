"""The annealing curve as a page draws it: from a family's parameter or from points, by the library's own schedules.

The page holds no mathematics of its own: it sends points, and draws what comes back.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from deradiff.algorithm.schedules import ROUNDING, Schedule, Spline, Step, finite
from deradiff.sweep import notation

MOST_POINTS = 24
MOST_STEPS = 200

FINENESS = 200
"""Pieces of the line that is drawn."""

FAMILIES: dict[str, tuple[str, float, float, float]] = {
    "power": ("p", 2.0, 0.05, 20.0),
    "step": ("p", 0.5, 0.0, 1.0),
    "sigmoid": ("κ", 10.0, 0.1, 100.0),
}
"""What a curve can start from: what its parameter is called, where it begins, its least and its greatest."""

CLOSEST = 0.004
"""Two points are at least this far apart: less cannot be told apart by eye, or by a sampler of 200 steps."""


def of_family(name: str, parameter: Any) -> Schedule | None:
    """The curve of AIG's family `name` (appendix A.7.3); None for "constant", which is no curve.

    Raises `ValueError` for another name, or a parameter outside its range.
    """
    if name == "constant":
        return None
    if name not in FAMILIES:
        raise ValueError(f"there is no family {str(name)[:40]!r}: choose among constant, {', '.join(FAMILIES)}")
    letter, _, least, most = FAMILIES[name]
    value = finite(parameter, f"{name}'s {letter}")
    if not least <= value <= most:
        raise ValueError(f"{name}'s {letter} goes from {least:g} to {most:g} here, got {value:g}")
    curve: Schedule = notation.FAMILIES[name][0](value)
    return curve


def through(points: Any, over: Any = "steps") -> Spline:
    """The monotone spline through `points` (s, λ), whose ends are λ = 0 at pure noise and λ = 1 at the image.

    Raises `ValueError` for ends elsewhere, for points that fall, are too near to one another, or too many.
    """
    if not 2 <= len(points) <= MOST_POINTS:
        raise ValueError(f"a curve has 2 to {MOST_POINTS} points, got {len(points)}")
    if not all(isinstance(point, list | tuple) and len(point) == 2 for point in points):
        raise ValueError(f"a curve's points are pairs (s, λ), got {points!r:.200}")
    # Numbers before anything else: whatever a browser sends arrives here.
    pairs = [(finite(s, "a point's s"), finite(lam, "a point's λ")) for s, lam in points]
    spline = Spline(pairs, over=over)
    if (first := spline.points[0]) != (0.0, 0.0) or (last := spline.points[-1]) != (1.0, 1.0):
        ends = f"{tuple(first)} and {tuple(spline.points[-1])}"
        raise ValueError(f"a curve begins at (0, 0), pure noise, and ends at (1, 1), the image; got {ends}")
    for (s, lam), (later, higher) in pairwise([*spline.points[:-1], last]):
        if higher < lam:
            raise ValueError(f"λ may not fall from noise to image: it does between s = {s:g} and {later:g}")
        if later - s < CLOSEST - ROUNDING:
            raise ValueError(f"two points are less than {CLOSEST} apart, at s = {s:g} and {later:g}")
    return spline


def points_of(schedule: Schedule) -> list[tuple[float, float]]:
    """Points that a spline needs to follow `schedule`, from λ = 0 to 1, to begin to change it from there."""
    if isinstance(schedule, Spline):
        return [(s, lam) for s, lam in schedule.points]
    if isinstance(schedule, Step):
        jump = min(max(1 - schedule.p, 2 * CLOSEST), 1 - 2 * CLOSEST)
        return [(0.0, 0.0), (jump - CLOSEST, 0.0), (jump + CLOSEST, 1.0), (1.0, 1.0)]
    fine = [(i / 1000, schedule(i / 1000)) for i in range(1001)]
    lengths = list(accumulate((math.dist(*pair) for pair in pairwise(fine)), initial=0.0))
    points = [(0.0, 0.0)]
    for i in range(1, 6):  # at equal distances along the line, so that steep parts have their share
        s = max(fine[bisect(lengths, lengths[-1] * i / 6)][0], round(points[-1][0] + 2 * CLOSEST, 3))
        if s < 1 - 2 * CLOSEST:
            points.append((s, round(schedule(s), 3)))
    return [*points, (1.0, 1.0)]


def drawing(schedule: Schedule | None, steps: int) -> dict[str, Any]:
    """All that a page shows of a curve: its line, its points, λ at each of `steps` sampling steps, and their mean."""
    if schedule is None:
        flat = [[i / steps, 1.0] for i in range(steps)]
        return {
            "schedule": None,
            "points": [],
            "line": [[0.0, 1.0], [1.0, 1.0]],
            "steps": flat,
            "average": 1.0,
            "description": "λ stays the same",
        }
    places = {i / FINENESS for i in range(FINENESS + 1)} | {s for s, _ in points_of(schedule)}
    if isinstance(schedule, Step) and 0 < schedule.p < 1:
        places |= {1 - schedule.p - 1e-6, 1 - schedule.p}
    at = [[i / steps, schedule(i / steps)] for i in range(steps)]
    return {
        "schedule": schedule.to_dict(),
        "points": points_of(schedule),
        "line": [[s, schedule(s)] for s in sorted(places)],
        "steps": at,
        "average": sum(lam for _, lam in at) / steps,
        "description": str(schedule),
    }


def read(record: Any) -> Schedule | None:
    """The curve of a page, a link or a file: a family with its λ at 1, or a spline with its ends pinned.

    Raises `ValueError` for anything else.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise ValueError(f"a curve is a schedule's record, got {str(record)[:80]!r}")
    schedule = Schedule.from_dict(record)
    if isinstance(schedule, Spline):
        return through(schedule.points, schedule.over)
    family = notation.family_of(schedule)
    if family is None:
        raise ValueError(f"the studio's curves are power, step, sigmoid and spline, up to λ = 1; got {schedule!r}")
    of_family(*family)
    return schedule


def family_of(schedule: Schedule | None) -> tuple[str, float | None]:
    """The family that a curve was started from, and its parameter; "spline" for one that was drawn."""
    if schedule is None:
        return "constant", None
    if isinstance(schedule, Spline):
        return "spline", None
    if family := notation.family_of(schedule):
        return family
    raise ValueError(f"{schedule!r} is of no family that a curve can start from")


def answer(asked: Any) -> dict[str, Any]:
    """What the curve editor is told about the points, or the schedule's record, that it holds: `drawing`, or an error.

    `asked` comes from a browser: "steps", and "points" with "over", or "schedule".
    """
    try:
        steps = asked.get("steps", 25)
        if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps go from 1 to {MOST_STEPS}")
        points = asked.get("points")
        return drawing(through(points, asked.get("over", "steps")) if points else read(asked.get("schedule")), steps)
    except (ValueError, TypeError, AttributeError) as error:
        return {"error": " ".join(str(error).split())}
