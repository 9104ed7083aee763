"""The analysis of a study: who is counted, and what they preferred, over all configurations and one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deradiff.files import pages
from deradiff.study.ballots import Ballot, mistakes
from deradiff.study.plan import StudyPlan
from deradiff.study.preferences import Preference, counted, preference_of, votes_each

ALL = "all"
"""In place of a configuration's name: all of them, pooled."""


@dataclass(frozen=True)
class Line:
    """A preference between two methods, and what it is about."""

    first: str
    second: str
    configuration: str
    prompt_set: str
    question: str
    preference: Preference


@dataclass(frozen=True)
class Analysis:
    """What a study has found."""

    plan: StudyPlan
    participants: int
    """Who voted and is counted."""
    failed: int
    """Who failed attention checks and is left out."""
    unchecked: int
    """Who is counted, but left before an attention check."""
    left_side: tuple[int, int]
    """Answers for the left set and for the right one, whatever the methods: they should be about as many."""
    pairs: tuple[int, ...]
    """How many pairs each participant answered, attention checks apart."""
    overall: tuple[Line, ...]
    by_configuration: tuple[Line, ...]


def analysed(plan: StudyPlan, ballots: Sequence[Ballot]) -> Analysis:
    """Count the votes of everybody who did not fail the attention checks.

    Raises `ValueError` where nobody is left, or nobody has voted yet.
    """
    if not ballots:
        raise ValueError("nobody has voted yet: there is nothing to analyse")
    checks = mistakes(ballots)
    failed = {number for number, (wrong, _) in checks.items() if wrong > plan.mistakes_allowed}
    valid = [ballot for ballot in ballots if ballot.real and ballot.participant not in failed]
    if not valid:
        raise ValueError(
            f"no vote is left: of {pages.counted(len(checks), 'participant')}, {len(failed)} failed the attention "
            f"checks and {len(checks) - len(failed)} answered nothing else yet"
        )
    people = {ballot.participant for ballot in valid}
    return Analysis(
        plan=plan,
        participants=len(people),
        failed=len(failed),
        unchecked=sum(checks[number][1] == 0 for number in people),
        left_side=(sum(ballot.answer == "left" for ballot in valid), sum(ballot.answer == "right" for ballot in valid)),
        pairs=tuple(votes_each(valid).values()),
        overall=tuple(_lines(plan, valid, None)),
        by_configuration=tuple(line for each in plan.configurations for line in _lines(plan, valid, each.name)),
    )


# -- helpers ----------------------------------------------------------------------------------------------------------


def _lines(plan: StudyPlan, ballots: Sequence[Ballot], configuration: str | None) -> Iterator[Line]:
    """The preferences of one configuration, or of all, that anybody voted on."""
    some = [ballot for ballot in ballots if configuration in (None, ballot.configuration)]
    sets = {each.name: each.prompt_set for each in plan.configurations}
    for first, second in dict.fromkeys(cell[1:] for cell in plan.cells):
        for question in plan.questions:
            counts = counted([ballot for ballot in some if ballot.question == question.key], first, second)
            if len(counts):
                where = (ALL, ALL) if configuration is None else (configuration, sets[configuration])
                yield Line(first, second, *where, question.key, preference_of(counts))
