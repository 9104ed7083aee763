"""What a search found, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from deradiff.search.answers import LEVEL, Best, Condition, Front, Interval
from deradiff.search.goals import Goal
from deradiff.search.knees import FLATTER, Knee
from deradiff.search.loop import SearchState
from deradiff.search.running import SearchOutcome
from deradiff.search.spaces import Point, SearchSpace

UNTOLD = ("exact", "few", "no target")
"""Verdicts that say nothing about the answer."""


def sentences(
    space: SearchSpace, goal: Goal, outcome: SearchOutcome, anchor_beta: float | None = None
) -> Iterator[str]:
    """The answer, how sure it is, what holds there and what does not, each a sentence or two."""
    answer = outcome.answer
    if isinstance(answer, Best):
        yield from _best(space, goal, answer, anchor_beta)
        yield from (check.sentence for check in outcome.checks.values())
        if outcome.verdict and outcome.verdict["kind"] not in UNTOLD:
            yield f"Beside a retrained model: {outcome.verdict['words']}."
    elif isinstance(answer, Knee):
        yield from _knee(space, goal, answer)
        yield from (check.sentence for check in outcome.checks.values())
    else:
        yield from _front(space, goal, outcome, answer)
    yield f"Stopped after {len(answer.evaluations)} evaluations: {answer.stopped}."
    for point, why in outcome.refused.items():
        yield f"{space.text(point)} could not be used, and nothing beyond it was tried: {why}"
    if outcome.left_out:
        yield f"{outcome.left_out} images were left out at every point, since a score of theirs failed at some."


def evaluated(space: SearchSpace, state: SearchState) -> str:
    """The last evaluation, and where to next, in one line."""
    assert state.tables is not None and state.proposal is not None
    names = [f"{name} {float(table[-1].mean()):.4g}" for name, table in state.tables.points.items()]
    then = state.proposal.point
    gain = "" if state.proposal.gain is None else f", expected to gain {state.proposal.gain:.2g}"
    after = "" if then is None else f"; next {space.text(then)}{gain}"
    return f"{len(state.points)}. {space.text(state.points[-1])}: {', '.join(names)}{after}"


def _best(space: SearchSpace, goal: Goal, answer: Best, anchor_beta: float | None) -> Iterator[str]:
    (objective,) = goal.objectives
    where = _where(space, answer.point, answer.ranges)
    beta = ""
    if anchor_beta is not None and space.kind == "lam" and answer.point[0] > 0:
        beta = f", which stands for β = {anchor_beta / answer.point[0]:.4g}"
    if not answer.reachable:
        yield f"No point meets all conditions. {where} comes nearest."
    else:
        yield f"Best: {where} with probability {LEVEL:.0%}{beta}."
    yield (f"{objective} is expected to be {answer.score} there, {_signed(answer.gain)} from the reference's.")
    yield from (f"{condition}." for condition in answer.conditions)
    if answer.gain.low <= 0 and any(answer.point):
        yield "No gain over the reference can be told from noise: more prompts would tell."
    wide = [
        c.name
        for c, (low, high) in zip(space.coordinates, answer.ranges, strict=True)
        if c.unit(high) - c.unit(low) > 0.5
    ]
    if wide:
        yield f"Where the best {' and '.join(wide)} lies can hardly be told: draw more prompts, or more seeds of them."


def _knee(space: SearchSpace, goal: Goal, answer: Knee) -> Iterator[str]:
    beaten = f"how often the reference's images are beaten in {goal.knee}"
    if answer.point is None:
        yield (
            f"No knee found: up to a drift of {answer.drift}, {beaten} goes on rising with the drift (a knee has "
            f"probability {answer.probability:.0%}; beyond it the rise would be below {FLATTER:.0%} of that before)."
        )
        yield "That says neither that the anchor hacks nor that it does not: look at the images and at held-out scores."
        return
    where = ", ".join(
        f"{c.name} in [{low:g}, {high:g}]" for c, (low, high) in zip(space.coordinates, answer.ranges, strict=True)
    )
    yield (
        f"Take {space.text(answer.point)}: surely before the knee, which lies at {where} with probability {LEVEL:.0%}, "
        f"at a drift of {answer.drift}."
    )
    assert answer.beats is not None and answer.gain is not None
    yield (
        f"There an image has more {goal.knee} than one of the reference with probability {answer.beats}, and "
        f"{_signed(answer.gain)} of it on average."
    )
    yield f"Beyond the knee {beaten} rises {answer.slowing} times as fast with the drift as before it."


def _front(space: SearchSpace, goal: Goal, outcome: SearchOutcome, answer: Front) -> Iterator[str]:
    if not answer.points:
        yield "No point meets all conditions."
        return
    yield f"{len(answer.points)} points that no other beats in every objective:"
    for member in answer.points:
        gains = [f"{o} {_signed(gain)}" for o, gain in zip(goal.objectives, member.gains, strict=True)]
        yield f"{space.text(member.point)}: {', '.join(gains)}; on the front with probability {member.probability:.0%}"
        yield from (f"  {condition}" for condition in member.conditions if not _surely(condition))
        if outcome.checks[member.point].compared:
            yield f"  {outcome.checks[member.point].sentence}"


def _surely(condition: Condition) -> bool:
    return condition.probability > 0.99


def _where(space: SearchSpace, point: Point, ranges: tuple[tuple[float, float], ...]) -> str:
    parts = zip(space.coordinates, point, ranges, strict=True)
    return ", ".join(f"{c.name} = {value:g}, in [{low:g}, {high:g}]" for c, value, (low, high) in parts)


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
