"""What methods cost: reward at equal cost, and the alignments that realignment saves (DeRaDiff, §6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from deradiff.experiments.arms import BY_WEIGHTS, TURNS
from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting.agreement_figures import unit
from deradiff.experiments.reporting.arm_series import (
    ByPrompt,
    Change,
    change,
    distinct,
    keys,
    series_of,
    short,
    substitutes,
)
from deradiff.experiments.reporting.cost_figures import GainAtCost, equal_cost
from deradiff.experiments.reporting.exhibits import Exhibit, table
from deradiff.experiments.reporting.front_figures import STYLES, extrapolates
from deradiff.experiments.results import Results, Table, over_prompts
from deradiff.measures import non_dominated
from deradiff.sweep import notation

SECTION = "Cost"

SWEEPS = (3, 5, 10)
"""Numbers of strengths that DeRaDiff's §6 counts savings for."""

TWICE_A_STEP = ("heun", "kdpm2")
"""Samplers of second order, which evaluate the network twice in every step but the last."""

NOTHING = 1e-12
"""What counts as λ = 0 or 1: the rounding of `step.with_reference_weight`."""


# -- network evaluations ----------------------------------------------------------------------------------------------


class EvaluationsPerImage(NamedTuple):
    """How often denoisers are evaluated for one image; a guided step evaluates each model twice."""

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both together: the gradient in the input alone, weights being fixed, is about as much work as a forward."""
        return self.forward + self.backward


def evaluations(results: Results, arm: Arm, prompts: str) -> EvaluationsPerImage | None:
    """What an image of `arm` takes by itself; None where only its images could tell, and there are none.

    A model without weight in a step is not evaluated in it: λ = 0 is the reference alone, λ = 1 the anchor alone. An
    experiment may evaluate more than that, for the path KL, or where images of different λ share a batch.
    """
    if arm.reward_guidance is not None:
        diagnostics = results.diagnostics(arm, prompts)
        if not diagnostics:
            return None
        return EvaluationsPerImage(
            *(float(np.mean([image[name] for image in diagnostics])) for name in ("forward", "backward"))
        )
    sampling = results.plan.sampling[arm.sampling]
    calls = calls_of(sampling.scheduler, sampling.steps)
    guided = 2 if sampling.guidance_scale is None or sampling.guidance_scale > 1 else 1
    per_call = [models_at(arm, call / calls) for call in range(calls)]
    return EvaluationsPerImage(float(guided * sum(per_call) * max(1, arm.particles)))


def calls_of(scheduler: str | None, steps: int) -> int:
    """How often a sampler calls its denoiser; a pipeline's own is taken to do so once a step."""
    if scheduler == "pndm":  # its second step is taken twice
        return steps + 1
    return 2 * steps - 1 if scheduler in TWICE_A_STEP else steps


def models_at(arm: Arm, progress: float) -> int:
    """How many models have a weight when so much of the sampling is done, 0 to 1."""
    if arm.method in ("reference", *BY_WEIGHTS, TURNS):
        return 1
    shape = notation.schedule(arm.schedule, "steps") if arm.schedule else None
    lams = [lam if shape is None else shape.scaled(lam)(progress) for _, lam in arm.anchors]
    weights = [1 - sum(lams), *lams]
    return sum(abs(weight) > NOTHING for weight in weights)


# -- equal cost -------------------------------------------------------------------------------------------------------


def exhibits(results: Results) -> Iterator[Exhibit]:
    """All methods at equal cost, for each prompt set; and what is saved."""
    if results.plan.scores:
        slugs = keys(list(results.plan.prompts))
        for prompts in results.plan.prompts:
            yield from at_equal_cost(results, prompts, slugs[prompts])
    yield from savings(results)


class ArmCost(NamedTuple):
    """One way to spend evaluations."""

    name: str
    kind: str
    label: str
    look: int
    hollow: bool
    by_prompt: ByPrompt
    evaluations: EvaluationsPerImage
    seconds: float


