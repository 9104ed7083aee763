"""What a run leaves out: log weights and densities of its path, in worlds where the truth is a formula."""

import math

import diffusers
import pytest
import torch

from deradiff import realign
from deradiff.algorithm.comparisons import EVEN, compare
from deradiff.algorithm.schedules import Power
from deradiff.worlds.gaussian_mixture import crossing, random_world
from realigned_worlds import FAMILIES, Family, realigned, sample
from tiny import make

# -- the weight itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.cases(7)
def test_weighted_samples_follow_the_retrained_model_with_every_scheduler(name):
    family, world, reward = FAMILIES[name], crossing(), crossing().rewards["slope"]
    x, dial = realigned(world, family, {"anchor": {"slope": 2.0}}, 0.25)
    truth = sample(world, family, {"slope": 0.5})
    shift = world.aligned({"slope": 0.5}).expected(reward)
    comparison = compare(reward(x), dial.importance_weights.log_weights)
    noise = math.hypot(comparison.weighted.error, float(reward(truth).std()) / len(truth) ** 0.5)
    gap = comparison.weighted.value - float(reward(truth).mean())
    # Four standard errors, and two percent of the shift for time discretisation.
    assert abs(gap) < 4 * noise + (0.02 + family.memory) * shift
    # Algorithm 1 itself is a third off here: the weights are what makes the difference.
    assert float(reward(truth).mean()) - comparison.plain.value > 0.2 * shift


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["DDPM", "DDIM η = ½", "Euler", "flow matching"])
@pytest.mark.cases(6)
def test_weighted_samples_follow_the_retrained_model_in_random_worlds(seed, name):
    chance = torch.Generator().manual_seed(seed)
    dim, rewards = (2, 3, 5, 8, 12, 16)[seed], 1 + seed % 2
    world = random_world(seed, int(torch.randint(2, 6, (1,), generator=chance)), dim, rewards, peaked=seed % 3 == 0)
    family = FAMILIES[name]
    spread = {n: float(r(world.reference.sample(2000, chance)).std()) for n, r in world.rewards.items()}
    tilts = {n: float(torch.rand(1, generator=chance) + 0.3) / s for n, s in spread.items()}
    lam = {n: float(2 * torch.rand(1, generator=chance)) / rewards for n in world.rewards}
    anchors = {n: {n: tilt} for n, tilt in tilts.items()}
    x, dial = realigned(world, family, anchors, lam, steps=60)
    target = {n: tilts[n] * lam[n] for n in tilts}
    truth = sample(world, family, target, steps=60)
    for reward in world.rewards.values():
        comparison = compare(reward(x), dial.importance_weights.log_weights)
        noise = math.hypot(comparison.weighted.error, float(reward(truth).std()) / len(truth) ** 0.5)
        # The aligned model differs from the reference by at most this much for any of the rewards.
        scale = max(
            abs(world.aligned(target).expected(r) - world.reference.expected(r)) for r in world.rewards.values()
        )
        assert comparison.evenness > EVEN
        assert abs(comparison.weighted.value - float(reward(truth).mean())) < 4 * noise + (0.03 + family.memory) * scale


def test_one_model_alone_has_no_weight_and_weights_do_not_depend_on_the_batch():
    world = crossing()
    for lam in (0.0, 1.0):
        _, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, lam, samples=5, steps=5)
        assert dial.importance_weights.log_weights.tolist() == [0.0] * 5
    latents = torch.randn(6, 2, dtype=torch.float64)
    family = FAMILIES["DDIM η = 0"]
    _, together = realigned(
        world, family, {"a": {"slope": 1.0}}, [0.0, 0.5, 0.5, 1.0, 2.0, 0.5], latents=latents, samples=6
    )
    _, alone = realigned(world, family, {"a": {"slope": 1.0}}, 0.5, latents=latents, samples=6)
    both = [1, 2, 5]
    log_weights = together.importance_weights.log_weights
    torch.testing.assert_close(log_weights[both], alone.importance_weights.log_weights[both])
    assert log_weights[[0, 3]].tolist() == [0.0, 0.0]
    assert log_weights[4] > 0 > log_weights[1]


