"""What is wanted of a point: scores to make large, prices on others, and conditions that must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.sweep.notation import decimal

PATH_KL = "path-kl"
DRIFT = "drift"
"""The square root of the path KL, which grows like λ while the models disagree alike along their paths."""
RECALL, VENDI, DISTANCE = "recall", "vendi", "distance"
MEASURES = (PATH_KL, DRIFT, RECALL, VENDI, DISTANCE)
"""What is measured besides the scores of the plan; the last three of the features of its first extractor."""

BEATS = "beats-reference:"
"""Before the name of a score: how often an image has more of it than one that the reference draws for its prompt from
other noise. 0.5 for the reference itself; n/(n+1) is what the best of n of its images reaches."""

REFERENCE = "reference"


class Tables(NamedTuple):
    """What was measured, by name: `reference` at λ = 0, `points` at every point, in the same units of the same noise.

    Units are prompts, or the seeds of a single prompt. A number is the mean over units, and its noise is known from how
    they differ.
    """

    reference: Mapping[str, Float[Tensor, " unit"]]
    points: Mapping[str, Float[Tensor, "point unit"]]
    near: Sequence[tuple[float, ...]] = ()
    """Further points, at which scores were estimated from the images of those nearby."""
    estimates: Mapping[str, Float[Tensor, "near unit"]] = MappingProxyType({})
    """What they were estimated to be."""

    def extended(self) -> Tables:
        """With the points nearby among the others, behind them."""
        if not self.near:
            return self
        rows = {name: torch.cat([table, self.estimates[name]]) for name, table in self.points.items()}
        return Tables(self.reference, rows)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of scores and measures, `{"legible": 1, "bold": -0.1}`: the larger the better."""

    terms: tuple[tuple[str, float], ...]

    @classmethod
    def read(cls, text: str) -> Objective:
        """`legible`, `legible - 0.1*bold`: names with factors, plus and minus between spaces.

        Raises `ValueError` for what is no such sum.
        """
        return cls(_terms(text))

    def __str__(self) -> str:
        parts = [f"{'-' if factor < 0 else '+'} {_factor(abs(factor))}{name}" for name, factor in self.terms]
        return " ".join(parts).removeprefix("+ ").replace("- ", "-", 1 if parts[0].startswith("-") else 0)

    def table(self, tables: Tables) -> Float[Tensor, "point unit"]:
        """The sum for every point and unit."""
        return _sum(self.terms, tables.points)

    def at_reference(self, tables: Tables) -> Float[Tensor, " unit"]:
        """The same of the reference."""
        return _sum(self.terms, tables.reference)


@dataclass(frozen=True)
class Constraint:
    """A condition on the mean: `clip >= reference`, `clip >= reference - 0.01`, `recall >= 0.6`, `path-kl <= 3`."""

    terms: tuple[tuple[str, float], ...]
    least: float
    relative: bool
    """Whether `least` is counted from the reference's value."""
    text: str

    @classmethod
    def read(cls, text: str) -> Constraint:
        """Raises `ValueError` for what is no such condition."""
        sign = next((sign for sign in (">=", "<=") if sign in text), "")
        left, right = (part.strip() for part in text.split(sign, 1)) if sign else (text, "")
        if not (left and right):
            raise ValueError(
                f"{text!r} is no condition: write NAME >= NUMBER, NAME <= NUMBER, or NAME >= reference - NUMBER"
            )
        direction = 1.0 if sign == ">=" else -1.0
        relative = right.split()[0] == REFERENCE
        shift = right.removeprefix(REFERENCE).replace(" ", "") if relative else right
        bound = float(decimal(shift, text, "condition")) if shift else 0.0
        terms = tuple((name, direction * factor) for name, factor in _terms(left))
        return cls(terms, direction * bound, relative, text.strip())

    def table(self, tables: Tables) -> Float[Tensor, "point unit"]:
        """By how much the condition is met at every point, unit by unit; negative where it is not."""
        margin = _sum(self.terms, tables.points) - self.least
        return margin - _sum(self.terms, tables.reference) if self.relative else margin


