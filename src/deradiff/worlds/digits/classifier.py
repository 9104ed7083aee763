"""Reading a picture back: which digit, in what ink, on what paper.

Nothing is told about the colours: paper is what the border shows, ink is what differs from it most. The digit is read
by a support vector machine trained on the real training split.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from deradiff.worlds.digits.data import INKS, PAPERS, render

if TYPE_CHECKING:
    from sklearn.svm import SVC

BORDER = 3
INK_SHARE = 0.06
"""The share of pixels, the farthest from the paper's colour, whose median is the ink's colour."""


class Reading(NamedTuple):
    """What a batch of pictures shows: digits, and indices into `INKS` and `PAPERS`."""

    digits: Int[Tensor, " batch"]
    inks: Int[Tensor, " batch"]
    papers: Int[Tensor, " batch"]


def colours(
    images: Float[Tensor, "batch 3 height width"],
) -> tuple[Float[Tensor, "batch 3"], Float[Tensor, "batch 3"]]:
    """The colours of ink and of paper: the median of the border, and of the pixels farthest from that."""
    inner = torch.ones(images.shape[-2:], dtype=torch.bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    paper = images[:, :, inner].median(-1).values
    pixels = images.flatten(2)
    distance = (pixels - paper[:, :, None]).norm(dim=1)
    farthest = distance.topk(max(1, int(INK_SHARE * distance.shape[1])), dim=1).indices
    ink = pixels.gather(2, farthest[:, None].expand(-1, 3, -1)).median(-1).values
    return ink, paper


def recover_ink_map(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch height width"]:
    """How much ink each pixel holds, in [0, 1]: the projection on the line from the paper's colour to the ink's."""
    ink, paper = colours(images)
    axis = ink - paper
    along = torch.einsum("bchw,bc->bhw", images - paper[:, :, None, None], axis)
    return (along / axis.square().sum(1).clamp(min=1e-4)[:, None, None]).clamp(0, 1)


def features(ink_maps: Float[Tensor, "batch 32 32"]) -> Float[Tensor, "batch 256"]:
    """An ink map at 16x16: what the classifier sees and what variances and distances are measured in."""
    return F.avg_pool2d(ink_maps[:, None], 2).flatten(1)


@cache
def svm() -> "SVC":
    """The classifier, trained on 6,000 renderings of the training split (each digit about four times)."""
    from sklearn.svm import SVC

    pictures = render("train", 6000, seed=1000)
    machine = SVC(C=10.0, gamma=0.02)
    return machine.fit(features(recover_ink_map(pictures.images)).numpy(), pictures.digits.numpy())


def nearest(colour: Float[Tensor, "batch 3"], palette: dict[str, tuple[float, float, float]]) -> Int[Tensor, " batch"]:
    """The index of the palette's nearest colour."""
    return torch.cdist(colour, torch.tensor(list(palette.values()), dtype=colour.dtype)).argmin(1)


def read(images: Float[Tensor, "batch 3 32 32"]) -> Reading:
    """Digit, ink and paper of each picture in [0, 1]."""
    images = images.float()
    ink, paper = colours(images)
    digits = svm().predict(features(recover_ink_map(images)).numpy().astype(np.float64))
    return Reading(torch.as_tensor(digits, dtype=torch.int64), nearest(ink, INKS), nearest(paper, PAPERS))
