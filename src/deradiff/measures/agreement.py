"""How well approximated scores agree with those of retrained models: the statistics of DeRaDiff's appendix A.8.

One pair is one approximation of one retrained model: the mean score that realigning an anchor reached, and the mean
score of the model aligned at that β from scratch. Differences are approximated minus original throughout. All intervals
are percentile bootstrap intervals of SciPy's, seeded: the same numbers give the same interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from deradiff.algorithm.estimates import Estimate

__all__ = [
    "Agreement",
    "AgreementByLam",
    "Difference",
    "ErrorDistribution",
    "Scatter",
    "agreement_by_lam",
    "agreement_of",
    "error_distribution",
    "paired_difference",
    "scatter_of",
]

Values: TypeAlias = Float[Tensor, " _"] | Sequence[float]
"""Scores, one per pair; where a function takes several, they belong together by position."""

CONFIDENCE = 0.95
LIMITS = 1.96
"""Standard deviations within which 95% of normal differences lie (Bland and Altman 1986)."""

RESAMPLES = 10_000
"""Of a bootstrap: the ends of an interval then vary by about 1% of its width with the seed."""

HELD = 2**22
"""Resampled values held at once, 32 MiB."""


@dataclass(frozen=True)
class Agreement:
    """The rows of DeRaDiff's Table 5, in the units of the scores."""

    pairs: int
    mae: float
    """Mean absolute error."""
    mae_bootstrap: float
    """The mean of the MAE over bootstrap resamples of the pairs."""
    mae_interval: tuple[float, float]
    """The 95% bootstrap interval of the MAE."""
    rmse: float
    median_absolute_error: float
    """The median of absolute differences; the table's formula lacks the absolute value."""
    bias: float
    """Bland-Altman mean difference, approximated minus original."""
    sd: float
    """Bland-Altman standard deviation of the differences, with n - 1."""
    limits: tuple[float, float]
    """Bland-Altman limits of agreement, `bias ± 1.96 sd`."""
    original_mean: float
    """What `relative` divides by."""

    def relative(self) -> dict[str, float | tuple[float, float]]:
        """Every statistic in percent of `original_mean` (Table 5, last row); NaN if that is 0."""

        def percent(value: float) -> float:
            return 100 * value / self.original_mean if self.original_mean else math.nan

        return {
            name: (percent(value[0]), percent(value[1])) if isinstance(value, tuple) else percent(value)
            for name, value in vars(self).items()
            if name not in ("pairs", "original_mean")
        }


class AgreementByLam(NamedTuple):
    """Agreement at λ ≤ 1, where predictions are interpolated, and at λ > 1; None where there is no pair."""

    interpolated: Agreement | None
    extrapolated: Agreement | None


