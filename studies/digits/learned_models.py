"""The trainings behind the study of learned families: four ways to align, each at as many strengths as λ asks for.

Everything is a small LoRA on the shipped reference, trained on captions that leave both colours open, so that few
pictures say much about each. Within a cell all strengths share data, seed and initial weights: what differs between
two models of a cell is their strength, and what differs between the cells of two seeds is the noise of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from deradiff.algorithm.estimates import effective_sample_size
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.draft import train_draft
from deradiff.alignment.lora_targets import WIDER_TARGETS
from deradiff.alignment.policy_gradient import train_ddpo
from deradiff.alignment.rwr import ReferenceSamples, tilted_weights, train_rwr
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import LossCurve, TrainingPlan, TrainingRun
from deradiff.files.inventory import Inventory, inventory, require_whole
from deradiff.files.locks import discard
from deradiff.files.models import reading_model
from deradiff.files.reading import Record, read
from deradiff.files.tensors import joined, rows
from deradiff.files.writing import atomic_file, atomic_folder, write_json
from deradiff.sweep.jobs import Report
from deradiff.worlds.digits import captions, load_pipeline
from studies.digits.anchors import Pairs, align
from studies.digits.settings import Settings
from studies.digits.truth_models import REWARDS, Pool, TruthSettings, draw_pairs, draw_scored

CONTROL = "control"
"""In place of a strength: trained on the reference's samples with even weights, what weighted training starts from."""


@dataclass(frozen=True)
class Cell:
    """One family, one reward, one seed of training: what is run and committed at a time."""

    family: str
    reward: str
    seed: int

    @property
    def name(self) -> str:
        """As its files are called."""
        return f"{self.family}-{self.reward}-{self.seed}"


