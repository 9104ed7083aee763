"""What the digits are aligned to, in closed form and differentiable; these rewards look at the picture alone.

The shipped anchors like bold ink and vivid colour. A little more of that reward is a bolder stroke and, where the
caption leaves a colour open, a more colourful choice; a lot more of it floods the paper with ink until no digit can be
read. That makes it a good reward to over-optimise in public.

Two more rewards are for judging realignment. One is smooth: boldness varies around a single mode. The other chooses
between modes: it ranks the six ink colours, and a caption that leaves the ink open lets the model choose. Both vary by
about one point between the reference's pictures of one caption, so that β means the same for either.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from deradiff.rewards.pixels import Images, batches, require_pairs, require_pictures
from deradiff.worlds.digits.classifier import BORDER
from deradiff.worlds.digits.data import INKS

BOLDNESS = 10.0
VIVIDNESS = 4.0

BOLD_POINTS = 25.0
"""Points per unit of boldness: between the reference's samples of one caption (guidance 1) the standard deviation is
0.74 points, from 0.64 where the caption names both colours to 0.99 where it names none."""

INK_POINTS = 3.0
"""Points between the least and the best liked ink: six ranks, equally likely, have a standard deviation of 1.02."""

INK_SCORES: dict[str, float] = {"green": 0.0, "purple": 0.2, "black": 0.4, "orange": 0.6, "blue": 0.8, "red": 1.0}
"""How well `InkReward` likes each of `INKS`, in equal steps from 0 to 1. The order hardly correlates with
luminance (0.1) nor, in the reference's samples, with boldness (-0.06): the two rewards pull in different directions."""

INK_SOFTNESS = 0.05
"""RGB distance in which a pixel's say about the ink's colour falls by a factor e, counted from the farthest pixel."""

COLOUR_SOFTNESS = 0.03
"""Squared RGB distance in which an ink's say about the score falls by a factor e. The closest two inks, red and orange,
are 0.15 apart: at either one the other has a say below 1%, and halfway between them the score changes fastest."""


def paired(images: Images, prompts: Sequence[str]) -> Float[Tensor, "batch 3 height width"]:
    """`images` as one tensor, in float32 at least.

    Raises `ValueError` unless there is one prompt per image, for no images, for a tensor that is not in [0, 1], and for
    PIL images of several sizes.
    """
    require_pairs(images, prompts)
    parts = batches(images, torch.device("cpu")) if not isinstance(images, Tensor) else [require_pictures(images)]
    if len({part.shape for part in parts}) > 1:
        raise ValueError("pictures of the digits have one size: these differ")
    dtype = torch.promote_types(images.dtype, torch.float32) if isinstance(images, Tensor) else torch.float32
    return torch.cat(parts).to(dtype)


def boldness(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """The share of the picture covered by ink, in [0, 1].

    A pixel counts as ink by its luminance (Rec. 601), through a sigmoid centred between the darkest paper (0.81) and
    the lightest ink (0.56) of the palette.
    """
    red, green, blue = images.unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.sigmoid((0.69 - luminance) / 0.04).mean((1, 2))


def vividness(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Mean chroma, the largest minus the smallest of red, green and blue, in [0, 1]."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


class DigitsReward:
    """`10 boldness + 4 vividness`, in points from 0 to 14; real digits lie around 3, a picture full of ink above 12."""

    name = "bold and vivid"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` in [0, 1]; the prompts only have to be as many. Differentiable in the images.

        Raises `ValueError` if there is not one prompt per image.
        """
        pictures = paired(images, prompts)
        return BOLDNESS * boldness(pictures) + VIVIDNESS * vividness(pictures)


class BoldReward:
    """`BOLD_POINTS` times boldness: smooth, with one mode per caption."""

    name = "bold"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` in [0, 1], in points from 0 to `BOLD_POINTS`; the prompts only have to be as many.

        Differentiable in the images. Raises `ValueError` if there is not one prompt per image.
        """
        return BOLD_POINTS * boldness(paired(images, prompts))


def paper_colour(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3"]:
    """The median of the border, as in `worlds.digits.classifier.colours`; RGB in [0, 1]."""
    inner = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    return images[:, :, inner].median(-1).values


def ink_colour(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3"]:
    """The colour that differs most from the paper's, as a softmax over pixels.

    The soft form of `worlds.digits.classifier.colours`: differentiable in every pixel, RGB in [0, 1].
    """
    pixels = images.flatten(2)
    # The gradient of a norm at zero is not a number: pixels of exactly the paper's colour are common.
    distance = (pixels - paper_colour(images)[:, :, None]).square().sum(1).add(1e-8).sqrt()
    return torch.einsum("bp,bcp->bc", torch.softmax(distance / INK_SOFTNESS, 1), pixels)


class InkReward:
    """`INK_POINTS` times the score of the picture's ink colour (see `INK_SCORES`): it chooses between modes."""

    name = "ink"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` in [0, 1], in points from 0 to `INK_POINTS`; the prompts only have to be as many.

        The mean of the inks' scores, softly weighted by how near each is to the picture's ink colour; differentiable in
        the images. Raises `ValueError` if there is not one prompt per image.
        """
        pictures = paired(images, prompts)
        palette = torch.tensor([INKS[name] for name in INK_SCORES]).to(pictures)
        scores = torch.tensor(list(INK_SCORES.values())).to(pictures)
        squared = (ink_colour(pictures)[:, None] - palette).square().sum(2)
        return INK_POINTS * F.softmin(squared / COLOUR_SOFTNESS, 1) @ scores
