"""A sweep: some prompts and seeds through one realigned pipeline at many λ, from the same noise for every λ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import verdict
from deradiff.files.folders import RunFolder
from deradiff.files.records import versions
from deradiff.sampling import pictures
from deradiff.sampling.devices import device_called
from deradiff.sampling.dial import Dial
from deradiff.sampling.particles import Particles, sample_particles
from deradiff.sampling.pictures import NotFinite
from deradiff.sampling.realignment import realign
from deradiff.sampling.reuse import Reused
from deradiff.sampling.truncation import Cut, cuts
from deradiff.sweep.pipelines import DTYPES, anchor_source, load_pipeline
from deradiff.sweep.prompt_embeddings import Remembering
from deradiff.sweep.settings import Settings, Shot, call_of, caption, file_name
from deradiff.sweep.sheets import contact_sheet, covered


def loaded(settings: Settings) -> DiffusionPipeline:
    """The pipeline of `settings` by itself, without its anchors and where it was loaded; raises what that raises."""
    automatic = "float32" if device_called(settings.device) == "cpu" else "float16"
    return load_pipeline(
        settings.reference,
        dtype=DTYPES[automatic if settings.dtype == "auto" else settings.dtype],
        scheduler=settings.scheduler,
        revision=settings.revision,
        allow_pickle=settings.allow_pickle,
    )


def place(pipe: DiffusionPipeline, settings: Settings) -> None:
    """Bring a pipeline, anchors and all, to the device of `settings`, and have it encode every prompt once."""
    device = device_called(settings.device)
    if settings.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if hasattr(pipe, "encode_prompt"):
        pipe.encode_prompt = Remembering(pipe.encode_prompt)


@contextmanager
def realigned(settings: Settings) -> Iterator[tuple[DiffusionPipeline, Dial]]:
    """The pipeline of `settings` with its anchors on a dial, on its device; raises what that raises."""
    pipe = loaded(settings)
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
        place(pipe, settings)
        yield pipe, dial


def made_of(settings: Settings, pipe: DiffusionPipeline, dial: Dial) -> dict[str, Any]:
    """What a record says about how images were made: the settings, and what came of those that were left open."""
    return {
        "settings": settings.model_dump(),
        "mixed": dial.path if settings.method == "mixture" else "weights",
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": call_of(settings).get("guidance_scale", _default(pipe, "guidance_scale")),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def about(settings: Settings, shot: Shot, told: Told) -> dict[str, Any]:
    """What a record says about one image, beside `made_of`."""
    column = settings.columns[shot.column]
    said = {"prompt": shot.prompt, "seed": shot.seed, **column.model_dump(), "beta": column.beta(settings.anchor_beta)}
    return said | told.record()


def draw(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    folder: RunFolder,
    on_step: Callable[[int, int], None] | None = None,
    **further: Any,
) -> list[dict[str, Any]]:
    """Sample the sweep with what `realigned` gave, and write images, contact sheet and record into `folder`.

    Returns the verdict of every column (see `verdict.Verdict.record`), which stand in the record too. `on_step(done,
    total)` is told about every sampling step of every image; `further` goes into the record as it is. Raises
    `NotFinite` at an image of NaN or infinity: those before it are in the folder, as after any interruption.
    """
    call = call_of(settings)
    made = made_of(settings, pipe, dial)
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
        said = about(settings, shot, told[shot])
        listed.append({"file": folder.add(file_name(settings, shot), image, said | made)} | said)
        images[shot] = covered(image) if told[shot].blacked_out else image
    sheet = contact_sheet(
        [[images[Shot(*row, column)] for column in range(len(lams))] for row in settings.rows],
        [column.label(settings.anchor_beta) for column in settings.columns],
        [f"{prompt}\nseed {seed}" for prompt, seed in settings.rows],
        caption(settings, made["scheduler"], made["guidance_scale"]),
    )
    verdicts = [judged(settings, [(s, told[s]) for s in shots if s.column == column]) for column in range(len(lams))]
    cut = [cut.record() for cut in cuts(pipe)]
    results = {"sheet": folder.sheet.name, "verdicts": verdicts, "cut_prompts": cut, "images": listed}
    folder.finish(sheet, made | further | results)
    return verdicts


@dataclass(frozen=True)
class Told:
    """What a run told about one image: its weights (one row), or what became of its particles."""

    run: ImportanceWeights | None = None
    particles: Particles | None = None
    reused: Reused | None = None
    blacked_out: bool = False
    """Whether a safety checker put a black image in its place."""
    cuts: tuple[Cut, ...] = ()
    """What its prompt and negative prompt lost to the tokenizers."""

    def record(self) -> dict[str, Any]:
        """The image's own part of a record."""
        about: dict[str, Any] = {}
        if self.particles is not None:
            about = {"effective_particles": float(self.particles.effective), "families": int(self.particles.families)}
        elif self.run is not None:
            about = {"log_weight": float(self.run.log_weights)}
        if self.reused is not None:
            about["reuse"] = self.reused.record()
        if self.cuts:
            about["cut_prompts"] = [cut.record() for cut in self.cuts]
        return about | ({"blacked_out": True} if self.blacked_out else {})


