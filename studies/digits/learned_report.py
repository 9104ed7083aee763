"""The tables of the study of learned families, made of whatever cells are there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED, TRUSTING
from studies.digits.learned import SEEDS, TUNED, cells

ARMS = ("algorithm 1", "weighted")

CELL = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One λ of one anchor over the seeds that are there; errors are shares of the shift; a verdict for each seed.

    `kinds` presume a tilt, `informed` go by the kind of anchor that was found.
    """

    family: str
    reward: str
    half: str
    anchor: float
    lam: float
    shift: Estimate
    errors: dict[str, Estimate]
    kinds: tuple[str, ...]
    informed: tuple[str, ...]
    seeds: int

    def judgement(self, kind: str) -> str:
        """A verdict beside the truth: right, a miss, a false alarm, or open where nothing was claimed.

        "Off" claims that the weighted mean is nearer: where it is not, that was a false alarm.
        """
        off = {arm: max(0.0, abs(error.value) - 2 * error.error) for arm, error in self.errors.items()}
        if kind in TRUSTING:
            return "right" if off["algorithm 1"] <= TRUSTED else "miss"
        if kind != "off":
            return "open"
        nearer = abs(self.errors["weighted"].value) < abs(self.errors["algorithm 1"].value)
        return "right" if off["algorithm 1"] > 0 and nearer else "false alarm"


def shares(case: Mapping[str, Any], arm: str) -> Estimate:
    """The error of a way of sampling as a share of the shift, whose own error counts too; NaN where nothing shifted."""
    (shift, shift_error), (gap, gap_error) = case["shift"], case[arm]
    if not shift:
        return Estimate(math.nan, math.nan)
    return Estimate(gap / abs(shift), math.hypot(gap_error / shift, gap * shift_error / shift**2))


def training_noise(found: Mapping[str, CELL]) -> dict[tuple[str, str], float]:
    """By family and arm, the standard deviation between seeds of an error, as a share of the shift, beyond sampling's.

    Pooled over all cases that have two seeds: half the squared difference of two less their own variances. Zero where
    that is negative; a family without two seeds is left out.
    """
    pools: dict[tuple[str, str], list[tuple[Estimate, Estimate]]] = {}
    for cell in cells():
        other = cell.__class__(cell.family, cell.reward, 1)
        if cell.seed or not {cell.name, other.name} <= found.keys():
            continue
        for first, second in zip(found[cell.name]["cases"], found[other.name]["cases"], strict=True):
            for arm in ARMS:
                pools.setdefault((cell.family, arm), []).append((shares(first, arm), shares(second, arm)))
    return {key: between_seeds(pairs) for key, pairs in pools.items()}


def between_seeds(pairs: Iterable[tuple[Estimate, Estimate]]) -> float:
    """The standard deviation between two trainings, beyond the estimates' own errors; 0 where there is none."""
    beyond = [((a.value - b.value) ** 2 - a.error**2 - b.error**2) / 2 for a, b in pairs]
    return math.sqrt(max(0.0, mean(beyond)))


def averaged(each: Sequence[Estimate], between: float) -> Estimate:
    """The mean over seeds, whose error holds the noise of training as well."""
    variance = sum(one.error**2 + between**2 for one in each) / len(each) ** 2
    return Estimate(mean(one.value for one in each), math.sqrt(variance))


def rows(found: Mapping[str, CELL]) -> list[Row]:
    """A row for every case, its seeds averaged; the error holds the noise of sampling and, given two, of training."""
    noise, made = training_noise(found), []
    for family, reward in dict.fromkeys((cell.family, cell.reward) for cell in cells()):
        its = [found[cell.name] for cell in cells(family, reward) if cell.name in found]
        for cases in zip(*(cell["cases"] for cell in its), strict=True):
            errors = {}
            for arm in ARMS:
                errors[arm] = averaged([shares(case, arm) for case in cases], noise.get((family, arm), 0.0))
            shift = Estimate(
                mean(case["shift"][0] for case in cases),
                math.sqrt(sum(case["shift"][1] ** 2 for case in cases)) / len(cases),
            )
            kinds = tuple(case["verdict"]["kind"] for case in cases)
            informed = tuple(case["verdict by kind"]["kind"] for case in cases)
            anchor, lam = cases[0]["anchor"], cases[0]["lam"]
            made.append(Row(family, reward, its[0]["half"], anchor, lam, shift, errors, kinds, informed, len(cases)))
    return made


