"""DeRaDiff's Algorithm 2 as it is printed (appendix A.5): the baseline that the search is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.acquisition import LogExpectedImprovement, UpperConfidenceBound
from botorch.models import SingleTaskGP
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import ZeroMean
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

LINE = torch.linspace(0, 1, 1001, dtype=torch.float64)
"""Where the line search of line 10 looks."""

TRIED = 2048
"""Hyperparameters among which the likeliest is taken."""

LENGTHS, AMPLITUDES, NOISES = (0.05, 2.0), (0.1, 10.0), (1e-3, 1.0)
"""Their ranges, the last two in units of the root mean square of the observed means."""


@dataclass(frozen=True)
class Found:
    """What Algorithm 2 returns, and what it evaluated on the way."""

    lam: float
    score: float
    """The best observed mean, which flatters: it is the largest of noisy ones."""
    evaluated: tuple[tuple[float, float], ...]
    """(λ, mean), in order."""


def algorithm_2(
    evaluate: Callable[[float], float],
    *,
    budget: int = 8,
    initial: int = 3,
    acquisition: Literal["ei", "ucb"] = "ei",
    delta: float = 0.1,
    seed: int = 0,
) -> Found:
    """Bayesian optimisation of λ in [0, 1] (DeRaDiff, Algorithm 2 and equations 39 to 43).

    The surrogate is a Gaussian process of mean zero with an RBF kernel, which is fitted to the means alone. The paper
    leaves open how: here length scale, amplitude and noise are the likeliest of `TRIED`.

    Args:
        evaluate: the mean score of a batch drawn at λ.
        budget: T, evaluations altogether.
        initial: n_0, the first of them, at uniformly random λ.
        acquisition: expected improvement (equation 43) or `μ + β_n σ` with `β_n = sqrt(2 log(n² π²/6δ))`.
        delta: δ of β_n.
        seed: of the initial design.

    Raises `ValueError` for a budget below `initial`, fewer than one initial λ, and a δ outside (0, 1).
    """
    if not 1 <= initial <= budget:
        raise ValueError(f"{initial} initial evaluations must be 1 at least and fit into the budget of {budget}")
    if not 0 < delta < 1:
        raise ValueError(f"δ is a probability between 0 and 1, got {delta}")
    chance = torch.Generator().manual_seed(seed)
    lams = torch.rand(initial, dtype=torch.float64, generator=chance).tolist()
    means = [evaluate(lam) for lam in lams]
    for n in range(initial, budget):
        unit = (sum(mean**2 for mean in means) / n) ** 0.5 or 1.0  # a mean of zero stays one
        scaled = [mean / unit for mean in means]
        surrogate = _fitted(torch.tensor(lams, dtype=torch.float64), torch.tensor(scaled, dtype=torch.float64))
        improves = _acquisition(surrogate, acquisition, max(scaled), n, delta)
        with torch.no_grad():
            lams.append(float(LINE[improves(LINE[:, None, None]).argmax()]))
        means.append(evaluate(lams[-1]))
    best = max(range(budget), key=lambda i: means[i])
    return Found(lams[best], means[best], tuple(zip(lams, means, strict=True)))


def _acquisition(surrogate: SingleTaskGP, name: str, best: float, n: int, delta: float) -> Any:
    if name == "ei":
        return LogExpectedImprovement(surrogate, best_f=best)  # its largest value is where EI's is
    beta = math.sqrt(2 * math.log(n**2 * math.pi**2 / (6 * delta)))
    return UpperConfidenceBound(surrogate, beta=beta**2)  # BoTorch's beta is the square of the paper's


def _fitted(lams: Float[Tensor, " point"], means: Float[Tensor, " point"]) -> SingleTaskGP:
    """The Gaussian process with the likeliest hyperparameters (equations 40 to 42)."""
    at = lams[:, None]
    places = SobolEngine(3, scramble=True, seed=0).draw(TRIED, dtype=torch.float64)
    ranges = enumerate((LENGTHS, AMPLITUDES, NOISES))
    lengths, amplitudes, noises = (low * (high / low) ** places[:, k] for k, (low, high) in ranges)
    with torch.no_grad():
        covariances = _kernel(lengths, amplitudes)(at).to_dense()
        covariances = covariances + noises.square()[:, None, None] * torch.eye(len(at), dtype=torch.float64)
        likelihoods = torch.distributions.MultivariateNormal(torch.zeros_like(means), covariances).log_prob(means)
    k = likelihoods.argmax()
    fitted = SingleTaskGP(
        at,
        means[:, None],
        likelihood=FixedNoiseGaussianLikelihood(noises[k].square().expand(len(at))),
        covar_module=_kernel(lengths[k : k + 1], amplitudes[k : k + 1], one=True),
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    return fitted.eval()


def _kernel(lengths: Float[Tensor, " node"], amplitudes: Float[Tensor, " node"], one: bool = False) -> Kernel:
    """`σ_f² exp(-(λ - λ')²/2l²)`, for every node or for the only one."""
    nodes = torch.Size([] if one else [len(lengths)])
    shape = RBFKernel(batch_shape=nodes)
    kernel = ScaleKernel(shape, batch_shape=nodes).double()
    shape.lengthscale, kernel.outputscale = lengths.reshape(*nodes, 1, 1), amplitudes.square().reshape(nodes)
    return kernel
