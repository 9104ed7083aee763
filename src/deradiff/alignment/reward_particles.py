"""Sampling from `p(x) exp(r(x)/β)` without an aligned model: sequential Monte Carlo with a reward as its potential.

p is what the sampler draws, guidance included. The estimate of x_0 behind every prediction says what a particle is
heading for, and a twist `λ_t r(x̂_0(x_t))/β` weighs it by that; the last twist is the reward itself, so that the target
is exact for any number of steps as the number of particles grows. With its gradient the twist also moves the proposals:

    q(x_{t-1} | x_t) = N(μ_t + λ_{t-1} σ_t² ∇ r(x̂_0(x_t))/β, σ_t²)

- TDS (Wu et al. 2023, arXiv 2306.17775, algorithm 1): λ_t = 1 throughout.
- DAS (Kim et al. 2025, arXiv 2501.05803, algorithm 1): λ_t grows from 0, `min((1 + γ)^(T - t) - 1, 1)`, since early
  estimates say little. Their code's γ is 0.008 for 100 steps; for another number it is scaled so that λ gets to 1 at
  the same share of the run.
- Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848) is TDS without the gradient: for rewards that have none.

The algorithm is `algorithm.smc`, as for realigned particles; here is another model for it. DAS's code resamples by
another scheme (SSP) and keeps the particle of greatest weight, which is no draw from the target; here particles have
their weights, by which one can be drawn.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import Gaussian
from deradiff.algorithm.smc import Population, WeightedParticles
from deradiff.alignment.rewarded_model import RewardedModel

GAMMA, STEPS = 0.008, 100
"""DAS's tempering in its authors' code: γ, and the number of steps that it is for."""


@dataclass(frozen=True, kw_only=True)
class TiltedParticles(WeightedParticles):
    """Clean latents of all particles of one prompt, and their rewards."""

    latents: Float[Tensor, "particle *latent"]
    scores: Float[Tensor, " particle"]


class _Look(NamedTuple):
    """What a particle is heading for: the prediction at x_t, `r(x̂_0)/β`, and the gradient of that in x_t."""

    prediction: Tensor
    log_tilt: Tensor
    gradient: Tensor

    def rows(self, index: Tensor) -> "_Look":
        return _Look(*(part[index.to(part.device)] for part in self))


@dataclass(frozen=True)
class RewardTilt:
    """The Feynman-Kac model of `p exp(r/β)`: transitions and potentials.

    `gradient` lets the twist move the proposals; `tempered` makes λ_t grow as DAS does, otherwise it is 1. Networks see
    `per_pass` particles at a time. Raises `ValueError` for a β that is not positive, and for a sampler that does not
    draw noise in every step or remembers earlier ones.
    """

    model: RewardedModel
    beta: float | int
    gradient: bool = True
    tempered: bool = True
    per_pass: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta = {self.beta}: it must be positive and finite")
        if not posteriors.is_diffusion(self.model.scheduler):
            raise ValueError(
                f"{type(self.model.scheduler).__name__} draws no noise of its own in every step, by which copies of a "
                "particle would part: take ddpm or euler-a"
            )

    def temperature(self, i: int) -> float:
        """λ before step i of the run, 0 to 1; 1 after the last."""
        steps = len(self.model.scheduler.timesteps)
        return min((1 + GAMMA) ** (i * STEPS / steps) - 1, 1.0) if self.tempered and i < steps else 1.0

    def look(self, x: Float[Tensor, "particle *latent"], i: int) -> _Look:
        """Where the particles are heading before step i."""
        return _Look(*map(torch.cat, zip(*(self._look(rows, i) for rows in x.split(self.per_pass)), strict=True)))

    def _look(self, x: Tensor, i: int) -> _Look:
        t, predictions = self.model.scheduler.timesteps[i], []

        def clean(x: Tensor) -> Tensor:
            predictions.append(self.model.predict(x, t))
            return self.model.clean(predictions[0], x, i)

        if self.gradient and self.temperature(i + 1) > 0:
            scores, gradient = self.model.scored_with_gradient(clean, x)
        else:
            with torch.no_grad():
                scores, gradient = self.model.reward(clean(x)), torch.zeros_like(x)
        return _Look(predictions[0].detach(), scores / self.beta, gradient / self.beta)

    def propose(
        self, x: Tensor, look: _Look, i: int, generators: torch.Generator | list[torch.Generator]
    ) -> tuple[Float[Tensor, "particle *latent"], Float[Tensor, " particle"]]:
        """Take step i from the proposal: x_{t-1}, and `log p(x_{t-1} | x_t) - log q(x_{t-1} | x_t)`."""
        scheduler, t = self.model.scheduler, self.model.scheduler.timesteps[i]
        mean, variance = posteriors.posterior(scheduler, look.prediction, t, x)
        push = self.temperature(i + 1) * look.gradient
        moved = posteriors.sample(scheduler, Gaussian(mean + variance * push, variance), t, generators)
        return moved, (push * (variance * push / 2 - (moved - mean))).flatten(1).sum(1)


@torch.no_grad()
def sample_tilted(
    tilt: RewardTilt,
    noise: Float[Tensor, "particle *latent"],
    generators: torch.Generator | list[torch.Generator],
    *,
    ess_threshold: float | int = 0.5,
    seed: int = 0,
) -> TiltedParticles:
    """Particles of one prompt from standard normal `noise`, weighted towards `p exp(r/β)` and resampled.

    Args:
        tilt: the model, its reward and how strongly.
        noise: where they start; their number is K.
        generators: of the noise that the sampler adds, one for all or one per particle.
        ess_threshold: resample where the share of effective particles falls below this, 0 (never) to 1 (always).
        seed: decides the resampling.

    Each step of each particle is one evaluation, with the gradient one backward pass more. Raises `FloatingPointError`
    where all weights are zero or NaN, `ValueError` for a reward without a finite gradient where it is wanted.
    """
    population = Population(1, len(noise), float(ess_threshold), torch.Generator().manual_seed(seed))
    x = noise * tilt.model.scheduler.init_noise_sigma
    log_ratio = log_twist = torch.zeros(len(noise), device=noise.device)
    for i in range(len(tilt.model.scheduler.timesteps)):
        look, before = tilt.look(x, i), log_twist
        log_twist = tilt.temperature(i) * look.log_tilt
        population.weigh(log_ratio + log_twist - before)
        if (rows := population.resample()) is not None:
            rows = rows.to(x.device)
            x, look, log_twist = x[rows], look.rows(rows), log_twist[rows]
        x, log_ratio = tilt.propose(x, look, i, generators)
    scores = torch.cat([tilt.model.reward(rows) for rows in x.split(tilt.per_pass)])
    population.weigh(log_ratio + scores / tilt.beta - log_twist)
    return TiltedParticles(**vars(population.result()), latents=x, scores=scores)
