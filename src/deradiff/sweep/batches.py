"""Drawings in batches through one pipeline, realigned or as it is: images, why one is none, what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deradiff.algorithm.guided_weights import GuidedWeights
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.sampling import pictures
from deradiff.sampling.dial import Dial
from deradiff.sampling.particles import Particles, sample_particles
from deradiff.sampling.pictures import NotFinite
from deradiff.sampling.reuse import Reused
from deradiff.sampling.truncation import Cut, cuts
from deradiff.sweep.description import Drawing, call_of

OnStep = Callable[[int, int], None]
"""Told about every sampling step of every image: how many are done, of how many."""


@dataclass(frozen=True)
class Diagnostics:
    """What a run knows about one image: its weights (one row), or what became of its particles."""

    run: ImportanceWeights | None = None
    particles: Particles | None = None
    reused: Reused | None = None
    blacked_out: bool = False
    """Whether a safety checker put a black image in its place."""
    cuts: tuple[Cut, ...] = ()
    """What its prompt and negative prompt lost to the tokenizers."""

    def record(self) -> dict[str, Any]:
        """As plain data, for the image's file and the record of its run."""
        known: dict[str, Any] = {}
        if self.particles is not None:
            known = {
                "effective": float(self.particles.effective),
                "families": int(self.particles.families),
                "collapsed": bool(self.particles.collapsed.any()),
            }
        elif self.run is not None:
            known = {"log_weight": float(self.run.log_weights)}
        if self.reused is not None:
            known["reuse"] = self.reused.record()
        if self.cuts:
            known["cut_prompts"] = [cut.record() for cut in self.cuts]
        return known | ({"blacked_out": True} if self.blacked_out else {})

    def stored(self) -> dict[str, Any]:
        """`record` and what is known of the image's path, for estimates from many images (`experiments.results`).

        How much is known of a path depends on whether models without weight were evaluated (`Dial.watching`).
        """
        return self.record() | ({} if self.run is None else _path(self.run))


def _path(run: ImportanceWeights) -> dict[str, Any]:
    return {
        "log_ratios": {name: float(ratio) for name, ratio in run.log_ratios.items()},
        "path_kl": None if run.path_kl is None else float(run.path_kl),
        "memoryless": run.memoryless,
        "obstacles": sorted(run.obstacles),
        "predictions": run.predictions,
    } | ({} if run.guidance is None else {"guidance": _guidance(run.guidance)})


def _guidance(guided: GuidedWeights) -> dict[str, float]:
    return {
        "scale": guided.scale,
        "conditional": float(guided.conditional),
        "unconditional": float(guided.unconditional),
        "strength": float(guided.strength),
    }


class Attempt(NamedTuple):
    """What became of a drawing."""

    place: int
    """Of the drawing among those that were asked for."""
    image: Image.Image | FloatingPointError
    """The image, or why it is none."""
    diagnostics: Diagnostics


def sample(
    pipe: DiffusionPipeline,
    dial: Dial | None,
    drawings: Sequence[Drawing],
    *,
    batch_size: int,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Image.Image, Diagnostics]]:
    """Yield every drawing's place, image and diagnostics, as `attempts` draws them.

    Raises `NotFinite` that names the first image of NaN or infinity, after those before it.
    """
    for place, image, diagnostics in attempts(pipe, dial, drawings, batch_size=batch_size, on_step=on_step):
        if isinstance(image, FloatingPointError):
            raise image
        yield place, image, diagnostics


def attempts(
    pipe: DiffusionPipeline,
    dial: Dial | None,
    drawings: Sequence[Drawing],
    *,
    batch_size: int,
    on_step: OnStep | None = None,
) -> Iterator[Attempt]:
    """Draw all of these by a pipeline with their scheduler and, on the dial, their anchors; None for no anchors.

    Drawings of different λ, prompts and seeds share a batch (`batch_size` images), each with a generator of its own,
    made on the CPU so that every device draws the same noise. Interpolated full weights are one model for a whole
    batch: there those of each λ run by themselves. With particles, each image is drawn by weight from particles of its
    own, `batch_size` at a time. An image of NaN or infinity comes as the `NotFinite` that says so; weights or particles
    that are not finite are the failure of their image alone.

    Raises `ValueError` for drawings that are not sampled alike and for what the pipeline does not take,
    `FloatingPointError` where a model's prediction for a batch is not finite.
    """
    if (
        len({(drawing.sampling, drawing.reference, drawing.particles, drawing.reward_guidance) for drawing in drawings})
        > 1
    ):
        raise ValueError("drawings that are not sampled alike, or with other particles or noise, share no batch")
    if not drawings:
        return
    arguments = call_of(drawings[0].sampling, drawings[0].reference)
    accepted = require_heeded(pipe, arguments)
    pipe.set_progress_bar_config(disable=True)
    if dial is not None and drawings[0].particles:
        yield from _by_particles(pipe, dial, drawings, arguments, batch_size, on_step)
        return
    groups = _groups(dial, drawings)
    done, total = 0, len(drawings) * drawings[0].sampling.steps
    for batch in (group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)):
        chosen = [drawings[place] for place in batch]
        callback: dict[str, Any] = {}
        if on_step and "callback_on_step_end" in accepted:
            callback["callback_on_step_end"] = _reporter(on_step, done, len(batch), total)
        tried = _batch(pipe, dial, chosen, arguments, callback)
        done += len(batch) * chosen[0].sampling.steps
        if on_step:
            on_step(done, total)
        for place, attempt in zip(batch, tried, strict=True):
            yield attempt._replace(place=place)


