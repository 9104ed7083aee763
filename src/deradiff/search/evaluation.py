"""Points of a search as arms of a growing experiment: drawn and scored by its runners, read from its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deradiff.algorithm.gaussian import IllConditionedMixture
from deradiff.experiments import running
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.search.goals import Tables
from deradiff.search.loop import PointRefused
from deradiff.search.readings import TooFewScores, by_unit, nearby, require_measured
from deradiff.search.spaces import Point, SearchSpace
from deradiff.sweep.jobs import Report
from deradiff.sweep.workers import Executor


class PointEvaluator:
    """Evaluates points of a space in the folder of an experiment. A context manager, which ends the workers.

    Args:
        plan: models, prompts, sampling, scores and features. What it draws besides is drawn as well.
        space: whose points are evaluated.
        folder: of the store; made where there is none. Images that it holds are not drawn again.
        make_executor: makes the workers, once there is work for them.
        report: told of progress.
        names: the scores and measures that are read (`Goal.names`).
        prompts: the plan's prompt set that is searched on; the first by default.
        weighted: read scores as the retrained model's, by importance weights within prompts (`verdict`), instead of
            Algorithm 1's own.
        nearby: also estimate scores at λ this much below and above every point, from the same images.
        about: what the workers are, for the record of every image.

    Raises `ValueError` for a name that the plan does not measure, and where nothing nearby can be estimated.
    """

    def __init__(
        self,
        plan: Plan,
        space: SearchSpace,
        folder: Path,
        make_executor: Callable[[], Executor],
        report: Report,
        names: Sequence[str],
        *,
        prompts: str | None = None,
        weighted: bool = False,
        nearby: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.plan, self.space, self.folder, self.weighted = plan, space, folder, weighted
        self.prompts = next(iter(plan.prompts)) if prompts is None else plan.sets((prompts,))[0]
        self.names, self.nearby = tuple(names), nearby
        self.left_out = 0
        """Images that are left out everywhere, since a score of theirs failed somewhere."""
        self._make_executor, self._report, self._maker = make_executor, report, about
        self._made: list[Executor] = []
        self._ran = False
        require_measured(plan, self.prompts, self.names, weighted)
        if nearby is not None:
            _require_nearby(plan, space, self.names, weighted, nearby)

    def __enter__(self) -> PointEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self._made:
            executor.close()
        self._made.clear()

    def __call__(self, points: Sequence[Point]) -> Tables:
        """Measure all of these points.

        Raises `PointRefused` for the last one where the models have no mixture or its images mostly no scores, and what
        a run raises.
        """
        results = self.drawn(points)
        arms = [self.reference(results), *(self.space.arm(results.plan, point) for point in points)]
        try:
            rows, self.left_out = by_unit(results, arms, self.prompts, self.names, weighted=self.weighted)
        except TooFewScores as error:
            if error.arm == arms[0]:
                raise ValueError(f"the reference: {error}") from None
            raise PointRefused(str(error)) from None
        reference, *others = rows
        tables = Tables(reference, {name: torch.stack([row[name] for row in others]) for name in self.names})
        return tables if self.nearby is None else self._with_nearby(tables, results, arms, points)

    def _with_nearby(self, tables: Tables, results: Results, arms: Sequence[Arm], points: Sequence[Point]) -> Tables:
        """The tables with what is estimated beside each point, of those beside several beside the first."""
        (coordinate,) = self.space.coordinates
        estimates: dict[Point, Mapping[str, Any]] = {}
        moved = nearby(results, arms, self.prompts, self.names, self.nearby or 0)[1:]
        for (lam,), moves in zip(points, moved, strict=True):
            for move, scores in moves.items():
                at = (round(lam + move, 6),)
                if coordinate.low <= at[0] <= coordinate.high and at not in points:
                    estimates.setdefault(at, scores)
        if not estimates:
            return tables
        rows = {name: torch.stack([scores[name] for scores in estimates.values()]) for name in self.names}
        return tables._replace(near=tuple(estimates), estimates=rows)

    def planned(self, points: Sequence[Point]) -> Plan:
        """The plan with arms for the reference and these points."""
        searched = {"prompts": [self.prompts]}
        methods = [{"method": "reference"} | searched, *(self.space.method(point) | searched for point in points)]
        given = self.plan.model_dump(exclude_unset=True)
        return Plan.model_validate(given | {"methods": [*given["methods"], *methods]})

    def drawn(self, points: Sequence[Point]) -> Results:
        """The results with all images of these points and their scores there. Raises as calling does."""
        plan = self.planned(points)
        if not (self._ran and self._complete(plan)):
            self.run(plan)
        with Store(self.folder, write=False) as store:
            return Results(plan, store)

    def reference(self, results: Results) -> Arm:
        """The arm that draws the reference."""
        assert results.reference is not None
        return results.reference

    def run(self, plan: Plan) -> None:
        """Draw and score what `plan` wants, also what was lost since it was drawn, and with weights as they are now."""
        self._ran = True
        try:
            running.run(plan, self.folder, self._share, self._report, about=self._maker)
        except IllConditionedMixture as error:
            raise PointRefused(f"the models have no mixture there: {error}") from None

    def _share(self) -> Executor:
        if not self._made:
            self._made.append(self._make_executor())
        own = self._made[0]
        # A run ends its workers, and the next one needs these again: models are loaded once in a search.
        shared: Any = SimpleNamespace(size=own.size, submit=own.submit, wait=own.wait, result=own.result)
        shared.close = lambda: None
        return shared

    def _complete(self, plan: Plan) -> bool:
        """Whether a run would have nothing to do, of models whose weights are those of the last one."""
        with Store(self.folder, write=False) as store:
            whole = running.contents(plan, store, fresh=False)
            there, tried = store.drawn(), store.unmade()
            wanted = [("scores", name) for name in plan.scores] + [("features", name) for name in plan.features]
            left = [item for item in whole.drawings if item not in tried]
            return all(item in there for item in left) and not any(
                store.unscored(table, name, left) for table, name in wanted
            )


def _require_nearby(plan: Plan, space: SearchSpace, names: Sequence[str], weighted: bool, nearby: float) -> None:
    """Raise `ValueError` where scores at other λ cannot be estimated from the same images."""
    if not 0 < nearby <= 0.5:
        raise ValueError(f"nearby is a distance of λ, above 0 and at most 0.5; got {nearby:g}")
    if not weighted:
        raise ValueError("scores nearby are estimated by importance weights: search the weighted score")
    if space.kind != "lam" or len(space.coordinates) != 1:
        raise ValueError("scores nearby are estimated along the λ of a single anchor")
    if others := [name for name in names if name not in plan.scores]:
        raise ValueError(f"of {', '.join(others)} nothing nearby can be estimated: only of the scores of single images")
