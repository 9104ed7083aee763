"""Particles with a reward as potential, in worlds where the law that they should follow is a formula."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

from deradiff.algorithm import posteriors
from deradiff.alignment.reward_particles import RewardTilt, TiltedParticles, sample_tilted
from deradiff.alignment.rewarded_model import RewardedModel
from deradiff.worlds.gaussian_mixture import SCHEDULE, QuadraticReward, World, crossing, peaked_reward
from messages import naming


def modelled(world: World, reward: QuadraticReward, scheduler: Any = None, steps: int = 40) -> RewardedModel:
    scheduler = scheduler or DDPMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(steps)
    denoiser = world.denoiser({})
    return RewardedModel(scheduler, lambda x, t: denoiser(scheduler.scale_model_input(x, t), t).sample, reward)


def drawn(tilt: RewardTilt, count: int, seed: int = 0) -> TiltedParticles:
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=chance)
    return sample_tilted(tilt, noise, chance, ess_threshold=0.9, seed=seed)


@pytest.mark.parametrize(
    ("scheduler", "gradient", "tempered"),
    [(DDPMScheduler, True, True), (DDPMScheduler, True, False), (EulerAncestralDiscreteScheduler, False, False)],
    ids=["DAS", "TDS", "Feynman-Kac steering"],
)
@pytest.mark.parametrize("peaked", [False, True], ids=["slope", "peak"])
def test_particles_follow_the_tilted_law(scheduler: Any, gradient: bool, tempered: bool, peaked: bool) -> None:
    """The reward, the probability of every mode and log Z are those of `p exp(r/β)`, which is a formula here."""
    world, beta = crossing(), 1.5
    reward = peaked_reward([1.5, 0.5], 0.6) if peaked else world.rewards["slope"]
    exact, log_z = world.reference.tilted(reward / beta)
    options = {"clip_sample": False} if scheduler is DDPMScheduler else {}
    model = modelled(world, reward, scheduler(**SCHEDULE, **options))
    particles = drawn(RewardTilt(model, beta, gradient, tempered, per_pass=10_000), 2500)
    estimate, truth = particles.mean(particles.scores), exact.expected(reward)
    shift = abs(truth - world.reference.expected(reward))
    assert abs(estimate.value - truth) <= 0.02 * shift + 3 * estimate.error and estimate.error < 0.05 * shift
    modes = (particles.log_weights.exp()[0][:, None] * exact.modes_of(particles.latents)).sum(0)
    assert float((modes - exact.mode_weights).abs().sum()) / 2 < 0.03
    assert float(particles.log_normalizer) == pytest.approx(log_z, abs=0.05 + 0.02 * abs(log_z))


def test_proposals_are_weighed_by_their_densities() -> None:
    """`log p - log q`, from torch's own Gaussians; and the push is `λ σ² ∇ r(x̂_0(x))/β`, by finite differences."""
    world, beta, i = crossing(), 0.8, 25
    model = modelled(world, world.rewards["slope"])
    tilt, scheduler = RewardTilt(model, beta), model.scheduler
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    look = tilt.look(x, i)
    moved, log_ratio = tilt.propose(x, look, i, torch.Generator().manual_seed(1))
    p = posteriors.posterior(scheduler, look.prediction, scheduler.timesteps[i], x)
    t, h = scheduler.timesteps[i], 1e-5

    def heading(x: torch.Tensor) -> torch.Tensor:
        bar = scheduler.alphas_cumprod.double()[t]
        return world.rewards["slope"]((x - (1 - bar) ** 0.5 * model.predict(x, t)) / bar**0.5) / beta

    slopes = torch.stack([(heading(x + h * e) - heading(x - h * e)) / (2 * h) for e in torch.eye(2).double()], 1)
    growth = 1.008 ** ((i + 1) * 100 / 40) - 1
    q = torch.distributions.Normal(p.mean + growth * p.variance * slopes, p.variance.sqrt())
    own = torch.distributions.Normal(p.mean, p.variance.sqrt())
    expected = (own.log_prob(moved) - q.log_prob(moved)).sum(1)
    assert growth < 1 and float(expected.abs().max()) > 0.01
    torch.testing.assert_close(log_ratio, expected, rtol=1e-4, atol=1e-5)


def test_every_step_of_every_particle_is_one_evaluation() -> None:
    model, rows = modelled(crossing(), crossing().rewards["slope"], steps=8), []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return model.predict(x, t)

    drawn(RewardTilt(RewardedModel(model.scheduler, predict, model.reward), 1.0, per_pass=2), 5)
    assert rows == [2, 2, 1] * 8


@pytest.mark.parametrize(
    ("scheduler", "beta", "values"),
    [(None, 0.0, ["beta", 0.0]), (DDIMScheduler(**SCHEDULE), 1.0, ["DDIMScheduler", "euler-a"])],
)
def test_what_has_no_such_particles(scheduler: Any, beta: float, values: list[Any]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        RewardTilt(modelled(crossing(), crossing().rewards["slope"], scheduler), beta)
