"""What a run leaves out: log weights, estimates and verdicts, in worlds where the truth is a formula."""

import math
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from deradiff import realign
from deradiff.algorithm.estimates import effective_sample_size, normalized
from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.schedules import Power
from deradiff.algorithm.verdict import ENOUGH, EVEN, at_other_lam, compare, slope, verdict
from deradiff.sampling.dial import Dial
from deradiff.schedulers import FlowMatchSDEScheduler
from deradiff.worlds.gaussian_mixture import SCHEDULE, World, crossing, prediction_of, random_world
from messages import naming
from tiny import make

STEPS = 100
SAMPLES = 4000


class Family(NamedTuple):
    """A scheduler, its η, and how far its deterministic run may be off through the noise it starts from."""

    name: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    eta: float = 0.0
    memory: float = 0.0

    def __call__(self) -> Any:
        own = dict(self.settings)
        if self.name == "FlowMatchSDEScheduler":
            return FlowMatchSDEScheduler(**own)
        if not self.name.startswith(("Flow", "EDM")):
            own = SCHEDULE | own
        if self.name.startswith("DD"):
            own["clip_sample"] = False
        return getattr(diffusers, self.name)(**own)


# Stable Diffusion's schedule ends with a little signal left, which samplers without noise remember: their target is
# not exactly the mixture's, and the retrained model, run through the same sampler, remembers another one.
FAMILIES = {
    "DDPM": Family("DDPMScheduler"),
    "DDPM v": Family("DDPMScheduler", {"prediction_type": "v_prediction"}),
    "DDPM x_0": Family("DDPMScheduler", {"prediction_type": "sample"}),
    "DDPM fixed_large": Family("DDPMScheduler", {"variance_type": "fixed_large"}),
    "DDIM η = 1": Family("DDIMScheduler", eta=1.0),
    "DDIM η = ½": Family("DDIMScheduler", eta=0.5, memory=0.05),
    "DDIM η = 0": Family("DDIMScheduler", memory=0.05),
    "Euler": Family("EulerDiscreteScheduler", memory=0.05),
    "Euler v": Family("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, memory=0.05),
    "Euler ancestral": Family("EulerAncestralDiscreteScheduler"),
    "Heun": Family("HeunDiscreteScheduler", memory=0.05),
    "DPM-Solver++": Family("DPMSolverMultistepScheduler", memory=0.05),
    "DPM-Solver++ SDE": Family("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": Family("UniPCMultistepScheduler", memory=0.05),
    "LMS": Family("LMSDiscreteScheduler", memory=0.05),
    "PNDM": Family("PNDMScheduler", {"skip_prk_steps": True}, memory=0.05),
    "KDPM2": Family("KDPM2DiscreteScheduler", memory=0.05),
    "EDM": Family("EDMEulerScheduler"),
    "flow matching": Family("FlowMatchEulerDiscreteScheduler"),
    "flow matching SDE": Family("FlowMatchSDEScheduler"),
    "flow matching SDE η = ½": Family("FlowMatchSDEScheduler", {"eta": 0.5}),
}


def sample(
    world: World,
    family: Any,
    tilts: dict[str, float],
    seed: int = 0,
    steps: int = STEPS,
    samples: int = SAMPLES,
    **call: Any,
) -> Tensor:
    """Draws of the model aligned at `tilts`, through the sampler."""
    pipe = world.pipeline(family(), tilts)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    eta = getattr(family, "eta", 0.0)
    call = {"num_images_per_prompt": samples, "eta": eta} | call
    with reproducible(pipe, seed):
        return pipe(num_inference_steps=steps, generator=generator, **call).images


def realigned(
    world: World,
    family: Any,
    anchors: dict[str, dict[str, float]],
    lam: Any,
    seed: int = 1,
    steps: int = STEPS,
    samples: int = SAMPLES,
    **call: Any,
) -> tuple[Tensor, Dial]:
    """The reference realigned with exact anchors: samples, and the dial (removed, with what it wrote down)."""
    pipe = world.pipeline(family())
    pipe.set_progress_bar_config(disable=True)
    modules = {name: world.denoiser(tilts, prediction_of(pipe.scheduler)) for name, tilts in anchors.items()}
    call = {"num_images_per_prompt": samples, "eta": getattr(family, "eta", 0.0)} | call
    with realign(pipe, modules, lam) as dial, reproducible(pipe, seed):
        x = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **call).images
    return x, dial


class reproducible:
    """Our flow-matching scheduler draws from a generator of its own."""

    def __init__(self, pipe: Any, seed: int):
        self.pipe, self.seed = pipe, seed

    def __enter__(self) -> None:
        if hasattr(self.pipe.scheduler, "generator"):
            self.pipe.scheduler.generator = torch.Generator().manual_seed(self.seed + 100)

    def __exit__(self, *_: object) -> None:
        pass


# -- the weight itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
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
def test_memoryless_paths_tell_the_implicit_reward_and_the_divergence(name):
    world, lam, tilt = crossing(), 0.5, 1.0
    reward = world.rewards["slope"]
    x, dial = realigned(world, FAMILIES[name], {"a": {"slope": tilt}}, lam, steps=400)
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
            outputs = prediction.view(5, 3, 2).unbind(1)
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


# -- statistics -------------------------------------------------------------------------------------------------------


def test_effective_sample_size_from_equal_to_one_survivor_and_far_below_underflow():
    assert effective_sample_size(torch.full((7,), -3000.0)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -2000.0, -3000.0])) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([-5e4, -5e4 + math.log(3)], dtype=torch.float64)) == pytest.approx(
        16 / 10
    )
    assert normalized(torch.tensor([-1e5, -1e5 - math.log(3)], dtype=torch.float64)).tolist() == pytest.approx(
        [0.75, 0.25]
    )
    assert normalized(torch.tensor([0.0, -math.inf])).tolist() == [1.0, 0.0]
    for bad in (torch.tensor([0.0, math.nan]), torch.tensor([-math.inf, -math.inf])):
        with pytest.raises(ValueError, match="NaN"):
            normalized(bad)


