"""The pixels that pairs become: where the crop is, what it holds, and what is drawn at random."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.pair_rows import PreferencePair
from messages import naming


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, in pixels."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return image


def read_back(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels + 1) * 127.5


def test_the_crop_is_where_the_time_ids_say() -> None:
    pair = PreferencePair("a", ramp(40, 24), ramp(24, 60))
    found = pair_pixels(pair, 24)
    assert found.time_ids.tolist() == [[24, 40, 0, 8, 24, 24], [60, 24, 18, 0, 24, 24]]
    for random in range(5):
        generator = torch.Generator().manual_seed(random)
        found = pair_pixels(pair, 24, crop="random", generator=generator)
        for pixels, (_, _, top, left, *_) in zip(read_back(found.pixels), found.time_ids.tolist(), strict=True):
            torch.testing.assert_close(pixels[0], torch.arange(left, left + 24).expand(24, 24), atol=1e-3, rtol=0)
            torch.testing.assert_close(
                pixels[1], torch.arange(top, top + 24)[:, None].expand(24, 24), atol=1e-3, rtol=0
            )
    places = {
        tuple(pair_pixels(pair, 24, crop="random", generator=generator).time_ids[:, 2:4].flatten().tolist())
        for _ in range(20)
    }
    assert len(places) > 10


def test_pixels_are_the_resized_image_from_minus_one_to_one() -> None:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    pair = PreferencePair("a", image, Image.new("RGB", (5, 5), (255, 0, 128)))
    found = pair_pixels(pair, 30).pixels
    resized = image.resize((45, 30), Image.Resampling.BILINEAR).crop((7, 0, 37, 30))
    expected = torch.from_numpy(np.array(resized)).float().permute(2, 0, 1)
    # Antialiasing at the border of the crop sees one pixel less.
    torch.testing.assert_close(read_back(found[0])[:, :, 1:-1], expected[:, :, 1:-1], atol=1.01, rtol=0)
    torch.testing.assert_close(found[1].mean((1, 2)), torch.tensor([1.0, -1.0, 1 / 255]), atol=1e-5, rtol=0)


def test_a_flip_mirrors_each_picture_half_of_the_time() -> None:
    pair, generator = PreferencePair("a", ramp(16, 16), ramp(16, 16)), torch.Generator().manual_seed(0)
    plain = pair_pixels(pair, 16).pixels
    seen = Counter[tuple[bool, ...]]()
    for _ in range(120):
        found = pair_pixels(pair, 16, flip=True, generator=generator).pixels
        flipped = tuple(not torch.equal(*each) for each in zip(found, plain, strict=True))
        for image, before, mirrored in zip(found, plain, flipped, strict=True):
            torch.testing.assert_close(image, before.flip(-1) if mirrored else before)
        seen[flipped] += 1
    assert len(seen) == 4 and all(12 < count < 50 for count in seen.values())


def test_unseeded_choices_and_odd_sizes() -> None:
    pair = PreferencePair("a", Image.new("RGB", (1, 3000)), Image.new("RGB", (333, 500)))
    for choice in ({"crop": "random"}, {"flip": True}):
        with pytest.raises(ValueError, match="generator"):
            pair_pixels(pair, 8, **choice)
    with pytest.raises(ValueError, match=naming("resolution", 0)):
        pair_pixels(pair, 0)
    assert pair_pixels(pair, 256).pixels.shape == (2, 3, 256, 256)
