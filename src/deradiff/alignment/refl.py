"""ReFL: the reward's gradient at a random late step of sampling (Xu et al. 2023, Algorithm 1; AIG, A.3).

What a late step takes the clean picture to be is scored already well, so sampling can stop there, and gradients go
through that step alone. As published, φ(r) = ReLU(c - r): rewards count up to a ceiling c. The paper's second term, the
denoising loss on its pre-training data, is not here, since those data are not at hand; the KL term of DRaFT takes its
place.
"""

from functools import partial

import torch

from deradiff.alignment.data_order import seeded
from deradiff.alignment.draft import train_through
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import LossCurve


def stopping_step(seed: int, step: int, window: tuple[int, int]) -> int:
    """After how many sampling steps a training step stops, evenly within `window`, both ends included."""
    first, last = window
    return int(torch.randint(first, last + 1, (), generator=seeded(seed, f"stop {step}")))


def train_refl(task: RewardTask, window: tuple[int, int], ceiling: float | int = float("inf")) -> LossCurve:
    """Raise the reward with gradients through one step of sampling; a batch counts prompts.

    Sampling stops after a number of steps drawn from `window`, counted from the noise (published: 30 to 39 of 40).
    Rewards count up to `ceiling`, in their own unit (published: 2, of ImageReward). The held-out loss is that of
    DRaFT-1, on pictures sampled to the end. Raises `ValueError` for a window outside the steps, and as
    `draft.train_draft` does.
    """
    (first, last), steps = window, task.sampling.steps
    if not 1 <= first <= last <= steps:
        raise ValueError(
            f"a window of {first},{last} means stopping after {first} to {last} of {steps} steps: name 1 ≤ first ≤ "
            "last ≤ all steps"
        )
    return train_through(task, 1, partial(stopping_step, task.run.seed, window=window), ceiling)
