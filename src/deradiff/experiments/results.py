"""What an experiment has found so far, by arm and prompt set: all that tables and figures are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from deradiff.algorithm.guided_weights import GuidedWeights, joined_guidance
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.verdict import Verdict, verdict
from deradiff.experiments.characters import sampler
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.running import Contents, blacked_out, contents, cut_prompts
from deradiff.experiments.store import Store, StoredDiagnostics, StoredGuidance
from deradiff.sweep.characters import CharacterFile, KnownCharacter

Table = Float[np.ndarray, "prompt seed"]


@dataclass(frozen=True)
class Pair:
    """A model approximated from another: the cell of a table of anchors and targets."""

    anchor: str
    target: str
    lam: float
    approximated: Arm
    retrained: Arm


def by_prompt(table: Table) -> Float[np.ndarray, " prompt"]:
    """The values of every prompt, averaged over the seeds that have one; NaN for a prompt without any."""
    there = np.isfinite(table)
    sums = np.where(there, table, 0.0).sum(1)
    return np.where(there.any(1), sums / np.maximum(there.sum(1), 1), np.nan)


def over_prompts(table: Table) -> tuple[float, float]:
    """Mean and standard error over prompts, each averaged over the seeds that have a value; NaN for none."""
    values = by_prompt(table)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


class Results:
    """The numbers of a store for a plan, at one way of sampling. What is not there yet is NaN, or not among the rows.

    Raises `ValueError` for a way of sampling that the plan does not have.
    """

    def __init__(self, plan: Plan, store: Store, sampling: str | None = None) -> None:
        self.plan = plan
        self.sampling = next(iter(plan.sampling)) if sampling is None else sampling
        if self.sampling not in plan.sampling:
            raise ValueError(f"the plan does not sample by {sampling!r}: it has {', '.join(plan.sampling)}")
        self.contents: Contents = contents(plan, store, fresh=False)
        self._drawn, self._diagnostics = store.drawn(), store.diagnostics()
        self._scores = {name: store.scores(name) for name in plan.scores}
        self._features = {name: store.features(name) for name in plan.features}
        self.failures, self.runs = store.failures(), store.runs()
        self.blacked_out = blacked_out(self.contents, store)
        """Images that a safety checker blacked out: they are not there, and have no scores."""
        held = store.fact("characters", dict[str, CharacterFile]) or {}
        self.characters: dict[str, KnownCharacter] = {
            name: CharacterFile.model_validate(record).known for name, record in held.items()
        }
        """What kind of anchor the models are that were examined, by their names."""
        self.cut = cut_prompts(self.contents, store)
        """What prompts lost to tokenizers."""

    # -- what there is ------------------------------------------------------------------------------------------------

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms of this way of sampling, in the plan's order."""
        return [arm for arm in self.plan.arms() if arm.sampling == self.sampling]

    def named(self, name: str) -> Arm | None:
        """The arm of that name, None where there is none."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def of_method(self, *methods: str) -> list[Arm]:
        """The arms of these methods."""
        return [arm for arm in self.arms if arm.method in methods]

    @property
    def reference(self) -> Arm | None:
        """The reference as it is."""
        return next(iter(self.of_method("reference")), None)

    def model(self, name: str) -> Arm | None:
        """The arm that draws this model as it is."""
        return next((arm for arm in self.of_method("model") if arm.anchors == ((name, 1.0),)), None)

    def pairs(self, particles: bool = False) -> list[Pair]:
        """Every approximation of a model that was also drawn as it is; by Algorithm 1, or by particles."""
        pairs = []
        for arm in self.of_method("realign"):
            retrained = self.model(arm.target) if arm.target else None
            if retrained is not None and bool(arm.particles) == particles:
                (anchor, lam), *_ = arm.anchors
                pairs.append(Pair(anchor, arm.target, lam, arm, retrained))
        return pairs

    def families(self) -> dict[str, list[str]]:
        """The models of each family, those with the largest β, hence least aligned, first."""
        families: dict[str, list[str]] = {}
        for name, model in self.plan.models.items():
            families.setdefault(model.family, []).append(name)
        return {
            family: sorted(names, key=lambda name: -(self.plan.models[name].beta or 0.0))
            for family, names in families.items()
        }

    @property
    def diversity_on(self) -> str:
        """The prompt set that diversity is measured with: the plan's choice, or the one with most seeds."""
        chosen = self.plan.report.diversity_on
        return chosen or max(self.plan.prompts, key=lambda name: len(self.plan.prompts[name].seeds))

    # -- numbers ------------------------------------------------------------------------------------------------------

    def scores(self, arm: Arm, prompts: str, name: str) -> Table:
        """A score of every image of an arm; NaN where there is none (yet)."""
        return self._table(arm, prompts, self._scores[name])

    def mean(self, arm: Arm, prompts: str, name: str) -> tuple[float, float]:
        """The mean score and its standard error over prompts, of those that have one; NaN for none."""
        return over_prompts(self.scores(arm, prompts, name))

    def by_prompt(self, arm: Arm, prompts: str, name: str) -> Float[np.ndarray, " prompt"]:
        """The score of every prompt, averaged over the seeds that have one; NaN for a prompt without any."""
        return by_prompt(self.scores(arm, prompts, name))

    def features(self, arm: Arm, prompts: str, name: str) -> Float[np.ndarray, "image feature"]:
        """The feature vectors of an arm's images, prompt after prompt; those that are there."""
        vectors = list(self.features_by_place(arm, prompts, name).values())
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def features_by_place(
        self, arm: Arm, prompts: str, name: str
    ) -> dict[tuple[int, int], Float[np.ndarray, " feature"]]:
        """The same by the place (prompt, seed) of the image, for comparisons of images that belong together."""
        known = self._features[name]
        return {(row, column): known[item] for row, column, item in self._items(arm, prompts) if item in known}

    def path_kl(self, arm: Arm, prompts: str) -> Table:
        """What each image's path adds to the divergence of the arm's model from the reference, in nats.

        0 for the reference; NaN where it is not known: deterministic samplers, interpolated weights, particles.
        """
        zero = arm.method == "reference"
        known = {item: 0.0 if zero else told.get("path_kl") for item, (told, *_) in self._diagnostics.items()}
        return self._table(arm, prompts, known)

    def seconds(self, arm: Arm) -> float:
        """Mean seconds that one image took, in its batch; NaN for none."""
        seconds = [self._diagnostics[item][1] for item in self._all_items(arm) if item in self._diagnostics]
        return float(np.mean(seconds)) if seconds else float("nan")

    def diagnostics(self, arm: Arm, prompts: str) -> list[dict[str, Any]]:
        """What is known of each of the arm's images that are there: weights, effective particles, evaluations."""
        return list(self.diagnostics_by_place(arm, prompts).values())

    def diagnostics_by_place(self, arm: Arm, prompts: str) -> dict[tuple[int, int], dict[str, Any]]:
        """The same by the place (prompt, seed) of the image."""
        items = self._items(arm, prompts)
        return {(row, column): self._diagnostics[item][0] for row, column, item in items if item in self._diagnostics}

    def verdict(self, arm: Arm, prompts: str, name: str) -> Verdict | None:
        """How far an arm's mean score can be trusted (`verdict.verdict`); None where it has no weights.

        It goes by the anchor's character where that is known, and says where it was examined by another sampler.
        """
        rows, drawn, scores = [], [], []
        for row, _, item in self._items(arm, prompts):
            score = self._scores[name].get(item)
            if item in self._diagnostics and score is not None and "log_weight" in self._diagnostics[item][0]:
                rows.append(row)
                drawn.append(self._diagnostics[item][0])
                scores.append(score)
        if not drawn:
            return None
        reference = self.reference
        baseline = self.mean(reference, prompts, name)[0] if reference is not None else float("nan")
        character = self.characters.get(arm.anchors[0][0]) if len(arm.anchors) == 1 else None
        judged = verdict(
            _weights(arm, drawn),
            torch.tensor(scores, dtype=torch.float64),
            torch.tensor(rows),
            baseline=baseline if np.isfinite(baseline) else None,
            name=name,
            character=None if character is None else character.character,
        )
        if character is None:
            return judged
        return replace(judged, words=character.said(judged.kind, judged.words, *sampler(self.plan, self.sampling)))

    # -- images -------------------------------------------------------------------------------------------------------

    def image(self, arm: Arm, prompts: str, row: int, column: int) -> Path | None:
        """The file of an image; None where it is not there."""
        item = self._index.get((arm, prompts), {}).get((row, column))
        drawn = self._drawn.get(item) if item is not None else None
        return None if drawn is None else drawn.path

    def done(self, arm: Arm) -> tuple[int, int]:
        """How many images of an arm are there, and how many are planned."""
        items = self._all_items(arm)
        return sum(item in self._drawn for item in items), len(items)

    def measured(self, arm: Arm) -> dict[str, int]:
        """How many images of an arm have each score and each extractor's features."""
        items = self._all_items(arm)
        known: dict[str, Any] = self._scores | self._features
        return {name: sum(item in values for item in items) for name, values in known.items()}

    # -- helpers ------------------------------------------------------------------------------------------------------

    @cached_property
    def _index(self) -> dict[tuple[Arm, str], dict[tuple[int, int], str]]:
        index: dict[tuple[Arm, str], dict[tuple[int, int], str]] = {}
        for cell, item in self.contents.cells.items():
            index.setdefault((cell.arm, cell.prompts), {})[cell.row, cell.column] = item
        return index

    def _items(self, arm: Arm, prompts: str) -> Iterator[tuple[int, int, str]]:
        for (row, column), item in sorted(self._index.get((arm, prompts), {}).items()):
            yield row, column, item

    def _all_items(self, arm: Arm) -> list[str]:
        return [item for name in self.plan.sets(arm.prompts) for _, _, item in self._items(arm, name)]

    def _table(self, arm: Arm, prompts: str, values: Mapping[str, float | None]) -> Table:
        table = np.full((len(self.contents.texts[prompts]), len(self.plan.prompts[prompts].seeds)), np.nan)
        for row, column, item in self._items(arm, prompts):
            number = values.get(item)
            if number is not None:
                table[row, column] = number
        return table


