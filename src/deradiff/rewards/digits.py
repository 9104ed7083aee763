"""What the digits are aligned to: bold ink and vivid colour, in closed form and differentiable.

The reward looks at the picture alone. A little more of it is a bolder stroke and, where the caption leaves a colour
open, a more colourful choice; a lot more of it floods the paper with ink until no digit can be read. That makes it a
good reward to over-optimise in public.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BOLDNESS = 10.0
VIVIDNESS = 4.0


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

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Score `images` in [0, 1]; the prompts only have to be as many. Differentiable in the images.

        Raises `ValueError` if there is not one prompt per image.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: the reward takes one prompt per image")
        return BOLDNESS * boldness(images) + VIVIDNESS * vividness(images)