def judged(settings: Settings, images: Sequence[tuple[Shot, Told]]) -> dict[str, Any]:
    """How far one column can be trusted, as a record: the verdict in words, and the numbers behind it.

    Images that a safety checker blacked out are counted: their paths count in the verdict, their pictures are none.
    """
    judgement = _judged(settings, images)
    hidden = sum(told.blacked_out for _, told in images)
    if not hidden:
        return judgement
    words = f"{judgement['words']}; {hidden} of {len(images)} images blacked out by the pipeline's safety checker"
    return judgement | {"words": words, "blacked_out": hidden}


def _judged(settings: Settings, images: Sequence[tuple[Shot, Told]]) -> dict[str, Any]:
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
    pipe: DiffusionPipeline, dial: Dial, shots: Sequence[Shot], lams: Sequence[Any], **how: Any
) -> Iterator[tuple[Shot, Image.Image, Told]]:
    """Yield every shot's image and what was told about it, as `attempts` draws them.

    Raises `NotFinite` that names the first image of NaN or infinity, after those before it.
    """
    return _sound(attempts(pipe, dial, shots, lams, **how))


def sample_by_particles(
    pipe: DiffusionPipeline, dial: Dial, shots: Sequence[Shot], lams: Sequence[Any], **how: Any
) -> Iterator[tuple[Shot, Image.Image, Told]]:
    """Like `sample`, but as `attempts_by_particles` draws them."""
    return _sound(attempts_by_particles(pipe, dial, shots, lams, **how))


Attempt = tuple[Shot, Image.Image | FloatingPointError, Told]
"""A shot, its image or why it is none, and what was told about it."""


def _sound(drawn: Iterator[Attempt]) -> Iterator[tuple[Shot, Image.Image, Told]]:
    for shot, image, told in drawn:
        if isinstance(image, FloatingPointError):
            raise image
        yield shot, image, told


def attempts(
    pipe: DiffusionPipeline,
    dial: Dial,
    shots: Sequence[Shot],
    lams: Sequence[Any],
    *,
    steps: int,
    batch_size: int,
    on_step: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Iterator[Attempt]:
    """Draw every shot; `lams[shot.column]` is its λ, its seed decides its noise.

    Shots of different λ, prompts and seeds share a batch (`batch_size` images), each with a generator of its own, made
    on the CPU so that every device draws the same noise. Interpolated full weights are one model for a whole batch:
    there the shots of each λ run by themselves. `arguments` go to the pipeline's call. An image of NaN or infinity
    comes as the `NotFinite` that says so.

    Raises `ValueError` for an argument that the pipeline does not take, `FloatingPointError` where a model's prediction
    for a batch is not finite.
    """
    accepted = require_heeded(pipe, arguments)
    groups = [list(shots)]
    one_lam = dial.method == "interpolate" and not dial.blends_rows
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
        try:
            drawn = pictures.draw(
                pipe,
                prompt=[shot.prompt for shot in batch],
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in batch],
                num_inference_steps=steps,
                **own,
            )
        except FloatingPointError as error:  # of a model's prediction, which does not say for which image
            which = "" if len(batch) == 1 else f"one of {len(batch)} images, of which the first is "
            raise FloatingPointError(f"{which}{_name(batch[0], lams)}: {error}") from error
        done += len(batch) * steps
        if on_step:
            on_step(done, total)
        run = None if dial.method == "interpolate" else dial.importance_weights
        reused = dial.reused
        require_size(pipe, drawn.images[0], arguments)
        for row, (shot, image, flaw) in enumerate(zip(batch, drawn.images, drawn.flaws, strict=True)):
            told = Told(
                run=None if run is None else run.rows(slice(row, row + 1)),
                reused=None if reused is None else reused.of(row),
                blacked_out=drawn.blacked_out[row],
                cuts=_cuts(pipe, shot, arguments),
            )
            yield shot, image if flaw is None else flaw.of(_name(shot, lams)), told


