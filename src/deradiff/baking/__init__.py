"""A chosen λ as one ordinary checkpoint, which costs what the plain model costs and needs nothing of deradiff.

Two ways: interpolated weights, in seconds, right to first order; and a student that is trained to predict what the
mixture predicts. Either way the result says how far its images are from truly realigned ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline
from torch import nn

from deradiff.algorithm.lams import Lams, parse_lam
from deradiff.algorithm.schedules import Constant, Progress, Schedule
from deradiff.anchors import denoiser_of
from deradiff.anchors.checks import unwrapped
from deradiff.baking import outputs
from deradiff.baking.cards import card
from deradiff.baking.distillation import Distillation
from deradiff.baking.drawing import Sampler
from deradiff.baking.judging import Case, Form, Judgement, judge, wearing
from deradiff.baking.methods import BakingJob, distilled, hashes, interpolated
from deradiff.baking.weights import fingerprint, open_anchor, require_plain
from deradiff.files.folders import require_room
from deradiff.files.inventory import inventory
from deradiff.files.records import versions, write_png
from deradiff.files.writing import write_json
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.dial import Lam, dial_of
from deradiff.sampling.realignment import Source, realign
from deradiff.sweep.jobs import Report

__all__ = ["Baked", "Distillation", "Judgement", "Sampler", "bake"]

Method = Literal["interpolate", "distill"]


@dataclass(frozen=True)
class Baked:
    """A baked model.

    Attributes:
        folder: where it is.
        form: "pipeline", for `from_pretrained(folder)`, or "lora", for `load_lora_weights(folder)` on the reference.
        judgements: how far its images are from realigned ones; empty where that was not measured.
    """

    folder: Path
    form: Form
    judgements: list[Judgement]


def bake(
    pipe: DiffusionPipeline,
    anchor: Source | Mapping[str, Source],
    lam: Lam | Mapping[str, Lam],
    out: str | Path,
    *,
    method: Method = "interpolate",
    prompts: Sequence[str] = (),
    images: int = 32,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    distillation: Distillation = Distillation(),  # noqa: B008
    seed: int = 0,
    force: bool = False,
    name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    local_files_only: bool = False,
    report: Report = lambda *_: None,
) -> Baked:
    """Make one checkpoint of `pipe` realigned at `lam`, which diffusers loads by itself.

    Args:
        pipe: the reference, a plain pipeline; it is given back as it was.
        anchor: the aligned model, or several by name: see `realign`.
        lam: λ as `realign` takes it, but the same for all images. A schedule needs `method="distill"`.
        out: a new or empty folder. It gets the model, its card (`README.md`), `baking.json` and a contact sheet.
        method: "interpolate" writes `(1 - Σλ) θ_0 + Σ λ θ`, a LoRA scaled and fused: exactly what a dial with
            `method="interpolate"` computes with. An anchor's files are read tensor by tensor, so that memory holds no
            second model. "distill" trains a student from there, on Stable Diffusion and SDXL.
        prompts: for measuring how near the result comes; with "distill" also for training, less the last fifth, which
            are held out for measuring.
        images: so many images are compared, from the noise of the seeds `seed`, `seed + 1`, ...; 0 leaves it out.
        sampler: how to sample, in training and for the comparison, with the scheduler that `pipe` has.
        distillation: how to train.
        seed: decides all that is drawn.
        force: replace a baked model in `out`. What is none is never replaced.
        name: what the reference is called in card and record, its hub id or path by default.
        subfolder: see `realign`, as for the next three.
        revision: see there.
        allow_pickle: see there.
        local_files_only: see there.
        report: called with (stage, steps done, steps planned, a line of words).

    An interrupted distillation goes on where it was if called again with the same arguments; until then the folder
    `<out>/.deradiff` keeps what it has.

    Raises:
        ValueError: λ that is not finite, not one for every anchor, or one per image; a schedule for "interpolate"; no
            prompts where some are needed; a model that cannot be distilled; an unfinished distillation with other
            settings; `anchors.AnchorError` for an anchor or a reference that cannot be used.
        FileExistsError: `out` holds something, or an interrupted distillation while `method` is another.
        FolderInUse: another process bakes there.
        OSError: the disk is too small or cannot be written to; nothing is left at `out` then.
        DialError: `pipe` is realigned (a `RuntimeError`).
    """
    out = Path(out).resolve()
    _require_askable(pipe, method, distillation)
    where = {"subfolder": subfolder, "revision": revision, "local_files_only": local_files_only}
    job = _job(pipe, anchor, lam, where | {"allow_pickle": allow_pickle}, seed, report)
    _require_bakeable(job.lams, method, distillation if method == "distill" else None, pipe, job.reference)
    texts, held_out = split_prompts(prompts, images, method)
    require_plain(job.reference, set())
    require_room(out, outputs.size_of(pipe))
    with outputs.baking_folder(out, method, force) as (folder, work):
        job.made_of.update(_made_of(job, name, method))
        if method == "interpolate":
            form = interpolated(job, folder)
        else:
            job.made_of.update(_trained_with(pipe, distillation, sampler, texts))
            form = distilled(job, folder, work, distillation, texts, sampler)
        cases = _cases(job.lams, method, distillation)
        judgements = _measured(job, folder, form, cases, held_out, images, sampler)
        how = {"scheduler": type(pipe.scheduler).__name__, **asdict(sampler), "prompts": held_out, "seed": seed}
        (folder / "README.md").write_text(card(job.made_of, form, judgements, how), encoding="utf-8")
        judged = [judgement.record() for judgement in judgements]
        record = {"made_of": job.made_of, "form": form, "judged": judged, "drawn": how, **job.trained}
        write_json(folder / outputs.RECORD, record | {"card": "README.md", "files": inventory(folder)})
    return Baked(out, form, judgements)


def _job(pipe: Any, anchor: Any, lam: Any, where: dict[str, Any], seed: int, report: Report) -> BakingJob:
    sources: dict[str, Source] = dict(anchor) if isinstance(anchor, Mapping) else {"anchor": anchor}
    if not sources:
        raise ValueError("bake() needs at least one anchor, got an empty dictionary")
    _, denoiser = denoiser_of(pipe)
    return BakingJob(pipe, unwrapped(denoiser), sources, where, parse_lam(lam, tuple(sources)), {}, seed, report)


def _require_askable(pipe: Any, method: Method, distillation: Distillation) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}; got {method!r}")
    if dial_of(pipe) is not None:
        raise DialError("this pipeline is realigned: call dial.remove() first, and give bake() the anchor and λ")
    if method == "interpolate" and distillation != Distillation():
        raise ValueError("interpolated weights are not trained: leave distillation out, or name method='distill'")


def _measured(
    job: BakingJob,
    folder: Path,
    form: Form,
    cases: Sequence[Case],
    prompts: Sequence[str],
    images: int,
    sampler: Sampler,
) -> list[Judgement]:
    """How far `images` of the model in `folder` are from realigned ones, with a sheet beside it; nothing of none."""
    if not images:
        return []
    judgements, sheet = judge(
        job.pipe,
        partial(realign, job.pipe, job.sources, job.lams.raw, **job.where),
        partial(wearing, job.pipe, folder, form),
        cases,
        [prompts[i % len(prompts)] for i in range(images)],
        range(job.seed, job.seed + images),
        sampler,
        lambda done, planned: job.report("comparing", done, planned, ""),
    )
    write_png(folder / "sheet.png", sheet, job.made_of)
    return judgements


def split_prompts(prompts: Sequence[str], images: int, method: Method) -> tuple[list[str], list[str]]:
    """Prompts to train with, and those held out for `images` to be compared: the last fifth, or all for "interpolate".

    Raises `ValueError` where there are too few.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is a list of prompts, got one string: write [{prompts!r}]")
    texts = list(dict.fromkeys(prompts))
    if images < 0:
        raise ValueError(f"{images} images cannot be compared: name 0 or more")
    if method == "interpolate":
        if texts and not images:
            raise ValueError("prompts measure the result, which 0 images leave unmeasured: leave them out")
        if images and not texts:
            raise ValueError("name prompts (--prompts) to measure the result with, or leave it unmeasured (--images 0)")
        return [], texts[: max(images, 1)]
    if len(texts) < 2:
        raise ValueError(
            f"{len(texts)} different prompts are too few to train with some and hold others out: name more"
        )
    held_out = max(1, len(texts) // 5)
    return texts[:-held_out], texts[-held_out:]


def _require_bakeable(
    lams: Lams, method: Method, settings: Distillation | None, pipe: Any, reference: nn.Module
) -> None:
    """Raise `ValueError` for λ that one checkpoint cannot have."""
    if lams.images is not None:
        raise ValueError(f"λ is given for {lams.images} images, but one checkpoint has one λ for all: name one")
    if method == "interpolate" and not lams.is_constant:
        raise ValueError(
            "interpolated weights have the same λ at every noise level, and this λ changes along the run: bake it with "
            "method='distill', whose student learns the λ that belongs to each noise level"
        )
    if settings is None:
        return
    config: Any = getattr(reference, "config", {})
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "this model is told its guidance scale (time_cond_proj_dim), and a student would have to be trained at "
            "every one: bake it with method='interpolate'"
        )
    if settings.span is None:
        return
    if len(lams.anchors) > 1 or not lams.is_constant:
        raise ValueError("a student for a span of λ is told one number: name one anchor, and λ without a schedule")
    low, high = settings.span
    lam = float(lams.at(Progress(0.0, 0.0), 1))
    if not low <= lam <= high:
        raise ValueError(
            f"λ = {lam:g}, which the result is measured at, is outside the student's span {low:g} to {high:g}"
        )
    if not hasattr(pipe, "get_guidance_scale_embedding") or "time_cond_proj_dim" not in config:
        raise ValueError(
            f"{type(pipe).__name__} with its {type(reference).__name__} has no input by which a plain pipeline could "
            "tell λ (time_cond_proj_dim): bake one λ at a time"
        )


