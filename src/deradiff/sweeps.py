"""A sweep: some prompts and seeds through one realigned pipeline at many λ, from the same noise for every λ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from deradiff import records
from deradiff.dial import Dial
from deradiff.ledger import RunWeights, joined
from deradiff.particles import Particles, sample_particles
from deradiff.pipelines import DTYPES, anchor_source, device_called, load_pipeline, usual_guidance
from deradiff.prompt_embeddings import Remembering
from deradiff.realignment import realign
from deradiff.reuse import Reused
from deradiff.schedules import Schedule
from deradiff.sheets import contact_sheet
from deradiff.weights import verdict

Strength = float | dict[str, float]
"""λ of one column: a number for one anchor, or one for each of several anchors by name."""


class Column(BaseModel):
    """One column of a sweep: a λ, and how it is reached if it is annealed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lam: Strength
    schedule: dict[str, Any] | None = None
    """A `Schedule.to_dict()` whose values are multiplied with `lam`; None for a λ that stays the same."""

    def dial(self) -> Any:
        """This column's λ in the form that a dial takes."""
        if isinstance(self.lam, dict):
            return {name: self._of(lam) for name, lam in self.lam.items()}
        return self._of(self.lam)

    def _of(self, lam: float) -> float | Schedule:
        if self.schedule is None:
            return lam
        return Schedule.from_dict(self.schedule).scaled(lam)

    def beta(self, anchor_beta: float | None) -> float | None:
        """The strength β/λ; None where it has no meaning: λ <= 0 or annealed, several anchors, an unknown β."""
        if anchor_beta is None or self.schedule is not None or isinstance(self.lam, dict) or self.lam <= 0:
            return None
        return anchor_beta / self.lam

    def label(self, anchor_beta: float | None) -> str:
        """What stands over the column: λ, and below it what that is."""
        annealed = [] if self.schedule is None else [str(Schedule.from_dict(self.schedule))]
        if isinstance(self.lam, dict):
            return "\n".join([*(f"{name} {lam:g}" for name, lam in self.lam.items()), *annealed])
        if annealed:
            return f"λ → {self.lam:g}\n{annealed[0]}"
        beta = self.beta(anchor_beta)
        if self.lam <= 0:
            meaning = "reference" if self.lam == 0 else "away from the anchor"
        elif self.lam == 1:
            meaning = "anchor" if beta is None else f"anchor, β = {beta:.4g}"
        else:
            meaning = "" if beta is None else f"β/λ = {beta:.4g}"
        return f"λ = {self.lam:g}\n{meaning}".strip()

    def slug(self) -> str:
        """The column in a file name."""
        lams = self.lam if isinstance(self.lam, dict) else {"lam": self.lam}
        name = "-".join(f"{name}{lam:g}" for name, lam in lams.items())
        return name if self.schedule is None else f"{name}-{records.slug(self.schedule['schedule'])}"