def attempts_by_particles(
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
) -> Iterator[Attempt]:
    """Like `attempts`, but each image is drawn by weight from `particles` of its own, `batch_size` at a time.

    Weights or particles that are not finite are the failure of their image alone.
    """
    require_heeded(pipe, arguments)
    pipe.set_progress_bar_config(disable=True)
    for number, shot in enumerate(shots):
        dial.lam = lams[shot.column]
        generator = torch.Generator("cpu").manual_seed(shot.seed)
        try:
            swarm = sample_particles(
                pipe,
                shot.prompt,
                particles,
                micro_batch=batch_size,
                generator=generator,
                num_inference_steps=steps,
                **arguments,
            )
        except NotFinite as error:
            yield shot, error.of(f"{error.image} for {_name(shot, lams)}"), Told()
            continue
        except FloatingPointError as error:
            yield shot, error, Told()
            continue
        if on_step:
            on_step((number + 1) * steps, len(shots) * steps)
        require_size(pipe, swarm.images[0], arguments)
        chosen = int(swarm.picks(torch.Generator("cpu").manual_seed(shot.seed)))
        told = Told(particles=swarm, blacked_out=bool(swarm.blacked_out[chosen]), cuts=_cuts(pipe, shot, arguments))
        yield shot, swarm.images[chosen], told


def _cuts(pipe: DiffusionPipeline, shot: Shot, arguments: Mapping[str, Any]) -> tuple[Cut, ...]:
    return tuple(cuts(pipe, [shot.prompt, arguments.get("negative_prompt")]))


def _name(shot: Shot, lams: Sequence[Any]) -> str:
    """An image in words."""
    lam = lams[shot.column]
    strength = ", ".join(f"{name} {its}" for name, its in lam.items()) if isinstance(lam, Mapping) else lam
    return f"the image of {shot.prompt!r} with seed {shot.seed} at λ = {strength}"


def require_heeded(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Mapping[str, Parameter]:
    """The parameters of the pipeline's call. Raises `ValueError` where it would not heed all of these arguments.

    It takes no prompt, or not all of them, or samples without guidance, so that a negative prompt does nothing.
    """
    accepted = signature(pipe.__call__).parameters
    if unknown := [name for name in ("prompt", *arguments) if name not in accepted]:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}: "
            + ("it is no text-to-image pipeline." if "prompt" in unknown else "leave it out.")
        )
    if arguments.get("negative_prompt") and not _guided(pipe, arguments):
        raise ValueError(
            f"{type(pipe).__name__} does not read a negative prompt here, since it samples without classifier-free "
            "guidance: leave negative_prompt out, or take a larger guidance_scale"
        )
    return accepted


def _guided(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether this call evaluates a second prompt; True where the pipeline does not tell."""
    true_scale = _default(pipe, "true_cfg_scale")
    if true_scale is not None:  # beside a guidance scale that the model is told
        return bool(true_scale > 1)
    scale = arguments.get("guidance_scale", _default(pipe, "guidance_scale"))
    try:
        pipe._guidance_scale = scale  # as its call does first of all
        return bool(pipe.do_classifier_free_guidance)
    except (AttributeError, TypeError):
        return True


def require_size(pipe: DiffusionPipeline, image: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a pipeline drew another size than was asked for, such as the next multiple of 16."""
    asked = arguments.get("width"), arguments.get("height")
    if isinstance(image, Image.Image) and None not in asked and image.size != asked:
        drawn, wanted = (f"{width}x{height}" for width, height in (image.size, asked))
        raise ValueError(f"{type(pipe).__name__} draws {drawn} where {wanted} was asked for: name {drawn}")


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
