"""What a pipeline returns, as arrays of numbers, and how far two of these are apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

Arrays = list[np.ndarray]


class ShapesDiffer(ValueError):
    """Two outputs that cannot be compared number by number."""


def arrays_of(output: Any) -> Arrays:
    """All real arrays in a pipeline's output, in double precision; words, flags and complex numbers are left out."""
    if isinstance(output, torch.Tensor):
        return [] if output.is_complex() else [output.detach().double().numpy()]
    if isinstance(output, np.ndarray):
        return [output.astype(np.float64)]
    if isinstance(output, PIL.Image.Image):
        return [np.asarray(output).astype(np.float64)]
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [array for part in output for array in arrays_of(part)]
    return []


def equal(one: Arrays, other: Arrays) -> bool:
    """Whether two outputs are the same, bit for bit."""
    return shapes(one) == shapes(other) and all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(one, other, strict=True)
    )


def difference(one: Arrays, other: Arrays) -> float:
    """The largest difference of two numbers at one place. Raises `ShapesDiffer`."""
    if shapes(one) != shapes(other):
        raise ShapesDiffer(f"shapes are {shapes(one)} and {shapes(other)}")
    return max((float(np.abs(x - y).max()) for x, y in zip(one, other, strict=True) if x.size), default=0.0)


def shapes(arrays: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """The arrays' shapes."""
    return [array.shape for array in arrays]


def is_finite(arrays: Arrays) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(np.isfinite(array).all()) for array in arrays)


def largest(arrays: Arrays) -> float:
    """The largest absolute value."""
    return max((float(np.abs(array).max()) for array in arrays if array.size), default=0.0)


def halves(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The first and the second image of an output for two: arrays with both, or as many arrays for either."""
    if all(len(array) % 2 == 0 for array in arrays):
        return [array[: len(array) // 2] for array in arrays], [array[len(array) // 2 :] for array in arrays]
    middle = len(arrays) // 2
    return arrays[:middle], arrays[middle:]


def is_twice(two: Arrays, one: Arrays) -> bool:
    """Whether `two` can be an output for two images where `one` is an output for one, and `halves` of it are known."""
    try:
        return all(shapes(half) == shapes(one) for half in halves(two))
    except TypeError:  # a number without axes
        return False
