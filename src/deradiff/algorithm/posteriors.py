"""What a scheduler's reverse step is as `N(mean, variance)`.

One function per family, named after it: `ddpm`, `ddim`, `euler_ancestral`, `flow_match_euler`, `flow_match_sde`. Each
gives mean and variance of what the scheduler's own `step` would return, with the same arithmetic, and leaves the
scheduler as it was; `sample` then takes the step that `step` would have taken. Every other scheduler's step either has
no noise of its own or combines several evaluations: it has no per-step posterior, and mixing predictions is the
definition there.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.gaussian import Gaussian
from deradiff.algorithm.noise_levels import Timestep, first, index_of, log_snr, progress
from deradiff.schedulers import FlowMatchSDEScheduler

__all__ = [
    "Coefficients",
    "UnsupportedScheduler",
    "affine",
    "coefficients",
    "ddim",
    "ddpm",
    "euler_ancestral",
    "flow_match_euler",
    "flow_match_sde",
    "has_posterior",
    "is_diffusion",
    "log_snr",
    "memoryless",
    "posterior",
    "progress",
    "sample",
    "share_of_noise",
]


class UnsupportedScheduler(ValueError):
    """The scheduler's step, as it is configured, has no posterior `N(mean, variance)`."""


# -- the families -----------------------------------------------------------------------------------------------------


def ddpm(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch predicted *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
) -> Gaussian:
    """DDPM's `p(x_{t-1} | x_t)` (Ho et al. 2020, equations 6, 7 and 15; learned variance: Nichol & Dhariwal 2021).

    The variance is zero at t = 0, and clamped to 1e-20 from below elsewhere, as in diffusers. With a learned variance
    `model_output` has twice the sample's channels, and the variance the sample's shape.
    """
    t = int(first(timestep))
    t_prev = int(scheduler.previous_timestep(t))
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_prev = scheduler.alphas_cumprod[t_prev] if t_prev >= 0 else scheduler.one
    alpha = alpha_bar / alpha_bar_prev

    predicted = None
    if _learns_variance(scheduler) and model_output.shape[1] == 2 * sample.shape[1]:
        model_output, predicted = model_output.split(sample.shape[1], dim=1)
    x_0 = _clipped(scheduler, _x_0(scheduler, model_output, sample, alpha_bar))

    mean = (alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar)) * x_0
    mean = mean + (alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)) * sample
    if t == 0:
        return _gaussian(mean, torch.zeros(()))
    small = torch.clamp((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha), min=1e-20)
    return _gaussian(mean, _ddpm_variance(scheduler, small, 1 - alpha, predicted))


def ddim(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch channel *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
    eta: float | int = 0.0,
    use_clipped_model_output: bool = False,
) -> Gaussian:
    """DDIM at any η (Song et al. 2021, equations 12 and 16); the variance is zero at η = 0."""
    t = int(first(timestep))
    t_prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_prev = scheduler.alphas_cumprod[t_prev] if t_prev >= 0 else scheduler.final_alpha_cumprod

    unclipped = _x_0(scheduler, model_output, sample, alpha_bar)
    x_0 = _clipped(scheduler, unclipped)
    if scheduler.config.prediction_type == "epsilon" and not use_clipped_model_output:
        epsilon = model_output
    elif scheduler.config.prediction_type == "v_prediction" and not use_clipped_model_output:
        epsilon = alpha_bar**0.5 * model_output + (1 - alpha_bar) ** 0.5 * sample
    else:
        epsilon = sample - alpha_bar**0.5 * (x_0 if use_clipped_model_output else unclipped)
        epsilon = epsilon / (1 - alpha_bar) ** 0.5

    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
    mean = alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev - sigma**2) ** 0.5 * epsilon
    return _gaussian(mean, sigma**2 if eta > 0 else torch.zeros(()))


