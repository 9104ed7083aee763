"""Scores and measures of a search's points, unit by unit, read from the results of an experiment.

Units are prompts, over whose seeds a number is averaged, or the seeds themselves where there is a single prompt. An
image whose score failed at one point is left out at all of them: what is compared then has the same prompts and the
same noise everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from deradiff.algorithm.comparisons import ENOUGH as FEW
from deradiff.algorithm.estimates import normalized
from deradiff.algorithm.verdict import OBSTACLES
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.results import Results, by_prompt
from deradiff.measures.diversity import mean_pairwise_distance, vendi_score
from deradiff.measures.precision_recall import squared_distances, squared_radii
from deradiff.measures.statistics import require_features
from deradiff.search.goals import BEATS, DISTANCE, DRIFT, MEASURES, PATH_KL, RECALL, VENDI

ENOUGH = 0.5
"""The share of an arm's images that must have scores."""

OF_FEATURES = (RECALL, VENDI, DISTANCE)
WITHIN_PROMPTS = (VENDI, DISTANCE)

Table = Float[np.ndarray, "prompt seed"]
Kept = Bool[np.ndarray, "prompt seed"]


class TooFewScores(ValueError):
    """Too few images of an arm have scores."""

    def __init__(self, arm: Arm, message: str) -> None:
        super().__init__(message)
        self.arm = arm


def require_measured(plan: Plan, prompts: str, names: Sequence[str], weighted: bool) -> None:
    """Raise `ValueError` for a name that `plan` does not measure on this prompt set, or for too few images to weigh."""
    seeds = len(plan.prompts[prompts].seeds)
    if weighted and seeds < FEW:
        raise ValueError(f"importance weights compare the images of a prompt: give {FEW:g} seeds at least, not {seeds}")
    for name in names:
        if name.removeprefix(BEATS) not in plan.scores and name not in MEASURES:
            known = ", ".join([*plan.scores, *MEASURES])
            raise ValueError(f"{name!r} is not measured here: scores and measures are {known}")
        if weighted and name.startswith(BEATS):
            raise ValueError(f"{name} compares single images, which weights do not: leave the weights out")
        if name in OF_FEATURES and not plan.features:
            raise ValueError(f"{name} compares images by features: name an extractor")
        if (name in WITHIN_PROMPTS or name.startswith(BEATS)) and seeds < 2:
            raise ValueError(f"{name} compares the images of a prompt: give two seeds at least")


def by_unit(
    results: Results, arms: Sequence[Arm], prompts: str, names: Sequence[str], *, weighted: bool = False
) -> tuple[list[dict[str, Float[Tensor, " unit"]]], int]:
    """Every named score and measure of each arm, in the same units, and how many images were left out.

    The first arm is the reference, which recall is counted against. `weighted` reads scores as the retrained model's,
    by importance weights within prompts; measures stay those of the images as they are.

    Raises:
        Unscored: fewer than half of an arm's images have their scores.
        ValueError: a path KL or weights that are not known for the sampler.
    """
    read, kept = _read(results, arms, prompts, names, weighted)
    reference, left_out = read[0], int((~kept).sum())
    return [{name: arm.unit(name, kept, reference) for name in names} for arm in read], left_out


def nearby(
    results: Results, arms: Sequence[Arm], prompts: str, names: Sequence[str], step: float
) -> list[dict[float, dict[str, Float[Tensor, " unit"]]]]:
    """What the named scores of the retrained model would be if every arm's λ were `step` less or more.

    An image's weight grows with λ as its path's log ratio says. What dividing by few weights biases is undone to first
    order. Empty for arms of a single model, or whose sampler is deterministic: nobody knows their ratios.

    Raises as `by_unit` does.
    """
    read, kept = _read(results, arms, prompts, names, True)
    if len(kept) < 2:
        raise ValueError("scores nearby are compared prompt by prompt: give two prompts at least")
    return [
        {move: {name: arm.moved(name, kept, move) for name in names} for move in (-step, step)}
        if arm.ratios.any()
        else {}
        for arm in read
    ]


