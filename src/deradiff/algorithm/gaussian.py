"""Geometric mixtures of Gaussians: mean, variance, log normaliser, KL divergence.

The geometric mixture of `N(mu_i, s_i² I)` with weights `w_i` that sum to one is `Π N(mu_i, s_i²)^{w_i} / Z`, again a
Gaussian (DeRaDiff, Theorem 1). The first model is the reference, with weight `1 - Σ λ_i`; the others are anchors, with
weights `λ_i` of any sign and size.

Two slips of the paper are not repeated here. Equations 33-36 (several rewards, appendix A.4) leave the reference's
factor `p_ref^{1 - λ_s}` of equation 32 out; the form here keeps it, and the two agree only when the λ_i sum to one. And
the exponent of equation 21, the factor φ that completing the square leaves over, has the wrong sign.

Everything is computed with *relative* precisions, `r_i = min_j s_j² / s_i²` in [0, 1], so that a variance of 1e-20
(diffusers' smallest) neither overflows nor loses digits in float32, and a variance of zero has a meaning: the limit.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Gaussian(NamedTuple):
    """A Gaussian with diagonal covariance; `variance` broadcasts against `mean`."""

    mean: Float[Tensor, "*latent"]
    variance: Float[Tensor, "*#latent"]


class IllConditionedMixture(ValueError):
    """The total precision `Σ w_i / s_i²` is not positive, so the mixture is no distribution."""


def geometric_mixture(
    means: Float[Tensor, "model *latent"],
    variances: Float[Tensor, "model *#latent"],
    weights: Float[Tensor, "model *#latent"],
) -> Gaussian:
    """The normalised product of the Gaussians, each raised to its weight (DeRaDiff, Theorem 1; appendix A.4 corrected).

        1/s² = Σ w_i / s_i²          mu = s² Σ w_i mu_i / s_i²

    Args:
        means: the models' means, the reference's first.
        variances: at least 0, one number per model, per element, or anything between that broadcasts against a mean.
        weights: sum to one over the models, `1 - Σ λ_i` for the reference. One per model (shape `[model]`), or one per
            model and image (shape `[model, batch, 1, 1, 1]`).

    A model of weight zero plays no part, whatever its variance; weight one for one model gives that model's Gaussian
    back bit for bit; equal variances give `Σ w_i mu_i` and the same variance for any weights. Zero variances are the
    limit: models that are all certain (every deterministic sampler) are mixed linearly, as those of equal variance are,
    and where only some are certain these alone decide, with their weights rescaled to sum to one.

    Half-precision means are mixed in float32. The mean has the means' dtype, the variance the variances'.

    Raises:
        IllConditionedMixture: where the total precision is not positive, which needs unequal variances and a weight
            outside [0, 1].
        ValueError: for weights that do not sum to one, and negative or NaN variances.
    """
    mixture = _precisions(means, variances, weights)
    shares = mixture.weights * mixture.relative / mixture.total
    mean = torch.zeros_like(means[0], dtype=shares.dtype)
    for share, model_mean, weight in zip(shares, means, mixture.weights, strict=True):
        # `where`, because a model of weight zero may hold infinities or NaN and still plays no part.
        mean = mean + torch.where(weight != 0, share * model_mean, 0)
    return Gaussian(mean.to(means.dtype), (mixture.scale / mixture.total).to(variances.dtype))


def log_normalizer(
    means: Float[Tensor, "model *latent"],
    variances: Float[Tensor, "model *#latent"],
    weights: Float[Tensor, "model *#latent"],
    batch_dims: int = 1,
) -> Float[Tensor, "*batch"]:
    """`log Z = log ∫ Π N(x; mu_i, s_i²)^{w_i} dx`, summed over all but the first `batch_dims` dimensions of a mean.

        log Z = -½ s² Σ_{i<j} a_i a_j ||mu_i - mu_j||² + ½ Σ_elements [log s² - Σ w_i log s_i²],      a_i = w_i / s_i²

    Only differences of means and ratios of variances enter, so nothing cancels; DeRaDiff's equation 21, a difference of
    squared norms, does (and has its sign wrong). Arguments as in `geometric_mixture`.

    Raises:
        IllConditionedMixture, ValueError: as `geometric_mixture` does; and `ValueError` for a zero variance among the
            models of non-zero weight: there Z has no value. (Leave the weight of such a step, a sampler's last one for
            instance, alone.)
    """
    mixture = _precisions(means, variances, weights)
    if bool((mixture.scale == 0).any()):
        raise ValueError("the normaliser of a mixture has no value where a variance is zero; leave that step out.")
    # s² a_i a_j = (w_i r_i) (w_j r_j) / (scale · total)
    precisions = mixture.weights * mixture.relative
    exponent = torch.zeros_like(means[0], dtype=precisions.dtype)
    for i, j in combinations(range(len(means)), 2):
        coupling = precisions[i] * precisions[j] / (mixture.scale * mixture.total)
        difference = means[i].to(precisions.dtype) - means[j].to(precisions.dtype)
        exponent = exponent - torch.where(coupling != 0, coupling * difference.square(), 0) / 2
    # log s² - Σ w_i log s_i² = -log total + Σ w_i log r_i, since the weights sum to one.
    volume = ((mixture.weights * mixture.log_relative).sum(0) - mixture.log_total) / 2
    return _sum_latent(exponent + volume, batch_dims)


def kl(p: Gaussian, q: Gaussian, batch_dims: int = 1) -> Float[Tensor, "*batch"]:
    """`KL(p || q)`, summed over all but the first `batch_dims` dimensions of the means.

    Infinite where q is certain (variance zero) and p is not, or the other way round, or both are and the means differ.
    """
    dtype = _computing_dtype(p.mean, p.variance, q.mean, q.variance)
    p_variance, q_variance = torch.broadcast_tensors(p.variance.to(dtype), q.variance.to(dtype))
    excess = torch.where(p_variance == q_variance, 0, (p_variance - q_variance) / q_variance)
    # x - log(1 + x), whose limit at infinity floating point does not know.
    spread = torch.where(excess.isinf(), excess, excess - _log1p(excess, p_variance / q_variance))
    difference = p.mean.to(dtype) - q.mean.to(dtype)
    distance = torch.where(difference == 0, 0, difference.square() / q_variance)
    return _sum_latent((spread + distance) / 2, batch_dims)


class _Precisions(NamedTuple):
    """The weights and variances of a mixture as relative precisions; each broadcasts to `[model, *latent]`."""

    weights: Tensor
    scale: Tensor
    """The smallest variance among the models whose weight is not zero."""
    relative: Tensor
    """`scale / s_i²`, in [0, 1]; zero for a model of weight zero."""
    log_relative: Tensor
    """Its logarithm, zero for a model of weight zero."""
    total: Tensor
    """`Σ w_i relative_i`: the mixture's precision times `scale`."""
    log_total: Tensor


