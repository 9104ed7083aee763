"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025, arXiv 2509.16117).

An old policy draws pictures by any sampler. Each is noised anew, and the flow is trained towards it as far as it is
good and away from it as far as it is bad, with no density of the sampler's steps and no guidance needed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions
from deradiff.alignment.flow_grpo import LARGEST_ADVANTAGE, group_advantages
from deradiff.alignment.noising import FlowNoising
from deradiff.alignment.parameters import OldPolicy
from deradiff.alignment.policy_gradient import Term, parts_of, prepared, require_whole_groups, summed, train_by_groups
from deradiff.alignment.sampling import SamplerSettings, at_least_single, decode, sample, told
from deradiff.alignment.scoring import RewardTask, scored
from deradiff.alignment.training import LossCurve

# -- the objective ----------------------------------------------------------------------------------------------------


def optimality(rewards: Float[Tensor, " sample"], group: int) -> Float[Tensor, " sample"]:
    """`r = ½ + ½ clip((reward - mean)/Z, -1, 1)` (Algorithm 1), Z being 5 standard deviations of the group's rewards.

    The paper leaves Z open; the released code takes 5 standard deviations of all rewards of a round.

    The probability that a picture is a good one: ½ where all of a group are equally good.
    """
    return 0.5 + 0.5 * group_advantages(rewards, group) / LARGEST_ADVANTAGE


def nft_loss(
    clean: Float[Tensor, "batch *latent"],
    noisy: Float[Tensor, "batch *latent"],
    sigma: Float[Tensor, ""],
    velocity: Float[Tensor, "batch *latent"],
    old: Float[Tensor, "batch *latent"],
    optimality: Float[Tensor, " batch"],
    mixing: float | int,
) -> Float[Tensor, " batch"]:
    """`r |x⁺ - x_0|² + (1 - r) |x⁻ - x_0|²` of each picture x_0, noised to `noisy` at the noise level `sigma`.

    x± are the clean pictures of the implicit policies, `v± = v_old ± β (v - v_old)` with β = `mixing` (equation 5):
    where the good one learns r, the bad one unlearns it. Errors are averaged over the elements and divided by their
    mean size, held fixed, in place of a weight for each time (§3.3); all is multiplied by 5/β, as in the released code.
    """

    def error(implicit: Tensor) -> Tensor:
        away = (noisy - sigma * implicit) - clean
        size = away.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return away.square().flatten(1).mean(1) / size

    good, bad = torch.lerp(old, velocity, mixing), torch.lerp(old, velocity, -mixing)
    return LARGEST_ADVANTAGE / mixing * (optimality * error(good) + (1 - optimality) * error(bad))


def ramp(first: int, rate: float | int, most: float | int) -> Callable[[int], float]:
    """How much of the old policy stays at the end of a round, after so many steps of training.

    None before step `first`, then `rate` more with every step, `most` at most (§3.3, Figure 6). Raises `ValueError` for
    what is negative, and for a policy that would never change: `most` of 1 or more.
    """
    if first < 0 or not 0 <= rate < float("inf") or not 0 <= most < 1:
        raise ValueError(f"a memory of {first},{rate:g},{most:g}: a step and a rate of 0 or more, a share below 1")
    return lambda step: 0.0 if step < first else min((step - first) * rate, most)


def loss(
    task: RewardTask,
    model: nn.Module,
    prompts: Sequence[str],
    group: int,
    generators: Sequence[torch.Generator],
    accelerator: Accelerator,
    *,
    old: OldPolicy,
    mixing: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Minus the mean reward of one picture of each of `prompts`, with the gradient of `nft_loss` over all times.

    `old` draws the pictures, `group` of each prompt after one another, with `generators`; each is noised at the time of
    every step of the sampler. λ_KL multiplies the squared distance between the velocities of model and reference,
    averaged over elements and times. Whatever draws, what is trained are predictions that are not guided; of a model
    that is told the guidance scale, those at the sampler's. The gradient is taken one time after the other (see
    `policy_gradient.summed`).
    """
    base, sampling, kl = task.base, task.sampling, task.kl
    with old.in_place(model):
        drawn, known = _drawn(task, model, prompts, generators)
        rewards = task.scale * scored(task.reward, decode(base, drawn), prompts)
        times = sampling.prepared(base).timesteps
        noised = [_noised(task, drawn, time, generators) for time in times]
        before = [_velocity(base, model, noisy, time, known) for noisy, time in zip(noised, times, strict=True)]
    good = optimality(rewards, group)

    def term(noisy: Tensor, time: Tensor, old_velocity: Tensor) -> Term:
        velocity = _velocity(base, model, noisy, time, known)
        sigma = (time / base.noising.timesteps).to(noisy)
        surrogate = nft_loss(drawn, noisy, sigma, velocity, old_velocity, good, mixing).mean() / len(times)
        if not kl:
            return Term(surrogate)
        away = kl * _distance(task, model, velocity, noisy, time, known).mean() / len(times)
        return Term(surrogate + away, away.detach())

    terms = [partial(term, *row) for row in zip(noised, times, before, strict=True)]
    return summed(-rewards.mean(), terms, model, accelerator)


def _drawn(
    task: RewardTask, model: nn.Module, prompts: Sequence[str], generators: Sequence[torch.Generator]
) -> tuple[Float[Tensor, "batch *latent"], Conditions]:
    """Clean latents as the task's sampler draws them, and what the denoiser is told of `prompts`."""
    base, sampling = task.base, task.sampling
    prompted, unprompted = told(base, prompts, sampling)
    noise = sampling.noise(base, generators)
    drawn = sample(base, model, prompted, unprompted, noise, sampling, keep=0, generators=generators)
    return drawn.latents, prompted


