"""The closed-form world against what shares none of its formulas: autograd, quadrature, torch, diffusers."""

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from deradiff.worlds.gaussian_mixture import (
    SCHEDULE,
    GaussianMixture,
    MixtureDenoiser,
    MixturePipeline,
    QuadraticReward,
    World,
    crossing,
    linear_reward,
    mixture,
    peaked_reward,
    prediction_of,
    random_world,
    variance_preserving,
)
from messages import naming

GRID = torch.linspace(-30, 30, 120_001, dtype=torch.float64)
CELL = float(GRID[1] - GRID[0])
SIZES = [(1, 1), (3, 1), (4, 2), (5, 16), (6, 64)]
TILTS = {"reference": {}, "aligned": {"reward 1": 0.8}, "two rewards": {"reward 1": 0.8, "reward 2": -0.5}}


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marginal(model: GaussianMixture, alpha: float = 1.0, sigma: float = 0.0) -> MixtureSameFamily:
    """The law of `alpha x_0 + sigma ε`, by torch."""
    spread = (alpha**2 * model.variances + sigma**2).sqrt()
    return MixtureSameFamily(Categorical(model.mode_weights), Independent(Normal(alpha * model.means, spread), 1))


def score(law: MixtureSameFamily, x: Tensor) -> Tensor:
    """The gradient of the log density, by autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(law.log_prob(x).sum(), x)[0]


def on_a_grid(values: Tensor, model: GaussianMixture) -> float:
    """The expectation of a function's `values` on the grid, by quadrature."""
    return float((values * marginal(model).log_prob(GRID[:, None]).exp()).sum() * CELL)


def agrees(samples: Tensor, expected: float, errors: float = 4.0) -> None:
    """The mean of independent samples is `expected` within so many of its standard errors."""
    error = float(samples.std() / len(samples) ** 0.5)
    assert abs(float(samples.mean()) - expected) < errors * error + 1e-12


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_what_they_are_called_and_add_and_scale() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=chance())
    direction, target = [1.0, -2.0, 0.5], [0.3, 1.0, -1.0]
    linear, peaked = linear_reward(direction), peaked_reward(target, [1.0, 2.0, 3.0])
    by_hand = -0.5 * (torch.tensor([1.0, 2.0, 3.0]) * (x - torch.tensor(target)).square()).sum(1)
    torch.testing.assert_close(linear(x), x @ torch.tensor(direction, dtype=torch.float64))
    torch.testing.assert_close(peaked(x), by_hand)
    torch.testing.assert_close((linear / 4 + 3 * peaked)(x), linear(x) / 4 + 3 * peaked(x))
    torch.testing.assert_close(linear(x.float()), linear(x).float())
    assert peaked(torch.tensor([target])).item() == pytest.approx(0, abs=1e-6) and bool((peaked(x) < 0).all())


@pytest.mark.parametrize("curvature", [0.0, -1.0, [1.0, -0.1], math.nan])
def test_a_peak_needs_positive_curvature(curvature: float | list[float]) -> None:
    with pytest.raises(ValueError, match=naming("curvature", curvature)):
        peaked_reward([0.0, 0.0], curvature)