def _precisions(means: Tensor, variances: Tensor, weights: Tensor) -> _Precisions:
    dtype = _computing_dtype(means, variances)
    _check_sum(weights)
    variances = _like_means(variances, means, dtype)
    weights = _like_means(weights, means, dtype)
    taking_part = weights != 0
    scale = torch.where(taking_part, variances, torch.inf).amin(0)
    # 1 - r_i and log r_i without cancellation where variances are nearly equal, and 0/0 = 1 where they are equal.
    deficit = torch.where(taking_part & (variances != scale), (variances - scale) / variances, 0)
    ratio = torch.where(variances == scale, 1, scale / variances)
    shortfall = (weights * deficit).sum(0)
    total = 1 - shortfall
    if not bool(((total > 0) & (scale >= 0)).all()):
        raise _ill_conditioned(variances, weights, total)
    relative = torch.where(taking_part, ratio, 0)
    log_relative = torch.where(taking_part, _log1p(-deficit, ratio), 0)
    return _Precisions(weights, scale, relative, log_relative, total, _log1p(-shortfall, total))


def _log1p(x: Tensor, one_plus_x: Tensor) -> Tensor:
    """`log(1 + x)`, exact for small x and, given `1 + x` computed some better way, for x near -1 as well."""
    return torch.where(x.abs() < 0.5, torch.log1p(x), torch.log(one_plus_x))


