"""What a study takes from experiments: their arms by name, a plan of all they hold, and the images themselves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deradiff.experiments import plan as experiments
from deradiff.experiments.running import contents, cut_prompts
from deradiff.experiments.store import Image, Store
from deradiff.files.records import slug
from deradiff.sampling.truncation import PromptCut
from deradiff.study.plan import TILES, Configuration, StudyImage, StudyPlan, parse_plan

LISTED = 30
"""Names that a message has room for."""

PAIRS = 20
"""Of a participant, where there are as many; about ten minutes."""


def drafted(folder: Path, methods: Sequence[str], beside: Path) -> StudyPlan:
    """A plan that compares arms of the experiment in `folder`: all of its prompts, each way of sampling by itself.

    Args:
        folder: of the experiment.
        methods: names of arms with commas between, in one text or several (`arms_named`).
        beside: the folder that the plan is written to.

    Warns of prompts that were cut when the images were drawn (`truncation.PromptCut`).

    Raises:
        StoreError: there is no experiment.
        ValueError: an arm that there is not, fewer than two of them, no prompts that all of them were drawn for with
            nine seeds, or an image that is missing.
    """
    with opened(folder) as (planned, store):
        arms = {(arm.name, arm.sampling): arm for arm in planned.arms()}
        names = arms_named(methods, [name for name, _ in arms])
        if len(names) < 2:
            raise ValueError(
                f"a study compares two methods or more, and --methods names {len(names)}: write two arms with a comma "
                f"between. The arms of {folder} are {_listed({name for name, _ in arms})}"
            )
        whole = contents(planned, store, fresh=False)
        texts = whole.texts
        for cut in cut_prompts(whole, store):
            warnings.warn(cut.words, PromptCut, stacklevel=2)
        shared = [
            (sampling, name)
            for sampling in planned.sampling
            for name in planned.prompts
            if all(name in planned.sets(arms[arm, sampling].prompts) for arm in names)
        ]
        enough = [(sampling, name) for sampling, name in shared if len(planned.prompts[name].seeds) >= TILES]
        if not enough:
            raise ValueError(_too_few(planned, names, shared))
        configurations = [
            {
                "name": name if len(planned.sampling) == 1 else f"{name}, {sampling}",
                "experiment": Path(os.path.relpath(folder, beside)).as_posix(),
                "sampling": sampling,
                "prompt_set": name,
                "methods": {arm: arm for arm in names},
                "seeds": list(planned.prompts[name].seeds),
                "prompts": list(texts[name]),
            }
            for sampling, name in enough
        ]
        name = f"{planned.name}-{slug(' '.join(names), 60)}"
    pairs = len(names) * (len(names) - 1) // 2 * sum(len(configuration["prompts"]) for configuration in configurations)
    count = min(PAIRS, pairs)
    plan = parse_plan(
        {
            "name": name,
            "pairs_per_participant": count,
            "attention_checks": min(2, count),
            "configurations": configurations,
        },
        f"what {folder} holds",
    )
    located(plan, beside)
    return plan


def arms_named(texts: Iterable[str], known: Collection[str]) -> list[str]:
    """Read names of arms with commas between. Names may hold commas themselves; the longest that there is counts.

    Raises `ValueError` where a piece begins no name.
    """
    named: dict[str, None] = {}
    for text in texts:
        pieces = text.split(",")
        while pieces:
            ends = [end for end in range(len(pieces), 0, -1) if ",".join(pieces[:end]).strip() in known]
            if not ends:
                raise ValueError(f"there is no arm {pieces[0].strip()!r}: the experiment has {_listed(known)}")
            named[",".join(pieces[: ends[0]]).strip()] = None
            pieces = pieces[ends[0] :]
    return list(named)


def located(plan: StudyPlan, beside: Path) -> dict[StudyImage, Image]:
    """Every image that the plan may show, by its place; `beside` is the folder of the plan.

    Raises:
        StoreError: a folder holds no experiment.
        ValueError: an arm, a prompt or a seed that the experiment does not have, or an image that is missing.
    """
    images: dict[StudyImage, Image] = {}
    for number, configuration in enumerate(plan.configurations):
        folder = beside / configuration.experiment
        with opened(folder) as (planned, store):
            items = _items(configuration, planned, store, folder)
            drawn, unmade = store.drawn(), store.unmade()
        wanted = {
            StudyImage(number, method, row, seed): items[arm, prompt, seed]
            for method, arm in configuration.methods.items()
            for row, prompt in enumerate(configuration.prompts)
            for seed in configuration.seeds
        }
        missing = [place for place, item in wanted.items() if item not in drawn or not drawn[item].path.is_file()]
        if missing:
            raise ValueError(_missing(configuration, missing, len(wanted), folder, unmade.get(wanted[missing[0]])))
        images |= {place: drawn[item] for place, item in wanted.items()}
    return images


@contextmanager
def opened(folder: Path) -> Iterator[tuple[experiments.Plan, Store]]:
    """The plan and the store of an experiment, to be read. Raises `StoreError` where there is none."""
    with Store(folder, write=False) as store:
        yield experiments.parse_plan(store.fact("plan"), f"the plan in {store.file}"), store


# -- helpers ----------------------------------------------------------------------------------------------------------


def _items(
    configuration: Configuration, planned: experiments.Plan, store: Store, folder: Path
) -> dict[tuple[str, str, int], str]:
    """The identity of every image that the configuration may name, by arm, prompt and seed."""
    cells = contents(planned, store, fresh=False).cells
    items = {
        (cell.arm.name, cell.drawing.prompt, cell.drawing.seed): item
        for cell, item in cells.items()
        if (cell.arm.sampling, cell.prompts) == (configuration.sampling, configuration.prompt_set)
    }
    arms, prompts, seeds = (dict.fromkeys(item[place] for item in items) for place in range(3))
    inside = f" for {configuration.prompt_set}"
    for wanted, known, lacks, end in (
        ([configuration.sampling], planned.sampling, "does not sample by", ""),
        ([configuration.prompt_set], planned.prompts, "has no prompt set", ""),
        (configuration.methods.values(), arms, "has no arm", inside),
        (configuration.prompts, prompts, "has no prompt", inside),
        (configuration.seeds, seeds, "was not drawn with seed", inside),
    ):
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(
                f"configuration {configuration.name!r}: the experiment in {folder} {lacks} {_listed(unknown)}{end}; it "
                f"has {_listed(known)}"
            )
    return items


def _missing(
    configuration: Configuration,
    missing: Sequence[StudyImage],
    wanted: int,
    folder: Path,
    metadata: Mapping[str, Any] | None,
) -> str:
    """`metadata` is what is known of the first image that is missing, if it was drawn and is none."""
    first = missing[0]
    which = (
        f"configuration {configuration.name!r}: {len(missing)} of {wanted} images are missing in {folder}, the first "
        f"is {first.method!r} for {configuration.prompts[first.prompt][:80]!r} with seed {first.seed}"
    )
    if metadata is None:
        return f"{which}: finish the experiment with `deradiff experiment run`, or leave these prompts or seeds out"
    why = "the pipeline's safety checker blacked it out" if metadata.get("blacked_out") else metadata["failed"]
    return f"{which}, which is no picture: {why}. Leave these prompts or seeds out"


def _too_few(planned: experiments.Plan, names: Sequence[str], shared: Sequence[tuple[str, str]]) -> str:
    if not shared:
        return f"{_listed(names)} were never drawn for the same prompts: add them to one prompt set, and run again"
    seeds: Mapping[str, int] = {name: len(planned.prompts[name].seeds) for _, name in shared}
    counted = ", ".join(f"{name} has {count}" for name, count in seeds.items())
    return (
        f'a grid shows {TILES} seeds of a prompt, and {counted}: give the prompts `seeds: "0:{TILES - 1}"` or more in '
        "the experiment's plan, and run it again"
    )


def _listed(names: Collection[object]) -> str:
    shown = [f"{name!r:.80}" for name in list(names)[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
