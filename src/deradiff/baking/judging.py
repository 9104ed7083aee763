"""How well one checkpoint stands for the mixture: images of both from the same noise, and of the reference."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, mean
from deradiff.anchors import denoiser_of
from deradiff.anchors.checks import unwrapped
from deradiff.baking.drawing import Sampler
from deradiff.sampling.dial import Dial
from deradiff.sweep.sheets import contact_sheet

Form = Literal["pipeline", "lora"]
"""What a baked checkpoint is: a whole pipeline, or a LoRA for the base."""

SHOWN = 6
"""Rows of the sheet, at most."""


@dataclass(frozen=True)
class Judgement:
    """How far baked images are from realigned ones, over final latents from the same noise.

    Attributes:
        lam: λ, or its schedule, in words.
        error: `||x(baked) - x(realigned)|| / ||x(realigned) - x(reference)||`, averaged over images, with its standard
            error. NaN where λ changes nothing.
        effect: `||x(realigned) - x(reference)||`, averaged over images.
        images: how many.
    """

    lam: str
    error: Estimate
    effect: Estimate
    images: int

    def record(self) -> dict[str, Any]:
        """As plain data for JSON, where what is no number is None."""
        error, effect = (
            {key: value if math.isfinite(value) else None for key, value in asdict(estimate).items()}
            for estimate in (self.error, self.effect)
        )
        return {"lam": self.lam, "error": error, "effect": effect, "images": self.images, "words": self.words}

    @property
    def words(self) -> str:
        """The error as a sentence."""
        if not self.effect.value > 0:
            return f"at {self.lam} the realigned images are the reference's: there is no effect to measure an error by"
        spread = f" ± {self.error.error:.1%}" if self.images > 1 else ""
        return (
            f"at {self.lam} baked images differ from realigned ones by {self.error.value:.1%}{spread} of what λ "
            f"changes ({self.images} images)"
        )


def compared(
    lam: str,
    reference: Float[Tensor, "image *latent"],
    realigned: Float[Tensor, "image *latent"],
    baked: Float[Tensor, "image *latent"],
) -> Judgement:
    """The judgement of these final latents."""
    effects, errors = ((a - b).double().flatten(1).norm(dim=1) for a, b in ((realigned, reference), (baked, realigned)))
    return Judgement(lam, mean(errors / effects), mean(effects), len(effects))


@contextmanager
def wearing(pipe: Any, folder: Path, form: Form) -> Iterator[None]:
    """`pipe` with what was baked in `folder`, loaded as anybody would: by diffusers alone."""
    component, denoiser = denoiser_of(pipe)
    own = unwrapped(denoiser)
    if form == "lora":
        pipe.load_lora_weights(folder)
        try:
            yield
        finally:
            pipe.unload_lora_weights()
        return
    baked = type(own).from_pretrained(folder / component, dtype=own.dtype, local_files_only=True).to(own.device)
    setattr(pipe, component, baked)
    try:
        yield
    finally:
        setattr(pipe, component, denoiser)


@dataclass(frozen=True)
class Case:
    """One λ at which something that was baked is judged.

    Attributes:
        words: λ in words.
        lam: as a dial takes it.
        worn: turns the pipeline into what was baked.
        guidance_scale: that it then is called with; None where a pipeline guides it as it guides the mixture.
    """

    words: str
    lam: Any
    worn: Callable[[], AbstractContextManager[None]]
    guidance_scale: float | None = None


def judge(
    pipe: DiffusionPipeline,
    realigned: Callable[[], AbstractContextManager[Dial]],
    cases: Sequence[Case],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    tick: Callable[[int, int], None],
) -> tuple[list[Judgement], Image.Image]:
    """A judgement for every case, and a sheet of the first one's images: reference, realigned, baked.

    An image of every prompt, from the noise of its own seed. `realigned` and a case's `worn` turn `pipe` into the one
    or the other; never are both in memory.
    """
    exact: list[Any] = []
    pictures, shown = [], slice(0, SHOWN)
    total = 2 + 2 * len(cases)
    tick(0, total)
    with realigned() as dial:
        dial.lam = {name: 0.0 for name in dial.anchors}
        reference = sampler.latents(pipe, prompts, seeds)
        pictures.append(sampler.pictures(pipe, prompts[shown], seeds[shown]))
        tick(1, total)
        for case in cases:
            known = [latents for other, latents in zip(cases, exact, strict=False) if other.lam == case.lam]
            if not known:
                dial.lam = case.lam
            exact.append(known[0] if known else sampler.latents(pipe, prompts, seeds))
            tick(1 + len(exact), total)
        dial.lam = cases[0].lam
        pictures.append(sampler.pictures(pipe, prompts[shown], seeds[shown]))
    judgements: list[Judgement] = []
    for worn, judged in groupby(zip(cases, exact, strict=True), key=lambda pair: pair[0].worn):
        with worn():
            for case, latents in judged:
                own = sampler.latents(pipe, prompts, seeds, case.guidance_scale)
                if not judgements:
                    pictures.append(sampler.pictures(pipe, prompts[shown], seeds[shown], case.guidance_scale))
                judgements.append(compared(case.words, reference, latents, own))
                tick(1 + len(exact) + len(judgements), total)
    tick(total, total)
    columns = ["reference\nλ = 0", f"realigned\n{cases[0].words}", "baked\none checkpoint"]
    rows = [f"{prompt}\nseed {seed}" for prompt, seed in zip(prompts[shown], seeds[shown], strict=True)]
    sheet = contact_sheet(
        [list(row) for row in zip(*pictures, strict=True)],
        columns,
        rows,
        f"From the same noise, {sampler.steps} steps. Over final latents, {judgements[0].words}.",
    )
    return judgements, sheet
