"""Diffusion-DPO (Wallace et al. 2023) on latents of preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions, Policy
from deradiff.alignment.feeds import order, row_generators
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.loop import Curve, Part, Plan, Report, train
from deradiff.alignment.objectives import diffusion_dpo, squared_error


@dataclass(frozen=True)
class Noised:
    """Winners, then losers, with the same noise and timestep in both halves, and what a model should predict."""

    noisy: Float[Tensor, "two_pairs *latent"]
    timesteps: Int[Tensor, " two_pairs"]
    conditions: Conditions
    target: Float[Tensor, "two_pairs *latent"]


@runtime_checkable
class Pairs(Protocol):
    """Latents of preference pairs with their prompts' embeddings, by row: `latent_cache.LatentCache` is one."""

    @property
    def training(self) -> Sequence[int]:
        """The rows to train on."""
        ...

    @property
    def held_out(self) -> Sequence[int]:
        """The rows that never train; their loss tells how far the training is."""
        ...

    def take(self, rows: Sequence[int]) -> CachedBatch:
        """The given rows, winner first."""
        ...

    def empty_prompt(self) -> Conditions:
        """One row: what the denoiser is told of a prompt that is dropped."""
        ...


def errors(base: Base, denoiser: nn.Module, noised: Noised) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The errors of a model's predictions, of winners and of losers (see `objectives.squared_error`)."""
    prediction = base.predict(denoiser, noised.noisy, noised.timesteps, noised.conditions)
    winner, loser = squared_error(prediction.float(), noised.target.float()).view(2, -1)
    return winner, loser


def noise_pairs(
    base: Base, pairs: Pairs, rows: Sequence[int], dropout: float, generators: Sequence[torch.Generator]
) -> Noised:
    """Noise the pairs at `rows`, a generator for each: what one pair gets does not depend on the others.

    `dropout` is the probability that a prompt is dropped.
    """
    batch, empty, device = pairs.take(rows), pairs.empty_prompt(), base.denoiser.device
    clean = batch.latents.to(device, torch.float32)
    noise = torch.stack([torch.randn(clean.shape[2:], generator=g) for g in generators]).to(device)
    timesteps = torch.cat([torch.randint(base.timesteps, (1,), generator=g) for g in generators]).to(device)
    dropped = torch.cat([torch.rand(1, generator=g) for g in generators]) < dropout
    told = {
        name: torch.where(_like(dropped, prompts), empty[name], prompts).to(device)
        for name, prompts in batch.prompts.items()
    }
    if base.is_xl:
        told["time_ids"] = batch.time_ids.transpose(0, 1).flatten(0, 1).to(told["prompt_embeds"])
    both, noise, timesteps = clean.transpose(0, 1).flatten(0, 1), _twice(noise), _twice(timesteps)
    conditions = {name: prompts if name == "time_ids" else _twice(prompts) for name, prompts in told.items()}
    return Noised(base.noised(both, noise, timesteps), timesteps, conditions, base.target(both, noise, timesteps))


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])


def _like(flags: Tensor, rows: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (rows.ndim - 1))


def loss(base: Base, policy: Policy, model: nn.Module, noised: Noised, beta: float) -> Float[Tensor, ""]:
    """The loss of `model`, the policy's as Accelerate prepared it, against the policy's reference."""
    with policy.reference(model) as reference:
        winner_reference, loser_reference = errors(base, reference, noised)
    return diffusion_dpo(*errors(base, model, noised), winner_reference, loser_reference, beta)


# -- training ---------------------------------------------------------------------------------------------------------


def train_dpo(
    base: Base,
    policy: Policy,
    pairs: Pairs,
    beta: float,
    plan: Plan,
    *,
    batch: int,
    dropout: float,
    per_pass: int = 16,
    seed: int,
    checkpoint: Path,
    report: Report,
    accelerator: Accelerator | None = None,
    identity: str = "",
) -> Curve:
    """Align `policy` at `beta` on `pairs`, `batch` of them a step, over all processes and micro-batches.

    Held-out pairs keep all prompts and are evaluated `per_pass` at a time; in training a share `dropout` of the prompts
    is dropped. Raises `ValueError` for β ≤ 0, for
    fewer pairs than a batch, for a batch that its parts cannot share equally and where nothing is held out.
    """
    if not beta > 0:
        raise ValueError(f"β = {beta}: the strength of the regularisation must be positive")
    rows, held_out = pairs.training, pairs.held_out
    if not held_out:
        raise ValueError("no pairs are held out: nothing would tell whether the alignment still improves")
    if len(rows) < batch:
        raise ValueError(
            f"{len(rows)} pairs to train on do not fill one batch of {batch}: lower the batch, or bring more pairs"
        )

    def objective(model: nn.Module, _: torch.Generator, part: Part) -> Tensor:
        positions = part.positions(batch)
        mine = [rows[place] for place in order(len(rows), seed, positions)]
        return loss(base, policy, model, noise_pairs(base, pairs, mine, dropout, row_generators(seed, positions)), beta)

    chunks = [held_out[i : i + per_pass] for i in range(0, len(held_out), per_pass)]
    known: list[tuple[Tensor, Tensor]] = []

    def held_out_loss(model: nn.Module) -> float:
        total = 0.0
        for number, chunk in enumerate(chunks):
            first = number * per_pass
            generators = row_generators(seed, range(first, first + len(chunk)), "held out")
            noised = noise_pairs(base, pairs, chunk, 0.0, generators)
            if number == len(known):
                with policy.reference(model) as reference:
                    known.append(errors(base, reference, noised))
            total += len(chunk) * diffusion_dpo(*errors(base, model, noised), *known[number], beta).item()
        return total / len(held_out)

    return train(
        policy.model, objective, held_out_loss, plan, seed=seed, checkpoint=checkpoint, report=report,
        accelerator=accelerator, identity=identity,
    )  # fmt: skip
