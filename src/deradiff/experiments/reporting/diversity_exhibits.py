"""How diverse the images of every arm are: the measures of AIG §4.1, their table, the spectra behind two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting.arm_series import (
    arms_on,
    distinct,
    drawing,
    keys,
    kind_of,
    series_of,
    short,
    short_label,
    substitutes,
)
from deradiff.experiments.reporting.diversity_figures import SpectrumCurve, illustration, spectra_figure
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.reporting.exhibits import table as tabulated
from deradiff.experiments.results import Results
from deradiff.measures import (
    Statistics,
    frechet_distance,
    mean_pairwise_distance,
    precision_and_recall,
    spectral_distance,
    spectrum,
    vendi_score,
)
from deradiff.measures.frechet import Frechet
from deradiff.measures.spectral import SpectralDistance, reference_mismatch
from deradiff.sweep.description import Drawing

T = TypeVar("T")

SECTION = "Diversity"

FOLDS = 10
"""Parts that the prompts are divided into for the jackknife."""

CURVES = 8
"""Spectra in one panel."""

AFFORDABLE = 512
"""Features up to which measures are taken `FOLDS` times more for their standard errors; their cost grows cubically."""


class Measure(NamedTuple):
    """A column of the table."""

    name: str
    maximize: bool
    squared: bool = False
    """Whether it grows as the square of a distance."""


FID = Measure("FID", False, True)
PRECISION = Measure("precision", True)
RECALL = Measure("recall", True)
SCD = Measure("SCD", False, True)
LSCD = Measure("LSCD", False, True)
VENDI = Measure("Vendi", True)
VENDI_OF_ALL = Measure("Vendi, all prompts", True)
DISTANCE = Measure("pairwise distance", True)

OF_ALL = (FID, PRECISION, RECALL, SCD, LSCD, VENDI_OF_ALL)
"""Of all images of an arm together; the others are of the images of each prompt, averaged over prompts."""
MEASURES = (FID, PRECISION, RECALL, SCD, LSCD, VENDI, VENDI_OF_ALL, DISTANCE)


@dataclass(frozen=True)
class Measured:
    """What the images of one arm measure; NaN where there are too few."""

    images: int
    prompts: int
    features: int
    compared: int
    """Eigenvalues that LSCD compares."""
    values: dict[Measure, float]
    errors: dict[Measure, float]
    """Standard errors: a jackknife's, but over prompts for what is measured within them."""
    caveats: tuple[str, ...]
    """What FID and the spectral distances say about few samples."""
    refusals: tuple[str, ...]
    """Why a measure is missing."""


class _FeatureSet(NamedTuple):
    """Features of some images, and what FID and the spectral distances need of them."""

    features: Float[Tensor, "image feature"]
    statistics: Statistics


PromptAndSeed = tuple[int, int]
"""The prompt and the seed of an image, by number."""

Vectors = Mapping[PromptAndSeed, Float[np.ndarray, " feature"]]


def diversity(results: Results, extractor: str) -> dict[Arm, Measured]:
    """The measures of every arm that has features of the images of `results.diversity_on`; of none without a reference.

    An arm with missing images is compared with the reference's of the same prompts and seeds. Arms that draw the same
    images are measured once.
    """
    where, reference = results.diversity_on, results.reference
    if reference is None:
        return {}
    known = results.features_by_place(reference, where, extractor)
    prepared: dict[tuple[PromptAndSeed, ...], list[_FeatureSet]] = {}
    by_drawing: dict[Drawing, Measured] = {}
    for arm in distinct(results, where):
        vectors = results.features_by_place(arm, where, extractor)
        places = tuple(sorted(known.keys() & vectors.keys()))
        if len(places) >= 2:
            if places not in prepared:
                prepared[places] = _sets(known, places)
            own = _sets(vectors, places)
            by_drawing[drawing(results, arm)] = measured(prepared[places], own, places, results.plan.report.neighbours)
    return {arm: by_drawing[drawn] for arm in arms_on(results, where) if (drawn := drawing(results, arm)) in by_drawing}