def test_prompts_are_weighted_among_themselves():
    scores = torch.tensor([1.0, 2.0, 10.0, 20.0])
    logs = torch.tensor([0.0, 0.0, 500.0, 500.0 + math.log(3)])
    groups = torch.tensor([4, 4, 7, 7])
    comparison = compare(scores, logs, groups)
    assert comparison.weighted.value == pytest.approx((1.5 + 17.5) / 2)
    assert comparison.plain.value == pytest.approx(8.25)
    assert comparison.effective == pytest.approx(2 + 16 / 10, rel=1e-5)
    assert comparison.prompts == 2 and comparison.evenness == pytest.approx(3.6 / 4, rel=1e-5)
    assert compare(scores, logs).weighted.value > 17  # all in one group: the first prompt has vanished


def test_standard_errors_are_the_spread_of_repeated_runs():
    chance = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(400):
        x = torch.randn(200, generator=chance, dtype=torch.float64)
        runs.append(compare(x, 0.5 * x))
    for part in ("plain", "weighted", "bias"):
        estimates = torch.tensor([getattr(run, part).value for run in runs])
        claimed = sum(getattr(run, part).error for run in runs) / len(runs)
        assert claimed == pytest.approx(float(estimates.std()), rel=0.12), part
    # x and log W are jointly Gaussian, so first order is exact: E_w[x] = Cov(x, x/2) = 1/2.
    assert sum(run.covariance for run in runs) / len(runs) == pytest.approx(0.5, abs=0.02)
    assert sum(run.weighted.value for run in runs) / len(runs) == pytest.approx(0.5, abs=0.02)


def test_second_order_is_nearer_where_the_score_is_skewed():
    """THEORY's world: exact 1.243, plain 0.86, first order 1.36, second 1.28."""
    world, reward = crossing(), crossing().rewards["slope"]
    x, dial = realigned(world, FAMILIES["DDIM η = 1"], {"a": {"slope": 2.0}}, 0.25, samples=20_000)
    exact = world.aligned({"slope": 0.5}).expected(reward)
    comparison = compare(reward(x), dial.importance_weights.log_weights)
    plain, first, second = (abs(v - exact) for v in (comparison.plain.value, comparison.covariance, comparison.skewed))
    assert second < first < plain


@pytest.mark.parametrize("scores", [torch.ones(3), torch.tensor([1.0, math.nan, 0.0, 0.0])])
def test_scores_have_to_fit(scores):
    with pytest.raises(ValueError, match=naming(4, len(scores), int((~scores.isfinite()).sum()))):
        compare(scores, torch.zeros(4))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_tell_trust_from_error_where_even_weights_prove_nothing():
    world, reward = crossing(), crossing().rewards["slope"]
    family = FAMILIES["DDIM η = 1"]
    x, dial = realigned(world, family, {"a": {"slope": 2.0}}, 0.25)
    off = dial.verdict(reward(x), baseline=0.0)
    assert off.comparison.evenness > 0.8 and off.kind == "off" and "use the weighted mean" in off.words
    exact = world.aligned({"slope": 0.5}).expected(reward)
    assert off.error is not None
    assert off.error.value == pytest.approx((exact - float(reward(x).mean())) / exact, abs=4 * off.error.error)
    # A single Gaussian has nothing to choose between: Algorithm 1 is exact there, and the verdict knows.
    gaussian = random_world(1, 1, 4)
    x, dial = realigned(gaussian, family, {"a": {"reward 1": 1.0}}, 0.5)
    assert (
        dial.verdict(
            gaussian.rewards["reward 1"](x), baseline=gaussian.reference.expected(gaussian.rewards["reward 1"])
        ).kind
        == "trust"
    )
    assert dial.verdict().kind == "trust" and dial.verdict().score == "implicit reward"


