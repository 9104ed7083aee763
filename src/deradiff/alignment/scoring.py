"""A reward's scores as training takes them: numbers, in single precision at least."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.alignment.sampling import at_least_single
from deradiff.rewards import Reward


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
