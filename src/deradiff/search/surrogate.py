"""The model of a score over a space: a Gaussian process that knows its noise, with its hyperparameters integrated out.

Every point is drawn with the same prompts and the same noise. So what is drawn by chance, easy prompts or lucky noise,
lifts or lowers all points together: the errors of their means are correlated, and mostly cancel where points are
compared. The surrogate is told the whole covariance of the errors, estimated from how units differ. A gain over the
reference then has the error of a paired difference, while a score itself keeps its own, which is larger.

Few points say little about length scale and amplitude, and one best guess of them makes intervals too short. They are
drawn from their prior instead and weighted by the marginal likelihood.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from botorch.models import ModelListGP, SingleTaskGP
from botorch.posteriors.fully_bayesian import MCMC_DIM, GaussianMixturePosterior
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ConstantKernel, Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import ZeroMean
from jaxtyping import Float, Int
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from torch.quasirandom import SobolEngine

LENGTH, LENGTH_SPREAD = 0.35, 0.6
"""Median and logarithmic standard deviation of the length scale's prior, in units of a coordinate's range."""

AMPLITUDE, AMPLITUDE_SPREAD = 1.5, 0.7
"""The same of the process's standard deviation, in units of that of the points' means."""

LEVEL = 3.0
"""Standard deviation of the process's mean, in the same units: next to no prior at all."""

ROUGHNESS = (0.003, 0.3)
"""Range, even by logarithm, of the standard deviation of what neither a smooth function nor the known noise explains,
in the same units. A few images that jump from one mode to another make a mean that is rougher than its error."""

NODES, KEPT = 512, 32
"""Hyperparameters that are tried for each coordinate, and those that are kept, equally likely."""

AT_ONCE = 128
"""Points that are looked at together."""

FEWEST = 2
"""Units below which there is no error."""


@dataclass(frozen=True)
class Observed:
    """Mean scores of some points, and the covariance of their errors."""

    means: Float[Tensor, " point"]
    covariance: Float[Tensor, "point point"]

    @classmethod
    def of(cls, table: Float[Tensor, "point unit"]) -> Observed:
        """Means over units, and errors as they differ between units.

        So few units estimate the covariance roughly; it is enlarged by `(n - 1)/(n - 3)`, as the variance of Student's
        t is. Raises `ValueError` for fewer than two units.
        """
        units = table.shape[1]
        if units < FEWEST:
            raise ValueError("one prompt with one seed has no error: draw more prompts, or more seeds of the prompt")
        away = table - table.mean(1, keepdim=True)
        slack = (units - 1) / (units - 3) if units > 3 else 3.0
        return cls(table.mean(1), slack * away @ away.T / (units * (units - 1)))

    def error_of_difference(self, first: int, second: int) -> float:
        """The standard error of the difference between two points, unit by unit."""
        c = self.covariance
        return float((c[first, first] + c[second, second] - 2 * c[first, second]).clamp(min=0).sqrt())