def _made_of(job: BakingJob, name: str | None, method: Method) -> dict[str, Any]:
    pipe, reference, lams = job.pipe, job.reference, job.lams
    with job.anchors(open_anchor) as opened:
        anchors = {anchor.name: {"source": anchor.source, "sha256": hashes(anchor, reference)} for anchor in opened}
    left_out = [
        part for part, held in pipe.components.items() if held is None and part not in pipe._optional_components
    ]
    called = name or str(getattr(pipe, "name_or_path", None) or f"a loaded {type(pipe).__name__}")
    lam = {anchor: _plain(lams.raw[anchor] if isinstance(lams.raw, Mapping) else lams.raw) for anchor in lams.anchors}
    return {
        "method": method,
        "words": _words(lams),
        "lam": lam,
        "pipeline": type(pipe).__name__,
        "reference": {"name": called, "class": type(reference).__name__, "sha256": fingerprint(reference)},
        "component": denoiser_of(pipe)[0],
        **({"left_out": left_out} if left_out else {}),
        "anchors": anchors,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "seed": job.seed,
        "versions": versions(),
    }


def _trained_with(pipe: Any, settings: Distillation, sampler: Sampler, prompts: list[str]) -> dict[str, Any]:
    settled = {
        "distillation": asdict(settings),
        "sampler": asdict(sampler),
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": sampler.guidance(pipe),
        "prompts": prompts,
    }
    return json.loads(json.dumps(settled))


def _plain(lam: Any) -> Any:
    return lam.to_dict() if isinstance(lam, Schedule) else lam


def _words(lams: Lams) -> str:
    raw = lams.raw if isinstance(lams.raw, Mapping) else {"": lams.raw}
    return ", ".join(_said(lam) if len(raw) == 1 else f"{name} {_said(lam)}" for name, lam in raw.items())


def _said(lam: Any) -> str:
    return f"λ = {lam:g}" if not isinstance(lam, Schedule) else str(lam) if isinstance(lam, Constant) else f"λ {lam}"


def _cases(lams: Lams, method: Method, settings: Distillation) -> list[Case]:
    """At which λ a result is compared; the first is on the sheet."""
    if method == "interpolate" or not settings.guided:
        return [Case(_words(lams), lams.raw, None)]
    if settings.span is None:
        return [Case(_words(lams), lams.raw, 1.0)]
    own = float(lams.at(Progress(0.0, 0.0), 1))
    ends = [end for end in settings.span if end not in (own, 0.0)]
    return [Case(f"λ = {value:g}", value, 1 + value) for value in (own, *ends)]
