"""Predictions that are carried over from earlier steps, not evaluated anew: realignment near the price of sampling.

The models of a mixture are close to each other, and what lies between them changes slowly along a run. So one model,
the *carrier*, is evaluated at every step, and the others at some steps only: there the differences of all predictions
from the carrier's are kept, and in between they are continued along a line. The carrier is one of the models, or the
weight-interpolated model, which is so near to the mixture that little is left to keep; but it is a further evaluation.

The differences are those of guided predictions. A mixture of predictions is linear in them, so the continued ones stand
for the models' own in everything that follows (`mixing`, `ledger`), as estimates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.clocks import index_of, log_snr_at
from deradiff.mixing import mixed, space_of
from deradiff.schedules import Lams, finite

Wanted = Literal["carrier", "all", "models"]

AUTO, WEIGHTS, REFERENCE = "auto", "weights", "reference"

SHARE = 0.3
"""The part of the tolerance that may be spent between two full evaluations: the errors of several intervals add up as
independent ones do."""

TURNOVER = 5.0
"""How often a difference changes by its own size along a run, as long as nothing is known: what a run then learns
replaces it. Seen on the digits, whose differences change by 2% a step in the first half of 50 steps."""


@dataclass(frozen=True)
class Reuse:
    """At which steps all models are evaluated, and what carries the others. One of `every`, `steps` and `tolerance`.

    Attributes:
        tolerance: the error that may be made, relative to λ's own effect on the final latents: steps are chosen as the
            run goes, by how far the last full evaluation was from its estimate.
        every: all models at every so many steps.
        steps: all models at these steps, counted from 0 in the scheduler's list of timesteps (`reuse.profiled` finds
            good ones). The first step of a run always is one.
        carrier: "reference", the name of an anchor, "weights" (the weight-interpolated model; of full weights it is one
            more copy in memory), or "auto": the weights where all anchors are LoRAs, else whichever model has more
            weight.
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
        if self.steps is not None and not all(_whole(step, 0) for step in self.steps):
            raise ValueError(f"steps are counted from 0, whole numbers; got {self.steps!r}")
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

    def resolved(self, names: Sequence[str], weights: Float[Tensor, "model #batch"], loras: bool) -> str:
        """The carrier's name. "auto" is the interpolated weights where all anchors are LoRAs, else the model with most
        weight; `names` are those of the models that a step mixes, `weights` theirs in the mixture.
        """
        if self.carrier != AUTO:
            return self.carrier
        return WEIGHTS if loras else names[int(weights.abs().mean(1).argmax())]

    def __str__(self) -> str:
        if self.tolerance is not None:
            when = f"within {self.tolerance:g} of λ's effect"
        elif self.every is not None:
            when = f"all models every {self.every} steps"
        else:
            when = f"all models at {len(self.steps or ())} chosen steps"
        return when if self.carrier == AUTO else f"{when}, carried by {self.carrier}"


@dataclass(frozen=True)
class Reused:
    """What reuse came to in one run.

    Attributes:
        steps: the steps at which all models were evaluated, in the scheduler's list of timesteps.
        predictions: how many predictions the run used where models are mixed.
        evaluations: network evaluations per image at those, one per model.
        carrier: what carried the other steps.
        error: the estimated error of the final latents relative to λ's own effect, from how far each full evaluation
            was from its estimate. It knows nothing of the few images that are near the boundary to another one, where
            any small change decides which it becomes. None with fewer than two full evaluations.
        tolerance: the one that was asked for.
    """

    steps: tuple[int, ...]
    predictions: int
    evaluations: int
    carrier: str
    error: float | None
    tolerance: float | None

    @property
    def kept(self) -> bool:
        """Whether the estimated error is within the tolerance; true where none was asked for."""
        return self.tolerance is None or self.error is None or self.error <= self.tolerance

    @property
    def words(self) -> str:
        """What was done, and how far off it may be, in a sentence."""
        done = (
            f"approximate: all models at {len(self.steps)} of {self.predictions} steps, {self.carrier} at the others "
            f"({self.evaluations / max(self.predictions, 1):.2f} evaluations a step)"
        )
        if self.error is None:
            return f"{done}; error not estimated"
        about = f"{done}; estimated error {self.error:.1%} of λ's effect"
        return about if self.kept else f"{about}, ABOVE the tolerance of {self.tolerance:g}"

    def record(self) -> dict[str, Any]:
        """The run as plain data, for a record."""
        found = {name: getattr(self, name) for name in ("predictions", "evaluations", "carrier", "error", "tolerance")}
        return {"full_steps": list(self.steps), **found, "kept": self.kept, "words": self.words}


