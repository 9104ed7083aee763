"""One step from the guided predictions of several models: Algorithm 1 of DeRaDiff, lines 9 to 14."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import geometric_mixture
from deradiff.algorithm.schedules import Progress

Space = Literal["prediction", "posterior"]


@dataclass(frozen=True)
class StepRecord:
    """What one step was taken from (Algorithm 1, lines 7 to 12).

    `predictions` are the guided predictions of the models that were evaluated, in the order of `models`, in whatever
    the scheduler predicts (ε, v, x_0 or flow velocity); `mixture_weights` are theirs, per image or for all (one
    column). `sample` is x_t as the scheduler holds it, `log_snr` its log(α²/σ²); `timestep` is the `at`-th of its
    timesteps.
    """

    models: tuple[str, ...]
    predictions: Float[Tensor, "model batch predicted *latent"]
    mixture_weights: Float[Tensor, "model #batch"]
    sample: Float[Tensor, "batch channel *latent"]
    timestep: Any
    at: int
    log_snr: float
    progress: Progress


def space_of(scheduler: SchedulerMixin, asked: Literal["auto", "prediction", "posterior"]) -> tuple[Space, str]:
    """Where to mix with `scheduler`, and why in words.

    Predictions wherever the step is affine in them and its variance does not depend on them: both ways are the same
    there, and one step is enough. Posteriors elsewhere. Raises `ValueError` where posteriors are asked for and the
    scheduler's step has none.
    """
    if asked == "posterior" and not posteriors.has_posterior(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} has no per-step posterior to mix (deterministic, multistep or two-stage): "
            "mixing predictions is the definition there: use path='auto' or 'prediction', or one of DDPM, DDIM, Euler "
            "ancestral and flow-matching Euler"
        )
    if asked != "auto":
        return asked, "as asked for"
    affine, reason = posteriors.affine(scheduler)
    return ("prediction" if affine else "posterior"), reason


def mixed_step(
    scheduler: SchedulerMixin, own_step: Callable[..., Any], arguments: dict[str, Any], step: StepRecord, space: Space
) -> Any:
    """Take the scheduler's step from the mixture; returns what `own_step(**arguments)` would.

    Noise is drawn as the scheduler itself would draw it, so that both spaces agree sample by sample where they agree in
    theory.
    """
    if space == "prediction":
        return own_step(**{**arguments, "model_output": mixed(step.predictions, step.mixture_weights)})
    settings = {key: arguments[key] for key in ("eta", "use_clipped_model_output") if key in arguments}
    gaussians = [
        posteriors.posterior(scheduler, prediction, step.timestep, step.sample, **settings)
        for prediction in step.predictions
    ]
    mixture = geometric_mixture(
        torch.stack([gaussian.mean for gaussian in gaussians]),
        torch.stack([gaussian.variance.expand_as(gaussian.mean) for gaussian in gaussians]),
        per_element(step.mixture_weights, step.predictions),
    )
    previous = posteriors.sample(
        scheduler,
        mixture,
        step.timestep,
        arguments.get("generator"),
        arguments.get("variance_noise"),
        eta=settings.get("eta", 0.0),
    )
    return SchedulerOutput(prev_sample=previous) if arguments.get("return_dict", True) else (previous,)


def mixed(
    predictions: Float[Tensor, "model batch *latent"], weights: Float[Tensor, "model #batch"]
) -> Float[Tensor, "batch *latent"]:
    """`Σ_k weights[k] predictions[k]`, in single precision at least; an image whose weights are one-hot is exact."""
    wide = torch.promote_types(predictions.dtype, torch.float32)
    mixture = (per_element(weights, predictions).to(wide) * predictions.to(wide)).sum(0)
    return mixture.to(predictions.dtype)


def with_reference_weight(lams: Float[Tensor, "anchor batch"]) -> Float[Tensor, "model batch"]:
    """Weights of all models, the reference's `1 - Σ λ` first; what is zero but for rounding is zero."""
    reference = 1 - lams.sum(0, keepdim=True)
    return torch.cat([reference.where(reference.abs() > 1e-12, torch.zeros_like(reference)), lams])


def per_element(
    weights: Float[Tensor, "model #batch"], predictions: Float[Tensor, "model batch predicted *latent"]
) -> Float[Tensor, "model #batch ..."]:
    """`weights` on the predictions' device, with as many axes as they have."""
    dtype = torch.float32 if predictions.device.type == "mps" else weights.dtype  # Apple's GPUs have no float64
    return weights.to(predictions.device, dtype).reshape(*weights.shape, *[1] * (predictions.ndim - 2))


def denoised(scheduler: SchedulerMixin, step: StepRecord) -> Float[Tensor, "batch channel *latent"] | None:
    """The estimate of x_0 that a step was taken from; None where the scheduler does not say what it predicts.

    `x_t = α x_0 + σ ε` as the scheduler holds it, α² and σ² from `log_snr`: α = 1 for the Euler family, α + σ = 1 for
    flow matching, α² + σ² = 1 elsewhere.
    """
    if not math.isfinite(step.log_snr):
        return None
    ratio = math.exp(-step.log_snr / 2)  # σ/α
    x = step.sample.float()
    output = mixed(step.predictions, step.mixture_weights).float()[:, : x.shape[1]]
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name.startswith("FlowMatch"):
        return x - ratio / (1 + ratio) * output
    if "sigma_data" in scheduler.config:
        return None
    alpha = 1 / math.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        x = x * alpha
    match prediction:
        case "epsilon":
            return (x - sigma * output) / alpha
        case "v_prediction":
            return alpha * x - sigma * output
        case "sample":
            return output
    return None
