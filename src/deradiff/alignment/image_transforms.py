"""From a preference pair to what a latent model trains on: two square images in [-1, 1], and SDXL's conditioning."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from deradiff.alignment.pair_rows import PreferencePair
from deradiff.files.images import rgb

Crop = Literal["centre", "random"]


@dataclass(frozen=True)
class PairPixels:
    """A pair at the training resolution, winner first.

    `pixels` are RGB in [-1, 1]. `time_ids` are SDXL's micro-conditioning of each image, in pixels and in the order of
    diffusers: original height and width, top and left of the crop, target height and width.
    """

    pixels: Float[Tensor, "2 3 height width"]
    time_ids: Float[Tensor, "2 6"]


def pair_pixels(
    pair: PreferencePair,
    resolution: int,
    *,
    crop: Crop = "centre",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> PairPixels:
    """Both images resized to `resolution` on their shorter side (bilinear, antialiased) and cropped to a square.

    Args:
        pair: the images, of any size.
        resolution: the side of the square.
        crop: where the square lies along the longer side; "random" draws it for each image.
        flip: mirror each image left to right with probability ½.
        generator: of the random choices. Seed it by the row's place in the run, not by the process.

    Raises:
        ValueError: a random choice is asked for without a generator.
    """
    if generator is None and (flip or crop == "random"):
        raise ValueError("a random crop or flip needs a generator, else a resumed run would see other pictures")
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    images, time_ids = [], []
    for image in (pair.winner, pair.loser):
        if flip and torch.rand((), generator=generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        width, height = _resized(image.size, resolution)
        across, down = width - resolution, height - resolution
        if crop == "random":
            left, top = (int(torch.randint(room + 1, (), generator=generator)) for room in (across, down))
        else:
            left, top = across // 2, down // 2
        images.append(_square(image, resolution, left, top))
        time_ids.append([image.height, image.width, top, left, resolution, resolution])
    return PairPixels(torch.stack(images), torch.tensor(time_ids, dtype=torch.float32))


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height after resizing the shorter side to `resolution`."""
    width, height = size
    scale = resolution / min(width, height)
    return max(resolution, round(width * scale)), max(resolution, round(height * scale))


def _square(image: Image.Image, resolution: int, left: int, top: int) -> Float[Tensor, "3 height width"]:
    """The square at (`left`, `top`) of the resized image, without making the rest of that image."""
    width, height = _resized(image.size, resolution)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + resolution) * across, (top + resolution) * down)
    # Rounding must not lead past the border, which Pillow refuses.
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    square = rgb(image).resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