class Settings(BaseModel):
    """Everything that decides a sweep's images; its JSON form stands in the record and in every image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    anchors: dict[str, str]
    prompts: tuple[str, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    scheduler: str | None = None
    steps: int = Field(default=25, ge=1)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    negative_prompt: str | None = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    method: Literal["mixture", "weights"] = "mixture"
    reuse: int | None = None
    """Every how many steps all models are evaluated; None for all."""
    tolerance: float | None = None
    """The error that carrying predictions over between steps may make, relative to λ's effect; None for exactness."""
    path: Literal["auto", "prediction", "posterior"] = "auto"
    anchor_beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    offload: bool = False
    revision: str | None = None
    anchor_revision: str | None = None
    allow_pickle: bool = False
    batch_size: int = Field(default=8, ge=1)
    particles: int | None = Field(default=None, ge=1)
    """Particles for every image, of which one is drawn; None for Algorithm 1 alone."""

    @property
    def rows(self) -> list[tuple[str, int]]:
        """A prompt and a seed for every row of the sheet."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


class Shot(NamedTuple):
    """One image of a sweep: which prompt, which seed, which column (an index)."""

    prompt: str
    seed: int
    column: int


@contextmanager
def realigned(settings: Settings) -> Iterator[tuple[DiffusionPipeline, Dial]]:
    """The pipeline of `settings` with its anchors on a dial, on its device; raises what that raises."""
    device = device_called(settings.device)
    automatic = "float32" if device == "cpu" else "float16"
    pipe = load_pipeline(
        settings.reference,
        dtype=DTYPES[automatic if settings.dtype == "auto" else settings.dtype],
        scheduler=settings.scheduler,
        revision=settings.revision,
        allow_pickle=settings.allow_pickle,
    )
    with realign(
        pipe,
        {name: anchor_source(source) for name, source in settings.anchors.items()},
        dict.fromkeys(settings.anchors, 1.0),
        method=settings.method,
        path=settings.path,
        reuse=settings.reuse,
        tolerance=settings.tolerance,
        revision=settings.anchor_revision,
        allow_pickle=settings.allow_pickle,
    ) as dial:
        if settings.offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        if hasattr(pipe, "encode_prompt"):
            pipe.encode_prompt = Remembering(pipe.encode_prompt)
        yield pipe, dial


def draw(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    folder: records.RunFolder,
    on_step: Callable[[int, int], None] | None = None,
    **further: Any,
) -> list[dict[str, Any]]:
    """Sample the sweep with what `realigned` gave, and write images, contact sheet and record into `folder`.

    Returns the verdict of every column (see `weights.Verdict.record`), which stand in the record too. `on_step(done,
    total)` is told about every sampling step of every image; `further` goes into the record as it is.
    """
    scheduler = type(pipe.scheduler).__name__
    chosen = {name: getattr(settings, name) for name in ("guidance_scale", "height", "width", "negative_prompt")}
    if settings.guidance_scale is None:
        chosen["guidance_scale"] = usual_guidance(settings.reference)
    call = {name: value for name, value in chosen.items() if value is not None}
    made = {
        "settings": settings.model_dump(),
        "mixed": dial.path if settings.method == "mixture" else "weights",
        "scheduler": scheduler,
        "guidance_scale": call.get("guidance_scale", _default(pipe, "guidance_scale")),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": records.versions(),
    }
    shots = [Shot(*row, column) for row in settings.rows for column in range(len(settings.columns))]
    lams = [column.dial() for column in settings.columns]
    drawing = sample if settings.particles is None else sample_by_particles
    if settings.particles is not None:
        call["particles"] = settings.particles
    images: dict[Shot, Image.Image] = {}
    told: dict[Shot, Told] = {}
    listed: list[dict[str, Any]] = []
    for shot, image, told[shot] in drawing(
        pipe, dial, shots, lams, steps=settings.steps, batch_size=settings.batch_size, on_step=on_step, **call
    ):
        column = settings.columns[shot.column]
        about = {"prompt": shot.prompt, "seed": shot.seed, **column.model_dump()}
        about["beta"] = column.beta(settings.anchor_beta)
        prompt = f"{settings.prompts.index(shot.prompt):03d}-{records.slug(shot.prompt)}"
        name = f"{prompt}-seed{shot.seed}-{shot.column:02d}-{column.slug()}.png"
        about |= told[shot].record()
        listed.append({"file": folder.add(name, image, about | made)} | about)
        images[shot] = image
    sheet = contact_sheet(
        [[images[Shot(*row, column)] for column in range(len(lams))] for row in settings.rows],
        [column.label(settings.anchor_beta) for column in settings.columns],
        [f"{prompt}\nseed {seed}" for prompt, seed in settings.rows],
        _caption(settings, scheduler, made["guidance_scale"]),
    )
    verdicts = [_judged(settings, [(s, told[s]) for s in shots if s.column == column]) for column in range(len(lams))]
    folder.finish(sheet, made | further | {"sheet": folder.sheet.name, "verdicts": verdicts, "images": listed})
    return verdicts


@dataclass(frozen=True)
class Told:
    """What a run told about one image: its weights (one row), or what became of its particles."""

    run: RunWeights | None = None
    particles: Particles | None = None
    reused: Reused | None = None

    def record(self) -> dict[str, Any]:
        """The image's own part of a record."""
        if self.particles is not None:
            return {"effective_particles": float(self.particles.effective), "families": int(self.particles.families)}
        about = {} if self.run is None else {"log_weight": float(self.run.log_weights)}
        return about if self.reused is None else about | {"reuse": self.reused.record()}


