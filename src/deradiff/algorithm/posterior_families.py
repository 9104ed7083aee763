"""The posterior `N(mean, variance)` of each family of schedulers that has one, after the family's own arithmetic.

`ddpm`, `ddim`, `euler_ancestral`, `flow_match_euler`, `flow_match_sde`: each gives mean and variance of what the
scheduler's own `step` would return, and leaves the scheduler as it was.
"""

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.gaussian import Gaussian
from deradiff.algorithm.noise_levels import Timestep, first, index_of


class UnsupportedScheduler(ValueError):
    """The scheduler's step, as it is configured, has no posterior `N(mean, variance)`."""


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
    if learns_variance(scheduler) and model_output.shape[1] == 2 * sample.shape[1]:
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


def learns_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the model predicts the variance too, in further channels."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def _gaussian(mean: Tensor, variance: Tensor) -> Gaussian:
    """`variance` with as many dimensions as `mean`, on its device, and never in half precision."""
    shape = variance.shape if variance.ndim else [1] * mean.ndim
    return Gaussian(mean, variance.reshape(shape).to(mean.device, torch.promote_types(variance.dtype, torch.float32)))


def _unknown_prediction(scheduler: SchedulerMixin) -> UnsupportedScheduler:
    return UnsupportedScheduler(
        f"{type(scheduler).__name__} with prediction_type={scheduler.config.prediction_type!r} cannot take a step."
    )
