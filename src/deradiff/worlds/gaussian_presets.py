"""The small examples behind annealed importance guidance, as worlds in which every number is exact.

Jena et al. 2025 (AIG) argue from four of them: noise mixes the modes of the data, and the reverse process finds them
again early (appendix A.6.1, figure 9); alignment without regularisation collapses to the reward's maximiser (Lemma 1);
dropout in the reward does not help, being alignment to another reward (appendix A.1.1); interpolating weights is a
Tikhonov regularisation (Lemma 2). Here is what each of them says in numbers; `docs/draw_worlds.py` draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from deradiff.worlds.gaussian_mixture import (
    SCHEDULE,
    GaussianMixture,
    MixtureDenoiser,
    Noise,
    QuadraticReward,
    World,
    mixture,
    peaked_reward,
    variance_preserving,
)

IMAGE = Noise(1.0, 0.0)
"""The noise level of x_0."""

MOST_PARAMETERS = 12
"""`dropout_average` sums over every one of the `2**N` masks."""


def two_modes() -> World:
    """`½ N(1, 0.05) + ½ N(-1, 0.05)` on a line (AIG, appendix A.6.1), and a reward "peak" that is greatest at 1.6.

    The paper does not say whether 0.05 is a variance or a standard deviation; here it is the variance. The reward is
    not the paper's: its maximiser lies where the reference puts next to nothing, as that of a hacked reward does.
    """
    return World("two modes", mixture([0.5, 0.5], [[1.0], [-1.0]], 0.05), {"peak": peaked_reward([1.6])})


def total_variance(model: GaussianMixture) -> float:
    """The trace of the model's covariance: the variance within its components plus that of their means."""
    second = (model.mode_weights @ (model.means.square() + model.variances)).sum()
    return float(second - (model.mode_weights @ model.means).square().sum())


# -- noise mixes the modes, the reverse process finds them (A.6.1) -----------------------------------------------------


def reverse(model: GaussianMixture, x: Float[Tensor, " dim"], now: Noise, then: Noise = IMAGE) -> GaussianMixture:
    """The exact `p(x_then | x_now = x)` of the reverse process of `model`'s diffusion; of x_0 unless `then` is given.

    By Bayes' rule it is `q_then(y) N(x; a y, b²)` with `a = α_now/α_then` and `b² = σ_now² - a² σ_then²`: the marginal
    at the earlier noise level, tilted by a reward that is quadratic in y. Raises `ValueError` unless `then` is less
    noisy than `now`.
    """
    a = now.alpha / then.alpha
    b2 = now.sigma**2 - a**2 * then.sigma**2
    if not b2 > 0:
        raise ValueError(
            f"a reverse step leads to less noise, but σ/α goes from {now.sigma / now.alpha:g} to "
            f"{then.sigma / then.alpha:g}"
        )
    evidence = QuadraticReward(linear=a * x / b2, curvature=a**2 / b2 * torch.ones_like(x))
    return model.noised(then).tilted(evidence)[0]


