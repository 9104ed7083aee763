"""Single images of an experiment: what decides each, however its plan words it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deradiff.algorithm.schedules import Schedule
from deradiff.experiments.arms import Arm, NoiseOptimization
from deradiff.experiments.plan import Plan, Sampling
from deradiff.sweep import notation


@dataclass(frozen=True)
class Drawing:
    """Everything that decides an image but the weights of the models, in one form however the plan words it.

    Anchors at λ = 0 are left out: the reference is the same under whatever name it is asked for.
    """

    kind: Literal["mixture", "weights", "particles", "noise"]
    """In the words of 0.1, which the identities of stored images are made of: "weights" are interpolated ones."""
    anchors: tuple[tuple[str, float], ...]
    schedule: str
    particles: int
    noise: NoiseOptimization | None
    sampling: Sampling
    prompt: str
    seed: int

    @property
    def group(self) -> tuple[Any, ...]:
        """Drawings of one group can share a batch: the same networks are evaluated, in the same way.

        Annealed ones keep apart, since what a run tells about its weights is told of all its images.
        """
        names = tuple(name for name, _ in self.anchors)
        alone = not self.schedule and [lam for _, lam in self.anchors] == [1.0]
        blend = self.anchors if self.kind == "weights" else ()
        return self.kind, names, alone, bool(self.schedule), blend, self.particles, self.noise, self.sampling

    def dial(self, names: tuple[str, ...]) -> Any:
        """λ of the anchors `names` in the form that a dial takes."""
        known = dict(self.anchors)
        lams = {name: _scaled(self.schedule, known.get(name, 0.0)) for name in names}
        return lams if len(lams) > 1 else next(iter(lams.values()))


class Cell(NamedTuple):
    """One image in the experiment: the arm, the prompt set, the prompt's and the seed's place in it."""

    arm: Arm
    prompts: str
    row: int
    column: int
    drawing: Drawing


def cells(plan: Plan, texts: Mapping[str, tuple[str, ...]]) -> Iterator[Cell]:
    """Every image of the experiment, for the prompts of each set (`sources.resolve`)."""
    for arm in plan.arms():
        for name in plan.sets(arm.prompts):
            for row, prompt in enumerate(texts[name]):
                for column, seed in enumerate(plan.prompts[name].seeds):
                    yield Cell(arm, name, row, column, drawing_of(plan, arm, prompt, seed))


def drawing_of(plan: Plan, arm: Arm, prompt: str, seed: int) -> Drawing:
    """What `arm` draws for a prompt and a seed."""
    kind: Any = "mixture"
    if arm.noise is not None:
        kind = "noise"
    elif arm.method == "interpolate":
        kind = "weights"
    elif arm.particles:
        kind = "particles"
    anchors = tuple(sorted((name, lam) for name, lam in arm.anchors if lam))
    if kind == "weights" and (not anchors or [lam for _, lam in anchors] == [1.0]):
        kind = "mixture"  # the weights of one of the models, where both are the same
    schedule = arm.schedule if anchors else ""
    return Drawing(kind, anchors, schedule, arm.particles, arm.noise, plan.sampling[arm.sampling], prompt, seed)


def _scaled(schedule: str, lam: float) -> float | Schedule:
    shape = notation.schedule(schedule, "steps") if schedule else None
    return lam if shape is None else shape.scaled(lam)
