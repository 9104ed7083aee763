"""The aligned half of the digits build: preference pairs, six anchors with all their weights, and a LoRA."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from deradiff.alignment import dpo
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.dpo import Noised, errors
from deradiff.alignment.loop import train
from deradiff.alignment.lora_targets import WIDER_TARGETS
from deradiff.alignment.objectives import bradley_terry, diffusion_dpo
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.alignment.training import Report as Progress
from deradiff.files.inventory import require_whole
from deradiff.files.locks import discard
from deradiff.files.tensors import joined, rows
from deradiff.files.writing import atomic_file, atomic_folder, write_json
from deradiff.sweep.jobs import Report
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits import models
from studies.digits.reference import decode
from studies.digits.settings import Settings


@dataclass(frozen=True)
class Pairs:
    """Two latents per prompt, their rewards, and whether the first won."""

    latents: Float[Tensor, "pair 2 4 8 8"]
    tokens: Int[Tensor, "pair token"]
    rewards: Float[Tensor, "pair 2"]
    first_wins: Bool[Tensor, " pair"]

    def ordered(self) -> Float[Tensor, "pair 2 4 8 8"]:
        """The latents with the winner first."""
        return torch.where(self.first_wins[:, None, None, None, None], self.latents, self.latents.flip(1))


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:03d}.safetensors"


def draw_pairs(folder: Path, settings: Settings, number: int, report: Report) -> None:
    """One chunk of pairs: the reference's own samples (guidance 1), labelled by Bradley-Terry over the reward."""
    path, start = _chunk(folder, number), number * settings.pairs_chunk
    if not path.exists():
        pipe = _reference(folder)
        prompts = captions.sample_prompts(settings.pairs, settings.seed + 5)[start : start + settings.pairs_chunk]
        texts = [prompt for prompt in prompts for _ in range(2)]
        generator = torch.Generator().manual_seed((settings.seed + 6 << 32) + number)
        noise = torch.randn(len(texts), 4, 8, 8, generator=generator)
        latents = sample(pipe, texts, noise, settings.sampling_steps)
        rewards = DigitsReward()(decode(pipe.vae, latents), texts).view(-1, 2)
        wins = bradley_terry(rewards[:, 0], rewards[:, 1], settings.reward_temperature, generator)
        chunk = {"latents": latents.view(-1, 2, 4, 8, 8), "rewards": rewards, "first_wins": wins}
        with atomic_file(path) as temporary:
            save_file(chunk, temporary)
    report("preference pairs", len(list(folder.glob("pairs-*.safetensors"))), settings.chunks, f"chunk {number}")


def load_pairs(folder: Path, settings: Settings) -> Pairs:
    """All chunks together."""
    what, cure = "chunk of pairs", "delete it, and it is drawn again"
    shapes, left = {"latents": (2, 4, 8, 8), "rewards": (2,), "first_wins": ()}, settings.pairs
    parts = {}
    for number in range(settings.chunks):
        path, count = _chunk(folder, number), min(settings.pairs_chunk, left - number * settings.pairs_chunk)
        parts[path] = rows(path, shapes, count, what, cure)
    together = joined(parts, what, cure)
    prompts = captions.sample_prompts(settings.pairs, settings.seed + 5)
    return Pairs(tokens=models.token_ids(prompts), **together)


