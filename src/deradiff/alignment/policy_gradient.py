"""Policy gradients: DDPO (Black et al. 2023, arXiv 2305.13301) and DPOK (Fan et al. 2023, arXiv 2305.16381).

Sampling is a sequence of decisions: in the state x_t the policy draws x_{t-1}, and the image gets a reward at the end.
What led to a high reward is made more likely, so the reward needs no gradient. What is minimised is

    J(θ) = E[-r(x_0, c)] + kl E Σ_t KL(p_θ(x_{t-1} | x_t, c) || p_ref(x_{t-1} | x_t, c))

DDPO with kl = 0, DPOK with kl > 0.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.algorithm.gaussian import Gaussian
from deradiff.alignment.base import Base
from deradiff.alignment.data_order import order, passes, row_generators
from deradiff.alignment.loop import train
from deradiff.alignment.parameters import OldPolicy
from deradiff.alignment.path_kl import Chain, ChainStep, divergence
from deradiff.alignment.sampling import SamplerSettings, decode
from deradiff.alignment.scoring import RewardTask, scored
from deradiff.alignment.training import BatchPart, LossCurve

CLIP = 1e-4
"""How far a ratio of probabilities may be from 1, as in DDPO's experiments."""

# -- the objective ----------------------------------------------------------------------------------------------------


