"""How different the images of one prompt are from one another: mean pairwise distance and Vendi score.

Neither needs a reference. Both are taken within prompts, since images of different prompts differ anyway, and averaged
over prompts.

Distances are between features. LPIPS, which other work reports here, compares pixels in place and so asks for the same
composition; its package also needs torchvision. DINOv2's features are what `features.load` has nearest to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from deradiff.algorithm.estimates import Estimate, mean
from deradiff.measures.statistics import require_features

__all__ = ["Diversity", "mean_pairwise_distance", "vendi_score"]


@dataclass(frozen=True)
class Diversity:
    """One number per prompt, and their mean."""

    prompts: Int[Tensor, " prompt"]
    """The values of `groups` in ascending order."""
    per_prompt: Float[Tensor, " prompt"]
    images: Int[Tensor, " prompt"]
    """How many each number is of."""
    mean: Estimate
    """Over prompts, with the standard error over prompts: NaN where there is one prompt alone."""


def mean_pairwise_distance(
    features: Float[Tensor, "image feature"],
    groups: Int[Tensor, " label"] | None = None,
    metric: Literal["euclidean", "cosine"] = "euclidean",
) -> Diversity:
    """The mean distance of two different images of a prompt, unbiased whatever their number.

    Args:
        features: of the images, of all prompts together.
        groups: the prompt of each image, as an index; all the same by default.
        metric: Euclidean distance, or 1 - cosine, in [0, 2].

    Raises:
        ValueError: features that are not finite, a prompt of one image, not one index per image, or under "cosine" a
            feature vector of zeros, which has no direction.
    """
    metrics = {"euclidean": euclidean, "cosine": cosine}
    if metric not in metrics:
        raise ValueError(f"there is no metric {metric!r}: choose among {', '.join(metrics)}")
    return over_prompts(metrics[metric], features, groups)


def vendi_score(
    features: Float[Tensor, "image feature"], groups: Int[Tensor, " label"] | None = None, order: float | int = 1
) -> Diversity:
    """The effective number of different images of a prompt: 1 if all are alike, n if all are orthogonal.

    `exp H(λ)` with the eigenvalues λ of `K/n`, K the cosine similarities and H Shannon's entropy (Friedman and Dieng
    2023, equation 1); at another `order` q of at least 0 Rényi's, `(Σ λ^q)^(1/(1-q))` (Pasarkar and Dieng 2024). The
    lower the order the more rare images count; 0 is the number of dimensions they span, and infinity `1/max λ`.

    It cannot exceed the number of images: compare prompts and models of equally many. Arguments and errors are those of
    `mean_pairwise_distance`, with `ValueError` also for a negative order.
    """
    if not order >= 0:
        raise ValueError(f"the order of a Vendi score is at least 0, not {order}")
    return over_prompts(partial(vendi, order=order), features, groups)


# -- one prompt -------------------------------------------------------------------------------------------------------


def euclidean(features: Float[Tensor, "image feature"]) -> float:
    """The mean Euclidean distance of two images."""
    return float(torch.pdist(features).mean())


def cosine(features: Float[Tensor, "image feature"]) -> float:
    """The mean of 1 - cosine of two images: of all n², those of an image with itself are n ones."""
    n, total = len(features), directions(features).sum(0)
    return float(1 - (total @ total - n) / (n * (n - 1)))


def vendi(features: Float[Tensor, "image feature"], order: float | int) -> float:
    """The Vendi score of one set."""
    # Singular values of the directions give the eigenvalues of K/n from the smaller side, and rounding is told from
    # small ones, which low orders would count as if they were not small.
    scaled = torch.linalg.svdvals(directions(features)) / len(features) ** 0.5
    noise = max(features.shape) * torch.finfo(scaled.dtype).eps * scaled[0]
    shares = scaled[scaled > noise].square()
    shares = shares / shares.sum()
    if order == 1:
        return float(torch.special.entr(shares).sum().exp())
    if math.isinf(order):
        return float(1 / shares.max())
    return float(shares.pow(order).sum().pow(1 / (1 - order)))


def directions(features: Float[Tensor, "image feature"]) -> Float[Tensor, "image feature"]:
    """Unit vectors. Raises `ValueError` for zeros."""
    lengths = features.norm(dim=1)
    if not bool(lengths.all()):
        raise ValueError(
            f"the features of {int((lengths == 0).sum())} of a prompt's {len(features)} images are all zero, which has "
            "no cosine with others: use the Euclidean distance, or another extractor"
        )
    return F.normalize(features, dim=1)


# -- all prompts ------------------------------------------------------------------------------------------------------


def over_prompts(
    measure: Callable[[Float[Tensor, "some feature"]], float],
    features: Float[Tensor, "image feature"],
    groups: Int[Tensor, " label"] | None,
) -> Diversity:
    """`measure` of each prompt's features. Raises `ValueError`, see `mean_pairwise_distance`."""
    exact = require_features(features)
    labels = torch.zeros(len(exact), dtype=torch.int64) if groups is None else groups.cpu()
    if len(labels) != len(exact):
        raise ValueError(f"{len(exact)} images need the index of a prompt each, got {len(labels)}")
    prompts, images = labels.unique(return_counts=True)
    if bool((images < 2).any()):
        alone = prompts[images < 2].tolist()
        raise ValueError(
            f"{len(alone)} of {len(prompts)} prompts, {alone[0]} for one, have a single image: how different images "
            "are needs two at least"
        )
    values = torch.tensor([measure(exact[labels == prompt]) for prompt in prompts], dtype=torch.float64)
    return Diversity(prompts, values, images, mean(values))
