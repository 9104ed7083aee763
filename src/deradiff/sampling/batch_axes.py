"""Where the batch is in the arguments of a denoiser, for every model class that this is known of.

Most tensors have it first, but not all: HiDream's text states are [layer, batch, ...], Flux's position tables have
none, Z-Image takes lists with a tensor per image. A table in `batch_axes.json` says it per class and argument, found
by running diffusers' own pipelines for one and for two images (`python tests/conformance --axes`). What is neither in
the table nor in a class's own `batch_axes` is not guessed: such a batch is not repeated, divided or thinned out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

ROWS = "rows"
"""Stands for an axis: a list with an entry for each row."""

Axes = Mapping[str, int | str | None]
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments, and those by name."""


class UnknownBatch(ValueError):
    """An argument of which it is not known where the batch is."""


class Batch:
    """The arguments of one call of a denoiser, whose parameters these are, as a batch of `rows`.

    Raises `UnknownBatch` where it is not known of some argument whether and where the batch is in it.
    """

    def __init__(
        self, model: type, parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], rows: int
    ):
        self.rows, self._model = rows, model.__name__
        self._positional = parameters[: len(args)]
        self._arguments = dict(zip(self._positional, args, strict=True)) | dict(kwargs)
        axes: Axes | None = getattr(model, "batch_axes", _table().get(self._model))
        if axes is None:
            raise UnknownBatch(f"it is not known where {self._model} has the batch in its arguments")
        self._axes = axes
        self.changed(lambda tensor, axis: tensor, lambda entries: entries)

    def repeated(self, copies: int) -> Call:
        """Every row `copies` times, one after the other."""
        return self.changed(
            lambda tensor, axis: tensor.repeat_interleave(copies, dim=axis),
            lambda entries: [entry for entry in entries for _ in range(copies)],
        )

    def chosen(self, rows: Int[Tensor, " some"]) -> Call:
        """These rows alone."""
        return self.changed(
            lambda tensor, axis: tensor.index_select(axis, rows.to(tensor.device)),
            lambda entries: [entries[row] for row in rows.tolist()],
        )

    def distinct_images(self, images: int) -> tuple[Int[Tensor, " some"], Int[Tensor, " rows"]]:
        """The rows of images that differ in some argument, and where among those each row is found again.

        The batch holds all images once, or several times over where a pipeline guides: an image is as another if all of
        its rows are, and what is left is a batch of the same form.
        """
        numbers: list[list[int]] = []

        def number(tensor: Tensor, axis: int) -> Tensor:
            flat = tensor.movedim(axis, 0).reshape(self.rows, -1)
            numbers.append(torch.unique(flat, dim=0, return_inverse=True)[1].tolist())
            return tensor

        def number_list(entries: Sequence[Any]) -> Sequence[Any]:
            same = [next(j for j, other in enumerate(entries) if _equal(entry, other)) for entry in entries]
            numbers.append(same)
            return entries

        self.changed(number, number_list)
        keys = list(zip(*numbers, strict=True))
        first: dict[Any, int] = {}
        own = [first.setdefault(tuple(keys[image::images]), len(first)) for image in range(images)]
        chosen = [own.index(k) for k in range(len(first))]
        groups = range(self.rows // images)
        return (
            torch.tensor([group * images + image for group in groups for image in chosen]),
            torch.tensor([group * len(first) + k for group in groups for k in own]),
        )

    def changed(
        self, tensor: Callable[[Tensor, int], Tensor], entries: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> Call:
        """The arguments, with what is the batch's changed: every tensor along its axis, every list of one per row."""

        def at(path: str, value: Any) -> Any:
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            if isinstance(value, (list, tuple)):
                if self._axes.get(path) == ROWS and len(value) == self.rows:
                    return entries(value)
                return type(value)([at(f"{path}.*", entry) for entry in value])
            if isinstance(value, dict):
                return {key: at(f"{path}.{key}", entry) for key, entry in value.items()}
            if not isinstance(value, Tensor):
                raise UnknownBatch(f"{path} of {self._model} is a {type(value).__name__}")
            axis = self._axis(path) if value.ndim else None
            if axis is None:
                return value
            if not isinstance(axis, int) or axis >= value.ndim or value.shape[axis] not in (1, self.rows):
                raise UnknownBatch(f"{path} of {self._model} is {tuple(value.shape)} in a batch of {self.rows}")
            return tensor(value, axis) if value.shape[axis] == self.rows else value

        changed = {name: at(name, value) for name, value in self._arguments.items()}
        return tuple(changed.pop(name) for name in self._positional), changed

    def _axis(self, path: str) -> int | str | None:
        if path not in self._axes:
            raise UnknownBatch(f"it is not known where {self._model} has the batch in {path}")
        return self._axes[path]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b


@cache
def _table() -> dict[str, Axes]:
    """The axis of the batch by class and argument; null for an argument without one."""
    text = (files("deradiff.sampling") / "batch_axes.json").read_text(encoding="utf-8")
    table: dict[str, Axes] = json.loads(text)
    return table
