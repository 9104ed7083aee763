"""A diffusion model and a reward of what it draws, both as functions of latents: what sampling for a reward needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.clean_estimates import NoiseScales, clean_estimate, noise_scales
from deradiff.algorithm.noise_levels import log_snr_at
from deradiff.alignment.base import Base
from deradiff.alignment.sampling import SamplerSettings, decode, guided, shown, together, told
from deradiff.alignment.scoring import scored
from deradiff.rewards import Reward


@dataclass(frozen=True)
class RewardedModel:
    """A model on its scheduler, whose timesteps are set, and a reward.

    `predict` is the guided prediction at latents as the scheduler holds them, `reward` the score of clean latents, both
    row by row and differentiable.
    """

    scheduler: Any
    predict: Callable[[Tensor, Tensor], Tensor]
    reward: Callable[[Tensor], Tensor]

    def scales(self, i: int) -> NoiseScales:
        """α and σ at the i-th timestep; α = 1 and σ = 0 after the last."""
        timesteps = self.scheduler.timesteps
        if i == len(timesteps):
            return NoiseScales(1.0, 0.0)
        return noise_scales(self.scheduler, log_snr_at(self.scheduler, i, timesteps[i]))

    def clean(self, prediction: Float[Tensor, "batch *latent"], x: Float[Tensor, "batch *latent"], i: int) -> Tensor:
        """The estimate of x_0 at the i-th timestep. Raises `ValueError` for a scheduler that does not say it."""
        log_snr = log_snr_at(self.scheduler, i, self.scheduler.timesteps[i])
        estimate = clean_estimate(self.scheduler, prediction, x, log_snr)
        if estimate is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} with prediction_type="
                f"{self.scheduler.config.get('prediction_type')!r} says nothing of the clean latents: take ddim, ddpm, "
                "euler or euler-a"
            )
        return estimate

    def scored_with_gradient(self, clean: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """`r(clean(x))` and its gradient in x, row by row. Raises what `gradient_of` raises."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            scores = self.reward(clean(x))
            return scores.detach(), gradient_of(scores, x)


def gradient_of(scores: Float[Tensor, " batch"], x: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *latent"]:
    """The gradient of scores in x, row by row. Raises `ValueError` where there is none, or it is not finite."""
    if not scores.requires_grad:
        raise ValueError(
            "the reward is not differentiable in the images: take one that is, or a method without gradient"
        )
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    if not bool(gradient.isfinite().all()):
        raise ValueError("the gradient of the reward is not finite; in half precision, try float32")
    return gradient


def rewarded(base: Base, prompts: Sequence[str], reward: Reward, sampling: SamplerSettings) -> RewardedModel:
    """The model of `base`, sampled by `sampling` for `prompts`, and `reward` of its pictures.

    Latents have as many rows as there are prompts, or with a single prompt any number.
    """
    scheduler = sampling.prepared(base)
    prompted, unprompted = told(base, prompts, sampling)
    known = together(unprompted, prompted)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rows = {name: values.repeat_interleave(len(x) // len(prompts), 0) for name, values in known.items()}
        return guided(base, base.denoiser, shown(scheduler, x, t), t, rows, sampling.guidance_scale)

    def score(clean: Tensor) -> Tensor:
        texts = list(prompts) * len(clean) if len(prompts) == 1 else list(prompts)
        return scored(reward, decode(base, clean), texts)

    return RewardedModel(scheduler, predict, score)