def measured(
    reference: Sequence[_FeatureSet], generated: Sequence[_FeatureSet], places: Sequence[PromptAndSeed], neighbours: int
) -> Measured:
    """Every measure of an arm's images, which are those at `places`, against the reference's (see `_sets`).

    The standard errors are those of a delete-a-group jackknife over prompts (Quenouille 1956): each fold is left out of
    both sets. A bootstrap would draw prompts twice, and images that coincide shrink the balls of recall and the
    spectra; leaving out makes no copies.
    """
    refusals: dict[str, None] = {}
    values, frechet, spectral = _against(reference[0], generated[0], neighbours, refusals)
    folds = zip(reference[1:], generated[1:], strict=True)
    parts = [_against(*fold, neighbours, {})[0] for fold in folds]
    errors = {measure: jackknifed([part[measure] for part in parts]) for measure in OF_ALL}
    labels = torch.tensor([row for row, _ in places])
    together = (torch.bincount(labels) > 1)[labels]
    for measure, take in ((VENDI, vendi_score), (DISTANCE, mean_pairwise_distance)):
        values[measure] = errors[measure] = math.nan
        if together.any():
            chosen = generated[0].features[together]
            within = _attempt(partial(take, chosen, labels[together]), refusals)
            values[measure], errors[measure] = (math.nan, math.nan) if within is None else within.mean
    return Measured(
        images=len(places),
        prompts=len(labels.unique()),
        features=frechet.features,
        compared=spectral.compared,
        values=values,
        errors=errors,
        caveats=tuple(filter(None, (frechet.caveat, spectral.caveat))),
        refusals=tuple(refusals),
    )


def jackknifed(parts: Sequence[float]) -> float:
    """The standard error of a number from those that it becomes when one group after the other is left out."""
    if len(parts) < 2 or not np.isfinite(parts).all():
        return math.nan
    return float(np.sqrt((len(parts) - 1) / len(parts) * np.square(np.array(parts) - np.mean(parts)).sum()))


def _against(
    reference: _FeatureSet, generated: _FeatureSet, neighbours: int, refusals: dict[str, None]
) -> tuple[dict[Measure, float], Frechet, SpectralDistance]:
    frechet = frechet_distance(reference.statistics, generated.statistics)
    spectral = spectral_distance(reference.statistics, generated.statistics)
    manifolds = _attempt(partial(precision_and_recall, reference.features, generated.features, neighbours), refusals)
    everything = _attempt(partial(vendi_score, generated.features), refusals)
    values = {
        FID: frechet.value,
        PRECISION: math.nan if manifolds is None else manifolds.precision,
        RECALL: math.nan if manifolds is None else manifolds.recall,
        SCD: spectral.scd,
        LSCD: spectral.lscd,
        VENDI_OF_ALL: math.nan if everything is None else everything.mean.value,
    }
    return values, frechet, spectral


def _attempt(measure: Callable[[], T], refusals: dict[str, None]) -> T | None:
    """What it measures; None, with the reason kept, for images that it refuses."""
    try:
        return measure()
    except ValueError as error:
        refusals[str(error)] = None
        return None


def _sets(vectors: Vectors, places: Sequence[PromptAndSeed]) -> list[_FeatureSet]:
    """All images at `places`, then all but those of one fold of the prompts after the other.

    There are no folds where the measures are not affordable, or where too few images would be left.
    """
    features = torch.from_numpy(np.stack([vectors[place] for place in places])).double()
    prompts, of = torch.tensor([row for row, _ in places]).unique(return_inverse=True)
    parts = min(FOLDS, len(prompts))
    kept = [of % parts != fold for fold in range(parts)]
    if features.shape[1] > AFFORDABLE or min(int(rows.sum()) for rows in kept) < 2:
        kept = []
    return [_FeatureSet(some, Statistics.of(some)) for some in (features, *(features[rows] for rows in kept))]


