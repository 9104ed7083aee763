"""What a realigned run leaves out, written down step by step: log weights, path divergence, implicit rewards.

Algorithm 1 normalises every step on its own and so drops a factor that depends on `x_t`. Along any sampler that uses
the mixed prediction, stochastic or not, the factor is known from predictions that are at hand (the geometric-average
case of the Feynman-Kac correctors of Skreta et al. 2025, arXiv 2503.02819, applied to realignment):

    d log W = -½ Σ_{i<j} w_i w_j ||ε_i - ε_j||² d log SNR

Samples weighted with W follow `Π p_i^{w_i}`, the retrained model's distribution; Algorithm 1's own do not. `verdict`
turns these numbers into estimates and a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import kl
from deradiff.algorithm.guided_weights import GuidanceFit, GuidedWeights, joined_guidance
from deradiff.algorithm.noise_levels import next_log_snr, weight_clock
from deradiff.algorithm.step import RealignedPosterior, StepRecord, mixed, realigned_posterior

Obstacle = Literal["guidance", "annealing", "partial", "renoising", "unknown noise", "reuse", "several schedulers"]
"""Why the weights of a run have no model's distribution as their target; `verdict.OBSTACLES` says it in words."""


@dataclass(frozen=True)
class ImportanceWeights:
    """What is known about one realigned run, per image. Made by `Dial.importance_weights`.

    Attributes:
        log_weights: log W; 0 for an image at λ = 0 or 1. Under guidance, of the guided predictions.
        log_ratios: `log p_i(path)/p_0(path)` of each anchor, from the noise actually drawn; empty where the sampler is
            deterministic or multistep, or where a model was not evaluated at every step. Where the sampler is
            `memoryless` this is the anchor's implicit reward divided by its β, up to a constant per prompt.
        path_kl: what this path adds to the KL divergence between the paths of the realigned model and the reference's,
            in nats; its mean is that divergence. None where the sampler is deterministic or multistep.
        memoryless: whether the image forgets the noise it started from (η = 1).
        lams: λ of each anchor and image at the last step.
        obstacles: what keeps the weights from having an exact target.
        predictions: how many predictions entered.
        guidance: the weights of the conditional and the unconditional predictions apart; None without guidance, and
            where it is not one scale for the whole run (rescaled, in an interval), or not two rows for each image.
    """

    log_weights: Float[Tensor, " batch"]
    log_ratios: Mapping[str, Float[Tensor, " batch"]]
    path_kl: Float[Tensor, " batch"] | None
    memoryless: bool
    lams: Float[Tensor, "anchor batch"]
    obstacles: frozenset[Obstacle]
    predictions: int
    guidance: GuidedWeights | None = None

    def rows(self, index: Int[Tensor, " rows"] | slice) -> ImportanceWeights:
        """These images alone, as when a batch holds several λ."""
        return replace(
            self,
            log_weights=self.log_weights[index],
            log_ratios={name: ratio[index] for name, ratio in self.log_ratios.items()},
            path_kl=None if self.path_kl is None else self.path_kl[index],
            lams=self.lams[:, index],
            guidance=None if self.guidance is None else self.guidance.rows(index),
        )


def joined(runs: Sequence[ImportanceWeights]) -> ImportanceWeights:
    """Several runs of the same models and sampler as one, their images in order."""
    first = runs[0]
    names = [name for name in first.log_ratios if all(name in run.log_ratios for run in runs)]
    paths = [run.path_kl for run in runs if run.path_kl is not None]
    return replace(
        first,
        log_weights=torch.cat([run.log_weights for run in runs]),
        log_ratios={name: torch.cat([run.log_ratios[name] for run in runs]) for name in names},
        path_kl=torch.cat(paths) if len(paths) == len(runs) else None,
        memoryless=all(run.memoryless for run in runs),
        lams=torch.cat([run.lams for run in runs], 1),
        obstacles=frozenset().union(*(run.obstacles for run in runs)),
        guidance=joined_guidance([run.guidance for run in runs]),
    )


