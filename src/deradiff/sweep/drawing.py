"""A sweep: some prompts and seeds through one realigned pipeline at many λ, from the same noise for every λ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from deradiff.files.folders import RunFolder
from deradiff.files.records import versions
from deradiff.sampling.devices import device_called
from deradiff.sampling.dial import Dial
from deradiff.sampling.realignment import realign
from deradiff.sampling.truncation import cuts
from deradiff.sweep.batches import Diagnostics, OnStep, default_of, sample
from deradiff.sweep.characters import KnownCharacter
from deradiff.sweep.description import about, call_of, metadata
from deradiff.sweep.pipelines import DTYPES, anchor_source, load_pipeline
from deradiff.sweep.prompt_embeddings import Remembering
from deradiff.sweep.settings import Settings, caption, file_name
from deradiff.sweep.sheets import contact_sheet, covered
from deradiff.sweep.verdicts import judged


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
        text_encoder=settings.text_encoder,
        reuse=settings.reuse,
        tolerance=settings.tolerance,
        revision=settings.anchor_revision,
        allow_pickle=settings.allow_pickle,
    ) as dial:
        place(pipe, settings)
        yield pipe, dial


def made_of(settings: Settings, pipe: DiffusionPipeline, dial: Dial) -> dict[str, Any]:
    """What a record says about how images were made: the settings, and what came of those that were left open."""
    chosen = call_of(settings, settings.reference).get("guidance_scale")
    return {
        "settings": settings.model_dump(),
        "mixed": dial.path if settings.method == "mixture" else "weights",
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": default_of(pipe, "guidance_scale") if chosen is None else chosen,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def draw(
    settings: Settings,
    pipe: DiffusionPipeline,
    dial: Dial,
    folder: RunFolder,
    on_step: OnStep | None = None,
    *,
    known_character: KnownCharacter | None = None,
    **further: Any,
) -> list[dict[str, Any]]:
    """Sample the sweep with what `realigned` gave, and write images, contact sheet and record into `folder`.

    Returns the verdict of every column (see `verdicts.judged`), which stand in the record too. `on_step(done, total)`
    is told about every sampling step of every image; `known_character` is the anchor's, where it was examined;
    `further` goes into the record as it is. Raises `NotFinite` at an
    image of NaN or infinity: those before it are in the folder, as after any interruption.
    """
    made = made_of(settings, pipe, dial)
    drawings, columns = settings.drawings, len(settings.columns)
    images: dict[int, Image.Image] = {}
    known: dict[int, Diagnostics] = {}
    listed: list[dict[str, Any]] = []
    for place, image, diagnostics in sample(pipe, dial, drawings, batch_size=settings.batch_size, on_step=on_step):
        drawing, beta = drawings[place], settings.columns[place % columns].beta(settings.anchor_beta)
        came_of_it = {"beta": beta} | diagnostics.record()
        file = folder.add(file_name(settings, place), image, made | metadata(drawing, made["settings"]) | came_of_it)
        listed.append({"file": file} | about(drawing) | came_of_it)
        images[place], known[place] = covered(image) if diagnostics.blacked_out else image, diagnostics
    sheet = contact_sheet(
        [[images[row + column] for column in range(columns)] for row in range(0, len(drawings), columns)],
        [column.label(settings.anchor_beta) for column in settings.columns],
        [f"{prompt}\nseed {seed}" for prompt, seed in settings.rows],
        caption(settings, made["scheduler"], made["guidance_scale"]),
    )
    verdicts = []
    for number, column in enumerate(settings.columns):
        places = range(number, len(drawings), columns)
        column_images = [(drawings[place], known[place]) for place in places]
        verdict = judged(column_images, known_character.character if known_character else None)
        if known_character is not None:
            sampler = made["scheduler"], made["guidance_scale"]
            verdict["words"] = known_character.said(verdict["kind"], verdict["words"], *sampler)
        verdicts.append({"lam": column.lam} | verdict)
    cut = [cut.record() for cut in cuts(pipe)]
    results = {"sheet": folder.sheet.name, "verdicts": verdicts, "cut_prompts": cut, "images": listed}
    folder.finish(sheet, made | further | results)
    return verdicts
