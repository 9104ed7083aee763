"""The files of the comparison on the digits, as they must be to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deradiff.files.reading import Record, fit, read

CURE = "delete it, and it is computed again"


class Measured(Record):
    """A value and its standard error."""

    value: float
    error: float


class ModelRecord(Record):
    """What one way of sampling was measured to be."""

    bold: Measured
    ink: Measured
    inks: dict[str, Measured]
    by_prompt: dict[str, list[float]]


class _CaseWords(Record):
    family: str
    target: dict[str, float]
    guidance_scale: float


class _Judged(Record):
    kind: str
    words: str


class _Errors(Record):
    shift: Measured
    gaps: dict[str, Measured]


class TruthCaseRecord(Record):
    """One target, sampled in every way, beside the retrained model."""

    case: _CaseWords
    arms: dict[str, ModelRecord]
    verdicts: dict[str, _Judged]
    errors: dict[str, _Errors]


class _Reached(Record):
    reference: Measured
    model: Measured


class _Tilted(Record):
    reference: Measured
    tilted: Measured


class TrainedRecord(Record):
    """The `truth.json` of a trained model."""

    family: str
    λ: dict[str, float]
    reached: dict[str, _Reached]
    mean_rewards: dict[str, _Tilted] | None = None


def model(file: Path, rewards: set[str], prompts: int) -> dict[str, Any]:
    """A measured model. Raises `ValueError` unless it is whole."""
    content = read(dict[str, Any], file, "measured model", CURE)
    found = fit(ModelRecord, content, str(file), "measured model", CURE)
    if {name: len(values) for name, values in found.by_prompt.items()} != dict.fromkeys(rewards, prompts):
        raise ValueError(f"{file} is no measured model of {prompts} prompts: {CURE}")
    return content


def case(file: Path, arms: set[str], targets: set[str]) -> dict[str, Any]:
    """A compared case. Raises `ValueError` unless it is whole."""
    content = read(dict[str, Any], file, "case of a comparison", CURE)
    found = fit(TruthCaseRecord, content, str(file), "case of a comparison", CURE)
    of_target = [of for held in (found.verdicts, found.errors) for of in targets - held.keys()]
    gaps = [name for errors in found.errors.values() for name in ("algorithm 1", "weighted") if name not in errors.gaps]
    if lacking := [*(arms - found.arms.keys()), *of_target, *gaps]:
        raise ValueError(f"{file} is no whole case of a comparison: it lacks {', '.join(sorted(lacking))}: {CURE}")
    return content


def trained(file: Path, rewards: set[str]) -> dict[str, Any]:
    """What a trained model was to reach and reached. Raises `ValueError` unless it is whole."""
    what, cure = "record of a trained model", "delete its folder, and it is trained again"
    content = read(dict[str, Any], file, what, cure)
    found = fit(TrainedRecord, content, str(file), what, cure)
    if lacking := (rewards | found.λ.keys()) - found.reached.keys():
        raise ValueError(f"{file} is no whole {what}: it lacks what {', '.join(sorted(lacking))} reached: {cure}")
    return content