_PARTS = ("first part", "second part")
"""The log weights of a guided run's two rows of each image."""

_STRENGTH = "strength"


@dataclass(frozen=True)
class _Outputs:
    """The models' outputs at one x_t, and how far apart they are."""

    names: tuple[str, ...]
    outputs: list[Tensor]
    mixture_weights: Float[Tensor, "model #batch"]
    distances: dict[tuple[int, int], Tensor]
    """`||out_i - out_j||²` of every image."""
    spreads: dict[str, Float[Tensor, " batch"]]
    """`Σ_{i<j} w_i w_j ||out_i - out_j||²`, by the name of the log weight that it adds to."""

    @classmethod
    def of(cls, step: StepRecord, unguided: Tensor | None) -> _Outputs:
        outputs = [output[:, : step.sample.shape[1]].float() for output in step.predictions]
        weights = step.mixture_weights.to(outputs[0].device, torch.float32)
        distances = _distances(outputs)
        spreads = {"log_weights": _spread(weights, distances, len(step.sample))}
        if unguided is not None:
            parts = first, second = unguided.unbind(1)
            for name, part in zip(_PARTS, parts, strict=True):
                spreads[name] = _spread(weights, _distances(list(part)), len(step.sample))
            spreads[_STRENGTH] = -2 * mixed(second - first, weights).flatten(1).square().sum(1)  # d log SNR is 2 dH
        return cls(step.models, outputs, weights, distances, spreads)

    def from_mixture(self, k: int) -> Float[Tensor, " batch"]:
        """`||Σ_j w_j out_j - out_k||²`, since the weights sum to one."""
        away = sum(self.mixture_weights[i if j == k else j] * d for (i, j), d in self.distances.items() if k in (i, j))
        return away - self.spreads["log_weights"]


