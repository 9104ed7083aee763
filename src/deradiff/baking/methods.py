"""The two ways of baking, from a pipeline and its anchors to files in a folder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from deradiff.algorithm.lams import Lams
from deradiff.algorithm.schedules import Progress
from deradiff.alignment.base import Base
from deradiff.alignment.training import TrainingRun
from deradiff.anchors import Anchor, denoiser_of, load_anchor
from deradiff.baking import outputs
from deradiff.baking.distillation import (
    ADAPTER,
    Distillation,
    RealignedSamples,
    Teacher,
    accelerator_of,
    distil,
    draw_samples,
    lam_by_timestep,
    student_of,
)
from deradiff.baking.drawing import Sampler
from deradiff.baking.judging import Form
from deradiff.baking.weights import Blend, Opened, StoredAnchor, content_of, fingerprint, open_anchor, write_blend
from deradiff.files.reading import sha256_of
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.realignment import Source, realign
from deradiff.sweep.jobs import Report


@dataclass(frozen=True)
class BakingJob:
    """What is to be baked.

    Attributes:
        pipe: the reference's pipeline, plain.
        reference: its denoiser.
        sources: the anchors' sources by name.
        where: further arguments of `load_anchor`.
        lams: λ of every anchor.
        made_of: what decides the weights, as plain data.
        seed: of everything drawn.
        report: told of the progress.
        trained: gets the curve of a training.
    """

    pipe: Any
    reference: Any
    sources: Mapping[str, Source]
    where: Mapping[str, Any]
    lams: Lams
    made_of: dict[str, Any]
    seed: int
    report: Report
    trained: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def anchors(self, opening: Callable[..., Opened]) -> Iterator[list[Opened]]:
        """The anchors, opened by `open_anchor` or `load_anchor`; afterwards the pipeline is without them."""
        opened: list[Opened] = []
        try:
            for name, source in self.sources.items():
                opened.append(opening(source, self.pipe, name=name, **self.where))
            yield opened
        finally:
            for anchor in opened:
                if isinstance(anchor, Anchor):
                    anchor.unload(self.reference)


def hashes(anchor: Opened, reference: nn.Module) -> dict[str, str]:
    """SHA-256 of what an anchor is made of: its files, or the tensors of one that was loaded."""
    if isinstance(anchor, StoredAnchor):
        return {path.name: sha256_of(path) for path in sorted(set(anchor.files.values()))}
    if anchor.module is not None:
        return {"tensors": fingerprint(anchor.module)}
    digest = hashlib.sha256()
    for name, parameter in sorted(reference.named_parameters(), key=lambda pair: pair[0]):
        if f".{anchor.adapter}." in name:
            digest.update(name.encode())
            digest.update(content_of(parameter))
    return {"tensors": digest.hexdigest()}


def interpolated(job: BakingJob, folder: Path) -> Form:
    """Write the pipeline with interpolated weights into `folder`, tensor by tensor."""
    lams = dict(zip(job.lams.anchors, job.lams.at(Progress(0.0, 0.0), 1)[:, 0].tolist(), strict=True))
    with job.anchors(open_anchor) as anchors:
        blend = Blend(job.reference, [(anchor, lams[anchor.name]) for anchor in anchors])
        job.report("weights", 0, 1, f"{len(blend.names)} tensors")
        outputs.save_pipeline(job.pipe, folder, partial(write_blend, blend))
    job.report("weights", 1, 1, "written")
    return "pipeline"


def identity_of(job: BakingJob) -> dict[str, Any]:
    """What an interrupted work must have been begun with to go on."""
    # Of other versions a warning tells: see `files.folders.begin_or_resume`.
    return {name: value for name, value in job.made_of.items() if name != "versions"}


def taught_on(
    job: BakingJob, work: Path, base: Base, settings: Distillation, prompts: Sequence[str], sampler: Sampler
) -> tuple[RealignedSamples, Float[Tensor, "anchor timestep"]]:
    """The samples that a student is trained on, drawn into `work`, and λ at every timestep.

    Raises `ValueError` for guidance that is to be folded into a model which is told it, and what `draw_samples` raises.
    """
    if settings.guided and base.call.guidance_is_embedded:
        raise ValueError(
            f"{type(job.pipe).__name__} tells its model the guidance scale, and guides no further: leave fold_guidance "
            "and span out"
        )
    clock = base.call.prepared(type(job.pipe.scheduler).from_config(job.pipe.scheduler.config), sampler.steps)
    shape, report = base.call.latent_shape(None), partial(job.report, "drawing samples")
    with realign(job.pipe, dict(job.sources), job.lams.raw, **job.where) as dial:
        drawn = (settings.samples, settings.span, identity_of(job), shape, job.seed, report)
        samples = draw_samples(work / "samples", job.pipe, dial, prompts, sampler, *drawn)
    return samples, lam_by_timestep(job.lams, clock)


def distilled(
    job: BakingJob, folder: Path, work: Path, settings: Distillation, prompts: Sequence[str], sampler: Sampler
) -> Form:
    """Train a student and write it into `folder`: as a LoRA where all anchors are such, else as a pipeline.

    What an interruption must not lose is in `work`; raises `ValueError` where that was begun with other settings.
    """
    base, guidance, identity = Base(job.pipe), sampler.guidance(job.pipe), identity_of(job)
    samples, lams = taught_on(job, work, base, settings, prompts, sampler)
    with job.anchors(load_anchor) as opened:
        anchors = [anchor for anchor in opened if isinstance(anchor, Anchor)]
        start = dict(zip(job.lams.anchors, lams.mean(1).tolist(), strict=True))
        if settings.span is not None:
            start = dict.fromkeys(start, sum(settings.span) / 2)
        begun = [(anchor, start[anchor.name]) for anchor in anchors]
        student = student_of(Blend(job.reference, begun), settings, job.seed)
        denoisers = Denoisers(job.reference, anchors)
        made_of, report = json.dumps(identity, sort_keys=True), partial(job.report, "training")
        run = TrainingRun(job.seed, work / "checkpoint", report, accelerator_of(base), made_of)
        try:
            curve = distil(base, Teacher(base, denoisers), student, samples, prompts, lams, settings, guidance, run)
            job.trained["curve"] = asdict(curve)
            return _save_student(job, folder, student, settings, begun)
        finally:
            denoisers.undo()


def _save_student(
    job: BakingJob, folder: Path, student: Any, settings: Distillation, start: Sequence[tuple[Anchor, float]]
) -> Form:
    """As a LoRA of the anchors and the student's own, or fused into a pipeline."""
    adapters = [anchor.adapter for anchor, _ in start if anchor.adapter]
    if (
        settings.lora_rank is not None
        and settings.span is None
        and len(adapters) == len(start)
        and outputs.can_be_joined(job.reference, adapters)
    ):
        parts = [(job.reference, anchor.adapter or "", lam) for anchor, lam in start]
        state = outputs.joined_loras([*parts, (student, ADAPTER, 1.0)])
        layers = {name: tensor.to(job.reference.dtype).contiguous() for name, tensor in state.items()}
        component = {f"{denoiser_of(job.pipe)[0]}_lora_layers": layers}
        job.pipe.save_lora_weights(folder, safe_serialization=True, **component)
        return "lora"
    if settings.lora_rank is None:
        whole = Blend(student.to(job.reference.dtype), [])
    else:
        whole = Blend(student, [(Anchor(ADAPTER, "student", adapter=ADAPTER), 1.0)])
    outputs.save_pipeline(job.pipe, folder, partial(write_blend, whole))
    return "pipeline"