def _plan(steps: int, rate: float, average: float = 0.97) -> TrainingPlan:
    """A rate that ends at zero: the last weights are kept, and none is chosen by a noisy held-out loss."""
    return TrainingPlan(steps, rate, warmup=20, cosine=steps, average=average, evaluate_every=max(1, steps // 8))


WEIGHTED_PLAN, DRAFT_PLAN, DDPO_PLAN = _plan(250, 2e-3), _plan(120, 1e-3), _plan(100, 1e-3)
DPO_PLAN = _plan(160, 0.15)
"""Its rate is for β = 1 (see `anchors.align`)."""


@dataclass(frozen=True)
class Trainings:
    """Everything that decides what is trained."""

    per_prompt: int = 300
    """Samples of the reference for each of the ten captions."""
    sampling_steps: int = 20
    lora_rank: int = 8
    caption_dropout: float = 0.1
    reward_temperature: float = 0.5
    held_out_pairs: int = 300
    """Never trained on; λ is calibrated on them."""
    held_out_samples: int = 300
    batch: int = 64
    weighted: TrainingPlan = WEIGHTED_PLAN
    dpo: TrainingPlan = DPO_PLAN
    draft: TrainingPlan = DRAFT_PLAN
    ddpo: TrainingPlan = DDPO_PLAN
    ddpo_steps: int = 10
    """Steps of the sampler that policy gradients reinforce; DRaFT takes `sampling_steps`."""


STRENGTHS: dict[str, dict[str, tuple[float, float]]] = {
    "weighted": {"bold": (1.2, 2.4), "ink": (0.8, 1.6)},
    "dpo": {"bold": (100.0, 400.0), "ink": (100.0, 400.0)},
    "draft": {"bold": (2.0, 8.0), "ink": (2.0, 8.0)},
    "ddpo": {"bold": (0.6, 2.4), "ink": (0.6, 2.4)},
}
"""β (or λ_KL) of the strong and of the mild anchor, by family and reward.

Weighted ones are as strong as the pool bears: at half the stronger β, where λ = 2 leads, a sixth (bold) and a quarter
(ink) of the samples are effective. Of the others bold at β = 100 by Diffusion-DPO alone has been tried: three standard
deviations of the reward.
"""

REWARD_SCALES = {"bold": 120.0, "ink": 120.0}
"""What multiplies the reward in DRaFT, by reward: bold is 2.5 times the shipped reward, whose scale is 300."""

PROMPTS = tuple(captions.caption(captions.Parts(digit)) for digit in range(10))

# -- the pool ---------------------------------------------------------------------------------------------------------


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"pool-{number}.safetensors"


def draw_pool(folder: Path, trainings: Trainings, report: Report) -> None:
    """Samples of the shipped reference for `PROMPTS`, scored: a file for each."""
    settings = TruthSettings(sampling_steps=trainings.sampling_steps)
    for number, prompt in enumerate(PROMPTS):
        if not _chunk(folder, number).exists():
            generator = torch.Generator().manual_seed((settings.seed << 32) + number)
            texts = [prompt] * trainings.per_prompt
            latents, rewards = draw_scored(reference(), texts, settings, generator)
            with atomic_file(_chunk(folder, number)) as temporary:
                save_file({"latents": latents, **rewards}, temporary)
        report("reference samples", number + 1, len(PROMPTS), prompt)


def load_pool(folder: Path, trainings: Trainings) -> Pool:
    """All of it, in an order in which every stretch holds all captions alike."""
    what, cure = "chunk of the pool", "delete it, and it is drawn again"
    shapes = {"latents": (4, 8, 8)} | dict.fromkeys(REWARDS, ())
    parts = {
        _chunk(folder, number): rows(_chunk(folder, number), shapes, trainings.per_prompt, what, cure)
        for number in range(len(PROMPTS))
    }
    together = joined(parts, what, cure)
    order = torch.arange(len(PROMPTS) * trainings.per_prompt).view(len(PROMPTS), -1).T.flatten()
    texts = [prompt for _ in range(trainings.per_prompt) for prompt in PROMPTS]
    return Pool(together.pop("latents")[order], texts, {name: values[order] for name, values in together.items()})


def pairs_of(pool: Pool, cell: Cell, trainings: Trainings) -> Pairs:
    """The preference pairs of a cell; the last `held_out_pairs` are never trained on."""
    generator = torch.Generator().manual_seed(5000 + cell.seed)
    return draw_pairs(pool, pool.rewards[cell.reward].double(), trainings.reward_temperature, generator)


# -- one model --------------------------------------------------------------------------------------------------------


def reference() -> StableDiffusionPipeline:
    """The shipped reference, its weights laid out as convolutions on a CPU read them fastest."""
    pipe = load_pipeline()
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def folder_of(folder: Path, cell: Cell, strength: float | str) -> Path:
    """Where the model of that strength lies."""
    return folder / cell.name / (strength if isinstance(strength, str) else f"{strength:g}")


class _Trained(Record):
    curve: dict[str, Any]
    files: Inventory | None = None


def curve_of(folder: Path, cell: Cell, strength: float | str) -> dict[str, Any]:
    """The losses of a model that was trained, as plain data. Raises `ValueError` where it is not whole."""
    path, cure = folder_of(folder, cell, strength), "delete its folder, and it is trained again"
    trained = read(_Trained, path / "trained.json", "record of a trained model", cure)
    require_whole(path, trained.files, "model", cure)
    return trained.curve


def train(folder: Path, pool: Pool, cell: Cell, strength: float | str, trainings: Trainings, report: Report) -> None:
    """Train one model of a cell into its folder, unless it is there; an interrupted training goes on."""
    path = folder_of(folder, cell, strength)
    if path.exists():
        curve_of(folder, cell, strength)
        return
    base = Base(reference())
    policy = Policy(base, trainings.lora_rank, WIDER_TARGETS, 6000 + cell.seed)
    checkpoint = folder / cell.name / f"{path.name}-checkpoint"
    run = TrainingRun(7000 + cell.seed, checkpoint, partial(report, f"{cell.name} at {path.name}"))
    curve = TRAIN[cell.family](base, policy, pool, cell, strength, trainings, run)
    path.parent.mkdir(exist_ok=True, parents=True)
    with atomic_folder(path) as fresh:
        layers = {key: value.contiguous() for key, value in get_peft_model_state_dict(policy.model).items()}
        StableDiffusionPipeline.save_lora_weights(fresh, unet_lora_layers=layers)
        write_json(fresh / "trained.json", {"curve": asdict(curve), "files": inventory(fresh)})
    discard(checkpoint)


def merged(path: Path) -> UNet2DConditionModel:
    """A trained model, its LoRA added to the reference's weights: half the price of adapters in every evaluation."""
    pipe = load_pipeline()
    with reading_model(path):
        pipe.load_lora_weights(path)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return pipe.unet.to(memory_format=torch.channels_last)


def _weighted(
    base: Base, policy: Policy, pool: Pool, cell: Cell, strength: Any, trainings: Trainings, run: TrainingRun
) -> LossCurve:
    tilt = torch.zeros(len(pool.latents)) if strength == CONTROL else pool.rewards[cell.reward] / strength
    weights = tilted_weights(tilt.double(), pool.conditions())
    held_out, batch, dropout = trainings.held_out_samples, trainings.batch, trainings.caption_dropout
    samples = ReferenceSamples(pool.latents, pool.captions)
    return train_rwr(
        base, policy, samples, weights, trainings.weighted, held_out=held_out, batch=batch, dropout=dropout, run=run
    )


def effective_share(pool: Pool, reward: str, strength: float) -> float:
    """The share of the pool that is effective under the weights of a weighted training."""
    weights = tilted_weights(pool.rewards[reward].double() / strength, pool.conditions())
    return float(effective_sample_size(weights.log())) / len(weights)


def _dpo(
    base: Base, policy: Policy, pool: Pool, cell: Cell, strength: Any, trainings: Trainings, run: TrainingRun
) -> LossCurve:
    settings = Settings(
        seed=run.seed,
        batch=trainings.batch,
        caption_dropout=trainings.caption_dropout,
        held_out_pairs=trainings.held_out_pairs,
    )
    pairs = pairs_of(pool, cell, trainings)
    return align(base, policy, pairs, strength, trainings.dpo, settings, run.checkpoint, run.report)


def _task(
    base: Base, policy: Policy, cell: Cell, strength: float, trainings: Trainings, run: TrainingRun
) -> RewardTask:
    """Held out are the same captions in another wording: what is learned is no list of prompts."""
    others = tuple(captions.caption(captions.Parts(digit), 1) for digit in range(10))
    sampling = SamplerSettings("ddim", trainings.sampling_steps, 1.0)
    reward, plan = REWARDS[cell.reward], trainings.draft
    return RewardTask(base, policy, PROMPTS, others, reward, strength, plan, run, trainings.batch // 2, sampling)


def _draft(
    base: Base, policy: Policy, pool: Pool, cell: Cell, strength: Any, trainings: Trainings, run: TrainingRun
) -> LossCurve:
    return train_draft(
        replace(_task(base, policy, cell, strength, trainings, run), scale=REWARD_SCALES[cell.reward]), keep=1
    )


def _ddpo(
    base: Base, policy: Policy, pool: Pool, cell: Cell, strength: Any, trainings: Trainings, run: TrainingRun
) -> LossCurve:
    task = _task(base, policy, cell, strength, trainings, run)
    sampling = replace(task.sampling, steps=trainings.ddpo_steps)
    return train_ddpo(replace(task, plan=trainings.ddpo, sampling=sampling, batch=trainings.batch), per_prompt=8)


TRAIN: Mapping[str, Callable[..., LossCurve]] = {
    "dpo": _dpo,
    "weighted": _weighted,
    "draft": _draft,
    "ddpo": _ddpo,
}
"""How each family trains a LoRA at a strength. Cells are run in this order, the cheap ones first."""
