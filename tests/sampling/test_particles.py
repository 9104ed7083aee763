"""Sequential Monte Carlo around a realigned pipeline: exact where Algorithm 1 is not, and honest when it cannot be."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from deradiff import realign, sample_particles
from deradiff.algorithm.schedules import Power
from deradiff.algorithm.smc import systematic
from deradiff.sampling.particles import Particles
from deradiff.schedulers import FlowMatchSDEScheduler
from deradiff.worlds.gaussian_mixture import SCHEDULE, World, crossing, prediction_of, random_world
from messages import naming
from tiny import KINDS, Counter, denoiser, make

LAMS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
# Every λ where the anchor is strongest; elsewhere the ends of its range.
PAIRS = [*((0.5, lam) for lam in LAMS), *((beta, lam) for beta in (1.0, 2.0) for lam in (LAMS[0], LAMS[-1]))]


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **changes)


def run(
    world: World,
    anchors: dict[str, dict[str, float]],
    lam: Any,
    count: int,
    *,
    scheduler: Any = None,
    prompt: str | list[str] = "",
    steps: int = 100,
    seed: int = 0,
    **options: Any,
) -> Particles:
    """Particles of a realigned world; DDIM at η = 1 unless told otherwise."""
    pipe = world.pipeline(scheduler or ddim())
    pipe.set_progress_bar_config(disable=True)
    modules = {name: world.denoiser(tilts, prediction_of(pipe.scheduler)) for name, tilts in anchors.items()}
    options = {"eta": 1.0} | options
    with realign(pipe, modules, lam):
        return sample_particles(
            pipe, prompt, count, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options
        )


@pytest.mark.parametrize(("beta", "lam"), PAIRS)
@pytest.mark.cases(3)
def test_particles_are_exact_where_algorithm_1_is_off_by_a_third(beta, lam):
    """The reward within 2% of the exact shift and modes within 0.01, beyond Monte Carlo error.

    Where the anchor is strongest, 6000 particles see an error of 5% of the shift; Algorithm 1's is 30% at λ = 0.25.
    """
    world, reward, count = crossing(), crossing().rewards["slope"], 6000
    particles = run(world, {"a": {"slope": 1 / beta}}, lam, count)
    exact = world.aligned({"slope": lam / beta})
    estimate, truth = particles.mean(reward(particles.images)), exact.expected(reward)
    assert abs(estimate.value - truth) <= 0.02 * truth + 2 * estimate.error
    modes = (particles.log_weights.exp()[0][:, None] * exact.modes_of(particles.images)).sum(0)
    distance = float((modes - exact.mode_weights).abs().sum()) / 2
    p = exact.mode_weights
    allowance = float((2 / math.pi * p * (1 - p) / float(particles.effective)).sqrt().sum()) / 2
    assert distance <= 0.01 + 2 * allowance
    if (beta, lam) == (0.5, 0.25):
        assert float(reward(particles.images).mean()) < 0.75 * truth


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchSDEScheduler, "η = ½"])
@pytest.mark.cases(2)
def test_every_single_step_stochastic_scheduler_resamples(scheduler):
    world, reward, count = crossing(), crossing().rewards["slope"], 8000
    half = scheduler == "η = ½"
    settings = {} if scheduler is FlowMatchSDEScheduler else SCHEDULE
    extra = {"clip_sample": False} if scheduler is DDPMScheduler else {}
    made = ddim() if half else scheduler(**settings, **extra)
    particles = run(world, {"a": {"slope": 1.0}}, 2.0, count, scheduler=made, eta=0.5 if half else 1.0)
    truth = world.aligned({"slope": 2.0}).expected(reward)
    estimate = particles.mean(reward(particles.images))
    assert particles.lineage and "resampled" in particles.resampled_by
    # At η = ½ a little of the starting noise is remembered, in which the schedule left 0.5% of the signal.
    assert abs(estimate.value - truth) <= (0.05 if half else 0.02) * truth + 3 * estimate.error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.cases(2)
def test_particles_in_random_worlds(seed):
    chance = torch.Generator().manual_seed(seed)
    dim, rewards = (2, 4, 8, 16)[seed], 1 + seed % 2
    world = random_world(seed + 10, 3, dim, rewards, peaked=seed == 3)
    spread = {n: float(r(world.reference.sample(2000, chance)).std()) for n, r in world.rewards.items()}
    tilts = {n: 1 / s for n, s in spread.items()}
    lam = {n: float(2 * torch.rand(1, generator=chance)) / rewards for n in tilts}
    particles = run(world, {n: {n: tilt} for n, tilt in tilts.items()}, lam, 6000)
    target = {n: tilts[n] * lam[n] for n in tilts}
    # Judged against the aligned model through the same sampler: in 16 dimensions a hundred steps distort any model.
    pipe = world.pipeline(ddim(), target)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    truth = pipe(num_images_per_prompt=6000, num_inference_steps=100, eta=1.0, generator=generator).images
    exact = world.aligned(target)
    shifts = [abs(exact.expected(r) - world.reference.expected(r)) for r in world.rewards.values()]
    for reward in world.rewards.values():
        estimate, scores = particles.mean(reward(particles.images)), reward(truth)
        error = math.hypot(estimate.error, float(scores.std()) / len(scores) ** 0.5)
        assert abs(estimate.value - float(scores.mean())) <= 0.02 * max(shifts) + 4 * error


def test_prompts_do_not_compete():
    """Under two prompts that favour opposite modes each gets its own aligned model."""
    world, reward = crossing(), crossing().rewards["slope"]
    particles = run(world, {"a": {"slope": 1.0}}, 2.0, 4000, prompt=["right", "left"])
    scores, weights = reward(particles.images).view(2, -1), particles.log_weights.exp()
    for p, prompt in enumerate(["right", "left"]):
        truth = world.aligned({"slope": 2.0}, prompt).expected(reward)
        mean = float((weights[p] * scores[p]).sum())
        assert abs(mean - truth) < 0.05 * truth
    assert weights.sum(1).tolist() == pytest.approx([1, 1])
    for _, parents in particles.lineage:
        assert parents.min() >= 0 and parents.max() < 4000
    picked = particles.picks(torch.Generator().manual_seed(0))
    assert picked[0] < 4000 <= picked[1]


def test_the_normaliser_is_estimated_through_resampling():
    world, tilt, lam = crossing(), 2.0, 2.0
    particles = run(world, {"a": {"slope": tilt}}, lam, 20_000, ess_threshold=0.9)
    assert len(particles.lineage) > 1
    exact = world.reference.tilted(world.exponent({"slope": lam * tilt}))[1]
    exact -= lam * world.reference.tilted(world.exponent({"slope": tilt}))[1]
    assert float(particles.log_normalizer) == pytest.approx(exact, rel=0.05)


def test_standard_errors_of_particles_are_the_spread_of_repeated_runs():
    world, reward = crossing(), crossing().rewards["slope"]
    prompts = [""] * 150
    particles = run(world, {"a": {"slope": 1.0}}, 2.0, 64, prompt=prompts, ess_threshold=0.8, steps=50)
    weights, scores = particles.log_weights.exp(), reward(particles.images).view(150, 64)
    spread = float((weights * scores).sum(1).std()) / 150**0.5
    assert particles.mean(reward(particles.images)).error == pytest.approx(spread, rel=0.35)


def test_more_particles_less_error():
    """Dividing by few weights costs bias, which falls as K grows."""
    world, reward = crossing(), crossing().rewards["slope"]
    truth = world.aligned({"slope": 0.5}).expected(reward)
    errors = []
    for count in (1, 4, 32):
        prompts = [""] * (6400 // count)
        particles = run(world, {"a": {"slope": 2.0}}, 0.25, count, prompt=prompts, steps=50)
        weights, scores = particles.log_weights.exp(), reward(particles.images).view(len(prompts), count)
        errors.append(abs(float((weights * scores).sum(1).mean()) - truth) / truth)
    assert errors[0] > 0.2 > errors[1] > errors[2] and errors[2] < 0.05


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_network_evaluations_are_exactly_k_times_those_of_one_image():
    pipe, anchor, call = make("sd")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    rows: list[int] = []
    forward = type(denoiser(pipe)).forward

    def counting(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    with Counter(denoiser(pipe)), realign(pipe, anchor, 0.5):
        for module in (denoiser(pipe), anchor):
            module.forward = counting.__get__(module)
        call = {key: value for key, value in call.items() if key != "prompt"} | {"guidance_scale": 1.0}
        call.pop("negative_prompt", None)
        pipe(prompt="a", **call)
        once, rows[:] = sum(rows), []
        sample_particles(pipe, "a", 5, ess_threshold=1.0, **call)
    assert sum(rows) == 5 * once


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_micro_batches_change_nothing_but_memory(guidance_scale):
    pipe, anchor, call = make("sd")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    call = {"num_inference_steps": 4, "guidance_scale": guidance_scale} | {k: call[k] for k in ("height", "width")}
    results = []
    with realign(pipe, anchor, 0.5) as dial:
        for micro_batch in (None, 3, 1):
            generator = torch.Generator().manual_seed(3)
            results.append(
                sample_particles(
                    pipe,
                    ["a", "b"],
                    4,
                    ess_threshold=1.0,
                    micro_batch=micro_batch,
                    generator=generator,
                    output_type="pt",
                    **call,
                )
            )
        assert dial.micro_batch is None and not pipe.vae.use_slicing
    whole, *others = results
    for other in others:
        torch.testing.assert_close(other.images, whole.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.log_weights.exp(), whole.log_weights.exp(), rtol=0, atol=1e-5)
        assert torch.equal(other.ancestors, whole.ancestors)


def test_without_resampling_particles_are_the_pipelines_own_images():
    world = crossing()
    pipe = world.pipeline(ddim())
    pipe.set_progress_bar_config(disable=True)
    with realign(pipe, world.denoiser({"slope": 1.0}), 0.5) as dial:
        call: dict[str, Any] = {"num_inference_steps": 10, "eta": 1.0}
        particles = sample_particles(pipe, "", 6, ess_threshold=0, generator=torch.Generator().manual_seed(2), **call)
        plain = pipe("", num_images_per_prompt=6, generator=torch.Generator().manual_seed(2), **call).images
    assert torch.equal(particles.images, plain)
    torch.testing.assert_close(particles.log_weights[0], torch.log_softmax(dial.importance_weights.log_weights, 0))
    assert particles.lineage == [] and particles.ancestors.tolist() == [list(range(6))]
    assert particles.evenness.shape == (9, 1)


# -- samplers that cannot resample ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [(ddim(), "draws no noise as it is set"), (FlowMatchEulerDiscreteScheduler(), "draws no noise")],
)
def test_deterministic_samplers_weight_without_resampling_and_say_so(scheduler, reason):
    particles = run(
        crossing(), {"a": {"slope": 1.0}}, 0.5, 50, scheduler=scheduler, eta=0.0, steps=10, ess_threshold=1.0
    )
    assert particles.lineage == [] and reason in particles.words
    assert 1 < float(particles.effective) < 50


def test_multistep_samplers_weight_without_resampling():
    from diffusers import DPMSolverMultistepScheduler

    for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        made = DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type=algorithm)
        particles = run(crossing(), {"a": {"slope": 1.0}}, 0.5, 20, scheduler=made, steps=10, ess_threshold=1.0)
        assert particles.lineage == [] and "remembers earlier steps" in particles.words


def test_diffusers_own_stochastic_flow_matching_is_refused_with_the_way_out():
    made = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match=naming("stochastic_sampling", type(made).__name__, "FlowMatchSDEScheduler")):
        run(crossing(), {"a": {"slope": 1.0}}, 0.5, 4, scheduler=made)
    ours = FlowMatchSDEScheduler.from_config(made.config, stochastic_sampling=False)
    assert run(crossing(), {"a": {"slope": 1.0}}, 0.5, 4, scheduler=ours, steps=5).log_weights.shape == (1, 4)


# -- collapse, tempering, bad input -----------------------------------------------------------------------------------


def test_collapsed_weights_are_confessed():
    world = random_world(3, 4, 16)
    particles = run(world, {"a": {"reward 1": 60.0}}, 5.0, 8, ess_threshold=0.0, prompt=["first", "first"])
    assert bool(particles.collapsed.all())
    assert "weights collapsed for 2 of 2 prompts" in particles.words and "Use more particles" in particles.words
    alone = run(world, {"a": {"reward 1": 1.0}}, 0.5, 1)
    assert bool(alone.collapsed.all()) and float(alone.log_weights) == 0.0
    assert math.isnan(alone.mean(torch.ones(1)).error)


def test_tempering_lies_between_algorithm_1_and_the_exact_target():
    world, reward = crossing(), crossing().rewards["slope"]
    means = {}
    for temper in (0.0, 0.5, 1.0):
        particles = run(world, {"a": {"slope": 2.0}}, 0.25, 8000, temper=temper)
        means[temper] = particles.mean(reward(particles.images)).value
        if temper == 0:
            assert float(particles.effective) == pytest.approx(8000)
    assert means[0.0] < means[0.5] < means[1.0]


def test_particles_without_a_target_say_so():
    particles = run(crossing(), {"a": {"slope": 1.0}}, 0.5, 4, guidance_scale=1.0, prompt="right", steps=5)
    assert "No exact target" not in particles.words
    particles = run(crossing(), {"a": {"slope": 1.0}}, Power(2), 4, steps=5)
    assert "annealed λ" in particles.words


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"count": 0}, ["count", 1, 0]),
        ({"count": True}, ["count", True]),
        ({"ess_threshold": 1.1}, ["ess_threshold", [0, 1], 1.1]),
        ({"ess_threshold": -0.1}, ["ess_threshold", -0.1]),
        ({"ess_threshold": math.nan}, ["ess_threshold", "nan"]),
        ({"temper": 2}, ["temper", [0, 1], 2]),
        ({"micro_batch": 0}, ["micro_batch", 1, 0]),
        ({"prompt": []}, ["prompt_embeds"]),
        ({"lam": [0.5, 0.6]}, ["dial.lam"]),
    ],
)
def test_bad_input(options, values):
    given: dict[str, Any] = {"count": 4, "lam": 0.5, "steps": 3} | options
    with pytest.raises(ValueError, match=naming(*values)):
        run(crossing(), {"a": {"slope": 1.0}}, given.pop("lam"), given.pop("count"), **given)


def test_pipelines_without_a_dial_or_with_interpolated_weights_are_refused():
    world = crossing()
    pipe = world.pipeline(ddim())
    with pytest.raises(ValueError, match=r"deradiff\.realign"):
        sample_particles(pipe, "", 4)
    with (
        realign(pipe, world.denoiser({"slope": 1.0}), 0.5, method="interpolate"),
        pytest.raises(ValueError, match="method='mixture'"),
    ):
        sample_particles(pipe, "", 4)


def test_too_many_particles_are_one_sentence_that_names_the_micro_batch(monkeypatch):
    world = crossing()
    pipe = world.pipeline(ddim())

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with realign(pipe, world.denoiser({"slope": 1.0}), 0.5) as dial:
        monkeypatch.setattr(type(pipe.unet), "forward", full)
        with pytest.raises(MemoryError, match=naming(1, 8, 4, "micro_batch")):
            sample_particles(pipe, "", 8, micro_batch=4, num_inference_steps=2)
        assert dial.population is None and dial.micro_batch is None


def test_nan_from_a_model_stops_the_run_and_names_it():
    world = crossing()
    pipe = world.pipeline(ddim())
    anchor = world.denoiser({"slope": 1.0})
    anchor.means[0, 0] = math.nan
    with realign(pipe, anchor, 0.5), pytest.raises(FloatingPointError, match=naming("anchor", 501)):
        sample_particles(pipe, "", 4, num_inference_steps=2)


# -- systematic resampling --------------------------------------------------------------------------------------------


def test_systematic_resampling_keeps_expectations_and_bounds_children():
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0], [0.25] * 4])
    logs, chance = weights.log(), torch.Generator().manual_seed(0)
    children = torch.zeros(3, 4)
    for _ in range(2000):
        parents = systematic(logs, chance)
        counts = torch.stack([torch.bincount(row, minlength=4) for row in parents])
        assert bool((counts >= (4 * weights).floor()).all() and (counts <= (4 * weights).ceil()).all())
        children += counts
    torch.testing.assert_close(children / 2000, 4 * weights, atol=0.05, rtol=0)
    assert systematic(torch.tensor([[-1e6, -1e6 + 50.0]]), chance).tolist() == [[1, 1]]


# -- every pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.cases(3)
def test_particles_on_every_kind_of_pipeline(kind):
    pipe, anchor, call = make(kind)
    flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
    family, extra = (FlowMatchSDEScheduler, {}) if flow else (DDPMScheduler, {"clip_sample": False})
    pipe.scheduler = family.from_config(pipe.scheduler.config, **extra)
    prompt = call.pop("prompt", None)
    call = {name: value for name, value in call.items() if name != "num_images_per_prompt"}
    with realign(pipe, {"one": anchor, "other": anchor}, {"one": 0.4, "other": 0.3}):
        particles = sample_particles(
            pipe, prompt, 3, ess_threshold=1.0, generator=torch.Generator().manual_seed(0), **call
        )
    prompts = 1 if isinstance(prompt, str) else len(call["prompt_embeds"] if prompt is None else prompt)
    assert particles.log_weights.shape == (prompts, 3) and len(particles.images) == 3 * prompts
    assert bool(torch.isfinite(particles.log_weights).all()) and "resampled" in particles.words
