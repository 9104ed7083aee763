"""MPGD: its algorithm written out in terms of x_0 and ε, and what it refuses."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from deradiff.alignment.manifold_guidance import manifold_guided
from deradiff.alignment.rewarded_model import RewardedModel
from deradiff.worlds.gaussian_mixture import SCHEDULE, crossing, peaked_reward
from messages import naming

REWARD = peaked_reward([1.5, 0.5], 0.6)


def modelled(scheduler: Any, steps: int) -> RewardedModel:
    scheduler.set_timesteps(steps)
    denoiser = crossing().denoiser({})
    return RewardedModel(scheduler, lambda x, t: denoiser(scheduler.scale_model_input(x, t), t).sample, REWARD)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_steps_are_those_of_the_papers_algorithm() -> None:
    model, beta = modelled(DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True), 6), 0.7
    bars, timesteps = model.scheduler.alphas_cumprod.double(), model.scheduler.timesteps.tolist()
    x = noise(4)
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        bar, next_bar = bars[t], 1.0 if following is None else bars[following]
        epsilon = model.predict(x, torch.tensor(t))
        clean = (x - (1 - bar) ** 0.5 * epsilon) / bar**0.5
        # The gradient of -½ q ||x - target||², by hand.
        clean = clean + (1 - bar) / beta * 0.6 * (torch.tensor([1.5, 0.5]) - clean)
        x = next_bar**0.5 * clean + (1 - next_bar) ** 0.5 * epsilon
    torch.testing.assert_close(manifold_guided(model, noise(4), beta), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_stochastic_samplers_are_guided_towards_the_reward_and_back_to_themselves(family: Any) -> None:
    options = {"clip_sample": False} if family is DDPMScheduler else {}
    rewards = []
    for beta in (0.5, 5.0, 1e12):
        generator = torch.Generator().manual_seed(1)
        model = modelled(family(**SCHEDULE, **options), 30)
        rewards.append(float(REWARD(manifold_guided(model, noise(400), beta, [generator] * 400)).mean()))
    assert rewards[0] > rewards[1] + 0.1 > rewards[2] + 0.2
    assert rewards[2] == pytest.approx(crossing().reference.expected(REWARD), abs=0.2)


def test_what_cannot_be_guided_is_refused() -> None:
    with pytest.raises(ValueError, match=naming("DPMSolverMultistepScheduler", "euler-a")):
        manifold_guided(modelled(DPMSolverMultistepScheduler(**SCHEDULE), 3), noise(1), 1.0)
    with pytest.raises(ValueError, match=naming("beta", 0)):
        manifold_guided(modelled(DDIMScheduler(**SCHEDULE), 3), noise(1), 0)
