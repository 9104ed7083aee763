"""Posteriors and clocks against the schedulers of diffusers themselves: their `step` is the oracle throughout."""

import copy
import math

import diffusers
import pytest
import torch

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import geometric_mixture
from deradiff.algorithm.noise_levels import index_of, log_snr, progress
from deradiff.algorithm.posterior_families import UnsupportedScheduler, ddim
from messages import naming

SHAPE = (2, 3, 4, 4)
STEPS = 7

DDPM_TYPES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
CASES: dict[str, tuple[str, dict, dict]] = {
    **{
        f"ddpm-{kind}-{prediction}": ("DDPMScheduler", {"variance_type": kind, "prediction_type": prediction}, {})
        for kind in DDPM_TYPES
        for prediction in ("epsilon", "v_prediction", "sample")
    },
    "ddpm-clip": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.5}, {}),
    "ddpm-threshold": ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, {}),
    "ddpm-last-step-clamped": ("DDPMScheduler", {"steps_offset": 1}, {}),
    "ddpm-parallel": ("DDPMParallelScheduler", {}, {}),
    **{
        f"ddim-{eta}-{prediction}": ("DDIMScheduler", {"prediction_type": prediction}, {"eta": eta})
        for eta in (0.0, 0.3, 1.0)
        for prediction in ("epsilon", "v_prediction", "sample")
    },
    "ddim-clip": ("DDIMScheduler", {"clip_sample": True}, {"eta": 0.5}),
    "ddim-clipped-output": ("DDIMScheduler", {"clip_sample": True}, {"eta": 0.5, "use_clipped_model_output": True}),
    "ddim-threshold": ("DDIMScheduler", {"thresholding": True, "prediction_type": "v_prediction"}, {"eta": 1.0}),
    "ddim-final-alpha": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, {"eta": 1.0}),
    "ddim-zero-snr": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"eta": 1.0},
    ),
    "ddim-parallel": ("DDIMParallelScheduler", {}, {"eta": 1.0}),
    "euler-ancestral-epsilon": ("EulerAncestralDiscreteScheduler", {}, {}),
    "euler-ancestral-v": ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "flow-stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, {}),
}
DTYPES = {"float32": (torch.float32, 3e-6), "float64": (torch.float64, 3e-6), "bfloat16": (torch.bfloat16, 3e-2)}


def make(name: str, **config: object) -> diffusers.SchedulerMixin:
    defaults = {"clip_sample": False} if name.startswith("DD") else {}
    return getattr(diffusers, name)(**{**defaults, **config})


def started(name: str, config: dict, steps: int = STEPS) -> diffusers.SchedulerMixin:
    scheduler = make(name, **config)
    scheduler.set_timesteps(steps)
    return scheduler


def prediction(scheduler, x: torch.Tensor, i: int) -> torch.Tensor:
    """A deterministic stand-in for a model, nonlinear in x, different at every step, and not one to amplify errors."""
    output = torch.sin((1 + i / STEPS) * x / x.std() + torch.linspace(0, 3, x[0].numel()).reshape(x[0].shape).to(x))
    if scheduler.config.get("variance_type") == "learned":
        return torch.cat([output, 0.01 + output.abs()], 1)
    if scheduler.config.get("variance_type") == "learned_range":
        return torch.cat([output, output.flip(-1)], 1)
    return output


def model_input(scheduler, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def start(scheduler, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype)
    return x * float(getattr(scheduler, "init_noise_sigma", 1.0))


def state(scheduler) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in vars(scheduler).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_mean_and_noise_scale_are_those_of_step_over_a_whole_run(case, dtype):
    name, config, step_kwargs = CASES[case]
    dtype, tolerance = DTYPES[dtype]
    scheduler = started(name, config)
    x = start(scheduler, dtype)
    for i, t in enumerate(scheduler.timesteps):
        output = prediction(scheduler, model_input(scheduler, x, t), i)
        before = state(scheduler)
        mean, variance = posteriors.posterior(scheduler, output, t, x, **step_kwargs)
        after = state(scheduler)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items()
        )
        assert mean.dtype == dtype and variance.ndim == mean.ndim

        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i), **step_kwargs)[0]
        noise_dtype = torch.float32 if name.startswith("Flow") else dtype
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=noise_dtype)
        scale = tolerance * float(expected.abs().max())
        wide = torch.promote_types(dtype, torch.float32)
        got = mean.to(wide) + variance.sqrt() * z.to(wide)
        torch.testing.assert_close(got, expected.to(wide), rtol=0, atol=scale)
        # The noise scale on its own, from two draws of the same step.
        if not hasattr(scheduler, "step_index") and dtype == torch.float32:
            again = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(99), **step_kwargs)[0]
            z_again = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=dtype)
            torch.testing.assert_close(variance.sqrt() * (z - z_again), expected - again, rtol=0, atol=2 * scale)
        x = expected


