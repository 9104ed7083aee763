"""One image, or one for each of several λ, with what is known about it; a glimpse of it while it is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.characters import MEANINGS, Character
from deradiff.algorithm.path_weights import joined
from deradiff.algorithm.verdict import Verdict, verdict
from deradiff.rewards import PictureReward
from deradiff.sampling.dial import Dial
from deradiff.sampling.pictures import upcast
from deradiff.sampling.reuse import Reuse
from deradiff.studio.denoised_latents import denoised
from deradiff.studio.jobs import PageJob
from deradiff.sweep.batches import Diagnostics, sample
from deradiff.sweep.characters import KnownCharacter
from deradiff.sweep.description import metadata
from deradiff.sweep.drawing import made_of
from deradiff.sweep.settings import Column, Settings, file_name

GLIMPSES = 0.15
"""The share of the time that glimpses may take."""

PREVIEW_TOLERANCE = 0.15
"""Of λ's own effect, where the preview carries predictions over between steps."""

OFTEN = 0.12
"""Seconds between two reports: a page shows no more, and showing takes time from drawing."""

FEWEST = 4
"""Steps of a preview."""


JUDGED = 16
"""Images from which a verdict is drawn."""


BLACKED_OUT = "none: blacked out by the safety checker"


class StepReport(NamedTuple):
    """How far an image is."""

    done: int
    total: int
    glimpse: Image.Image | None = None
    """The present estimate of it; None for none, or for the same as before."""


@dataclass(frozen=True)
class DrawnImage:
    """An image and what is known about it."""

    image: Image.Image
    settings: Settings
    record: dict[str, Any]
    """What its PNG file holds: the same as `deradiff generate` writes."""
    name: str
    """Of its file."""
    scores: dict[str, float | str]
    """By reward; words where a reward says that it cannot score this image for its prompt."""
    path_kl: float | None
    """In nats; None where the sampler's steps draw no noise of their own."""
    verdict: str
    kind: str
    seconds: float
    warned: tuple[str, ...] = ()
    """What loading its models, and drawing it, warned about."""
    blacked_out: bool = False
    """Whether the pipeline's safety checker put a black image in its place: it has no scores."""
    anchor: str = ""
    """What kind of anchor it is of, in words; empty where the anchor was not examined."""


def preview_of(settings: Settings, how: str) -> Settings:
    """The same image at a lower price: "steps" takes a third of them; "carry" carries predictions over."""
    if how == "carry":
        return settings.model_copy(update={"tolerance": PREVIEW_TOLERANCE})
    return settings.model_copy(update={"steps": min(settings.steps, max(FEWEST, round(settings.steps / 3)))})


def strip_of(settings: Settings, lams: Sequence[float]) -> Settings:
    """The same image at several λ; of several anchors all are multiplied."""
    own = settings.columns[0]

    def at(lam: float) -> Column:
        if isinstance(own.lam, dict):
            return Column(
                lam={name: round(dialled * lam, 6) for name, dialled in own.lam.items()}, schedule=own.schedule
            )
        return Column(lam=lam, schedule=own.schedule)

    return settings.model_copy(update={"columns": tuple(map(at, lams))})


def draw(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    job: PageJob,
    report: Callable[[StepReport], None],
    preview: bool = False,
    known: KnownCharacter | None = None,
) -> list[DrawnImage]:
    """Draw an image for every column of `settings`, one prompt's and one seed's.

    `known` is the anchor's character, where it was examined: verdicts go by it.

    `report` is told about every step; the job is looked at as often, so that one that was stopped ends there
    (`jobs.Cancelled`). Where the scheduler's steps draw noise, exact images evaluate models without weight as well, so
    that the path KL is known at λ = 0 and 1 too.
    """
    begun, glimpsed = time.perf_counter(), 0.0
    reported = begun
    single = len(settings.columns) == 1
    dial.reuse = None if settings.tolerance is None else Reuse(tolerance=settings.tolerance)
    dial.watching = not preview and posteriors.is_diffusion(pipe.scheduler)

    def on_step(done: int, total: int) -> None:
        nonlocal glimpsed, reported
        job.check()
        now, glimpse = time.perf_counter(), None
        if preview or now - reported < OFTEN:
            return
        reported = now
        if single and done < total and glimpsed <= GLIMPSES * (now - begun):
            glimpse = glimpse_of(pipe, dial)
            glimpsed += time.perf_counter() - now
        report(StepReport(done, total, glimpse))

    sampled = list(sample(pipe, dial, settings.drawings, batch_size=settings.batch_size, on_step=on_step))
    seconds = time.perf_counter() - begun
    made = made_of(settings, pipe, dial)
    return [_drawn(settings, made, place, image, diagnostics, seconds, known) for place, image, diagnostics in sampled]


def scored(images: Sequence[DrawnImage], rewards: Sequence[PictureReward]) -> list[DrawnImage]:
    """The same images with their scores, or words in place of them: what was blacked out is no picture."""
    shown = [drawn for drawn in images if not drawn.blacked_out]
    columns: dict[str, Tensor | str] = {}
    if shown:
        columns = _scores([drawn.image for drawn in shown], [drawn.settings.prompts[0] for drawn in shown], rewards)
    own = {
        id(drawn): {name: column if isinstance(column, str) else float(column[i]) for name, column in columns.items()}
        for i, drawn in enumerate(shown)
    }
    hidden: dict[str, float | str] = {reward.name: BLACKED_OUT for reward in rewards}
    return [replace(drawn, scores=own.get(id(drawn), hidden)) for drawn in images]


