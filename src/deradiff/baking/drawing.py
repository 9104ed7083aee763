"""How a pipeline is sampled here: for what a student is trained on, and for what tells how well it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.schedules import finite
from deradiff.alignment.data_order import seeded
from deradiff.sampling.pictures import DrawnPictures, draw
from deradiff.sweep.sheets import covered


@dataclass(frozen=True)
class Sampler:
    """Calls of a pipeline with the scheduler that it has.

    `guidance_scale` is the pipeline's own where it is None. Raises `ValueError` for fewer than one step or row, and for
    a guidance scale that is negative or not finite.
    """

    steps: int = 25
    guidance_scale: float | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"{self.steps} sampling steps, {self.batch_size} images at a time: both must be 1 or more")
        if self.guidance_scale is not None and finite(self.guidance_scale, "the guidance scale") < 0:
            raise ValueError(f"a guidance scale of {self.guidance_scale:g} guides away from the prompt: name 0 or more")

    def guidance(self, pipe: Any) -> float:
        """The guidance scale that `pipe` is sampled with. Raises `ValueError` where it has none."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        default = getattr(signature(pipe.__call__).parameters.get("guidance_scale"), "default", None)
        if not isinstance(default, int | float):
            raise ValueError(f"{type(pipe).__name__} has no guidance scale of its own: name one")
        return float(default)

    @torch.no_grad()
    def latents(
        self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None = None
    ) -> Float[Tensor, "image *latent"]:
        """The final latents of an image of every prompt, from the noise of its own seed, in single precision.

        Raises `NotFinite` for NaN or infinity.
        """
        parts = [
            self._call(pipe, prompts[rows], seeds[rows], guidance_scale, "latent").images.float().cpu()
            for rows in self._batches(len(prompts))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(
        self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None = None
    ) -> list[Any]:
        """The same images, decoded, for a sheet: one that a safety checker blacked out is covered.

        Raises `NotFinite` for NaN or infinity.
        """
        calls = (
            self._call(pipe, prompts[rows], seeds[rows], guidance_scale, "pil") for rows in self._batches(len(prompts))
        )
        return [
            covered(image) if hidden else image
            for drawn in calls
            for image, hidden in zip(drawn.images, drawn.blacked_out, strict=True)
        ]

    def _batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def _call(
        self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None, kind: str
    ) -> DrawnPictures:
        pipe.set_progress_bar_config(disable=True)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        drawn = draw(
            pipe,
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=self.steps,
            output_type=kind,
            **({} if scale is None else {"guidance_scale": scale}),
        )
        names = [f"the image of {prompt!r}, seed {seed}," for prompt, seed in zip(prompts, seeds, strict=True)]
        return drawn.require_finite(names)


def seeds_for(seed: int, count: int, purpose: str) -> list[int]:
    """A seed for every image of a purpose: none is another purpose's, and none depends on how many there are."""
    return [seeded(seed, f"{purpose} {number}").initial_seed() for number in range(count)]