def _weights(arm: Arm, known: Sequence[dict[str, Any]]) -> ImportanceWeights:
    """The weights of images that were drawn in several batches, as of one run."""
    records = [StoredDiagnostics.model_validate(record) for record in known]
    names = [name for name in records[0].log_ratios if all(name in record.log_ratios for record in records)]
    paths = [record.path_kl for record in records]
    return ImportanceWeights(
        log_weights=torch.tensor([record.log_weight for record in records], dtype=torch.float64),
        log_ratios={
            name: torch.tensor([record.log_ratios[name] for record in records], dtype=torch.float64) for name in names
        },
        path_kl=None if None in paths else torch.tensor(paths, dtype=torch.float64),
        memoryless=all(record.memoryless for record in records),
        lams=torch.tensor([[lam] * len(known) for _, lam in sorted(arm.anchors)], dtype=torch.float64).reshape(
            len(arm.anchors), len(known)
        ),
        obstacles=frozenset(obstacle for record in records for obstacle in record.obstacles),
        predictions=records[0].predictions,
        guidance=joined_guidance([_guided(record.guidance) for record in records]),
    )


def _guided(held: StoredGuidance | None) -> GuidedWeights | None:
    if held is None:
        return None
    parts = (held.conditional, held.unconditional, held.strength)
    return GuidedWeights(held.scale, *(torch.tensor([part], dtype=torch.float64) for part in parts))
