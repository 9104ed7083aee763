"""What a plan names, made definite: which prompts, and which weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deradiff.alignment.prompts import PICKAPIC, load_prompts
from deradiff.experiments.plan import Plan, Prompts
from deradiff.sweep.fingerprints import fingerprint
from deradiff.worlds import ShippedWorld, find


def resolve(wanted: Prompts) -> tuple[str, ...]:
    """The prompts of a set. Raises what `load_prompts` raises, and `ValueError` where there are fewer than `count`."""
    if wanted.prompts:
        return wanted.prompts
    files = (wanted.source,) if isinstance(wanted.source, str) else wanted.source or ()
    split = None if wanted.split == "train" else wanted.split  # which is what there is by default
    if len(files) == 1 and (world := find(files[0])):
        if split is not None:
            raise ValueError(f"{world.title} have no splits, of which {split!r} was asked for: leave split out")
        return _of_world(world, wanted.count or 100, wanted.draw_seed or 0)
    if len(files) == 1:
        return load_prompts(files[0], wanted.count, wanted.draw_seed, split=split).prompts
    lists = [load_prompts(source, split=split if source in PICKAPIC else None) for source in files]
    union = dict.fromkeys(text for prompts in lists for text in prompts.prompts)
    return _drawn(list(union), wanted, " and ".join(files))


def _drawn(prompts: list[str], wanted: Prompts, source: str) -> tuple[str, ...]:
    """So many of the prompts: the first, or drawn with the seed."""
    import random

    count = len(prompts) if wanted.count is None else wanted.count
    if count > len(prompts):
        raise ValueError(f"{source} hold {len(prompts)} different prompts, {count} were asked for")
    if wanted.draw_seed is None:
        return tuple(prompts[:count])
    return tuple(random.Random(wanted.draw_seed).sample(prompts, count))


def _of_world(world: ShippedWorld, count: int, seed: int) -> tuple[str, ...]:
    """Different prompts of a world; there may be so few that drawing them at random repeats some."""
    prompts = tuple(dict.fromkeys(world.sample_prompts(20 * min(count, 1000), seed)))[:count]
    if len(prompts) < count:
        raise ValueError(f"{world.title} have fewer than {count} different prompts: {len(prompts)} were found")
    return prompts


def fingerprints(plan: Plan, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of the reference and every model: a hash of its weights, and the state of the files that it was computed from.

    `known` is an earlier answer: files that have the size and time they had then are not read again. Raises `OSError`
    for a source that is neither a file, a folder nor a hub id that can be reached, `ValueError` for a revision of one
    that is on this machine.
    """
    return {
        name: fingerprint(source, revision, (known or {}).get(name))
        for name, (source, revision) in sources(plan).items()
    }


def sources(plan: Plan) -> dict[str, tuple[str, str | None]]:
    """The source and the revision of all that a plan draws with: of models by their names, of the reference by ""."""
    models: dict[str, tuple[str, str | None]] = {name: (model.source, None) for name, model in plan.models.items()}
    guidances = [arm.reward_guidance for arm in plan.arms() if arm.reward_guidance is not None]
    pipelines = [guidance.pipeline for guidance in guidances if guidance.pipeline]
    return {"": (plan.reference, plan.revision)} | models | {source: (source, None) for source in pipelines}
