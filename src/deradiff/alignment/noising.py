"""How a model is trained to denoise: which times are drawn, what noise makes of a picture, what is to be predicted.

Everything that depends on whether a model predicts ε, v or the velocity of a flow is said here, once. Times are those
of the model's scheduler, from 0 for a clean picture to the number of its training steps for noise.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Shaped
from torch import Tensor

from deradiff.anchors.checks import prediction_type, shift_of

Density = Literal["uniform", "logit-normal"]
"""How the times of training are spread, before a scheduler's shift: evenly, or as the sigmoid of normal noise."""


@runtime_checkable
class Noising(Protocol):
    """One way of noising, on latents as the scheduler holds them, with a time for each row."""

    @property
    def prediction(self) -> str:
        """What the model predicts: `epsilon`, `v_prediction` or `flow`."""
        ...

    @property
    def timesteps(self) -> int:
        """How many steps the noise schedule has: the time of pure noise, or one more."""
        ...

    def drawn(self, generator: torch.Generator) -> Shaped[Tensor, " 1"]:
        """The time of one row. How often each occurs is all the weight that a time has: errors are not weighted."""
        ...

    def noised(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """The latents at these times."""
        ...

    def target(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """What a perfect model would predict."""
        ...


class DiffusionNoising:
    """`x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε` at whole times drawn evenly; the target is ε, or v (Salimans and Ho 2022)."""

    def __init__(self, config: Any, prediction: str) -> None:
        self.prediction = prediction
        self.scheduler = DDPMScheduler.from_config(config)
        self.timesteps = int(self.scheduler.config.num_train_timesteps)

    def drawn(self, generator: torch.Generator) -> Shaped[Tensor, " 1"]:
        """A whole number from 0 to below `timesteps`."""
        return torch.randint(self.timesteps, (1,), generator=generator)

    def noised(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """See `Noising`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """ε or v."""
        if self.prediction == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)


@dataclass(frozen=True)
class FlowNoising:
    """`x_t = (1 - σ) x_0 + σ ε` at `t = σ T`; the target is the velocity `ε - x_0` (Lipman et al. 2023, Liu et al.
    2023).

    A share u of (0, 1) is drawn from `density`, evenly or logit-normally (location 0, scale 1: Esser et al. 2024,
    Stable Diffusion 3, §3.1), and moved towards noise as the model's scheduler moves its own: `σ = s u / (1 + (s - 1)
    u)` with the `shift` s of the scheduler, for one that shifts by resolution the one it has at the resolution of the
    training.
    """

    timesteps: int
    shift: float
    density: Density = "uniform"
    prediction: str = "flow"

    def drawn(self, generator: torch.Generator) -> Shaped[Tensor, " 1"]:
        """A number from 0 to T."""
        if self.density == "uniform":
            share = torch.rand(1, generator=generator)
        else:
            share = torch.randn(1, generator=generator).sigmoid()
        return self.timesteps * self.shift * share / (1 + (self.shift - 1) * share)

    def noised(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """See `Noising`."""
        sigma = (timesteps / self.timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - sigma) * latents + sigma * noise

    def target(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """The velocity, the same at all times."""
        return noise - latents

    def clean(
        self,
        noisy: Float[Tensor, "batch *latent"],
        velocity: Float[Tensor, "batch *latent"],
        timestep: Shaped[Tensor, ""],
    ) -> Float[Tensor, "batch *latent"]:
        """The clean latents that a predicted velocity stands for: `x_t - σ v`, also of pure noise."""
        return noisy - timestep.to(noisy) / self.timesteps * velocity


def shift_at(config: Any, mu: float | None = None) -> float:
    """The shift s of a flow scheduler with this configuration; of one that shifts by resolution, that of its `mu`.

    Raises `ValueError` where it shifts by resolution and no `mu` is known.
    """
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("the scheduler shifts its times by the resolution, and the pipeline did not say how far")
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
    return shift_of(config) or 1.0


def noising_of(scheduler: Any, density: Density | None = None, mu: float | None = None) -> Noising:
    """How a model with this scheduler is trained; `mu` is what its pipeline shifts the times by.

    Raises `ValueError` for a model that predicts neither ε, nor v, nor the velocity of a flow, and for a `density` of
    one whose times are whole numbers of a noise schedule.
    """
    prediction = prediction_type(type(scheduler).__name__, scheduler.config)
    if prediction == "flow":
        return FlowNoising(
            int(scheduler.config.num_train_timesteps), shift_at(scheduler.config, mu), density or "uniform"
        )
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"a model that predicts {prediction!r} cannot be aligned here: ε, v or the velocity of a flow is needed"
        )
    if density not in (None, "uniform"):
        raise ValueError(f"--density {density} is for flow matching: this model predicts {prediction}, at even times")
    return DiffusionNoising(scheduler.config, prediction)
