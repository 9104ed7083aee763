"""What a search knows, drawn: the posterior of the score, the evaluations, the acquisition function, the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deradiff.search.answers import Best, Front
from deradiff.search.goals import DRIFT, Goal
from deradiff.search.knees import Knee, drawn
from deradiff.search.loop import SearchState
from deradiff.search.spaces import Coordinate, Point, SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe and Ito's

BAND = 1.6448536269514722
"""Standard deviations that hold 90% of a normal distribution."""


def draw(space: SearchSpace, goal: Goal, state: SearchState, answer: Best | Front | Knee, path: Path) -> None:
    """Write the figure of a search to `path` as PNG (DeRaDiff, figure 8).

    For one objective: a panel for every coordinate along the line through the answer, with the acquisition function
    below. For several: every pair of objectives, with the Pareto set. For a knee: the front, and the score beside it.
    """
    from matplotlib.figure import Figure

    if isinstance(answer, Knee):
        figure = Figure(figsize=(10.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _bent(left, space, state, answer)
        _paid(right, space, goal, state, answer)
        figure.savefig(path, format="png", dpi=150)
        return
    panels = len(space.coordinates) if isinstance(answer, Best) else max(1, len(goal.objectives) - 1)
    figure = Figure(figsize=(2.2 + 4.4 * panels, 5.6 if isinstance(answer, Best) else 4.4), layout="constrained")
    if isinstance(answer, Best):
        axes: Any = figure.subplots(2, panels, sharex="col", squeeze=False, height_ratios=(3, 1))
        for k in range(panels):
            _posterior(axes[0, k], space, goal, state, answer, k)
            _acquisition(axes[1, k], space, state, answer, k)
        axes[0, 0].legend(fontsize="small", loc="best")
    else:
        row: Any = figure.subplots(1, panels, squeeze=False)[0]
        for k in range(panels):
            _front(row[k], space, goal, answer, k + 1)
        row[0].legend(fontsize="small", loc="best")
    figure.savefig(path, format="png", dpi=150)


def _line(space: SearchSpace, point: Point, k: int) -> list[Point]:
    """The points of the space on the line through `point` along coordinate `k`."""
    values = space.coordinates[k].values()
    line = [tuple(value if i == k else at for i, at in enumerate(point)) for value in values]
    return [candidate for candidate in line if space.holds(candidate)]


def _posterior(axes: Axes, space: SearchSpace, goal: Goal, state: SearchState, answer: Best, k: int) -> None:
    """Posterior mean and band of the score along one coordinate, with what was observed."""
    assert state.models is not None and state.tables is not None
    (gain,), line = state.models.gains, _line(space, answer.point, k)
    at, x = space.unit(line), [point[k] for point in line]
    level = float(goal.objectives[0].at_reference(state.tables).mean())
    mean, spread = level + gain.mean(at), BAND * gain.deviation(at)
    axes.fill_between(
        x,
        (mean - spread).tolist(),
        (mean + spread).tolist(),
        color=BLUE,
        alpha=0.2,
        linewidth=0,
        label="90% of the posterior",
    )
    axes.plot(x, mean.tolist(), color=BLUE, linewidth=2, label="posterior mean")
    on_line = [evaluation for evaluation in answer.evaluations if evaluation.point in {*line}]
    away = [evaluation for evaluation in answer.evaluations if evaluation.point not in {*line}]
    for evaluations, colour, label in ((on_line, INK, "evaluations"), (away, GREY, "evaluations off this line")):
        if evaluations:
            axes.errorbar(
                [evaluation.point[k] for evaluation in evaluations],
                [level + evaluation.gains[0] for evaluation in evaluations],
                [BAND * evaluation.errors[0] for evaluation in evaluations],
                fmt="o",
                color=colour,
                markersize=4,
                capsize=2,
                linewidth=1,
                label=label,
            )
    low, high = answer.ranges[k]
    axes.axvspan(low, high, color=ORANGE, alpha=0.12, linewidth=0)
    axes.axvline(answer.point[k], color=ORANGE, linewidth=1.5, label="best, and 90% of where it may lie")
    axes.set_title(f"{space.coordinates[k].name} = {answer.point[k]:g} [{low:g}, {high:g}]", fontsize="medium")
    axes.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"{goal.objectives[0]}\n(errors of the difference from the reference)" if k == 0 else "")
    axes.grid(alpha=0.25)


def _acquisition(axes: Axes, space: SearchSpace, state: SearchState, answer: Best, k: int) -> None:
    """What another evaluation would be expected to gain, along one coordinate."""
    assert state.proposal is not None
    values = dict(zip(state.proposal.candidates, state.proposal.values.tolist(), strict=True))
    if len(space.coordinates) == 1:
        line = _line(space, answer.point, k)
        known = [point for point in line if point in values]
        axes.plot([point[k] for point in known], [values[point] for point in known], color=GREEN, linewidth=1.5)
    else:
        places = list(values)
        axes.plot([point[k] for point in places], [values[point] for point in places], ".", color=GREEN, markersize=3)
    axes.axvline(answer.point[k], color=ORANGE, linewidth=1.5)
    axes.set_ylabel("expected gain" if k == 0 else "")
    axes.set_xlabel(space.coordinates[k].name)
    if space.coordinates[k].log:
        _spread_evenly(axes, space.coordinates[k])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _spread_evenly(axes: Axes, coordinate: Coordinate) -> None:
    """A logarithmic axis with ticks that are read at a glance."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    steps = [tick * 10**decade for decade in range(-3, 4) for tick in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if coordinate.low <= step <= coordinate.high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _front(axes: Axes, space: SearchSpace, goal: Goal, answer: Front, j: int) -> None:
    """The gains of all evaluations in the first objective and the j-th, and the Pareto set among them."""
    axes.errorbar(
        [evaluation.gains[0] for evaluation in answer.evaluations],
        [evaluation.gains[j] for evaluation in answer.evaluations],
        [BAND * evaluation.errors[j] for evaluation in answer.evaluations],
        [BAND * evaluation.errors[0] for evaluation in answer.evaluations],
        fmt="o",
        color=GREY,
        markersize=4,
        linewidth=0.8,
        label="evaluations",
    )
    order = sorted(answer.points, key=lambda member: member.gains[0].value)
    x, y = [member.gains[0].value for member in order], [member.gains[j].value for member in order]
    line = "o-" if len(goal.objectives) == 2 else "o"  # a line through the projection of more would mean nothing
    axes.plot(x, y, line, color=ORANGE, markersize=6, linewidth=1.5, label="Pareto set")
    for member in order:
        text = ", ".join(f"{value:g}" for value in member.point)
        axes.annotate(
            text,
            (member.gains[0].value, member.gains[j].value),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize="x-small",
        )
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"{goal.objectives[0]}, gain over the reference")
    axes.set_ylabel(f"{goal.objectives[j]}, gain over the reference")
    axes.grid(alpha=0.25)


