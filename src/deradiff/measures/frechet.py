"""Fréchet distance between two sets of images, FID where the features are Inception's (Heusel et al. 2017).

Of two Gaussians with the features' means and covariances it is the squared 2-Wasserstein distance (Dowson and Landau
1982). Gaussians are fitted, so that everything beyond second moments goes unseen.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from deradiff.measures.statistics import Statistics, require_same_features, singular_values, statistics_of

__all__ = ["Frechet", "frechet_distance"]


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance and what it is made of: `value = means + covariances`, squared units of the features."""

    value: float
    """0 for equal means and covariances, and without an upper bound."""
    means: float
    """`‖μ₁ - μ₂‖²`."""
    covariances: float
    """`Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)`."""
    samples: tuple[int, int]
    features: int
    noise: float
    """`Tr Σ₁/n₁ + Tr Σ₂/n₂`: what `means` would be on average if the two distributions were the same."""

    @property
    def caveat(self) -> str | None:
        """What a report has to say beside the value where there are too few samples for the features; else None."""
        if min(self.samples) > self.features:
            return None
        ranks = [min(n - 1, self.features) for n in self.samples]
        return (
            f"{self.samples[0]} and {self.samples[1]} images for {self.features} features: the covariances have rank "
            f"{ranks[0]} and {ranks[1]} at most, so the distance of {self.value:.4g} is biased upwards. The means' "
            f"sampling noise alone is worth {self.noise:.3g}. Compare it only with distances of as many images; more "
            f"than {self.features} of either would make the covariances regular, many more would shrink the bias."
        )


def frechet_distance(
    reference: Float[Tensor, "image feature"] | Statistics, generated: Float[Tensor, "other width"] | Statistics
) -> Frechet:
    """`‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)` in float64 (Annealed Importance Guidance, equation 12).

    With roots `Σ = RᵀR` the eigenvalues of `Σ₁Σ₂` are the squared singular values of `R₁R₂ᵀ`. So the trace of its
    square root is their sum, which is exact for singular covariances too: no matrix root, and nothing added to the
    diagonal. `R₁R₂ᵀ` has no more rows and columns than images or features, whichever are fewer.

    Raises `ValueError` for features that are not finite, of fewer than 2 images, or not as many in both sets.
    """
    first, second = statistics_of(reference, "the reference's"), statistics_of(generated, "the generated")
    require_same_features(first, second)
    traces = [float(each.root.square().sum()) for each in (first, second)]
    overlap = float(singular_values(first.root @ second.root.T).sum())
    means = float((first.mean - second.mean).square().sum())
    # Rounding can leave equal covariances a hair below zero, where no distance is.
    covariances = max(0.0, sum(traces) - 2 * overlap)
    return Frechet(
        value=means + covariances,
        means=means,
        covariances=covariances,
        samples=(first.samples, second.samples),
        features=first.features,
        noise=traces[0] / first.samples + traces[1] / second.samples,
    )