def test_the_normaliser_of_the_mixture_comes_out():
    """`E[W]` along the reverse process is `∫ p_0^{1-λ} p_1^λ`, which is `Z(λ/β)/Z(1/β)^λ`."""
    world, lam, tilt = crossing(), 0.5, 2.0
    _, dial = realigned(world, FAMILIES["DDIM η = 1"], {"a": {"slope": tilt}}, lam, samples=20_000)
    weights = dial.importance_weights.log_weights
    exact = world.reference.tilted(world.exponent({"slope": lam * tilt}))[1]
    exact -= lam * world.reference.tilted(world.exponent({"slope": tilt}))[1]
    estimate = float(torch.logsumexp(weights, 0)) - math.log(len(weights))
    error = float((weights - estimate).exp().std()) / len(weights) ** 0.5
    assert abs(estimate - exact) < 4 * error + 0.02 * abs(exact)


def test_guidance_annealing_img2img_and_renoising_have_no_exact_target_and_say_so():
    world, anchors = crossing(), {"a": {"slope": 1.0}}
    ddpm = FAMILIES["DDPM"]
    _, dial = realigned(world, ddpm, anchors, 0.5, samples=8, steps=6, guidance_scale=3.0, prompt="right")
    assert dial.importance_weights.obstacles == {"guidance"}
    _, dial = realigned(world, ddpm, anchors, 1.5, samples=8, steps=6, guidance_scale=3.0, prompt="right")
    assert "guidance scale 1" in dial.verdict().words and dial.verdict().kind == "no target"
    _, dial = realigned(world, ddpm, anchors, Power(2), samples=8, steps=6)
    assert dial.importance_weights.obstacles == {"annealing"}
    renoising = Family("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})
    _, dial = realigned(world, renoising, anchors, 0.5, samples=8, steps=6)
    assert dial.importance_weights.obstacles == {"renoising"}
    assert "FlowMatchSDEScheduler" in dial.verdict().words
    pipe = world.pipeline(ddpm())
    with realign(pipe, world.denoiser({"slope": 1.0}), 0.5) as dial:
        pipe.scheduler.set_timesteps(10)
        x = torch.randn(4, 2, dtype=torch.float64)
        for t in pipe.scheduler.timesteps[5:]:  # as img2img does
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    assert dial.importance_weights.obstacles == {"partial"}


def test_guidance_that_was_distilled_into_a_model_counts_as_guidance():
    pipe, anchor, call = make("flux")
    with realign(pipe, anchor, 0.5) as dial:
        pipe(**call | {"true_cfg_scale": 1.0})
    assert pipe.transformer.config.guidance_embeds and "guidance" in dial.importance_weights.obstacles


def test_interpolated_weights_and_runs_not_begun_have_no_weights():
    world = crossing()
    pipe = world.pipeline(FAMILIES["DDPM"]())
    with realign(pipe, world.denoiser({"slope": 1.0}), 0.5) as dial, pytest.raises(RuntimeError, match="step"):
        dial.importance_weights  # noqa: B018
    with realign(pipe, world.denoiser({"slope": 1.0}), 0.5, method="interpolate") as dial:
        pipe(num_inference_steps=2, num_images_per_prompt=2)
        with pytest.raises(RuntimeError, match="method='mixture'"):
            dial.importance_weights  # noqa: B018


# -- densities of the path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDPM", "DDIM η = 1", "Euler ancestral", "flow matching SDE"])
@pytest.mark.cases(2)
def test_memoryless_paths_tell_the_implicit_reward_and_the_divergence(name):
    world, lam, tilt = crossing(), 0.5, 1.0
    reward = world.rewards["slope"]
    # 1000 samples know the slope within 0.01.
    x, dial = realigned(world, FAMILIES[name], {"a": {"slope": tilt}}, lam, steps=400, samples=1000)
    run = dial.importance_weights
    assert run.memoryless
    implied, given = run.log_ratios["a"], tilt * reward(x)
    slope_ = float(torch.cov(torch.stack([implied, given]))[0, 1] / given.var())
    # The schedule ends with 0.5% of the signal left, and the density of the noise it starts from is not counted.
    assert slope_ == pytest.approx(1, abs=0.06)
    assert float(torch.corrcoef(torch.stack([implied, given]))[0, 1]) > 0.95


@pytest.mark.parametrize("name", ["DDPM", "flow matching SDE"])
def test_the_divergence_of_memoryless_paths_is_that_of_their_images(name):
    """At λ → 1 the realigned model is the anchor, whose KL divergence to the reference is a formula."""
    world = crossing()
    _, dial = realigned(world, FAMILIES[name], {"a": {"slope": 1.0}}, 1 - 1e-6, steps=200)
    path_kl = dial.importance_weights.path_kl
    assert path_kl is not None
    exact = world.divergence({"slope": 1.0})
    assert abs(float(path_kl.mean()) - exact) < 4 * float(path_kl.std()) / len(path_kl) ** 0.5 + 0.05 * exact


@pytest.mark.parametrize(("name", "clip"), [("DDIM η = ½", False), ("DDIM η = 1", False), ("DDIM η = ½", True)])
@pytest.mark.cases(2)
def test_path_densities_match_gaussians_written_out(name, clip):
    """Every step's densities by hand, for two anchors, one of them with a weight outside [0, 1].

    With clipping switched on (so far out that it never happens) they are those of the very Gaussians; without, those of
    the diffusion that the steps discretise, which is the same where steps are small.
    """
    world, lams, eta = crossing(), {"a": 0.7, "b": -0.2}, FAMILIES[name].eta
    steps = 10 if clip else 500
    pipe = world.pipeline(Family("DDIMScheduler", {"clip_sample_range": 1e3})())
    pipe.scheduler.register_to_config(clip_sample=clip)
    models = {"a": world.denoiser({"slope": 1.0}), "b": world.denoiser({"lift": 0.5})}
    with realign(pipe, models, lams) as dial:
        scheduler = pipe.scheduler
        scheduler.set_timesteps(steps)
        x = torch.randn(5, 2, dtype=torch.float64)
        ratios, kl = {"a": torch.zeros(5), "b": torch.zeros(5)}, torch.zeros(5)
        for t in scheduler.timesteps:
            before, prediction = x, pipe.unet(x, t).sample
            x = scheduler.step(prediction, t, x, eta=eta).prev_sample
            if t == scheduler.timesteps[-1]:
                break
            abar = scheduler.alphas_cumprod.double()[int(t)]
            prev = scheduler.alphas_cumprod.double()[int(t) - 1000 // steps]
            variance = eta**2 * (1 - prev) / (1 - abar) * (1 - abar / prev)
            outputs = prediction.stacked().unbind(0)
            means = [
                prev.sqrt() * (before - (1 - abar).sqrt() * e) / abar.sqrt() + (1 - prev - variance).sqrt() * e
                for e in outputs
            ]
            mix = 0.5 * means[0] + 0.7 * means[1] - 0.2 * means[2]
            for k, name in ((1, "a"), (2, "b")):
                gained = ((x - means[0]).square() - (x - means[k]).square()).sum(1) / (2 * variance)
                ratios[name] = ratios[name] + gained
            kl = kl + (mix - means[0]).square().sum(1) / (2 * variance)
    run = dial.importance_weights
    near = 1e-3 if clip else 0.1
    torch.testing.assert_close(run.path_kl, kl, rtol=near, atol=near)
    for name, ratio in ratios.items():
        torch.testing.assert_close(run.log_ratios[name], ratio, rtol=near, atol=near)


def test_deterministic_runs_know_no_path_and_half_anchored_runs_no_ratio():
    world = crossing()
    _, dial = realigned(world, FAMILIES["DDIM η = 0"], {"a": {"slope": 1.0}}, 0.5, samples=4, steps=5)
    run = dial.importance_weights
    assert run.path_kl is None and run.log_ratios == {} and not run.memoryless
    _, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, 0.0, samples=4, steps=5)
    path_kl = dial.importance_weights.path_kl
    assert dial.importance_weights.log_ratios == {} and path_kl is not None and path_kl.tolist() == [0.0] * 4
    _, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, 1.0, samples=4, steps=5)
    assert dial.importance_weights.path_kl is None


def test_the_first_run_of_a_scheduler_that_was_put_in_forgets_the_last_one() -> None:
    pipe, module, call = make("sd")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with realign(pipe, module, lam=0.5) as dial:
        pipe(**call)
        assert dial.importance_weights.path_kl is None  # DDIM draws no noise
        pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        pipe(**call, generator=torch.Generator().manual_seed(0))
        first = dial.importance_weights
        pipe(**call, generator=torch.Generator().manual_seed(0))
        second = dial.importance_weights
    assert first.path_kl is not None and second.path_kl is not None
    torch.testing.assert_close(first.path_kl, second.path_kl)
    torch.testing.assert_close(first.log_weights, second.log_weights)
    assert first.predictions == second.predictions
