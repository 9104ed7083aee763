"""What a step was heading for: the estimate of x_0 behind its prediction."""

import math

from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.step import StepRecord, mixed


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
