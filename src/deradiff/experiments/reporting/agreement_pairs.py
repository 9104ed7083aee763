"""Pairs of an approximated and a retrained model, scored on the same prompts: what the agreement exhibits draw from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from deradiff.algorithm.estimates import Estimate
from deradiff.experiments.results import Pair, Results, by_prompt
from deradiff.measures.agreement import HELD, RESAMPLES

COSINES = ("pickscore", "hps-v2.0", "hps-v2.1", "clip")
"""Scores in the papers' scale: cosines of normalised embeddings."""


@dataclass(frozen=True)
class ComparedPair:
    """One pair, over the images that both of its models have: the same prompts, the same seeds."""

    models: Pair
    approximated: float
    retrained: float
    difference: Estimate
    """Approximated minus retrained; the error is the paired bootstrap's over prompts, NaN for a single prompt."""
    interval: tuple[float, float]
    """Its 95% bootstrap interval."""
    prompts: int
    images: int
    planned: int

    @property
    def alone(self) -> bool:
        """Whether the anchor stands for itself: λ = 1, and nothing is approximated."""
        return self.models.anchor == self.models.target

    @property
    def average(self) -> float:
        """The mean of both, across in a Bland-Altman plot."""
        return (self.approximated + self.retrained) / 2

    @property
    def percent(self) -> float:
        """The difference's size in per cent of the retrained mean, as in DeRaDiff's Table 2; NaN if that is 0."""
        return 100 * abs(self.difference.value / self.retrained) if self.retrained else float("nan")

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out: the prompts tell the two models apart."""
        return self.interval[0] > 0 or self.interval[1] < 0


class PromptNoise(NamedTuple):
    """What the choice of prompts does to a mean absolute error."""

    error: float
    """The MAE's standard error over prompts, from resamples that all pairs share."""
    floor: float
    """The MAE that chance alone would make if every approximation agreed with its retrained model."""


@dataclass(frozen=True, eq=False)
class Study:
    """All pairs of one family that have images of one prompt set, by one score."""

    family: str
    prompts: str
    score: str
    pairs: tuple[ComparedPair, ...]
    resampled: Float[np.ndarray, "resample pair"]
    """The pairs' differences over resampled prompts: row by row the same prompts for all of them."""
    betas: dict[str, float]
    """β of every model here, ascending."""
    retrained: dict[str, Estimate]
    """Mean score of every retrained model, each counted once, and its standard error over prompts."""
    reference: Estimate | None
    """The reference's, where it was drawn."""

    @property
    def original_mean(self) -> float:
        """The mean over retrained models, which relative errors divide by (DeRaDiff, Table 5, last row)."""
        return float(np.mean([estimate.value for estimate in self.retrained.values()]))

    @property
    def original_sd(self) -> float:
        """Their standard deviation with n, as in DeRaDiff's figure 4; NaN for a single model."""
        values = [estimate.value for estimate in self.retrained.values()]
        return float(np.std(values)) if len(values) > 1 else float("nan")

    def relative(self, value: float) -> float:
        """`value` in per cent of the size of `original_mean`; NaN if that is 0."""
        return 100 * value / abs(self.original_mean) if self.original_mean else float("nan")

    def places(self, interpolated: bool) -> list[int]:
        """Where in `pair` the pairs at λ ≤ 1 are, or those at λ > 1; anchors that stand for themselves are neither.

        DeRaDiff's Tables 6 to 17 leave the diagonal out too: six strengths give 15 pairs of either sort.
        """
        return [
            place for place, pair in enumerate(self.pairs) if not pair.alone and (pair.models.lam <= 1) == interpolated
        ]

    def part(self, interpolated: bool) -> list[ComparedPair]:
        """The pairs at λ ≤ 1, or those at λ > 1, without anchors that stand for themselves."""
        return [self.pairs[place] for place in self.places(interpolated)]

    def noise(self, interpolated: bool) -> PromptNoise:
        """How much of these pairs' MAE is noise of the prompts; NaN without pairs, or where one has a single prompt."""
        chance = self.chance(interpolated)
        if chance is None:
            return PromptNoise(float("nan"), float("nan"))
        resampled = self.resampled[:, self.places(interpolated)]
        return PromptNoise(float(np.nanstd(np.abs(resampled).mean(1), ddof=1)), float(np.nanmean(np.abs(chance))))

    def chance(self, interpolated: bool) -> Float[np.ndarray, "resample part"] | None:
        """How far resampling prompts alone moves these pairs' differences; None where `noise` is NaN."""
        pairs = self.part(interpolated)
        if not pairs or any(pair.prompts < 2 for pair in pairs):
            return None
        return self.resampled[:, self.places(interpolated)] - [pair.difference.value for pair in pairs]

    def label(self, model: str) -> str:
        """A model's name and strength, on two lines."""
        return f"{model}\nβ = {self.betas[model]:g}"

    def inline(self, model: str) -> str:
        """The same on one line."""
        return f"{model} (β = {self.betas[model]:g})"

    @property
    def anchors(self) -> list[str]:
        """The models that are realigned, weakest regularisation (smallest β) first."""
        return [name for name in self.betas if any(pair.models.anchor == name for pair in self.pairs)]

    @property
    def targets(self) -> list[str]:
        """The models that are stood for, in the same order."""
        return [name for name in self.betas if any(pair.models.target == name for pair in self.pairs)]

    def at(self, anchor: str, target: str) -> ComparedPair | None:
        """The pair of these two; None where there is none."""
        return next((p for p in self.pairs if (p.models.anchor, p.models.target) == (anchor, target)), None)

    def shift(self, model: str) -> float | None:
        """How far retraining moved the mean score from the reference's; None where that was not drawn."""
        return None if self.reference is None else self.retrained[model].value - self.reference.value


