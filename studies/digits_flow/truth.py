"""Realignment of a flow against models trained at the very strengths that λ stands for.

A *cell* is a method (Diffusion-DPO, or denoising of the reference's samples weighted by `exp(r/β)`) and a seed of
training. It holds an anchor and, for λ = ¼, ½ and ¾, models trained at β/λ. Every way of sampling from the anchor is
set beside the retrained model drawn by the same sampler, for the same captions and noise. A cell is a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import verdict
from deradiff.alignment.methods import METHODS
from deradiff.alignment.presets import preset
from deradiff.alignment.runs import RECORD, AlignmentRecord, align, anchor_name
from deradiff.alignment.settings import Preset
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.models import reading_model
from deradiff.files.reading import read
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.rewards import load as load_reward
from deradiff.sampling.particles import sample_particles
from deradiff.sampling.realignment import realign
from deradiff.sweep.jobs import Job, Report, run_jobs
from deradiff.sweep.pipelines import scheduler_like
from deradiff.worlds import digits_flow
from studies.digits.learned import contrast
from studies.digits_flow.models import EqualTokensPipeline

SEEDS = (0, 1)

EVEN = 1e9
"""In place of a β of weighted training: all samples weigh alike. That model, the control, is what λ = 0 is there."""

ANEW = "delete its folder, and it is trained again"

Settings = dict[str, Preset]


def _trainings() -> Settings:
    """All weights, at a rate that ends at zero: the last weights are kept, none chosen by a noisy held-out loss."""
    dpo, rwr = preset("digits-flow"), preset("digits-flow-rwr")
    steady = replace(dpo.plan, steps=250, cosine=250, evaluate_every=50)
    return {
        "dpo": replace(dpo, lora_rank=None, rate_times_beta=0.004, plan=steady, betas=(20.0,)),
        "rwr": replace(
            rwr,
            lora_rank=None,
            plan=replace(steady, steps=500, cosine=500, learning_rate=3e-4),
            betas=(0.4,),
            held_out=320,
            options=rwr.options | {"per_prompt": 64},
        ),
    }


@dataclass(frozen=True)
class FlowTruth:
    """Everything that decides what is trained, and what is drawn to compare it."""

    trainings: Mapping[str, Preset]
    lams: tuple[float, ...] = (0.25, 0.5, 0.75)
    pairs: int = 1600
    prompts: int = 45
    """Captions that weighted training draws samples of, five of which are held out; means are over the first ones."""
    compared: int = 40
    images: int = 12
    """Of every caption that is compared."""
    steps: int = 20
    batch: int = 240
    seed: int = 7
    particles: int = 8
    """Of a population, of which there are two for every caption; at guidance 1."""
    guidance_scales: tuple[float, ...] = (1.0, digits_flow.GUIDANCE)

    @classmethod
    def planned(cls) -> FlowTruth:
        """The study."""
        return cls(_trainings())


@dataclass(frozen=True)
class FlowCell:
    """A method and a seed of training: what is run at a time."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """As its file is called."""
        return f"{self.method}-{self.seed}"


def cells() -> list[FlowCell]:
    """All of the study's."""
    return [FlowCell(method, seed) for seed in SEEDS for method in ("dpo", "rwr")]


def run(out: Path, plan: FlowTruth, report: Report, workers: int = 1, only: str | None = None) -> list[Path]:
    """Train and compare every cell that `out` does not hold yet, or the one called `only`; returns the files of all.

    Raises `ValueError` where `out` holds a study of another plan, and for a cell that is none of the study's.
    """
    names = [cell.name for cell in cells()]
    if only not in (None, *names):
        raise ValueError(f"the study has no cell {only}: choose from {', '.join(names)}")
    begin_or_resume(out, asdict(plan), "study of flows")
    todo = [cell for cell in cells() if only in (None, cell.name)]
    with taken(out, "a study of flows"):
        (out / "cells").mkdir(exist_ok=True)
        run_jobs([partial(_prepare, out, plan, method) for method in plan.trainings], workers, report)
        trainings: list[Job] = [
            partial(train, out, plan, cell, beta) for cell in todo for beta in strengths(plan, cell.method)
        ]
        run_jobs(trainings, workers, report)
        run_jobs([partial(_cell, out, plan, cell) for cell in todo], workers, report)
    return [_file(out, cell) for cell in todo]


