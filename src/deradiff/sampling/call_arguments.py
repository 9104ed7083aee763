"""What a denoiser is called with, and the rows of what it returns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree

ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Among which a pipeline hands over the scale of LoRAs."""

_TIMESTEP = ("timestep", "timesteps", "timestep_ratio")


def timestep_argument(parameters: Collection[str]) -> str | None:
    """By which of its usual names a denoiser is told the timestep; None for one that is told in another way."""
    return next((name for name in _TIMESTEP if name in parameters), None)


def without_scale(kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A call's arguments without the LoRA scale among them, and that scale."""
    for key in ATTENTION_KWARGS:
        if "scale" in (extra := kwargs.get(key) or {}):
            return {**kwargs, key: {name: extra[name] for name in extra if name != "scale"}}, extra["scale"]
    return kwargs, 1.0


def output_rows(output: Any, rows: int, chosen: Int[Tensor, " some"]) -> Any:
    """What a model returned for a batch of `rows`, with only the chosen ones of its tensors, or of its lists."""

    def of(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[chosen.to(part.device)] if part.ndim and len(part) == rows else part
        return [part[row] for row in chosen.tolist()] if _is_list_of_rows(part) and len(part) == rows else part

    return pytree.tree_map(of, output, is_leaf=_is_list_of_rows)


def joined_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What a model returned for parts of a batch of these sizes, as it would have for the whole."""

    def joined(*parts: Any) -> Any:
        if not (isinstance(parts[0], Tensor) and parts[0].ndim) and not _is_list_of_rows(parts[0]):
            return parts[0]
        if [len(part) for part in parts] != [*sizes]:
            return parts[0]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]

    return pytree.tree_map(joined, *outputs, is_leaf=_is_list_of_rows)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a model returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def written_to(arguments: Any) -> list[int]:
    """How often each tensor among the arguments has been written to."""
    return [tensor._version for tensor in tensors_of(arguments) if not tensor.is_inference()]


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Tensor) for entry in value)
