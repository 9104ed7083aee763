"""Predictions that are carried over from earlier steps, not evaluated anew: realignment near the price of sampling.

The models of a mixture are close to each other, and what lies between them changes slowly along a run. So one model,
the *carrier*, is evaluated at every step, and the others at some steps only: there the differences of all predictions
from the carrier's are kept, and in between they are continued along a line. The carrier is one of the models, or the
weight-interpolated model, which is so near to the mixture that little is left to keep; but it is a further evaluation.

The differences are those of guided predictions. A mixture of predictions is linear in them, so the continued ones stand
for the models' own in everything that follows (`step`, `path_weights`), as estimates.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.schedules import finite
from deradiff.algorithm.step import mixed, space_of

Wanted = Literal["carrier", "all", "models"]

AUTO, INTERPOLATE, REFERENCE = "auto", "interpolate", "reference"

RESERVED = (AUTO, INTERPOLATE, REFERENCE, "weights")
"""Names that no anchor can have. Files of 0.1 say "weights" for "interpolate"."""


SHARE = 0.35
"""The part of the tolerance that may be spent between two full evaluations: the errors of several intervals add up as
independent ones do."""

TURNOVER = 5.0
"""How often a difference changes by its own size along a run, as long as nothing is known: what a run then learns
replaces it."""

GROWTH = 3.0
"""By how much the rate may be expected to grow from one interval to the next, where it has grown."""


@dataclass(frozen=True)
class Reuse:
    """At which steps all models are evaluated, and what carries the others. One of `every`, `steps` and `tolerance`.

    Attributes:
        tolerance: the error that may be made, relative to λ's own effect on the final latents: steps are chosen as the
            run goes, by how far the last full evaluation was from its estimate.
        every: all models at every so many steps.
        steps: all models at these steps, counted from 0 in the scheduler's list of timesteps (`find_full_steps` finds
            good ones). The first step of a run always is one.
        carrier: "reference", the name of an anchor, "interpolate" (the weight-interpolated model; of full weights it is
            one more copy in memory), or "auto": that one where all anchors are LoRAs, else whichever model has more
            weight, or the reference where images have weights of their own.
        slope: the part of the last change that goes on between full evaluations: 1 continues a difference along the
            line through its last two, 0 holds it.

    Raises `ValueError` for a number outside its range, or not exactly one way of choosing steps.
    """

    tolerance: float | None = None
    every: int | None = None
    steps: tuple[int, ...] | None = None
    carrier: str = AUTO
    slope: float = 1.0

    def __post_init__(self) -> None:
        ways = [name for name in ("tolerance", "every", "steps") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(
                "reuse needs one way of choosing the steps at which all models are evaluated, tolerance, every or "
                f"steps; got {' and '.join(ways) or 'none'}"
            )
        if self.tolerance is not None and not 0 < finite(self.tolerance, "tolerance") < 1:
            raise ValueError(
                f"tolerance is an error relative to λ's own effect, above 0 and below 1; got {self.tolerance!r}"
            )
        if self.every is not None and not _whole(self.every, 1):
            raise ValueError(f"every must be a whole number of steps, 1 at least; got {self.every!r}")
        counted = isinstance(self.steps, tuple) and all(_whole(step, 0) for step in self.steps)
        if self.steps is not None and not counted:
            raise ValueError(f"steps are a tuple of whole numbers, counted from 0; got {self.steps!r}")
        if not 0 <= finite(self.slope, "slope") <= 1:
            raise ValueError(f"slope must lie in [0, 1]; got {self.slope!r}")

    @classmethod
    def parse(cls, asked: Reuse | int | None, tolerance: float | None) -> Reuse | None:
        """What `realign(..., reuse=, tolerance=)` means: a `Reuse`, every so many steps, a tolerance, or exactness."""
        if asked is not None and tolerance is not None:
            raise ValueError(
                "give reuse or tolerance, not both: Reuse(tolerance=..., carrier=...) has a tolerance of its own"
            )
        if tolerance is not None:
            return cls(tolerance=tolerance)
        if asked is None or isinstance(asked, Reuse):
            return asked
        if isinstance(asked, int):
            return cls(every=asked)
        raise ValueError(f"unknown reuse {asked!r}: give Reuse(...), every how many steps, or None for exactness")

    def resolved(self, names: Sequence[str], mixture_weights: Float[Tensor, "model #batch"], loras: bool) -> str:
        """The carrier's name. "auto" is the weight-interpolated model where all anchors are LoRAs; else the model with
        most weight, and the reference where images have weights of their own, for its error is the same share of λ's
        effect at every λ. `names` are those of the models that a step mixes.
        """
        if self.carrier != AUTO:
            return self.carrier
        if loras:
            return INTERPOLATE
        if mixture_weights.shape[1] > 1 and REFERENCE in names:
            return REFERENCE
        return names[int(mixture_weights.abs().mean(1).argmax())]

    def __str__(self) -> str:
        if self.tolerance is not None:
            when = f"within {self.tolerance:g} of λ's effect"
        elif self.every is not None:
            when = f"all models every {self.every} steps"
        else:
            when = f"all models at {len(self.steps or ())} chosen steps"
        return when if self.carrier == AUTO else f"{when}, carried by {_in_words(self.carrier)}"


@dataclass(frozen=True)
class Reused:
    """What reuse came to in one run.

    Attributes:
        steps: the steps at which all models were evaluated, in the scheduler's list of timesteps.
        predictions: how many predictions the run used where models are mixed.
        evaluations: network evaluations per image at those, one per model.
        carrier: what carried the other steps.
        errors: for every image, the estimated error of its final latents relative to λ's own effect, from how far each
            full evaluation was from its estimate. It knows nothing of the few images that are near the boundary to
            another one, where any small change decides which it becomes.
        tolerance: the one that was asked for.
    """

    steps: tuple[int, ...]
    predictions: int
    evaluations: int
    carrier: str
    errors: tuple[float, ...]
    tolerance: float | None

    @property
    def error(self) -> float:
        """The mean of the images' errors."""
        return sum(self.errors) / len(self.errors) if self.errors else 0.0

    def of(self, image: int) -> Reused:
        """The same of one image of the batch."""
        return replace(self, errors=self.errors[image : image + 1])

    @property
    def kept(self) -> bool:
        """Whether the estimated error is within the tolerance; true where none was asked for."""
        return self.tolerance is None or self.error <= self.tolerance

    @property
    def words(self) -> str:
        """What was done, and how far off it may be, in a sentence."""
        price = self.evaluations / max(self.predictions, 1)
        done = (
            f"approximate: all models at {len(self.steps)} of {self.predictions} steps, {_in_words(self.carrier)} at "
            f"the others ({price:.2f} evaluations a step); estimated error {self.error:.1%} of λ's effect"
        )
        return done if self.kept else f"{done}, ABOVE the tolerance of {self.tolerance:g}"

    def record(self) -> dict[str, Any]:
        """The run as plain data, for a record."""
        names = ("predictions", "evaluations", "carrier", "error", "tolerance")
        numbers = {name: getattr(self, name) for name in names}
        return {"full_steps": list(self.steps), **numbers, "kept": self.kept, "words": self.words}


