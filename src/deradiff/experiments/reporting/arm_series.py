"""The arms of an experiment as the series of its trade-offs: one method, one anchor, one parameter that grows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from deradiff.experiments.drawings import drawing_of
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.results import Results
from deradiff.files.records import slug
from deradiff.measures import paired_difference
from deradiff.sweep.description import Drawing

ByPrompt: TypeAlias = Float[np.ndarray, " prompt"]

FEW = 3
"""As many anchors of one method have a place in a legend each."""


@dataclass(frozen=True)
class Series:
    """Arms that differ by one parameter, in the order in which it grows."""

    kind: str
    """How it is drawn: the method, or "particles"."""
    label: str
    """In the legend; series may share it."""
    variant: int
    """Which series of its kind it is, from 0: what its line is drawn by."""
    look: int
    """The same where its label is its own, else 0: what its markers are drawn by."""
    arms: tuple[Arm, ...]
    connected: bool
    """Whether a line through the arms means anything."""


def kind_of(arm: Arm) -> str:
    """Its method; particles apart from Algorithm 1."""
    return "particles" if arm.particles else arm.method


def arms_on(results: Results, *prompts: str) -> list[Arm]:
    """The arms that are drawn for all of these prompt sets."""
    return [arm for arm in results.arms if {*prompts} <= {*results.plan.sets(arm.prompts)}]


def distinct(results: Results, *prompts: str) -> list[Arm]:
    """Those without the ones that draw the images of another, as λ = 0 and λ = 1 do; models as they are stay."""
    arms = arms_on(results, *prompts)
    kept: dict[Drawing, Arm] = {}
    for arm in sorted(arms, key=lambda arm: arm.method not in ("reference", "model")):
        kept.setdefault(drawing(results, arm), arm)
    return [arm for arm in arms if kept[drawing(results, arm)] is arm]


def is_about(plan: Plan, models: Iterable[str], score: str) -> bool:
    """Whether a front of `score` is about these models: where some were aligned for it, not about those for others."""
    rewards = {plan.models[name].reward for name in models}
    return rewards <= {score, ""} or score not in {model.reward for model in plan.models.values()}


def aimed_at(plan: Plan) -> list[str]:
    """The scores that models were aligned for; the first where the plan does not say."""
    rewards = {model.reward for model in plan.models.values()}
    return [score for score in plan.scores if score in rewards] or list(plan.scores[:1])


def drawing(results: Results, arm: Arm) -> Drawing:
    """What an arm draws, whatever the plan calls it: the same for arms with the same images."""
    return drawing_of(results.plan, arm, "", 0)


def series_of(results: Results) -> list[Series]:
    """Every arm but the reference: models by family, others by anchor."""
    plan = results.plan
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for arm in results.arms:
        if arm.method == "model":
            groups.setdefault(("model", plan.models[arm.anchors[0][0]].family), []).append(arm)
        elif arm.method != "reference":
            names = arm.anchors[0][0] if len(arm.anchors) == 1 else ""
            groups.setdefault((kind_of(arm), names, arm.schedule.partition(":")[0]), []).append(arm)
    series: list[Series] = []
    for (kind, of, *_), arms in groups.items():
        siblings = sorted({key[1] for key in groups if key[0] == kind})
        arms.sort(key=lambda arm: _parameter(plan, arm))
        variant = sum(earlier.kind == kind for earlier in series)
        look = siblings.index(of) if len(siblings) <= FEW or kind == "model" else 0
        series.append(
            Series(
                kind,
                _label(plan, kind, of, len(siblings)),
                variant,
                look,
                tuple(arms),
                kind in ("realign", "anneal", "interpolate") or all(_strength(plan, arm) for arm in arms),
            )
        )
    return series


def model_label(plan: Plan, name: str) -> str:
    """`β = 500` where that names one model, else the plan's name."""
    beta = plan.models[name].beta
    return name if beta is None or [m.beta for m in plan.models.values()].count(beta) > 1 else f"β = {beta:g}"


def short_label(plan: Plan, arm: Arm) -> str:
    """What tells an arm from the others of its series."""
    if arm.method == "model":
        return model_label(plan, arm.anchors[0][0])
    if arm.schedule:
        return arm.schedule.replace(":", " ")
    return arm.name if arm.lam is None else f"λ = {arm.lam:.3g}"


def short(name: str) -> str:
    """A score or an extractor without the folder of its weights."""
    return name.partition("=")[0]


def keys(names: Sequence[str]) -> dict[str, str]:
    """Names as parts of file names, each another."""
    parts: dict[str, str] = {}
    for name in names:
        part = slug(short(name))
        number = sum(known.partition(".")[0] == part for known in parts.values())
        parts[name] = f"{part}.{number + 1}" if number else part
    return parts


def substitutes(plan: Plan, names: Sequence[str]) -> str:
    """The sentence of a caption that says which prompts are not the papers' own; empty where all are."""
    notes = [f"{name} stands for {text}" for name in names if (text := plan.prompts[name].substitute_for)]
    return f" Substituted prompts: {'; '.join(notes)}." if notes else ""


# -- numbers ----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A mean score minus the reference's, with the ends of its 95% interval, over so many prompts."""

    value: float
    low: float
    high: float
    prompts: int

    @property
    def cells(self) -> dict[str, Any]:
        """The cells of a table, by column."""
        columns = ("difference to the reference", "95% from", "95% to", "prompts (n)")
        return dict(zip(columns, self, strict=True))


def change(results: Results, by_prompt: ByPrompt, prompts: str, score: str) -> Change | None:
    """How far scores (one for each prompt) are from the reference's: a paired bootstrap over the prompts of both.

    None where there is no reference, or fewer than 2 prompts have both.
    """
    if results.reference is None:
        return None
    known = results.by_prompt(results.reference, prompts, score)
    both = np.isfinite(by_prompt) & np.isfinite(known)
    if both.sum() < 2:
        return None
    difference = paired_difference(torch.from_numpy(by_prompt[both, None]), torch.from_numpy(known[both, None]))
    return Change(difference.estimate.value, *difference.interval, difference.prompts)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _label(plan: Plan, kind: str, of: str, siblings: int) -> str:
    if kind == "model":
        return f"{of}, as aligned"
    method = {
        "realign": "realigned (DeRaDiff)",
        "particles": "realigned by particles",
        "anneal": "annealed guidance (AIG)",
        "interpolate": "interpolated weights",
        "combine": "combined rewards",
        "soup": "rewarded soups",
        "db-mpa-ls": "models by turns (DB-MPA-LS)",
        "optimize-noise": "optimised noise",
        "doodl": "reversible noise (DOODL)",
        "das": "reward particles (DAS)",
        "tds": "reward particles (TDS)",
        "fk-steering": "reward particles, no gradient",
        "mpgd": "manifold guidance (MPGD)",
    }[kind]
    return f"{method}, {model_label(plan, of)}" if of and 1 < siblings <= FEW else method


def _strength(plan: Plan, arm: Arm) -> float:
    """1/β of a model as it is, 0 where it has none."""
    beta = plan.models[arm.anchors[0][0]].beta if arm.method == "model" else None
    return 1 / beta if beta else 0.0


def _parameter(plan: Plan, arm: Arm) -> tuple[float, float]:
    """What arms of a series are sorted by: the schedule's number, then λ or 1/β."""
    number = arm.schedule.partition(":")[2]
    grows = float(number) if re.fullmatch(r"\d+(\.\d+)?", number) else 0.0
    return grows, _strength(plan, arm) if arm.method == "model" else arm.lam or 0.0
