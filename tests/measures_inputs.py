"""What the goldens of `tests/data/measures_goldens.py` are of; the tests make the same again. Needs numpy and torch."""

from collections.abc import Mapping

import numpy as np
import torch

FEATURE_SETS: dict[str, tuple[int, int, int]] = {
    "as many": (150, 150, 8),
    "unequal": (200, 90, 16),
    "fewer images than features": (60, 70, 100),
}
"""Images of the reference, generated images, features."""

NEIGHBOURS = (1, 5, 10)

PICTURE_SIZES = [(32, 32), (48, 64), (400, 310)]
"""Height and width, smaller and larger than the 299 pixels of Inception."""


def feature_sets(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping, correlated Gaussian sets, in float64."""
    reference, generated, width = FEATURE_SETS[name]
    random = np.random.default_rng(reference + generated + width)
    mix = random.standard_normal((width, width))
    first = random.standard_normal((reference, width)) @ mix
    second = 0.8 * random.standard_normal((generated, width)) @ mix + 0.3
    return torch.from_numpy(first), torch.from_numpy(second)


def pictures() -> list[torch.Tensor]:
    """Noise over a gradient, as (3, height, width) in 8 bits."""
    random = np.random.default_rng(7)
    found = []
    for height, width in PICTURE_SIZES:
        slope = np.linspace(0, 160, width) + np.linspace(0, 60, height)[:, None]
        noisy = slope + random.integers(-30, 60, (3, height, width))
        found.append(torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)))
    return found


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Of an Inception, far from what a new one has: norms are not one, biases and means not zero."""
    random, found = np.random.default_rng(11), {}
    for name in sorted(shapes):
        noise = random.standard_normal(shapes[name], dtype=np.float32)
        values: np.ndarray
        if name.endswith("conv.weight"):
            values = noise * (2 / np.prod(shapes[name][1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.2 * np.abs(noise)
        else:
            values = 0.1 * noise
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found
