"""What raising a reward takes, whatever the method, and scores as training takes them: in single precision at least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.sampling import SamplerSettings, at_least_single
from deradiff.alignment.training import TrainingPlan, TrainingRun
from deradiff.rewards import Reward


@dataclass(frozen=True)
class RewardTask:
    """To raise `reward` of what `policy` draws, `batch` pictures or prompts a step, for a divergence to pay for.

    `kl` is λ_KL, 0 for none; it is weighed against `scale` times the reward. In training a share `dropout` of the
    reward's parameters is zero (see `DroppedReward`). The loss is also computed for the prompts `held_out`, `per_pass`
    at a time and always from the same noise. Raises `ValueError` for a negative `kl`, a scale that is not positive, and
    where there are no prompts.
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
    scale: float | int = 1
    dropout: float | int = 0
    per_pass: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(
                f"a reward scale of {self.scale:g}: it multiplies the reward and must be above 0, as 100 does, the "
                "logit scale of CLIP models"
            )
        if not 0 <= self.kl < float("inf"):
            raise ValueError(f"λ_KL = {self.kl}: the strength of the KL term must be 0 or more")
        if not self.prompts or not self.held_out:
            raise ValueError(
                f"{len(self.prompts)} prompts to train on and {len(self.held_out)} held out: both must be there"
            )

    def with_dropout(self) -> "RewardTask":
        """The task as it is trained on. Raises `ValueError` as `DroppedReward` does."""
        return replace(self, reward=DroppedReward(self.reward, self.dropout)) if self.dropout else self


class DroppedReward:
    """`reward` with a share of its parameters at zero, others in every call: `r_φ[u, ξ]`.

    DRaFT's authors tried it against reward hacking (Clark et al. 2023). Annealed Importance Guidance says why it cannot
    help (A.1.1, equations 23 to 25): on average over u it is another reward, which is maximised as blindly. What is
    kept is divided by the share kept: on average, parameters are what they were.

    u is drawn by torch's own generator. Raises `ValueError` for a share outside [0, 1) and a reward without parameters.
    """

    def __init__(self, reward: Reward, share: float | int) -> None:
        if not 0 <= share < 1:
            raise ValueError(
                f"a reward dropout of {share:g}: it is the share of parameters that is dropped, 0 to below 1"
            )
        models = {name: value for name, value in vars(reward).items() if isinstance(value, nn.Module)}
        if not models and not isinstance(reward, nn.Module):
            raise ValueError(f"{reward.name} is a formula and has no parameters to drop: leave --reward-dropout out")
        self.name, self._share = reward.name, share
        self._called = _Called(reward, models)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Score `images` by what is left of the reward."""
        left = {name: F.dropout(value, self._share) for name, value in self._called.named_parameters()}
        return torch.func.functional_call(self._called, left, (images, prompts))


class _Called(nn.Module):
    """A reward as a module, whose parameters are those of its `models`."""

    def __init__(self, reward: Reward, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._reward = reward
        for name, model in models.items():
            self.add_module(name, model)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._reward(images, prompts)


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
