"""Pictures for image towers: the levels of CLIP's processor on PIL images, the gradient of plain interpolation."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deradiff.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    batches,
    clip_pixels,
    picture_tensor,
    require_pairs,
    require_pictures,
)
from messages import naming

SIDE = 56
SIZES = [(56, 56), (112, 112), (28, 28), (200, 56), (57, 131), (131, 57), (256, 90), (20, 47), (9, 400), (1, 1), (3, 2)]


def noise(height: int, width: int) -> Image.Image:
    levels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def smooth(height: int, width: int) -> Image.Image:
    small = np.random.default_rng(height).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def ours(images: Any, side: int = SIDE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In [0, 1], the normalisation undone."""
    pixels = clip_pixels(images, side, CLIP_MEAN, CLIP_STD, "cpu", dtype)
    return pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]


def processor(images: list[Image.Image], side: int = SIDE) -> torch.Tensor:
    made = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = made(images, return_tensors="pt")["pixel_values"]
    return pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", [noise, smooth])
def test_the_levels_are_the_processors(size: tuple[int, int], picture: Any) -> None:
    image = picture(*size)
    expected = processor([image])
    # The issue asks for 2e-3; every level is in fact the same, and one level is 4e-3.
    torch.testing.assert_close(ours([image]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(as_tensor(image)), expected, atol=1e-5, rtol=0)


def test_at_the_towers_real_size() -> None:
    images = [noise(512, 512), smooth(768, 512), noise(416, 608)]
    assert (ours(images, 224) - processor(images, 224)).abs().max() < 1e-5


def test_a_tensor_counts_as_the_picture_it_is_saved_as() -> None:
    images = torch.rand(3, 3, 70, 90)
    saved = [Image.fromarray(levels) for levels in (255 * images.permute(0, 2, 3, 1)).round().byte().numpy()]
    assert torch.equal(ours(images), ours(saved))
    assert (ours(images.half()) - ours(images)).abs().mean() < 1e-3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "transparent P"])
def test_any_mode(mode: str) -> None:
    image = noise(60, 80)
    if "A" in mode:
        image.putalpha(smooth(60, 80).convert("L"))
    image = image.convert(mode.removeprefix("transparent "))
    if mode == "transparent P":
        image.info["transparency"] = 7
    assert (ours([image]) - processor([image])).abs().max() < 1e-5


def test_a_list_of_sizes_is_a_batch() -> None:
    images = [noise(60, 80), smooth(300, 100), noise(20, 20)]
    assert torch.equal(ours(images), torch.cat([ours([image]) for image in images]))


# --- gradients


@pytest.mark.parametrize("size", [(56, 56), (100, 140), (224, 131), (30, 41)])
def test_the_gradient_is_that_of_the_interpolation_without_rounding(size: tuple[int, int]) -> None:
    # Away from black and white, where both clip.
    images = (0.3 + 0.4 * torch.rand(2, 3, *size, dtype=torch.float64)).requires_grad_()
    direction = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    pixels = clip_pixels(images, SIDE, CLIP_MEAN, CLIP_STD, "cpu", torch.float64)
    (found,) = torch.autograd.grad((pixels * direction).sum(), images)

    height, width = (int(SIDE * length / min(size)) for length in size)
    plain = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    plain = plain[:, :, top : top + SIDE, left : left + SIDE]
    plain = (plain - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    (expected,) = torch.autograd.grad((plain * direction).sum(), images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (pixels - plain).abs().max() < 2.5 / 255 / min(CLIP_STD)


def test_no_gradient_where_a_pixel_is_clipped() -> None:
    # An edge from black to white, enlarged: bicubic interpolation overshoots, Pillow clips.
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 1
    images.requires_grad_()
    ours(images, 32)[0, 0, 16, 19].backward()
    assert images.grad is not None and images.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_reach_and_leave_half_precision(dtype: torch.dtype) -> None:
    images = torch.rand(1, 3, 64, 64).to(dtype).requires_grad_()
    pixels = clip_pixels(images, SIDE, CLIP_MEAN, CLIP_STD, "cpu", dtype)
    pixels.sum().backward()
    assert pixels.dtype == dtype and images.grad is not None and images.grad.dtype == dtype
    assert images.grad.abs().sum() > 0


# --- what is refused


def test_nan_stays_in_its_picture() -> None:
    images = torch.rand(2, 3, 60, 60)
    images[1, 0, 5, 5] = torch.nan
    found = ours(images)
    assert not found[0].isnan().any() and found[1].isnan().any()


@pytest.mark.parametrize(
    ("images", "values"),
    [
        (
            torch.linspace(-0.9, 0.9, 192, dtype=torch.float64).view(1, 3, 8, 8),
            ["image 0", -0.9, 0.9, "x / 2 + 0.5"],
        ),
        (torch.cat([torch.rand(2, 3, 8, 8), torch.full((1, 3, 8, 8), 255.0)]), ["image 2", 255]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["torch.uint8", 255]),
        (torch.rand(3, 8, 8), [(3, 8, 8)]),
        (torch.rand(1, 4, 8, 8), [(1, 4, 8, 8)]),
    ],
)
def test_tensors_that_are_no_pictures(images: torch.Tensor, values: list[object]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        require_pictures(images)


def test_rounding_errors_around_the_range_are_none() -> None:
    images = torch.tensor([-0.001, 1.001]).repeat(1, 3, 8, 4)
    assert ours(images, 8).aminmax() == torch.tensor([0.0, 1.0]).aminmax()


def test_lists_that_are_no_pictures() -> None:
    nothing: list[Image.Image] = []
    with pytest.raises(ValueError, match="no images"):
        batches(nothing, torch.device("cpu"))
    path: Any = "a.png"
    with pytest.raises((ValueError, TypeError)):
        batches([path], torch.device("cpu"))
    with pytest.raises(ValueError, match=naming(3, "images", 2, "prompts")):
        require_pairs(torch.rand(3, 3, 8, 8), ["a", "b"])
    assert picture_tensor(noise(4, 6)).shape == (1, 3, 4, 6)