# -- mixtures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("components", "dim"), SIZES)
def test_log_density_is_that_of_torch(components: int, dim: int) -> None:
    world = random_world(1, components, dim)
    for model in (world.reference, world.aligned({"reward 1": 1.3})):
        x = model.sample(100, chance())
        torch.testing.assert_close(model.log_density(x), marginal(model).log_prob(x))


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("tilts", TILTS.values(), ids=TILTS)
def test_density_expectation_and_divergence_match_quadrature(tilts: dict[str, float], peaked: bool) -> None:
    world = random_world(2, 4, 1, rewards=2, peaked=peaked)
    model = world.aligned(tilts)
    log_p, log_p_0 = model.log_density(GRID[:, None]), world.reference.log_density(GRID[:, None])
    assert float(log_p.exp().sum() * CELL) == pytest.approx(1, abs=1e-9)
    for reward in world.rewards.values():
        assert model.expected(reward) == pytest.approx(on_a_grid(reward(GRID[:, None]), model), abs=1e-8)
    assert world.divergence(tilts) == pytest.approx(on_a_grid(log_p - log_p_0, model), abs=1e-8)


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("components", "dim"), SIZES)
def test_the_aligned_model_is_the_reference_times_the_exponential_of_the_reward(
    components: int, dim: int, peaked: bool
) -> None:
    world = random_world(3, components, dim, rewards=2, peaked=peaked)
    exponent = world.exponent({"reward 1": 0.7, "reward 2": 1.5})
    aligned, log_z = world.reference.tilted(exponent)
    x = torch.cat([world.reference.sample(50, chance()), aligned.sample(50, chance()), 5 * torch.randn(50, dim)])
    ratio = aligned.log_density(x) - world.reference.log_density(x) - exponent(x)
    torch.testing.assert_close(ratio, torch.full_like(ratio, -log_z), rtol=1e-9, atol=1e-9)
    assert float(aligned.mode_weights.sum()) == pytest.approx(1)
    if dim == 1:
        assert log_z == pytest.approx(math.log(on_a_grid(exponent(GRID[:, None]).exp(), world.reference)), abs=1e-8)


@pytest.mark.parametrize("peaked", [False, True])
def test_expectation_and_divergence_match_sampling_in_four_dimensions(peaked: bool) -> None:
    world = random_world(4, 5, 4, rewards=2, peaked=peaked)
    tilts = {"reward 1": 1.0, "reward 2": 0.5}
    model = world.aligned(tilts)
    x = model.sample(100_000, chance(5))
    for reward in world.rewards.values():
        agrees(reward(x), model.expected(reward))
    agrees(model.log_density(x) - world.reference.log_density(x), world.divergence(tilts))


def test_several_rewards_at_once_are_their_sum_in_any_order() -> None:
    world = random_world(6, 4, 3, rewards=2, peaked=True)
    first, second = world.rewards.values()
    at_once = world.aligned({"reward 1": 0.4, "reward 2": 1.1})
    one_by_one = world.reference.tilted(second * 1.1)[0].tilted(first * 0.4)[0]
    as_one = world.reference.tilted(first * 0.4 + second * 1.1)[0]
    x = at_once.sample(100, chance())
    for other in (one_by_one, as_one):
        torch.testing.assert_close(at_once.log_density(x), other.log_density(x))
    with pytest.raises(KeyError):
        world.aligned({"reward 3": 1.0})


def test_alignment_at_beta_over_lam_is_the_geometric_mixture_of_reference_and_anchor() -> None:
    world, lam = crossing(), 0.3
    x = 2 * torch.randn(200, 2, dtype=torch.float64, generator=chance())
    anchor, realigned = world.aligned({"slope": 2.0}), world.aligned({"slope": 2.0 * lam})
    mixed = (1 - lam) * world.reference.log_density(x) + lam * anchor.log_density(x)
    gap = realigned.log_density(x) - mixed
    torch.testing.assert_close(gap, gap[:1].expand_as(gap))


def test_a_tilt_without_a_finite_integral_is_refused() -> None:
    model = mixture([1, 1], [[0.0, 1.0], [1.0, 0.0]], [0.2, 0.5])
    convex = QuadraticReward(torch.zeros(2).double(), torch.tensor([0.0, -1.0]).double())
    assert model.tilted(convex * 1.9)[0].variances.max().item() == pytest.approx(10)
    with pytest.raises(ValueError, match=naming(0.5, "curvature -2")):
        model.tilted(convex / 0.5)


def test_samples_have_the_mixtures_moments_and_modes() -> None:
    model = random_world(7, 3, 4).reference
    x = model.sample(100_000, chance(1))
    law = marginal(model)
    for d in range(4):
        agrees(x[:, d], float(law.mean[d]))
        agrees((x[:, d] - law.mean[d]).square(), float(law.variance[d]))
    for k in range(3):
        agrees(model.modes_of(x)[:, k], float(model.mode_weights[k]))
    torch.testing.assert_close(model.sample(9, chance(2)), model.sample(9, chance(2)), rtol=0, atol=0)


