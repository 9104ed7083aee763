"""What kind of anchor each model of a plan is: read from the files that the plan names, refused for other weights."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deradiff.experiments.arms import Model
from deradiff.experiments.plan import Plan
from deradiff.files.hub import cached
from deradiff.sweep.characters import CharacterFile, belonging, read_character
from deradiff.sweep.description import call_of
from deradiff.sweep.fingerprints import fingerprint
from deradiff.sweep.pipelines import SCHEDULERS
from deradiff.worlds import find, find_anchor


def examined(plan: Plan) -> Iterator[tuple[str, Model]]:
    """The models whose character the plan names, by their names."""
    yield from ((name, model) for name, model in plan.models.items() if model.character)


def characters(plan: Plan, prints: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The characters of a plan's models, by their names, as plain data for the store.

    `prints` are the hashes of all weights (`sources.fingerprints`). Raises `FileNotFoundError` for a file that is not
    there, and `ValueError` for one that is no character, or of other weights.
    """
    held = {}
    for name, model in examined(plan):
        present = {
            "reference": (plan.reference, prints[""]["sha256"]),
            "anchor": (model.source, prints[name]["sha256"]),
        }
        held[name] = _checked(model, present).model_dump(mode="json")
    return held


def sampler(plan: Plan, sampling: str) -> tuple[str | None, float | None]:
    """The scheduler's class and the guidance scale of a way of sampling; None for what is the pipeline's own."""
    chosen = plan.sampling[sampling]
    scheduler = None if chosen.scheduler is None else SCHEDULERS[chosen.scheduler][0]
    return scheduler, call_of(chosen, plan.reference).get("guidance_scale")


# -- before a run -----------------------------------------------------------------------------------------------------


def missing(plan: Plan, model: Model) -> str:
    """Why a model's character cannot be had or taken; empty where it can.

    Weights that are here are read, for their hash; of those in the hub's cache the commit tells.
    """
    try:
        named = {"reference": (plan.reference, plan.revision), "anchor": (model.source, None)}
        here = {role: (source, _hash_here(source, revision)) for role, (source, revision) in named.items()}
        _checked(model, {role: (source, sha256) for role, (source, sha256) in here.items() if sha256 is not None})
    except FileNotFoundError:
        prompts = "" if find(plan.reference) else ", with a dozen --prompts such as it is to be used with"
        return f"is no file here: examine the anchor{prompts}"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def examination(plan: Plan, model: Model) -> str:
    """The command that writes a model's character."""
    options = [*(["--reward", model.reward] if model.reward else [])]
    options += ["--revision", plan.revision] if plan.revision else []
    options += ["--out", model.character, *(["--force"] if Path(model.character).exists() else [])]
    return shlex.join(["deradiff", "examine", plan.reference, "--anchor", model.source, *options])


def _checked(model: Model, present: Mapping[str, tuple[str, str]]) -> CharacterFile:
    held = read_character(model.character)
    belonging(held, model.character, present)
    return held


def _hash_here(source: str, revision: str | None) -> str | None:
    """The hash of a source's weights; None where they are not here, so that nothing has to be asked of the hub."""
    if find(source) or find_anchor(source) or Path(source).exists():
        return str(fingerprint(source, revision)["sha256"])
    folder = cached(source, "model", revision)
    return None if folder is None else folder.name