def _scores(
    pictures: list[Image.Image], prompts: list[str], rewards: Sequence[PictureReward]
) -> dict[str, Tensor | str]:
    """Each reward's scores, or why it has none: the digits' rewards know the digits' captions alone."""
    scores: dict[str, Tensor | str] = {}
    with torch.no_grad():
        for reward in rewards:
            try:
                scores[reward.name] = reward(pictures, prompts).double().cpu()
            except ValueError as error:
                scores[reward.name] = str(error)
    return scores


def _drawn(
    settings: Settings,
    made: dict[str, Any],
    place: int,
    image: Image.Image,
    diagnostics: Diagnostics,
    seconds: float,
    known: KnownCharacter | None,
) -> DrawnImage:
    column = settings.columns[place]
    own = settings.model_copy(update={"columns": (column,)})
    assert diagnostics.run is not None
    judged = verdict(joined([diagnostics.run]), character=_character(known))
    kl = None if diagnostics.run.path_kl is None else float(diagnostics.run.path_kl)
    reason, kind = _said(judged, known, made), judged.kind
    if diagnostics.reused is not None and diagnostics.reused.error:
        reason, kind = diagnostics.reused.words, "approximate"  # type: ignore[assignment]
    record = made | metadata(own.drawings[0], made["settings"])
    record |= {"beta": column.beta(own.anchor_beta)} | diagnostics.record()
    warned = tuple(cut.words for cut in diagnostics.cuts)
    if diagnostics.blacked_out:
        warned += ("the pipeline's safety checker blacked this image out: it is no picture",)
    name, anchor = file_name(own, 0), "" if known is None else MEANINGS[known.character.kind]
    return DrawnImage(image, own, record, name, {}, kl, reason, kind, seconds, warned, diagnostics.blacked_out, anchor)


def judged(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    job: PageJob,
    report: Callable[[StepReport], None],
    rewards: Sequence[PictureReward],
    known: KnownCharacter | None = None,
) -> list[str]:
    """How far Algorithm 1 can be trusted for this prompt and λ, in words: for each reward, or at all without any.

    From `JUDGED` images, whose seeds begin with that of `settings`, and by the anchor's character where it is `known`;
    see `verdict.verdict`.
    """
    dial.reuse, dial.watching = None, False
    prompt, seed = settings.prompts[0], settings.seeds[0]

    def on_step(done: int, total: int) -> None:
        job.check()
        report(StepReport(done, total))

    asked = settings.model_copy(update={"seeds": tuple(range(seed, seed + JUDGED))})
    sampled = list(sample(pipe, dial, asked.drawings, batch_size=settings.batch_size, on_step=on_step))
    made = made_of(settings, pipe, dial)
    run = joined([diagnostics.run for _, _, diagnostics in sampled if diagnostics.run is not None])

    def said(**scored: Any) -> str:
        return _said(verdict(run, character=_character(known), **scored), known, made)

    hidden = sum(diagnostics.blacked_out for _, _, diagnostics in sampled)
    if hidden:
        return [f"{said()}; no score, as the safety checker blacked out {hidden} of {len(sampled)} images"]
    scores = _scores([image for _, image, _ in sampled], [prompt] * len(sampled), rewards)
    verdicts = {name: said(scores=score, name=name) for name, score in scores.items() if not isinstance(score, str)}
    if not verdicts:
        return [said()]
    if len({*verdicts.values()}) == 1:
        return [*verdicts.values()][:1]
    return [f"{name}: {words}" for name, words in verdicts.items()]


def _character(known: KnownCharacter | None) -> Character | None:
    return None if known is None else known.character


def _said(judged: Verdict, known: KnownCharacter | None, made: dict[str, Any]) -> str:
    """A verdict in one line, which says where the anchor was examined with another sampler than `made` the run."""
    if known is None:
        return judged.words
    return known.said(judged.kind, judged.words, made["scheduler"], made["guidance_scale"])


def glimpse_of(pipe: DiffusionPipeline, dial: Dial) -> Image.Image | None:
    """The image that the last step was heading for.

    None for pipelines whose latents are no pictures of their own, and for NaN.
    """
    step, vae = dial.last, getattr(pipe, "vae", None)
    if step is None or vae is None or step.sample.ndim != 4 or not hasattr(pipe, "image_processor"):
        return None
    latents = denoised(pipe.scheduler, step)
    if latents is None or latents.shape[1] != vae.config.get("latent_channels"):
        return None
    latents = latents[:1] / (vae.config.get("scaling_factor") or 1.0) + (vae.config.get("shift_factor") or 0.0)
    with torch.no_grad(), upcast(vae):
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    if not torch.isfinite(decoded).all():
        return None  # the whole image will say why
    return pipe.image_processor.postprocess(decoded.float(), output_type="pil")[0]
