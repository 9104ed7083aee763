"""A search from begin to end in one folder: images, scores, the answer, its figure and its pictures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.reporting.picture_sheets import filled
from deradiff.experiments.results import Results
from deradiff.experiments.store import DAMAGED, Store, StoreError
from deradiff.files.images import read_rgb
from deradiff.files.outputs import replaced
from deradiff.files.reading import Record
from deradiff.files.records import versions, write_png
from deradiff.files.writing import write_json
from deradiff.search import figures
from deradiff.search.answers import Best, Front
from deradiff.search.checks import Check, check, nothing_to_check
from deradiff.search.evaluation import PointEvaluator
from deradiff.search.goals import Goal, Tables
from deradiff.search.knees import Knee
from deradiff.search.loop import FRACTION, PointRefused, SearchState, maximise
from deradiff.search.spaces import Point, SearchSpace
from deradiff.sweep.jobs import Report
from deradiff.sweep.sheets import contact_sheet
from deradiff.sweep.workers import Executor

SHOWN = 6
"""Prompts on the sheet, and points of a front."""

FACT = "search"
"""Under which the store remembers how far a search has come."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found, and where it is written down."""

    answer: Best | Front | Knee
    checks: dict[Point, Check]
    """Of the winner, or of every point of the front; none where no knee was found."""
    refused: dict[Point, str]
    """Points that could not be used, and why."""
    verdict: dict[str, Any] | None
    """How far the winner's score can be trusted (`verdict.Verdict.record`); None where there are no weights."""
    left_out: int
    """Images that are left out everywhere, since a score of theirs failed somewhere."""
    files: list[Path] = field(default_factory=list)


def run(
    plan: Plan,
    space: SearchSpace,
    goal: Goal,
    folder: Path,
    make_executor: Callable[[], Executor],
    report: Report,
    *,
    budget: int = 8,
    seed: int = 0,
    fraction: float = FRACTION,
    prompts: str | None = None,
    weighted: bool = False,
    nearby: float | None = None,
    about: Mapping[str, Any] | None = None,
    on_evaluation: Callable[[SearchState], None] | None = None,
) -> SearchOutcome:
    """Search `space` by an experiment in `folder`, which goes on where it was interrupted.

    The plan gives models, prompts, sampling, scores and features; its scores that the goal does not name are held out
    and checked at the winner. Every point is an arm of the experiment, so that nothing is drawn twice and
    `deradiff experiment report` shows all of it. The winner is drawn in the end if no evaluation was there.

    Args:
        plan: see `experiments.plan`; its own methods are drawn as well.
        space: what is searched.
        goal: what is wanted.
        folder: of the experiment, made where there is none; takes `search.json`, `search.png` and `sheet.png`.
        make_executor: makes the workers (`experiments.executors`).
        report: told of progress in drawing and scoring.
        budget: evaluations, see `loop.maximise`, as `seed` and `fraction`.
        prompts: the prompt set to search on; the first by default.
        weighted: search the retrained model's score, by importance weights, instead of Algorithm 1's own.
        nearby: of a weighted search along one λ: also use scores this much below and above every point, estimated from
            the same images.
        about: what the workers are, such as their device, for the record of every image.
        on_evaluation: told of the search's state after every evaluation.

    Raises what `loop.maximise`, `evaluation.PointEvaluator` and `experiments.running.run` raise.
    """
    state = SearchState()
    with PointEvaluator(
        plan,
        space,
        folder,
        make_executor,
        report,
        goal.names,
        prompts=prompts,
        weighted=weighted,
        nearby=nearby,
        about=about,
    ) as evaluator:
        identity = _identity(evaluator, seed)
        _resume(evaluator, identity)

        def evaluate(points: Sequence[Point]) -> Tables:
            _remember(evaluator, identity, points)
            try:
                return evaluator(points)
            except PointRefused:
                _remember(evaluator, identity, (), points[-1])
                raise

        answer = maximise(
            space, goal, evaluate, budget=budget, seed=seed, fraction=fraction, state=state, report=on_evaluation
        )
        winners = _winners(answer)
        _remember(evaluator, identity, winners)
        results = evaluator.drawn(list(dict.fromkeys([*state.points, *winners])))
        reference = evaluator.reference(results)
        checks = {point: _checked(evaluator, space, goal, results, reference, point) for point in winners}
        verdict = _verdict(evaluator, goal, results, winners)
        outcome = SearchOutcome(answer, checks, state.refused, verdict, evaluator.left_out)
        outcome.files.extend(_written(folder, evaluator, goal, state, outcome, results, seed))
    return outcome


def _winners(answer: Best | Front | Knee) -> list[Point]:
    """The points that an answer names."""
    if isinstance(answer, Front):
        return [member.point for member in answer.points]
    return [] if answer.point is None else [answer.point]


def _checked(
    evaluator: PointEvaluator, space: SearchSpace, goal: Goal, results: Results, reference: Arm, point: Point
) -> Check:
    """What held-out scores say of a winner; of the reference itself there is nothing to say."""
    if not any(point) and space.kind in ("lam", "lams"):
        return nothing_to_check()
    return check(results, reference, space.arm(results.plan, point), evaluator.prompts, goal)


