"""Which steps a model and a scheduler need in full, measured once: the same few for every image, whatever its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, NonNegativeInt
from torch import Tensor

from deradiff.files.reading import Record, read
from deradiff.files.writing import write_json
from deradiff.sampling.dial import Dial, dial_of
from deradiff.sampling.reuse import INTERPOLATE, REFERENCE, Reuse, current_word

AIMS = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35)
"""Tolerances that are tried, in units of the one asked for: an error is only estimated until it is measured."""


class Errors(NamedTuple):
    """How far latents are from the exact ones, relative to λ's own effect."""

    whole: float
    """`||x - x_exact|| / ||x_exact - x_reference||` over all latents together."""
    median: float
    """The median image's distance, by the median image's effect."""
    changed: float
    """The share of images that are further off than half the median effect: they became other images."""


@dataclass(frozen=True)
class FullSteps:
    """Full steps that were measured to keep a tolerance, for these models, this scheduler and number of steps.

    `reuse` is for `realign` or `dial.reuse`. `error`, the median image's, is what it came to on the images it was
    measured with, at `cost` evaluations a step.
    """

    reuse: Reuse
    tolerance: float
    error: float
    changed: float
    cost: float
    scheduler: str
    steps: int
    images: int

    def save(self, file: Path) -> None:
        """Write them as JSON. Raises `FileExistsError` where `file` is something else than such a list."""
        if file.exists():
            try:
                FullSteps.load(file)
            except (ValueError, OSError):
                raise FileExistsError(f"{file} is no list of full steps, and stays: name another file") from None
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> FullSteps:
        """Read what `save` wrote. Raises `ValueError` for another file."""
        record = read(_FullStepsRecord, Path(file), "list of full steps", "measure it anew")
        try:
            reuse = Reuse(steps=tuple(record.reuse.steps), carrier=record.reuse.carrier)
        except ValueError as error:
            raise ValueError(f"{file} is no list of full steps: {error}") from None
        return cls(reuse=reuse, **record.model_dump(exclude={"reuse"}))


class _ReuseRecord(Record):
    steps: list[NonNegativeInt]
    carrier: Annotated[str, BeforeValidator(current_word)]


class _FullStepsRecord(Record):
    reuse: _ReuseRecord
    tolerance: float
    error: float
    changed: float
    cost: float
    scheduler: str
    steps: int
    images: int


def find_full_steps(
    pipe: Any,
    prompts: Sequence[str],
    tolerance: float,
    *,
    carriers: Sequence[str] | None = None,
    seed: int = 0,
    **call: Any,
) -> FullSteps:
    """Find the fewest full steps that keep `tolerance` on these prompts, at the λ that the dial is set to.

    Costs two exact runs' worth of evaluations and one to six approximate ones for each carrier.

    Args:
        pipe: a realigned pipeline, with its scheduler.
        prompts: one image each; a dozen or more, of the kind that will be drawn.
        tolerance: the median image's error, relative to λ's own effect.
        carriers: those that are tried, see `Reuse`; by default the reference and the anchors, and where these are LoRAs
            the interpolated weights.
        seed: of the first image's noise; the others count on.
        call: further arguments of the pipeline's call, `num_inference_steps` and `guidance_scale` among them.

    Raises:
        ValueError: a pipeline that is not realigned; λ without an effect; a tolerance that no carrier keeps with fewer
            evaluations than the exact run has.
    """
    dial = dial_of(pipe)
    if dial is None:
        raise ValueError("this pipeline is not realigned: call deradiff.realign(pipe, anchor, lam) first")
    Reuse(tolerance=tolerance)
    if carriers is None:
        carriers = (*([INTERPOLATE] if dial.blends_rows else []), REFERENCE, *dial.anchors)
    lam, before = dial.lam, dial.reuse

    def drawn() -> Float[Tensor, "image *latent"]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        latents: Tensor = pipe(prompt=list(prompts), generator=generators, output_type="latent", **call).images
        return latents

    try:
        dial.reuse, dial.lam = None, dict.fromkeys(dial.anchors, 0.0)
        reference = drawn()
        dial.lam = lam
        exact = drawn()
        tries = (_tried(dial, carrier, tolerance, drawn, exact, reference) for carrier in carriers)
        tried = [cheapest for cheapest in tries if cheapest]
    finally:
        dial.lam, dial.reuse = lam, before
    if not tried:
        raise ValueError(
            f"no carrier of {', '.join(carriers)} keeps {tolerance:g} of λ's effect with fewer evaluations than the "
            "exact run: take more steps, or a larger tolerance"
        )
    cost, errors, reuse = min(tried, key=lambda candidate: candidate[0])
    return FullSteps(
        reuse,
        tolerance,
        errors.median,
        errors.changed,
        cost,
        type(pipe.scheduler).__name__,
        len(pipe.scheduler.timesteps),
        len(prompts),
    )


def _tried(
    dial: Dial, carrier: str, tolerance: float, drawn: Any, exact: Tensor, reference: Tensor
) -> tuple[float, Errors, Reuse] | None:
    """The cheapest run by this carrier that keeps the tolerance: cost, errors, and its full steps."""
    for aim in AIMS:
        if aim * tolerance >= 1:
            continue
        dial.reuse = Reuse(tolerance=aim * tolerance, carrier=carrier)
        errors_made = errors(drawn(), exact, reference)
        if dial.reused is None:
            raise ValueError("no step of this λ mixes two models: there is nothing to carry over")
        cost = dial.reused.evaluations / dial.reused.predictions
        if cost >= 1 + len(dial.anchors):
            return None
        if errors_made.median <= tolerance:
            return cost, errors_made, Reuse(steps=dial.reused.steps, carrier=carrier)
    return None


def errors(
    approximate: Float[Tensor, "image *latent"],
    exact: Float[Tensor, "image *latent"],
    reference: Float[Tensor, "image *latent"],
) -> Errors:
    """How far `approximate` latents are from `exact` ones, relative to what λ makes of the `reference`'s.

    Raises `ValueError` where λ has no effect.
    """
    effects = (exact.double() - reference.double()).flatten(1).norm(dim=1)
    away = (approximate.double() - exact.double()).flatten(1).norm(dim=1)
    typical = float(effects.median())
    if not typical:
        raise ValueError("λ has no effect on these images, relative to which errors could be told")
    return Errors(
        float(away.norm() / effects.norm()), float(away.median()) / typical, float((away > typical / 2).double().mean())
    )
