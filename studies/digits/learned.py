"""Learned families against models trained at the very strengths that λ stands for: is the verdict right there?

A *cell* is a family (how anchors are trained), a reward and a seed of training. It holds anchors at two strengths, and
for λ = ¼, ½, ¾ and 2 of each a model trained at β/λ. Every way of sampling from an anchor is set beside that model, for
the same prompts and noise. A cell is a file: whatever cells are there make the tables (`learned_report`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from deradiff.algorithm.characters import Character
from deradiff.algorithm.estimates import Estimate, covariance, normalized, rows_of_groups
from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import verdict
from deradiff.examination import examine
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.reading import Record, read
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.rewards import Reward
from deradiff.sampling.realignment import realign
from deradiff.sweep.jobs import Report, reproducible
from deradiff.worlds.digits.rewards import BoldReward, InkReward
from studies.digits import learned_models
from studies.digits.learned_models import CONTROL, PROMPTS, STRENGTHS, TRAIN, Cell, Trainings
from studies.digits.truth import Amounts, draw, sampler
from studies.digits.truth_models import Pool

REWARDS: dict[str, Reward] = {reward.name: reward for reward in (BoldReward(), InkReward())}

SEEDS = (0, 1)

LAMS = (0.25, 0.5, 0.75, 2.0)

TUNED = frozenset({("dpo", "bold"), ("weighted", "ink"), ("draft", "bold"), ("ddpo", "ink")})
"""The half of families and rewards on which thresholds may be chosen; all others are for judging."""


METHODS = {"dpo": "dpo", "weighted": "rwr", "draft": "draft", "ddpo": "ddpo"}
"""What `deradiff examine` calls the families."""


@dataclass(frozen=True)
class Plan(Amounts):
    """What is trained, and what is drawn to compare it: `images` of each of the ten prompts, by DDPM, guidance 1."""

    images: int = 40
    examined: int = 24
    """Images of each prompt that an anchor's kind is found from."""
    trainings: Trainings = field(default_factory=Trainings)


def quick() -> Plan:
    """A miniature that takes a minute and proves nothing: it tries whether everything runs."""
    trainings = Trainings(per_prompt=24, sampling_steps=2, held_out_pairs=8, held_out_samples=8, batch=8, ddpo_steps=2)
    short = {name: replace(getattr(trainings, name), steps=2, cosine=2, evaluate_every=1) for name in TRAIN}
    return Plan(trainings=replace(trainings, **short), images=8, examined=8, steps=3, batch=80)


def half(cell: Cell) -> str:
    """Whether a cell's thresholds are "tuned" on it, or "judged" by it."""
    return "tuned" if (cell.family, cell.reward) in TUNED else "judged"


def cells(family: str | None = None, reward: str | None = None, seed: int | None = None) -> list[Cell]:
    """All cells in the order in which they are run, or those of a family, a reward, a seed.

    Raises `ValueError` for a family, a reward or a seed that is none of the study's.
    """
    known: dict[str, tuple[object, list[Any]]] = {
        "family": (family, [*TRAIN]),
        "reward": (reward, [*REWARDS]),
        "seed": (seed, [*SEEDS]),
    }
    for name, (asked, there) in known.items():
        if asked is not None and asked not in there:
            raise ValueError(f"the study has no {name} {asked}: choose from {', '.join(map(str, there))}")
    return [
        Cell(f, r, s)
        for f in TRAIN
        for s in SEEDS
        for r in REWARDS
        if family in (None, f) and reward in (None, r) and seed in (None, s)
    ]


def strengths(cell: Cell) -> list[float | str]:
    """Every strength that a cell trains at: what is compared, its anchors', and the control of weighted training."""
    anchors = STRENGTHS[cell.family][cell.reward]
    found = {*anchors, *(anchor / lam for anchor in anchors for lam in LAMS)}
    return [*([CONTROL] if cell.family == "weighted" else []), *sorted(found, reverse=True)]


