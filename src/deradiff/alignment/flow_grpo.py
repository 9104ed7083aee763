"""Flow-GRPO: policy gradients for flow matching (Liu et al. 2025, arXiv 2505.05470).

The flow is sampled as a diffusion with the same marginals (`FlowMatchSDEScheduler`), so that a step has a density, and
a prompt's pictures are compared with one another (group relative policy optimisation, Shao et al. 2024, arXiv
2402.03300). What an old policy drew is learned from in several updates, with the ratio of probabilities clipped.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.base import Base
from deradiff.alignment.parameters import OldPolicy
from deradiff.alignment.path_kl import Chain, ChainStep, divergence
from deradiff.alignment.policy_gradient import (
    Term,
    advantages,
    clipped_policy_gradient,
    log_density,
    parts_of,
    prepared,
    require_whole_groups,
    summed,
    train_by_groups,
)
from deradiff.alignment.sampling import SamplerSettings, decode
from deradiff.alignment.scoring import RewardTask, scored
from deradiff.alignment.training import LossCurve

LARGEST_ADVANTAGE = 5.0
"""In standard deviations of a group's rewards, as in the method's released code."""


def group_advantages(rewards: Float[Tensor, " sample"], group: int) -> Float[Tensor, " sample"]:
    """`(r - mean) / std` within each group of a prompt's pictures (equation 4), at most `LARGEST_ADVANTAGE`.

    Zero where all of a group are equally good. Raises `ValueError` as `advantages` does.
    """
    return advantages(rewards, group, normalized=True).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)


def per_element(step: ChainStep, total: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """A sum over the elements of a picture's latents as a mean."""
    return total / step.before[0].numel()


def kl_rate(chain: Chain, task: RewardTask, step: ChainStep, model: nn.Module) -> Float[Tensor, " batch"]:
    """`|mean - mean_ref|² / (2 σ²)` of a step, averaged over the elements, σ being its noise per unit of time.

    That is the step's KL divergence times its length, Δt, as in the method's released code; equation 10 has the
    divergence itself.
    """
    length = chain.scheduler.sigmas[step.number] - chain.scheduler.sigmas[step.number + 1]
    return length.to(step.before.device) * per_element(step, divergence(chain, task.policy, step, model))


def loss(
    task: RewardTask,
    model: nn.Module,
    prompts: Sequence[str],
    group: int,
    generators: Sequence[torch.Generator],
    accelerator: Accelerator,
    *,
    old: OldPolicy | None = None,
    clip: float = 1e-4,
) -> Float[Tensor, ""]:
    """Minus the mean reward of one picture of each of `prompts`, with the gradient of equation 5.

        J = mean over samples and steps of  min(ρ A, clip(ρ, 1 - clip, 1 + clip) A) - λ_KL D
        ρ = exp(log p(x_{t-1} | x_t) - log p_old(x_{t-1} | x_t))

    with log densities averaged over the elements of a latent, as in the released code: a ratio of whole densities
    would be far outside any clip after one update. A is `group_advantages`, D `kl_rate`. Pictures are drawn here, by
    `old` where it is another policy than `model`, `group` of each prompt after one another, with `generators`. Steps
    are those that count (`path_kl.Chain.counted`). Rewards are multiplied by the task's scale, which advantages do not
    see.
    """
    kl, chain = task.kl, Chain(task.base, prompts, task.sampling)
    with old.in_place(model) if old else nullcontext():
        path = list(chain.walk(model, generators))
    with torch.no_grad():
        rewards = task.scale * scored(task.reward, decode(task.base, path[-1].after), prompts)
    advantage, steps = group_advantages(rewards, group), [path[number] for number in chain.counted]

    def term(step: ChainStep) -> Term:
        transition = chain.transition(model, step.number, step.before)
        log_probs = per_element(step, log_density(transition, step.after))
        sampled = per_element(step, log_density(step.transition, step.after)) if old else log_probs
        surrogate = clipped_policy_gradient(log_probs, sampled, advantage, clip) / len(steps)
        if not kl:
            return Term(surrogate)
        away = kl * kl_rate(chain, task, step._replace(transition=transition), model).mean() / len(steps)
        return Term(surrogate + away, away.detach())

    return summed(-rewards.mean(), [partial(term, step) for step in steps], model, accelerator)


def require(
    base: Base,
    sampling: SamplerSettings,
    batch: int,
    parts: int,
    per_prompt: int,
    updates: int,
    clip: float,
) -> OldPolicy | None:
    """Raise `ValueError` for what `train_flow_grpo` refuses, where a batch has so many parts; else its old policy.

    There is none where every update draws anew.
    """
    require_whole_groups(batch, per_prompt, parts)
    if not 0 < clip < float("inf"):
        raise ValueError(f"a clip of {clip:g}: ratios of probabilities must be free to leave 1, by 0.0001 for instance")
    _ = Chain(base, ["a picture"], sampling).counted
    return None if updates == 1 else OldPolicy(updates)


def train_flow_grpo(task: RewardTask, per_prompt: int = 24, updates: int = 2, clip: float = 1e-4) -> LossCurve:
    """Align a flow by the rewards of its own samples: a batch counts pictures, `per_prompt` of each prompt.

    A round is `updates` steps of training, each on a batch of its own that the policy at the round's beginning draws;
    the ratio of probabilities is 1 in the first of them. The sampler is the task's, `flow-sde` with its noise, and with
    guidance it is the guided prediction that decides. Few sampling steps suffice in training.

    λ_KL multiplies the divergence from the reference, `kl_rate` averaged over the steps, and is weighed against
    advantages, which have the reward's spread within a prompt as their unit. (The released configurations divide by the
    spread of all rewards of a round instead, `global_std`; the paper, and this, by the group's.) The loss reported is
    minus the scaled reward plus that term, as is the held-out one: one picture of every held-out prompt.

    Raises:
        ValueError: a part of the batch that is not a multiple of `per_prompt`, at least 2; a sampler without noise; a
            clip that is not positive; fewer than one update; a reward that is not finite.
    """
    task = prepared(task)
    old = require(task.base, task.sampling, task.batch, parts_of(task), per_prompt, updates, clip)

    def held_out(model: nn.Module, texts: Sequence[str], generators: Sequence[torch.Generator]) -> float:
        chain = Chain(task.base, texts, task.sampling)
        path = list(chain.walk(model, generators))
        total = -task.scale * scored(task.reward, decode(task.base, path[-1].after), texts).sum().item()
        if task.kl:
            steps = [path[number] for number in chain.counted]
            total += task.kl * sum(kl_rate(chain, task, step, model).sum().item() for step in steps) / len(steps)
        return total

    return train_by_groups(task, per_prompt, partial(loss, old=old, clip=clip), held_out, old)
