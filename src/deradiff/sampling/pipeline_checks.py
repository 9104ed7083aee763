"""What has to hold of a realigned pipeline, a line each: equal to the bit, or close beside the anchor's effect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARP = 1e-3
"""A difference of this share of the anchor's effect is rounding, whatever the numbers are computed in."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Up to which share of the largest latent a difference may be rounding."""

TELLING = 0.05
"""Up to which share of the anchor's effect a difference that may be rounding tells one λ from another."""


@dataclass(frozen=True)
class PipelineCheck:
    """One thing that has to hold.

    Attributes:
        name: what, in words.
        holds: None where it could not be judged.
        number: how far off, relative to the anchor's effect; of what has to be equal to the bit, to the largest latent.
        words: what to know of it, or to do where it does not hold.
    """

    name: str
    holds: bool | None
    number: float | None = None
    words: str = ""


def equal(name: str, output: Tensor, expected: Tensor, words: str = "") -> PipelineCheck:
    """Whether all numbers are the same to the bit; `words` say what to do where they are not."""
    if output.shape != expected.shape:
        return PipelineCheck(name, False, None, f"{output.numel()} numbers instead of {expected.numel()}")
    holds = torch.equal(output, expected)
    return PipelineCheck(name, holds, distance(output, expected) / _size(expected), "" if holds else words)


def close(name: str, output: Tensor, expected: Tensor, effect: float, rounding: float) -> PipelineCheck:
    """Whether a difference is rounding; `effect` is the largest that the anchor makes, `rounding` a share of values.

    Where it may be rounding and is as large as what tells one λ from another, it is not judged.
    """
    if output.shape != expected.shape:
        return PipelineCheck(name, False, None, f"{output.numel()} numbers instead of {expected.numel()}")
    difference = distance(output, expected)
    share, rounded = difference / effect, difference <= rounding * _size(expected)
    if share <= SHARP or (rounded and share <= TELLING):
        return PipelineCheck(name, True, share, "of the anchor's effect")
    if rounded:
        coarse = "not judged: so much may be rounding here, and λ moves little more; --dtype float32 tells"
        return PipelineCheck(name, None, share, coarse)
    return PipelineCheck(name, False, share, "of the anchor's effect: λ means something else with this pipeline")


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) or 1.0
