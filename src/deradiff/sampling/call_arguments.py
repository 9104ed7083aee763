"""The arguments of a denoiser's call, and the batch in them: every tensor whose first axis is that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree

UNBATCHED = ("img_ids", "txt_ids")
"""Position tables of Flux: their first axis is the sequence, not the batch."""

ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Among which a pipeline hands over the scale of LoRAs."""

_TIMESTEP = ("timestep", "timesteps")


def timestep_argument(model: type, parameters: Collection[str]) -> str:
    """By which of its usual names a denoiser is told the timestep; `ValueError` for one that is not."""
    for name in _TIMESTEP:
        if name in parameters:
            return name
    raise ValueError(
        f"{model.__name__} cannot be realigned: its forward takes {', '.join(parameters)}, but no timestep, by which a "
        "step of the mixture knows where in the run it is"
    )


def without_scale(kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A call's arguments without the LoRA scale among them, and that scale."""
    for key in ATTENTION_KWARGS:
        if "scale" in (extra := kwargs.get(key) or {}):
            return {**kwargs, key: {name: extra[name] for name in extra if name != "scale"}}, extra["scale"]
    return kwargs, 1.0


def repeated(value: Any, rows: int, copies: int) -> Any:
    """`value` with every tensor in it whose first axis is the batch repeated `copies` times, row by row."""
    return each_batch(value, rows, lambda tensor: tensor.repeat_interleave(copies, dim=0))


def distinct_images(value: Any, rows: int, images: int) -> tuple[Int[Tensor, " some"], Int[Tensor, " rows"]]:
    """The rows of images that differ in some tensor of `value`, and where among those each row is found again.

    The batch holds all images once, or several times over where a pipeline guides: an image is as another if all of its
    rows are, and what is left is a batch of the same form.
    """
    numbers: list[list[int]] = []

    def number(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(rows, -1)
        numbers.append(torch.unique(flat, dim=0, return_inverse=True)[1].tolist())
        return tensor

    each_batch(value, rows, number)
    keys = list(zip(*numbers, strict=True))
    first: dict[Any, int] = {}
    own = [first.setdefault(tuple(keys[image::images]), len(first)) for image in range(images)]
    chosen = [own.index(k) for k in range(len(first))]
    groups = range(rows // images)
    return (
        torch.tensor([group * images + image for group in groups for image in chosen]),
        torch.tensor([group * len(first) + k for group in groups for k in own]),
    )


def rows_of(value: Any, rows: int, chosen: slice | Tensor) -> Any:
    """`value` with only the chosen rows of every tensor in it whose first axis is the batch."""
    return each_batch(value, rows, lambda tensor: tensor[chosen])


def each_batch(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` of every tensor in it whose first axis is the batch, in lists and dictionaries too."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == rows else value
    if isinstance(value, (list, tuple)):
        return type(value)(each_batch(entry, rows, change) for entry in value)
    if isinstance(value, dict):
        return {key: each_batch(entry, rows, change) for key, entry in value.items()}
    return value


def output_rows(output: Any, rows: int, chosen: slice | Tensor) -> Any:
    """What a model returned for a batch of `rows`, with only the chosen rows of every tensor in it."""

    def of(tensor: Tensor) -> Tensor:
        index = chosen.to(tensor.device) if isinstance(chosen, Tensor) else chosen
        return tensor[index].contiguous() if tensor.ndim and len(tensor) == rows else tensor

    return pytree.tree_map_only(Tensor, of, output)


def joined_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What a model returned for parts of a batch of these sizes, as it would have for the whole."""

    def joined(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor) and all(len(part) == size for part, size in zip(parts, sizes, strict=True)):
            return torch.cat(parts)
        return parts[0]

    return pytree.tree_map(joined, *outputs)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a model returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