def _groups(dial: Dial | None, drawings: Sequence[Drawing]) -> list[list[int]]:
    """The places of drawings that may share a batch."""
    if dial is None or not _one_lam(dial):
        return [list(range(len(drawings)))]
    lams = [drawing.lams for drawing in drawings]
    alike = [lams.index(lam) for lam in lams]
    return [[place for place, first in enumerate(alike) if first == group] for group in dict.fromkeys(alike)]


def _one_lam(dial: Dial) -> bool:
    return dial.method == "interpolate" and not dial.blends_rows


def _batch(
    pipe: DiffusionPipeline,
    dial: Dial | None,
    drawings: Sequence[Drawing],
    arguments: Mapping[str, Any],
    callback: Mapping[str, Any],
) -> list[Attempt]:
    """Draw one batch."""
    if dial is not None:
        lams = [drawing.lams for drawing in drawings]
        dial.lam = lams[0] if _one_lam(dial) else {name: [lam[name] for lam in lams] for name in lams[0]}
    call = dict(arguments)
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(drawings)
    try:
        drawn = pictures.draw(
            pipe,
            prompt=[drawing.prompt for drawing in drawings],
            generator=[torch.Generator("cpu").manual_seed(drawing.seed) for drawing in drawings],
            num_inference_steps=drawings[0].sampling.steps,
            **call,
            **callback,
        )
    except FloatingPointError as error:  # of a model's prediction, which does not say for which image
        which = "" if len(drawings) == 1 else f"one of {len(drawings)} images, of which the first is "
        raise FloatingPointError(f"{which}{drawings[0].name}: {error}") from error
    run = None if dial is None or dial.method == "interpolate" else dial.importance_weights
    reused = None if dial is None else dial.reused
    require_size(pipe, drawn.images[0], arguments)
    return [
        Attempt(
            row,
            image if flaw is None else flaw.of(drawing.name),
            Diagnostics(
                run=None if run is None else run.rows(slice(row, row + 1)),
                reused=None if reused is None else reused.of(row),
                blacked_out=drawn.blacked_out[row],
                cuts=_cuts(pipe, drawing),
            ),
        )
        for row, (drawing, image, flaw) in enumerate(zip(drawings, drawn.images, drawn.flaws, strict=True))
    ]


def _by_particles(
    pipe: DiffusionPipeline,
    dial: Dial,
    drawings: Sequence[Drawing],
    arguments: Mapping[str, Any],
    batch_size: int,
    on_step: OnStep | None,
) -> Iterator[Attempt]:
    """Draw one image after the other, each from its particles."""
    steps = drawings[0].sampling.steps
    for place, drawing in enumerate(drawings):
        dial.lam = drawing.lams
        try:
            particles = sample_particles(
                pipe,
                drawing.prompt,
                drawing.particles,
                micro_batch=batch_size,
                generator=torch.Generator("cpu").manual_seed(drawing.seed),
                num_inference_steps=steps,
                **arguments,
            )
        except NotFinite as error:
            yield Attempt(place, error.of(f"{error.image} for {drawing.name}"), Diagnostics())
            continue
        except FloatingPointError as error:
            yield Attempt(place, error, Diagnostics())
            continue
        if on_step:
            on_step((place + 1) * steps, len(drawings) * steps)
        require_size(pipe, particles.images[0], arguments)
        chosen = int(particles.picks(torch.Generator("cpu").manual_seed(drawing.seed)))
        hidden = bool(particles.blacked_out[chosen])
        yield Attempt(
            place,
            particles.images[chosen],
            Diagnostics(particles=particles, blacked_out=hidden, cuts=_cuts(pipe, drawing)),
        )


def _cuts(pipe: DiffusionPipeline, drawing: Drawing) -> tuple[Cut, ...]:
    return tuple(cuts(pipe, [drawing.prompt, drawing.sampling.negative_prompt]))


def _reporter(on_step: OnStep, done: int, images: int, total: int) -> Callable[..., dict[str, Any]]:
    """A pipeline's callback at the end of a step of so many images, before which `done` steps were done."""

    def report(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(done + (step + 1) * images, total), total)
        return tensors

    return report


# -- what a pipeline takes --------------------------------------------------------------------------------------------


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
    true_scale = default_of(pipe, "true_cfg_scale")
    if true_scale is not None:  # beside a guidance scale that the model is told
        return bool(true_scale > 1)
    scale = arguments.get("guidance_scale", default_of(pipe, "guidance_scale"))
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


def default_of(pipe: DiffusionPipeline, argument: str) -> Any:
    """What the pipeline's call takes for an argument that is not given."""
    parameter = signature(pipe.__call__).parameters.get(argument)
    return None if parameter is None or parameter.default is Parameter.empty else parameter.default
