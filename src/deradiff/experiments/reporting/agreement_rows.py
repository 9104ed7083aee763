"""What agreement exhibits have in common: the columns of their CSV files, what their captions and keys name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deradiff.experiments.reporting.agreement_pairs import ComparedPair, Study
from deradiff.experiments.reporting.exhibits import Exhibit, table
from deradiff.experiments.results import Results
from deradiff.files.records import slug

SUMMARY = "Agreement of approximated and retrained models"

BARS = "95% intervals of the difference to the retrained model, by a paired bootstrap over prompts"


def names(pair: ComparedPair) -> dict[str, Any]:
    """The anchor and the target, as a table's cells by column."""
    return {"anchor": pair.models.anchor, "target": pair.models.target}


def numbers(pair: ComparedPair) -> dict[str, Any]:
    """Both means and their difference; standard error and interval are the difference's, by a paired bootstrap."""
    low, high = pair.interval
    return {
        "lambda": pair.models.lam,
        "approximated": pair.approximated,
        "retrained": pair.retrained,
        "difference": pair.difference.value,
        "standard_error": pair.difference.error,
        "interval_low": low,
        "interval_high": high,
    }


def images(pair: ComparedPair) -> dict[str, Any]:
    """What the numbers are of."""
    return {"prompts": pair.prompts, "images": pair.images, "planned": pair.planned}


def exhibit(
    results: Results,
    kind: str,
    about: Study | Sequence[Study],
    title: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    figure: Any = None,
) -> Exhibit:
    """An exhibit about a family and a prompt set, which its key, title and caption name: one study, or all scores'."""
    study, scores = (about, [about.score]) if isinstance(about, Study) else (about[0], [])
    substitute = results.plan.prompts[study.prompts].substitute_for
    note = f" The prompts, {study.prompts}, are a substitute for {substitute}." if substitute else ""
    return Exhibit(
        "-".join(["agreement", kind, *map(slug, [study.family, study.prompts, *scores])]),
        f"Agreement by {study.score}" if scores else SUMMARY,
        f"{title}: {study.family}, prompts {study.prompts}",
        caption + note,
        *table(rows),
        figure,
    )
