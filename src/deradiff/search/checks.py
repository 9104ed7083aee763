"""Is the winner a better model, or has it found what the score overlooks? Held-out scores and diversity say.

A score that is pushed far enough stops meaning what it was made for. What was not pushed shows that: scores that the
search did not look at, and how diverse the images still are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, mean
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.results import Results
from deradiff.search.goals import RECALL, VENDI, Goal
from deradiff.search.readings import by_unit

ERRORS = 2.0
"""Standard errors beyond which a difference counts."""

LOST_DIVERSITY = 0.1
"""The share of the Vendi score that may be lost unremarked."""

LOW_RECALL = 0.5
"""Recall below which half of what the reference draws is out of reach."""


@dataclass(frozen=True)
class ReferenceComparison:
    """One number of the winner beside the reference's; the difference is taken unit by unit."""

    name: str
    reference: float
    winner: float
    difference: Estimate
    suspicious: bool

    def __str__(self) -> str:
        if self.name == RECALL:
            return f"recall of the reference's images is {self.winner:.2f}"
        turn = "rises" if self.difference.value > 0 else "falls"
        if abs(self.difference.value) < ERRORS * self.difference.error:
            turn = "hardly changes"
        amount = f"{self.difference.value:+.3g} ± {self.difference.error:.2g}"
        return f"{'the Vendi score' if self.name == VENDI else self.name} {turn} ({amount})"


@dataclass(frozen=True)
class Check:
    """What speaks for and against the winner, and a sentence that sums it up."""

    compared: tuple[ReferenceComparison, ...]
    sentence: str


def measured(plan: Plan, prompts: str, goal: Goal) -> tuple[str, ...]:
    """What the winner is checked by: scores of the plan that the goal does not name, and diversity by features."""
    held_out = tuple(name for name in plan.scores if name not in goal.names)
    if not plan.features:
        return held_out
    return (*held_out, RECALL, *([VENDI] if len(plan.prompts[prompts].seeds) > 1 else []))


def check(results: Results, reference: Arm, winner: Arm, prompts: str, goal: Goal) -> Check:
    """Compare the winner with the reference by what the search did not look at."""
    names = measured(results.plan, prompts, goal)
    if not names:
        return Check((), "Not checked for reward hacking: give held-out scores, or features to see diversity by.")
    (before, after), _ = by_unit(results, [reference, winner], prompts, names)
    compared = [_compared(name, before[name], after[name]) for name in names]
    return Check(tuple(compared), _words(compared))


def nothing_to_check() -> Check:
    """Of a search whose winner is the reference."""
    return Check((), "The reference itself is best: nothing was hacked.")


def _compared(name: str, before: Float[Tensor, " unit"], after: Float[Tensor, " unit"]) -> ReferenceComparison:
    was, now = mean(before), mean(after)
    difference = mean(after - before)
    fell = difference.value < -ERRORS * difference.error
    if name == RECALL:
        suspicious = now.value < LOW_RECALL
    elif name == VENDI:
        suspicious = fell and -difference.value > LOST_DIVERSITY * was.value
    else:
        suspicious = fell
    return ReferenceComparison(name, was.value, now.value, difference, suspicious)


def _words(compared: Sequence[ReferenceComparison]) -> str:
    against = [str(comparison) for comparison in compared if comparison.suspicious]
    if not against:
        return f"No sign of reward hacking: {', '.join(map(str, compared))}."
    return (
        f"This may be reward hacking: {' and '.join(against)}, compared with the reference. Look at the images; a "
        "condition on what falls keeps the search from it."
    )