@dataclass(frozen=True)
class Goal:
    """One objective or several, and conditions. Several have a Pareto set instead of a best point, or a knee."""

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    knee: str | None = None
    """The score of which the knee is wanted, `undo_hacking`."""

    @classmethod
    def read(cls, maximize: Sequence[str], minimize: Sequence[str] = (), require: Sequence[str] = ()) -> Goal:
        """From text; raises `ValueError` as `Objective.read` and `Constraint.read` do, and where nothing is wanted."""
        wanted = [Objective.read(text) for text in maximize]
        wanted += [Objective(tuple((n, -f) for n, f in Objective.read(text).terms)) for text in minimize]
        if not wanted:
            raise ValueError("a search needs something to maximise or to minimise: the name of a score")
        return cls(tuple(wanted), tuple(Constraint.read(text) for text in require))

    @classmethod
    def undo_hacking(cls, score: str) -> Goal:
        """How far λ can go before more of the anchor buys less of `score`: the knee of a front (`knees`).

        Gained is how often the reference's images are beaten, and the drift is the price. The score itself would be a
        bad measure of gain: a hacked reward goes on rising where images are ruined. But a reward only ranks images, and
        beyond all that the reference draws there is nothing left to beat. Raises `ValueError` unless `score` is the
        name of one.
        """
        wanted = Objective.read(score).terms
        if wanted != ((score.strip(), 1.0),) or score.strip() in MEASURES or score.strip().startswith(BEATS):
            raise ValueError(f"{score!r} is no score by name: a knee is looked for in one score, as in legible")
        ((name, _),) = wanted
        return cls((Objective(((BEATS + name, 1.0),)), Objective(((DRIFT, -1.0),))), knee=name)

    @property
    def names(self) -> tuple[str, ...]:
        """The scores and measures that it needs, each once."""
        parts: list[Objective | Constraint] = [*self.objectives, *self.constraints]
        names = [name for part in parts for name, _ in part.terms]
        return tuple(dict.fromkeys([*names, *([self.knee] if self.knee else [])]))

    @property
    def scores(self) -> tuple[str, ...]:
        """The rewards among them, also those that images are compared by."""
        return tuple(dict.fromkeys(name.removeprefix(BEATS) for name in self.names if name not in MEASURES))


_TERM = re.compile(r"(?:(?P<factor>[0-9.eE+-]+)\s*\*?\s+|(?P<times>[0-9.eE+-]+)\*)?(?P<name>[A-Za-z][^\s*]*)")


def _terms(text: str) -> tuple[tuple[str, float], ...]:
    """Names and factors of a sum; a name that comes twice is added up."""
    factors: dict[str, float] = {}
    sign = 1.0
    stripped = text.strip()
    if stripped.startswith("-"):
        sign, stripped = -1.0, stripped[1:].strip()
    pieces = re.split(r"\s+([+-])\s+", stripped)
    for piece, then in zip(pieces[::2], [*pieces[1::2], "+"], strict=True):
        match = _TERM.fullmatch(piece.strip())
        if match is None:
            raise ValueError(f"{text!r} is no sum of scores: write NAME, or NAME - 0.1*OTHER, with spaces around the -")
        factor = match["factor"] or match["times"] or "1"
        factors[match["name"]] = factors.get(match["name"], 0.0) + sign * float(decimal(factor, text, "factor"))
        sign = 1.0 if then == "+" else -1.0
    return tuple(factors.items())


def _factor(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g}*"


def _sum(terms: Sequence[tuple[str, float]], tables: Mapping[str, Tensor]) -> Tensor:
    return sum((factor * tables[name].double() for name, factor in terms), torch.zeros((), dtype=torch.float64))