class _FullEvaluation(NamedTuple):
    """A full evaluation: how far the models' predictions were from the carrier's, and the mixture's."""

    number: int
    differences: Float[Tensor, "model batch *latent"]
    residual: Float[Tensor, "batch *latent"]


@dataclass
class PredictionEstimator:
    """One run with reuse: when to evaluate all models, and what the others are estimated to predict in between.

    Errors are counted in the length of the final latents' change, image by image. An estimate that is off by e moves
    them by e times the step's impact (`noise_levels.impacts`); λ itself, by the length of what it adds to the
    prediction. Between two full evaluations e grows as `_shape` says, at a rate that the second of them shows.
    """

    reuse: Reuse
    carrier: str
    """The carrier's name, "auto" resolved."""
    names: Sequence[str]
    """Those of all models, reference first."""
    impacts: Sequence[float]
    """Of every timestep, see `noise_levels.impacts`."""
    strengths: Sequence[float]
    """λ at every timestep, up to a common factor: what λ adds to a prediction, and an error of it, grow with that."""
    steps: list[int] = field(default_factory=list)
    predictions: int = 0
    evaluations: int = 0
    told: bool = False
    kind: Any = None
    """What the predictions are of, see `wants`."""
    _kept: list[_FullEvaluation] = field(default_factory=list)
    _last: int = 0
    """The timestep of the last prediction."""
    _effect: Tensor = field(default_factory=lambda: torch.zeros(1))
    """What λ added to the last full prediction, per unit of `strengths`."""
    _done: Tensor = field(default_factory=lambda: torch.zeros(1))
    """λ's own change of the latents so far."""
    _squares: Tensor = field(default_factory=lambda: torch.zeros(1))
    """Squared errors of the intervals that are closed."""
    _rate: Tensor = field(default_factory=lambda: torch.zeros(1))
    """At which the estimate's error grows, per unit of `_shape` and `strengths`."""
    _shapes: float = 0.0
    """What the rate is to be multiplied with for the error of the open interval."""
    _ahead: float = 0.0
    """The rate, relative to all that λ is expected to change, averaged over images."""
    _patience: int = 1
    """How many steps after a full one the interpolated model is not evaluated beside the others again: it is of no use
    there where predictions cannot be carried over, and would make them dearer than exact ones."""

    def wants(self, i: int, kind: Any) -> Wanted:
        """What is to be evaluated at the i-th timestep: the carrier alone, all models with it, or the models alone.

        `kind` is what must be the same for differences to be carried over: which models, how many rows. Nor are they
        carried over steps that mixed nothing, as where an annealed λ passes through 0.
        """
        if self._kept and (kind != self.kind or i > self._last + 1):
            self._close(self._rate)
            self._kept = []
        self.kind = kind
        if not self._wants_all(i):
            return "carrier"
        early = self._kept and self.predictions - self._kept[0].number < self._patience
        return "models" if early and self.carrier == INTERPOLATE and self.reuse.tolerance is not None else "all"

    def _wants_all(self, i: int) -> bool:
        if not self._kept:
            return True
        if self.reuse.every is not None:
            return self.predictions - self._kept[0].number >= self.reuse.every
        if self.reuse.steps is not None:
            return i in self.reuse.steps
        ahead = self._ahead * (self._shapes + self._weight(i))
        return not ahead <= SHARE * float(self.reuse.tolerance or 0)

    def complete(
        self,
        i: int,
        predictions: Float[Tensor, "evaluated batch *latent"],
        models: Sequence[int],
        evaluated: Sequence[int],
        mixture_weights: Float[Tensor, "model #batch"],
    ) -> Float[Tensor, "model batch *latent"]:
        """The predictions of all `models` at the i-th timestep, from those that were `evaluated`: kept, or estimated.

        The weight-interpolated model's, where it was evaluated, is the last of `predictions`.
        """
        if len(evaluated) < len(models):
            completed = self._estimate(predictions[0], mixture_weights)
            self._shapes += self._weight(i)
        else:
            completed = predictions[: len(models)]
            wide = completed.float()
            self._effect = _length(mixed(wide - wide[0], mixture_weights)) / max(self.strengths[i], 1e-12)
            self.steps.append(i)
            if self.carrier != INTERPOLATE or len(predictions) > len(models):
                at = models.index(self.names.index(self.carrier)) if self.carrier != INTERPOLATE else -1
                self._keep(i, wide - predictions[at].float(), mixture_weights)
        self._done = self._done + self.impacts[i] * self.strengths[i] * self._effect
        self.predictions += 1
        self.evaluations += len(predictions)
        self._last = i
        return completed

    def renew(self, strengths: Sequence[float]) -> None:
        """λ was set anew: what was learned at the old one is not carried over."""
        self._close(self._rate)
        self._kept, self.strengths = [], strengths

    def tell(self, i: int | None = None) -> None:
        """Warn if the run did not keep its tolerance: at its last step, or once it is over; once."""
        if self.told or (i is not None and i < len(self.impacts) - 1):
            return
        self.told = True
        if not (result := self.result()).kept:
            warnings.warn(result.words, stacklevel=2)

    def result(self) -> Reused:
        """What the run came to so far."""
        away = (self._squares + (self._rate * self._shapes).square()).sqrt()
        errors = torch.where(away > 0, away / self._done, 0.0).tolist() if self.predictions else []
        return Reused(
            tuple(self.steps), self.predictions, self.evaluations, self.carrier, tuple(errors), self.reuse.tolerance
        )

    def _keep(self, i: int, differences: Float[Tensor, "model batch *latent"], mixture_weights: Tensor) -> None:
        """Learn from the error of what would have been estimated, and keep the differences."""
        residual = mixed(differences, mixture_weights)
        turnover = TURNOVER / len(self.impacts)
        if self._kept:
            away = self.predictions - self._kept[0].number
            self._patience = 2 * self._patience if away <= self._patience else 1
            expected_differences, expected_residual = self._continued()
            if self.carrier != INTERPOLATE:
                expected_residual = mixed(expected_differences, mixture_weights)
            off = residual - expected_residual
            rate = _length(off) / (self._shape() * max(self.strengths[i], 1e-12))
            self._close(rate)
            # Differences change ever faster towards the image: a rate that has grown goes on growing.
            growth = float((rate / self._rate).nanmedian()) if len(self._kept) > 1 else 1.0
            # A held difference that changes at this rate bends, as long as nothing is known, once in a turnover.
            self._rate = rate if len(self._kept) > 1 else rate * turnover / 2
        else:
            growth = 1.0
            self._rate = _length(residual) * turnover / max(self.strengths[i], 1e-12)
        self._kept = [_FullEvaluation(self.predictions, differences, residual), *self._kept[:1]]
        future = sum(a * b for a, b in zip(self.impacts[i:], self.strengths[i:], strict=True))
        expected = self._done + future * self._effect
        still = (self._rate == 0) & (expected == 0) & (self._effect.max() > 0)  # the reference itself
        self._ahead = float(torch.where(still, 0.0, self._rate / expected).mean()) * min(max(growth, 1.0), GROWTH)

    def _close(self, rate: Tensor) -> None:
        """An interval is over, and its error grew at this rate."""
        self._squares = self._squares + (rate * self._shapes).square()
        self._shapes = 0.0

    def _estimate(
        self, carrier: Float[Tensor, "batch *latent"], mixture_weights: Float[Tensor, "model #batch"]
    ) -> Float[Tensor, "model batch *latent"]:
        differences, residual = self._continued()
        if self.carrier == INTERPOLATE:  # the carrier goes along with λ: what is left of the mixture does not
            differences = differences - mixed(differences, mixture_weights) + residual
        return (carrier.float() + differences).to(carrier.dtype)

    def _continued(self) -> tuple[Float[Tensor, "model batch *latent"], Float[Tensor, "batch *latent"]]:
        """The kept differences and residual, on the line through the last two."""
        last = self._kept[0]
        if len(self._kept) == 1 or not self.reuse.slope:
            return last.differences, last.residual
        before = self._kept[1]
        share = self.reuse.slope * (self.predictions - last.number) / (last.number - before.number)
        return (
            last.differences + share * (last.differences - before.differences),
            last.residual + share * (last.residual - before.residual),
        )

    def _weight(self, i: int) -> float:
        return self.impacts[i] * self.strengths[i] * self._shape()

    def _shape(self) -> float:
        """How the error of an estimate grows with its distance: that of a line through two points, or of a constant."""
        away = self.predictions - self._kept[0].number
        if len(self._kept) == 1 or not self.reuse.slope:
            return float(away)
        return float(away * (away + self._kept[0].number - self._kept[1].number))


def require_affine(scheduler: SchedulerMixin, path: Literal["auto", "prediction", "posterior"]) -> None:
    """Raise `ValueError` where explicit posteriors are mixed: estimated predictions stand for them no longer."""
    space, why = space_of(scheduler, path)
    if space == "posterior":
        raise ValueError(
            f"predictions cannot be carried over between steps where posteriors are mixed ({why}): their error is not "
            "the prediction's. Use path='prediction' or a scheduler whose step is affine, or leave reuse out"
        )


def current_word(word: Any) -> Any:
    """What a file says of a method or a carrier, in today's word: 0.1 wrote "weights" for "interpolate"."""
    return INTERPOLATE if word == "weights" else word


def _in_words(carrier: str) -> str:
    return "the interpolated weights" if carrier == INTERPOLATE else carrier


def _length(change: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """Of every image, in double precision on the CPU."""
    return change.flatten(1).norm(dim=1).double().cpu()


def _whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
