"""What agreement exhibits have in common: the columns of their CSV files, what their captions and keys name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deradiff.algorithm.estimates import Estimate
from deradiff.experiments.reporting.agreement_pairs import ComparedPair, Study
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results
from deradiff.files.records import slug

SUMMARY = "Agreement of approximated and retrained models"

BARS = "95% intervals of the difference to the retrained model, by a paired bootstrap over prompts"

NUMBERS = ("lambda", "approximated", "retrained", "difference", "standard_error", "interval_low", "interval_high")
"""Columns of CSV files; standard error and interval are the difference's, by a paired bootstrap over prompts."""

COUNTS = ("prompts", "images", "planned")


def names(pair: ComparedPair) -> tuple[str, str]:
    """The anchor and the target."""
    return pair.models.anchor, pair.models.target


def numbers(pair: ComparedPair) -> tuple[float, ...]:
    """The values of `NUMBERS`."""
    return (
        pair.models.lam,
        pair.approximated,
        pair.retrained,
        pair.difference.value,
        pair.difference.error,
        *pair.interval,
    )


def images(pair: ComparedPair) -> tuple[int, ...]:
    """The values of `COUNTS`."""
    return pair.prompts, pair.images, pair.planned


def percent(estimate: Estimate | None) -> tuple[float | None, float | None]:
    """A share and its error in per cent."""
    return (None, None) if estimate is None else (100 * estimate.value, 100 * estimate.error)


def exhibit(
    results: Results,
    kind: str,
    study: Study,
    title: str,
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    figure: Any = None,
    one_score: bool = False,
) -> Exhibit:
    """An exhibit about a family and a prompt set, which its key, title and caption name; with `one_score` about one."""
    about = [study.family, study.prompts, *([study.score] if one_score else [])]
    substitute = results.plan.prompts[study.prompts].substitute_for
    note = f" The prompts, {study.prompts}, are a substitute for {substitute}." if substitute else ""
    return Exhibit(
        key="-".join(["agreement", kind, *map(slug, about)]),
        section=f"Agreement by {study.score}" if one_score else SUMMARY,
        title=f"{title}: {study.family}, prompts {study.prompts}",
        caption=caption + note,
        header=tuple(header),
        rows=tuple(map(tuple, rows)),
        figure=figure,
    )