@dataclass
class Bridge:
    """One run with reuse: when to evaluate all models, and what the others are estimated to predict in between."""

    reuse: Reuse
    carrier: str
    """The carrier's name, "auto" resolved."""
    names: Sequence[str]
    """Those of all models, reference first."""
    steps: list[int] = field(default_factory=list)
    predictions: int = 0
    evaluations: int = 0
    _kept: list[tuple[int, Tensor]] = field(default_factory=list)
    _kind: Any = None
    _impacts: list[float] = field(default_factory=list)
    _rate: float = 0.0
    _spent: float = 0.0
    _shapes: float = 0.0
    _squares: float | None = None
    _patience: int = 1
    """How many steps after a full one the interpolated model is not evaluated beside the others again: it is of no use
    there where predictions cannot be carried over, and would make them dearer than exact ones."""

    def wants(self, scheduler: SchedulerMixin, timestep: Any, kind: Any) -> Wanted:
        """What is to be evaluated at this timestep: the carrier alone, all models with it, or the models alone.

        `kind` is what must be the same for differences to be carried over: which models, how many rows.
        """
        if not self._wants_all(scheduler, timestep, kind):
            return "carrier"
        early = self._kept and index_of(scheduler, timestep) - self._kept[0][0] < self._patience
        return "models" if early and self.carrier == WEIGHTS and self.reuse.tolerance is not None else "all"

    def _wants_all(self, scheduler: SchedulerMixin, timestep: Any, kind: Any) -> bool:
        i = index_of(scheduler, timestep)
        if not self._impacts:
            self._impacts = impacts(scheduler)
        if self._kind != kind or not self._kept:
            self._kept, self._kind = [], kind
            return True
        if self.reuse.every is not None:
            return i - self._kept[0][0] >= self.reuse.every
        if self.reuse.steps is not None:
            return i in self.reuse.steps
        ahead = self._spent + self._impacts[i] * self._rate * self._shape(i)
        return ahead > SHARE * float(self.reuse.tolerance or 0) * sum(self._impacts)

    def complete(
        self,
        scheduler: SchedulerMixin,
        timestep: Any,
        predictions: Float[Tensor, "evaluated batch *latent"],
        models: Sequence[int],
        evaluated: Sequence[int],
        weights: Float[Tensor, "model #batch"],
    ) -> Float[Tensor, "model batch *latent"]:
        """The predictions of all `models` of a step, from those that were `evaluated`: kept, or estimated.

        The weight-interpolated model's, where it was evaluated, is the last of `predictions`.
        """
        i = index_of(scheduler, timestep)
        self.predictions += 1
        self.evaluations += len(predictions)
        if len(evaluated) < len(models):
            return self._estimate(i, predictions[0])
        self.steps.append(i)
        if self.carrier == WEIGHTS and len(predictions) == len(models):
            return predictions
        carrier = predictions[-1] if self.carrier == WEIGHTS else predictions[models.index(self._number)]
        self._keep(i, predictions[: len(models)].float(), carrier.float(), weights)
        return predictions[: len(models)]

    def tell(self, scheduler: SchedulerMixin, timestep: Any) -> None:
        """Warn at a run's last step if it did not keep its tolerance."""
        if index_of(scheduler, timestep) == len(self._impacts) - 1 and not (found := self.result()).kept:
            warnings.warn(found.words, stacklevel=2)

    @property
    def _number(self) -> int:
        return self.names.index(self.carrier)

    def _keep(
        self,
        i: int,
        predictions: Float[Tensor, "model batch *latent"],
        carrier: Float[Tensor, "batch *latent"],
        weights: Float[Tensor, "model #batch"],
    ) -> None:
        """Learn from the error of what would have been estimated, and keep the differences."""
        differences = predictions - carrier
        effect = float(mixed(predictions - predictions[0], weights).norm())
        if self._kept:
            self._patience = 2 * self._patience if i - self._kept[0][0] <= self._patience else 1
        if not self._kept:
            self._rate = _ratio(mixed(differences, weights), effect) * TURNOVER / len(self._impacts)
        else:
            shape = self._shape(i)
            rate = _ratio(mixed(differences - self._continued(i), weights), effect) / shape
            self._squares = (self._squares or 0.0) + (self._shapes * rate) ** 2
            # A held difference that changes at this rate bends, as long as nothing is known, once in a turnover.
            self._rate = rate if len(self._kept) > 1 else rate * TURNOVER / len(self._impacts) / 2
        self._kept = [(i, differences), *self._kept[:1]]
        self._spent = self._shapes = 0.0

    def _estimate(self, i: int, carrier: Float[Tensor, "batch *latent"]) -> Float[Tensor, "model batch *latent"]:
        shape = self._shape(i)
        self._spent += self._impacts[i] * self._rate * shape
        self._shapes += self._impacts[i] * shape
        return (carrier.float() + self._continued(i)).to(carrier.dtype)

    def result(self) -> Reused:
        """What the run came to so far."""
        error = None
        if self._squares is not None or self._spent:
            error = math.sqrt((self._squares or 0.0) + self._spent**2) / sum(self._impacts)
        elif self.predictions == len(self.steps):
            error = 0.0
        return Reused(tuple(self.steps), self.predictions, self.evaluations, self.carrier, error, self.reuse.tolerance)

    def _continued(self, i: int) -> Float[Tensor, "model batch *latent"]:
        """The kept differences, on the line through the last two."""
        at, last = self._kept[0]
        if len(self._kept) == 1 or not self.reuse.slope:
            return last
        before, previous = self._kept[1]
        return last + self.reuse.slope * (i - at) / (at - before) * (last - previous)

    def _shape(self, i: int) -> float:
        """How the error of an estimate grows with its distance: that of a line through two points, or of a constant."""
        away = i - self._kept[0][0]
        if len(self._kept) == 1 or not self.reuse.slope:
            return float(away)
        return float(away * (away + self._kept[0][0] - self._kept[1][0]))


