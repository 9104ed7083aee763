"""Can λ be calibrated? The line search of the loss at the target's strength, on pairs that were held out.

β/λ presumes that what an anchor adds to its reference's predictions goes with 1/β. Diffusion-DPO's loss says what it
goes with, as far as the anchor's own direction tells: along the line from the one to the other its terms
(`algorithm.pair_terms`) are computed once for every pair, timestep and noise, and then the loss at every point of the
line and every β costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deradiff.algorithm.pair_terms import PairTerms, terms
from deradiff.alignment.base import Base

SCALES = torch.logspace(math.log10(0.002), math.log10(4), 160, dtype=torch.float64)
"""The s that are tried."""

CLEAR = 2.0
"""Where the calibrated λ differs from β/λ by fewer standard errors, β/λ stands."""


@dataclass(frozen=True)
class TimedTerms(PairTerms):
    """The terms of every pair at every draw, and the timestep of each draw."""

    timesteps: Int[Tensor, "draw pair"]

    def within(self, low: int, high: int) -> TimedTerms:
        """The draws with `low <= t < high`; the others count nothing."""
        inside = (self.timesteps >= low) & (self.timesteps < high)
        return replace(self, linear=self.linear * inside, square=self.square * inside)

    def curves(self, beta: float) -> Float[Tensor, "pair scale"]:
        """The loss at `beta` of every pair at each of `SCALES`."""
        return torch.stack([self.losses(s, beta) for s in SCALES.tolist()], 1)


@torch.no_grad()
def timed_terms(
    base: Base,
    reference: nn.Module,
    anchors: Mapping[Any, nn.Module],
    latents: Float[Tensor, "pair 2 *latent"],
    embedded: Float[Tensor, "pair token width"],
    draws: int,
    seed: int,
    per_pass: int = 128,
) -> dict[Any, TimedTerms]:
    """Of every anchor, for pairs with the winner first. Timesteps are stratified over a pair's `draws`.

    The reference is evaluated once, and noise and timesteps are the same for all anchors.
    """
    count, generator = len(latents), torch.Generator().manual_seed(seed)
    steps = (torch.arange(draws) + torch.rand(count, draws, generator=generator)) * (base.noising.timesteps / draws)
    timesteps = steps.long().clamp(max=base.noising.timesteps - 1)
    found: dict[Any, list[Tensor]] = {name: [] for name in anchors}
    for start in range(0, count * draws, per_pass):
        flat = torch.arange(start, min(start + per_pass, count * draws))
        pair, t = flat // draws, timesteps.flatten()[flat].repeat(2)
        noise = torch.randn(len(flat), *latents.shape[2:], generator=generator).repeat(2, *[1] * (latents.ndim - 2))
        noisy = base.noising.noised(latents[pair].transpose(0, 1).flatten(0, 1), noise, t)
        told = {"prompt_embeds": embedded[pair].repeat(2, 1, 1)}
        before = base.call.predict(reference, noisy, t, told)
        for name, anchor in anchors.items():
            after = base.call.predict(anchor, noisy, t, told)
            found[name].append(terms(noise.double(), before.double(), after.double()))
    both = {name: torch.cat(parts, 1).view(2, count, draws).transpose(1, 2) for name, parts in found.items()}
    return {name: TimedTerms(linear, square, timesteps.T) for name, (linear, square) in both.items()}


def minimum(losses: Float[Tensor, "*sample scale"]) -> Float[Tensor, "*sample"]:
    """The s of the lowest loss, between `SCALES` by a parabola in log s; at an end of them where the loss falls on."""
    best = losses.argmin(-1).clamp(1, len(SCALES) - 2)
    left, here, right = (losses.gather(-1, (best + k).unsqueeze(-1)).squeeze(-1) for k in (-1, 0, 1))
    bend = (left - 2 * here + right).clamp(min=1e-300)
    moved = (0.5 * (left - right) / bend).clamp(-1, 1)
    width = math.log(float(SCALES[1] / SCALES[0]))
    return (SCALES.log()[best] + moved * width).exp()


@dataclass(frozen=True)
class Calibrated:
    """A λ for a strength: `plain` is the quotient of strengths, `ratio` the line search's.

    `error` is the standard error of the logarithm of `ratio`.
    """

    plain: float
    search: float
    ratio: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether `ratio` says anything else than `plain`."""
        return abs(math.log(self.ratio / self.plain)) > CLEAR * self.error

    @property
    def lam(self) -> float:
        """What is taken: within (0, 1) the line search's where it is clear, otherwise β/λ's."""
        return self.ratio if self.clear and self.plain < 1 else self.plain

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "plain": self.plain,
            "search": self.search,
            "ratio": self.ratio,
            "log error": self.error,
            "lam": self.lam,
        }


def calibrate(
    of: TimedTerms, anchor_beta: float, target_beta: float, bootstraps: int = 200, seed: int = 0
) -> Calibrated:
    """The λ that stands for `target_beta`, by the quotient `s*(target_beta) / s*(anchor_beta)`.

    s*(β) minimises the loss at β over the pairs. The anchor's own strength is the control variate: s* there is 1 where
    its training has converged and generalises, both searches share their pairs and noise, and where the square term is
    small the quotient is β/λ without any noise at all. The error is that of resampled pairs.
    """
    own, target = of.curves(anchor_beta), of.curves(target_beta)
    count, generator = len(own), torch.Generator().manual_seed(seed)
    chosen = torch.randint(count, (bootstraps, count), generator=generator)
    shares = torch.zeros(bootstraps, count, dtype=torch.float64).scatter_add_(
        1, chosen, torch.full(chosen.shape, 1 / count, dtype=torch.float64)
    )
    quotients = minimum(shares @ target) / minimum(shares @ own)
    search = float(minimum(target.mean(0)))
    ratio = search / float(minimum(own.mean(0)))
    return Calibrated(anchor_beta / target_beta, search, ratio, float(quotients.log().std()))
