"""Images at λ from 0 to 1 from the same noise, with their rewards and what is known of their paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import OBSTACLES
from deradiff.alignment.scoring import scored
from deradiff.rewards import Reward
from deradiff.rewards.pixels import picture_tensor
from deradiff.sampling.dial import Dial
from deradiff.sweep.batches import OnStep, sample
from deradiff.sweep.settings import Settings

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where anchors are sampled."""

SCORED_TOGETHER = 64


@dataclass(frozen=True)
class ExaminedImages:
    """What the tests need, and the reference's own images, prompt by prompt."""

    scores: Float[Tensor, "lam prompt image"]
    log_weights: Float[Tensor, "lam prompt image"]
    log_ratios: Float[Tensor, "lam prompt image"] | None
    of_reference: list[list[Image.Image]]


def draw(pipe: Any, dial: Dial, settings: Settings, reward: Reward, on_step: OnStep) -> ExaminedImages:
    """Draw `settings`, whose columns are `LAMS`, and score the images.

    Raises `ValueError` for a sampler whose weights have no target, a reward that is not finite and images that a safety
    checker blacked out.
    """
    dial.watching = True  # for the ratio of the paths at λ = 0 and 1
    images: dict[int, Image.Image] = {}
    runs: dict[int, ImportanceWeights] = {}
    for place, image, known in sample(pipe, dial, settings.drawings, batch_size=settings.batch_size, on_step=on_step):
        if known.blacked_out:
            raise ValueError(
                f"the pipeline's safety checker blacked out {settings.drawings[place].name}: name other prompts"
            )
        assert known.run is not None
        images[place], runs[place] = image, known.run
    run = joined([runs[place] for place in range(len(runs))])
    log_weights, ratios = _weights(run)
    texts = [drawing.prompt for drawing in settings.drawings]
    scores = _scores(reward, [images[place] for place in range(len(images))], texts)
    shape = (len(settings.prompts), len(settings.seeds), len(settings.columns))

    def table(values: Tensor) -> Tensor:
        return values.double().cpu().view(shape).permute(2, 0, 1)

    columns, seeds = len(settings.columns), len(settings.seeds)
    of_reference = [
        [images[(prompt * seeds + i) * columns] for i in range(seeds)] for prompt in range(len(settings.prompts))
    ]
    return ExaminedImages(table(scores), table(log_weights), None if ratios is None else table(ratios), of_reference)


def _weights(run: ImportanceWeights) -> tuple[Tensor, Tensor | None]:
    """log W, and the log ratio of the paths where that means something."""
    obstacles = run.obstacles - {"annealing"}  # each image has one λ, and a batch several
    if obstacles == {"guidance"} and run.guidance is not None:
        return run.guidance.combined, None
    if obstacles:
        reasons = "; ".join(OBSTACLES[obstacle] for obstacle in sorted(obstacles))
        raise ValueError(f"nothing can be examined with this sampler: {reasons}. Take DDPM at guidance 1")
    return run.log_weights, next(iter(run.log_ratios.values()), None) if run.memoryless else None


@torch.no_grad()
def _scores(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    parts = []
    for start in range(0, len(images), SCORED_TOGETHER):
        chosen = slice(start, start + SCORED_TOGETHER)
        pictures = torch.cat([picture_tensor(image) for image in images[chosen]]).float()
        parts.append(scored(reward, pictures, prompts[chosen]).float().cpu())
    return torch.cat(parts)
