"""Which models a prediction needs, in a run of ComfyUI's, and what is carried over between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.schedules import Constant, Schedule
from deradiff.integrations.comfyui.runs import DialSettings, RunClock, mixture, noise_in, weights_of, without_noise
from deradiff.sampling.reuse import INTERPOLATE, REFERENCE, PredictionEstimator, Reused

ALIGNED = "aligned"

MODELS = (REFERENCE, ALIGNED)

Evaluate = Callable[[str], Tensor]
"""The guided denoised latents by a model: the reference, the aligned one, or that of interpolated weights."""


@dataclass
class MixedRun:
    """One run at one λ, constant or annealed: asked for a prediction at a noise level, it answers with the mixture.

    `shared_weights` says that both models are one with a LoRA switched, so that there also is the weight-interpolated
    one. `flow` says that latents are `(1 - σ) x_0 + σ ε`.
    """

    dial: DialSettings
    schedule: Schedule
    clock: RunClock
    flow: bool
    shared_weights: bool
    estimator: PredictionEstimator | None = None
    lam: float = 0.0
    """λ of the prediction that was asked for last."""
    _last: int = field(default=-1, init=False)

    def denoised(
        self,
        x: Float[Tensor, "batch *latent"],
        sigma: float | int,
        evaluate: Callable[[str], Tensor],
        exactly: bool = False,
    ) -> Float[Tensor, "batch *latent"]:
        """The mixture of the models' guided predictions at x (Algorithm 1, lines 7 and 8), as denoised latents.

        A model without weight is not evaluated. `exactly` forbids predictions that are carried over.
        """
        i = self.clock.step(sigma)
        self.lam = self.schedule.at(self.clock.progress(i, sigma))
        weights = weights_of(self.lam)
        models = [k for k in range(len(MODELS)) if weights[k, 0] != 0]
        if len(models) == 1:
            return evaluate(MODELS[models[0]])
        if self.dial.method == "interpolate":
            return evaluate(INTERPOLATE)
        if self.dial.reuse is None or exactly or not sigma or i <= self._last or not self.clock.begins(i, sigma):
            return mixture(torch.stack([evaluate(name) for name in MODELS]), self.lam)
        self._last = i
        return self._carried_over(i, x, sigma, evaluate)

    def _carried_over(self, i: int, x: Tensor, sigma: float, evaluate: Evaluate) -> Tensor:
        """The mixture from all models, or from the carrier alone and what is known of the others' differences."""
        estimator = self._estimator()
        wanted = estimator.wants(i, x.shape)
        carrier = estimator.carrier
        names: Sequence[str] = MODELS
        if wanted == "carrier":
            names = (carrier,)
        elif wanted == "all" and carrier == INTERPOLATE:
            names = (*MODELS, INTERPOLATE)
        denoised = [evaluate(name) for name in names]
        noise = torch.stack([noise_in(x, clean, sigma) for clean in denoised])
        indices = range(len(MODELS))
        completed = estimator.complete(i, noise, indices, names_to_indices(names), weights_of(self.lam))
        if wanted == "carrier":
            return without_noise(x, mixture(completed, self.lam), sigma)
        return mixture(torch.stack(denoised[: len(MODELS)]), self.lam)

    def _estimator(self) -> PredictionEstimator:
        if self.estimator is None:
            reuse = self.dial.reuse
            assert reuse is not None
            carrier = reuse.resolved(MODELS, weights_of(self.lam), self.shared_weights)
            self.estimator = PredictionEstimator(
                reuse, carrier, MODELS, self.clock.impacts(self.flow), self._strengths()
            )
        return self.estimator

    def _strengths(self) -> list[float]:
        """λ at every step, one for a constant λ."""
        if isinstance(self.schedule, Constant):
            return [1.0] * self.clock.steps
        return [abs(self.schedule.at(self.clock.progress(i))) for i in range(self.clock.steps)]

    def end(self) -> Reused | None:
        """What reuse came to, once the run is over; warns where its tolerance was not kept."""
        if self.estimator is None:
            return None
        self.estimator.tell()
        return self.estimator.result()


def names_to_indices(names: Sequence[str]) -> list[int]:
    """Where models are among `MODELS`; the weight-interpolated one comes after them."""
    order: tuple[Any, ...] = (*MODELS, INTERPOLATE)
    return [order.index(name) for name in names]
