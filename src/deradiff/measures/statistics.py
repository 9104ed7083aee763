"""What a set of images' features is summed up by: their mean, their covariance, and how many they were.

The covariance is kept as a *root*, a matrix whose Gram matrix it is. Its singular values are the standard deviations
along the principal axes; nothing is squared on the way to them, so that a singular covariance, of fewer images than
features, is as exact as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Statistics", "require_features", "statistics_of"]

SLACK = 1e-6
"""How far from symmetric and positive a covariance may be, relative to its largest entry: float32's rounding."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of `samples` feature vectors, in float64 on the CPU; small enough to keep and to reuse."""

    mean: Float[Tensor, " feature"]
    root: Float[Tensor, "row feature"]
    """`rootᵀ root` is the covariance; at most as many rows as features."""
    samples: int

    @classmethod
    def of(cls, features: Float[Tensor, "image feature"], name: str = "the") -> Statistics:
        """Those of `features`. Raises `ValueError` (see `require_features`)."""
        rows = require_features(features, name)
        # Counted from the first image, a feature that never changes is exactly zero, and so is its variance.
        away = rows - rows[0]
        shift = away.mean(0)
        return cls(rows[0] + shift, compressed((away - shift) / (len(rows) - 1) ** 0.5), len(rows))

    @classmethod
    def of_covariance(
        cls, mean: Float[Tensor, " feature"], covariance: Float[Tensor, "_ _"], samples: int
    ) -> Statistics:
        """Those that somebody published as mean and covariance, of `samples` images.

        Eigenvalues that are zero but for rounding are zero, as are all but the largest `samples - 1`. Raises
        `ValueError` for numbers that are not finite, a matrix that is no covariance of so many features, and under 2
        samples.
        """
        centre, matrix = (given.detach().to("cpu", torch.float64) for given in (mean, covariance))
        if samples < 2:
            raise ValueError(f"{samples} samples have no covariance: at least 2 are needed")
        if matrix.shape != (len(centre), len(centre)):
            raise ValueError(f"a mean of {len(centre)} features has no covariance of shape {tuple(matrix.shape)}")
        if not bool(torch.isfinite(centre).all() and torch.isfinite(matrix).all()):
            raise ValueError("the mean or the covariance holds NaN or infinity: compute them anew")
        slack = SLACK * float(matrix.abs().max())
        variances, axes = torch.linalg.eigh((matrix + matrix.T) / 2)  # from the smallest
        if float((matrix - matrix.T).abs().max()) > slack or float(variances[0]) < -slack:
            raise ValueError(
                f"the matrix is no covariance: it is {float((matrix - matrix.T).abs().max()):.3g} off from symmetric, "
                f"and its smallest eigenvalue is {float(variances[0]):.3g}"
            )
        is_zero = variances <= len(centre) * torch.finfo(variances.dtype).eps * variances[-1]
        is_zero[: max(0, len(centre) - (samples - 1))] = True
        return cls(centre, (variances.sqrt()[:, None] * axes.T)[~is_zero], samples)

    @property
    def covariance(self) -> Float[Tensor, "feature feature"]:
        """The unbiased covariance, divided by `samples - 1`."""
        return self.root.T @ self.root

    @property
    def features(self) -> int:
        """How many there are."""
        return len(self.mean)

    @property
    def most_rank(self) -> int:
        """The rank that the covariance of so many samples can have."""
        return min(self.samples - 1, self.features)

    def merged(self, other: Statistics) -> Statistics:
        """Those of both sets together, without their features (Chan, Golub and LeVeque 1983).

        Raises `ValueError` if they are not of the same features.
        """
        require_same_features(self, other)
        n, shift = self.samples + other.samples, other.mean - self.mean
        parts = [((each.samples - 1) / (n - 1)) ** 0.5 * each.root for each in (self, other)]
        between = (self.samples * other.samples / (n * (n - 1))) ** 0.5 * shift[None]
        return Statistics(self.mean + other.samples / n * shift, compressed(torch.cat([*parts, between])), n)


def statistics_of(given: Float[Tensor, "image feature"] | Statistics, name: str) -> Statistics:
    """`given` itself, or the statistics of these features, which an error calls `name`."""
    return given if isinstance(given, Statistics) else Statistics.of(given, name)


def compressed(root: Float[Tensor, "row feature"]) -> Float[Tensor, "fewer feature"]:
    """The same Gram matrix from no more rows than features."""
    return torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def singular_values(matrix: Float[Tensor, "row column"]) -> Float[Tensor, " smaller"]:
    """From the largest on, by one thread.

    LAPACK reduces the matrix column by column, at the pace of memory: a second thread saves nothing, and where cores
    are busy the two spend their time waiting for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.svdvals(matrix)
    finally:
        torch.set_num_threads(threads)


# -- what was given ---------------------------------------------------------------------------------------------------


def require_features(
    features: Float[Tensor, "..."], name: str = "the", least: int = 2
) -> Float[Tensor, "image feature"]:
    """`features` in float64 on the CPU, without their history.

    Raises `ValueError`, which calls them "`name` features", unless they are a matrix of finite floats, one row for each
    of `least` images or more.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} features must be a matrix (image, feature), not of shape {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{name} features are of {len(features)} images: at least {least} are needed")
    exact = features.detach().to("cpu", torch.float64)
    broken = ~torch.isfinite(exact).all(1)
    if bool(broken.any()):
        raise ValueError(
            f"{name} features of {int(broken.sum())} of {len(exact)} images hold NaN or infinity, first image "
            f"{int(broken.nonzero()[0])}: look at these images, and extract in float32 if it was half precision"
        )
    return exact


def require_same_features(first: Statistics, second: Statistics) -> None:
    """Raise `ValueError` unless both are of as many features."""
    if first.features != second.features:
        raise ValueError(
            f"{first.features} and {second.features} features cannot be compared: extract both sets with one extractor"
        )
