"""What a denoiser is called with, and the rows of what it returns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree

from deradiff.sampling.per_model import PLAIN

ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Among which a pipeline hands over the scale of LoRAs."""

_TIMESTEP = ("timestep", "timesteps", "timestep_ratio", "r")


def timestep_argument(parameters: Collection[str]) -> str | None:
    """By which of its usual names a denoiser is told the timestep; None for one that is told in another way."""
    return next((name for name in _TIMESTEP if name in parameters), None)


def without_scale(kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A call's arguments without the LoRA scale among them, and that scale."""
    for key in ATTENTION_KWARGS:
        if "scale" in (extra := kwargs.get(key) or {}):
            return {**kwargs, key: {name: extra[name] for name in extra if name != "scale"}}, extra["scale"]
    return kwargs, 1.0


@torch.compiler.disable
def is_only_rows(output: Any, rows: int) -> bool:
    """Whether all that a model returned for a batch has a row for each of its `rows`; numbers and the like aside.

    It has not where there is a cache among it, of which nobody knows where its rows are, or a tensor of another length.
    """

    def has_rows(leaf: Any) -> bool:
        return (_is_list_of_rows(leaf) or (isinstance(leaf, Tensor) and leaf.ndim > 0)) and len(leaf) == rows

    leaves = pytree.tree_leaves(output, is_leaf=_is_list_of_rows)
    return all(isinstance(leaf, PLAIN) or has_rows(leaf) for leaf in leaves)


def output_rows(output: Any, chosen: Int[Tensor, " some"]) -> Any:
    """What a model returned, which `is_only_rows`, with only the chosen ones of its tensors, or of its lists."""

    def of(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[chosen.to(part.device)]
        return [part[row] for row in chosen.tolist()] if _is_list_of_rows(part) else part

    return pytree.tree_map(of, output, is_leaf=_is_list_of_rows)


def joined_outputs(outputs: Sequence[Any]) -> Any:
    """What a model returned for the parts of a batch, all of which `is_only_rows`, as it would have for the whole."""

    def joined(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return [row for part in parts for row in part] if _is_list_of_rows(parts[0]) else parts[0]

    return pytree.tree_map(joined, *outputs, is_leaf=_is_list_of_rows)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a model returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def written_to(arguments: Any) -> list[int]:
    """How often each tensor among the arguments has been written to."""
    return [tensor._version for tensor in tensors_of(arguments) if not tensor.is_inference()]


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Tensor) for entry in value)