def offers(results: Results, prompts: str, score: str) -> list[ArmCost]:
    """Every arm with its cost, and the reference with the best of several images, which costs as many times more."""
    reference = results.reference
    if reference is None:
        return []
    labels = {arm: (series.kind, series.label, series.look) for series in series_of(results) for arm in series.arms}
    costs = []
    for arm in distinct(results, prompts):
        cost = evaluations(results, arm, prompts)
        if cost is not None and arm != reference:
            by_prompt = results.by_prompt(arm, prompts, score)
            costs.append(ArmCost(arm.name, *labels[arm], extrapolates(arm), by_prompt, cost, results.seconds(arm)))
    plain = evaluations(results, reference, prompts)
    assert plain is not None
    scores = results.scores(reference, prompts, score)
    for power in range(1, 1 + int(math.log2(scores.shape[1]))):
        count = 2**power
        best = ArmCost(
            f"reference, best of {count}",
            "best-of",
            STYLES["best-of"].label,
            0,
            False,
            best_of(scores, count),
            EvaluationsPerImage(count * plain.forward),
            count * results.seconds(reference),
        )
        costs.append(best)
    return costs


def best_of(table: Table, count: int) -> ByPrompt:
    """For each prompt the expected maximum of `count` of its seeds' scores; NaN where it has fewer.

    Without bias: the mean maximum over all subsets of that size, in which the k-th smallest of n is the greatest
    `C(k - 1, count - 1)` times out of `C(n, count)`.
    """
    expected = np.full(len(table), np.nan)
    for row, scores in enumerate(table):
        known = np.sort(scores[np.isfinite(scores)])
        if len(known) >= count:
            shares = [math.comb(k, count - 1) / math.comb(len(known), count) for k in range(len(known))]
            expected[row] = float(np.dot(known, shares))
    return expected


def at_equal_cost(results: Results, prompts: str, slug: str) -> Iterator[Exhibit]:
    """The first score of every arm minus the reference's, against what an image costs."""
    score, reference = results.plan.scores[0], results.reference
    if reference is None:
        return
    plain, second = evaluations(results, reference, prompts), results.seconds(reference)
    assert plain is not None
    known = [
        (offer, gain)
        for offer in offers(results, prompts, score)
        if (gain := change(results, offer.by_prompt, prompts, score)) is not None
    ]
    if not known:
        return
    plane = [[0.0, plain.total], *([gain.value, offer.evaluations.total] for offer, gain in known)]
    best = non_dominated(torch.tensor(plane, dtype=torch.float64), (True, False)).tolist()
    by_prompt = results.by_prompt(reference, prompts, score)
    own = ArmCost("reference", "reference", "", 0, False, by_prompt, plain, second)
    unchanged = Change(0.0, 0.0, 0.0, int(np.isfinite(by_prompt).sum()))
    rows, bought = [], []
    for (offer, gain), is_best in zip([(own, unchanged), *known], best, strict=True):
        mean, error = over_prompts(offer.by_prompt[:, None])
        relative = offer.evaluations.total / plain.total, offer.seconds / second
        bought.append(GainAtCost(*offer[1:5], *gain[:3], *relative, is_best))
        rows.append(
            {
                "arm": offer.name,
                "method": offer.kind,
                "forward evaluations": offer.evaluations.forward,
                "backward evaluations": offer.evaluations.backward,
                "evaluations / reference's": relative[0],
                "seconds": offer.seconds,
                "seconds / reference's": relative[1],
                "mean score": mean,
                "s.e. of mean score": error,
                **gain.cells,
                "non-dominated": "yes" if is_best else "",
            }
        )
    yield Exhibit(
        f"equal-cost-{slug}",
        SECTION,
        f"What methods gain at equal cost, {prompts}",
        _cost_caption(results, prompts, score),
        *table(rows),
        equal_cost(bought[1:], f"{unit(short(score))},\ndifference to the reference"),
    )


