"""Single images of an experiment: what its plan draws in every place, and which images share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deradiff.experiments.arms import BY_WEIGHTS, TURNS, Arm
from deradiff.experiments.plan import Plan
from deradiff.sweep import notation
from deradiff.sweep.description import Drawing


class PlannedImage(NamedTuple):
    """One image in the experiment: the arm, the prompt set, the prompt's and the seed's place in it."""

    arm: Arm
    prompts: str
    row: int
    column: int
    drawing: Drawing


def planned_images(plan: Plan, texts: Mapping[str, tuple[str, ...]]) -> Iterator[PlannedImage]:
    """Every image of the experiment, for the prompts of each set (`sources.resolve`)."""
    for arm in plan.arms():
        for name in plan.sets(arm.prompts):
            for row, prompt in enumerate(texts[name]):
                for column, seed in enumerate(plan.prompts[name].seeds):
                    yield PlannedImage(arm, name, row, column, drawing_of(plan, arm, prompt, seed))


def drawing_of(plan: Plan, arm: Arm, prompt: str, seed: int) -> Drawing:
    """What `arm` draws for a prompt and a seed, in one form however the plan words it.

    Anchors at λ = 0 are left out: the reference is the same under whatever name it is asked for.
    """
    anchors = tuple(sorted((name, lam) for name, lam in arm.anchors if lam))
    # The weights of one of the models are that model, where both methods are the same.
    several = bool(anchors) and [lam for _, lam in anchors] != [1.0]
    return Drawing(
        prompt=prompt,
        seed=seed,
        sampling=plan.sampling[arm.sampling],
        reference=plan.reference,
        anchors=anchors,
        sources=tuple(plan.models[name].source for name, _ in anchors),
        schedule=notation.schedule(arm.schedule, "steps") if anchors and arm.schedule else None,
        method="interpolate" if several and arm.method in BY_WEIGHTS else "mixture",
        particles=arm.particles,
        reward_guidance=arm.reward_guidance,
        turns=several and arm.method == TURNS,
    )


def kind_of(drawing: Drawing) -> str:
    """How an image is drawn, in the words of 0.1, which the identities of stored images are made of.

    "weights" are interpolated ones, "noise" is optimised noise.
    """
    if drawing.reward_guidance is not None:
        return drawing.reward_guidance.kind
    if drawing.turns:
        return "turns"
    if drawing.method != "mixture":
        return "weights"
    return "particles" if drawing.particles else "mixture"


def group_of(drawing: Drawing) -> tuple[Any, ...]:
    """Drawings of one group can share a batch: the same networks are evaluated, in the same way.

    Annealed ones keep apart, since what a run knows about its weights is known of all its images.
    """
    names = tuple(name for name, _ in drawing.anchors)
    annealed = drawing.schedule is not None
    alone = not annealed and [lam for _, lam in drawing.anchors] == [1.0]
    blend = drawing.anchors if kind_of(drawing) == "weights" else ()
    turns = drawing.seed if drawing.turns else None  # images of one seed evaluate one model in every step
    guided = drawing.reward_guidance
    return kind_of(drawing), names, alone, annealed, blend, turns, drawing.particles, guided, drawing.sampling