class Surrogate:
    """A score's posterior over a space, given what was observed at some points.

    Args:
        at: the observed points, every coordinate scaled to [0, 1].
        observed: their means and errors.
        seed: decides the hyperparameters that are tried.
    """

    def __init__(self, at: Float[Tensor, "point coordinate"], observed: Observed, seed: int) -> None:
        self.centre = float(observed.means.mean())
        self.scale = _scale(observed)
        targets = (observed.means - self.centre) / self.scale
        lengths, amplitudes, roughness = _prior(at.shape[1], seed)
        rough = roughness.square()[:, None, None] * torch.eye(len(at), dtype=torch.float64)
        noise = observed.covariance / self.scale**2 + rough
        kept = _resampled(_evidence(_kernel(lengths, amplitudes), at, targets, noise), seed)
        self.model = _Ensemble(at, targets, noise[kept], _kernel(lengths[kept], amplitudes[kept]))

    def mean(self, at: Float[Tensor, "point coordinate"]) -> Float[Tensor, " point"]:
        """The posterior mean."""
        return self.centre + self.scale * self._alone(at)[0]

    def deviation(self, at: Float[Tensor, "point coordinate"]) -> Float[Tensor, " point"]:
        """The posterior standard deviation."""
        return self.scale * self._alone(at)[1].sqrt()

    @torch.no_grad()
    def _alone(self, at: Float[Tensor, "point coordinate"]) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
        """Mean and variance of each point by itself, standardised."""
        posteriors = [self.model.posterior(part[:, None, :]) for part in at.split(AT_ONCE)]
        means, variances = (
            [getattr(posterior, f"mixture_{name}") for posterior in posteriors] for name in ("mean", "variance")
        )
        return torch.cat(means).flatten(), torch.cat(variances).flatten()

    @torch.no_grad()
    def samples(self, at: Float[Tensor, "point coordinate"], count: int, seed: int) -> Float[Tensor, "sample point"]:
        """At least `count` draws from the posterior, as many of each kept hyperparameter, jointly for all points."""
        posterior = self.model.posterior(at).distribution
        each = -(-count // KEPT)
        chance = torch.Generator().manual_seed(seed)
        normal = torch.randn(KEPT, len(at), each, dtype=torch.float64, generator=chance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            root = psd_safe_cholesky(posterior.covariance_matrix, jitter=1e-10, max_tries=6)
        drawn = posterior.mean[..., None] + root @ normal
        return (self.centre + self.scale * drawn).mT.flatten(0, 1)


def several(surrogates: Sequence[Surrogate]) -> ModelListGP:
    """Independent surrogates as one BoTorch model with an output for each."""
    return ModelListGP(*(surrogate.model for surrogate in surrogates))


# -- the pieces -------------------------------------------------------------------------------------------------------


class _Ensemble(SingleTaskGP):
    """BoTorch's Gaussian process for several hyperparameters at once, over which acquisition functions average."""

    _is_ensemble = True
    _supports_batched_models = False

    def __init__(
        self,
        at: Float[Tensor, "point coordinate"],
        targets: Float[Tensor, " point"],
        noise: Float[Tensor, "node point point"],
        kernel: Kernel,
    ) -> None:
        size = len(noise)
        super().__init__(
            at.expand(size, *at.shape),
            targets[:, None].expand(size, len(targets), 1),
            likelihood=_KnownNoise(noise),
            covar_module=kernel,
            mean_module=ZeroMean(batch_shape=kernel.batch_shape),
            outcome_transform=None,
        )
        self.eval()

    def posterior(self, X: Tensor, *arguments: Any, **options: Any) -> GaussianMixturePosterior:
        """The posterior at `X`, a mixture over the hyperparameters."""
        posterior: Any = super().posterior(X.unsqueeze(MCMC_DIM), *arguments, **options)
        return GaussianMixturePosterior(distribution=posterior.distribution)


class _KnownNoise(FixedNoiseGaussianLikelihood):
    """Noise of a known covariance, where GPyTorch's own knows variances alone."""

    def __init__(self, covariance: Float[Tensor, "node point point"]) -> None:
        super().__init__(noise=covariance.diagonal(dim1=-2, dim2=-1))
        self.register_buffer("covariance", covariance)

    def marginal(self, function_dist: MultivariateNormal, *_: Any, **__: Any) -> MultivariateNormal:
        """What is observed where the process is `function_dist`."""
        return MultivariateNormal(function_dist.mean, function_dist.lazy_covariance_matrix + self.covariance)


def _scale(observed: Observed) -> float:
    """The standard deviation of the means; their noise where all are the same."""
    spread = float(observed.means.std()) if len(observed.means) > 1 else 0.0
    noise = float(observed.covariance.diagonal().mean().sqrt())
    return spread if spread > 1e-9 * max(noise, abs(float(observed.means[0]))) else noise or 1.0


def _prior(
    dim: int, seed: int
) -> tuple[Float[Tensor, "node coordinate"], Float[Tensor, " node"], Float[Tensor, " node"]]:
    """Length scales, amplitudes and roughness, spread evenly by their prior."""
    places = SobolEngine(dim + 2, scramble=True, seed=seed).draw(NODES * dim, dtype=torch.float64)
    normal = torch.special.ndtri(places.clamp(1e-6, 1 - 1e-6))
    lengths = LENGTH * dim**0.5 * torch.exp(LENGTH_SPREAD * normal[:, :dim])
    amplitudes = AMPLITUDE * torch.exp(AMPLITUDE_SPREAD * normal[:, dim])
    return lengths, amplitudes, ROUGHNESS[0] * (ROUGHNESS[1] / ROUGHNESS[0]) ** places[:, dim + 1]


def _kernel(lengths: Float[Tensor, "node coordinate"], amplitudes: Float[Tensor, " node"]) -> Kernel:
    """`LEVEL² + amplitude² exp(-½ |x - x'|²/length²)` for every node."""
    nodes = torch.Size([len(lengths)])
    shape = RBFKernel(ard_num_dims=lengths.shape[1], batch_shape=nodes)
    scaled, level = ScaleKernel(shape, batch_shape=nodes), ConstantKernel(batch_shape=nodes)
    kernel = (scaled + level).double()
    shape.lengthscale, scaled.outputscale = lengths[:, None, :], amplitudes.square()
    level.constant = torch.full_like(amplitudes, LEVEL**2)
    return kernel


@torch.no_grad()
def _evidence(
    kernel: Kernel,
    at: Float[Tensor, "point coordinate"],
    targets: Float[Tensor, " point"],
    noise: Float[Tensor, "node point point"],
) -> Float[Tensor, " node"]:
    """The log marginal likelihood of every node."""
    total = kernel(at).to_dense() + noise
    nothing = torch.zeros_like(targets)
    return torch.distributions.MultivariateNormal(nothing, total).log_prob(targets)


def _resampled(log_weights: Float[Tensor, " node"], seed: int) -> Int[Tensor, " kept"]:
    """`KEPT` nodes drawn by weight (systematic resampling)."""
    chance = torch.Generator().manual_seed(seed)
    steps = (torch.arange(KEPT, dtype=torch.float64) + torch.rand(1, dtype=torch.float64, generator=chance)) / KEPT
    return torch.searchsorted(torch.softmax(log_weights, 0).cumsum(0), steps).clamp(max=len(log_weights) - 1)