# -- exhibits ---------------------------------------------------------------------------------------------------------


def exhibits(results: Results, diversities: dict[str, dict[Arm, Measured]]) -> Iterator[Exhibit]:
    """The table and the spectra for each extractor (see `diversity`), and the illustration of spectral distances."""
    slugs = keys(list(diversities))
    for extractor, by_arm in diversities.items():
        if by_arm:
            yield table(results, extractor, slugs[extractor], by_arm)
            yield spectra(results, extractor, slugs[extractor], by_arm)
    if any(diversities.values()):
        yield spectral_illustration()


def table(results: Results, extractor: str, slug: str, by_arm: dict[Arm, Measured]) -> Exhibit:
    """All measures of all arms."""
    where, k = results.diversity_on, results.plan.report.neighbours
    rows = [
        {
            "arm": arm.name,
            "method": kind_of(arm),
            "images": of_arm.images,
            "prompts": of_arm.prompts,
            "features": of_arm.features,
            "eigenvalues in LSCD": of_arm.compared,
        }
        | {
            f"{what}{measure.name}": numbers[measure]
            for measure in MEASURES
            for what, numbers in (("", of_arm.values), ("s.e. of ", of_arm.errors))
        }
        | {"not measured": " ".join(of_arm.refusals)}
        for arm, of_arm in by_arm.items()
    ]
    return Exhibit(
        f"diversity-{slug}",
        SECTION,
        f"Diversity of every arm, by {short(extractor)} features",
        (
            f"Images of the prompts “{where}”, compared with the reference's images of the same prompts and seeds by "
            f"{short(extractor)} features: Fréchet distance (FID where the features are Inception's), precision and "
            f"recall with k = {k}, spectral covariance distance and its logarithmic form, which compares as many "
            "eigenvalues as the numbers of images allow (Annealed Importance Guidance, §4.1, equations 12 to 14; the "
            "coverage measures of its figures 4 and 17 to 24). Vendi score and mean pairwise Euclidean distance are "
            "within prompts, averaged over them; the second Vendi score is of all images together. The reference is "
            "compared with its own images, and other arms start from the same noise as it does: independent images "
            f"would be farther apart. {_on_errors(by_arm)}{_on_few(by_arm)}" + substitutes(results.plan, [where])
        ),
        *tabulated(rows),
    )


def _on_errors(by_arm: dict[Arm, Measured]) -> str:
    groups = min(FOLDS, max(of_arm.prompts for of_arm in by_arm.values()))
    how = (
        f"by a jackknife over prompts, {groups} groups of them left out in turn on both sides"
        if any(math.isfinite(of_arm.errors[FID]) for of_arm in by_arm.values())
        else f"not estimated for measures of all images (more than {AFFORDABLE} features, or too few images)"
    )
    return f"Standard errors (s.e.) are {how}; over prompts for what is measured within them."


def _on_few(by_arm: dict[Arm, Measured]) -> str:
    """What too few samples do, in the words of the first arm that has something to say."""
    caveated = [(arm, of_arm.caveats) for arm, of_arm in by_arm.items() if of_arm.caveats and arm.method != "reference"]
    if not caveated:
        return ""
    arm, caveats = caveated[0]
    return f" Few samples in {len(caveated)} of {len(by_arm)} arms, for example {arm.name}: {' '.join(caveats)}"


