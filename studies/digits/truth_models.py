"""Ground truth for realignment on the digits: models trained at the very target that λ is meant to reach.

A realigned model claims to be the reference tilted by `exp(λ r/β)`. Here that model is trained, twice:

- *weighted*: the reference, fine-tuned on its own samples drawn with probability proportional to `exp(r/β)`. The plain
  denoising loss has one minimum, so that all it leaves to doubt is measured: the effective sample size of the weights,
  a held-out curve, and the mean rewards reached beside those of the weighted samples. The control is tilted by
  nothing: what training on samples does by itself.
- *dpo*: Diffusion-DPO from the reference at the target's β, as the papers' comparisons do.

Each stage writes its result under a folder once it is complete and is skipped when the result is there; training
checkpoints on the way. The same settings and machine give the same bits, interrupted or not. Every model is a UNet
folder that `deradiff.realign(pipe, folder)` takes, with `truth.json` in it: what it is a model of, and its curve.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from deradiff.algorithm.estimates import effective_sample_size, mean
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.objectives import bradley_terry
from deradiff.alignment.rwr import ReferenceSamples, tilted_weights, train_rwr, weighted_mean
from deradiff.alignment.training import LossCurve, TrainingPlan, TrainingRun
from deradiff.files.folders import begin_or_resume
from deradiff.files.inventory import Inventory, inventory, require_whole
from deradiff.files.locks import discard, taken
from deradiff.files.reading import Record, read
from deradiff.files.tensors import joined, metadata, opened, rows
from deradiff.files.writing import atomic_file, atomic_folder, write_json
from deradiff.rewards import Reward
from deradiff.sweep.jobs import Job, Report, run_jobs
from deradiff.worlds.digits import captions, load_pipeline
from deradiff.worlds.digits.rewards import BoldReward, DigitsReward, InkReward
from studies.digits import models
from studies.digits.anchors import Pairs, align, sample
from studies.digits.reference import decode
from studies.digits.settings import Settings

REWARDS: dict[str, Reward] = {reward.name: reward for reward in (BoldReward(), InkReward(), DigitsReward())}
"""Every reward that the pool is scored with, by name."""

Target = dict[str, float]
"""λ by reward, relative to the reward's anchor (λ = 1); the empty target is the control."""

# A tilt lowers the loss by 1e-4 or so, far less than what a step at any useful rate stirs up: the held-out loss first
# rises, and keeping its minimum would keep the reference. So the rate ends at zero, and the last average is kept.
WEIGHTED_PLAN = TrainingPlan(steps=1500, learning_rate=2e-4, warmup=50, cosine=1500, average=0.995, evaluate_every=100)
# As for the shipped anchors, but slow to call a curve flat: a target that stopped early would be no truth.
DPO_PLAN = TrainingPlan(
    steps=1500, learning_rate=0.0125, warmup=20, average=0.98, evaluate_every=25, patience=16, tolerance=0.02
)