def _reference(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder / "reference", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    noise: Float[Tensor, "batch 4 8 8"],
    steps: int,
    guidance_scale: float = 1.0,
    batch: int = 250,
) -> Float[Tensor, "batch 4 8 8"]:
    """Latents drawn by `pipe`, one per prompt, from the given noise."""
    return torch.cat(
        [
            pipe(
                prompts[i : i + batch],
                latents=noise[i : i + batch],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
            for i in range(0, len(prompts), batch)
        ]
    )


def align(
    base: Base,
    policy: Policy,
    pairs: Pairs,
    beta: float,
    plan: TrainingPlan,
    settings: Settings,
    checkpoint: Path,
    report: Progress,
) -> LossCurve:
    """Diffusion-DPO of `policy` against the base's UNet; keeps the best held-out weights."""
    latents, tokens = pairs.ordered(), pairs.tokens
    with torch.no_grad():
        embedded = torch.cat([base.pipe.text_encoder(t).last_hidden_state for t in tokens.split(256)])
        empty = base.pipe.text_encoder(models.token_ids([""])).last_hidden_state
    trained_on = len(latents) - settings.held_out_pairs

    def noised(index: Tensor, generator: torch.Generator) -> Noised:
        clean = latents[index].transpose(0, 1).flatten(0, 1)
        noise = torch.randn(len(index), 4, 8, 8, generator=generator).repeat(2, 1, 1, 1)
        timesteps = torch.randint(1000, (len(index),), generator=generator).repeat(2)
        dropped = torch.rand(len(index), generator=generator) < settings.caption_dropout
        text = torch.where(dropped[:, None, None], empty, embedded[index]).repeat(2, 1, 1)
        return Noised(base.noising.noised(clean, noise, timesteps), timesteps, {"prompt_embeds": text}, noise)

    def objective(model: nn.Module, generator: torch.Generator, _: BatchPart) -> Tensor:
        index = torch.randint(trained_on, (settings.batch // 2,), generator=generator)
        return dpo.loss(base, policy, model, noised(index, generator), beta)

    fixed = torch.Generator().manual_seed(settings.seed + 7)
    held_out = torch.arange(trained_on, len(latents)).split(settings.batch // 2)
    batches = [noised(index, fixed) for index in held_out]
    with policy.reference(policy.model) as reference:
        known = [errors(base, reference, batch) for batch in batches]

    def held_out_loss(model: nn.Module) -> float:
        losses = [
            diffusion_dpo(*errors(base, model, batch), *reference, beta) * batch.timesteps.numel()
            for batch, reference in zip(batches, known, strict=True)
        ]
        return (torch.stack(losses).sum() / sum(batch.timesteps.numel() for batch in batches)).item()

    plan = replace(plan, learning_rate=plan.learning_rate / beta)
    return train(policy.model, objective, held_out_loss, plan, run=TrainingRun(settings.seed + 3, checkpoint, report))


def train_anchor(folder: Path, settings: Settings, beta: float, report: Report) -> None:
    """All weights of the UNet, aligned at `beta`."""
    name = f"beta-{beta:g}"
    path = folder / "anchors" / name
    if path.exists():
        require_whole(path, None, "model", "delete that folder, and it is trained again")
        return
    path.parent.mkdir(exist_ok=True)
    base, pairs = Base(_reference(folder)), load_pairs(folder, settings)
    policy, checkpoint, progress = Policy(base), folder / f"{name}-checkpoint", partial(report, f"anchor β = {beta:g}")
    curve = align(base, policy, pairs, beta, settings.dpo, settings, checkpoint, progress)
    write_json(folder / f"{name}-curve.json", asdict(curve))
    with atomic_folder(path) as fresh:
        policy.model.save_pretrained(fresh)
    discard(checkpoint)


def train_lora(folder: Path, settings: Settings, report: Report) -> None:
    """A LoRA on the attention, feed-forward and convolution weights of the UNet, aligned at `lora_beta`."""
    from peft.utils import get_peft_model_state_dict

    beta = settings.lora_beta
    path = folder / f"lora-beta-{beta:g}"
    if path.exists():
        require_whole(path, None, "model", "delete that folder, and it is trained again")
        return
    base, pairs = Base(_reference(folder)), load_pairs(folder, settings)
    policy = Policy(base, settings.lora_rank, WIDER_TARGETS, settings.seed + 2)
    checkpoint, progress = folder / "lora-checkpoint", partial(report, f"LoRA β = {beta:g}")
    curve = align(base, policy, pairs, beta, settings.lora, settings, checkpoint, progress)
    write_json(folder / f"lora-beta-{beta:g}-curve.json", asdict(curve))
    layers = get_peft_model_state_dict(policy.model)
    with atomic_folder(path) as fresh:
        StableDiffusionPipeline.save_lora_weights(fresh, unet_lora_layers=layers)
    discard(checkpoint)