@pytest.mark.parametrize("generators", ["one", "one per image", "global"])
@pytest.mark.parametrize("case", CASES)
def test_sampling_from_posteriors_reproduces_the_scheduler_and_leaves_generators_alike(case, generators):
    name, config, step_kwargs = CASES[case]

    def seeded():
        torch.manual_seed(5)
        match generators:
            case "one":
                return torch.Generator().manual_seed(3)
            case "one per image":
                return [torch.Generator().manual_seed(s) for s in (3, 4)]
        return None

    def run(step):
        scheduler, generator = started(name, config), seeded()
        x = start(scheduler, torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            x = step(scheduler, prediction(scheduler, model_input(scheduler, x, t), i), t, x, generator)
        rest = generator if isinstance(generator, list) else [generator]
        return x, getattr(scheduler, "step_index", None), [torch.randn(3, generator=g) for g in rest]

    def own(scheduler, output, t, x, generator):
        return scheduler.step(output, t, x, generator=generator, **step_kwargs)[0]

    def ours(scheduler, output, t, x, generator):
        gaussian = posteriors.posterior(scheduler, output, t, x, **step_kwargs)
        return posteriors.sample(scheduler, gaussian, t, generator, eta=step_kwargs.get("eta", 0.0))

    expected, index, rest = run(own)
    got, got_index, got_rest = run(ours)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert got_index == index
    assert all(torch.equal(a, b) for a, b in zip(rest, got_rest, strict=True))


def test_half_precision_samples_keep_their_dtype_and_tiny_variances():
    scheduler = started("DDPMScheduler", {"steps_offset": 1})
    x = start(scheduler, torch.float16)
    gaussian = posteriors.posterior(scheduler, prediction(scheduler, x, 0), scheduler.timesteps[-1], x)
    assert gaussian.variance.dtype == torch.float32
    assert gaussian.variance.item() == pytest.approx(1e-20)
    assert posteriors.sample(scheduler, gaussian, scheduler.timesteps[-1]).dtype == torch.float16


def test_given_noise_is_used_and_excludes_a_generator():
    scheduler = started("DDIMScheduler", {})
    t, x, z = scheduler.timesteps[2], start(scheduler, torch.float32), torch.randn(SHAPE)
    output = prediction(scheduler, x, 0)
    gaussian = ddim(scheduler, output, t, x, eta=1.0)
    expected = scheduler.step(output, t, x, eta=1.0, variance_noise=z)[0]
    torch.testing.assert_close(posteriors.sample(scheduler, gaussian, t, variance_noise=z), expected)
    with pytest.raises(ValueError, match=naming("generator", "variance_noise")):
        posteriors.sample(scheduler, gaussian, t, torch.Generator(), z)


def test_a_run_that_starts_in_mid_schedule_knows_its_step():
    for begin in (True, False):
        scheduler = started("EulerAncestralDiscreteScheduler", {})
        if begin:
            scheduler.set_begin_index(3)
        t, x = scheduler.timesteps[3], start(scheduler, torch.float32)
        output = prediction(scheduler, x, 0)
        gaussian = posteriors.posterior(scheduler, output, t, x)
        assert scheduler.step_index is None
        drawn = posteriors.sample(scheduler, gaussian, t, torch.Generator().manual_seed(0))
        assert scheduler.step_index == 4
        scheduler._step_index = None
        scheduler.is_scale_input_called = True
        expected = scheduler.step(output, t, x, torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -- which schedulers have posteriors, and which of them are affine ----------------------------------------------------

WITH_POSTERIORS = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
}
WITHOUT_POSTERIORS = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("name", sorted(WITH_POSTERIORS | WITHOUT_POSTERIORS))
def test_which_schedulers_have_posteriors(name):
    scheduler = make(name)
    assert posteriors.has_posterior(scheduler) == (name in WITH_POSTERIORS)
    affine, reason = posteriors.affine(scheduler)
    assert affine and name in reason
    if name in WITHOUT_POSTERIORS:
        assert "mixing predictions is the definition" in reason
        x = torch.zeros(SHAPE)
        with pytest.raises(UnsupportedScheduler, match=name):
            posteriors.posterior(scheduler, x, 1, x)


def test_no_other_scheduler_is_taken_for_one_with_posteriors():
    every = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    known = {name for name, cls in every.items() if vars(cls).get("step") in posteriors._FAMILIES}
    assert known == WITH_POSTERIORS


def test_a_step_of_ones_own_has_no_posterior_but_a_wrapped_one_has():
    import functools

    class Own(diffusers.DDPMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Wrapped(diffusers.DDPMScheduler):
        @functools.wraps(diffusers.DDPMScheduler.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert not posteriors.has_posterior(Own())
    assert posteriors.has_posterior(Wrapped())


@pytest.mark.parametrize(
    ("name", "config", "because"),
    [
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDPMScheduler", {"thresholding": True}, "thresholding"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ],
)
def test_steps_that_are_not_affine_say_why(name, config, because):
    affine, reason = posteriors.affine(make(name, **config))
    assert not affine and because in reason


@pytest.mark.parametrize(
    ("name", "config", "because"),
    [
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample"),
    ],
)
def test_without_a_posterior_nonlinear_switches_are_named_and_predictions_are_mixed_all_the_same(name, config, because):
    affine, reason = posteriors.affine(make(name, **config))
    assert affine and because in reason and "definition" in reason


@pytest.mark.parametrize("case", CASES)
def test_affine_is_true_exactly_where_both_mixtures_agree(case):
    """Mixed predictions through one step equal mixed posteriors if and only if the step is affine."""
    name, config, step_kwargs = CASES[case]
    scheduler = started(name, config)
    x, t = start(scheduler, torch.float32), scheduler.timesteps[3]
    x = x / x.std()
    model_input(scheduler, x, t)
    outputs = torch.stack([3 * prediction(scheduler, x, i) for i in (0, 1)])
    if scheduler.config.get("variance_type") == "learned":
        outputs = outputs.abs()
    weights = torch.tensor([0.3, 0.7])
    each = [posteriors.posterior(scheduler, output, t, x, **step_kwargs) for output in outputs]
    means, variances = (torch.stack(part) for part in zip(*each, strict=True))
    mixture = geometric_mixture(means, variances, weights)
    mixed = posteriors.posterior(scheduler, 0.3 * outputs[0] + 0.7 * outputs[1], t, x, **step_kwargs)
    agree = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(mixture, mixed, strict=True))
    assert posteriors.affine(scheduler)[0] == agree


def test_variances_that_cannot_be_are_refused_with_the_reason():
    x = torch.zeros(SHAPE)
    scheduler = started("DDPMScheduler", {"variance_type": "fixed_large_log"})
    assert not posteriors.has_posterior(scheduler)
    with pytest.raises(UnsupportedScheduler, match=naming("variance_type='fixed_large_log'", "NaN")):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)
    scheduler = started("DDPMScheduler", {"variance_type": "learned_range"})
    with pytest.raises(UnsupportedScheduler, match="variance_type='learned_range'"):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)
    scheduler = started("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"})
    with pytest.raises(
        UnsupportedScheduler, match=naming("EulerAncestralDiscreteScheduler", "prediction_type='sample'")
    ):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)