def _verdict(
    evaluator: PointEvaluator, goal: Goal, results: Results, winners: Sequence[Point]
) -> dict[str, Any] | None:
    """How far the best point's first score is from the retrained model's."""
    name = goal.objectives[0].terms[0][0]
    if len(goal.objectives) > 1 or not winners or name not in goal.scores:
        return None
    verdict = results.verdict(evaluator.space.arm(results.plan, winners[0]), evaluator.prompts, name)
    return None if verdict is None else verdict.record()


# -- going on ---------------------------------------------------------------------------------------------------------


def _identity(evaluator: PointEvaluator, seed: int) -> str:
    """What decides which images a search draws and in which batches."""
    decides = [evaluator.plan.model_dump(mode="json"), asdict(evaluator.space), evaluator.prompts, seed]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _remember(evaluator: PointEvaluator, identity: str, points: Sequence[Point], refused: Point | None = None) -> None:
    """Write down which points are drawn, before they are."""
    with Store(evaluator.folder, create=True) as store:
        known = _known(store, evaluator, identity)
        now = [point for point in dict.fromkeys([*known, *points]) if point != refused]
        if now != known:
            store.remember(FACT, {"identity": identity, "points": now})


class _SearchRecord(Record):
    identity: str
    points: list[list[float]]


def _known(store: Store, evaluator: PointEvaluator, identity: str) -> list[Point]:
    """The points that this search has drawn so far, or had begun to."""
    saved = store.fact(FACT, _SearchRecord)
    if not saved or saved["identity"] != identity:
        return []
    points = [tuple(point) for point in saved["points"]]
    if any(len(point) != len(evaluator.space.coordinates) or not all(map(math.isfinite, point)) for point in points):
        raise StoreError(f"the fact {FACT!r} in {store.file} holds points of another space: {DAMAGED}")
    return points


def _resume(evaluator: PointEvaluator, identity: str) -> None:
    """Make whole what this search has drawn so far, all of it at once.

    Images that shared a batch are drawn in it again, so that a resumed search sees the same images to the last bit.
    """
    if not (evaluator.folder / "store.sqlite").exists():
        return
    with Store(evaluator.folder, write=False) as store:
        points = _known(store, evaluator, identity)
    if points:
        with suppress(PointRefused):  # it broke off at such a point, and will meet it again
            evaluator.run(evaluator.planned(points))


# -- what is written --------------------------------------------------------------------------------------------------


def _written(
    folder: Path,
    evaluator: PointEvaluator,
    goal: Goal,
    state: SearchState,
    outcome: SearchOutcome,
    results: Results,
    seed: int,
) -> list[Path]:
    """The record, the figure and the sheet."""
    names = ["search.png", "sheet.png", "search.json"]
    about = record(evaluator, goal, outcome, seed)
    with replaced(folder, "search", names) as inside:
        figures.draw(evaluator.space, goal, state, outcome.answer, inside / names[0])
        write_png(inside / names[1], _sheet(evaluator, outcome, results), about)
        write_json(inside / names[2], about)
    return [folder / name for name in names]


def record(evaluator: PointEvaluator, goal: Goal, outcome: SearchOutcome, seed: int) -> dict[str, Any]:
    """Everything about a search that is not in the store, as plain data."""
    space = evaluator.space
    return {
        "space": {"kind": space.kind, "anchors": space.anchors, "simplex": space.simplex, "places": space.places}
        | {"coordinates": [asdict(coordinate) for coordinate in space.coordinates]},
        "objectives": [str(objective) for objective in goal.objectives],
        "knee": goal.knee,
        "conditions": [condition.text for condition in goal.constraints],
        "weighted": evaluator.weighted,
        "nearby": evaluator.nearby,
        "seed": seed,
        "answer": asdict(outcome.answer),
        "checks": [
            {"point": point, "compared": [asdict(number) for number in checked.compared], "words": checked.sentence}
            for point, checked in outcome.checks.items()
        ],
        "refused": [{"point": point, "why": why} for point, why in outcome.refused.items()],
        "verdict": outcome.verdict,
        "left_out": outcome.left_out,
        "versions": versions(),
    }


def _sheet(evaluator: PointEvaluator, outcome: SearchOutcome, results: Results) -> Image.Image:
    """The first prompts by the reference, the winners and the anchors."""
    space, plan = evaluator.space, results.plan
    columns: dict[str, Arm] = {"reference": evaluator.reference(results)}
    words = {Best: "best", Front: "on the front", Knee: "before the knee"}[type(outcome.answer)]
    for point in list(outcome.checks)[:SHOWN]:
        columns[f"{space.text(point)}\n{words}"] = space.arm(plan, point)
    for point, name in zip(space.alone(), space.anchors, strict=False):
        if point in [evaluation.point for evaluation in outcome.answer.evaluations] and point not in outcome.checks:
            columns[f"{name}\nλ = 1"] = space.arm(plan, point)
    texts = results.contents.texts[evaluator.prompts][:SHOWN]
    rows = [[_opened(results, arm, evaluator.prompts, row) for arm in columns.values()] for row in range(len(texts))]
    seeds = plan.prompts[evaluator.prompts].seeds
    labels = [f"{text}\nseed {seeds[0]}" for text in texts]
    return contact_sheet(
        filled(rows), list(columns), labels, f"{plan.reference} → {', '.join(space.anchors)}; same noise"
    )


def _opened(results: Results, arm: Arm, prompts: str, row: int) -> Image.Image | None:
    path = results.image(arm, prompts, row, 0)
    return None if path is None else read_rgb(path)
