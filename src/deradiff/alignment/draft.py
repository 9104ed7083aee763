"""DRaFT-K: the reward's own gradient through the last K steps of sampling (Clark et al. 2023), with a KL term."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions, Policy
from deradiff.alignment.data_order import order, row_generators
from deradiff.alignment.loop import train
from deradiff.alignment.objectives import regularised_reward
from deradiff.alignment.sampling import (
    DifferentiatedStep,
    SamplerSettings,
    at_least_single,
    conditions,
    decode,
    sample,
    unconditional,
)
from deradiff.alignment.scoring import scored
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.rewards import Reward


def divergence(
    base: Base, policy: Policy, model: nn.Module, steps: Sequence[DifferentiatedStep], prompted: Conditions
) -> Float[Tensor, " batch"]:
    """The sum over `steps` of `||ε_θ - ε_ref||²` (AIG, equation 4), a sum over elements as it is printed."""
    total = torch.zeros(len(steps[0].noisy), device=steps[0].noisy.device)
    for step in steps:
        # What earlier steps did to the latents is differentiated too: then the reference's own prediction moves.
        moves = step.noisy.requires_grad
        with policy.reference(model) as reference, torch.set_grad_enabled(moves), _remembering(model, moves):
            prediction = base.predict(reference, step.noisy, step.timesteps, prompted)
        total = total + (at_least_single(step.prediction) - at_least_single(prediction)).square().flatten(1).sum(1)
    return total


@contextmanager
def _remembering(model: nn.Module, moves: bool) -> Iterator[None]:
    """Activations are kept inside the block: to compute them anew later would find the adapter on again."""
    modules = [module for module in model.modules() if moves and getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def objective(
    base: Base,
    policy: Policy,
    model: nn.Module,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    reward: Reward,
    kl: float | int,
    sampling: SamplerSettings,
    keep: int,
    until: int | None = None,
    ceiling: float | int = float("inf"),
) -> Float[Tensor, ""]:
    """Minus the mean reward of what `model` draws for `prompts`, plus `kl` times the divergence over the last steps.

    `until` stops the sampling early (see `sampling.sample`); rewards count up to `ceiling`.
    """
    prompted = conditions(base, prompts, sampling.resolution)
    guided = sampling.guidance_scale > 1
    unprompted = unconditional(base, len(prompts), sampling.resolution) if guided else None
    noise = sampling.noise(base, generators)
    drawn = sample(base, model, prompted, unprompted, noise, sampling, keep=keep, generators=generators, until=until)
    images = decode(base, drawn.latents)
    rewards = scored(reward, images, prompts)
    if images.requires_grad and not rewards.requires_grad:
        raise ValueError(f"{reward.name} has no gradient in its pictures: policy gradients need none (--method ddpo)")
    # Without a KL term the reference need not be evaluated.
    divergences = divergence(base, policy, model, drawn.steps, prompted) if kl else torch.zeros_like(rewards)
    return regularised_reward(rewards.clamp(max=ceiling), divergences, kl)


def on_held_out(
    base: Base,
    policy: Policy,
    model: nn.Module,
    prompts: Sequence[str],
    reward: Reward,
    kl: float | int,
    sampling: SamplerSettings,
    keep: int,
    per_pass: int,
    seed: int,
) -> float:
    """The objective for `prompts`, `per_pass` at a time, from noise that is always the same."""
    total = 0.0
    for start in range(0, len(prompts), per_pass):
        places = range(len(prompts))[start : start + per_pass]
        asked, generators = [prompts[place] for place in places], row_generators(seed, places, "held out")
        value = objective(base, policy, model, asked, generators, reward, kl, sampling, keep)
        total += len(asked) * value.item()
    return total / len(prompts)


def require(kl: float | int, prompts: Sequence[str], held_out: Sequence[str]) -> None:
    """Raise `ValueError` for a negative `kl`, or where there are no prompts."""
    if not 0 <= kl < float("inf"):
        raise ValueError(f"λ_KL = {kl}: the strength of the KL term must be 0 or more")
    if not prompts or not held_out:
        raise ValueError(f"{len(prompts)} prompts to train on and {len(held_out)} held out: both must be there")


def train_draft(
    base: Base,
    policy: Policy,
    prompts: Sequence[str],
    held_out: Sequence[str],
    reward: Reward,
    kl: float | int,
    plan: TrainingPlan,
    *,
    batch: int,
    sampling: SamplerSettings,
    keep: int = 1,
    per_pass: int = 16,
    run: TrainingRun,
) -> LossCurve:
    """Raise `reward` of what `policy` draws, `batch` prompts a step, with gradients through the last `keep` steps.

    `kl` is λ_KL, 0 for none; its term is computed over the same steps. The held-out loss is the same objective for the
    `held_out` prompts, `per_pass` at a time, always from the same noise. Raises `ValueError` for a negative `kl`, for
    `keep` outside 1 to all steps, for no prompts, and for a reward that is no number or has no gradient.
    """
    if keep < 1:
        raise ValueError(f"gradients through {keep} steps teach nothing: keep 1 or more")
    require(kl, prompts, held_out)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        positions = part.positions(batch)
        asked = [prompts[place] for place in order(len(prompts), run.seed, positions)]
        return objective(base, policy, model, asked, row_generators(run.seed, positions), reward, kl, sampling, keep)

    def held_out_loss(model: nn.Module) -> float:
        return on_held_out(base, policy, model, held_out, reward, kl, sampling, keep, per_pass, run.seed)

    return train(
        policy.model,
        loss,
        held_out_loss,
        plan,
        run=run,
    )
