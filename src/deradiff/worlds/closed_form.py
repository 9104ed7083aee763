"""Mixtures of Gaussians, the rewards that keep them so, and the models aligned to these: formulas, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Noise(NamedTuple):
    """A noise level: `x = alpha x_0 + sigma ε`."""

    alpha: Tensor | float
    sigma: Tensor | float


@dataclass(frozen=True)
class QuadraticReward:
    """`r(x) = linear·x - ½ Σ_d curvature_d x_d² + constant`: every reward that keeps a mixture of Gaussians one.

    Rewards add and scale: `r / beta` is the exponent of the aligned model, and a sum is several rewards at once.
    """

    linear: Float[Tensor, " dim"]
    curvature: Float[Tensor, " dim"]
    constant: float = 0.0

    def __call__(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The reward of each row of `x`."""
        return x @ self.linear.to(x) - (x.square() @ self.curvature.to(x)) / 2 + self.constant

    def __add__(self, other: QuadraticReward) -> QuadraticReward:
        return QuadraticReward(
            self.linear + other.linear, self.curvature + other.curvature, self.constant + other.constant
        )

    def __mul__(self, factor: float | int) -> QuadraticReward:
        return QuadraticReward(factor * self.linear, factor * self.curvature, float(factor * self.constant))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> QuadraticReward:
        return self * (1 / divisor)


def linear_reward(direction: Sequence[float] | Float[Tensor, " dim"]) -> QuadraticReward:
    """`r(x) = direction·x`. It moves every mode without bound as β falls and never narrows one."""
    a = torch.as_tensor(direction, dtype=torch.float64)
    return QuadraticReward(a, torch.zeros_like(a))


def peaked_reward(
    target: Sequence[float] | Float[Tensor, " dim"], curvature: float | int | Sequence[float] = 1.0
) -> QuadraticReward:
    """`r(x) = -½ Σ_d curvature_d (x_d - target_d)²`, greatest (zero) at `target`; curvature must be positive."""
    target = torch.as_tensor(target, dtype=torch.float64)
    q = torch.as_tensor(curvature, dtype=torch.float64).expand_as(target).clone()
    if not bool((q > 0).all()):
        raise ValueError(f"a reward with a peak has positive curvature, got {q.tolist()}")
    return QuadraticReward(q * target, q, float(-(q * target.square()).sum() / 2))


@dataclass(frozen=True)
class GaussianMixture:
    """`Σ_k exp(log_weights_k) N(means_k, diag(variances_k))` in double precision; the weights sum to one."""

    log_weights: Float[Tensor, " component"]
    means: Float[Tensor, "component dim"]
    variances: Float[Tensor, "component dim"]

    @property
    def dim(self) -> int:
        """How many dimensions a sample has."""
        return self.means.shape[1]

    @property
    def mode_weights(self) -> Float[Tensor, " component"]:
        """The probability of each component."""
        return self.log_weights.exp()

    def prompted(self, shifts: Float[Tensor, " component"]) -> GaussianMixture:
        """The conditional model under a prompt, which multiplies component k's weight by `exp(shifts_k)`."""
        return GaussianMixture(torch.log_softmax(self.log_weights + shifts, 0), self.means, self.variances)

    def noised(self, noise: Noise) -> GaussianMixture:
        """The marginal of `alpha x_0 + sigma ε`."""
        return GaussianMixture(
            self.log_weights, noise.alpha * self.means, noise.alpha**2 * self.variances + noise.sigma**2
        )

    def tilted(self, exponent: QuadraticReward) -> tuple[GaussianMixture, float]:
        """`p(x) exp(exponent(x)) / Z`, and `log Z` (complete the square in every component).

        Raises `ValueError` where the product has no finite integral, which a negative curvature can do.
        """
        precisions = 1 / self.variances + exponent.curvature
        if not bool((precisions > 0).all()):
            worst = int(precisions.argmin())
            raise ValueError(
                f"p exp(r/β) is no distribution: a component of variance {float(self.variances.flatten()[worst]):g} "
                f"cannot make up for the reward's curvature {float(exponent.curvature[worst % self.dim]):g}"
            )
        variances = 1 / precisions
        means = variances * (self.means / self.variances + exponent.linear)
        squares = means.square() * precisions - self.means.square() / self.variances
        log_weights = self.log_weights + (squares + (variances / self.variances).log()).sum(1) / 2 + exponent.constant
        log_z = torch.logsumexp(log_weights, 0)
        return GaussianMixture(log_weights - log_z, means, variances), float(log_z)

    def log_joint(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch component"]:
        """`log p(x, component)`."""
        distance = (x[:, None] - self.means).square() / self.variances
        return self.log_weights - (distance + (2 * torch.pi * self.variances).log()).sum(2) / 2

    def log_density(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """`log p(x)`."""
        return torch.logsumexp(self.log_joint(x), 1)

    def modes_of(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch component"]:
        """The probability that each sample belongs to each component; their mean estimates `mode_weights`."""
        return torch.softmax(self.log_joint(x.to(self.means)), 1)

    def expected(self, reward: QuadraticReward) -> float:
        """The expectation of a reward."""
        second = self.means.square() + self.variances
        return float(self.mode_weights @ (self.means @ reward.linear - second @ reward.curvature / 2) + reward.constant)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "batch dim"]:
        """`count` independent draws."""
        component = torch.multinomial(self.mode_weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=self.means.dtype, generator=generator)
        return self.means[component] + self.variances[component].sqrt() * noise


def mixture(
    weights: Sequence[float], means: Sequence[Sequence[float]], variances: float | int | Sequence[Any]
) -> GaussianMixture:
    """A mixture from plain numbers. `variances`: one for all, one per component, or one per component and dimension.

    Raises `ValueError` for weights or variances that are not positive, and for shapes that do not fit.
    """
    w, m = torch.tensor(weights, dtype=torch.float64), torch.tensor(means, dtype=torch.float64)
    v = torch.as_tensor(variances, dtype=torch.float64)
    if m.ndim != 2 or w.shape != m.shape[:1] or v.shape not in ((), m.shape[:1], m.shape):
        raise ValueError(
            f"{len(weights)} weights, means of shape {list(m.shape)} and variances of shape {list(v.shape)} do not fit "
            "together: means are [component, dim], variances a number, [component] or [component, dim]"
        )
    if not bool((w > 0).all() & (v > 0).all()):
        raise ValueError("the weights and variances of a mixture must be positive")
    v = (v[:, None] if v.ndim == 1 else v).expand_as(m).clone()
    return GaussianMixture((w / w.sum()).log(), m, v)
