"""Schedulers of diffusers in the settings that tests compare, started, and what a model would give them."""

import diffusers
import torch

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
