"""λ in all the forms that a person gives it, for every anchor and image of a batch, ready to be asked at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deradiff.algorithm.schedules import Constant, Progress, Schedule, finite, numbers_in

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Lams:
    """The λ of every anchor and image, as functions of progress: what `parse_lam` understood of what it was given.

    `raw` is what the user gave, in a form that cannot be changed in place: a number or a `Schedule`, a tuple of these,
    or a read-only dictionary of any of those. `anchors` are the names in the order of the rows of `at`.
    """

    def __init__(self, raw: Any, rows: Mapping[str, Schedule | tuple[Schedule, ...]]) -> None:
        self.raw = raw
        self.anchors = tuple(rows)
        self._rows = tuple(rows.values())

    def __repr__(self) -> str:
        return f"Lams({self.raw!r}, anchors={self.anchors})"

    @property
    def is_constant(self) -> bool:
        """Whether no λ changes along the run (images and anchors may still differ from one another)."""
        schedules = [s for row in self._rows for s in (row if isinstance(row, tuple) else (row,))]
        return all(isinstance(schedule, Constant) for schedule in schedules)

    @property
    def images(self) -> int | None:
        """How many images the λ are for, None where every image has the same."""
        return next((len(row) for row in self._rows if isinstance(row, tuple)), None)

    def at(self, progress: Progress, batch: int) -> Float[Tensor, "anchor batch"]:
        """λ of every anchor (rows, in the order of `anchors`) for each of the `batch` images, float64 on the CPU.

        The images are in diffusers' order: `batch` = prompts x `num_images_per_prompt`, all images of the first prompt
        first, then those of the second. Raises `ValueError` where a list does not have one λ per image.
        """
        import torch

        rows = []
        for anchor, row in zip(self.anchors, self._rows, strict=True):
            if isinstance(row, Schedule):
                rows.append([row.at(progress)] * batch)
            elif len(row) == batch:
                rows.append([schedule.at(progress) for schedule in row])
            else:
                raise ValueError(
                    f"λ of {anchor!r} is a list of {len(row)} values, but the batch holds {batch} images. Give one λ "
                    f"for all, or one for each image; there are prompts x num_images_per_prompt of them, and diffusers "
                    f"keeps the images of one prompt together (all images of the first prompt come first)."
                )
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), batch)


def parse_lam(lam: Any, anchors: Sequence[str]) -> Lams:
    """Check λ in any of its forms and make it ready to be asked for at every step.

    Args:
        lam: a number (a negative one is legal and moves away from the anchor) or a `Schedule`; or a list, tuple, 1-D
            tensor or array of these, one for each image of the batch; or `{anchor: any of those}`, which is the only
            form when there are several anchors.

            A per-image list follows diffusers' order: the batch holds prompts x `num_images_per_prompt` images, and
            all images of the first prompt come first. So one prompt with `num_images_per_prompt=11` and eleven λ is a
            sweep in one call; with two prompts and `num_images_per_prompt=3` the list holds the λ of the first
            prompt's three images, then those of the second's.
        anchors: the anchors' names, in the order in which `Lams.at` answers.

    Raises:
        ValueError: for NaN, infinities, strings, booleans, None, tensors that require a gradient, empty lists, lists
            of different lengths for different anchors, and a dictionary whose keys are not exactly the anchors' names.
            Whether a list fits the batch is only known at the first step: `Lams.at` raises then.
    """
    if isinstance(lam, Mapping):
        unknown, missing = [name for name in lam if name not in anchors], [name for name in anchors if name not in lam]
        if unknown or missing:
            raise ValueError(
                f"λ must be given for exactly the anchors {list(anchors)}"
                + (f"; unknown: {unknown}" if unknown else "")
                + (f"; missing: {missing}" if missing else "")
                + "."
            )
        rows = {name: _per_image(lam[name], f"λ of {name!r}") for name in anchors}
    elif len(anchors) == 1:
        rows = {anchors[0]: _per_image(lam, "λ")}
    else:
        example = ", ".join(f"{name!r}: ..." for name in anchors)
        raise ValueError(f"with {len(anchors)} anchors λ is a dictionary, {{{example}}}; got {lam!r}.")
    lengths = {name: len(row) for name, row in rows.items() if isinstance(row, tuple)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of λ have different lengths, {lengths}; each needs one λ per image of the batch.")
    return Lams(_immutable(lam), rows)


def _immutable(lam: Any) -> Any:
    """A λ that was understood, as it can be read back: out of reach of whoever changes the list or tensor given."""
    if isinstance(lam, Schedule):
        return lam
    if isinstance(lam, Mapping):
        return MappingProxyType({name: _immutable(lam[name]) for name in lam})
    if getattr(lam, "ndim", 0) > 0:
        lam = numbers_in(lam, "λ")
    return tuple(map(_immutable, lam)) if isinstance(lam, Sequence) else finite(lam, "λ")


def _per_image(lam: Any, name: str) -> Schedule | tuple[Schedule, ...]:
    if getattr(lam, "ndim", 0) > 0:
        lam = numbers_in(lam, name)
    if isinstance(lam, Sequence) and not isinstance(lam, str | bytes):
        if not lam:
            raise ValueError(f"{name} is an empty list; give one λ, or one for each image of the batch.")
        return tuple(_schedule(value, f"{name}[{i}]") for i, value in enumerate(lam))
    return _schedule(lam, name)


def _schedule(lam: Any, name: str) -> Schedule:
    return lam if isinstance(lam, Schedule) else Constant(finite(lam, name))