def missing(found: Mapping[str, CELL]) -> list[str]:
    """The cells of the study that are not there."""
    return [cell.name for cell in cells() if cell.name not in found]


def split() -> str:
    """Which half of families and rewards thresholds were chosen on, in words."""
    pairs = list(dict.fromkeys((cell.family, cell.reward) for cell in cells()))
    tuned = ", ".join(f"{family} {reward}" for family, reward in pairs if (family, reward) in TUNED)
    judged = ", ".join(f"{family} {reward}" for family, reward in pairs if (family, reward) not in TUNED)
    return f"Thresholds may be chosen on {tuned}; judged by {judged}."


def table(found: Mapping[str, CELL]) -> str:
    """In Markdown: every case, its shift, the errors of Algorithm 1 and of weighted means, the verdicts."""
    lines = [
        "| models | reward | half | anchor | λ | seeds | shift | Algorithm 1 | weighted | presuming a tilt | which is "
        "| by kind | which is |",
        "|" + "---|" * 13,
    ]
    for row in rows(found):
        both = (row.kinds, row.informed)
        verdicts = [f"{', '.join(kinds)} | {', '.join(map(row.judgement, kinds))}" for kinds in both]
        lines.append(
            f"| {row.family} | {row.reward} | {row.half} | {row.anchor:g} | {row.lam:g} | {row.seeds} of {len(SEEDS)} "
            f"| {row.shift.value:+.3f} ± {row.shift.error:.3f} | {percent(row.errors['algorithm 1'])} "
            f"| {percent(row.errors['weighted'])} | {' | '.join(verdicts)} |"
        )
    return "\n".join(lines) + "\n"


def percent(share: Estimate) -> str:
    """As the tables show it."""
    if math.isnan(share.value):
        return "no shift"
    return f"{100 * share.value:+.0f} ± {100 * share.error:.0f}%"


def judgements(found: Mapping[str, CELL]) -> str:
    """In Markdown: how often verdicts were right, by family and half, presuming a tilt and by the kind of anchor."""
    counts: dict[tuple[str, str, str, str], Counter[str]] = {}
    for row in rows(found):
        for said, kinds in (("presuming a tilt", row.kinds), ("by kind", row.informed)):
            place = (row.half, row.family, row.reward, said)
            counts.setdefault(place, Counter()).update(map(row.judgement, kinds))
    outcomes = ("right", "false alarm", "miss", "open")
    lines = ["| half | models | reward | verdicts | " + " | ".join(outcomes) + " |", "|" + "---|" * (4 + len(outcomes))]
    for place, count in sorted(counts.items()):
        lines.append(f"| {' | '.join(place)} | {' | '.join(str(count[outcome]) for outcome in outcomes)} |")
    return "\n".join(lines) + "\n"


def report(found: Mapping[str, CELL]) -> str:
    """All tables, the split, the noise of training, and what is missing: Markdown."""
    noise = [
        f"{family}, {arm}: {100 * share:.0f}% of the shift" for (family, arm), share in training_noise(found).items()
    ]
    absent = missing(found)
    told = [
        split(),
        table(found),
        judgements(found),
        f"Noise of training (standard deviation between seeds): {'; '.join(noise) or 'not known, no two seeds'}.",
        f"Cells that are missing, {len(absent)} of {len(cells())}: {', '.join(absent) or 'none'}.",
    ]
    return "\n".join(f"{part}\n" for part in told)
