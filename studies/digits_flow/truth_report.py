"""The table of the study of flows, made of whatever cells are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deradiff.algorithm.estimates import Estimate
from deradiff.files.reading import Record, read
from studies.digits.learned_report import averaged, between_seeds, percent, shares
from studies.digits_flow.truth import FlowCell, cells

ARMS = ("algorithm 1", "interpolated", "weighted", "particles")


class FlowCellRecord(Record):
    """A cell's file, as it must be to be read."""

    cell: dict[str, Any]
    anchor: float
    cases: list[dict[str, Any]]


def load(folder: Path) -> dict[FlowCell, dict[str, Any]]:
    """The cells in a folder. Raises `ValueError` for a file that is no cell."""
    found = {}
    for cell in cells():
        file = folder / f"{cell.name}.json"
        if file.exists():
            read(FlowCellRecord, file, "cell of a study", "run its cell again")
            found[cell] = read(dict[str, Any], file, "cell of a study", "run its cell again")
    return found


def table(found: Mapping[FlowCell, dict[str, Any]]) -> str:
    """In Markdown: a line for every method, sampler, guidance and λ, seeds averaged; errors in per cent of the shift.

    A standard error holds the noise of sampling and, with two seeds, that of training, pooled over a method's cases.
    """
    lines = [
        "| models | sampler | guidance | λ | seeds | shift | " + " | ".join(ARMS) + " | verdict |",
        "|" + "---|" * (7 + len(ARMS)),
    ]
    for method in dict.fromkeys(cell.method for cell in found):
        rows = list(zip(*(record["cases"] for cell, record in found.items() if cell.method == method), strict=True))
        noise = {arm: _noise(rows, arm) for arm in ARMS}
        for cases in rows:
            first = cases[0]
            shift = averaged([Estimate(*case["shift"]) for case in cases], 0.0)
            errors = [
                percent(averaged([shares(case, arm) for case in cases], noise[arm])) if arm in first else ""
                for arm in ARMS
            ]
            kinds = ", ".join(case["verdict"]["kind"] for case in cases if "verdict" in case)
            lines.append(
                f"| {method} | {first['scheduler']} | {first['guidance_scale']:g} | {first['lam']:g} | {len(cases)} "
                f"| {shift.value:+.3f} ± {shift.error:.3f} | {' | '.join(errors)} | {kinds} |"
            )
    return "\n".join(lines) + "\n"


def _noise(rows: list[tuple[dict[str, Any], ...]], arm: str) -> float:
    pairs = [(shares(a, arm), shares(b, arm)) for a, b, *_ in (row for row in rows if len(row) > 1) if arm in a]
    return between_seeds(pairs) if pairs else 0.0
