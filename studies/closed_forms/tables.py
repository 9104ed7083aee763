"""What the records of a comparison add up to: verdicts against true errors, weights against evenness, goals.

Errors are shares of the exact reward shift. "Beyond" an error's Monte Carlo error means what is left of it after two
standard errors: what cannot be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from deradiff.algorithm.comparisons import EVEN
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED, TRUSTING
from studies.closed_forms.comparison import Record

EVENNESS = (0.0, 0.01, 0.03, 0.1, 0.2, EVEN, 0.5, 0.7, 0.9, 1.0)
"""The bounds of the bins of ESS/n."""


def select(records: Iterable[Record], **wanted: object) -> list[Record]:
    """The records whose case has these values, as in `select(records, world="crossing", eta=1.0)`."""
    return [record for record in records if all(record["case"][key] == value for key, value in wanted.items())]


def error(record: Record, arm: str, against: str = "against_exact") -> Estimate | None:
    """The relative error of an arm, None where it was not drawn or has none."""
    found = record["arms"].get(arm, {}).get(against)
    return None if found is None else Estimate(*found)


def beyond(estimate: Estimate) -> float:
    """The size of an error after two standard errors."""
    return max(0.0, abs(estimate.value) - 2 * estimate.error)


def true_error(record: Record) -> Estimate:
    """What the verdict estimates: Algorithm 1's mean against the exactly aligned model through the same sampler."""
    return Estimate(*record["arms"]["plain"]["against_aligned"])


def judged(records: Iterable[Record]) -> list[Record]:
    """The records that carry a verdict."""
    return [record for record in records if "verdict" in record]


class VerdictRow(NamedTuple):
    """Verdicts of one kind with one sampler: runs, and how far off these runs truly were."""

    kind: str
    eta: float
    runs: int
    within: int
    """Runs whose true error, beyond its Monte Carlo error, is at most `TRUSTED`."""
    worst: float
    """The largest true error beyond its Monte Carlo error."""

    @property
    def false_alarms(self) -> int:
        """Runs not called trustworthy though they were right."""
        return 0 if self.kind in TRUSTING else self.within

    @property
    def misses(self) -> int:
        """Runs called trustworthy though they were wrong."""
        return self.runs - self.within if self.kind in TRUSTING else 0


def verdict_rows(records: Iterable[Record]) -> list[VerdictRow]:
    """The table of verdict against true error, by kind and η."""
    errors: dict[tuple[str, float], list[float]] = {}
    for record in judged(records):
        key = record["verdict"]["kind"], record["case"]["eta"]
        errors.setdefault(key, []).append(beyond(true_error(record)))
    return [
        VerdictRow(kind, eta, len(found), sum(size <= TRUSTED for size in found), max(found))
        for (kind, eta), found in sorted(errors.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]


class EvennessRow(NamedTuple):
    """The errors of weighted means whose ESS/n lies in one bin, against the exactly aligned model."""

    low: float
    high: float
    stochastic: bool
    runs: int
    plain: float
    """The median size of Algorithm 1's error in the same runs."""
    weighted: float
    """The median size of the weighted mean's error."""
    noise: float
    """Its median standard error."""
    worst: float
    """The largest error beyond its Monte Carlo error."""


def evenness_rows(records: Iterable[Record]) -> list[EvennessRow]:
    """The weighted mean's error by evenness of the weights, for samplers with noise and without; λ = 1 has none."""
    mixed = [record for record in judged(records) if record["verdict"]["kind"] != "exact"]
    rows = []
    for stochastic in (True, False):
        for low, high in pairwise(EVENNESS):
            inside = [
                record
                for record in mixed
                if (record["case"]["eta"] > 0) == stochastic
                and low <= min(record["verdict"]["evenness"], EVENNESS[-1] - 1e-9) < high
            ]
            if inside:
                found = [Estimate(*record["arms"]["weighted"]["against_aligned"]) for record in inside]
                rows.append(
                    EvennessRow(
                        low,
                        high,
                        stochastic,
                        len(inside),
                        median(abs(true_error(record).value) for record in inside),
                        median(abs(estimate.value) for estimate in found),
                        median(estimate.error for estimate in found),
                        max(map(beyond, found)),
                    )
                )
    return rows


class Goal(NamedTuple):
    """A bound that the comparison has to keep: the worst of `runs` beside it."""

    words: str
    limit: float
    worst: float
    runs: int
    where: str

    @property
    def met(self) -> bool:
        """Whether the worst run keeps the bound."""
        return self.worst <= self.limit


def goals(records: Sequence[Record]) -> list[Goal]:
    """The bounds that realignment is held to in closed-form worlds, as far as the records tell."""
    crossing = select(records, world="crossing", study="grid")
    stochastic, fine = select(crossing, eta=1.0), select(records, study="fine")
    even = [record for record in select(crossing, eta=0.0) if record["verdict"]["evenness"] >= EVEN]
    trusted = [record for record in judged(records) if record["verdict"]["kind"] in TRUSTING]
    found = [
        _goal("Particles at η = 1: expected reward off by", 0.02, stochastic, _particles_off),
        _goal("Particles at η = 1: mode weights off by (total variation)", 0.01, stochastic, _modes_off),
        _goal("Particles at η = 1, 400 steps: expected reward off by", 0.01, fine, _particles_off),
        _goal(f"Weighted means at η = 0, ESS/n ≥ {EVEN:g}: off from the aligned model by", 0.05, even, _weighted_off),
        _goal("Runs called trustworthy: Algorithm 1 truly off by", TRUSTED, trusted, _truly_off),
    ]
    return [goal for goal in found if goal is not None]


def _goal(words: str, limit: float, records: Sequence[Record], size: Callable[[Record], float]) -> Goal | None:
    if not records:
        return None
    worst = max(records, key=size)
    return Goal(words, limit, size(worst), len(records), place(worst))


def _truly_off(record: Record) -> float:
    return beyond(true_error(record))


def _particles_off(record: Record) -> float:
    return beyond(Estimate(*record["arms"]["particles"]["against_exact"]))


def _weighted_off(record: Record) -> float:
    return beyond(Estimate(*record["arms"]["weighted"]["against_aligned"]))


def _modes_off(record: Record) -> float:
    arm = record["arms"]["particles"]
    return max(0.0, arm["modes_off"] - arm["modes_allowance"])


def place(record: Record) -> str:
    """Where a record stands, in words short enough for a table."""
    case = record["case"]
    return f"{case['world']}, η = {case['eta']:g}, β = {case['beta']:g}, λ = {case['lam']:g}"


def summary(records: Sequence[Record]) -> list[tuple[str, str, str, str, str]]:
    """For each world: how many runs, and the worst errors after two standard errors of three ways to sample."""
    rows = []
    for world in dict.fromkeys(record["case"]["world"] for record in judged(records)):
        found = judged(select(records, world=world))
        worst = []
        for arm in ("plain", "weighted", "particles"):
            estimates = [estimate for record in found if (estimate := error(record, arm, "against_aligned"))]
            worst.append(f"{max(map(beyond, estimates), default=0.0):.1%}")
        rows.append((world, str(len(found)), worst[0], worst[1], worst[2]))
    return rows
