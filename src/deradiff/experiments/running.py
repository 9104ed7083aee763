"""Run a plan: draw what the store does not have, score what has no score. Interrupted at any time, it goes on."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from deradiff.experiments.characters import characters
from deradiff.experiments.drawings import PlannedImage, group_of, kind_of, planned_images
from deradiff.experiments.plan import Plan
from deradiff.experiments.sources import fingerprints, resolve, sources
from deradiff.experiments.store import Image, Missing, Store, StoreError
from deradiff.experiments.worker import Done, Draw, Score
from deradiff.files.records import versions
from deradiff.sampling.truncation import Cut, PromptCut
from deradiff.sweep.description import Drawing, metadata
from deradiff.sweep.fingerprints import Fingerprint
from deradiff.sweep.jobs import Report
from deradiff.sweep.workers import Executor, Todo, work

SCORED_TOGETHER = 64
"""Images that a scorer is given at a time."""


@dataclass
class Outcome:
    """What a run did."""

    drawn: int = 0
    lost: int = 0
    """Images that were gone or altered, and were drawn again."""
    scored: int = 0
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(score, image, error): what could not be scored or, with `store.IMAGE` for the score, not drawn."""
    blacked_out: int = 0
    """Images that a safety checker blacked out: they are no pictures, and have no scores."""
    cut: list[Cut] = field(default_factory=list)
    """What prompts lost to tokenizers."""
    seconds: float = 0.0
    busy: float = 0.0
    """Seconds that the workers spent in models and scorers, per worker."""

    @property
    def overhead(self) -> float:
        """The share of the time in which the average worker computed nothing."""
        return 1 - self.busy / self.seconds if self.seconds else 0.0


