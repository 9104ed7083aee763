"""What a scheduler's reverse step is as `N(mean, variance)`, whichever family it is of (`posterior_families`).

`posterior` says what the scheduler's own `step` would draw from, `sample` then takes the step that `step` would have
taken. Every other scheduler's step either has no noise of its own or combines several evaluations: it has no per-step
posterior, and mixing predictions is the definition there.
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
from deradiff.algorithm.noise_levels import Timestep, first
from deradiff.algorithm.posterior_families import (
    UnsupportedScheduler,
    ddim,
    ddpm,
    euler_ancestral,
    flow_match_euler,
    flow_match_sde,
    learns_variance,
)
from deradiff.schedulers import FlowMatchSDEScheduler

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
    if learns_variance(scheduler):
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
