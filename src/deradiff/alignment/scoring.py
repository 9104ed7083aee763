"""What raising a reward takes, whatever the method, and scores as training takes them: in single precision at least."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.sampling import SamplerSettings, at_least_single
from deradiff.alignment.training import TrainingPlan, TrainingRun
from deradiff.rewards import Reward


@dataclass(frozen=True)
class RewardTask:
    """To raise `reward` of what `policy` draws, `batch` pictures or prompts a step, for a divergence to pay for.

    `kl` is λ_KL, 0 for none. The loss is also computed for the prompts `held_out`, `per_pass` at a time and always from
    the same noise. Raises `ValueError` for a negative `kl`, and where there are no prompts.
    """

    base: Base
    policy: Policy
    prompts: Sequence[str]
    held_out: Sequence[str]
    reward: Reward
    kl: float | int
    plan: TrainingPlan
    run: TrainingRun
    batch: int
    sampling: SamplerSettings
    per_pass: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.kl < float("inf"):
            raise ValueError(f"λ_KL = {self.kl}: the strength of the KL term must be 0 or more")
        if not self.prompts or not self.held_out:
            raise ValueError(
                f"{len(self.prompts)} prompts to train on and {len(self.held_out)} held out: both must be there"
            )


class UnusableScore(ValueError, FloatingPointError):
    """A reward is NaN or infinite."""


def scored(
    reward: Reward, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
) -> Float[Tensor, " batch"]:
    """The rewards of `images`, with gradients where the reward has them, whatever precision the training is in.

    Raises `UnusableScore` where one is not finite, and says whether the picture or the reward is to blame.
    """
    with torch.autocast(images.device.type, enabled=False):
        scores = at_least_single(reward(images, prompts))
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        first = wrong[0]
        cause = (
            "the picture is sound, so look into the reward"
            if images[first].isfinite().all()
            else "the picture itself holds NaN: lower the learning rate, or in half precision take bfloat16 or float32"
        )
        raise UnusableScore(
            f"the reward {reward.name!r} is {scores[first].item()} for {prompts[first]!r} ({len(wrong)} of "
            f"{len(scores)} scores are not finite); {cause}"
        )
    return scores
