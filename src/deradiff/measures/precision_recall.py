"""Precision and recall of a set of images against another, by k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019).

A set's manifold is estimated as the union of balls around its features, each reaching to the k-th nearest neighbour in
the same set. Annealed Importance Guidance calls the recall "generalised" and takes k = 10, the base model being the
reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.measures.statistics import require_features

__all__ = ["PrecisionRecall", "precision_and_recall"]

BLOCK = 2**23
"""Distances held at once: 64 MiB."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]; both depend on `k` and on the numbers of images, so compare equal ones only."""

    precision: float
    """Of the generated images, those on the reference's manifold: fidelity."""
    recall: float
    """Of the reference's images, those on the generated manifold: coverage. 1 for the reference itself."""
    k: int
    samples: tuple[int, int]


def precision_and_recall(
    reference: Float[Tensor, "image feature"], generated: Float[Tensor, "other width"], k: int = 10
) -> PrecisionRecall:
    """Both shares (Kynkäänniemi et al. 2019, equations 1 and 2), k = 10 as in Annealed Importance Guidance.

    A ball includes its surface, as in equation 1, which matters only where images coincide. Memory is bounded: at most
    `BLOCK` distances exist at a time, in float64.

    Raises `ValueError` for features that are not finite or not as many in both sets, and unless either set has more
    than `k` images.
    """
    known = require_features(reference, "the reference's")
    drawn = require_features(generated, "the generated")
    if known.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"{known.shape[1]} and {drawn.shape[1]} features cannot be compared: extract both sets with one extractor"
        )
    if not 1 <= k < min(len(known), len(drawn)):
        raise ValueError(
            f"k = {k} nearest neighbours among {len(known)} and {len(drawn)} images: k must be at least 1 and less "
            "than either, so take a smaller k or more images"
        )
    # Differences are what counts: around the common centre, less is lost by expanding the squares.
    centre = known.mean(0)
    known, drawn = known - centre, drawn - centre
    around_known, around_drawn = squared_radii(known, k), squared_radii(drawn, k)
    is_precise = torch.zeros(len(drawn), dtype=torch.bool)
    is_recalled = torch.zeros(len(known), dtype=torch.bool)
    for rows, squared in squared_distances(known, drawn):
        is_precise |= (squared <= around_known[rows, None]).any(0)
        is_recalled[rows] = (squared <= around_drawn).any(1)
    return PrecisionRecall(
        float(is_precise.double().mean()), float(is_recalled.double().mean()), k, (len(known), len(drawn))
    )


def squared_radii(features: Float[Tensor, "image feature"], k: int) -> Float[Tensor, " image"]:
    """The squared distance of each image to its k-th nearest neighbour; itself, at distance 0, is not one."""
    return torch.cat([squared.kthvalue(k + 1, 1).values for _, squared in squared_distances(features, features)])


def squared_distances(
    first: Float[Tensor, "image feature"], second: Float[Tensor, "other feature"]
) -> Iterator[tuple[slice, Float[Tensor, "row other"]]]:
    """Squared Euclidean distances of some rows of `first` to all of `second`, block by block."""
    step = max(1, BLOCK // len(second))
    lengths = second.square().sum(1)
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        total = first[rows].square().sum(1, keepdim=True) + lengths
        squared = total - 2 * first[rows] @ second.T
        # What is left of equal images is rounding, which must not decide whether they are on each other's surface.
        noise = first.shape[1] * torch.finfo(total.dtype).eps * total
        yield rows, torch.where(squared > noise, squared, 0)