def _noised(
    task: RewardTask, drawn: Tensor, time: Shaped[Tensor, ""], generators: Sequence[torch.Generator]
) -> Float[Tensor, "batch *latent"]:
    noise = task.sampling.noise(task.base, generators)
    return task.base.noising.noised(drawn, noise, time.expand(len(drawn)))


def _velocity(
    base: Base, model: nn.Module, noisy: Tensor, time: Shaped[Tensor, ""], known: Conditions
) -> Float[Tensor, "batch *latent"]:
    at = time.expand(len(noisy)).to(noisy.device)
    return at_least_single(base.call.predict(model, noisy.to(base.denoiser.dtype), at, known))


def _distance(
    task: RewardTask,
    model: nn.Module,
    velocity: Tensor,
    noisy: Tensor,
    time: Shaped[Tensor, ""],
    known: Conditions,
) -> Float[Tensor, " batch"]:
    """The squared distance between a velocity and the reference's, averaged over the elements."""
    with task.policy.reference(model) as reference:
        of_reference = _velocity(task.base, reference, noisy, time, known)
    return (velocity - of_reference).square().flatten(1).mean(1)


# -- training ---------------------------------------------------------------------------------------------------------


def require(
    base: Base,
    sampling: SamplerSettings,
    batch: int,
    parts: int,
    per_prompt: int,
    updates: int,
    mixing: float | int,
    memory: tuple[int, float | int, float | int],
) -> OldPolicy:
    """Raise `ValueError` for what `train_diffusion_nft` refuses, where a batch has so many parts; else its old policy.

    Any sampler will do.
    """
    require_whole_groups(batch, per_prompt, parts)
    if not isinstance(base.noising, FlowNoising):
        raise ValueError(f"DiffusionNFT mixes velocities, and this model predicts {base.noising.prediction}")
    if not 0 < mixing < float("inf"):
        raise ValueError(f"a mixing of {mixing:g}: it is the step from old to implicit policy and must be above 0")
    return OldPolicy(updates, ramp(*memory))


def train_diffusion_nft(
    task: RewardTask,
    per_prompt: int = 24,
    updates: int = 1,
    mixing: float | int = 1.0,
    memory: tuple[int, float | int, float | int] = (0, 0.001, 0.5),
) -> LossCurve:
    """Align a flow by the rewards of its own samples: a batch counts pictures, `per_prompt` of each prompt.

    A round is `updates` steps of training, each on a batch of its own that the old policy draws; at its end that moves
    towards the new one, keeping what `ramp(*memory)` says of itself. The sampler is the task's and may be
    deterministic. λ_KL is weighed against advantages of the reward's spread within a prompt. The loss reported is minus
    the scaled reward plus the term of λ_KL, as is the held-out one: one picture of every held-out prompt, of the policy
    that is trained.

    Raises:
        ValueError: a model that is no flow; a part of the batch that is not a multiple of `per_prompt`, at least 2; a
            mixing that is not positive; a memory as `ramp` says; a reward that is not finite.
    """
    task = prepared(task)
    base, kl = task.base, task.kl
    old = require(base, task.sampling, task.batch, parts_of(task), per_prompt, updates, mixing, memory)

    def held_out(model: nn.Module, texts: Sequence[str], generators: Sequence[torch.Generator]) -> float:
        drawn, known = _drawn(task, model, texts, generators)
        total = -task.scale * scored(task.reward, decode(base, drawn), texts).sum().item()
        times = task.sampling.prepared(base).timesteps if kl else []
        for time in times:
            noisy = _noised(task, drawn, time, generators)
            velocity = _velocity(base, model, noisy, time, known)
            total += kl * _distance(task, model, velocity, noisy, time, known).sum().item() / len(times)
        return total

    return train_by_groups(task, per_prompt, partial(loss, old=old, mixing=mixing), held_out, old)