def test_variances_may_be_given_in_three_shapes() -> None:
    one, per_component, full = 0.3, [0.1, 0.2], [[0.1, 0.2], [0.3, 0.4]]
    models = [mixture([1, 3], [[0.0, 1.0], [2.0, 3.0]], variances) for variances in (one, per_component, full)]
    found = [model.variances.tolist() for model in models]
    assert found == [[[0.3, 0.3], [0.3, 0.3]], [[0.1, 0.1], [0.2, 0.2]], full]
    assert models[0].mode_weights.tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("weights", "means", "variances", "values"),
    [
        ([1, 0], [[0.0], [1.0]], 1.0, ["positive"]),
        ([1, math.nan], [[0.0], [1.0]], 1.0, ["positive"]),
        ([1, 1], [[0.0], [1.0]], [1.0, -1.0], ["positive"]),
        ([1, 1, 1], [[0.0], [1.0]], 1.0, [3, [2, 1]]),
        ([1, 1], [[0.0], [1.0]], [1.0, 1.0, 1.0], [2, [2, 1], [3]]),
        ([], [], 1.0, [0, [0]]),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(weights, means, variances, values) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        mixture(weights, means, variances)


# -- the denoiser ------------------------------------------------------------------------------------------------------


def test_the_noise_levels_are_those_of_diffusers_between_timesteps_too() -> None:
    alpha_bar = diffusers.DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
    for t in (0, 1, 500, 998, 999):
        noise = variance_preserving(t)
        assert float(noise.alpha) == pytest.approx(float(alpha_bar[t].sqrt()), rel=1e-6)
        assert float(noise.alpha**2 + noise.sigma**2) == pytest.approx(1)
    euler = diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="linspace")
    euler.set_timesteps(14)
    assert not float(euler.timesteps[1]).is_integer()
    for t, ratio in zip(euler.timesteps, euler.sigmas, strict=False):
        noise = variance_preserving(float(t))
        assert float(noise.sigma / noise.alpha) == pytest.approx(float(ratio), rel=1e-5)


@pytest.mark.parametrize("tilts", TILTS.values(), ids=TILTS)
@pytest.mark.parametrize(("components", "dim"), SIZES)
def test_epsilon_is_the_score_of_the_noised_density(components: int, dim: int, tilts: dict[str, float]) -> None:
    world = random_world(8, components, dim, rewards=2)
    model, denoiser = world.aligned(tilts), world.denoiser(tilts)
    for t in (0, 250.5, 700, 999):
        alpha, sigma = map(float, variance_preserving(t))
        law = marginal(model, alpha, sigma)
        x = torch.cat([law.sample((20,)), 3 * torch.randn(20, dim, dtype=torch.float64)])
        torch.testing.assert_close(denoiser(x, t).sample, -sigma * score(law, x), rtol=1e-7, atol=1e-9)


def denoised_by_diffusers(prediction: str, output: Tensor, x: Tensor, t: float) -> Tensor:
    """x_0 from a model's output, by the scheduler that such an output is for."""
    if prediction == "edm":
        edm = diffusers.EDMEulerScheduler()
        return edm.precondition_outputs(x, output, torch.tensor(math.exp(4 * t), dtype=torch.float64))
    if prediction == "flow":
        return x - t / 1000 * output
    ddpm = diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction)
    ddpm.alphas_cumprod = ddpm.alphas_cumprod.double()
    return ddpm.step(output, int(t), x).pred_original_sample