def _cost_caption(results: Results, prompts: str, score: str) -> str:
    sampling = results.plan.sampling[results.sampling]
    assumed = ""
    if sampling.guidance_scale is None:
        assumed = " The plan leaves guidance to the pipeline; it is counted as guided."
    watched = ""
    if results.plan.path_kl:
        watched = (
            " Seconds hold more than the method needs: the plan asks for the path KL, for which the reference is "
            "evaluated beside models that are drawn as they are, about doubling theirs; go by evaluations."
        )
    return (
        f"Mean {short(score)} on “{prompts}” minus the reference's on the same prompts and seeds, against the cost of "
        "an image. Left: network evaluations, in multiples of the reference's; arms of the same cost lie side by side "
        "on a band, dashed the best gain at that cost or less, ringed what no arm beats in both. Hollow markers are at "
        "λ > 1. A step evaluates one model for the reference, a model as it is, interpolated weights and models that "
        "take turns; reference and anchor for realigned and annealed ones, but only those that have a weight in it; "
        "the reference and each anchor for combined rewards; K times as many for K particles; and what was counted "
        "where a reward guides the sampling, a backward pass through a denoiser as one more. Guided steps count twice. "
        "Reward models, text encoders and decoders are not counted, nor the gradients that stop there. Right: measured "
        f"seconds.{watched}{assumed} “Best of n” is the expected best of n images of the reference "
        "by this very score, and, like all that a reward guides, needs it when sampling. Bars: 95% intervals by a "
        "paired bootstrap over prompts. Asked for by DeRaDiff's reviewers; no figure of either "
        "paper." + substitutes(results.plan, [prompts])
    )


# -- what is saved ----------------------------------------------------------------------------------------------------


def savings(results: Results) -> Iterator[Exhibit]:
    """Aligning once against aligning at every strength, for the plan's targets and for the paper's numbers."""
    realigned = [arm for arm in results.of_method("realign") if not arm.particles]
    if not realigned:
        return
    from deradiff.experiments.cost import PaperInputs, saved  # with all of diffusers

    targets = len({arm.target for arm in realigned if arm.target})
    hours = results.plan.report.alignment_gpu_hours
    paper = PaperInputs(gpu_hours=hours)
    reference = results.reference
    mixing = [arm for arm in realigned if arm.lam not in (0.0, 1.0)]
    extra = twice = math.nan
    if reference is not None and mixing:
        extra = float(np.mean([results.seconds(arm) for arm in mixing])) - results.seconds(reference)
        twice = models_at(mixing[0], 0.5) / models_at(reference, 0.5)
    counts = [*([(targets, "targets of this plan")] if targets > 1 else []), *((n, "DeRaDiff, §6") for n in SWEEPS)]
    rows = [
        {
            "N": count,
            "which": which,
            "GPU hours, sweep": count * hours,
            "GPU hours, aligned once": hours,
            "GPU hours saved": (count - 1) * hours,
            "saved, %": 100 * saved(count),
            "EFLOP saved": (count - 1) * paper.exaflops,
            "evaluations per image / reference's": twice,
            "extra seconds per image": extra,
            "images that use up the saving": (count - 1) * hours * 3600 / extra if extra > 0 else math.nan,
        }
        for count, which in counts
    ]
    yield Exhibit(
        "compute-saved",
        SECTION,
        "Compute saved by aligning once",
        (
            f"N strengths by aligning at each of them, {hours:g} GPU hours each, against aligning once and realigning "
            "(DeRaDiff, §6): the share saved is 1 - 1/N. EFLOP as the paper counts them, on A100s at half of their 312 "
            "TFLOP/s. What it costs is a second model evaluated at every step of every image: twice the evaluations, "
            "and here so many seconds more per image than the reference's (mean over this plan's realigned arms, as "
            "measured in their batches). The last column is how many images use up what was saved, if alignment and "
            "sampling ran on the same hardware."
        ),
        *table(rows),
    )
