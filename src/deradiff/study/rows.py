"""Rows of a study's database, read back as what they must be in its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import NonNegativeInt

from deradiff.files.reading import Record, fit, parse
from deradiff.study.plan import TILES, StudyPlan

CURE = "restore the database from a copy, or begin a new study"


class StudyError(RuntimeError):
    """The study cannot be opened, read or written; the message says what to do."""


class ShownPair(Record):
    """A pair that was shown: its numbers in the plan, the method on each side (empty for noise), nine seeds."""

    participant: NonNegativeInt
    position: NonNegativeInt
    cell: NonNegativeInt
    prompt: NonNegativeInt
    left: str
    right: str
    seeds: list[NonNegativeInt]


def pair_of(plan: StudyPlan, values: Sequence[Any], where: str) -> ShownPair:
    """A row's values, in the order of `ShownPair`, as a pair of `plan`. Raises `StudyError` where it is none."""
    named = dict(zip(ShownPair.model_fields, values, strict=True))
    try:
        named["seeds"] = parse(list[int], named["seeds"], f"the seeds of {where}", "list of seeds", CURE)
        row = fit(ShownPair, named, where, "pair of this study", CURE)
    except ValueError as error:
        raise StudyError(str(error)) from None
    cells = plan.cells
    if row.cell >= len(cells):
        raise StudyError(f"{where} is of cell {row.cell}, and the plan has {len(cells)}: {CURE}")
    cell = cells[row.cell]
    configuration = plan.configurations[cell.configuration]
    if (
        row.prompt >= len(configuration.prompts)
        or not {row.left, row.right} <= {cell.first, cell.second, ""}
        or len(row.seeds) != TILES
        or not {*row.seeds} <= {*configuration.seeds}
    ):
        raise StudyError(
            f"{where} names a prompt, a method or a seed that {configuration.name!r} does not have: {CURE}"
        )
    return row
