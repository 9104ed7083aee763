"""Mixing by hand what two models return, whatever its form."""

from typing import Any

import torch


def mixed(reference: Any, anchor: Any, weight: float) -> Any:
    """`(1 - weight) reference + weight anchor`, taken in double precision; the reference's where it is no number."""
    if isinstance(reference, torch.Tensor):
        if not reference.is_floating_point():
            return reference
        return (reference.double() * (1 - weight) + anchor.double() * weight).to(reference.dtype)
    if isinstance(reference, list | tuple):
        return type(reference)(mixed(one, other, weight) for one, other in zip(reference, anchor, strict=True))
    if hasattr(reference, "to_tuple"):
        return type(reference)(**{name: mixed(reference[name], anchor[name], weight) for name in reference})
    return reference
