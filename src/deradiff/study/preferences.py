"""Preferences from votes: shares, what they are where each participant weighs the same, intervals, a sign test.

Shares are of the first method, of Equal and of the second, in this order, and add up to one (AIG, §4.4, A.4). All
intervals are percentile bootstrap intervals over participants, seeded: people are resampled with all of their votes,
since the votes of one person are alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from deradiff.measures.agreement import CONFIDENCE, RESAMPLES
from deradiff.study.ballots import Ballot

Counts = Int[np.ndarray, "participant answer"]
"""Votes of each participant for the first method, for Equal, for the second."""


@dataclass(frozen=True)
class Rate:
    """A share between 0 and 1, and its 95% interval; NaN where there is none, as of a single participant."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Preference:
    """What participants said of two methods in one question."""

    participants: int
    votes: tuple[int, int, int]
    """For the first method, Equal, the second."""
    shares: tuple[Rate, Rate, Rate]
    """Of all votes."""
    normalised: tuple[Rate, Rate, Rate]
    """The mean over participants of each one's shares."""
    wins: Rate
    """The first method's share of the votes that are not Equal."""
    p_votes: float
    """Two-sided sign test over votes, Equal left out: as if every vote were another person's. 1 where all are Equal."""
    p_participants: float
    """The same over participants, each counted once, by which method they preferred more often."""


def preference_of(counts: Counts, *, resamples: int = RESAMPLES, seed: int = 0) -> Preference:
    """Shares, intervals and tests of the votes of participants, a row (first, Equal, second) for each.

    Raises `ValueError` where there is no participant, or one without a vote.
    """
    if counts.ndim != 2 or counts.shape[1:] != (3,) or not len(counts) or bool((counts.sum(1) < 1).any()):
        raise ValueError(
            f"votes must be a row (first, Equal, second) for every participant with a vote, got {counts!r}"
        )
    people = len(counts)
    own = counts / counts.sum(1, keepdims=True)
    total = counts.sum(0)
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=resamples)
    pooled, each = drawn @ counts, drawn @ own / people
    decided = pooled[:, 0] + pooled[:, 2]
    with np.errstate(invalid="ignore"):
        won = pooled[:, 0] / decided
    return Preference(
        participants=people,
        votes=(int(total[0]), int(total[1]), int(total[2])),
        shares=_rates(total / total.sum(), pooled / pooled.sum(1, keepdims=True), people),
        normalised=_rates(own.mean(0), each, people),
        wins=_rate(float(total[0] / sides) if (sides := total[0] + total[2]) else math.nan, won, people),
        p_votes=sign_test(int(total[0]), int(total[2])),
        p_participants=sign_test(int((counts[:, 0] > counts[:, 2]).sum()), int((counts[:, 0] < counts[:, 2]).sum())),
    )


def sign_test(first: int, second: int) -> float:
    """The two-sided p of so many preferences each way, were both as likely; 1 for none."""
    return float(stats.binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def counted(ballots: Iterable[Ballot], first: str, second: str) -> Counts:
    """Votes of each participant between two methods, whichever side they were shown on; others are left out."""
    counts: dict[int, list[int]] = {}
    for ballot in ballots:
        if {ballot.left, ballot.right} == {first, second}:
            row = counts.setdefault(ballot.participant, [0, 0, 0])
            row[1 if ballot.chosen is None else 0 if ballot.chosen == first else 2] += 1
    return np.array(list(counts.values()), dtype=np.int64).reshape(len(counts), 3)


def votes_each(ballots: Iterable[Ballot]) -> Mapping[int, int]:
    """How many pairs every participant answered."""
    pairs = {(ballot.participant, ballot.position) for ballot in ballots}
    return Counter(participant for participant, _ in sorted(pairs))


def _rates(values: Float[np.ndarray, " answer"], resampled: np.ndarray, people: int) -> tuple[Rate, Rate, Rate]:
    first, equal, second = (_rate(float(values[i]), resampled[:, i], people) for i in range(3))
    return first, equal, second


def _rate(value: float, resampled: np.ndarray, people: int) -> Rate:
    known = resampled[np.isfinite(resampled)]
    if people < 2 or not len(known):
        return Rate(value, math.nan, math.nan)
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Rate(value, float(low), float(high))