def euler_ancestral(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch channel *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
) -> Gaussian:
    """k-diffusion's ancestral Euler step: an Euler step to `sigma_down`, then noise of scale `sigma_up`."""
    i = index_of(scheduler, timestep)
    sigma, sigma_to = scheduler.sigmas[i], scheduler.sigmas[i + 1]
    x = sample.to(torch.float32)
    if scheduler.config.prediction_type == "epsilon":
        denoised = x - sigma * model_output
    elif scheduler.config.prediction_type == "v_prediction":
        denoised = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    else:
        raise _unknown_prediction(scheduler)
    sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
    sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
    mean = x + (x - denoised) / sigma * (sigma_down - sigma)
    return _gaussian(mean.to(model_output.dtype), sigma_up**2)


def flow_match_euler(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch channel *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
) -> Gaussian:
    """diffusers' flow-matching Euler step; `stochastic_sampling` noises the estimate of x_0 anew, else no variance."""
    i = index_of(scheduler, timestep)
    sigma, sigma_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
    x = sample.to(torch.float32)
    if scheduler.config.stochastic_sampling:
        mean = (1 - sigma_next) * (x - sigma * model_output)
        return _gaussian(mean.to(model_output.dtype), sigma_next**2)
    mean = x + (sigma_next - sigma) * model_output
    return _gaussian(mean.to(model_output.dtype), torch.zeros(()))


def flow_match_sde(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch channel *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
) -> Gaussian:
    """The step of `schedulers.FlowMatchSDEScheduler`, which writes it out."""
    carry, gain, s = scheduler.transition(index_of(scheduler, timestep))
    mean = carry * sample.float() + gain * model_output.float()
    return _gaussian(mean.to(model_output.dtype), torch.tensor(s**2))


# By the `step` that a class has, not by the class: a subclass with a step of its own has a posterior of its own.
_FAMILIES: dict[Any, Callable[..., Gaussian]] = {
    DDPMScheduler.step: ddpm,
    DDPMParallelScheduler.step: ddpm,
    DDIMScheduler.step: ddim,
    DDIMParallelScheduler.step: ddim,
    EulerAncestralDiscreteScheduler.step: euler_ancestral,
    FlowMatchEulerDiscreteScheduler.step: flow_match_euler,
    inspect.unwrap(FlowMatchSDEScheduler.step): flow_match_sde,
}