def require_blendable(lams: Lams, blends_rows: bool, method: str, reuse: Reuse | None, names: Sequence[str]) -> None:
    """Raise `ValueError` for λ per image with interpolated weights that cannot have it, and for what reuse cannot be.

    `names` are those of all models, which a carrier may be one of.
    """
    if reuse is not None and method == "weights":
        raise ValueError(
            "interpolated weights are one model, with nothing to carry over: reuse is for method='mixture'"
        )
    if reuse is not None and reuse.carrier not in (AUTO, WEIGHTS, *names):
        raise ValueError(f"the carrier is one of {', '.join((AUTO, WEIGHTS, *names))}; got {reuse.carrier!r}")
    blended = method == "weights" or (reuse is not None and reuse.carrier == WEIGHTS)
    if blended and lams.images is not None and not blends_rows:
        raise ValueError(
            f"λ per image ({lams.images} of them) needs one model for each: interpolated weights are one for all, "
            "unless the anchors are LoRAs. Use method='mixture', carried by the reference or an anchor"
        )


def impacts(scheduler: SchedulerMixin) -> list[float]:
    """How much an error of the prediction at each timestep moves the final latents, up to a common factor.

    A step of length dσ moves `x` by `ε dσ`, and later steps shrink what was moved at noise σ by `1/sqrt(1 + σ²)` where
    latents have unit variance: so `d asinh(σ)` for a predicted ε, σ in units of the signal. For other predictions ε is
    scaled by about the signal's share, which makes it the angle, `d atan(σ)`.
    """
    at = [log_snr_at(scheduler, i, t) for i, t in enumerate(scheduler.timesteps.tolist())]
    if any(math.isnan(snr) for snr in at):
        return [1.0] * len(at)
    epsilon = scheduler.config.get("prediction_type", "epsilon") == "epsilon" and "sigma_data" not in scheduler.config
    epsilon &= not type(scheduler).__name__.startswith("FlowMatch")
    along = [_position(snr, epsilon) for snr in at] + [0.0]
    lengths = [abs(b - a) for a, b in pairwise(along)]
    # Schedulers that evaluate twice at a timestep make no step at one of the two: neighbours share.
    return [(lengths[max(i - 1, 0)] + length) / 2 for i, length in enumerate(lengths)]


def _position(log_snr: float, epsilon: bool) -> float:
    sigma = math.exp(min(-log_snr / 2, 700.0)) if log_snr > -math.inf else math.inf
    if not epsilon:
        return math.atan(sigma)
    return math.asinh(min(sigma, 1e6))


def require_affine(scheduler: SchedulerMixin, path: Literal["auto", "prediction", "posterior"]) -> None:
    """Raise `ValueError` where explicit posteriors are mixed: estimated predictions stand for them no longer."""
    space, why = space_of(scheduler, path)
    if space == "posterior":
        raise ValueError(
            f"predictions cannot be carried over between steps where posteriors are mixed ({why}): their error is not "
            "the prediction's. Use path='prediction' or a scheduler whose step is affine, or leave reuse out"
        )


def _ratio(part: Tensor, whole: float) -> float:
    return float(part.norm()) / whole if whole > 0 else 0.0


def _whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
