"""Real handwriting in colour: scikit-learn's 1,797 digits, rendered 32x32 as ink on paper.

Every digit is an 8x8 grid of ink counts from the UCI handwritten digits (Alpaydin and Kaynak, 1998). It is upsampled
with a bicubic kernel under a small affine jitter and becomes an *ink map* `m` in [0, 1]; the picture is `paper + m (ink
- paper)`. One fixed, stratified split separates the digits that models see from those that only measure.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
"""Height and width of a picture in pixels."""

INKS: dict[str, tuple[float, float, float]] = {
    "black": (0.10, 0.10, 0.12),
    "red": (0.85, 0.10, 0.12),
    "orange": (0.93, 0.47, 0.05),
    "green": (0.08, 0.52, 0.18),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.52, 0.12, 0.68),
}
"""RGB of every ink colour, in [0, 1]."""

PAPERS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "yellow": (0.98, 0.92, 0.58),
    "pink": (0.98, 0.75, 0.82),
    "mint": (0.68, 0.94, 0.74),
    "sky": (0.66, 0.84, 0.98),
}
"""RGB of every paper colour, in [0, 1]; all light enough for every ink to be read on them."""


class Split(NamedTuple):
    """Digits as handwritten: ink counts scaled to [0, 1] and the digit each one is."""

    strokes: Float[Tensor, "digit 8 8"]
    labels: Int[Tensor, " digit"]


@cache
def load(split: str) -> Split:
    """The `"train"` (1,437) or `"held-out"` (360) digits: a fixed stratified split of scikit-learn's 1,797."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "held-out"):
        raise ValueError(f"the splits are 'train' and 'held-out', not {split!r}")
    digits = load_digits()
    train, held_out = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=digits.target)
    index = np.sort(train if split == "train" else held_out)
    strokes = torch.tensor(digits.images[index] / 16, dtype=torch.float32)
    return Split(strokes, torch.tensor(digits.target[index], dtype=torch.int64))


class Jitter(NamedTuple):
    """How a digit lies on its paper: shift in pixels, size relative to the nominal one, rotation in radians."""

    shift: Float[Tensor, "batch 2"]
    size: Float[Tensor, " batch"]
    angle: Float[Tensor, " batch"]


def draw_jitter(count: int, generator: torch.Generator) -> Jitter:
    """Shifts within 1.5 pixels, sizes within 6%, rotations within 6 degrees, all uniform."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    return Jitter(1.5 * uniform(count, 2), 1 + 0.06 * uniform(count), np.pi / 30 * uniform(count))


def ink_maps(strokes: Float[Tensor, "batch 8 8"], jitter: Jitter) -> Float[Tensor, "batch 32 32"]:
    """Handwriting at 32x32: bicubic upsampling under `jitter`, then a soft threshold so that strokes have an inside."""
    # The 8x8 grid covers 25 of the 32 pixels: room for the jitter and a border of bare paper.
    scale = SIZE / 25 / jitter.size
    cos, sin = scale * jitter.angle.cos(), scale * jitter.angle.sin()
    offset = -jitter.shift * (2 / SIZE)
    rows = [
        torch.stack([cos, -sin, cos * offset[:, 0] - sin * offset[:, 1]], -1),
        torch.stack([sin, cos, sin * offset[:, 0] + cos * offset[:, 1]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(strokes), 1, SIZE, SIZE], align_corners=False)
    fine = F.grid_sample(strokes[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    level = ((fine - 0.22) / 0.6).clamp(0, 1)
    return level * level * (3 - 2 * level)


def paint(
    ink_map: Float[Tensor, "batch height width"], ink: Float[Tensor, "batch 3"], paper: Float[Tensor, "batch 3"]
) -> Float[Tensor, "batch 3 height width"]:
    """Ink on paper: `paper + ink_map (ink - paper)`, in [0, 1]."""
    return paper[:, :, None, None] + ink_map[:, None] * (ink - paper)[:, :, None, None]


class RenderedDigits(NamedTuple):
    """Rendered digits with what they show: indices of the digit, into `INKS` and into `PAPERS`."""

    images: Float[Tensor, "batch 3 32 32"]
    ink_maps: Float[Tensor, "batch 32 32"]
    digits: Int[Tensor, " batch"]
    inks: Int[Tensor, " batch"]
    papers: Int[Tensor, " batch"]


def render(split: str, count: int, seed: int) -> RenderedDigits:
    """`count` pictures: the split's digits in shuffled rounds, with fresh jitter, ink and paper, all uniform."""
    strokes, labels = load(split)
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(labels), generator=generator) for _ in range(-(-count // len(labels)))]
    index = torch.cat(rounds)[:count]
    inks = torch.randint(len(INKS), (count,), generator=generator)
    papers = torch.randint(len(PAPERS), (count,), generator=generator)
    maps = ink_maps(strokes[index], draw_jitter(count, generator))
    images = paint(maps, torch.tensor(list(INKS.values()))[inks], torch.tensor(list(PAPERS.values()))[papers])
    return RenderedDigits(images, maps, labels[index], inks, papers)
