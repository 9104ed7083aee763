"""The batch of a denoiser's call: every tensor among its arguments whose first axis is the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def repeated(value: Any, rows: int, copies: int) -> Any:
    """`value` with every tensor in it whose first axis is the batch repeated `copies` times, row by row."""
    return each_batch(value, rows, lambda tensor: tensor.repeat_interleave(copies, dim=0))


def distinct_rows(value: Any, rows: int) -> dict[int, list[int]]:
    """Rows whose tensors are all equal, under the first of them."""
    numbers: list[list[int]] = []

    def number(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(rows, -1)
        numbers.append(torch.unique(flat, dim=0, return_inverse=True)[1].tolist())
        return tensor

    each_batch(value, rows, number)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(zip(*numbers, strict=True)):
        groups.setdefault(key, []).append(row)
    return {equal[0]: equal for equal in groups.values()}


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
