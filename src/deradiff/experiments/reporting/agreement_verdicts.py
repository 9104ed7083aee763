"""The trust verdict of every approximation beside its true error: the retrained model's mean is the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED, TRUSTING
from deradiff.experiments.reporting.agreement_pairs import ComparedPair, Study
from deradiff.experiments.results import Results

JUDGEMENTS = ("right", "false alarm", "miss", "open")


@dataclass(frozen=True)
class Judged:
    """One approximation by one score: what its weights claimed, and what was true.

    Errors are Algorithm 1's in shares of the shift, the retrained model's mean minus the reference's.
    """

    pair: ComparedPair
    score: str
    kind: str
    sentence: str
    evenness: float
    estimated: Estimate | None
    """None where the verdict knew no shift."""
    true: Estimate | None
    """None without a reference, or where retraining moved nothing."""
    weighted: float | None
    """The error of the weighted mean, in the same shares."""

    @property
    def beyond(self) -> float:
        """The true error beyond two standard errors."""
        return max(0.0, abs(self.true.value) - 2 * self.true.error) if self.true else float("nan")

    @property
    def judgement(self) -> str:
        """The claim beside the truth, as on the digits: right, a miss, a false alarm, or open where none was made.

        "Off" claims that the weighted mean is nearer: where it is not, or nothing was off, that was a false alarm.
        """
        if self.true is None or self.weighted is None:
            return "open"
        if self.kind in TRUSTING:
            return "right" if self.beyond <= TRUSTED else "miss"
        if self.kind == "off":
            nearer = abs(self.weighted) < abs(self.true.value)
            return "right" if self.beyond > 0 and nearer else "false alarm"
        return "open"


def judged(results: Results, study: Study) -> list[Judged]:
    """The verdicts of a study's approximations, where weights tell of any; an anchor as it is needs none."""
    claims = []
    for pair in study.pairs:
        verdict = None if pair.alone else results.verdict(pair.models.approximated, study.prompts, study.score)
        if verdict is None:
            continue
        shift = study.shift(pair.models.target)
        true = weighted = None
        if shift:
            true = Estimate(pair.difference.value / abs(shift), pair.difference.error / abs(shift))
            weighted = (verdict.comparison.weighted.value - pair.retrained) / abs(shift)
        # The verdict counts weighted minus plain, the truth plain minus retrained.
        estimated = None if verdict.error is None else Estimate(-verdict.error.value, verdict.error.error)
        claims.append(
            Judged(
                pair,
                study.score,
                verdict.kind,
                verdict.words,
                verdict.comparison.evenness,
                estimated,
                true,
                weighted,
            )
        )
    return claims


def counts(claims: Sequence[Judged]) -> list[tuple[str | int, ...]]:
    """By score and kind of verdict, and last of all together: how many there were, and how many of each judgement."""
    groups: dict[tuple[str, str], list[Judged]] = {}
    for claim in claims:
        groups.setdefault((claim.score, claim.kind), []).append(claim)
    rows: list[tuple[str | int, ...]] = [(*group, *_count(some)) for group, some in groups.items()]
    return [*rows, ("all", "", *_count(claims))]


def _count(claims: Sequence[Judged]) -> tuple[int, ...]:
    judgements = [claim.judgement for claim in claims]
    return (len(judgements), *(judgements.count(judgement) for judgement in JUDGEMENTS))
