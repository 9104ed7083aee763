"""DRaFT-K: the reward's own gradient through the last K steps of sampling (Clark et al. 2023), with a KL term."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions, Policy
from deradiff.alignment.data_order import order, passes, row_generators
from deradiff.alignment.loop import train
from deradiff.alignment.objectives import regularised_reward
from deradiff.alignment.sampling import DifferentiatedStep, SamplerSettings, at_least_single, decode, sample, told
from deradiff.alignment.scoring import RewardTask, scored
from deradiff.alignment.training import BatchPart, LossCurve
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
    prompted, unprompted = told(base, prompts, sampling)
    noise = sampling.noise(base, generators)
    drawn = sample(base, model, prompted, unprompted, noise, sampling, keep=keep, generators=generators, until=until)
    images = decode(base, drawn.latents)
    rewards = scored(reward, images, prompts)
    if images.requires_grad and not rewards.requires_grad:
        raise ValueError(f"{reward.name} has no gradient in its pictures: policy gradients need none (--method ddpo)")
    # Without a KL term the reference need not be evaluated.
    divergences = divergence(base, policy, model, drawn.steps, prompted) if kl else torch.zeros_like(rewards)
    return regularised_reward(rewards.clamp(max=ceiling), divergences, kl)


def train_through(
    task: RewardTask,
    keep: int,
    until: Callable[[int], int | None] = lambda step: None,
    ceiling: float | int = float("inf"),
) -> LossCurve:
    """Minimise `objective`, in training with `until(training step)` and `ceiling`; the held-out loss has neither."""
    base, policy, seed = task.base, task.policy, task.run.seed

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        positions = part.positions(task.batch)
        asked = [task.prompts[place] for place in order(len(task.prompts), seed, positions)]
        generators, stop = row_generators(seed, positions), until(part.step)
        return objective(
            base, policy, model, asked, generators, task.reward, task.kl, task.sampling, keep, stop, ceiling
        )

    def held_out_loss(model: nn.Module) -> float:
        total = 0.0
        for places in passes(len(task.held_out), task.per_pass):
            asked, generators = task.held_out[places.start : places.stop], row_generators(seed, places, "held out")
            value = objective(base, policy, model, asked, generators, task.reward, task.kl, task.sampling, keep)
            total += len(asked) * value.item()
        return total / len(task.held_out)

    return train(policy.model, loss, held_out_loss, task.plan, run=task.run)


def train_draft(task: RewardTask, keep: int = 1) -> LossCurve:
    """Raise the reward with gradients through the last `keep` steps; the KL term is computed over the same steps.

    A batch counts prompts. Raises `ValueError` for `keep` outside 1 to all steps, and for a reward that is no number or
    has no gradient.
    """
    if keep < 1:
        raise ValueError(f"gradients through {keep} steps teach nothing: keep 1 or more")
    return train_through(task, keep)