def _read(
    results: Results, arms: Sequence[Arm], prompts: str, names: Sequence[str], weighted: bool
) -> tuple[list[_Arm], Kept]:
    """The arms, and the images of which all that is needed is known at all of them."""
    read = [_Arm(results, arm, prompts, names, weighted) for arm in arms]
    for arm in read:
        arm.require_enough()
    kept = np.logical_and.reduce([arm.there for arm in read])
    if any(name in WITHIN_PROMPTS or name.startswith(BEATS) for name in names):
        kept = kept & (kept.sum(1, keepdims=True) >= 2)
    return read, kept


class _Arm:
    """What is known of one arm, as [prompt, seed] tables and as features by place."""

    def __init__(self, results: Results, arm: Arm, prompts: str, names: Sequence[str], weighted: bool) -> None:
        self._results, self._arm, self._prompts = results, arm, prompts
        self._tables = {name: self._table(name) for name in names if name not in OF_FEATURES}
        self._features: Mapping[tuple[int, int], Any] = {}
        self._weights = self._log_weights() if weighted else None
        self.there: Kept = np.logical_and.reduce(
            [np.isfinite(table) for table in self._tables.values()] or [np.ones(self._shape, dtype=bool)]
        )
        if {*names} & {*OF_FEATURES}:
            self._features = results.features_by_place(arm, prompts, results.plan.features[0])
            has = np.zeros(self._shape, dtype=bool)
            for place in self._features:
                has[place] = True
            self.there = self.there & has

    @property
    def _shape(self) -> tuple[int, int]:
        results = self._results
        return len(results.contents.texts[self._prompts]), len(results.plan.prompts[self._prompts].seeds)

    def _table(self, name: str) -> Table:
        if name not in (PATH_KL, DRIFT):
            return self._results.scores(self._arm, self._prompts, name.removeprefix(BEATS))
        if not any(lam for _, lam in self._arm.anchors):
            return np.zeros(self._shape)  # the reference
        path_kl = self._results.path_kl(self._arm, self._prompts)
        if not np.isfinite(path_kl).any():
            raise ValueError(
                "the path KL is not known for this sampler: it needs one that draws noise in every step, such as "
                "euler-a, ddpm or flow-sde"
            )
        return path_kl

    def _log_weights(self) -> Table:
        """log W of every image; zero where one model acts alone."""
        diagnostics = self._results.diagnostics(self._arm, self._prompts)
        obstacles = sorted({obstacle for image in diagnostics for obstacle in image.get("obstacles", ())})
        if obstacles:
            reasons = "; ".join(OBSTACLES[obstacle] for obstacle in obstacles)
            raise ValueError(f"there is no retrained model whose score could be estimated: {reasons}")
        return self._by_place(lambda diagnostics: diagnostics.get("log_weight", 0.0))

    @property
    def ratios(self) -> Table:
        """The log ratio of every image's path; zero where it is not known."""
        return self._by_place(lambda diagnostics: sum(diagnostics.get("log_ratios", {}).values()))

    def _by_place(self, number: Callable[[dict[str, Any]], float]) -> Table:
        """A number from what is known of every image; zero where the image is not there, which is never kept."""
        table = np.zeros(self._shape)
        for place, diagnostics in self._results.diagnostics_by_place(self._arm, self._prompts).items():
            table[place] = number(diagnostics)
        return table

    def moved(self, name: str, kept: Kept, move: float) -> Float[Tensor, " unit"]:
        """A score prompt by prompt, if λ were so much larger."""
        assert self._weights is not None
        table = self._tables[name]
        here = _weighted(table, self._weights, kept)
        there = _weighted(table, self._weights + move * self.ratios, kept)
        count = torch.from_numpy(kept.sum(1)[kept.any(1)]).double()
        return here + count / (count - 1).clamp(min=1) * (there - here)

    def require_enough(self) -> None:
        """Raise `TooFewScores` where too few images have their scores."""
        if self.there.mean() >= ENOUGH:
            return
        errors = [error for _, _, error in self._results.failures]
        why = f"; the first error: {errors[0]}" if errors else ""
        raise TooFewScores(self._arm, f"{1 - self.there.mean():.0%} of the images could not be scored{why}")

    def unit(self, name: str, kept: Kept, reference: _Arm) -> Float[Tensor, " unit"]:
        """A score or measure of the images that are kept, unit by unit."""
        if name in WITHIN_PROMPTS:
            measure = vendi_score if name == VENDI else mean_pairwise_distance
            places = np.argwhere(kept)
            return measure(self._chosen(kept), torch.from_numpy(places[:, 0].copy())).per_prompt
        if name == RECALL:
            table = np.zeros(kept.shape)
            table[kept] = self._covers(reference, kept)
            return _averaged(table, kept)
        if name == DRIFT:
            return _averaged(self._tables[name], kept).sqrt()
        if name.startswith(BEATS):
            return _averaged(_beaten(self._tables[name], reference._tables[name], kept), kept)
        if self._weights is None or name == PATH_KL:
            return _averaged(self._tables[name], kept)
        return _weighted(self._tables[name], self._weights, kept)

    def _chosen(self, kept: Kept) -> Float[Tensor, "image feature"]:
        vectors = np.stack([self._features[int(row), int(column)] for row, column in np.argwhere(kept)])
        return torch.from_numpy(vectors).double()

    def _covers(self, reference: _Arm, kept: Kept) -> Bool[np.ndarray, " image"]:
        """Which of the reference's images lie on this arm's manifold (`measures.precision_and_recall`)."""
        known = require_features(reference._chosen(kept), "the reference's")
        drawn = require_features(self._chosen(kept), "the generated")
        k = self._results.plan.report.neighbours
        if not k < len(drawn):
            raise ValueError(f"recall looks at {k} neighbours: {len(drawn)} images are too few, draw more")
        centre = known.mean(0)
        radii = squared_radii(drawn - centre, k)
        covered = [(squared <= radii).any(1) for _, squared in squared_distances(known - centre, drawn - centre)]
        return torch.cat(covered).numpy()


