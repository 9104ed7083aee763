"""ReFL: the reward's gradient at a random late step of sampling (Xu et al. 2023, Algorithm 1; AIG, A.3).

What a late step takes the clean picture to be is scored already well, so sampling can stop there, and gradients go
through that step alone. As published, φ(r) = ReLU(c - r): rewards count up to a ceiling c. The paper's second term, the
denoising loss on its pre-training data, is not here, since those data are not at hand; the KL term of DRaFT takes its
place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import order, row_generators, seeded
from deradiff.alignment.draft import objective, on_held_out, require
from deradiff.alignment.loop import train
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.rewards import Reward


def stopping_step(seed: int, step: int, window: tuple[int, int]) -> int:
    """After how many sampling steps a training step stops, evenly within `window`, both ends included."""
    first, last = window
    return int(torch.randint(first, last + 1, (), generator=seeded(seed, f"stop {step}")))


def train_refl(
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
    window: tuple[int, int],
    ceiling: float | int = float("inf"),
    per_pass: int = 16,
    run: TrainingRun,
) -> LossCurve:
    """Raise `reward` of what `policy` draws, `batch` prompts a step, through one step of sampling.

    Sampling stops after a number of steps drawn from `window`, counted from the noise (published: 30 to 39 of 40).
    Rewards count up to `ceiling`, in their own unit (published: 2, of ImageReward). `kl` is λ_KL as in DRaFT. The
    held-out loss is that of DRaFT-1, on pictures sampled to the end, always from the same noise. Raises `ValueError`
    for a window outside the steps, and as `draft.train_draft` does.
    """
    first, last = window
    if not 1 <= first <= last <= sampling.steps:
        raise ValueError(
            f"a window of {first},{last} means stopping after {first} to {last} of {sampling.steps} steps: name "
            "1 ≤ first ≤ last ≤ all steps"
        )
    require(kl, prompts, held_out)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        positions = part.positions(batch)
        asked = [prompts[place] for place in order(len(prompts), run.seed, positions)]
        until, generators = stopping_step(run.seed, part.step, window), row_generators(run.seed, positions)
        return objective(base, policy, model, asked, generators, reward, kl, sampling, 1, until, ceiling)

    def held_out_loss(model: nn.Module) -> float:
        return on_held_out(base, policy, model, held_out, reward, kl, sampling, 1, per_pass, run.seed)

    return train(
        policy.model,
        loss,
        held_out_loss,
        plan,
        run=run,
    )