@dataclass(frozen=True)
class TruthSettings:
    """Everything that decides what is trained. A reward's unit is the point (see `rewards.digits`)."""

    seed: int = 1000
    samples: int = 48_000
    samples_chunk: int = 1000
    sampling_batch: int = 250
    sampling_steps: int = 25
    betas: dict[str, float] = field(default_factory=lambda: {"bold": 1.2, "ink": 0.8})
    """β of each reward's weighted anchor, in points: the anchor is the reference tilted by `exp(r/β)`."""
    targets: tuple[Target, ...] = (
        {"bold": 1.0},
        {"ink": 1.0},
        {"bold": 0.5},
        {"bold": 2.0},
        {"ink": 0.5},
        {"ink": 0.25},
        {"bold": 0.5, "ink": 0.5},
        {"bold": 1.0, "ink": 0.5},
        {},
    )
    """What is trained, in this order. λ that sum to 1 leave the reference no weight; 1.5 goes beyond the anchors."""
    batch: int = 128
    caption_dropout: float = 0.1
    held_out_samples: int = 2000
    weighted: TrainingPlan = WEIGHTED_PLAN
    dpo_beta: float = 1000.0
    """β of either reward's DPO anchor, in Diffusion-DPO's convention (see `alignment.objectives`)."""
    reward_temperature: float = 0.5
    held_out_pairs: int = 1000
    dpo: TrainingPlan = DPO_PLAN
    measured_samples: int = 1000

    @property
    def chunks(self) -> int:
        """In how many files the pool is drawn."""
        return -(-self.samples // self.samples_chunk)

    def as_build(self) -> Settings:
        """What `align` reads, as the digits build's settings."""
        return Settings(
            seed=self.seed + 2,
            batch=self.batch,
            caption_dropout=self.caption_dropout,
            held_out_pairs=self.held_out_pairs,
        )


def train_truth(
    folder: Path, settings: TruthSettings, report: Report, workers: int = 2, only: Collection[str] = ()
) -> None:
    """Make `folder/pool-*.safetensors`, `folder/weighted/<target>` and `folder/dpo/<target>`, `workers` at a time.

    With `only`, of the models those named `family/target`: none depends on another. Raises `ValueError` if `folder`
    holds a truth with other settings, if a target names a reward without an anchor, or for a name that is not planned.
    """
    for reward in {name for target in settings.targets for name in target}:
        if reward not in settings.betas:
            raise ValueError(f"a target names the reward {reward!r}, which has no β: {', '.join(settings.betas)} have")
    begin_or_resume(folder, asdict(settings), "truth")
    with taken(folder, "a truth"):
        _train_truth(folder, settings, report, workers, only)


def _train_truth(folder: Path, settings: TruthSettings, report: Report, workers: int, only: Collection[str]) -> None:
    chunks: list[Job] = [partial(draw_pool, folder, settings, number) for number in range(settings.chunks)]
    run_jobs(chunks, workers, report)
    models: dict[str, Job] = {
        f"{family}/{target_name(target)}": partial(train, folder, settings, target)
        for family, train in (("weighted", train_weighted), ("dpo", train_dpo))
        for target in settings.targets
        if target or family == "weighted"
    }
    if unknown := set(only) - set(models):
        raise ValueError(f"no model is planned for {', '.join(sorted(unknown))}: choose among {', '.join(models)}")
    run_jobs([job for name, job in models.items() if not only or name in only], workers, report)


def target_name(target: Target) -> str:
    """The folder of a target: `bold-0.5+ink-0.5`, or `control` for the empty one."""
    return "+".join(f"{reward}-{lam:g}" for reward, lam in target.items()) or "control"


def _reference() -> StableDiffusionPipeline:
    """The shipped reference, its weights laid out as convolutions on a CPU read them fastest."""
    pipe = load_pipeline()
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


# --- the pool


@dataclass(frozen=True)
class Pool:
    """Samples of the reference, the caption each one answers, and what every reward says of it."""

    latents: Float[Tensor, "sample 4 8 8"]
    captions: list[str]
    rewards: dict[str, Float[Tensor, " sample"]]

    def conditions(self) -> Int[Tensor, " sample"]:
        """A number for what each caption says, whatever its wording: digit, ink or open, paper or open."""
        numbers: dict[captions.Parts, int] = {}
        return torch.tensor([numbers.setdefault(captions.parse(text), len(numbers)) for text in self.captions])

    def weighted_sum(self, factors: Mapping[str, float]) -> Float[Tensor, " sample"]:
        """The rewards times their factors, summed, in float64; zero where there are none."""
        terms = [factor * self.rewards[name].double() for name, factor in factors.items()]
        return torch.stack(terms).sum(0) if terms else torch.zeros(len(self.latents), dtype=torch.float64)


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"pool-{number:03d}.safetensors"


def draw_scored(
    pipe: StableDiffusionPipeline, prompts: list[str], settings: TruthSettings, generator: torch.Generator
) -> tuple[Float[Tensor, "sample 4 8 8"], dict[str, Float[Tensor, " sample"]]]:
    """Latents drawn at guidance 1 by DPM-Solver++ 2M (Lu et al. 2022), one per prompt, and what `REWARDS` say of them.

    Sets the pipeline's scheduler.
    """
    # Stable Diffusion's own spacing would start at t = 961 of 1,000, from noise that is less than it takes it for.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    noise = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    latents = sample(pipe, prompts, noise, settings.sampling_steps, batch=settings.sampling_batch)
    images = decode(pipe.vae, latents)
    return latents, {name: reward(images, prompts) for name, reward in REWARDS.items()}


def draw_pool(folder: Path, settings: TruthSettings, number: int, report: Report) -> None:
    """One chunk of the pool: samples of the shipped reference, scored."""
    path, start = _chunk(folder, number), number * settings.samples_chunk
    if not path.exists():
        prompts = captions.sample_prompts(settings.samples, settings.seed)[start : start + settings.samples_chunk]
        generator = torch.Generator().manual_seed((settings.seed + 1 << 32) + number)
        latents, rewards = draw_scored(_reference(), prompts, settings, generator)
        texts = {"captions": json.dumps(prompts)}
        with atomic_file(path) as temporary:
            save_file({"latents": latents, **rewards}, temporary, metadata=texts)
    report("reference samples", len(list(folder.glob("pool-*.safetensors"))), settings.chunks, f"chunk {number}")


def load_pool(folder: Path, settings: TruthSettings) -> Pool:
    """All chunks together."""
    what, cure = "chunk of the pool", "delete it, and it is drawn again"
    texts: list[str] = []
    parts = {}
    for path in (_chunk(folder, number) for number in range(settings.chunks)):
        with opened(path, what, cure) as chunk:
            told = metadata(chunk, "captions", list[str], path, what, cure)
        shapes = {"latents": (4, 8, 8)} | dict.fromkeys(REWARDS, ())
        parts[path] = rows(path, shapes, len(told), what, cure)
        texts += told
    together = joined(parts, what, cure)
    return Pool(together.pop("latents"), texts, together)


# --- weights


def describe_weights(pool: Pool, weights: Float[Tensor, " sample"]) -> dict[str, Any]:
    """What the weights make of the pool, as plain data: effective sample sizes, and the mean rewards to be reached.

    The condition named is the one with the smallest effective sample size.
    """
    conditions = pool.conditions()
    sizes = [float(effective_sample_size(weights[conditions == c].log())) for c in range(int(conditions.max()) + 1)]
    members = (conditions == sizes.index(min(sizes))).nonzero().flatten()
    return {
        "samples": len(weights),
        "effective_samples": float(effective_sample_size(weights.log())),
        "smallest_condition": {
            **captions.parse(pool.captions[int(members[0])])._asdict(),
            "samples": len(members),
            "effective_samples": min(sizes),
        },
        "mean_rewards": {
            name: {"reference": asdict(mean(values)), "tilted": asdict(weighted_mean(values, weights))}
            for name, values in pool.rewards.items()
        },
    }


# --- models trained on weighted samples


def tilts(settings: TruthSettings, target: Target) -> dict[str, float]:
    """λ/β of each reward in the target, in nats per point."""
    return {reward: lam / settings.betas[reward] for reward, lam in target.items()}


def train_weighted(folder: Path, settings: TruthSettings, target: Target, report: Report) -> None:
    """The reference's UNet on the denoising loss (Ho et al. 2020) over pool samples drawn by their tilted weights."""
    path = folder / "weighted" / target_name(target)
    if _is_trained(path):
        return
    pipe, pool = _reference(), load_pool(folder, settings)
    weights = tilted_weights(pool.weighted_sum(tilts(settings, target)), pool.conditions())
    base = Base(pipe)
    policy, checkpoint = Policy(base), folder / f"weighted-{path.name}-checkpoint"
    curve = train_rwr(
        base,
        policy,
        ReferenceSamples(pool.latents, pool.captions),
        weights,
        settings.weighted,
        held_out=settings.held_out_samples,
        batch=settings.batch,
        dropout=settings.caption_dropout,
        run=TrainingRun(
            seed=settings.seed + 4,
            checkpoint=checkpoint,
            report=partial(report, f"weighted {path.name}"),
        ),
    )
    record = {"family": "weighted", "λ": target, "tilts": tilts(settings, target), **describe_weights(pool, weights)}
    record["reached"] = reached(pipe, policy.model, pool, settings)
    _save(policy.model, record, curve, path)
    discard(checkpoint)


def train_dpo(folder: Path, settings: TruthSettings, target: Target, report: Report) -> None:
    """The reference's UNet by Diffusion-DPO on pairs from the pool, at β over the target's largest λ.

    Preferences are drawn over the rewards in proportion to λ: a single reward keeps its labels at any λ, and two
    together tilt as the sum of their anchors' tilts.
    """
    path = folder / "dpo" / target_name(target)
    if _is_trained(path):
        return
    pipe, pool = _reference(), load_pool(folder, settings)
    largest = max(target.values())
    preferred = pool.weighted_sum({reward: lam / largest for reward, lam in target.items()})
    generator = torch.Generator().manual_seed(settings.seed + 5)
    pairs = draw_pairs(pool, preferred, settings.reward_temperature, generator)
    base, beta = Base(pipe), settings.dpo_beta / largest
    policy = Policy(base)
    checkpoint, progress = folder / f"dpo-{path.name}-checkpoint", partial(report, f"DPO {path.name}")
    curve = align(base, policy, pairs, beta, settings.dpo, settings.as_build(), checkpoint, progress)
    record = {"family": "dpo", "λ": target, "β": beta, "pairs": len(pairs.tokens)}
    record["reached"] = reached(pipe, policy.model, pool, settings)
    _save(policy.model, record, curve, path)
    discard(checkpoint)


def draw_pairs(
    pool: Pool, preferred: Float[Tensor, " sample"], temperature: float, generator: torch.Generator
) -> Pairs:
    """Disjoint pairs of samples of the same condition, in random order, labelled by Bradley-Terry over `preferred`.

    A pair carries the caption of its first sample; one sample of a condition with an odd number of them stays alone.
    """
    order = torch.randperm(len(preferred), generator=generator)
    conditions = pool.conditions()[order]
    conditions, together = conditions.sort(stable=True)
    order, rank = order[together], torch.arange(len(order)) - torch.searchsorted(conditions, conditions)
    firsts = ((rank[:-1] % 2 == 0) & (conditions[:-1] == conditions[1:])).nonzero().flatten()
    firsts = firsts[torch.randperm(len(firsts), generator=generator)]
    index = torch.stack([order[firsts], order[firsts + 1]], 1)
    rewards = preferred[index].float()
    return Pairs(
        latents=pool.latents[index],
        tokens=models.token_ids([pool.captions[i] for i in index[:, 0].tolist()]),
        rewards=rewards,
        first_wins=bradley_terry(rewards[:, 0], rewards[:, 1], temperature, generator),
    )


def reached(
    pipe: StableDiffusionPipeline, model: UNet2DConditionModel, pool: Pool, settings: TruthSettings
) -> dict[str, Any]:
    """The mean rewards of `model`'s own samples for the pool's first captions, drawn as the pool was, as plain data.

    Beside them the pool's own for the same captions. Leaves `model` in the pipeline.
    """
    pipe.unet = model
    prompts = pool.captions[: settings.measured_samples]
    _, rewards = draw_scored(pipe, prompts, settings, torch.Generator().manual_seed(settings.seed + 6))
    return {
        name: {"reference": asdict(mean(pool.rewards[name][: len(prompts)])), "model": asdict(mean(values))}
        for name, values in rewards.items()
    }


def _is_trained(path: Path) -> bool:
    """Whether the model is there. Raises `ValueError` where it is, and is not whole."""
    if not path.exists():
        return False
    cure = "delete that folder, and it is trained again"
    files = read(_Trained, path / "truth.json", "record of a trained model", cure).files
    require_whole(path, files, "model", cure)
    return True


class _Trained(Record):
    files: Inventory | None = None


def _save(model: UNet2DConditionModel, record: Mapping[str, Any], curve: LossCurve, path: Path) -> None:
    model.to(memory_format=torch.contiguous_format)

    path.parent.mkdir(exist_ok=True)
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        write_json(folder / "truth.json", {**record, "curve": asdict(curve), "files": inventory(folder)})