def _judged(settings: Settings, images: Sequence[tuple[Shot, Told]]) -> dict[str, Any]:
    """How far one column can be trusted, as a record: the verdict in words, and the numbers behind it."""
    lam = settings.columns[images[0][0].column].lam
    runs = [told.run for _, told in images if told.run is not None]
    if len(runs) == len(images):
        groups = torch.tensor([settings.prompts.index(shot.prompt) for shot, _ in images])
        judged = {"lam": lam} | verdict(joined(runs), groups=groups).record()
        return judged | _approximate([told.reused for _, told in images if told.reused is not None])
    swarms = [told.particles for _, told in images if told.particles is not None]
    if not swarms:
        return {"lam": lam, "kind": "approximate", "words": "interpolated weights: an approximation without a verdict"}
    collapsed = [swarm for swarm in swarms if bool(swarm.collapsed.any())]
    effective = sum(float(swarm.effective) for swarm in swarms) / len(swarms)
    words = f"{effective:.3g} of {settings.particles} particles effective on average; {swarms[0].resampled_by}"
    if swarms[0].why_inexact:
        words += f". No exact target: {swarms[0].why_inexact}"
    if collapsed:
        words = f"collapsed for {len(collapsed)} of {len(swarms)} images, of which the first: {collapsed[0].words}"
    return {
        "lam": lam,
        "kind": "collapsed" if collapsed else "particles",
        "words": words,
        "images": len(swarms),
        "particles": settings.particles,
        "collapsed": len(collapsed),
        "effective": effective,
    }


def _approximate(runs: Sequence[Reused]) -> dict[str, Any]:
    """What carrying predictions over came to for one column, in words and numbers: the mean image's error."""
    if not runs or not any(run.error for run in runs):
        return {}
    together = replace(runs[0], errors=tuple(run.error for run in runs))
    return {"kind": "approximate", "words": together.words, "reuse": together.record()}


def sample(
    pipe: DiffusionPipeline,
    dial: Dial,
    shots: Sequence[Shot],
    lams: Sequence[Any],
    *,
    steps: int,
    batch_size: int,
    on_step: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Iterator[tuple[Shot, Image.Image, Told]]:
    """Yield every shot's image and what was told about it; `lams[shot.column]` is its λ, its seed decides its noise.

    Shots of different λ, prompts and seeds share a batch (`batch_size` images), each with a generator of its own, made
    on the CPU so that every device draws the same noise. Interpolated full weights are one model for a whole batch:
    there the shots of each λ run by themselves. `arguments` go to the pipeline's call; raises `ValueError` for one that
    it does not take.
    """
    accepted = _accepted(pipe, arguments)
    groups = [list(shots)]
    one_lam = dial.method == "weights" and not dial.blends_rows
    if one_lam:
        alike = [next(other for other, its in enumerate(lams) if its == lam) for lam in lams]
        groups = [[shot for shot in shots if alike[shot.column] == column] for column in dict.fromkeys(alike)]
    pipe.set_progress_bar_config(disable=True)
    done, total = 0, len(shots) * steps
    for batch in (group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)):
        dial.lam = _together([lams[shot.column] for shot in batch], per_image=not one_lam)
        own = dict(arguments)
        if "negative_prompt" in own:
            own["negative_prompt"] = [own["negative_prompt"]] * len(batch)
        if on_step and "callback_on_step_end" in accepted:
            own["callback_on_step_end"] = _reporter(on_step, done, len(batch), total)
        output = pipe(
            prompt=[shot.prompt for shot in batch],
            generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in batch],
            num_inference_steps=steps,
            **own,
        )
        done += len(batch) * steps
        if on_step:
            on_step(done, total)
        run = None if dial.method == "weights" else dial.weights
        reused = dial.reused
        for row, (shot, image) in enumerate(zip(batch, output.images, strict=True)):
            own_run = None if run is None else run.rows(slice(row, row + 1))
            yield shot, image, Told(run=own_run, reused=None if reused is None else reused.of(row))