def _file(out: Path, cell: FlowCell) -> Path:
    return out / "cells" / f"{cell.name}.json"


# -- training ---------------------------------------------------------------------------------------------------------


def strengths(plan: FlowTruth, method: str) -> list[float]:
    """Every β that a cell trains at: its anchor's, β/λ, and the control of weighted training."""
    (anchor,) = plan.trainings[method].betas
    return [*([EVEN] if method == "rwr" else []), anchor, *(anchor / lam for lam in plan.lams)]


def _data(out: Path, plan: FlowTruth, method: str, report: Report) -> tuple[EqualTokensPipeline, Any]:
    """The pipeline that is aligned, and what on: drawn once, for all strengths and seeds."""
    pipe = EqualTokensPipeline.around(digits_flow.load_pipeline())
    count = {"dpo": plan.pairs, "rwr": plan.prompts}[method]
    return pipe, METHODS[method].prepare(pipe, plan.trainings[method], out / f"{method}-data", count, 0, report)


def _prepare(out: Path, plan: FlowTruth, method: str, report: Report) -> None:
    _data(out, plan, method, report)


def _trained(out: Path, cell: FlowCell, beta: float) -> Path:
    return out / "models" / f"{cell.name}-{beta:g}" / anchor_name(beta)


def train(out: Path, plan: FlowTruth, cell: FlowCell, beta: float, report: Report) -> None:
    """One model, unless it is there; an interrupted training goes on."""
    path = _trained(out, cell, beta)
    if not path.exists():
        pipe, data = _data(out, plan, cell.method, report)
        path.parent.mkdir(parents=True, exist_ok=True)
        align(pipe, data, beta, plan.trainings[cell.method], path.parent, report, seed=cell.seed)


def _transformer(out: Path, cell: FlowCell, beta: float) -> SD3Transformer2DModel:
    path = _trained(out, cell, beta)
    with reading_model(path):
        return SD3Transformer2DModel.from_pretrained(path)


# -- a cell -----------------------------------------------------------------------------------------------------------


def _cell(out: Path, plan: FlowTruth, cell: FlowCell, report: Report) -> None:
    if not (file := _file(out, cell)).exists():
        write_json(file, compute(out, plan, cell, report))


def compute(out: Path, plan: FlowTruth, cell: FlowCell, report: Report) -> dict[str, Any]:
    """Draw by every model as it is, and in every way from the anchor, and compare: plain data."""
    betas = strengths(plan, cell.method)
    anchor_beta = plan.trainings[cell.method].betas[0]
    start = None if cell.method == "dpo" else _transformer(out, cell, EVEN)
    anchor, cases, told = _transformer(out, cell, anchor_beta), [], Drawing(plan)
    for scale in plan.guidance_scales:
        for scheduler in ("flow-euler", "flow-sde"):
            drawing = replace(told, scheduler=scheduler, guidance_scale=scale)
            reference, _ = drawing.scores(drawing.pipeline(start))
            for number, lam in enumerate(plan.lams):
                retrained, _ = drawing.scores(drawing.pipeline(_transformer(out, cell, anchor_beta / lam)))
                arms = _arms(drawing, start, anchor, lam, reference, retrained)
                cases.append({"lam": lam, "guidance_scale": scale, "scheduler": scheduler, **arms})
                report(f"{cell.name}: guidance {scale:g}, {scheduler}", number + 1, len(plan.lams), f"λ = {lam:g}")
    records = {f"{beta:g}": read(AlignmentRecord, _trained(out, cell, beta) / RECORD, "record", ANEW) for beta in betas}
    curves = {beta: record.curve.model_dump() for beta, record in records.items()}
    return {
        "cell": asdict(cell),
        "anchor": anchor_beta,
        "plan": asdict(plan),
        "versions": versions(),
        "curves": curves,
        "path KL": {beta: record.path_kl for beta, record in records.items()},
        "cases": cases,
    }


