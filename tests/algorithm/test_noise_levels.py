"""Clocks and noise levels against the schedulers of diffusers themselves."""

import math

import diffusers
import pytest
import torch

from deradiff.algorithm.noise_levels import index_of, log_snr, progress, weight_clock
from messages import naming
from scheduler_cases import make, model_input, prediction, start, started

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


def test_an_end_among_the_timesteps_is_no_step():
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.4, 0.0])
    assert [progress(scheduler, t).steps for t in scheduler.timesteps[:-1]] == pytest.approx([0, 1 / 3, 2 / 3])
    scheduler.set_timesteps(4)
    assert [progress(scheduler, t).steps for t in scheduler.timesteps[:3]] == pytest.approx([0, 0.25, 0.5])


def test_timesteps_that_come_again_are_where_they_were():
    scheduler = diffusers.RePaintScheduler()
    scheduler.set_timesteps(4, jump_length=2, jump_n_sample=2)
    places = {750: 0.0, 500: 0.25, 250: 0.5, 0: 0.75}
    assert len(scheduler.timesteps) > len(places)
    assert all(progress(scheduler, t).steps == places[int(t)] for t in scheduler.timesteps)


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


@pytest.mark.parametrize(
    ("scheduler", "squared"),
    [
        (diffusers.DDPMScheduler(), lambda snr: 1.0),
        (diffusers.DDPMScheduler(prediction_type="v_prediction"), lambda snr: snr / (1 + snr)),
        (diffusers.DDPMScheduler(prediction_type="sample"), lambda snr: snr),
        (diffusers.FlowMatchEulerDiscreteScheduler(), lambda snr: (snr**0.5 / (1 + snr**0.5)) ** 2),
        (diffusers.EDMEulerScheduler(sigma_data=0.5), lambda snr: 0.25 * snr / (1 + 0.25 * snr)),
    ],
    ids=["epsilon", "v", "sample", "flow", "edm"],
)
def test_the_clock_of_log_weights_runs_with_what_an_output_is_worth_in_noise(scheduler, squared):
    for level in (-6.0, -1.0, 0.5, 4.0):
        step = 1e-4
        slope = (weight_clock(scheduler, level + step) - weight_clock(scheduler, level - step)) / (2 * step)
        assert slope == pytest.approx(squared(math.exp(level)) / 2, rel=1e-5)


def test_a_denoiser_that_is_told_t_over_T_begins_where_it_could_be_the_end():
    scheduler = started("FlowMatchEulerDiscreteScheduler", {}, steps=3)
    assert scheduler.timesteps[-1] == 1
    assert index_of(scheduler, torch.tensor(1.0)) == 0
    assert index_of(scheduler, scheduler.timesteps[1] / 1000) == 1