# -- where am I --------------------------------------------------------------------------------------------------------

CLOCKS: dict[str, tuple[str, dict]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddim-offset": ("DDIMScheduler", {"steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "edm": ("EDMEulerScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


@pytest.mark.parametrize("form", ["as given", "batch", "half", "over T"])
@pytest.mark.parametrize("case", CLOCKS)
def test_progress_over_a_run_is_the_fraction_of_steps_done(case, form):
    name, config = CLOCKS[case]
    scheduler = started(name, config, steps=10)
    x = start(scheduler, torch.float32)
    seen = []
    for i, t in enumerate(scheduler.timesteps):
        output = prediction(scheduler, model_input(scheduler, x, t), i)
        argument = {
            "as given": t,
            "batch": t.expand(4),
            "half": t.to(torch.bfloat16),
            "over T": t / 1000 if name.startswith("Flow") else t.item(),
        }[form]
        seen.append(progress(scheduler, argument))
        x = scheduler.step(output, t, x)[0]
    steps = [p.steps for p in seen]
    assert sorted(set(steps)) == pytest.approx([i / 10 for i in range(10)])
    assert steps == sorted(steps)
    if len(seen) > 10:  # Heun and PNDM evaluate twice at a timestep, at the same progress
        assert case in ("heun", "pndm")
    times = [p.time for p in seen]
    assert times == sorted(times) and 0 <= times[0] < times[-1] <= 1
    if case == "ddim":
        assert times == pytest.approx([1 - t / 1000 for t in range(900, -1, -100)])
    if case == "flow":
        sigmas = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 1 / 1000, 10).tolist()]
        assert times == pytest.approx([1 - s for s in sigmas], abs=2e-2)
    if case == "edm":
        # Karras' ρ-parametrisation is the one in which the default schedule is uniform.
        assert times == pytest.approx([i / 9 for i in range(10)], abs=1e-6)