def _distances(outputs: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    return {
        (i, j): (outputs[i] - outputs[j]).flatten(1).square().sum(1) for i, j in combinations(range(len(outputs)), 2)
    }


def _spread(weights: Tensor, distances: Mapping[tuple[int, int], Tensor], batch: int) -> Float[Tensor, " batch"]:
    return sum((weights[i] * weights[j] * d for (i, j), d in distances.items()), torch.zeros(batch).to(weights))


class PathWeights:
    """Writes down one run: `before_step` before a scheduler's step is taken, `after_step` after it.

    log W is integrated by the trapezoidal rule. The first half of an interval belongs to the predictions at its
    beginning, its second half to those at its end; the last interval, to infinite SNR, is left out.

    Attributes:
        noisy: whether the sampler draws noise in every step and remembers none of the earlier ones.
        ahead: where the coming step leads by `weight_clock`; None at the last step and where `noisy` is false.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A run begins; the last one is forgotten."""
        self._sums: dict[str, Tensor] = {}
        self._evaluation: Any = None
        self._clock = 0.0
        self._first_half_added = False
        self._densities: Callable[[Tensor], dict[str, Tensor]] | None = None
        self.noisy = self._memoryless = self._has_paths = self._has_densities = True
        self.ahead: float | None = None
        self._obstacles: set[Obstacle] = set()
        self._lams: Any = None
        self._predictions = 0
        self._guidance = GuidanceFit()

    def before_step(
        self,
        scheduler: SchedulerMixin,
        step: StepRecord,
        lams: Tensor,
        guided: bool,
        unguided: Float[Tensor, "model part batch *latent"] | None,
        estimated: bool,
        realigned: RealignedPosterior | None,
    ) -> None:
        """Predictions are in: close the interval that led here. Call before the scheduler's own step.

        `lams` are λ of all anchors, `[anchor, #batch]`; `guided` says that the predictions are not the models' own,
        which are `unguided` where two of them were combined; `estimated` that some were carried over from earlier
        steps; `realigned` is what the step will be drawn from, where that was made.
        """
        if estimated:
            self._obstacles.add("reuse")
        if guided:
            self._obstacles.add("guidance")
        if self._lams is not None and not torch.equal(lams, self._lams):
            self._obstacles.add("annealing")
        if not self._predictions and step.progress.steps > 0:
            self._obstacles.add("partial")
        channels = step.sample.shape[1]  # without learned variances
        if unguided is not None:
            unguided = unguided[:, :, :, :channels].float()
            self._guidance.add(unguided, step.predictions[:, :, :channels].float())
        evaluation, clock = _Outputs.of(step, unguided), weight_clock(scheduler, step.log_snr)
        if math.isnan(clock):
            self._obstacles.add("unknown noise")
        if self._evaluation is not None and math.isfinite(clock - self._clock) and clock > self._clock:
            self.add_first_half(clock)
            self._add_half(evaluation, clock)
        self._evaluation, self._clock, self._first_half_added = evaluation, clock, False
        self._lams = lams
        self._predictions += 1
        self._path(scheduler, step, realigned)

    def _path(self, scheduler: SchedulerMixin, step: StepRecord, realigned: RealignedPosterior | None) -> None:
        """What the coming step will add to the densities of the path."""
        models, eta = self._evaluation.names, step.settings.get("eta", 0.0)
        self._densities, self.ahead = None, None
        if not posteriors.is_diffusion(scheduler, eta):
            self.noisy = self._has_paths = self._has_densities = self._memoryless = False
            if scheduler.config.get("stochastic_sampling"):
                self._obstacles.add("renoising")
            return
        log_snr = next_log_snr(scheduler, step.at)
        if log_snr is None:
            return
        self.ahead = weight_clock(scheduler, log_snr)
        self._memoryless &= posteriors.memoryless(scheduler, eta)
        self._has_densities &= len(models) == len(self._lams) + 1
        self._has_paths &= models[0] == "reference"
        if len(models) > 1 and self._has_paths:
            if posteriors.affine(scheduler)[0]:
                share = posteriors.share_of_noise(scheduler, eta)
                elapsed = (self.ahead - self._clock) * ((1 + share**2) / (2 * share)) ** 2
                self._densities = _diffusion(scheduler, step, self._evaluation, elapsed)
            else:
                self._densities = _gaussians(step.models, _in_single_precision(scheduler, step, realigned))

    def add_obstacle(self, obstacle: Obstacle) -> None:
        """Something else keeps these weights from having a target."""
        self._obstacles.add(obstacle)

    def add_first_half(self, until: float) -> None:
        """Count the first half of the interval to the clock's `until`, once."""
        if not self._first_half_added:
            self._add_half(self._evaluation, until)
        self._first_half_added = True

    def _add_half(self, evaluation: _Outputs, until: float) -> None:
        for name, spread in evaluation.spreads.items():
            self._add(name, spread, (self._clock - until) / 2)

    def after_step(self, previous: Tensor) -> None:
        """The step led to `previous`: add its part to the densities of the path (the last step has none)."""
        if self._densities is not None:
            for name, summand in self._densities(previous).items():
                self._add(name, summand)

    def select(self, parents: Int[Tensor, " batch"]) -> None:
        """Row b goes on as a copy of row `parents[b]`, with all that is written down about it."""
        self._sums = {name: total[parents] for name, total in self._sums.items()}

    def detach(self) -> None:
        """The run is over: keep what `result` needs, and no graph of a gradient."""
        self._sums = {name: total.detach() for name, total in self._sums.items()}
        self._densities = None
        if self._evaluation is not None:
            spreads = {name: spread.detach() for name, spread in self._evaluation.spreads.items()}
            self._evaluation = replace(self._evaluation, outputs=[], distances={}, spreads=spreads)

    @property
    def log_weights(self) -> Float[Tensor, " batch"]:
        """log W so far."""
        return self._sums.get("log_weights", torch.zeros_like(self._evaluation.spreads["log_weights"]))

    @property
    def guidance(self) -> GuidedWeights | None:
        """The parts' weights so far, where every step had them and one scale explains the guidance."""
        return self._guided_weights(self._sums)

    def result(self) -> ImportanceWeights:
        """What is known so far. Raises `RuntimeError` before the first step."""
        if self._evaluation is None:
            raise RuntimeError("no realigned step has been taken yet: run the pipeline first")
        nothing = torch.zeros_like(self._evaluation.spreads["log_weights"], dtype=torch.float64, device="cpu")
        sums = {name: total.cpu().double() for name, total in self._sums.items()}
        ratios = {name.removeprefix("ratio "): total for name, total in sums.items() if name.startswith("ratio ")}
        return ImportanceWeights(
            log_weights=sums.get("log_weights", nothing),
            log_ratios=ratios if self._has_densities else {},
            path_kl=sums.get("path_kl", nothing) if self._has_paths else None,
            memoryless=self._memoryless,
            lams=self._lams.expand(-1, len(nothing)),
            obstacles=frozenset(self._obstacles),
            predictions=self._predictions,
            guidance=self._guided_weights(sums),
        )

    def _guided_weights(self, sums: Mapping[str, Tensor]) -> GuidedWeights | None:
        """The parts' weights where every step had them."""
        if self._guidance.steps < self._predictions or _STRENGTH not in sums:
            return None
        return self._guidance.weights(*(sums[name] for name in (*_PARTS, _STRENGTH)))

    def _add(self, name: str, summand: Tensor, factor: float = 1.0) -> None:
        before = self._sums.get(name)
        self._sums[name] = summand * factor if before is None else before.add(summand, alpha=factor)


def _diffusion(
    scheduler: SchedulerMixin, step: StepRecord, evaluation: _Outputs, elapsed: float
) -> Callable[[Tensor], dict[str, Tensor]]:
    """The densities of a step of a diffusion, by Girsanov's theorem with the noise `z` that the step will draw.

        log p_i/p_0 = √(2 ΔH) (out_i - out_0)·z + ΔH (||out_mix - out_0||² - ||out_mix - out_i||²)

    `elapsed` is ΔH, the step's length by `weight_clock`, times `((1 + η²)/2η)²`. The densities of the discrete step's
    own Gaussians tend to the same, but from far: they overcount a step in which SNR grows by much, as the last but one
    does in flow matching.
    """
    carry, gain, variance = posteriors.coefficients(scheduler, step.timestep, **step.settings)
    outputs = evaluation.outputs
    mean = carry * step.sample.float() + gain * mixed(torch.stack(outputs), evaluation.mixture_weights)
    from_reference = evaluation.from_mixture(0)

    def at(previous: Tensor) -> dict[str, Tensor]:
        noise = (previous.float() - mean) * math.copysign((2 * elapsed / variance) ** 0.5, gain)
        summands = {"path_kl": elapsed * from_reference}
        for k, name in enumerate(evaluation.names[1:], 1):
            along = ((outputs[k] - outputs[0]) * noise).flatten(1).sum(1)
            summands[f"ratio {name}"] = along + elapsed * (from_reference - evaluation.from_mixture(k))
        return summands

    return at


def _in_single_precision(
    scheduler: SchedulerMixin, step: StepRecord, realigned: RealignedPosterior | None
) -> RealignedPosterior:
    """The posteriors that the step is drawn from, if they are in single precision; else made anew in that."""
    if realigned is not None and step.predictions.dtype == step.sample.dtype == torch.float32:
        return realigned
    return realigned_posterior(
        scheduler, replace(step, predictions=step.predictions.float(), sample=step.sample.float())
    )


def _gaussians(models: Sequence[str], realigned: RealignedPosterior) -> Callable[[Tensor], dict[str, Tensor]]:
    """The densities of a step that is not affine in the prediction: every model's Gaussian, written out."""

    def at(previous: Tensor) -> dict[str, Tensor]:
        x = previous.float()
        log_densities = [-((x - m).square() / v + v.log()).flatten(1).sum(1) / 2 for m, v in realigned.models]
        summands = {"path_kl": kl(realigned.mixture, realigned.models[0])}
        for k, name in enumerate(models[1:], 1):
            summands[f"ratio {name}"] = log_densities[k] - log_densities[0]
        return summands

    return at