def run(out: Path, todo: Iterable[Cell], plan: Plan, report: Report) -> list[Path]:
    """Train and compare every cell that `out` does not hold yet; returns the files of all.

    Models lie in `out/models`, cells in `out/cells`. Raises `ValueError` where `out` holds a study of another plan.
    """
    begin_or_resume(out, asdict(plan), "study of learned models")
    models, files = out / "models", out / "cells"
    with taken(out, "a study of learned models"), reproducible(1):
        for folder in (models, files):
            folder.mkdir(exist_ok=True)
        todo = list(todo)
        for number, cell in enumerate(todo):
            file = files / f"{cell.name}.json"
            if not file.exists():
                learned_models.draw_pool(models, plan.trainings, report)
                pool = learned_models.load_pool(models, plan.trainings)
                for strength in strengths(cell):
                    learned_models.train(models, pool, cell, strength, plan.trainings, report)
                write_json(file, compute(models, cell, plan, pool, report))
            report("cells", number + 1, len(todo), cell.name)
    return [files / f"{cell.name}.json" for cell in todo]


# -- a cell -----------------------------------------------------------------------------------------------------------


def compute(models: Path, cell: Cell, plan: Plan, pool: Pool, report: Report) -> dict[str, Any]:
    """Draw by every model as it is and by Algorithm 1 from both anchors, and compare: plain data."""
    reward = REWARDS[cell.reward]
    groups = torch.arange(len(PROMPTS)).repeat_interleave(plan.images)
    names = strengths(cell)
    drawn: dict[float | str, Float[Tensor, " image"]] = {}
    start = base_of(models, cell)
    for number, name in enumerate(["reference", *(n for n in names if n != CONTROL)]):
        unet = start if name == "reference" else learned_models.merged(learned_models.folder_of(models, cell, name))
        images = draw(sampler(unet), PROMPTS, 1.0, plan)
        drawn[name] = reward(images, [""] * len(images))
        report(f"{cell.name}: models as they are", number + 1, len(names) + 1, str(name))
    cases, kinds = [], {}
    for anchor in STRENGTHS[cell.family][cell.reward]:
        unet = learned_models.merged(learned_models.folder_of(models, cell, anchor))
        character = examined(start, unet, cell, anchor, plan)
        kinds[str(anchor)] = character.words
        for lam in LAMS:
            scores, weights = realigned(start, unet, lam, plan, reward)
            cases.append(_case(anchor, lam, scores, weights, drawn, groups, cell.reward, character))
            report(f"{cell.name}: comparing", len(cases), len(LAMS) * 2, f"{anchor:g} at λ = {lam:g}")
    means = {str(name): list(contrast(values, None, None, None, groups)) for name, values in drawn.items()}
    curves = {str(name): learned_models.curve_of(models, cell, name) for name in names}
    told: dict[str, Any] = {"cell": asdict(cell), "half": half(cell), "plan": asdict(plan), "versions": versions()}
    if cell.family == "weighted":
        betas = [name for name in names if not isinstance(name, str)]
        shares = {str(beta): learned_models.effective_share(pool, cell.reward, beta) for beta in betas}
        told["effective shares of the samples"] = shares
    return {**told, "curves": curves, "means": means, "kinds": kinds, "cases": cases}


def examined(
    start: UNet2DConditionModel, anchor: UNet2DConditionModel, cell: Cell, strength: float, plan: Plan
) -> Character:
    """The kind of an anchor, as `deradiff examine` finds it from other images than those that are compared."""
    with TemporaryDirectory() as folder:
        reference, aligned = Path(folder) / "reference", Path(folder) / "anchor"
        sampler(start).save_pretrained(reference)
        anchor.save_pretrained(aligned)
        found = examine(
            str(reference),
            aligned,
            reward=REWARDS[cell.reward],
            aligned_by=METHODS[cell.family],
            anchor_beta=strength if cell.family == "dpo" else None,
            prompts=PROMPTS,
            images=plan.examined,
            seed=1000,
            steps=plan.steps,
        )
    return found.character


