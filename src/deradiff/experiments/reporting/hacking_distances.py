"""How far hacked models and their realignments are from the healthy one, with the errors of these distances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.experiments.plan import Arm
from deradiff.experiments.results import Results
from deradiff.measures.frechet import Frechet, frechet_distance
from deradiff.measures.statistics import Statistics, compressed

RESAMPLES = 100
"""Of the bootstrap: its standard errors are within 7% of what more would make them; each costs as many distances."""


class Undoing(NamedTuple):
    """A hacked model, a realignment of it towards the healthy one, and the healthy one."""

    hacked: Arm
    realigned: Arm
    healthy: Arm


@dataclass(frozen=True)
class Distances:
    """One row of DeRaDiff's Table 3. Errors are standard errors by the bootstrap over prompts; NaN for one prompt."""

    undoing: Undoing
    prompts: str
    hacked: Frechet
    realigned: Frechet
    errors: dict[str, float]
    """Of `hacked`, `realigned`, `undone` and `percent`."""
    prompt_count: int
    apart: dict[str, float]
    """The distances of `hacked`, `realigned` and `healthy` from the healthy model with other seeds, half as many."""

    @property
    def undone(self) -> float:
        """By how much realigning has shortened the distance."""
        return self.hacked.value - self.realigned.value

    @property
    def percent(self) -> float:
        """The same in percent of the hacked model's distance; NaN if that is 0."""
        return percent(self.hacked.value, self.realigned.value)

    @property
    def caveat(self) -> str:
        """What is to be said of too few samples; nothing if there are enough."""
        return self.hacked.caveat or ""


def percent(hacked: float, realigned: float) -> float:
    """By how many percent realigning has shortened the distance; NaN if it was 0."""
    return 100 * (hacked - realigned) / hacked if hacked else math.nan


def distances(results: Results, undoing: Undoing, prompts: str, features: str) -> Distances | None:
    """Both distances from the healthy model, over the prompts and seeds that all three have; None for under 2."""
    known = [results.features_by_place(arm, prompts, features) for arm in undoing]
    places = sorted(set.intersection(*map(set, known)))
    if len(places) < 2:
        return None
    hacked, realigned, healthy = (torch.from_numpy(np.stack([of[place] for place in places])) for of in known)
    rows, columns = (np.asarray(side) for side in zip(*places, strict=True))
    count = len(np.unique(rows))
    return Distances(
        undoing,
        prompts,
        frechet_distance(healthy, hacked),
        frechet_distance(healthy, realigned),
        bootstrapped(hacked, realigned, healthy, rows),
        count,
        apart(hacked, realigned, healthy, columns),
    )


Vectors = Float[Tensor, "image feature"]


def bootstrapped(
    hacked: Vectors, realigned: Vectors, healthy: Vectors, rows: Int[np.ndarray, " image"], resamples: int = RESAMPLES
) -> dict[str, float]:
    """Standard errors of both distances, of their difference and of that in percent, over resampled prompts.

    All three sets are resampled by the same prompts, each with all its images: what prompts do to all of them cancels
    in the difference. `rows` is the prompt of each image.
    """
    names = ("hacked", "realigned", "undone", "percent")
    prompts = np.unique(rows)
    if len(prompts) < 2:
        return dict.fromkeys(names, math.nan)
    random = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        picks = random.choice(prompts, len(prompts))
        times = np.bincount(picks, minlength=rows.max() + 1)[rows]
        far, near, base = (repeated(vectors, times) for vectors in (hacked, realigned, healthy))
        first, second = frechet_distance(base, far).value, frechet_distance(base, near).value
        values.append((first, second, first - second, percent(first, second)))
    return dict(zip(names, np.std(values, axis=0, ddof=1).tolist(), strict=True))


def repeated(vectors: Vectors, times: Int[np.ndarray, " image"]) -> Statistics:
    """The statistics of a set in which each vector stands so often, at the price of the distinct ones."""
    there = torch.from_numpy(times > 0)
    x, counts = vectors[there].double(), torch.from_numpy(times)[there].double()[:, None]
    total = counts.sum()
    mean = (counts * x).sum(0) / total
    return Statistics(mean, compressed((counts / (total - 1)).sqrt() * (x - mean)), int(total))


def apart(
    hacked: Vectors, realigned: Vectors, healthy: Vectors, columns: Int[np.ndarray, " image"]
) -> dict[str, float]:
    """The distances that images of other seeds have: the first half of the seeds against the second, and reversed.

    What is left of the healthy model's own is what independent samples of this size cannot go below.
    """
    seeds = np.unique(columns)
    half = len(seeds) // 2
    halves = [torch.from_numpy(np.isin(columns, some)) for some in (seeds[:half], seeds[half : 2 * half])]
    if min(int(rows.sum()) for rows in halves) < 2:
        return dict.fromkeys(("hacked", "realigned", "healthy"), math.nan)
    return {
        name: sum(frechet_distance(healthy[a], other[b]).value for a, b in (halves, halves[::-1])) / 2
        for name, other in (("hacked", hacked), ("realigned", realigned), ("healthy", healthy))
    }
