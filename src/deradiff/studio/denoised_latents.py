"""What a step was heading for: the estimate of x_0 behind its prediction."""

from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.clean_estimates import clean_estimate
from deradiff.algorithm.step import StepRecord, mixed


def denoised(scheduler: SchedulerMixin, step: StepRecord) -> Float[Tensor, "batch channel *latent"] | None:
    """The estimate of x_0 that a step was taken from; None where the scheduler does not say what it predicts."""
    x = step.sample.float()
    output = mixed(step.predictions, step.mixture_weights).float()[:, : x.shape[1]]
    return clean_estimate(scheduler, output, x, step.log_snr)
