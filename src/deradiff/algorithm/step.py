"""Algorithm 1 of DeRaDiff: what happens at one step, once every model has made its guided prediction.

    7:  ε_ref ← the reference's guided prediction at x_t             made by the pipeline, with its own guidance:
    8:  ε_tuned ← the aligned model's                                `StepRecord.predictions`
    9:  μ_1, σ_1² ← SchedulerPosterior(x_t, ε_ref, t, t_prev)        `posteriors.posterior`
   10:  μ_2, σ_2² ← SchedulerPosterior(x_t, ε_tuned, t, t_prev)
   11:  σ_new² ← ((1 - λ) / σ_1² + λ / σ_2²)⁻¹                       `gaussian.geometric_mixture`
   12:  μ_new ← σ_new² ((1 - λ) / σ_1² μ_1 + λ / σ_2² μ_2)
   13:  z ~ N(0, I)                                                  `posteriors.sample`
   14:  x_prev ← μ_new + z √σ_new²

`realigned_posterior` is lines 9 to 12 for any number of anchors, `mixed_step` the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import Gaussian, geometric_mixture
from deradiff.algorithm.schedules import Progress

Space = Literal["prediction", "posterior"]


@dataclass(frozen=True)
class StepRecord:
    """What one step is taken from (Algorithm 1, lines 7 and 8).

    `predictions` are the guided predictions of the models that were evaluated, in the order of `models`, in whatever
    the scheduler predicts (ε, v, x_0 or flow velocity); `mixture_weights` are theirs, per image or for all (one
    column). `sample` is x_t as the scheduler holds it, `log_snr` its log(α²/σ²); `timestep` is the `at`-th of its
    timesteps. `settings` shape the step's distribution: `eta` and `use_clipped_model_output` of DDIM.
    """

    models: tuple[str, ...]
    predictions: Float[Tensor, "model batch predicted *latent"]
    mixture_weights: Float[Tensor, "model #batch"]
    sample: Float[Tensor, "batch channel *latent"]
    timestep: Any
    at: int
    log_snr: float
    progress: Progress
    settings: Mapping[str, Any] = field(default_factory=dict)


class RealignedPosterior(NamedTuple):
    """The distribution of x_prev: every model's own, and their geometric mixture."""

    models: list[Gaussian]
    mixture: Gaussian


def mixed_step(
    scheduler: SchedulerMixin,
    own_step: Callable[..., Any],
    arguments: Mapping[str, Any],
    step: StepRecord,
    space: Space,
    observe: Callable[[RealignedPosterior | None], None],
) -> Any:
    """Take the scheduler's step from the mixture (Algorithm 1); returns what `own_step(**arguments)` would.

    In the space of predictions the scheduler's own step from the mixed prediction is lines 9 to 14 at once. Noise is
    drawn as the scheduler itself would draw it, so that both spaces agree sample by sample where they agree in theory.
    `observe` is handed the posterior before the scheduler moves on, None where none was made.
    """
    if space == "prediction":
        observe(None)
        return own_step(**{**arguments, "model_output": mixed(step.predictions, step.mixture_weights)})
    realigned = realigned_posterior(scheduler, step)
    observe(realigned)
    # Lines 13 and 14.
    previous = posteriors.sample(
        scheduler,
        realigned.mixture,
        step.timestep,
        arguments.get("generator"),
        arguments.get("variance_noise"),
        eta=step.settings.get("eta", 0.0),
    )
    return SchedulerOutput(prev_sample=previous) if arguments.get("return_dict", True) else (previous,)


def realigned_posterior(scheduler: SchedulerMixin, step: StepRecord) -> RealignedPosterior:
    """The models' posteriors and their mixture (Algorithm 1, lines 9 to 12), in the precision of the predictions.

    Raises what `posteriors.posterior` and `geometric_mixture` raise.
    """
    # Lines 9 and 10.
    gaussians = [
        posteriors.posterior(scheduler, prediction, step.timestep, step.sample, **step.settings)
        for prediction in step.predictions
    ]
    gaussians = [Gaussian(mean, variance.expand_as(mean)) for mean, variance in gaussians]
    # Lines 11 and 12.
    means, variances = (torch.stack(part) for part in zip(*gaussians, strict=True))
    mixture = geometric_mixture(means, variances, per_element(step.mixture_weights, step.predictions))
    return RealignedPosterior(gaussians, mixture)


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
