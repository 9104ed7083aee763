"""Spectral covariance distances: do two sets of images spread alike, wherever they are and whichever way they point?

FID and recall also punish what alignment means to change, a shift of all images towards what is preferred. Annealed
Importance Guidance (section 4.1) therefore compares the eigenvalues of the covariances alone, which neither translation
nor rotation of the features changes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.measures.frechet import Frechet, frechet_distance
from deradiff.measures.statistics import Statistics, require_same_features, singular_values, statistics_of

__all__ = ["Cloud", "SpectralDistance", "reference_mismatch", "spectral_distance", "spectrum"]


@dataclass(frozen=True)
class SpectralDistance:
    """How differently two sets spread; 0 for equal spectra, and without an upper bound."""

    scd: float
    """Absolute: `Σ (λ₁ - λ₂)²`, in the features' units to the fourth power. The largest eigenvalues decide."""
    lscd: float
    """Relative: `Σ (log λ₁ - log λ₂)²`, without units. The smallest eigenvalues decide. Infinite where one set does not
    spread at all along an axis that its number of images would allow, and the other does."""
    compared: int
    """Eigenvalues in `lscd`."""
    samples: tuple[int, int]
    features: int

    @property
    def caveat(self) -> str | None:
        """What a report has to say beside the values where images are few or not as many in both sets; else None."""
        first, second = self.samples
        caveats = []
        if self.compared < self.features:
            caveats.append(
                f"{first} and {second} images for {self.features} features: LSCD compares {self.compared} eigenvalues, "
                f"the other {self.features - self.compared} are zero for lack of images. Of few images, small "
                "eigenvalues are too small and large ones too large"
            )
        if first != second:
            caveats.append(
                f"{first} images against {second}: with different numbers even equal distributions have different "
                "spectra, so draw as many of either"
            )
        if math.isinf(self.lscd):
            caveats.append("LSCD is infinite: along some axis one of the sets does not vary at all")
        return ". ".join(caveats) + "." if caveats else None


def spectrum(features: Float[Tensor, "image feature"] | Statistics, name: str = "the") -> Float[Tensor, " feature"]:
    """The eigenvalues of the covariance, the largest first, in float64.

    Those that are zero but for rounding are zero, and so are those beyond `samples - 1`. Raises `ValueError` as
    `statistics.require_features` does.
    """
    statistics = statistics_of(features, name)
    deviations = singular_values(statistics.root)
    bound = max(statistics.root.shape) * torch.finfo(deviations.dtype).eps * deviations[:1]
    variances = torch.where(deviations > bound, deviations, 0).square()
    return torch.cat([variances, variances.new_zeros(statistics.features - len(variances))])


def spectral_distance(
    reference: Float[Tensor, "image feature"] | Statistics, generated: Float[Tensor, "other width"] | Statistics
) -> SpectralDistance:
    """SCD and LSCD (Annealed Importance Guidance, equations 13 and 14), all images of a set taken together.

    What the paper leaves open is read so:

    - `‖Σ₁' - Σ₂‖₂²` of two matrices is the sum of squared entries, the only norm that gives equation 13's sum.
    - Eigenvalues correspond by rank, the largest to the largest.
    - Covariances are divided by n - 1, as in FID.
    - LSCD runs over the first `min(n₁, n₂) - 1` eigenvalues at most. Equation 14 sums over all of them, but the paper's
      40 x 50 images in 2,048 dimensions have 49 that are zero for lack of images, whose logarithm is not finite.
    - An axis along which neither set varies counts nothing; one along which only one of them does makes LSCD infinite.

    Raises `ValueError` as `frechet_distance` does.
    """
    first, second = statistics_of(reference, "the reference's"), statistics_of(generated, "the generated")
    require_same_features(first, second)
    spectra = [spectrum(each) for each in (first, second)]
    compared = min(first.most_rank, second.most_rank)
    logs = [each[:compared].log() for each in spectra]
    is_flat = torch.isinf(logs[0]) & torch.isinf(logs[1])
    differences = torch.where(is_flat, 0, logs[0] - logs[1])
    return SpectralDistance(
        scd=float((spectra[0] - spectra[1]).square().sum()),
        lscd=float(differences.square().sum()),
        compared=compared,
        samples=(first.samples, second.samples),
        features=first.features,
    )


# -- the illustration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cloud:
    """One of the sets of `reference_mismatch`, and how far each measure finds it from the base."""

    points: Float[Tensor, "sample 2"]
    mean: Float[Tensor, " 2"]
    covariance: Float[Tensor, "2 2"]
    spectrum: Float[Tensor, " 2"]
    frechet: Frechet
    spectral: SpectralDistance


def reference_mismatch(samples: int = 500, seed: int = 0) -> dict[str, Cloud]:
    """What figure 5 of Annealed Importance Guidance draws: Gaussians in the plane that FID and SCD rank differently.

    "collapsed" lies close to "base" and is tighter, "moved" spreads as "base" does but is shifted and rotated. FID
    finds the collapsed one nearer, SCD and LSCD the moved one. The paper prints no numbers; these are ours. Points are
    drawn exactly: means and covariances of every set are those of its Gaussian.

    Raises `ValueError` for fewer than 3 samples.
    """
    if samples < 3:
        raise ValueError(f"{samples} samples do not spread in a plane: at least 3 are needed")
    noise = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = Statistics.of(noise)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(drawn.covariance), (noise - drawn.mean).T, upper=False
    ).T
    cos, sin = math.cos(math.radians(60)), math.sin(math.radians(60))
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    axes = torch.diag(torch.tensor([2.0, 0.7], dtype=torch.float64))
    shapes = {
        "base": ((0.0, 0.0), axes),
        "collapsed": ((0.3, 0.1), 0.3 * axes),
        "moved": ((2.5, 1.5), axes @ rotation.T),
    }
    sets = {name: white @ root + torch.tensor(mean, dtype=torch.float64) for name, (mean, root) in shapes.items()}
    return {
        name: Cloud(
            points=points,
            mean=points.mean(0),
            covariance=Statistics.of(points).covariance,
            spectrum=spectrum(points),
            frechet=frechet_distance(sets["base"], points),
            spectral=spectral_distance(sets["base"], points),
        )
        for name, points in sets.items()
    }
