"""Where in its run a scheduler is: the fraction of steps done, the diffusion time, the signal-to-noise ratio.

Steps are not counted, because no count is right: Heun, KDPM2 and PNDM evaluate the model more than once per step,
img2img starts inside the list, and some pipelines call the denoiser several times for one prediction. What is asked
instead is which entry of `scheduler.timesteps` the run has come to.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import KDPM2AncestralDiscreteScheduler, SchedulerMixin
from torch import Tensor

from deradiff.algorithm.lams import Lams
from deradiff.algorithm.schedules import Progress

Timestep = float | int | Tensor

ROUNDING = 2**-8
"""By how much of itself half precision may round a timestep."""


class _Clock(NamedTuple):
    timesteps: tuple[float, ...]
    ranks: tuple[int, ...]
    """How many distinct timesteps come before each. Second evaluations of a step repeat its timestep, and so do
    RePaint's ways back to more noise and down again."""
    places: Mapping[float, int]
    """Where each timestep is. Of equal ones diffusers' `index_for_timestep` takes the second, for runs that start in
    mid-schedule."""


def progress(scheduler: SchedulerMixin, timestep: Timestep) -> Progress:
    """How far the run is, seen by the denoiser: call it with the timestep the denoiser was given, *before* `step`.

    `steps` is the rank of the present timestep among the distinct ones of the *whole* schedule, divided by their
    number. So Heun's and PNDM's repeated evaluations at a timestep count once, img2img at strength 0.5 starts at about
    0.5, and an SDXL base that ends at `denoising_end` leaves off where its refiner begins. (KDPM2's intermediate
    evaluations have timesteps of their own, and count.)

    `time` is `1 - t/T` of the diffusion time; for EDM schedules, whose timestep is no time, the position in their own
    parametrisation of noise, `(σ_max^(1/ρ) - σ^(1/ρ)) / (σ_max^(1/ρ) - σ_min^(1/ρ))` (Karras et al. 2022, equation 5),
    or its logarithmic counterpart.

    The scheduler's own index is believed where there is one. Otherwise (DDIM, DDPM, PNDM, and any first step) the
    nearest entry of `scheduler.timesteps` is the present one: the argument may be a batch of equal timesteps, rounded
    to half precision, or divided by `num_train_timesteps`, as Flux has it.
    """
    return progress_at(scheduler, index_of(scheduler, timestep))


def progress_at(scheduler: SchedulerMixin, i: int) -> Progress:
    """`progress` at the i-th of the scheduler's timesteps."""
    clock = _clock(_timesteps(scheduler))
    steps = max(clock.ranks) + (0 if _lists_the_end(scheduler) else 1)
    return Progress(steps=clock.ranks[i] / steps, time=_time(scheduler, i, clock.timesteps[i]))


def log_snr(scheduler: SchedulerMixin, timestep: Timestep) -> float:
    """`log(α²/σ²)` of the sample x_t that the scheduler holds at this timestep, before `step`.

    α² = ᾱ, σ² = 1 - ᾱ for DDIM, DDPM, PNDM and their kind; α = 1 for the Euler family, Heun, KDPM2, LMS and EDM;
    α = 1 - σ for flow matching; the multistep solvers convert their σ themselves. Infinite at zero noise or zero
    signal, and NaN for a scheduler that keeps neither ᾱ nor σ.
    """
    return log_snr_at(scheduler, index_of(scheduler, timestep), timestep)


def next_log_snr(scheduler: SchedulerMixin, i: int) -> float | None:
    """`log_snr` of what `step` from the i-th timestep will lead to: ask before `step`. None at the last step.

    For schedulers that evaluate once per step; of the others nobody knows before where the next evaluation is.
    """
    timesteps = _clock(_timesteps(scheduler)).timesteps
    return log_snr_at(scheduler, i + 1, timesteps[i + 1]) if i + 1 < len(timesteps) else None


def log_snr_at(scheduler: SchedulerMixin, i: int, timestep: Timestep) -> float:
    """`log_snr` at the i-th of the scheduler's timesteps, which is `timestep`."""
    if _is_trigonometric(scheduler):
        angle = float(scheduler.timesteps[i])
        return 2 * (_log(math.cos(angle)) - _log(math.sin(angle)))
    if not hasattr(scheduler, "sigmas"):
        if not hasattr(scheduler, "alphas_cumprod"):
            return math.nan
        alpha_bar = float(scheduler.alphas_cumprod[round(first(timestep))])
        return _log(alpha_bar) - _log(1 - alpha_bar)
    sigma = _sigma(scheduler, i)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = map(float, scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma, dtype=torch.float64)))
    elif hasattr(scheduler, "alphas_cumprod") or "sigma_data" in scheduler.config:
        alpha = 1.0
    else:
        sigma = 1 - sigma if scheduler.config.get("invert_sigmas") else sigma
        alpha = 1 - sigma
    return 2 * (_log(alpha) - _log(sigma))