def base_of(models: Path, cell: Cell) -> UNet2DConditionModel:
    """What a family's models start from: the shipped reference, or the control of weighted training."""
    if cell.family != "weighted":
        return learned_models.reference().unet
    return learned_models.merged(learned_models.folder_of(models, cell, CONTROL))


def realigned(
    start: UNet2DConditionModel, anchor: UNet2DConditionModel, lam: Any, plan: Plan, reward: Reward
) -> tuple[Float[Tensor, " image"], ImportanceWeights]:
    """Rewards of Algorithm 1's pictures, and their weights."""
    pipe, runs = sampler(start), list[ImportanceWeights]()
    with realign(pipe, anchor, lam) as dial:
        images = draw(pipe, PROMPTS, 1.0, plan, lambda: runs.append(dial.importance_weights))
    return reward(images, [""] * len(images)), joined(runs)


def _case(
    anchor: float,
    lam: float,
    scores: Tensor,
    weights: ImportanceWeights,
    drawn: Mapping[float | str, Tensor],
    groups: Tensor,
    name: str,
    character: Character,
) -> dict[str, Any]:
    """One λ of one anchor beside the model trained at anchor/λ: estimates are `[value, standard error]`.

    Verdicts are those that presume a tilt, and those that go by what kind the anchor is.
    """
    retrained, before = drawn[anchor / lam], drawn["reference"]
    ratio = next(iter(weights.log_ratios.values()))
    claim, informed = (
        verdict(weights, scores, groups, baseline=float(before.mean()), name=name, character=kind)
        for kind in (None, character)
    )
    return {
        "anchor": anchor,
        "lam": lam,
        "shift": list(contrast(retrained, None, before, None, groups)),
        "algorithm 1": list(contrast(scores, None, retrained, None, groups)),
        "weighted": list(contrast(scores, weights.log_weights, retrained, None, groups)),
        "slope": covariance(ratio, scores, groups) / covariance(scores, scores, groups),
        "verdict": claim.record(),
        "verdict by kind": informed.record(),
    }


def contrast(
    scores: Float[Tensor, " image"],
    log_weights: Float[Tensor, " image"] | None,
    other: Float[Tensor, " image"] | None,
    other_weights: Float[Tensor, " image"] | None,
    groups: Int[Tensor, " image"],
) -> Estimate:
    """The (weighted) mean of `scores` less that of `other`, drawn from the same prompts and noise, pair by pair.

    Prompts are fixed, and images of each the sample: the standard error is that of the differences of their influences
    within prompts, a weighted mean's to first order.
    """
    value, variance = 0.0, 0.0
    for index in rows_of_groups(groups, len(scores)):
        share, n = len(index) / len(scores), len(index)
        influence = torch.zeros(n, dtype=torch.float64)
        for sign, values, logs in ((1, scores, log_weights), (-1, other, other_weights)):
            if values is None:
                continue
            x = values[index].double()
            w = normalized(torch.zeros(n) if logs is None else logs[index])
            centre = w @ x
            value += sign * share * float(centre)
            influence += sign * n * w * (x - centre)
        variance += share**2 * float(influence.square().sum() / (n * (n - 1)))
    return Estimate(value, variance**0.5)


# -- files ------------------------------------------------------------------------------------------------------------


class CaseRecord(Record):
    """A case of a cell, as it must be to be read."""

    anchor: float
    lam: float
    shift: list[float]
    slope: float
    verdict: dict[str, Any]
    by_kind: dict[str, Any] = Field(alias="verdict by kind")


class CellRecord(Record):
    """A cell's file, as it must be to be read."""

    cell: dict[str, Any]
    half: str
    cases: list[CaseRecord]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The cells in a folder by their names, in the study's order. Raises `ValueError` for a file that is no cell."""
    found = {}
    for cell in cells():
        file = folder / f"{cell.name}.json"
        if file.exists():
            read(CellRecord, file, "cell of a study", "run its cell again")
            found[cell.name] = read(dict[str, Any], file, "cell of a study", "run its cell again")
    return found
