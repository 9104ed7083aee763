"""What the papers show by pictures: strips over λ, pairs, grids of each method's images, methods side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting import hacking_exhibits
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.reporting.picture_sheets import (
    SAME_NOISE,
    SheetColumn,
    SheetImage,
    best_set,
    drawn,
    key,
    label,
    panels,
    pictured,
    shape_of,
    sheet,
    shots,
    strength,
    uncurated,
)
from deradiff.experiments.results import Pair, Results
from deradiff.sweep import notation
from deradiff.sweep.description import NoiseOptimization, ReversibleNoise, RewardParticles

GRID_SEEDS = 9
"""Images of a prompt in a grid (AIG, figures 13 to 16)."""

PAIR_ANCHORS = 4
"""Anchors whose approximations of a model are pictured."""

QUALITATIVE_POWER = "power:2"
"""The schedule of AIG's pictures and user study."""


CHOICE = (
    "What needs an anchor has {anchor}. Of several arms the one with λ nearest to ½ is shown, or with p = 2, or the "
    "middle one; of every family of models, one other."
)


def exhibits(results: Results) -> Iterator[Exhibit]:
    """All of them that the plan has pictures for, and what is shown about reward hacking."""
    yield from strips(results)
    yield from pairs(results)
    yield from combinations(results)
    yield from annealings(results)
    yield from methods(results)
    yield from grids(results)
    yield from hacking_exhibits.exhibits(results)


# -- one anchor -------------------------------------------------------------------------------------------------------


def strips(results: Results) -> Iterator[Exhibit]:
    """For each anchor, its pictures at all λ (DeRaDiff, figure 3)."""
    for anchor, model in results.plan.models.items():
        steps = by_lam(results, anchor)
        inner = [arm for lam, arm in steps if lam not in (0.0, 1.0)]
        yield from _compared(
            results,
            [SheetColumn(_at(results, anchor, lam), arm) for lam, arm in steps],
            inner,
            best_set(results, inner),
            key("strip", anchor),
            f"{anchor} at every λ",
            f"The reference (λ = 0), the anchor {anchor} (λ = 1) and DeRaDiff between and beyond them"
            f"{'' if model.beta is None else ', with the KL strength β/λ that a λ stands for'}; beyond λ = 1 it "
            "extrapolates.",
            "DeRaDiff, figure 3",
        )


def by_lam(results: Results, anchor: str) -> list[tuple[float, Arm]]:
    """Every λ that an anchor was drawn at by Algorithm 1, ascending, the reference and the anchor among them."""
    by_number: dict[str, tuple[float, Arm]] = {}
    ends = ((0.0, results.reference), (1.0, results.model(anchor)))
    realigned = [arm for arm in results.of_method("realign") if arm.anchors[0][0] == anchor and not arm.particles]
    for lam, arm in [*ends, *((arm.anchors[0][1], arm) for arm in realigned)]:
        if arm is not None:
            by_number.setdefault(f"{lam:.6g}", (lam, arm))  # the same λ by number and as a target is shown once
    return sorted(by_number.values(), key=lambda it: it[0])


def _at(results: Results, anchor: str, lam: float) -> str:
    if lam == 0:
        return "reference\nλ = 0"
    name = f"{anchor}\nλ = 1" if lam == 1 else f"λ = {lam:.3g}"
    return "\n".join(filter(None, (name, strength(results.plan, anchor, lam))))


def pairs(results: Results) -> Iterator[Exhibit]:
    """For each model, its pictures and those that anchors approximate it with (DeRaDiff, figure 1)."""
    known = [pair for pair in results.pairs() if pair.anchor != pair.target]
    for target in results.plan.models:
        approximations = sorted((pair for pair in known if pair.target == target), key=lambda pair: pair.lam)
        if not approximations:
            continue
        chosen = spread(approximations, PAIR_ANCHORS)
        prompts = best_set(results, [chosen[0].retrained, *(pair.approximated for pair in chosen)])
        of = shots(results, prompts)
        retrained = drawn(results, [chosen[0].retrained], of)
        chosen = [pair for pair in chosen if drawn(results, [pair.approximated], of)]
        if not retrained or not chosen:
            continue
        own = strength(results.plan, target, 1.0)
        columns = [SheetColumn(f"{target}, aligned\n{own}", retrained[0])]
        for pair in chosen:
            reached = strength(results.plan, pair.anchor, pair.lam)
            columns.append(SheetColumn(f"from {pair.anchor}\nλ = {pair.lam:.3g}\n{reached}", pair.approximated))
        some = (
            "every anchor"
            if len(approximations) == len(chosen)
            else f"{len(chosen)} of {len(approximations)} anchors, spread over λ"
        )
        yield sheet(
            results,
            key("pairs", target),
            f"{target}, aligned and approximated",
            f"Top row: {target} ({own}), aligned from scratch; below it, DeRaDiff's approximations from {some}, "
            f"smallest λ first. {SAME_NOISE}. {uncurated(results, prompts, of)} After DeRaDiff, figure 1.",
            columns,
            of,
            upright=True,
        )