@pytest.mark.parametrize("sizes", [(1, 1), (4, 2), (5, 16)])
@pytest.mark.parametrize(
    ("prediction", "timesteps"),
    [
        *((prediction, (0, 321, 999)) for prediction in ("epsilon", "v_prediction", "sample")),
        ("flow", (1, 250, 999.9, 1000)),
        ("edm", (-1.5, -0.3, 0.0, 1.0)),
    ],
)
def test_every_prediction_leads_diffusers_to_the_same_expected_image(prediction, timesteps, sizes) -> None:
    world = random_world(9, *sizes)
    denoiser = world.denoiser({"reward 1": 0.6}, prediction)
    for t in timesteps:
        if prediction == "edm":
            sigma = math.exp(4 * t)
            alpha, scale = 1.0, 1 / math.sqrt(sigma**2 + 0.25)
        elif prediction == "flow":
            alpha, sigma, scale = 1 - t / 1000, t / 1000, 1.0
        else:
            alpha, sigma, scale = *map(float, variance_preserving(t)), 1.0
        model = world.aligned({"reward 1": 0.6})
        law = marginal(model, alpha, sigma)
        x = law.sample((30,))
        # Tweedie's formula; where nothing of the image is left, its expectation is the mean of all images.
        tweedie = (x + sigma**2 * score(law, x)) / alpha if alpha > 0 else marginal(model).mean.expand_as(x)
        found = denoised_by_diffusers(prediction, denoiser(scale * x, t).sample, x, t)
        torch.testing.assert_close(found, tweedie, rtol=2e-5, atol=2e-5)


def test_the_denoiser_answers_like_a_unet() -> None:
    denoiser = crossing().denoiser({"slope": 1.0})
    x = torch.randn(3, 2)
    output = denoiser(x, torch.tensor([500, 500, 500]))
    assert output.sample.dtype == torch.float32
    assert torch.equal(denoiser(x, 500, return_dict=False)[0], output.sample)
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_a_denoiser_can_be_saved_and_loaded(tmp_path) -> None:
    denoiser = crossing().denoiser({"slope": 1.0}, "v_prediction")
    denoiser.save_pretrained(tmp_path)
    loaded = MixtureDenoiser.from_pretrained(tmp_path)
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(loaded(x, 400).sample, denoiser(x, 400).sample)


# -- prompts and pipelines ---------------------------------------------------------------------------------------------


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)


def quiet(world: World, scheduler: Any, tilts: dict[str, float]) -> MixturePipeline:
    pipe = world.pipeline(scheduler, tilts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_reweights_the_modes_and_nothing_else() -> None:
    world = crossing()
    weights = world.prompted("right").mode_weights
    torch.testing.assert_close(weights / weights[2], torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64).exp())
    aligned = world.aligned({"slope": 0.5}, "right")
    x = aligned.sample(20_000, chance())
    ratio = aligned.log_density(x) - world.prompted("right").log_density(x)
    log_z = 0.5 * world.rewards["slope"](x) - ratio
    torch.testing.assert_close(log_z, log_z[:1].expand_as(log_z))
    agrees(ratio, world.divergence({"slope": 0.5}, "right"))
    with pytest.raises(ValueError, match=naming("'up'")):
        world.aligned({}, "up")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_in_the_pipeline_is_classifier_free_guidance(guidance: float) -> None:
    world, tilts = random_world(11, 4, 3), {"reward 1": 0.5}
    pipe = quiet(world, ddim(), tilts)
    latents = torch.randn(4, 3, dtype=torch.float64, generator=chance())
    images = pipe(["first", "second"], 2, num_inference_steps=5, guidance_scale=guidance, latents=latents).images
    scheduler = ddim()
    scheduler.set_timesteps(5)
    plain = MixtureDenoiser.of(world.aligned(tilts))
    for rows, prompt in ((slice(0, 2), "first"), (slice(2, 4), "second")):
        conditional = MixtureDenoiser.of(world.aligned(tilts, prompt))
        x = latents[rows]
        for t in scheduler.timesteps:
            epsilon = (1 - guidance) * plain(x, t).sample + guidance * conditional(x, t).sample
            x = scheduler.step(epsilon, t, x).prev_sample
        torch.testing.assert_close(images[rows], x)


