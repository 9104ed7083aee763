"""DOODL: its step by hand, through EDICT's chain by plain autograd; what it counts; what it leaves as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deradiff.alignment.doodl import doodl
from deradiff.alignment.noise_optimization import initial_noise
from deradiff.alignment.rewarded_model import rewarded
from deradiff.alignment.sampling import SamplerSettings, decode
from messages import naming
from test_edict import by_the_paper
from test_noise_optimization import PROMPTS, Blueness, base_of


def test_an_iteration_is_the_papers() -> None:
    base, reward, prompts, clip = base_of(), Blueness(), PROMPTS[:2], 0.05
    sampling = SamplerSettings("ddim", 3, 1.0)
    start = initial_noise(base, sampling, 2, 5).double()
    model = rewarded(base, prompts, reward, sampling)

    def mean_reward(noise: Tensor) -> Tensor:
        x, y = (reward(decode(base, latents), prompts) for latents in by_the_paper(model, noise, noise, 0.93))
        return (x + y) / 2

    noise = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(mean_reward(noise).sum(), noise)
    moved = start + (3.0 * gradient).clamp(-clip, clip)
    moved = moved * (start.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1)).view(2, 1, 1, 1)

    options: dict[str, Any] = {"steps": 3, "guidance_scale": 1.0, "learning_rate": 3.0, "clip": clip, "seed": 5}
    found = doodl(base, prompts, reward, iterations=1, **options)
    assert (found.scores[1] > found.scores[0]).all() and (found.gain > 0).all()
    assert float((moved - start).abs().max()) > 0.01
    torch.testing.assert_close(found.noise, moved, rtol=0, atol=2e-3)  # which the perturbation stays below
    torch.testing.assert_close(found.noise.flatten(1).norm(dim=1), start.flatten(1).norm(dim=1))
    # Two evaluations a step; once more with the gradient, which goes back through each; and the last rendering.
    assert (found.cost.forward, found.cost.backward) == (2 * 3 * 3, 2 * 3)


def test_no_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match=naming("iterations", 0)):
        doodl(base_of(), PROMPTS, Blueness(), iterations=0)
