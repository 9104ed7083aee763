"""Realignment on the digits against models trained at the very target: what a learned model makes of the theory.

`truth_models` trains, for two rewards, an anchor and the models that λ is meant to reach, twice: on reference
samples weighted by `exp(r/β)`, and by Diffusion-DPO. Here every way of sampling is drawn for the same prompts, all of
which leave the ink's colour open, and set beside the retrained model through the same sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.estimates import mean
from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import verdict
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.models import reading_model
from deradiff.files.writing import write_json
from deradiff.rewards import Reward
from deradiff.sampling.particles import Particles, sample_particles
from deradiff.sampling.realignment import realign
from deradiff.sweep.jobs import Job, Report, run_jobs
from deradiff.worlds.digits import captions, load_pipeline
from deradiff.worlds.digits.classifier import read
from deradiff.worlds.digits.data import INKS, PAPERS
from deradiff.worlds.digits.rewards import BoldReward, InkReward
from studies.digits import truth_files

REWARDS: dict[str, Reward] = {reward.name: reward for reward in (BoldReward(), InkReward())}

FAMILIES = ("weighted", "dpo")

SHIPPED = "reference"
"""Stands for the reference that ships, which no training made."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Amounts:
    """How much is drawn: `images` of every prompt in so many `steps`, a `batch` of them at a time."""

    images: int = 16
    steps: int = 25
    batch: int = 320
    seed: int = 7


@dataclass(frozen=True)
class Plan(Amounts):
    """What is drawn. Plain and weighted means come from `prompts` x `images`, particles from `prompts` x K."""

    prompts: int = 200
    counts: tuple[int, ...] = (4, 16, 64)
    """K at guidance 1, where the particles' target is the retrained model's."""
    guided_counts: tuple[int, ...] = (4, 16)
    """K at any other guidance."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5)


@dataclass(frozen=True)
class Case:
    """One target: a family of trained models, λ by reward relative to its anchor, and the guidance."""

    family: str
    target: dict[str, float]
    guidance_scale: float

    @property
    def name(self) -> str:
        """The case in a file name."""
        return f"{self.family}_{folder_of(self.target)}_guidance{self.guidance_scale:g}"

    @property
    def reference(self) -> str:
        """What the family starts from: the shipped reference, or the control that weighted training makes of it.

        Training on samples changes a model by itself (in `digits_truth`, boldness falls by a fifth of its standard
        deviation), and would be taken for a part of what a tilt does.
        """
        return "weighted/control" if self.family == "weighted" else SHIPPED

    def models(self) -> dict[str, str]:
        """The arms that are models as they are, and each one's folder among the trained ones."""
        anchors = {f"anchor {reward}": f"{self.family}/{reward}-1" for reward in self.target}
        return {"reference": self.reference, "retrained": f"{self.family}/{folder_of(self.target)}", **anchors}


def folder_of(target: Mapping[str, float]) -> str:
    """The folder of a target's model, as `truth_models` names it."""
    return "+".join(f"{reward}-{lam:g}" for reward, lam in target.items())


def target_of(folder: str) -> dict[str, float]:
    """The inverse of `folder_of`. Raises `ValueError` for a name with another form."""
    parts = (part.rpartition("-") for part in folder.split("+"))
    return {reward: float(lam) for reward, _, lam in parts}


def cases(trained: Path, plan: Plan) -> list[Case]:
    """Every target that has a model under `trained` and whose anchors have one too: simple ones first.

    The anchors themselves are left out.
    """
    found = []
    for family in FAMILIES:
        for folder in sorted((trained / family).glob("*-*")) if (trained / family).is_dir() else []:
            target = target_of(folder.name)
            anchored = all((trained / family / f"{reward}-1").is_dir() for reward in target)
            anchored &= family == "dpo" or (trained / "weighted" / "control").is_dir()
            if anchored and target != dict.fromkeys(list(target)[:1], 1.0):
                found += [Case(family, target, scale) for scale in plan.guidance_scales]
    return sorted(found, key=lambda case: (case.guidance_scale, len(case.target), max(case.target.values())))