def studies(results: Results, particles: bool = False) -> Iterator[Study]:
    """Every study that has data: by score, then by family and prompt set; of Algorithm 1, or of particles."""
    pairs = results.pairs(particles)
    for score in results.plan.scores:
        for family in results.families():
            members = [pair for pair in pairs if results.plan.models[pair.anchor].family == family]
            for prompts in results.plan.prompts:
                made = study(results, members, family, prompts, score)
                if made is not None:
                    yield made


def study(results: Results, pairs: Sequence[Pair], family: str, prompts: str, score: str) -> Study | None:
    """The study of these pairs; None where no approximation has images that its retrained model has too."""
    columns = []
    for pair in pairs:
        tables = [results.scores(arm, prompts, score) for arm in (pair.approximated, pair.retrained)]
        both = np.isfinite(tables[0]) & np.isfinite(tables[1])
        if both.any():
            columns.append((pair, both, *(by_prompt(np.where(both, table, np.nan)) for table in tables)))
    if all(pair.anchor == pair.target for pair, *_ in columns):
        return None
    away = np.stack([first - second for _, _, first, second in columns], axis=1)
    resampled = resampled_means(away)
    compared_pairs = []
    for (pair, both, first, second), means in zip(columns, resampled.T, strict=True):
        there = int(both.any(1).sum())
        error, interval = _spread(means) if there > 1 else (float("nan"), (float("nan"), float("nan")))
        compared_pairs.append(
            ComparedPair(
                pair,
                float(np.nanmean(first)),
                float(np.nanmean(second)),
                Estimate(float(np.nanmean(first - second)), error),
                interval,
                there,
                int(both.sum()),
                both.size,
            )
        )
    models = results.plan.models
    names = {name for pair, *_ in columns for name in (pair.anchor, pair.target)}
    betas = {name: float(models[name].beta or 0) for name in names}
    retrained = {pair.target: Estimate(*results.mean(pair.retrained, prompts, score)) for pair, *_ in columns}
    reference = results.reference
    mean = None if reference is None else Estimate(*results.mean(reference, prompts, score))
    return Study(
        family=family,
        prompts=prompts,
        score=score,
        pairs=tuple(compared_pairs),
        resampled=resampled,
        betas=dict(sorted(betas.items(), key=lambda item: (item[1], item[0]))),
        retrained=retrained,
        reference=mean if mean is not None and np.isfinite(mean.value) else None,
    )


def resampled_means(
    values: Float[np.ndarray, "prompt pair"], resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resample pair"]:
    """Means over prompts drawn with replacement: every resample takes the same prompts for all pairs.

    NaN where a pair lacks a prompt; its mean is over those of its prompts that were drawn.
    """
    rng, count = np.random.default_rng(seed), len(values)
    there = np.isfinite(values)
    known = np.where(there, values, 0.0)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, HELD // count)
    for start in range(0, resamples, step):
        rows = means[start : start + step]
        times = rng.multinomial(count, np.full(count, 1 / count), size=len(rows)).astype(float)
        with np.errstate(invalid="ignore"):  # 0/0 where none of a pair's few prompts was drawn
            rows[:] = (times @ known) / (times @ there)
    return means


def _spread(means: Float[np.ndarray, " resample"]) -> tuple[float, tuple[float, float]]:
    """Standard error and 95% percentile interval of resampled means."""
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(np.nanstd(means, ddof=1)), (float(low), float(high))