def _arms(
    drawing: Drawing,
    start: SD3Transformer2DModel | None,
    anchor: SD3Transformer2DModel,
    lam: float,
    reference: Tensor,
    retrained: Tensor,
) -> dict[str, Any]:
    """Estimates are `[value, standard error]`, each less the retrained model's but for the shift."""
    groups = drawing.groups()
    scores, weights = drawing.scores(drawing.pipeline(start), anchor, lam)
    arms: dict[str, Any] = {
        "shift": list(contrast(retrained, None, reference, None, groups)),
        "algorithm 1": list(contrast(scores, None, retrained, None, groups)),
    }
    if drawing.scheduler == "flow-euler":
        blended, _ = drawing.scores(drawing.pipeline(start), anchor, lam, method="interpolate")
        return arms | {"interpolated": list(contrast(blended, None, retrained, None, groups))}
    assert weights is not None
    claim = verdict(weights, scores, groups, baseline=float(reference.mean()), name="digits")
    arms["weighted"] = list(contrast(scores, weights.log_weights, retrained, None, groups))
    if drawing.guidance_scale == 1:
        arms["particles"] = list(drawing.particles(drawing.pipeline(start), anchor, lam, retrained))
    return arms | {"verdict": claim.record()}


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn for a comparison: all that is compared begins with the same noise."""

    plan: FlowTruth
    scheduler: str = "flow-euler"
    guidance_scale: float = 1.0

    @property
    def prompts(self) -> list[str]:
        """The captions, of which weighted training has samples."""
        return digits_flow.WORLD.sample_prompts(self.plan.prompts, 0)[: self.plan.compared]

    def groups(self) -> Tensor:
        """The caption of every picture, as a number."""
        return torch.arange(self.plan.compared).repeat_interleave(self.plan.images)

    def pipeline(self, transformer: SD3Transformer2DModel | None) -> EqualTokensPipeline:
        """The flow digits, with another transformer if one is given."""
        pipe = digits_flow.load_pipeline()
        pipe.transformer = transformer or pipe.transformer
        pipe.scheduler = scheduler_like(pipe.scheduler, self.scheduler)
        return EqualTokensPipeline.around(pipe)

    def scores(
        self, pipe: EqualTokensPipeline, anchor: Any = None, lam: float = 0.0, **options: Any
    ) -> tuple[Float[Tensor, " image"], ImportanceWeights | None]:
        """The reward of every picture, and weights where an anchor is given and every step has noise."""
        reward, scores, runs = load_reward("digits"), [], list[ImportanceWeights]()
        if anchor is None:
            return torch.cat([reward(images, texts) for images, texts in self._batches(pipe)]), None
        anchor.set_attn_processor(pipe.transformer.attn_processors)
        weighted = self.scheduler == "flow-sde" and not options
        with realign(pipe, anchor, lam, **options) as dial:
            for images, texts in self._batches(pipe):
                scores.append(reward(images, texts))
                if weighted:
                    runs.append(dial.importance_weights)
        return torch.cat(scores), joined(runs) if weighted else None

    def _batches(self, pipe: EqualTokensPipeline) -> Any:
        per, each = self.plan.batch // self.plan.images, self.plan.images
        for start in range(0, self.plan.compared, per):
            some = self.prompts[start : start + per]
            images = pipe(some, num_images_per_prompt=each, **self._call(start)).images.float()
            yield images, [text for text in some for _ in range(each)]

    def _call(self, start: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed((self.plan.seed << 32) + start)
        return {
            "num_inference_steps": self.plan.steps,
            "guidance_scale": self.guidance_scale,
            "generator": generator,
            "output_type": "pt",
        }

    def particles(self, pipe: EqualTokensPipeline, anchor: Any, lam: float, retrained: Tensor) -> Estimate:
        """The mean reward of populations of particles less the retrained model's.

        The particles of a population depend on one another: its mean is one observation of its caption.
        """
        reward, means, count = load_reward("digits"), [], self.plan.particles
        anchor.set_attn_processor(pipe.transformer.attn_processors)
        per = self.plan.batch // (2 * count)
        with realign(pipe, anchor, lam):
            for start in range(0, self.plan.compared, per):
                texts = [text for text in self.prompts[start : start + per] for _ in range(2)]
                drawn = sample_particles(pipe, texts, count, **self._call(start))
                each = reward(drawn.images.float(), [text for text in texts for _ in range(count)])
                weights = torch.softmax(drawn.log_weights.double(), 1)
                means.append((weights * each.double().view(-1, count)).sum(1).view(-1, 2))
        own, theirs = torch.cat(means), retrained.double().view(self.plan.compared, -1)
        variance = sum(float((x.var(1) / x.shape[1]).sum()) for x in (own, theirs)) / self.plan.compared**2
        return Estimate(float(own.mean() - theirs.mean()), variance**0.5)