def prompts(plan: Plan) -> list[str]:
    """Prompts that leave the ink open, digits and papers in equal numbers, one paper in six open as well."""
    papers = [*PAPERS, None]
    return [
        captions.caption(captions.Parts(i % 10, None, papers[i // 10 % len(papers)]), i % 3)
        for i in range(plan.prompts)
    ]


def needed(names: Iterable[str]) -> set[str]:
    """The trained models that the targets `family/target` are compared with and sampled from, by their folders.

    Raises `ValueError` for a name that is no target's.
    """
    found = set[str]()
    for name in names:
        family, _, folder = name.partition("/")
        try:
            target = target_of(folder)
        except ValueError:
            target = {}
        if family not in FAMILIES or not target or not set(target) <= set(REWARDS):
            raise ValueError(f"{name} names no target: write a family and λ of its rewards, such as dpo/ink-0.5")
        found |= {*Case(family, target, 1.0).models().values()}
    return found - {SHIPPED}


def require_compared(plan: Plan, guidance_scale: float | int | None) -> None:
    """Raise `ValueError` where `plan` compares nothing at `guidance_scale`; None stands for all of them."""
    if guidance_scale is not None and guidance_scale not in plan.guidance_scales:
        scales = " and ".join(f"{scale:g}" for scale in plan.guidance_scales)
        raise ValueError(f"nothing is compared at guidance {guidance_scale:g}, only at {scales}")


def run(
    trained: Path,
    out: Path,
    plan: Plan,
    report: Report,
    workers: int = 2,
    only: Collection[str] = (),
    guidance_scale: float | int | None = None,
) -> list[Record]:
    """Compute every case that `out` does not hold yet, `workers` at a time, and return all.

    With `only`, those of the targets named `family/target`; with `guidance_scale`, those at that one of the plan's.
    Raises `ValueError` where no such target has been trained, for another guidance scale, and where `out` holds a study
    of another plan.
    """
    require_compared(plan, guidance_scale)
    todo = [
        case
        for case in cases(trained, plan)
        if (not only or f"{case.family}/{folder_of(case.target)}" in only)
        and guidance_scale in (None, case.guidance_scale)
    ]
    if not todo:
        raise ValueError(f"{trained} holds no trained targets with their anchors that were asked for")
    begin_or_resume(out, asdict(plan), "study")
    with taken(out, "a study"):
        _measure(trained, out, plan, todo, report, workers)
    return [_compared(out, case) for case in todo]


def _measure(trained: Path, out: Path, plan: Plan, todo: list[Case], report: Report, workers: int) -> None:
    """Draw and measure what is not there yet."""
    models = {(name, case.guidance_scale) for case in todo for name in case.models().values()}
    for scale in plan.guidance_scales:
        draws: list[Job] = [
            partial(_plain, trained, out, name, scale, plan, len(models))
            for name, its in sorted(models)
            if its == scale
        ]
        run_jobs(draws, workers, report)
        comparisons: list[Job] = [
            partial(_case, trained, out, case, plan, len(todo)) for case in todo if case.guidance_scale == scale
        ]
        run_jobs(comparisons, workers, report)


# -- models as they are -----------------------------------------------------------------------------------------------


def _plain(
    trained: Path, out: Path, name: str, guidance_scale: float, plan: Plan, planned: int, report: Report
) -> None:
    """Measure one model, the reference or a trained one, as it is: several cases share it."""
    file = _drawn(out, name, guidance_scale)
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        pipe = _pipeline(trained, name)
        images = draw(pipe, prompts(plan), guidance_scale, plan)
        write_json(file, _measured(images, torch.zeros(plan.prompts, plan.images)))
    report("models as they are", len(list(file.parent.glob("*.json"))), planned, name)


def _drawn(out: Path, name: str, guidance_scale: float) -> Path:
    return out / "models" / f"{name.replace('/', '_')}_guidance{guidance_scale:g}.json"


# -- one case ---------------------------------------------------------------------------------------------------------


def _case(trained: Path, out: Path, case: Case, plan: Plan, planned: int, report: Report) -> None:
    file = out / f"{case.name}.json"
    if not file.exists():
        known = {
            arm: truth_files.model(_drawn(out, name, case.guidance_scale), set(REWARDS), plan.prompts)
            for arm, name in case.models().items()
        }
        write_json(file, compute(trained, case, plan, known))
    report("comparing", len(list(out.glob("*_guidance*.json"))), planned, case.name)


def _compared(out: Path, case: Case) -> Record:
    arms = {*case.models(), "algorithm 1", "weighted"}
    return truth_files.case(out / f"{case.name}.json", arms, set(case.target))


def compute(trained: Path, case: Case, plan: Plan, known: Record) -> Record:
    """Every way of sampling one target, with what the verdict had said of Algorithm 1.

    `known` holds the arms that are models as they are: the reference, the retrained model and the anchors.
    """
    texts = prompts(plan)
    own = trained / case.family
    anchors = {reward: _unet(own / f"{reward}-1") for reward in case.target}
    groups = torch.arange(plan.prompts).repeat_interleave(plan.images)
    shape = plan.prompts, plan.images
    arms, pipe, scale = dict(known), _pipeline(trained, case.reference), case.guidance_scale

    def of(images: Tensor) -> Record:
        return _measured(images, torch.zeros(shape))

    with realign(pipe, anchors, case.target) as dial:
        runs: list[ImportanceWeights] = []
        images = draw(pipe, texts, scale, plan, lambda: runs.append(dial.importance_weights))
        whole = joined(runs)
        arms["algorithm 1"], arms["weighted"] = of(images), _measured(images, whole.log_weights.view(shape))
        for count in plan.counts if scale == 1 else plan.guided_counts:
            arms[f"particles {count}"] = _particles(pipe, texts, scale, plan, count)
    with realign(pipe, anchors, case.target, method="interpolate"):
        arms["interpolated"] = of(draw(pipe, texts, scale, plan))
    verdicts = {}
    for name, reward in REWARDS.items():
        found = verdict(
            whole, reward(images, [""] * len(images)), groups, baseline=arms["reference"][name]["value"], name=name
        )
        verdicts[name] = found.record()
    return {"case": asdict(case), "arms": arms, "verdicts": verdicts, "errors": _errors(arms)}


def _errors(arms: Mapping[str, Record]) -> Record:
    """Every arm's difference from the retrained model, by reward, and the shift that it is a part of.

    Prompts are the sample: the difference is taken prompt by prompt, and its standard error is that of their mean. It
    holds the noise of both arms and what prompts differ in, and no assumption about the particles of one prompt.
    """
    found: Record = {}
    for name in REWARDS:
        means = {arm: torch.tensor(measured["by_prompt"][name]) for arm, measured in arms.items()}
        gaps = {arm: asdict(mean(values - means["retrained"])) for arm, values in means.items() if arm != "retrained"}
        found[name] = {"shift": asdict(mean(means["retrained"] - means["reference"])), "gaps": gaps}
    return found


def _pipeline(trained: Path, name: str) -> StableDiffusionPipeline:
    """The shipped reference, or a trained model."""
    return sampler(None if name == SHIPPED else _unet(trained / name))


def sampler(unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """The digits, with another denoiser if one is given, sampled with noise from the very end of the schedule."""
    pipe = load_pipeline()
    pipe.unet = pipe.unet if unet is None else unet
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace", clip_sample=False)
    return pipe


def _unet(folder: Path) -> UNet2DConditionModel:
    """A trained model, its weights laid out as convolutions on a CPU read them fastest."""
    with reading_model(folder):
        return UNet2DConditionModel.from_pretrained(folder).to(memory_format=torch.channels_last)


def _batches(texts: Sequence[str], each: int, plan: Amounts) -> Iterator[tuple[int, list[str]]]:
    size = max(1, plan.batch // each)
    yield from ((start, list(texts[start : start + size])) for start in range(0, len(texts), size))


def _call(guidance_scale: float, plan: Amounts, start: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed((plan.seed << 32) + start)
    return {
        "num_inference_steps": plan.steps,
        "guidance_scale": guidance_scale,
        "generator": generator,
        "output_type": "pt",
    }


def draw(
    pipe: StableDiffusionPipeline,
    texts: Sequence[str],
    guidance_scale: float,
    plan: Amounts,
    after: Callable[[], None] = lambda: None,
) -> Float[Tensor, "image 3 32 32"]:
    """Pictures in [0, 1], `plan.images` of every prompt; `after` is called after every batch."""
    drawn = []
    for start, some in _batches(texts, plan.images, plan):
        drawn.append(pipe(some, num_images_per_prompt=plan.images, **_call(guidance_scale, plan, start)).images.float())
        after()
    return torch.cat(drawn)


def _particles(
    pipe: StableDiffusionPipeline, texts: list[str], guidance_scale: float, plan: Plan, count: int
) -> Record:
    swarms: list[Particles] = []
    for start, some in _batches(texts, count, plan):
        swarms.append(sample_particles(pipe, some, count, **_call(guidance_scale, plan, start)))
    images = torch.cat([swarm.images.float() for swarm in swarms])
    log_weights = torch.cat([swarm.log_weights for swarm in swarms])
    effective = torch.cat([swarm.effective for swarm in swarms])
    collapsed = torch.cat([swarm.collapsed for swarm in swarms])
    return _measured(images, log_weights) | {"effective": float(effective.mean()), "collapsed": int(collapsed.sum())}


def _measured(images: Float[Tensor, "image 3 32 32"], log_weights: Float[Tensor, "prompt sample"]) -> Record:
    """Weighted mean rewards of every prompt, and the shares of the ink colours."""
    weights = torch.softmax(log_weights.double(), 1)

    def by_prompt(values: Tensor) -> Float[Tensor, " prompt"]:
        return (weights * values.double().view(weights.shape)).sum(1)

    scores = {name: by_prompt(reward(images, [""] * len(images))) for name, reward in REWARDS.items()}
    inks = read(images).inks
    return {
        **{name: asdict(mean(values)) for name, values in scores.items()},
        "inks": {name: asdict(mean(by_prompt(inks == i))) for i, name in enumerate(INKS)},
        "by_prompt": {name: [round(value, 6) for value in values.tolist()] for name, values in scores.items()},
    }