def sampled_reverse(
    model: GaussianMixture,
    x: Float[Tensor, " dim"],
    timestep: int,
    until: int | None = None,
    *,
    count: int = 1000,
    stride: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count dim"]:
    """`count` samples of `p(x_until | x_timestep = x)` by a diffusers chain: DDIM with η = 1 and the exact score.

    Timesteps run from 999 (noise) to 0 in jumps of `stride`; `until=None` goes on to x_0. Beside `reverse`, which is
    exact, this has the chain's discretisation error. Raises `ValueError` for timesteps that such a chain does not meet.
    """
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(len(scheduler) // stride)
    visited = scheduler.timesteps.tolist()
    end = -stride if until is None else until
    if timestep not in visited or not (until is None or until in visited) or end >= timestep:
        raise ValueError(
            f"no chain of stride {stride} leads from timestep {timestep} to {until}: it visits {visited[0]}, "
            f"{visited[1]}, ..., 0, downwards"
        )
    denoiser = MixtureDenoiser.of(model)
    samples = x.expand(count, -1)
    for t in scheduler.timesteps[(scheduler.timesteps <= timestep) & (scheduler.timesteps > end)]:
        epsilon = denoiser(samples, t).sample
        samples = scheduler.step(epsilon, t, samples, eta=1.0, generator=generator).prev_sample
    return samples


class Mixing(NamedTuple):
    """How far noise has mixed the modes of the data, averaged over x_t."""

    variance: float
    """The share of the data's total variance that `p(x_0 | x_t)` still has: 0 without noise, 1 in pure noise."""

    guess: float
    """The probability that the likeliest mode is the one x_t came from: 1, down to the weight of the largest mode."""


def mixing(model: GaussianMixture, timestep: int, count: int = 20_000, seed: int = 0) -> Mixing:
    """How far the modes are mixed at `timestep` (0 to 999), estimated from `count` samples (AIG, appendix A.6.1).

    The variance is `Var(x_0) - Var(E[x_0 | x_t])`, by the law of total variance; the expectation within is what a
    denoiser predicts. With one `seed` all timesteps use the same images and noise, which makes smooth curves.
    """
    chance = torch.Generator().manual_seed(seed)
    x_0 = model.sample(count, chance)
    noise = variance_preserving(timestep)
    x_t = noise.alpha * x_0 + noise.sigma * torch.randn(x_0.shape, dtype=x_0.dtype, generator=chance)
    denoised = MixtureDenoiser.of(model, "sample")(x_t, timestep).sample
    recovered = float(denoised.var(0).sum()) / total_variance(model)
    return Mixing(1 - recovered, float(model.noised(noise).modes_of(x_t).amax(1).mean()))


# -- alignment collapses to the maximiser (Lemma 1) --------------------------------------------------------------------


class Collapse(NamedTuple):
    """What is left of the reference in a model aligned at one β."""

    variance: float
    """Total variance, in squared units of x."""

    distance: float
    """How far the mean is from the reward's maximiser, in units of x."""

    divergence: float
    """KL to the reference, in nats."""

    mode_weights: Float[Tensor, " component"]


def peak(reward: QuadraticReward) -> Float[Tensor, " dim"]:
    """The maximiser of `reward`. Raises `ValueError` where it has none, its curvature not being positive throughout."""
    if not bool((reward.curvature > 0).all()):
        raise ValueError(f"a reward of curvature {reward.curvature.tolist()} has no maximiser")
    return reward.linear / reward.curvature


def collapse(model: GaussianMixture, reward: QuadraticReward, beta: float) -> Collapse:
    """The model aligned to `reward` at strength `beta`, in numbers, exactly (AIG, Lemma 1 and appendix A.1).

    Lemma 1 is the limit β → 0 of `p_0 exp(r/β)`, where regularisation vanishes: for a reward of curvature q in every
    one of D dimensions the variance falls as `D β/q`, the distance as β, and the divergence grows as `½ D log(1/β)`.
    No component's weight vanishes in the limit, but all components then lie on the maximiser. Raises `ValueError` for a
    β that is not positive, and for a reward without a maximiser.
    """
    if not beta > 0:
        raise ValueError(f"the strength β must be positive, got {beta}")
    exponent = reward / beta
    aligned, log_z = model.tilted(exponent)
    mean = aligned.mode_weights @ aligned.means
    return Collapse(
        variance=total_variance(aligned),
        distance=float((mean - peak(reward)).norm()),
        divergence=aligned.expected(exponent) - log_z,
        mode_weights=aligned.mode_weights,
    )


# -- dropout in the reward makes another reward (A.1.1) ----------------------------------------------------------------


def dropout_average(
    reward: Callable[[Float[Tensor, " parameter"]], QuadraticReward],
    parameters: Float[Tensor, " parameter"],
    rate: float,
    *,
    rescaled: bool = False,
) -> QuadraticReward:
    """`E_u[r_φ[u,ξ]]`, the exact mean of a reward over dropout of its parameters (AIG, equation 25).

    Each of the N `parameters` φ is kept with probability `1 - rate`, independently, and then divided by `1 - rate` if
    `rescaled`; `rate` is the paper's ξ, in [0, 1). `reward` makes the reward of given parameters. Since x and u are
    independent, maximising the expected reward under dropout, with any KL penalty, *is* maximising the expectation of
    this average (equation 24), and the average is a reward like any other:

    - a linear reward `φ·x` becomes `(1-ξ) φ·x`: alignment at β turns into alignment at `β/(1-ξ)`, λ = 1-ξ;
    - a `parametrised_peak` keeps a peak, with `(1-ξ)` of its curvature, at `1-ξ` times its target;
    - rescaled, both are what they were, up to a constant.

    Raises `ValueError` for a rate outside [0, 1), and for more than `MOST_PARAMETERS` parameters.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate lies in [0, 1), got {rate}")
    if len(parameters) > MOST_PARAMETERS:
        raise ValueError(f"{len(parameters)} parameters have 2**{len(parameters)} masks; at most {MOST_PARAMETERS}")
    kept = parameters / (1 - rate) if rescaled else parameters
    masks = [parameters.new_tensor(mask) for mask in itertools.product([0.0, 1.0], repeat=len(parameters))]
    chances = [float((1 - rate) ** mask.sum() * rate ** (1 - mask).sum()) for mask in masks]
    first, *others = [reward(mask * kept) * chance for mask, chance in zip(masks, chances, strict=True)]
    return sum(others, first)


def parametrised_peak(parameters: Float[Tensor, " parameter"]) -> QuadraticReward:
    """`r(x) = -½ Σ_d q_d (x_d - c_d)²` of the parameters `(c, q)`: targets, then curvatures, which may be zero."""
    target, curvature = parameters.chunk(2)
    return QuadraticReward(curvature * target, curvature, float(-(curvature * target.square()).sum() / 2))


# -- interpolated weights as regularisation (Lemma 2) ------------------------------------------------------------------


def tikhonov(
    base: Float[Tensor, " dim"],
    tuned: Float[Tensor, " dim"],
    hessian: Float[Tensor, "dim dim"],
    alpha: float,
    metric: Float[Tensor, "dim dim"] | None = None,
) -> Float[Tensor, " dim"]:
    """The minimiser of `½ (θ - θ_d)ᵀ H (θ - θ_d) + ½ α (θ - θ_base)ᵀ M (θ - θ_base)` (AIG, Lemma 2, equations 5-9).

    `base` is θ_base, `tuned` is θ_d, the minimiser of the loss alone, `hessian` its H, symmetric and positive definite,
    and `metric` the penalty's M, H itself by default. With M = H the minimiser is `θ_base + α' (θ_d - θ_base)`,
    `α' = 1/(1 + α)`: interpolated weights, or a LoRA at scale α'.

    The lemma is stated for an L2 penalty, but its proof penalises in the metric of the Hessian. With the plain L2
    penalty, M the identity, the minimiser lies on the segment from θ_base to θ_d only where θ_d - θ_base is an
    eigenvector of H, and for every θ_base only where H is a multiple of the identity: flat directions return to the
    base before steep ones do.

    Raises `ValueError` for a negative α and an H that is not symmetric and positive definite.
    """
    if alpha < 0:
        raise ValueError(f"a penalty's weight α is not negative, got {alpha}")
    if not torch.allclose(hessian, hessian.T) or torch.linalg.cholesky_ex(hessian).info != 0:
        raise ValueError("the Hessian at a minimiser must be symmetric and positive definite")
    penalty = alpha * (hessian if metric is None else metric)
    return torch.linalg.solve(hessian + penalty, hessian @ tuned + penalty @ base)


def off_segment(theta: Float[Tensor, " dim"], base: Float[Tensor, " dim"], tuned: Float[Tensor, " dim"]) -> float:
    """The distance of `theta` from the segment between `base` and `tuned`, in units of the segment's length."""
    along, step = tuned - base, theta - base
    share = ((step @ along) / (along @ along)).clamp(0, 1)
    return float((step - share * along).norm() / along.norm())