def _bent(axes: Axes, space: SearchSpace, state: SearchState, answer: Knee) -> None:
    """How often the reference is beaten against the drift: evaluations, draws of the front, and the knee."""
    assert state.models is not None and state.proposal is not None
    places = drawn(space, state.models, state.proposal.candidates, 0)
    for drifts, gains in zip(places.drifts[:40], places.gains[:40], strict=True):
        order = drifts.argsort()
        axes.plot(drifts[order].tolist(), (0.5 + gains[order].cummax(0).values).tolist(), color=BLUE, alpha=0.08)
    axes.plot([], [], color=BLUE, alpha=0.5, label="draws of the front")
    axes.errorbar(
        [-one.gains[1] for one in answer.evaluations],
        [0.5 + one.gains[0] for one in answer.evaluations],
        [BAND * one.errors[0] for one in answer.evaluations],
        [BAND * one.errors[1] for one in answer.evaluations],
        fmt="o",
        color=INK,
        markersize=4,
        linewidth=1,
        label="evaluations",
    )
    _labelled(axes, answer)
    _marked(axes, answer)
    axes.set_ylabel("share of the reference's images beaten")
    axes.legend(fontsize="small", loc="lower right")


def _paid(axes: Axes, space: SearchSpace, goal: Goal, state: SearchState, answer: Knee) -> None:
    """The score itself against the drift."""
    assert state.tables is not None and goal.knee is not None
    drifts, scores = state.tables.points[DRIFT].mean(1), state.tables.points[goal.knee].mean(1)
    axes.plot(drifts.tolist(), scores.tolist(), "o", color=INK, markersize=4)
    _marked(axes, answer)
    axes.set_ylabel(f"mean {goal.knee}")
    for drift, score, point in zip(drifts.tolist(), scores.tolist(), state.points, strict=True):
        text = ", ".join(f"{value:g}" for value in point)
        axes.annotate(text, (drift, score), xytext=(5, -9), textcoords="offset points", fontsize="x-small")
    axes.set_title(f"{', '.join(c.name for c in space.coordinates)} beside each point", fontsize="medium")


def _labelled(axes: Axes, answer: Knee) -> None:
    if answer.point is None:
        axes.set_title(f"no knee (probability of one {answer.probability:.0%})", fontsize="medium")
    else:
        axes.set_title(f"knee at a drift of {answer.drift}", fontsize="medium")


def _marked(axes: Axes, answer: Knee) -> None:
    """The knee and its interval along the drift."""
    if answer.point is not None:
        axes.axvspan(answer.drift.low, answer.drift.high, color=ORANGE, alpha=0.12, linewidth=0)
        axes.axvline(answer.drift.value, color=ORANGE, linewidth=1.5, label="knee, and 90% of where it may lie")
    axes.set_xlabel("drift from the reference, √(path KL)")
    axes.grid(alpha=0.25)