# -- from images to units ---------------------------------------------------------------------------------------------


def _averaged(table: Table, kept: Kept) -> Float[Tensor, " unit"]:
    """The mean over seeds of each prompt that has any; the seeds of a single prompt."""
    if len(kept) == 1:
        return torch.from_numpy(table[kept])
    return torch.from_numpy(by_prompt(np.where(kept, table, np.nan))[kept.any(1)])


def _beaten(table: Table, reference: Table, kept: Kept) -> Table:
    """For every image the share of the reference's that score less, of the same prompt and of another seed.

    Ties count half. From the same noise the two would be alike, which is no comparison of what the models draw.
    """
    wins = np.sign(table[:, :, None] - reference[:, None, :]) / 2 + 0.5
    others = kept[:, None, :] & ~np.eye(kept.shape[1], dtype=bool)
    return np.where(others, wins, 0).sum(2) / others.sum(2).clip(min=1)


def _weighted(table: Table, log_weights: Table, kept: Kept) -> Float[Tensor, " unit"]:
    """The weighted mean over seeds of each prompt.

    Of a single prompt, whose images are the units, `f + n w_j (f_j - f)` with the weighted mean f: its mean is f, and
    its spread gives f's standard error (the delta method).
    """
    rows = np.argwhere(kept)[:, 0].copy()
    scores = torch.from_numpy(table[kept])
    weights = normalized(torch.from_numpy(log_weights[kept]), torch.from_numpy(rows))
    if len(kept) == 1:
        mean = weights @ scores
        return mean + len(scores) * weights * (scores - mean)
    sums = torch.zeros(len(kept), dtype=torch.float64).index_add(0, torch.from_numpy(rows), weights * scores)
    return sums[torch.from_numpy(kept.any(1))]