def _computing_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors, float32 at least: half precision cannot hold a variance of 1e-20."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _like_means(x: Tensor, means: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` of shape `[model, *#latent]` on the means' device with as many dimensions as `means`."""
    missing = means.ndim - x.ndim
    return x.reshape(x.shape[0], *[1] * missing, *x.shape[1:]).to(means.device, dtype)


def _sum_latent(x: Tensor, batch_dims: int) -> Tensor:
    return x.flatten(batch_dims).sum(-1) if x.ndim > batch_dims else x


def _check_sum(weights: Tensor) -> None:
    weights = weights.double() if weights.device.type == "cpu" else weights.float()
    total = weights.sum(0)
    # `not <=`, so that NaN does not pass.
    if not bool(((total - 1).abs() <= 1e-3 * weights.abs().sum(0).clamp(min=1)).all()):
        raise ValueError(
            f"the weights must sum to one over the models (1 - Σ λ for the reference), got {total.tolist()}."
        )


def _ill_conditioned(variances: Tensor, weights: Tensor, total: Tensor) -> ValueError:
    """The error for a mixture's worst element: λ, the variances, and the bound that λ must stay strictly within."""
    variances, weights, total = torch.broadcast_tensors(variances, weights, total)
    worst = total.nan_to_num(nan=-torch.inf).argmin() if total[0].numel() else 0
    s2 = variances.flatten(1)[:, worst].tolist()
    w = weights.flatten(1)[:, worst].tolist()
    if not all(0 <= variance < float("inf") for variance in s2):
        return ValueError(f"variances must be finite and not negative, got {s2} (one per model, the reference first).")
    # Σ w_i / s_i² = 1/s_0² · (1 - Σ λ_i (1 - s_0²/s_i²)) is positive while all λ are multiplied by less than `factor`.
    factor = 1 / sum(lam * (1 - _quotient(s2[0], variance)) for lam, variance in zip(w[1:], s2[1:], strict=True))
    if len(w) == 2:
        side = "under" if s2[1] > s2[0] else "above"
        return IllConditionedMixture(
            f"λ = {w[1]:g} leaves the mixture without a distribution: its precision (1 - λ)/s_0² + λ/s_1² is not "
            f"positive for the reference's variance s_0² = {s2[0]:g} and the anchor's s_1² = {s2[1]:g}. With these, "
            f"λ must stay strictly {side} s_1²/(s_1² - s_0²) = {w[1] * factor + 0.0:g}."
        )
    return IllConditionedMixture(
        f"λ = {[float(f'{lam:g}') for lam in w[1:]]} leave the mixture without a distribution: its precision "
        f"(1 - Σ λ_i)/s_0² + Σ λ_i/s_i² is not positive for the reference's variance s_0² = {s2[0]:g} and the anchors' "
        f"s_i² = {[float(f'{variance:g}') for variance in s2[1:]]}. In these proportions all λ together must stay "
        f"strictly under 1/Σ λ_i (1 - s_0²/s_i²) = {factor:g} times their present values; λ in [0, 1] with a sum of at "
        f"most 1 are always safe."
    )


def _quotient(a: float, b: float) -> float:
    """`a / b` with the limits `0/0 = 1` and `a/0 = ∞`, the latter as a number that can be subtracted from itself."""
    return 1.0 if a == b else a / b if b else 1e300
