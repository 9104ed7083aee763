"""What a caption of the digits asks for, as rewards: can the digit be read, are the colours those that were named?

Both lie in [0, 1] and follow the counts of `worlds.digits.quality`, but are differentiable in the images.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from deradiff.rewards.pixels import Images
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.classifier import features, recover_ink_map, svm
from deradiff.worlds.digits.data import INKS, PAPERS, SIZE
from deradiff.worlds.digits.rewards import COLOUR_SOFTNESS, ink_colour, paired, paper_colour

MARGIN_SOFTNESS = 0.25
"""The margin of a support vector machine at which a contest is won by 98%; support vectors lie at a margin of 1."""


class Machine(NamedTuple):
    """`classifier.svm` as tensors: contests `i` against `j`, i < j, each a sum over all support vectors."""

    vectors: Float[Tensor, "vector feature"]
    coefficients: Float[Tensor, "contest vector"]
    intercepts: Float[Tensor, " contest"]
    contestants: list[tuple[int, int]]
    gamma: float


@cache
def machine() -> Machine:
    """The classifier that `worlds.digits.quality` reads with, in a form that gradients go through."""
    trained = svm()
    ends = torch.tensor(trained.n_support_).cumsum(0).tolist()
    owned = [slice(end - int(count), end) for end, count in zip(ends, trained.n_support_, strict=True)]
    contestants = [(i, j) for i in range(len(owned)) for j in range(i + 1, len(owned))]
    dual = torch.from_numpy(trained.dual_coef_)
    coefficients = torch.zeros(len(contestants), dual.shape[1], dtype=dual.dtype)
    for row, (i, j) in zip(coefficients, contestants, strict=True):
        # scikit-learn keeps, for the vectors of one class, a row of coefficients for each other class.
        row[owned[i]], row[owned[j]] = dual[j - 1, owned[i]], dual[i, owned[j]]
    return Machine(
        torch.from_numpy(trained.support_vectors_),
        coefficients,
        torch.from_numpy(trained.intercept_),
        contestants,
        trained.gamma,
    )


def margins(ink_maps: Float[Tensor, "batch 256"]) -> Float[Tensor, "batch contest"]:
    """By how much the first of the two digits wins each contest (Cortes and Vapnik 1995), in float64."""
    known = machine()
    vectors, coefficients, intercepts = (part.to(ink_maps.device) for part in known[:3])
    squared = torch.cdist(ink_maps.double(), vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-known.gamma * squared) @ coefficients.T + intercepts


class LegibleReward:
    """The share of the nine other digits over which the classifier prefers the one that the caption names."""

    name = "legible"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` of 32 x 32 pixels in [0, 1]: 1 where every contest is won, softly near a margin of 0.

        Differentiable in the images. Raises `ValueError` if there is not one prompt per image, or if one is no caption
        of the digits.
        """
        pictures = paired(images, prompts)
        if pictures.shape[-2:] != (SIZE, SIZE):
            height, width = pictures.shape[-2:]
            raise ValueError(f"pictures of {height} x {width} pixels: the digits' classifier reads {SIZE} x {SIZE}")
        digits = [captions.parse(prompt).digit for prompt in prompts]
        signs = torch.tensor([[(i == d) - (j == d) for i, j in machine().contestants] for d in digits])
        won = torch.sigmoid(signs.to(pictures.device) * margins(features(recover_ink_map(pictures))) / MARGIN_SOFTNESS)
        return ((won * signs.abs().to(won)).sum(1) / signs.abs().sum(1).to(won)).to(pictures.dtype)


class ColourReward:
    """How well ink and paper agree with the colours that the caption names; a colour it leaves open counts nothing."""

    name = "colours"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` in [0, 1]: the mean over the named colours of their softmin among the palette's.

        1 for a caption that names none, with which no picture disagrees. Differentiable in the images. Raises
        `ValueError` if there is not one prompt per image, or if one is no caption of the digits.
        """
        pictures = paired(images, prompts)
        asked = [captions.parse(prompt) for prompt in prompts]
        inks = agreement(ink_colour(pictures), INKS, [parts.ink for parts in asked])
        papers = agreement(paper_colour(pictures), PAPERS, [parts.paper for parts in asked])
        is_named = torch.tensor([[parts.ink is not None, parts.paper is not None] for parts in asked]).to(inks)
        count = is_named.sum(1)
        nothing_asked = 1 + 0 * papers  # NaN where the picture is
        agreed = (torch.stack([inks, papers], 1) * is_named).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, agreed, nothing_asked)


def agreement(
    colours: Float[Tensor, "batch 3"], palette: dict[str, tuple[float, float, float]], named: Sequence[str | None]
) -> Float[Tensor, " batch"]:
    """The softmin share of the named colour among the palette's, by squared RGB distance; the first's where none is."""
    known = torch.tensor(list(palette.values()), dtype=colours.dtype, device=colours.device)
    shares = F.softmin((colours[:, None] - known).square().sum(2) / COLOUR_SOFTNESS, 1)
    places = torch.tensor([0 if name is None else list(palette).index(name) for name in named], device=colours.device)
    return shares.gather(1, places[:, None])[:, 0]