def _x_0(scheduler: SchedulerMixin, output: Tensor, sample: Tensor, alpha_bar: Tensor) -> Tensor:
    match scheduler.config.prediction_type:
        case "epsilon":
            return (sample - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5
        case "sample":
            return output
        case "v_prediction":
            return alpha_bar**0.5 * sample - (1 - alpha_bar) ** 0.5 * output
    raise _unknown_prediction(scheduler)


def _clipped(scheduler: SchedulerMixin, x_0: Tensor) -> Tensor:
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(x_0)
    if scheduler.config.clip_sample:
        return x_0.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return x_0


def _ddpm_variance(scheduler: SchedulerMixin, small: Tensor, large: Tensor, predicted: Tensor | None) -> Tensor:
    match scheduler.config.variance_type, predicted:
        case (("fixed_small" | "fixed_small_log"), _):
            return small
        case "fixed_large", _:
            return large
        case "learned", Tensor():
            return predicted.float()
        case "learned_range", Tensor():
            fraction = (predicted.float() + 1) / 2
            return torch.exp(fraction * torch.log(large) + (1 - fraction) * torch.log(small))
    raise UnsupportedScheduler(
        f"the scheduler expects a learned variance (variance_type={scheduler.config.variance_type!r}), but the model "
        "output has no channels for one (twice the sample's); set the scheduler's variance_type='fixed_small'."
    )


def _learns_variance(scheduler: SchedulerMixin) -> bool:
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def _gaussian(mean: Tensor, variance: Tensor) -> Gaussian:
    """`variance` with as many dimensions as `mean`, on its device, and never in half precision."""
    shape = variance.shape if variance.ndim else [1] * mean.ndim
    return Gaussian(mean, variance.reshape(shape).to(mean.device, torch.promote_types(variance.dtype, torch.float32)))


def _unknown_prediction(scheduler: SchedulerMixin) -> UnsupportedScheduler:
    return UnsupportedScheduler(
        f"{type(scheduler).__name__} with prediction_type={scheduler.config.prediction_type!r} cannot take a step."
    )


# -- any scheduler ----------------------------------------------------------------------------------------------------


def posterior(
    scheduler: SchedulerMixin,
    model_output: Float[Tensor, "batch predicted *latent"],
    timestep: Timestep,
    sample: Float[Tensor, "batch channel *latent"],
    **step_kwargs: Any,
) -> Gaussian:
    """Mean and variance of the sample that `scheduler.step(model_output, timestep, sample, **step_kwargs)` would draw.

    The mean has the dtype that `step` would return; the variance is float32 at least, and has as many dimensions as the
    mean: all ones (one number), or the mean's shape where it is learned. The scheduler is not changed. `step_kwargs`
    are those that shape the distribution, `eta` and `use_clipped_model_output` of DDIM.

    Raises:
        UnsupportedScheduler: the scheduler has no such posterior (see `has_posterior`).
    """
    if not has_posterior(scheduler):
        raise _no_posterior(scheduler)
    return _family(scheduler)(scheduler, model_output, timestep, sample, **step_kwargs)


def has_posterior(scheduler: SchedulerMixin) -> bool:
    """Whether `posterior` knows this scheduler's step: DDPM, DDIM, Euler ancestral, flow matching (Euler and SDE).

    Not DDPM's `fixed_large_log`, for which diffusers' own step gives NaN (it takes the root of a logarithm).
    """
    return _family(scheduler) is not None and scheduler.config.get("variance_type") != "fixed_large_log"


def affine(scheduler: SchedulerMixin) -> tuple[bool, str]:
    """Whether mixing predictions gives the mixture of posteriors, and why, in words.

    True where the step is affine in the model output with a variance that does not depend on it: then both models have
    the same variance, and one step with the mixed output is the mixture. Also true where a step has no posterior of its
    own (deterministic in several stages or steps, or noised in some other way): there, mixed predictions *are* the
    definition. False for `clip_sample`, `thresholding` and learned variances of a scheduler that has posteriors.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    bends = [switch for switch in ("thresholding", "clip_sample") if config.get(switch)]
    if not has_posterior(scheduler):
        but = f" although {' and '.join(bends)} can make its step nonlinear in the prediction" if bends else ""
        return True, f"{name} has no posterior of a single step: mixing predictions is the definition{but}."
    if _learns_variance(scheduler):
        bends.append(f"variance_type={config.variance_type!r}")
    if bends:
        return False, f"{name}'s step is not affine in the prediction, because of {' and '.join(bends)}."
    return True, f"{name}'s step is affine in the prediction, with a variance that does not depend on it."


class Coefficients(NamedTuple):
    """One affine step as numbers: `mean = carry · x_t + gain · model_output`, and its variance."""

    carry: float
    gain: float
    variance: float


def coefficients(scheduler: SchedulerMixin, timestep: Timestep, **step_kwargs: Any) -> Coefficients:
    """What an affine step does to sample and prediction, read off by applying it to one and to zero.

    Raises `UnsupportedScheduler` as `posterior` does; means nothing where the step is not `affine`.
    """
    unit = torch.eye(2)
    mean, variance = posterior(scheduler, unit[1][:, None], timestep, unit[0][:, None], **step_kwargs)
    carry, gain = mean.flatten().tolist()
    return Coefficients(carry, gain, float(variance))


def is_diffusion(scheduler: SchedulerMixin, eta: float | int = 0.0) -> bool:
    """Whether the step is one of a discretised diffusion, with Gaussian noise of its own that shrinks with the step.

    DDPM, Euler ancestral, DDIM at η > 0, and our own flow-matching SDE at η > 0. Not diffusers' stochastic
    flow-matching step, which noises its estimate of x_0 all anew at every step, however small.
    """
    return has_posterior(scheduler) and share_of_noise(scheduler, eta) > 0


def memoryless(scheduler: SchedulerMixin, eta: float | int = 0.0) -> bool:
    """Whether the image is independent of the starting noise: DDPM, Euler ancestral, and the others at η = 1.

    Only there is the density of the anchor's path relative to the reference's a function of the image alone, the
    anchor's implicit reward (Domingo-Enrich et al. 2024, arXiv 2409.08861, call this noise schedule memoryless).
    """
    return has_posterior(scheduler) and share_of_noise(scheduler, eta) == 1


def share_of_noise(scheduler: SchedulerMixin, eta: float) -> float:
    """η of the step: 0 is deterministic, 1 memoryless."""
    family = _family(scheduler)
    if family is flow_match_sde:
        return scheduler.config.eta
    return eta if family is ddim else float(family in (ddpm, euler_ancestral))


def sample(
    scheduler: SchedulerMixin,
    gaussian: Gaussian,
    timestep: Timestep,
    generator: torch.Generator | list[torch.Generator] | None = None,
    variance_noise: Float[Tensor, "batch *latent"] | None = None,
    *,
    eta: float | int = 0.0,
) -> Float[Tensor, "batch *latent"]:
    """Take the scheduler's step to a draw from `gaussian`: what `step` would return if this were its posterior.

    Noise is drawn as `step` draws it (the same call on the same generator or list of generators, and none where `step`
    draws none), so with the same seed both give the same sample; the scheduler's `step_index` advances as in `step`.

    Args:
        scheduler: one that has posteriors.
        gaussian: the mean and variance to draw from, the mean in the pipeline's dtype.
        timestep: the timestep that `step` was called with.
        generator: as in `step`.
        variance_noise: standard normal noise to use instead of drawing any, as in DDIM's `step`.
        eta: DDIM's η, which matters only for the state of the generator afterwards: at η > 0 `step` draws noise even
            where its scale is zero, at the last step.

    Raises:
        ValueError: both `generator` and `variance_noise` are given.
        UnsupportedScheduler: the scheduler has no posteriors.
    """
    family = _family(scheduler)
    mean, variance = gaussian
    if generator is not None and variance_noise is not None:
        raise ValueError("both generator and variance_noise are given; at least one must be None.")
    if family is ddpm:
        noisy = first(timestep) > 0
    elif family is ddim:
        noisy = eta > 0 or bool((variance > 0).any())
    elif family is euler_ancestral:
        noisy = True
    elif family is flow_match_euler:
        noisy = scheduler.config.stochastic_sampling
    elif family is flow_match_sde:
        noisy = bool((variance > 0).any())
        generator = generator if generator is not None else scheduler.generator
    else:
        raise _no_posterior(scheduler)

    drawn = mean
    if noisy:
        noise = variance_noise
        if noise is None:
            dtype = torch.float32 if family in (flow_match_euler, flow_match_sde) else mean.dtype
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=dtype)
        wide = torch.promote_types(mean.dtype, torch.float32)
        drawn = (mean.to(wide) + noise.to(mean.device, wide) * variance.to(wide).sqrt()).to(mean.dtype)
    if hasattr(scheduler, "_step_index"):
        if scheduler._step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._step_index += 1
    return drawn


def _family(scheduler: SchedulerMixin) -> Any:
    return _FAMILIES.get(inspect.unwrap(type(scheduler).step))


def _no_posterior(scheduler: SchedulerMixin) -> UnsupportedScheduler:
    variance_type = scheduler.config.get("variance_type")
    nan = f" with variance_type={variance_type!r}, for which its own step gives NaN," if _family(scheduler) else ""
    return UnsupportedScheduler(
        f"{type(scheduler).__name__}{nan} has no posterior N(mean, variance) of a single step; mix predictions, or use "
        "DDPM, DDIM, Euler ancestral or flow-matching Euler."
    )
