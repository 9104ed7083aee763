"""ReFL: the reward's gradient at a random late step of sampling (Xu et al. 2023, Algorithm 1; AIG, A.3).

What a late step takes the clean picture to be is scored already well, so sampling can stop there, and gradients go
through that step alone. As published, φ(r) = ReLU(c - r): rewards count up to a ceiling c. Algorithm 1 holds the model
by the denoising loss on its pre-training data; those are not at hand, so that the reference's own samples take their
place. The authors' released code leaves that loss out. DRaFT's KL term can be had as well.
"""

import torch
from torch import Tensor, nn

from deradiff.alignment.data_order import order, row_generators
from deradiff.alignment.draft import Truncation, drawn_from, train_through
from deradiff.alignment.rwr import Denoising, ReferenceSamples
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import BatchPart, LossCurve


def train_refl(
    task: RewardTask,
    window: tuple[int, int],
    ceiling: float | int = float("inf"),
    pretraining: float | int = 0,
    samples: ReferenceSamples | None = None,
) -> LossCurve:
    """Raise the reward with gradients through one step of sampling; a batch counts prompts.

    Sampling stops after a number of steps drawn from `window`, counted from the noise (published: 31 to 40 of 40).
    Rewards count up to `ceiling`, in their own unit (published: 2, of ImageReward). To the loss the denoising loss of
    as many `samples` is added `pretraining` times. (Algorithm 1 alternates the two, with 0.001 before the reward: 1000
    here.) The held-out loss is that of DRaFT-1, on pictures sampled to the end. Raises `ValueError` for a `pretraining`
    below 0 or without samples, and as `draft.drawn_from` and `draft.train_draft` do.
    """
    if not 0 <= pretraining < float("inf") or (pretraining and samples is None):
        raise ValueError(f"a pre-training loss times {pretraining:g}: it is 0 or more, and needs samples to train on")
    stop = drawn_from(window, task.sampling.steps, task.run.seed)
    beside = None
    if pretraining and samples is not None:
        denoising = Denoising(task.base, samples)

        def beside(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
            positions = part.positions(task.batch)
            rows = order(len(samples.prompts), task.run.seed, positions)
            generators = row_generators(task.run.seed, positions, "pre-training")
            return pretraining * denoising.errors(model, rows, 0, generators).mean()

    return train_through(task, lambda step: Truncation(1, stop(step)), Truncation(1), ceiling, beside)