def agreement_of(
    approximated: Values,
    original: Values,
    *,
    original_mean: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """The statistics of DeRaDiff's Table 5.

    Args:
        approximated: mean scores that realignment reached.
        original: mean scores of the retrained models, pair by pair.
        original_mean: what relative values divide by. The paper takes the mean over its retrained models, each counted
            once; by default it is the mean of `original`, where a model counts as often as it was approximated.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than 2 pairs, not as many of both, or scores that are not finite.
    """
    y, x = paired(approximated, original)
    d = y - x
    absolute, bias, sd = np.abs(d), float(d.mean()), float(d.std(ddof=1))
    resampled = bootstrapped(absolute, resamples, seed)
    return Agreement(
        pairs=len(d),
        mae=float(absolute.mean()),
        mae_bootstrap=float(resampled.bootstrap_distribution.mean()),
        mae_interval=interval_of(resampled),
        rmse=float(np.sqrt(np.square(d).mean())),
        median_absolute_error=float(np.median(absolute)),
        bias=bias,
        sd=sd,
        limits=(bias - LIMITS * sd, bias + LIMITS * sd),
        original_mean=float(x.mean()) if original_mean is None else original_mean,
    )


def agreement_by_lam(
    approximated: Values,
    original: Values,
    lams: Values,
    *,
    original_mean: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AgreementByLam:
    """`agreement_of` the pairs at λ ≤ 1 and of those at λ > 1, as DeRaDiff's Tables 6 to 17 split them.

    `lams` is the λ of each pair; relative values share one mean, that of `original` over both parts by default. At
    λ = 1 an anchor is compared with itself: the paper's tables have 15 pairs of 6 models, so leave these pairs out.

    Raises `ValueError` as `agreement_of` does, also where a part has a single pair.
    """
    y, x = paired(approximated, original)
    weights = numbers(lams, "λ")
    if len(weights) != len(x):
        raise ValueError(f"{len(x)} pairs need a λ each, got {len(weights)}")
    shared = float(x.mean()) if original_mean is None else original_mean

    def part(rows: np.ndarray, where: str) -> Agreement | None:
        if rows.sum() == 1:
            raise ValueError(f"there is one pair at {where}: statistics need 2 at least, or none")
        if not rows.any():
            return None
        halves = y[rows].tolist(), x[rows].tolist()
        return agreement_of(*halves, original_mean=shared, resamples=resamples, seed=seed)

    return AgreementByLam(part(weights <= 1, "λ ≤ 1"), part(weights > 1, "λ > 1"))


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorDistribution:
    """The empirical distribution of absolute errors, and the table beside it in DeRaDiff's figure 4."""

    errors: tuple[float, ...]
    """The distinct absolute errors in ascending order: where the ECDF steps."""
    shares: tuple[float, ...]
    """The share of pairs with an error of at most that, in (0, 1]: the ECDF's heights."""
    pairs: int
    mae: float
    quantiles: dict[float, float]
    """By probability, interpolated linearly between errors."""
    maximum: float
    fractions: dict[float, float]
    """By threshold, the share of pairs with at most that error."""
    original_mean: float
    original_sd: float
    """With n, as in the paper: the six means of its Table 2 have 0.00145 with n, 0.00159 with n - 1, and figure 4 says
    0.001434."""


def error_distribution(
    approximated: Values,
    original: Values,
    *,
    retrained: Values | None = None,
    probabilities: Sequence[float] = (0.5, 0.75, 0.9),
    thresholds: Sequence[float] = (5e-4, 1e-3),
) -> ErrorDistribution:
    """What DeRaDiff's figure 4 plots and lists.

    `retrained` are the scores of the retrained models, each once, whose mean and standard deviation are listed; by
    default `original`, where a model counts as often as it was approximated. Raises `ValueError` as `agreement_of`
    does.
    """
    y, x = paired(approximated, original)
    once = x if retrained is None else numbers(retrained, "retrained")
    absolute = np.abs(y - x)
    cdf = stats.ecdf(absolute).cdf
    return ErrorDistribution(
        errors=tuple(cdf.quantiles.tolist()),
        shares=tuple(cdf.probabilities.tolist()),
        pairs=len(absolute),
        mae=float(absolute.mean()),
        quantiles={p: float(np.quantile(absolute, p)) for p in probabilities},
        maximum=float(absolute.max()),
        fractions={bound: float(cdf.evaluate(bound)) for bound in thresholds},
        original_mean=float(once.mean()),
        original_sd=float(once.std()),
    )


@dataclass(frozen=True)
class Scatter:
    """How the pairs lie about their linear fit and about the identity line (DeRaDiff, figure 6a)."""

    slope: Estimate
    intercept: Estimate
    correlation: float
    """Pearson's: how well any line fits, 1 also for a wrong slope or a constant offset."""
    concordance: float
    """Lin's coefficient (1989): how well the identity fits, in [-1, 1]; 1 only if all pairs are equal."""
    fit_rmse: float
    """Root mean squared distance of the originals from the fit."""
    identity_rmse: float
    """The same from the identity line."""
    identity_r2: float
    """`1 - Σ (original - approximated)² / Σ (original - mean)²`: 1 if all pairs are equal, negative if the mean of the
    originals would have been closer to them."""


def scatter_of(approximated: Values, original: Values) -> Scatter:
    """The fit of the originals, upright, by the approximations, across, as in DeRaDiff's figure 6a.

    Raises `ValueError` as `agreement_of` does, for fewer than 3 pairs, and if either are all the same, which have no
    line.
    """
    across, upright = paired(approximated, original)
    if len(across) < 3:
        raise ValueError("2 pairs lie on a line, whatever they are: a fit needs 3 at least")
    for scores, name in ((across, "approximated"), (upright, "original")):
        if np.ptp(scores) == 0:
            raise ValueError(f"all {len(scores)} {name} scores are {scores[0]:g}: what does not vary has no fit")
    fit = stats.linregress(across, upright)
    rest, apart = upright - (fit.intercept + fit.slope * across), upright - across
    covariance = np.cov(across, upright, ddof=0)
    return Scatter(
        slope=Estimate(float(fit.slope), float(fit.stderr)),
        intercept=Estimate(float(fit.intercept), float(fit.intercept_stderr)),
        correlation=float(fit.rvalue),
        concordance=float(2 * covariance[0, 1] / (np.trace(covariance) + apart.mean() ** 2)),
        fit_rmse=float(np.sqrt(np.square(rest).mean())),
        identity_rmse=float(np.sqrt(np.square(apart).mean())),
        identity_r2=float(1 - np.square(apart).mean() / upright.var()),
    )


# -- two methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The difference of two methods' mean scores, over prompts."""

    estimate: Estimate
    """First minus second, with the bootstrap's standard error."""
    interval: tuple[float, float]
    """The 95% bootstrap interval; where it holds 0, these prompts do not tell the methods apart."""
    prompts: int


def paired_difference(
    first: Float[Tensor, "prompt seed"],
    second: Float[Tensor, "row column"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap over prompts: by how much `first` scores higher than `second` on average.

    Rows are the same prompts for both methods; seeds are averaged, and need not be as many. Prompts are resampled, each
    with both methods' scores: what makes a prompt easy for both cancels. The interval is for new prompts of this kind.

    Raises `ValueError` for scores that are not finite, fewer than 2 prompts, or not the same number for both.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} prompts: both methods must be scored on the same prompts")
    for scores, name in ((first, "first"), (second, "second")):
        if scores.ndim != 2 or scores.shape[1] == 0:
            raise ValueError(f"the {name} scores must be (prompt, seed), not of shape {tuple(scores.shape)}")
    means = [scores.detach().to("cpu", torch.float64).mean(1) for scores in (first, second)]
    away = numbers(means[0] - means[1], "differences")
    if len(away) < 2:
        raise ValueError("a single prompt cannot be resampled: score 2 at least")
    resampled = bootstrapped(away, resamples, seed)
    estimate = Estimate(float(away.mean()), float(resampled.standard_error))
    return Difference(estimate, interval_of(resampled), len(away))


# -- helpers ----------------------------------------------------------------------------------------------------------


def bootstrapped(values: np.ndarray, resamples: int, seed: int) -> Any:
    """SciPy's percentile bootstrap of the mean."""
    return stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, HELD // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def interval_of(resampled: Any) -> tuple[float, float]:
    """Its ends."""
    return float(resampled.confidence_interval.low), float(resampled.confidence_interval.high)


def paired(approximated: Values, original: Values) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays. Raises `ValueError` unless they are as many, at least 2, and finite."""
    y, x = numbers(approximated, "approximated scores"), numbers(original, "original scores")
    if len(y) != len(x):
        raise ValueError(f"{len(y)} approximated and {len(x)} original scores: they must be pairs")
    if len(x) < 2:
        raise ValueError(f"{len(x)} pairs: agreement needs 2 at least")
    return y, x


def numbers(values: Values, name: str) -> np.ndarray:
    """`values` as float64. Raises `ValueError` where they are not finite."""
    numbers = torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy()
    if not np.isfinite(numbers).all():
        broken = np.flatnonzero(~np.isfinite(numbers))
        raise ValueError(f"{len(broken)} of {len(numbers)} {name} are NaN or infinite, number {broken[0]} first")
    return numbers
