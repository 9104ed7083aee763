"""Pictures as an image tower takes them: resized until the shortest side fits, cropped at the centre, normalised.

The processors that the papers used work on PIL images, and Pillow resizes in 8 bits: along the rows, rounded to one of
256 levels, and along the columns, rounded again. `clip_pixels` computes exactly these levels on tensors, so that a
tensor and the PIL image it would be saved as have one score. Rounding has no useful gradient; the gradient here is that
of the same computation without rounding (the straight-through estimator, Bengio et al. 2013).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import PIL
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from deradiff.files.images import rgb

Images: TypeAlias = Float[Tensor, "batch 3 height width"] | Sequence[Image.Image]
"""A float tensor in [0, 1], or PIL images of any mode, each of any size."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures CLIP was trained on, red, green and blue in [0, 1] (Radford et al. 2021)."""

LEVELS = 255.0
FIXED_POINT = 2.0**22
"""Pillow's weights are integers, one divided by so many."""

CHOOSES_ORDER = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether the installed Pillow begins with the columns where that is faster, which older ones never did."""


# -- what was given ---------------------------------------------------------------------------------------------------


def require_pairs(images: Images, prompts: Sequence[str]) -> None:
    """Raise `ValueError` unless there is one prompt per image."""
    if isinstance(images, Image.Image):
        raise ValueError("one PIL image was given: pass a list of images, and as many prompts")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: the reward takes one prompt per image")


def batches(images: Images, device: torch.device) -> list[Float[Tensor, "part 3 _ _"]]:
    """Images in [0, 1] on `device`, a tensor as it is, PIL images one by one: in float64, where 8 bits stay exact."""
    if len(images) == 0:
        raise ValueError("there are no images to score")
    exact = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(images, Tensor):
        return [require_pictures(images).to(device, exact)]
    return [picture_tensor(image, place).to(device, exact) for place, image in enumerate(images)]


def require_pictures(images: Tensor) -> Tensor:
    """`images` again. Raises `ValueError` unless it is a batch of three channels, floats in [0, 1] (or NaN)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be a tensor (batch, 3, height, width), but its shape is {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], but the tensor is {images.dtype}: divide 0..255 by 255")
    slack = 0.5 / LEVELS
    outside = ((images < -slack) | (images > 1 + slack)).flatten(1).any(1)
    if outside.any():
        worst = int(outside.nonzero()[0])
        low, high = images[worst].aminmax()
        raise ValueError(
            f"images must be in [0, 1], but image {worst} goes from {low.item():.3g} to {high.item():.3g}: pictures in "
            "[-1, 1] become x / 2 + 0.5"
        )
    return images


def picture_tensor(image: Image.Image, place: int = 0) -> Float[Tensor, "1 3 height width"]:
    """A PIL image in [0, 1], as `files.images.rgb` makes it; `place` is its index, for errors. Raises `ValueError`."""
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image {place} is a {type(image).__name__}: pass PIL images, or one float tensor (batch, 3, height, width)"
        )
    return torch.from_numpy(np.array(rgb(image, f"image {place}"))).permute(2, 0, 1)[None] / LEVELS


# -- resizing ---------------------------------------------------------------------------------------------------------


def resized_in_levels(
    images: Float[Tensor, "batch 3 height width"], side: int
) -> Float[Tensor, "batch 3 {side} {side}"]:
    """Resized and cropped as Pillow and CLIP's processor do it, in [0, 1] in steps of 1/255."""
    rows, columns = (
        (weights * FIXED_POINT).round().div(FIXED_POINT).to(images) for weights in crop(images, side, lambda m: m // 2)
    )
    levels = rounded(LEVELS * images)
    shorter, narrower = (
        before - after for before, after in zip(images.shape[-2:], resized_shape(images, side), strict=True)
    )
    if CHOOSES_ORDER and shorter > max(0, 2 * narrower):
        return rounded(rounded(rows @ levels) @ columns.T) / LEVELS
    return rounded(rows @ rounded(levels @ columns.T)) / LEVELS


def resized_shape(images: Float[Tensor, "batch 3 height width"], side: int) -> tuple[int, int]:
    """Height and width when the shortest is `side`, the other rounded down."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    return int(side * height / shortest), int(side * width / shortest)


def crop(
    images: Float[Tensor, "batch 3 height width"], side: int, offset: Callable[[int], int]
) -> tuple[Float[Tensor, "{side} height"], Float[Tensor, "{side} width"]]:
    """The weights of each row and each column that the centre crop keeps; `offset` of what a length has too much."""
    rows, columns = (
        bicubic(length, resized, offset(resized - side), side)
        for length, resized in zip(images.shape[-2:], resized_shape(images, side), strict=True)
    )
    return rows, columns


def bicubic(length: int, resized: int, start: int, count: int) -> Float[Tensor, "{count} {length}"]:
    """Weights of antialiased bicubic interpolation (Keys 1981, a = -1/2), of `count` pixels from `start`.

    A side of `length` pixels becomes `resized`; where that is fewer, the kernel is widened by as much. Float64.
    """
    scale = length / resized
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale
    distances = (torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / max(scale, 1)
    near = (1.5 * distances - 2.5) * distances.square() + 1
    far = ((2.5 - 0.5 * distances) * distances - 4) * distances + 2
    weights = torch.where(distances < 1, near, torch.where(distances < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def rounded(levels: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest whole level from 0 to 255, halves up; the gradient is that of the clipping alone."""
    clipped = levels.clamp(0, LEVELS)
    # Added this way, what carries the gradient is exactly zero, and the levels stay whole numbers.
    return (clipped + 0.5).floor().detach() + (clipped - clipped.detach())


def normalized(
    images: Float[Tensor, "batch 3 height width"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "batch 3 height width"]:
    """`(images - mean) / std`, channel by channel."""
    centre, spread = (torch.tensor(values).to(images)[:, None, None] for values in (mean, std))
    return (images - centre) / spread


def clip_pixels(
    images: Images,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype,
    resized: Callable[[Float[Tensor, "part 3 _ _"], int], Tensor] = resized_in_levels,
) -> Float[Tensor, "batch 3 {side} {side}"]:
    """What CLIP's processor makes of `images`, on `device`, in `dtype`: `(pixels - mean) / std`.

    The shortest side is resized to `side` by antialiased bicubic interpolation, the middle of the longer one kept.
    Tensors are rounded to 8 bits first, as when they are saved. Differentiable in a tensor; NaN stays NaN. On Apple's
    GPUs, which have no float64, a few pixels may be one level off. Models that were trained on pixels by another
    library have another `resized`.

    Raises `ValueError` for no images, for a tensor that is not in [0, 1], and for a list of anything but PIL images.
    """
    small = torch.cat([resized(part, side) for part in batches(images, torch.device(device))])
    return normalized(small, mean, std).to(dtype)
