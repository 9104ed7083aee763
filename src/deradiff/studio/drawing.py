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
from deradiff.algorithm.path_weights import joined
from deradiff.algorithm.verdict import verdict
from deradiff.rewards import PictureReward
from deradiff.sampling.dial import Dial
from deradiff.sampling.pictures import upcast
from deradiff.sampling.reuse import Reuse
from deradiff.studio.denoised_latents import denoised
from deradiff.studio.jobs import Job
from deradiff.sweep import drawing
from deradiff.sweep.settings import Column, Settings, Shot, call_of, file_name

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


class Step(NamedTuple):
    """How far an image is."""

    done: int
    total: int
    glimpse: Image.Image | None = None
    """The present estimate of it; None for none, or for the same as before."""


@dataclass(frozen=True)
class Drawn:
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
    preview: bool = False
    warned: tuple[str, ...] = ()
    """What loading its models, and drawing it, warned about."""
    blacked_out: bool = False
    """Whether the pipeline's safety checker put a black image in its place: it has no scores."""


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
            return Column(lam={name: round(its * lam, 6) for name, its in own.lam.items()}, schedule=own.schedule)
        return Column(lam=lam, schedule=own.schedule)

    return settings.model_copy(update={"columns": tuple(map(at, lams))})


def draw(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    job: Job,
    report: Callable[[Step], None],
    preview: bool = False,
) -> list[Drawn]:
    """Draw an image for every column of `settings`, one prompt's and one seed's.

    `report` is told about every step; the job is looked at as often, so that one that was stopped ends there
    (`jobs.Cancelled`). Where the scheduler's steps draw noise, exact images evaluate models without weight as well, so
    that the path KL is known at λ = 0 and 1 too.
    """
    begun, glimpsed = time.perf_counter(), 0.0
    told = begun
    single = len(settings.columns) == 1
    dial.reuse = None if settings.tolerance is None else Reuse(tolerance=settings.tolerance)
    dial.watching = not preview and posteriors.is_diffusion(pipe.scheduler)

    def on_step(done: int, total: int) -> None:
        nonlocal glimpsed, told
        job.check()
        now, glimpse = time.perf_counter(), None
        if preview or now - told < OFTEN:
            return
        told = now
        if single and done < total and glimpsed <= GLIMPSES * (now - begun):
            glimpse = glimpse_of(pipe, dial)
            glimpsed += time.perf_counter() - now
        report(Step(done, total, glimpse))

    prompt, seed = settings.prompts[0], settings.seeds[0]
    shots = [Shot(prompt, seed, column) for column in range(len(settings.columns))]
    lams = [column.dial() for column in settings.columns]
    found = list(
        drawing.sample(
            pipe,
            dial,
            shots,
            lams,
            steps=settings.steps,
            batch_size=settings.batch_size,
            on_step=on_step,
            **call_of(settings),
        )
    )
    seconds = time.perf_counter() - begun
    made = drawing.made_of(settings, pipe, dial)
    return [_drawn(settings, made, shot, image, told, seconds, preview) for shot, image, told in found]


def scored(images: Sequence[Drawn], rewards: Sequence[PictureReward]) -> list[Drawn]:
    """The same images with their scores, or words in place of them: what was blacked out is no picture."""
    shown = [drawn for drawn in images if not drawn.blacked_out]
    columns: dict[str, Tensor | str] = {}
    if shown:
        columns = _scores([drawn.image for drawn in shown], [drawn.settings.prompts[0] for drawn in shown], rewards)
    own = {
        id(drawn): {name: its if isinstance(its, str) else float(its[i]) for name, its in columns.items()}
        for i, drawn in enumerate(shown)
    }
    hidden: dict[str, float | str] = {reward.name: BLACKED_OUT for reward in rewards}
    return [replace(drawn, scores=own.get(id(drawn), hidden)) for drawn in images]


def _scores(
    pictures: list[Image.Image], prompts: list[str], rewards: Sequence[PictureReward]
) -> dict[str, Tensor | str]:
    """Each reward's scores, or why it has none: the digits' rewards know the digits' captions alone."""
    found: dict[str, Tensor | str] = {}
    with torch.no_grad():
        for reward in rewards:
            try:
                found[reward.name] = reward(pictures, prompts).double().cpu()
            except ValueError as error:
                found[reward.name] = str(error)
    return found


def _drawn(
    settings: Settings,
    made: dict[str, Any],
    shot: Shot,
    image: Image.Image,
    told: drawing.Told,
    seconds: float,
    preview: bool,
) -> Drawn:
    own = settings.model_copy(update={"columns": (settings.columns[shot.column],)})
    assert told.run is not None
    judged = verdict(joined([told.run]))
    kl = None if told.run.path_kl is None else float(told.run.path_kl)
    words, kind = judged.words, judged.kind
    if told.reused is not None and told.reused.error:
        words, kind = told.reused.words, "approximate"  # type: ignore[assignment]
    own_shot = Shot(shot.prompt, shot.seed, 0)
    record = drawing.about(own, own_shot, told) | made | {"settings": own.model_dump()}
    warned = tuple(cut.words for cut in told.cuts)
    if told.blacked_out:
        warned += ("the pipeline's safety checker blacked this image out: it is no picture",)
    return Drawn(
        image, own, record, file_name(own, own_shot), {}, kl, words, kind, seconds, preview, warned, told.blacked_out
    )


def judged(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    job: Job,
    report: Callable[[Step], None],
    rewards: Sequence[PictureReward],
) -> list[str]:
    """How far Algorithm 1 can be trusted for this prompt and λ, in words: for each reward, or at all without any.

    From `JUDGED` images, whose seeds begin with that of `settings`; see `verdict.verdict`.
    """
    dial.reuse, dial.watching = None, False
    prompt, seed = settings.prompts[0], settings.seeds[0]

    def on_step(done: int, total: int) -> None:
        job.check()
        report(Step(done, total))

    shots = [Shot(prompt, seed + i, 0) for i in range(JUDGED)]
    lams = [settings.columns[0].dial()]
    found = list(
        drawing.sample(
            pipe,
            dial,
            shots,
            lams,
            steps=settings.steps,
            batch_size=settings.batch_size,
            on_step=on_step,
            **call_of(settings),
        )
    )
    run = joined([told.run for _, _, told in found if told.run is not None])
    hidden = sum(told.blacked_out for _, _, told in found)
    if hidden:
        return [f"{verdict(run).words}; no score, as the safety checker blacked out {hidden} of {len(found)} images"]
    scores = _scores([image for _, image, _ in found], [prompt] * len(found), rewards)
    usable = {name: its for name, its in scores.items() if not isinstance(its, str)}
    if not usable:
        return [verdict(run).words]
    said = {name: verdict(run, its, name=name).words for name, its in usable.items()}
    if len({*said.values()}) == 1:
        return [next(iter(said.values()))]
    return [f"{name}: {words}" for name, words in said.items()]


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