def sample_by_particles(
    pipe: DiffusionPipeline,
    dial: Dial,
    shots: Sequence[Shot],
    lams: Sequence[Any],
    *,
    steps: int,
    batch_size: int,
    particles: int,
    on_step: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Iterator[tuple[Shot, Image.Image, Told]]:
    """Like `sample`, but each image is drawn by weight from `particles` of its own, `batch_size` at a time."""
    _accepted(pipe, arguments)
    pipe.set_progress_bar_config(disable=True)
    for number, shot in enumerate(shots):
        dial.lam = lams[shot.column]
        generator = torch.Generator("cpu").manual_seed(shot.seed)
        swarm = sample_particles(
            pipe, shot.prompt, particles, micro_batch=batch_size, generator=generator, num_inference_steps=steps,
            **arguments,
        )  # fmt: skip
        if on_step:
            on_step((number + 1) * steps, len(shots) * steps)
        chosen = int(swarm.picks(torch.Generator("cpu").manual_seed(shot.seed)))
        yield shot, swarm.images[chosen], Told(particles=swarm)


def _accepted(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Mapping[str, Parameter]:
    """The parameters of the pipeline's call; `ValueError` where it takes no prompt or not these arguments."""
    accepted = signature(pipe.__call__).parameters
    if unknown := [name for name in ("prompt", *arguments) if name not in accepted]:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}: "
            + ("it is no text-to-image pipeline." if "prompt" in unknown else "leave it out.")
        )
    return accepted


def _together(lams: Sequence[Any], per_image: bool) -> Any:
    """λ of a batch as a dial takes it, from the λ of each of its images."""
    if not per_image:
        return lams[0]
    if isinstance(lams[0], Mapping):
        return {name: [lam[name] for lam in lams] for name in lams[0]}
    return list(lams)


def _reporter(on_step: Callable[[int, int], None], done: int, images: int, total: int) -> Callable[..., dict[str, Any]]:
    def report(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(done + (step + 1) * images, total), total)
        return tensors

    return report


def _default(pipe: DiffusionPipeline, argument: str) -> Any:
    """What the pipeline's call takes for an argument that is not given."""
    parameter = signature(pipe.__call__).parameters.get(argument)
    return None if parameter is None or parameter.default is Parameter.empty else parameter.default


def _caption(settings: Settings, scheduler: str, guidance_scale: float | None) -> str:
    """What stands under a sheet: the models and how they were sampled."""
    anchors = [source if name == "anchor" else f"{name}: {source}" for name, source in settings.anchors.items()]
    parts = [
        f"{settings.reference} → {' + '.join(anchors)}",
        f"{scheduler.removesuffix('Scheduler')}, {settings.steps} steps",
    ]
    if guidance_scale is not None:
        parts.append(f"guidance {guidance_scale:g}")
    if clocks := sorted({column.schedule["over"] for column in settings.columns if column.schedule is not None}):
        parts.append(f"λ annealed over {' and '.join(clocks)}")
    if settings.method == "weights":
        parts.append("interpolated weights")
    if settings.tolerance is not None:
        parts.append(f"approximate: within {settings.tolerance:g} of λ's effect")
    if settings.reuse is not None:
        parts.append(f"approximate: all models every {settings.reuse} steps")
    if settings.particles is not None:
        parts.append(f"{settings.particles} particles each")
    return " · ".join(parts)
