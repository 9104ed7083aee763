"""What a prediction says about the image without noise: the estimate of x_0 behind it."""

from __future__ import annotations

import math
from typing import NamedTuple

from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor


class NoiseScales(NamedTuple):
    """`x_t = alpha x_0 + sigma ε`, for x_t as its scheduler holds it."""

    alpha: float
    sigma: float


def noise_scales(scheduler: SchedulerMixin, log_snr: float | int) -> NoiseScales:
    """α and σ at `log_snr` = log(α²/σ²), which may be infinite: α = 1 for the Euler family, α + σ = 1 for flow
    matching, α² + σ² = 1 elsewhere. Not for EDM, whose predictions are scaled by something else.
    """
    ratio = math.exp(-log_snr / 2)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return NoiseScales(1 / (1 + ratio), ratio / (1 + ratio))
    if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return NoiseScales(1.0, ratio)
    alpha = 1 / math.sqrt(1 + ratio**2)
    return NoiseScales(alpha, ratio * alpha)


def clean_estimate(
    scheduler: SchedulerMixin,
    prediction: Float[Tensor, "batch channel *latent"],
    sample: Float[Tensor, "batch channel *latent"],
    log_snr: float | int,
) -> Float[Tensor, "batch channel *latent"] | None:
    """The estimate of x_0 behind a prediction at `sample`, x_t as the scheduler holds it; differentiable in both.

    None where log SNR is not finite, and where the scheduler does not say what it predicts.
    """
    if not math.isfinite(log_snr) or "sigma_data" in scheduler.config:
        return None
    alpha, sigma = noise_scales(scheduler, log_snr)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return sample - sigma * prediction
    size = math.hypot(alpha, sigma)
    match scheduler.config.get("prediction_type"):
        case "epsilon":
            return (sample - sigma * prediction) / alpha
        case "v_prediction":  # of the sample scaled to unit variance
            return (alpha * sample / size - sigma * prediction) / size
        case "sample":
            return prediction
    return None
