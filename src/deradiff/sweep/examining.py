"""The models of a command line, loaded and examined (`deradiff doctor`), and what is known of their pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from deradiff.files.reading import Record, read
from deradiff.files.records import versions
from deradiff.sampling.doctor import PipelineReport, examine
from deradiff.sweep.batches import require_heeded
from deradiff.sweep.description import call_of
from deradiff.sweep.drawing import loaded, place
from deradiff.sweep.pipelines import anchor_source
from deradiff.sweep.settings import Settings
from deradiff.worlds import find

PROMPT = "a red fox in the snow"

TRIED = Path(__file__).parents[3] / "docs" / "data" / "pipelines.json"
"""What came of diffusers' own tests of every pipeline (`tests/conformance`); in a checkout, not in a wheel."""


def usual_prompt(reference: str) -> str:
    """What is drawn where no prompt is given."""
    world = find(reference)
    return world.example[1] if world else PROMPT


def examined(settings: Settings, lam: float) -> PipelineReport:
    """The pipeline and the anchors of `settings`, loaded as for a sweep, with its first prompt and seed, at `lam`.

    Raises what loading raises, `ValueError` for a pipeline that draws from more than a prompt, and what `examine` does.
    """
    sources = {name: anchor_source(source) for name, source in settings.anchors.items()}
    pipe = loaded(settings)
    place(pipe, settings)
    pipe.set_progress_bar_config(disable=True)
    report = examine(
        pipe,
        sources if len(sources) > 1 else next(iter(sources.values())),
        _call(pipe, settings),
        lam,
        seed=settings.seeds[0],
        revision=settings.anchor_revision,
        allow_pickle=settings.allow_pickle,
    )
    if (verdict := tried(type(pipe).__name__)) is not None:
        report.facts["diffusers' own tests"] = verdict
    report.facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    return report


def _call(pipe: DiffusionPipeline, settings: Settings) -> Mapping[str, Any]:
    """The arguments of a call that ends with latents, where the pipeline can."""
    call = call_of(settings.sampling, settings.reference)
    accepted = require_heeded(pipe, call)
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    needed = [name for name, one in accepted.items() if one.kind in kinds and one.default is Parameter.empty]
    if further := [name for name in needed if name != "prompt"]:
        raise ValueError(
            f"{type(pipe).__name__} draws from {', '.join(further)} as well as a prompt: examine it from Python, with "
            "deradiff.sampling.doctor.examine(pipe, anchor, call)"
        )
    if "output_type" in accepted:
        call["output_type"] = "latent"
    return call | {"prompt": settings.prompts[0], "num_inference_steps": settings.steps}


class _Verdict(Record):
    verdict: str


class _Tried(Record):
    versions: dict[str, str]
    pipelines: dict[str, _Verdict]


def tried(name: str, record: Path = TRIED) -> str | None:
    """What diffusers' own tests of the pipeline class `name` came to, in words; None where there is no record of it."""
    if not record.is_file():
        return None
    known = read(_Tried, record, "record of tried pipelines", "")
    if name not in known.pipelines:
        return "not among those tried"
    return f"{known.pipelines[name].verdict} (with diffusers {known.versions.get('diffusers', 'unknown')})"