def run_of(log_weights: Tensor, lam: float = 0.5, **changes: Any) -> ImportanceWeights:
    """A run of a deterministic sampler with these weights."""
    n = len(log_weights)
    known: dict[str, Any] = {
        "log_weights": log_weights.double(),
        "log_ratios": {},
        "path_kl": None,
        "memoryless": False,
        "lams": torch.full((1, n), lam),
        "obstacles": frozenset(),
        "predictions": 10,
    }
    return ImportanceWeights(**(known | changes))


def test_every_kind_of_verdict():
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=chance)
    assert verdict(run_of(torch.zeros(1000), lam=1.0), x).kind == "exact"
    assert verdict(run_of(3 * torch.randn(1000, generator=chance)), x).kind == "uneven"
    assert verdict(run_of(torch.zeros(1000)), x, torch.arange(1000)).kind == "few"
    assert verdict(run_of(1e-3 * x)).kind == "trust"
    assert verdict(run_of(0.1 * x)).kind == "depends"
    assert verdict(run_of(0.1 * x), x).kind == "depends"
    assert verdict(run_of(0.1 * x), x, baseline=-1.0).kind == "off"
    assert verdict(run_of(0.1 * torch.randn(1000, generator=chance)), x, baseline=-1.0).kind in ("unclear", "trust")
    assert verdict(run_of(0.1 * torch.randn(30, generator=chance)), x[:30], baseline=-1.0).kind == "unclear"
    words = verdict(run_of(torch.tensor([0.0] + [-5000.0] * 99)), x[:100]).words
    assert "too uneven (1 of 100" in words and "particles" in words
    assert ENOUGH > 1


def test_a_batch_of_several_lam_is_judged_row_by_row_and_runs_join():
    world = crossing()
    lams = [0.25] * 200 + [0.75] * 200
    _, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, lams, samples=400, steps=20)
    with pytest.raises(ValueError, match=r"run\.rows"):
        dial.verdict()
    run = dial.importance_weights
    first, second = run.rows(slice(0, 200)), run.rows(torch.arange(200, 400))
    assert first.lams.unique().tolist() == [0.25] and len(second.log_ratios["a"]) == 200
    assert verdict(first).comparison.images == 200
    again = joined([first, second])
    assert torch.equal(again.log_weights, run.log_weights)
    assert run.path_kl is not None and again.path_kl is not None and torch.equal(again.path_kl, run.path_kl)


# -- other λ ----------------------------------------------------------------------------------------------------------


def test_other_lam_from_one_run():
    world, reward = crossing(), crossing().rewards["slope"]
    x, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, 0.5, samples=20_000, steps=200)
    run = dial.importance_weights
    for lam in (0.4, 0.5, 0.65):
        elsewhere = at_other_lam(run, reward(x), lam)
        exact = world.aligned({"slope": lam}).expected(reward)
        assert abs(elsewhere.mean.value - exact) < 4 * elsewhere.mean.error + 0.02 * exact
    assert elsewhere.effective < 20_000
    with pytest.raises(ValueError, match=naming("λ = 4.0", 20_000)):
        at_other_lam(run, reward(x), 4.0)
    derivative = slope(run, reward(x))["a"]
    exact = (world.aligned({"slope": 0.51}).expected(reward) - world.aligned({"slope": 0.49}).expected(reward)) / 0.02
    assert abs(derivative.value - exact) < 4 * derivative.error + 0.05 * exact


def test_other_lam_of_two_anchors_and_refusals():
    world = crossing()
    lams = {"s": 0.4, "l": 0.4}
    x, dial = realigned(world, FAMILIES["DDPM"], {"s": {"slope": 1.0}, "l": {"lift": 1.0}}, lams, samples=20_000)
    lift = world.rewards["lift"]
    elsewhere = at_other_lam(dial.importance_weights, lift(x), {"s": 0.4, "l": 0.55})
    exact = world.aligned({"slope": 0.4, "lift": 0.55}).expected(lift)
    assert abs(elsewhere.mean.value - exact) < 4 * elsewhere.mean.error + 0.03 * exact
    with pytest.raises(ValueError, match=naming(["s", "l"], 0.5)):
        at_other_lam(dial.importance_weights, lift(x), 0.5)
    with pytest.raises(ValueError, match=naming(["s", "l"], {"s": 0.4, "x": 0.5})):
        at_other_lam(dial.importance_weights, lift(x), {"s": 0.4, "x": 0.5})
    x, dial = realigned(world, FAMILIES["DDIM η = 0"], {"s": {"slope": 1.0}}, 0.5, samples=50, steps=5)
    for asked in (
        lambda: at_other_lam(dial.importance_weights, lift(x), 0.6),
        lambda: slope(dial.importance_weights, lift(x)),
    ):
        with pytest.raises(ValueError, match="memoryless"):
            asked()


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