def spread(items: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


# -- several anchors, schedules ---------------------------------------------------------------------------------------


def combinations(results: Results) -> Iterator[Exhibit]:
    """For each set of anchors that were combined, each alone and all their combinations (DeRaDiff, appendix A.4)."""
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for arm in results.of_method("combine"):
        names = {name for name, _ in arm.anchors}
        groups.setdefault(tuple(name for name in results.plan.models if name in names), []).append(arm)
    for anchors, arms in groups.items():
        yield from _compared(
            results,
            _labelled(results, [results.reference, *map(results.model, anchors), *arms]),
            arms,
            None,
            key("combined", *anchors),
            f"{' and '.join(anchors)} at once",
            "The reference, each anchor alone, and several at once, each with its λ.",
            "DeRaDiff, appendix A.4",
        )


def annealings(results: Results) -> Iterator[Exhibit]:
    """For each anchor, its pictures under every schedule (AIG, section 3.3 and appendix A.7.3)."""
    for anchor in results.plan.models:
        arms = sorted(_of(results, anchor, "anneal"), key=mean_lam)
        inner = [SheetColumn("\n".join(shape_of(arm).split(", ")), arm) for arm in arms]
        yield from _compared(
            results,
            [*_labelled(results, [results.reference]), *inner, *_labelled(results, [results.model(anchor)])],
            arms,
            None,
            key("annealed", anchor),
            f"Annealed guidance of {anchor}",
            f"From the reference to the anchor {anchor}: annealed importance guidance, whose λ grows along a schedule "
            "while an image is drawn, in the order of λ's mean over the run.",
            "Annealed Importance Guidance, section 3.3 and appendix A.7.3",
        )


def mean_lam(arm: Arm) -> float:
    """λ of an annealed arm, averaged over its run."""
    shape = notation.schedule(arm.schedule, "steps")
    assert shape is not None and arm.lam is not None
    return arm.lam * sum(shape((step + 0.5) / 100) for step in range(100)) / 100


def _labelled(results: Results, arms: Iterable[Arm | None]) -> list[SheetColumn]:
    return [SheetColumn(label(results.plan, arm), arm) for arm in arms if arm is not None]


def _compared(
    results: Results,
    columns: Sequence[SheetColumn],
    inner: Sequence[Arm],
    prompts: str | None,
    name: str,
    title: str,
    caption: str,
    source: str,
) -> Iterator[Exhibit]:
    """A sheet of `columns`, if any of the `inner` ones has pictures: the others are what these are compared with."""
    prompts = prompts or best_set(results, [column.arm for column in columns])
    of = shots(results, prompts)
    there = drawn(results, [column.arm for column in columns], of)
    if any(arm in inner for arm in there):
        text = f"{caption} {noise_of(there)}. {uncurated(results, prompts, of)} After {source}."
        yield sheet(results, name, title, text, [column for column in columns if column.arm in there], of)


# -- every method -----------------------------------------------------------------------------------------------------


def focus(results: Results) -> list[str]:
    """The anchors that methods are compared for: the unregularised model, and all that were annealed.

    Without any, the first anchor of another method, and then the least regularised model.
    """
    annealed = [arm.anchors[0][0] for arm in results.of_method("anneal")]
    chosen = list(dict.fromkeys((*results.plan.report.every_unregularised, *annealed)))
    if chosen:
        return chosen
    others = [arm.anchors[0][0] for arm in results.of_method("interpolate", "realign")]
    return others[:1] or [next(iter(results.families().values()))[-1]]


def representatives(results: Results, anchor: str) -> list[Arm]:
    """One arm of every method, of this anchor where it has one: λ nearest to ½, p = 2, or else the middle one.

    Of aligned models, the anchor and one other of every family: the healthy model, or the middle strength.
    """
    chosen = [results.reference, results.model(anchor)]
    chosen.append(_middle(_of(results, anchor, "anneal"), QUALITATIVE_POWER))
    for particles in (False, True):
        realigned = [arm for arm in _of(results, anchor, "realign") if bool(arm.particles) == particles]
        chosen.append(_half(realigned))
    chosen.append(_half(_of(results, anchor, "interpolate")))
    for method in ("combine", "soup", "db-mpa-ls"):
        chosen.append(_middle([arm for arm in results.of_method(method) if anchor in dict(arm.anchors)]))
    healthy = results.plan.report.healthy
    for names in results.families().values():
        others = [name for name in names if name != anchor]
        if others:
            chosen.append(results.model(healthy if healthy in others else others[len(others) // 2]))
    chosen += results.of_method("optimize-noise")
    chosen += [_middle(results.of_method(method)) for method in ("doodl", "das", "tds", "fk-steering", "mpgd")]
    return [arm for arm in chosen if arm is not None]


def _of(results: Results, anchor: str, method: str) -> list[Arm]:
    return [arm for arm in results.of_method(method) if arm.anchors[0][0] == anchor]


def _half(arms: Sequence[Arm]) -> Arm | None:
    """The arm whose λ is nearest to ½, of those that are a mixture at all."""
    inner = [arm for arm in arms if arm.lam not in (None, 0.0, 1.0)]
    return min(inner, key=lambda arm: abs((arm.lam or 0.0) - 0.5), default=None)


def _middle(arms: Sequence[Arm], schedule: str = "") -> Arm | None:
    chosen = [arm for arm in arms if schedule and arm.schedule == schedule and arm.lam == 1]
    return next(iter([*chosen, *arms[len(arms) // 2 :]]), None)


def methods(results: Results) -> Iterator[Exhibit]:
    """For each anchor compared, one image of every method for several prompts (AIG, figures 11 and 12)."""
    for anchor in focus(results):
        arms = representatives(results, anchor)

        def rank(name: str, arms: Sequence[Arm] = arms) -> tuple[int, bool]:
            there = drawn(results, arms, shots(results, name))
            return pictured(results, arms, name), any(arm.reward_guidance is not None for arm in there)

        prompts = max(results.plan.prompts, key=rank)
        of = shots(results, prompts)
        arms = drawn(results, arms, of)
        if len(arms) < 3:
            continue
        yield sheet(
            results,
            key("methods", anchor),
            f"Every method, {anchor}",
            f"One image by every method. {CHOICE.format(anchor=anchor)} {noise_of(arms)}. "
            f"{uncurated(results, prompts, of)} After Annealed Importance Guidance, figures 11 and 12.",
            _labelled(results, arms),
            of,
        )


def grids(results: Results) -> Iterator[Exhibit]:
    """For each prompt, a grid of every method's images of the same seeds (AIG, figures 2 and 13 to 16)."""
    plan, prompts = results.plan, results.diversity_on
    seeds = plan.prompts[prompts].seeds[:GRID_SEEDS]
    if len(seeds) < 2:
        return
    for anchor in focus(results):
        arms = representatives(results, anchor)
        for number, text in enumerate(results.contents.texts[prompts][: plan.report.pictures], 1):
            of = [SheetImage(text, seed) for seed in seeds]
            there = drawn(results, arms, of)
            if len(there) < 2:
                continue
            yield panels(
                results,
                key("grid", anchor, str(number)),
                f"{text}: {len(seeds)} images by each method",
                f"Images of the same {len(seeds)} seeds, in the same places, by every method: look at how much varies "
                f"within a panel. {CHOICE.format(anchor=anchor)} {noise_of(there)}. {uncurated(results, prompts, of)} "
                "After Annealed Importance Guidance, figures 2 and 13 to 16.",
                _labelled(results, there),
                of,
            )


def noise_of(arms: Sequence[Arm]) -> str:
    """The words by which a caption says what images have in common, with the exceptions among `arms`."""
    apart = []
    if any(arm.particles or isinstance(arm.reward_guidance, RewardParticles) for arm in arms):
        apart.append("particles, which are several")
    if any(isinstance(arm.reward_guidance, NoiseOptimization | ReversibleNoise) for arm in arms):
        apart.append("noise that is optimised")
    return SAME_NOISE + (f", but for {' and '.join(apart)}" if apart else "")
