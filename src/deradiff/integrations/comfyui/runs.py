"""λ of a run, where a sampler is in it, and the mixture in the terms of denoised latents.

ComfyUI's samplers ask for `D(x, σ)`, the denoised latents, and know no model's own prediction. ε, v and the velocity of
a flow are affine in D at given x and σ, with the same coefficients for both models. So the mixture of denoised latents
is the mixture of predictions, and the step that a sampler takes from it is that of Algorithm 1 (DeRaDiff), lines 9 to
14, wherever its step is affine in the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.noise_levels import impacts_at
from deradiff.algorithm.schedules import Constant, Progress, Schedule, Spline, finite
from deradiff.algorithm.step import mixed, with_reference_weight
from deradiff.files.reading import parse
from deradiff.sampling.reuse import Reuse
from deradiff.sweep import notation

Method = Literal["mixture", "interpolate"]

CLOSE = 1e-4
"""Two noise levels that differ by less than this, relatively, are the same one: samplers compute theirs anew."""


@dataclass(frozen=True)
class DialSettings:
    """What a realigned model does: λ over the run, how, and with what error.

    Several `schedules` are a strip: a run for each of them, from one noise.
    """

    schedules: tuple[Schedule, ...]
    method: Method = "mixture"
    reuse: Reuse | None = None

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("a strip needs one λ at least")
        if self.method == "interpolate" and self.reuse is not None:
            raise ValueError("interpolated weights need one evaluation a step: there is no tolerance, set it to 0")


def schedule_of(
    lam: float,
    family: str = "constant",
    parameter: float = 2.0,
    curve: Schedule | None = None,
    values: Sequence[float] | float | None = None,
) -> Schedule:
    """λ over a run, from what the nodes have: a `family` (constant, power, step, sigmoid), a `curve`, or `values`.

    `values` are one per step, evenly spread over the run and smooth in between. `lam` multiplies each of them. Raises
    `ValueError` for a family that there is not, a parameter outside its range, and a curve and values at once.
    """
    lam = finite(lam, "λ")
    if curve is not None and values is not None:
        raise ValueError("λ has a curve and a list of values: connect one of the two")
    if curve is not None:
        return curve.scaled(lam)
    if values is not None:
        listed = [values] if isinstance(values, int | float) else list(values)
        numbers = [finite(value, "a value of λ's list") for value in listed]
        if not numbers:
            raise ValueError("λ's list of values is empty: it needs one per step")
        if len(numbers) == 1:
            return Constant(lam * numbers[0])
        return Spline([(i / len(numbers), value) for i, value in enumerate(numbers)]).scaled(lam)
    if family == "constant":
        return Constant(lam)
    if family not in notation.FAMILIES:
        raise ValueError(f"there is no schedule {family!r}: choose among constant, {', '.join(notation.FAMILIES)}")
    shape: Schedule = notation.FAMILIES[family][0](parameter)
    return shape.scaled(lam)


def curve_of(text: str) -> Schedule:
    """A curve from the JSON that the studio keeps, as in `{"schedule": "Power", "p": 2.0, "lam": 1.0}`.

    Raises `ValueError` for a text that is no such record.
    """
    what = "annealing curve of the studio's"
    record: Mapping[str, Any] = parse(dict[str, Any], text, "the node's text", what, "paste the file that it kept")
    return Schedule.from_dict(record)


@dataclass(frozen=True)
class RunClock:
    """Where in its run a sampler is, told by the noise level σ at which it asks.

    `sigmas` are the run's, with the one that it ends at; `time_of` is the model's own diffusion time at a σ, 0 at pure
    noise and 1 at the image.
    """

    sigmas: tuple[float, ...]
    time_of: Callable[[float], float]

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return max(len(self.sigmas) - 1, 1)

    def step(self, sigma: float) -> int:
        """The step that a prediction at `sigma` is for: the one that begins there, or that it lies in."""
        rising = self.sigmas[-1] > self.sigmas[0]
        ahead = [i for i, other in enumerate(self.sigmas) if _reached(sigma, other, rising)]
        return min(max(ahead, default=0), self.steps - 1)

    def begins(self, i: int, sigma: float) -> bool:
        """Whether `sigma` is where step i begins."""
        return abs(self.sigmas[i] - sigma) <= CLOSE * max(self.sigmas[i], sigma)

    def progress(self, i: int, sigma: float | None = None) -> Progress:
        """How far the run is in step i, at `sigma` or where it begins.

        By steps: `i/N` in a run from pure noise to the image. One that begins or ends in between (img2img, the second
        half of split σ) begins and ends at the model's own time there; a run that begins less than one of its steps
        from pure noise begins at 0, as diffusers counts it.
        """
        first, last = self.time_of(self.sigmas[0]), self.time_of(self.sigmas[-1])
        if first <= 1 / self.steps:
            first = 0.0
        along = first + (last - first) * i / self.steps
        return Progress(along, self.time_of(self.sigmas[i] if sigma is None else sigma))

    def impacts(self, flow: bool) -> list[float]:
        """Of every step, `noise_levels.impacts_at`: of ε, or of the velocity of a `flow`."""
        return impacts_at([_log_snr(sigma, flow) for sigma in self.sigmas[: self.steps]], not flow)


def mixture(predictions: Float[Tensor, "model batch *latent"], lam: float | int) -> Float[Tensor, "batch *latent"]:
    """`(1 - λ) reference + λ aligned`, of either the denoised latents or the models' predictions."""
    return mixed(predictions, weights_of(lam))


def weights_of(lam: float | int) -> Float[Tensor, "model 1"]:
    """The mixture's weights, the reference's first."""
    return with_reference_weight(torch.tensor([[lam]], dtype=torch.float64))


def noise_in(
    latents: Float[Tensor, "batch *latent"], denoised: Float[Tensor, "batch *latent"], sigma: float | int
) -> Float[Tensor, "batch *latent"]:
    """`(x - D)/σ`: ε where σ is the noise beside a signal of 1, the velocity of a flow."""
    return (latents - denoised) / sigma


def without_noise(
    latents: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"], sigma: float | int
) -> Float[Tensor, "batch *latent"]:
    """The inverse of `noise_in`."""
    return latents - sigma * noise


def _reached(sigma: float, other: float, rising: bool) -> bool:
    if abs(sigma - other) <= CLOSE * max(sigma, other):
        return True
    return sigma > other if rising else sigma < other


def _log_snr(sigma: float, flow: bool) -> float:
    signal = 1 - sigma if flow else 1.0
    return 2 * (_log(signal) - _log(sigma))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