def log_density(gaussian: Gaussian, x: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """`log N(x; mean, variance)` of each row, summed over its elements."""
    variance = gaussian.variance.expand_as(gaussian.mean)
    return -0.5 * ((x - gaussian.mean).square() / variance + (2 * torch.pi * variance).log()).flatten(1).sum(1)


def advantages(rewards: Float[Tensor, " sample"], group: int, *, normalized: bool) -> Float[Tensor, " sample"]:
    """How much better each sample is than the others of its prompt; the `group` samples of a prompt stand together.

    `normalized`: the reward minus its mean over the group, divided by its standard deviation there (DDPO's, per
    prompt); zero where all are equally good. Otherwise the reward minus the mean of the *others*, in the reward's own
    unit: a baseline that leaves the gradient unbiased.

    Raises `ValueError` for groups of one, which have nothing to compare, and for an incomplete group.
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(
            f"{len(rewards)} samples do not make groups of {group}: every prompt needs the same number of samples, 2 "
            "or more, to compare with one another"
        )
    rows = rewards.view(-1, group)
    rows = rows - rows[:, :1]  # the mean of equal rewards is not exactly theirs, and their spread is as small
    away = rows - rows.mean(1, keepdim=True)
    scaled = away / (rows.std(1, keepdim=True) + 1e-8) if normalized else away * (group / (group - 1))
    return scaled.flatten()


def clipped_policy_gradient(
    log_probs: Float[Tensor, " sample"],
    sampled: Float[Tensor, " sample"],
    advantages: Float[Tensor, " sample"],
    clip: float = CLIP,
) -> Float[Tensor, ""]:
    """`-mean min(ρ A, clip(ρ) A)`, `ρ = exp(log_probs - sampled)` (Schulman et al. 2017, equation 7; DDPO's IS form).

    `clip` is how far ρ may be from 1 before a sample has no gradient that would move it farther.

    `sampled` are the logarithms of the probabilities with which the samples were drawn. Where the two agree, ρ is 1 and
    the gradient is the policy gradient, `-mean A ∇ log_probs`.
    """
    ratio = torch.exp(log_probs - sampled.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


class Term(NamedTuple):
    """A part of a loss: `surrogate` has its gradient, `value` is what it adds to the loss that is reported."""

    surrogate: Float[Tensor, ""]
    value: Float[Tensor, ""] | float | int = 0.0


def summed(
    value: Float[Tensor, ""], terms: Sequence[Callable[[], Term]], model: nn.Module, accelerator: Accelerator
) -> Float[Tensor, ""]:
    """`value` and the sum of `terms`, at least one, with their gradient; one term's graph is held at a time.

    The gradients of all terms but the last are added to the weights here, that of the last by going back through the
    result: memory does not grow with their number. `model` is as `accelerator` prepared it.
    """
    for number, term in enumerate(terms):
        last = number == len(terms) - 1
        # Processes exchange gradients once, with the last term; divided ones each time, instead of holding a whole one.
        with nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            surrogate, added = term()
            value = value + added
            if not last:
                accelerator.backward(surrogate)
    return surrogate + (value - surrogate).detach()


def decisions(path: Sequence[ChainStep], sampling: SamplerSettings) -> list[ChainStep]:
    """The steps of a path that draw noise. Raises `ValueError` where none does."""
    random = [step for step in path if step.is_random]
    if not random:
        raise ValueError(f"no step of {sampling} draws noise: take 2 steps or more")
    return random


def loss(
    task: RewardTask,
    model: nn.Module,
    prompts: Sequence[str],
    group: int,
    generators: Sequence[torch.Generator],
    accelerator: Accelerator,
) -> Float[Tensor, ""]:
    """J of one picture of each of `prompts`, `group` equal ones after one another, drawn here with `generators`.

    Its gradient is the policy gradient, one step of the sampler after the other (see `summed`). `model` is the policy's
    as `accelerator` prepared it; rewards are multiplied by the task's scale. Raises `ValueError` for a reward that is
    not finite, and where no step draws noise.
    """
    policy, kl, chain = task.policy, task.kl, Chain(task.base, prompts, task.sampling)
    path = list(chain.walk(model, generators))
    with torch.no_grad():
        rewards = task.scale * scored(task.reward, decode(task.base, path[-1].after), prompts)
    advantage = advantages(rewards, group, normalized=kl == 0)

    def term(step: ChainStep) -> Term:
        transition = chain.transition(model, step.number, step.before)
        log_probs = log_density(transition, step.after)
        surrogate = clipped_policy_gradient(log_probs, log_probs, advantage)
        if not kl:
            return Term(surrogate)
        away = kl * divergence(chain, policy, step._replace(transition=transition), model).mean()
        return Term(surrogate + away, away.detach())

    terms = [partial(term, step) for step in decisions(path, task.sampling)]
    return summed(-rewards.mean(), terms, model, accelerator)


# -- training ---------------------------------------------------------------------------------------------------------


def train_ddpo(task: RewardTask, per_prompt: int = 4) -> LossCurve:
    """Align the policy by the rewards of its own samples: a batch counts pictures, `per_prompt` of each prompt.

    Every step samples anew and updates once, so the ratio of probabilities is 1 (see `clipped_policy_gradient`). The
    sampler is `sampling`'s at full noise (see `Chain`), and with guidance it is the guided prediction that decides. A
    last step without noise decides nothing: it counts as part of the reward, its gradient is left out.

    λ_KL is in points of the scaled reward per nat. At 0 there is nothing to weigh the reward against, and advantages
    are normalised per prompt, as in DDPO. Otherwise they stay in points, as in DPOK, whose KL gradient is that of every
    step at the states that were drawn: how earlier steps change which states are drawn is left out, as in its paper.

    A prompt's samples are compared with one another alone and stay in one part of the batch, so that the result does
    not depend on the number of processes and micro-batches. Steps of the sampler are differentiated one at a time:
    memory does not grow with their number. The loss reported is J, as is the held-out one: one image of every held-out
    prompt.

    Raises:
        ValueError: a part of the batch that is not a multiple of `per_prompt`, at least 2; a sampler without noise; a
            reward that is not finite.
    """
    task = prepared(task)
    require(task.base, task.sampling, task.batch, parts_of(task), per_prompt)

    def held_out(model: nn.Module, texts: Sequence[str], generators: Sequence[torch.Generator]) -> float:
        chain, total = Chain(task.base, texts, task.sampling), 0.0
        for step in chain.walk(model, generators):
            if task.kl:
                total += task.kl * divergence(chain, task.policy, step, model).sum().item()
        return total - task.scale * scored(task.reward, decode(task.base, step.after), texts).sum().item()

    return train_by_groups(task, per_prompt, loss, held_out)


@runtime_checkable
class GroupLoss(Protocol):
    """The loss of one picture of each of some prompts, `group` equal ones after one another, that it draws itself."""

    def __call__(
        self,
        task: RewardTask,
        model: nn.Module,
        prompts: Sequence[str],
        group: int,
        generators: Sequence[torch.Generator],
        accelerator: Accelerator,
    ) -> Float[Tensor, ""]:
        """See `loss`."""
        ...


def prepared(task: RewardTask) -> RewardTask:
    """`task` with an accelerator: the processor's where it names none."""
    return replace(task, run=replace(task.run, accelerator=task.run.accelerator or Accelerator(cpu=True)))


def parts_of(task: RewardTask) -> int:
    """How many parts a batch of a prepared task has: processes times micro-batches."""
    return task.plan.accumulate * (task.run.accelerator.num_processes if task.run.accelerator else 1)


def train_by_groups(
    task: RewardTask,
    per_prompt: int,
    loss: GroupLoss,
    held_out: Callable[[nn.Module, Sequence[str], Sequence[torch.Generator]], float],
    old: OldPolicy | None = None,
) -> LossCurve:
    """Minimise `loss` of `per_prompt` pictures of each prompt, with the task's dropout; a batch counts pictures.

    `held_out` is the sum of the held-out losses of some prompts; `task` is `prepared`, and `old` goes to `loop.train`.
    """
    seed, taught, accelerator = task.run.seed, task.with_dropout(), task.run.accelerator or Accelerator(cpu=True)

    def objective(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        positions, group = part.positions(task.batch), per_prompt
        rows = order(len(task.prompts), seed, range(positions.start // group, positions.stop // group))
        texts = [task.prompts[row] for row in rows for _ in range(group)]
        return loss(taught, model, texts, group, row_generators(seed, positions, "path"), accelerator)

    def held_out_loss(model: nn.Module) -> float:
        totals = [
            held_out(model, task.held_out[places.start : places.stop], row_generators(seed, places, "held out"))
            for places in passes(len(task.held_out), task.per_pass)
        ]
        return sum(totals) / len(task.held_out)

    return train(task.policy.model, objective, held_out_loss, task.plan, run=task.run, old=old)


def require(base: Base, sampling: SamplerSettings, batch: int, parts: int, per_prompt: int) -> None:
    """Raise `ValueError` for what `train_ddpo` refuses, where a batch has so many parts."""
    require_whole_groups(batch, per_prompt, parts)
    Chain(base, ["a picture"], sampling)


def require_whole_groups(batch: int, per_prompt: int, parts: int) -> None:
    """Raise `ValueError` unless each of `parts` of a batch holds whole groups of 2 samples of a prompt or more."""
    size = len(BatchPart(of=parts).positions(batch))
    if per_prompt < 2 or size % per_prompt:
        raise ValueError(
            f"per_prompt = {per_prompt}: a prompt's samples are compared with one another. Take 2 or "
            f"more, of which each part of the batch holds a multiple: a batch of {batch} has {parts} parts of {size} "
            "(processes x micro-batches)"
        )