def weight_clock(scheduler: SchedulerMixin, log_snr: float | int) -> float:
    """The time in which log weights run: `H` with `½ ||ε_i - ε_j||² d log SNR = ||out_i - out_j||² dH`.

    ε differs by `k(SNR)` times the difference of the outputs, and `H = ½ ∫ k² d log SNR` in closed form: so a step
    from pure noise, where log SNR is infinite, weighs what it should. NaN where SNR or parametrisation are not known.

        ε: k = 1         v: k² = α² = σ(log SNR)         x_0: k² = SNR
        flow matching: k = 1 - t = σ(½ log SNR)          EDM: k² = σ_d²/(σ_t² + σ_d²) = σ(log SNR + 2 log σ_d)
    """
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return _softplus(log_snr / 2) - _sigmoid(log_snr / 2)
    if _is_trigonometric(scheduler):
        return math.nan
    if "sigma_data" in scheduler.config:
        return _softplus(log_snr + 2 * math.log(scheduler.config.sigma_data)) / 2
    match prediction:
        case "epsilon":
            return log_snr / 2
        case "v_prediction":
            return _softplus(log_snr) / 2
        case "sample":
            return math.exp(min(log_snr, 700.0)) / 2
    return math.nan


def strengths(lams: Lams, scheduler: SchedulerMixin) -> list[float]:
    """λ at every timestep of a run, averaged over images: one for a constant λ."""
    timesteps = scheduler.timesteps.tolist()
    if lams.is_constant:
        return [1.0] * len(timesteps)
    at = [lams.at(progress_at(scheduler, i), lams.images or 1) for i in range(len(timesteps))]
    return [float(lam.abs().sum(0).mean()) for lam in at]


def impacts(scheduler: SchedulerMixin) -> list[float]:
    """How much an error of the prediction at each timestep moves the final latents, up to a common factor.

    A step of length dσ moves `x` by `ε dσ`, and later steps shrink what was moved at noise σ by `1/sqrt(1 + σ²)` where
    latents have unit variance: so `d asinh(σ)` for a predicted ε, σ in units of the signal. For other predictions ε is
    scaled by about the signal's share, which makes it the angle, `d atan(σ)`.
    """
    at = [log_snr_at(scheduler, i, t) for i, t in enumerate(scheduler.timesteps.tolist())]
    epsilon = scheduler.config.get("prediction_type", "epsilon") == "epsilon" and "sigma_data" not in scheduler.config
    return impacts_at(at, epsilon and not type(scheduler).__name__.startswith("FlowMatch"))


def impacts_at(log_snrs: Sequence[float], epsilon: bool) -> list[float]:
    """`impacts` of steps that are taken from these log(α²/σ²), of a predicted ε or of something else.

    All alike where one is NaN.
    """
    if any(math.isnan(snr) for snr in log_snrs):
        return [1.0] * len(log_snrs)
    along = [_position(snr, epsilon) for snr in log_snrs] + [0.0]
    lengths = [abs(b - a) for a, b in pairwise(along)]
    # Schedulers that evaluate twice at a timestep make no step at one of the two: neighbours share.
    return [(lengths[max(i - 1, 0)] + length) / 2 for i, length in enumerate(lengths)]