def spectra(results: Results, extractor: str, slug: str, by_arm: dict[Arm, Measured]) -> Exhibit:
    """The eigenvalues that SCD and LSCD compare, of one series of each method."""
    where, reference = results.diversity_on, results.reference
    assert reference is not None
    base = _eigenvalues(results, reference, extractor)
    others = {arm for arm in distinct(results, where) if arm in by_arm and by_arm[arm].images > 2}
    longest: dict[str, list[Arm]] = {}
    labels = {}
    for series in series_of(results):
        arms = [arm for arm in series.arms if arm in others]
        if len(arms) > max(1, len(longest.get(series.kind, []))):
            longest[series.kind], labels[series.kind] = arms, series.label
    panels: dict[str, list[SpectrumCurve]] = {}
    rows = []
    for kind, arms in longest.items():
        for arm in spaced(arms, CURVES):
            eigenvalues = _eigenvalues(results, arm, extractor)
            ranks = min(len(base), len(eigenvalues))
            ratio = eigenvalues[:ranks] / base[:ranks]
            panels.setdefault(labels[kind], []).append(SpectrumCurve(short_label(results.plan, arm), ratio.tolist()))
            columns = range(1, ranks + 1), eigenvalues.tolist(), base.tolist(), ratio.tolist()
            rows += [(arm.name, *numbers) for numbers in zip(*columns, strict=False)]
    return Exhibit(
        f"spectra-{slug}",
        SECTION,
        f"Eigenvalue spectra against the reference's, by {short(extractor)} features",
        (
            "Eigenvalues of the covariance of the features, largest first: at the left the reference's, then each "
            "arm's divided by the reference's of the same rank, for the longest series of each method that has one. 1 "
            "is as spread as the reference; LSCD sums the squares of these ratios' logarithms over all ranks, SCD the "
            "squared differences, which the first ranks decide (Annealed Importance Guidance, equations 13 and 14). "
            f"Images of the prompts “{where}”; ranks that both numbers of images allow. No error bars: eigenvalues of "
            "one sample are not independent." + substitutes(results.plan, [where])
        ),
        ("arm", "rank", "eigenvalue", "reference's", "ratio"),
        tuple(rows),
        spectra_figure(base.tolist(), panels),
    )


def spaced(arms: Sequence[Arm], count: int) -> list[Arm]:
    """`count` of the arms at most, the first and the last among them."""
    return [arms[round(place)] for place in np.linspace(0, len(arms) - 1, min(count, len(arms)))]


def _eigenvalues(results: Results, arm: Arm, extractor: str) -> Float[np.ndarray, " rank"]:
    """Those that the number of images allows and that are not zero."""
    features = torch.from_numpy(results.features(arm, results.diversity_on, extractor))
    values: Float[np.ndarray, " feature"] = spectrum(features).numpy()
    return values[values > 0]


def spectral_illustration() -> Exhibit:
    """Three Gaussians that FID and the spectral distances rank differently."""
    clouds = reference_mismatch()
    rows = []
    for name, cloud in clouds.items():
        (x, y), (first, second) = cloud.mean.tolist(), cloud.spectrum.tolist()
        is_base = name == "base"  # at 0 from itself but for rounding
        rows.append(
            {
                "distribution": NAMES[name],
                "mean x": x,
                "mean y": y,
                "eigenvalue 1": first,
                "eigenvalue 2": second,
                "FID to D1": 0.0 if is_base else cloud.frechet.value,
                "SCD to D1": 0.0 if is_base else cloud.spectral.scd,
                "LSCD to D1": 0.0 if is_base else cloud.spectral.lscd,
            }
        )
    return Exhibit(
        "spectral-distance",
        SECTION,
        "What spectral distances see that FID does not",
        (
            "Three Gaussians in the plane, after Annealed Importance Guidance, figure 5: the base D1; D2, close to it "
            "but tighter (collapsed); D3, spread as D1 but shifted and rotated by 60° (reference mismatch). Ellipses "
            "hold one and two standard deviations. FID finds D2 nearer to D1, SCD and LSCD find D3, whose covariance "
            "has the same eigenvalues. The paper prints no numbers; these are of our distributions, by the same "
            "functions that measure the arms. 500 points each, whose means and covariances are exactly those drawn."
        ),
        *tabulated(rows),
        illustration({NAMES[name]: cloud for name, cloud in clouds.items()}),
    )


NAMES = {"base": "D1, base", "collapsed": "D2, tighter", "moved": "D3, moved"}
