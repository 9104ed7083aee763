"""Noise-space optimisation: its gradient and regulariser by hand, what it raises, what it counts, what it refuses."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from deradiff.alignment.base import Base
from deradiff.alignment.noise_optimization import (
    Optimized,
    clipped,
    counted,
    initial_noise,
    log_density_of_norm,
    optimize_noise,
    scored_with_gradient,
)
from deradiff.alignment.sampling import SamplerSettings, conditions, decode, sample, unconditional
from deradiff.rewards import Reward
from deradiff.worlds import digits
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import DigitsReward
from messages import naming
from tiny import make

PROMPTS = ["a red fox", "two blue owls", "a fox"]


class Blueness:
    """Smooth in every pixel, and another for every prompt."""

    name = "blueness"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=images.dtype)
        return lengths * images[:, 2].square().mean((1, 2))


def base_of(kind: str = "sd") -> Base:
    pipe, _, _ = make(kind)
    return from_noise(pipe)


def from_noise(pipe: Any, spacing: str = "trailing") -> Base:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    return Base(pipe)


def ddim(steps: int = 2, guidance_scale: float = 1.0) -> SamplerSettings:
    return SamplerSettings("ddim", steps, guidance_scale)


def optimized(
    base: Base,
    prompts: Sequence[str] = PROMPTS,
    reward: Reward | None = None,
    sampling: SamplerSettings | None = None,
    **changed: Any,
) -> Optimized:
    settings = {"iterations": 3, "learning_rate": 0.5, "seed": 5} | changed
    return optimize_noise(base, prompts, reward or Blueness(), sampling or ddim(), **settings)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_regulariser_is_the_chi_density_and_its_gradient_the_closed_form() -> None:
    noise = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        noise *= torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    density = log_density_of_norm(noise)
    # The norm's density, from that of its square (χ² is a Gamma distribution): p(n) = 2 n p(n²).
    squared = noise.detach().flatten(1).square().sum(1)
    gamma = torch.distributions.Gamma(torch.tensor(8.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    known = gamma.log_prob(squared) + math.log(2) + 0.5 * squared.log()
    constant = (1 - 8) * math.log(2) - math.lgamma(8)
    assert torch.allclose(density.detach() + constant, known, rtol=1e-12)
    (gradient,) = torch.autograd.grad(density.sum(), noise)
    closed_form = noise.detach() * (15 / squared - 1).view(3, 1, 1, 1)
    assert torch.allclose(gradient, closed_form, rtol=1e-12)


@pytest.mark.parametrize("steps, guidance_scale, checkpointing", [(1, 1.0, True), (3, 2.5, True), (3, 2.5, False)])
def test_gradient_is_that_of_finite_differences_in_float64(
    steps: int, guidance_scale: float, checkpointing: bool
) -> None:
    base = base_of()
    base.pipe.to(torch.float64)
    sampling, reward, prompts, weight = ddim(steps, guidance_scale), Blueness(), PROMPTS[:2], 0.03
    prompted, unprompted, vae = conditions(base, prompts), unconditional(base, 2), base.pipe.vae

    def render(noise: Tensor) -> Tensor:
        latents = sample(
            base, base.denoiser, prompted, unprompted, noise, sampling, keep=steps, checkpointing=checkpointing
        ).latents
        # As `decode` does it, but for its rounding to float32.
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.sigmoid()

    def objective(noise: Tensor) -> Tensor:
        with torch.no_grad():
            images = render(noise)
        norm = noise.flatten(1).norm(dim=1)
        return reward(images, prompts) + weight * ((noise[0].numel() - 1) * norm.log() - norm.square() / 2)

    noise = initial_noise(base, sampling, 2, 3).double()
    images, scores, gradient = scored_with_gradient(render, reward, prompts, noise, weight)
    assert torch.equal(scores, reward(render(noise), prompts).detach()) and images.shape == (2, 3, 16, 16)
    direction = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = 1e-5
    slope = (objective(noise + h * direction) - objective(noise - h * direction)) / (2 * h)
    assert torch.allclose(slope, (gradient * direction).flatten(1).sum(1), rtol=1e-6, atol=1e-9)


def test_an_iteration_is_a_clipped_step_with_nesterov_momentum() -> None:
    base, reward = base_of(), Blueness()
    sampling = ddim()
    noise = initial_noise(base, sampling, 2, 5)
    prompted = conditions(base, PROMPTS[:2])

    def render(at: Tensor) -> Tensor:
        return decode(base, sample(base, base.denoiser, prompted, None, at, sampling, keep=2).latents)

    at = noise.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([at], lr=0.5, momentum=0.9, nesterov=True, maximize=True)
    expected = []
    for _ in range(3):
        _, scores, gradient = scored_with_gradient(render, reward, PROMPTS[:2], at.detach(), 0.01)
        expected.append(scores)
        # Both rows are longer than that, so that clipping makes both of them 0.02 long.
        assert gradient.flatten(1).norm(dim=1).min() > 0.02
        at.grad = 0.02 * gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1)
        optimizer.step()
    expected.append(reward(render(at.detach()), PROMPTS[:2]).detach())
    found = optimized(base, PROMPTS[:2], max_norm=0.02)
    assert torch.allclose(found.scores, torch.stack(expected), rtol=1e-4)
    assert torch.allclose(found.noise, at.detach(), atol=1e-4)


def test_clipping_leaves_short_and_vanishing_gradients_alone() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(clipped(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(clipped(gradient, float("inf")), gradient)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_the_digits_reward_rises_beyond_two_standard_errors(steps: int) -> None:
    base = from_noise(digits.load_pipeline())
    prompts = captions.sample_prompts(6, 3)
    found = optimized(base, prompts, DigitsReward(), ddim(steps), iterations=6, learning_rate=1.0, norm_weight=0.01)
    rise = found.scores[-1] - found.scores[0]
    assert rise.mean() > 2 * rise.std() / len(rise) ** 0.5
    # The noise stays as long as ordinary noise is: √256 ± a few times √½.
    assert (found.noise.flatten(1).norm(dim=1) - 16).abs().max() < 4


def test_the_best_image_is_kept_with_its_noise() -> None:
    base = base_of()
    # A rate far too large, so that the last image is not the best of all prompts.
    found = optimized(base, learning_rate=300.0, iterations=4)
    assert found.scores.shape == (5, 3)
    best = found.scores.amax(0)
    assert (best > found.scores[-1]).any() and (found.gain >= 0).all()
    assert torch.allclose(found.gain, best - found.scores[0])
    assert torch.allclose(Blueness()(found.images, PROMPTS), best, rtol=1e-5)
    again = decode(
        base, sample(base, base.denoiser, conditions(base, PROMPTS), None, found.noise, ddim(), keep=0).latents
    )
    assert torch.allclose(again, found.images, atol=1e-4)


def test_sdxl_is_optimised_too() -> None:
    found = optimized(base_of("sdxl"), sampling=ddim(2, 3.0))
    assert (found.scores[-1] > found.scores[0]).all()


def test_the_seed_decides_and_a_row_does_not_depend_on_its_batch() -> None:
    base = base_of()
    first, again, other = (optimized(base, seed=seed, iterations=2) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images) and torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores[0], other.scores[0])
    apart = optimized(base, per_pass=1, iterations=2)
    assert torch.allclose(apart.scores, first.scores, rtol=1e-4)
    assert torch.allclose(apart.noise, first.noise, atol=1e-4)
    given = optimized(base, PROMPTS[1:], noise=initial_noise(base, ddim(), 3, 5)[1:], iterations=2)
    assert torch.allclose(given.scores, first.scores[:, 1:], rtol=1e-4)


def test_a_stochastic_sampler_adds_the_same_noise_in_every_iteration() -> None:
    base = base_of()
    settings: dict[str, Any] = {"sampling": SamplerSettings("euler-a", 2, 1.0), "iterations": 1}
    start = initial_noise(base, ddim(), 3, 5)
    still = optimized(base, **settings, learning_rate=1e-9)
    assert torch.allclose(still.scores[1], still.scores[0], rtol=1e-5)
    # The seed and the row decide what is added.
    assert torch.allclose(optimized(base, **settings, per_pass=1).scores[0], still.scores[0], rtol=1e-5)
    other = optimized(base, **settings, noise=start, seed=6)
    assert not torch.allclose(other.scores[0], still.scores[0], rtol=1e-3)


def test_half_precision_noise_is_optimised_in_single() -> None:
    base = base_of()
    half = initial_noise(base, ddim(), 3, 5).half()
    found = optimized(base, noise=half, iterations=1)
    assert found.noise.dtype == torch.float32
    assert torch.equal(found.scores, optimized(base, noise=half.float(), iterations=1).scores)


def test_the_model_is_left_as_it_was() -> None:
    base = base_of()
    before = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
    base.denoiser.requires_grad_(True)
    optimized(base)
    assert all(torch.equal(weight, before[name]) for name, weight in base.denoiser.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in base.denoiser.parameters())
    assert not base.denoiser._forward_hooks and not base.denoiser._forward_pre_hooks


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale, each", [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.cases(2)
def test_every_evaluation_is_counted(guidance_scale: float, each: int, checkpointing: bool) -> None:
    base, rows = base_of(), 0

    def count(_: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    base.denoiser.register_forward_pre_hook(count)
    sampling = ddim(3, guidance_scale)
    prompted = []
    found = optimized(
        base,
        sampling=sampling,
        iterations=3,
        checkpointing=checkpointing,
        per_pass=2,
        report=lambda *line: prompted.append(line[:2]),
    )
    assert prompted == 2 * [(1, 3), (2, 3), (3, 3)]
    evaluations = (2 * 3 + 1 if checkpointing else 3 + 1) * 3 * each
    assert found.cost.forward == evaluations and rows == 3 * evaluations
    assert found.cost.backward == 3 * 3 * each
    assert found.cost.seconds > 0


def test_counting_sees_plain_sampling() -> None:
    base = base_of()
    with counted(base.denoiser) as evaluations:
        base.pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.0, output_type="latent", height=16, width=16)
    assert (evaluations.forward, evaluations.backward) == (3 * 3 * 2, 0)


# -- what is refused --------------------------------------------------------------------------------------------------


class Broken:
    """A reward that is `value` for every second image."""

    name = "broken"

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([0.0, self.value, 0.0])[: len(images)]


class Flat:
    """A reward without gradient."""

    name = "flat"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.detach().mean((1, 2, 3))


class Detached(nn.Module):
    """A reward with weights of its own that takes no gradient from the images."""

    name = "detached"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * images.detach().mean((1, 2, 3))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"iterations": 0}, "iterations = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"norm_weight": -1.0}, "norm_weight = -1.0"),
        ({"max_norm": 0.0}, "max_norm = 0.0"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"per_pass": 0}, "per_pass = 0"),
        ({"prompts": []}, "no prompts"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, naming(2, "noise", 3)),
        ({"reward": Broken(math.nan)}, naming("'broken'", "nan", "'two blue owls'")),
        ({"reward": Broken(math.inf)}, naming("'broken'", "inf", "'two blue owls'")),
        ({"reward": Flat()}, "'flat'"),
        ({"reward": Detached()}, "'detached'"),
    ],
)
def test_what_cannot_be_optimised_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimized(base_of(), **changed)


def test_one_step_from_a_schedule_that_begins_at_the_image_is_refused() -> None:
    pipe, _, _ = make("sd")
    with pytest.raises(ValueError, match="trailing"):
        optimized(from_noise(pipe, "leading"), sampling=ddim(1))
