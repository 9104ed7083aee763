"""Is an anchor of Diffusion-DPO stepwise: does its distance from the reference go as 1/β? A test on preference pairs.

With `Δ = ε_θ - ε_ref` the loss of a pair is `-log σ(β (l - ½ q))`, `l = <ε - ε_ref, Δ>` of the winner less that of the
loser, `q = ||Δ||²` likewise, means over the elements of the latent, step by step (`objectives.diffusion_dpo`). Of Δ and
β apart it sees the square alone: while that is small the optimum has `Δ ∝ 1/β`, and mixing predictions *is* retraining.

Along the line `s Δ` the loss at any β is known from `l` and `q`, by forward passes alone. `s(β)` is where it is least;
an anchor is stepwise where `s(β/λ) = λ s(β)`. Both come from the same pairs and noise, whose chance cancels in the
ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.tilts import Answer

LAMS = (0.25, 0.5)
"""The λ at which proportionality is tested."""

NEAR = 0.4
"""How far `s(β/λ) / (λ s(β))` may be from 1 in a stepwise anchor, two standard errors included."""

FAR = 0.25
"""Farther than this by two standard errors, it is not stepwise."""

FARTHEST = 6.0
"""The greatest s that is looked at."""

LEAST = 0.1
"""The least s(β) of an anchor that prefers the winners of the pairs at hand."""

BLOCKS = 20
"""Parts of the pairs that are left out one by one, for standard errors."""


@dataclass(frozen=True)
class PairTerms:
    """`l` and `q` of every pair, at every draw of noise and timestep."""

    linear: Float[Tensor, "draw pair"]
    square: Float[Tensor, "draw pair"]

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return self.linear.shape[1]

    def without(self, part: int, parts: int) -> PairTerms:
        """All pairs but every `parts`-th, from the `part`-th on."""
        kept = torch.arange(self.pairs) % parts != part
        return PairTerms(self.linear[:, kept], self.square[:, kept])

    def losses(self, strength: float, beta: float) -> Float[Tensor, " pair"]:
        """The loss of `ε_ref + strength Δ` at `beta` on every pair, averaged over its draws."""
        margins = beta * (strength * self.linear.double() - strength**2 / 2 * self.square.double())
        return -F.logsigmoid(margins).mean(0)

    def loss(self, strength: float, beta: float) -> float:
        """The loss of `ε_ref + strength Δ` at `beta`."""
        return float(self.losses(strength, beta).mean())

    def best(self, beta: float) -> float:
        """`s(β)`, from 0 to `FARTHEST`."""
        grid = torch.linspace(0, 1, 25, dtype=torch.float64).square() * FARTHEST
        losses = [self.loss(float(s), beta) for s in grid]
        k = losses.index(min(losses))
        low, high = float(grid[max(k - 1, 0)]), float(grid[min(k + 1, len(grid) - 1)])
        return float(minimize_scalar(self.loss, args=(beta,), bounds=(low, high), method="bounded").x)


def terms(
    target: Float[Tensor, "prediction *latent"],
    reference: Float[Tensor, "prediction *latent"],
    anchor: Float[Tensor, "prediction *latent"],
) -> Float[Tensor, "term pair"]:
    """`l` and `q`, of what both models predict for the winners of some pairs and then for their losers."""
    away = anchor - reference
    both = torch.stack([((target - reference) * away).flatten(1).mean(1), away.square().flatten(1).mean(1)])
    winners, losers = both.chunk(2, dim=1)
    return winners - losers


@dataclass(frozen=True)
class PairTest:
    """The answer, why, and the numbers behind it."""

    answer: Answer
    why: str
    beta: float
    strength: Estimate
    """`s(β)`: 1 for an anchor trained to the end on pairs like these."""
    proportions: dict[float, Estimate]
    """`s(β/λ) / (λ s(β))` by λ: 1 where Δ ∝ 1/β."""
    square: Estimate
    """The square term's share, in standard deviations of the linear one: `sd(β q/2) / sd(β l)`."""
    pairs: int


def pair_test(terms: PairTerms, beta: float, lams: Sequence[float] = LAMS) -> PairTest:
    """Test whether an anchor aligned by Diffusion-DPO at `beta` is stepwise.

    Raises `ValueError` for a β that is not positive, fewer pairs than `BLOCKS` and terms that are not finite.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"β = {beta}: the strength that the anchor was aligned at must be positive")
    if terms.pairs < BLOCKS:
        raise ValueError(f"{terms.pairs} pairs tell nothing: {BLOCKS} at least are needed, better some hundreds")
    if not bool(torch.isfinite(terms.linear).all() and torch.isfinite(terms.square).all()):
        raise ValueError("a model's prediction on these pairs is not finite: there is nothing to compare")

    def told(part: PairTerms) -> Tensor:
        own = part.best(beta)
        ratios = [part.best(beta / lam) / (lam * max(own, 1e-3)) for lam in lams]
        return torch.tensor([own, *ratios, float(part.square.std() / 2 / part.linear.std())], dtype=torch.float64)

    whole = told(terms)
    parts = torch.stack([told(terms.without(part, BLOCKS)) for part in range(BLOCKS)])
    errors = ((BLOCKS - 1) / BLOCKS * (parts - parts.mean(0)).square().sum(0)).sqrt()
    strength, *ratios, square = [Estimate(float(v), float(e)) for v, e in zip(whole, errors, strict=True)]
    proportions = dict(zip(lams, ratios, strict=True))
    answer, why = _answer(strength, proportions)
    return PairTest(answer, why, beta, strength, proportions, square, terms.pairs)


def _answer(strength: Estimate, proportions: dict[float, Estimate]) -> tuple[Answer, str]:
    if not strength.value > max(3 * strength.error, LEAST):
        return "open", (
            f"the anchor does not prefer the winners of these pairs (along the line to it their loss is least at "
            f"{strength}): they are of another model, or compared by another reward"
        )
    lam, worst = max(proportions.items(), key=lambda item: abs(item[1].value - 1) + 2 * item[1].error)
    words = f"at λ = {lam:g} the loss of pairs at β/λ is least at {worst.value:.2f} ± {worst.error:.2f} times λ"
    if any(abs(one.value - 1) - 2 * one.error > FAR for one in proportions.values()):
        return "no", words
    if all(abs(one.value - 1) + 2 * one.error <= NEAR for one in proportions.values()):
        return "yes", words
    return "open", f"too noisy to tell: {words}"


def record(test: PairTest) -> dict[str, Any]:
    """The test as JSON; estimates as `[value, error]`."""
    proportions = {format(lam, "g"): [one.value, one.error] for lam, one in test.proportions.items()}
    return {
        "answer": test.answer,
        "why": test.why,
        "beta": test.beta,
        "strength": [test.strength.value, test.strength.error],
        "proportions": proportions,
        "square": [test.square.value, test.square.error],
        "pairs": test.pairs,
    }