def identity(drawing: Drawing, schedule: str, plan: Plan, prints: dict[str, Any]) -> str:
    """The name of an image: a hash of everything that decides it, the models' weights rather than their names.

    `schedule` is the drawing's as the plan words it; empty for none.
    The device and the batch are left out: they decide the last bits, and would make every image another.
    """
    guidance = drawing.reward_guidance
    about = {
        "kind": kind_of(drawing),
        "reference": prints[""]["sha256"],
        "dtype": plan.dtype,
        "anchors": sorted((prints[name]["sha256"], lam) for name, lam in drawing.anchors),
        "schedule": schedule,
        "particles": drawing.particles,
        "noise": guidance and guidance.shown(),
        "pipeline": guidance and guidance.pipeline and prints[guidance.pipeline]["sha256"],
        "sampling": drawing.sampling.model_dump(),
        "prompt": drawing.prompt,
        "seed": drawing.seed,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Contents:
    """A plan with its prompts and weights made definite: which images it consists of."""

    plan: Plan
    texts: dict[str, tuple[str, ...]]
    cells: dict[PlannedImage, str]
    """Every cell of the experiment, and the identity of its image, which several cells may share."""

    @property
    def drawings(self) -> dict[str, Drawing]:
        """Every image by its identity."""
        return {item: cell.drawing for cell, item in self.cells.items()}


def contents(plan: Plan, store: Store, *, fresh: bool = True) -> Contents:
    """What `plan` consists of. Prompts are found once and stay in the store, as their lists on the hub may change.

    With `fresh` false the weights are those of the last run, and are not looked at.
    """
    texts = {
        name: _texts(
            wanted.model_dump(mode="json", exclude={"seeds", "substitute_for", "made_by"}),
            partial(resolve, wanted),
            store,
            fresh,
        )
        for name, wanted in plan.prompts.items()
    }
    prints = store.fact("fingerprints", dict[str, Fingerprint]) or {}
    if fresh:
        prints = fingerprints(plan, prints)
        store.remember("fingerprints", prints)
    elif unknown := sources(plan).keys() - prints.keys():
        raise StoreError(
            f"{store.file} does not know the weights of {sorted(unknown)[0] or 'the reference'} yet: begin with "
            "`deradiff experiment run`"
        )
    named: dict[PlannedImage, str] = {}
    for planned in planned_images(plan, texts):
        cell = planned._replace(drawing=by_weights(planned.drawing, plan, prints))
        schedule = cell.arm.schedule if cell.drawing.schedule is not None else ""
        named[cell] = identity(cell.drawing, schedule, plan, prints)
    return Contents(plan, texts, named)


def by_weights(drawing: Drawing, plan: Plan, prints: Mapping[str, Any]) -> Drawing:
    """The drawing with each model under the first name in the plan that has its weights.

    Two names of the same weights are one image, which is drawn once, in one batch.
    """
    names: dict[str, list[str]] = {}
    for name in plan.models:
        names.setdefault(prints[name]["sha256"], []).append(name)
    anchors = sorted(
        (names[weights].pop(0), lam) for weights, lam in sorted((prints[n]["sha256"], x) for n, x in drawing.anchors)
    )
    sources = tuple(plan.models[name].source for name, _ in anchors)
    return replace(drawing, anchors=tuple(anchors), sources=sources)


def _texts(wanted: dict[str, Any], find: Callable[[], tuple[str, ...]], store: Store, fresh: bool) -> tuple[str, ...]:
    name = f"prompts {hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()}"
    known = store.fact(name, list[str])
    if known is None:
        known = find()
        if fresh:
            store.remember(name, known)
    return tuple(known)


def in_batches(plan: Plan, cells: Sequence[tuple[PlannedImage, str]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Batches of the images: those of one group together, all λ of a prompt beside each other."""
    arms = {arm: number for number, arm in enumerate(plan.arms())}
    sets = {name: number for number, name in enumerate(plan.prompts)}
    groups: dict[Any, dict[str, Drawing]] = {}
    for cell, item in sorted(cells, key=lambda it: (sets[it[0].prompts], it[0].row, it[0].column, arms[it[0].arm])):
        groups.setdefault(group_of(cell.drawing), {})[item] = cell.drawing
    for group in groups.values():
        size = max(1, plan.batch_size // max(1, next(iter(group.values())).particles))
        rows = [(item, metadata(drawing)) for item, drawing in group.items()]
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def run(
    plan: Plan,
    folder: Path,
    make_executor: Callable[[], Executor],
    report: Report,
    *,
    about: Mapping[str, Any] | None = None,
    thoroughly: bool = False,
    again: bool = False,
) -> Outcome:
    """Draw and score what the store in `folder` lacks, and say what was done.

    Args:
        plan: what is wanted. It may be another than that of the last run: what both want is there.
        folder: made where there is none.
        make_executor: makes the workers, once there is work for them.
        report: told of progress.
        about: what the workers are, such as their device: it stands in the record of everything they make.
        thoroughly: read all images that are there, instead of trusting the size and time of their files.
        again: try once more what could not be drawn or scored.

    An image that is NaN, infinite or blacked out is kept as a failure, and the others go on. Warns of prompts that were
    cut (`truncation.PromptCut`), and of what workers were warned of. Raises `StoreError`, `ValueError` for a character
    of other weights, before anything is drawn, and whatever a model raises; all that was done until then stays.
    """
    outcome, began = Outcome(), time.perf_counter()
    made: list[Executor] = []

    def executor() -> Executor:
        if not made:
            made.append(make_executor())
        return made[0]

    with Store(folder, create=True) as store:
        try:
            store.remember("plan", plan.model_dump(mode="json"))
            whole = contents(plan, store)
            prints = store.fact("fingerprints", dict[str, Fingerprint]) or {}
            store.remember("characters", characters(plan, prints))
            store.begin({"versions": versions(), "plan": plan.name, **(about or {})})
            outcome.lost += len(set(store.check(thoroughly)) & set(whole.drawings))
            tried = {} if again else store.unmade()
            while True:
                _draw(whole, store, executor, report, outcome, tried)
                tried = store.unmade()
                lost = _score(whole, store, executor, report, outcome, again)
                if not lost:
                    break
                outcome.lost += lost
            outcome.failures = store.failures()
            outcome.blacked_out = len(blacked_out(whole, store))
            outcome.cut = cut_prompts(whole, store)
            if made:
                outcome.busy /= executor().size
        finally:
            for workers in made:
                workers.close()
    for cut in outcome.cut:
        warnings.warn(cut.words, PromptCut, stacklevel=2)
    outcome.seconds = time.perf_counter() - began
    return outcome


def blacked_out(whole: Contents, store: Store) -> set[str]:
    """The images in place of which a safety checker put black ones."""
    return {item for item, why in store.unmade().items() if why.get("blacked_out")} & whole.drawings.keys()


def cut_prompts(whole: Contents, store: Store) -> list[Cut]:
    """What the prompts of the images that are there lost to tokenizers, each once."""
    planned = whole.drawings.keys()
    known = [diagnostics for item, (diagnostics, _, _) in store.diagnostics().items() if item in planned]
    kept = [cut for diagnostics in known for cut in diagnostics.get("cut_prompts", ())]
    return list(dict.fromkeys(Cut(**cut | {"tokenizers": tuple(cut["tokenizers"])}) for cut in kept))


def _draw(
    whole: Contents,
    store: Store,
    executor: Callable[[], Executor],
    report: Report,
    outcome: Outcome,
    tried: Collection[str],
) -> None:
    """Draw what is not there, but for what was `tried` and came to nothing."""
    drawings = whole.drawings
    # Whoever shares a batch with an image decides its last bits, so a batch is drawn again as a whole. That cannot be
    # where the plan no longer has them all.
    stale = [
        item
        for members in store.batches().values()
        for item, drawn in members
        if not drawn and not drawings.keys() >= {item for item, _ in members}
    ]
    store.unbatch(stale)
    tried = set(tried) - set(stale)
    known = store.known()
    store.add_batches(in_batches(whole.plan, [(cell, item) for cell, item in whole.cells.items() if item not in known]))
    batches = {
        number: members
        for number, members in store.batches().items()
        if any(not drawn and item in drawings and item not in tried for item, drawn in members)
    }
    planned, done = len(drawings), len(drawings.keys() & (store.drawn().keys() | tried))
    if not batches:
        return
    report("drawing", done, planned, "")
    todos = []
    for number, members in batches.items():
        wanted = tuple(place for place, (item, drawn) in enumerate(members) if not drawn and item not in tried)
        whole_batch = Draw(number, tuple(drawings[item] for item, _ in members), wanted)
        todos.append(Todo(whole_batch.group, partial(lambda task: task, whole_batch)))
    for task, result in work(todos, executor()):
        assert isinstance(task, Draw)
        _warn(result)
        names = [batches[task.number][place][0] for place in task.wanted]
        store.put([(name, *drawn) for name, drawn in zip(names, result.results, strict=True)], result.seconds)
        outcome.busy += result.seconds
        outcome.drawn += sum(png is not None for png, _ in result.results)
        done += len(names)
        report("drawing", done, planned, "")


def _warn(result: Done) -> None:
    for line, category in result.warned:
        warnings.warn(line, category, stacklevel=2)


def _score(
    whole: Contents, store: Store, executor: Callable[[], Executor], report: Report, outcome: Outcome, again: bool
) -> int:
    """Score what has no score yet; the number of images that turned out to be gone."""
    drawings, images = whole.drawings, store.drawn()
    there = [item for item in drawings if item in images]
    lost: set[str] = set()
    wanted = [("scores", name) for name in whole.plan.scores] + [("features", name) for name in whole.plan.features]
    todos: list[Todo] = []
    planned = 0
    for table, name in wanted:
        items = store.unscored(table, name, there, again)
        planned += len(items)
        for start in range(0, len(items), SCORED_TOGETHER):
            some = [images[item] for item in items[start : start + SCORED_TOGETHER]]
            todos.append(Todo((table, name), partial(_loaded, table, name, some, drawings, lost)))
    if not todos:
        return 0
    done = 0
    for task, result in work(todos, executor()):
        assert isinstance(task, Score)
        _warn(result)
        pairs: Iterable[tuple[Image, tuple[Any, str | None]]] = zip(task.token, result.results, strict=True)
        store.put_scores(task.table, task.name, [(image, *score) for image, score in pairs])
        outcome.busy += result.seconds
        outcome.scored += len(task.token)
        done += len(task.token)
        report("scoring", done, planned, task.name)
    store.forget(lost)
    return len(lost)


def _loaded(table: str, name: str, images: Sequence[Image], drawings: dict[str, Drawing], lost: set[str]) -> Score:
    """The task of scoring these images, without those that are not what was drawn: they go to `lost`."""
    whole: dict[Image, bytes] = {}
    for image in images:
        try:
            whole[image] = image.read()
        except Missing:
            lost.add(image.id)
    return Score(table, name, tuple(whole.values()), tuple(drawings[image.id].prompt for image in whole), tuple(whole))


__all__ = ["Contents", "Done", "Outcome", "contents", "identity", "in_batches", "run"]
