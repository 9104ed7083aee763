"""Every scheduler a text-to-image user picks, under Stable Diffusion 1.5 or 3, against Algorithm 1 by hand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import oracle
from deradiff import realign
from deradiff.algorithm.schedules import Power, Step
from deradiff.sampling.scheduler_hook import schedulers_of
from messages import naming
from tiny import Counter, assert_close, denoiser, distance, make, sample, with_denoiser


class Case(NamedTuple):
    """A scheduler by class name and settings; `step_of` tells which step's noise level its n-th evaluation is at."""

    scheduler: str
    config: Mapping[str, Any] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({})
    kind: str = "sd"
    step_of: Callable[[int], int] | None = None


def at_both_ends(call: int) -> int:
    """Heun: t0, t1, t1, t2, t2, ..."""
    return (call + 1) // 2


def with_midpoints(call: int) -> int:
    """KDPM2: t0, between, t1, between, ..."""
    return call // 2


def second_twice(call: int) -> int:
    """PNDM without Runge-Kutta: t0, t1, t1, t2, t3, ..."""
    return call if call < 2 else call - 1


STEPS = 5
AFFINE = {
    "DDPM": Case("DDPMScheduler"),
    "DDPM fixed_large": Case("DDPMScheduler", {"variance_type": "fixed_large"}),
    "DDPM trailing": Case("DDPMScheduler", {"timestep_spacing": "trailing"}),
    "DDIM": Case("DDIMScheduler"),
    "DDIM eta 0.5": Case("DDIMScheduler", call={"eta": 0.5}),
    "DDIM eta 1": Case("DDIMScheduler", call={"eta": 1.0}),
    "DDIM v": Case("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "Euler": Case("EulerDiscreteScheduler"),
    "Euler Karras": Case("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler ancestral": Case("EulerAncestralDiscreteScheduler"),
    "Heun": Case("HeunDiscreteScheduler", step_of=at_both_ends),
    "DPM-Solver++ 1": Case("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "DPM-Solver++ 2": Case("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 2 Karras": Case("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ 3": Case("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM-Solver++ SDE": Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ singlestep": Case("DPMSolverSinglestepScheduler"),
    "UniPC": Case("UniPCMultistepScheduler"),
    "LMS": Case("LMSDiscreteScheduler"),
    "PNDM": Case("PNDMScheduler", {"skip_prk_steps": True}, step_of=second_twice),
    "KDPM2": Case("KDPM2DiscreteScheduler", step_of=with_midpoints),
    "KDPM2 ancestral": Case("KDPM2AncestralDiscreteScheduler", step_of=with_midpoints),
    "DEIS": Case("DEISMultistepScheduler"),
    "LCM": Case("LCMScheduler"),
    "EDM Euler": Case("EDMEulerScheduler", {"prediction_type": "epsilon"}),
    "flow Euler": Case("FlowMatchEulerDiscreteScheduler", kind="sd3"),
    "flow Euler stochastic": Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, kind="sd3"),
    "flow Heun": Case("FlowMatchHeunDiscreteScheduler", kind="sd3", step_of=at_both_ends),
    "flow DPM-Solver++": Case(
        "DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, kind="sd3"
    ),
    "flow UniPC": Case(
        "UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, kind="sd3"
    ),
}


def build(case: Case) -> tuple[DiffusionPipeline, nn.Module, dict[str, Any], list[DiffusionPipeline]]:
    """A pipeline to realign, its anchor, the call, and the models' own pristine pipelines, all under that scheduler."""
    pipe, anchor, call = make(case.kind)
    pipes = [pipe, make(case.kind)[0], with_denoiser(case.kind, anchor)]
    for each in pipes:
        # Assigned later, as users do: the constructor of Stable Diffusion rewrites `clip_sample` and `steps_offset`.
        each.scheduler = getattr(diffusers, case.scheduler).from_config(each.scheduler.config, **case.config)
    return pipe, anchor, call | {"num_inference_steps": STEPS} | dict(case.call), pipes[1:]


@pytest.mark.parametrize("case", AFFINE.values(), ids=AFFINE)
@pytest.mark.cases(7)
def test_affine_steps_mix_predictions(case):
    pipe, anchor, call, own = build(case)
    plain, aligned = sample(own[0], call), sample(own[1], call)
    with realign(pipe, anchor, 0.0) as dial:
        assert dial.path == "prediction"
        assert torch.equal(sample(pipe, call), plain)
        dial.lam = 1.0
        assert torch.equal(sample(pipe, call), aligned)
        dial.lam = 0.37
        realigned = sample(pipe, call)
        assert_close(realigned, oracle.lock_step(own, call, 0.37), tolerance=3e-5)
        assert min(distance(realigned, plain), distance(realigned, aligned)) > 1e-2
    assert torch.equal(sample(pipe, call), plain)


SINGLE_STAGE = {name: case for name, case in AFFINE.items() if case.step_of is None}


@pytest.mark.parametrize("case", SINGLE_STAGE.values(), ids=SINGLE_STAGE)
@pytest.mark.cases(6)
def test_a_schedule_is_read_at_the_fraction_of_steps_done(case):
    pipe, anchor, call, own = build(case)
    with realign(pipe, anchor, Power(2)):
        assert_close(sample(pipe, call), oracle.lock_step(own, call, lambda i: (i / STEPS) ** 2), tolerance=3e-5)


@pytest.mark.parametrize("name", ["Heun", "PNDM", "KDPM2", "flow Heun"])
@pytest.mark.cases(2)
def test_a_schedule_stays_in_place_where_a_step_evaluates_twice(name):
    """λ jumps from 0 to 1 between the second and the third of four noise levels, however often each is evaluated."""
    step_of = AFFINE[name].step_of
    assert step_of is not None
    pipe, anchor, call, own = build(AFFINE[name])
    call["num_inference_steps"] = 4
    with realign(pipe, anchor, Step(0.5)):
        realigned = sample(pipe, call)
    assert_close(realigned, oracle.lock_step(own, call, lambda n: float(step_of(n) >= 2)), tolerance=3e-5)


LISTING = {
    "DDPM": (Case("DDPMScheduler"), oracle.ddpm),
    "DDIM eta 0": (Case("DDIMScheduler", call={"eta": 0.0}), oracle.ddim),
    "DDIM eta 0.5": (Case("DDIMScheduler", call={"eta": 0.5}), oracle.ddim),
    "DDIM eta 1": (Case("DDIMScheduler", call={"eta": 1.0}), oracle.ddim),
    "Euler ancestral": (Case("EulerAncestralDiscreteScheduler"), oracle.euler_ancestral),
}


@pytest.mark.parametrize(("case", "posterior"), LISTING.values(), ids=LISTING)
@pytest.mark.parametrize("path", ["prediction", "posterior"])
@pytest.mark.cases(3)
def test_both_paths_are_the_papers_listing(case, posterior, path):
    pipe, anchor, call, own = build(case)
    with realign(pipe, anchor, path=path) as dial:
        assert dial.path == path
        for lam in (0.37, 1.4, -0.3, Power(2)):
            dial.lam = lam
            by_hand = (lambda i: (i / STEPS) ** 2) if isinstance(lam, Power) else lam
            assert_close(
                sample(pipe, call), oracle.algorithm_1(own[0], [anchor], call, by_hand, posterior, **case.call)
            )


NOT_AFFINE = {
    "DDIM clip_sample": (Case("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}), oracle.ddim),
    "DDIM eta 1 clip_sample": (Case("DDIMScheduler", {"clip_sample": True}, {"eta": 1.0}), oracle.ddim),
    "DDPM clip_sample": (Case("DDPMScheduler", {"clip_sample": True}), oracle.ddpm),
    "DDPM clip_sample, sample prediction": (
        Case("DDPMScheduler", {"clip_sample": True, "prediction_type": "sample"}),
        oracle.ddpm,
    ),
    "DDPM thresholding": (Case("DDPMScheduler", {"thresholding": True, "sample_max_value": 2.0}), oracle.ddpm),
    "DDIM thresholding": (Case("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}), oracle.ddim),
    "DDPM learned_range": (
        Case("DDPMScheduler", {"variance_type": "learned_range"}, kind="sd_8_channels"),
        oracle.ddpm,
    ),
}


@pytest.mark.parametrize(("case", "posterior"), NOT_AFFINE.values(), ids=NOT_AFFINE)
@pytest.mark.cases(2)
def test_other_steps_mix_posteriors(case, posterior):
    pipe, anchor, call, own = build(case)
    plain, aligned = sample(own[0], call), sample(own[1], call)
    with realign(pipe, anchor, 0.0) as dial:
        assert dial.path == "posterior"
        assert torch.equal(sample(pipe, call), plain)
        dial.lam = 1.0
        assert torch.equal(sample(pipe, call), aligned)
        dial.lam = 0.37
        realigned = sample(pipe, call)
        assert_close(realigned, oracle.lock_step(own, call, 0.37, posterior))

    with realign(pipe, anchor, 0.37, path="prediction") as dial:
        assert dial.path == "prediction"
        mixed = sample(pipe, call)
        assert_close(mixed, oracle.lock_step(own, call, 0.37))
    assert distance(mixed, realigned) > 1e-3, "the two paths differ here"


def test_posteriors_of_unequal_variance_cannot_be_extrapolated_at_will():
    case, _ = NOT_AFFINE["DDPM learned_range"]
    pipe, anchor, call, _ = build(case)
    with realign(pipe, anchor, 50.0), pytest.raises(ValueError, match=naming("λ = 50", "variance")):
        sample(pipe, call)


def test_a_scheduler_without_a_posterior_is_refused_on_the_posterior_path():
    pipe, anchor, call, _ = build(AFFINE["DPM-Solver++ 2"])
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"), realign(pipe, anchor, 0.5, path="posterior"):
        sample(pipe, call)


def test_the_path_follows_the_scheduler():
    pipe, anchor, call, own = build(NOT_AFFINE["DDPM clip_sample"][0])
    with realign(pipe, anchor, 0.37) as dial:
        assert dial.path == "posterior"
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert dial.path == "prediction"
        for each in own:
            each.scheduler = diffusers.EulerDiscreteScheduler.from_config(each.scheduler.config)
        assert_close(sample(pipe, call), oracle.lock_step(own, call, 0.37))


def test_one_evaluation_of_each_model_per_step():
    pipe, anchor, call, _ = build(AFFINE["DDIM"])
    with realign(pipe, anchor, 0.37), Counter(denoiser(pipe)) as reference, Counter(anchor) as anchors:
        latents: Tensor = sample(pipe, call)
    assert (reference.number, anchors.number, len(latents)) == (STEPS, STEPS, 2)


@pytest.mark.attack("two threads, one dial")
def test_a_pipeline_may_set_attributes_while_another_thread_looks_for_its_schedulers() -> None:
    pipe: Any = make("sd")[0]

    class Part:
        """Asked what it is, it has something set on the pipeline, as a call in another thread may."""

        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            setattr(pipe, f"_set_{len(vars(pipe))}", None)
            return Part

    pipe._part = Part()
    assert schedulers_of(pipe) == [pipe.scheduler]
