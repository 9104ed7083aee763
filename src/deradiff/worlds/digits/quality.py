"""How good the digits world is, in numbers with standard errors, beside what real handwriting scores.

Real handwriting means the held-out split, rendered like the training data. Shapes are compared as ink maps at 16x16,
recovered from the pictures without knowing their colours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, mean
from deradiff.anchors.checks import denoiser_of
from deradiff.sampling import pictures
from deradiff.worlds.digits import GUIDANCE
from deradiff.worlds.digits.captions import parse, sample_prompts
from deradiff.worlds.digits.classifier import features, read, recover_ink_map
from deradiff.worlds.digits.data import INKS, PAPERS, render


@torch.no_grad()
def draw(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 25,
    guidance_scale: float = GUIDANCE,
    tick: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "batch 3 32 32"]:
    """One picture in [0, 1] per prompt; the noise depends on `seed` and the position in the list alone."""
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    denoiser: Any = denoiser_of(pipe)[1]
    drawn = []
    for i in range(0, len(prompts), 250):
        batch = pictures.draw(
            pipe,
            prompt=prompts[i : i + 250],
            latents=noise[i : i + 250].to(denoiser.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        drawn.append(batch.require_finite(prompts[i : i + 250]).images.float())
        tick(min(i + 250, len(prompts)))
    return torch.cat(drawn)


@dataclass(frozen=True)
class Scores:
    """What a set of pictures says about the prompts they were made for. Shares are in [0, 1]."""

    legible: Estimate
    ink_right: Estimate
    paper_right: Estimate


def score(images: Float[Tensor, "batch 3 32 32"], prompts: list[str]) -> Scores:
    """Legibility and named colours; a colour counts only where the prompt names one."""
    seen = read(images)
    inks, papers = list(INKS), list(PAPERS)
    digit, ink, paper = [], [], []
    for i, parts in enumerate(map(parse, prompts)):
        digit.append(float(seen.digits[i] == parts.digit))
        if parts.ink is not None:
            ink.append(float(inks[int(seen.inks[i])] == parts.ink))
        if parts.paper is not None:
            paper.append(float(papers[int(seen.papers[i])] == parts.paper))
    return Scores(mean(digit), mean(ink), mean(paper))


def within_class_variance(
    maps: Float[Tensor, "sample feature"], digits: Int[Tensor, " sample"]
) -> Float[Tensor, " digit"]:
    """The total variance (trace of the covariance) of each digit's features."""
    return torch.stack([maps[digits == d].var(0).sum() for d in range(10)])


def nearest_distance(
    maps: Float[Tensor, "sample feature"], training: Float[Tensor, "other feature"]
) -> Float[Tensor, " sample"]:
    """The Euclidean distance of each sample to the nearest training picture."""
    return torch.cdist(maps, training).min(1).values


@dataclass(frozen=True)
class Quality:
    """The reference beside held-out real digits."""

    samples: int
    steps: int
    guidance_scale: float
    generated: Scores
    real_legible: Estimate
    variance_ratio: Estimate
    nearest_generated: tuple[float, float, float]
    nearest_real: tuple[float, float, float]

    def goals(self) -> dict[str, bool]:
        """Which of the four goals are met."""
        return {
            "legible ≥ 97%": self.generated.legible.value >= 0.97,
            "named colours right ≥ 97%": min(self.generated.ink_right.value, self.generated.paper_right.value) >= 0.97,
            "within-class variance ≥ 85% of real": self.variance_ratio.value >= 0.85,
            "no closer to training digits than held-out ones": all(
                g >= r for g, r in zip(self.nearest_generated, self.nearest_real, strict=True)
            ),
        }


def measure(
    pipe: DiffusionPipeline,
    samples: int = 1000,
    steps: int = 25,
    guidance_scale: float = GUIDANCE,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Draw `samples` pictures and compare them with real ones.

    The distances are the 5th, 25th and 50th percentile of the distance to the nearest of 10 renderings of every
    training digit; the error of the variance ratio is that of the mean over the ten digits.
    """
    prompts = sample_prompts(samples, seed + 100)
    images = draw(pipe, prompts, seed, steps, guidance_scale, tick)
    training, real = render("train", 10 * 1437, seed + 101), render("held-out", 5 * 360, seed + 102)
    maps, real_maps = features(recover_ink_map(images)), features(recover_ink_map(real.images))
    train_maps = features(recover_ink_map(training.images))
    digits = torch.tensor([parse(p).digit for p in prompts])
    ratios = within_class_variance(maps, digits) / within_class_variance(train_maps, training.digits)

    def percentiles(values: Float[Tensor, " sample"]) -> tuple[float, float, float]:
        low, quarter, median = torch.quantile(values, torch.tensor([0.05, 0.25, 0.5])).tolist()
        return low, quarter, median

    return Quality(
        samples=samples,
        steps=steps,
        guidance_scale=guidance_scale,
        generated=score(images, prompts),
        real_legible=mean((read(real.images).digits == real.digits).float()),
        variance_ratio=mean(ratios),
        nearest_generated=percentiles(nearest_distance(maps, train_maps)),
        nearest_real=percentiles(nearest_distance(real_maps, train_maps)),
    )