def test_kdpm2_counts_its_intermediate_evaluations():
    scheduler = started("KDPM2DiscreteScheduler", {}, steps=5)
    x, steps = start(scheduler, torch.float32), []
    for i, t in enumerate(scheduler.timesteps):
        steps.append(progress(scheduler, t).steps)
        x = scheduler.step(prediction(scheduler, x, i), t, x)[0]
    assert steps == pytest.approx([i / 9 for i in range(9)])


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_image_to_image_starts_inside_the_schedule(name):
    scheduler = started(name, {"skip_prk_steps": True} if name == "PNDMScheduler" else {}, steps=10)
    middle = sorted(set(scheduler.timesteps.tolist()), reverse=True)[5]
    assert progress(scheduler, torch.tensor(middle)).steps == pytest.approx(0.5)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(7)
        assert progress(scheduler, torch.tensor(middle)).steps == pytest.approx(0.7)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_flow_timestep_divided_by_a_thousand_is_found(steps):
    scheduler = started("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, steps=steps)
    for i, t in enumerate(scheduler.timesteps):
        assert index_of(scheduler, t / 1000) == i
        assert index_of(scheduler, t) == i


def test_a_new_schedule_is_noticed_and_a_missing_one_is_named():
    scheduler = make("DDIMScheduler")
    for steps in (10, 20, 10):
        scheduler.set_timesteps(steps)
        assert progress(scheduler, scheduler.timesteps[5]).steps == pytest.approx(5 / steps)
    with pytest.raises(ValueError, match=naming("PNDMScheduler", "set_timesteps")):
        progress(make("PNDMScheduler"), 10)


def test_a_finished_run_stays_at_its_last_step():
    scheduler = started("EulerDiscreteScheduler", {}, steps=4)
    scheduler._step_index = 4
    assert progress(scheduler, scheduler.timesteps[-1]).steps == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_log_snr_is_that_of_the_training_schedule(name):
    """All of these hold x_t = α x_0 + σ ε with SNR = ᾱ/(1 - ᾱ), whether they scale it to unit variance or not."""
    scheduler = make(name, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(8)
    alphas_cumprod = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps[::3]:
        alpha_bar = float(alphas_cumprod[round(float(t))])
        expected = math.log(alpha_bar / (1 - alpha_bar))
        # Where timesteps are fractional (linspace), the neighbours bound the value; a tolerance of half a step does.
        assert log_snr(scheduler, t) == pytest.approx(expected, abs=0.02)


def test_log_snr_of_the_first_timestep_of_stable_diffusion():
    """Stable Diffusion's schedule ends at ᾱ = 0.0047."""
    scheduler = make("DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert log_snr(scheduler, 999) == pytest.approx(math.log(0.00466 / (1 - 0.00466)), abs=2e-3)


def test_log_snr_of_flow_matching_edm_and_kdpm2():
    flow = started("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, steps=4)
    assert log_snr(flow, flow.timesteps[0]) == -math.inf
    sigma = float(flow.sigmas[2])
    assert log_snr(flow, flow.timesteps[2]) == pytest.approx(2 * math.log((1 - sigma) / sigma))

    unipc = started("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, steps=4)
    sigma = float(unipc.sigmas[2])
    assert log_snr(unipc, unipc.timesteps[2]) == pytest.approx(2 * math.log((1 - sigma) / sigma))

    edm = started("EDMEulerScheduler", {}, steps=4)
    assert log_snr(edm, edm.timesteps[0]) == pytest.approx(-2 * math.log(80))
    assert log_snr(edm, edm.timesteps[-1]) == pytest.approx(-2 * math.log(0.002), rel=1e-4)

    zero = started("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    assert log_snr(zero, zero.timesteps[0]) == -math.inf


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_the_noise_level_is_the_one_the_scheduler_scales_its_input_by(name):
    """A second stage holds its sample at another level; `scale_model_input` divides by √(σ² + 1) of the true one."""
    scheduler = started(name, {}, steps=5)
    x = start(scheduler, torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        snr = log_snr(scheduler, t)
        factor = float(scheduler.scale_model_input(torch.ones(()), t))
        assert snr == pytest.approx(-math.log(1 / factor**2 - 1), rel=1e-4)
        x = scheduler.step(prediction(scheduler, x, i), t, x)[0]


def test_a_scheduler_with_no_noise_levels_has_no_snr():
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(4)
    assert math.isnan(log_snr(scheduler, scheduler.timesteps[0]))