@pytest.mark.parametrize("tilts", [{}, {"slope": 0.5}, {"slope": 1.0, "lift": 0.7}], ids=["none", "one", "two"])
def test_a_stochastic_chain_reproduces_the_modes_of_the_aligned_model(tilts: dict[str, float]) -> None:
    world, count = crossing(), 3000
    pipe = quiet(world, ddim(), tilts)
    images = pipe("left", count, num_inference_steps=150, eta=1.0, generator=chance(3)).images
    target = world.aligned(tilts, "left")
    modes = target.modes_of(images)
    error = (modes.var(0) / count).sqrt()
    assert bool(((modes.mean(0) - target.mode_weights).abs() < 4 * error + 0.004).all())


# On Stable Diffusion's schedule pure noise still holds 0.5% of an image, which deterministic samplers, starting from
# N(0, 1), never find out: they miss about a tenth of the reward's shift. The others only have their 60 steps' error.
STARTING_NOISE, STEPS = 0.16, 0.06
SCHEDULERS = [
    ("DDPMScheduler", "epsilon", STEPS),
    ("DDIMScheduler", "v_prediction", STARTING_NOISE),
    ("EulerDiscreteScheduler", "epsilon", STARTING_NOISE),
    ("EulerAncestralDiscreteScheduler", "v_prediction", STEPS),
    ("DPMSolverMultistepScheduler", "sample", STARTING_NOISE),
    ("FlowMatchEulerDiscreteScheduler", "flow", STEPS),
    ("EDMEulerScheduler", "edm", STEPS),
    ("EDMDPMSolverMultistepScheduler", "edm", STEPS),
]


@pytest.mark.parametrize(("name", "prediction", "bias"), SCHEDULERS)
def test_every_kind_of_scheduler_samples_the_world(name: str, prediction: str, bias: float) -> None:
    config = {} if prediction in ("flow", "edm") else {**SCHEDULE, "prediction_type": prediction}
    scheduler = getattr(diffusers, name)(**config, **({"clip_sample": False} if name.startswith("DD") else {}))
    assert prediction_of(scheduler) == prediction
    world = crossing()
    pipe = quiet(world, scheduler, {"slope": 0.5})
    images = pipe(num_images_per_prompt=4000, num_inference_steps=60, generator=chance(4)).images
    rewards, exact = world.rewards["slope"](images), world.aligned({"slope": 0.5}).expected(world.rewards["slope"])
    error = float(rewards.std()) / 4000**0.5
    assert abs(float(rewards.mean()) - exact) < 4 * error + bias * exact


def test_a_pipeline_repeats_itself_from_the_same_generator_and_in_single_precision() -> None:
    pipe = quiet(crossing(), ddim(), {})
    first, second = (pipe(num_inference_steps=4, eta=1.0, generator=chance(1), return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    latents = torch.randn(2, 2)
    images = pipe(num_images_per_prompt=2, num_inference_steps=4, latents=latents).images
    double = pipe(num_images_per_prompt=2, num_inference_steps=4, latents=latents.double()).images
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, double.float(), rtol=1e-4, atol=1e-4)


# -- worlds ------------------------------------------------------------------------------------------------------------


def test_the_crossing_has_the_expected_rewards_of_the_study() -> None:
    world = crossing()
    expected = {tilt: world.aligned({"slope": tilt}).expected(world.rewards["slope"]) for tilt in (0.0, 0.5, 1.0, 2.0)}
    assert expected == pytest.approx({0.0: 0.0, 0.5: 1.2434, 1.0: 1.8306, 2.0: 2.2683}, abs=5e-5)
    assert world.divergence({}) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("components", "dim"), SIZES)
def test_worlds_drawn_at_random_are_repeatable_and_sound(components: int, dim: int, peaked: bool) -> None:
    world, again, another = (random_world(seed, components, dim, rewards=2, peaked=peaked) for seed in (12, 12, 13))
    assert torch.equal(world.reference.means, again.reference.means)
    assert not torch.equal(world.reference.means, another.reference.means)
    assert world.reference.means.shape == (components, dim) and bool((world.reference.variances > 0).all())
    assert float(world.reference.mode_weights.sum()) == pytest.approx(1)
    assert set(world.prompts) == {"first", "second"} and set(world.rewards) == {"reward 1", "reward 2"}
    assert all(bool((reward.curvature > 0).all()) == peaked for reward in world.rewards.values())