def _position(log_snr: float, epsilon: bool) -> float:
    sigma = math.exp(min(-log_snr / 2, 700.0)) if log_snr > -math.inf else math.inf
    if not epsilon:
        return math.atan(sigma)
    return math.asinh(min(sigma, 1e6))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def index_of(scheduler: SchedulerMixin, timestep: Timestep | None) -> int:
    """The position in `scheduler.timesteps`: the scheduler's own index, or the entry that is `timestep`.

    A scheduler that counts its steps knows its index from the second on; at the first, a timestep that is no entry of
    the list means its beginning, for some denoisers are told a time that runs the other way (Lumina, Z-Image), or none.
    Raises `ValueError` where neither knows.
    """
    timesteps, _, places = _clock(_timesteps(scheduler))
    for known in (getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)):
        if known is not None:
            return min(int(known), len(timesteps) - 1)
    counts = hasattr(scheduler, "step_index")
    if timestep is None:
        if not counts:
            raise ValueError(
                f"{type(scheduler).__name__} does not count its steps and the denoiser is not told the timestep: "
                "nobody knows where in the run a step is. Use another scheduler"
            )
        return 0
    t = first(timestep)
    scaled = t * _duration(scheduler) if max(timesteps) > 1 >= t >= 0 else t  # may be t/T
    if (place := places.get(t)) is not None:
        # PRX tells 1 for T, and 1 may be the last entry: a run that is counted begins with the first of both.
        return min(place, places.get(scaled, place)) if counts else place
    distances = min(([abs(entry - time) for entry in timesteps] for time in (t, scaled)), key=min)
    least = min(distances)
    nearest = timesteps[distances.index(least)]
    if counts and least > ROUNDING * max(abs(nearest), least):
        return 0
    return places[nearest]


def _timesteps(scheduler: SchedulerMixin) -> Tensor:
    if scheduler.timesteps is None:
        raise ValueError(f"{type(scheduler).__name__} has no timesteps yet; call its set_timesteps first.")
    return torch.as_tensor(scheduler.timesteps)


@lru_cache(maxsize=16)
def _clock(timesteps: Tensor) -> _Clock:
    """Kept per tensor (tensors are told apart by identity), so that a schedule on a GPU is read once per run."""
    values = tuple(timesteps.tolist())
    order = {value: rank for rank, value in enumerate(dict.fromkeys(values))}
    places: dict[float, int] = {}
    for i, value in enumerate(values):
        places[value] = i if value not in places or values[:i].count(value) == 1 else places[value]
    return _Clock(values, tuple(order[value] for value in values), places)


def _time(scheduler: SchedulerMixin, i: int, timestep: float) -> float:
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    if _is_trigonometric(scheduler):
        time = 1 - timestep / (math.pi / 2)
    elif "sigma_data" in config or continuous:
        least = config.get("sigma_min") or float(scheduler.sigmas[-2])
        most = config.get("sigma_max") or float(scheduler.sigmas[0])
        exponential = config.get("sigma_schedule") == "exponential" or config.get("use_exponential_sigmas")
        rho = config.get("rho", 7.0)
        start, now, end = (math.log(s) if exponential else s ** (1 / rho) for s in (most, _sigma(scheduler, i), least))
        time = (start - now) / (start - end)
    else:
        time = 1 - timestep / _duration(scheduler)
        time = 1 - time if config.get("invert_sigmas") else time
    return min(max(time, 0.0), 1.0)


def _duration(scheduler: SchedulerMixin) -> float:
    """T, the timestep of pure noise; schedulers that count no training steps (Würstchen's) let t run from 1 to 0."""
    return float(scheduler.config.get("num_train_timesteps", 1))


def _is_trigonometric(scheduler: SchedulerMixin) -> bool:
    """Whether timesteps are angles, as in TrigFlow: `x_t = cos(t) x_0 + sin(t) z` (Lu and Song 2024, of SCM)."""
    return not hasattr(scheduler, "sigmas") and "sigma_data" in scheduler.config


def _lists_the_end(scheduler: SchedulerMixin) -> bool:
    """Whether the last timestep is only where the last step leads to, never visited.

    SCM's and Würstchen's, and that of a scheduler with no more σ than timesteps (LTX's ancestral one, told its σ).
    """
    if _is_trigonometric(scheduler) or "num_train_timesteps" not in scheduler.config:
        return True
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas is not None and len(sigmas) == len(scheduler.timesteps)


def _sigma(scheduler: SchedulerMixin, i: int) -> float:
    """σ of the sample that is held: in the second stage of KDPM2 and DPM-Solver SDE, that of the point in between."""
    if not getattr(scheduler, "state_in_first_order", True):
        if getattr(scheduler, "mid_point_sigma", None) is not None:
            return float(scheduler.mid_point_sigma)
        if hasattr(scheduler, "sigmas_interpol"):
            return float(scheduler.sigmas_interpol[i - isinstance(scheduler, KDPM2AncestralDiscreteScheduler)])
    return float(scheduler.sigmas[i])


def first(timestep: Timestep) -> float:
    """The timestep as a number; pipelines give one number, or one per image, all the same.

    Video models are told one per token, of which those of a given frame are without noise: the others' is meant.
    """
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
