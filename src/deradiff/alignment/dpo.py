"""Diffusion-DPO (Wallace et al. 2023) and MaPO (Hong et al. 2024) on latents of preference pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions, Policy, with_dropped
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.loop import train
from deradiff.alignment.objectives import diffusion_dpo, margin_aware, squared_error
from deradiff.alignment.training import BatchPart, LossCurve, Stateful, TrainingPlan, TrainingRun


@dataclass(frozen=True)
class Noised:
    """Winners, then losers, with the same noise and timestep in both halves, and what a model should predict."""

    noisy: Float[Tensor, "two_pairs *latent"]
    timesteps: Shaped[Tensor, " two_pairs"]
    conditions: Conditions
    target: Float[Tensor, "two_pairs *latent"]


@runtime_checkable
class Pairs(Stateful, Protocol):
    """Latents of preference pairs with their prompts' embeddings, in an order (see `training_pairs`)."""

    training: int | None
    """How many train in an epoch, if that is known beforehand."""
    held_out: int
    """How many never train; their loss tells how far the training is."""

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        """This part of the step's `size` pairs, winners first."""
        ...

    def held_out_batch(self, places: range) -> CachedBatch:
        """Some of the held-out pairs."""
        ...

    def empty_prompt(self) -> Conditions:
        """One row: what the denoiser is told of a prompt that is dropped."""
        ...


def errors(base: Base, denoiser: nn.Module, noised: Noised) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The errors of a model's predictions, of winners and of losers (see `objectives.squared_error`)."""
    prediction = base.call.predict(denoiser, noised.noisy, noised.timesteps, noised.conditions)
    winner, loser = squared_error(prediction.float(), noised.target.float()).view(2, -1)
    return winner, loser


def noise_pairs(
    base: Base, batch: CachedBatch, empty: Conditions, dropout: float, generators: Sequence[torch.Generator]
) -> Noised:
    """Noise a batch of pairs, a generator for each: what one pair gets does not depend on the others.

    `dropout` is the probability that a prompt is dropped, `empty` what the denoiser is told instead.
    """
    device = base.denoiser.device
    clean = batch.latents.to(device, torch.float32)
    noise, timesteps, dropped = base.noise_of(generators, clean.shape[2:], dropout)
    single = {name: rows.to(device) for name, rows in with_dropped(batch.prompts, dropped, empty).items()}
    both = clean.transpose(0, 1).flatten(0, 1)
    noise, timesteps = _twice(noise.to(device)), _twice(timesteps.to(device))
    sizes = batch.time_ids.transpose(0, 1).flatten(0, 1)
    conditions = base.call.with_sizes({name: _twice(prompts) for name, prompts in single.items()}, sizes)
    return Noised(
        base.noising.noised(both, noise, timesteps), timesteps, conditions, base.noising.target(both, noise, timesteps)
    )


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])


def loss(base: Base, policy: Policy, model: nn.Module, noised: Noised, beta: float) -> Float[Tensor, ""]:
    """The loss of `model`, the policy's as Accelerate prepared it, against the policy's reference."""
    return diffusion_dpo(*errors(base, model, noised), *reference_errors(base, policy, model, noised), beta)


def reference_errors(
    base: Base, policy: Policy, model: nn.Module, noised: Noised
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The `errors` of the policy's reference."""
    with policy.reference(model) as reference:
        return errors(base, reference, noised)


# -- training ---------------------------------------------------------------------------------------------------------


def train_dpo(
    base: Base, policy: Policy, pairs: Pairs, beta: float, plan: TrainingPlan, *, run: TrainingRun, **more: Any
) -> LossCurve:
    """Align `policy` at `beta` by Diffusion-DPO; `more` goes to `train_pairs`. Raises `ValueError` for β ≤ 0."""
    if not beta > 0:
        raise ValueError(f"β = {beta}: the strength of the regularisation must be positive")
    return train_pairs(base, policy, pairs, partial(diffusion_dpo, beta=beta), plan, run=run, **more)


def train_mapo(
    base: Base, policy: Policy, pairs: Pairs, beta: float | int, plan: TrainingPlan, *, run: TrainingRun, **more: Any
) -> LossCurve:
    """Align `policy` by MaPO, whose `beta` weighs the margin (see `objectives.margin_aware`), without a reference.

    `more` goes to `train_pairs`. Raises `ValueError` for β < 0.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"β = {beta}: the weight of the margin must be 0 or more")
    objective = partial(margin_aware, beta=beta, timesteps=base.noising.timesteps)
    return train_pairs(base, policy, pairs, objective, plan, referenced=False, run=run, **more)


def train_pairs(
    base: Base,
    policy: Policy,
    pairs: Pairs,
    objective: Callable[..., Float[Tensor, ""]],
    plan: TrainingPlan,
    *,
    batch: int,
    dropout: float,
    per_pass: int = 16,
    referenced: bool = True,
    run: TrainingRun,
) -> LossCurve:
    """Minimise `objective` of the policy's `errors` and, if `referenced`, its reference's, over `batch` pairs a step.

    A batch is that of all processes and micro-batches. Held-out pairs keep all prompts and are evaluated `per_pass` at
    a time; in training a share `dropout` of the prompts is dropped. Raises `ValueError` for fewer pairs than a batch,
    for a batch that its parts cannot share equally and where nothing is held out.
    """
    if not pairs.held_out:
        raise ValueError("no pairs are held out: nothing would tell whether the alignment still improves")
    if pairs.training is not None and pairs.training < batch:
        raise ValueError(
            f"{pairs.training} pairs to train on do not fill one batch of {batch}: lower the batch, or bring more pairs"
        )
    empty = pairs.empty_prompt()

    def compared_to(model: nn.Module, noised: Noised) -> tuple[Tensor, ...]:
        return reference_errors(base, policy, model, noised) if referenced else ()

    def training_loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        generators = row_generators(run.seed, part.positions(batch))
        noised = noise_pairs(base, pairs.batch(part, batch), empty, dropout, generators)
        return objective(*errors(base, model, noised), *compared_to(model, noised))

    known: list[tuple[Tensor, ...]] = []

    def held_out_loss(model: nn.Module) -> float:
        total = 0.0
        for number, chunk in enumerate(passes(pairs.held_out, per_pass)):
            generators = row_generators(run.seed, chunk, "held out")
            noised = noise_pairs(base, pairs.held_out_batch(chunk), empty, 0.0, generators)
            if number == len(known):
                known.append(compared_to(model, noised))
            total += len(chunk) * objective(*errors(base, model, noised), *known[number]).item()
        return total / pairs.held_out

    return train(policy.model, training_loss, held_out_loss, plan, run=run, data=pairs)
