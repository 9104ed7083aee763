"""The estimate of x_0 behind a step, against the schedulers of diffusers themselves."""

from typing import Any

import diffusers
import pytest
import torch

from deradiff.algorithm.noise_levels import index_of, log_snr, progress
from deradiff.algorithm.step import StepRecord
from deradiff.studio.denoised_latents import denoised

SHAPE = (2, 3, 4, 4)


def started(name: str, config: dict[str, Any]) -> Any:
    scheduler = getattr(diffusers, name)(**({"clip_sample": False} if name.startswith("DD") else {}), **config)
    scheduler.set_timesteps(7)
    return scheduler


ESTIMATES = {
    **{
        f"{name}-{prediction}": (name, {"prediction_type": prediction})
        for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        for prediction in ("epsilon", "v_prediction")
    },
    "DDIMScheduler-sample": ("DDIMScheduler", {"prediction_type": "sample"}),
}


@pytest.mark.parametrize("case", ESTIMATES)
def test_the_estimate_of_x_0_is_the_schedulers_own(case: str) -> None:
    name, config = ESTIMATES[case]
    scheduler = started(name, config)
    for timestep in scheduler.timesteps[:-1]:
        sample, outputs = torch.randn(SHAPE), torch.randn(2, *SHAPE)
        weights = torch.tensor([[0.3, 1.0], [0.7, 0.0]])
        step = record(scheduler, timestep, sample, outputs, weights)
        mixture = weights[0].view(-1, 1, 1, 1) * outputs[0] + weights[1].view(-1, 1, 1, 1) * outputs[1]
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        expected = scheduler.step(mixture, timestep, sample).pred_original_sample
        estimate = denoised(scheduler, step)
        assert estimate is not None
        torch.testing.assert_close(estimate, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_estimate_of_x_0_in_flow_matching_is_where_the_velocity_leads() -> None:
    scheduler = started("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    image, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for i, timestep in enumerate(scheduler.timesteps[1:], 1):
        sigma = scheduler.sigmas[i]
        sample, velocity = (1 - sigma) * image + sigma * noise, noise - image
        scheduler._step_index = i
        step = record(scheduler, timestep, sample, velocity[None], torch.ones(1, 1))
        torch.testing.assert_close(denoised(scheduler, step), image, rtol=1e-4, atol=1e-4)


def test_nobody_guesses_x_0_where_the_prediction_is_unknown() -> None:
    scheduler = started("DDIMScheduler", {"prediction_type": "epsilon"})
    step = record(scheduler, scheduler.timesteps[0], torch.zeros(SHAPE), torch.zeros(1, *SHAPE), torch.ones(1, 1))
    assert denoised(scheduler, step) is not None
    scheduler.register_to_config(prediction_type="riddle")
    assert denoised(scheduler, step) is None


def record(
    scheduler: diffusers.SchedulerMixin,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
) -> StepRecord:
    models = tuple(f"model {k}" for k in range(len(outputs)))
    at, snr = index_of(scheduler, timestep), log_snr(scheduler, timestep)
    return StepRecord(models, outputs, weights, sample, timestep, at, snr, progress(scheduler, timestep))
